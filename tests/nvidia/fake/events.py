"""Read the event log of the stand-in for libcudart: what a block of Python would have done on a GPU."""

from __future__ import annotations

import ctypes
import struct
import subprocess
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

from engine.errors import EngineError

DIRECTIONS = ("on the host", "to the device", "to the host", "on the device", "by address")
"""cudaMemcpyKind, the second value of a copy."""
FAT_BINARY = struct.pack("<IHH", 0xBA55ED50, 1, 16)
"""The first bytes of a fat binary: magic number, version and header size."""
MACHINE_CODE = 7
"""Index of a kernel's value that is the address of its fat binary."""


@dataclass(frozen=True)
class Event:
    """A call, and what is recorded of it.

    kind    kernel, product, cudnn, copy, fill, wait, event, allocate (on the device), pin (on the host), free, ...
    name    the function, or the mangled name of a kernel
    values  allocation: bytes; copy: bytes, direction, rows; kernel: grid, block, stream, address of its fat binary;
            product: transa, transb, m, n, k, batch, type, lda, ldb, type of the sums
    """

    kind: str
    name: str
    values: tuple[int, ...]


class _Entry(ctypes.Structure):
    _fields_ = (("kind", ctypes.c_char_p), ("name", ctypes.c_char_p), ("values", ctypes.c_longlong * 10))


@cache
def _library() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL("libcudart.so.13")
        library.fake_peak_bytes.restype = ctypes.c_longlong
        library.fake_stop.restype = ctypes.c_long
    except (OSError, AttributeError) as error:
        raise EngineError(f"LD_LIBRARY_PATH lacks the stand-ins ({error}): see tests/nvidia/fake/build.py") from None
    return library


@contextmanager
def recorded() -> Iterator[list[Event]]:
    """Record the calls of a block. The list is filled when the block ends. Raises EngineError without the stand-ins."""
    events: list[Event] = []
    first = ctypes.POINTER(_Entry)()
    _library().fake_start()
    try:
        yield events
    finally:
        count = _library().fake_stop(ctypes.byref(first))
        events += [Event(one.kind.decode(), one.name.decode(), tuple(one.values)) for one in first[:count]]


def peak_bytes() -> int:
    """Return the most device memory that this process has had allocated at once."""
    return int(_library().fake_peak_bytes())


def describe(events: list[Event]) -> dict[str, Any]:
    """Count events by kind, kernels by C++ name and products by their values; list allocations in MiB."""
    products = [f"{event.name} {list(event.values)}" for event in events if event.kind == "product"]
    kinds = (f"copy {DIRECTIONS[event.values[1]]}" if event.kind == "copy" else event.kind for event in events)
    return {
        "events": dict(Counter(kinds).most_common()),
        "kernels": dict(Counter(demangle([e.name for e in events if e.kind == "kernel"])).most_common()),
        "products": dict(Counter(products).most_common()),
        "allocated_mib": [round(event.values[0] / 2**20, 2) for event in events if event.kind == "allocate"],
    }


def demangle(names: list[str]) -> list[str]:
    """Return the C++ names of kernels (mangled names if c++filt is not installed)."""
    try:
        done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    except FileNotFoundError:
        return names
    return done.stdout.replace("onnxruntime::", "").replace("contrib::", "").split("\n")[: len(names)]


def capabilities(events: list[Event]) -> Counter[str]:
    """Return for which compute capabilities the launched kernels have machine code -> number of fat binaries."""
    addresses = {event.values[MACHINE_CODE] for event in events if event.kind == "kernel"} - {0}
    return Counter(" ".join(capabilities_of(address)) for address in addresses)


def capabilities_of(address: int) -> Iterator[str]:
    """Read a fat binary in this process's memory. NVIDIA does not document the format; it was read off wheels.

    A header (magic u32, version u16, header size u16, total size u64) is followed by images: kind u16, version u16,
    header size u32, size u64, and at byte 28 the compute capability as u32, for example 80.
    """
    magic, _, header, total = struct.unpack("<IHHQ", ctypes.string_at(address, 16))
    assert magic == 0xBA55ED50, hex(magic)
    image, end = address + header, address + header + total
    while image < end:
        _, _, header, size, number = struct.unpack("<HHIQ12xI", ctypes.string_at(image, 32))
        yield f"{number // 10}.{number % 10}"
        image += header + size
