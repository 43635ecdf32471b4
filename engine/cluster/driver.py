"""Captions from the workers of a Ray cluster: images go out in blocks, captions come back as they are made."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from engine.bundle.ensemble import BundlePlace, absolute, open_place
from engine.bundle.manifest import Bundle
from engine.bundle.tokenizer import CaptionTokenizer
from engine.captioner import Todo
from engine.captions import Caption
from engine.cluster.session import LOCAL, cluster
from engine.cluster.worker import AttemptCounter, CaptionWorker, NodeFacts, inspect_node
from engine.errors import EngineError, ImageError, UsageError
from engine.inputs.images import ImageFile
from engine.inputs.notes import ImageNote
from engine.options import DecodeOptions
from engine.runtime import CPU_BACKENDS, Runtime, Workers
from engine.searches import search_for, searches_for
from engine.workers.messages import COLUMN, WorkOrder, pack_images, unpack_answer

Say = Callable[[str], None]

MOST_IN_BLOCK = 512
"""Images in a block at most: what a killed worker has to do again."""
BLOCKS_PER_ACTOR = 4
"""Blocks a worker gets at least, so that slow ones leave some to fast ones."""
BLOCKS_IN_FLIGHT = 2
"""Blocks a worker has at a time: when one ends, images of the other fill its slots."""
MAX_LOADING_DEATHS = 10
"""Workers that may die one after another while they load."""


def block_size(images: int, actors: int) -> int:
    """Return how many images a block holds."""
    return max(1, min(MOST_IN_BLOCK, -(-images // (actors * BLOCKS_PER_ACTOR))))


@dataclass(frozen=True)
class WorkerPlan:
    """`actors` workers with `cpus` CPUs and `gpus` GPUs (0 or 1) each, at most `peers` of them on a node."""

    actors: int
    cpus: int
    gpus: int
    peers: int

    def __str__(self) -> str:
        cpus = f"{self.cpus} CPU{'s' if self.cpus > 1 else ''}"
        return f"{self.actors} worker{'s' if self.actors > 1 else ''} with {'a GPU and ' if self.gpus else ''}{cpus}"


@contextmanager
def open_cluster(
    place: BundlePlace | None, asked: DecodeOptions, rows: int | None, runtime: Runtime, workers: Workers, say: Say
) -> Iterator[ClusterSource]:
    """Connect to a cluster, and ask a node what the backend is there; `say` gets how many workers there will be."""
    bundle = open_place(place)  # a damaged bundle or a wrong option is found before a cluster starts
    search_for(bundle, tokenizer := CaptionTokenizer(bundle), asked)
    with cluster(workers.address or LOCAL) as ray:
        gpus = 0 if runtime.backend in CPU_BACKENDS else int(ray.cluster_resources().get("GPU", 0))
        node = _ask_a_node(ray, runtime.backend, min(gpus, 1))
        resources = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        gpus = 0 if node.backend in CPU_BACKENDS else gpus
        team = plan_workers(resources, gpus, actors=workers.actors, threads=runtime.threads)
        say(f"backend: {node.backend}, {team}")
        order = WorkOrder(
            bundle=absolute(place),
            digest=bundle.digest,
            environment=node.environment,
            runtime=replace(
                runtime, backend=node.backend, threads=team.cpus, plans=runtime.plans and runtime.plans.absolute()
            ),
            peers=team.peers,
            num_nodes=len(resources),
            rows=rows,
        )
        yield ClusterSource(ray, bundle, tokenizer, order, team)


def _ask_a_node(ray: Any, backend: str, gpus: int) -> NodeFacts:
    try:
        node: NodeFacts = ray.get(ray.remote(num_cpus=0, num_gpus=gpus)(inspect_node).remote(backend))
    except ray.exceptions.RayError as error:
        raise EngineError(
            f"a node cannot run the engine ({_first_line(error)}): install blip-caption-engine, as it is here, on all"
        ) from error
    if node.error:
        raise (UsageError if node.exit_code == UsageError.exit_code else EngineError)(node.error)
    return node


def plan_workers(nodes: list[Mapping[str, float]], gpus: int, *, actors: int | None, threads: int | None) -> WorkerPlan:
    """Return one worker a GPU, where there are `gpus` of them; on CPUs as many as there is room for with `threads` CPUs
    each, by default a node's.

    `nodes` are the resources of each node, by Ray's names. Raises UsageError for more `actors` than there is room for.
    """
    cores = [int(node["CPU"]) for node in nodes if node.get("CPU", 0) >= 1]
    if gpus:
        cpus = threads or 1
        fitting = [min(int(node.get("GPU", 0)), int(node.get("CPU", 0)) // cpus) for node in nodes]
        if sum(fitting) < (actors or 1):
            raise UsageError(
                f"the Ray cluster has room for {sum(fitting)} workers with a GPU and {cpus} CPUs: ask for fewer "
                "--ray-actors or --threads"
            )
        return WorkerPlan(actors or sum(fitting), cpus, 1, min(actors or sum(fitting), max(fitting)))
    if not cores:
        raise EngineError("the Ray cluster has no CPUs: start its nodes with some (ray start --num-cpus)")
    cpus = threads or min(cores)
    if threads is None and actors is not None:
        cpus = max(1, min(cpus, sum(cores) // actors))
    room = sum(count // cpus for count in cores)
    if room < (actors or 1):
        raise UsageError(
            f"the Ray cluster has room for {room} workers with {cpus} CPUs: ask for fewer --ray-actors or --threads"
        )
    return WorkerPlan(actors or room, cpus, 0, min(actors or room, max(cores) // cpus))


class ClusterSource:
    """A team of workers, started when captions are asked for."""

    def __init__(
        self, ray: Any, bundle: Bundle, tokenizer: CaptionTokenizer, order: WorkOrder, team: WorkerPlan
    ) -> None:
        self.bundle = bundle
        self._tokenizer = tokenizer
        self.backend_name = order.runtime.backend
        self.environment = order.environment.rpartition("|engine:")[0]
        self.notes: list[ImageNote] = []
        self._ray, self._order, self._team = ray, order, team

    def resolve(self, asked: DecodeOptions, prompts: Mapping[str, str] | None = None) -> DecodeOptions:
        options = asked.over(self.bundle.generation)
        searches_for(self.bundle, self._tokenizer, options, prompts)
        return options

    def captions(self, options: DecodeOptions, todo: Todo, say: Say) -> Iterator[Caption]:
        """See Source. A worker that dies is replaced and its block done again; what is nevertheless missing in the end
        goes out once more.
        """
        self._order = replace(self._order, options=options, prompts=todo.prompts)
        while missing := list(todo.remaining()):
            paths = {image.id: str(image.source) for image in missing}
            for answer in map(unpack_answer, self._answers(missing)):
                for name, reason in answer.failures.items():
                    todo.fail(ImageError(paths[name], reason))
                self.notes += answer.image_notes
                if answer.note:
                    say(answer.note)
                yield from (caption for caption in answer.captions if not todo.has(caption.id))
            if len(list(todo.remaining())) == len(missing):
                raise EngineError("the workers answered without captions: run the same command again, or without --ray")

    def _answers(self, images: list[ImageFile]) -> Iterator[str]:
        """Yield what the workers say to blocks of images, as they say it."""
        import pyarrow as pa

        ray, team = self._ray, self._team
        size = block_size(len(images), team.actors)
        blocks = [images[start : start + size] for start in range(0, len(images), size)]
        configure_ray_data(ray.data.DataContext.get_current())
        answers = ray.data.from_arrow([pa.table({COLUMN: [pack_images(block)]}) for block in blocks]).map_batches(
            CaptionWorker,
            fn_constructor_args=(self._order, start_restarting_actor(ray, AttemptCounter)),
            batch_size=None,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(
                size=min(team.actors, len(blocks)),
                max_tasks_in_flight_per_actor=BLOCKS_IN_FLIGHT,
                max_concurrent_calls_per_actor=BLOCKS_IN_FLIGHT,
                enable_true_multi_threading=True,
            ),
            num_cpus=team.cpus,
            num_gpus=team.gpus,
        )
        try:
            for table in answers.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1):
                yield from table[COLUMN].to_pylist()
        except ray.exceptions.RayTaskError as error:
            if not isinstance(error.cause, ray.exceptions.RayError):
                raise  # a fault of ours, with its traceback
            raise _cluster_failed(error) from error
        except ray.exceptions.RayError as error:
            raise _cluster_failed(error) from error


def start_restarting_actor(ray: Any, kind: type) -> Any:
    """Start an actor that is started anew wherever its process or node dies; what it knew is gone then."""
    return ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(kind).remote()


def _cluster_failed(error: Exception) -> EngineError:
    return EngineError(
        f"the Ray cluster failed ({_first_line(error)}): run the same command again, it goes on from here"
    )


def configure_ray_data(context: Any) -> None:
    """Let Ray Data hand on every message at once, without progress bars; workers may die while they load."""
    context.target_max_block_size = 1
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.max_consecutive_actor_init_deaths = MAX_LOADING_DEATHS


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:300]
