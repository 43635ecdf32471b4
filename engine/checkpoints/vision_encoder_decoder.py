"""VisionEncoderDecoder: the supported pairs of encoder and decoder, and what their checkpoints look like.

Defaults are those of transformers 4.57.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.bundle.manifest import TokenIds
from engine.checkpoints.rules import (
    CLIP,
    CROP,
    ConvertibleRules,
    ProcessorRules,
    Settings,
    Sizes,
    check_heads,
    check_numbers,
    check_patches,
    completed,
    linear,
    norm,
    outer_settings,
    processor_rules,
)
from engine.errors import CheckpointError

PAIRS = {
    "vit": ("gpt2", "bert", "roberta", "trocr"),
    "deit": ("gpt2", "trocr"),
    "beit": ("bert",),
    "swin": ("gpt2", "bert", "roberta", "mbart"),
    "dinov2": ("gpt2",),
}
"""The supported pairs: `model_type` of the encoder, and of the decoders that it may have."""
CONVERTIBLE = {"vit": ("gpt2", "trocr")}
"""Those of them that are converted without torch."""

HALF = [0.5] * 3, [0.5] * 3
"""Mean and std of pixels per channel."""
VIT = processor_rules("ViT", {"height": 224, "width": 224}, 2, HALF)
DEIT = processor_rules("DeiT", {"height": 256, "width": 256}, 3, HALF, **CROP)
BEIT = processor_rules("Beit", {"height": 256, "width": 256}, 3, HALF, **CROP)
BIT = processor_rules("Bit", {"shortest_edge": 224}, 3, CLIP, **CROP)
PROCESSORS = {"vit": VIT, "deit": DEIT, "beit": BEIT, "swin": VIT, "dinov2": BIT}
"""Image processors: the one of each encoder. A checkpoint may name any of them."""

ENCODERS: dict[str, dict[str, Any]] = {
    "vit": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
        "qkv_bias": True,
        "image_size": 224,
        "patch_size": 16,
    },
    "deit": {"image_size": 224, "patch_size": 16},
    "beit": {"image_size": 224, "patch_size": 16},
    "swin": {"image_size": 224, "patch_size": 4, "depths": [2, 2, 6, 2]},
    "dinov2": {"image_size": 224, "patch_size": 14},
}
"""Settings of encoders that are read here, with their defaults."""
EXTRA_TOKENS = {"vit": 1, "deit": 2, "beit": 1, "dinov2": 1}
"""Positions of an encoder that are not patches: the class token, and DeiT's distillation token."""


@dataclass(frozen=True)
class TextRules:
    """A kind of decoder.

    `sizes` are the names of its number of layers, number of heads, width and number of positions, with their defaults;
    `ids` the defaults of its special ids. `head` names the head's weight and the word embeddings, which are one tensor
    if tie_word_embeddings is set, `tied` tensors that always are one. Captions do not depend on the weights `unused`.
    Settings other than the `neutral` ones change the model in a way that the graph does not have. `more` are further
    settings that decide the operations of the graph, with their defaults, for decoders that are converted.
    """

    sizes: Mapping[str, int]
    vocab_size: int
    ids: Mapping[str, int]
    head: tuple[str, str]
    tied: Mapping[str, str] = field(default_factory=dict)
    unused: tuple[str, ...] = ()
    neutral: Mapping[str, Any] = field(default_factory=dict)
    more: Mapping[str, Any] = field(default_factory=dict)


BERT_SIZES = {
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_size": 768,
    "max_position_embeddings": 512,
}
BART_SIZES = {"decoder_layers": 12, "decoder_attention_heads": 16, "d_model": 1024, "max_position_embeddings": 1024}
POSITION_OFFSET = 2
"""The first rows of a table of learned positions in the BART family, which have no position."""
BART_IDS = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
DECODERS = {
    "gpt2": TextRules(
        sizes={"n_layer": 12, "n_head": 12, "n_embd": 768, "n_positions": 1024},
        vocab_size=50257,
        ids={"bos_token_id": 50256, "eos_token_id": 50256},
        head=("lm_head.weight", "transformer.wte.weight"),
        neutral={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False},
        more={"n_inner": None, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5},
    ),
    "bert": TextRules(
        sizes=BERT_SIZES,
        vocab_size=30522,
        ids={"pad_token_id": 0},
        head=("cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"),
        tied={"cls.predictions.decoder.bias": "cls.predictions.bias"},
        neutral={"position_embedding_type": "absolute"},
    ),
    "roberta": TextRules(
        sizes=BERT_SIZES,
        vocab_size=50265,
        ids=BART_IDS,
        head=("lm_head.decoder.weight", "roberta.embeddings.word_embeddings.weight"),
        tied={"lm_head.decoder.bias": "lm_head.bias"},
        neutral={"position_embedding_type": "absolute"},
    ),
    "trocr": TextRules(
        sizes=BART_SIZES | {"max_position_embeddings": 512},
        vocab_size=50265,
        ids=BART_IDS | {"decoder_start_token_id": 2},
        head=("output_projection.weight", "model.decoder.embed_tokens.weight"),
        unused=("model.decoder.embed_positions._float_tensor",),
        more={
            "decoder_ffn_dim": 4096,
            "activation_function": "gelu",
            "scale_embedding": False,
            "use_learned_position_embeddings": True,
            "layernorm_embedding": True,
        },
    ),
    "mbart": TextRules(
        sizes=BART_SIZES,
        vocab_size=50265,
        ids=BART_IDS | {"forced_eos_token_id": 2},
        head=("lm_head.weight", "model.decoder.embed_tokens.weight"),
    ),
}
"""Decoders by `model_type`. Names are those of the decoder's own configuration and weights."""
ENDINGS = ("decoder_start_token_id", "eos_token_id", "pad_token_id")


class VisionEncoderDecoderRules(ConvertibleRules):
    """An image encoder with a text decoder (VisionEncoderDecoderModel)."""

    name = "VisionEncoderDecoder"
    model_type, architecture = "vision-encoder-decoder", "VisionEncoderDecoderModel"
    weight_prefixes = ("encoder.", "decoder.")
    tokenizer_class = "PreTrainedTokenizer"  # transformers has none for the pair: tokenizer.json alone counts
    position_table = "encoder.embeddings.position_embeddings"
    processor = VIT

    def check_config(self, raw: Mapping[str, Any], path: Path) -> None:
        """See Rules.check_config."""
        for part in ("encoder", "decoder"):
            if not isinstance(raw.get(part), dict):
                raise CheckpointError(f"{path}: {part} is not a JSON object: save the model again")
        encoder, decoder = (raw[part].get("model_type") for part in ("encoder", "decoder"))
        if not isinstance(encoder, str) or decoder not in PAIRS.get(encoder, ()):
            known = "; ".join(f"{name} with {', '.join(others)}" for name, others in PAIRS.items())
            raise CheckpointError(
                f"{path} pairs the encoder {encoder!r} with the decoder {decoder!r}, which is not supported: use one "
                f"of these pairs: {known}"
            )
        text = raw["decoder"]
        for name in ("is_decoder", "add_cross_attention"):
            if decoder in ("gpt2", "bert", "roberta") and not text.get(
                name, name == "is_decoder" and decoder == "gpt2"
            ):
                raise CheckpointError(
                    f"{path}: decoder.{name} is not true, so the decoder cannot attend to an image: train it as a "
                    "decoder with cross-attention"
                )
        for name in ("image_size", "patch_size"):
            size = raw["encoder"].get(name, 1)
            sides = size if isinstance(size, list) and size else [size]
            if any(type(side) is not int or side < 1 or side != sides[0] for side in sides):
                raise CheckpointError(f"{path}: encoder.{name} is {size!r}, but only squares are supported")
        if self.converts(raw):
            self._check_sizes(raw, path)
        missing = [name for name in ENDINGS if type(raw.get(name)) is not int]
        if missing:
            raise CheckpointError(
                f"{path}: {missing[0]} is {raw.get(missing[0])!r}, but `generate` needs one id: set it in "
                "generation_config.json"
            )
        if decoder == "roberta" and raw["decoder_start_token_id"] == part_of(raw, "decoder")["pad_token_id"]:
            raise CheckpointError(
                f"{path}: captions start with the pad id {raw['decoder_start_token_id']}, from which RoBERTa counts "
                "positions in another way: train with another decoder_start_token_id"
            )

    def _check_sizes(self, raw: Mapping[str, Any], path: Path) -> None:
        vision, text = part_of(raw, "encoder"), part_of(raw, "decoder")
        names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        check_numbers({name: vision[name] for name in names}, path, "encoder", lowest=1)
        check_numbers({name: side_of(vision[name]) for name in ("image_size", "patch_size")}, path, "encoder", lowest=1)
        rules = DECODERS[text["model_type"]]
        sizes = {name: text[name] for name in (*rules.sizes, "vocab_size")}
        inner = "n_inner" if text["model_type"] == "gpt2" else "decoder_ffn_dim"
        if text[inner] is not None:
            sizes[inner] = text[inner]
        check_numbers(sizes, path, "decoder", lowest=1)
        _, heads, width, _ = (text[name] for name in rules.sizes)
        check_heads(vision["hidden_size"], vision["num_attention_heads"], path, "encoder")
        check_heads(width, heads, path, "decoder")

    def settings(self, raw: Mapping[str, Any], generation: Mapping[str, Any] | None) -> list[Settings]:
        """See Rules.settings. Without generation_config.json, Hugging Face reads both levels of config.json."""
        found = outer_settings(raw, generation)
        if found[0].values is not raw:
            return found
        ids = DECODERS[raw["decoder"]["model_type"]].ids if self._is_known(raw) else {}
        inner = raw["decoder"] if isinstance(raw.get("decoder"), dict) else {}
        return [*found, Settings("decoder of config.json", {**ids, **inner})]

    def complete(self, raw: Mapping[str, Any], generation: Mapping[str, Any] | None) -> dict[str, Any]:
        """See Rules.complete."""
        settings = self.settings(raw, generation)

        def id_of(name: str) -> Any:
            values = (only_one(source.values.get(name)) for source in settings)
            return next((value for value in values if value is not None), None)

        start, end, pad = map(id_of, ENDINGS)
        start = id_of("bos_token_id") if start is None else start
        return {**raw, **dict(zip(ENDINGS, (start, end, end if pad is None else pad), strict=True))}

    def _is_known(self, raw: Mapping[str, Any]) -> bool:
        kind = raw["decoder"].get("model_type") if isinstance(raw.get("decoder"), dict) else None
        return isinstance(kind, str) and kind in DECODERS

    def sizes(self, raw: Mapping[str, Any]) -> Sizes:
        """See Rules.sizes."""
        text, rules = part_of(raw, "decoder"), DECODERS[raw["decoder"]["model_type"]]
        layers, heads, width, positions = (text[name] for name in rules.sizes)
        if text["model_type"] == "roberta":  # the first rows of the table have no position
            positions -= text["pad_token_id"] + 1
        return Sizes(
            num_layers=layers,
            num_heads=heads,
            head_width=width // heads,
            vocab_size=text["vocab_size"],
            max_positions=positions,
            encoder_positions=_encoder_positions(part_of(raw, "encoder")),
            image_size=side_of(part_of(raw, "encoder")["image_size"]),
            tokens=TokenIds(*(raw[name] for name in ENDINGS)),
        )

    def converts(self, raw: Mapping[str, Any]) -> bool:
        """See ConvertibleRules.converts."""
        encoder, decoder = (raw[part]["model_type"] for part in ("encoder", "decoder"))
        return decoder in CONVERTIBLE.get(encoder, ())

    def shape(self, raw: Mapping[str, Any]) -> dict[str, int | float | str]:
        """See ConvertibleRules.shape. A width of cross-attention that is not set is that of the decoder: 0."""
        vision, text = part_of(raw, "encoder"), part_of(raw, "decoder")
        rules = DECODERS[text["model_type"]]
        vision_names = [name for name in ENCODERS[vision["model_type"]] if name != "image_size"]
        text_names = [*list(rules.sizes)[:3], *rules.more]  # without the number of positions
        shape = {f"encoder.{name}": vision[name] for name in ("model_type", *vision_names)}
        shape["encoder.patch_size"] = side_of(vision["patch_size"])
        shape |= {f"decoder.{name}": text[name] for name in ("model_type", *text_names)}
        if "n_inner" in text_names and text["n_inner"] is None:
            shape["decoder.n_inner"] = 4 * text["n_embd"]
        return shape | {"decoder.cross_attention_hidden_size": text.get("cross_attention_hidden_size") or 0}

    def weight_shapes(self, raw: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """See ConvertibleRules.weight_shapes. Names: ViTModel and the decoder's class in transformers 4.57."""
        vision, text = part_of(raw, "encoder"), part_of(raw, "decoder")
        rules = DECODERS[text["model_type"]]
        _, _, text_width, _ = (text[name] for name in rules.sizes)
        width, inner, patch = vision["hidden_size"], vision["intermediate_size"], side_of(vision["patch_size"])
        shapes: dict[str, tuple[int, ...]] = {
            "encoder.embeddings.cls_token": (1, 1, width),
            self.position_table: (1, self.sizes(raw).encoder_positions, width),
            "encoder.embeddings.patch_embeddings.projection.weight": (width, 3, patch, patch),
            "encoder.embeddings.patch_embeddings.projection.bias": (width,),
            **norm("encoder.layernorm", width),
        }
        for i in range(vision["num_hidden_layers"]):
            layer = f"encoder.encoder.layer.{i}"
            for part in ("query", "key", "value"):
                shapes |= linear(f"{layer}.attention.attention.{part}", width, width, bias=vision["qkv_bias"])
            shapes |= linear(f"{layer}.attention.output.dense", width, width)
            shapes |= linear(f"{layer}.intermediate.dense", inner, width)
            shapes |= linear(f"{layer}.output.dense", width, inner)
            shapes |= norm(f"{layer}.layernorm_before", width) | norm(f"{layer}.layernorm_after", width)
        source = text.get("cross_attention_hidden_size")
        if source is None:
            source = text_width
            if width != text_width:
                shapes |= linear("enc_to_dec_proj", text_width, width)
        shapes |= {f"decoder.{name}": shape for name, shape in DECODER_SHAPES[text["model_type"]](text, source).items()}
        head, words = rules.head
        return shapes | {f"decoder.{name}": (text["vocab_size"], text_width) for name in (head, words)}

    def resized(self, raw: Mapping[str, Any], image_size: int) -> dict[str, Any]:
        """See ConvertibleRules.resized."""
        patch = side_of(part_of(raw, "encoder")["patch_size"])
        check_patches(image_size, patch)
        return {**raw, "encoder": {**raw["encoder"], "image_size": image_size}}

    def tied(self, raw: Mapping[str, Any]) -> dict[str, str]:
        """See Rules.tied."""
        rules = DECODERS[raw["decoder"]["model_type"]]
        names = dict(rules.tied)
        if raw["decoder"].get("tie_word_embeddings", True):
            names |= dict([rules.head])
        return {f"decoder.{copy}": f"decoder.{original}" for copy, original in names.items()}

    def unused(self, raw: Mapping[str, Any]) -> tuple[str, ...]:
        """See Rules.unused."""
        decoder = tuple(f"decoder.{name}" for name in DECODERS[raw["decoder"]["model_type"]].unused)
        return ("encoder.pooler.", "encoder.embeddings.mask_token", *decoder)

    def unsupported(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """See Rules.unsupported."""
        text, neutral = raw["decoder"], DECODERS[raw["decoder"]["model_type"]].neutral
        return {f"decoder.{name}": text[name] for name, value in neutral.items() if text.get(name, value) != value}

    def processor_for(self, kind: str | None, raw: Mapping[str, Any]) -> ProcessorRules | None:
        """See Rules.processor_for."""
        if kind is None:
            return PROCESSORS[raw["encoder"]["model_type"]]
        return next((rules for rules in PROCESSORS.values() if kind.startswith(rules.prefix)), None)


def part_of(raw: Mapping[str, Any], part: str) -> dict[str, Any]:
    """Return the encoder's or the decoder's configuration, completed with the defaults."""
    kind = raw[part]["model_type"]
    if part == "encoder":
        defaults = ENCODERS[kind]
    else:
        rules = DECODERS[kind]
        defaults = {**rules.sizes, **rules.ids, **rules.more, "vocab_size": rules.vocab_size}
    return completed(raw[part], defaults)


def only_one(value: Any) -> Any:
    """Return the only entry of a list, or the value itself: transformers accepts several end ids, the engine one."""
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def side_of(size: int | Sequence[int]) -> int:
    """Return the side of a square given as a number or as height and width."""
    return size if isinstance(size, int) else size[0]


def _encoder_positions(vision: Mapping[str, Any]) -> int:
    """Return the number of hidden states of an image. Swin halves both sides between its stages, rounding up."""
    side, patch = side_of(vision["image_size"]), side_of(vision["patch_size"])
    if vision["model_type"] != "swin":
        return (side // patch) ** 2 + EXTRA_TOKENS[vision["model_type"]]
    side = -(-side // patch)
    for _ in vision["depths"][1:]:
        side = -(-side // 2)
    return side * side


def _gpt2_shapes(text: Mapping[str, Any], source: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of GPT2LMHeadModel's weights, without embeddings of words. `source` is the encoder's width.

    Weights of its dense layers (Conv1D) are [inputs,outputs].
    """
    width, inner = text["n_embd"], text["n_inner"] or 4 * text["n_embd"]
    shapes = {"transformer.wpe.weight": (text["n_positions"], width), **norm("transformer.ln_f", width)}
    for i in range(text["n_layer"]):
        layer = f"transformer.h.{i}"
        for name, inputs, outputs in (
            ("attn.c_attn", width, 3 * width),
            ("attn.c_proj", width, width),
            ("crossattention.c_attn", source, 2 * width),
            ("crossattention.q_attn", width, width),
            ("crossattention.c_proj", width, width),
            ("mlp.c_fc", width, inner),
            ("mlp.c_proj", inner, width),
        ):
            shapes |= {f"{layer}.{name}.weight": (inputs, outputs), f"{layer}.{name}.bias": (outputs,)}
        for name in ("ln_1", "ln_2", "ln_cross_attn"):
            shapes |= norm(f"{layer}.{name}", width)
    return shapes


def _trocr_shapes(text: Mapping[str, Any], source: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of TrOCRForCausalLM's weights, without embeddings of words. `source` is the encoder's width."""
    width, inner, body = text["d_model"], text["decoder_ffn_dim"], "model.decoder"
    shapes: dict[str, tuple[int, ...]] = {}
    if text["use_learned_position_embeddings"]:
        shapes[f"{body}.embed_positions.weight"] = (text["max_position_embeddings"] + POSITION_OFFSET, width)
    if text["layernorm_embedding"]:
        shapes |= norm(f"{body}.layernorm_embedding", width)
    for i in range(text["decoder_layers"]):
        layer = f"{body}.layers.{i}"
        for attention, inputs in (("self_attn", width), ("encoder_attn", source)):
            for name, many in (("q_proj", width), ("k_proj", inputs), ("v_proj", inputs), ("out_proj", width)):
                shapes |= linear(f"{layer}.{attention}.{name}", width, many)
            shapes |= norm(f"{layer}.{attention}_layer_norm", width)
        shapes |= linear(f"{layer}.fc1", inner, width) | linear(f"{layer}.fc2", width, inner)
        shapes |= norm(f"{layer}.final_layer_norm", width)
    return shapes


DECODER_SHAPES = {"gpt2": _gpt2_shapes, "trocr": _trocr_shapes}
"""Shapes of weights of the decoders in CONVERTIBLE."""
