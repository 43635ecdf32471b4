"""List what ONNX Runtime launches on a GPU for attention operators. Stand-ins; no GPU has run this.

    python -m tests.nvidia.fake.operators    # in the environment of count.py

The shapes are those of BLIP-base: 16 images in the encoder, 64 slots of 4 beams in the decoder.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import onnxruntime
from onnx import helper

from tests.nvidia.fake.events import demangle, recorded

MICROSOFT = "com.microsoft"
HEADS, BOTH = {"num_heads": 12}, {"q_num_heads": 12, "kv_num_heads": 12}
Input = tuple[Any, tuple[int, ...]]


def tensor(*shape: int, dtype: Any = np.float16) -> Input:
    """Return the type and shape of an input."""
    return dtype, shape


ENCODER, QUERIES, CROSS, PAST = (tensor(*shape, 768) for shape in ((16, 197), (64, 4), (64, 197), (64, 104)))
SPLIT = {positions: tensor(64, 12, positions, 64) for positions in (4, 104, 197)}
SINGLE = {positions: tensor(64, 12, positions, 64, dtype=np.float32) for positions in (4, 197)}
MASK, BIAS = tensor(64, 1, 4, 104, dtype=np.bool_), tensor(64, 1, 4, 104)
CASES: list[tuple[str, str, int | str, dict[str, Any], list[Input | None]]] = [
    ("encoder", "MultiHeadAttention", MICROSOFT, HEADS, [ENCODER] * 3),
    ("encoder, packed", "MultiHeadAttention", MICROSOFT, HEADS, [tensor(16, 197, 12, 3, 64)]),
    ("cross, keys split", "MultiHeadAttention", MICROSOFT, HEADS, [QUERIES, SPLIT[197], SPLIT[197]]),
    ("cross", "MultiHeadAttention", MICROSOFT, HEADS, [QUERIES, CROSS, CROSS]),
    ("self, bias", "MultiHeadAttention", MICROSOFT, HEADS, [QUERIES, PAST, PAST, None, None, BIAS]),
    ("encoder, split", "Attention", 23, {}, [tensor(16, 12, 197, 64)] * 3),
    ("encoder", "Attention", 23, BOTH, [ENCODER] * 3),
    ("cross, split", "Attention", 23, {}, [SPLIT[4], SPLIT[197], SPLIT[197]]),
    ("cross, split, float32", "Attention", 23, {}, [SINGLE[4], SINGLE[197], SINGLE[197]]),
    ("cross", "Attention", 23, BOTH, [QUERIES, CROSS, CROSS]),
    ("self, split, mask", "Attention", 23, {}, [SPLIT[4], SPLIT[104], SPLIT[104], MASK]),
    ("self, split, bias", "Attention", 23, {}, [SPLIT[4], SPLIT[104], SPLIT[104], BIAS]),
    ("self, mask", "Attention", 23, BOTH, [QUERIES, PAST, PAST, MASK]),
    ("self, mask", "Attention", 24, BOTH, [QUERIES, PAST, PAST, MASK]),
    ("cache", "TensorScatter", 24, {"axis": 1}, [PAST, QUERIES, tensor(64, dtype=np.int64)]),
]


def launches(operator: str, release: int | str, attributes: dict[str, Any], inputs: list[Input | None]) -> list[str]:
    """Run one operator, whose `release` is its domain or opset, and return the calls of its second run."""
    given = {f"input_{i}": one for i, one in enumerate(inputs) if one}
    names = [f"input_{i}" if one else "" for i, one in enumerate(inputs)]
    domain, opset = (release, 18) if isinstance(release, str) else ("", release)
    node = helper.make_node(operator, names, ["output"], domain=domain, **attributes)
    types = {name: helper.np_dtype_to_tensor_dtype(np.dtype(dtype)) for name, (dtype, _) in given.items()}
    values = [helper.make_tensor_value_info(name, types[name], shape) for name, (_, shape) in given.items()]
    output = helper.make_tensor_value_info("output", types["input_0"], None)
    graph = helper.make_graph([node], operator, values, [output])
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid(MICROSOFT, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    providers = [("CUDAExecutionProvider", {"use_tf32": "0"}), "CPUExecutionProvider"]
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=providers, enable_fallback=0)
    binding = session.io_binding()
    for name, (dtype, shape) in given.items():
        value = onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros(shape, dtype), "cuda", 0)
        binding.bind_ortvalue_input(name, value)
    binding.bind_output("output", "cuda")
    session.run_with_iobinding(binding)
    with recorded() as events:
        session.run_with_iobinding(binding)
    calls = [event for event in events if event.kind in ("kernel", "product", "cudnn", "copy", "fill")]
    names = demangle([event.name for event in calls])
    return [f"{name[:150]} {list(event.values[:6])}" for name, event in zip(names, calls, strict=True)]


def main() -> None:
    """Print the calls of every case, or why it failed, as JSON."""
    onnxruntime.set_default_logger_severity(4)
    report: dict[str, Any] = {"label": "stand-ins; no GPU has run this"}
    for name, operator, release, attributes, inputs in CASES:
        try:
            calls = launches(operator, release, attributes, inputs)
        except Exception as error:  # what is not supported is part of the answer
            calls = [f"failed: {error}"]
        report[f"{operator} ({release}), {name}"] = calls
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
