"""Fetch checkpoints from the Hugging Face Hub: only the files that are read, and never code.

`HF_ENDPOINT`, `HF_TOKEN`, `HF_HOME` and `HF_HUB_OFFLINE` are variables of huggingface_hub, which stores the files.
"""

from __future__ import annotations

import errno
import glob
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import NoReturn

from engine.bundle.manifest import MANIFEST
from engine.errors import CheckpointError, EngineError, counted
from engine.files.atomic import megabytes, require_space

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)
SETTINGS = (".json", ".txt")
"""Suffixes of configurations and vocabularies, which are small and are fetched together with the weights."""
WEIGHTS = (("model", ".safetensors"), ("pytorch_model", ".bin"))
"""Stems and suffixes of weight files, in transformers' order."""
INDEX = ".index.json"
COMMIT_DIGITS = 12
LIST_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Snapshot:
    """The files of a repository at one commit, in the cache of huggingface_hub.

    `is_newest` is False if the hub was not reached, so that it may have a newer commit.
    """

    folder: Path
    is_newest: bool = True

    @property
    def commit(self) -> str:
        """The full hash of the commit."""
        return self.folder.name


def is_hub_id(name: str) -> bool:
    """Return whether a name has the form `owner/name` or `owner/name@revision`."""
    return bool(HUB_ID.fullmatch(name.partition("@")[0]))


def fetch(name: str, log: Callable[[str], None], room: Callable[[int], Mapping[Path, int]] = lambda _: {}) -> Snapshot:
    """Download what captioning needs of `owner/name` or `owner/name@revision`; files that are there are kept.

    Without a connection the files of an earlier download are returned. `log` gets a line with the number of files,
    their size and folder if any are downloaded. `room` maps the size of the weights in bytes to what will be written
    later, as {folder: bytes}: the disks must have room for that, too. Raises OutputError if they do not, and
    CheckpointError if the hub does not have the checkpoint or does not give access to it.
    """
    repository, _, revision = name.partition("@")
    try:
        return _fetch(name, repository, revision or None, log, room)
    except EngineError:
        raise
    except Exception as error:  # the hub's client uses requests or httpx, which raise their own exceptions
        _explain(name, repository, revision, error)


def _fetch(
    name: str,
    repository: str,
    revision: str | None,
    log: Callable[[str], None],
    room: Callable[[int], Mapping[Path, int]],
) -> Snapshot:
    from huggingface_hub import HfApi, constants, snapshot_download, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError

    try:
        info = HfApi().model_info(repository, revision=revision, files_metadata=True, timeout=LIST_TIMEOUT_S)
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", 0)
        if status < 500 and status != HTTPStatus.TOO_MANY_REQUESTS:
            raise  # the hub answered, but not with this repository
        return _fetched_before(repository, revision, error)
    except Exception as error:  # no connection
        return _fetched_before(repository, revision, error)
    sizes = {entry.rfilename: entry.size or 0 for entry in info.siblings or []}
    weights = weights_of(sizes)
    if not weights:
        _refuse_without_weights(name, sizes)
    # files in subfolders are other checkpoints, such as those of a training
    wanted = [*weights, *(file for file in sizes if "/" not in file and file.endswith(SETTINGS))]
    paths = {file: try_to_load_from_cache(repository, file, revision=info.sha) for file in wanted}
    missing = [file for file, path in paths.items() if not isinstance(path, str)]
    if missing:
        cache, total = Path(constants.HF_HUB_CACHE), sum(sizes[file] for file in missing)
        needs = {cache: total, **room(sum(sizes[file] for file in weights))}
        require_space(needs, name)
        log(
            f"fetching {name} at commit {(info.sha or '')[:COMMIT_DIGITS]}: {counted(len(missing), 'file')}, "
            f"{megabytes(total)} -> {cache}"
        )
    patterns = [glob.escape(file) for file in wanted]
    return Snapshot(Path(snapshot_download(repository, revision=revision, allow_patterns=patterns)))


def _fetched_before(repository: str, revision: str | None, error: Exception) -> Snapshot:
    """Return the files of an earlier download. Raises LocalEntryNotFoundError if it did not get to the weights."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import LocalEntryNotFoundError

    # snapshot_download would miss the files that are never fetched, such as README.md (huggingface_hub 2)
    config = try_to_load_from_cache(repository, "config.json", revision=revision)
    if not isinstance(config, str):
        raise LocalEntryNotFoundError(f"{repository} is not cached") from error
    folder = Path(config).parent
    if not weights_of(path.name for path in folder.iterdir()):
        raise LocalEntryNotFoundError(f"{folder} has no weights") from error
    return Snapshot(folder, is_newest=False)


def weights_of(names: Iterable[str]) -> list[str]:
    """Return the weight files to read among the names of a repository's files, as weight_files does for a folder."""
    top = [name for name in names if "/" not in name]
    for stem, suffix in WEIGHTS:
        if stem + suffix in top:
            return [stem + suffix]
        shards = [name for name in top if name.endswith(suffix) and name.startswith(stem)]
        if shards and (suffix == ".bin" or stem + suffix + INDEX in top):
            return sorted(shards)
    return sorted(name for name in top if name.endswith(".safetensors") and not name.startswith("adapter_"))


def _refuse_without_weights(name: str, files: Iterable[str]) -> NoReturn:
    files = sorted(files)
    if MANIFEST in files and "encoder.onnx" in files:
        raise CheckpointError(f"{name} is a bundle, not a checkpoint: pass it as hf://{name}")
    others = [file for file in files if file.endswith((".pth", ".pt", ".h5", ".msgpack"))]
    raise CheckpointError(
        f"{name} has no weights that can be read from the hub ({', '.join(others[:3]) or 'it has none at all'}): "
        "download an original .pth file yourself and pass its path"
    )


def _explain(name: str, repository: str, revision: str, error: Exception) -> NoReturn:
    """Raise CheckpointError with one line: why the hub did not provide a checkpoint, and what to do."""
    from huggingface_hub import constants, errors

    if isinstance(error, errors.GatedRepoError):
        reason = "it is gated: ask for access on its page, then set HF_TOKEN"
    elif isinstance(error, errors.RevisionNotFoundError):
        reason = f"{repository} has no revision {revision}: see its page for the revisions"
    elif isinstance(error, errors.RepositoryNotFoundError):
        reason = "there is no such repository, or it is private: check the name, or set HF_TOKEN"
    elif isinstance(error, errors.HFValidationError):
        reason = "it cannot be the name of a repository either: check the path"
    elif isinstance(error, errors.HfHubHTTPError) and getattr(error.response, "status_code", 0) in (401, 403):
        reason = "HF_TOKEN is not valid, or gives no access to it: set another, or remove it for a public model"
    elif isinstance(error, errors.LocalEntryNotFoundError):
        status = getattr(getattr(error.__cause__, "response", None), "status_code", None)
        state = "is not used (HF_HUB_OFFLINE is set)" if constants.HF_HUB_OFFLINE else "cannot be reached"
        state = f"answers with HTTP {status}" if status else state
        reason = f"the hub {state}, and the checkpoint is not cached: pass the folder of a checkpoint"
    elif isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        reason = f"{constants.HF_HUB_CACHE} is full ({error.strerror}): free space there, or set HF_HOME"
    else:
        text = " ".join(str(error).split())[:300]
        reason = f"{text}: run the same command again to resume the download, or pass the folder of a checkpoint"
    raise CheckpointError(
        f"{name} is not a local folder, and it cannot be loaded from the Hugging Face Hub: {reason}"
    ) from error
