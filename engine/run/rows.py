"""What a run says of each image, and how it goes to standard output while the run goes on."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import IO

from engine.captions import Caption
from engine.errors import UsageError
from engine.files.run_files import CSV_HEADER, Row, format_json, format_row, one_line
from engine.inputs.images import ImageFile, utf8
from engine.run.job import Outputs
from engine.run.record import RunRecord


class ReaderGoneError(Exception):
    """Nobody reads standard output any more, as behind `| head`: the run ends without a word."""


def text_of(caption: Caption, outputs: Outputs) -> str:
    """Return a caption's text between prefix and suffix, on one line; an empty caption stays empty."""
    text = one_line(caption.raw_text if outputs.raw_text else caption.text)
    return f"{outputs.prefix}{text}{outputs.suffix}" if text else ""


def row_of(record: RunRecord, image: ImageFile, outputs: Outputs) -> Row | None:
    """Return what is known of an image, None before it is captioned or has failed.

    One that failed has no text, or with `allow_missing` an empty one.
    """
    caption, failure = record.captions.get(image.id), record.failure(image)
    if caption is not None:
        return Row(image.id, file_of(image), text_of(caption, outputs).strip())
    if failure is None:
        return None
    return Row(image.id, file_of(image), "" if outputs.allow_missing else None, failure.reason)


def file_of(image: ImageFile) -> str:
    """Return an image's path or URI as files name it."""
    return utf8(str(image.source)) if image.folder is None else str(image.source)


def rows_of(record: RunRecord, outputs: Outputs) -> Iterator[Row]:
    """Yield what is known of all images, in their order."""
    return (row for image in record.images if (row := row_of(record, image, outputs)) is not None)


class RowStream:
    """Writes rows to standard output in the order of the images, each as soon as those before it are known."""

    def __init__(self, record: RunRecord, outputs: Outputs) -> None:
        """Raises UsageError when standard output is closed."""
        if sys.stdout is None:
            raise UsageError("--out - writes to standard output, which is closed")
        self._out: IO[bytes] = sys.stdout.buffer
        self._record, self._outputs, self._next = record, outputs, 0
        self._header = "" if outputs.jsonl else CSV_HEADER

    def advance(self) -> None:
        """Write what is known by now. Raises ReaderGoneError, or OSError where the output is full."""
        images, lines = self._record.images, []
        while self._next < len(images):
            row = row_of(self._record, images[self._next], self._outputs)
            if row is None:
                break
            self._next += 1
            if self._outputs.jsonl:
                lines.append(format_json(row))
            elif row.text is not None:
                lines.append(format_row(row.id, row.text))
        if not lines:
            return
        try:
            self._out.write((self._header + "".join(lines)).encode("utf-8", "surrogateescape"))
            self._out.flush()
        except BrokenPipeError as error:
            raise ReaderGoneError from error
        self._header = ""
