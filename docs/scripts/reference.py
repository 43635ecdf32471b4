"""Write the option tables of README.md and docs/ from the declarations of the commands, and the API from docstrings.

    python -m docs.scripts.reference

A table is between `<!-- options: NAME -->` and `<!-- end -->`. NAME is a command (`engine caption`), a section of its
help (`engine caption / Inputs`), or one of `decoding`, `recipes`, `settings`, `make`. `api MODULE.CLASS METHOD...` is
the signature and docstring of a class and of these methods.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click

from benchmarks.figures import PAGES, ROOT, WIDTH, fill
from engine.files.atomic import write_atomically
from engine.options import DECODE_OPTIONS, DEFAULT_NEW_TOKENS, DEFAULTS

GROUPS = {"engine": "engine.cli.app", "python -m export": "export.__main__", "python -m train": "train.__main__"}
"""Prefix of a command line, and the module whose `main` it runs."""


def find_command(words: str) -> click.Command:
    """Return the command of a command line, such as `engine score compare`."""
    start = max((start for start in GROUPS if words.startswith(start)), key=len)
    command: click.Command = importlib.import_module(GROUPS[start]).main
    for word in words.removeprefix(start).split():
        assert isinstance(command, click.Group), words
        command = command.commands[word]
    return command


def table(header: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """Return a Markdown table; bars inside cells are escaped."""
    header = list(header)
    lines = [header, ["---"] * len(header), *([str(cell).replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def options_of(command: click.Command, section: str = "") -> str:
    """Return the options of a command, or of one section of its help, as a table."""
    context = click.Context(command)
    rows = []
    for param in command.params:
        if not section and isinstance(param, click.Argument):
            rows.append([f"`{param.make_metavar(context)}`", "required" if param.required else "", ""])
        elif not param.expose_value:  # -q and -v, which all commands have
            continue
        elif isinstance(param, click.Option) and section in ("", getattr(param, "section", "Other")):
            rows.append([f"`{_usage(param)}`", _default(param), param.help or ""])
    return table(["option", "default", "what it does"], rows)


def _usage(option: click.Option) -> str:
    """Return an option with its metavar or its choices, such as `--threads N`."""
    if option.is_flag or option.count:
        return " / ".join([*option.opts, *option.secondary_opts])
    if isinstance(option.type, click.Choice):
        return f"{option.opts[0]} {{{','.join(option.type.choices)}}}"
    names = {"integer": "N", "integer range": "N", "float": "X"}
    metavar = option.metavar or names.get(option.type.name, option.type.name.upper())
    return f"{option.opts[0]} {metavar}"


def _default(option: click.Option) -> str:
    """Return the cell `default` of an option: empty for flags and for options without a default."""
    if option.required:
        return "required"
    if option.multiple:
        return "may be repeated"
    default = option.to_info_dict()["default"]
    if getattr(option, "section", "") == "Decoding":
        # click's default of a decoding option is None, so that an option that was not passed does not override the
        # bundle. The real default is in the declaration.
        declaration = next(declared for declared, _ in DECODE_OPTIONS.values() if declared.flag == option.opts[0])
        own = "" if declaration.default is None else f"`{_value(declaration.default)}`"
        return ", else ".join(filter(None, ["the bundle's", own])) if declaration.in_bundle else own
    return "" if default is None or isinstance(default, bool) or default == () else f"`{default}`"


def decoding() -> str:
    """Return the decoding options under Hugging Face's names, with option, default and meaning."""
    rows = []
    for name, (option, _) in DECODE_OPTIONS.items():
        default = DEFAULTS[name]
        shown = "" if default is None else f"`{str(default).lower() if isinstance(default, bool) else default}`"
        if name == "max_new_tokens":
            shown = f"`{DEFAULT_NEW_TOKENS}`, if `max_length` is not set either"
        flag = f"`{option.flag}`" if option.flag else ""
        rows.append([f"`{name}`", flag, shown, option.help])
    return table(["Hugging Face's name", "option", "default", "meaning"], rows)


def recipes() -> str:
    """Return the named recipes with the settings that differ from medblip-base."""
    from train.recipe import RECIPES

    base = RECIPES["medblip-base"].settings()
    rows = []
    for name, recipe in RECIPES.items():
        changed = {key: value for key, value in recipe.settings().items() if value != base[key] and key != "name"}
        rows.append([f"`{name}`", ", ".join(f"`{key}={_value(value)}`" for key, value in changed.items())])
    return table(["recipe", "differs from `medblip-base` in"], rows)


def settings() -> str:
    """Return every setting of a recipe with its value in medblip-base."""
    from train.recipe import RECIPES

    values = {key: value for key, value in RECIPES["medblip-base"].settings().items() if key != "name"}
    return table(["setting", "value"], ([f"`{key}`", f"`{_value(value)}`"] for key, value in values.items()))


def _value(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(value) or "none"
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def make_targets() -> str:
    """Return the targets that `make help` lists."""
    targets = re.findall(r"^([a-z-]+):.*?## (.+)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    return table(["command", "what it does"], ([f"`make {name}`", text] for name, text in targets))


def api(words: str) -> str:
    """Return headings, signatures and docstrings of a class and of its methods, `MODULE.CLASS METHOD METHOD`."""
    where, *methods = words.split()
    module, _, name = where.rpartition(".")
    found = getattr(importlib.import_module(module), name)
    parts = [f"## {name}\n\n{prose(inspect.getdoc(found) or '')}"]
    if dataclasses.is_dataclass(found) and not methods:
        fields = [f"    {field.name}: {field.type}" for field in dataclasses.fields(found)]
        computed = [
            f"    {key}: {value.fget.__annotations__['return']}  # property"
            for key, value in vars(found).items()
            if isinstance(value, property)
        ]
        parts.append("\n".join(["```py", f"class {name}:", *fields, *computed, "```"]))
    for method in methods:
        function = getattr(found, method)
        heading, text = f"{name}.{method}", prose(inspect.getdoc(function) or "")
        parts.append(f"### {heading}\n\n{signature(heading, function)}\n\n{text}")
    return "\n\n".join(parts)


def signature(name: str, function: Callable[..., Any]) -> str:
    """Return a signature as a block of Python, with one parameter per line."""
    found = inspect.signature(function)
    lines, kind = [], None
    for param in found.parameters.values():
        if param.name == "self":
            continue
        if param.kind is param.KEYWORD_ONLY and kind is not param.KEYWORD_ONLY:
            lines.append("    *,")
        kind = param.kind
        lines.append(f"    {str(param).replace(repr(param.annotation), param.annotation)},")
    inside = "\n".join(["", *lines, ""]) if lines else ""
    return f"```py\n{name}({inside}) -> {found.return_annotation}\n```"


def prose(docstring: str) -> str:
    """Return a docstring as Markdown: aligned `name  text` lines become a list, indented lines a block of Python.

    Its blocks are marked `py`: the tests run only those marked `python`.
    """
    blocks = []
    for block in docstring.split("\n\n"):
        if re.match(r"\w+ {2,}\S", block):
            items = re.sub(r"\n +", " ", block).splitlines()
            entries = (re.sub(r"^(\w+) +", r"* `\1`: ", item) for item in items)
            blocks.append("\n".join(textwrap.fill(entry, WIDTH, subsequent_indent="  ") for entry in entries))
        elif block.startswith("    "):
            blocks.append(f"```py\n{textwrap.dedent(block)}\n```")
        else:
            blocks.append(block)
    return "\n\n".join(blocks)


def reference(name: str) -> str:
    """Return the table `name`, with the description of the command above it."""
    if name.startswith("api "):
        return f"\n{api(name.removeprefix('api '))}\n"
    special = {"decoding": decoding, "recipes": recipes, "settings": settings, "make": make_targets}
    if name in special:
        return f"\n{special[name]()}\n"
    words, _, section = name.partition(" / ")
    command = find_command(words)
    text = "" if section or words == "python -m export" else f"\n{' '.join((command.help or '').split())}\n"
    return f"{text}\n{options_of(command, section)}\n"


def render(page: Path) -> str:
    """Return the text of a page with its option tables updated from the commands."""
    return fill(page.read_text(encoding="utf-8"), "options", reference)


@click.command()
def main() -> None:
    """Update the option tables of all pages and print the pages that changed."""
    for page in PAGES:
        text = render(page)
        if text != page.read_text(encoding="utf-8"):
            write_atomically(page, text)
            click.echo(f"{page.relative_to(ROOT)}: updated")


if __name__ == "__main__":
    main()
