"""What driver and workers send each other: JSON lines in Ray's tables; knows no Ray.

JSON in ASCII keeps floats to the last bit and file names that are not UTF-8, which a table's own strings do not.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from engine.bundle.open import BundlePlace
from engine.captions import Alternative, Caption
from engine.errors import EngineError, UsageError
from engine.inputs.images import ImageFile
from engine.inputs.pixels import ImageNote
from engine.inputs.remote import RemoteFolder
from engine.options import DecodeOptions
from engine.runtime import Runtime

COLUMN = "message"
"""The one column of the tables: a message a row."""


@dataclass(frozen=True)
class WorkOrder:
    """All a worker needs to know of a run. `digest` is the bundle's, `environment` the versions it must have, too.

    `runtime` names what `auto` chose; `peers` is how many workers at most share a node's memory. With more than one of
    `num_nodes`, what a worker cannot read or do names its node.
    """

    bundle: BundlePlace | None
    digest: str
    environment: str
    runtime: Runtime
    peers: int
    num_nodes: int = 1
    rows: int | None = None
    options: DecodeOptions = field(default_factory=DecodeOptions)
    prompts: Mapping[str, str] | None = None


def pack_images(images: list[ImageFile]) -> str:
    """Return a message with images to caption; paths are absolute, workers run elsewhere."""
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
    return json.dumps({"captions": [asdict(caption) for caption in captions]})


def pack_failures(failures: Mapping[str, str]) -> str:
    """Return a message with images that cannot be read: id -> reason."""
    return json.dumps({"failures": dict(failures)})


def pack_image_notes(notes: list[ImageNote]) -> str:
    """Return a message with the images that were read without something."""
    return json.dumps({"image_notes": notes})


def pack_ready(wants: int) -> str:
    """Return a message of a worker that has loaded and may hold `wants` images at a time."""
    return json.dumps({"wants": wants})


def pack_note(note: str) -> str:
    """Return a message with a line for the user."""
    return json.dumps({"note": note})


def pack_error(error: EngineError, where: str = "") -> str:
    """Return a message that ends the run; `where` follows the error's own words."""
    return json.dumps({"error": f"{error}{where}", "exit_code": error.exit_code})


@dataclass(frozen=True)
class Answer:
    """What a worker sent: captions, images it cannot read (id -> reason), images it read without something, a line for
    the user, and how many images it wants at a time.
    """

    captions: tuple[Caption, ...] = ()
    failures: Mapping[str, str] = field(default_factory=dict)
    image_notes: tuple[ImageNote, ...] = ()
    note: str = ""
    wants: int = 0


def unpack_answer(message: str) -> Answer:
    """Return what a worker said; raise the EngineError it met."""
    content = json.loads(message)
    if "error" in content:
        raise (UsageError if content["exit_code"] == UsageError.exit_code else EngineError)(content["error"])
    captions = (
        Caption(
            entry["id"],
            tuple(Alternative(**{**a, "ids": tuple(a["ids"])}) for a in entry["alternatives"]),
            entry["latency_s"],
            entry["file_sha256"],
        )
        for entry in content.get("captions", ())
    )
    return Answer(
        tuple(captions),
        content.get("failures", {}),
        tuple(ImageNote(*note) for note in content.get("image_notes", ())),
        content.get("note", ""),
        content.get("wants", 0),
    )
