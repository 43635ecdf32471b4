"""Florence-2 (Microsoft): DaViT, and a BART that reads the image's tokens followed by those of a task.

The encoder graph holds all but the text decoder: its output are the keys and values of BART's cross-attention. It has a
second input for the ids of the task, so that the number of its positions depends on the task. Reference: transformers
4.57, models/florence2/modeling_florence2.py and models/bart/modeling_bart.py.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import (
    Florence2Config,
    Florence2ForConditionalGeneration,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_outputs import BaseModelOutput

from engine.checkpoints.florence2 import IMAGE_SIZE, Florence2Rules, sides
from engine.checkpoints.rules import Sizes
from engine.checkpoints.vision_encoder_decoder import POSITION_OFFSET
from export.families.decoders import TrocrStep, bart_keys_values
from export.families.git import CLIPImageProcessor
from export.families.modules import Encoder, Normalisation, PublishedFamily


class Florence2Encoder(Encoder):
    """DaViT, the projection of the image's tokens, BART's encoder, and the keys and values for BART's decoder."""

    parts = ("model",)

    def __init__(self, model: PreTrainedModel, sizes: Sizes, normalisation: Normalisation) -> None:
        super().__init__(model, sizes, normalisation)
        # the model counts images of a video in waves; a single image has the first row
        row = model.model.multi_modal_projector.visual_temporal_embed.pos_idx_to_embed[0]
        self.register_buffer("first_image", row.to(self.weights_type).clone())

    def forward(self, pixel_values: Tensor, task_ids: Tensor) -> tuple[Tensor, ...]:
        """pixel_values u8[B,height,width,3], task_ids i64[N] -> for each layer keys and values f32[B,H,S+N,d]."""
        return self.keys_values_of(pixel_values, task_ids)

    def encode(self, pixels: Tensor, task_ids: Tensor) -> Tensor:
        """See Encoder.encode; the hidden states are those of image and task."""
        language, batch = self.model.language_model, pixels.shape[0]
        encoder = language.encoder
        task = language.get_input_embeddings()(task_ids)[None].expand(batch, -1, -1)
        x = torch.cat([self._image_tokens(pixels), task], 1)
        positions = encoder.embed_positions.weight[POSITION_OFFSET : POSITION_OFFSET + x.shape[1]]
        x = encoder.layernorm_embedding(x + positions)
        for layer in encoder.layers:
            own = layer.self_attn
            q, k, v = (
                project(x).view(batch, -1, own.num_heads, own.head_dim).transpose(1, 2)
                for project in (own.q_proj, own.k_proj, own.v_proj)
            )
            mixed = _attend(q, k, v, own.head_dim**-0.5).transpose(1, 2).reshape(batch, -1, own.embed_dim)
            x = layer.self_attn_layer_norm(x + own.out_proj(mixed))
            x = layer.final_layer_norm(x + layer.fc2(layer.activation_fn(layer.fc1(x))))
        return x

    def keys_values(self, encoded: Tensor) -> Iterator[Tensor]:
        """See Encoder.keys_values."""
        return bart_keys_values(self.model.language_model.decoder, encoded)

    def _image_tokens(self, pixels: Tensor) -> Tensor:
        """Return the tokens of an image f32[B,1+N,D]: the mean over all patches, then a token for each."""
        tower, projector, x = self.model.vision_tower, self.model.multi_modal_projector, pixels
        side = 0
        for conv, blocks, side in zip(tower.convs, tower.blocks, sides(self.config.to_dict()), strict=True):
            x = conv(x)
            for block in blocks:
                x = _block(block.spatial_block, x, side, _in_windows(block.spatial_block.window_attn, side))
                x = _block(block.channel_block, x, side, _over_channels(block.channel_block.channel_attn, side))
        places = projector.image_position_embed
        columns, rows = places.column_embeddings.weight[:side], places.row_embeddings.weight[:side]
        grid = torch.cat([columns[None].expand(side, -1, -1), rows[:, None].expand(-1, side, -1)], 2)
        x = x.flatten(2).transpose(1, 2) + grid.reshape(side * side, -1) + self.first_image
        x = torch.cat([x.mean(1, keepdim=True), x], 1)
        return projector.image_proj_norm(projector.image_projection(x))


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return torch.softmax((q * scale) @ k.transpose(-1, -2), -1) @ v


def _block(block: nn.Module, x: Tensor, side: int, attend: Callable[[Tensor], Tensor]) -> Tensor:
    """Run a block of DaViT on f32[B,C,side,side]: its two parts, attention and an MLP, follow a convolution each."""
    batch, width = x.shape[0], x.shape[1]
    for conv, norm, part in ((block.conv1, block.norm1, attend), (block.conv2, block.norm2, block.ffn)):
        x = (conv(x) + x).flatten(2).transpose(1, 2)
        x = x + part(norm(x))
        x = x.transpose(1, 2).view(batch, width, side, side)
    return x


def _in_windows(attention: nn.Module, side: int) -> Callable[[Tensor], Tensor]:
    """Return the function that attends within windows, of f32[B,side*side,C]."""
    window, heads, width = attention.window_size, attention.num_heads, attention.dim
    count = -(-side // window)
    more = count * window - side

    def attend(x: Tensor) -> Tensor:
        x = x.view(-1, side, side, width)
        if more:  # positions that pad the last windows take part, as in Hugging Face
            x = nn.functional.pad(x, (0, 0, 0, more, 0, more))
        x = x.view(-1, count, window, count, window, width).transpose(2, 3).reshape(-1, window**2, width)
        qkv = attention.qkv(x).view(-1, window**2, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
        x = _attend(*qkv.unbind(0), attention.scale).transpose(1, 2).reshape(-1, window**2, width)
        x = attention.proj(x).view(-1, count, count, window, window, width).transpose(2, 3)
        x = x.reshape(-1, count * window, count * window, width)
        return (x[:, :side, :side] if more else x).reshape(-1, side * side, width)

    return attend


def _over_channels(attention: nn.Module, side: int) -> Callable[[Tensor], Tensor]:
    """Return the function that attends from channels to channels of the same group, of f32[B,side*side,C]."""
    positions, groups, width = side * side, attention.groups, attention.dim

    def attend(x: Tensor) -> Tensor:
        qkv = attention.qkv(x).view(-1, positions, 3, groups, width // groups).permute(2, 0, 3, 4, 1)
        x = _attend(*qkv.unbind(0), positions**-0.5).permute(0, 3, 1, 2).reshape(-1, positions, width)
        return attention.proj(x)

    return attend


class Florence2Step(TrocrStep):
    """The decoder of Florence2ForConditionalGeneration.forward, which is BART's."""

    parts = ("model", "lm_head")

    @property
    def body(self) -> nn.Module:
        """See TrocrStep.body."""
        return self.model.language_model.decoder

    def logits(self, x: Tensor) -> Tensor:
        """See DecoderStep.logits."""
        return self.lm_head(x)


def _config(text_width: int, text_layers: int, width: int) -> Florence2Config:
    """Return a published configuration. `width` is that of the first stage of DaViT, which doubles with each."""
    heads = [width * 2**stage // 32 for stage in range(4)]
    sides_of_text = ("encoder", "decoder")
    text = {f"{side}_layers": text_layers for side in sides_of_text}
    text |= {f"{side}_attention_heads": text_width // 64 for side in sides_of_text}
    text |= {f"{side}_ffn_dim": 4 * text_width for side in sides_of_text}
    return Florence2Config(
        text_config=text | {"d_model": text_width, "vocab_size": 51289},
        vision_config={
            "embed_dim": [width * 2**stage for stage in range(4)],
            "num_heads": heads,
            "num_groups": heads,
            "projection_dim": text_width,
        },
        image_token_id=51288,  # any that is not in a task: their own code has no such token
        image_size=IMAGE_SIZE,
        decoder_start_token_id=2,
        eos_token_id=2,
        pad_token_id=1,
    )


class Florence2(PublishedFamily):
    """Florence-2 with a language model head (Florence2ForConditionalGeneration)."""

    rules: ClassVar[Florence2Rules] = Florence2Rules()
    config_class, model_class = Florence2Config, Florence2ForConditionalGeneration

    def published(self) -> dict[str, PretrainedConfig]:
        """See PublishedFamily.published."""
        return {"Florence-2-base": _config(768, 6, 128), "Florence-2-large": _config(1024, 12, 256)}

    def shrunk(self, config: PretrainedConfig) -> PretrainedConfig:
        """See PublishedFamily.shrunk."""
        config = copy.deepcopy(config)
        config.image_size = 96
        stages = {"depths": [1, 1, 2, 1], "embed_dim": [8, 8, 16, 16], "num_heads": [1, 1, 2, 2]}
        config.vision_config.update(stages | {"num_groups": [1, 2, 2, 4], "window_size": 3, "projection_dim": 32})
        text = {
            f"{side}_{name}": value
            for side in ("encoder", "decoder")
            for name, value in {"layers": 2, "attention_heads": 4, "ffn_dim": 64}.items()
        }
        config.text_config.update(text | {"d_model": 32})
        return config

    def with_sizes(
        self,
        config: PretrainedConfig,
        *,
        patches: int,  # noqa: ARG002
        vocab_size: int,
        max_positions: int,
    ) -> PretrainedConfig:
        """See PublishedFamily.with_sizes. The graphs hold the image's size. Positions are for its tokens, too."""
        config = copy.deepcopy(config)
        positions = max_positions + sides(config.to_dict())[-1] ** 2
        config.text_config.update({"vocab_size": vocab_size, "max_position_embeddings": positions})
        return config

    def resize(self, model: PreTrainedModel, image_size: int) -> None:
        """See Family.resize."""
        model.config.image_size = self.rules.resized(model.config.to_dict(), image_size)["image_size"]

    def make_processor(self, settings: Mapping[str, Any]) -> CLIPImageProcessor:
        """See Family.make_processor."""
        return CLIPImageProcessor(**settings)

    def encoder(self, model: PreTrainedModel, normalisation: Normalisation) -> Florence2Encoder:
        """See Family.encoder."""
        return Florence2Encoder(model, self.sizes(model.config), normalisation)

    def step(self, model: PreTrainedModel) -> Florence2Step:
        """See Family.step."""
        return Florence2Step(model, self.sizes(model.config))

    def apply_settings(self, model: PreTrainedModel, settings: Mapping[str, Any]) -> None:
        """See Family.apply_settings. They may be in generation_config.json, which only `from_pretrained` reads."""
        tokens = self.sizes(model.config).tokens
        model.generation_config = GenerationConfig(
            decoder_start_token_id=tokens.bos, eos_token_id=tokens.eos, pad_token_id=tokens.pad, **settings
        )

    def prompt_arguments(
        self, tokenizer: PreTrainedTokenizerBase, prompt: str | None, images: int, first: int | None = None
    ) -> tuple[dict[str, Any], int]:
        """See Family.prompt_arguments. `generate` puts the start token before the ids."""
        if not prompt:
            return {}, 1
        ids = [*([] if first is None else [first]), *tokenizer(prompt, add_special_tokens=False)["input_ids"]]
        return {"decoder_input_ids": torch.tensor([ids]).repeat(images, 1)}, 1 + len(ids)

    def task_arguments(self, model: PreTrainedModel, task_ids: Sequence[int], images: int) -> dict[str, Any]:
        """See Family.task_arguments. The processor puts a token for each of the image's before those of the task."""
        ids = [model.config.image_token_id] * self.sizes(model.config).encoder_positions + [*task_ids]
        return {"input_ids": torch.tensor([ids]).repeat(images, 1)}

    def encode(self, model: PreTrainedModel, pixel_values: Tensor, task_ids: Sequence[int] = ()) -> Tensor:
        """See Family.encode."""
        arguments = self.task_arguments(model, task_ids, len(pixel_values))
        start = torch.full((len(pixel_values), 1), self.sizes(model.config).tokens.bos)
        return model(**arguments, pixel_values=pixel_values, decoder_input_ids=start).encoder_last_hidden_state

    def logits(self, model: PreTrainedModel, ids: Tensor, encoded: Tensor) -> Tensor:
        """See Family.logits."""
        return model(
            encoder_outputs=BaseModelOutput(last_hidden_state=encoded), decoder_input_ids=ids, use_cache=False
        ).logits
