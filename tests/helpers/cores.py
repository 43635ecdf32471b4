"""One core for each process of pytest-xdist, so that several do not slow each other down; all cores for some tests.

Imported before numpy, torch and ONNX Runtime, which choose their number of threads when they are loaded.
"""

from __future__ import annotations

import os

import pytest

ALL = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
COUNT = len(ALL) or os.cpu_count() or 1
WORKER = os.environ.get("PYTEST_XDIST_WORKER", "")
two_cores = pytest.mark.two_cores


def use_cores(*, every: bool) -> None:
    """Bind this thread, and what it starts from now on, to all cores, or to the one of this worker of pytest-xdist.

    Without pytest-xdist all cores are used.
    """
    if ALL:
        os.sched_setaffinity(0, ALL if every or not WORKER else {ALL[int(WORKER.removeprefix("gw")) % len(ALL)]})


use_cores(every=False)
