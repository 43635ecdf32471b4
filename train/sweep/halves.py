"""Two halves of the images of a split: one to choose settings on, one to report them on. Knows nothing of captions."""

from __future__ import annotations

import re
from collections.abc import Sequence

from engine.errors import DataError, UsageError
from engine.inputs.ids import join_some
from train.data.dataset import draw

FEWEST = 2
"""Images of a half; a difference has no interval with fewer."""


def halve(ids: Sequence[str], seed: int, group: str | None = None) -> tuple[list[str], list[str]]:
    """Return (tuning, held back): all ids, each in one half, in the order given.

    Who is in which half depends on the ids and the seed, not on their order. Ids that share a group, the part that
    the regular expression `group` matches (its first group where it has one), stay together; without it each id is
    alone. The halves are as equal as the groups allow. Raises UsageError for a pattern that is none, DataError where
    ids lack a group or a half would have fewer than FEWEST images.
    """
    members: dict[str, list[str]] = {}
    for name, own in zip(ids, _groups(ids, group), strict=True):
        members.setdefault(own, []).append(name)
    drawn = sorted(members, key=lambda own: (draw(own, seed), own))
    sizes = [sum(len(members[own]) for own in drawn[:cut]) for cut in range(len(drawn) + 1)]
    cut = min(range(len(sizes)), key=lambda cut: abs(2 * sizes[cut] - len(ids)))
    if min(sizes[cut], len(ids) - sizes[cut]) < FEWEST:
        alone = "" if group is None else f" in {len(drawn)} groups"
        raise DataError(
            f"{len(ids)} images{alone} do not make two halves of at least {FEWEST} images: tune on more of them"
        )
    tuning = {name for own in drawn[:cut] for name in members[own]}
    return [name for name in ids if name in tuning], [name for name in ids if name not in tuning]


def _groups(ids: Sequence[str], group: str | None) -> list[str]:
    """Return the group of each id."""
    if group is None:
        return list(ids)
    try:
        pattern = re.compile(group)
    except re.error as error:
        raise UsageError(f"--tune-group {group} is no regular expression: {error}") from error
    found = [pattern.search(name) for name in ids]
    parts = [match and match[1 if pattern.groups else 0] for match in found]
    without = [name for name, part in zip(ids, parts, strict=True) if not part]
    if without:
        raise DataError(
            f"--tune-group {group} matches nothing in {len(without)} of {len(ids)} ids ({join_some(without, 3)}): "
            "it must find the group of every id"
        )
    return [str(part) for part in parts]
