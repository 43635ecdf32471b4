"""Load checkpoints as users have them: pickled, wrapped, sharded, from transformers 5, or the original .pth files."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BlipConfig, BlipForConditionalGeneration

from engine.checkpoints.blip import HEAD, HEAD_WIDTH, WORDS, read_sizes
from engine.checkpoints.files import weight_files
from engine.checkpoints.read import read_checkpoint
from engine.checkpoints.settings import assumed_settings, read_processor
from engine.errors import CheckpointError
from export.bundle import checkpoint_sha256
from export.checkpoints.find import find_checkpoint
from export.checkpoints.load import load_checkpoint, read_config
from export.checkpoints.settings import read_tokenizer
from export.reference.golden import record_golden
from export.reference.huggingface import Reference
from tests.helpers.tiny import WORDS as ALL_WORDS


@pytest.fixture
def checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))


@pytest.fixture
def weights(tiny_checkpoint: Path) -> dict[str, torch.Tensor]:
    return load_file(tiny_checkpoint / "model.safetensors")


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def assert_same_model(checkpoint: Path, tiny_checkpoint: Path) -> None:
    loaded, expected = load_checkpoint(checkpoint).state_dict(), load_checkpoint(tiny_checkpoint).state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)


def shard(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    names = sorted(weights)
    parts = {"pytorch_model-00001-of-00002.bin": names[::2], "pytorch_model-00002-of-00002.bin": names[1::2]}
    for file, part in parts.items():
        torch.save({name: weights[name] for name in part}, folder / file)
    files = {name: file for file, part in parts.items() for name in part}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))


@pytest.mark.parametrize(
    "save",
    [
        lambda folder, weights: torch.save(weights, folder / "pytorch_model.bin"),
        lambda folder, weights: torch.save(weights, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False),
        lambda folder, weights: torch.save({"state_dict": weights, "epoch": 3}, folder / "pytorch_model.bin"),
        lambda folder, weights: torch.save(
            {f"_orig_mod.module.{name}": tensor for name, tensor in weights.items()}, folder / "pytorch_model.bin"
        ),
        lambda folder, weights: torch.save(
            weights | {"text_decoder.bert.embeddings.position_ids": torch.arange(64)[None]},
            folder / "pytorch_model.bin",
        ),
        lambda folder, weights: torch.save(weights | {HEAD: weights[WORDS].clone()}, folder / "pytorch_model.bin"),
        shard,
        lambda folder, weights: save_file(
            {f"_orig_mod.{name}": tensor for name, tensor in weights.items()}, folder / "model.safetensors"
        ),
    ],
    ids=["zip", "legacy", "wrapped", "prefixes", "position_ids", "copy of the head", "shards", "safe with a prefix"],
)
def test_weights_load_in_every_format(save, checkpoint, weights, tiny_checkpoint):
    (checkpoint / "model.safetensors").unlink()
    save(checkpoint, weights)
    assert_same_model(checkpoint, tiny_checkpoint)
    assert len(checkpoint_sha256(checkpoint)) == 64


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_loaded_as_float32(dtype, checkpoint, weights):
    (checkpoint / "model.safetensors").unlink()
    torch.save({name: tensor.to(dtype) for name, tensor in weights.items()}, checkpoint / "pytorch_model.bin")
    found = load_checkpoint(checkpoint).state_dict()
    assert all(torch.equal(found[name], weights[name].to(dtype).float()) for name in weights)


@pytest.mark.parametrize("read", [read_checkpoint, lambda path: find_checkpoint(str(path))])
def test_weights_without_the_settings_next_to_them_are_refused(read, checkpoint):
    """As an original file they would get BLIP's own settings instead of those of the folder."""
    with pytest.raises(CheckpointError, match=f"is one file of a checkpoint: give its folder, {checkpoint}"):
        read(checkpoint / "model.safetensors")


def test_safetensors_are_preferred_to_a_pickle(checkpoint, tiny_checkpoint):
    (checkpoint / "pytorch_model.bin").write_bytes(b"never read")
    assert weight_files(checkpoint) == [checkpoint / "model.safetensors"]
    assert_same_model(checkpoint, tiny_checkpoint)


class Evil:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("is_zip", [True, False])
def test_malicious_pickle_is_refused_and_not_run(is_zip, checkpoint, weights, tmp_path):
    (checkpoint / "model.safetensors").unlink()
    mark = tmp_path / "ran"
    torch.save(
        weights | {"x": Evil(f"touch {mark}")},
        checkpoint / "pytorch_model.bin",
        _use_new_zipfile_serialization=is_zip,
    )
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is refused: it asks to load (posix|os|nt)\.system"):
        load_checkpoint(checkpoint)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda d: (d / "pytorch_model.bin").write_bytes(b"x" * 99), "pytorch_model.bin (cannot be read|is refused)"),
        (
            lambda d: torch.save([1, 2], d / "pytorch_model.bin"),
            "pytorch_model.bin holds a list instead of a dict of weights",
        ),
        (lambda d: torch.save({}, d / "pytorch_model.bin"), r"lacks \d+ weights of BlipForConditionalGeneration"),
        (lambda d: (d / "pytorch_model.bin.index.json").write_text("{}"), "lists no weights"),
        (
            lambda d: (d / "pytorch_model.bin.index.json").write_text('{"weight_map": {"a": "gone.bin"}}'),
            "lists files that are missing: gone.bin",
        ),
        (
            lambda d: (
                (d / "config.json").unlink()
                or (d / "adapter_config.json").write_text(
                    '{"peft_type": "LORA", "base_model_name_or_path": "Salesforce/blip-image-captioning-base"}'
                )
            ),
            "is not a checkpoint: it is an adapter .*, but a base must be a full model",
        ),
        (
            lambda d: (d / "config.json").unlink() or (d / "model_base_caption_capfilt_large.pth").touch(),
            "to use an original .pth file, pass its path: .*capfilt_large.pth",
        ),
    ],
)
def test_bad_checkpoint_is_one_line_with_a_remedy(damage, sentence, checkpoint):
    (checkpoint / "model.safetensors").unlink()
    damage(checkpoint)
    with pytest.raises(CheckpointError, match=sentence) as found:
        load_checkpoint(checkpoint)
    assert "\n" not in str(found.value)


def test_head_that_differs_from_tied_embedding_is_refused(checkpoint, weights):
    save_file(weights | {HEAD: weights[WORDS] + 1}, checkpoint / "model.safetensors")
    with pytest.raises(CheckpointError, match="tie_word_embeddings requires them to be equal"):
        load_checkpoint(checkpoint)


@pytest.mark.parametrize(
    ("name", "what"),
    [("itm_head.weight", "an image-text matching"), ("text_encoder.pooler.weight", "a question answering")],
)
def test_error_names_other_blip_models(name, what, checkpoint, weights):
    save_file(weights | {name: torch.zeros(2)}, checkpoint / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"is {what} .*checkpoint of BLIP, which cannot generate captions"):
        load_checkpoint(checkpoint)


def test_config_with_bom_and_missing_settings(checkpoint, tiny_checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    del config["text_config"]["encoder_hidden_size"]
    (checkpoint / "config.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(config | {"_commit_hash": None}).encode())
    assert_same_model(checkpoint, tiny_checkpoint)
    edit = config | {"text_config": None}
    (checkpoint / "config.json").write_text(json.dumps(edit))
    with pytest.raises(
        CheckpointError, match=r"config\.json requires"
    ):  # the sizes of BLIP base, which are the default
        load_checkpoint(checkpoint)


def test_image_processor_of_transformers_5_is_read(checkpoint):
    own = json.loads((checkpoint / "preprocessor_config.json").read_text())
    own |= {"image_mean": [0.5, 0.4, 0.3], "image_std": 0.5, "crop_size": None, "data_format": "channels_first"}
    (checkpoint / "processor_config.json").write_text(json.dumps({"image_processor": own}))
    with pytest.raises(CheckpointError, match="differ in image_mean, image_std: delete the wrong file"):
        read_processor(checkpoint)
    (checkpoint / "preprocessor_config.json").unlink()
    found = read_processor(checkpoint)
    assert found.values["image_mean"] == [0.5, 0.4, 0.3]
    assert found.values["image_std"] == [0.5] * 3
    edit_json(checkpoint / "processor_config.json", image_processor=own | {"size": {"height": 48, "width": 48}})
    with pytest.raises(CheckpointError, match=r"processor_config\.json makes 48x48 px images, .* pass --image-size 48"):
        load_checkpoint(checkpoint)
    edit_json(checkpoint / "processor_config.json", image_processor=own | {"do_center_crop": True, "do_pad": False})
    with pytest.raises(CheckpointError, match="settings that the engine does not support \\(do_center_crop=True\\)"):
        read_processor(checkpoint)


def test_tokenizer_of_transformers_5_needs_one_file(checkpoint, tiny_checkpoint):
    before = read_tokenizer(tiny_checkpoint)
    for name in ("vocab.txt", "special_tokens_map.json", "added_tokens.json"):
        (checkpoint / name).unlink(missing_ok=True)
    edit_json(checkpoint / "tokenizer_config.json", extra_special_tokens=["[ENC]"], tokenizer_class="TokenizersBackend")
    after = read_tokenizer(checkpoint)
    text = "axial ct of the chest, showing a mass"
    assert after(text)["input_ids"] == before(text)["input_ids"]
    assert after.decode(before(text)["input_ids"], skip_special_tokens=True) == before.decode(
        before(text)["input_ids"], skip_special_tokens=True
    )


def test_vocab_txt_alone_is_a_tokenizer(checkpoint, tiny_checkpoint):
    before = read_tokenizer(tiny_checkpoint)
    words = sorted(before.get_vocab(), key=before.get_vocab().__getitem__)
    (checkpoint / "tokenizer.json").unlink()
    (checkpoint / "vocab.txt").write_text("\n".join(words) + "\n")
    text = "axial ct of the chest, showing a mass"
    assert read_tokenizer(checkpoint)(text)["input_ids"] == before(text)["input_ids"]


ORIGINAL = (
    ("vision_model.embeddings.class_embedding", "visual_encoder.cls_token"),
    ("vision_model.embeddings.position_embedding", "visual_encoder.pos_embed"),
    ("vision_model.embeddings.patch_embedding.", "visual_encoder.patch_embed.proj."),
    ("vision_model.post_layernorm.", "visual_encoder.norm."),
    ("vision_model.encoder.layers.", "visual_encoder.blocks."),
    (".layer_norm", ".norm"),
    (".self_attn.projection.", ".attn.proj."),
    (".self_attn.qkv.", ".attn.qkv."),
)


@pytest.mark.parametrize(("width", "layers"), [(768, 12), (1024, 24)], ids=["base", "large"])
def test_sizes_of_original_files_are_read_from_tensors(width, layers):
    """Only names and shapes, as in an original file of base or large, taken from transformers' model of that size."""
    config = BlipConfig(
        vision_config={
            "hidden_size": width,
            "intermediate_size": 4 * width,
            "num_hidden_layers": layers,
            "num_attention_heads": width // 64,
            "image_size": 384,
        },
        text_config={"vocab_size": 30524, "encoder_hidden_size": width},
    )
    with torch.device("meta"):
        shapes = BlipForConditionalGeneration(config).state_dict()
    tokenizer = {"model": {"vocab": {"word": 30523}}, "added_tokens": [{"id": 0}]}
    found = read_sizes({name: tuple(one.shape) for name, one in shapes.items()}, Path("model.pth"), tokenizer)
    found = BlipConfig.from_dict(found)
    assert found.vision_config.num_attention_heads == config.vision_config.num_attention_heads
    with torch.device("meta"):
        rebuilt = BlipForConditionalGeneration(found).state_dict()
    assert {name: one.shape for name, one in rebuilt.items()} == {name: one.shape for name, one in shapes.items()}


def test_original_file_is_converted_without_loss(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    torch.manual_seed(0)
    sizes = {"hidden_size": HEAD_WIDTH, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 1}
    config = BlipConfig(
        vision_config=sizes | {"image_size": 32, "patch_size": 16},
        text_config=sizes | {"vocab_size": 30524, "encoder_hidden_size": HEAD_WIDTH, "max_position_embeddings": 40},
    )
    expected = BlipForConditionalGeneration(config).state_dict()
    original_weights = {}
    for name, tensor in expected.items():
        for new, original in ORIGINAL:
            name = name.replace(new, original) if not name.startswith("text_decoder.") else name
        original_weights[name] = tensor.half() if name.endswith("class_embedding") else tensor
    file = tmp_path / "model_base_caption.pth"
    position_ids = {"text_decoder.bert.embeddings.position_ids": torch.arange(40)[None]}
    torch.save({"model": original_weights | position_ids}, file)
    folder = find_checkpoint(str(file))
    found = load_checkpoint(folder)
    assert found.config.vision_config.image_size == 32
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.state_dict().items())
    assert read_tokenizer(folder).convert_tokens_to_ids(["[DEC]", "[ENC]"]) == [30522, 30523]
    assert find_checkpoint(str(file)) == folder
    torch.save({"model": original_weights | {"text_encoder.x": torch.zeros(1)}}, tmp_path / "model_base_vqa.pth")
    with pytest.raises(CheckpointError, match="a question answering or retrieval checkpoint of BLIP"):
        find_checkpoint(str(tmp_path / "model_base_vqa.pth"))


FIRST = "text_decoder.bert.encoder.layer.0.output.dense.weight"


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda w: w[FIRST].view(-1)[:1].fill_(float("nan")), f"1 weight is NaN or infinite \\(in {FIRST}\\)"),
        (lambda w: w["vision_model.post_layernorm.bias"].fill_(float("inf")), r"24 weights are .*post_layernorm"),
        (
            lambda w: [tensor.zero_() for name, tensor in w.items() if name.startswith("text_")],
            "all weights of text_decoder are 0",
        ),
    ],
    ids=["nan", "infinite", "zero"],
)
def test_weights_of_diverged_training_are_refused(damage, sentence, checkpoint, weights):
    damage(weights)
    save_file(weights, checkpoint / "model.safetensors")
    with pytest.raises(CheckpointError, match=sentence):
        load_checkpoint(checkpoint)


def test_export_refuses_weights_that_overflow(checkpoint, weights):
    weights[FIRST].fill_(1e38)
    save_file(weights, checkpoint / "model.safetensors")
    with pytest.raises(CheckpointError, match="scores are NaN or infinite"):
        record_golden(Reference.load(checkpoint))


STAND_INS = {
    b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n": "git lfs pull",
    b"<!DOCTYPE html><html>404": "an HTML page instead of the file",
    b"": "empty file",
}


@pytest.mark.parametrize("content", STAND_INS)
@pytest.mark.parametrize(
    "name",
    ["model.safetensors", "pytorch_model.bin", "config.json", "tokenizer.json", "special_tokens_map.json"],
)
def test_error_names_placeholder_files(name, content, checkpoint):
    if name == "pytorch_model.bin":
        (checkpoint / "model.safetensors").unlink()
    (checkpoint / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{name}: .*{STAND_INS[content]}"):
        Reference.load(checkpoint)


def test_tokenizer_larger_than_the_model_is_refused(checkpoint, tiny_checkpoint):
    tokenizer = read_tokenizer(tiny_checkpoint)
    tokenizer.add_tokens(["hippocampus"])
    tokenizer.save_pretrained(checkpoint)
    with pytest.raises(CheckpointError, match=r"has 67 entries, but the model has 66 .*resize_token_embeddings"):
        Reference.load(checkpoint)


def test_tokenizer_of_special_tokens_only_is_refused(checkpoint):
    content = json.loads((checkpoint / "tokenizer.json").read_text())
    template, named = content["added_tokens"][0], {token["content"] for token in content["added_tokens"]}
    rest = [template | {"id": content["model"]["vocab"][word], "content": word} for word in {*ALL_WORDS} - named]
    edit_json(checkpoint / "tokenizer.json", added_tokens=content["added_tokens"] + rest)
    with pytest.raises(CheckpointError, match="every token of the tokenizer is special"):
        read_tokenizer(checkpoint)


def test_code_of_a_tokenizer_is_refused(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda _: "y")  # transformers asks whether to run the code
    (checkpoint / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    edit_json(
        checkpoint / "tokenizer_config.json",
        tokenizer_class="Evil",
        auto_map={"AutoTokenizer": ["evil.Evil", "evil.Evil"]},
    )
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json asks for custom code"):
        read_tokenizer(checkpoint)
    assert not (tmp_path / "ran").exists()


def test_attention_kernels_of_a_config_are_dropped(checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    names = ("_attn_implementation", "_attn_implementation_internal", "attn_implementation")
    kernels = dict.fromkeys(names, "owner/kernel")
    parts = {name: config[name] | kernels for name in ("text_config", "vision_config")}
    edit_json(checkpoint / "config.json", **parts, **kernels)
    assert "owner/kernel" not in str(vars(read_config(checkpoint)))
    assert "owner/kernel" not in str(vars(read_config(checkpoint).text_config))
    load_checkpoint(checkpoint)


@pytest.mark.parametrize(
    ("file", "setting", "value"),
    [
        ("preprocessor_config.json", "image_std", [0, 0.2, 0.2]),
        ("preprocessor_config.json", "image_mean", [float("nan"), 0.2, 0.2]),
        ("preprocessor_config.json", "rescale_factor", "x"),
        ("preprocessor_config.json", "size", {"height": "x", "width": -3}),
        ("config.json", "dtype", "__import__"),
    ],
)
def test_invalid_settings_are_one_line_errors(file, setting, value, checkpoint):
    edit_json(checkpoint / file, **{setting: value})
    with pytest.raises(CheckpointError, match=f"{file}.*") as found:
        load_checkpoint(checkpoint)
    assert "\n" not in str(found.value)


def test_error_names_files_that_trainer_does_not_save(checkpoint, tmp_path):
    assert assumed_settings(checkpoint) == []
    for file in checkpoint.iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            file.unlink()
    with pytest.raises(CheckpointError, match=r"has no tokenizer .* AutoProcessor\.from_pretrained\('BASE'\)"):
        Reference.load(checkpoint)
    (note,) = assumed_settings(checkpoint)
    assert "has no preprocessor_config.json" in note
    for step in (500, 1000):
        shutil.copytree(checkpoint, tmp_path / f"run/checkpoint-{step}")
    with pytest.raises(CheckpointError, match="pass one of checkpoint-500, checkpoint-1000"):
        load_checkpoint(tmp_path / "run")
