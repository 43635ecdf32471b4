"""The one-line signature that says how a run was made, so that two runs can be compared or told apart."""

from __future__ import annotations

from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version

from engine.bundle.manifest import Bundle
from engine.options import DecodeOptions
from engine.version import __version__

SAMPLING_OPTIONS = ("do_sample", "temperature", "top_k", "top_p", "seed")


def run_signature(bundle: Bundle, backend: str, options: DecodeOptions) -> str:
    """Return `name:value` pairs joined by `|`: engine, bundle digest, precision, backend, every option in force."""
    parts = {"engine": __version__, "bundle": bundle.digest[:12], "precision": bundle.precision, "backend": backend}
    without = () if options.do_sample else SAMPLING_OPTIONS
    parts |= {name: value for name, value in asdict(options).items() if value is not None and name not in without}
    return "|".join(f"{name}:{value}" for name, value in parts.items())


DECIDING_PACKAGES = ("numpy", "onnxruntime", "onnxruntime-gpu", "pillow", "pydicom", "tokenizers")
"""Another release of these may round, resize or decode differently, and so change a caption."""


def environment() -> str:
    """Return `package:version` of what else decides the captions here, joined by `|`."""
    installed = []
    for package in DECIDING_PACKAGES:
        try:
            installed.append(f"{package}:{version(package)}")
        except PackageNotFoundError:
            continue
    return "|".join(installed)
