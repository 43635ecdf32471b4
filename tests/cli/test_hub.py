"""Export, caption and train by a hub id, with a repository like the published ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.hub import loopback_hub
from tests.helpers.tiny import IMAGE_SIZE, random_pictures

NAME = "Salesforce/blip-image-captioning-base"
OLD_DEFAULTS = {"max_length": 20, "top_k": 50, "num_beams": 1, "repetition_penalty": 1.0, "bad_words_ids": None}
"""Transformers 4.26 wrote every generation setting into text_config and vision_config."""


def published_as_base(tiny_checkpoint: Path, folder: Path) -> None:
    """Write a checkpoint with the files of Salesforce/blip-image-captioning-base, and these as they are there."""
    weights = load_file(tiny_checkpoint / "model.safetensors")
    positions = torch.arange(64)[None]
    torch.save(
        weights | {"text_decoder.bert.embeddings.position_ids": positions},
        folder / "pytorch_model.bin",
        _use_new_zipfile_serialization=False,
    )
    config = json.loads((tiny_checkpoint / "config.json").read_text())
    for part in ("text_config", "vision_config"):
        config[part] |= OLD_DEFAULTS
    del config["text_config"]["encoder_hidden_size"]
    config |= {"_commit_hash": None, "transformers_version": None, "torch_dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config))
    own = json.loads((tiny_checkpoint / "preprocessor_config.json").read_text())
    kept = {name: own[name] for name in ("do_normalize", "do_resize", "image_mean", "image_std")}
    (folder / "preprocessor_config.json").write_text(
        json.dumps(kept | {"size": IMAGE_SIZE, "image_processor_type": "BlipImageProcessor"})
    )
    tokenizer = json.loads((tiny_checkpoint / "tokenizer.json").read_text())
    tokenizer["added_tokens"] = [t for t in tokenizer["added_tokens"] if t["content"] not in ("[DEC]", "[ENC]")]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    tokens = {f"{name}_token": f"[{name.upper()}]" for name in ("cls", "mask", "pad", "sep", "unk")}
    (folder / "special_tokens_map.json").write_text(json.dumps(tokens))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(tokens | {"do_lower_case": True, "tokenizer_class": "BertTokenizer"})
    )
    words = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].__getitem__)
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    for name in ("tf_model.h5", "README.md", ".gitattributes"):
        (folder / name).write_bytes(b"not wanted")


@pytest.fixture
def environment(tiny_checkpoint, tmp_path):
    folder = tmp_path / "served"
    folder.mkdir()
    published_as_base(tiny_checkpoint, folder)
    with loopback_hub() as hub:
        hub.repositories[NAME] = folder
        yield os.environ | {
            "HF_ENDPOINT": hub.endpoint,
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }


def test_bundle_and_images_are_read_by_hf_uris(tiny_bundle, tmp_path):
    (tmp_path / "images/deep").mkdir(parents=True)
    for number, picture in enumerate(random_pictures(3)):
        picture.save(tmp_path / "images" / f"{'deep/' * (number > 1)}{number}.png")
    command = ["engine", "caption", "--beams", 2, "--max-new-tokens", 8, "--recursive"]
    local = run(dict(os.environ), *command, "--bundle", tiny_bundle, "--input", tmp_path / "images", "--out", "-")
    with loopback_hub() as hub:
        hub.repositories |= {"owner/bundle": tiny_bundle, "owner/data": tmp_path}
        cache = {"HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home"), "XDG_CACHE_HOME": str(tmp_path / "cache")}
        inputs = ["--bundle", "hf://owner/bundle", "--input", "hf://owner/data/images", "--out", tmp_path / "run.csv"]
        run(os.environ | cache | {"HF_ENDPOINT": hub.endpoint}, *command, *inputs)
    assert (tmp_path / "run.csv").read_text() == local


def run(environment: dict[str, str], *arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, "-m", *map(str, arguments)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_published_base_exports_captions_and_trains_by_id(environment, tiny_bundle, tmp_path):
    run(environment, "export", "--checkpoint", NAME, "--out", tmp_path / "bundle")
    manifest = json.loads((tmp_path / "bundle/manifest.json").read_text())
    assert list(manifest["checkpoint"]["files"]) == ["pytorch_model.bin"]
    for graph in ("encoder.onnx.data", "decoder.onnx.data"):
        assert (tmp_path / "bundle" / graph).read_bytes() == (tiny_bundle / graph).read_bytes()
    (tmp_path / "train").mkdir()
    for number, picture in enumerate(random_pictures(4)):
        picture.save(tmp_path / "train" / f"{number}.png")
        (tmp_path / "train" / f"{number}.txt").write_text("axial ct of the chest")
    captioned = ["engine", "caption", "--bundle", tmp_path / "bundle", "--input", tmp_path / "train"]
    run(environment, *captioned, "--beams", 2, "--max-new-tokens", 8, "--out", tmp_path / "run.csv")
    assert len((tmp_path / "run.csv").read_text().splitlines()) == 5
    start = ["train", "finetune", "--recipe", "medblip-base", "--model", NAME, "--data", tmp_path]
    settings = ["--image-size", IMAGE_SIZE, "--set", "max_tokens=20", "--set", "valid_share=0.5"]
    plan = json.loads(run(environment, *start, "--out", tmp_path / "out", "--dry-run", *settings).splitlines()[-1])
    assert plan["image_size"] == IMAGE_SIZE
