"""The pages of the documentation, taken apart: code blocks with their marks, headings, links."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from benchmarks.figures import PAGES, ROOT

LINKING = (*PAGES, ROOT / "CONTRIBUTING.md")
"""Pages whose links are looked at."""
MARK = re.compile(r"<!-- (needs|run by): (.+?) -->")
CANNOT = ("gpu", "network", "a cluster")
"""What a block may need that the machine of the tests lacks."""


@dataclass(frozen=True)
class Block:
    """A code block: where it begins, its language, its text, and the mark above it, such as ("needs", "gpu")."""

    page: Path
    line: int
    language: str
    text: str
    mark: tuple[str, str] | None

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"

    @property
    def lines(self) -> list[str]:
        """Return the lines of a shell block, continued ones joined, without comments."""
        joined = self.text.replace("\\\n", " ").splitlines()
        return [line.strip() for line in joined if line.strip() and not line.lstrip().startswith("#")]


def name_of(page: Path) -> str:
    """Return a page's path in the repository."""
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, language: str) -> list[Block]:
    """Return the blocks of a language in a page."""
    lines = page.read_text(encoding="utf-8").splitlines()
    found, start = [], None
    for number, line in enumerate(lines):
        if start is None and (opening := re.fullmatch(r"```(\w+)", line)):
            start, kind = number, opening[1]
        elif start is not None and line == "```":
            mark = MARK.fullmatch(lines[start - 1].strip())
            text = "\n".join(lines[start + 1 : number])
            found.append(Block(page, start + 1, kind, text, (mark[1], mark[2]) if mark else None))
            start = None
    return [block for block in found if block.language == language]


def words_of(line: str) -> list[str]:
    """Return the words of one command, without a comment behind it."""
    return shlex.split(line, comments=True)


def slug(heading: str) -> str:
    """Return the anchor of a heading, as it is made in the repository and in the site."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def without_code(page: Path) -> str:
    """Return a page without its code blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page."""
    return {slug(heading) for heading in re.findall(r"^#+ (.+)$", without_code(page), re.MULTILINE)}


def links(page: Path) -> list[str]:
    """Return the targets of a page's links and pictures within the repository."""
    targets = re.findall(r"\]\(([^)\s]+)\)", without_code(page))
    return [target for target in targets if not re.match(r"[a-z]+:", target)]
