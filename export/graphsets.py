"""Write the graph sets in the wheel, from which the engine converts checkpoints without torch.

    python -m export.graphsets

A set holds the graphs of an architecture without weights. They are traced twice, from models of other image sizes and
vocabularies: what differs becomes a parameter, and a difference that is not a parameter is an error.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

import click
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_utils import no_init_weights

from engine.checkpoints.convert import parameters
from engine.checkpoints.families import RULES
from engine.checkpoints.graphs import Graph, GraphSet, Number, save_graphs, shipped_graphs
from engine.cli.shared import PATH, OneLine
from engine.options import PRECISIONS
from export.families import PUBLISHED, family_for, family_of
from export.families.modules import Normalisation
from export.graphs.exporters import trace, without_weights
from export.graphs.templates import with_parameters


class Example(NamedTuple):
    """What a checkpoint decides: patches per side of an image, vocabulary, positions, rescale with mean and std."""

    patches: int
    vocab_size: int
    max_positions: int
    normalisation: Normalisation


EXAMPLES = (
    Example(5, 1009, 97, (1 / 255, [0.1, 0.2, 0.3], [0.4, 0.5, 0.6])),
    Example(7, 1013, 101, (1 / 127, [0.3, 0.2, 0.1], [0.7, 0.6, 0.8])),
)
"""Small, so that tracing is quick. Each parameter has its own number, by which it is recognised in a graph.

Not 2 patches: torch's tracer stores equal constants once, and 5, their number of positions, is its number of float16.
"""
FINGERPRINT = EXAMPLES[0]._replace(patches=2)
"""Sizes that `fingerprint` traces. The sets change when these change."""


def make_graphs(name: str, config: PretrainedConfig) -> list[GraphSet]:
    """Return the graph sets of an architecture. Sizes in `config` that a checkpoint decides are not used."""
    made_by, tied = fingerprint(config), tied_weights(model_of(config, EXAMPLES[0]))
    (numbers, graphs), (other_numbers, others) = (
        (numbers_of(config, example), trace_all(config, example)) for example in EXAMPLES
    )
    return [
        GraphSet(
            architecture=name,
            family=config.model_type,
            precision=precision,
            shape=RULES[config.model_type].shape(config.to_dict()),
            made_by=made_by,
            tied=tied,
            graphs=tuple(
                with_parameters(graph, other, numbers, other_numbers)
                for graph, other in zip(graphs[precision], others[precision], strict=True)
            ),
        )
        for precision in PRECISIONS
    ]


def trace_all(config: PretrainedConfig, example: Example) -> dict[str, tuple[Graph, ...]]:
    """Return {precision: graphs} of an architecture with the sizes of an example."""
    model = model_of(config, example)
    sizes, float32 = family_of(model).sizes(model.config), trace(model, example.normalisation)
    return {
        "fp32": without_weights(float32, sizes),
        "fp16": without_weights(trace(model.half(), example.normalisation), sizes),
        "int8": without_weights(float32, sizes, is_int8=True),
    }


def model_of(config: PretrainedConfig, example: Example) -> PreTrainedModel:
    """Return a model of an architecture with the sizes of an example. Its weights are not initialised."""
    with no_init_weights():  # the memory of the weights is not touched, so it takes none
        model = family_for(config).model_class(sized(config, example)).eval()
    for part in model.modules():
        if isinstance(part, PreTrainedModel):  # VisionEncoderDecoderModel does not tie its decoder's weights
            part.tie_weights()
    return model


def sized(config: PretrainedConfig, example: Example) -> PretrainedConfig:
    """Return the configuration of an architecture with the sizes of an example."""
    patches, vocab_size, max_positions, _ = example
    return family_for(config).with_sizes(config, patches=patches, vocab_size=vocab_size, max_positions=max_positions)


def numbers_of(config: PretrainedConfig, example: Example) -> dict[str, Number]:
    """Return the parameters of an example's graphs."""
    sizes = family_for(config).sizes(sized(config, example))
    return parameters(sizes, sizes.image_size, *example.normalisation)


def tied_weights(model: PreTrainedModel) -> dict[str, str]:
    """Return {name: first name} of weights with several names."""
    first = {weight: name for name, weight in model.named_parameters()}
    every = model.named_parameters(remove_duplicate=False)
    return {name: first[weight] for name, weight in every if name != first[weight]}


def fingerprint(config: PretrainedConfig) -> str:
    """Return 12 digits that change with the graphs of an export: those of a tiny model, made in seconds.

    Every set holds the fingerprint of the code that made it, so that a test finds sets that are out of date.
    """
    small = family_for(config).shrunk(config)
    return hashlib.sha256(repr(trace_all(small, FINGERPRINT)).encode()).hexdigest()[:12]


@click.command(cls=OneLine)
@click.option("--out", type=PATH, help="Folder to write the graph sets to. Default: the engine's own.")
def main(out: Path | None) -> None:
    """Trace the published architectures and write their graph sets; takes some minutes. Sets that did not change are
    not written again."""
    for name, config in PUBLISHED.items():
        for graphs in make_graphs(name, config):
            path = save_graphs(graphs, out or shipped_graphs())
            click.echo(f"{path}: {path.stat().st_size:,} bytes, version {graphs.version}")


if __name__ == "__main__":
    main()
