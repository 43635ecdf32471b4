"""Captions as records of a journal, and which of an earlier run's are still right."""

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

Stamp = list[int] | None
"""The fingerprint of an image file, see fingerprints."""
Stamps = Mapping[str, Stamp]
"""Fingerprints of images by their ids."""
READERS = 4
"""Threads that read images for their digests, which takes as long as the disk does."""
SIZE_AND_TIME = 2
"""The first numbers of a fingerprint. The others change without the content: some network file systems give a file
another number whenever their cache expires, and chmod, hard links and copies set the time of the last status change."""


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


def place_of(image: ImageFile) -> str:
    """Return where an image is, whatever its id and the working directory."""
    return os.path.abspath(image.path) if image.folder is None else str(image.source)  # noqa: PTH100 (follows links)


class KnownImages:
    """Captions that earlier runs made, found by the content of the image and its prompt.

    A file at the same path with the same size and time of change is trusted without reading it. Other files may have
    been copied, moved or touched: they are compared by sha256, and only those are read whose size is in the journal.
    Images at a URI are not read for that. With `strict`, a file is only trusted where its number and the time of its
    last status change are the same, too: `--update` may follow months later, on data unpacked again with fixed times.
    `prompts` are those of the images by their ids, where each has its own.
    """

    def __init__(
        self, records: Iterable[Mapping[str, Any]], prompts: Mapping[str, str], *, strict: bool = False
    ) -> None:
        self._prompts = prompts
        self._stamp_length = None if strict else SIZE_AND_TIME
        self._by_place: dict[tuple[str, str, str | None], Mapping[str, Any]] = {}
        self._by_digest: dict[tuple[str, str, str | None], Mapping[str, Any]] = {}
        self._sizes: set[int] = set()
        self._used: set[int] = set()
        self.digests: dict[str, str] = {}
        """sha256 of the bytes that were captioned, by image id, where it is known."""
        for record in records:
            place, stamp, digest = record.get("place"), record.get("file"), record.get("sha256")
            prompt = record.get("prompt")
            if not isinstance(place, str) or not isinstance(stamp, list) or not stamp or not _is_text(prompt):
                continue
            self._by_place[place, self.trusted(stamp), prompt] = record
            if isinstance(digest, str) and isinstance(stamp[0], int):
                self._by_digest[digest, _suffix(place), prompt] = record
                self._sizes.add(stamp[0])

    @property
    def used(self) -> int:
        """How many records gave a caption."""
        return len(self._used)

    def trusted(self, stamp: Stamp) -> str:
        """Return the part of a fingerprint that stands for the content of a file at the same path."""
        return str(stamp and stamp[: self._stamp_length])

    def recall(self, images: Sequence[ImageFile], stamps: Stamps) -> dict[str, Caption]:
        """Return the captions of the images, by id, whose content is known; a malformed one is decoded again."""
        captions: dict[str, Caption] = {}
        others: list[ImageFile] = []
        for image in images:
            if (stamp := stamps[image.id]) is None:
                continue
            record = self._by_place.get((place_of(image), self.trusted(stamp), self._prompts.get(image.id)))
            if record is not None and self._take(record, image, captions):
                if isinstance(digest := record.get("sha256"), str):
                    self.digests[image.id] = digest
            elif image.folder is None and stamp[0] in self._sizes:
                others.append(image)
        self.learn_digests(others)
        for image in others:
            digest = self.digests.get(image.id, "")
            record = self._by_digest.get((digest, _suffix(place_of(image)), self._prompts.get(image.id)))
            if record is None or not self._take(record, image, captions):
                self.digests.pop(image.id, None)  # the bytes that will be captioned are read later
        return captions

    def _take(self, record: Mapping[str, Any], image: ImageFile, captions: dict[str, Caption]) -> bool:
        if (caption := decode_caption(record, image.id)) is None:
            return False
        captions[image.id] = caption
        self._used.add(id(record))
        return True

    def learn_digests(self, images: Iterable[ImageFile]) -> None:
        """Read those of the images, on this machine's disks, whose digests are not known."""
        self.digests |= digests_of([image for image in images if image.folder is None and image.id not in self.digests])

    def encode(self, image: ImageFile, caption: Caption, stamp: Stamp) -> dict[str, Any]:
        """Return a caption as a record; `stamp` is the fingerprint of its image."""
        if caption.file_sha256 is not None:
            self.digests[image.id] = caption.file_sha256
        record = {
            "id": caption.id,
            "file": stamp,
            "latency_s": caption.latency_s,
            "alternatives": [vars(alternative) for alternative in caption.alternatives],
            "place": place_of(image),
        }
        if image.id in self._prompts:
            record["prompt"] = self._prompts[image.id]
        if image.id in self.digests:
            record["sha256"] = self.digests[image.id]
        return record


def with_places(
    records: Iterable[Mapping[str, Any]], images: Iterable[ImageFile], prompts: Mapping[str, str]
) -> list[dict[str, Any]]:
    """Return the records of a journal of an earlier version, which had only ids: its key stood for the list of images.

    Records whose image is not in the list are left out.
    """
    by_id = {image.id: image for image in images}
    found = []
    for record in records:
        if (image := by_id.get(str(record.get("id")))) is not None:
            prompt = {"prompt": prompts[image.id]} if image.id in prompts else {}
            found.append({**record, "place": place_of(image)} | prompt)
    return found


def digests_of(images: Sequence[ImageFile]) -> dict[str, str]:
    """Return the sha256 of local files by image id, without those that cannot be read."""
    paths = [image.path for image in images]
    found = read_ahead(digest_of, paths, threads=READERS, window=4 * READERS) if paths else iter(())
    return {image.id: digest for image, digest in zip(images, found, strict=True) if digest is not None}


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


def _is_text(value: object) -> bool:
    return value is None or isinstance(value, str)
