"""The decoder in two graphs, for bundles that caption together (engine/bundle/ensemble.py).

log_probs.onnx ends at the log-probabilities, and its weights are those of decoder.onnx, in the same file.
choice.onnx begins there and has no weights. One after the other they compute what decoder.onnx does, but for a second
log_softmax, which leaves log-probabilities of one model as they are.
"""

from __future__ import annotations

from pathlib import Path

import onnx
from onnx import TensorProto, helper
from onnx.utils import Extractor

from engine.bundle.graphs import CHOICE, LOG_PROBS, graph_inputs, graph_outputs
from engine.bundle.manifest import FORMAT


def write_halves(out: Path, num_layers: int, vocab_size: int) -> None:
    """Write log_probs.onnx and choice.onnx beside the decoder.onnx in `out`."""
    for graph in (LOG_PROBS, CHOICE):
        model = onnx.load(str(out / "decoder.onnx"), load_external_data=False)
        (node,) = (node for node in model.graph.node if node.op_type == "LogSoftmax")
        _rename(model, node.output[0] if graph == LOG_PROBS else node.input[0])
        model.graph.value_info.append(
            helper.make_tensor_value_info(LOG_PROBS, TensorProto.FLOAT, ["images", "rows", vocab_size])
        )
        half = Extractor(model).extract_model(graph_inputs(num_layers, FORMAT)[graph], graph_outputs(num_layers)[graph])
        half.producer_name = model.producer_name
        path = out / f"{graph}.onnx"
        onnx.save_model(half, str(path))
        onnx.checker.check_model(str(path), full_check=True)


def _rename(model: onnx.ModelProto, name: str) -> None:
    """Give a tensor the name LOG_PROBS."""
    for node in model.graph.node:
        for names in (node.input, node.output):
            names[:] = [LOG_PROBS if one == name else one for one in names]
