"""Bundles: graph, input and output names, the manifest, the check of all files, and a watch for later changes.

For the shapes of inputs and outputs see export/graphs.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np

from engine.bundle.onnx import may_loop
from engine.errors import BundleError, EngineError, UsageError
from engine.files.atomic import file_sha256
from engine.inputs.kinds import HEAD_BYTES, wrong_content
from engine.options import PRECISIONS, DecodeOptions, options_from

GRAPHS = ("encoder", "decoder", "regroup")
LOG_PROBS, CHOICE = "log_probs", "choice"
"""The split decoder of ensembles: one graph computes log-probabilities, the other chooses candidates from them."""
HALVES = (LOG_PROBS, CHOICE)

STEP_INPUTS: dict[str, type[np.generic]] = {
    "input_ids": np.int64,
    "positions": np.int64,
    "scores": np.float32,
    "marked_ids": np.int64,
    "penalties": np.float32,
    "ancestry": np.bool_,
}
"""Inputs of the decoder that the host sends at every step: name -> dtype, see engine.decoding.backend.StepInputs."""
WITH_PENALTIES = 2
"""First bundle format whose decoder supports penalties. Before it, the input was `banned_ids`, without `penalties`."""
LOG_PROBS_INPUTS, CHOICE_INPUTS = ("input_ids", "positions", "ancestry"), ("scores", "marked_ids", "penalties")
"""The step inputs of the two graphs of the split decoder."""
NUM_CANDIDATES = "num_candidates"
TASK_IDS = "task_ids"
"""Input of encoders that read a task with each image: its ids i64[N], see Bundle.tasks."""
CANDIDATES = ("candidate_scores", "candidate_ids")
"""Outputs of the decoder that the host reads at every step."""


def cache_names(num_layers: int, part: str) -> list[str]:
    """Return the names of the 2L key and value tensors of a part of the KV cache.

    Parts are cross (cross-attention), settled (the folded block) and recent (the recent block). As outputs they are
    extended (recent plus the new positions) and regrouped. Example: `settled.key.0`.
    """
    return [f"{part}.{kind}.{i}" for i in range(num_layers) for kind in ("key", "value")]


def step_inputs(bundle_format: int) -> dict[str, str]:
    """Return {input name of the decoder: field name of StepInputs} for a bundle format."""
    if bundle_format >= WITH_PENALTIES:
        return {name: name for name in STEP_INPUTS}
    return {"banned_ids" if name == "marked_ids" else name: name for name in STEP_INPUTS if name != "penalties"}


def graph_inputs(num_layers: int, bundle_format: int, *, has_tasks: bool = False) -> dict[str, list[str]]:
    """Return {graph: names of its inputs}; `has_tasks` is whether the encoder reads the ids of a task."""
    past = cache_names(num_layers, "settled") + cache_names(num_layers, "recent")
    keys = [*cache_names(num_layers, "cross"), *past]
    return {
        "encoder": ["pixel_values", *([TASK_IDS] if has_tasks else [])],
        "decoder": [*step_inputs(bundle_format), NUM_CANDIDATES, *keys],
        "regroup": ["slots", "columns", *past],
        LOG_PROBS: [*LOG_PROBS_INPUTS, *keys],
        CHOICE: [LOG_PROBS, *CHOICE_INPUTS, NUM_CANDIDATES],
    }


def graph_outputs(num_layers: int) -> dict[str, list[str]]:
    """Return {graph: names of its outputs}."""
    return {
        "encoder": cache_names(num_layers, "cross"),
        "decoder": [*CANDIDATES, *cache_names(num_layers, "extended")],
        "regroup": cache_names(num_layers, "regrouped"),
        LOG_PROBS: [LOG_PROBS, *cache_names(num_layers, "extended")],
        CHOICE: [*CANDIDATES],
    }


T = TypeVar("T")

Stamp = tuple[int, int, int]
"""Size of a file in bytes, and the times in ns of the last change of its content (mtime) and of its status (ctime)."""

FORMAT = 3
"""Version of the bundle format. It increases whenever an older engine could not read a newer bundle correctly."""
OLDER_FORMATS = (1, 2)
"""Older formats that this engine reads. Options they do not support raise an error when used, see WITH_PENALTIES."""

MANIFEST = "manifest.json"
PER_ROW, PER_TENSOR = "row", "tensor"
"""How an int8 bundle scales activations. Per tensor (formats 1 and 2), captions depend on the images in a batch."""
KNOWN_VALUES = {
    "activation_scales": (PER_ROW, PER_TENSOR),
    "cross_layout": ("heads",),
}
"""Optional keys of a manifest and the values that this engine knows. Others are of a newer engine, and refused."""
GOLDEN = "golden.npz"
"""PyTorch's recorded answers, which `engine verify` replays; a bundle that was converted without PyTorch has none."""
REQUIRED_FILES = (*(f"{graph}.onnx" for graph in GRAPHS), "tokenizer.json", GOLDEN)
MAX_MANIFEST_BYTES = 1 << 20
MAX_NUMBER = 10**7
"""Upper limit of sizes and ids in a manifest, far above those of any captioning model."""
MAX_LAYERS = 1000
"""Upper limit of the number of layers and heads."""
MAX_TASK_IDS = 1000
"""Upper limit of the number of ids of a task."""
SMALL_NUMBERS = ("num_layers", "num_heads")
SHORT_DIGEST = 12
RESAMPLE_FILTERS = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")
"""Names of Pillow's resampling filters."""


@dataclass(frozen=True)
class ModelDims:
    """Sizes of the exported model; engine.decoding.backend defines the letters L, H, d, V and S for them."""

    num_layers: int
    num_heads: int
    head_width: int
    vocab_size: int
    max_positions: int
    encoder_positions: int


@dataclass(frozen=True)
class ImageSpec:
    """Input image of the encoder: u8 RGB of exactly height x width px, resized with Pillow's `resample` filter.

    `mean` and `std` (per channel, after scaling to 0..1) are applied inside the encoder graph; here they are for
    information only. With `resize`, which is optional, images are resized to it and then center-cropped to height x
    width. It is [height, width], as [256, 256] for DeiT, or [edge], the size of the shortest edge, as [224] for CLIP.
    """

    height: int
    width: int
    resample: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: tuple[int, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Return the entry of a manifest; it has `resize` only if something is cropped."""
        return {name: value for name, value in asdict(self).items() if name != "resize" or value}


@dataclass(frozen=True)
class TokenIds:
    """Special token ids: `bos` starts a caption and `eos` ends it (BLIP: [DEC] and [SEP])."""

    bos: int
    eos: int
    pad: int


@dataclass(frozen=True)
class Bundle:
    """A checked bundle, or an ensemble of bundles.

    `digest` is the sha256 of the manifest, which has the sha256 of every other file in `files`. `generation_from` maps
    each of the `generation` settings to its source in the checkpoint. An ensemble is a copy of its first bundle with
    all bundles as `members` and one of the `weights` for each (see engine.bundle.open.combine). `stamps` are the file
    stamps from just before the files were checked, for BundleWatch. `activation_scales` matters
    to int8 alone.

    `tasks` maps the names of the tasks that the encoder supports to their token ids; it is empty for most models.
    The bundle is for `task`, the first of them unless `for_task` chose another, and the number of encoder positions
    includes its ids.
    """

    path: Path
    digest: str
    model: ModelDims
    image: ImageSpec
    tokens: TokenIds
    precision: str
    generation: Mapping[str, Any] = field(default_factory=dict)
    generation_from: Mapping[str, str] = field(default_factory=dict)
    checkpoint: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    clean_up_tokenization_spaces: bool = True
    format: int = FORMAT
    members: tuple[Bundle, ...] = ()
    weights: tuple[float, ...] = ()
    stamps: Mapping[str, Stamp] = field(default_factory=dict, compare=False)
    activation_scales: str = PER_TENSOR
    tasks: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    task: str | None = None

    @property
    def task_ids(self) -> tuple[int, ...]:
        """The ids of `task`; none if the bundle has no tasks."""
        return () if self.task is None else self.tasks[self.task]

    def encoder_positions(self) -> tuple[int, ...]:
        """Return the numbers of encoder positions of all tasks, in ascending order; one without tasks."""
        image = self.model.encoder_positions - len(self.task_ids)
        return tuple(sorted({image + len(ids) for ids in self.tasks.values()} or {image}))

    def for_task(self, name: str | None) -> Bundle:
        """Return the bundle for another task, such as `detailed-caption` or `<DETAILED_CAPTION>`; None changes nothing.

        Raises UsageError if it has no such task.
        """
        if name is None:
            return self
        if not self.tasks:
            raise UsageError(f"{self.path} is not a model with tasks, as Florence-2 is: remove --task")
        wanted = task_name(name)
        if wanted not in self.tasks:
            known = ", ".join(self.tasks)
            kind = "returns boxes or other than captions" if wanted in OTHER_TASKS else "is unknown"
            raise UsageError(f"the task {name!r:.60} {kind}: choose one of {known}")
        positions = self.model.encoder_positions + len(self.tasks[wanted]) - len(self.task_ids)
        members = tuple(member.for_task(name) for member in self.members)
        return replace(self, task=wanted, model=replace(self.model, encoder_positions=positions), members=members)

    @property
    def notes(self) -> list[str]:
        """What users should know about captions of this bundle, one line each."""
        if self.members:
            return [note for member in self.members for note in member.notes]
        if self.precision == "int8" and self.activation_scales == PER_TENSOR:
            return [
                f"captions of {self.path} depend on which images share a batch, because its int8 activations have one "
                "scale per tensor: export its checkpoint again for one scale per row"
            ]
        return []

    @property
    def models(self) -> tuple[ModelDims, ...]:
        """Sizes of all models that run: one, or those of an ensemble's members."""
        return tuple(member.model for member in self.members) or (self.model,)

    @property
    def short_digest(self) -> str:
        """The first 12 digits of the digest; for an ensemble those of its members, with the weights if they differ."""
        if not self.members:
            return self.digest[:SHORT_DIGEST]
        factors = [f"{weight!r}*" if len(set(self.weights)) > 1 else "" for weight in self.weights]
        return "+".join(
            f"{factor}{member.digest[:SHORT_DIGEST]}" for factor, member in zip(factors, self.members, strict=True)
        )

    @classmethod
    def load(cls, path: Path | None = None, sha256: Callable[[Path], str] = file_sha256) -> Bundle:
        """Read the bundle in directory `path` (None: the embedded demo) and verify every file's sha256.

        `sha256` computes it, see FileDigests. See open_bundle for bundles at a URI. Raises BundleError, which lists all
        missing and changed files.
        """
        path = demo_bundle() if path is None else Path(path)
        try:
            stamps = {}
            if path.is_dir():  # before the check, so that later changes are detected
                stamps = {entry.name: stamp_of(entry.stat()) for entry in path.iterdir() if entry.is_file()}
            manifest, digest = _read_manifest(path)
            required = set(REQUIRED_FILES) - ({GOLDEN} if manifest.get("converted") else set())
            problems = _file_problems(path, manifest.get("files"), required, sha256)
        except OSError as error:
            raise BundleError(f"{path} cannot be read: {error.strerror}: {error.filename}") from error
        if problems:
            listed = " ".join("; ".join(problems).split())  # names from the manifest may contain line breaks
            raise BundleError(
                f"{path} is damaged: {listed}: copy it again, or make it again with `engine get` or `python -m export`"
            )
        _refuse_loops(path, manifest["files"])
        try:
            bundle = cls(
                path=path,
                digest=digest,
                model=_dataclass_from_json(ModelDims, manifest["model"]),
                image=_dataclass_from_json(ImageSpec, manifest["image"]),
                tokens=_dataclass_from_json(TokenIds, manifest["tokens"]),
                precision=str(manifest["precision"]),
                generation=dict(manifest["generation"]),
                generation_from=dict(manifest.get("generation_from", {})),  # older bundles have none
                checkpoint=dict(manifest["checkpoint"]),
                versions=dict(manifest["versions"]),
                files=dict(manifest["files"]),
                clean_up_tokenization_spaces=bool(manifest["clean_up_tokenization_spaces"]),
                format=manifest["format"],
                stamps=stamps,
                activation_scales=_known_values(manifest).get("activation_scales", PER_TENSOR),
                tasks=_tasks(manifest.get("tasks", {}), int(manifest["model"]["vocab_size"])),
            )
            bundle.options()
            if bundle.precision not in PRECISIONS:
                raise ValueError(f"its precision is {bundle.precision[:40]!r}, supported are {', '.join(PRECISIONS)}")
            if max(bundle.tokens.bos, bundle.tokens.eos, bundle.tokens.pad) >= bundle.model.vocab_size:
                raise ValueError(f"{bundle.tokens} do not fit a vocabulary of {bundle.model.vocab_size}")
        except (KeyError, TypeError, ValueError, EngineError) as error:
            raise BundleError(f"{path / MANIFEST} is not valid: {error!s}: export it again") from error
        return bundle.for_task(next(iter(bundle.tasks), None))

    def options(self, **given: Any) -> DecodeOptions:
        """Return decoding options: `given` overrides the bundle's generation settings, which override the defaults."""
        return options_from(self.generation, given)


def stamp_of(status: os.stat_result) -> Stamp:
    """Return size and times of a file, at least one of which changes when the file is overwritten in place."""
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


class FileDigests:
    """Compute the sha256 of files, and read a file again only if it was replaced or its stamp has changed.

    It is for a process that loads bundles which it has just written: moving them to another folder changes neither.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[int, int], tuple[Stamp, str]] = {}

    def __call__(self, path: Path) -> str:
        """Return the sha256 of a file as lower-case hexadecimal."""
        status = path.stat()  # before the content is read, so that a later change is detected
        file, stamp = (status.st_dev, status.st_ino), stamp_of(status)
        known_stamp, digest = self._known.get(file, (None, ""))
        if known_stamp != stamp:
            digest = file_sha256(path)
            self._known[file] = stamp, digest
        return digest

    def forget(self, path: Path) -> None:
        """Read a file again next time: some file systems count time in steps of 2 s, and its size may be the same."""
        status = path.stat()
        self._known.pop((status.st_dev, status.st_ino), None)


def demo_bundle() -> Path:
    """Return the directory of the demo bundle that ships inside the package."""
    return Path(__file__).parent.parent / "assets" / "demo"


def _read_manifest(path: Path) -> tuple[dict[str, Any], str]:
    file = path / MANIFEST
    if path.is_file():
        remedy = f"give its folder, {path.parent}" if path.name == MANIFEST else "give the folder of a bundle"
        raise BundleError(f"{path} is a file: {remedy}")
    if not path.is_dir():
        raise BundleError(f"{path} is not a bundle: no such directory")
    if not file.is_file():
        raise BundleError(f"{path} is not a bundle: it has no {MANIFEST}; make one with `python -m export`")
    if file.stat().st_size > MAX_MANIFEST_BYTES:
        raise BundleError(f"{file} is larger than {MAX_MANIFEST_BYTES} bytes: not a manifest")
    raw = file.read_bytes()
    try:
        manifest = json.loads(raw)
    except (ValueError, RecursionError) as error:
        reason = wrong_content(raw) or f"not valid JSON ({str(error)[:200]}): export the bundle again"
        raise BundleError(f"{file}: {reason}") from error
    version = manifest.get("format") if isinstance(manifest, dict) else None
    if type(version) is not int or version not in (*OLDER_FORMATS, FORMAT):  # bool is an int, and True == 1
        raise BundleError(
            f"{file} has bundle format {repr(version)[:40]}, this engine reads "
            f"{' and '.join(map(str, (*OLDER_FORMATS, FORMAT)))}: export the bundle again"
        )
    return manifest, hashlib.sha256(raw).hexdigest()


def _known_values(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Return the optional keys of a manifest that are present. Raises ValueError for a value of a newer engine."""
    present = {name: manifest[name] for name in KNOWN_VALUES if name in manifest}
    for name, value in present.items():
        if value not in KNOWN_VALUES[name]:
            raise ValueError(f"its {name} {value!r:.40} is not known to this release of the engine: update it")
    return present


OTHER_TASKS = (
    *("od", "dense-region-caption", "region-proposal", "caption-to-phrase-grounding", "open-vocabulary-detection"),
    *("referring-expression-segmentation", "region-to-segmentation", "region-to-category", "region-to-description"),
    *("region-to-ocr", "ocr", "ocr-with-region"),
)
"""Tasks of Florence-2 that are not captions of the whole image."""


def task_name(text: str) -> str:
    """Return the name of a task that may be written as the model's own token, such as `<DETAILED_CAPTION>`."""
    return text.strip().removeprefix("<").removesuffix(">").lower().replace("_", "-")


def _tasks(listed: object, vocab_size: int) -> dict[str, tuple[int, ...]]:
    """Return {name: token ids} of a manifest's tasks, in its order. Raises ValueError if they are not valid."""
    if not isinstance(listed, dict) or not all(
        isinstance(ids, list)
        and 0 < len(ids) <= MAX_TASK_IDS
        and all(type(token) is int and 0 <= token < vocab_size for token in ids)
        for ids in listed.values()
    ):
        raise ValueError(f"its tasks are not lists of token ids below {vocab_size}")
    return {task_name(str(name)): tuple(ids) for name, ids in listed.items()}


def _file_problems(path: Path, files: object, required: set[str], sha256: Callable[[Path], str]) -> list[str]:
    """Compare the directory with the manifest's {file name: sha256} and return all differences."""
    if not isinstance(files, dict):
        return [f"{MANIFEST} lists no files"]
    # hidden files count as well: a graph may read its weights from one
    present = {entry.name for entry in path.iterdir()} - {MANIFEST}
    problems = [f"{name} is not listed" for name in sorted((required | present) - set(files))]
    for name, expected in sorted(files.items()):
        file = path / name
        if Path(name).name != name or name in ("", ".", ".."):
            problems.append(f"{name!r} is not a plain file name")
        elif file.is_symlink():
            problems.append(f"{name} is a link")
        elif not file.is_file():
            problems.append(f"{name} is missing")
        elif sha256(file) != expected:
            problems.append(f"{name} {change_of(file)}")
    return problems


def _refuse_loops(path: Path, files: Iterable[str]) -> None:
    """Raise BundleError if a graph could run forever, or if a file is not an ONNX graph."""
    for file in (path / name for name in sorted(files) if name.endswith(".onnx")):
        try:
            has_loops = may_loop(file.read_bytes())
        except ValueError as error:
            raise BundleError(f"{file} cannot be loaded: it is not an ONNX file ({error}): export it again") from error
        if has_loops:
            raise BundleError(
                f"{file} contains control flow (Loop, If, Scan or functions), which may never end and which exported "
                "bundles do not have: export it again"
            )


def change_of(file: Path) -> str:
    """Return the words for a file with another sha256 than in the manifest; they name its actual content if known."""
    with file.open("rb") as stream:
        reason = wrong_content(stream.read(HEAD_BYTES))
    return f"has changed ({reason})" if reason else "has changed"


def _dataclass_from_json(kind: type[T], values: Mapping[str, Any]) -> T:
    """Build a dataclass from JSON, with lists as tuples. Raises ValueError for unknown, missing or bad values."""
    wanted = {entry.name: entry.type for entry in fields(kind)}  # type: ignore[arg-type]
    optional = {entry.name for entry in fields(kind) if entry.default is not MISSING}  # type: ignore[arg-type]
    if set(values) | optional != set(wanted):
        raise ValueError(f"{kind.__name__} needs {sorted(wanted)}, found {sorted(values)}")
    built = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    for name, value in built.items():
        lowest = 0 if kind is TokenIds else 1
        fits = {
            "int": type(value) is int and lowest <= value <= (MAX_LAYERS if name in SMALL_NUMBERS else MAX_NUMBER),
            "str": value in RESAMPLE_FILTERS,
            "tuple[int, ...]": isinstance(value, tuple)
            and len(value) in (1, 2)
            and all(type(v) is int and 1 <= v <= MAX_NUMBER for v in value),
            "tuple[float, ...]": isinstance(value, tuple) and [type(v) in (int, float) for v in value] == [True] * 3,
        }
        if not fits[str(wanted[name])]:
            raise ValueError(f"{kind.__name__}.{name} is {value!r}")
    return kind(**built)


SIZE_AND_TIME = 2
"""Length of the part of a stamp without ctime, which also changes with chmod, hard links and renames."""


class BundleWatch:
    """Detects changes to the files of a bundle, or of all members of an ensemble, since it was loaded.

    The files are kept open. Replacing the folder by a rename is not a change: the run keeps the files it opened.
    """

    def __init__(self, bundle: Bundle) -> None:
        """Open the files. Raises BundleError if one has changed since the bundle was loaded."""
        self._held = ExitStack()
        self._files: list[tuple[Path, IO[bytes], str]] = []
        self._stamps: list[Stamp] = []
        with ExitStack() as opened:
            for member in bundle.members or (bundle,):
                for name, digest in {**member.files, MANIFEST: member.digest}.items():
                    path = member.path / name
                    try:
                        stream = opened.enter_context(path.open("rb"))
                    except OSError as error:
                        raise _overwritten(path) from error
                    self._files.append((path, stream, digest))
                    stamp = stamp_of(os.fstat(stream.fileno()))
                    if stamp != member.stamps.get(name) and _sha256(stream) != digest:
                        raise _overwritten(path)
                    self._stamps.append(stamp)
            self._held = opened.pop_all()

    def check(self) -> None:
        """Raise BundleError if a file was overwritten since the bundle was loaded.

        This takes microseconds, so call it often.
        """
        for i, (path, stream, digest) in enumerate(self._files):
            stamp, before = stamp_of(os.fstat(stream.fileno())), self._stamps[i]
            if stamp == before:
                continue
            # only the ctime differs: this may be a harmless chmod, or a write with the old mtime restored
            if stamp[:SIZE_AND_TIME] != before[:SIZE_AND_TIME] or _sha256(stream) != digest:
                raise _overwritten(path)
            self._stamps[i] = stamp

    def close(self) -> None:
        """Close the files."""
        self._held.close()


@contextmanager
def watched(bundle: Bundle) -> Iterator[BundleWatch]:
    """Yield a BundleWatch and close it at the end."""
    watch = BundleWatch(bundle)
    try:
        yield watch
    finally:
        watch.close()


def _sha256(stream: IO[bytes]) -> str:
    stream.seek(0)
    return hashlib.file_digest(stream, "sha256").hexdigest()  # type: ignore[arg-type]  # the stream has readinto


def _overwritten(path: Path) -> BundleError:
    return BundleError(
        f"{path} was overwritten during the run, so captions may come from different weights: put a new bundle into "
        "another folder, and run the same command again"
    )
