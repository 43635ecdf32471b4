"""Text decoders of VisionEncoderDecoder as step graphs: GPT-2, BERT, RoBERTa, TrOCR and MBart.

Each decoder also yields the cross-attention keys and values for the encoder graph. `decoder` is Hugging Face's module
with its head (such as GPT2LMHeadModel), `config` its configuration.

References: transformers 4.57, models/gpt2, bert, roberta, trocr and mbart.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from engine.checkpoints.vision_encoder_decoder import POSITION_OFFSET
from export.families.modules import DecoderStep, LayerCache, Sizes, bert_embeddings, cross_keys_values


class TextDecoder(DecoderStep):
    """A decoder with cross-attention to the encoder's hidden states."""

    parts = ("decoder",)

    @staticmethod
    @abstractmethod
    def keys_values(decoder: nn.Module, encoded: Tensor) -> Iterator[Tensor]:
        """See Encoder.keys_values."""


class Gpt2Step(TextDecoder):
    """GPT2LMHeadModel.forward: layer norms come first, and dense layers are Conv1D with weights [inputs,outputs]."""

    prefix = False
    """Whether the image is before the text in self-attention instead of in cross-attention."""

    @staticmethod
    def keys_values(decoder: nn.Module, encoded: Tensor) -> Iterator[Tensor]:
        """See TextDecoder.keys_values."""
        for block in decoder.transformer.h:
            yield from block.crossattention.c_attn(encoded).split(block.crossattention.split_size, 2)

    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        """See DecoderStep.embed."""
        return self.decoder.transformer.wte(ids) + self.decoder.transformer.wpe(positions)

    def layer(self, index: int, x: Tensor, cache: LayerCache) -> tuple[Tensor, list[Tensor]]:
        """See DecoderStep.layer."""
        block = self.decoder.transformer.h[index]
        q, k, v = block.attn.c_attn(block.ln_1(x)).split(block.attn.split_size, -1)
        q, k, v = (self.split_heads(part, cache.batch) for part in (q, k, v))
        mixed, extended = self.self_attention(q, k, v, cache, prefix=self.prefix)
        x = block.attn.c_proj(mixed) + x
        if self.prefix:
            return x + block.mlp(block.ln_2(x)), extended
        query = block.crossattention.q_attn(block.ln_cross_attn(x))
        mixed = self.cross_attention(self.split_heads(query, cache.batch), cache)
        x = x + block.crossattention.c_proj(mixed)
        return x + block.mlp(block.ln_2(x)), extended

    def logits(self, x: Tensor) -> Tensor:
        """See DecoderStep.logits."""
        return self.decoder.lm_head(self.decoder.transformer.ln_f(x))


class BertStep(TextDecoder):
    """BertLMHeadModel.forward. Every token has type 0."""

    body = "bert"

    @classmethod
    def keys_values(cls, decoder: nn.Module, encoded: Tensor) -> Iterator[Tensor]:
        """See TextDecoder.keys_values."""
        return cross_keys_values(getattr(decoder, cls.body).encoder.layer, encoded)

    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        """See DecoderStep.embed."""
        return bert_embeddings(getattr(self.decoder, self.body).embeddings, ids, positions)

    def layer(self, index: int, x: Tensor, cache: LayerCache) -> tuple[Tensor, list[Tensor]]:
        """See DecoderStep.layer."""
        return self.bert_layer(getattr(self.decoder, self.body).encoder.layer[index], x, cache)

    def logits(self, x: Tensor) -> Tensor:
        """See DecoderStep.logits."""
        return self.decoder.cls(x)


def skips_pads(config: PretrainedConfig) -> bool:
    """Return whether a decoder of this configuration gives the pad id its own position, see `after_pad`."""
    return config.model_type == "roberta" or not getattr(config, "use_learned_position_embeddings", True)


def after_pad(ids: Tensor, positions: Tensor, pad: int) -> Tensor:
    """Return the rows of a position table that has the row of pad ids first, i64 of the shape of `ids`.

    RoBERTa counts positions over the ids of one forward pass that are not the pad id, and adds the number of cached
    positions (create_position_ids_from_input_ids). `generate` feeds one id per pass, so that a pad id gets the row
    `pad` and any other id `pad` + 1 + its position in the caption, whatever precedes it.
    """
    return torch.where(ids == pad, pad, positions + (pad + 1))


class RobertaStep(BertStep):
    """RobertaForCausalLM.forward: a BERT with another head, and with positions that depend on the pad id."""

    body = "roberta"

    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        """See DecoderStep.embed."""
        return super().embed(ids, after_pad(ids, positions, self.decoder.config.pad_token_id))

    def logits(self, x: Tensor) -> Tensor:
        """See DecoderStep.logits."""
        return self.decoder.lm_head(x)


def bart_keys_values(body: nn.Module, encoded: Tensor) -> Iterator[Tensor]:
    """Yield the cross-attention keys and values of the layers of a BART decoder, see Encoder.keys_values."""
    for layer in body.layers:
        yield layer.encoder_attn.k_proj(encoded)
        yield layer.encoder_attn.v_proj(encoded)


class TrocrStep(TextDecoder):
    """TrOCRForCausalLM.forward: a BART decoder. Layer norms come after each part; positions are learned or waves."""

    norm_first = False
    """Whether each part of a layer normalises its input (MBart) instead of its output."""

    def __init__(self, model: PreTrainedModel, sizes: Sizes) -> None:
        super().__init__(model, sizes)
        if skips_pads(self.body.config):  # Hugging Face computes it, and does not count it among the weights
            table = self.body.embed_positions.weights
            self.register_buffer("waves", table.to(self.weights_type))  # persistent: others become constants

    @property
    def body(self) -> nn.Module:
        """The layers and embeddings, without the head."""
        return self.decoder.model.decoder

    @staticmethod
    def keys_values(decoder: nn.Module, encoded: Tensor) -> Iterator[Tensor]:
        """See TextDecoder.keys_values."""
        return bart_keys_values(decoder.model.decoder, encoded)

    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        """See DecoderStep.embed."""
        body = self.body
        if skips_pads(body.config):
            rows = nn.functional.embedding(after_pad(ids, positions, body.padding_idx), self.waves)
        else:
            rows = nn.functional.embedding(positions + POSITION_OFFSET, body.embed_positions.weight)
        x = body.embed_tokens(ids) + rows
        norm = body.layernorm_embedding
        return x if norm is None else norm(x)

    def layer(self, index: int, x: Tensor, cache: LayerCache) -> tuple[Tensor, list[Tensor]]:
        """See DecoderStep.layer."""
        layer = self.body.layers[index]
        own, cross = layer.self_attn, layer.encoder_attn

        def before(norm: nn.Module, x: Tensor) -> Tensor:
            return norm(x) if self.norm_first else x

        def after(norm: nn.Module, x: Tensor) -> Tensor:
            return x if self.norm_first else norm(x)

        y = before(layer.self_attn_layer_norm, x)
        q, k, v = (self.split_heads(project(y), cache.batch) for project in (own.q_proj, own.k_proj, own.v_proj))
        mixed, extended = self.self_attention(q, k, v, cache)
        x = after(layer.self_attn_layer_norm, x + own.out_proj(mixed))
        query = cross.q_proj(before(layer.encoder_attn_layer_norm, x))
        mixed = self.cross_attention(self.split_heads(query, cache.batch), cache)
        x = after(layer.encoder_attn_layer_norm, x + cross.out_proj(mixed))
        y = layer.fc2(layer.activation_fn(layer.fc1(before(layer.final_layer_norm, x))))
        return after(layer.final_layer_norm, x + y), extended

    def logits(self, x: Tensor) -> Tensor:
        """See DecoderStep.logits."""
        return self.decoder.output_projection(x)


class MbartStep(TrocrStep):
    """MBartForCausalLM.forward, the decoder of Donut's shape."""

    norm_first = True

    def logits(self, x: Tensor) -> Tensor:
        """See DecoderStep.logits."""
        return self.decoder.lm_head(self.body.layer_norm(x))


DECODERS: dict[str, type[TextDecoder]] = {
    "gpt2": Gpt2Step,
    "bert": BertStep,
    "roberta": RobertaStep,
    "trocr": TrocrStep,
    "mbart": MbartStep,
}
"""Decoders by `model_type` of the decoder's configuration."""
