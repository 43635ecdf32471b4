"""Checkpoints that transformers 5 saved. The tests need transformers 5, see `make test-next`."""

from __future__ import annotations

import json

import pytest
from transformers import BlipProcessor

from engine.errors import CheckpointError
from export.bundle import export_bundle
from export.checkpoints.load import load_checkpoint
from export.families.blip import BlipImageProcessor
from export.families.modules import IS_5
from export.reference.huggingface import Reference

pytestmark = pytest.mark.skipif(not IS_5, reason="transformers 4 is installed here: `make test-next` has 5")


@pytest.fixture
def saved(tiny_checkpoint, tmp_path):
    """Return a function that saves the tiny checkpoint again with another image processor."""

    def save(size: int):
        reference = Reference.load(tiny_checkpoint)
        processor = BlipImageProcessor(
            size={"height": size, "width": size}, image_mean=[0.5, 0.4, 0.3], image_std=[0.5, 0.6, 0.7]
        )
        reference.model.save_pretrained(tmp_path / "saved")
        BlipProcessor(processor, reference.tokenizer).save_pretrained(tmp_path / "saved")
        return tmp_path / "saved"

    return save


def test_files_of_transformers_5_are_read(saved, tiny_bundle, tmp_path):
    checkpoint = saved(32)
    assert not (checkpoint / "preprocessor_config.json").exists()
    assert json.loads((checkpoint / "tokenizer_config.json").read_text())["extra_special_tokens"] == ["[ENC]"]
    bundle = export_bundle(checkpoint, tmp_path / "bundle", lambda _: None)
    assert (bundle.image.mean, bundle.image.std) == ((0.5, 0.4, 0.3), (0.5, 0.6, 0.7))
    for name in ("decoder.onnx", "decoder.onnx.data", "encoder.onnx.data", "tokenizer.json"):
        assert (bundle.path / name).read_bytes() == (tiny_bundle / name).read_bytes(), name


def test_size_that_does_not_fit_position_table_is_refused(saved):
    with pytest.raises(CheckpointError, match=r"processor_config\.json makes 48x48 px images"):
        load_checkpoint(saved(48))
