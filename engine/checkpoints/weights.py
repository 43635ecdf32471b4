"""Read the weights of a checkpoint lazily and without torch: one tensor at a time, as float32.

Opening a file reads its list of tensors only. Each access reads one tensor from its place in the file, so memory is
bounded by the largest tensor. safetensors files are read here, files of torch.save in pickles.py.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from engine.checkpoints.files import refuse_stand_in
from engine.checkpoints.pickles import NUMBERS, Entry, read_entries
from engine.errors import CheckpointError

PREFIXES = ("_orig_mod.", "module.", "model.")
"""Prefixes that torch.compile, DataParallel and trainers add to all weight names."""
NO_WEIGHTS = (".position_ids", ".pos_idx_to_embed")
"""Name endings of buffers that are not weights: position numbers, and the waves that Florence-2 counts images with."""
MAX_HEADER_BYTES = 16 << 20
"""Largest list of tensors that is read. That of BLIP-large has 0.1 MB; the format allows 100 MB."""


class Tensor(Protocol):
    """A tensor that is read when it is needed."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def read(self) -> NDArray[np.float32]: ...


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: `entry` says where. `stamp` is the size and the time in ns of the last change of the file."""

    path: Path
    entry: Entry
    stamp: tuple[int, int]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.entry.shape

    def read(self) -> NDArray[np.float32]:
        """Return the tensor. Raises CheckpointError if the file has changed or cannot be read."""
        entry = self.entry
        if entry.kind not in NUMBERS:
            raise CheckpointError(f"{self.path} has numbers of type {entry.kind}, which are not read: use float32")
        try:
            with self.path.open("rb") as stream:
                stream.seek(entry.start)
                has_changed = _stamp(stream.fileno()) != self.stamp
                numbers = np.fromfile(stream, np.dtype(entry.order + NUMBERS[entry.kind]), entry.span)
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be read: {error.strerror or error}") from error
        if has_changed or len(numbers) != entry.span:
            raise CheckpointError(f"{self.path} changed while it was read: run the same command again")
        if entry.kind == "BF16":
            numbers = numbers.astype(np.uint32)
            numbers <<= 16
            numbers = numbers.view(np.float32)
        strides = tuple(stride * numbers.itemsize for stride in entry.strides)
        with np.errstate(over="ignore"):  # a float64 beyond float32 becomes infinite, which is refused as such
            return np.ascontiguousarray(as_strided(numbers, entry.shape, strides), np.float32).reshape(entry.shape)


@dataclass(frozen=True)
class Transposed:
    """A matrix that a file has as its transpose."""

    stored: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored.shape[::-1]

    def read(self) -> NDArray[np.float32]:
        """Return the matrix."""
        return np.ascontiguousarray(self.stored.read().T)


class Weights(Mapping[str, NDArray[np.float32]]):
    """Weights of a checkpoint by name. Each access reads a tensor again; keep what is needed twice."""

    def __init__(self, tensors: Mapping[str, Tensor], source: Path) -> None:
        self.tensors, self.source = dict(tensors), source

    def __getitem__(self, name: str) -> NDArray[np.float32]:
        """Read a tensor. Raises CheckpointError if it cannot be read, or if a number is NaN or infinite."""
        weight = self.tensors[name].read()
        # a NaN passes through min and max; unlike isfinite of all numbers, they need no memory
        if weight.size and not np.isfinite([weight.min(), weight.max()]).all():
            count = int(np.count_nonzero(~np.isfinite(weight)))
            raise CheckpointError(
                f"{self.source}: {count} weight{' is' if count == 1 else 's are'} NaN or infinite (in {name}): the "
                "training diverged, use an earlier checkpoint"
            )
        return weight

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def are_equal(self, name: str, other: str) -> bool:
        """Return whether two tensors have the same numbers. One tensor under two names is not read."""
        return self.tensors[name] == self.tensors[other] or np.array_equal(self[name], self[other])

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor without reading it."""
        return self.tensors[name].shape


def open_weights(files: Sequence[Path], source: Path) -> Weights:
    """Open the weight files of the checkpoint `source`, without the prefixes of wrappers and without old buffers.

    Raises CheckpointError if a file cannot be read, or if it holds anything but weights.
    """
    tensors: dict[str, Tensor] = {}
    for path in files:
        refuse_stand_in(path)
        try:
            with path.open("rb") as stream:
                stamp = _stamp(stream.fileno())
                entries = _safetensors(path) if path.suffix == ".safetensors" else read_entries(path, stream)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
        if repeated := next((name for name in entries if name in tensors), None):
            raise CheckpointError(
                f"{path} has the weight {repeated}, which another file of {source} has, too: remove the files of other "
                "checkpoints"
            )
        tensors |= {name: Stored(path, entry, stamp) for name, entry in entries.items()}
    while (prefix := common_prefix(tensors)) is not None:
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return Weights({name: tensor for name, tensor in tensors.items() if not name.endswith(NO_WEIGHTS)}, source)


def common_prefix(names: Iterable[str]) -> str | None:
    """Return the wrapper's prefix that all names start with, or None if there is no such prefix."""
    return next((prefix for prefix in PREFIXES if names and all(name.startswith(prefix) for name in names)), None)


def _stamp(descriptor: int) -> tuple[int, int]:
    status = os.fstat(descriptor)
    return status.st_size, status.st_mtime_ns


def _safetensors(path: Path) -> dict[str, Entry]:
    """Return the tensors of a safetensors file by name. Raises CheckpointError if its header is not valid.

    The library checks the header: that the tensors cover the file without gaps, and that their sizes fit their shapes.
    Format: https://huggingface.co/docs/safetensors
    """
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = stream.read(min(length, MAX_HEADER_BYTES))
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(f"{path} cannot be read: its header has {length} bytes: download it again")
    try:
        with safe_open(path, framework="numpy"):
            content: dict[str, Any] = json.loads(header)
    except (SafetensorError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} cannot be read: {' '.join(str(error).split())[:200]}: download it again"
        ) from error
    content.pop("__metadata__", None)
    return {
        name: Entry(one["dtype"], "<", 8 + length + one["data_offsets"][0], tuple(one["shape"]))
        for name, one in content.items()
    }
