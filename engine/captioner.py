"""The search that options mean for a bundle, and where the captions of images with prompts of their own start."""

from __future__ import annotations

import gc
import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from engine.backends import Backend, open_backends, require_backend
from engine.backends.device import slots_for
from engine.bundle.manifest import WITH_PENALTIES, Bundle
from engine.bundle.open import BundlePlace, absolute, open_place, place_of
from engine.bundle.tokenizer import CaptionTokenizer, detokenise
from engine.captions import Alternative, Caption
from engine.decoding.backend import BatchSizes
from engine.decoding.beam import Hypothesis, Search, Start
from engine.decoding.resolve import resolve_search
from engine.decoding.scheduler import NOTHING_YET, Arrival, Request, Scheduler
from engine.errors import BundleError, ImageError, OutOfMemoryError, UsageError
from engine.host import available_cores
from engine.inputs.images import ImageFile
from engine.inputs.kinds import cut_suffix
from engine.inputs.pixels import CLIPPED, ImageNote, Picture, read_image, window_of
from engine.inputs.read_ahead import read_ahead, read_live
from engine.inputs.remote import Location, location
from engine.options import DecodeOptions
from engine.runtime import Runtime


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


REMEMBERED = 4096
"""Distinct images whose captions are kept for repeats: a few megabytes."""


class Repeats:
    """Equal pixels are captioned once; the last REMEMBERED captions are kept, so that memory does not grow."""

    def __init__(self) -> None:
        self._waiting: dict[bytes, list[tuple[int, str, str | None, float]]] = {}
        self._known: dict[bytes, tuple[Alternative, ...]] = {}

    @property
    def is_waiting(self) -> bool:
        """Whether any image waits for a caption."""
        return bool(self._waiting)

    def known(self, digest: bytes) -> tuple[Alternative, ...] | None:
        """Return what was said of these pixels, None where nothing was."""
        return self._known.get(digest)

    def wait(self, digest: bytes, index: int, name: str, file_sha256: str | None = None) -> bool:
        """Let image `index` wait for the caption of these pixels; return whether it is the first that does."""
        self._waiting.setdefault(digest, []).append((index, name, file_sha256, time.perf_counter()))
        return len(self._waiting[digest]) == 1

    def resolve(self, digest: bytes, alternatives: tuple[Alternative, ...]) -> Iterator[tuple[int, Caption]]:
        """Yield the index and the caption of every image that waited for these pixels."""
        now = time.perf_counter()
        self._known[digest] = alternatives
        if len(self._known) > REMEMBERED:
            del self._known[next(iter(self._known))]
        for index, name, file_sha256, since in self._waiting.pop(digest):
            yield index, Caption(name, alternatives, latency_s=now - since, file_sha256=file_sha256)


class InOrder:
    """Hands out captions in the order of their images."""

    def __init__(self) -> None:
        self._early: dict[int, Caption] = {}
        self._next = 0

    def add(self, index: int, caption: Caption) -> None:
        """Take in the caption of image `index`."""
        self._early[index] = caption

    def ready(self) -> Iterator[Caption]:
        """Yield the captions whose turn it is."""
        while self._next in self._early:
            yield self._early.pop(self._next)
            self._next += 1


ImageSource = ImageFile | Path | str | Image.Image | NDArray[np.uint8]

MOST_CLIPPED = 1000
"""Names that `Captioner.clipped` keeps."""
AHEAD = 4
"""Images read ahead for each reader, or for each one of a batch to encode, of which there are more on a GPU."""
FEWEST_READERS = 4
"""Threads that decode images at least, else one a core: Pillow releases the interpreter lock meanwhile."""


class _Reading(NamedTuple):
    """What Captioner.caption was asked about reading; see there."""

    on_error: Callable[[ImageError], None] | None
    on_note: Callable[[ImageNote], None] | None
    high_bit_depth: str | None
    live: bool


class _Read(NamedTuple):
    """An image: its id, pixels u8[height,width,3] or why it cannot be read, their digest, the sha256 of its file, and
    what was dropped.
    """

    name: str
    pixels: NDArray[np.uint8] | ImageError
    digest: bytes = b""
    file_sha256: str | None = None
    notes: Sequence[ImageNote] = ()


class Captioner:
    """A loaded bundle, ready to caption.

    It can be pickled and copied: the copy loads the same bundle again. As a context manager it is closed at the end.
    """

    def __init__(self, bundle: Bundle, backend: Backend, *more_backends: Backend, threads: int | None = None) -> None:
        """`threads` is how many cores are this captioner's; all of them when None. With `more_backends`, all of the
        same bundle, each decodes a set of the images.
        """
        self._readers = max(FEWEST_READERS, threads or available_cores())
        self.clipped: list[str] = []
        """Names of the images of the latest call of which values above 255 became white; at most MOST_CLIPPED."""
        self._origin: tuple[BundlePlace | None, Runtime] | None = None
        self._is_closed = False
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
        captioner = cls(checked, *open_backends(checked, runtime), threads=runtime.threads)
        captioner._origin = absolute(bundle), runtime
        return captioner

    def __reduce__(self) -> tuple[Callable[..., Captioner], tuple[BundlePlace | None, Runtime, str]]:
        if self._origin is None:
            raise TypeError("this captioner was built from open parts and cannot be pickled: use Captioner.load")
        return _reopen, (*self._origin, self.bundle.digest)

    def close(self) -> None:
        """Free the model's memory, once captions that are being read have come to their end; close again at will."""
        self._is_closed = True
        self._more_backends = ()
        if "backend" in self.__dict__:
            del self.backend

    def __enter__(self) -> Captioner:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def caption(
        self,
        images: Iterable[ImageSource],
        options: DecodeOptions | None = None,
        *,
        rows: int | None = None,
        prompts: Mapping[str, str] | None = None,
        on_error: Callable[[ImageError], None] | None = None,
        on_note: Callable[[ImageNote], None] | None = None,
        high_bit_depth: str | None = None,
        live: bool = False,
        **given: Any,
    ) -> Iterator[Caption]:
        """Caption images (paths, ImageFiles, Pillow images, arrays u8[h,w,3]) and yield a Caption each, in order.

        Keywords (num_beams=4) override `options`, which override the bundle's settings, which override Hugging Face's
        defaults, as on the command line. `prompts` are the texts captions start with, by the ids of their images,
        for all of them, instead of one for all. `rows` is how many beams are decoded in parallel, None what suits
        device, bundle and memory. On a GPU, or with streams, one such iteration at a time: the device works ahead of
        what is read.

        Images are read ahead of the captions, so a source must not wait for one. With `live` it may: images are taken
        from it in a thread of its own, and what has arrived is captioned while it waits. `rows=8` then keeps the time
        of a single image short.

        `high_bit_depth` says how more than 8 bits a channel, or floats, become 8 bits: "scale" (the image's own range),
        "LOW,HIGH" or "clip" (values above 255 white). Without it, paths are clipped as on the command line, and Pillow
        images and arrays of such numbers are refused.

        An unreadable image raises ImageError, or is passed to `on_error` and left out. `on_note` gets what was dropped
        from an image that was read: transparency, values above 255, further frames. Options that do not fit the bundle
        raise UsageError at once, not at the first caption.
        """
        if self._is_closed:
            raise UsageError("this captioner is closed: load it again")
        if isinstance(images, str | Path | Image.Image | np.ndarray):
            raise UsageError("caption takes several images: put a single one into a list")
        if high_bit_depth is not None:
            window_of(high_bit_depth)  # refuses what is neither a word nor a window
        options = (options or DecodeOptions()).replace(**given)
        search, starts = self.searches(options, prompts)
        reading = _Reading(on_error, on_note, high_bit_depth, live)
        return self._caption(images, search, starts, rows, reading)

    def _caption(
        self,
        images: Iterable[ImageSource],
        search: Search,
        starts: Mapping[str, Start] | None,
        rows: int | None,
        reading: _Reading,
    ) -> Iterator[Caption]:
        repeats, captions = Repeats(), InOrder()
        known_before = NOTHING_YET if reading.live else None  # of a live source its caption must leave at once

        def arrivals() -> Iterator[Arrival[bytes]]:
            """Yield what has to be decoded, None for what was met before: the same pixels with the same start."""
            index = -1
            for image in self._read(enumerate(images), reading, may_wait=lambda: not repeats.is_waiting):
                if image is None:
                    yield NOTHING_YET
                    continue
                index, (name, pixels, digest, file_sha256) = index + 1, image
                start = search.start if starts is None else starts.get(name)
                if start is None:
                    raise UsageError(f"no prompt is given for {name}: an empty one is none")
                key = digest if start == search.start else digest + repr(start.prompt).encode()
                if (known := repeats.known(key)) is not None:
                    captions.add(index, Caption(name, known, latency_s=0.0, file_sha256=file_sha256))
                    yield known_before
                else:
                    is_first = repeats.wait(key, index, name, file_sha256)
                    yield Request(key, pixels, start) if is_first else None

        if self._is_running and self.batch_sizes.sets > 1:
            raise UsageError("this captioner is captioning already: read those captions to their end first")
        self._is_running, self.clipped = True, []
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
        self, sources: Iterable[tuple[int, ImageSource]], reading: _Reading, may_wait: Callable[[], bool]
    ) -> Iterator[tuple[str, NDArray[np.uint8], bytes, str | None] | None]:
        """Yield id, pixels u8[height,width,3], their digest and the file's sha256 of the readable images.

        They are read ahead in threads. Yield None while a live source has nothing and `may_wait()` is false.
        """
        spec = self.bundle.image

        def read(numbered: tuple[int, ImageSource]) -> _Read:
            number, source = numbered
            name, content, how = _identify(number, source, reading.high_bit_depth)
            is_file = isinstance(source, ImageFile | Path | str)
            notes: list[ImageNote] = []
            sha256: list[str] = []
            how |= {"notes": notes, "sha256": sha256}
            try:
                pixels = read_image(content, spec.height, spec.width, spec.resample, **how)
            except ImageError as error:
                return _Read(name, error if is_file else ImageError(f"image {name}", error.reason))
            named = notes if is_file else [note._replace(name=name) for note in notes]
            return _Read(name, pixels, _digest(pixels), sha256[-1] if sha256 else None, named)

        bounds = {"threads": self._readers, "window": self.images_ahead}
        found: Iterator[_Read | None]
        if reading.live:
            found = read_live(read, sources, may_wait=may_wait, **bounds)
        else:
            found = read_ahead(read, sources, **bounds)
        for image in found:
            if image is None:
                yield None
                continue
            for note in image.notes:
                self._note(note, reading)
            if isinstance(image.pixels, np.ndarray):
                yield image.name, image.pixels, image.digest, image.file_sha256
            elif reading.on_error is None:
                raise image.pixels
            else:
                reading.on_error(image.pixels)

    def _note(self, note: ImageNote, reading: _Reading) -> None:
        if note.kind == CLIPPED and len(self.clipped) < MOST_CLIPPED:
            self.clipped.append(note.name)
        if reading.on_note is not None:
            reading.on_note(note)

    def _alternative(self, hypothesis: Hypothesis) -> Alternative:
        raw = self.tokenizer.decode(hypothesis.ids)
        return Alternative(detokenise(raw), raw, hypothesis.ids, hypothesis.sum_log_prob, hypothesis.score)


class PendingImages(Protocol):
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
    on_note: Callable[[ImageNote], None],
    rows: int | None,
    log: Callable[[str], None],
) -> Iterator[Caption]:
    """Caption what remains; where memory does not suffice, go on with half as many images side by side.

    `remaining` is asked again then, and must leave out what has been yielded; `log` gets a note of it before.
    Unreadable images go to `on_error`, what was dropped from the others to `on_note`.
    """
    search, _ = captioner.searches(options, prompts)
    num_slots = captioner.scheduler(search, rows).concurrency
    while True:
        gc.collect()  # an error holds on to the frames it came through, and these to the keys that did not fit
        try:
            rows = num_slots * search.num_beams
            images = remaining()
            yield from captioner.caption(
                images, options, rows=rows, prompts=prompts, on_error=on_error, on_note=on_note
            )
            return
        except (OutOfMemoryError, MemoryError) as error:
            if num_slots == 1:
                reason = f" ({error})" if str(error) else ""  # a MemoryError of Python itself has no words
                raise OutOfMemoryError(
                    f"there is not enough memory for one image at a time{reason}: close other programs, or raise the "
                    "memory limit (ulimit -v, a container's)"
                ) from error
            log(f"memory is short with {num_slots} images side by side: going on with {num_slots // 2}")
            num_slots //= 2


def _digest(pixels: NDArray[np.uint8]) -> bytes:
    return hashlib.sha256(np.ascontiguousarray(pixels).reshape(-1).data).digest()  # without the interpreter lock


def _identify(number: int, source: ImageSource, depth: str | None) -> tuple[str, Picture, dict[str, Any]]:
    """Return an image's id (the file's stem, or its running number without a file), what to read, and how."""
    if isinstance(source, ImageFile):
        return source.id, source.source, {"frame": source.frame, "depth": source.depth}
    name = cut_suffix(Path(source).name) if isinstance(source, Path | str) else str(number)
    return name, source, {"depth": depth}


def _reopen(bundle: BundlePlace | None, runtime: Runtime, digest: str) -> Captioner:
    """Load the captioner of a pickle. Raises BundleError if the bundle is not the pickled one any more."""
    captioner = Captioner.open(bundle, runtime)
    if captioner.bundle.digest != digest:
        raise BundleError(f"{captioner.bundle.path} is not the bundle that was pickled: load it with Captioner.load")
    return captioner
