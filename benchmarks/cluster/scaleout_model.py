"""How a run on a cluster grows with its workers: a discrete simulation of blocks, messages and the one driver.

Every worker reads and captions a block at a time and answers it in messages; the driver takes messages in one after
another and journals their captions. What is serial, listing images before and writing run.csv after, is added.
The network and the storage behind it are taken as fast enough: they are not measured here.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

from engine.cluster.driver import block_size
from engine.cluster.worker import MESSAGES_PER_BLOCK

BUSY = 0.9
"""Share of the time from which on somebody counts as the bottleneck."""


@dataclass(frozen=True)
class Stages:
    """Seconds each stage takes, measured on one core or device.

    On a worker: `read_s` an image for one reading thread of `readers`, `caption_s` an image for encoding and decoding,
    `start_s` until it answers its first block. On the driver: `list_s` and `write_s` an image before and after,
    `block_s` a block sent out, `message_s` a message from the object store, `record_s` a caption in the journal.
    """

    read_s: float
    caption_s: float
    start_s: float
    list_s: float
    write_s: float
    block_s: float
    message_s: float
    record_s: float
    readers: int = 1

    @property
    def image_s(self) -> float:
        """Seconds an image takes a worker: reading goes on beside captioning, the slower one counts."""
        return max(self.caption_s, self.read_s / self.readers)


@dataclass(frozen=True)
class Outcome:
    """A simulated run. `worker_busy`, which is also throughput over that of as many workers that never wait, and
    `driver_busy`, with its serial parts, are shares of its time.
    """

    images: int
    actors: int
    seconds: float
    images_per_s: float
    worker_busy: float
    driver_busy: float
    bottleneck: str


def simulate(stages: Stages, images: int, actors: int) -> Outcome:
    """Run `images` through `actors` workers that take their next block the moment they have answered one."""
    size = block_size(images, actors)
    sizes = [min(size, images - start) for start in range(0, images, size)]
    ready = stages.list_s * images + stages.block_s * len(sizes)
    free_at = [ready + stages.start_s] * actors  # a heap: when each worker takes its next block
    arrivals: list[tuple[float, int]] = []
    for count in sizes:
        begun = free_at[0]
        group = -(-count // MESSAGES_PER_BLOCK)
        for done in range(0, count, group):
            answered = min(group, count - done)
            arrivals.append((begun + (done + answered) * stages.image_s, answered))
        heapq.heapreplace(free_at, begun + count * stages.image_s)
    driver = serial = ready
    for arrived, captions in sorted(arrivals):
        cost = stages.message_s + captions * stages.record_s
        driver = max(driver, arrived) + cost
        serial += cost
    tail = stages.write_s * images
    seconds = driver + tail
    working = images * stages.image_s / (actors * seconds)
    losses = {  # seconds in which workers wait, by what they wait for
        "driver: listing and writing": stages.list_s * images + tail,
        "driver: sending blocks": stages.block_s * len(sizes),
        "starting the workers": stages.start_s,
        "driver: messages and journal": driver - max(arrivals)[0],
        "too few images": max(arrivals)[0] - ready - stages.start_s - images * stages.image_s / actors,
    }
    busy = "reading" if stages.read_s / stages.readers > stages.caption_s else "captioning"
    return Outcome(
        images=images,
        actors=actors,
        seconds=seconds,
        images_per_s=images / seconds,
        worker_busy=working,
        driver_busy=(serial + tail) / seconds,
        bottleneck=busy if working >= BUSY else max(losses, key=losses.__getitem__),
    )
