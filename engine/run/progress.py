"""How fast a run is, and how long it still takes."""

from __future__ import annotations

import time
from collections.abc import Callable

FIRST_WAVE = 2.0
"""Times the seconds of the first image: by then the first wave is over. Captions of 20 tokens may follow one of 8."""
WAVE_END = 0.25
"""Part of these seconds in which the last images of that wave finish."""


class Pace:
    """Measures the speed of a run by when its images finish; `done` of `length` have.

    Many images are decoded in parallel and finish in waves: none at first, then many at about the same time. Divided by
    the time since the start, their number gives a speed that is too low by as much as the number of images in parallel.
    So the speed is counted from the end of the first wave, and known once it spans two more.
    """

    def __init__(self, length: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self.length, self.done = length, 0
        self._clock, self._start = clock, clock()
        self._first_s: float | None = None
        self._since: tuple[float, int] | None = None
        self._latest_s = 0.0

    def tell(self, done: int) -> None:
        """Note that so many images are done."""
        if done == self.done:
            return
        self.done, self._latest_s = done, self._clock() - self._start
        if self._first_s is None:
            self._first_s = self._latest_s
        waves = self._latest_s / max(self._first_s, 1e-9)
        if waves >= FIRST_WAVE and (self._since is None or waves < FIRST_WAVE + WAVE_END):
            self._since = self._latest_s, done

    @property
    def images_per_s(self) -> float | None:
        """Images a second, None before it is known."""
        if self._first_s is None or self._since is None:
            return None
        seconds = self._latest_s - self._since[0]
        return (self.done - self._since[1]) / seconds if seconds > FIRST_WAVE * self._first_s else None

    @property
    def left_s(self) -> float | None:
        """Seconds until all images are done, None before that is known."""
        if (speed := self.images_per_s) is None:
            return None
        return max(0.0, (self.length - self.done) / speed - (self._clock() - self._start - self._latest_s))

    def __str__(self) -> str:
        """Return speed and time left in words, empty before they are known."""
        speed, left = self.images_per_s, self.left_s
        return "" if speed is None or left is None else f"{speed:.2f} images/s, about {in_words(left)} left"


def in_words(seconds: float) -> str:
    """Return a duration as people say it: `40 s`, `12 min`, `3.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"
