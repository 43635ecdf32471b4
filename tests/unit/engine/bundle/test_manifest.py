"""Bundles that are damaged, incomplete or not bundles at all."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from engine.backends import open_backend
from engine.bundle.manifest import Bundle, FileDigests
from engine.bundle.open import open_bundle
from engine.captioner import Captioner
from engine.errors import BackendError, BundleError, EngineError
from engine.files.atomic import file_sha256
from engine.inputs.pixels import read_image
from engine.inputs.remote import RemoteFolder
from engine.machine.info import describe_bundle
from engine.machine.verify import verify
from engine.runtime import CPU_BACKENDS, Runtime
from tests.helpers.tiny import random_pictures

IMAGE = {"height": 32, "width": 32, "resample": "bicubic", "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
PLACEHOLDERS = {
    b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n": "a Git LFS pointer instead of the file",
    b"<!DOCTYPE html><html>404": "an HTML page instead of the file",
    b"": "empty file",
}
CPU = pytest.mark.parametrize("backend", CPU_BACKENDS)


@pytest.fixture
def bundle_copy(tiny_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


def edit_manifest(bundle: Path, **changes: object) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    (bundle / "manifest.json").write_text(json.dumps(manifest | changes))


def test_known_digests_of_changed_files_are_not_trusted(bundle_copy, monkeypatch):
    hashed = []
    monkeypatch.setattr(
        "engine.bundle.manifest.file_sha256", lambda path: hashed.append(path.name) or file_sha256(path)
    )
    digests = FileDigests()
    names = sorted(Bundle.load(bundle_copy, digests).files)
    assert hashed == names
    moved = bundle_copy.rename(bundle_copy.with_name("moved"))
    Bundle.load(moved, digests)
    assert hashed == names
    digests.forget(moved / "golden.npz")
    Bundle.load(moved, digests)
    assert hashed == [*names, "golden.npz"]
    tokenizer = moved / "tokenizer.json"
    tokenizer.write_bytes(tokenizer.read_bytes()[::-1])  # in place, the same size
    with pytest.raises(BundleError, match=r"moved is damaged: tokenizer\.json has changed"):
        Bundle.load(moved, digests)
    copied = shutil.copy(moved / "choice.onnx", moved / "copy")
    Path(copied).write_bytes(b"other")
    Path(copied).replace(moved / "choice.onnx")
    with pytest.raises(BundleError, match=r"choice\.onnx has changed"):
        Bundle.load(moved, digests)


def test_all_problems_are_listed(bundle_copy):
    (bundle_copy / "tokenizer.json").unlink()
    (bundle_copy / "decoder.onnx").write_bytes(b"other")
    with pytest.raises(BundleError, match=r"decoder\.onnx has changed; tokenizer\.json is missing"):
        Bundle.load(bundle_copy)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"format": 99}, "bundle format 99"),
        ({"files": {}}, "encoder.onnx is not listed"),
        ({"precision": "fp8"}, "its precision is 'fp8', supported are fp32, fp16, int8"),
        ({"files": {"../evil": "0"}}, "not a plain file name"),
        ({"model": {}}, "ModelDims needs"),
        ({"activation_scales": "layer"}, "its activation_scales 'layer' is not known to this release of the engine"),
        ({"cross_layout": ["heads"]}, "its cross_layout .* is not known"),
        ({"generation": {"num_beams": 0}}, "num_beams must be"),
        ({"generation": {"prompt": 5}}, "prompt must be a text"),
        ({"generation": {"beam_colour": 1}}, "unknown decoding options: beam_colour"),
        ({"tokens": {"bos": -1, "eos": 1, "pad": 0}}, "TokenIds.bos is -1"),
        ({"tokens": {"bos": 1, "eos": 9999, "pad": 0}}, "do not fit a vocabulary"),
        ({"image": IMAGE | {"resample": "bogus"}}, "ImageSpec.resample is 'bogus'"),
        ({"image": IMAGE | {"height": "224"}}, "ImageSpec.height is '224'"),
        ({"image": IMAGE | {"height": 0}}, "ImageSpec.height is 0"),
        ({"image": IMAGE | {"mean": [1, 2]}}, "ImageSpec.mean is"),
        ({"image": IMAGE | {"resize": []}}, r"ImageSpec.resize is \(\)"),
        ({"image": IMAGE | {"resize": [32, 0]}}, "ImageSpec.resize is"),
        ({"image": IMAGE | {"resize": 32}}, "ImageSpec.resize is 32"),
        ({"image": IMAGE | {"crop": 32}}, "ImageSpec needs"),
    ],
)
def test_invalid_manifest_values_are_refused(changes, sentence, bundle_copy):
    edit_manifest(bundle_copy, **changes)
    with pytest.raises(BundleError, match=sentence):
        Bundle.load(bundle_copy)


@pytest.mark.parametrize(
    ("resize", "text"),
    [((40,), "center of shortest edge 40 px"), ((40, 48), "center of 40 x 48 px"), ((), "px, bicubic")],
)
def test_images_are_cropped_as_the_manifest_says(resize, text, bundle_copy, tiny_bundle):
    edit_manifest(bundle_copy, image=IMAGE | ({"resize": list(resize)} if resize else {}))
    captioner = Captioner.load(bundle_copy, backend="cpu")
    assert text in describe_bundle(captioner.bundle)["bundle"]["image"]
    pictures = [picture.resize((60, 44)) for picture in random_pictures(4)]
    pixels = [read_image(picture, 32, 32, "bicubic", resize=resize) for picture in pictures]
    expected = [caption.ids for caption in Captioner.load(tiny_bundle, backend="cpu").caption(pixels)]
    assert [caption.ids for caption in captioner.caption(pictures)] == expected


def test_converted_bundle_has_no_recorded_answers(bundle_copy):
    (bundle_copy / "golden.npz").unlink()
    files = json.loads((bundle_copy / "manifest.json").read_text())["files"]
    edit_manifest(bundle_copy, files={name: digest for name, digest in files.items() if name != "golden.npz"})
    with pytest.raises(BundleError, match=r"golden.npz is not listed"):
        Bundle.load(bundle_copy)
    edit_manifest(bundle_copy, converted=True)
    bundle = Bundle.load(bundle_copy)
    with pytest.raises(BundleError, match="has no recorded answers of PyTorch, because it was converted without torch"):
        verify(bundle, open_backend(bundle, Runtime("cpu")))


def test_int8_of_older_formats_says_that_captions_depend_on_the_batch(bundle_copy):
    assert Bundle.load(bundle_copy).notes == []
    edit_manifest(bundle_copy, precision="int8", format=2)
    (note,) = Bundle.load(bundle_copy).notes
    assert "depend on which images share a batch" in note
    edit_manifest(bundle_copy, activation_scales="row", format=3)
    assert Bundle.load(bundle_copy).notes == []


@pytest.mark.parametrize("content", ["", "[]", "{", '"text"', "null", "[" * 100_000])
def test_malformed_manifest_is_refused(content, bundle_copy):
    (bundle_copy / "manifest.json").write_text(content)
    with pytest.raises(BundleError, match=r"manifest\.json"):
        Bundle.load(bundle_copy)


@pytest.fixture
def linked(tiny_bundle, tmp_path, monkeypatch) -> Path:
    """A bundle of links to files in folders named by their hash, as in the caches of Hugging Face and git-annex."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder, blobs = tmp_path / "snapshots/main", tmp_path / "blobs"
    folder.mkdir(parents=True)
    for file in tiny_bundle.iterdir():
        blob = blobs / file_sha256(file) / "blob"
        blob.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, blob)
        (folder / file.name).symlink_to(Path("../../blobs") / blob.parent.name / "blob")
    (folder / ".gitattributes").write_text("*.data filter=lfs\n")
    return folder


@CPU
def test_bundle_of_links_runs(backend, linked, tiny_bundle):
    bundle = open_bundle(linked)
    assert bundle.digest == Bundle.load(tiny_bundle).digest
    assert all(check.passed for check in verify(bundle, open_backend(bundle, Runtime(backend))))


@pytest.mark.parametrize(
    ("target", "sentence"),
    [
        ("/etc/passwd", r"golden\.npz has changed"),
        ("/dev/zero", r"is incomplete: it has no golden\.npz"),
        ("/proc/version", r"golden\.npz has changed \(empty file"),  # like all files of /proc, its size is 0
        ("golden.npz", r"is incomplete: it has no golden\.npz"),
        ("nowhere", r"is incomplete: it has no golden\.npz"),
    ],
)
def test_hostile_links_are_refused(target, sentence, linked, tmp_path):
    (linked / "golden.npz").unlink()
    (linked / "golden.npz").symlink_to(target)
    with pytest.raises(BundleError, match=sentence):
        open_bundle(linked)
    assert not list((tmp_path / "cache").rglob("golden.npz"))


def test_load_refuses_links(linked):
    with pytest.raises(BundleError, match=r"golden\.npz is a link"):
        Bundle.load(linked)


@pytest.mark.parametrize("content", PLACEHOLDERS)
@pytest.mark.parametrize("name", ["decoder.onnx.data", "manifest.json"])
def test_placeholder_files_are_named(name, content, bundle_copy, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (bundle_copy / name).write_bytes(content)
    for location in (bundle_copy, RemoteFolder(bundle_copy.as_uri())):
        with pytest.raises(BundleError, match=f"{name}.*{PLACEHOLDERS[content]}"):
            open_bundle(location)


def test_unlisted_file_is_refused(bundle_copy):
    manifest = json.loads((bundle_copy / "manifest.json").read_text())
    del manifest["files"]["decoder.onnx.data"]
    (bundle_copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match=r"decoder\.onnx\.data is not listed"):
        Bundle.load(bundle_copy)


def test_verify_detects_other_ids_and_scores(bundle_copy):
    bundle = Bundle.load(bundle_copy)
    with np.load(bundle_copy / "golden.npz") as archive:
        golden = dict(archive)
    golden["ids.0"][0, 1] += 1
    golden["scores.1"][1] *= 1.01
    np.savez(bundle_copy / "golden.npz", **golden)
    checks = verify(bundle, open_backend(bundle, Runtime("cpu")))
    assert [check.passed for check in checks] == [False, False, True, True, True, True]
    assert checks[0].identical == checks[0].images - 1
    assert checks[1].max_score_difference == pytest.approx(0.01, rel=0.1)


def test_verify_fails_for_nan_scores(tiny_bundle, tiny_captioner, monkeypatch):
    step = tiny_captioner.backend.step

    def broken(cache, inputs):
        scores, ids = step(cache, inputs)
        return scores * np.float32(np.nan), ids

    monkeypatch.setattr(tiny_captioner.backend, "step", broken)
    checks = verify(Bundle.load(tiny_bundle), tiny_captioner.backend)
    assert not any(check.passed for check in checks if "num_beams 1," not in check.setting)


def rewrite_graph(bundle: Path, graph: str, change: Callable[[onnx.ModelProto], None]) -> None:
    """Change a graph and its hash in the manifest, as an attacker would."""
    path = bundle / f"{graph}.onnx"
    model = onnx.load(str(path), load_external_data=False)
    change(model)
    path.write_bytes(model.SerializeToString())
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["files"][path.name] = file_sha256(path)
    (bundle / "manifest.json").write_text(json.dumps(manifest))


def point_outside(location: str) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        tensor = next(t for t in model.graph.initializer if t.external_data)
        entry = next(entry for entry in tensor.external_data if entry.key == "location")
        entry.value = location

    return change


@CPU
@pytest.mark.parametrize("location", ["../secret.bin", "{tmp}/secret.bin", "/dev/zero", "nowhere.bin"])
def test_weights_outside_the_bundle_are_refused(backend, location, bundle_copy, tmp_path):
    (tmp_path / "secret.bin").write_bytes(bytes(1 << 20))
    rewrite_graph(bundle_copy, "decoder", point_outside(location.format(tmp=tmp_path)))
    with pytest.raises(BackendError, match=r"decoder\.onnx cannot be loaded"):
        open_backend(Bundle.load(bundle_copy), Runtime(backend))


def add_endless_loop(model: onnx.ModelProto) -> None:
    yes = onnx.helper.make_tensor_value_info("yes", onnx.TensorProto.BOOL, [])
    entries = [onnx.helper.make_tensor_value_info("i", onnx.TensorProto.INT64, []), yes]
    same = onnx.helper.make_node("Identity", ["yes"], ["again"])
    again = onnx.helper.make_tensor_value_info("again", onnx.TensorProto.BOOL, [])
    body = onnx.helper.make_graph([same], "body", entries, [again])
    true = onnx.helper.make_tensor("true", onnx.TensorProto.BOOL, [], [True])
    model.graph.node.insert(0, onnx.helper.make_node("Loop", ["", "always"], [], body=body))
    model.graph.node.insert(0, onnx.helper.make_node("Constant", [], ["always"], value=true))


def add_function(model: onnx.ModelProto) -> None:
    same = onnx.helper.make_node("Identity", ["x"], ["y"])
    model.functions.append(onnx.helper.make_function("local", "F", ["x"], ["y"], [same], model.opset_import))


@pytest.mark.parametrize("change", [add_endless_loop, add_function])
def test_graph_with_control_flow_is_refused(change, bundle_copy):
    rewrite_graph(bundle_copy, "regroup", change)
    with pytest.raises(BundleError, match=r"regroup\.onnx contains control flow"):
        Bundle.load(bundle_copy)


def rename_input(model: onnx.ModelProto) -> None:
    name = model.graph.input[0].name
    model.graph.input[0].name = "renamed"
    for node in model.graph.node:
        node.input[:] = ["renamed" if n == name else n for n in node.input]


def drop_output(model: onnx.ModelProto) -> None:
    del model.graph.output[-1]


def other_size(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 48


@CPU
@pytest.mark.parametrize(
    ("graph", "change", "sentence"),
    [
        ("encoder", rename_input, "does not have the inputs of this engine's bundles (pixel_values, renamed)"),
        ("decoder", rename_input, "does not have the inputs"),
        ("regroup", rename_input, "does not have the inputs"),
        ("decoder", drop_output, "does not have the outputs"),
        ("encoder", other_size, "encoder.onnx"),
    ],
)
def test_graphs_that_do_not_match_are_refused(backend, graph, change, sentence, bundle_copy):
    rewrite_graph(bundle_copy, graph, change)
    with pytest.raises(EngineError, match=re.escape(sentence)):
        open_backend(Bundle.load(bundle_copy), Runtime(backend))


@CPU
@pytest.mark.parametrize(
    "absurd",
    [
        {"num_layers": 9},
        {"num_layers": 10**7},
        {"num_heads": 1000},
        {"head_width": 10**6},
        {"encoder_positions": 10**6},
    ],
)
def test_wrong_sizes_are_refused_before_allocation(backend, absurd, bundle_copy):
    manifest = json.loads((bundle_copy / "manifest.json").read_text())
    edit_manifest(bundle_copy, model=manifest["model"] | absurd)
    with pytest.raises(BundleError, match="export it again"):
        open_backend(Bundle.load(bundle_copy), Runtime(backend))


def test_unlisted_hidden_file_is_refused(bundle_copy):
    (bundle_copy / ".weights").write_bytes(b"unlisted weights")
    with pytest.raises(BundleError, match=r"\.weights is not listed"):
        Bundle.load(bundle_copy)


@CPU
def test_absurd_image_size_is_refused(backend, bundle_copy):
    edit_manifest(bundle_copy, image=IMAGE | {"height": 10**6, "width": 10**6})
    with pytest.raises(BundleError, match=r"pixel_values has the sizes \(32, 32, 3\)"):
        open_backend(Bundle.load(bundle_copy), Runtime(backend))
