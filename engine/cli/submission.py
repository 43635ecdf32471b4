"""The commands that write and check submission files: submit, check; see app.py for the others."""

from __future__ import annotations

from pathlib import Path

import click

from engine.cli.shared import PATH, column_options, say
from engine.errors import EngineError, UsageError
from engine.inputs.columns import Columns

FORMAT_NAMES = ("imageclef2022", "imageclef2023", "imageclef2024", "imageclef2025", "imageclef2026")


@click.command()
@click.option("--run", type=PATH, required=True, help="run.csv, or captions in another layout.")
@click.option("--manifest", type=PATH, required=True, help="File of the ids, in the order wanted.")
@click.option("--format", "form", type=click.Choice(FORMAT_NAMES), required=True)
@click.option("--out", type=PATH, required=True, help="submission.csv, or submission.zip for 2025 and 2026.")
@column_options("caption")
def submit(run: Path, manifest: Path, form: str, out: Path, named: Columns) -> None:
    """Write a run as a submission, then read the file back and check it."""
    from engine.files.atomic import check_outputs
    from engine.inputs.tables import read_table
    from engine.submission.formats import manifest_ids, write_submission

    check_outputs({"--out": out}, [run, manifest])
    ids, notes = manifest_ids(manifest, named)
    captions = read_table(run, named).single()
    named.require_found()
    for note in notes:
        say(f"note: {note}")
    for note in write_submission(captions, ids, form, out):
        say(note)
    say(f"{len(ids)} captions -> {out}, read back and checked as {form}")


@click.command()
@click.argument("file", type=PATH)
@click.option("--manifest", type=PATH, required=True, help="File of the ids, in the order wanted.")
@click.option("--format", "form", type=click.Choice(FORMAT_NAMES), required=True)
@column_options()
def check(file: Path, manifest: Path, form: str, named: Columns) -> None:
    """Check any submission file as the organisers' checker does; exit 1 when it would be refused."""
    from engine.submission.formats import MOST_PROBLEMS, check_submission, manifest_ids

    if not file.is_file():
        raise UsageError(f"{file} is not a file")
    ids, notes = manifest_ids(manifest, named)
    named.require_found()
    for note in notes:
        say(f"note: {note}")
    verdict = check_submission(file, ids, form)
    for line in verdict.warnings[:10]:
        say(f"allowed, but unwise: {line}")
    if len(verdict.warnings) > 10:
        least = "" if len(verdict.warnings) < MOST_PROBLEMS else "at least "
        say(f"allowed, but unwise: {least}{len(verdict.warnings) - 10} more like these")
    if verdict.errors:
        more = f"{len(verdict.errors) - 1} more" if len(verdict.errors) > 1 else ""
        more += "" if verdict.is_whole else f"{', ' if more else ''}not checked to the end"
        raise EngineError(f"{file} is no {form} submission: {verdict.errors[0]}{f' ({more})' if more else ''}")
    say(f"{file}: {len(ids)} captions, a correct {form} submission")
