"""Speed and time left, for runs whose images finish in waves."""

from __future__ import annotations

import heapq
import random

import pytest

from engine.cli.caption import Pace, in_words

IMAGES, IN_PARALLEL = 1000, 32


def finish_times(shortest: int, longest: int) -> list[float]:
    """Return when each image is done, in seconds, if a token takes one: captions are handed out in order."""
    chance = random.Random(0)
    free, latest, times = [0.0] * IN_PARALLEL, 0.0, []
    for _ in range(IMAGES):
        end = heapq.heappop(free) + chance.randint(shortest, longest)
        heapq.heappush(free, end)
        latest = max(latest, end)
        times.append(latest)
    return times


@pytest.mark.parametrize(("shortest", "longest"), [(20, 20), (8, 20), (5, 40)])
def test_time_left_is_right_from_the_start(shortest, longest):
    times, now = finish_times(shortest, longest), 0.0
    pace, shown, done = Pace(IMAGES, lambda: now), [], 0
    for second in range(int(0.9 * times[-1])):
        now = float(second)
        while times[done] <= now:
            done += 1
            pace.update(done)
        if (left := pace.left_s) is not None:
            shown.append((second, left / (times[-1] - now)))
    assert shown[0][0] < 0.25 * times[-1]
    assert all(0.5 < share < 2 for _, share in shown), "within a factor of two; images / seconds would be wrong by ten"
    assert shown[-1][1] == pytest.approx(1, abs=0.35)


def test_no_speed_before_the_first_wave_is_over():
    now = 0.0
    pace = Pace(600, lambda: now)
    assert str(pace) == ""
    now = 10.0
    pace.update(1)
    assert str(pace) == ""
    for wave in range(1, 6):
        now = 10.0 * wave
        for done in range(20 * wave - 18, 20 * wave + 1):
            pace.update(done)
    assert str(pace) == "2.00 images/s, about 4 min left"


def test_durations_in_words():
    assert [in_words(seconds) for seconds in (40, 89, 720, 12600)] == ["40 s", "89 s", "12 min", "3.5 h"]
