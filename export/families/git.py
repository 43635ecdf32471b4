"""GIT (Microsoft): a CLIP image encoder, and a text decoder that attends to image and text in the same self-attention.

The image's tokens come before the text. They attend to each other only, so they run through the decoder's layers once,
in the encoder graph, and `cross.*` holds their keys and values in each layer. transformers runs the image encoder and
all image tokens again at every step. Reference: transformers 4.57, models/git/modeling_git.py.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    GitConfig,
    GitForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_outputs import BaseModelOutput

from engine.checkpoints.git import GitRules
from export.families.modules import (
    IS_5,
    DecoderStep,
    Encoder,
    LayerCache,
    Normalisation,
    PublishedFamily,
    bert_embeddings,
    patch_embeddings,
    patches_per_side,
    resized_positions,
)

# release 5 uses torchvision for CLIPImageProcessor if it is installed, whose resized pixels differ
if IS_5:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil as CLIPImageProcessor
else:
    from transformers import CLIPImageProcessor

PARTS = ("git", "output")


class GitEncoder(Encoder):
    """The image encoder, whose layers are Hugging Face's own code, and the decoder's layers applied to its tokens."""

    parts = PARTS

    def encode(self, pixels: Tensor) -> Tensor:
        """Run GitVisionTransformer.forward with the position table as it is; returns f32[B,S,D].

        Hugging Face looks up all rows of the table by their numbers, which the graph would have to hold.
        """
        vision = self.git.image_encoder.vision_model
        embeddings = vision.embeddings
        patches = patch_embeddings(embeddings.patch_embedding, pixels, self.sizes.image_size)
        classes = embeddings.class_embedding.expand(pixels.shape[0], 1, -1)
        x = torch.cat([classes, patches], 1) + embeddings.position_embedding.weight
        x = vision.encoder(vision.pre_layrnorm(x)).last_hidden_state
        return self.git.visual_projection(vision.post_layernorm(x))

    def keys_values(self, encoded: Tensor) -> Iterator[Tensor]:
        """Run the image's tokens through GitLayer.forward; yield their keys and values in each layer."""
        x, batch = encoded, encoded.shape[0]
        for number, layer in enumerate(self.git.encoder.layer, 1):
            own = layer.attention.self
            key, value = own.key(x), own.value(x)
            yield key
            yield value
            if number == self.sizes.num_layers:
                return  # the last layer's output is only for the image's tokens themselves
            q, k, v = (self.split_heads(part, batch) for part in (own.query(x), key, value))
            weights = torch.softmax((q * (1 / math.sqrt(self.width))) @ k.transpose(-1, -2), -1)
            mixed = self.merge_heads(weights @ v).view(batch, -1, self.heads * self.width)
            x = layer.attention.output(mixed, x)
            x = layer.output(layer.intermediate(x), x)


class GitStep(DecoderStep):
    """GitForCausalLM.forward for the text's tokens. Their positions count from 0, without those of the image."""

    parts = PARTS

    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        """See DecoderStep.embed."""
        return bert_embeddings(self.git.embeddings, ids, positions)

    def layer(self, index: int, x: Tensor, cache: LayerCache) -> tuple[Tensor, list[Tensor]]:
        """See DecoderStep.layer."""
        return self.bert_layer(self.git.encoder.layer[index], x, cache, prefix=True)

    def logits(self, x: Tensor) -> Tensor:
        """See DecoderStep.logits."""
        return self.output(x)


class Git(PublishedFamily):
    """GIT with a captioning head (GitForCausalLM), for single images."""

    rules: ClassVar[GitRules] = GitRules()
    config_class, model_class = GitConfig, GitForCausalLM

    def published(self) -> dict[str, PretrainedConfig]:
        """See PublishedFamily.published. The two differ in their image encoder."""
        large = {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "patch_size": 14,
        }
        return {"GIT-base": GitConfig(), "GIT-large": GitConfig(vision_config=large)}

    def shrunk(self, config: PretrainedConfig) -> GitConfig:
        """See PublishedFamily.shrunk."""
        config = copy.deepcopy(config)
        config.vision_config.update(
            {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3}
        )
        config.update({"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4})
        return config

    def with_sizes(
        self, config: PretrainedConfig, *, patches: int, vocab_size: int, max_positions: int
    ) -> PretrainedConfig:
        """See PublishedFamily.with_sizes."""
        config = copy.deepcopy(config)
        config.vision_config.image_size = patches * config.vision_config.patch_size
        config.vocab_size, config.max_position_embeddings = vocab_size, max_positions
        return config

    def resize(self, model: PreTrainedModel, image_size: int) -> None:
        """See Family.resize. The decoder's layers store the number of the image's tokens.

        Raises CheckpointError if `image_size` is not a multiple of the patch size.
        """
        embeddings, vision = model.git.image_encoder.vision_model.embeddings, model.config.vision_config
        side = patches_per_side(image_size, vision.patch_size)
        table = resized_positions(embeddings.position_embedding.weight.data, side)
        embeddings.position_embedding = nn.Embedding.from_pretrained(table, freeze=False)
        embeddings.position_ids = torch.arange(len(table))[None]
        embeddings.image_size = vision.image_size = image_size
        embeddings.num_patches, embeddings.num_positions = side**2, len(table)
        for layer in model.git.encoder.layer:
            layer.attention.self.image_patch_tokens = len(table)

    def make_processor(self, settings: Mapping[str, Any]) -> CLIPImageProcessor:
        """See Family.make_processor."""
        return CLIPImageProcessor(**settings)

    def encoder(self, model: PreTrainedModel, normalisation: Normalisation) -> GitEncoder:
        """See Family.encoder."""
        return GitEncoder(model, self.sizes(model.config), normalisation)

    def step(self, model: PreTrainedModel) -> GitStep:
        """See Family.step."""
        return GitStep(model, self.sizes(model.config))

    def apply_settings(self, model: PreTrainedModel, settings: Mapping[str, Any]) -> None:
        """See Family.apply_settings. They may be in generation_config.json, which only `from_pretrained` reads."""
        tokens = self.sizes(model.config).tokens
        model.generation_config = GenerationConfig(
            bos_token_id=tokens.bos, eos_token_id=tokens.eos, pad_token_id=tokens.pad, **settings
        )

    def prompt_arguments(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompt: str | None,
        images: int,
        first: int | None = None,  # noqa: ARG002
    ) -> tuple[dict[str, Any], int]:
        """See Family.prompt_arguments. As in transformers' examples, the prompt's ids follow [CLS], without [SEP]."""
        if not prompt:
            return {}, 1
        ids = [tokenizer.cls_token_id, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]
        return {"input_ids": torch.tensor([ids]).repeat(images, 1)}, len(ids)

    def encode(self, model: PreTrainedModel, pixel_values: Tensor, task_ids: Sequence[int] = ()) -> Tensor:  # noqa: ARG002
        """See Family.encode: the hidden states of the image encoder, before the projection."""
        return model.git.image_encoder(pixel_values).last_hidden_state

    def logits(self, model: PreTrainedModel, ids: Tensor, encoded: Tensor) -> Tensor:
        """See Family.logits. GitForCausalLM expects pixels, so it gets an image encoder that returns `encoded`."""
        model = copy.copy(model)
        model._modules = dict(model._modules)
        model.git = copy.copy(model.git)
        model.git._modules = dict(model.git._modules)
        model.git.image_encoder = Encoded(encoded)
        pixels = encoded.new_zeros(len(encoded), 3, 1, 1)
        logits = model(input_ids=ids, pixel_values=pixels, use_cache=False).logits
        return logits[:, encoded.shape[1] :]


class Encoded(nn.Module):
    """Stands in for an image encoder whose output is known."""

    def __init__(self, encoded: Tensor) -> None:
        super().__init__()
        self.encoded = encoded

    def forward(self, pixel_values: Tensor, **_: object) -> BaseModelOutput:  # noqa: ARG002
        """Return the known output."""
        return BaseModelOutput(last_hidden_state=self.encoded)
