"""Score what follows a prompt: a caption that was generated from one begins with it, and no reference holds it."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from dataclasses import replace

from engine.errors import DataError
from engine.inputs.ids import join_some
from engine.scoring.base import Items

LEAST_WORDS, LEAST_IMAGES = 2, 5
"""Words that all captions of a run have in common at the start, and images of the run, before the two are noted."""


def remove_prompts(items: Items, prompts: Mapping[str, str], source: str) -> tuple[Items, str]:
    """Return items whose candidates lack the prompts of their ids, and a note; `source` is where the prompts are from.

    Captions remain as they are where none begins with its prompt. Raises DataError where only some do, which may be
    chance: then it is unknown which of them hold a prompt. Empty captions and prompts do not count.
    """
    prompted = {
        i: after_prompt(caption, prompts[name])
        for i, (name, caption) in enumerate(zip(items.ids, items.candidates, strict=True))
        if caption.strip() and prompts.get(name, "").strip()
    }
    others = [items.ids[i] for i, rest in prompted.items() if rest is None]
    if len(others) == len(prompted):
        return items, f"no caption begins with its prompt (from {source}): captions are scored as they are"
    if others:
        raise DataError(
            f"{len(prompted) - len(others)} captions begin with their prompt (from {source}), {len(others)} do not "
            f"({join_some(others, 3)}): give the run's prompts with --prompts, or --keep-prompt to score whole captions"
        )
    candidates = [caption if (rest := prompted.get(i)) is None else rest for i, caption in enumerate(items.candidates)]
    note = (
        f"{len(prompted)} captions begin with their prompt (from {source}): what follows it is scored; --keep-prompt "
        "scores whole captions"
    )
    return replace(items, candidates=candidates, how=f"{items.how}|prompt:removed"), note


def after_prompt(caption: str, prompt: str) -> str | None:
    """Return what follows the prompt, None where the caption does not begin with it.

    Case, accents and white space may differ: a tokenizer changes them.
    """
    wanted, seen = _letters(prompt), ""
    for end, character in enumerate(caption):
        if seen == wanted:
            return caption[end:].strip()
        seen += _letters(character)
        if not wanted.startswith(seen):
            return None
    return "" if seen == wanted else None


def common_start(items: Items) -> str:
    """Return the words that all captions and less than half of the references begin with, empty where there are none.

    They are likely to be a prompt.
    """
    captions = [caption.split() for caption in items.candidates if caption.strip()]
    if len(captions) < LEAST_IMAGES:
        return ""
    first, last = min(captions), max(captions)  # in order, all others are between the two
    count = next((i for i, pair in enumerate(zip(first, last, strict=False)) if pair[0] != pair[1]), len(first))
    start = " ".join(first[:count])
    references = [after_prompt(one, start) is not None for several in items.references for one in several]
    is_told = count >= LEAST_WORDS and first != last and sum(references) < len(references) / 2
    return start if is_told else ""


def _letters(text: str) -> str:
    decomposed = unicodedata.normalize("NFKD", text.casefold())
    return "".join(one for one in decomposed if not one.isspace() and not unicodedata.combining(one))
