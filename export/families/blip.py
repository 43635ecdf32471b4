"""BLIP (Salesforce, LAVIS): a ViT, and a BERT decoder with cross-attention to the image.

References: transformers 4.57, models/blip/modeling_blip.py and modeling_blip_text.py.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import (
    BlipConfig,
    BlipForConditionalGeneration,
    BlipTextLMHeadModel,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions

from engine.checkpoints.blip import BlipRules
from export.families.modules import (
    IS_5,
    DecoderStep,
    Encoder,
    LayerCache,
    Normalisation,
    PublishedFamily,
    bert_embeddings,
    cross_keys_values,
    patch_embeddings,
    patches_per_side,
    resized_positions,
)

# release 5 uses torchvision for BlipImageProcessor if it is installed, whose resized pixels differ by a level or two
if IS_5:
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil as BlipImageProcessor
else:
    from transformers import BlipImageProcessor

__all__ = ["Blip", "BlipImageProcessor"]

PARTS = ("vision_model", "text_decoder")


class BlipEncoder(Encoder):
    """The vision model and the key and value projections of the decoder's cross-attention."""

    parts = PARTS

    def encode(self, pixels: Tensor) -> Tensor:
        """Run BlipVisionModel.forward with packed attention and without a mask; returns f32[B,S,D]."""
        vision, batch = self.vision_model, pixels.shape[0]
        embeddings = vision.embeddings
        patches = patch_embeddings(embeddings.patch_embedding, pixels, self.sizes.image_size)
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
        return cross_keys_values(self.text_decoder.bert.encoder.layer, encoded)


class BlipStep(DecoderStep):
    """BlipTextLMHeadModel.forward: BERT without token types."""

    parts = PARTS

    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        """See DecoderStep.embed."""
        return bert_embeddings(self.text_decoder.bert.embeddings, ids, positions)

    def layer(self, index: int, x: Tensor, cache: LayerCache) -> tuple[Tensor, list[Tensor]]:
        """See DecoderStep.layer."""
        return self.bert_layer(self.text_decoder.bert.encoder.layer[index], x, cache)

    def logits(self, x: Tensor) -> Tensor:
        """See DecoderStep.logits."""
        return self.text_decoder.cls(x)


def _config(vision_layers: int, vision_width: int, vision_heads: int) -> BlipConfig:
    """Return the configuration of a BLIP with this image encoder, and otherwise as published."""
    return BlipConfig(
        vision_config={
            "hidden_size": vision_width,
            "intermediate_size": 4 * vision_width,
            "num_hidden_layers": vision_layers,
            "num_attention_heads": vision_heads,
        },
        text_config={"encoder_hidden_size": vision_width, "num_attention_heads": 12},
    )


class Blip(PublishedFamily):
    """BLIP with a captioning head (BlipForConditionalGeneration)."""

    rules: ClassVar[BlipRules] = BlipRules()
    config_class, model_class = BlipConfig, BlipForConditionalGeneration

    def published(self) -> dict[str, PretrainedConfig]:
        """See PublishedFamily.published. The two differ in their image encoder."""
        return {"BLIP-base": _config(12, 768, 12), "BLIP-large": _config(24, 1024, 16)}

    def shrunk(self, config: PretrainedConfig) -> PretrainedConfig:
        """See PublishedFamily.shrunk."""
        config = copy.deepcopy(config)
        config.vision_config.update(
            {"hidden_size": 24, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 3}
        )
        text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        config.text_config.update(text | {"encoder_hidden_size": 24})
        return config

    def with_sizes(
        self, config: PretrainedConfig, *, patches: int, vocab_size: int, max_positions: int
    ) -> PretrainedConfig:
        """See PublishedFamily.with_sizes."""
        config = copy.deepcopy(config)
        config.vision_config.image_size = patches * config.vision_config.patch_size
        config.text_config.vocab_size = vocab_size
        config.text_config.max_position_embeddings = max_positions
        return config

    def resize(self, model: PreTrainedModel, image_size: int) -> None:
        """Resize the vision position table as BlipVisionEmbeddings.interpolate_pos_encoding does (transformers 4.57).

        It is done once here, so that the checkpoint and the exported graph hold a plain table. Raises CheckpointError
        if `image_size` is not a multiple of the patch size.
        """
        embeddings, vision = model.vision_model.embeddings, model.config.vision_config
        side = patches_per_side(image_size, vision.patch_size)
        table = resized_positions(embeddings.position_embedding.data[0], side)
        embeddings.position_embedding = nn.Parameter(table[None])
        embeddings.image_size = vision.image_size = image_size
        embeddings.num_patches, embeddings.num_positions = side**2, side**2 + 1
        model.vision_model.config.image_size = image_size

    def make_processor(self, settings: Mapping[str, Any]) -> BlipImageProcessor:
        """See Family.make_processor."""
        return BlipImageProcessor(**settings)

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
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompt: str | None,
        images: int,
        first: int | None = None,  # noqa: ARG002
    ) -> tuple[dict[str, Any], int]:
        """See Family.prompt_arguments. `generate` replaces [CLS] by [DEC] and drops [SEP]."""
        if not prompt:
            return {}, 1
        ids = tokenizer(prompt, padding=False, truncation=False, return_tensors="pt")["input_ids"]
        return {"input_ids": ids.repeat(images, 1)}, ids.shape[1] - 1  # a copy: generate changes input_ids in place

    def encode(self, model: PreTrainedModel, pixel_values: Tensor, task_ids: Sequence[int] = ()) -> Tensor:  # noqa: ARG002
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
            mean = mean + weight * torch.log_softmax(output.logits, -1)
        return CausalLMOutputWithCrossAttentions(logits=mean)
