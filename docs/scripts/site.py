"""MkDocs hook: add pages and images from outside docs/ to the site, and fix the links to them.

In the repository a page of docs/ links to `../benchmarks/LOG.md`. In the site that file is at `benchmarks/LOG.md`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
PAGES = ("CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/LOG.md", "benchmarks/A100.md")
OTHERS = ("benchmarks/results/*.png", "benchmarks/results/*.json")


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the files outside docs/ that the pages link to."""
    others = [path.relative_to(ROOT).as_posix() for pattern in OTHERS for path in sorted(ROOT.glob(pattern))]
    for name in (*PAGES, *others):
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, *, page: Page, **_: Any) -> str:
    """Rewrite links that leave docs/ as links within the site."""
    if page.file.src_uri in PAGES:
        return markdown
    return re.sub(r"\]\(\.\./", "](", markdown)
