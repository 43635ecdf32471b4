"""Downloads of checkpoints, from a hub on the loopback interface."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.helpers.hub import Hub, loopback_hub

BASE = (
    *(".gitattributes", "README.md", "config.json", "preprocessor_config.json", "pytorch_model.bin"),
    *("special_tokens_map.json", "tf_model.h5", "tokenizer.json", "tokenizer_config.json", "vocab.txt"),
)
"""The files of Salesforce/blip-image-captioning-base; -large also has model.safetensors."""
Fetch = Callable[..., str]


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with loopback_hub() as served:
        for name, files in {
            "Salesforce/blip-image-captioning-base": BASE,
            "Salesforce/blip-image-captioning-large": (*BASE, "model.safetensors"),
            "salesforce/originals": ("README.md", "model_base_caption_capfilt_large.pth", "evil.py"),
        }.items():
            folder = tmp_path / "served" / name.replace("/", "--")
            folder.mkdir(parents=True)
            for file in files:
                (folder / file).write_bytes(f"{name} {file}\n".encode() * 500)
            served.repositories[name] = folder
        yield served


@pytest.fixture
def fetched(hub: Hub, tmp_path: Path) -> Fetch:
    """Call fetch in a separate process: the hub's client reads its environment when it is imported."""

    def call(name: str, endpoint: str | None = None) -> str:
        code = (
            "import sys\nfrom engine.errors import CheckpointError\n"
            "from engine.checkpoints.hub import fetch\n"
            "try:\n    print(fetch(sys.argv[1], str).folder)\n"
            "except CheckpointError as error:\n    print('refused:', error)"
        )
        environment = os.environ | {
            "HF_ENDPOINT": endpoint or hub.endpoint,
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_ETAG_TIMEOUT": "3",
        }
        done = subprocess.run(
            [sys.executable, "-c", code, name], capture_output=True, text=True, env=environment, timeout=120
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    return call


def test_pickles_are_fetched_only_without_safetensors(hub, fetched):
    """Code is never fetched."""
    base = Path(fetched("Salesforce/blip-image-captioning-base"))
    assert sorted(path.name for path in base.iterdir()) == sorted(
        name for name in BASE if name.endswith((".json", ".txt", "pytorch_model.bin"))
    )
    large = Path(fetched("Salesforce/blip-image-captioning-large@main"))
    assert (large / "model.safetensors").is_file()
    assert not (large / "pytorch_model.bin").exists()
    hub.asked.clear()
    assert Path(fetched("Salesforce/blip-image-captioning-base")) == base
    assert hub.asked == [], "cached files were fetched again"
    assert Path(fetched("Salesforce/blip-image-captioning-base", "http://127.0.0.1:9")) == base, "without a network"


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("owner/missing", "there is no such repository, or it is private: check the name, or set HF_TOKEN"),
        ("Salesforce/blip-image-captioning-base@v9", "has no revision v9: see its page for the revisions"),
        ("salesforce/gated", "it is gated: ask for access on its page, then set HF_TOKEN"),
        ("salesforce/originals", "model_base_caption_capfilt_large.pth): download an original .pth file"),
    ],
)
def test_hub_errors_are_one_line_with_a_remedy(name, sentence, hub, fetched):
    hub.gated.add("salesforce/gated")
    (line,) = fetched(name).splitlines()
    assert line.startswith(f"refused: {name} ")
    assert sentence in line


def test_error_without_network_and_cache(fetched):
    (line,) = fetched("Salesforce/blip-image-captioning-base", "http://127.0.0.1:9").splitlines()
    assert "the hub cannot be reached, and the checkpoint is not cached: pass the folder of a checkpoint" in line


def test_interrupted_download_resumes(hub, fetched):
    hub.cut.add("pytorch_model.bin")
    first = fetched("Salesforce/blip-image-captioning-base")
    folder = Path(first if not first.startswith("refused") else fetched("Salesforce/blip-image-captioning-base"))
    served = hub.repositories["Salesforce/blip-image-captioning-base"]
    assert (folder / "pytorch_model.bin").read_bytes() == (served / "pytorch_model.bin").read_bytes()
    assert json.dumps(hub.asked).count("pytorch_model.bin from") > 1, "it was fetched in one piece"
    assert not first.startswith("refused") or "run the same command again" in first
