"""Several checkpoints as one model that Hugging Face's own `generate` runs: what an ensemble of bundles must say.

Its logits are the weighted mean of the models' log-probabilities, so that every setting means what it means for one
model.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import BlipForConditionalGeneration, BlipTextLMHeadModel
from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions

from engine.bundle.ensemble import shares
from engine.errors import CheckpointError
from export.reference.huggingface import Reference


class MeanVision(nn.Module):
    """The vision towers side by side: hidden states f32[B,S,D1+D2+...]."""

    def __init__(self, models: Sequence[BlipForConditionalGeneration]) -> None:
        super().__init__()
        self.towers = nn.ModuleList(model.vision_model for model in models)

    def forward(self, pixel_values: Tensor, **_: object) -> tuple[Tensor]:
        """pixel_values f32[B,3,height,width]."""
        return (torch.cat([tower(pixel_values)[0] for tower in self.towers], -1),)


class MeanDecoder(BlipTextLMHeadModel):
    """The text decoders, each on its own part of the hidden states; keeps no keys and values."""

    def __init__(self, models: Sequence[BlipForConditionalGeneration], weights: Sequence[float]) -> None:
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
        """Return logits f32[B,T,V]: the sum of weight * log_softmax of the decoders, in their order."""
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


def ensemble(references: Sequence[Reference], weights: Sequence[float]) -> Reference:
    """Return several references as one, with weights as in engine.bundle.ensemble; the first gives tokenizer and
    settings.

    Raises CheckpointError where their pictures are not prepared alike, which a batch of pixels has to be.
    """
    first = references[0]
    for other in references[1:]:
        if other.image_processor.to_dict() != first.image_processor.to_dict():
            raise CheckpointError(
                "the checkpoints prepare pictures in different ways: parity is shown for such that do it alike"
            )
    models = [reference.model for reference in references]
    model = copy.copy(first.model)
    model._modules = dict(first.model._modules)
    model.vision_model, model.text_decoder = MeanVision(models), MeanDecoder(models, shares(weights)).eval()
    return Reference(model, first.image_processor, first.tokenizer)
