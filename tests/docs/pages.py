"""Parse the pages of the documentation: code blocks with their marks, headings, links."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from benchmarks.figures import PAGES, ROOT

LINKING = (*PAGES, ROOT / "CONTRIBUTING.md")
"""Pages whose links are checked."""
MARK = re.compile(r"<!-- (needs|run by): (.+?) -->")
CANNOT = ("gpu", "network", "a cluster")
"""Allowed values of `<!-- needs: ... -->`: what the test machine does not have."""


@dataclass(frozen=True)
class Block:
    """A code block: first line, language, text, and the mark above it, such as ("needs", "gpu")."""

    page: Path
    line: int
    language: str
    text: str
    mark: tuple[str, str] | None

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"

    @property
    def lines(self) -> list[str]:
        """Return the commands of a shell block, with continued lines joined and without comments."""
        joined = self.text.replace("\\\n", " ").splitlines()
        return [line.strip() for line in joined if line.strip() and not line.lstrip().startswith("#")]


def name_of(page: Path) -> str:
    """Return the path of a page relative to the repository."""
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, language: str) -> list[Block]:
    """Return the code blocks of one language in a page."""
    lines = page.read_text(encoding="utf-8").splitlines()
    parsed, start = [], None
    for number, line in enumerate(lines):
        if start is None and (opening := re.fullmatch(r"```(\w+)", line)):
            start, kind = number, opening[1]
        elif start is not None and line == "```":
            mark = MARK.fullmatch(lines[start - 1].strip())
            text = "\n".join(lines[start + 1 : number])
            parsed.append(Block(page, start + 1, kind, text, (mark[1], mark[2]) if mark else None))
            start = None
    return [block for block in parsed if block.language == language]


def words_of(line: str) -> list[str]:
    """Split a command into words, without a comment at its end."""
    return shlex.split(line, comments=True)


def slug(heading: str) -> str:
    """Return the anchor of a heading, which is the same on GitHub and in the site."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def without_code(page: Path) -> str:
    """Return a page without its code blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page."""
    return {slug(heading) for heading in re.findall(r"^#+ (.+)$", without_code(page), re.MULTILINE)}


def links(page: Path) -> list[str]:
    """Return the targets of all links and images of a page that are inside the repository."""
    targets = re.findall(r"\]\(([^)\s]+)\)", without_code(page))
    return [target for target in targets if not re.match(r"[a-z]+:", target)]
