"""VisionEncoderDecoder: an image encoder and a text decoder of two other models, such as ViT with GPT-2.

Only the pairs in PAIRS are supported. Reference: transformers 4.57,
models/vision_encoder_decoder/modeling_vision_encoder_decoder.py.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    GPT2Config,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrOCRConfig,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
)
from transformers.modeling_outputs import BaseModelOutput

from engine.checkpoints.vision_encoder_decoder import DECODERS as DECODER_RULES
from engine.checkpoints.vision_encoder_decoder import ENDINGS, VisionEncoderDecoderRules, side_of
from engine.errors import CheckpointError
from export.families.decoders import DECODERS, TextDecoder, skips_pads
from export.families.modules import (
    IS_5,
    Encoder,
    ImageProcessor,
    Normalisation,
    PublishedFamily,
    Sizes,
    patches_per_side,
)

if IS_5:  # release 5 uses torchvision by default if it is installed, whose resized pixels differ by a level or two
    from transformers.models.beit.image_processing_pil_beit import BeitImageProcessorPil as BeitImageProcessor
    from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil as BitImageProcessor
    from transformers.models.deit.image_processing_pil_deit import DeiTImageProcessorPil as DeiTImageProcessor
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil as ViTImageProcessor
else:
    from transformers import BeitImageProcessor, BitImageProcessor, DeiTImageProcessor, ViTImageProcessor

PROCESSORS = {
    "ViT": ViTImageProcessor,
    "DeiT": DeiTImageProcessor,
    "Beit": BeitImageProcessor,
    "Bit": BitImageProcessor,
}
"""Image processors by the beginning of the name that a checkpoint gives them."""
CACHE = "cache" if "cache" in inspect.signature(VisionEncoderDecoderModel.forward).parameters else "past_key_values"
"""Name of forward's argument for cached keys and values, which transformers 5 has changed."""
PROJECTION = "enc_to_dec_proj"
"""Name of the dense layer between an encoder and a decoder of different widths."""


def decoder_of(config: VisionEncoderDecoderConfig) -> type[TextDecoder]:
    """Return the step graph of a configuration's decoder."""
    return DECODERS[config.decoder.model_type]


class VisionEncoder(Encoder):
    """The encoder by Hugging Face's own code, the projection to the decoder's width, and the decoder's keys."""

    parts = ("encoder", "decoder")

    def __init__(self, model: PreTrainedModel, sizes: Sizes, normalisation: Normalisation) -> None:
        super().__init__(model, sizes, normalisation)
        self.encoder = for_one_size(model.encoder)
        if hasattr(model, PROJECTION):
            self.enc_to_dec_proj = model.enc_to_dec_proj
        self.keys_of = decoder_of(model.config).keys_values

    def encode(self, pixels: Tensor) -> Tensor:
        """See Encoder.encode."""
        encoded = self.encoder(pixel_values=pixels).last_hidden_state
        return self.enc_to_dec_proj(encoded) if hasattr(self, PROJECTION) else encoded

    def keys_values(self, encoded: Tensor) -> Iterator[Tensor]:
        """See Encoder.keys_values."""
        return self.keys_of(self.decoder, encoded)


def _pair(
    encoder: PretrainedConfig, decoder: PretrainedConfig, ids: tuple[int, int, int]
) -> VisionEncoderDecoderConfig:
    """Return the configuration of a pair with the ids of start, end and padding."""
    return VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        encoder, decoder, **dict(zip(ENDINGS, ids, strict=True))
    )


def for_one_size(encoder: PreTrainedModel) -> PreTrainedModel:
    """Return a copy of an encoder that uses its position table as it is; it shares all weights.

    While they are traced, these models always interpolate the table to the size of the image. The graph has one size.
    """
    table = getattr(encoder.embeddings, "position_embeddings", None)
    if not isinstance(table, nn.Parameter):  # Swin without absolute positions
        return encoder
    encoder = copy.copy(encoder)
    encoder._modules = dict(encoder._modules)
    embeddings = encoder.embeddings = copy.copy(encoder.embeddings)
    embeddings.interpolate_pos_encoding = lambda *_: embeddings.position_embeddings
    return encoder


class VisionEncoderDecoder(PublishedFamily):
    """An image encoder with a text decoder (VisionEncoderDecoderModel)."""

    rules: ClassVar[VisionEncoderDecoderRules] = VisionEncoderDecoderRules()
    config_class, model_class = VisionEncoderDecoderConfig, VisionEncoderDecoderModel

    def published(self) -> dict[str, PretrainedConfig]:
        """See PublishedFamily.published. TrOCR-base is microsoft/trocr-base-printed and -handwritten."""
        gpt2 = GPT2Config(is_decoder=True, add_cross_attention=True)
        trocr = TrOCRConfig(is_decoder=True, add_cross_attention=True, cross_attention_hidden_size=768)
        return {
            "ViT-GPT2": _pair(ViTConfig(), gpt2, (50256, 50256, 50256)),
            "TrOCR-base": _pair(ViTConfig(image_size=384, qkv_bias=False), trocr, (2, 2, 1)),
        }

    def shrunk(self, config: PretrainedConfig) -> PretrainedConfig:
        """See PublishedFamily.shrunk."""
        small = copy.deepcopy(config)
        small.encoder.update(
            {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3}
        )
        if small.decoder.model_type == "gpt2":
            small.decoder.update({"n_embd": 24, "n_layer": 2, "n_head": 4})
        else:
            small.decoder.update(
                {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 64}
            )
            small.decoder.cross_attention_hidden_size = 24
        return small

    def with_sizes(
        self, config: PretrainedConfig, *, patches: int, vocab_size: int, max_positions: int
    ) -> PretrainedConfig:
        """See PublishedFamily.with_sizes."""
        config = copy.deepcopy(config)
        config.encoder.image_size = patches * side_of(config.encoder.patch_size)
        *_, positions = DECODER_RULES[config.decoder.model_type].sizes
        config.decoder.update({"vocab_size": vocab_size, positions: max_positions})
        return config

    def resize(self, model: PreTrainedModel, image_size: int) -> None:
        """Interpolate the position table as the encoder itself does, once.

        Raises CheckpointError for encoders with positions relative to each other or in windows.
        """
        vision, embeddings = model.config.encoder, model.encoder.embeddings
        table = getattr(embeddings, "position_embeddings", None)
        patch = side_of(vision.patch_size)
        side = patches_per_side(image_size, patch)
        if table is None or vision.model_type == "swin" or getattr(vision, "use_relative_position_bias", False):
            raise CheckpointError(
                f"--image-size {image_size}: the positions of this {vision.model_type} encoder cannot be resized, "
                "leave the option out"
            )
        extra = table.shape[1] - (side_of(vision.image_size) // patch) ** 2
        tokens = torch.zeros(1, extra + side**2, table.shape[2])
        with torch.no_grad():
            resized = embeddings.interpolate_pos_encoding(tokens, image_size, image_size)
        embeddings.position_embeddings = nn.Parameter(resized.clone())
        # transformers 5 checks DeiT's size in `embeddings`, earlier releases in its patches
        embeddings.image_size = embeddings.patch_embeddings.image_size = (image_size, image_size)
        vision.image_size = image_size

    def make_processor(self, settings: Mapping[str, Any]) -> ImageProcessor:
        """See Family.make_processor."""
        kind, given = settings["image_processor_type"], dict(settings)
        if kind.startswith("Beit"):  # it never converts, and warns about this setting; images are RGB already
            given.pop("do_convert_rgb", None)
        return next(make for prefix, make in PROCESSORS.items() if kind.startswith(prefix))(**given)

    def encoder(self, model: PreTrainedModel, normalisation: Normalisation) -> VisionEncoder:
        """See Family.encoder."""
        return VisionEncoder(model, self.sizes(model.config), normalisation)

    def step(self, model: PreTrainedModel) -> TextDecoder:
        """See Family.step."""
        return decoder_of(model.config)(model, self.sizes(model.config))

    def apply_settings(self, model: PreTrainedModel, settings: Mapping[str, Any]) -> None:
        """See Family.apply_settings. They may be in generation_config.json, which only `from_pretrained` reads."""
        tokens = self.sizes(model.config).tokens
        model.generation_config = GenerationConfig(
            decoder_start_token_id=tokens.bos, eos_token_id=tokens.eos, pad_token_id=tokens.pad, **settings
        )

    def prompt_arguments(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompt: str | None,
        images: int,
        first: int | None = None,  # noqa: ARG002
    ) -> tuple[dict[str, Any], int]:
        """See Family.prompt_arguments. `generate` puts the start token before the ids."""
        if not prompt:
            return {}, 1
        ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
        return {"decoder_input_ids": ids.repeat(images, 1)}, 1 + ids.shape[1]

    def encode(self, model: PreTrainedModel, pixel_values: Tensor, task_ids: Sequence[int] = ()) -> Tensor:  # noqa: ARG002
        """See Family.encode."""
        return model.encoder(pixel_values=pixel_values).last_hidden_state

    def logits(self, model: PreTrainedModel, ids: Tensor, encoded: Tensor) -> Tensor:
        """See Family.logits.

        Where positions depend on the pad id and the caption contains it, only a cache gives the positions of generate.
        """
        outputs = BaseModelOutput(last_hidden_state=encoded)
        text = model.config.decoder
        if not (skips_pads(text) and (ids == text.pad_token_id).any()):
            return model(encoder_outputs=outputs, decoder_input_ids=ids, use_cache=False).logits
        logits, cache = [], None
        for column in ids.split(1, 1):
            step = model(encoder_outputs=outputs, decoder_input_ids=column, use_cache=True, **{CACHE: cache})
            cache = step.past_key_values
            logits.append(step.logits)
        return torch.cat(logits, 1)
