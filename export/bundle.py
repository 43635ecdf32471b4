"""Write a bundle: graphs, tokenizer, golden recordings and the manifest that vouches for all of them."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from engine.backends import open_backend
from engine.bundle import FORMAT, MANIFEST, Bundle, file_sha256
from engine.captioner import Captioner
from engine.options import DecodeOptions
from engine.verify import UNRECORDED, Golden, replay, verify
from export.checkpoint import CheckpointError
from export.onnx_graphs import write_graphs
from export.reference import Reference, TorchBackend
from export.trace import explain

GENERATION_DEFAULTS = (
    "num_beams",
    "no_repeat_ngram_size",
    "max_new_tokens",
    "max_length",
    "min_new_tokens",
    "min_length",
    "length_penalty",
    "early_stopping",
    "num_return_sequences",
)
"""Settings of the text decoder's generation config that a bundle carries, where they differ from Hugging Face's."""

WITHOUT_EFFECT = (
    # ids come from text_config, caching and bookkeeping change no caption, the rest only matters when sampling
    *("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "use_cache", "transformers_version"),
    *("_from_model_config", "return_dict_in_generate", "output_scores", "output_attentions", "output_hidden_states"),
    *("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"),
)
"""Settings that may differ from Hugging Face's defaults without changing what `generate` says."""

NEUTRAL = {"min_length": 0, "length_penalty": 1.0, "early_stopping": False}
GOLDEN_SETTINGS = (
    NEUTRAL | {"num_beams": 1, "no_repeat_ngram_size": 0, "max_new_tokens": 24},
    NEUTRAL | {"num_beams": 3, "no_repeat_ngram_size": 0, "max_new_tokens": 12, "prompt": "a picture of the"},
    NEUTRAL | {"num_beams": 4, "no_repeat_ngram_size": 3, "max_new_tokens": 30, "min_new_tokens": 30},
    NEUTRAL
    | {
        "num_beams": 4,
        "no_repeat_ngram_size": 2,
        "max_new_tokens": 20,
        "length_penalty": 2.0,
        "early_stopping": "never",
    },
)
"""Each sets everything, so that a checkpoint's own defaults play no part."""
GOLDEN_IMAGES = 3
LONGEST_PROMPT = 24
"""Room kept for the golden prompt where a checkpoint has few positions."""


class ExportError(Exception):
    """An export did not end in a bundle that says what PyTorch says."""


def export_bundle(checkpoint: Path, out: Path, say: Callable[[str], None], *, image_size: int | None = None) -> Bundle:
    """Export a BLIP captioning checkpoint in float32 and return the bundle, after replaying its golden recordings.

    Everything is written beside `out` and moved there at the end, so a failed export leaves nothing behind; an
    earlier bundle at `out` is replaced, anything else there refused. Raises CheckpointError or ExportError.
    """
    if not _is_replaceable(out):
        raise ExportError(f"{out} exists and is more than a bundle: choose another --out")
    reference = Reference.load(checkpoint, image_size)
    check_supported(reference, checkpoint)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as temporary:
        draft = Path(temporary) / "bundle"
        draft.mkdir()
        manifest = _manifest(reference, checkpoint)  # before optimum switches use_cache off in every config it meets
        _write_files(reference, draft, say)
        _write_manifest(draft, manifest)
        say("replaying the golden recordings")
        _settle_ties(reference, draft, say)
        _write_manifest(draft, manifest)
        bundle = Bundle.load(draft)
        failed = [check for check in verify(bundle, open_backend(bundle, "cpu")) if not check.passed]
        if failed:
            raise ExportError(f"{checkpoint}: the graphs do not say what PyTorch says: {failed}")
        if out.exists():
            out.replace(Path(temporary) / "replaced")
        draft.replace(out)
    return Bundle.load(out)


def _write_manifest(draft: Path, manifest: dict) -> None:
    files = {path.name: file_sha256(path) for path in sorted(draft.iterdir()) if path.name != MANIFEST}
    text = json.dumps(manifest | {"files": files}, indent=1, sort_keys=True)
    (draft / MANIFEST).write_text(text + "\n", encoding="utf-8")


def _settle_ties(reference: Reference, draft: Path, say: Callable[[str], None]) -> None:
    """Leave golden pictures out of a setting where the engine says otherwise only because two candidates tie."""
    captioner, path = Captioner.load(draft, backend="cpu"), draft / "golden.npz"
    golden = Golden.load(path)
    for setting, options in enumerate(golden.settings):
        found = replay(captioner, golden, setting)
        for i, theirs in enumerate(golden.expected(setting)):
            if theirs is None or found[i].ids == theirs:
                continue
            divergence = explain(
                captioner,
                TorchBackend(reference),
                golden.pixel_values[i],
                DecodeOptions(**options),
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


def _write_files(reference: Reference, out: Path, say: Callable[[str], None]) -> None:
    processor = reference.image_processor
    rescale = processor.rescale_factor if processor.do_rescale else 1.0
    mean, std = _mean_and_std(reference)
    say("recording golden outputs")
    _record_golden(reference).save(out / "golden.npz")
    tokenizer = reference.tokenizer.backend_tokenizer
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.save(str(out / "tokenizer.json"))
    say("exporting graphs")
    write_graphs(reference.model, out, rescale, mean, std)


def _mean_and_std(reference: Reference) -> tuple[list[float], list[float]]:
    """Return the mean and standard deviation that pixels are normalised with; 0 and 1 where they are not."""
    processor = reference.image_processor
    if not processor.do_normalize:
        return [0.0] * 3, [1.0] * 3
    return processor.image_mean, processor.image_std


def check_supported(reference: Reference, checkpoint: Path) -> None:
    """Raise CheckpointError for settings under which Hugging Face would caption in ways the engine cannot."""
    text = reference.model.config.text_config
    settings = reference.model.text_decoder.generation_config.to_diff_dict()
    unknown = {
        name: value
        for name, value in settings.items()
        if name not in GENERATION_DEFAULTS + WITHOUT_EFFECT and value is not None
    }
    if not reference.image_processor.do_resize:
        unknown["do_resize"] = False
    if getattr(text, "position_embedding_type", "absolute") != "absolute":
        unknown["position_embedding_type"] = text.position_embedding_type
    if unknown:
        listed = ", ".join(f"{name}={value!r}" for name, value in sorted(unknown.items()))
        raise CheckpointError(
            f"{checkpoint} asks for what the engine does not do ({listed}): remove it and export again"
        )


def golden_pictures(size: int) -> np.ndarray:
    """Return smooth synthetic pictures u8[N,size,size,3], the same on every machine: sums of a few cosine waves."""
    rng = np.random.default_rng(20260101)
    y, x = np.mgrid[0:size, 0:size] / size
    pictures = []
    for _ in range(GOLDEN_IMAGES):
        channels = []
        for _ in range(3):
            waves = [np.cos(2 * np.pi * (fx * x + fy * y) + p) for fx, fy, p in rng.uniform(-4, 4, (4, 3))]
            channels.append(np.sum(waves, 0))
        picture = np.stack(channels, -1)
        span = picture.max() - picture.min()
        pictures.append(np.round((picture - picture.min()) / span * 255).astype(np.uint8))
    return np.stack(pictures)


def _record_golden(reference: Reference) -> Golden:
    """Record `generate` on synthetic pictures in every one of GOLDEN_SETTINGS."""
    pictures = golden_pictures(reference.model.config.vision_config.image_size)
    pixel_values = reference.pixels([Image.fromarray(picture) for picture in pictures])
    room = max(1, reference.model.config.text_config.max_position_embeddings - LONGEST_PROMPT)
    lengths = ("max_new_tokens", "min_new_tokens")
    settings = [s | {name: min(s[name], room) for name in lengths if name in s} for s in GOLDEN_SETTINGS]
    all_ids, all_scores = [], []
    for setting in settings:
        captions = [best for best, *_ in reference.generate(pixel_values, DecodeOptions(**setting))]
        ids = np.full((len(captions), max(len(c.ids) for c in captions)), UNRECORDED, np.int64)
        for row, c in zip(ids, captions, strict=True):
            row[: len(c.ids)] = c.ids
        all_ids.append(ids)
        all_scores.append(np.array([np.nan if c.score is None else c.score for c in captions], np.float32))
    return Golden(pictures, settings, all_ids, all_scores)


def generation_defaults(reference: Reference) -> dict:
    """Return the checkpoint's generation settings that differ from Hugging Face's own."""
    return {
        name: value
        for name, value in reference.model.text_decoder.generation_config.to_diff_dict().items()
        if name in GENERATION_DEFAULTS and value is not None
    }


def _manifest(reference: Reference, checkpoint: Path) -> dict:
    """Return everything but the files' sha256."""
    model, processor = reference.model, reference.image_processor
    text, vision = model.config.text_config, model.config.vision_config
    mean, std = _mean_and_std(reference)
    return {
        "format": FORMAT,
        "precision": "fp32",
        "model": {
            "num_layers": text.num_hidden_layers,
            "num_heads": text.num_attention_heads,
            "head_width": text.hidden_size // text.num_attention_heads,
            "vocab_size": text.vocab_size,
            "max_positions": text.max_position_embeddings,
            "encoder_positions": (vision.image_size // vision.patch_size) ** 2 + 1,
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
        "clean_up_tokenization_spaces": bool(reference.tokenizer.clean_up_tokenization_spaces),
        "checkpoint": {"name": checkpoint.resolve().name, "sha256": checkpoint_sha256(checkpoint)},
        "restore": {  # what `python -m export.restore` needs and the engine does not read
            "config": model.config.to_diff_dict(),
            "image_processor": processor.to_dict(),
            "tokenizer": {
                name: reference.tokenizer.init_kwargs.get(name) for name in ("do_lower_case", "strip_accents")
            },
        },
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "optimum", "onnx")},
    }


def checkpoint_sha256(checkpoint: Path) -> str:
    """Hash the sha256 of every weights file, in name order."""
    digests = "".join(file_sha256(path) for path in sorted(checkpoint.glob("*.safetensors")))
    return hashlib.sha256(digests.encode()).hexdigest()
