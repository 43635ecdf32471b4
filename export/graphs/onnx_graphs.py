"""Write the three graphs of a bundle: exported, in half or 8 bits, checked, with their weights beside them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from transformers import BlipForConditionalGeneration

from export.graphs.exporters import EXPORTERS
from export.graphs.halves import write_halves
from export.graphs.modules import DecoderStep, Encoder, ExportedModule, Regroup
from export.graphs.quantise import kept_float32, quantise
from export.graphs.specs import DecoderSpec, EncoderSpec, GraphSpec, RegroupSpec

FP16_SUFFIX = ".fp16"
MIN_FP16_ELEMENTS = 1024
"""Smaller tensors stay float32: nothing is gained, and scalars keep their type."""


def write_graphs(
    blip: BlipForConditionalGeneration,
    out: Path,
    normalisation: tuple[float, list[float], list[float]],
    *,
    is_int8: bool = False,
    exporter: str = "torch",
) -> None:
    """Write encoder.onnx, decoder.onnx and regroup.onnx with their weights beside them into `out`, and the decoder in
    halves.

    They have the model's own type, float32 or float16; of a float32 model `is_int8` makes the dense layers int8.
    `normalisation` is export.reference.huggingface.normalisation, `exporter` one of EXPORTERS.
    """
    graphs: tuple[tuple[str, ExportedModule, GraphSpec], ...] = (
        ("encoder", Encoder(blip, *normalisation), EncoderSpec(blip)),
        ("decoder", DecoderStep(blip), DecoderSpec(blip)),
        ("regroup", Regroup(blip), RegroupSpec(blip)),
    )
    for name, module, spec in graphs:
        path = out / f"{name}.onnx"
        EXPORTERS[exporter](module, spec, path)
        model = onnx.load(str(path))
        for stray in out.glob(f"{name}.onnx?data"):
            stray.unlink()
        if is_int8:
            model = quantise(model, kept_float32(blip.config))
        _check_operators(model, name)
        _store_exact_weights_as_fp16(model)
        _save(model, path)
    text = blip.config.text_config
    write_halves(out, text.num_hidden_layers, text.vocab_size)


def _check_operators(model: onnx.ModelProto, name: str) -> None:
    """Only standard operators may be in the files: every runtime must take the same graphs."""
    foreign = {node.domain for node in model.graph.node if node.domain not in ("", "ai.onnx")}
    assert not foreign, f"{name}.onnx holds operators of {foreign}"


def _store_exact_weights_as_fp16(model: onnx.ModelProto) -> None:
    """Store float32 weights that are exact in float16 at half the size, with a Cast that runtimes fold at load."""
    casts = []
    for tensor in model.graph.initializer:
        if tensor.data_type != TensorProto.FLOAT or np.prod(tensor.dims) < MIN_FP16_ELEMENTS:
            continue
        array = numpy_helper.to_array(tensor)
        with np.errstate(over="ignore"):
            half = array.astype(np.float16)
        if not np.array_equal(half.astype(np.float32), array):
            continue
        name, stored = tensor.name, tensor.name + FP16_SUFFIX
        tensor.CopyFrom(numpy_helper.from_array(half, stored))
        casts.append(helper.make_node("Cast", [stored], [name], name=f"{name}.cast", to=TensorProto.FLOAT))
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def _save(model: onnx.ModelProto, path: Path) -> None:
    """Save with the weights in one file beside the graph, so that a changed graph does not rewrite them."""
    model.producer_name, model.doc_string = "blip-caption-engine", ""
    for node in model.graph.node:
        node.doc_string = ""
    data = path.with_name(path.name + ".data")
    path.unlink()
    onnx.save_model(model, str(path), save_as_external_data=True, location=data.name, size_threshold=MIN_FP16_ELEMENTS)
    if data.exists():
        data.chmod(0o644)
    onnx.checker.check_model(str(path), full_check=True)
