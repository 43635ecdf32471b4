"""Choose the images of a split and caption them into a run file that a later call can reuse."""

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
from engine.run.job import Outputs
from engine.run.pipeline import LocalSource, Progress, keep, open_record, write
from engine.run.record import RunRecord, fingerprint, run_key
from train.data.dataset import Split, read_dataset

Log = Callable[[str], None]


def choose_split(data: Path, name: str, unpack_into: Path | None, log: Log, columns: Columns = USUAL) -> Split:
    """Return the split `name`, or `test` if `valid` is requested and missing. Raises DataError if it does not exist."""
    splits = read_dataset(data, unpack_into=unpack_into, columns=columns, log=log)
    if name == "valid" and name not in splits and "test" in splits:
        log(f"{data} has no split valid: using its split test")
        name = "test"
    if name not in splits:
        expected = "valid or test" if name == "valid" else name
        raise DataError(f"{data} has no split {expected}, only {', '.join(splits)}: choose one with --split")
    split = splits[name]
    for line in split.problems.lines():
        log(f"{name}: {line}")
    return split


def choose_images(split: Split, limit: int | None) -> tuple[list[ImageFile], dict[str, tuple[str, ...]]]:
    """Return the images of a split in its order, each once, and their references {id: captions}.

    With `limit`, only that many images, evenly spaced. Raises DataError if files are missing or an id has two images.
    """
    files: dict[str, Path] = {}
    references: dict[str, tuple[str, ...]] = {}
    for example in split.examples:
        if files.setdefault(example.id, example.image) != example.image:
            raise DataError(
                f"{split.captions_file}: the id {example.id} has two images, {files[example.id].name} and "
                f"{example.image.name}: give each image a different id"
            )
        references[example.id] = (*references.get(example.id, ()), example.caption)
    names = list(files)
    ids = [names[index] for index in evenly_spaced(len(names), limit or len(names))]
    missing = [name for name in ids if not files[name].is_file()]
    if missing:
        raise DataError(
            f"{split.captions_file}: {len(missing)} of {len(ids)} images are missing ({join_some(missing, 3)}): "
            "add the files or remove their rows"
        )
    return [ImageFile(name, files[name]) for name in ids], {name: references[name] for name in ids}


def prompts_of(split: Split, images: list[ImageFile]) -> dict[str, str] | None:
    """Return the prompts of the images {id: prompt}, or None if no image has a prompt."""
    prompts = {example.id: example.prompt for example in split.examples if example.prompt}
    by_id = {image.id: prompts.get(image.id, "") for image in images}
    return by_id if any(by_id.values()) else None


def evenly_spaced(count: int, wanted: int) -> list[int]:
    """Return `wanted` indices below `count`, evenly spaced, or all of them.

    The first images would not do: captions are often sorted by kind.
    """
    return list(range(count)) if wanted >= count else [i * count // wanted for i in range(wanted)]


class PromptedSource(LocalSource):
    """A captioner in this process that removes the prompts from its captions: references do not contain them."""

    def captions(self, pending: PendingImages, log: Log) -> Iterator[Caption]:
        """See Source.captions."""
        captions = super().captions(pending, log)
        if (starts := self.decoding.starts) is None:
            yield from captions
            return
        for caption in captions:
            length = len(starts[caption.id].prompt)
            alternatives = tuple(self._without_prompt(item, length) for item in caption.alternatives)
            yield replace(caption, alternatives=alternatives)

    def _without_prompt(self, alternative: Alternative, length: int) -> Alternative:
        """Drop the first `length` tokens, the prompt, and detokenise the rest."""
        ids = alternative.ids[length:]
        raw = self._captioner.tokenizer.decode(ids)
        return replace(alternative, text=detokenise(raw), raw_text=raw, ids=ids)


LOG_EVERY_S = 30.0


def caption_run(
    source: PromptedSource,
    images: list[ImageFile],
    prompts: dict[str, str] | None,
    path: Path,
    log: Log,
) -> dict[str, Any]:
    """Caption the images into the CSV file `path` and return {beams, run, signature, images_per_s}.

    If the file already exists for the same bundle, options, prompts and images, it is reused. A JSON file of the same
    name holds the key that is compared. `images_per_s` includes reading the images. It is None if all captions come
    from the journal of an interrupted run.
    """
    options = source.decoding.options
    signature = run_signature(source.bundle, source.backend_name, options)
    if prompts is not None:
        digest = hashlib.sha256(json.dumps(sorted(prompts.items())).encode()).hexdigest()
        signature += f"|prompts:{sum(map(bool, prompts.values()))}:{digest[:12]}"
    made_with = f"{signature}|{source.environment}"
    files = json.dumps([fingerprint(image.path) for image in images])
    key = hashlib.sha256((run_key(images, made_with) + files).encode()).hexdigest()
    known = _known_run(path, key)
    if known is not None:
        log(f"{path.name} exists for the same bundle, options and images: not captioned again")
        return known

    outputs = Outputs(path)
    with open_record(images, source, outputs, log, prompts=prompts) as record:
        seconds = keep(source.captions(record, log), record, periodic_progress(log))
        _check_failures(record)
        write(record, outputs, options, log)
    new = len(record.captions) - record.resumed
    speed = new / seconds if new else None
    log(f"{new} images captioned in {seconds:.1f} s")
    run = {"beams": options.num_beams, "run": path.name, "signature": signature, "images_per_s": speed}
    with_key = run | {"key": key, "sha256": file_sha256(path)}
    write_atomically(path.with_suffix(".json"), json.dumps(with_key, indent=1) + "\n")
    return run


def periodic_progress(log: Log) -> Progress:
    """Return a progress that logs a line every LOG_EVERY_S seconds.

    A progress bar would not do: a sweep may run for days with its output in a file.
    """

    @contextmanager
    def progress(length: int) -> Iterator[Callable[[int], None]]:
        logged_at = time.perf_counter()

        def advance(done: int) -> None:
            nonlocal logged_at
            if time.perf_counter() - logged_at > LOG_EVERY_S:
                logged_at = time.perf_counter()
                log(f"{done} of {length} images")

        yield advance

    return progress


def _check_failures(record: RunRecord) -> None:
    if record.failures:
        named = "; ".join(str(error) for error in record.failures[:3])
        more = f"; and {len(record.failures) - 3} more" if len(record.failures) > 3 else ""
        raise DataError(
            f"{len(record.failures)} of {len(record.images)} images cannot be read ({named}{more}): fix the files "
            "and run the same command again; it captions only these images"
        )


def _known_run(path: Path, key: str) -> dict[str, Any] | None:
    """Return {beams, run, signature, images_per_s} of a finished run with this key, or None.

    The result is None as well if the run file was changed after it was written.
    """
    try:
        known = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        if known["key"] == key and known["sha256"] == file_sha256(path):
            return {name: known[name] for name in ("beams", "run", "signature", "images_per_s")}
    except (OSError, ValueError, KeyError, TypeError):
        pass  # a missing or damaged file: caption again
    return None
