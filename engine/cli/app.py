"""The command line: arguments in, one call, an exit code out; heavy imports live inside the commands."""

from __future__ import annotations

import warnings

import click

from engine.cli import machine, report, scoring, submission
from engine.cli.caption import caption
from engine.cli.group import OneLineGroup
from engine.version import __version__


@click.group(cls=OneLineGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def main() -> None:
    """Caption directories of images with BLIP: the words of Hugging Face, without torch."""
    warnings.filterwarnings("ignore", module=r"PIL\b")  # of pictures that are read nevertheless


for _command in (
    caption,
    *(machine.verify, machine.bench, machine.plan, machine.info),
    *(scoring.score, scoring.rerank),
    *(submission.submit, submission.check),
    report.report,
):
    main.add_command(_command)
