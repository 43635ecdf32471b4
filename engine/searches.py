"""The search that options mean for a bundle, and where the captions of images with prompts of their own start."""

from __future__ import annotations

from collections.abc import Mapping

from engine.bundle.graphs import WITH_PENALTIES
from engine.bundle.manifest import Bundle
from engine.bundle.tokenizer import CaptionTokenizer
from engine.decoding.beam import Search, Start
from engine.decoding.resolve import resolve_search
from engine.errors import UsageError
from engine.options import DecodeOptions


def search_for(bundle: Bundle, tokenizer: CaptionTokenizer, options: DecodeOptions) -> Search:
    """Resolve options over a bundle's settings; raise UsageError where they do not fit it."""
    options = options.over(bundle.generation)
    if options.repetition_penalty != 1.0 and bundle.format < WITH_PENALTIES:
        raise UsageError(
            f"{bundle.path} was exported before its decoder knew a repetition penalty: export its checkpoint again"
        )
    return resolve_search(
        options,
        prompt=tokenizer.prompt_ids(options.prompt),
        bad_words_ids=tokenizer.bad_words_ids(options.bad_words or ()),
        eos=bundle.tokens.eos,
        vocab_size=bundle.model.vocab_size,
        max_positions=bundle.model.max_positions,
    )


def searches_for(
    bundle: Bundle, tokenizer: CaptionTokenizer, options: DecodeOptions, prompts: Mapping[str, str] | None
) -> tuple[Search, dict[str, Start] | None]:
    """Return the search that has room for all images, and where their captions start, by id (None: all alike).

    Raises UsageError for options or a prompt that do not fit the bundle.
    """
    if not prompts:
        return search_for(bundle, tokenizer, options), None
    if options.prompt:
        raise UsageError("a prompt for all images and prompts for each of them exclude each other: give one")
    of_prompt = {
        prompt: search_for(bundle, tokenizer, options.replace(prompt=prompt))
        for prompt in sorted(set(prompts.values()))
    }
    search = max(of_prompt.values(), key=lambda one: one.max_length)
    return search, {name: of_prompt[prompt].start for name, prompt in prompts.items()}
