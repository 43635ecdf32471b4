"""The one-line signature that says how a run was made, so that two runs can be compared or told apart."""

from __future__ import annotations

from dataclasses import asdict

from engine import __version__
from engine.bundle import Bundle
from engine.options import DecodeOptions


def run_signature(bundle: Bundle, backend: str, options: DecodeOptions) -> str:
    """Return `name:value` pairs joined by `|`: engine, bundle digest, precision, backend, every option in force."""
    parts = {"engine": __version__, "bundle": bundle.digest[:12], "precision": bundle.precision, "backend": backend}
    parts |= {name: value for name, value in asdict(options).items() if value is not None}
    return "|".join(f"{name}:{value}" for name, value in parts.items())
