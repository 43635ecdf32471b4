"""How captions were made, in one line, so that two runs can be compared or told apart."""

from __future__ import annotations

import hashlib
from importlib.metadata import PackageNotFoundError, version

from engine.bundle.manifest import Bundle
from engine.inputs.pixels import CLIP
from engine.options import DEFAULTS, DecodeOptions
from engine.version import __version__

DECIDING_PACKAGES = ("numpy", "onnxruntime", "onnxruntime-gpu", "pillow", "pydicom", "tokenizers")
"""Another release of these may round, resize or decode differently, and so change a caption."""
BUILDERS = ("tensorrt", "tensorrt-cu12", "tensorrt-cu13", "tensorrt-rtx")
MORE_PACKAGES = {"openvino": ("openvino",), "tensorrt": BUILDERS, "trt": BUILDERS}
"""Backend -> packages whose release counts there, too."""

LATER = ("repetition_penalty",)
"""Options that came after the first journals: at their defaults they are left out, so that such runs still go on."""


def run_signature(
    bundle: Bundle,
    backend: str,
    options: DecodeOptions,
    high_bit_depth: str = CLIP,
    cpu_precision: str = "fp32",
) -> str:
    """Return `name:value` pairs joined by `|`: engine, bundle digest, precision, backend, every option in force, that a
    CPU rounded what it multiplied where it did, how more than 8 bits a channel were read where that is not Hugging
    Face's way, and Pillow's release.

    Pillow 13 resizes pictures that are narrower and taller than the model's size otherwise than 12 did, so a caption of
    one may differ from that of the same bundle elsewhere (tests/unit/engine/inputs/test_pixels.py).
    """
    depth = "" if high_bit_depth == CLIP else f"|high_bit_depth:{high_bit_depth}"
    return f"{settings_line(bundle, backend, options, cpu_precision)}{depth}|pillow:{version('pillow')}"


def settings_line(bundle: Bundle, backend: str, options: DecodeOptions, cpu_precision: str = "fp32") -> str:
    """Return the signature without packages; with `environment` it tells one journal from another."""
    parts = {"engine": __version__, "bundle": bundle.short_digest, "precision": bundle.precision, "backend": backend}
    if cpu_precision != "fp32":  # left out else, so that journals of earlier versions go on
        parts["cpu_precision"] = f"{cpu_precision} (not parity)"
    asked = {name: value for name, value in options.in_force().items() if value != DEFAULTS[name] or name not in LATER}
    return "|".join(f"{name}:{_in_short(value)}" for name, value in (parts | asked).items())


def _in_short(value: object) -> object:
    """Return a value as it is, of a list only its length and the beginning of its sha256."""
    if not isinstance(value, tuple):
        return value
    return f"{len(value)}:{hashlib.sha256(repr(value).encode()).hexdigest()[:12]}"


def environment(backend: str) -> str:
    """Return `package:version` of what else decides the captions of a backend here, joined by `|`."""
    installed = []
    for package in (*DECIDING_PACKAGES, *MORE_PACKAGES.get(backend, ())):
        try:
            installed.append(f"{package}:{version(package)}")
        except PackageNotFoundError:
            continue
    return "|".join(installed)
