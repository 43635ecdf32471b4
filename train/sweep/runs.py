"""The images of a split, with references and prompts, as a sweep takes them. Knows nothing of decoding and scores."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from engine.bundle.signature import run_signature
from engine.bundle.tokenizer import detokenise
from engine.captioner import PendingImages
from engine.captions import Alternative, Caption
from engine.errors import DataError
from engine.files.atomic import file_sha256, write_atomically
from engine.inputs.columns import USUAL, Columns
from engine.inputs.ids import join_some
from engine.inputs.images import ImageFile
from engine.options import DecodeOptions
from engine.run.job import Outputs
from engine.run.pipeline import LocalSource, Log, Progress, keep, open_record, write
from engine.run.record import RunRecord, fingerprint, run_key
from train.data.dataset import Split, read_dataset


def choose_split(data: Path, name: str, unpack_into: Path | None, log: Log, columns: Columns = USUAL) -> Split:
    """Return the split to caption: the one asked for, `test` in place of a missing `valid`. Raises DataError."""
    splits = read_dataset(data, unpack_into=unpack_into, columns=columns, log=log)
    if name == "valid" and name not in splits and "test" in splits:
        log(f"{data} has no split valid: the sweep is made on its split test")
        name = "test"
    if name not in splits:
        wanted = "valid or test" if name == "valid" else name
        raise DataError(f"{data} has no split {wanted}, only {', '.join(splits)}: choose with --split")
    split = splits[name]
    for line in split.problems.lines():
        log(f"{name}: {line}")
    return split


def choose_images(split: Split, limit: int | None) -> tuple[list[ImageFile], dict[str, tuple[str, ...]]]:
    """Return the images of a split, each once and in its order, and their references by id.

    Raises DataError where files are missing, or one id has two of them.
    """
    files: dict[str, Path] = {}
    references: dict[str, tuple[str, ...]] = {}
    for example in split.examples:
        if files.setdefault(example.id, example.image) != example.image:
            raise DataError(
                f"{split.captions_file}: {example.id} stands for two pictures, {files[example.id].name} and "
                f"{example.image.name}: give each an id of its own"
            )
        references[example.id] = (*references.get(example.id, ()), example.caption)
    ids = [list(files)[place] for place in spaced(len(files), limit or len(files))]
    missing = [name for name in ids if not files[name].is_file()]
    if missing:
        raise DataError(
            f"{split.captions_file}: {len(missing)} of {len(ids)} images are missing ({join_some(missing, 3)}): "
            "add the files, or take their rows out"
        )
    return [ImageFile(name, files[name]) for name in ids], {name: references[name] for name in ids}


def prompts_of(split: Split, images: list[ImageFile]) -> dict[str, str] | None:
    """Return what the captions of the images start with by id, None where none of them has a prompt."""
    prompts = {example.id: example.prompt for example in split.examples if example.prompt}
    found = {image.id: prompts.get(image.id, "") for image in images}
    return found if any(found.values()) else None


def spaced(count: int, wanted: int) -> list[int]:
    """Return `wanted` places of `count`, evenly spaced, or all: captions often come sorted by kind."""
    return list(range(count)) if wanted >= count else [i * count // wanted for i in range(wanted)]


class PromptedSource(LocalSource):
    """A captioner in this process whose captions come without the prompts, which no reference holds."""

    def captions(self, options: DecodeOptions, pending: PendingImages, log: Log) -> Iterator[Caption]:
        """See Source.captions."""
        captions = super().captions(options, pending, log)
        _, starts = self._captioner.searches(options, pending.prompts)
        if starts is None:
            yield from captions
            return
        for caption in captions:
            told = len(starts[caption.id].prompt)
            yield replace(caption, alternatives=tuple(self._behind(one, told) for one in caption.alternatives))

    def _behind(self, alternative: Alternative, told: int) -> Alternative:
        ids = alternative.ids[told:]
        raw = self._captioner.tokenizer.decode(ids)
        return replace(alternative, text=detokenise(raw), raw_text=raw, ids=ids)


TELL_EVERY_S = 30.0


def caption_run(
    source: PromptedSource,
    options: DecodeOptions,
    images: list[ImageFile],
    prompts: dict[str, str] | None,
    path: Path,
    log: Log,
) -> dict[str, Any]:
    """Caption the images into the CSV file `path`, unless it is there and of the same bundle, options, prompts and
    images; a JSON file of that name says so. Return what is known of the run.

    `images_per_s` includes reading; None when all captions come from the journal of a run that was cut off.
    """
    signature = run_signature(source.bundle, source.backend_name, options)
    if prompts is not None:
        digest = hashlib.sha256(json.dumps(sorted(prompts.items())).encode()).hexdigest()
        signature += f"|prompts:{sum(map(bool, prompts.values()))}:{digest[:12]}"
    made_with = f"{signature}|{source.environment}"
    files = json.dumps([fingerprint(image.path) for image in images])
    key = hashlib.sha256((run_key(images, made_with) + files).encode()).hexdigest()
    known = _known_run(path, key)
    if known is not None:
        log(f"{path.name} is there, of the same bundle, options and images: not captioned again")
        return known

    outputs = Outputs(path)
    with open_record(images, source, options, outputs, log, prompts=prompts) as record:
        seconds = keep(source.captions(options, record, log), record, now_and_then(log))
        _check_failures(record)
        write(record, outputs, options, log)
    new = len(record.captions) - record.resumed
    speed = new / seconds if new else None
    log(f"{new} images captioned in {seconds:.1f} s")
    run = {"beams": options.num_beams, "run": path.name, "signature": signature, "images_per_s": speed}
    beside = run | {"key": key, "sha256": file_sha256(path)}
    write_atomically(path.with_suffix(".json"), json.dumps(beside, indent=1) + "\n")
    return run


def now_and_then(tell: Log) -> Progress:
    """Return a progress that is told in a line now and then: a sweep may write to a file for days."""

    @contextmanager
    def progress(length: int) -> Iterator[Callable[[int], None]]:
        told = time.perf_counter()

        def advance(done: int) -> None:
            nonlocal told
            if time.perf_counter() - told > TELL_EVERY_S:
                told = time.perf_counter()
                tell(f"{done} of {length} images")

        yield advance

    return progress


def _check_failures(record: RunRecord) -> None:
    if record.failures:
        named = "; ".join(str(error) for error in record.failures[:3])
        more = f"; and {len(record.failures) - 3} more" if len(record.failures) > 3 else ""
        raise DataError(
            f"{len(record.failures)} of {len(record.images)} images cannot be read ({named}{more}): mend them in "
            "place and run the same command again, which captions only these"
        )


def _known_run(path: Path, key: str) -> dict[str, Any] | None:
    """Return what is known of a finished run with this key whose captions are still those that were written."""
    try:
        known = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        if known["key"] == key and known["sha256"] == file_sha256(path):
            return {name: known[name] for name in ("beams", "run", "signature", "images_per_s")}
    except (OSError, ValueError, KeyError, TypeError):
        pass  # a file that is missing or damaged is none
    return None
