"""Captions as records of a journal, and which of an earlier run's still stand."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.captions import Alternative, Caption
from engine.inputs.images import ImageFile
from engine.inputs.pixels import open_file
from engine.inputs.read_ahead import read_ahead

Stamps = Mapping[str, list[int] | None]
"""Fingerprints of images by their ids, see fingerprints."""
READERS = 4
"""Threads that read pictures for their digests, which takes as long as the disk does."""


def encode_caption(caption: Caption, stamp: list[int] | None) -> dict[str, Any]:
    """Return a caption as a record; `stamp` is the fingerprint of its image."""
    return {
        "id": caption.id,
        "file": stamp,
        "latency_s": caption.latency_s,
        "alternatives": [vars(alternative) for alternative in caption.alternatives],
    }


def decode_caption(record: Mapping[str, Any], image_id: str) -> Caption | None:
    """Return the caption of a record as that of `image_id`, None where the record is malformed."""
    try:
        alternatives = tuple(
            Alternative(
                text=str(entry["text"]),
                raw_text=str(entry["raw_text"]),
                ids=tuple(int(token) for token in entry["ids"]),
                sum_log_prob=float(entry["sum_log_prob"]),
                score=float(entry["score"]),
            )
            for entry in record["alternatives"]
        )
        latency_s = record.get("latency_s")  # journals of an earlier version have none
        latency_s = None if latency_s is None else float(latency_s)
    except (KeyError, TypeError, ValueError):
        return None
    return Caption(image_id, alternatives, latency_s) if alternatives else None


def recall_by_id(records: Iterable[Mapping[str, Any]], stamps: Stamps) -> dict[str, Caption]:
    """Return the captions, by id, whose images have not changed since; a malformed one is done again."""
    captions = {}
    for record in records:
        image_id, stamp = record.get("id"), record.get("file")
        if not isinstance(image_id, str) or stamp is None or stamps.get(image_id) != stamp:
            continue
        if (caption := decode_caption(record, image_id)) is not None:
            captions[image_id] = caption
    return captions


def place_of(image: ImageFile) -> str:
    """Return where an image is, whatever its id and the working directory."""
    return os.path.abspath(image.path) if image.folder is None else str(image.source)  # noqa: PTH100 (follows links)


class KnownPictures:
    """Captions that earlier runs made, to be found by the bytes of the picture.

    A file with the same fingerprint at the same place has the same bytes: times of change cannot be set back, and the
    journal of a run that was cut off goes by no more. Where that differs, a file was touched, copied or renamed,
    perhaps: then its sha256 tells, and only files of a size that is known are read for it. Pictures at a URI have no
    digests. `prompts` are those of the images by their ids, where they have some: another one makes another caption.
    """

    def __init__(self, records: Iterable[Mapping[str, Any]], prompts: Mapping[str, str]) -> None:
        self._prompts = prompts
        self._by_stamp: dict[tuple[str, str], Mapping[str, Any]] = {}
        self._by_digest: dict[tuple[str, str], Mapping[str, Any]] = {}
        self._sizes: set[int] = set()
        self.digests: dict[str, str] = {}
        """sha256 of images by their ids, of those whose is known."""
        for record in records:
            place, stamp, digest = record.get("place"), record.get("file"), record.get("sha256")
            if isinstance(place, str) and isinstance(stamp, list) and stamp:
                self._by_stamp[place, str(stamp)] = record
                if isinstance(digest, str):
                    self._by_digest[digest, _suffix(place)] = record
                    self._sizes.add(stamp[0])

    def recall(self, images: Sequence[ImageFile], stamps: Stamps) -> dict[str, Caption]:
        """Return the captions of the images, by id, whose bytes are known."""
        captions, others = {}, []
        for image in images:
            stamp = stamps[image.id]
            record = self._by_stamp.get((place_of(image), str(stamp)))
            if record is not None and record.get("prompt") != self._prompts.get(image.id):
                continue
            if record is not None and (caption := decode_caption(record, image.id)) is not None:
                captions[image.id] = caption
                if isinstance(digest := record.get("sha256"), str):
                    self.digests[image.id] = digest
            elif image.folder is None and stamp is not None and stamp[0] in self._sizes:
                others.append(image)
        self.learn_digests(others)
        for image in others:
            known = self._by_digest.get((self.digests.get(image.id, ""), _suffix(place_of(image))))
            if known is None or known.get("prompt") != self._prompts.get(image.id):
                continue
            if (caption := decode_caption(known, image.id)) is not None:
                captions[image.id] = caption
        return captions

    def learn_digests(self, images: Iterable[ImageFile]) -> None:
        """Read those of the images, on this machine's disks, whose digests are not known."""
        unknown = [image for image in images if image.folder is None and image.id not in self.digests]
        paths = [image.path for image in unknown]
        found = read_ahead(digest_of, paths, threads=READERS, window=4 * READERS) if paths else iter(())
        for image, digest in zip(unknown, found, strict=True):
            if digest is not None:
                self.digests[image.id] = digest

    def encode(self, image: ImageFile, caption: Caption, stamp: list[int] | None) -> dict[str, Any]:
        """Return a record with the digest of its picture, of which it must be sure that these bytes were captioned."""
        digest = self.digests.get(image.id)
        return self.encode_new(image, caption, stamp) | ({} if digest is None else {"sha256": digest})

    def encode_new(self, image: ImageFile, caption: Caption, stamp: list[int] | None) -> dict[str, Any]:
        """Return a record that is found by the place and the fingerprint of its picture."""
        prompt = {"prompt": self._prompts[image.id]} if image.id in self._prompts else {}
        return encode_caption(caption, stamp) | {"place": place_of(image)} | prompt


def digest_of(path: Path) -> str | None:
    """Return the sha256 of a file's content in hexadecimal, None where it cannot be read."""
    try:
        with open_file(path) as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()  # type: ignore[arg-type]  # it has readinto
    except (OSError, ValueError):
        return None


def _suffix(place: str) -> str:
    """Return the suffix of a file, which decides how it is read where its bytes do not tell."""
    return os.path.splitext(place)[1].lower()  # noqa: PTH122 (of URIs, too)
