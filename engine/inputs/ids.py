"""Ids of pictures, however people write them: the one rule of runs, references, manifests and data sets."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path

from engine.errors import DataError
from engine.inputs.kinds import cut_caption_number


class Ids:
    """Known ids. A name finds its id as it is; else by Unicode form, separators and suffix; else by its folders; else
    without white space around it.

    By folders: one of the two paths is the end of the other. `0001` and `ct/s1/0001.png` mean `s1/0001`; `s2/0001` does
    not. `files` are the paths of known ids that were file names: there the id alone has lost its folder.
    """

    def __init__(
        self, known: Iterable[str], aliases: Mapping[str, str] | None = None, files: Mapping[str, str] | None = None
    ) -> None:
        self._known = set(known)
        self._aliases = aliases or {}
        self._files = files or {}
        self._spelled = _unique((spelled(name), name) for name in self._known)

    @cached_property
    def _paths(self) -> dict[str, str]:
        """The ids by their paths in one spelling; made when a name is not found as it is, which is rare."""
        return _unique((spelled(self._files.get(name, name)), name) for name in self._known)

    @cached_property
    def _path_ends(self) -> dict[str, str]:
        return _unique((end, name) for name in self._known for end in _ends(spelled(self._files.get(name, name))))

    @cached_property
    def _stripped(self) -> dict[str, str]:
        return _unique((spelled(name.strip()), name) for name in self._known)

    def find(self, name: str, file: str | None = None) -> str | None:
        """Return the id that a name means, None where there is none, or more than one.

        `file` is the path that the name was cut from, where it was.
        """
        if name in self._known:
            return name
        if name in self._aliases and self._aliases[name] in self._known:
            return self._aliases[name]
        path = spelled(file or name)
        found = self._spelled.get(spelled(name)) or self._path_ends.get(path)
        found = found or next((self._paths[end] for end in _ends(path) if end in self._paths), None)
        return found or self._stripped.get(spelled(name.strip()))

    def find_all(
        self, names: Iterable[str], source: Path | str, files: Mapping[str, str] | None = None
    ) -> dict[str, str]:
        """Return the ids of the names that mean one. Raises DataError where two names of `source` mean the same."""
        found: dict[str, str] = {}
        names_of: dict[str, str] = {}
        for name in names:
            one = self.find(name, (files or {}).get(name))
            if one is None:
                continue
            if names_of.setdefault(one, name) != name:
                raise DataError(f"{source}: {shown(names_of[one])} and {shown(name)} are two names of {shown(one)}")
            found[name] = one
        return found

    def hint(self, name: str) -> str:
        """Return in words how a name that was not found differs from a known id that looks the same; else nothing."""
        bare = _letters(name)
        near = next((known for known in sorted(self._known) if _letters(known) == bare), None)
        return f" (there is {shown(near)}, not {shown(name)})" if near is not None else ""


def spelled(name: str) -> str:
    """Return a name in one spelling: composed characters, `/` between folders, no leading `./`, no image suffix."""
    return cut_caption_number(one_spelling(name))


def one_spelling(name: str) -> str:
    """Return a name as `spelled` does, but with its suffix."""
    return unicodedata.normalize("NFC", name).replace("\\", "/").removeprefix("./")


def shown(name: str) -> str:
    """Return a name as a message shows it: escaped where the eye would not see all of it."""
    is_plain = name == unicodedata.normalize("NFC", name) == name.strip() and name.isprintable()
    return name if is_plain else ascii(name)


def join_some(names: Iterable[str], most: int = 10) -> str:
    """Join names for a message."""
    listed = list(names)
    return ", ".join(map(shown, listed[:most])) + (f" and {len(listed) - most} more" if len(listed) > most else "")


def _ends(path: str) -> list[str]:
    """Return the ends of a path at whole parts, the longest first: a/b/c, b/c, c."""
    parts = path.split("/")
    return ["/".join(parts[i:]) for i in range(len(parts))]


def _unique(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Return {spelling: id} of the spellings that only one id has."""
    found: dict[str, str] = {}
    twice = set()
    for spelling, name in pairs:
        if found.setdefault(spelling, name) != name:
            twice.add(spelling)
    return {spelling: name for spelling, name in found.items() if spelling not in twice}


def _letters(name: str) -> str:
    """Return a name without what the eye passes over: case, white space, marks that print nothing."""
    text = unicodedata.normalize("NFKC", spelled(name)).casefold()
    return "".join(one for one in text if one.isprintable() and not one.isspace())
