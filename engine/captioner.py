"""A loaded model that turns any images into captions; knows nothing of directories or output files."""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from engine.backends import Backend, open_backends, require_backend
from engine.backends.capacity import slots_for
from engine.bundle.ensemble import BundlePlace, open_place, place_of
from engine.bundle.manifest import Bundle
from engine.bundle.tokenizer import CaptionTokenizer, detokenise
from engine.captions import Alternative, Caption
from engine.decoding.backend import BatchSizes
from engine.decoding.beam import Hypothesis, Search, Start
from engine.decoding.scheduler import Scheduler, Waiting
from engine.errors import ImageError, OutOfMemoryError, UsageError
from engine.host import available_cores
from engine.inputs.images import ImageFile
from engine.inputs.kinds import cut_suffix
from engine.inputs.pixels import Picture, read_image
from engine.inputs.read_ahead import read_ahead
from engine.inputs.remote import Location, location
from engine.options import DecodeOptions
from engine.repeats import InOrder, Repeats
from engine.runtime import Runtime
from engine.searches import search_for, searches_for

ImageSource = ImageFile | Path | str | Image.Image | NDArray[np.uint8]

AHEAD = 4
"""Images read ahead for each reader, or for each one of a batch to encode, of which there are more on a GPU."""
FEWEST_READERS = 4
"""Threads that decode images at least, else one a core: Pillow releases the interpreter lock meanwhile."""


class Captioner:
    """A loaded bundle, ready to caption."""

    def __init__(self, bundle: Bundle, backend: Backend, *more_backends: Backend, threads: int | None = None) -> None:
        """`threads` is how many cores are this captioner's; all of them when None. With `more_backends`, all of the
        same bundle, each decodes a set of the images.
        """
        self._readers = max(FEWEST_READERS, threads or available_cores())
        self.clipped: list[str] = []
        """Names of the pictures read so far of whose more than 8 bits a channel only values up to 255 were kept."""
        self.bundle = bundle
        self.backend = backend
        self._more_backends = more_backends
        self._is_running = False
        self.tokenizer = CaptionTokenizer(bundle)

    @classmethod
    def load(
        cls,
        bundle: Location | str | Sequence[Location | str] | None = None,
        *,
        weights: Sequence[float] = (),
        backend: str = "auto",
        threads: int | None = None,
        streams: int | None = None,
        cpu_precision: str = "fp32",
        plans: Path | str | None = None,
        cuda_graphs: bool = False,
    ) -> Captioner:
        """Load a bundle from a directory or a URI (the embedded demo when None), with `threads` CPU threads.

        Several bundles caption together: in each step the mean of their log-probabilities counts, by `weights`.
        `streams` is for the backend `cpu`, `cpu_precision` (fp32 or bf16, which is not parity) for `cpu` and
        `openvino`, `plans` and `cuda_graphs` are for `trt`. Raises BundleError, BackendError or UsageError; see
        open_bundle and open_backends.
        """
        folder = None if plans is None else Path(plans)
        runtime = Runtime(
            backend,
            threads=threads,
            streams=streams,
            cpu_precision=cpu_precision,
            plans=folder,
            cuda_graphs=cuda_graphs,
        )
        several = [] if bundle is None else [bundle] if isinstance(bundle, Location | str) else bundle
        places = [location(one) if isinstance(one, str) else one for one in several]
        return cls.open(place_of(places, weights), runtime)

    @classmethod
    def open(cls, bundle: BundlePlace | None, runtime: Runtime) -> Captioner:
        """Load a bundle, or several that caption together, for a runtime; see load."""
        name = require_backend(runtime.backend, runtime.cpu_precision)  # what is missing is said at once
        runtime = replace(runtime, backend=name)
        checked = open_place(bundle)
        return cls(checked, *open_backends(checked, runtime), threads=runtime.threads)

    def caption(
        self,
        images: Iterable[ImageSource],
        options: DecodeOptions | None = None,
        *,
        rows: int | None = None,
        prompts: Mapping[str, str] | None = None,
        on_error: Callable[[ImageError], None] | None = None,
        **given: Any,
    ) -> Iterator[Caption]:
        """Caption images (paths, ImageFiles, Pillow images, arrays u8[h,w,3]) and yield a Caption each, in order.

        What `options` or keywords (num_beams=4) give lies over the bundle's settings, and these over Hugging Face's
        defaults, as on the command line. `prompts` are the texts captions start with, by the ids of their images,
        for all of them, instead of one for all. `rows` is how many beams are decoded side by side, None what suits
        device, bundle and memory. An unreadable image raises ImageError, or is passed to `on_error` and left out.
        Options that do not fit the bundle raise UsageError at once, not at the first caption. On a GPU, or with
        streams, one such iteration at a time: the device works ahead of what is read.
        """
        if isinstance(images, str | Path | Image.Image | np.ndarray):
            raise UsageError("caption takes several images: put a single one into a list")
        options = (options or DecodeOptions()).replace(**given)
        search, starts = self.searches(options, prompts)
        return self._caption(images, search, starts, rows, on_error)

    def _caption(
        self,
        images: Iterable[ImageSource],
        search: Search,
        starts: Mapping[str, Start] | None,
        rows: int | None,
        on_error: Callable[[ImageError], None] | None,
    ) -> Iterator[Caption]:
        repeats, captions = Repeats(), InOrder()

        def arrivals() -> Iterator[Waiting[bytes] | None]:
            """Yield what has to be decoded, None for what was met before: the same pixels with the same start."""
            for index, (name, pixels, digest) in enumerate(self._read(enumerate(images), on_error)):
                start = search.start if starts is None else starts.get(name)
                if start is None:
                    raise UsageError(f"no prompt is given for {name}: an empty one is none")
                key = digest if start == search.start else digest + repr(start.prompt).encode()
                if (known := repeats.known(key)) is not None:
                    captions.add(index, Caption(name, known, latency_s=0.0))
                    yield None
                else:
                    yield Waiting(key, pixels, start) if repeats.wait(key, index, name) else None

        if self._is_running and self.batch_sizes.sets > 1:
            raise UsageError("this captioner is captioning already: read those captions to their end first")
        self._is_running = True
        try:
            for closed in self.scheduler(search, rows).steps(arrivals()):
                for digest, hypotheses in closed:
                    alternatives = tuple(map(self._alternative, hypotheses))
                    for index, caption in repeats.resolve(digest, alternatives):
                        captions.add(index, caption)
                yield from captions.ready()
        finally:
            self._is_running = False

    @property
    def batch_sizes(self) -> BatchSizes:
        """What keeps all backends of this captioner busy."""
        sizes, streams = self.backend.batch_sizes, 1 + len(self._more_backends)
        return sizes if streams == 1 else replace(sizes, rows=streams * sizes.rows, sets=streams)

    @property
    def images_ahead(self) -> int:
        """How many images are read before they are decoded, at most."""
        return AHEAD * max(self._readers, self.backend.batch_sizes.encode_batch)

    def scheduler(self, search: Search, rows: int | None = None) -> Scheduler:
        """Return a scheduler with as many slots as `rows` beams need; None means what suits device and memory."""
        batch_sizes = self.batch_sizes
        slots = slots_for(search, self.bundle.models, batch_sizes, rows=rows)
        sets = min(slots, batch_sizes.sets)
        return Scheduler(
            self.backend,
            search,
            num_slots=-(-slots // sets),
            num_sets=sets,
            encode_batch=batch_sizes.encode_batch,
            more_backends=self._more_backends,
        )

    def search(self, options: DecodeOptions) -> Search:
        """Resolve options over this bundle's settings; raise UsageError where they do not fit it."""
        return search_for(self.bundle, self.tokenizer, options)

    def searches(
        self, options: DecodeOptions, prompts: Mapping[str, str] | None
    ) -> tuple[Search, dict[str, Start] | None]:
        """See searches_for."""
        return searches_for(self.bundle, self.tokenizer, options, prompts)

    def _read(
        self, sources: Iterable[tuple[int, ImageSource]], on_error: Callable[[ImageError], None] | None
    ) -> Iterator[tuple[str, NDArray[np.uint8], bytes]]:
        """Yield id, pixels u8[height,width,3] and their digest of the readable images, made ahead in threads."""
        spec = self.bundle.image

        def read(numbered: tuple[int, ImageSource]) -> tuple[str, NDArray[np.uint8] | ImageError, bytes]:
            number, source = numbered
            name, content, how = _identify(number, source)
            try:
                pixels = read_image(content, spec.height, spec.width, spec.resample, clipped=self.clipped, **how)
            except ImageError as error:
                return name, error, b""
            return name, pixels, _digest(pixels)

        for name, pixels, digest in read_ahead(read, sources, threads=self._readers, window=self.images_ahead):
            if isinstance(pixels, np.ndarray):
                yield name, pixels, digest
            elif on_error is None:
                raise pixels
            else:
                on_error(pixels)

    def _alternative(self, hypothesis: Hypothesis) -> Alternative:
        raw = self.tokenizer.decode(hypothesis.ids)
        return Alternative(detokenise(raw), raw, hypothesis.ids, hypothesis.sum_log_prob, hypothesis.score)


class Todo(Protocol):
    """Images that wait for captions."""

    def remaining(self) -> Iterator[ImageFile]:
        """Yield the images that have neither a caption nor failed."""
        ...

    @property
    def prompts(self) -> Mapping[str, str] | None:
        """The text each image's caption starts with, by id; None where they have one in common, or none."""
        ...

    def has(self, image_id: str) -> bool:
        """Return whether an image has its caption."""
        ...

    def fail(self, error: ImageError) -> None:
        """Note an image that cannot be read."""
        ...


def caption_within_memory(
    captioner: Captioner,
    options: DecodeOptions,
    remaining: Callable[[], Iterable[ImageFile]],
    *,
    prompts: Mapping[str, str] | None,
    on_error: Callable[[ImageError], None],
    rows: int | None,
    say: Callable[[str], None],
) -> Iterator[Caption]:
    """Caption what remains; where memory does not suffice, go on with half as many images side by side.

    `remaining` is asked again then, and must leave out what has been yielded; `say` gets a note of it before.
    Unreadable images go to `on_error`.
    """
    search, _ = captioner.searches(options, prompts)
    num_slots = captioner.scheduler(search, rows).side_by_side
    while True:
        gc.collect()  # an error holds on to the frames it came through, and these to the keys that did not fit
        try:
            rows = num_slots * search.num_beams
            yield from captioner.caption(remaining(), options, rows=rows, prompts=prompts, on_error=on_error)
            return
        except (OutOfMemoryError, MemoryError) as error:
            if num_slots == 1:
                reason = f" ({error})" if str(error) else ""  # a MemoryError of Python itself has no words
                raise OutOfMemoryError(
                    f"there is not enough memory for one image at a time{reason}: close other programs, or raise the "
                    "memory limit (ulimit -v, a container's)"
                ) from error
            say(f"memory is short with {num_slots} images side by side: going on with {num_slots // 2}")
            num_slots //= 2


def _digest(pixels: NDArray[np.uint8]) -> bytes:
    return hashlib.sha256(np.ascontiguousarray(pixels).reshape(-1).data).digest()  # without the interpreter lock


def _identify(number: int, source: ImageSource) -> tuple[str, Picture, dict[str, Any]]:
    """Return an image's id (the file's stem, or its running number without a file), what to read, and how."""
    if isinstance(source, ImageFile):
        return source.id, source.source, {"frame": source.frame, "depth": source.depth}
    return (cut_suffix(Path(source).name) if isinstance(source, Path | str) else str(number)), source, {}
