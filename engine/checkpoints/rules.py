"""What the checkpoints of a model family look like, without torch: names, sizes and settings.

A family subclasses Rules (example: blip.py) and is listed in families.py. Its graphs are in export/families.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from engine.bundle.manifest import MAX_LAYERS, MAX_NUMBER, ModelDims, TokenIds
from engine.checkpoints.int8 import Residual
from engine.errors import CheckpointError


@dataclass(frozen=True)
class Sizes(ModelDims):
    """What graphs, searches and manifests need to know about a model: its sizes and its special tokens.

    `image_size` is the height and width of the encoder's input in px. With `has_tasks` the encoder also reads the ids
    of a task, and `encoder_positions` are those of the image alone.
    """

    image_size: int
    tokens: TokenIds
    has_tasks: bool = False


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


LAYERS = ("n_layer", "decoder_layers", "encoder_layers", "depths")
"""Settings that are a number of layers, in addition to those that start with "num_"."""


def check_numbers(settings: Mapping[str, Any], path: Path, part: str, lowest: int) -> None:
    """Raise CheckpointError if a size or an id in `part` of config.json at `path` is not a whole number in range."""
    for name, value in settings.items():
        most = MAX_LAYERS if name.startswith("num_") or name in LAYERS else MAX_NUMBER
        if type(value) is not int or not lowest <= value <= most:
            raise CheckpointError(
                f"{path}: {part}.{name} is {value!r:.40}, but it must be a whole number from {lowest} to {most}"
            )


def check_heads(width: int, heads: int, path: Path, part: str) -> None:
    """Raise CheckpointError if the width of `part` of config.json is not a multiple of its attention heads."""
    if width % heads:
        raise CheckpointError(f"{path}: the width {width} of {part} is not a multiple of its {heads} attention heads")


def check_patches(image_size: int, patch_size: int) -> None:
    """Raise CheckpointError if an image (px) does not consist of whole patches."""
    if image_size % patch_size:
        raise CheckpointError(f"image size {image_size} is not a multiple of the patch size {patch_size}")


def completed(settings: Mapping[str, Any] | None, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings with the defaults for those that are missing or null."""
    return {**defaults, **{name: value for name, value in (settings or {}).items() if value is not None}}


def linear(name: str, outputs: int, inputs: int, *, bias: bool = True) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a dense layer's weights by name."""
    return {f"{name}.weight": (outputs, inputs)} | ({f"{name}.bias": (outputs,)} if bias else {})


def norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a layer norm's weights by name."""
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


WITHOUT_EFFECT = frozenset(
    (
        *("image_processor_type", "feature_extractor_type", "processor_class", "_processor_class", "auto_map"),
        *("data_format", "input_data_format", "default_to_square", "device", "disable_grouping"),
        *("return_tensors", "image_seq_length", "num_query_tokens", "crop_size", "pad_size", "size_divisor"),
        *("do_reduce_labels", "reduce_labels", "transformers_version", "_valid_processor_keys"),
    )
)
"""Settings of image processors that do not change pixels."""
CLIP = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
"""Mean and std of pixels per channel."""
CROP = {"do_center_crop": True, "crop_size": {"height": 224, "width": 224}}


def processor_rules(
    name: str, size: Mapping[str, int], resample: int, moments: tuple[list[float], list[float]], **more: Any
) -> ProcessorRules:
    """Return the rules of an image processor, whose older class is called a feature extractor.

    `size`, `resample` (a filter of Pillow), the mean and std in `moments` and `more` are the defaults of transformers.
    """
    mean, std = moments
    settings = {"do_resize": True, "size": size, "resample": resample, "do_rescale": True, "rescale_factor": 1 / 255}
    settings |= {"do_normalize": True, "image_mean": mean, "image_std": std, "do_convert_rgb": True} | more
    return ProcessorRules(f"{name}ImageProcessor", name, settings, WITHOUT_EFFECT - set(more))


DEFAULTS: dict[str, Any] = {
    "max_length": 20,
    "min_length": 0,
    "do_sample": False,
    "early_stopping": False,
    "num_beams": 1,
    "num_beam_groups": 1,
    "diversity_penalty": 0.0,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "typical_p": 1.0,
    "repetition_penalty": 1.0,
    "length_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "bad_words_ids": None,
    "num_return_sequences": 1,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "remove_invalid_values": False,
    "exponential_decay_length_penalty": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "max_new_tokens": None,
    "min_new_tokens": None,
}
"""Generation settings that a model configuration may contain, with their defaults.

Source: transformers 4.57, PretrainedConfig.
"""


OTHER_DEFAULTS: dict[str, Any] = {
    **dict.fromkeys(("max_time", "stop_strings", "cache_implementation", "cache_config", "prefill_chunk_size")),
    **dict.fromkeys(("sequence_bias", "guidance_scale", "watermarking_config", "prompt_lookup_num_tokens")),
    **dict.fromkeys(("penalty_alpha", "dola_layers", "constraints", "force_words_ids")),
    "encoder_repetition_penalty": 1.0,
    "renormalize_logits": False,
    "token_healing": False,
}
"""Refused generation settings that transformers 4.57 reads from a model configuration as well, with their defaults.

Source: transformers 4.57, GenerationConfig.
"""


class Settings(NamedTuple):
    """A source of generation settings, such as "decoder of config.json", and its content."""

    source: str
    values: Mapping[str, Any]


def outer_settings(raw: Mapping[str, Any], generation: Mapping[str, Any] | None) -> list[Settings]:
    """Return where `generate` of a model without an inner one reads its settings: in generation_config.json if it is
    there, else in config.json.

    If transformers made generation_config.json from config.json, and config.json has settings, these are used:
    4.57.6 takes them for later changes (GenerationMixin._prepare_generation_config).
    """
    # transformers does not look for these two in config.json (PretrainedConfig._get_global_generation_defaults)
    names = DEFAULTS.keys() - {"max_new_tokens", "min_new_tokens"}
    has_later = any(raw.get(name) not in (None, DEFAULTS[name]) for name in names)
    is_copy = generation is not None and generation.get("_from_model_config") is True
    if generation is None or (is_copy and has_later):
        return [Settings("config.json", raw)]
    return [Settings("generation_config.json", generation)]


def task_ids(rules: Rules, encode: Callable[[str], Sequence[int]]) -> dict[str, tuple[int, ...]]:
    """Return the token ids of a family's tasks by name. `encode` adds no special tokens to a text."""
    start, end = rules.task_ends
    return {name: tuple(encode(f"{start}{text}{end}")) for name, text in rules.tasks.items()}


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
    processor: ClassVar[ProcessorRules]
    """The image processor of the family; see `processor_for`."""
    tokenizer_class: ClassVar[str]
    """transformers' tokenizer for checkpoints that name none."""
    tasks: ClassVar[Mapping[str, str]] = {}
    """Names of the tasks that the encoder reads with each image, and their texts."""
    task_ends: ClassVar[tuple[str, str]] = ("", "")
    """Special tokens before and after the text of a task."""
    special_tokens: ClassVar[tuple[str, ...]] = ()
    """Special tokens that follow the vocabulary, which some checkpoints leave to their own code to add."""
    has_native_code: ClassVar[bool] = False
    """Whether checkpoints may ask for custom code, because transformers has the model itself. It is never run."""

    @abstractmethod
    def check_config(self, raw: Mapping[str, Any], path: Path) -> None:
        """Raise CheckpointError if config.json at `path` does not describe a model that can caption."""

    @abstractmethod
    def sizes(self, raw: Mapping[str, Any]) -> Sizes:
        """Return the sizes and special tokens of a model."""

    @abstractmethod
    def tied(self, raw: Mapping[str, Any]) -> dict[str, str]:
        """Return {name of a weight: name of the weight that it is a copy of} for tied weights."""

    @abstractmethod
    def unsupported(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """Return the settings of config.json that change the model in a way that the graphs do not have."""

    @abstractmethod
    def settings(self, raw: Mapping[str, Any], generation: Mapping[str, Any] | None) -> list[Settings]:
        """Return where `generate` reads its settings; the first source that sets one decides.

        `generation` is the content of generation_config.json, or None without that file.
        """

    def complete(self, raw: Mapping[str, Any], generation: Mapping[str, Any] | None) -> dict[str, Any]:  # noqa: ARG002
        """Return config.json with the special ids that `generate` uses, which may be in generation_config.json."""
        return dict(raw)

    def current_name(self, name: str) -> tuple[str, bool]:
        """Return the name that transformers has for a weight of a checkpoint, and whether it is stored transposed."""
        return name, False

    def unused(self, raw: Mapping[str, Any]) -> tuple[str, ...]:  # noqa: ARG002
        """Return prefixes of weights that captions do not depend on: checkpoints may lack them, and bundles do."""
        return ()

    def processor_for(self, kind: str | None, raw: Mapping[str, Any]) -> ProcessorRules | None:  # noqa: ARG002
        """Return the rules for an image processor of class `kind`, or None if the family has no such processor.

        `kind` is None for the default of the family.
        """
        return self.processor if kind is None or kind.startswith(self.processor.prefix) else None

    def residual(self, raw: Mapping[str, Any]) -> Residual | None:  # noqa: ARG002
        """Return the residual stream of the image encoder, which is rotated for int8; None leaves it as it is."""
        return None


class ConvertibleRules(Rules):
    """The rules of a family with graph sets in the wheel: its checkpoints convert without torch."""

    position_table: ClassVar[str] = ""
    """Name of the encoder's position table f32[1,1+h*w,D] or f32[1+h*w,D]: a row for the class token, then one for
    each patch."""

    def converts(self, raw: Mapping[str, Any]) -> bool:  # noqa: ARG002
        """Return whether `shape`, `weight_shapes` and `resized` know this model of the family."""
        return True

    @abstractmethod
    def shape(self, raw: Mapping[str, Any]) -> dict[str, int | float | str]:
        """Return all settings of config.json that decide which operations the graphs have, by names of this family.

        These are layers, heads, widths, epsilons, activations and the patch size, but neither the image size nor the
        size of the vocabulary.
        """

    @abstractmethod
    def weight_shapes(self, raw: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """Return the shapes of all weights of the model by name: with tied ones, without unused ones."""

    @abstractmethod
    def resized(self, raw: Mapping[str, Any], image_size: int) -> dict[str, Any]:
        """Return config.json for images of `image_size` px. Raises CheckpointError if the model cannot have them."""
