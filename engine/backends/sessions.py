"""ONNX Runtime's sessions: opened with the provider that was asked for, and only of graphs that are the manifest's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.backends.providers import Provider
from engine.bundle.graphs import LOG_PROBS, cache_names, graph_inputs, graph_outputs
from engine.bundle.manifest import Bundle
from engine.errors import BackendError, BundleError, UsageError

FLOAT32_ALWAYS = ("scores", "penalties", "candidate_scores", LOG_PROBS)
"""What scores are made of, whatever the weights are; keys and values have the precision's own type."""

LOG_ERRORS_ONLY = 3
STOP_SPINNING = ("session.force_spinning_stop", "1")
"""Threads of one graph would else spin on the cores the next graph needs: 8 to 20 % of a run (benchmarks/LOG.md)."""
BF16_ON_ARM = ("mlas.enable_gemm_fastmath_arm64_bfloat16", "1")


def refuse_rounded_twice(bundle: Bundle, cpu_precision: str) -> None:
    """Raise UsageError for bf16 of a bundle whose weights are rounded already."""
    if cpu_precision != "fp32" and bundle.precision != "fp32":
        raise UsageError(
            f"{bundle.path} is {bundle.precision}: --cpu-precision {cpu_precision} is for fp32 bundles, leave it out"
        )


def check_graphs(bundle: Bundle, sessions: Mapping[str, Any]) -> None:
    """Refuse graphs, by their names, that are not those of the manifest, before any is run. Raises BundleError."""
    model, image = bundle.model, bundle.image
    inputs, outputs = graph_inputs(model.num_layers, bundle.format), graph_outputs(model.num_layers)
    for graph, session in sessions.items():
        for kind, wanted, found in (
            ("inputs", inputs[graph], session.get_inputs()),
            ("outputs", outputs[graph], session.get_outputs()),
        ):
            other = sorted(set(wanted) ^ {entry.name for entry in found})
            if other:
                raise BundleError(
                    f"{bundle.path / graph}.onnx does not have the {kind} of this engine's bundles "
                    f"({', '.join(other[:3])}): export it again"
                )
            _check_types(bundle, graph, found)
    keys = (model.num_heads, model.encoder_positions, model.head_width)
    fixed = dict.fromkeys(cache_names(model.num_layers, "cross"), keys)
    fixed["pixel_values"] = (image.height, image.width, 3)
    for graph, session in sessions.items():
        for entry in session.get_inputs():
            if entry.name in fixed and tuple(entry.shape[1:]) != fixed[entry.name]:
                raise BundleError(
                    f"{bundle.path / graph}.onnx: {entry.name} has the sizes {tuple(entry.shape[1:])}, the manifest "
                    f"says {fixed[entry.name]}: export it again"
                )


def _check_types(bundle: Bundle, graph: str, entries: list[Any]) -> None:
    """Refuse keys, values and scores of another type than the manifest's precision has. Raises BundleError."""
    keys = "tensor(float16)" if bundle.precision == "fp16" else "tensor(float)"
    for entry in entries:
        is_key = "." in entry.name  # keys and values: cross.key.0 and so on
        wanted = keys if is_key else "tensor(float)"
        if (is_key or entry.name in FLOAT32_ALWAYS) and entry.type != wanted:
            raise BundleError(
                f"{bundle.path / graph}.onnx: {entry.name} is {entry.type}, {bundle.precision} of the manifest means "
                f"{wanted}: export it again"
            )


def open_session(
    ort: Any,
    path: Path,
    providers: list[Provider],
    threads: int,
    *,
    is_optimised: bool,
    has_patterns: bool,
    is_bf16: bool = False,
) -> Any:
    """Load one graph and check that the provider asked for is the one in use (else ONNX Runtime only logs it).

    Without `has_patterns` memory is not planned for each combination of shapes: on a GPU each plan would be kept. With
    `is_bf16` an ARM processor rounds what it multiplies; others take no notice.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = LOG_ERRORS_ONLY
    options.enable_mem_pattern = has_patterns
    options.add_session_config_entry(*STOP_SPINNING)
    if is_bf16:
        options.add_session_config_entry(*BF16_ON_ARM)
    if not is_optimised:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        session = ort.InferenceSession(str(path), options, providers=providers)
    except Exception as error:
        raise BackendError(f"{path} cannot be loaded: {' '.join(str(error).split())[:400]}") from error
    wanted, _ = providers[0]
    if session.get_providers()[0] != wanted:
        raise BackendError(
            f"{wanted} was asked for and ONNX Runtime fell back to {session.get_providers()[0]}: "
            f"`engine info` says what is missing"
        )
    return session
