"""The cache of graphs compiled by OpenVINO: reuse, and recompilation if a file is damaged."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from click.testing import CliRunner

from engine.backends import open_backend
from engine.backends.openvino import OpenVinoBackend, import_openvino, openvino_errors
from engine.bundle.manifest import Bundle
from engine.cli.app import main
from engine.errors import BackendError, EngineError, OutOfMemoryError
from engine.files.atomic import file_sha256
from engine.machine.verify import verify
from engine.runtime import Runtime
from tests.helpers.tiny import save_pictures

openvino = import_openvino()


@pytest.fixture
def fresh(tmp_path, monkeypatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def compiled(monkeypatch) -> list[str]:
    """The graphs compiled after this point, by the name of their first input."""
    names = []
    compile_model = openvino.Core.compile_model

    def recording(core, model, *more):
        names.append(model.inputs[0].any_name)
        return compile_model(core, model, *more)

    monkeypatch.setattr(openvino.Core, "compile_model", recording)
    return names


def blobs(cache: Path) -> list[Path]:
    return sorted(cache.rglob("*.blob"))


def test_compiled_graphs_are_cached_and_reused(fresh, compiled, tiny_bundle):
    bundle = Bundle.load(tiny_bundle)
    assert all(check.passed for check in verify(bundle, OpenVinoBackend(bundle)))
    assert len(compiled) == 3
    assert [path.name.partition("-")[0] for path in blobs(fresh)] == ["decoder", "encoder"]
    assert [path.parent.parent.name for path in blobs(fresh)] == [bundle.digest[:16]] * 2
    assert {path.stat().st_mode & 0o777 for path in blobs(fresh)} == {0o600}
    assert sum(path.stat().st_size for path in blobs(fresh)) < 1 << 21
    del compiled[:]
    assert all(check.passed for check in verify(bundle, OpenVinoBackend(bundle)))
    assert compiled == ["slots"], "regroup has no weights and is not cached"
    del compiled[:]
    OpenVinoBackend(bundle, cpu_precision="bf16")
    assert len(compiled) == 3
    assert len(blobs(fresh)) == 4


def test_graphs_of_another_release_are_compiled_again(fresh, compiled, tiny_bundle, monkeypatch):
    bundle = Bundle.load(tiny_bundle)
    OpenVinoBackend(bundle)
    monkeypatch.setattr(openvino, "__version__", "2099.1.0")
    OpenVinoBackend(bundle)
    assert len(compiled) == 6
    assert len(blobs(fresh)) == 4


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def swap(path: Path) -> None:
    shutil.copyfile(next(blob for blob in path.parent.glob("*.blob") if blob != path), path)


def open_to_others(path: Path) -> None:
    path.chmod(0o666)


DAMAGE = [shorten, flip_a_bit, swap, open_to_others, lambda path: path.write_bytes(b"")]


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_file_is_reported_and_recompiled(damage, fresh, compiled, tiny_bundle, capfd):
    bundle = Bundle.load(tiny_bundle)
    OpenVinoBackend(bundle)
    decoder, _ = blobs(fresh)
    damage(decoder)
    capfd.readouterr()
    backend = OpenVinoBackend(bundle)
    assert all(check.passed for check in verify(bundle, backend))
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"{decoder} cannot be used, its graph is compiled again: ")
    del compiled[:]
    OpenVinoBackend(bundle)
    assert compiled == ["slots"]
    assert capfd.readouterr().err == ""


def test_unusable_cache_is_reported(tiny_bundle, tmp_path, monkeypatch, capfd):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    bundle = Bundle.load(tiny_bundle)
    backend = OpenVinoBackend(bundle)
    assert all(check.passed for check in verify(bundle, backend))
    assert "compiled graphs are not cached: " in capfd.readouterr().err


def test_graph_that_differs_when_read_back_is_not_cached(fresh, bundle_copy):
    """OpenVINO reads cached graphs with one file of weights. Here the decoder's weights are in another file."""
    for graph in ("encoder", "decoder"):
        path = bundle_copy / f"{graph}.onnx"
        model = onnx.load(str(path), load_external_data=False)
        for tensor in model.graph.initializer:
            for entry in tensor.external_data:
                entry.value = "elsewhere.bin" if entry.key == "location" and graph == "decoder" else entry.value
        path.write_bytes(model.SerializeToString())
    weights = bundle_copy / "decoder.onnx.data"
    shutil.copyfile(weights, bundle_copy / "elsewhere.bin")
    weights.write_bytes(bytes(weights.stat().st_size))
    manifest = json.loads((bundle_copy / "manifest.json").read_text())
    manifest["files"] = {path.name: file_sha256(path) for path in bundle_copy.iterdir() if path.name != "manifest.json"}
    (bundle_copy / "manifest.json").write_text(json.dumps(manifest))
    bundle = Bundle.load(bundle_copy)
    for _ in range(2):
        backend = OpenVinoBackend(bundle)
        assert all(check.passed for check in verify(bundle, backend))
        assert [path.name.partition("-")[0] for path in blobs(fresh)] == ["encoder"]


@pytest.fixture
def bundle_copy(tiny_bundle, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


def test_other_format_named_onnx_is_refused(bundle_copy):
    """OpenVINO would read its own format, or TensorFlow's, whatever the file is called."""
    model = openvino.Core().read_model(bundle_copy / "regroup.onnx")
    openvino.serialize(model, bundle_copy / "x.xml", bundle_copy / "regroup.bin")
    (bundle_copy / "x.xml").rename(bundle_copy / "regroup.onnx")
    manifest = json.loads((bundle_copy / "manifest.json").read_text())
    for name in ("regroup.onnx", "regroup.bin"):
        manifest["files"][name] = file_sha256(bundle_copy / name)
    (bundle_copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(EngineError, match=r"regroup\.onnx cannot be loaded: .") as raised:
        open_backend(Bundle.load(bundle_copy), Runtime("openvino"))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (RuntimeError("[CPU] Subgraph node with name '/a' can't\nallocate dummy"), OutOfMemoryError),
        (MemoryError(), OutOfMemoryError),
        (RuntimeError("std::bad_alloc"), OutOfMemoryError),
        (RuntimeError("Check 'x' failed\n\n at y"), BackendError),
    ],
)
def test_openvino_errors_become_one_line(error, kind):
    with pytest.raises(BackendError, match="decoder failed: ") as raised, openvino_errors("decoder failed"):
        raise error
    assert type(raised.value) is kind
    assert "\n" not in str(raised.value)


def test_old_openvino_is_refused(monkeypatch):
    monkeypatch.setattr(openvino, "__version__", "2025.4.1-12345-abc")
    with pytest.raises(BackendError, match=r"OpenVINO 2025\.4\.1 is too old: pip install 'openvino>=2026\.4'"):
        open_backend(Bundle.load(), Runtime("openvino"))


def test_processes_that_compile_concurrently_agree(tiny_bundle, tmp_path, fresh):
    images = save_pictures(tmp_path / "images", 17, name="{:02}.png")

    def run(out: Path, *more: object):
        words = ["caption", "--input", images, "--bundle", tiny_bundle, "--out", out, "--beams", 3, "--rows", 6, *more]
        return CliRunner().invoke(main, [*map(str, words), "--json"])

    whole = run(tmp_path / "whole.csv", "--backend", "cpu")
    assert whole.exit_code == 0, whole.output
    for _ in range(2):  # with an empty cache, then with a filled one
        out = tmp_path / "run.csv"
        shared = run(out, "--backend", "openvino", "--processes", 2, "--threads", 2)
        assert shared.exit_code == 0, shared.output
        assert "cannot be used" not in shared.stderr
        assert out.read_bytes() == (tmp_path / "whole.csv").read_bytes()
        assert len(blobs(fresh)) == 2


@pytest.mark.skipif(sys.platform != "linux", reason="signal stacks of Linux")
def test_signals_after_backends_are_closed_in_the_order_of_opening(tiny_bundle):
    """OpenVINO's signal stack of the first would be used after it was freed: the process then ended with SIGSEGV."""
    code = (
        "import os, signal, sys\nfrom engine import Captioner\n"
        "signal.signal(signal.SIGUSR1, lambda *_: print('handled'))\n"
        "first, second = (Captioner.load(sys.argv[1], backend='openvino', threads=1) for _ in range(2))\n"
        "del first\ndel second\nos.kill(os.getpid(), signal.SIGUSR1)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, tiny_bundle], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "handled\n"), done.stderr
