"""Restore the checkpoint of a bundle. The graphs store the checkpoint's tensors under their original names.

    python -m export.restore --bundle engine/assets/demo --out DIR

With it, anyone who has only a bundle can run Hugging Face on the same weights and compare the captions.
"""

from __future__ import annotations

import json
from pathlib import Path

import click
import onnx
import torch
from onnx import numpy_helper

from engine.bundle.manifest import MANIFEST
from engine.bundle.open import open_bundle
from engine.checkpoints.weights import NO_WEIGHTS
from engine.checkpoints.write import FP16_SUFFIX
from engine.cli.shared import PATH, OneLine
from engine.errors import EngineError, counted
from export.checkpoints.settings import restored_tokenizer
from export.families import FAMILIES


def restore_checkpoint(bundle_dir: Path, out: Path) -> Path:
    """Write a bundle's weights, config, image processor and tokenizer in Hugging Face's layout to `out` and return
    `out`.

    Weights that captions do not depend on, which a bundle lacks, become 0. Raises EngineError if the bundle is not fp32
    or lacks other weights.
    """
    bundle = open_bundle(bundle_dir)
    if bundle.precision != "fp32":
        raise EngineError(
            f"the weights of {bundle_dir} are rounded to {bundle.precision}: restore from the fp32 bundle"
        )
    manifest = json.loads((bundle.path / MANIFEST).read_text(encoding="utf-8"))
    if "restore" not in manifest:
        raise EngineError(
            f"{bundle_dir} was converted without torch, and lacks its checkpoint's settings: use the checkpoint itself"
        )
    source = manifest["restore"]
    family = FAMILIES[source["config"]["model_type"]]
    model = family.model_class(family.config_class.from_dict(source["config"])).eval()
    weights: dict[str, torch.Tensor] = {}
    for name in ("encoder", "decoder"):
        weights |= graph_weights(bundle.path / f"{name}.onnx")
    expected = set(model.state_dict())
    report = model.load_state_dict({n: w for n, w in weights.items() if n in expected}, strict=False)
    model.tie_weights()
    missing = {name for name in report.missing_keys if not name.endswith(NO_WEIGHTS)} - set(family.tied(model.config))
    unused = {name for name in missing if name.startswith(family.rules.unused(model.config.to_dict()))}
    with torch.no_grad():
        for name in unused:
            model.state_dict()[name].zero_()
    if missing := missing - unused:
        raise EngineError(
            f"{bundle_dir} lacks {counted(len(missing), 'weight')} of its checkpoint ({sorted(missing)[0]}, ...): "
            "export it again"
        )
    out.mkdir(parents=True, exist_ok=True)
    family.apply_settings(model, bundle.generation)
    model.save_pretrained(out)
    family.make_processor(source["image_processor"]).save_pretrained(out)
    clean_up = bundle.clean_up_tokenization_spaces
    restored_tokenizer(bundle.path / "tokenizer.json", source["tokenizer"], clean_up=clean_up).save_pretrained(out)
    return out


def graph_weights(path: Path) -> dict[str, torch.Tensor]:
    """Return a graph's initialisers in float32, by their names in the checkpoint.

    The exporter stores equal tensors once and adds an Identity node for each other name; those names are included.
    """
    graph = onnx.load(str(path)).graph
    weights = {
        tensor.name.removesuffix(FP16_SUFFIX): torch.tensor(numpy_helper.to_array(tensor)).float()
        for tensor in graph.initializer
    }
    for node in graph.node:
        if node.op_type == "Identity" and node.input[0] in weights:
            weights[node.output[0]] = weights[node.input[0]]
    return weights


@click.command(cls=OneLine)
@click.option("--bundle", type=PATH, required=True, help="The fp32 bundle to restore the checkpoint from.")
@click.option("--out", type=PATH, required=True, help="Folder to write the checkpoint to, in Hugging Face's layout.")
def main(bundle: Path, out: Path) -> None:
    """Write the Hugging Face checkpoint that a bundle was exported from."""
    click.echo(restore_checkpoint(bundle, out))


if __name__ == "__main__":
    main()
