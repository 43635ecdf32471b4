"""Tests that need a GPU. They are skipped without one, with the reason; ENGINE_GPU=required makes them fail instead."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from engine.backends import BACKENDS, open_backend, require_backend
from engine.backends.plans import MODULES, build_plans, import_builder, target_for
from engine.backends.shapes import Bounds
from engine.bundle.manifest import Bundle
from engine.captioner import Captioner
from engine.errors import BackendError
from engine.machine.verify import verify
from engine.runtime import CPU_BACKENDS, Runtime

pytestmark = pytest.mark.gpu
GPU_BACKENDS = [name for name in BACKENDS if name not in ("auto", *CPU_BACKENDS)]


@pytest.fixture(params=GPU_BACKENDS)
def backend_name(request) -> str:
    try:
        return require_backend(request.param)
    except BackendError as error:
        if os.environ.get("ENGINE_GPU") == "required":
            pytest.fail(f"ENGINE_GPU=required, but {error}")
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def plans(tmp_path_factory) -> Path:
    bundle, folder = Bundle.load(), tmp_path_factory.mktemp("plans")
    for builder in MODULES:
        try:
            import_builder(builder)
        except BackendError:
            continue
        build_plans(bundle, folder, Bounds.of(bundle, beams=4, rows=64), target_for(builder), lambda _: None)
        return folder
    pytest.skip("no builder of plans is installed")


def test_golden_recordings_are_replayed(backend_name, request):
    bundle = Bundle.load()
    folder = request.getfixturevalue("plans") if backend_name == "trt" else None
    backend = open_backend(bundle, Runtime(backend_name, plans=folder))
    assert backend.name == backend_name
    assert all(check.passed for check in verify(bundle, backend))


def test_gpu_and_cpu_give_the_same_captions(backend_name, request):
    bundle = Bundle.load()
    folder = request.getfixturevalue("plans") if backend_name == "trt" else None
    images = sorted(Path("examples/images").iterdir())[:8]
    captions = [
        [caption.ids for caption in Captioner(bundle, backend).caption(images, rows=32)]
        for backend in (open_backend(bundle, Runtime("cpu")), open_backend(bundle, Runtime(backend_name, plans=folder)))
    ]
    assert captions[0] == captions[1]
