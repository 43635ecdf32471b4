"""Messages between driver and workers, as JSON lines: the same for worker processes and Ray actors.

ASCII JSON preserves floats to the last bit and file names that are not UTF-8.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from engine.bundle.open import BundleRef
from engine.captioner import Decoding
from engine.captions import Alternative, Attention, Caption
from engine.errors import EngineError, UsageError
from engine.inputs.images import ImageFile
from engine.inputs.pixels import ImageNote
from engine.inputs.remote import RemoteFolder
from engine.runtime import Runtime
from engine.version import __version__


@dataclass(frozen=True)
class WorkOrder:
    """Everything that a worker needs for a run.

    bundle          location of the bundle
    digest          digest that the bundle must have
    runtime         how to run the bundle, with the backend that `auto` chose
    decoding        options, search and prompts
    rows            number of beams in flight (None: what suits device and memory)
    environment     versions of packages that the worker must have
    engine_version  version of this package that the worker must have
    peers           maximum number of workers that share a node's memory
    num_nodes       number of nodes; with more than one, a worker's errors name its node
    """

    bundle: BundleRef
    digest: str
    runtime: Runtime
    decoding: Decoding
    rows: int | None = None
    environment: str = ""
    engine_version: str = __version__
    peers: int = 1
    num_nodes: int = 1


def pack_images(images: Sequence[ImageFile]) -> str:
    """Return a message with images to caption; paths are absolute, because workers may run elsewhere."""
    return json.dumps(
        [
            [i.id, str(i.path.absolute() if i.folder is None else i.path), i.frame, i.folder and i.folder.uri, i.depth]
            for i in images
        ]
    )


def unpack_images(message: str) -> list[ImageFile]:
    """Return the images of a message."""
    return [
        ImageFile(name, Path(path), frame, RemoteFolder(uri) if uri else None, depth)
        for name, path, frame, uri, depth in json.loads(message)
    ]


def pack_captions(captions: list[Caption]) -> str:
    """Return a message with finished captions."""
    return json.dumps({"captions": list(map(_pack_caption, captions))})


def _pack_caption(caption: Caption) -> dict[str, Any]:
    entry = {**vars(caption), "alternatives": list(map(asdict, caption.alternatives))}
    if (attention := caption.attention) is not None:
        maps = np.ascontiguousarray(attention.maps, "<f2")
        packed = {"shape": maps.shape, "maps": base64.b64encode(maps.tobytes()).decode("ascii")}
        entry["attention"] = vars(attention) | packed
    return entry


def _unpack_caption(entry: dict[str, Any]) -> Caption:
    attention = entry["attention"]
    if attention is not None:
        content = np.frombuffer(base64.b64decode(attention["maps"]), "<f2").reshape(attention.pop("shape"))
        lists = {name: tuple(value) for name, value in attention.items() if name != "maps"}
        attention = Attention(maps=content, **lists)
    alternatives = tuple(map(Alternative.from_json, entry["alternatives"]))
    return Caption(entry["id"], alternatives, entry["latency_s"], entry["file_sha256"], attention)


def pack_failures(failures: Mapping[str, str]) -> str:
    """Return a message with images that cannot be read: id -> reason."""
    return json.dumps({"failures": dict(failures)})


def pack_image_notes(notes: list[ImageNote]) -> str:
    """Return a message with what was dropped from images."""
    return json.dumps({"image_notes": notes})


def pack_ready(wants: int) -> str:
    """Return the message of a worker that has loaded its bundle and can hold `wants` images at a time."""
    return json.dumps({"wants": wants})


def pack_note(note: str) -> str:
    """Return a message with a line to log for the user."""
    return json.dumps({"note": note})


def pack_error(error: EngineError, where: str = "") -> str:
    """Return a message that ends the run; `where` is appended to the error's text."""
    return json.dumps({"error": f"{error}{where}", "exit_code": error.exit_code})


@dataclass(frozen=True)
class Answer:
    """A message from a worker.

    captions     finished captions
    failures     images that cannot be read: id -> reason
    image_notes  what was dropped from images
    note         a line to log, or an empty string
    wants        number of images that the worker can hold at a time; 0 if it does not say
    """

    captions: tuple[Caption, ...] = ()
    failures: Mapping[str, str] = field(default_factory=dict)
    image_notes: tuple[ImageNote, ...] = ()
    note: str = ""
    wants: int = 0


def unpack_answer(message: str) -> Answer:
    """Return the content of a worker's message. Raises the EngineError that a worker sent."""
    content = json.loads(message)
    if "error" in content:
        raise (UsageError if content["exit_code"] == UsageError.exit_code else EngineError)(content["error"])
    return Answer(
        tuple(map(_unpack_caption, content.get("captions", ()))),
        content.get("failures", {}),
        tuple(ImageNote(*note) for note in content.get("image_notes", ())),
        content.get("note", ""),
        content.get("wants", 0),
    )
