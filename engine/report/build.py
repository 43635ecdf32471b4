"""Make a report, top to bottom: read, make thumbnails, write the page: start reading here."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from engine.errors import UsageError
from engine.files.atomic import write_atomically
from engine.files.lock import OutputLock
from engine.inputs.ids import join_some
from engine.report.folder import PAGE, THUMBNAILS, open_folder
from engine.report.gather import Content, ReportRequest, gather
from engine.report.page import page_signature, render
from engine.report.thumbnails import Thumbnails, make_thumbnails, remove_stale

Progress = Callable[[int], AbstractContextManager[Callable[[], None]]]
"""Called with the number of images, gives what to call after each."""


@dataclass(frozen=True)
class ReportSummary:
    """What was written, for the command's last lines."""

    page: Path
    images: int
    thumbnails_made: int
    signature: str


def build_report(request: ReportRequest, *, say: Callable[[str], None], progress: Progress) -> ReportSummary:
    """Write a report; `say` gets one line for each thing that is missing or cannot be read.

    The page replaces an earlier one when it is whole, and only then are the earlier one's thumbnails removed. Raises
    EngineError for inputs that cannot be read or do not belong together, and for a folder that cannot be written.
    """
    if request.against_scores is not None and request.against is None:
        raise UsageError("--against-scores needs --against, the run that they are of")
    content = gather(request)
    open_folder(request.out)
    page, folder = request.out / PAGE, request.out / THUMBNAILS
    with OutputLock(page):
        with progress(len(content.ids)) as advance:
            thumbnails = make_thumbnails(content.images, folder, size_px=request.thumbnail_px, advance=advance)
        notes = content.notes + _unreadable(content, thumbnails)
        for line in notes:
            say(line)
        write_atomically(page, render(content, thumbnails, notes=notes, signatures=request.signatures))
        remove_stale(folder, set(thumbnails.names))
    return ReportSummary(page, len(content.ids), thumbnails.made, page_signature(content))


def _unreadable(content: Content, thumbnails: Thumbnails) -> list[str]:
    if not thumbnails.unreadable:
        return []
    told = []
    for place, reason in thumbnails.unreadable.items():
        image = content.images[place]
        told.append(f"{image.path.name if image else content.ids[place]} ({reason})")
    return [f"{len(told)} images cannot be read and have a placeholder: {join_some(told)}"]
