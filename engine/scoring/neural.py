"""BERTScore, BLEURT and CLIPScore, computed by their own libraries from local weights; nothing is downloaded."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from logging import ERROR, WARNING, Handler, LogRecord, getLogger
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.errors import UsageError, counted, install_command
from engine.files.atomic import file_sha256
from engine.inputs.pixels import ImageNote, decode_image, note_lines
from engine.options import CLIP
from engine.scoring.base import SIGNATURE, Items, Measured, MetricInputs, UnavailableError, library, mean, settle_empty

EXTRA = install_command("score-neural")
ORGANISERS_BERT = {
    "architectures": ["DebertaForSequenceClassification"],
    "model_type": "deberta",
    "num_hidden_layers": 48,
    "hidden_size": 1024,
}
"""Identifies microsoft/deberta-xlarge-mnli by its config.json; the model without MNLI has a different architecture."""
CHUNK = 1000
"""Images per pass; the token vectors of all their texts are held in memory."""
ORGANISERS_LAYER = 40
"""Layer for that model: bert-score's default, which the organisers use as well."""
TRIES = 10
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")


class BertScore:
    """BERTScore F1 (Zhang et al. 2020) without rescaling; with `idf`, the weights come from all references of the run.

    Every pair is scored independently of the others, as the organisers do by calling bert-score on one pair at a time.
    bert-score's own batches pad shorter texts with zeros, and a token whose best cosine is negative then matches the
    padding with 0. A score would depend on the other pairs of the batch.

    The organisers use microsoft/deberta-xlarge-mnli at layer 40. Other weights give a proxy, which the signature marks.
    """

    name = "bertscore"

    def __init__(self, setting: MetricInputs, *, idf: bool = False, layer: int | None = None) -> None:
        self._setting = setting
        self._idf = idf
        self._layer = layer
        self._scorer: Any = None

    def signature(self) -> str:
        directory = weights_folder(self._setting, self.name, "microsoft/deberta-xlarge-mnli")
        is_official, layer = self._model(directory)
        idf = "references" if self._idf else "no"
        parts = f"bertscore:F1|model:{fingerprint(directory)}|layer:{layer}|idf:{idf}"
        proxy = "" if is_official else "|proxy:not the organisers' model"
        return f"{parts}{proxy}|pairs:one by one|text:{SIGNATURE}|{library('bert-score')}|{library('transformers')}"

    def measure(self, items: Items) -> Measured:
        directory = weights_folder(self._setting, self.name, "microsoft/deberta-xlarge-mnli")
        text = items.preprocessed()
        # bert-score prints a warning for each empty caption
        with silence_logs(), contextlib.redirect_stderr(io.StringIO()):
            if self._scorer is None:
                self._scorer = self._load(directory)
            if self._idf:
                self._scorer._idf_dict = None  # avoids a warning when an earlier run's weights are replaced
                self._scorer.compute_idf([reference for texts in text.references for reference in texts])
            best = np.full(len(items), -np.inf)
            for start in range(0, len(items), CHUNK):
                indices = [i for i in range(start, min(start + CHUNK, len(items))) for _ in text.references[i]]
                references = [reference for texts in text.references[start : start + CHUNK] for reference in texts]
                f1 = self._f1([(text.candidates[i], ref) for i, ref in zip(indices, references, strict=True)])
                np.maximum.at(best, indices, f1)  # an image scores as its best reference
        return mean(settle_empty(items, best), self._truncation_note(text))

    def _f1(self, pairs: Sequence[tuple[str, str]]) -> NDArray[np.float64]:
        """Return the F1 f64[N] of (candidate, reference) pairs, each independent of the others.

        Only pairs with equal lengths in tokens are batched. They need no padding, so that bert-score's matching gives
        each pair the same value as alone.
        """
        torch, utils = import_library("torch"), import_library("bert_score.utils")
        vectors = self._vectors({text for pair in pairs for text in pair})

        def lengths(index: int) -> tuple[int, int]:
            candidate, reference = pairs[index]
            return len(vectors[candidate][1]), len(vectors[reference][1])

        scores = np.zeros(len(pairs))
        for _, group in groupby(sorted(range(len(pairs)), key=lengths), lengths):
            equal = list(group)
            for start in range(0, len(equal), self._setting.batch_size):
                batch = equal[start : start + self._setting.batch_size]
                sides = []
                for side in (1, 0):  # greedy_cos_idf takes the references first
                    chosen = [vectors[pairs[i][side]] for i in batch]
                    words, weights = (torch.stack(part) for part in zip(*chosen, strict=True))
                    sides += [words, torch.ones_like(weights), weights]
                scores[batch] = utils.greedy_cos_idf(*sides)[2].double().cpu().numpy()
        return scores

    def _vectors(self, texts: set[str]) -> Mapping[str, tuple[Any, Any]]:
        """Return {text: (vectors f32[L,D], idf weights f32[L])} for its L tokens."""
        torch, utils = import_library("torch"), import_library("bert_score.utils")
        scorer = self._scorer
        idf = scorer._idf_dict
        if not self._idf:
            idf = defaultdict(lambda: 1.0, {scorer._tokenizer.sep_token_id: 0.0, scorer._tokenizer.cls_token_id: 0.0})
        ordered, vectors = sorted(texts, key=lambda text: (len(text), text)), {}  # similar lengths: little padding
        with torch.inference_mode():
            for start in range(0, len(ordered), self._setting.batch_size):
                batch = ordered[start : start + self._setting.batch_size]
                model = (scorer._model, scorer._tokenizer, idf)
                words, masks, weights = utils.get_bert_embedding(batch, *model, device=scorer.device)
                lengths = masks.sum(1).tolist()
                for i, text in enumerate(batch):
                    vectors[text] = words[i, : lengths[i]].clone(), weights[i, : lengths[i]].clone()
        return vectors

    def _load(self, directory: Path) -> Any:
        """Load the model, once for all runs."""
        scorer_class = import_library("bert_score", "BERTScorer")
        _, layer = self._model(directory)
        with _neutral_path(directory) as model, checked_weights(directory):
            scorer = scorer_class(
                model_type=model, num_layers=layer, idf=self._idf, nthreads=0, device=self._setting.device
            )
        tokenizer = scorer._tokenizer
        tokenizer.model_max_length = min(tokenizer.model_max_length, _positions(scorer._model.config))
        return scorer

    def _truncation_note(self, items: Items) -> str:
        """Return a note on texts that were truncated to the model's length, or an empty string."""
        tokenizer = self._scorer._tokenizer
        limit = tokenizer.model_max_length
        # a token has at least one character, and two tokens are special: shorter texts need no tokenizer
        long = {text for text in items.candidates if len(text) > limit - 2}
        long |= {text for texts in items.references for text in texts if len(text) > limit - 2}
        truncated = sum(len(tokenizer(text)["input_ids"]) > limit for text in long)
        return f"{counted(truncated, 'text')} longer than the model's {limit} tokens: truncated" if truncated else ""

    def _model(self, directory: Path) -> tuple[bool, int]:
        """Return whether model and layer are the organisers', and the layer to use."""
        config = read_config(directory, self.name)
        is_official = all(config.get(name) == value for name, value in ORGANISERS_BERT.items())
        layers = int(config.get("num_hidden_layers", 0))
        layer = self._layer or (ORGANISERS_LAYER if is_official else layers)
        if not 1 <= layer <= layers:
            raise UsageError(f"--bertscore-layer {layer}: the model in {directory} has layers 1 to {layers}")
        return is_official and layer == ORGANISERS_LAYER, layer


class Bleurt:
    """BLEURT (Sellam et al. 2020): the regression output of a BLEURT-20 model in PyTorch.

    With several references, an image gets its best score.
    """

    name = "bleurt"
    wanted = "lucadiliello/BLEURT-20-D12"

    def __init__(self, setting: MetricInputs) -> None:
        self._setting = setting

    def signature(self) -> str:
        directory = weights_folder(self._setting, self.name, self.wanted)
        return f"{self.name}|model:{fingerprint(directory)}|text:{SIGNATURE}|{library('bleurt-pytorch')}"

    def measure(self, items: Items) -> Measured:
        directory = weights_folder(self._setting, self.name, self.wanted)
        torch = import_library("torch")
        library_module = import_library("bleurt_pytorch")
        text = items.preprocessed()
        indices = [i for i, texts in enumerate(text.references) for _ in texts]
        references = [reference for texts in text.references for reference in texts]
        best = np.full(len(items), -np.inf)
        device = self._setting.device or ("cuda" if torch.cuda.is_available() else "cpu")
        with checked_weights(directory):
            model = library_module.BleurtForSequenceClassification.from_pretrained(str(directory)).eval().to(device)
        with silence_logs(), torch.inference_mode():
            tokenizer = library_module.BleurtTokenizer.from_pretrained(str(directory))
            for start in range(0, len(indices), self._setting.batch_size):
                part = slice(start, start + self._setting.batch_size)
                inputs = tokenizer(
                    references[part],
                    [text.candidates[i] for i in indices[part]],
                    padding="longest",
                    truncation=True,
                    max_length=min(512, _positions(model.config)),
                    return_tensors="pt",
                ).to(device)
                scores = model(**inputs).logits.flatten().double().cpu().numpy()
                np.maximum.at(best, indices[part], scores)
        return mean(best)


def weights_folder(setting: MetricInputs, name: str, wanted: str) -> Path:
    """Return the weights folder of a metric.

    Raises UnavailableError if none was given, UsageError if it does not hold a model. `wanted` names the model in the
    message.
    """
    directory = setting.weights.get(name)
    if directory is None:
        raise UnavailableError(f"needs weights: --weights {name}=DIR, a folder with {wanted}")
    check_weights(name, directory)
    return directory


def check_weights(name: str, directory: Path) -> None:
    """Raise UsageError if the weights folder given for a metric does not hold a model."""
    if not (directory / "config.json").is_file() or not _weight_file(directory):
        raise UsageError(f"--weights {name}={directory}: not a folder with config.json and {' or '.join(WEIGHT_FILES)}")


def read_config(directory: Path, name: str) -> dict[str, Any]:
    """Return the config.json of a metric's weights. Raises UsageError if it is not a JSON object."""
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"--weights {name}={directory}: config.json cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise UsageError(f"--weights {name}={directory}: config.json is not a JSON object")
    return config


def fingerprint(directory: Path) -> str:
    """Return `<folder name>@<12 hexadecimal digits>`, a hash of a folder's configuration and weights."""
    digest = hashlib.sha256((directory / "config.json").read_bytes())
    digest.update(file_sha256(_weight_file(directory)).encode())
    return f"{directory.resolve().name}@{digest.hexdigest()[:12]}"


def _weight_file(directory: Path) -> Any:
    return next((directory / name for name in WEIGHT_FILES if (directory / name).is_file()), None)


@contextlib.contextmanager
def _neutral_path(directory: Path) -> Iterator[str]:
    """Yield a symbolic link to a model whose path bert-score does not misread.

    bert-score chooses the model class by its path: "t5" anywhere and "scibert" at the start have a meaning.
    """
    with contextlib.ExitStack() as folders:
        for _ in range(TRIES):  # one random name in 200 contains "t5"
            folder = folders.enter_context(tempfile.TemporaryDirectory(prefix="weights"))
            link = Path(folder).resolve() / "model"
            if "t5" not in str(link):
                break
        else:
            raise UsageError(f"{link.parent.parent}: bert-score takes every path with 't5' for a T5 model: set TMPDIR")
        link.symlink_to(directory.resolve(), target_is_directory=True)
        yield str(link)


@contextlib.contextmanager
def silence_logs() -> Iterator[None]:
    """Silence the warnings of transformers, for example about unused heads."""
    logging = import_library("transformers.utils.logging")
    before = logging.get_verbosity()
    logging.set_verbosity(ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(before)


@contextlib.contextmanager
def checked_weights(directory: Path) -> Iterator[None]:
    """Capture the warnings while a model is loaded; raise UnavailableError if weights that a metric uses are missing.

    transformers initializes missing weights randomly and only logs a warning. The scores would be meaningless.
    """
    logging = import_library("transformers.utils.logging")
    captured, before = _CapturedLogs(), logging.get_verbosity()
    logger = getLogger("transformers")
    handlers, logger.handlers = logger.handlers, [captured]
    logging.set_verbosity(WARNING)
    try:
        yield
    finally:
        logging.set_verbosity(before)
        logger.handlers = handlers
    warnings = [text.partition("newly initialized")[2] for text in captured.texts]
    names = [name for text in warnings for name in re.findall(r"'([\w.]+)'", text)]
    missing = [name for name in names if not re.search(UNUSED, name)]
    if missing:
        raise UnavailableError(
            f"the weights in {directory} belong to a different model: {len(missing)} are missing ({missing[0]}, ...)"
        )


UNUSED = r"(^|\.)(pooler\.|position_ids$)"
"""Weights that none of the metrics uses."""


class _CapturedLogs(Handler):
    """Collects the messages that a library logs."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: LogRecord) -> None:
        self.texts.append(record.getMessage())


def _positions(config: Any) -> int:
    """Return how many tokens fit; RoBERTa's positions start after the padding index."""
    positions = int(getattr(config, "max_position_embeddings", 0) or 512)
    reserved = 1 + (config.pad_token_id or 0) if "roberta" in str(config.model_type) else 0
    return positions - reserved


def import_library(module: str, name: str | None = None) -> Any:
    """Import a library of the neural metrics in offline mode. Raises UnavailableError with its install command."""
    from importlib import import_module
    from importlib.metadata import version

    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        imported = import_module(module)
        if int(version("transformers").partition(".")[0]) >= 5:
            raise UnavailableError("needs transformers below 5: bert-score and bleurt-pytorch do not support 5")
    except ImportError as error:
        raise UnavailableError(f"needs {module.replace('_', '-')} ({error}): {EXTRA}") from error
    return getattr(imported, name) if name else imported


WANTED = "openai/clip-vit-base-patch32"
PREFIX = "A photo depicts "
WEIGHT = 2.5
TOKENS = 77
"""Prompt prefix, weight and maximum length in the code of the paper (Hessel et al. 2021)."""


@dataclass(frozen=True)
class _Pixels:
    """Which images are read and how: the frame of DICOM files, and the conversion of more than 8 bits per channel."""

    paths: tuple[Path, ...]
    frame: int
    depth: str


class ClipScore:
    """CLIPScore: 2.5 * max(cos(image, "A photo depicts " + caption), 0) of raw captions, mean over images.

    Images are read as for captioning: `frame` is the frame of DICOM files, `depth` converts more than 8 bits per
    channel (engine/inputs/pixels.py).
    """

    name = "clipscore"

    def __init__(self, setting: MetricInputs, *, frame: int = 0, depth: str = CLIP) -> None:
        self._setting, self._frame, self._depth = setting, frame, depth

    def signature(self) -> str:
        directory = weights_folder(self._setting, "clipscore", WANTED)
        pixels = f"|dicom-frame:{self._frame}" if self._frame else ""
        pixels += f"|high-bit-depth:{self._depth}" if self._depth != CLIP else ""
        return f"{self.name}|model:{fingerprint(directory)}|w:{WEIGHT}|text:raw{pixels}|{library('transformers')}"

    def measure(self, items: Items) -> Measured:
        image, text, note = self._features(items)
        return mean(clip_scores(image, text), note)

    def _features(self, items: Items) -> tuple[NDArray[np.float64], NDArray[np.float64], str]:
        """Return unit vectors f64[N,D] of the images and of the captions, and a note on how the images were read."""
        if items.images is None:
            raise UnavailableError("needs the images: --images DIR")
        model = self._model()
        image, notes = model.image_features(_Pixels(tuple(items.images), self._frame, self._depth))
        return image, model.text_features(tuple(items.candidates)), ". ".join(note_lines(notes))

    def _model(self) -> _Clip:
        directory = weights_folder(self._setting, "clipscore", WANTED)
        return _load(str(directory), self._setting.device, self._setting.batch_size)


class _Clip:
    """The CLIP model. It caches the vectors of the last images, because clipscore and refclipscore need the same."""

    def __init__(self, directory: str, device: str | None, batch_size: int) -> None:
        self._torch, transformers = import_library("torch"), import_library("transformers")
        self._device = device or ("cuda" if self._torch.cuda.is_available() else "cpu")
        self._batch_size = batch_size
        with checked_weights(Path(directory)):
            self._model = transformers.CLIPModel.from_pretrained(directory).eval().to(self._device)
        with silence_logs():
            self._processor = transformers.CLIPProcessor.from_pretrained(directory)
        self._images: tuple[_Pixels, NDArray[np.float64], list[ImageNote]] | None = None

    def image_features(self, pixels: _Pixels) -> tuple[NDArray[np.float64], list[ImageNote]]:
        """Return unit vectors f64[N,D] of images, and notes on what was dropped when they were read."""
        if self._images is None or self._images[0] != pixels:
            notes: list[ImageNote] = []

            def encode(paths: list[Path]) -> Any:
                images = [decode_image(path, frame=pixels.frame, depth=pixels.depth, notes=notes) for path in paths]
                return self._encode_images(images)

            self._images = pixels, self._in_batches(pixels.paths, encode), notes
        return self._images[1:]

    def text_features(self, captions: tuple[str, ...]) -> NDArray[np.float64]:
        """Return unit vectors f64[N,D] of captions."""
        return self._in_batches(captions, self._encode_texts)

    def _in_batches(self, values: Sequence[Any], features: Any) -> NDArray[np.float64]:
        parts = []
        with self._torch.inference_mode():
            for start in range(0, len(values), self._batch_size):
                part = features(list(values[start : start + self._batch_size])).double().cpu().numpy()
                parts.append(part / np.linalg.norm(part, axis=1, keepdims=True))
        return np.concatenate(parts)

    def _encode_images(self, images: list[Any]) -> Any:
        inputs = self._processor(images=images, return_tensors="pt").to(self._device)
        return self._model.get_image_features(**inputs)

    def _encode_texts(self, captions: list[str]) -> Any:
        inputs = self._processor(
            text=[PREFIX + caption for caption in captions],
            padding=True,
            truncation=True,
            max_length=TOKENS,
            return_tensors="pt",
        ).to(self._device)
        return self._model.get_text_features(**inputs)


_load = lru_cache(maxsize=1)(_Clip)


class RefClipScore(ClipScore):
    """RefCLIPScore: harmonic mean of CLIPScore and the best cosine of caption and reference (at least 0)."""

    name = "refclipscore"

    def measure(self, items: Items) -> Measured:
        image, text, note = self._features(items)
        indices = [i for i, texts in enumerate(items.references) for _ in texts]
        references = self._model().text_features(tuple(_flat(items.references)))
        closest = np.zeros(len(items))
        np.maximum.at(closest, indices, (text[indices] * references).sum(1))
        return mean(harmonic(clip_scores(image, text), closest), note)


def clip_scores(image: NDArray[np.float64], text: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return 2.5 * max(cos, 0) of unit vectors f64[N,D]."""
    return np.asarray(WEIGHT * np.maximum((image * text).sum(1), 0.0))


def harmonic(first: NDArray[np.float64], second: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the element-wise harmonic mean of two non-negative arrays f64[N]; 0 where both are 0."""
    total = first + second
    return np.divide(2 * first * second, total, out=np.zeros_like(total), where=total > 0)


def _flat(lists: Sequence[tuple[str, ...]]) -> Iterator[str]:
    for texts in lists:
        yield from texts
