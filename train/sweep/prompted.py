"""Captions that start from their images' prompts, as the sweep writes them: what follows the prompt.

Knows nothing of data sets and scores.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from engine.bundle.tokenizer import detokenise
from engine.captioner import Todo
from engine.captions import Alternative, Caption
from engine.options import DecodeOptions
from engine.run.source import LocalSource, Say


class PromptedSource(LocalSource):
    """A captioner in this process whose captions come without the prompts, which no reference holds."""

    def captions(self, options: DecodeOptions, todo: Todo, say: Say) -> Iterator[Caption]:
        """See Source.captions."""
        captions = super().captions(options, todo, say)
        _, starts = self._captioner.searches(options, todo.prompts)
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
