"""What the checkpoints of a model family look like, without torch: names, sizes and settings.

A family subclasses Rules (example: blip.py) and is listed in families.py. Its graphs are in export/families.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from engine.bundle.manifest import MAX_LAYERS, MAX_NUMBER, ModelDims, TokenIds
from engine.errors import CheckpointError


@dataclass(frozen=True)
class Sizes(ModelDims):
    """What graphs, searches and manifests need to know about a model: its sizes and its special tokens.

    `image_size` is the height and width of the encoder's input in px.
    """

    image_size: int
    tokens: TokenIds


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


def check_numbers(settings: Mapping[str, Any], path: Path, part: str, lowest: int) -> None:
    """Raise CheckpointError if a size or an id in `part` of config.json at `path` is not a whole number in range."""
    for name, value in settings.items():
        most = MAX_LAYERS if name.startswith("num_") else MAX_NUMBER
        if type(value) is not int or not lowest <= value <= most:
            raise CheckpointError(
                f"{path}: {part}.{name} is {value!r:.40}, but it must be a whole number from {lowest} to {most}"
            )


class Rules(ABC):
    """What the checkpoints of a family look like. `raw` is the content of config.json in all methods."""

    name: ClassVar[str]
    """As users know it; in messages."""
    model_type: ClassVar[str]
    """`model_type` in config.json."""
    architecture: ClassVar[str]
    """The class that `architectures` in config.json names."""
    weight_prefixes: ClassVar[tuple[str, ...]]
    """Prefixes of weight names: the encoder's, the decoder's. If all weights of one are 0, the checkpoint is broken."""
    other_models: ClassVar[Mapping[str, str]] = {}
    """Prefixes of weight names of related models that do not generate captions, and what these models are."""
    settings_part: ClassVar[str]
    """The part of config.json from which `generate` reads its settings."""
    processor: ClassVar[ProcessorRules]
    tokenizer_class: ClassVar[str]
    """transformers' tokenizer for checkpoints that name none."""
    position_table: ClassVar[str]
    """Name of the encoder's position table f32[1,1+h*w,D]: a row for the class token, and one for each patch."""

    @abstractmethod
    def check_config(self, raw: Mapping[str, Any], path: Path) -> None:
        """Raise CheckpointError if config.json at `path` does not describe a model that can caption."""

    @abstractmethod
    def sizes(self, raw: Mapping[str, Any]) -> Sizes:
        """Return the sizes and special tokens of a model."""

    @abstractmethod
    def shape(self, raw: Mapping[str, Any]) -> dict[str, int | float | str]:
        """Return all settings of config.json that decide which operations the graphs have, by names of this family.

        These are layers, heads, widths, epsilons, activations and the patch size, but neither the image size nor the
        size of the vocabulary.
        """

    @abstractmethod
    def weight_shapes(self, raw: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """Return the shapes of all weights of the model by name, tied ones included."""

    @abstractmethod
    def resized(self, raw: Mapping[str, Any], image_size: int) -> dict[str, Any]:
        """Return config.json for images of `image_size` px. Raises CheckpointError if the model cannot have them."""

    @abstractmethod
    def tied(self, raw: Mapping[str, Any]) -> dict[str, str]:
        """Return {name of a weight: name of the weight that it is a copy of} for tied weights."""

    @abstractmethod
    def unsupported(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """Return the settings of config.json that change the model in a way that the graphs do not have."""
