"""Adapters: merged into the base that they name, or refused with a one-line error."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from engine.errors import CheckpointError
from export.checkpoints.find import find_checkpoint
from export.checkpoints.load import load_checkpoint

LAYER = "text_decoder.bert.encoder.layer.0.attention.self.query.weight"


@pytest.fixture
def adapter(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of a LoRA adapter of the tiny checkpoint with nonzero weights."""
    peft = pytest.importorskip("peft", reason="the group `adapters` is not installed")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["query", "qkv"], init_lora_weights=False)
    torch.manual_seed(1)
    model = peft.get_peft_model(load_checkpoint(tiny_checkpoint), config)
    model.save_pretrained(str(tmp_path / "adapter"))
    edit(tmp_path / "adapter", base_model_name_or_path=str(tiny_checkpoint))
    return tmp_path / "adapter"


def edit(adapter: Path, **changes: object) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_adapter_is_merged_into_its_base(adapter, tiny_checkpoint):
    from safetensors.torch import load_file

    merged = load_checkpoint(find_checkpoint(str(adapter))).state_dict()
    base = load_checkpoint(tiny_checkpoint).state_dict()
    weights = load_file(adapter / "adapter_model.safetensors")
    stem = f"base_model.model.{LAYER.removesuffix('.weight')}.lora_"
    change = 2 * weights[f"{stem}B.weight"] @ weights[f"{stem}A.weight"]  # lora_alpha / r = 2
    assert change.abs().max() > 0.01
    torch.testing.assert_close(merged[LAYER], base[LAYER] + change)
    changed = {name for name in base if not torch.equal(base[name], merged[name])}
    assert changed
    assert all(name.endswith(("query.weight", "qkv.weight")) for name in changed)


def test_image_processor_of_adapter_overrides_base(adapter, tiny_checkpoint):
    processor = json.loads((tiny_checkpoint / "preprocessor_config.json").read_text())
    (adapter / "preprocessor_config.json").write_text(json.dumps(processor | {"image_mean": [0.5, 0.4, 0.3]}))
    folder = find_checkpoint(str(adapter))
    assert json.loads((folder / "preprocessor_config.json").read_text())["image_mean"] == [0.5, 0.4, 0.3]
    assert (folder / "tokenizer.json").read_bytes() == (tiny_checkpoint / "tokenizer.json").read_bytes()
    assert not (folder / "adapter_config.json").exists()
    assert find_checkpoint(str(adapter)) == folder


def test_pickled_adapter_uses_weights_only_unpickler(adapter):
    from safetensors.torch import load_file

    expected = load_checkpoint(find_checkpoint(str(adapter))).state_dict()
    safe = adapter / "adapter_model.safetensors"
    torch.save(load_file(safe), adapter / "adapter_model.bin")
    safe.unlink()
    merged = load_checkpoint(find_checkpoint(str(adapter))).state_dict()
    assert all(torch.equal(merged[name], expected[name]) for name in expected)
    torch.save({"x": Path("/")}, adapter / "adapter_model.bin")  # a class that is not a tensor
    with pytest.raises(CheckpointError, match="this LORA adapter cannot be merged"):
        find_checkpoint(str(adapter))


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (
            lambda adapter: edit(adapter, base_model_name_or_path=None),
            "has no base_model_name_or_path: add the base checkpoint",
        ),
        (lambda adapter: edit(adapter, base_model_name_or_path=str(adapter)), "a base must be a full model"),
        (lambda adapter: edit(adapter, peft_type="PROMPT_TUNING", num_virtual_tokens=3), "cannot be merged into"),
        (lambda adapter: edit(adapter, target_modules=["query", "qkv", "key"]), "does not fit its base"),
        (lambda adapter: edit(adapter, r=3), "cannot be merged into"),
        (lambda adapter: (adapter / "adapter_model.safetensors").unlink(), "an adapter without weights"),
        (lambda adapter: (adapter / "adapter_model.safetensors").write_bytes(b"x" * 99), "cannot be merged into"),
        (lambda adapter: (adapter / "adapter_model.safetensors").write_bytes(b""), "safetensors: empty file"),
        (lambda adapter: edit(adapter, megatron_config={"x": 1}, megatron_core="evil"), "asks for Megatron"),
    ],
)
def test_unmergeable_adapter_is_a_one_line_error(damage, sentence, adapter):
    damage(adapter)
    with pytest.raises(CheckpointError, match=sentence) as caught:
        find_checkpoint(str(adapter))
    assert "\n" not in str(caught.value)


def test_error_without_peft_names_the_package(adapter, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(CheckpointError, match="merging it needs peft"):
        find_checkpoint(str(adapter))
