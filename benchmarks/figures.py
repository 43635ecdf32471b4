"""Write the tables of README.md and docs/ from the records in benchmarks/results.

    python -m benchmarks.figures

A table is written between `<!-- figures: NAME -->` and `<!-- end -->`, with the machine and versions of its records
below. Records of a demo bundle that is not the embedded one are marked. Nothing is measured.
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
    """Return a page with `make(NAME)` between every `<!-- kind: NAME -->` and the next `<!-- end -->`."""
    return re.sub(
        rf"(<!-- {kind}: ([^\n]+?) -->\n).*?(<!-- end -->)",
        lambda match: f"{match[1]}{make(match[2])}\n{match[3]}",
        text,
        flags=re.DOTALL,
    )


def read_record(name: str, folder: Path = RESULTS) -> dict[str, Any]:
    """Read a record from benchmarks/results."""
    record: dict[str, Any] = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    return record


def figures(name: str, page: Path, folder: Path = RESULTS) -> str:
    """Return the table `name` and the lines about its records, with links relative to `page`."""
    table = TABLES[name]
    records = {record: read_record(record, folder) for record in table.records}
    others = [read_record(record, folder) for record in table.elsewhere]
    to_results = FROM_REPOSITORY if page.parent == ROOT else f"../{FROM_REPOSITORY}"
    return f"\n{table.make(*records.values(), *others)}\n\n{_measured_with(table, records, to_results)}\n"


def _measured_with(table: Table, records: dict[str, dict[str, Any]], to_results: str) -> str:
    """Return the lines below a table: records, grouped by equal machine, versions and date."""
    if table.as_above:
        return "*Records:* as above."
    groups: dict[str, list[str]] = {}
    for name, record in records.items():
        groups.setdefault(_circumstances(record, table.needs_bundle), []).append(name)
    lines = []
    for circumstances, names in groups.items():
        links = ", ".join(f"[{name}]({to_results}/{name}.json)" for name in names)
        line = f"*{'Records' if len(names) > 1 else 'Record'}:* {links}, of {circumstances}."
        lines.append(textwrap.fill(line, WIDTH, break_long_words=False, break_on_hyphens=False))
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
    """Describe the bundle of a record, and mark it if it is not the embedded demo of this version."""
    workload = record.get("workload") or record.get("setting", {}).get("workload", "demo")
    digest = record.get("bundle_sha256") or record.get("bundle") or record.get("start", "").removeprefix("bundle ")
    if workload != "demo":
        return f"BLIP-{workload}'s shape with random weights" + (f", bundle {digest[:12]}" if digest else "")
    present = Bundle.load().digest[:12]
    if not digest:
        return f"**a demo bundle that was not recorded**, perhaps not the present one ({present})"
    if digest[:12] != present:
        return f"**an earlier demo bundle, {digest[:12]}**, not the present one ({present})"
    return f"the embedded demo bundle {present}"


def render(page: Path, folder: Path = RESULTS) -> str:
    """Return the text of a page with its tables made from the current records."""
    return fill(page.read_text(encoding="utf-8"), "figures", lambda name: figures(name, page, folder))


@click.command()
def main() -> None:
    """Write every table again and print the pages that changed."""
    for page in PAGES:
        text = render(page)
        if text != page.read_text(encoding="utf-8"):
            write_atomically(page, text)
            click.echo(f"{page.relative_to(ROOT)}: updated")


if __name__ == "__main__":
    main()
