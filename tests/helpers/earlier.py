"""The demo bundle of commit 084ae4d, in format 1: its graph, recordings and manifest, with the current weights."""

from __future__ import annotations

import shutil
from pathlib import Path

from engine.bundle.manifest import demo_bundle

OWN_FILES = Path(__file__).parents[1] / "data/bundle_of_084ae4d"


def bundle_of_084ae4d(folder: Path) -> Path:
    """Write the bundle into a new folder and return the folder."""
    shutil.copytree(demo_bundle(), folder)
    shutil.copytree(OWN_FILES, folder, dirs_exist_ok=True)
    return folder
