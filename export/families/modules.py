"""The three graphs of a bundle as torch modules: what all model families share.

A family subclasses Family, which is last in this file and returns the graphs: subclasses of Encoder and DecoderStep
(example: export/families/blip.py). The third graph, Regroup, is the same for all families. Shape letters are those of
engine/decoding/backend.py. The modules use a checkpoint's weights under their original names. Parameters are not
changed: packing and transposing happens in the graph, and runtimes fold it when they load the graph. So a graph's
initialisers are the checkpoint's tensors, and tied tensors are stored once.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
import transformers
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from engine.checkpoints.rules import ConvertibleRules, Rules, Sizes, check_patches
from engine.errors import CheckpointError

MASKED = -1e4
"""Added to the attention scores of positions outside a beam's past; exp(MASKED) is 0, and float16 can represent it."""

Normalisation = tuple[float, list[float], list[float]]
"""rescale, mean and std of an image processor: (x * rescale - mean) / std."""


class ExportedModule(PreTrainedModel):
    """Base class of the exported modules. optimum's exporter needs a PreTrainedModel with a config."""

    config_class = PretrainedConfig
    parts: ClassVar[tuple[str, ...]] = ()
    """Names of the model's submodules that the graph uses. They keep these names, and with them the weights' names."""

    def __init__(self, model: PreTrainedModel, sizes: Sizes) -> None:
        config = copy.deepcopy(model.config)
        config._attn_implementation = "eager"  # PreTrainedModel refuses others; the model keeps what it has
        super().__init__(config)
        self.sizes, self.heads, self.width = sizes, sizes.num_heads, sizes.head_width
        self.weights_type = model.dtype
        """float32 or float16. Some operations use float32 in either case, see the comments there."""
        self.is_half = self.weights_type == torch.float16
        """Whether a decoder's rows are f16[B,T,D], not f32[B*T,D]. If ONNX Runtime knows that there are three axes, it
        computes bias, residual and layer norm in one kernel on GPUs. On CPUs products of two axes are faster."""
        for part in self.parts:
            setattr(self, part, getattr(model, part))

    def split_heads(self, x: Tensor, batch: Tensor) -> Tensor:
        """Reshape f32[B*T,D] or f32[B,T,D] to f32[B,H,T,d]."""
        if self.is_half and x.dim() == 3:
            return Reshape.apply(x, (0, 0, self.heads, -1)).transpose(1, 2)
        return x.view(batch, -1, self.heads, self.width).transpose(1, 2)

    def merge_heads(self, x: Tensor) -> Tensor:
        """Reshape f32[B,H,T,d] to f32[B*T,D], or to f16[B,T,D]."""
        x = x.transpose(1, 2)
        return Reshape.apply(x, (0, 0, -1)) if self.is_half else x.reshape(-1, self.heads * self.width)


class Reshape(torch.autograd.Function):
    """Reshape as ONNX does: 0 stands for the size of the same axis before, -1 for what is left.

    torch traces sizes as values that are computed. These are constants in the graph, so runtimes know which axes stay.
    """

    @staticmethod
    def forward(ctx, x: Tensor, shape: tuple[int, ...]) -> Tensor:  # noqa: ARG004
        return x.reshape([size or x.shape[axis] for axis, size in enumerate(shape)])

    @staticmethod
    def symbolic(g, x, shape):
        return g.op("Reshape", x, g.op("Constant", value_t=torch.tensor(shape)))


def _as(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast to another type. A cast to the same type is skipped, because tracing would add it to the graph."""
    return x if x.dtype == dtype else x.to(dtype)


class Encoder(ExportedModule, ABC):
    """Turns pixels into the cross-attention keys and values of every decoder layer; runs once per image.

    A family implements `encode` and `keys_values`.
    """

    def __init__(self, model: PreTrainedModel, sizes: Sizes, normalisation: Normalisation) -> None:
        super().__init__(model, sizes)
        self.rescale, mean, std = normalisation
        self.register_buffer("image_mean", torch.tensor(mean))
        self.register_buffer("image_std", torch.tensor(std))

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """pixel_values u8[B,height,width,3] -> for each layer keys and values f32[B,H,S,d]."""
        return self.keys_values_of(pixel_values)

    def keys_values_of(self, pixel_values: Tensor, *task_ids: Tensor) -> tuple[Tensor, ...]:
        """Run the graph. If the encoder of a family reads a task, its `forward` has the task's ids as second input."""
        pixels = (pixel_values.float() * self.rescale - self.image_mean) / self.image_std
        encoded = self.encode(_as(pixels, self.weights_type).permute(0, 3, 1, 2), *task_ids)
        batch = pixel_values.shape[0]
        return tuple(self.split_heads(x, batch) for x in self.keys_values(encoded))

    @abstractmethod
    def encode(self, pixels: Tensor, *task_ids: Tensor) -> Tensor:
        """Return the image's hidden states f32[B,S,width of the encoder] from normalised pixels f32[B,3,h,w]."""

    @abstractmethod
    def keys_values(self, encoded: Tensor) -> Iterator[Tensor]:
        """Yield cross-attention keys and values f32[B,S,D] alternately, layer by layer, from the hidden states."""


class LayerCache(NamedTuple):
    """What one decoder layer attends to.

    Keys and values of the image (`cross`), of the folded block (`settled`) and of the recent block, and `bias`
    f32[B,1,T,F+R+T], which masks the positions that are not in a row's past. `batch` is B. In float16, `columns` are
    those of the folded block i64[F] and the others i64[R+T].
    """

    bias: Tensor
    cross: list[Tensor]
    settled: list[Tensor]
    recent: list[Tensor]
    batch: Tensor
    columns: tuple[Tensor, Tensor] | None = None


class DecoderStep(ExportedModule, ABC):
    """One step of the text decoder: T tokens per image, attention over a tree-shaped cache, and the best candidates.

    A family implements `embed`, `layer` and `logits`.
    """

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        scores: Tensor,
        marked_ids: Tensor,
        penalties: Tensor,
        ancestry: Tensor,
        num_candidates: Tensor,
        cross: list[Tensor],
        settled: list[Tensor],
        recent: list[Tensor],
    ) -> tuple[Tensor, ...]:
        """Run one step.

        The inputs are those of engine.decoding.backend.StepInputs. cross f32[B,H,S,d], settled f32[B,H,F,d] and recent
        f32[B,H,R,d] each hold keys and values alternately, layer by layer. num_candidates is i64[1] in a graph. If
        torch runs the step, it is a 0-dimensional CPU tensor, on whatever device the other inputs are.

        Returns candidate_scores f32[B,C], candidate_ids i64[B,C] and the recent cache extended to f32[B,H,R+T,d].
        """
        batch = input_ids.shape[0]
        fed = (input_ids, positions) if self.is_half else (input_ids.flatten(), positions.flatten())
        x = self.start(self.embed(*fed), input_ids, cross)
        bias = _as(torch.where(ancestry, 0.0, MASKED), self.weights_type)[:, None]
        extended: list[Tensor] = []
        columns = None
        if self.is_half:
            folded, device = settled[0].shape[2], ancestry.device
            columns = torch.arange(folded, device=device), torch.arange(folded, ancestry.shape[2], device=device)
        for i in range(self.sizes.num_layers):
            pair = slice(2 * i, 2 * i + 2)
            x, grown = self.layer(i, x, LayerCache(bias, cross[pair], settled[pair], recent[pair], batch, columns))
            extended += grown
        logits = self.logits(x).view(batch, -1, self.sizes.vocab_size)
        # scores stay float32 in a float16 model too
        processed = self._process(logits.float(), marked_ids, penalties)
        return (*self._select(processed, scores, num_candidates), *extended)

    @abstractmethod
    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Return the embeddings f32[B*T,D] of ids and positions i64[B*T]; the start token has position 0.

        Like all rows of the decoder, f16[B,T,D] and i64[B,T] in float16.
        """

    def start(self, x: Tensor, ids: Tensor, cross: Sequence[Tensor]) -> Tensor:  # noqa: ARG002
        """Return the embeddings f32[B*T,D] with those of start tokens that depend on the image. By default none do."""
        return x

    @abstractmethod
    def layer(self, index: int, x: Tensor, cache: LayerCache) -> tuple[Tensor, list[Tensor]]:
        """Run a layer on f32[B*T,D]; return its output and the extended keys and values of `self_attention`."""

    @abstractmethod
    def logits(self, x: Tensor) -> Tensor:
        """Return the logits f32[B*T,V] of the last layer's output f32[B*T,D]."""

    def prefix_scores(self, scores: Tensor) -> Tensor:
        """Return the attention scores f32[B,H,T,S] of a prefix, for a family whose `cross` holds more than its keys."""
        return scores

    def bert_layer(
        self, layer: nn.Module, x: Tensor, cache: LayerCache, *, prefix: bool = False
    ) -> tuple[Tensor, list[Tensor]]:
        """Run a layer of a BERT as `layer` does: layer norms come after each part.

        The image is in cross-attention or, with `prefix`, before the text in self-attention.
        """
        own = layer.attention.self
        q, k, v = (self.split_heads(project(x), cache.batch) for project in (own.query, own.key, own.value))
        mixed, extended = self.self_attention(q, k, v, cache, prefix=prefix)
        x = layer.attention.output(mixed, x)
        if not prefix:
            query = self.split_heads(layer.crossattention.self.query(x), cache.batch)
            x = layer.crossattention.output(self.cross_attention(query, cache), x)
        return layer.output(layer.intermediate(x), x), extended

    def self_attention(
        self, q: Tensor, k: Tensor, v: Tensor, cache: LayerCache, *, prefix: bool = False
    ) -> tuple[Tensor, list[Tensor]]:
        """Attend from the fed tokens f32[B,H,T,d] over settled, recent and fed positions.

        With `prefix`, the image's keys and values `cross` come before them, in the same softmax. Every row sees them.

        Returns f32[B*T,D], before the output projection, and the recent keys and values with those of the fed tokens
        appended.
        """
        settled, recent = cache.settled, cache.recent
        k, v = torch.cat([recent[0], k], 2), torch.cat([recent[1], v], 2)
        q = q * (1 / math.sqrt(self.width))
        # the two blocks are multiplied separately: concatenating them would copy the large settled block every step
        weights = torch.cat([q @ settled[0].transpose(-1, -2), q @ k.transpose(-1, -2)], -1)
        weights = weights + cache.bias
        if prefix:
            weights = torch.cat([self.prefix_scores(q @ cache.cross[0].transpose(-1, -2)), weights], -1)
        weights = torch.softmax(weights, -1)
        image = self.sizes.encoder_positions if prefix else 0
        split = image + settled[0].shape[2]
        if cache.columns is not None and not prefix:  # a Gather: runtimes do not know the axes of a Slice's result
            first, rest = (weights.index_select(3, columns) for columns in cache.columns)
        else:
            first, rest = weights[..., image:split], weights[..., split:]
        mixed = first @ settled[1] + rest @ v
        if prefix:
            mixed = weights[..., :image] @ cache.cross[1] + mixed
        return self.merge_heads(mixed), [k, v]

    def cross_attention(self, q: Tensor, cache: LayerCache) -> Tensor:
        """Attend from f32[B,H,T,d] over the image; returns f32[B*T,D], before the output projection.

        All rows of an image share its keys and values, so the rows are on the query axis.
        """
        q = q * (1 / math.sqrt(self.width))
        weights = torch.softmax(q @ cache.cross[0].transpose(-1, -2), -1)
        return self.merge_heads(weights @ cache.cross[1])

    @staticmethod
    def _process(logits: Tensor, marked_ids: Tensor, penalties: Tensor) -> Tensor:
        """Return log-probabilities f32[B,T,V] with the repetition penalty and the bans of marked_ids i64[B,T,M].

        Hugging Face applies the penalty to raw logits in greedy search and sampling, and to log-probabilities in beam
        search. penalties f32[2] holds both; 1 is off and changes no bit. A change of raw logits is added to the
        log-probabilities, because log_softmax shifts all logits by the same number.

        A mark of -1 (in a row without marks) writes back the value at id 0. So all writes to one position agree, and
        the result does not depend on their order.
        """
        log_probs = torch.log_softmax(logits, -1)
        index = torch.where(marked_ids < 0, -2 - marked_ids, marked_ids).clamp(min=0)
        raw, log_prob = logits.gather(2, index), log_probs.gather(2, index)
        on_logits, on_log_probs = penalties[0], penalties[1]
        penalised = log_prob + (torch.where(raw < 0, raw * on_logits, raw / on_logits) - raw)
        penalised = torch.where(penalised < 0, penalised * on_log_probs, penalised / on_log_probs)
        banned = torch.where(marked_ids < 0, log_prob, float("-inf"))
        return log_probs.scatter(2, index, torch.where(marked_ids < -1, penalised, banned))

    @staticmethod
    def _select(log_probs: Tensor, scores: Tensor, num_candidates: Tensor) -> tuple[Tensor, Tensor]:
        """Add the running scores and return the best C continuations over all rows of each image.

        The top C of each row are selected first, because the best C over all rows are among them.
        """
        row_scores, row_ids = TopK.apply(log_probs, num_candidates)
        totals = (row_scores + scores.unsqueeze(2)).flatten(1)
        best_scores, best = TopK.apply(totals, num_candidates)
        row = torch.div(best, num_candidates, rounding_mode="trunc")
        return best_scores, row * log_probs.shape[-1] + row_ids.flatten(1).gather(1, best)


def bert_embeddings(embeddings: nn.Module, ids: Tensor, positions: Tensor) -> Tensor:
    """Return the embeddings of a BERT f32[...,D] for ids and positions i64[...]. If it has token types, all are 0."""
    x = embeddings.word_embeddings(ids)
    if hasattr(embeddings, "token_type_embeddings"):
        x = x + embeddings.token_type_embeddings.weight[0]
    return embeddings.LayerNorm(x + embeddings.position_embeddings(positions))


def cross_keys_values(layers: Iterable[nn.Module], encoded: Tensor) -> Iterator[Tensor]:
    """Yield the cross-attention keys and values of a BERT's layers, see Encoder.keys_values."""
    for layer in layers:
        yield layer.crossattention.self.key(encoded)
        yield layer.crossattention.self.value(encoded)


class TopK(torch.autograd.Function):
    """torch.topk over the last axis with a tensor of one element as k.

    With k as an input, one graph serves every number of beams. torch.topk itself would be traced with a constant.
    """

    @staticmethod
    def forward(ctx, x: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ARG004
        return torch.topk(x, int(count))

    @staticmethod
    def symbolic(g, x, count):
        return g.op("TopK", x, count, axis_i=-1, outputs=2)


class Regroup(ExportedModule):
    """Folds recent keys and values into the settled ones, and keeps only chosen slots and positions. Has no weights."""

    def forward(
        self, slots: Tensor, columns: Tensor, settled: list[Tensor], recent: list[Tensor]
    ) -> tuple[Tensor, ...]:
        """Return the settled caches f32[B',H,F',d] of the slots and positions to keep.

        slots i64[B'] are the slots to keep. columns i64[B',F'] are the positions to keep of each, counted over the
        settled positions and then the recent ones.
        """
        positions = settled[0].shape[2] + recent[0].shape[2]
        heads = torch.arange(self.heads)
        flat = (slots[:, None, None] * self.heads + heads[None, :, None]) * positions + columns[:, None, :]
        return tuple(
            nn.functional.embedding(flat, torch.cat([old, new], 2).reshape(-1, self.width))
            for old, new in zip(settled, recent, strict=True)
        )


def patch_embeddings(convolution: nn.Conv2d, pixels: Tensor, image_size: int) -> Tensor:
    """Return the embeddings of an image's patches f32[B,h*w,D] from pixels f32[B,3,image_size,image_size].

    The convolution's windows do not overlap, so it is a product of matrices. GPUs need cuDNN for a convolution only.
    """
    size = convolution.kernel_size[0]
    side = patches_per_side(image_size, size)
    # runtimes remove the first permutation together with the one in Encoder.forward
    windows = pixels.permute(0, 2, 3, 1).reshape(-1, side, size, side, size, 3)
    patches = windows.permute(0, 1, 3, 5, 2, 4).reshape(-1, side * side, 3 * size * size)
    return nn.functional.linear(patches, convolution.weight.flatten(1), convolution.bias)


def patches_per_side(image_size: int, patch_size: int) -> int:
    """Return the number of patches of a side in px. Raises CheckpointError if it is not a whole number."""
    check_patches(image_size, patch_size)
    return image_size // patch_size


def resized_positions(table: Tensor, side: int) -> Tensor:
    """Return a table of position embeddings f32[1+n*n,D] for side x side patches: f32[1+side*side,D].

    The first row, that of the class token, is kept, the others are resized by bicubic interpolation. This is
    interpolate_pos_encoding of transformers' vision models (4.57).
    """
    old = math.isqrt(table.shape[0] - 1)
    if side == old:
        return table
    grid = table[1:].reshape(1, old, old, -1).permute(0, 3, 1, 2)
    grid = nn.functional.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    return torch.cat([table[:1], grid.permute(0, 2, 3, 1).reshape(side * side, -1)])


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


class Family(ABC):
    """A family of captioning models: graphs, and the calls of Hugging Face's model.

    Families are listed in export/families/__init__.py. Models are Hugging Face's, `config` is the content of
    config.json as Hugging Face's object.
    """

    rules: ClassVar[Rules]
    """What the family's checkpoints look like, without torch."""
    config_class: ClassVar[type[PretrainedConfig]]
    model_class: ClassVar[type[PreTrainedModel]]

    # checkpoints

    def sizes(self, config: PretrainedConfig) -> Sizes:
        """Return the sizes and special tokens of a model."""
        return self.rules.sizes(config.to_dict())

    def tied(self, config: PretrainedConfig) -> dict[str, str]:
        """Return {name of a weight: name of the weight that it is a copy of} for tied weights."""
        return self.rules.tied(config.to_dict())

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

    # Hugging Face's model as the reference

    def generation_config(self, model: PreTrainedModel) -> Any:
        """Return the GenerationConfig that the model's `generate` reads."""
        return model.generation_config

    def apply_settings(self, model: PreTrainedModel, settings: Mapping[str, Any]) -> None:
        """Change the GenerationConfig of a new model to a checkpoint's settings (those that are not the default).

        By default these are in config.json, where only transformers 5 does not find them.
        """
        if IS_5:
            for name, value in settings.items():
                setattr(self.generation_config(model), name, value)

    @abstractmethod
    def prompt_arguments(
        self, tokenizer: PreTrainedTokenizerBase, prompt: str | None, images: int, first: int | None = None
    ) -> tuple[dict[str, Any], int]:
        """Return generate's arguments for a prompt, and the number of ids that it puts before the caption.

        `first` is the forced first token, which precedes the prompt in families with tasks.
        """

    def task_arguments(self, model: PreTrainedModel, task_ids: Sequence[int], images: int) -> dict[str, Any]:  # noqa: ARG002
        """Return generate's arguments for the ids of a task; nothing for families without tasks."""
        return {}

    @abstractmethod
    def encode(self, model: PreTrainedModel, pixel_values: Tensor, task_ids: Sequence[int] = ()) -> Tensor:
        """Return the encoder's hidden states f32[B,S,D] of f32[B,3,height,width], by Hugging Face's own code."""

    @abstractmethod
    def logits(self, model: PreTrainedModel, ids: Tensor, encoded: Tensor) -> Tensor:
        """Return the logits f32[B,T,V] of sequences i64[B,T] without a cache, by Hugging Face's own code."""

    def ensemble(self, models: Sequence[PreTrainedModel], weights: Sequence[float]) -> PreTrainedModel:  # noqa: ARG002
        """Return a model whose log-probabilities are the weighted sum of those of several models; weights sum to 1.

        Raises CheckpointError if the family has no such model.
        """
        raise CheckpointError(
            f"parity of several {self.rules.name} checkpoints is not supported: compare one at a time"
        )


class PublishedFamily(Family):
    """A family with graph sets in the wheel (export/graphsets.py), so that its checkpoints convert without torch."""

    rules: ClassVar[ConvertibleRules]

    @abstractmethod
    def published(self) -> dict[str, PretrainedConfig]:
        """Return the published architectures whose graphs are in the wheel, by name."""

    @abstractmethod
    def shrunk(self, config: PretrainedConfig) -> PretrainedConfig:
        """Return an architecture of `published` with few, narrow layers and otherwise the same settings."""

    @abstractmethod
    def with_sizes(
        self, config: PretrainedConfig, *, patches: int, vocab_size: int, max_positions: int
    ) -> PretrainedConfig:
        """Return an architecture with other sizes: patches per side of an image, vocabulary, positions of the text."""
