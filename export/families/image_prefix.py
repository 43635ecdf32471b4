"""GPT-2 with an image prefix: CLIP or a ViT, a mapping network, and GPT-2, which attends to the prefix as to text.

transformers has no such class, so it is here, by the layout of engine/checkpoints/image_prefix.py. The mapping networks
are those of ClipCap (Mokady et al., 2021) and of MedICap. The reference is GPT2LMHeadModel.generate with the prefix as
`inputs_embeds`. As GIT's image, the prefix runs through the decoder's layers once, in the encoder graph.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    CLIPVisionModelWithProjection,
    GenerationConfig,
    GPT2LMHeadModel,
    LogitsProcessor,
    LogitsProcessorList,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ViTModel,
)

from engine.checkpoints.image_prefix import CLIP_ENCODER, MAPPING_HEADS, MAPPINGS, ImagePrefixRules
from engine.checkpoints.rules import Rules, completed
from engine.errors import CheckpointError
from engine.options import DEFAULT_NEW_TOKENS
from export.families.decoders import Gpt2Step
from export.families.git import CLIPImageProcessor
from export.families.modules import IS_5, MASKED, Encoder, Family, ImageProcessor, Normalisation, Sizes
from export.families.vision_encoder_decoder import PROCESSORS, for_one_size


class ImagePrefixGPT2Config(PretrainedConfig):
    """Settings of the image encoder and of GPT-2 as their own configurations, and those of the mapping network."""

    model_type = "image-prefix-gpt2"

    def __init__(
        self,
        encoder: Mapping[str, Any] | None = None,
        decoder: Mapping[str, Any] | None = None,
        mapping: Mapping[str, Any] | None = None,
        decoder_start_token_id: int | None = None,
        **settings: Any,
    ) -> None:
        encoder, decoder = (dict(part or {"model_type": kind}) for part, kind in ((encoder, "vit"), (decoder, "gpt2")))
        self.encoder = AutoConfig.for_model(encoder.pop("model_type"), **encoder)
        self.decoder = AutoConfig.for_model(decoder.pop("model_type"), **decoder)
        mapping = mapping or {"type": "linear"}
        self.mapping = completed(mapping, MAPPINGS[mapping["type"]])
        super().__init__(**settings)
        self.decoder_start_token_id = decoder_start_token_id


class LinearMapping(nn.Module):
    """MedICap's: a layer norm and a dense layer for each hidden state f32[B,S,W] of the image encoder."""

    def __init__(self, config: ImagePrefixGPT2Config) -> None:
        super().__init__()
        width = config.encoder.hidden_size
        self.layer_norm = nn.LayerNorm(width, eps=config.encoder.layer_norm_eps)
        self.projection = nn.Linear(width, config.decoder.n_embd, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the prefix f32[B,S,D]."""
        return self.projection(self.layer_norm(hidden))


class MlpMapping(nn.Module):
    """ClipCap's for a GPT-2 that is trained too: two dense layers for the image embedding f32[B,W]."""

    def __init__(self, config: ImagePrefixGPT2Config) -> None:
        super().__init__()
        self.length, self.width = config.mapping["prefix_length"], config.decoder.n_embd
        total = self.length * self.width
        self.model = nn.Sequential(
            nn.Linear(config.encoder.projection_dim, total // 2), nn.Tanh(), nn.Linear(total // 2, total)
        )

    def forward(self, features: Tensor) -> Tensor:
        """Return the prefix f32[B,P,D]."""
        return self.model(features).view(-1, self.length, self.width)


class MappingAttention(nn.Module):
    """Self-attention of a MappingLayer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.to_queries = nn.Linear(width, width, bias=False)
        self.to_keys_values = nn.Linear(width, 2 * width, bias=False)
        self.project = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return f32[B,T,D] of the same shape."""
        parts = self.to_queries(x), *self.to_keys_values(x).chunk(2, -1)
        # not unflatten, which traces the batch size as a constant
        q, k, v = (part.view(*x.shape[:2], MAPPING_HEADS, -1).transpose(1, 2) for part in parts)
        weights = torch.softmax(q @ k.transpose(-1, -2) * (1 / math.sqrt(q.shape[-1])), -1)
        return self.project((weights @ v).transpose(1, 2).flatten(2))


class MappingLayer(nn.Module):
    """A layer of TransformerMapping: layer norms come first."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = MappingAttention(width)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 2 * width), "fc2": nn.Linear(2 * width, width)})

    def forward(self, x: Tensor) -> Tensor:
        """Return f32[B,T,D] of the same shape."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp["fc2"](torch.relu(self.mlp["fc1"](self.norm2(x))))


class TransformerMapping(nn.Module):
    """ClipCap's for a frozen GPT-2: a transformer over parts of the image embedding f32[B,W] and learned vectors."""

    def __init__(self, config: ImagePrefixGPT2Config) -> None:
        super().__init__()
        width, self.clip_length = config.decoder.n_embd, config.mapping["clip_length"]
        self.linear = nn.Linear(config.encoder.projection_dim, self.clip_length * width)
        self.prefix_const = nn.Parameter(torch.zeros(config.mapping["prefix_length"], width))
        layers = nn.ModuleList(MappingLayer(width) for _ in range(config.mapping["num_layers"]))
        self.transformer = nn.ModuleDict({"layers": layers})

    def forward(self, features: Tensor) -> Tensor:
        """Return the prefix f32[B,P,D]: the outputs of the learned vectors."""
        count = features.shape[0]
        x = self.linear(features).view(count, self.clip_length, -1)
        x = torch.cat([x, self.prefix_const.expand(count, -1, -1)], 1)
        for layer in self.transformer["layers"]:
            x = layer(x)
        return x[:, self.clip_length :]


LENGTHS = ("max_length", "min_length", "max_new_tokens", "min_new_tokens")
MAPPING_CLASSES = {"linear": LinearMapping, "mlp": MlpMapping, "transformer": TransformerMapping}


def image_prefix(module: nn.Module, mapping: Mapping[str, Any], pixels: Tensor) -> Tensor:
    """Return the prefix f32[B,P,D] of normalised pixels f32[B,3,h,w] by the parts of a model or of an encoder graph."""
    output = module.vision_model(pixel_values=pixels)
    if mapping["type"] == "linear":
        return module.clip_project(output.last_hidden_state)
    features = module.visual_projection(output.pooler_output)
    if mapping["normalize_prefix"]:
        features = features / features.norm(dim=-1, keepdim=True)
    return module.clip_project(features)


class BannedFirst(LogitsProcessor):
    """Bans each sequence of ids where it would be the whole text so far, as release 5 does.

    4.57 applies a ban of n ids to texts of at least n ids, so that without a start token it lets it be the first words.
    """

    def __init__(self, sequences: Sequence[Sequence[int]]) -> None:
        self.sequences = sequences

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the scores f32[R,V] of the tokens after ids i64[R,T]."""
        for *first, last in self.sequences:
            if first and len(first) == input_ids.shape[1]:
                scores[(input_ids == input_ids.new_tensor(first)).all(1), last] = -math.inf
        return scores


class ImagePrefixGPT2(PreTrainedModel):
    """The whole model. Without decoder_start_token_id, captions start right after the prefix, as ClipCap's do."""

    config_class = ImagePrefixGPT2Config
    main_input_name = "pixel_values"

    def __init__(self, config: ImagePrefixGPT2Config) -> None:
        super().__init__(config)
        if config.encoder.model_type == CLIP_ENCODER:
            self.vision_model = CLIPVisionModelWithProjection(config.encoder).vision_model
        else:
            self.vision_model = ViTModel(config.encoder, add_pooling_layer=False)
        if config.mapping["type"] != "linear":
            self.visual_projection = nn.Linear(config.encoder.hidden_size, config.encoder.projection_dim, bias=False)
        self.clip_project = MAPPING_CLASSES[config.mapping["type"]](config)
        self.gpt = GPT2LMHeadModel(config.decoder)
        self.post_init()

    def embedded(self, prefix: Tensor, ids: Tensor) -> Tensor:
        """Return GPT-2's input f32[B,P+T,D], without positions: the prefix f32[B,P,D], then ids i64[B,T]."""
        return torch.cat([prefix, self.gpt.transformer.wte(ids)], 1)

    def generate(self, pixel_values: Tensor, input_ids: Tensor | None = None, **settings: Any) -> Any:
        """Caption f32[B,3,h,w] by GPT-2's own `generate`; `input_ids` i64[B,T] are a prompt.

        `max_length` and `min_length` count the start token, the prompt and the caption, as for the other families.
        GPT-2's `generate` also counts the prefix, once or twice, depending on the prompt and the release. Without a
        start token, each sequence begins with the id after the vocabulary, see ImagePrefixRules.sizes.
        """
        start = self.config.decoder_start_token_id
        ids = torch.zeros(len(pixel_values), 0, dtype=torch.long) if input_ids is None else input_ids
        if start is not None:
            ids = nn.functional.pad(ids, (1, 0), value=start)
        embedded = self.embedded(image_prefix(self, self.config.mapping, pixel_values), ids)
        limits = self._new_tokens(settings, ids.shape[1] + (start is None))
        if start is None and not IS_5 and settings.get("bad_words_ids"):
            settings["logits_processor"] = LogitsProcessorList([BannedFirst(settings["bad_words_ids"])])
        others = {name: value for name, value in settings.items() if name not in LENGTHS}
        with warnings.catch_warnings():  # release 5 warns that bans and penalties do not count the prefix
            warnings.filterwarnings("ignore", message="Passing `.*` with `inputs_embeds`")
            output = self.gpt.generate(
                input_ids=ids if ids.shape[1] else None,
                inputs_embeds=embedded,
                attention_mask=embedded.new_ones(embedded.shape[:2]).long(),
                **others,
                **limits,
            )
        if start is None:
            words = self.config.decoder.vocab_size
            if isinstance(output, Tensor):
                return nn.functional.pad(output, (1, 0), value=words)
            output.sequences = nn.functional.pad(output.sequences, (1, 0), value=words)
        return output

    def _new_tokens(self, settings: Mapping[str, Any], before: int) -> dict[str, Any]:
        """Return the limits of `generate` without those that count the `before` ids in front of the caption."""
        asked = self.gpt.generation_config.to_dict() | dict(settings)
        most, least = asked.get("max_new_tokens"), asked.get("min_new_tokens")
        if most is None:
            most, total = DEFAULT_NEW_TOKENS, asked.get("max_length")
            if "max_length" in settings or total not in (None, DEFAULT_NEW_TOKENS):
                most = total - before
        if least is None:
            least = max(0, (asked.get("min_length") or 0) - before)
        limits = {"max_new_tokens": most, "min_new_tokens": least or None}
        return limits if least else limits | {"min_length": 0}

    def save_pretrained(self, save_directory: Any, **settings: Any) -> None:
        """Write the checkpoint, and generation_config.json, which transformers writes for its own classes only."""
        super().save_pretrained(save_directory, **settings)
        self.gpt.generation_config.save_pretrained(save_directory)


class ImagePrefixEncoder(Encoder):
    """The image encoder, the mapping network, and GPT-2's layers applied to the prefix."""

    parts = ("vision_model", "clip_project", "gpt")

    def __init__(self, model: ImagePrefixGPT2, sizes: Sizes, normalisation: Normalisation) -> None:
        super().__init__(model, sizes, normalisation)
        if model.config.encoder.model_type != CLIP_ENCODER:
            self.vision_model = for_one_size(model.vision_model)
        if hasattr(model, "visual_projection"):
            self.visual_projection = model.visual_projection

    def encode(self, pixels: Tensor) -> Tensor:
        """Return the prefix with its positions, the input of GPT-2's first layer f32[B,P,D]."""
        prefix = image_prefix(self, self.config.mapping, pixels)
        return prefix + self.gpt.transformer.wpe.weight[: self.sizes.encoder_positions]

    def keys_values(self, encoded: Tensor) -> Iterator[Tensor]:
        """Run the prefix through GPT2Block.forward with a causal mask; yield its keys and values in each layer.

        Without a start token, the first values of the last position are its input, see ImagePrefixStep.start.
        """
        x, batch, length = encoded, encoded.shape[0], self.sizes.encoder_positions
        later = torch.full((length, length), MASKED, dtype=self.weights_type).triu(1)
        for number, block in enumerate(self.gpt.transformer.h, 1):
            query, key, value = block.attn.c_attn(block.ln_1(x)).split(block.attn.split_size, 2)
            yield key
            is_input = number == 1 and self.config.decoder_start_token_id is None
            yield torch.cat([value[:, :-1], encoded[:, -1:]], 1) if is_input else value
            if number == self.sizes.num_layers:
                return  # the last layer's output is only for the prefix itself
            q, k, v = (self.split_heads(part, batch) for part in (query, key, value))
            weights = torch.softmax((q * (1 / math.sqrt(self.width))) @ k.transpose(-1, -2) + later, -1)
            x = block.attn.c_proj(self.merge_heads(weights @ v).view(batch, -1, self.heads * self.width)) + x
            x = x + block.mlp(block.ln_2(x))


class ImagePrefixStep(Gpt2Step):
    """GPT2LMHeadModel.forward for the text's tokens, whose positions follow those of the prefix.

    Without a start token, the last position of the prefix is the start token. `cross` holds its input to the first
    layer, no other token attends to it there, and it has an id after the vocabulary.
    """

    parts = ("gpt",)
    prefix = True

    def __init__(self, model: ImagePrefixGPT2, sizes: Sizes) -> None:
        super().__init__(model, sizes)
        self.words, length = model.config.decoder.vocab_size, sizes.encoder_positions
        self.starts_with_image = model.config.decoder_start_token_id is None
        self.first_position = length - self.starts_with_image
        if self.starts_with_image:
            hidden = torch.zeros(length, dtype=self.weights_type)
            hidden[-1] = MASKED
            self.register_buffer("hidden", hidden, persistent=False)

    @property
    def decoder(self) -> nn.Module:
        """GPT-2 with its head."""
        return self.gpt

    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        """See DecoderStep.embed."""
        known = ids.clamp(max=self.words - 1) if self.starts_with_image else ids
        return super().embed(known, positions + self.first_position)

    def start(self, x: Tensor, ids: Tensor, cross: Sequence[Tensor]) -> Tensor:
        """See DecoderStep.start."""
        if not self.starts_with_image:
            return x
        first = cross[1][:, :, -1:].transpose(1, 2).flatten(2)
        is_start = (ids == self.words)[..., None]
        x = torch.where(is_start, first, x.view(*ids.shape, -1))
        return x if self.is_half else x.flatten(0, 1)

    def prefix_scores(self, scores: Tensor) -> Tensor:
        """See DecoderStep.prefix_scores."""
        return scores + self.hidden if self.starts_with_image else scores

    def logits(self, x: Tensor) -> Tensor:
        """See DecoderStep.logits."""
        return with_start(super().logits(x)) if self.starts_with_image else super().logits(x)


def with_start(logits: Tensor) -> Tensor:
    """Return logits f32[...,V+1] with one for the start token's id, which is never the next one. It is finite, so that
    a repetition penalty does not make it NaN.
    """
    return nn.functional.pad(logits, (0, 1), value=MASKED)


class ImagePrefix(Family):
    """GPT-2 with an image prefix."""

    rules: ClassVar[Rules] = ImagePrefixRules()
    config_class, model_class = ImagePrefixGPT2Config, ImagePrefixGPT2

    def resize(self, model: PreTrainedModel, image_size: int) -> None:  # noqa: ARG002
        """See Family.resize."""
        raise CheckpointError(
            f"--image-size {image_size}: the positions of a {self.rules.name} checkpoint cannot be resized, leave the "
            "option out"
        )

    def make_processor(self, settings: Mapping[str, Any]) -> ImageProcessor:
        """See Family.make_processor."""
        is_clip = settings["image_processor_type"].startswith("CLIP")
        return (CLIPImageProcessor if is_clip else PROCESSORS["ViT"])(**settings)

    def encoder(self, model: PreTrainedModel, normalisation: Normalisation) -> ImagePrefixEncoder:
        """See Family.encoder."""
        return ImagePrefixEncoder(model, self.sizes(model.config), normalisation)

    def step(self, model: PreTrainedModel) -> ImagePrefixStep:
        """See Family.step."""
        return ImagePrefixStep(model, self.sizes(model.config))

    def generation_config(self, model: PreTrainedModel) -> GenerationConfig:
        """See Family.generation_config."""
        return model.gpt.generation_config

    def apply_settings(self, model: PreTrainedModel, settings: Mapping[str, Any]) -> None:
        """See Family.apply_settings."""
        tokens = self.sizes(model.config).tokens
        model.gpt.generation_config = GenerationConfig(eos_token_id=tokens.eos, pad_token_id=tokens.pad, **settings)

    def prompt_arguments(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompt: str | None,
        images: int,
        first: int | None = None,  # noqa: ARG002
    ) -> tuple[dict[str, Any], int]:
        """See Family.prompt_arguments. `generate` gets the ids and their embeddings, and counts them for bans."""
        if not prompt:
            return {}, 1
        ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
        return {"input_ids": ids.repeat(images, 1)}, 1 + ids.shape[1]

    def encode(
        self,
        model: PreTrainedModel,
        pixel_values: Tensor,
        task_ids: Sequence[int] = (),  # noqa: ARG002
    ) -> Tensor:
        """See Family.encode: the prefix, without positions."""
        return image_prefix(model, model.config.mapping, pixel_values)

    def logits(self, model: PreTrainedModel, ids: Tensor, encoded: Tensor) -> Tensor:
        """See Family.logits."""
        starts_with_image = model.config.decoder_start_token_id is None
        embedded = model.embedded(encoded, ids[:, starts_with_image:])
        logits = model.gpt(inputs_embeds=embedded, use_cache=False).logits[:, -ids.shape[1] :]
        return with_start(logits) if starts_with_image else logits
