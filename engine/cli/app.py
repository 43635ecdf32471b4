"""The command line: arguments in, one call, an exit code out; heavy imports live inside the commands."""

from __future__ import annotations

import warnings

import click

from engine.cli import machine, results
from engine.cli.caption import caption
from engine.cli.shared import OneLineGroup
from engine.errors import UsageError
from engine.version import __version__

FIRST_STEPS = """\
engine captions folders of images with a BLIP model. Begin with these:

  engine caption --input FOLDER --out run.csv             caption images; --bundle DIR is your own model
  engine report --run run.csv --images FOLDER --out page  look at the captions in a browser
  engine info                                             what is installed, what is missing, and why

engine --help lists all commands, engine COMMAND --help the options of one."""
"""What `engine` alone prints."""


@click.group(cls=OneLineGroup, invoke_without_command=True)
@click.version_option(__version__)
@click.pass_context
def main(context: click.Context) -> None:
    """Caption directories of images with BLIP: the words of Hugging Face, without torch."""
    if context.invoked_subcommand is None:
        click.echo(FIRST_STEPS, err=True)
        context.exit(UsageError.exit_code)
    warnings.filterwarnings("ignore", module=r"PIL\b")  # of pictures that are read nevertheless


for _command in (
    caption,
    *(machine.verify, machine.bench, machine.plan, machine.info),
    *(results.score, results.rerank),
    *(results.submit, results.check),
    results.report,
):
    main.add_command(_command)
