"""Small random VisionEncoderDecoder checkpoints of every supported pair, with real tokenizers."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    GPT2TokenizerFast,
    PreTrainedTokenizerFast,
    RobertaTokenizerFast,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
)

from engine.checkpoints.vision_encoder_decoder import PAIRS
from export.families.modules import IS_5
from tests.helpers.tiny import IMAGE_SIZE, PATCH_SIZE, WORDS, make_tokenizer

SIZES = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 48}
ENCODERS: dict[str, dict[str, Any]] = {
    "vit": SIZES,
    "deit": SIZES,
    "beit": SIZES
    | {"use_relative_position_bias": True, "use_absolute_position_embeddings": True, "use_mean_pooling": False},
    "swin": {"embed_dim": 12, "depths": [2, 2], "num_heads": [2, 3], "window_size": 2},
    "dinov2": SIZES | {"mlp_ratio": 2},
}
"""Settings of each encoder; all take images of IMAGE_SIZE px in patches of PATCH_SIZE."""
SWIN_PATCH = 4
"""Swin halves the grid of patches once."""
BART = {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 64}
TEXT: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "bert": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    | {"max_position_embeddings": 64},
    "roberta": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    | {"max_position_embeddings": 66, "type_vocab_size": 1},
    "trocr": BART | {"max_position_embeddings": 64},
    "mbart": BART | {"max_position_embeddings": 64, "scale_embedding": True, "forced_eos_token_id": None},
}
"""Settings of each decoder."""
END_BIAS = {"gpt2": 2.0, "bert": 2.5, "roberta": 2.5, "trocr": 3.0, "mbart": 0.7}
CROPPED = {"size": {"height": 40, "width": 36}, "crop_size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE}}
PROCESSORS: dict[str, dict[str, Any]] = {
    "vit": {"image_processor_type": "ViTFeatureExtractor", "size": IMAGE_SIZE},
    "deit": {"image_processor_type": "DeiTImageProcessor"} | CROPPED,
    "beit": {"feature_extractor_type": "BeitFeatureExtractor", "size": 37, "crop_size": IMAGE_SIZE},
    "swin": {"image_processor_type": "ViTImageProcessor", "size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE}},
    "dinov2": {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 36}}
    | {"crop_size": CROPPED["crop_size"]},
}
"""Content of preprocessor_config.json for each encoder; the older kinds have sizes as numbers."""
WITHOUT_GENERATION_FILE = {("vit", "gpt2"), ("swin", "bert"), ("beit", "bert")}
"""Pairs whose settings are in config.json alone, as in nlpconnect/vit-gpt2-image-captioning."""


def make_pair(directory: Path, encoder: str, decoder: str, **settings: Any) -> Path:
    """Write a checkpoint with random weights, a tokenizer and an image processor; see make_model for settings."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = tokenizer_for(decoder, directory)
    make_model(encoder, decoder, tokenizer, **settings).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    (directory / "preprocessor_config.json").write_text(json.dumps(PROCESSORS[encoder]))
    if (encoder, decoder) in WITHOUT_GENERATION_FILE:
        (directory / "generation_config.json").unlink()
    return directory


def sentences() -> list[str]:
    """Return made-up captions to train tokenizers on."""
    words = [word for word in WORDS if word.isalpha()]
    return [" ".join(words[(3 * i + j * j) % len(words)] for j in range(8)) + "." for i in range(200)]


def byte_pairs(directory: Path, kind: type[GPT2TokenizerFast] | type[RobertaTokenizerFast], special: list[str]) -> Any:
    """Return a byte-level BPE tokenizer whose special tokens come first, written by `kind`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(set("".join(sentences()) + "Ġ,:/()%-'0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ") - {" "})
    trainer = trainers.BpeTrainer(
        vocab_size=180, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(sentences(), trainer)
    model = json.loads(tokenizer.to_str())["model"]
    pairs = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    if IS_5:  # 4 takes files
        return kind(vocab=model["vocab"], merges=[tuple(pair.split(" ")) for pair in pairs])
    vocabulary, merges = directory / "vocab.json", directory / "merges.txt"
    vocabulary.write_text(json.dumps(model["vocab"]), encoding="utf-8")
    merges.write_text("#version: 0.2\n" + "\n".join(pairs) + "\n", encoding="utf-8")
    return kind(vocab_file=str(vocabulary), merges_file=str(merges))


def tokenizer_for(decoder: str, directory: Path) -> Any:
    """Return a tokenizer as checkpoints with this decoder have it."""
    if decoder == "bert":
        return make_tokenizer(directory)
    if decoder == "gpt2":
        return byte_pairs(directory, GPT2TokenizerFast, ["<|endoftext|>"])
    if decoder in ("roberta", "trocr"):
        return byte_pairs(directory, RobertaTokenizerFast, ["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=special, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(sentences(), trainer)
    names = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def token_ids(decoder: str, tokenizer: Any) -> dict[str, int]:
    """Return start, end and pad id as published checkpoints have them: GPT-2 has one id for all."""
    ids = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad", "sep", "cls")}
    start, end, pad = {
        "gpt2": (ids["eos"], ids["eos"], ids["eos"]),
        "bert": (ids["cls"], ids["sep"], ids["pad"]),
        "roberta": (ids["bos"], ids["eos"], ids["pad"]),
        "trocr": (ids["eos"], ids["eos"], ids["pad"]),
        "mbart": (ids["bos"], ids["eos"], ids["pad"]),
    }[decoder]
    return {"decoder_start_token_id": start, "eos_token_id": end, "pad_token_id": pad}


def make_model(
    encoder: str,
    decoder: str,
    tokenizer: Any,
    *,
    seed: int = 0,
    end_bias: float | None = None,
    favoured: str | None = None,
    vision: dict | None = None,
    text: dict | None = None,
) -> VisionEncoderDecoderModel:
    """Return a model with random weights in eval mode.

    `end_bias` is added to the logit of the end token, so that captions of different images have different lengths.
    The logit of the pad token is raised too if `favoured` is "pad". `vision` and `text` are further settings.
    """
    ids = token_ids(decoder, tokenizer)
    patch = SWIN_PATCH if encoder == "swin" else PATCH_SIZE
    encoder_config = AutoConfig.for_model(
        encoder, **{"image_size": IMAGE_SIZE, "patch_size": patch} | ENCODERS[encoder] | (vision or {})
    )
    settings = TEXT[decoder] | {"vocab_size": len(tokenizer), "pad_token_id": ids["pad_token_id"]} | (text or {})
    if decoder == "trocr":  # its cross-attention reads the encoder's width, without a projection
        settings["cross_attention_hidden_size"] = encoder_config.hidden_size
    decoder_config = AutoConfig.for_model(
        decoder, bos_token_id=ids["decoder_start_token_id"], eos_token_id=ids["eos_token_id"], **settings
    )
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder_config, decoder_config, **ids)
    model = VisionEncoderDecoderModel(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if parameter.dim() > 1 or "lambda" in name:
                parameter.normal_(std=0.25, generator=generator)
        model.tie_weights()
        favour(model.decoder, decoder, ids["eos_token_id"], END_BIAS[decoder] if end_bias is None else end_bias)
        if favoured == "pad":
            favour(model.decoder, decoder, ids["pad_token_id"], 3.0 if decoder == "roberta" else 6.0)
    return model


def favour(model: Any, decoder: str, token: int, bias: float) -> None:
    """Add `bias` to the logit of a token, in heads without a bias by the last layer norm's."""
    if decoder == "bert":
        model.cls.predictions.bias[token] += bias
        return
    if decoder == "roberta":
        model.lm_head.bias[token] += bias
        return
    norm = {
        "gpt2": lambda: model.transformer.ln_f,
        "trocr": lambda: model.model.decoder.layers[-1].final_layer_norm,
        "mbart": lambda: model.model.decoder.layer_norm,
    }[decoder]()
    row = model.get_output_embeddings().weight[token]
    norm.bias += bias * row / row.dot(row)


def pairs() -> list[tuple[str, str]]:
    """Return all supported pairs."""
    return list(itertools.chain.from_iterable(((one, other) for other in others) for one, others in PAIRS.items()))
