"""List the tensors of a torch.save file without torch, and without running anything that the file asks for.

Such a file is a zip archive: `data.pkl` holds the tensors' names, shapes and places, and `data/KEY` the numbers of a
storage, which several tensors can share. Source of the format: torch 2.13, torch/serialization.py and
torch/_utils.py (_rebuild_tensor_v2).

Pickle is a language for a stack machine that can call any function. The reader here knows the few operations that
torch.save writes, and the names in ALLOWED. Both the archive's directory and the pickle have an upper size, because
one byte of a pickle can make an object of 60 bytes.
"""

from __future__ import annotations

import io
import math
import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, ClassVar, NamedTuple

import numpy as np

from engine.errors import CheckpointError


@dataclass(frozen=True)
class Entry:
    """Where a tensor is in a file: `start` in bytes, `strides` in numbers (None: contiguous).

    `kind` is the type of its numbers by its name in safetensors files, `order` their byte order: "<" or ">".
    """

    kind: str
    order: str
    start: int
    shape: tuple[int, ...]
    given_strides: tuple[int, ...] | None = None

    @property
    def strides(self) -> tuple[int, ...]:
        """Distances of neighbours along each axis, in numbers."""
        if self.given_strides is not None:
            return self.given_strides
        return tuple(math.prod(self.shape[axis + 1 :]) for axis in range(len(self.shape)))

    @property
    def span(self) -> int:
        """Count of numbers from the first to the last of the tensor in the file."""
        if 0 in self.shape:
            return 0
        return 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))


STORAGES = {
    **{"DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16"},
    **{"LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8"},
    "BoolStorage": "BOOL",
}
"""torch's storage types, and the types of their numbers by their names in safetensors files."""
NUMBERS = {
    **{"F64": "f8", "F32": "f4", "F16": "f2", "BF16": "u2"},
    **{"I64": "i8", "I32": "i4", "I16": "i2", "I8": "i1", "U8": "u1", "BOOL": "?"},
}
"""Types of numbers that are read, by their names in safetensors files, as numpy's types.

bfloat16 is the upper half of a float32 and is read as bits, because numpy has no such type.
"""

MAX_PICKLE_BYTES = 2 << 20
"""Largest pickle that is read. That of BLIP-large has 0.2 MB, with the state of AdamW 0.6 MB."""
MAX_DIRECTORY_BYTES = 4 << 20
"""Largest directory of an archive that is read. It has about 100 bytes for each storage."""
MAX_AXES = 16
MAX_NUMBER = 1 << 48
"""Upper limit of sizes, strides and offsets in numbers: no file holds as many."""
MAX_WRAPPER_ENTRIES = 16
"""Largest dict that is searched for the weights under `model` or `state_dict`.

A wrapper of a training script has a few entries, such as epoch, optimizer and config. A larger dict holds the weights.
"""
MAX_WRAPPERS = 8
MAX_ARGUMENTS = 8
"""Upper limit of arguments of a call, which are copied: that of _rebuild_tensor_v2 has 7."""
LEGACY = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
"""First bytes of torch's format before release 1.6: its magic number, pickled."""


class _Storage(NamedTuple):
    """A reference to the numbers of `data/KEY`."""

    kind: object
    key: object
    numel: object


class _Tensor(NamedTuple):
    """The arguments of torch._utils._rebuild_tensor_v2, not checked yet."""

    storage: object
    offset: object
    size: object
    stride: object


class _Dict(dict[object, object]):
    """OrderedDict, but it takes no arguments: copies of copies could fill the memory."""

    def __init__(self) -> None:
        super().__init__()


def _rebuild_tensor(*arguments: object) -> _Tensor:
    storage, offset, size, stride, *_ = arguments  # then: requires_grad, hooks, metadata
    return _Tensor(storage, offset, size, stride)


def _first(value: object, *_: object) -> object:
    """Return the tensor of torch._utils._rebuild_parameter, or the tuple of torch.Size."""
    return value


ALLOWED: dict[str, Callable[..., object] | str] = {
    "collections.OrderedDict": _Dict,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_parameter": _first,
    "torch.Size": _first,
    **{f"torch.{name}": kind for name, kind in STORAGES.items()},
}
"""What a pickle may name, and what stands in for it here."""
OPERATIONS = (
    *(pickle.PROTO, pickle.FRAME, pickle.STOP, pickle.MARK, pickle.MEMOIZE),
    *(pickle.BINPUT, pickle.LONG_BINPUT, pickle.BINGET, pickle.LONG_BINGET),
    *(pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE, pickle.BINFLOAT),
    *(pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.LONG1, pickle.BINUNICODE, pickle.SHORT_BINUNICODE),
    *(pickle.EMPTY_TUPLE, pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3),
    *(pickle.EMPTY_LIST, pickle.APPEND, pickle.APPENDS, pickle.EMPTY_DICT),
    *(pickle.GLOBAL, pickle.STACK_GLOBAL, pickle.BINPERSID),
)
"""Operations that torch.save writes and that pickle's own code carries out. Four more are methods of _Unpickler."""


class _RefusedError(Exception):
    """A pickle asks for something that is not a weight; the message names it."""


class _Unpickler(pickle._Unpickler):
    """Reads pickles of weights. It is pickle's reader in Python, because its table of operations can be replaced."""

    stack: list[Any]
    pop_mark: Callable[[], list[Any]]
    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {
        operation[0]: pickle._Unpickler.dispatch[operation[0]] for operation in OPERATIONS
    }

    def find_class(self, module: str, name: str) -> Any:
        """Return what stands in for a global. Raises _RefusedError if it is not in ALLOWED."""
        full = f"{module}.{name}"
        if full not in ALLOWED:
            raise _RefusedError(full)
        return ALLOWED[full]

    def persistent_load(self, pid: Any) -> _Storage:
        """Return a storage from its reference ("storage", type, key, device, count of numbers)."""
        mark, kind, key, _, numel = pid
        if mark != "storage":
            raise ValueError("a reference that is not a storage")
        return _Storage(kind, key, numel)

    def _set(self, pairs: list[Any]) -> None:
        """Add keys and values to the dict on the stack. Other keys than text and numbers are not hashed.

        Hashing deeply nested tuples would overflow the C stack.
        """
        target = self.stack[-1]
        if not isinstance(target, dict) or not all(isinstance(key, str | int | float) for key in pairs[::2]):
            raise ValueError("a dict with keys that are not text or numbers")
        target.update(zip(pairs[::2], pairs[1::2], strict=True))

    def _set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set([key, value])

    def _set_items(self) -> None:
        self._set(self.pop_mark())

    def _call(self) -> None:
        """Call what stands in for a global."""
        arguments = self.stack.pop()
        if not isinstance(arguments, tuple) or len(arguments) > MAX_ARGUMENTS:
            raise ValueError("a call with wrong arguments")
        self.stack[-1] = self.stack[-1](*arguments)

    def _build(self) -> None:
        """Drop the attributes of an object: state dicts have `_metadata`."""
        self.stack.pop()

    dispatch |= {
        **{pickle.SETITEM[0]: _set_item, pickle.SETITEMS[0]: _set_items},
        **{pickle.REDUCE[0]: _call, pickle.BUILD[0]: _build},
    }


class _Archive(io.FileIO):
    """The file of an archive, of which zipfile reads at most MAX_DIRECTORY_BYTES at once."""

    def read(self, size: int | None = -1) -> bytes:
        """See io.RawIOBase.read. Raises BadZipFile if more bytes are asked for."""
        content = super().read(
            MAX_DIRECTORY_BYTES + 1 if size is None or size < 0 else min(size, MAX_DIRECTORY_BYTES + 1)
        )
        if content is not None and len(content) > MAX_DIRECTORY_BYTES:
            raise zipfile.BadZipFile("its directory is too large")
        return content or b""


def read_entries(path: Path, stream: IO[bytes]) -> dict[str, Entry]:
    """Return where the tensors of a torch.save file are, by name. Nothing that the file asks for is run.

    Raises CheckpointError if the file cannot be read, or if it holds anything but weights.
    """
    if stream.read(len(LEGACY)) == LEGACY:
        raise CheckpointError(
            f"{path} has the format of torch before 1.6, which only torch reads: export it with `python -m export` (in "
            "the repository), or load and save it again with a newer torch"
        )
    try:
        with _Archive(path) as file, zipfile.ZipFile(file) as archive:
            return _Reader(path, file, archive).entries()
    except _RefusedError as error:
        raise CheckpointError(
            f"{path} is refused: it asks to load {str(error)[:100]}, but only weights are read from pickles: save only "
            "the weights, as safetensors"
        ) from error
    except (OSError, CheckpointError):
        raise
    except Exception as error:  # a damaged file can make zipfile and pickle raise almost any exception
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise CheckpointError(f"{path} cannot be read as a torch.save file ({reason}): download it again") from error


class _Reader:
    """Reads an archive's pickle and finds its storages."""

    def __init__(self, path: Path, file: IO[bytes], archive: zipfile.ZipFile) -> None:
        self._path, self._file = path, file
        self._size = file.seek(0, io.SEEK_END)
        self._infos = {info.filename: info for info in archive.infolist()}

    def entries(self) -> dict[str, Entry]:
        """Return the tensors by name."""
        pickles = [name for name in self._infos if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError("it has no data.pkl")
        folder = pickles[0].partition("/")[0]
        content = unwrapped(self._load(pickles[0]), self._path)
        order = b"little"
        if f"{folder}/byteorder" in self._infos:
            order = self._record(f"{folder}/byteorder", 16)
        if order not in (b"little", b"big"):
            raise ValueError("its byte order is unknown")
        tensors = {str(name): value for name, value in content.items() if isinstance(value, _Tensor)}
        mark = "<" if order == b"little" else ">"
        return {name: self._entry(name, tensor, f"{folder}/data", mark) for name, tensor in tensors.items()}

    def _load(self, name: str) -> object:
        content = self._record(name, MAX_PICKLE_BYTES)
        try:
            return _Unpickler(io.BytesIO(content)).load()
        except KeyError as error:  # not in the table of operations
            raise _RefusedError(f"something with pickle's operation {error}") from error

    def _place(self, name: str) -> tuple[int, int]:
        """Return start and size in bytes of a file in the archive. Raises ValueError if it is not stored plainly."""
        info = self._infos.get(name)
        if info is None:
            raise ValueError(f"{name} is missing")
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 or info.file_size != info.compress_size:
            raise ValueError(f"{name} is compressed or encrypted")
        self._file.seek(info.header_offset)
        header = self._file.read(30)
        if len(header) != 30 or header[:4] != b"PK\x03\x04":
            raise ValueError(f"{name} is not where the directory says")
        name_length, extra_length = struct.unpack("<HH", header[26:])
        start = info.header_offset + len(header) + name_length + extra_length
        if start + info.file_size > self._size:
            raise ValueError(f"{name} ends after the file")
        return start, info.file_size

    def _record(self, name: str, most: int) -> bytes:
        """Return the content of a small file in the archive."""
        start, size = self._place(name)
        if size > most:
            raise ValueError(f"{name} has {size} bytes, more than weights need")
        self._file.seek(start)
        return self._file.read(size)

    def _entry(self, name: str, tensor: _Tensor, folder: str, order: str) -> Entry:
        """Return where a tensor is. Raises ValueError if its numbers are not all within its storage."""
        storage, offset, size, stride = tensor
        if not isinstance(storage, _Storage) or not isinstance(storage.key, str) or storage.kind not in NUMBERS:
            raise ValueError(f"{name} has no storage")
        shape, strides = _numbers(size), _numbers(stride)
        (first, numel) = _numbers((offset, storage.numel))
        start, stored = self._place(f"{folder}/{storage.key}")
        width = np.dtype(NUMBERS[str(storage.kind)]).itemsize
        entry = Entry(str(storage.kind), order, start + first * width, shape, strides)
        if len(shape) != len(strides) or stored != numel * width:
            raise ValueError(f"{name} has sizes that do not fit its storage")
        if first + entry.span > numel or math.prod(shape) > numel:
            raise ValueError(f"{name} has numbers outside its storage")
        return entry


def unwrapped(content: object, path: Path) -> Mapping[object, object]:
    """Return the dict of weights, which training scripts put under `model` or `state_dict`.

    Raises CheckpointError, which names the file, if there is none.
    """
    for _ in range(MAX_WRAPPERS):
        if not isinstance(content, dict):
            raise CheckpointError(f"{path} holds a {type(content).__name__.lstrip('_')} instead of a dict of weights")
        names = ("model", "state_dict") if len(content) <= MAX_WRAPPER_ENTRIES else ()
        inner = next((content[name] for name in names if isinstance(content.get(name), dict)), None)
        if inner is None:
            return content
        content = inner
    raise CheckpointError(f"{path} nests its weights too deeply: save only the weights")


def _numbers(values: object) -> tuple[int, ...]:
    """Return sizes, strides or offsets. Raises ValueError if they are not a few numbers of at least 0."""
    if not isinstance(values, tuple | list) or len(values) > MAX_AXES:
        raise ValueError("a shape that is not a tuple")
    if not all(type(value) is int and 0 <= value <= MAX_NUMBER for value in values):
        raise ValueError("a size, stride or offset that is negative or too large")
    return tuple(values)
