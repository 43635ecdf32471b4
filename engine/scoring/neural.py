"""BERTScore and BLEURT: by their own libraries, with weights from folders the user names; nothing is downloaded."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import tempfile
from collections.abc import Iterator
from logging import ERROR
from pathlib import Path
from typing import Any

import numpy as np

from engine.errors import UsageError
from engine.files.atomic import file_sha256
from engine.scoring.base import Items, Measured, MetricInputs, UnavailableError, library, mean, settle_empty
from engine.scoring.preprocess import SIGNATURE

EXTRA = "pip install 'blip-caption-engine[score-neural]', or '.[score-neural]' in a checkout"
ORGANISERS_BERT = {
    "architectures": ["DebertaForSequenceClassification"],
    "model_type": "deberta",
    "num_hidden_layers": 48,
    "hidden_size": 1024,
}
"""microsoft/deberta-xlarge-mnli, by its config.json; without MNLI the architecture is another."""
CHUNK = 1000
"""Images measured at once: bert-score keeps the vectors of every word of a call."""
ORGANISERS_LAYER = 40
"""bert-score's own choice for that model, and the organisers'."""
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")


class BertScore:
    """BERTScore F1 (Zhang et al. 2020), without rescaling; idf, where on, from all references given.

    The organisers' model is microsoft/deberta-xlarge-mnli at layer 40; another folder of weights makes a proxy, and its
    signature says so.
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
        parts = f"bertscore:F1|model:{fingerprint(directory)}|layer:{layer}|idf:{'references' if self._idf else 'no'}"
        proxy = "" if is_official else "|proxy:not the organisers' model"
        return f"{parts}{proxy}|text:{SIGNATURE}|{library('bert-score')}|{library('transformers')}"

    def measure(self, items: Items) -> Measured:
        directory = weights_folder(self._setting, self.name, "microsoft/deberta-xlarge-mnli")
        text = items.preprocessed()
        # it prints a line for each empty caption
        with quiet(), contextlib.redirect_stderr(io.StringIO()):
            if self._scorer is None or self._idf:
                self._scorer = self._load(directory, [one for several in text.references for one in several])
            parts = []
            for start in range(0, len(items), CHUNK):
                part = slice(start, start + CHUNK)
                references = [list(several) for several in text.references[part]]
                batch_size = self._setting.batch_size
                _, _, f1 = self._scorer.score(list(text.candidates[part]), references, batch_size=batch_size)
                parts.append(f1.double().numpy())
        return mean(settle_empty(items, np.concatenate(parts)))

    def _load(self, directory: Path, references: list[str]) -> Any:
        """Load the model; idf, where on, is that of `references`. Without idf it serves any number of runs."""
        scorer_class = import_library("bert_score", "BERTScorer")
        _, layer = self._model(directory)
        with _neutral_name(directory) as model:
            return scorer_class(
                model_type=model,
                num_layers=layer,
                idf=self._idf,
                idf_sents=references if self._idf else None,
                nthreads=0,
                device=self._setting.device,
            )

    def _model(self, directory: Path) -> tuple[bool, int]:
        """Return whether these are the organisers' weights, and the layer to take."""
        config = read_config(directory, self.name)
        is_official = all(config.get(name) == value for name, value in ORGANISERS_BERT.items())
        most = int(config.get("num_hidden_layers", 0))
        layer = self._layer or (ORGANISERS_LAYER if is_official else most)
        if not 1 <= layer <= most:
            raise UsageError(f"--bertscore-layer {layer}: the model in {directory} has layers 1 to {most}")
        return is_official and layer == ORGANISERS_LAYER, layer


class Bleurt:
    """BLEURT (Sellam et al. 2020): the regression output of a BLEURT-20 model in PyTorch; the best of several
    references.
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
        places = [i for i, several in enumerate(text.references) for _ in several]
        references = [reference for several in text.references for reference in several]
        best = np.full(len(items), -np.inf)
        with quiet(), torch.inference_mode():
            device = self._setting.device or ("cuda" if torch.cuda.is_available() else "cpu")
            model = library_module.BleurtForSequenceClassification.from_pretrained(str(directory)).eval().to(device)
            tokenizer = library_module.BleurtTokenizer.from_pretrained(str(directory))
            for start in range(0, len(places), self._setting.batch_size):
                part = slice(start, start + self._setting.batch_size)
                inputs = tokenizer(
                    references[part],
                    [text.candidates[i] for i in places[part]],
                    padding="longest",
                    truncation=True,
                    max_length=512,
                    return_tensors="pt",
                ).to(device)
                scores = model(**inputs).logits.flatten().double().cpu().numpy()
                np.maximum.at(best, places[part], scores)
        return mean(best)


def weights_folder(setting: MetricInputs, name: str, wanted: str) -> Path:
    """Return the folder of a metric's weights. Raises UnavailableError without one, UsageError when it is none."""
    directory = setting.weights.get(name)
    if directory is None:
        raise UnavailableError(f"needs weights: --weights {name}=DIR, a folder with {wanted}")
    if not (directory / "config.json").is_file() or not _weight_file(directory):
        raise UsageError(f"--weights {name}={directory}: no folder with config.json and {' or '.join(WEIGHT_FILES)}")
    return directory


def read_config(directory: Path, name: str) -> dict[str, Any]:
    """Return the configuration of a metric's weights. Raises UsageError when it is none."""
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"--weights {name}={directory}: config.json cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise UsageError(f"--weights {name}={directory}: config.json is no JSON object")
    return config


def fingerprint(directory: Path) -> str:
    """Return `<folder name>@<12 hexadecimal digits>` of a folder's configuration and weights."""
    digest = hashlib.sha256((directory / "config.json").read_bytes())
    digest.update(file_sha256(_weight_file(directory)).encode())
    return f"{directory.resolve().name}@{digest.hexdigest()[:12]}"


def _weight_file(directory: Path) -> Any:
    return next((directory / name for name in WEIGHT_FILES if (directory / name).is_file()), None)


@contextlib.contextmanager
def _neutral_name(directory: Path) -> Iterator[str]:
    """Give bert-score a path that means no other model to it, as "t5" anywhere and "scibert" in front would."""
    with tempfile.TemporaryDirectory(prefix="weights") as folder:
        link = Path(folder).resolve() / "model"
        if "t5" in str(link):
            raise UsageError(f"{link}: bert-score takes a path with 't5' for a T5 model: try again, or set TMPDIR")
        link.symlink_to(directory.resolve(), target_is_directory=True)
        yield str(link)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' notes on unused heads."""
    logging = import_library("transformers.utils.logging")
    before = logging.get_verbosity()
    logging.set_verbosity(ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(before)


def import_library(module: str, name: str | None = None) -> Any:
    """Import a library of the neural metrics, told to stay offline, or raise UnavailableError naming the extra."""
    from importlib import import_module
    from importlib.metadata import version

    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        imported = import_module(module)
        if int(version("transformers").partition(".")[0]) >= 5:
            raise UnavailableError("needs transformers below 5, with which bert-score and bleurt-pytorch work")
    except ImportError as error:
        raise UnavailableError(f"needs {module.replace('_', '-')} ({error}): {EXTRA}") from error
    return getattr(imported, name) if name else imported
