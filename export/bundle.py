"""What a bundle's manifest says of the checkpoint it was made from."""

from __future__ import annotations

import copy
import errno
import glob
import hashlib
import importlib.metadata
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np
from PIL import Image

from engine.backends import Backend, open_backend
from engine.bundle.manifest import FORMAT, MANIFEST, PRECISIONS, Bundle
from engine.bundle.open import on_halves
from engine.captioner import Captioner
from engine.errors import ExportError, OutputError
from engine.files.atomic import file_sha256
from engine.files.lock import OutputLock
from engine.machine.verify import Golden, first_difference, replay, same_on_halves, verify, verify_halves
from engine.options import GENERATION_SETTINGS, options_from
from engine.runtime import Runtime
from export.checkpoints.files import weight_files
from export.checkpoints.load import encoder_positions
from export.checkpoints.settings import assumed_settings, check_supported, ignored_settings
from export.graphs.exporters import write_graphs
from export.precision import PrecisionReport, ScoredCaption, compare_captions, encoder_error, forced_log_prob, summary
from export.reference.golden import record_golden
from export.reference.huggingface import Reference, normalisation
from export.reference.torch_backend import TorchBackend
from export.reference.trace import judge


def generation_defaults(reference: Reference) -> dict:
    """Return the checkpoint's generation settings that differ from Hugging Face's own."""
    return {
        name: value
        for name, value in reference.model.text_decoder.generation_config.to_diff_dict().items()
        if name in GENERATION_SETTINGS and value is not None
    }


def describe_checkpoint(reference: Reference, checkpoint: Path) -> dict:
    """Return everything but the files' sha256."""
    model, processor = reference.model, reference.image_processor
    text, vision = model.config.text_config, model.config.vision_config
    _, mean, std = normalisation(reference.image_processor)
    return {
        "format": FORMAT,
        "precision": "fp32",
        "model": {
            "num_layers": text.num_hidden_layers,
            "num_heads": text.num_attention_heads,
            "head_width": text.hidden_size // text.num_attention_heads,
            "vocab_size": text.vocab_size,
            "max_positions": text.max_position_embeddings,
            "encoder_positions": encoder_positions(vision),
        },
        "image": {
            "height": vision.image_size,
            "width": vision.image_size,
            "resample": Image.Resampling(processor.resample).name.lower(),
            "mean": mean,
            "std": std,
        },
        "tokens": {"bos": text.bos_token_id, "eos": text.sep_token_id, "pad": text.pad_token_id},
        "generation": generation_defaults(reference),
        "generation_from": dict.fromkeys(generation_defaults(reference), "text_config of config.json"),
        "clean_up_tokenization_spaces": bool(reference.tokenizer.clean_up_tokenization_spaces),
        "checkpoint": {
            "name": checkpoint.resolve().name,
            "sha256": checkpoint_sha256(checkpoint),
            "files": {path.name: file_sha256(path) for path in weight_files(checkpoint)},
        },
        "restore": {  # what `python -m export.restore` needs and the engine does not read
            "config": model.config.to_diff_dict(),
            "image_processor": processor.to_dict(),
            "tokenizer": {
                name: reference.tokenizer.init_kwargs.get(name) for name in ("do_lower_case", "strip_accents")
            },
        },
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "onnx")},
    }


def checkpoint_sha256(checkpoint: Path) -> str:
    """Hash the sha256 of every weights file, in name order."""
    digests = "".join(file_sha256(path) for path in weight_files(checkpoint))
    return hashlib.sha256(digests.encode()).hexdigest()


def write_manifest(draft: Path, manifest: dict) -> None:
    """Write a bundle's manifest with the sha256 of every other file in its directory."""
    files = {path.name: file_sha256(path) for path in sorted(draft.iterdir()) if path.name != MANIFEST}
    text = json.dumps(manifest | {"files": files}, indent=1, sort_keys=True)
    (draft / MANIFEST).write_text(text + "\n", encoding="utf-8")


ENCODER_BOUND = {"fp16": 0.05, "int8": 0.25}
"""Largest accepted encoder error over its own peak (export.precision.encoder_error), from the demo (benchmarks/LOG.md).
fp16: it is off by 0.008 with every operator rounded; roundings add up like a random walk, so 24 layers for its 8 make
0.014, and the bound is three times that; what overflows is off by far more or not finite. int8: it is off by 0.085,
three times that; 0.25 with one scale for all of a weight, and then a fifth of the captions change."""


def convert(
    reference: Reference, float32: Bundle, out: Path, precision: str, exporter: str, log: Callable[[str], None]
) -> Path:
    """Write the bundle of `precision` ("fp16" or "int8") for a float32 one into the new directory `out`; return it.

    Raises ExportError where the encoder is off by more than ENCODER_BOUND, a number overflows, or `verify` fails.
    """
    out.mkdir()
    for name in ("tokenizer.json", "golden.npz"):
        shutil.copy(float32.path / name, out / name)
    manifest = json.loads((float32.path / MANIFEST).read_text(encoding="utf-8")) | {"precision": precision}
    log(f"exporting graphs in {precision}")
    model = copy.deepcopy(reference.model).half() if precision == "fp16" else reference.model
    write_graphs(model, out, normalisation(reference.image_processor), is_int8=precision == "int8", exporter=exporter)
    write_manifest(out, manifest)
    ours, theirs = Captioner.load(out, backend="cpu"), Captioner(float32, open_backend(float32, Runtime("cpu")))
    log(f"comparing {precision} with float32 on the golden pictures")
    others: list[Backend] = [ours.backend]
    if precision == "fp16":
        others.append(TorchBackend(model, reference.image_processor))
    error = _check_numbers(theirs, others, precision)
    reports = _settle_differences(theirs, ours, log)
    manifest["conversion"] = {
        "encoder_error": error,
        "encoder_bound": ENCODER_BOUND[precision],
        "golden": [asdict(report) for report in reports],
    }
    write_manifest(out, manifest)
    bundle = Bundle.load(out)
    checks = verify(bundle, ours.backend) + verify_halves(bundle, Runtime("cpu"))
    if failed := [check for check in checks if not check.passed]:
        raise ExportError(
            f"{precision} scores captions too differently from float32: {'; '.join(map(str, failed))}: export fp32"
        )
    return out


def _check_numbers(float32: Captioner, others: list[Backend], precision: str) -> float:
    """Return the worst encoder error on the golden pictures; raise ExportError beyond the bound or on an overflow.

    float16 is looked at twice: ONNX Runtime's CPU provider computes much of such a graph in float32, torch rounds after
    every operator as a GPU does, so only torch shows what overflows there.
    """
    golden = Golden.load(float32.bundle.path / "golden.npz")
    error = max(encoder_error(float32.backend, other, golden.pixel_values) for other in others)
    bound = ENCODER_BOUND[precision]
    if not error <= bound:
        what = f"off by {error:.2g} of its own peak" if np.isfinite(error) else "not finite"
        raise ExportError(f"in {precision} the encoder is {what}, {bound} is the bound: export fp32")
    vocab_size = float32.bundle.model.vocab_size
    for picture, (hypothesis,) in zip(golden.pixel_values, replay(float32, golden, 0), strict=True):
        for other in others:
            if not np.isfinite(forced_log_prob(other, vocab_size, picture, hypothesis.ids, 1)):
                raise ExportError(f"in {precision} the decoder's log-probabilities are not finite: export fp32")
    return error


def _settle_differences(float32: Captioner, ours: Captioner, log: Callable[[str], None]) -> list[PrecisionReport]:
    """Compare the golden captions, and remove images that get another caption from our bundle's recording."""
    path = ours.bundle.path / "golden.npz"
    golden = Golden.load(path)
    pictures = [(f"golden picture {i}", picture) for i, picture in enumerate(golden.pixel_values)]
    reports = []
    for setting, options in enumerate(golden.settings):
        replayed = replay(ours, golden, setting)
        theirs, found = (
            [ScoredCaption(best.ids, best.score) for best, *_ in captions]
            for captions in (replay(float32, golden, setting), replayed)
        )
        report = compare_captions(float32, options_from({}, options), pictures, theirs, found)
        log(f"{', '.join(f'{key} {value}' for key, value in options.items())}: {summary(report)}")
        for i, (expected, other) in enumerate(zip(theirs, found, strict=True)):
            if expected.ids != other.ids:
                golden.skip(setting, i, 0)
            elif rank := first_difference(replayed[i], golden.n_best(setting)[i]):
                golden.skip(setting, i, rank)
        reports.append(report)
    if not any(expected for setting in range(len(golden.settings)) for expected in golden.expected(setting)):
        raise ExportError(f"{ours.bundle.precision} captions no golden picture as float32 does: export fp32")
    golden.save(path)
    return reports


REPLACED = "replaced"
"""Where an earlier bundle waits, in the draft's folder, until the new one has its place."""


def export_bundle(
    checkpoint: Path,
    out: Path,
    log: Callable[[str], None],
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
        log(f"note: {line}")
    with _drafting(out, log) as folder:
        draft = folder / "bundle"
        draft.mkdir()
        # before the graphs are written: optimum switches use_cache off in every config it meets
        manifest = describe_checkpoint(reference, checkpoint)
        _write_files(reference, draft, exporter, log)
        write_manifest(draft, manifest)
        log("replaying the golden recordings")
        _settle_ties(reference, draft, log)
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
            draft = convert(reference, bundle, folder / precision, precision, exporter, log)
        _move(draft, out)
    return Bundle.load(out)


@contextmanager
def _drafting(out: Path, log: Callable[[str], None]) -> Iterator[Path]:
    """Hold `out` for this export alone and make a folder next to it for drafts, removed at the end.

    What killed exports to `out` left behind is removed first; the lock shows that no live one needs it. Raises
    OutputError, which names the folder, where files cannot be written.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with OutputLock(out) as lock:
            if lock.note:
                log(lock.note)
            _remove_dead_drafts(out, log)
            with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as temporary:
                yield Path(temporary)
    except OSError as error:
        if error.errno == errno.EPIPE:  # not a file of ours: whoever read our messages has left
            raise
        raise OutputError(
            f"{out.parent} cannot be written ({error.strerror or error}): check its free space and permissions, or "
            "choose another --out"
        ) from error


def _remove_dead_drafts(out: Path, log: Callable[[str], None]) -> None:
    """Remove draft folders of killed exports; an earlier bundle that one of them had moved aside is put back first."""
    for folder in out.parent.glob(f".{glob.escape(out.name)}.*"):
        contents = {entry.name for entry in folder.iterdir()} if _is_draft_folder(folder, out) else {""}
        if not contents <= {"bundle", REPLACED, *PRECISIONS}:
            continue
        if REPLACED in contents and not out.exists():
            (folder / REPLACED).replace(out)
            log(f"note: {out} is back, which a killed export had moved to {folder}")
        shutil.rmtree(folder)
        log(f"note: removed {folder}, the draft of a killed export")


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


def _settle_ties(reference: Reference, draft: Path, log: Callable[[str], None]) -> None:
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
                log(f"golden image {i} is skipped in setting {setting}: a tie, {divergence.gap:.1e} apart")
                golden.skip(setting, i, rank)
    for setting in range(len(golden.settings)):
        if not any(golden.expected(setting)):
            log(f"note: every golden image ties in setting {setting}: `engine verify` cannot check it")
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


def _write_files(reference: Reference, out: Path, exporter: str, log: Callable[[str], None]) -> None:
    log("recording golden outputs")
    record_golden(reference).save(out / "golden.npz")
    tokenizer = reference.tokenizer.backend_tokenizer
    tokenizer.no_padding()
    tokenizer.no_truncation()
    # written by Python, whose errors name the file: the tokenizer's own save raises a bare Exception on a full disk
    (out / "tokenizer.json").write_bytes(tokenizer.to_str(pretty=True).encode())
    log("exporting graphs")
    write_graphs(reference.model, out, normalisation(reference.image_processor), exporter=exporter)
