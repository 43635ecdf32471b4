"""Run signatures: one line with everything that decides captions, so that two runs can be compared."""

from __future__ import annotations

import hashlib
from importlib.metadata import PackageNotFoundError, version

from engine.bundle.manifest import Bundle
from engine.options import CLIP, DEFAULTS, DecodeOptions
from engine.runtime import Runtime
from engine.version import __version__

DECIDING_PACKAGES = ("numpy", "onnxruntime", "onnxruntime-gpu", "pillow", "pydicom", "tokenizers")
"""Packages whose release can change a caption, because it rounds, resizes or decodes differently."""
BUILDERS = ("tensorrt", "tensorrt-cu12", "tensorrt-cu13", "tensorrt-rtx")
MORE_PACKAGES = {"openvino": ("openvino",), "tensorrt": BUILDERS, "trt": BUILDERS, "torch": ("torch",)}
"""Backend -> further packages whose release can change a caption."""

DEFAULT = Runtime()
NEWER_OPTIONS = ("repetition_penalty",)
"""Options added after the first journals. They are omitted at their defaults, so that older journals can be resumed."""


def run_signature(
    bundle: Bundle,
    backend: str,
    options: DecodeOptions,
    high_bit_depth: str = CLIP,
    runtime: Runtime = DEFAULT,
) -> str:
    """Return `name:value` pairs joined by `|`.

    They are engine, bundle digest, precision, backend, the task of a model with tasks, for torch the kind of device,
    the precision of the arithmetic if not fp32, every option in effect, `high_bit_depth` if not Hugging Face's way of
    reading more than 8 bits per channel, and Pillow's release.

    Pillow 13 and 12 resize images that are narrower and taller than the model's size differently, so captions of the
    same bundle may differ between them (tests/unit/engine/inputs/test_pixels.py).
    """
    depth = "" if high_bit_depth == CLIP else f"|high_bit_depth:{high_bit_depth}"
    return f"{settings_line(bundle, backend, options, runtime)}{depth}|pillow:{version('pillow')}"


def settings_line(bundle: Bundle, backend: str, options: DecodeOptions, runtime: Runtime = DEFAULT) -> str:
    """Return the signature without packages. Together with `environment` it identifies a journal."""
    parts = {"engine": __version__, "bundle": bundle.short_digest, "precision": bundle.precision, "backend": backend}
    if bundle.task is not None:
        parts["task"] = bundle.task
    if runtime.device is not None:
        parts["device"] = runtime.device.partition(":")[0]
    if runtime.cpu_precision != "fp32":  # otherwise omitted, so that journals of earlier versions can be resumed
        name = "cpu_precision" if runtime.device is None else "arithmetic"
        parts[name] = f"{runtime.cpu_precision} (not parity)"
    decisive = {
        name: value
        for name, value in options.in_force().items()
        if value != DEFAULTS[name] or name not in NEWER_OPTIONS
    }
    return "|".join(f"{name}:{_in_short(value)}" for name, value in (parts | decisive).items())


def _in_short(value: object) -> object:
    """Return a value unchanged; for a tuple, only its length and the start of its sha256."""
    if not isinstance(value, tuple):
        return value
    return f"{len(value)}:{hashlib.sha256(repr(value).encode()).hexdigest()[:12]}"


def environment(backend: str) -> str:
    """Return the `package:version` pairs that decide the captions of a backend on this machine, joined by `|`."""
    installed = []
    for package in (*DECIDING_PACKAGES, *MORE_PACKAGES.get(backend, ())):
        try:
            installed.append(f"{package}:{version(package)}")
        except PackageNotFoundError:
            continue
    return "|".join(installed)
