"""Write the tables of README.md and docs/ from the records in benchmarks/results, so that no figure is typed by hand.

    python -m benchmarks.figures

A table is between `<!-- figures: NAME -->` and `<!-- end -->`. The lines below a table name its records, the machine,
the package versions and the date. If a record was made with another demo bundle than the embedded one, they say so.
This program only formats existing records; it runs no benchmark.
"""

from __future__ import annotations

import calendar
import json
import re
import textwrap
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import click

from benchmarks.tables import TABLES, Table
from engine.bundle.manifest import Bundle
from engine.files.atomic import write_atomically

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results"
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
FROM_REPOSITORY = "benchmarks/results"
WIDTH = 120


def fill(text: str, kind: str, make: Callable[[str], str]) -> str:
    """Return a page with `make(NAME)` written between every `<!-- kind: NAME -->` and the next `<!-- end -->`."""
    return re.sub(
        rf"(<!-- {kind}: ([^\n]+?) -->\n).*?(<!-- end -->)",
        lambda match: f"{match[1]}{make(match[2])}\n{match[3]}",
        text,
        flags=re.DOTALL,
    )


def read_record(name: str, folder: Path = RESULTS) -> dict[str, Any]:
    """Return the record `NAME.json` of benchmarks/results, or of another folder."""
    record: dict[str, Any] = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    return record


def figures(name: str, page: Path, folder: Path = RESULTS) -> str:
    """Return the table `name` and the lines below it, with links relative to `page`."""
    table = TABLES[name]
    records = {record: read_record(record, folder) for record in table.records}
    others = [read_record(record, folder) for record in table.elsewhere]
    to_results = FROM_REPOSITORY if page.parent == ROOT else f"../{FROM_REPOSITORY}"
    made = table.make(*records.values(), *others)
    return f"\n{made}\n\n{_measured_with(table, records, to_results)}".rstrip() + "\n"


def _measured_with(table: Table, records: dict[str, dict[str, Any]], to_results: str) -> str:
    """Return the lines below a table. Records with the same machine, versions and date share one paragraph."""
    if table.see is not None:
        return f"*Records:* {table.see}." if table.see else ""
    groups: dict[str, list[str]] = {}
    for name, record in records.items():
        groups.setdefault(_circumstances(record, table.needs_bundle), []).append(name)
    lines = []
    for circumstances, names in groups.items():
        links = ", ".join(f"[{name}]({to_results}/{name}.json)" for name in names)
        what = f"*{'Records' if len(names) > 1 else 'Record'}:* {links}: {circumstances}."
        lines.append(textwrap.fill(what, WIDTH, break_long_words=False, break_on_hyphens=False))
    return "\n\n".join(lines)


def _circumstances(record: dict[str, Any], needs_bundle: bool) -> str:
    machine = record["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    when = date.fromisoformat(machine["date"])
    parts = [
        *([_bundle(record)] if needs_bundle else []),
        f"{machine['cores']} cores of an {machine['processor']}, Python {machine['python']}",
        versions,
        f"{when.day} {calendar.month_name[when.month]} {when.year}",
    ]
    return "; ".join(parts)


def _bundle(record: dict[str, Any]) -> str:
    """Describe the bundle of a record, and whether it is the current demo bundle."""
    workload = record.get("workload") or record.get("setting", {}).get("workload", "demo")
    digest = record.get("bundle_sha256") or record.get("bundle") or record.get("start", "").removeprefix("bundle ")
    if workload != "demo":
        shape = f"BLIP-{workload}" if workload.startswith(("base", "large")) else workload
        return f"random weights in the shape of {shape}" + (f", bundle {digest[:12]}" if digest else "")
    current = Bundle.load().digest[:12]
    if not digest:
        return f"**an unrecorded demo bundle**, possibly not the current one ({current})"
    if digest[:12] != current:
        return f"**an earlier demo bundle, {digest[:12]}**, not the current one ({current})"
    return f"the embedded demo bundle {current}"


def render(page: Path, folder: Path = RESULTS) -> str:
    """Return the text of a page with its tables updated from the records."""
    return fill(page.read_text(encoding="utf-8"), "figures", lambda name: figures(name, page, folder))


@click.command()
def main() -> None:
    """Update the tables of all pages from the records and print the pages that changed."""
    for page in PAGES:
        text = render(page)
        if text != page.read_text(encoding="utf-8"):
            write_atomically(page, text)
            click.echo(f"{page.relative_to(ROOT)}: updated")


if __name__ == "__main__":
    main()
