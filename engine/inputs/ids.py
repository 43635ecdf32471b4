"""Match image ids that are written differently. Runs, references, manifests and data sets all use this rule."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path

from engine.errors import DataError
from engine.inputs.kinds import cut_caption_number


class Ids:
    """A set of known ids, in which names are looked up.

    The lookup tries in this order: the exact name, an alias, the name without differences of Unicode form, separators
    and suffix, the path, the name without surrounding white space. Two paths match if one is the end of the other:
    `0001` and `ct/s1/0001.png` match the id `s1/0001`, and `s2/0001` does not. A match counts only if it is unique.

    `aliases` maps other names of the images to their ids. `files` holds the paths of the ids that were cut from file
    names, since such an id has lost its folder.
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
        """The ids by their paths in one spelling. Built only if a name is not found directly, which is rare."""
        return _unique((spelled(self._files.get(name, name)), name) for name in self._known)

    @cached_property
    def _path_ends(self) -> dict[str, str]:
        return _unique((end, name) for name in self._known for end in _ends(spelled(self._files.get(name, name))))

    @cached_property
    def _stripped(self) -> dict[str, str]:
        return _unique((spelled(name.strip()), name) for name in self._known)

    def find(self, name: str, file: str | None = None) -> str | None:
        """Return the id that a name stands for, or None if there is no match or more than one.

        `file` is the path that the name was cut from, if any.
        """
        if name in self._known:
            return name
        if name in self._aliases and self._aliases[name] in self._known:
            return self._aliases[name]
        path = spelled(file or name)
        match = self._spelled.get(spelled(name)) or self._path_ends.get(path)
        match = match or next((self._paths[end] for end in _ends(path) if end in self._paths), None)
        return match or self._stripped.get(spelled(name.strip()))

    def find_all(
        self,
        names: Iterable[str],
        source: Path | str,
        files: Mapping[str, str] | None = None,
        *,
        are_numbers: bool = False,
    ) -> dict[str, str]:
        """Return {name: id} of all names that match an id.

        With `are_numbers` the names are COCO's numbers of images. If any is an alias, all are: then `2` does not match
        the id of 2.jpg, which may have another number. Raises DataError if two names of `source` match the same id.
        """
        ids: dict[str, str] = {}
        names_of: dict[str, str] = {}
        listed = list(names)
        by_number = are_numbers and any(self._aliases.get(name) in self._known for name in listed)
        for name in listed:
            match = self._aliases.get(name) if by_number else self.find(name, (files or {}).get(name))
            if match not in self._known:
                continue
            if names_of.setdefault(match, name) != name:
                raise DataError(f"{source}: {shown(names_of[match])} and {shown(name)} are two names of {shown(match)}")
            ids[name] = match
        return ids

    def hint(self, name: str) -> str:
        """Return a hint for a message if an unknown name looks the same as a known id, else an empty string."""
        bare = _letters(name)
        near = next((known for known in sorted(self._known) if _letters(known) == bare), None)
        return f" (there is {shown(near)}, not {shown(name)})" if near is not None else ""


def spelled(name: str) -> str:
    """Normalise a name: composed characters, `/` between folders, no leading `./`, no image suffix."""
    return cut_caption_number(one_spelling(name))


def one_spelling(name: str) -> str:
    """Normalise a name like `spelled`, but keep its suffix."""
    return unicodedata.normalize("NFC", name).replace("\\", "/").removeprefix("./")


def shown(name: str) -> str:
    """Return a name as messages show it. A name with invisible or decomposed characters is escaped."""
    is_plain = name == unicodedata.normalize("NFC", name) == name.strip() and name.isprintable()
    return name if is_plain else ascii(name)


def join_some(names: Iterable[str], most: int = 10) -> str:
    """Join names for a message. More than `most` names are counted instead of listed."""
    listed = list(names)
    return ", ".join(map(shown, listed[:most])) + (f" and {len(listed) - most} more" if len(listed) > most else "")


def _ends(path: str) -> list[str]:
    """Return the ends of a path, split at `/`, the longest first: a/b/c, b/c, c."""
    parts = path.split("/")
    return ["/".join(parts[i:]) for i in range(len(parts))]


def _unique(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Return {spelling: id} without the spellings that several ids share."""
    id_of: dict[str, str] = {}
    twice = set()
    for spelling, name in pairs:
        if id_of.setdefault(spelling, name) != name:
            twice.add(spelling)
    return {spelling: name for spelling, name in id_of.items() if spelling not in twice}


def _letters(name: str) -> str:
    """Return a name without differences that are hard to see: case, white space and characters that are not printed."""
    text = unicodedata.normalize("NFKC", spelled(name)).casefold()
    return "".join(char for char in text if char.isprintable() and not char.isspace())
