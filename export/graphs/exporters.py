"""Export the graphs of a bundle to ONNX files, with torch's or optimum's exporter.

A GraphSpec describes a graph for either exporter: names, dynamic axes and example inputs. Graphs are traced without
their weights. The engine's own writer, which also converts checkpoints without torch, adds them.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import ModelProto, TensorProto, numpy_helper
from transformers import PreTrainedModel

from engine.bundle.manifest import HALVES, TASK_IDS, ModelDims, cache_names
from engine.checkpoints.graphs import Graph
from engine.checkpoints.int8 import rotate
from engine.checkpoints.write import write_graphs as write
from engine.errors import ExportError
from export.families import family_of
from export.families.modules import ExportedModule, Normalisation, Regroup
from export.graphs.attention import fuse_attention
from export.graphs.quantise import halves, quantise
from export.graphs.templates import template

EXAMPLE_TASK_IDS = 6
"""Number of ids of a task while a graph is traced."""


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

    @property
    def encoded(self) -> str | None:
        """Name of the axis of encoder positions, which is dynamic if there are tasks: their ids follow the image."""
        return "encoded" if self.sizes.has_tasks else None

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
        return {"pixel_values": {0: "images"}} | ({TASK_IDS: {0: "task ids"}} if self.sizes.has_tasks else {})

    @property
    def outputs(self) -> dict[str, dict[int, str]]:
        return self.cache_axes("cross", "images", self.encoded)

    def examples(self) -> dict:
        size = self.sizes.image_size
        pixels = {"pixel_values": torch.randint(0, 256, (2, size, size, 3), dtype=torch.uint8)}
        return pixels | ({TASK_IDS: torch.arange(EXAMPLE_TASK_IDS)} if self.sizes.has_tasks else {})


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
            **self.cache_axes("cross", "images", self.encoded),
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
            "cross": self.cache(images, self.sizes.encoder_positions + EXAMPLE_TASK_IDS * self.sizes.has_tasks),
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
    weights = {name: weight.detach().numpy() for name, weight in model.named_parameters(remove_duplicate=False)}
    residual = family.rules.residual(model.config.to_dict()) if is_int8 else None
    graphs = without_weights(trace(model, normalisation, exporter), family.sizes(model.config), is_int8=is_int8)
    write(graphs, rotate(weights, residual), {}, out)
    for path in out.glob("*.onnx"):
        onnx.checker.check_model(str(path), full_check=True)


def trace(model: PreTrainedModel, normalisation: Normalisation, exporter: str = "torch") -> dict[str, ModelProto]:
    """Return the three graphs of a bundle. Values of weights are neither read nor in the graphs."""
    family = family_of(model)
    sizes = family.sizes(model.config)
    modules: tuple[tuple[str, ExportedModule, type[GraphSpec]], ...] = (
        ("encoder", family.encoder(model, normalisation), EncoderSpec),
        ("decoder", family.step(model), DecoderSpec),
        ("regroup", Regroup(model, sizes), RegroupSpec),
    )
    return {name: _trace(module, spec(module), EXPORTERS[exporter]) for name, module, spec in modules}


def without_weights(graphs: Mapping[str, ModelProto], sizes: ModelDims, *, is_int8: bool = False) -> tuple[Graph, ...]:
    """Return the five graphs of a bundle, as the engine's writer reads them, from the three of `trace`."""
    models = {}
    for name, graph in graphs.items():
        is_half = any(weight.data_type == TensorProto.FLOAT16 for weight in graph.graph.initializer)
        models[name] = fuse_attention(graph) if is_half else graph
        if is_int8:
            models[name] = quantise(graph, is_decoder=name == "decoder")
        _check_operators(models[name], name)
    models |= halves(models["decoder"], sizes.num_layers, sizes.vocab_size)
    return tuple(template(name, model, "decoder" if name in HALVES else name) for name, model in models.items())


def _trace(
    module: ExportedModule, spec: GraphSpec, exporter: Callable[[ExportedModule, GraphSpec, Path], None]
) -> ModelProto:
    """Return a module's graph, whose initialisers have names, types and shapes; only those of buffers have values."""
    with tempfile.TemporaryDirectory() as folder, _placeholders(module), _without_products():
        path = Path(folder) / "graph.onnx"
        exporter(module, spec, path)
        model = onnx.load(str(path), load_external_data=False)
    buffers = dict(module.named_buffers())
    inputs = {value.name: value for value in model.graph.input}
    # torch lists weights as inputs here (export_params=False), optimum as initialisers
    weights = {tensor.name: (tensor.data_type, tensor.dims) for tensor in model.graph.initializer} or {
        name: (value.type.tensor_type.elem_type, [axis.dim_value for axis in value.type.tensor_type.shape.dim])
        for name, value in inputs.items()
        if name not in spec.inputs
    }
    del model.graph.initializer[:], model.graph.input[:]
    model.graph.input.extend(inputs[name] for name in spec.inputs)
    for name, (kind, dims) in weights.items():
        if name in buffers:
            model.graph.initializer.append(numpy_helper.from_array(buffers[name].numpy(), name))
        else:
            model.graph.initializer.append(TensorProto(name=name, data_type=kind, dims=dims))
    model.producer_name = "blip-caption-engine"
    model.ClearField("doc_string")
    for node in model.graph.node:
        node.ClearField("doc_string")
    return model


@contextmanager
def _placeholders(module: ExportedModule) -> Iterator[None]:
    """Replace a module's weights by constants that need no memory, as long as the context is open.

    Each has another value, because torch's exporter stores tensors with equal values once. So the graph does not
    depend on the values of weights, such as biases that are all 0, nor on those of buffers, such as a mean of pixels
    that equals their std. Buffers that are not persistent keep their values: the exporter stores them as constants.
    """
    persistent = module.state_dict()
    buffers = [one for name, one in module.named_buffers() if one.is_floating_point() and name in persistent]
    weights = [*module.parameters(), *buffers]  # tied ones once
    values = [weight.data for weight in weights]
    try:
        for i, weight in enumerate(weights):
            weight.data = torch.full((), i + 1, dtype=weight.dtype).expand(weight.shape)
        yield
    finally:
        for weight, value in zip(weights, values, strict=True):
            weight.data = value


@contextmanager
def _without_products() -> Iterator[None]:
    """Skip the products of matrices and the convolutions on the CPU as long as the context is open: results are 0.

    A trace records operators and shapes alone, and the image of Florence-2 has 36,864 patches: computed, its graph
    would take minutes. The kernels are replaced where the tracer has recorded the operators already.
    """

    def convolved(x: torch.Tensor, weight: torch.Tensor, settings: Sequence[Any]) -> list[int]:
        stride, padding, dilation = settings[1:4]
        sides = (
            (_size(x, i) + 2 * padding[i - 2] - dilation[i - 2] * (_size(weight, i) - 1) - 1) // stride[i - 2] + 1
            for i in (2, 3)
        )
        return [_size(x, 0), _size(weight, 0), *sides]

    kernels: dict[str, Callable[..., torch.Tensor]] = {
        "mm": lambda a, b: a.new_zeros(_size(a, 0), _size(b, 1)),
        "addmm": lambda _, a, b, **__: a.new_zeros(_size(a, 0), _size(b, 1)),
        "bmm": lambda a, b: a.new_zeros(_size(a, 0), _size(a, 1), _size(b, 2)),
        "_convolution": lambda x, weight, *settings: x.new_zeros(convolved(x, weight, settings)),
    }
    library = torch.library.Library("aten", "IMPL")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns that kernels are replaced
            for name, kernel in kernels.items():
                library.impl(name, kernel, "CPU")
        yield
    finally:
        library._destroy()


def _size(x: torch.Tensor, axis: int) -> int:
    """Return the size of an axis as a number; while torch traces, `shape` has tensors."""
    return int(torch.ops.aten.sym_size.int(x, axis))


def _check_operators(model: onnx.ModelProto, name: str) -> None:
    """Assert that a graph has only standard ONNX operators, because every runtime must accept the same files."""
    foreign = {node.domain for node in model.graph.node if node.domain not in ("", "ai.onnx")}
    assert not foreign, f"{name}.onnx has operators of {foreign}"


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
            export_params=False,
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
