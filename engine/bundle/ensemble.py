"""Several bundles that caption together: in each step their log-probabilities are averaged.

The mean is of log-probabilities, by weights that sum up to 1, and what a search sees as the logits of one model.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from engine.bundle.fetch import open_bundle
from engine.bundle.graphs import HALVES
from engine.bundle.manifest import Bundle
from engine.errors import BundleError, UsageError
from engine.inputs.remote import Location


@dataclass(frozen=True)
class Ensemble:
    """Where the bundles are, and the weight of each in the mean: equal ones where none are given.

    Raises UsageError for fewer than two bundles, for one twice, or for weights that are none.
    """

    bundles: tuple[Location, ...]
    weights: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if len(self.bundles) < 2:
            raise UsageError("bundles caption together from two on: leave the weight out, or give another --bundle")
        if len(set(self.bundles)) < len(self.bundles):
            raise UsageError("a bundle is given twice: give it once, with a larger --bundle-weight")
        if len(self.weights or self.bundles) != len(self.bundles):
            raise UsageError(
                f"{len(self.bundles)} bundles and {len(self.weights)} weights: give one --bundle-weight for each"
            )
        if not all(0 < weight < math.inf for weight in self.weights):
            raise UsageError(f"a --bundle-weight must be a number above 0: {', '.join(map(str, self.weights))}")
        object.__setattr__(self, "weights", self.weights or (1.0,) * len(self.bundles))

    def __str__(self) -> str:
        return " + ".join(map(str, self.bundles))


def shares(weights: Sequence[float]) -> list[float]:
    """Return weights divided by their sum: what each bundle counts in the mean."""
    return [weight / math.fsum(weights) for weight in weights]


BundlePlace = Location | Ensemble
"""Where a bundle is, or where several are that caption together."""


def place_of(bundles: Sequence[Location], weights: Sequence[float]) -> BundlePlace | None:
    """Return where to look for one bundle, or for several with their weights; None for none. Raises UsageError."""
    if len(bundles) < 2 and not weights:
        return bundles[0] if bundles else None
    return Ensemble(tuple(bundles), tuple(weights))


def absolute(place: BundlePlace | None) -> BundlePlace | None:
    """Return the same place for processes that run in another folder."""
    if isinstance(place, Ensemble):
        return replace(place, bundles=tuple(one.absolute() if isinstance(one, Path) else one for one in place.bundles))
    return place.absolute() if isinstance(place, Path) else place


def where_read(place: BundlePlace | None, bundle: Bundle) -> BundlePlace:
    """Return where a bundle that was opened at `place` lies on this machine: that of a URI is not asked for again."""
    if isinstance(place, Ensemble):
        return replace(place, bundles=tuple(member.path.absolute() for member in bundle.members))
    return bundle.path.absolute()


def folders_of(place: BundlePlace | None) -> list[Path]:
    """Return the local folders of a place."""
    places = place.bundles if isinstance(place, Ensemble) else (place,)
    return [one for one in places if isinstance(one, Path)]


def open_place(place: BundlePlace | None = None) -> Bundle:
    """Read and check a bundle, or all of an ensemble; the embedded demo when None. Raises BundleError."""
    if not isinstance(place, Ensemble):
        return open_bundle(place)
    return combine([open_bundle(one) for one in place.bundles], place.weights)


def on_halves(bundle: Bundle) -> Bundle | None:
    """Return a bundle as the only one of an ensemble: what it says beside others, to the same numbers. None where it
    cannot caption together with others.
    """
    return combine([bundle], [1.0]) if all(f"{graph}.onnx" in bundle.files for graph in HALVES) else None


def combine(bundles: Sequence[Bundle], weights: Sequence[float]) -> Bundle:
    """Return what bundles are together: the first one, with the others as its `members`, and a digest of its own.

    Settings for decoding are those of the first. Raises BundleError where bundles do not fit one another.
    """
    first = bundles[0]
    for bundle in bundles:
        for what, mine, other in (
            ("a tokenizer", bundle.files["tokenizer.json"], first.files["tokenizer.json"]),
            ("special tokens", bundle.tokens, first.tokens),
            ("a vocabulary", bundle.model.vocab_size, first.model.vocab_size),
            ("an image size", (bundle.image.height, bundle.image.width), (first.image.height, first.image.width)),
            ("a way of resizing", bundle.image.resample, first.image.resample),
            ("a way of writing", bundle.clean_up_tokenization_spaces, first.clean_up_tokenization_spaces),
        ):
            if mine != other:
                raise BundleError(f"{bundle.path} has {what} of its own: it cannot caption together with {first.path}")
        if missing := [f"{graph}.onnx" for graph in HALVES if f"{graph}.onnx" not in bundle.files]:
            raise BundleError(
                f"{bundle.path} was exported before bundles could caption together (no {', '.join(missing)}): export "
                "its checkpoint again"
            )
    named = "|".join(f"{bundle.digest}:{weight!r}" for bundle, weight in zip(bundles, weights, strict=True))
    positions = min(bundle.model.max_positions for bundle in bundles)
    precisions = [bundle.precision for bundle in bundles]
    return replace(
        first,
        precision="+".join(precisions if len(set(precisions)) > 1 else precisions[:1]),
        digest=hashlib.sha256(named.encode()).hexdigest(),
        model=replace(first.model, max_positions=positions),
        members=tuple(bundles),
        weights=tuple(weights),
    )
