"""Convert a checkpoint to a bundle without torch: the graphs of its architecture with its weights."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from engine.bundle.manifest import FORMAT, MANIFEST, PER_ROW, ModelDims
from engine.checkpoints.graphs import GraphSet, Number, size_of
from engine.checkpoints.int8 import BEST_LOGITS, rotate
from engine.checkpoints.read import Checkpoint
from engine.checkpoints.vision_encoder_decoder import POSITION_OFFSET
from engine.checkpoints.write import write_graphs
from engine.errors import CheckpointError, OutputError
from engine.version import __version__

NOT_RECORDED, NOT_CHECKED = "not recorded", "not checked"


def convert(
    checkpoint: Checkpoint,
    graphs: GraphSet,
    out: Path,
    *,
    source: Mapping[str, str],
    log: Callable[[str], None],
) -> None:
    """Write the bundle of a checkpoint into the folder `out`, which is empty or new, one tensor at a time.

    `graphs` are those of find_graphs.
    The files are those of `python -m export`, byte for byte, but for the manifest and the recorded answers of PyTorch,
    which need PyTorch. `source` says where the checkpoint comes from, such as {"hub": ..., "commit": ...}. Nothing is
    flushed to the disk. Raises CheckpointError if there are no graphs for the checkpoint or its weights do not fit
    them, and OutputError if a file cannot be written; the caller then removes `out`.
    """
    image = checkpoint.image
    numbers = parameters(checkpoint.model, image.height, checkpoint.rescale, image.mean, image.std)
    _check_weights(checkpoint, graphs, numbers)
    log(f"writing the graphs of {graphs.architecture} in {graphs.precision} (graph set {graphs.version})")
    try:
        out.mkdir(exist_ok=True)
        weights = rotate(checkpoint.weights, checkpoint.residual if graphs.precision == "int8" else None)
        files = write_graphs(graphs.graphs, weights, numbers, out)
        tokenizer = checkpoint.tokenizer.encode()
        (out / "tokenizer.json").write_bytes(tokenizer)
        files["tokenizer.json"] = hashlib.sha256(tokenizer).hexdigest()
        manifest = _manifest(checkpoint, graphs, source) | {"files": files}
        text = json.dumps(manifest, indent=1, sort_keys=True) + "\n"
        (out / MANIFEST).write_text(text, encoding="utf-8")
    except OSError as error:
        raise OutputError(
            f"{out} cannot be written: {error.strerror or error}: make room, or choose another folder"
        ) from error


def parameters(
    model: ModelDims, image_size: int, rescale: float, mean: Sequence[float], std: Sequence[float]
) -> dict[str, Number]:
    """Return the values that graphs take from a checkpoint rather than from its architecture."""
    return {
        "image_size": image_size,
        "encoder_positions": model.encoder_positions,
        "patches_per_side": math.isqrt(model.encoder_positions - 1),
        "patches": model.encoder_positions - 1,
        "vocab_size": model.vocab_size,
        "max_positions": model.max_positions,
        "position_rows": model.max_positions + POSITION_OFFSET,
        "rescale": rescale,
        "image_mean": tuple(mean),
        "image_std": tuple(std),
    }


def _check_weights(checkpoint: Checkpoint, graphs: GraphSet, numbers: Mapping[str, Number]) -> None:
    """Raise CheckpointError if a weight is missing, has another shape, or differs from one that it is tied to.

    Also if the vocabulary is too small for the head of int8 graphs.
    """
    vocab_size = checkpoint.model.vocab_size
    if graphs.precision == "int8" and vocab_size <= BEST_LOGITS:
        raise CheckpointError(
            f"the checkpoint has {vocab_size} tokens, but int8 needs more than {BEST_LOGITS}: use --precision fp32"
        )
    for name, sizes in graphs.weights.items():
        expected = tuple(size_of(size, numbers) for size in sizes)
        if name not in checkpoint.weights:
            raise CheckpointError(
                f"the checkpoint has no weight {name}: it is incomplete, or not of {graphs.architecture}"
            )
        shape = checkpoint.weights.shape(name)
        if shape != expected:
            raise CheckpointError(
                f"the weight {name} has the shape {shape}, but {expected} according to config.json: use the "
                "config.json that the weights were saved with"
            )
    weights = checkpoint.weights
    for name, original in graphs.tied.items():
        if name in weights and original in weights and not weights.are_equal(name, original):
            raise CheckpointError(
                f"{name} differs from {original}, but the graphs of {graphs.architecture} use one weight for both: "
                "export the checkpoint with `python -m export`"
            )


def _manifest(checkpoint: Checkpoint, graphs: GraphSet, source: Mapping[str, str]) -> dict[str, Any]:
    """Return the manifest, without the sha256 of the bundle's files."""
    converted = {"architecture": graphs.architecture, "graphs": graphs.version, "golden": NOT_RECORDED}
    if graphs.precision != "fp32":  # the export measures the error of the encoder, and compares captions
        converted["bounds"] = NOT_CHECKED
    manifest = {
        "format": FORMAT,
        "family": checkpoint.family,
        "precision": graphs.precision,
        "model": asdict(checkpoint.model),
        "image": checkpoint.image.as_json(),
        "tokens": asdict(checkpoint.tokens),
        **({"tasks": dict(checkpoint.tasks)} if checkpoint.tasks else {}),
        "generation": dict(checkpoint.generation),
        "generation_from": dict(checkpoint.generation_from),
        "clean_up_tokenization_spaces": checkpoint.clean_up_tokenization_spaces,
        "checkpoint": {**checkpoint.description, **source},
        "converted": converted,
        "versions": {"engine": __version__},
    }
    if graphs.precision == "int8":
        manifest["activation_scales"] = PER_ROW
    return manifest
