"""Write a bundle: graphs, tokenizer, golden recordings and the manifest that vouches for all of them."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

from engine.backends import open_backend
from engine.bundle.ensemble import on_halves
from engine.bundle.manifest import FORMAT, MANIFEST, Bundle
from engine.captioner import Captioner
from engine.errors import ExportError
from engine.machine.verify import UNRECORDED, Golden, replay, same_on_halves, verify, verify_halves
from engine.options import options_from
from engine.runtime import Runtime
from export.checkpoints.generation import check_supported, ignored_settings
from export.checkpoints.processor import assumed_settings
from export.conversion import convert
from export.graphs.onnx_graphs import write_graphs
from export.manifest import describe_checkpoint, write_manifest
from export.reference.golden import record_golden
from export.reference.huggingface import Reference, UncachedBackend, normalisation
from export.reference.trace import explain


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
    Everything is written beside `out` and moved there at the end, so a failed export leaves nothing behind; an
    earlier bundle at `out` is replaced, anything else there refused. Raises CheckpointError or ExportError.
    """
    if not _is_replaceable(out):
        raise ExportError(f"{out} exists and is more than a bundle: choose another --out")
    reference = Reference.load(checkpoint, image_size)
    check_supported(reference.model, checkpoint)
    for line in (*ignored_settings(checkpoint), *assumed_settings(checkpoint)):
        say(f"note: {line}")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as temporary:
        draft = Path(temporary) / "bundle"
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
            raise ExportError(f"{checkpoint}: the graphs do not say what PyTorch says: {failed}")
        if precision != "fp32":
            draft = convert(reference, bundle, Path(temporary) / precision, precision, exporter, say)
        if out.exists():
            out.replace(Path(temporary) / "replaced")
        draft.replace(out)
    return Bundle.load(out)


def _settle_ties(reference: Reference, draft: Path, say: Callable[[str], None]) -> None:
    """Leave golden pictures out of a setting where the engine says otherwise only because two candidates tie."""
    whole, path = Captioner.load(draft, backend="cpu"), draft / "golden.npz"
    golden, single = Golden.load(path), on_halves(whole.bundle)
    todo = [(whole, setting) for setting in range(len(golden.settings))]
    if single is not None:
        halves = Captioner(single, open_backend(single, Runtime("cpu")))
        todo += [(halves, setting) for setting in same_on_halves(golden)]
    for captioner, setting in todo:
        found = replay(captioner, golden, setting)
        for i, theirs in enumerate(golden.expected(setting)):
            if theirs is None or found[i].ids == theirs:
                continue
            divergence = explain(
                captioner,
                UncachedBackend(reference),
                golden.pixel_values[i],
                options_from({}, golden.settings[setting]),
                ours=found[i].ids,
                theirs=theirs,
            )
            if divergence.is_tie:
                say(f"golden picture {i} left out of setting {setting}: a tie, {divergence.gap:.1e} apart")
                golden.ids[setting][i] = UNRECORDED
    golden.save(path)


def _is_replaceable(out: Path) -> bool:
    """Return whether `out` is nothing yet, an empty directory, or a bundle and nothing besides."""
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
    tokenizer.save(str(out / "tokenizer.json"))
    say("exporting graphs")
    write_graphs(reference.model, out, normalisation(reference.image_processor), exporter=exporter)
