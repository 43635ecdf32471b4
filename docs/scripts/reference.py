"""Write the option tables of README.md and docs/ from the declarations of the commands themselves.

    python -m docs.scripts.reference

A table stands between `<!-- options: NAME -->` and `<!-- end -->`. NAME is a command (`engine caption`), a section of
its help (`engine caption / Inputs`), or one of `decoding`, `recipes`, `settings`, `make`.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click

from benchmarks.figures import PAGES, ROOT, fill
from engine.files.atomic import write_atomically
from engine.options import DECODE_OPTIONS, DEFAULT_NEW_TOKENS, DEFAULTS

GROUPS = {"engine": "engine.cli.app", "python -m export": "export.__main__", "python -m train": "train.__main__"}
"""How a command line begins, and the module whose `main` it is."""


def find_command(words: str) -> click.Command:
    """Return the command of a command line, such as `engine score compare`."""
    start = max((start for start in GROUPS if words.startswith(start)), key=len)
    command: click.Command = importlib.import_module(GROUPS[start]).main
    for word in words.removeprefix(start).split():
        assert isinstance(command, click.Group), words
        command = command.commands[word]
    return command


def table(header: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """Return a Markdown table; bars within cells are escaped."""
    header = list(header)
    lines = [header, ["---"] * len(header), *([str(cell).replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def options_of(command: click.Command, section: str = "") -> str:
    """Return the options of a command, or of one section of its help, as a table."""
    context = click.Context(command)
    rows = []
    for one in command.params:
        if not section and isinstance(one, click.Argument):
            rows.append([f"`{one.make_metavar(context)}`", "required" if one.required else "", ""])
        elif isinstance(one, click.Option) and section in ("", getattr(one, "section", "Other")):
            rows.append([f"`{_written(one)}`", _default(one), one.help or ""])
    return table(["option", "default", "what it does"], rows)


def _written(one: click.Option) -> str:
    if one.is_flag or one.count:
        return " / ".join([*one.opts, *one.secondary_opts])
    if isinstance(one.type, click.Choice):
        return f"{one.opts[0]} {{{','.join(one.type.choices)}}}"
    kind = one.metavar or {"integer": "N", "integer range": "N", "float": "X"}.get(one.type.name, one.type.name.upper())
    return f"{one.opts[0]} {kind}"


def _default(one: click.Option) -> str:
    if one.required:
        return "required"
    if one.multiple:
        return "may be repeated"
    given = one.to_info_dict()["default"]
    if getattr(one, "section", "") == "Decoding":
        declaration = next(option for option, _ in DECODE_OPTIONS.values() if option.flag == one.opts[0])
        own = "" if declaration.default is None else f"`{_value(declaration.default)}`"
        return ", else ".join(filter(None, ["the bundle's", own])) if declaration.in_bundle else own
    return "" if given is None or isinstance(given, bool) or given == () else f"`{given}`"


def decoding() -> str:
    """Return Hugging Face's names of the decoding options, with option, default and meaning."""
    rows = []
    for name, (option, _) in DECODE_OPTIONS.items():
        default = DEFAULTS[name]
        shown = "" if default is None else f"`{str(default).lower() if isinstance(default, bool) else default}`"
        if name == "max_new_tokens":
            shown = f"`{DEFAULT_NEW_TOKENS}`, where `max_length` is not given either"
        flag = f"`{option.flag}`" if option.flag else ""
        rows.append([f"`{name}`", flag, shown, option.help])
    return table(["Hugging Face's name", "option", "default", "meaning"], rows)


def recipes() -> str:
    """Return the named recipes: what differs from medblip-base."""
    from train.recipe import RECIPES

    base = RECIPES["medblip-base"].settings()
    rows = []
    for name, recipe in RECIPES.items():
        changed = {key: value for key, value in recipe.settings().items() if value != base[key] and key != "name"}
        rows.append([f"`{name}`", ", ".join(f"`{key}={_value(value)}`" for key, value in changed.items())])
    return table(["recipe", "differs from `medblip-base` in"], rows)


def settings() -> str:
    """Return every setting of a recipe with the value of medblip-base."""
    from train.recipe import RECIPES

    values = {key: value for key, value in RECIPES["medblip-base"].settings().items() if key != "name"}
    return table(["setting", "value"], ([f"`{key}`", f"`{_value(value)}`"] for key, value in values.items()))


def _value(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(value) or "none"
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def make_targets() -> str:
    """Return what `make help` lists."""
    found = re.findall(r"^([a-z-]+):.*?## (.+)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    return table(["command", "what it does"], ([f"`make {name}`", text] for name, text in found))


def reference(name: str) -> str:
    """Return the table `name` as it stands in a page."""
    own = {"decoding": decoding, "recipes": recipes, "settings": settings, "make": make_targets}
    if name in own:
        return f"\n{own[name]()}\n"
    words, _, section = name.partition(" / ")
    command = find_command(words)
    text = "" if section or words == "python -m export" else f"\n{' '.join((command.help or '').split())}\n"
    return f"{text}\n{options_of(command, section)}\n"


def render(page: Path) -> str:
    """Return the text of a page with its option tables as the commands have them now."""
    return fill(page.read_text(encoding="utf-8"), "options", reference)


@click.command()
def main() -> None:
    """Write every table anew; say which pages changed."""
    for page in PAGES:
        text = render(page)
        if text != page.read_text(encoding="utf-8"):
            write_atomically(page, text)
            click.echo(f"{page.relative_to(ROOT)}: written anew")


if __name__ == "__main__":
    main()
