"""The `engine` command: each command parses its arguments and makes one call. Heavy imports are inside the commands."""

from __future__ import annotations

import warnings

import click

from engine.cli import compare, machine, models, results
from engine.cli.calibrate import calibrate
from engine.cli.caption import EXAMPLE, caption, explain, merge
from engine.cli.duplicates import duplicates
from engine.cli.shared import OneLineGroup
from engine.errors import UsageError
from engine.version import __version__

FIRST_STEPS = f"""\
engine captions folders of images with BLIP, GIT, Florence-2, VisionEncoderDecoder and ClipCap-like models:

  engine caption --model {EXAMPLE} --input photos --out captions.csv
  engine report --run captions.csv --images photos --out page

The first fetches the model once and captions the images in the folder photos. The second makes a page to view them.
--model also accepts your own checkpoint: a folder or a .pth file.

  engine models    list the models that are ready on this machine
  engine info      show what is installed, what is missing, and why

engine --help lists all commands, engine COMMAND --help the options of a command."""
"""Printed by `engine` without a command."""


@click.group(cls=OneLineGroup, invoke_without_command=True)
@click.version_option(__version__)
@click.pass_context
def main(context: click.Context) -> None:
    """Caption folders of images: the same captions as Hugging Face, without torch."""
    if context.invoked_subcommand is None:
        click.echo(FIRST_STEPS, err=True)
        context.exit(UsageError.exit_code)
    warnings.filterwarnings("ignore", module=r"PIL\b")  # warnings about images that can still be read


for _command in (
    *(caption, merge, explain),
    *(models.get, models.models),
    *(machine.verify, machine.bench, machine.plan, machine.info),
    *(results.score, results.rerank, calibrate, duplicates),
    *(results.submit, results.check),
    results.report,
):
    main.add_command(_command)
results.score.add_command(compare.compare)
