"""BLIP (Salesforce, LAVIS): a ViT, and a BERT decoder with cross-attention to the image.

References: transformers 4.57, models/blip/modeling_blip.py and modeling_blip_text.py.
"""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import (
    BlipConfig,
    BlipForConditionalGeneration,
    BlipTextLMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions

from engine.bundle.manifest import TokenIds, demo_bundle
from engine.errors import CheckpointError
from export.families.modules import IS_5, DecoderStep, Encoder, Family, LayerCache, Normalisation, ProcessorRules, Sizes

# release 5 uses torchvision for BlipImageProcessor if it is installed, whose resized pixels differ by a level or two
if IS_5:
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil as BlipImageProcessor
else:
    from transformers import BlipImageProcessor

__all__ = ["Blip", "BlipImageProcessor"]

PARTS = ("vision_model", "text_decoder")
HEAD, WORDS = "text_decoder.cls.predictions.decoder.weight", "text_decoder.bert.embeddings.word_embeddings.weight"
BIAS = "text_decoder.cls.predictions.decoder.bias"
TIED = {HEAD: WORDS, BIAS: "text_decoder.cls.predictions.bias"}
"""Names of one tensor: the bias always, the words if tie_word_embeddings is set, as in every published checkpoint."""


class BlipEncoder(Encoder):
    """The vision model and the key and value projections of the decoder's cross-attention."""

    parts = PARTS

    def encode(self, pixels: Tensor) -> Tensor:
        """Run BlipVisionModel.forward with packed attention and without a mask; returns f32[B,S,D]."""
        vision, batch = self.vision_model, pixels.shape[0]
        embeddings = vision.embeddings
        patches = embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)
        classes = embeddings.class_embedding.expand(batch, -1, -1)
        x = torch.cat([classes, patches], 1) + embeddings.position_embedding
        for layer in vision.encoder.layers:
            attention = layer.self_attn
            qkv = attention.qkv(layer.layer_norm1(x)).view(batch, -1, 3, attention.num_heads, attention.head_dim)
            q, k, v = qkv.permute(2, 0, 3, 1, 4)
            weights = torch.softmax((q * attention.scale) @ k.transpose(-1, -2), -1)
            mixed = (weights @ v).transpose(1, 2).reshape(batch, -1, attention.embed_dim)
            x = x + attention.projection(mixed)
            x = x + layer.mlp(layer.layer_norm2(x))
        return vision.post_layernorm(x)

    def keys_values(self, encoded: Tensor) -> Iterator[Tensor]:
        """See Encoder.keys_values."""
        for layer in self.text_decoder.bert.encoder.layer:
            yield layer.crossattention.self.key(encoded)
            yield layer.crossattention.self.value(encoded)


class BlipStep(DecoderStep):
    """BlipTextLMHeadModel.forward: BERT without token types."""

    parts = PARTS

    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        """See DecoderStep.embed."""
        embeddings = self.text_decoder.bert.embeddings
        words = embeddings.word_embeddings(ids.flatten())
        return embeddings.LayerNorm(words + embeddings.position_embeddings(positions.flatten()))

    def layer(self, index: int, x: Tensor, cache: LayerCache) -> tuple[Tensor, list[Tensor]]:
        """See DecoderStep.layer."""
        layer = self.text_decoder.bert.encoder.layer[index]
        own, cross = layer.attention.self, layer.crossattention.self
        q, k, v = (self.split_heads(project(x), cache.batch) for project in (own.query, own.key, own.value))
        mixed, extended = self.self_attention(q, k, v, cache)
        x = layer.attention.output(mixed, x)
        mixed = self.cross_attention(self.split_heads(cross.query(x), cache.batch), cache)
        x = layer.crossattention.output(mixed, x)
        return layer.output(layer.intermediate(x), x), extended

    def logits(self, x: Tensor) -> Tensor:
        """See DecoderStep.logits."""
        return self.text_decoder.cls(x)


class OriginalCheckpoint(NamedTuple):
    """A checkpoint in the authors' own layout, converted to Hugging Face's.

    `files` are the texts of further files by name, such as the settings of the image processor.
    """

    config: BlipConfig
    weights: dict[str, Tensor]
    files: dict[str, str]


class Blip(Family):
    """BLIP with a captioning head (BlipForConditionalGeneration)."""

    name = "BLIP"
    config_class, model_class = BlipConfig, BlipForConditionalGeneration
    weight_prefixes = ("vision_model.", "text_decoder.")
    other_models = {  # noqa: RUF012
        "itm_head.": "an image-text matching (retrieval) checkpoint",
        "text_encoder.": "a question answering or retrieval checkpoint",
        "text_projection.": "a retrieval checkpoint",
    }
    settings_part = "text_config"
    processor = ProcessorRules(
        kind="BlipImageProcessor",
        prefix="Blip",
        settings={  # the defaults are the same in transformers 4.57 and 5
            "do_resize": True,
            "size": {"height": 384, "width": 384},
            "resample": 3,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711],
            "do_convert_rgb": True,
        },
        without_effect=frozenset(
            (
                *("image_processor_type", "feature_extractor_type", "processor_class", "_processor_class", "auto_map"),
                *("data_format", "input_data_format", "default_to_square", "device", "disable_grouping"),
                *("return_tensors", "image_seq_length", "num_query_tokens", "crop_size", "pad_size", "size_divisor"),
                "transformers_version",
            )
        ),
    )

    def check_config(self, raw: Mapping[str, Any], path: Path) -> None:
        """See Family.check_config."""
        for part in ("text_config", "vision_config"):
            if raw.get(part) is not None and not isinstance(raw[part], dict):
                raise CheckpointError(f"{path}: {part} is not a JSON object")
        if not (raw.get("text_config") or {}).get("is_decoder", True):
            raise CheckpointError(
                f"{path}: text_config.is_decoder is false, so the text model cannot attend to an image"
            )

    def sizes(self, config: BlipConfig) -> Sizes:
        """See Family.sizes. The encoder has a position per patch, and one for the class token."""
        text, vision = config.text_config, config.vision_config
        return Sizes(
            num_layers=text.num_hidden_layers,
            num_heads=text.num_attention_heads,
            head_width=text.hidden_size // text.num_attention_heads,
            vocab_size=text.vocab_size,
            max_positions=text.max_position_embeddings,
            encoder_positions=(vision.image_size // vision.patch_size) ** 2 + 1,
            image_size=vision.image_size,
            tokens=TokenIds(bos=text.bos_token_id, eos=text.sep_token_id, pad=text.pad_token_id),
        )

    def tied(self, config: BlipConfig) -> dict[str, str]:
        """See Family.tied."""
        return TIED if config.text_config.tie_word_embeddings else {BIAS: TIED[BIAS]}

    def unsupported(self, config: BlipConfig) -> dict[str, Any]:
        """See Family.unsupported."""
        kind = getattr(config.text_config, "position_embedding_type", "absolute")
        return {} if kind == "absolute" else {"position_embedding_type": kind}

    def resize(self, model: PreTrainedModel, image_size: int) -> None:
        """Resize the vision position table by bicubic interpolation; the class row is kept.

        This is the interpolation of BlipVisionEmbeddings.interpolate_pos_encoding (transformers 4.57). It is done once
        here, so that the checkpoint and the exported graph hold a plain table. Raises CheckpointError if `image_size`
        is not a multiple of the patch size.
        """
        embeddings, vision = model.vision_model.embeddings, model.config.vision_config
        if image_size % vision.patch_size:
            raise CheckpointError(f"image size {image_size} is not a multiple of the patch size {vision.patch_size}")
        table = embeddings.position_embedding.data
        old, new = math.isqrt(table.shape[1] - 1), image_size // vision.patch_size
        if new != old:
            grid = table[:, 1:].reshape(1, old, old, -1).permute(0, 3, 1, 2)
            grid = torch.nn.functional.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
            grid = grid.permute(0, 2, 3, 1).reshape(1, new * new, -1)
            embeddings.position_embedding = torch.nn.Parameter(torch.cat([table[:, :1], grid], 1))
        embeddings.image_size = vision.image_size = image_size
        embeddings.num_patches, embeddings.num_positions = new * new, new * new + 1
        model.vision_model.config.image_size = image_size

    def make_processor(self, settings: Mapping[str, Any]) -> BlipImageProcessor:
        """See Family.make_processor."""
        return BlipImageProcessor(**settings)

    def convert_original(self, weights: dict[str, Tensor], file: Path) -> OriginalCheckpoint:
        """Convert the weights of a checkpoint in the authors' own layout.

        The tokenizer is bert-base-uncased with [DEC] and [ENC], which the demo has too. Raises CheckpointError if the
        weights are of another task, or have other sizes than the published models.
        """
        weights = {_renamed(name): tensor for name, tensor in weights.items()}
        required = ("vision_model.embeddings.class_embedding", WORDS)
        if any(name not in weights for name in required):
            raise CheckpointError(
                f"{file} is not a BLIP captioning checkpoint: visual_encoder or text_decoder is missing"
            )
        weights = {name: tensor for name, tensor in weights.items() if name.startswith(self.weight_prefixes)}
        tokenizer = (demo_bundle() / "tokenizer.json").read_text(encoding="utf-8")
        config = read_sizes(weights, file, json.loads(tokenizer))
        size = config.vision_config.image_size
        processor = {**self.processor.settings, "size": {"height": size, "width": size}}
        processor["image_processor_type"] = self.processor.kind
        files = {
            "preprocessor_config.json": json.dumps(processor, indent=1) + "\n",
            "tokenizer_config.json": json.dumps(TOKENIZER, indent=1) + "\n",
            "tokenizer.json": tokenizer,
        }
        return OriginalCheckpoint(config, weights, files)

    def encoder(self, model: PreTrainedModel, normalisation: Normalisation) -> BlipEncoder:
        """See Family.encoder."""
        return BlipEncoder(model, self.sizes(model.config), normalisation)

    def step(self, model: PreTrainedModel) -> BlipStep:
        """See Family.step."""
        return BlipStep(model, self.sizes(model.config))

    def generation_config(self, model: PreTrainedModel) -> Any:
        """See Family.generation_config: `generate` calls the text decoder's."""
        return model.text_decoder.generation_config

    def prompt_arguments(
        self, tokenizer: PreTrainedTokenizerBase, prompt: str | None, images: int
    ) -> tuple[dict[str, Any], int]:
        """See Family.prompt_arguments. `generate` replaces [CLS] by [DEC] and drops [SEP]."""
        if not prompt:
            return {}, 1
        ids = tokenizer(prompt, padding=False, truncation=False, return_tensors="pt")["input_ids"]
        return {"input_ids": ids.repeat(images, 1)}, ids.shape[1] - 1  # a copy: generate changes input_ids in place

    def encode(self, model: PreTrainedModel, pixel_values: Tensor) -> Tensor:
        """See Family.encode."""
        return model.vision_model(pixel_values)[0]

    def logits(self, model: PreTrainedModel, ids: Tensor, encoded: Tensor) -> Tensor:
        """See Family.logits."""
        return model.text_decoder(
            input_ids=ids, attention_mask=torch.ones_like(ids), encoder_hidden_states=encoded, use_cache=False
        ).logits

    def ensemble(self, models: Sequence[PreTrainedModel], weights: Sequence[float]) -> PreTrainedModel:
        """See Family.ensemble."""
        model = copy.copy(models[0])
        model._modules = dict(models[0]._modules)
        model.vision_model, model.text_decoder = MeanVision(models), MeanDecoder(models, weights).eval()
        return model


class MeanVision(nn.Module):
    """The vision models of several models: their hidden states, concatenated to f32[B,S,D1+D2+...]."""

    def __init__(self, models: Sequence[PreTrainedModel]) -> None:
        super().__init__()
        self.towers = nn.ModuleList(model.vision_model for model in models)

    def forward(self, pixel_values: Tensor, **_: object) -> tuple[Tensor]:
        """Encode pixel_values f32[B,3,height,width]."""
        return (torch.cat([tower(pixel_values)[0] for tower in self.towers], -1),)


class MeanDecoder(BlipTextLMHeadModel):
    """The text decoders of several models, each on its part of the hidden states. It has no KV cache."""

    def __init__(self, models: Sequence[PreTrainedModel], weights: Sequence[float]) -> None:
        super().__init__(copy.deepcopy(models[0].config.text_config))
        del self.bert, self.cls
        self.decoders = nn.ModuleList(model.text_decoder for model in models)
        self.widths = [model.config.vision_config.hidden_size for model in models]
        self.weights = list(weights)
        self.generation_config = copy.deepcopy(models[0].text_decoder.generation_config)
        self.generation_config.use_cache = False

    def forward(
        self,
        input_ids: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        **_: object,
    ) -> CausalLMOutputWithCrossAttentions:
        """Return logits f32[B,T,V]: the sum of weight * log_softmax over the decoders, in their order."""
        parts = encoder_hidden_states.split(self.widths, -1)
        mean: Tensor | float = 0.0
        for decoder, hidden, weight in zip(self.decoders, parts, self.weights, strict=True):
            output = decoder(
                input_ids=input_ids,
                attention_mask=attention_mask,
                encoder_hidden_states=hidden,
                encoder_attention_mask=encoder_attention_mask,
                use_cache=False,
            )
            mean = mean + weight * torch.log_softmax(output.logits.float(), -1)
        return CausalLMOutputWithCrossAttentions(logits=mean)


HEAD_WIDTH = 64
"""Width of an attention head in BLIP base and large, in the image encoder and the text decoder."""
RENAMED = (
    (r"^visual_encoder\.cls_token$", "vision_model.embeddings.class_embedding"),
    (r"^visual_encoder\.pos_embed$", "vision_model.embeddings.position_embedding"),
    (r"^visual_encoder\.patch_embed\.proj\.", "vision_model.embeddings.patch_embedding."),
    (r"^visual_encoder\.norm\.", "vision_model.post_layernorm."),
    (r"^visual_encoder\.blocks\.(\d+)\.norm([12])\.", r"vision_model.encoder.layers.\1.layer_norm\2."),
    (r"^visual_encoder\.blocks\.(\d+)\.attn\.qkv\.", r"vision_model.encoder.layers.\1.self_attn.qkv."),
    (r"^visual_encoder\.blocks\.(\d+)\.attn\.proj\.", r"vision_model.encoder.layers.\1.self_attn.projection."),
    (r"^visual_encoder\.blocks\.(\d+)\.mlp\.", r"vision_model.encoder.layers.\1.mlp."),
)
"""Names in the image encoder of an original checkpoint (patterns), and Hugging Face's. The decoder's are the same."""
TOKENIZER = {
    "tokenizer_class": "BertTokenizerFast",
    "do_lower_case": True,
    "bos_token": "[DEC]",
    "unk_token": "[UNK]",
    "sep_token": "[SEP]",
    "pad_token": "[PAD]",
    "cls_token": "[CLS]",
    "mask_token": "[MASK]",
    "additional_special_tokens": ["[ENC]"],
}
"""tokenizer_config.json of a converted checkpoint."""


def _renamed(name: str) -> str:
    """Return Hugging Face's name of a weight of an original checkpoint."""
    for pattern, replacement in RENAMED:
        new_name, count = re.subn(pattern, replacement, name)
        if count:
            return new_name
    return name


def read_sizes(weights: dict[str, Tensor], file: Path, tokenizer: Mapping[str, Any]) -> BlipConfig:
    """Return a configuration with the sizes of the tensors. All else is BLIP's own value, the default of BlipConfig.

    `tokenizer` is the content of tokenizer.json. Raises CheckpointError if it does not fit the word embeddings.
    """
    table = weights["vision_model.embeddings.position_embedding"]
    patches = weights["vision_model.embeddings.patch_embedding.weight"]
    words = weights[WORDS]
    known = 1 + max(*tokenizer["model"]["vocab"].values(), *(token["id"] for token in tokenizer["added_tokens"]))
    if words.shape[0] != known:
        raise CheckpointError(
            f"{file} has {words.shape[0]} word embeddings, but BLIP's tokenizer has {known} tokens: convert it by hand"
        )
    return BlipConfig(
        architectures=["BlipForConditionalGeneration"],
        vision_config={
            "hidden_size": table.shape[2],
            "intermediate_size": weights["vision_model.encoder.layers.0.mlp.fc1.weight"].shape[0],
            "num_hidden_layers": _layers(weights, "vision_model.encoder.layers"),
            "num_attention_heads": table.shape[2] // HEAD_WIDTH,
            "image_size": math.isqrt(table.shape[1] - 1) * patches.shape[3],
            "patch_size": patches.shape[3],
        },
        text_config={
            "vocab_size": words.shape[0],
            "hidden_size": words.shape[1],
            "encoder_hidden_size": table.shape[2],
            "intermediate_size": weights["text_decoder.bert.encoder.layer.0.intermediate.dense.weight"].shape[0],
            "num_hidden_layers": _layers(weights, "text_decoder.bert.encoder.layer"),
            "num_attention_heads": words.shape[1] // HEAD_WIDTH,
            "max_position_embeddings": weights["text_decoder.bert.embeddings.position_embeddings.weight"].shape[0],
        },
    )


def _layers(weights: dict[str, Tensor], part: str) -> int:
    """Return the number of layers under the prefix `part`."""
    numbers = {int(name.removeprefix(part + ".").split(".")[0]) for name in weights if name.startswith(part + ".")}
    return 1 + max(numbers, default=-1)
