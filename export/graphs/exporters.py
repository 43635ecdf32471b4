"""Two ways from a module to an ONNX file: torch's exporter alone, or optimum's, which stands on it.

Both give the same nodes and weights (tests/parity/test_export.py); optimum needs transformers 4.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from engine.errors import ExportError
from export.graphs.modules import ExportedModule
from export.graphs.specs import GraphSpec

OPSET = 18


def export_by_torch(module: ExportedModule, spec: GraphSpec, path: Path) -> None:
    """Trace a module with torch.onnx.export."""
    axes = {name: named for name, named in (spec.inputs | spec.outputs).items() if named}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # torch deprecates its TorchScript exporter
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
    """Trace a module with optimum's exporter. Raises ExportError where it does not work with what is installed."""
    try:
        from optimum.exporters.onnx import export
        from optimum.exporters.onnx.base import OnnxConfig
    except ImportError as error:
        raise ExportError(f"optimum's exporter cannot be imported ({error}): leave --exporter optimum out") from error

    class Config(OnnxConfig):
        """A GraphSpec in optimum's words."""

        NORMALIZED_CONFIG_CLASS = staticmethod(lambda config, **_: config)
        DEFAULT_ONNX_OPSET = OPSET
        inputs = property(lambda _: spec.inputs)
        outputs = property(lambda _: spec.outputs)

        def generate_dummy_inputs(self, framework: str = "pt", **_: object) -> dict:
            assert framework == "pt", framework
            return spec.examples()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates its TorchScript exporter, which optimum uses
        config = Config(spec.config, task="feature-extraction")
        export(module.eval(), config, path, opset=OPSET, do_constant_folding=False, disable_dynamic_axes_fix=True)


EXPORTERS: dict[str, Callable[[ExportedModule, GraphSpec, Path], None]] = {
    "torch": export_by_torch,
    "optimum": export_by_optimum,
}
