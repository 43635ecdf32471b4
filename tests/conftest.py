"""Shared fixtures: a tiny checkpoint, its bundle and both ways of running it, made once a session."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from tests.helpers import cores  # isort: skip  # before numpy

import hypothesis
import pytest
from filelock import FileLock

from engine.backends import open_backend
from engine.bundle.manifest import Bundle
from engine.captioner import Captioner
from engine.runtime import Runtime

hypothesis.settings.register_profile("long", max_examples=5_000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    needs_two = item.get_closest_marker("two_cores") is not None
    if needs_two and cores.COUNT < 2:
        pytest.skip("two worker processes need two cores")
    cores.use_cores(every=needs_two)


Once = Callable[[str, Callable[[Path], object]], Path]


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Once:
    """once(name, make): a folder that `make` fills once for all processes of the tests. No test may change it."""
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if cores.WORKER else base) / "shared"
    shared.mkdir(exist_ok=True)

    def folder_of(name: str, make: Callable[[Path], object]) -> Path:
        folder, is_whole = shared / name, shared / f"{name}.whole"
        with FileLock(shared / f"{name}.lock"):
            if not is_whole.exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                make(folder)
                is_whole.touch()
        return folder

    return folder_of


@pytest.fixture(scope="session")
def exported(once: Once) -> Callable[..., tuple[Path, Path]]:
    """exported("git"), exported("florence") or exported(encoder, decoder): a checkpoint and its bundle, made once."""

    def checkpoint_and_bundle(*model: str) -> tuple[Path, Path]:
        from export.bundle import export_bundle
        from tests.helpers.tiny_florence import make_florence_checkpoint
        from tests.helpers.tiny_git import make_git_checkpoint
        from tests.helpers.tiny_pairs import make_pair

        def make(folder: Path) -> None:
            if model == ("git",):
                make_git_checkpoint(folder / "checkpoint")
            elif model == ("florence",):
                make_florence_checkpoint(folder / "checkpoint")
            else:
                make_pair(folder / "checkpoint", *model)
            export_bundle(folder / "checkpoint", folder / "bundle", lambda _: None)  # replays its golden recordings

        folder = once("-".join(model), make)
        return folder / "checkpoint", folder / "bundle"

    return checkpoint_and_bundle


@pytest.fixture(scope="session")
def other_families(once: Once) -> Path:
    """A folder with small checkpoints of all families but BLIP that convert without torch; graphs/ has their sets."""

    def make(folder: Path) -> None:
        from engine.checkpoints.graphs import save_graphs
        from export.graphsets import make_graphs
        from export.reference.huggingface import Reference
        from tests.helpers.tiny_florence import make_florence_checkpoint
        from tests.helpers.tiny_git import make_git_checkpoint
        from tests.helpers.tiny_pairs import make_pair

        checkpoints = [
            make_pair(folder / "vit-gpt2", "vit", "gpt2"),
            make_pair(folder / "trocr", "vit", "trocr", vision={"qkv_bias": False}),
            make_git_checkpoint(folder / "git"),
            make_florence_checkpoint(folder / "florence"),
            make_florence_checkpoint(folder / "first florence", is_first=True),
        ]
        for checkpoint in checkpoints:
            for one in make_graphs(f"tiny-{checkpoint.name}", Reference.load(checkpoint).model.config):
                save_graphs(one, folder / "graphs")

    return once("others", make)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.helpers.tiny import make_checkpoint

    return make_checkpoint(tmp_path_factory.mktemp("tiny") / "checkpoint")


@pytest.fixture(scope="session")
def tiny_bundle(tiny_checkpoint: Path) -> Path:
    from export.bundle import export_bundle

    export_bundle(tiny_checkpoint, tiny_checkpoint.parent / "bundle", lambda _: None)
    return tiny_checkpoint.parent / "bundle"


@pytest.fixture(scope="session")
def rounded_bundles(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny checkpoint in fp16 and int8."""
    from export.bundle import export_bundle

    folder = tmp_path_factory.mktemp("rounded")
    return {
        name: export_bundle(tiny_checkpoint, folder / name, lambda _: None, precision=name).path
        for name in ("fp16", "int8")
    }


@pytest.fixture(scope="session")
def tiny_reference(tiny_checkpoint: Path):
    from export.reference.huggingface import Reference

    return Reference.load(tiny_checkpoint)


@pytest.fixture(scope="session")
def tiny_captioner(tiny_bundle: Path) -> Captioner:
    bundle = Bundle.load(tiny_bundle)
    return Captioner(bundle, open_backend(bundle, Runtime("cpu", threads=1)))
