"""Write a bundle: graphs, tokenizer, golden recordings and the manifest with the sha256 of all of them."""

from __future__ import annotations

import errno
import glob
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

from engine.backends import open_backend
from engine.bundle.ensemble import on_halves
from engine.bundle.manifest import FORMAT, MANIFEST, PRECISIONS, Bundle
from engine.captioner import Captioner
from engine.errors import ExportError, OutputError
from engine.files.lock import OutputLock
from engine.machine.verify import Golden, first_difference, replay, same_on_halves, verify, verify_halves
from engine.options import options_from
from engine.runtime import Runtime
from export.checkpoints.generation import check_supported, ignored_settings
from export.checkpoints.processor import assumed_settings
from export.conversion import convert
from export.graphs.onnx_graphs import write_graphs
from export.manifest import describe_checkpoint, write_manifest
from export.reference.golden import record_golden
from export.reference.huggingface import Reference, normalisation
from export.reference.trace import judge

REPLACED = "replaced"
"""Where an earlier bundle waits, in the draft's folder, until the new one has its place."""


def export_bundle(
    checkpoint: Path,
    out: Path,
    say: Callable[[str], None],
    *,
    precision: str = "fp32",
    image_size: int | None = None,
    exporter: str = "torch",
) -> Bundle:
    """Export a BLIP captioning checkpoint and return the bundle, after replaying its golden recordings.

    Precisions other than fp32 are made from a float32 bundle that has passed, and compared with it; see convert.
    Everything is written next to `out` and moved there at the end, so a failed export leaves nothing behind. An
    earlier bundle at `out` is replaced, anything else there is refused. Raises CheckpointError, ExportError,
    OutputError or, while another export writes `out`, UsageError.
    """
    if not _is_replaceable(out):
        raise ExportError(f"{out} exists and is more than a bundle: choose another --out")
    reference = Reference.load(checkpoint, image_size)
    check_supported(reference.model, checkpoint)
    for line in (*ignored_settings(checkpoint), *assumed_settings(checkpoint)):
        say(f"note: {line}")
    with _drafting(out, say) as folder:
        draft = folder / "bundle"
        draft.mkdir()
        # before the graphs are written: optimum switches use_cache off in every config it meets
        manifest = describe_checkpoint(reference, checkpoint)
        _write_files(reference, draft, exporter, say)
        write_manifest(draft, manifest)
        say("replaying the golden recordings")
        _settle_ties(reference, draft, say)
        write_manifest(draft, manifest)
        bundle = Bundle.load(draft)
        runtime = Runtime("cpu")
        checks = verify(bundle, open_backend(bundle, runtime)) + verify_halves(bundle, runtime)
        if failed := [check for check in checks if not check.passed]:
            more = f", and {len(failed) - 1} more settings fail" if failed[1:] else ""
            raise ExportError(
                f"{checkpoint}: the exported graphs do not give PyTorch's captions, and no tie explains it: {failed[0]}"
                f"{more}. No bundle was written: report this as a bug"
            )
        if precision != "fp32":
            draft = convert(reference, bundle, folder / precision, precision, exporter, say)
        _move(draft, out)
    return Bundle.load(out)


@contextmanager
def _drafting(out: Path, say: Callable[[str], None]) -> Iterator[Path]:
    """Hold `out` for this export alone and make a folder next to it for drafts, removed at the end.

    What killed exports to `out` left behind is removed first; the lock shows that no live one needs it. Raises
    OutputError, which names the folder, where files cannot be written.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with OutputLock(out) as lock:
            if lock.note:
                say(lock.note)
            _remove_dead_drafts(out, say)
            with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as temporary:
                yield Path(temporary)
    except OSError as error:
        if error.errno == errno.EPIPE:  # not a file of ours: whoever read our messages has left
            raise
        raise OutputError(
            f"{out.parent} cannot be written ({error.strerror or error}): check its free space and permissions, or "
            "choose another --out"
        ) from error


def _remove_dead_drafts(out: Path, say: Callable[[str], None]) -> None:
    """Remove draft folders of killed exports; an earlier bundle that one of them had moved aside is put back first."""
    for folder in out.parent.glob(f".{glob.escape(out.name)}.*"):
        contents = {entry.name for entry in folder.iterdir()} if _is_draft_folder(folder, out) else {""}
        if not contents <= {"bundle", REPLACED, *PRECISIONS}:
            continue
        if REPLACED in contents and not out.exists():
            (folder / REPLACED).replace(out)
            say(f"note: {out} is back, which a killed export had moved to {folder}")
        shutil.rmtree(folder)
        say(f"note: removed {folder}, the draft of a killed export")


def _is_draft_folder(folder: Path, out: Path) -> bool:
    """Return whether a folder has the name that tempfile gives to drafts of `out`: 8 of its characters at the end."""
    is_ours = re.fullmatch(r"[a-z0-9_]{8}", folder.name.removeprefix(f".{out.name}."))
    return bool(is_ours) and folder.is_dir() and not folder.is_symlink()


def _move(draft: Path, out: Path) -> None:
    """Move a draft to `out`; an earlier bundle there is put back if that fails."""
    replaced = draft.parent / REPLACED
    if out.exists():
        out.replace(replaced)
    try:
        draft.replace(out)
    except BaseException:
        if replaced.exists():
            replaced.replace(out)
        raise


def _settle_ties(reference: Reference, draft: Path, say: Callable[[str], None]) -> None:
    """Remove a golden image from a setting's recording where the engine's caption differs because of a tie."""
    whole, path = Captioner.load(draft, backend="cpu"), draft / "golden.npz"
    golden, single = Golden.load(path), on_halves(whole.bundle)
    todo = [(whole, setting) for setting in range(len(golden.settings))]
    if single is not None:
        halves = Captioner(single, open_backend(single, Runtime("cpu")))
        todo += [(halves, setting) for setting in same_on_halves(golden)]
    for captioner, setting in todo:
        found, options = replay(captioner, golden, setting), options_from({}, golden.settings[setting])
        for i, expected in enumerate(golden.n_best(setting)):
            rank = first_difference(found[i], expected)
            if rank is None:
                continue
            picture = Image.fromarray(golden.pixel_values[i])
            verdict, divergence = judge(reference, captioner, picture, options, found[i][rank], rank)
            if verdict != "real":
                say(f"golden image {i} is skipped in setting {setting}: a tie, {divergence.gap:.1e} apart")
                golden.skip(setting, i, rank)
    for setting in range(len(golden.settings)):
        if not any(golden.expected(setting)):
            say(f"note: every golden image ties in setting {setting}: `engine verify` cannot check it")
    golden.save(path)


def _is_replaceable(out: Path) -> bool:
    """Return whether `out` does not exist, is an empty directory, or is a bundle without other files."""
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        return False
    present = {entry.name for entry in out.iterdir()} if out.exists() else set()
    if not present:
        return True
    try:
        manifest = json.loads((out / MANIFEST).read_text(encoding="utf-8"))
        return manifest["format"] == FORMAT and present <= {MANIFEST, *manifest["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _write_files(reference: Reference, out: Path, exporter: str, say: Callable[[str], None]) -> None:
    say("recording golden outputs")
    record_golden(reference).save(out / "golden.npz")
    tokenizer = reference.tokenizer.backend_tokenizer
    tokenizer.no_padding()
    tokenizer.no_truncation()
    # written by Python, whose errors name the file: the tokenizer's own save raises a bare Exception on a full disk
    (out / "tokenizer.json").write_bytes(tokenizer.to_str(pretty=True).encode())
    say("exporting graphs")
    write_graphs(reference.model, out, normalisation(reference.image_processor), exporter=exporter)
