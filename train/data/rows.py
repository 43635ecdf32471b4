"""Rows of a table of captions with their concepts and prompts; knows nothing of pictures."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from engine.errors import DataError
from engine.inputs.columns import PROMPT
from engine.inputs.ids import shown
from engine.inputs.tables import Table
from train.data.parquet import CONCEPT_COLUMNS, ParquetRow, split_concepts


def rows_of(table: Table, concepts: dict[str, tuple[str, ...]]) -> list[ParquetRow]:
    """Return a row for every caption. Concepts that are not given come from a column; so do prompts, one an image.

    Raises DataError for an image with different prompts.
    """
    if not concepts:
        columns = [values for title, values in table.columns.items() if title.lower() in CONCEPT_COLUMNS]
        concepts = {name: tuple(split_concepts(value)) for values in columns[:1] for name, value in values.items()}
    title = next((title for title in table.columns if title.lower() == PROMPT), "")
    if title in table.varying:
        raise _different_prompts(table.path, table.varying[title])
    prompts = table.columns.get(title, {})
    return [
        ParquetRow(name, None, caption, concepts.get(name, ()), prompts.get(name, ""))
        for name, captions in table.captions.items()
        for caption in captions
    ]


def check_prompts(rows: Iterable[ParquetRow], captions_file: Path) -> None:
    """Raise DataError for an image with different prompts, for which no one caption could be generated, and for a
    prompt that holds control characters or half a character.
    """
    prompts: dict[str, str] = {}
    for row in rows:
        if prompts.setdefault(row.id, row.prompt) != row.prompt:
            raise _different_prompts(captions_file, row.id)
        if not row.prompt.isprintable():
            raise DataError(
                f"{captions_file}: the prompt of {shown(row.id)} holds characters that are no text: {row.prompt!a}"
            )


def _different_prompts(captions_file: Path, name: str) -> DataError:
    return DataError(
        f"{captions_file}: {shown(name)} has captions with different prompts: an image has one prompt, the same in all "
        "of its rows"
    )
