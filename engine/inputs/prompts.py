"""A table of prompts: the text each image's caption starts with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from engine.errors import DataError
from engine.inputs.columns import PROMPT, USUAL, Columns
from engine.inputs.delimited import read_columns
from engine.inputs.ids import Ids, join_some


def read_prompts(path: Path, ids: Sequence[str], columns: Columns = USUAL) -> dict[str, str]:
    """Return {id: prompt} of all `ids` from a table with a column `prompt`; rows of other images are skipped.

    Names mean ids as elsewhere (inputs/ids.py). An empty prompt is not a prompt. Raises DataError naming what is
    missing.
    """
    table = read_columns(path, columns, whole=True)
    found = [column for column in table if column.lower() == PROMPT]
    if not found:
        raise DataError(
            f"{path} has no column {PROMPT!r}, only {join_some(table, 3)}: it needs ID and {PROMPT}, or give "
            "--prompt-column"
        )
    prompts = table[found[0]]
    of_id = {one: prompts[name] for name, one in Ids(ids).find_all(prompts, path).items()}
    if missing := [one for one in ids if one not in of_id]:
        raise DataError(
            f"{path} has no prompt for {len(missing)} of {len(ids)} images ({join_some(missing, 3)}): add their rows, "
            "the prompt may be empty"
        )
    return of_id
