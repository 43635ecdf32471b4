"""What a bundle's manifest says of the checkpoint it was made from."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from pathlib import Path

from PIL import Image

from engine.bundle.manifest import FORMAT, MANIFEST
from engine.files.atomic import file_sha256
from engine.options import GENERATION_SETTINGS
from export.checkpoints.files import weight_files
from export.checkpoints.load import encoder_positions
from export.reference.huggingface import Reference, normalisation


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
