"""One run of a sweep: images captioned with one setting, unless their run is there. Knows nothing of scores."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from engine.bundle.signature import run_signature
from engine.errors import DataError
from engine.files.atomic import file_sha256, write_atomically
from engine.inputs.images import ImageFile
from engine.options import DecodeOptions
from engine.run.fingerprints import fingerprint, run_key
from engine.run.job import Outputs
from engine.run.pipeline import Progress, keep, open_record, write
from engine.run.record import RunRecord
from train.sweep.prompted import PromptedSource

Say = Callable[[str], None]

TELL_EVERY_S = 30.0


def caption_run(
    source: PromptedSource,
    options: DecodeOptions,
    images: list[ImageFile],
    prompts: dict[str, str] | None,
    path: Path,
    say: Say,
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
        say(f"{path.name} is there, of the same bundle, options and images: not captioned again")
        return known

    outputs = Outputs(path)
    with open_record(images, source, options, outputs, say, prompts=prompts) as record:
        seconds = keep(source.captions(options, record, say), record, now_and_then(say))
        _check_failures(record)
        write(record, outputs, options, say)
    new = len(record.captions) - record.resumed
    speed = new / seconds if new else None
    say(f"{new} images captioned in {seconds:.1f} s")
    run = {"beams": options.num_beams, "run": path.name, "signature": signature, "images_per_s": speed}
    beside = run | {"key": key, "sha256": file_sha256(path)}
    write_atomically(path.with_suffix(".json"), json.dumps(beside, indent=1) + "\n")
    return run


def now_and_then(tell: Say) -> Progress:
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
