"""Captioner, the Python API: load a bundle and caption images, equal ones only once, in order."""

from __future__ import annotations

import gc
import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from engine.attention import words_of
from engine.backends import Backend, open_backends, resolve_runtime
from engine.backends.attention import grid_of, layers_of, require_attention
from engine.backends.device import slots_for
from engine.bundle.manifest import WITH_PENALTIES, Bundle
from engine.bundle.open import BundleRef
from engine.bundle.tokenizer import CaptionTokenizer
from engine.captions import REMEMBERED, REMEMBERED_MAPS, Alternative, Attention, Caption, Finished, InOrder, Repeats
from engine.checkpoints.cache import ModelRef
from engine.decoding.backend import AttentionBackend, BatchSizes
from engine.decoding.beam import Hypothesis, Search, Start, resolve_search
from engine.decoding.scheduler import NOTHING_YET, Arrival, Request, Scheduler
from engine.errors import BundleError, ImageError, OutOfMemoryError, UsageError
from engine.host import available_cores
from engine.inputs.images import ImageFile
from engine.inputs.kinds import cut_suffix
from engine.inputs.pixels import CLIPPED, ImageInput, ImageNote, read_image
from engine.inputs.read_ahead import read_ahead, read_live
from engine.inputs.remote import Location
from engine.options import DecodeOptions, window_of
from engine.runtime import Runtime, divide_precision


def search_for(bundle: Bundle, tokenizer: CaptionTokenizer, options: DecodeOptions) -> Search:
    """Return the Search of options that override a bundle's settings. Raises UsageError if they do not fit it."""
    options = options.over(bundle.generation)
    if options.repetition_penalty != 1.0 and bundle.format < WITH_PENALTIES:
        raise UsageError(
            f"{bundle.path} was exported before its decoder supported a repetition penalty: export its checkpoint again"
        )
    return resolve_search(
        options,
        prompt=tokenizer.prompt_ids(options.prompt, options.forced_bos_token_id),
        bad_words_ids=tokenizer.bad_words_ids(options.bad_words or ()),
        eos=bundle.tokens.eos,
        vocab_size=bundle.model.vocab_size,
        max_positions=bundle.model.max_positions,
    )


@dataclass(frozen=True)
class Decoding:
    """How images are decoded, resolved once: workers get it with their order.

    options    the options in force
    search     their search; with a prompt per image, one that is long enough for all
    starts     the Start of each image by id, or None if all have that of the search
    attention  decoder layers whose mean attention every caption gets, or None for captions without
    """

    options: DecodeOptions
    search: Search
    starts: Mapping[str, Start] | None = None
    attention: tuple[int, ...] | None = None


def resolve(
    bundle: Bundle, tokenizer: CaptionTokenizer, requested: DecodeOptions, prompts: Mapping[str, str] | None = None
) -> Decoding:
    """Resolve options that override a bundle's settings, with one prompt for all images or `prompts` by image id.

    Raises UsageError if an option or a prompt does not fit the bundle.
    """
    options = requested.over(bundle.generation)
    if not prompts:
        return Decoding(options, search_for(bundle, tokenizer, options))
    if options.prompt:
        raise UsageError("one prompt for all images and a prompt per image exclude each other: give one")
    search_of = {
        prompt: search_for(bundle, tokenizer, options.replace(prompt=prompt))
        for prompt in sorted(set(prompts.values()))
    }
    # The searches differ in their prompts and lengths, of which the longest has room for all, and in the first token,
    # which is forced only without a prompt.
    search = max(search_of.values(), key=lambda search: search.max_length)
    forced = (one.forced_first for one in search_of.values() if one.forced_first is not None)
    search = replace(search, forced_first=next(forced, None))
    return Decoding(options, search, {name: search_of[prompt].start for name, prompt in prompts.items()})


ImageSource = ImageFile | Path | str | Image.Image | NDArray[np.uint8]

MOST_CLIPPED = 1000
"""Maximum number of names that `Captioner.clipped` keeps."""
AHEAD = 4
"""Images read ahead per reader thread, or per image of an encoder batch if that is larger, as on a GPU."""
FEWEST_READERS = 4
"""Minimum number of threads that decode images, otherwise one per core: Pillow releases the GIL while decoding."""


class _Reading(NamedTuple):
    """Arguments of Captioner.caption that concern reading images."""

    on_error: Callable[[ImageError], None] | None
    on_note: Callable[[ImageNote], None] | None
    high_bit_depth: str | None
    live: bool


class _Read(NamedTuple):
    """An image that was read, or that cannot be read.

    name         id
    pixels       u8[height,width,3], or the error
    digest       sha256 of the pixels
    file_sha256  sha256 of the file in hexadecimal, or None if there is no file
    notes        what was dropped, such as transparency
    """

    name: str
    pixels: NDArray[np.uint8] | ImageError
    digest: bytes = b""
    file_sha256: str | None = None
    notes: Sequence[ImageNote] = ()


def _silent(line: str) -> None:
    """Log nothing."""


class Captioner:
    """A loaded bundle, ready to caption images.

    A captioner can be pickled and copied; the copy loads the same bundle again. As a context manager it closes itself.

        with Captioner.load("bundle") as captioner:
            for caption in captioner.caption(["a.png", "b.png"], num_beams=4):
                print(caption.id, caption.text)
    """

    def __init__(self, bundle: Bundle, backend: Backend, *more_backends: Backend, threads: int | None = None) -> None:
        """Create a captioner from open parts; use `load` instead.

        `threads` is the number of cores it may use (None: all). With `more_backends`, which must have loaded the same
        bundle, the images are divided among the backends.
        """
        self._readers = max(FEWEST_READERS, threads or available_cores())
        self.clipped: list[str] = []
        """Names of images of the latest call with values above 255, which became white; at most MOST_CLIPPED."""
        self._origin: tuple[BundleRef, Runtime] | None = None
        self._is_closed = False
        self.bundle = bundle
        self.backend = backend
        self._more_backends = more_backends
        self._is_running = False
        self._attention_layers: list[tuple[int, ...]] = []
        self.tokenizer = CaptionTokenizer(bundle)

    @classmethod
    def load(
        cls,
        bundle: Location | str | Sequence[Location | str] | None = None,
        *,
        weights: Sequence[float] = (),
        precision: str | None = None,
        image_size: int | None = None,
        task: str | None = None,
        backend: str = "auto",
        threads: int | None = None,
        streams: int | None = None,
        cpu_precision: str = "fp32",
        device: str | None = None,
        plans: Path | str | None = None,
        cuda_graphs: bool = False,
    ) -> Captioner:
        """Load a model: a bundle (directory or URI), a checkpoint, or None for the embedded demo.

        A checkpoint is a directory, a .pth file, or an id on the Hugging Face Hub such as
        `Salesforce/blip-image-captioning-base` or `owner/name@revision`. It is converted to a bundle once and then
        taken from the cache, without asking the hub. The logger `engine` gets a line for each step. Several models are
        averaged: each step uses the mean of their log-probabilities, weighted by `weights`.

        precision      fp32 (default), fp16 or int8, for checkpoints; for `torch` also bf16, see cpu_precision
        image_size     image height and width in pixels, for checkpoints; by default the checkpoint's own
        task           what Florence-2 writes: caption (default), detailed-caption or more-detailed-caption
        backend        auto, cpu, openvino, cuda, tensorrt, trt or torch; auto takes `cuda` if it works, else `cpu`
        threads        number of CPU threads (None: all cores)
        streams        number of parallel decoding streams, for `cpu` (None: one, or one per 8 threads). With 2 threads,
                       2 make long runs faster, and a single image slower; `engine caption` uses 2
        cpu_precision  fp32, or bf16 (captions may differ), for `cpu` and `openvino`; for `torch` fp16 or bf16, which
                       round a float32 bundle when it is loaded (`precision` is another name for it there)
        device         cuda, cuda:N, xpu, mps or cpu, for `torch`; by default the first that torch finds
        plans          folder written by `engine plan`, for `trt`
        cuda_graphs    whether to replay decoding steps as CUDA graphs, for `trt`

        Raises BundleError, CheckpointError, BackendError or UsageError.
        """
        folder = None if plans is None else Path(plans)
        precision, cpu_precision = divide_precision(backend, precision, cpu_precision)
        runtime = Runtime(
            backend,
            threads=threads,
            streams=streams,
            cpu_precision=cpu_precision,
            device=device,
            plans=folder,
            cuda_graphs=cuda_graphs,
        )
        names = [] if bundle is None else [bundle] if isinstance(bundle, Location | str) else bundle
        if bundle is not None and (not names or "" in names):
            raise UsageError("no bundle is given: pass its folder, or None for the embedded demo")
        models = ModelRef(tuple(names), tuple(weights), precision, image_size, task)
        return cls.open(models, runtime, logging.getLogger("engine").info)

    @classmethod
    def open(
        cls,
        bundle: BundleRef | ModelRef,
        runtime: Runtime,
        log: Callable[[str], None] = _silent,
        *,
        many_images: bool = False,
    ) -> Captioner:
        """Load a bundle, or several that are averaged, for a runtime; see load, and open_backends for `many_images`.

        `log` gets the steps of a conversion.
        """
        # before the bundle is read, so that a missing library is reported at once
        runtime = resolve_runtime(runtime)
        bundle = bundle.located(log)
        checked = bundle.open()
        captioner = cls.of(checked, runtime, many_images=many_images)
        captioner._origin = bundle.absolute(), runtime
        return captioner

    @classmethod
    def of(cls, bundle: Bundle, runtime: Runtime, *, many_images: bool = False) -> Captioner:
        """Load the graphs of a checked bundle for a runtime; see open_backends for `many_images`."""
        return cls(bundle, *open_backends(bundle, runtime, many_images=many_images), threads=runtime.threads)

    def __reduce__(self) -> tuple[Callable[..., Captioner], tuple[BundleRef, Runtime, str]]:
        if self._origin is None:
            raise TypeError("this captioner was created from open parts and cannot be pickled: use Captioner.load")
        return _reopen, (*self._origin, self.bundle.digest)

    def close(self) -> None:
        """Free the model's memory, as soon as captions that are being read are finished. Closing twice is allowed."""
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
        attention: bool | Sequence[int] | None = False,
        **given: Any,
    ) -> Iterator[Caption]:
        """Caption images (paths, ImageFiles, Pillow images, arrays u8[h,w,3]); yield one Caption per image, in order.

        Keywords (num_beams=4) override `options`, which override the bundle's settings, which override Hugging Face's
        defaults, as on the command line. A keyword of None is not given.

        rows            number of beams in flight (None: what suits device, bundle and memory)
        prompts         the text that each caption starts with, by image id, for every image; instead of one `prompt`
        on_error        gets the ImageError of each unreadable image, which is skipped; without it the error is raised
        on_note         gets what was dropped from an image: transparency, values above 255, further frames
        high_bit_depth  how images with more than 8 bits per channel, or floats, become 8 bits: "scale" (the image's own
                        range), "LOW,HIGH" or "clip" (values above 255 become white). By default files are clipped as on
                        the command line, and such Pillow images and arrays raise ImageError
        live            whether `images` may wait for captions, see below
        attention       whether captions have their Attention, averaged over all decoder layers or over those listed,
                        counted from 0; on the backends cpu and torch

        Images are read ahead of the captions, so that `images` must not wait for a caption. With `live` it may: a
        separate thread reads from it, and images that have arrived are captioned while it waits. Then `rows=8` keeps
        the latency of a single image low.

        On a GPU, or with streams, only one iteration may run at a time, because the device works ahead of it. Options
        that do not fit the bundle raise UsageError at the call, not at the first caption.
        """
        self._require_open()
        if isinstance(images, str | Path | Image.Image | np.ndarray):
            raise UsageError("caption expects an iterable of images: put a single image into a list")
        if high_bit_depth is not None:
            window_of(high_bit_depth)  # raises UsageError for an invalid value
        options = (options or DecodeOptions()).replace(**{k: v for k, v in given.items() if v is not None})
        reading = _Reading(on_error, on_note, high_bit_depth, live)
        decoding = self.decoding(options, prompts)
        if attention is not None and attention is not False:
            layers = self.attention_layers(None if attention is True else attention)
            decoding = replace(decoding, attention=layers)
        return self._caption(images, decoding, rows, reading)

    def attention_layers(self, layers: Sequence[int] | None = None) -> tuple[int, ...]:
        """Return the decoder layers that attention is averaged over; None stands for all.

        Raises UsageError if the bundle lacks one, or if this bundle or backend does not support attention maps.
        """
        require_attention(self.bundle, self.backend.name)
        return layers_of(self.bundle, layers)

    def _caption(
        self, images: Iterable[ImageSource], decoding: Decoding, rows: int | None, reading: _Reading
    ) -> Iterator[Caption]:
        search, starts = decoding.search, decoding.starts
        repeats = Repeats(REMEMBERED if decoding.attention is None else REMEMBERED_MAPS)
        captions = InOrder()
        # NOTHING_YET returns control at once, so that a live source gets a known caption without delay
        known_before = NOTHING_YET if reading.live else None

        def arrivals() -> Iterator[Arrival[bytes]]:
            """Yield a Request for each image to decode, None for pixels that were seen before with the same start."""
            index = -1
            for image in self._read(enumerate(images), reading, may_wait=lambda: not repeats.is_waiting):
                if image is None:
                    yield NOTHING_YET
                    continue
                index, (name, pixels, digest, file_sha256) = index + 1, image
                start = search.start if starts is None else starts.get(name)
                if start is None:
                    raise UsageError(f"image {name} has no prompt: add one, which may be empty")
                # it seeds samples, so it depends on nothing but the image and its prompt
                key = digest if len(start.prompt) == 1 else digest + repr(start.prompt).encode()
                if (known := repeats.known(key)) is not None:
                    captions.add(index, known.caption_of(name, 0.0, file_sha256))
                    yield known_before
                else:
                    is_first = repeats.wait(key, index, name, file_sha256)
                    yield Request(key, pixels, start) if is_first else None

        self._require_open()
        if self._is_running and self.batch_sizes.sets > 1:
            raise UsageError("this captioner is already captioning: read those captions to the end first")
        layers = decoding.attention
        if layers is not None and any(other != layers for other in self._attention_layers):
            raise UsageError("this captioner already gives attention of other layers: read those captions to the end")
        self._attention_layers += [] if layers is None else [layers]
        self._is_running, self.clipped = True, []
        try:
            for closed in self.scheduler(search, rows, attention=decoding.attention).steps(arrivals()):
                for digest, hypotheses in closed:
                    finished = Finished(
                        tuple(map(self._alternative, hypotheses)), self._attention(hypotheses[0], decoding.attention)
                    )
                    for index, caption in repeats.resolve(digest, finished):
                        captions.add(index, caption)
                yield from captions.ready()
        finally:
            self._is_running = False
            if layers is not None:
                self._attention_layers.remove(layers)

    def _require_open(self) -> None:
        if self._is_closed:
            raise UsageError("this captioner is closed: load it again")

    @property
    def batch_sizes(self) -> BatchSizes:
        """Batch sizes that keep all backends of this captioner busy."""
        sizes, streams = self.backend.batch_sizes, 1 + len(self._more_backends)
        if streams == 1:
            return sizes
        # streams that share a backend share its rows: the same memory as one stream of all threads
        distinct = len({id(backend) for backend in (self.backend, *self._more_backends)})
        return replace(sizes, rows=distinct * sizes.rows, sets=streams)

    @property
    def images_ahead(self) -> int:
        """Maximum number of images that are read ahead of decoding."""
        return AHEAD * max(self._readers, self.backend.batch_sizes.encode_batch)

    def scheduler(
        self, search: Search, rows: int | None = None, *, attention: Sequence[int] | None = None
    ) -> Scheduler:
        """Return a scheduler with slots for `rows` beams in flight (None: what suits device and memory).

        With `attention`, hypotheses have their attention, averaged over these decoder layers.
        """
        if attention is not None:
            require_attention(self.bundle, self.backend.name)
            for backend in (self.backend, *self._more_backends):
                cast("AttentionBackend", backend).prepare_attention(attention)
        batch_sizes = self.batch_sizes
        slots = slots_for(search, self.bundle.models, batch_sizes, rows=rows)
        sets = min(slots, batch_sizes.sets)
        return Scheduler(
            self.backend,
            search,
            num_slots=-(-slots // sets),
            num_sets=sets,
            # no more than there are slots for, so that fewer slots after an out-of-memory error need less here, too
            encode_batch=min(batch_sizes.encode_batch, slots),
            more_backends=self._more_backends,
            with_attention=attention is not None,
        )

    def search(self, options: DecodeOptions) -> Search:
        """Return the Search of options that override the bundle's settings. Raises UsageError if they do not fit it."""
        return search_for(self.bundle, self.tokenizer, options)

    def decoding(self, options: DecodeOptions, prompts: Mapping[str, str] | None = None) -> Decoding:
        """See resolve."""
        return resolve(self.bundle, self.tokenizer, options, prompts)

    def _read(
        self, sources: Iterable[tuple[int, ImageSource]], reading: _Reading, may_wait: Callable[[], bool]
    ) -> Iterator[tuple[str, NDArray[np.uint8], bytes, str | None] | None]:
        """Read images ahead in threads; yield (id, pixels u8[height,width,3], their digest, the file's sha256).

        Unreadable images are skipped or raised, see caption. Yields None while a live source has no image and
        `may_wait()` is false.
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
                pixels = read_image(content, spec.height, spec.width, spec.resample, resize=spec.resize, **how)
            except ImageError as error:
                return _Read(name, error if is_file else ImageError(f"image {name}", error.reason))
            named = notes if is_file else [note._replace(name=name) for note in notes]
            return _Read(name, pixels, _digest(pixels), sha256[-1] if sha256 else None, named)

        bounds = {"threads": self._readers, "window": self.images_ahead}
        images: Iterator[_Read | None]
        if reading.live:
            images = read_live(read, sources, may_wait=may_wait, **bounds)
        else:
            images = read_ahead(read, sources, **bounds)
        for image in images:
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

    def _attention(self, hypothesis: Hypothesis, layers: tuple[int, ...] | None) -> Attention | None:
        """Return the attention of a hypothesis over the encoder's grid."""
        if layers is None or hypothesis.attention is None:
            return None
        rows, columns, first = grid_of(self.bundle)
        tokens, image = hypothesis.ids[1:], self.bundle.image
        words, word_of = words_of(tokens, lambda ids: self.tokenizer.tidy(self.tokenizer.decode(ids)))
        maps = hypothesis.attention[:, first:].reshape(-1, rows, columns).astype(np.float16)
        crop = (image.height, image.width, *image.resize) if image.resize else ()
        return Attention(tokens, maps, words, word_of, layers, crop)

    def _alternative(self, hypothesis: Hypothesis) -> Alternative:
        raw = self.tokenizer.decode(hypothesis.ids)
        return Alternative(
            self.tokenizer.tidy(raw),
            raw,
            hypothesis.ids,
            hypothesis.sum_log_prob,
            hypothesis.score,
            hypothesis.token_log_probs,
        )


class PendingImages(Protocol):
    """The images of a run that still need a caption, as a Source sees them."""

    def remaining(self) -> Iterator[ImageFile]:
        """Yield the images that have neither a caption nor failed."""
        ...

    def fail(self, error: ImageError) -> None:
        """Record an image that cannot be read."""
        ...


def caption_within_memory(
    captioner: Captioner,
    decoding: Decoding,
    remaining: Callable[[], Iterable[ImageFile]],
    *,
    on_error: Callable[[ImageError], None],
    on_note: Callable[[ImageNote], None],
    rows: int | None,
    log: Callable[[str], None],
) -> Iterator[Caption]:
    """Caption the `remaining` images; if memory runs out, continue with half as many images in parallel.

    `remaining` is then called again and must not return images whose captions were yielded; `log` gets a note first.
    Raises OutOfMemoryError if memory does not suffice for one image. See Captioner.caption for the other arguments.
    """
    search, reading = decoding.search, _Reading(on_error, on_note, high_bit_depth=None, live=False)
    num_slots = captioner.scheduler(search, rows, attention=decoding.attention).concurrency
    while True:
        # the error of the last attempt holds its frames, and these the KV cache that did not fit: free them first
        gc.collect()
        try:
            yield from captioner._caption(remaining(), decoding, num_slots * search.num_beams, reading)
            return
        except (OutOfMemoryError, MemoryError) as error:
            if num_slots == 1:
                reason = f" ({error})" if str(error) else ""  # Python's own MemoryError has no message
                raise OutOfMemoryError(
                    f"there is not enough memory for one image at a time{reason}: close other programs, or raise the "
                    "memory limit (`ulimit -v`, or the container's)"
                ) from error
            log(f"note: memory is short with {num_slots} images in parallel: continuing with {num_slots // 2}")
            num_slots //= 2


def _digest(pixels: NDArray[np.uint8]) -> bytes:
    return hashlib.sha256(np.ascontiguousarray(pixels).reshape(-1).data).digest()  # releases the GIL


def _identify(number: int, source: ImageSource, depth: str | None) -> tuple[str, ImageInput, dict[str, Any]]:
    """Return an image's id (the file's stem, or its running number without a file), what to read, and how."""
    if isinstance(source, ImageFile):
        return source.id, source.source, {"frame": source.frame, "depth": source.depth}
    name = cut_suffix(Path(source).name) if isinstance(source, Path | str) else str(number)
    return name, source, {"depth": depth}


def _reopen(bundle: BundleRef, runtime: Runtime, digest: str) -> Captioner:
    """Load the captioner of a pickle. Raises BundleError if the bundle has changed since."""
    captioner = Captioner.open(bundle, runtime)
    if captioner.bundle.digest != digest:
        raise BundleError(f"{captioner.bundle.path} is not the bundle that was pickled: load it with Captioner.load")
    return captioner
