"""What the export, the reference and the training need to know about a family of captioning models."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import transformers
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from export.families.modules import DecoderStep, Encoder, Normalisation, Sizes

IS_5 = int(transformers.__version__.partition(".")[0]) >= 5


class ImageProcessor(Protocol):
    """The part of Hugging Face's image processors that is used here."""

    size: dict[str, int]
    resample: int
    do_rescale: bool
    rescale_factor: float
    do_normalize: bool
    image_mean: Sequence[float]
    image_std: Sequence[float]

    def __call__(self, images: Any, **settings: Any) -> Any: ...

    def to_dict(self) -> dict[str, Any]: ...

    def save_pretrained(self, directory: Path) -> Any: ...


@dataclass(frozen=True)
class ProcessorRules:
    """Which image processors a family accepts: those whose type in the settings file starts with `prefix`.

    `kind` is the class that the family's checkpoints name, `settings` are its settings with their defaults. Settings in
    `without_effect` do not change pixels; any other setting is refused.
    """

    kind: str
    prefix: str
    settings: Mapping[str, Any]
    without_effect: frozenset[str]


class Family(ABC):
    """A family of captioning models: names in checkpoints, sizes, graphs and the calls of Hugging Face's model.

    Families are listed in export/families/__init__.py. Models are Hugging Face's, `config` is the content of
    config.json as Hugging Face's object, `raw` the same as JSON.
    """

    name: ClassVar[str]
    """As users know it; in messages."""
    config_class: ClassVar[type[PretrainedConfig]]
    model_class: ClassVar[type[PreTrainedModel]]
    weight_prefixes: ClassVar[tuple[str, ...]]
    """Prefixes of weight names: the encoder's, the decoder's. If all weights of one are 0, the checkpoint is broken."""
    other_models: ClassVar[Mapping[str, str]] = {}
    """Prefixes of weight names of related models that do not generate captions, and what these models are."""
    settings_part: ClassVar[str]
    """The part of config.json from which `generate` reads its settings."""
    processor: ClassVar[ProcessorRules]

    @property
    def model_type(self) -> str:
        """`model_type` in config.json."""
        return self.config_class.model_type

    @property
    def architecture(self) -> str:
        """The class that `architectures` in config.json names."""
        return self.model_class.__name__

    # checkpoints

    @abstractmethod
    def check_config(self, raw: Mapping[str, Any], path: Path) -> None:
        """Raise CheckpointError if config.json at `path` does not describe a model that can caption."""

    @abstractmethod
    def sizes(self, config: PretrainedConfig) -> Sizes:
        """Return the sizes and special tokens of a model."""

    @abstractmethod
    def tied(self, config: PretrainedConfig) -> dict[str, str]:
        """Return {name of a weight: name of the weight that it is a copy of} for tied weights."""

    @abstractmethod
    def unsupported(self, config: PretrainedConfig) -> dict[str, Any]:
        """Return the settings of config.json that change the model in a way that the graphs do not have."""

    @abstractmethod
    def resize(self, model: PreTrainedModel, image_size: int) -> None:
        """Change the model in place to images of `image_size` px. Raises CheckpointError if it cannot be changed."""

    @abstractmethod
    def make_processor(self, settings: Mapping[str, Any]) -> ImageProcessor:
        """Return Hugging Face's image processor with these settings, in the slow version that uses Pillow."""

    # graphs

    @abstractmethod
    def encoder(self, model: PreTrainedModel, normalisation: Normalisation) -> Encoder:
        """Return the encoder graph as a module that uses the model's weights."""

    @abstractmethod
    def step(self, model: PreTrainedModel) -> DecoderStep:
        """Return the decoder graph as a module that uses the model's weights."""

    @abstractmethod
    def kept_float32(self, config: PretrainedConfig) -> tuple[str, ...]:
        """Return parts of weight names; a dense layer whose weight's name has one stays float32 in int8 bundles."""

    # Hugging Face's model as the reference

    @abstractmethod
    def generation_config(self, model: PreTrainedModel) -> Any:
        """Return the GenerationConfig that the model's `generate` reads."""

    @abstractmethod
    def prompt_arguments(
        self, tokenizer: PreTrainedTokenizerBase, prompt: str | None, images: int
    ) -> tuple[dict[str, Any], int]:
        """Return generate's arguments for a prompt, and the number of ids that it puts before the caption."""

    @abstractmethod
    def encode(self, model: PreTrainedModel, pixel_values: Tensor) -> Tensor:
        """Return the encoder's hidden states f32[B,S,D] of f32[B,3,height,width], by Hugging Face's own code."""

    @abstractmethod
    def logits(self, model: PreTrainedModel, ids: Tensor, encoded: Tensor) -> Tensor:
        """Return the logits f32[B,T,V] of sequences i64[B,T] without a cache, by Hugging Face's own code."""

    @abstractmethod
    def ensemble(self, models: Sequence[PreTrainedModel], weights: Sequence[float]) -> PreTrainedModel:
        """Return a model whose log-probabilities are the weighted sum of those of several models; weights sum to 1."""
