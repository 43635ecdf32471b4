"""Shared fixtures: a tiny checkpoint, its bundle and both ways of running it, made once a session."""

from __future__ import annotations

import os
from pathlib import Path

from tests.helpers import cores  # isort: skip  # before numpy

import hypothesis
import pytest

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
