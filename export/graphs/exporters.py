"""Export the three graphs of a bundle to ONNX files, with torch's or optimum's exporter.

A GraphSpec describes a graph for either exporter: names, dynamic axes and example inputs.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from transformers import PreTrainedModel

from engine.bundle.manifest import cache_names
from engine.errors import ExportError
from export.families import family_of
from export.families.modules import ExportedModule, Normalisation, Regroup
from export.graphs.quantise import quantise, write_halves


class GraphSpec:
    """Describes one graph for an exporter. Subclasses define the names, dynamic axes and example inputs."""

    def __init__(self, module: ExportedModule) -> None:
        self.config, self.sizes, self.cache_type = module.config, module.sizes, module.weights_type

    def cache_names(self, part: str) -> list[str]:
        """Return the names of the keys and values `part` ("cross", "settled", ...) of all layers."""
        return cache_names(self.sizes.num_layers, part)

    def cache_axes(self, part: str, images: str, positions: str | None) -> dict[str, dict[int, str]]:
        """Return the dynamic axes of keys and values [B,H,positions,d]; without a name, `positions` is a fixed size."""
        axes = {0: images} | ({2: positions} if positions else {})
        return dict.fromkeys(self.cache_names(part), axes)

    def cache(self, images: int, positions: int) -> list[torch.Tensor]:
        """Return random example keys and values [B,H,positions,d] of all layers, keys and values alternately."""
        shape = (images, self.sizes.num_heads, positions, self.sizes.head_width)
        return [torch.randn(shape, dtype=self.cache_type) for _ in range(2 * self.sizes.num_layers)]

    @property
    def inputs(self) -> dict[str, dict[int, str]]:
        """Names of the inputs in order, and the names of their dynamic axes."""
        raise AssertionError("a subclass must define it")

    @property
    def outputs(self) -> dict[str, dict[int, str]]:
        """Names of the outputs in order, and the names of their dynamic axes."""
        raise AssertionError("a subclass must define it")

    def examples(self) -> dict:
        """Return example inputs for tracing.

        Every dynamic axis has a different length, so that tracing cannot mistake one for another and fix its size.
        """
        raise AssertionError("a subclass must define it")


class EncoderSpec(GraphSpec):
    """encoder.onnx: pixels u8[B,height,width,3] -> keys and values of cross-attention."""

    @property
    def inputs(self) -> dict[str, dict[int, str]]:
        return {"pixel_values": {0: "images"}}

    @property
    def outputs(self) -> dict[str, dict[int, str]]:
        return self.cache_axes("cross", "images", None)

    def examples(self) -> dict:
        size = self.sizes.image_size
        return {"pixel_values": torch.randint(0, 256, (2, size, size, 3), dtype=torch.uint8)}


class DecoderSpec(GraphSpec):
    """decoder.onnx: one decoding step. The prefill uses the same graph."""

    @property
    def inputs(self) -> dict[str, dict[int, str]]:
        rows = {0: "images", 1: "rows"}
        return {
            "input_ids": rows,
            "positions": rows,
            "scores": rows,
            "marked_ids": rows | {2: "marks"},
            "penalties": {},
            "ancestry": rows | {2: "positions"},
            "num_candidates": {},
            **self.cache_axes("cross", "images", None),
            **self.cache_axes("settled", "images", "settled"),
            **self.cache_axes("recent", "images", "recent"),
        }

    @property
    def outputs(self) -> dict[str, dict[int, str]]:
        candidates = {0: "images", 1: "candidates"}
        return {
            "candidate_scores": candidates,
            "candidate_ids": candidates,
            **self.cache_axes("extended", "images", "recent + rows"),
        }

    def examples(self) -> dict:
        images, rows, settled, recent = 2, 3, 5, 4
        return {
            "input_ids": torch.randint(1, 9, (images, rows)),
            "positions": torch.full((images, rows), 7),
            "scores": torch.zeros(images, rows),
            "marked_ids": torch.full((images, rows, 2), -1),
            "penalties": torch.ones(2),
            "ancestry": torch.ones(images, rows, settled + recent + rows, dtype=torch.bool),
            "num_candidates": torch.tensor([6]),
            "cross": self.cache(images, self.sizes.encoder_positions),
            "settled": self.cache(images, settled),
            "recent": self.cache(images, recent),
        }


class RegroupSpec(GraphSpec):
    """regroup.onnx: folds the recent block of the KV cache into the settled block; keeps only chosen positions."""

    @property
    def inputs(self) -> dict[str, dict[int, str]]:
        return {
            "slots": {0: "kept"},
            "columns": {0: "kept", 1: "kept positions"},
            **self.cache_axes("settled", "slots", "settled"),
            **self.cache_axes("recent", "slots", "recent"),
        }

    @property
    def outputs(self) -> dict[str, dict[int, str]]:
        return self.cache_axes("regrouped", "kept", "kept positions")

    def examples(self) -> dict:
        return {
            "slots": torch.tensor([0, 2]),
            "columns": torch.zeros(2, 4, dtype=torch.long),
            "settled": self.cache(3, 5),
            "recent": self.cache(3, 2),
        }


FP16_SUFFIX = ".fp16"
MIN_FP16_ELEMENTS = 1024
"""Smaller tensors stay float32: converting them saves nothing, and scalars must keep their type."""


def write_graphs(
    model: PreTrainedModel,
    out: Path,
    normalisation: Normalisation,
    *,
    is_int8: bool = False,
    exporter: str = "torch",
) -> None:
    """Write encoder.onnx, decoder.onnx, regroup.onnx and the two graphs of the split decoder into the folder `out`.

    Weights are stored in separate files next to the graphs. The graphs have the model's type, float32 or float16. With
    `is_int8`, the dense layers of a float32 model become int8. `normalisation` is the result of
    export.reference.huggingface.normalisation, and `exporter` is one of EXPORTERS.
    """
    family = family_of(model)
    sizes = family.sizes(model.config)
    graphs: tuple[tuple[str, ExportedModule, type[GraphSpec]], ...] = (
        ("encoder", family.encoder(model, normalisation), EncoderSpec),
        ("decoder", family.step(model), DecoderSpec),
        ("regroup", Regroup(model, sizes), RegroupSpec),
    )
    for name, module, spec in graphs:
        path = out / f"{name}.onnx"
        EXPORTERS[exporter](module, spec(module), path)
        graph = onnx.load(str(path))
        # onnx.load has read the exporter's weight file; _save writes another
        for exported_weights in out.glob(f"{name}.onnx?data"):
            exported_weights.unlink()
        if is_int8:
            graph = quantise(graph)
        _check_operators(graph, name)
        _store_exact_weights_as_fp16(graph)
        _save(graph, path)
    write_halves(out, sizes.num_layers, sizes.vocab_size)


def _check_operators(model: onnx.ModelProto, name: str) -> None:
    """Assert that a graph has only standard ONNX operators, because every runtime must accept the same files."""
    foreign = {node.domain for node in model.graph.node if node.domain not in ("", "ai.onnx")}
    assert not foreign, f"{name}.onnx has operators of {foreign}"


def _store_exact_weights_as_fp16(model: onnx.ModelProto) -> None:
    """Store float32 weights that float16 represents exactly at half the size.

    A Cast restores float32, and runtimes fold it when they load the graph.
    """
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
    """Save a graph with its weights in a separate file, so that a change to the graph does not rewrite the weights."""
    model.producer_name, model.doc_string = "blip-caption-engine", ""
    for node in model.graph.node:
        node.doc_string = ""
    data = path.with_name(path.name + ".data")
    path.unlink()
    onnx.save_model(model, str(path), save_as_external_data=True, location=data.name, size_threshold=MIN_FP16_ELEMENTS)
    if data.exists():
        data.chmod(0o644)
    onnx.checker.check_model(str(path), full_check=True)


OPSET = 18


def export_by_torch(module: ExportedModule, spec: GraphSpec, path: Path) -> None:
    """Export a module with torch.onnx.export, by tracing."""
    axes = {name: named for name, named in (spec.inputs | spec.outputs).items() if named}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # torch warns that its TorchScript exporter is deprecated
        torch.onnx.export(
            module.eval(),
            tuple(spec.examples().values()),
            str(path),
            input_names=list(spec.inputs),
            output_names=list(spec.outputs),
            dynamic_axes=axes,
            opset_version=OPSET,
            do_constant_folding=False,
            dynamo=False,
        )


def export_by_optimum(module: ExportedModule, spec: GraphSpec, path: Path) -> None:
    """Export a module with optimum's exporter. Raises ExportError if it cannot be imported."""
    try:
        from optimum.exporters.onnx import export
        from optimum.exporters.onnx.base import OnnxConfig
    except ImportError as error:
        raise ExportError(f"optimum's exporter cannot be imported ({error}): use --exporter torch") from error

    class Config(OnnxConfig):
        """The GraphSpec as optimum's OnnxConfig."""

        NORMALIZED_CONFIG_CLASS = staticmethod(lambda config, **_: config)
        DEFAULT_ONNX_OPSET = OPSET
        inputs = property(lambda _: spec.inputs)
        outputs = property(lambda _: spec.outputs)

        def generate_dummy_inputs(self, framework: str = "pt", **_: object) -> dict:
            assert framework == "pt", framework
            return spec.examples()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that its TorchScript exporter, which optimum uses, is deprecated
        config = Config(spec.config, task="feature-extraction")
        export(module.eval(), config, path, opset=OPSET, do_constant_folding=False, disable_dynamic_axes_fix=True)


EXPORTERS: dict[str, Callable[[ExportedModule, GraphSpec, Path], None]] = {
    "torch": export_by_torch,
    "optimum": export_by_optimum,
}
