"""An exponential moving average of the weights that are trained, beside them; knows nothing of recipes and trainers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.optim.swa_utils import get_ema_multi_avg_fn

from engine.errors import EngineError

FILE = "ema.safetensors"
"""Its name within a state of training."""


class MovingAverage:
    """The mean m of every trained weight w of a model: m + (1 - decay) * (w - m) after each step, in the weights' own
    type, float32. It begins with the weights as they are.
    """

    def __init__(self, model: torch.nn.Module, decay: float) -> None:
        trained = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
        self._names = [name for name, _ in trained]
        self._weights = [weight for _, weight in trained]
        self._means = [weight.detach().clone() for weight in self._weights]
        self._average = get_ema_multi_avg_fn(decay)

    def update(self) -> None:
        """Take in the weights as they are, once after each step of the optimiser."""
        self._average(self._means, [weight.detach() for weight in self._weights], None)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Let the model have the means as its weights for a while; its own come back bit for bit."""
        own = [weight.data for weight in self._weights]
        for weight, mean in zip(self._weights, self._means, strict=True):
            weight.data = mean
        try:
            yield
        finally:
            for weight, data in zip(self._weights, own, strict=True):
                weight.data = data

    def save(self, directory: Path) -> None:
        """Write the means into a state of training."""
        save_file(dict(zip(self._names, self._means, strict=True)), directory / FILE)

    def load(self, directory: Path) -> None:
        """Go on from the means of a state of training. Raises EngineError where it has none, or of other weights."""
        try:
            found = load_file(directory / FILE)
            for name, mean in zip(self._names, self._means, strict=True):
                mean.copy_(found[name])
        except Exception as error:  # a damaged file has many kinds of errors
            raise EngineError(
                f"{directory / FILE} is not the moving average of this run ({' '.join(str(error).split())[:100]}): "
                f"delete {directory}, and the run goes on from an earlier state"
            ) from error
