"""A checkpoint read without torch equals what the export reads and writes, value for value."""

from __future__ import annotations

import itertools
import json
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BlipConfig,
    BlipForConditionalGeneration,
    Florence2Config,
    GitConfig,
    VisionEncoderDecoderConfig,
)

from engine.checkpoints.blip import HEAD, HEAD_WIDTH, WORDS, BlipRules
from engine.checkpoints.families import RULES
from engine.checkpoints.read import Checkpoint, bicubic_matrix, read_checkpoint
from engine.checkpoints.settings import DEFAULTS, OTHER_DEFAULTS, assumed_settings, ignored_settings, verdict
from engine.checkpoints.tokenizer import read_tokenizer
from engine.checkpoints.weights import NO_WEIGHTS
from engine.errors import CheckpointError
from export.bundle import describe_checkpoint
from export.checkpoints.find import find_checkpoint
from export.checkpoints.settings import check_supported
from export.checkpoints.settings import read_tokenizer as read_by_transformers
from export.families import PUBLISHED, family_for
from export.reference.huggingface import Reference, normalisation
from tests.helpers.tiny import IMAGE_SIZE, PATCH_SIZE, SPECIAL
from tests.helpers.tiny import WORDS as ALL_WORDS
from tests.helpers.tiny_florence import make_florence_checkpoint
from tests.helpers.tiny_git import make_git_checkpoint
from tests.helpers.tiny_pairs import make_pair

Weights = dict[str, torch.Tensor]


@pytest.fixture
def checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))


@pytest.fixture
def weights(tiny_checkpoint: Path) -> Weights:
    return load_file(tiny_checkpoint / "model.safetensors")


def unchanged(*_: object) -> None:
    pass


def edit_json(path: Path, **changes: object) -> None:
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not ...}))


def edit_part(checkpoint: Path, part: str, **changes: object) -> None:
    edit_json(
        checkpoint / "config.json", **{part: json.loads((checkpoint / "config.json").read_text())[part] | changes}
    )


def text_of(tokenizer) -> str:
    """Return a tokenizer as export.bundle writes it."""
    backend = tokenizer.backend_tokenizer
    backend.no_padding()
    backend.no_truncation()
    return backend.to_str(pretty=True)


def assert_as_exported(found: Checkpoint, folder: Path, image_size: int | None = None) -> None:
    """Compare everything with the export of `folder`. Weights of a resized table may differ by 1e-6."""
    reference = Reference.load(folder, image_size)
    manifest = describe_checkpoint(reference, folder)
    assert asdict(found.model) == manifest["model"]
    assert asdict(found.tokens) == manifest["tokens"]
    assert found.image.as_json() == manifest["image"]
    assert found.rescale == normalisation(reference.image_processor)[0]
    assert found.family == manifest["family"]
    assert (found.generation, found.generation_from) == (manifest["generation"], manifest["generation_from"])
    assert found.clean_up_tokenization_spaces == manifest["clean_up_tokenization_spaces"]
    assert found.tokenizer == text_of(reference.tokenizer)
    assert found.notes == (*ignored_settings(folder), *assumed_settings(folder))
    if found.path == folder:
        assert found.description == manifest["checkpoint"]
        assert found.description["sha256"] == manifest["checkpoint"]["sha256"]
    unused = RULES[found.family].unused(reference.model.config.to_dict())
    weights = reference.model.state_dict()
    expected = {
        name: one for name, one in weights.items() if not (name.endswith(NO_WEIGHTS) or name.startswith(unused))
    }
    assert set(found.weights) == set(expected)
    for name, tensor in expected.items():
        weight = found.weights[name]
        assert weight.dtype == np.float32
        assert weight.flags.c_contiguous
        assert found.weights.shape(name) == weight.shape == tuple(tensor.shape)
        if name == RULES[found.family].position_table and image_size:
            np.testing.assert_allclose(weight, tensor.numpy(), rtol=0, atol=1e-6)
        else:
            assert np.array_equal(weight, tensor.numpy()), name


def pickled(folder: Path, weights: object, name: str = "pytorch_model.bin") -> None:
    (folder / "model.safetensors").unlink(missing_ok=True)
    torch.save(weights, folder / name)


def sharded(folder: Path, weights: Weights, *, is_safe: bool) -> None:
    (folder / "model.safetensors").unlink()
    stem, suffix = ("model", "safetensors") if is_safe else ("pytorch_model", "bin")
    names = sorted(weights)
    files = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"{stem}-0000{number}-of-00002.{suffix}"
        content = {name: weights[name] for name in part}
        (save_file if is_safe else torch.save)(content, folder / file)
        files |= dict.fromkeys(part, file)
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))


def strided(weights: Weights) -> Weights:
    """Return weights that are views: transposed matrices, and vectors that are every second number of a storage."""
    views = {}
    for name, tensor in weights.items():
        if tensor.dim() == 2:
            views[name] = tensor.t().contiguous().t()
        elif tensor.dim() == 1:
            views[name] = torch.stack([tensor, tensor + 1], 1)[:, 0]
        else:
            views[name] = tensor
    return views


def tied_in_one_storage(weights: Weights) -> Weights:
    return weights | {HEAD: weights[WORDS], "text_decoder.bert.embeddings.position_ids": torch.arange(64)[None]}


FORMS = {
    "safetensors": unchanged,
    "zip": pickled,
    "wrapped": lambda folder, weights: pickled(folder, {"epoch": 3, "lr": [0.1], "state_dict": {"model": weights}}),
    "parameters": lambda folder, weights: pickled(folder, {n: torch.nn.Parameter(w) for n, w in weights.items()}),
    "prefixes": lambda folder, weights: pickled(folder, {f"_orig_mod.module.{n}": w for n, w in weights.items()}),
    "head in the same storage": lambda folder, weights: pickled(folder, tied_in_one_storage(weights)),
    "head copied": lambda folder, weights: pickled(folder, weights | {HEAD: weights[WORDS].clone()}),
    "head alone": lambda folder, weights: pickled(folder, {HEAD if n == WORDS else n: w for n, w in weights.items()}),
    "more weights": lambda folder, weights: pickled(folder, weights | {"other": torch.zeros(3)}),
    "views": lambda folder, weights: pickled(folder, strided(weights)),
    "float16": lambda folder, weights: save_file(
        {n: w.half() for n, w in weights.items()}, folder / "model.safetensors"
    ),
    "bfloat16": lambda folder, weights: save_file(
        {n: w.bfloat16() for n, w in weights.items()}, folder / "model.safetensors"
    ),
    "bfloat16 pickled": lambda folder, weights: pickled(folder, {n: w.bfloat16() for n, w in weights.items()}),
    "float64": lambda folder, weights: pickled(folder, {n: w.double() for n, w in weights.items()}),
    "safe with a prefix": lambda folder, weights: save_file(
        {f"model.{n}": w for n, w in weights.items()}, folder / "model.safetensors"
    ),
    "shards": lambda folder, weights: sharded(folder, weights, is_safe=True),
    "shards pickled": lambda folder, weights: sharded(folder, weights, is_safe=False),
}


@pytest.mark.parametrize("form", FORMS)
def test_weights_in_every_form_equal_the_export(form, checkpoint, weights):
    FORMS[form](checkpoint, weights)
    assert_as_exported(read_checkpoint(checkpoint), checkpoint)


def test_untied_head_is_read(checkpoint, weights):
    edit_part(checkpoint, "text_config", tie_word_embeddings=False)
    with pytest.raises(CheckpointError, match=f"lacks 1 weight .*{HEAD}"):
        read_checkpoint(checkpoint)
    pickled(checkpoint, weights | {HEAD: weights[WORDS] + 1})
    assert_as_exported(read_checkpoint(checkpoint), checkpoint)
    edit_part(checkpoint, "text_config", tie_word_embeddings=True)
    with pytest.raises(CheckpointError, match="tie_word_embeddings requires them to be equal"):
        read_checkpoint(checkpoint)


@pytest.mark.parametrize("size", [IMAGE_SIZE, IMAGE_SIZE + PATCH_SIZE, 3 * PATCH_SIZE, 9 * PATCH_SIZE])
def test_resized_position_table_equals_the_export(size, checkpoint):
    assert_as_exported(read_checkpoint(checkpoint, image_size=size), checkpoint, size)


def test_image_size_that_does_not_fit_is_refused(checkpoint):
    with pytest.raises(CheckpointError, match="image size 33 is not a multiple of the patch size 8"):
        read_checkpoint(checkpoint, image_size=33)
    edit_json(checkpoint / "preprocessor_config.json", size={"height": 48, "width": 48})
    with pytest.raises(CheckpointError, match=r"makes 48x48 px images, .* pass --image-size 48"):
        read_checkpoint(checkpoint)
    assert read_checkpoint(checkpoint, image_size=48).image.height == 48


@pytest.mark.parametrize(("old", "new"), [(24, 16), (24, 14), (14, 24), (24, 37), (7, 30), (2, 9), (1, 3)])
def test_bicubic_interpolation_equals_torch(old, new):
    grid = torch.randn(1, 5, old, old, generator=torch.Generator().manual_seed(0))
    expected = torch.nn.functional.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)[0].numpy()
    rows = bicubic_matrix(old, new)
    np.testing.assert_allclose(np.einsum("yi,xj,cij->cyx", rows, rows, grid[0].numpy()), expected, rtol=0, atol=1e-6)


def test_settings_of_processor_and_generation_equal_the_export(checkpoint):
    edit_json(
        checkpoint / "preprocessor_config.json",
        resample=2,
        do_normalize=False,
        rescale_factor=1 / 127.5,
    )
    edit_part(checkpoint, "text_config", num_beams=3, max_length=30, no_repeat_ngram_size=0, length_penalty=0.5)
    edit_json(checkpoint / "generation_config.json", max_length=99)
    found = read_checkpoint(checkpoint)
    assert found.generation == {"num_beams": 3, "max_length": 30, "length_penalty": 0.5}
    assert any("generation_config.json sets max_length=99" in note for note in found.notes)
    assert_as_exported(found, checkpoint)
    edit_json(checkpoint / "preprocessor_config.json", do_normalize=True, do_rescale=False, image_std=0.5)
    assert_as_exported(read_checkpoint(checkpoint), checkpoint)


def test_config_without_sizes_has_the_defaults_of_transformers():
    rules, config = BlipRules(), BlipConfig()
    assert rules.sizes({}) == rules.sizes(config.to_dict())
    assert rules.shape({}) == rules.shape(config.to_dict())
    assert rules.weight_shapes({}) == rules.weight_shapes(config.to_dict())
    assert rules.tied({}) == rules.tied(config.to_dict())


OTHERS = {
    "vit-gpt2": lambda folder: make_pair(folder, "vit", "gpt2"),
    "trocr": lambda folder: make_pair(folder, "vit", "trocr", vision={"qkv_bias": False}),
    "git": make_git_checkpoint,
    "florence": make_florence_checkpoint,
    "first florence": lambda folder: make_florence_checkpoint(folder, is_first=True),
}
"""Checkpoints of other families that are converted."""


@pytest.mark.parametrize("image_size", [None, 48])
@pytest.mark.parametrize("name", OTHERS)
def test_other_families_equal_the_export(name, image_size, tmp_path):
    folder = OTHERS[name](tmp_path / name)
    assert_as_exported(read_checkpoint(folder, image_size=image_size), folder, image_size)


def test_image_sizes_of_other_families_fit_their_patches(tmp_path):
    for name, make in OTHERS.items():
        if "florence" in name:  # its patches overlap, so that there are no sizes that fit
            continue
        with pytest.raises(CheckpointError, match="image size 33 is not a multiple of the patch size 8"):
            read_checkpoint(make(tmp_path / name), image_size=33)


@pytest.mark.parametrize("architecture", PUBLISHED)
def test_weight_shapes_of_published_architectures(architecture):
    config = PUBLISHED[architecture]
    rules, raw = RULES[config.model_type], json.loads(json.dumps(config.to_dict()))
    with torch.device("meta"):
        weights = family_for(config).model_class(config).state_dict()
    unused = rules.unused(raw)
    expected = {name: tuple(one.shape) for name, one in weights.items() if not name.startswith(unused)}
    assert rules.weight_shapes(raw) == {n: shape for n, shape in expected.items() if not n.endswith(NO_WEIGHTS)}


def test_shapes_of_other_families_have_the_defaults_of_transformers():
    assert RULES["git"].shape({}) == RULES["git"].shape(GitConfig().to_dict())
    size = {"image_size": 768}
    assert RULES["florence2"].shape(size) == RULES["florence2"].shape(Florence2Config(**size).to_dict())
    rules = RULES["vision-encoder-decoder"]
    for decoder in ("gpt2", "trocr"):
        text = {"model_type": decoder, "is_decoder": True, "add_cross_attention": True}
        raw = {"encoder": {"model_type": "vit"}, "decoder": text}
        assert rules.shape(raw) == rules.shape(VisionEncoderDecoderConfig.from_dict(raw).to_dict())


def test_other_pairs_need_torch(tmp_path):
    folder = make_pair(tmp_path / "swin", "swin", "bert")
    with pytest.raises(CheckpointError, match=r"swin is a VisionEncoderDecoder .*needs torch.*`python -m export`"):
        read_checkpoint(folder)


LIES = {
    "git": [("num_hidden_layers", 10**6), ("hidden_size", -1), ("vision_config", {"num_hidden_layers": "2"})],
    "vit-gpt2": [("decoder", {"n_layer": 10**6}), ("encoder", {"hidden_size": True}), ("decoder", {"n_head": 7})],
    "trocr": [("decoder", {"decoder_layers": 10**9}), ("decoder", {"d_model": 0})],
    "florence": [
        ("text_config", {"encoder_layers": 10**6}),
        ("text_config", {"d_model": 33}),
        ("vision_config", {"depths": [1, 1, 10**6, 1]}),
        ("vision_config", {"embed_dim": [8, 8, 16, "16"]}),
        ("image_size", 10**9),
    ],
}


@pytest.mark.parametrize(("name", "setting", "value"), [(n, *lie) for n, lies in LIES.items() for lie in lies])
def test_configurations_that_lie_about_sizes_are_refused(name, setting, value, tmp_path):
    folder = OTHERS[name](tmp_path / name)
    if isinstance(value, dict):
        value = json.loads((folder / "config.json").read_text())[setting] | value
    edit_json(folder / "config.json", **{setting: value})
    with pytest.raises(CheckpointError, match=r"must be a whole number|is not a multiple of") as refused:
        read_checkpoint(folder)
    assert "\n" not in str(refused.value)


REFUSED = sorted(name for name in DEFAULTS | OTHER_DEFAULTS if verdict(name) == "refused")
VALUES = {
    "bool": True,
    "stop_strings": ["a"],
    "dola_layers": "low",
    "cache_implementation": "static",
    "sequence_bias": [[[3], 1.0]],
    "force_words_ids": [[3]],
    "watermarking_config": {"greenlist_ratio": 0.3},
    "exponential_decay_length_penalty": [3, 1.5],
}


@pytest.mark.parametrize("name", REFUSED)
def test_setting_that_changes_captions_is_refused(name, checkpoint):
    default = (DEFAULTS | OTHER_DEFAULTS)[name]
    value = VALUES.get(name, True if isinstance(default, bool) else 2)
    edit_part(checkpoint, "text_config", **{name: value})
    with pytest.raises(CheckpointError, match=f"does not support .*{name}="):
        read_checkpoint(checkpoint)


def test_refused_settings_are_those_of_transformers(tiny_reference, tiny_checkpoint):
    """Every field of GenerationConfig that a configuration could set, and the export would refuse, is known here."""
    fields = type(tiny_reference.model.text_decoder.generation_config)().to_dict()
    assert {name for name in fields if verdict(name) == "refused"} <= set(DEFAULTS) | set(OTHER_DEFAULTS)
    check_supported(tiny_reference.model, tiny_checkpoint)


def vocabulary_only(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.txt").write_text("\n".join(SPECIAL + ALL_WORDS) + "\n")


def without(*names: str):
    return lambda folder: [(folder / name).unlink(missing_ok=True) for name in names]


def with_settings(**changes: object):
    return lambda folder: edit_json(folder / "tokenizer_config.json", **changes)


def without_decoder(folder: Path) -> None:
    edit_json(folder / "tokenizer_config.json", added_tokens_decoder=...)
    (folder / "added_tokens.json").write_text(json.dumps({"[DEC]": 64, "[ENC]": 65}))


def with_padding(folder: Path) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json")) if (folder / "tokenizer.json").exists() else None
    if tokenizer is not None:
        tokenizer.enable_padding(pad_token="[PAD]", length=8)
        tokenizer.enable_truncation(5)
        tokenizer.save(str(folder / "tokenizer.json"))


SOURCES = {"tokenizer.json": unchanged, "vocab.txt": vocabulary_only}
SPECIAL_DICT = {"content": "[DEC]", "lstrip": True, "rstrip": False, "normalized": False, "single_word": False}
EDITS = {
    "as saved": unchanged,
    "no settings": without("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    "map only": without("tokenizer_config.json", "added_tokens.json"),
    "added_tokens.json": without_decoder,
    "no map": without("special_tokens_map.json", "added_tokens.json"),
    "no class": with_settings(tokenizer_class=...),
    "cased": with_settings(do_lower_case=False, strip_accents=True, tokenize_chinese_chars=False),
    "not basic": with_settings(do_basic_tokenize=False),
    "clean": with_settings(clean_up_tokenization_spaces=True),
    "not clean": with_settings(clean_up_tokenization_spaces=False),
    "a new token": with_settings(bos_token="[NEW]", additional_special_tokens=["[ENC]", "[MORE]"]),
    "an object": with_settings(bos_token=SPECIAL_DICT | {"__type": "AddedToken"}, added_tokens_decoder=...),
    "plain objects": with_settings(bos_token=SPECIAL_DICT, additional_special_tokens=[SPECIAL_DICT]),
    "extra dict": with_settings(extra_special_tokens={"image_token": "[IMG]"}),
    "transformers 5": with_settings(
        tokenizer_class="TokenizersBackend", extra_special_tokens=["[ENC]"], added_tokens_decoder=...
    ),
    "extra list": with_settings(extra_special_tokens=["[ENC]"]),
    "plain class": with_settings(tokenizer_class="PreTrainedTokenizerFast"),
    "padding": with_padding,
}


@pytest.mark.parametrize(("source", "edit"), list(itertools.product(SOURCES, EDITS)))
def test_tokenizer_equals_that_of_transformers(source, edit, checkpoint):
    EDITS[edit](checkpoint)
    SOURCES[source](checkpoint)
    try:
        expected = read_by_transformers(checkpoint)
    except CheckpointError:
        with pytest.raises(CheckpointError, match="tokenizer") as refused:
            read_tokenizer(checkpoint, "BertTokenizer", 100)
        assert "\n" not in str(refused.value)
        return
    found = read_tokenizer(checkpoint, "BertTokenizer", 100)
    assert found.text == text_of(expected)
    assert found.clean_up_tokenization_spaces == expected.clean_up_tokenization_spaces


BYTE_PAIR_EDITS = {
    "as saved": unchanged,
    "no settings": without("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    "no map": without("special_tokens_map.json", "added_tokens.json"),
    "map only": lambda folder: edit_json(folder / "tokenizer_config.json", added_tokens_decoder=...),
    "no class": with_settings(tokenizer_class=...),
    "fast class of GPT-2": with_settings(tokenizer_class="GPT2TokenizerFast"),
    "class of GPT-2": with_settings(tokenizer_class="GPT2Tokenizer"),
    "fast class of RoBERTa": with_settings(tokenizer_class="RobertaTokenizerFast"),
    "class of RoBERTa": with_settings(tokenizer_class="RobertaTokenizer"),
    "plain class": with_settings(tokenizer_class="PreTrainedTokenizerFast"),
    "prefix space": with_settings(add_prefix_space=True),
    "no prefix space": with_settings(add_prefix_space=...),
    "not trimmed": with_settings(trim_offsets=False),
    "start added": with_settings(add_bos_token=True),
    "padding token": with_settings(pad_token="<|endoftext|>"),
    "a new token": with_settings(bos_token="[NEW]", additional_special_tokens=["[MORE]"]),
    "objects": with_settings(
        bos_token=SPECIAL_DICT | {"__type": "AddedToken", "content": "</s>"}, added_tokens_decoder=...
    ),
    "clean": with_settings(clean_up_tokenization_spaces=True),
    "transformers 5": with_settings(tokenizer_class="TokenizersBackend", added_tokens_decoder=...),
    "padding": with_padding,
}


def with_spaces(folder: Path) -> None:
    """Make tokenizer.json differ from the settings."""
    content = json.loads((folder / "tokenizer.json").read_text())
    content["pre_tokenizer"]["add_prefix_space"] = True
    (folder / "tokenizer.json").write_text(json.dumps(content))


BYTE_PAIR_SOURCES = {
    "tokenizer.json": unchanged,
    "merges.txt": without("tokenizer.json"),
    "other prefix": with_spaces,
}


@pytest.mark.parametrize("decoder", ["gpt2", "trocr"])
@pytest.mark.parametrize(("source", "edit"), list(itertools.product(BYTE_PAIR_SOURCES, BYTE_PAIR_EDITS)))
def test_byte_pairs_equal_those_of_transformers(source, edit, decoder, tmp_path):
    checkpoint = make_pair(tmp_path, "vit", decoder)
    BYTE_PAIR_SOURCES[source](checkpoint)
    BYTE_PAIR_EDITS[edit](checkpoint)
    try:
        expected = read_by_transformers(checkpoint)
    except CheckpointError:
        with pytest.raises(CheckpointError, match="tokenizer") as refused:
            read_tokenizer(checkpoint, "PreTrainedTokenizer", 200)
        assert "\n" not in str(refused.value)
        return
    found = read_tokenizer(checkpoint, "PreTrainedTokenizer", 200)
    assert found.text == text_of(expected)
    assert found.clean_up_tokenization_spaces == expected.clean_up_tokenization_spaces


def test_unusable_tokenizers_are_refused(checkpoint):
    with pytest.raises(CheckpointError, match=r"has 66 entries, but the model has 65 .*resize_token_embeddings"):
        read_tokenizer(checkpoint, "BertTokenizer", 65)
    edit_json(checkpoint / "tokenizer_config.json", tokenizer_class="LlamaTokenizerFast")
    with pytest.raises(CheckpointError, match=r"LlamaTokenizerFast, .*`python -m export`"):
        read_tokenizer(checkpoint, "BertTokenizer", 66)
    edit_json(checkpoint / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", None]})
    with pytest.raises(CheckpointError, match="asks for custom code"):
        read_tokenizer(checkpoint, "BertTokenizer", 66)
    for name in ("tokenizer.json", "vocab.txt"):
        (checkpoint / name).unlink(missing_ok=True)
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        read_tokenizer(checkpoint, "BertTokenizer", 66)


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


@pytest.mark.parametrize("image_size", [None, 48])
def test_original_file_equals_the_export(image_size, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    torch.manual_seed(0)
    sizes = {"hidden_size": HEAD_WIDTH, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 1}
    config = BlipConfig(
        vision_config=sizes | {"image_size": 32, "patch_size": 16},
        text_config=sizes | {"vocab_size": 30524, "max_position_embeddings": 40},
    )
    original = {}
    for name, tensor in BlipForConditionalGeneration(config).state_dict().items():
        for new, old in ORIGINAL:
            name = name.replace(new, old) if not name.startswith("text_decoder.") else name
        original[name] = tensor.half() if name.endswith("cls_token") else tensor
    file = tmp_path / "model_base_caption.pth"
    torch.save({"model": original | {"temp": torch.zeros(1)}}, file)
    found = read_checkpoint(file, image_size=image_size)
    assert found.description["name"] == file.name
    assert_as_exported(found, find_checkpoint(str(file)), image_size)
    torch.save({"model": original | {"text_encoder.x": torch.zeros(1)}}, file)
    with pytest.raises(CheckpointError, match="a question answering or retrieval checkpoint of BLIP"):
        read_checkpoint(file)
    torch.save({"model": {"x": torch.zeros(1)}}, file)
    with pytest.raises(CheckpointError, match="visual_encoder or text_decoder is missing"):
        read_checkpoint(file)


FIRST = "text_decoder.bert.encoder.layer.0.output.dense.weight"


def test_broken_numbers_are_refused_when_they_are_read(checkpoint, weights):
    weights[FIRST].view(-1)[:2] = torch.tensor([float("nan"), float("-inf")])
    save_file(weights, checkpoint / "model.safetensors")
    found = read_checkpoint(checkpoint)
    with pytest.raises(CheckpointError, match=f"2 weights are NaN or infinite \\(in {FIRST}\\)"):
        found.weights[FIRST]


def test_weights_that_are_all_zero_are_refused(checkpoint, weights):
    for name, tensor in weights.items():
        if name.startswith("vision_"):
            tensor.zero_()
    save_file(weights, checkpoint / "model.safetensors")
    with pytest.raises(CheckpointError, match="all weights of vision_model are 0"):
        read_checkpoint(checkpoint)


@pytest.mark.parametrize(
    ("part", "name", "value", "sentence"),
    [
        ("text_config", "hidden_size", 48, r"has the shape .*, but config\.json requires"),
        ("text_config", "num_hidden_layers", 3, r"lacks 26 weights"),
        ("text_config", "num_hidden_layers", 10**9, r"num_hidden_layers is 1000000000, but it must be"),
        ("text_config", "vocab_size", 10**9, r"vocab_size is 1000000000, but it must be"),
        ("text_config", "vocab_size", 10**6, r"word_embeddings.weight has the shape"),
        ("text_config", "num_attention_heads", 0, r"num_attention_heads is 0"),
        (
            "text_config",
            "num_attention_heads",
            5,
            r"the width 32 of text_config is not a multiple of its 5 attention heads",
        ),
        ("text_config", "hidden_size", "x", r"hidden_size is 'x'"),
        ("text_config", "hidden_size", [1], r"hidden_size is \[1\]"),
        ("text_config", "bos_token_id", 66, r"token ids .* do not fit a vocabulary of 66"),
        ("vision_config", "patch_size", 4, r"has the shape .*, but config\.json requires"),
        ("vision_config", "image_size", 10**7, r"position_embedding has the shape"),
        ("vision_config", "image_size", True, r"image_size is True"),
        ("text_config", "is_decoder", False, r"is_decoder is false"),
        ("text_config", "num_beams", 0, r"text_config of config\.json: "),
        ("text_config", "position_embedding_type", "relative_key", r"position_embedding_type='relative_key'"),
    ],
)
def test_config_that_lies_is_one_line(part, name, value, sentence, checkpoint):
    edit_part(checkpoint, part, **{name: value})
    with pytest.raises(CheckpointError, match=sentence) as refused:
        read_checkpoint(checkpoint)
    assert "\n" not in str(refused.value)


def test_other_models_and_code_are_refused(checkpoint, weights):
    edit_json(checkpoint / "config.json", auto_map={"AutoModel": "evil.Evil"})
    with pytest.raises(CheckpointError, match="asks for custom code"):
        read_checkpoint(checkpoint)
    edit_json(
        checkpoint / "config.json", auto_map=..., model_type="blip-2", architectures=["Blip2ForConditionalGeneration"]
    )
    with pytest.raises(CheckpointError, match=r"is not a BLIP or .* captioning checkpoint"):
        read_checkpoint(checkpoint)
    edit_json(checkpoint / "config.json", model_type="blip", architectures=None)
    save_file(weights | {"itm_head.weight": torch.zeros(2)}, checkpoint / "model.safetensors")
    with pytest.raises(CheckpointError, match="is an image-text matching"):
        read_checkpoint(checkpoint)


def test_folder_of_transformers_5_is_read(checkpoint):
    own = json.loads((checkpoint / "preprocessor_config.json").read_text())
    (checkpoint / "preprocessor_config.json").unlink()
    (checkpoint / "processor_config.json").write_text(json.dumps({"image_processor": own | {"image_std": 0.5}}))
    for name in ("vocab.txt", "special_tokens_map.json", "added_tokens.json"):
        (checkpoint / name).unlink(missing_ok=True)
    edit_json(checkpoint / "tokenizer_config.json", extra_special_tokens=["[ENC]"], tokenizer_class="TokenizersBackend")
    assert_as_exported(read_checkpoint(checkpoint), checkpoint)
