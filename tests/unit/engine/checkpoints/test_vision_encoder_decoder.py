"""Checkpoints of VisionEncoderDecoder: sizes, special ids, settings and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine.bundle.manifest import TokenIds
from engine.checkpoints.files import read_config_file, rules_at
from engine.checkpoints.settings import (
    Setting,
    configured_settings,
    height_width,
    ignored_settings,
    read_processor,
    size_before_crop,
)
from engine.checkpoints.vision_encoder_decoder import PAIRS, VisionEncoderDecoderRules
from engine.errors import CheckpointError

RULES = VisionEncoderDecoderRules()
PUBLISHED = {
    "model_type": "vision-encoder-decoder",
    "architectures": ["VisionEncoderDecoderModel"],
    "encoder": {"model_type": "vit"},
    "decoder": {"model_type": "gpt2", "add_cross_attention": True, "is_decoder": True},
}


def write(folder: Path, generation: dict | None = None, **changes) -> Path:
    (folder / "config.json").write_text(json.dumps(PUBLISHED | changes))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def checked(folder: Path) -> dict:
    raw = read_config_file(folder)
    rules_at(folder).check_config(raw, folder / "config.json")
    return raw


def test_defaults_are_those_of_transformers():
    from transformers import VisionEncoderDecoderConfig

    for encoder, decoders in PAIRS.items():
        for decoder in decoders:
            text = {"model_type": decoder, "add_cross_attention": True, "is_decoder": True}
            ids = {"decoder_start_token_id": 7, "eos_token_id": 8, "pad_token_id": 9}
            raw = PUBLISHED | {"encoder": {"model_type": encoder}, "decoder": text} | ids
            full = VisionEncoderDecoderConfig.from_dict(json.loads(json.dumps(raw))).to_dict()
            assert RULES.sizes(raw) == RULES.sizes(full), (encoder, decoder)
            assert RULES.tied(raw) == RULES.tied(full)
            assert not RULES.unsupported(full)


@pytest.mark.parametrize(
    ("outer", "inner", "generation", "expected"),
    [
        ({}, {}, None, TokenIds(50256, 50256, 50256)),
        ({"decoder_start_token_id": 3, "pad_token_id": 0}, {}, None, TokenIds(3, 50256, 0)),
        ({}, {"eos_token_id": 5}, None, TokenIds(50256, 5, 5)),
        ({"eos_token_id": 4}, {"eos_token_id": 5}, None, TokenIds(50256, 4, 4)),
        (
            {"eos_token_id": 4},
            {"eos_token_id": 5},
            {"decoder_start_token_id": 1, "eos_token_id": [2]},
            TokenIds(1, 2, 2),
        ),
        ({}, {}, {"bos_token_id": 6, "eos_token_id": 2, "pad_token_id": 9}, TokenIds(6, 2, 9)),
    ],
)
def test_special_ids_come_from_where_generate_reads_them(outer, inner, generation, expected, tmp_path):
    write(tmp_path, generation, decoder=PUBLISHED["decoder"] | inner, **outer)
    assert RULES.sizes(checked(tmp_path)).tokens == expected


def test_settings_and_their_sources(tmp_path):
    text = PUBLISHED["decoder"] | {"num_beams": 5, "max_length": 30, "length_penalty": 1.0}
    write(tmp_path, num_beams=4, decoder=text)
    assert configured_settings(tmp_path) == {
        "num_beams": Setting(4, "config.json"),
        "max_length": Setting(30, "decoder of config.json"),
    }
    write(tmp_path, {"max_new_tokens": 12, "guidance_scale": 2.0, "eos_token_id": 1}, num_beams=4, decoder=text)
    assert configured_settings(tmp_path) == {
        "max_new_tokens": Setting(12, "generation_config.json"),
        "guidance_scale": Setting(2.0, "generation_config.json"),
    }
    made = {"num_beams": 2, "_from_model_config": True}
    write(tmp_path, made, num_beams=4, decoder=text)  # changed after generation_config.json was made
    assert configured_settings(tmp_path)["num_beams"] == Setting(4, "config.json")
    write(tmp_path, made, decoder=text)
    assert configured_settings(tmp_path) == {"num_beams": Setting(2, "generation_config.json")}
    assert ignored_settings(tmp_path) == []


def test_mbart_forces_an_end_by_default(tmp_path):
    write(tmp_path, encoder={"model_type": "swin"}, decoder={"model_type": "mbart"})
    assert configured_settings(tmp_path) == {"forced_eos_token_id": Setting(2, "decoder of config.json")}
    write(tmp_path, encoder={"model_type": "swin"}, decoder={"model_type": "mbart", "forced_eos_token_id": None})
    assert configured_settings(tmp_path) == {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"encoder": {"model_type": "cvt"}},
            r"pairs the encoder 'cvt' with the decoder 'gpt2', which is not supported",
        ),
        ({"decoder": {"model_type": "opt"}}, r"decoder 'opt'.* use one of these pairs: vit with gpt2, bert"),
        ({"decoder": None}, "decoder is not a JSON object"),
        ({"decoder": {"model_type": "gpt2"}}, r"decoder\.add_cross_attention is not true"),
        ({"encoder": {"model_type": "vit", "image_size": [224, 192]}}, "only squares are supported"),
        ({"eos_token_id": [1, 2]}, r"eos_token_id is .* needs one id"),
        (
            {
                "decoder": {"model_type": "roberta", "add_cross_attention": True, "is_decoder": True},
                "decoder_start_token_id": 1,
            },
            "captions start with the pad id 1",
        ),
    ],
)
def test_other_models_are_refused_by_name(changes, message, tmp_path):
    write(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=message) as refused:
        checked(tmp_path)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("encoder", "content", "size", "before"),
    [
        ("vit", {"feature_extractor_type": "ViTFeatureExtractor", "size": 384}, (384, 384), ()),
        (
            "deit",
            {"feature_extractor_type": "DeiTFeatureExtractor", "size": 256, "crop_size": 224},
            (224,) * 2,
            (256,) * 2,
        ),
        ("deit", {"image_processor_type": "DeiTImageProcessor", "do_center_crop": False}, (256, 256), ()),
        ("beit", {"image_processor_type": "BeitImageProcessor", "do_reduce_labels": False}, (224, 224), (256, 256)),
        ("dinov2", {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 256}}, (224, 224), (256,)),
        ("dinov2", {}, (224, 224), (224,)),
        ("swin", {}, (224, 224), ()),
        ("swin", {"image_processor_type": "DeiTImageProcessor"}, (224, 224), (256, 256)),
    ],
)
def test_processors_of_the_encoders(encoder, content, size, before, tmp_path):
    decoder = PUBLISHED["decoder"] | {"model_type": PAIRS[encoder][0]}
    write(tmp_path, encoder={"model_type": encoder}, decoder=decoder)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(content))
    settings = read_processor(tmp_path).values
    assert (height_width(settings), size_before_crop(settings)) == (size, before)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"image_processor_type": "DonutImageProcessor"},
            "is for DonutImageProcessor, but VisionEncoderDecoder needs ViT",
        ),
        ({"image_processor_type": "ViTImageProcessor", "do_center_crop": True}, "do_center_crop=True"),
        ({"image_processor_type": "BitImageProcessor", "do_center_crop": False}, "keeps the aspect ratio"),
        ({"image_processor_type": "DeiTImageProcessor", "size": {"shortest_edge": 224}}, "needs a height and a width"),
    ],
)
def test_other_processors_are_refused(content, message, tmp_path):
    write(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=message):
        read_processor(tmp_path)
