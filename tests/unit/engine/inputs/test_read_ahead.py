"""Reading ahead: order, window, errors, and programs that stop."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from engine.inputs.read_ahead import read_ahead


def test_results_come_in_order_within_the_window():
    taken = []

    def slow_at_first(item: int) -> int:
        time.sleep(0.02 if item == 0 else 0)
        return item * item

    def items():
        for item in range(40):
            taken.append(item)
            yield item

    for number, result in enumerate(read_ahead(slow_at_first, items(), threads=4, window=6)):
        assert result == number * number
        assert len(taken) <= number + 6
    assert len(taken) == 40


def test_errors_of_a_thread_reach_the_consumer():
    results = read_ahead(lambda item: 1 // item, [1, 0], threads=2, window=2)
    with pytest.raises(ZeroDivisionError):
        list(results)


def test_stopped_program_does_not_wait_for_a_hanging_disk():
    program = (
        "import time\nfrom engine.inputs.read_ahead import read_ahead\n"
        "def read(item):\n    time.sleep(60 * item)\n    return item\n"
        "for item in read_ahead(read, [0, 1, 1], threads=2, window=2):\n    raise KeyboardInterrupt"
    )
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=50)
    assert "KeyboardInterrupt" in done.stderr
    assert time.perf_counter() - start < 20
