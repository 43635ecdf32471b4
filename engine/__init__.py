"""Caption directories of images with BLIP, token for token what Hugging Face would have said, without torch."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from engine.version import __version__ as __version__

# From 1.29 on ONNX Runtime sends usage events to its makers and stores a device id in the cache folder. It reads this
# variable once, at its first import, so the variable is set here: export, train and benchmarks import engine first.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__all__ = ["Caption", "Captioner", "DecodeOptions", "EngineError"]

if TYPE_CHECKING:
    from engine.captioner import Captioner
    from engine.captions import Caption
    from engine.errors import EngineError
    from engine.options import DecodeOptions


def __getattr__(name: str) -> Any:
    """Import the public names on first use, so that `engine --help` need not load numpy and Pillow."""
    homes = {"Caption": "captions", "Captioner": "captioner", "DecodeOptions": "options", "EngineError": "errors"}
    if name not in homes:
        raise AttributeError(f"module 'engine' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"engine.{homes[name]}"), name)
