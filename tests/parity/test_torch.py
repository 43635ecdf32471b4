"""The torch backend: ids of `generate` for every family, on fake CUDA tensors, and half precisions, which are compared.

A short grid runs for three models; `make test-families` sets FAMILIES_GRID=full for the whole one and all pairs.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from onnx import TensorProto, helper
from torch._subclasses import FakeTensorMode

from engine.backends import open_backend, torch_tape
from engine.backends.shapes import PaddedBackend
from engine.backends.torch import TorchBackend, TorchGraph
from engine.backends.torch_ops import OPERATORS
from engine.backends.torch_tape import WeightStore
from engine.bundle.manifest import Bundle
from engine.bundle.onnx import read_onnx
from engine.captioner import Captioner
from engine.checkpoints.graphs import known_graphs
from engine.cli.app import main
from engine.decoding.backend import StepInputs
from engine.errors import BackendError, BundleError, OutOfMemoryError, UsageError
from engine.machine.verify import verify, verify_halves
from engine.runtime import Runtime, divide_precision
from export.precision import encoder_error
from export.reference.huggingface import Reference
from tests.helpers.earlier import bundle_of_084ae4d
from tests.helpers.tiny import random_pictures, save_pictures
from tests.helpers.tiny_pairs import pairs
from tests.parity.test_pairs import IS_FULL, compare_with_generate

PICTURES = random_pictures(9)
MODELS = ("blip", "git", *pairs()) if IS_FULL else ("blip", "git", ("vit", "gpt2"))
RUNTIME = Runtime("torch", threads=1, device="cpu")


@pytest.fixture(scope="module", params=MODELS, ids=str)
def model(request, exported) -> tuple[Path, Path]:
    """A checkpoint and its bundle."""
    if request.param == "blip":
        return tuple(map(request.getfixturevalue, ("tiny_checkpoint", "tiny_bundle")))
    return exported(request.param) if request.param == "git" else exported(*request.param)


@pytest.fixture(scope="module")
def bundle(tiny_bundle) -> Bundle:
    return Bundle.load(tiny_bundle)


@pytest.fixture(scope="module")
def captioner(bundle) -> Captioner:
    return Captioner.of(bundle, RUNTIME)


def ids(captioner: Captioner, **given):
    return [caption.ids for caption in captioner.caption(PICTURES, max_new_tokens=14, **given)]


def test_captions_equal_generate(model):
    checkpoint, folder = model
    captioner, reference = Captioner.of(Bundle.load(folder), RUNTIME), Reference.load(checkpoint)
    assert isinstance(captioner.backend.inner, TorchBackend)
    compare_with_generate(captioner, reference, slots=4)


def test_prompts_and_samples_equal_onnx_runtime(captioner, tiny_captioner):
    prompts = {str(i): ("", "a", "ct of the left upper lobe showing")[i % 3] for i in range(len(PICTURES))}
    for given in (
        {"num_beams": 3, "prompts": prompts, "rows": 12},
        {"do_sample": True, "num_return_sequences": 3, "top_k": 40, "seed": 5},
        {"num_beams": 4, "no_repeat_ngram_size": 2, "min_new_tokens": 10},
    ):
        assert ids(captioner, **given) == ids(tiny_captioner, **given)


def test_caches_that_grow_give_the_same_captions(bundle, captioner):
    """Without PaddedBackend: the recent block grows, and every step has other shapes."""
    growing = Captioner(bundle, captioner.backend.inner)
    given = {"num_beams": 3, "no_repeat_ngram_size": 2, "rows": 12}
    assert ids(growing, **given) == ids(captioner, **given)


def test_golden_recordings_replay(captioner, tmp_path):
    assert all(check.passed for check in verify(captioner.bundle, captioner.backend))
    checks = verify_halves(captioner.bundle, RUNTIME)
    assert checks
    assert all(check.passed for check in checks)
    earlier = Bundle.load(bundle_of_084ae4d(tmp_path / "bundle"))  # of format 1
    assert all(check.passed for check in verify(earlier, open_backend(earlier, RUNTIME)))


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_fp16_and_int8_bundles_pass_verify(precision, rounded_bundles):
    bundle = Bundle.load(rounded_bundles[precision])
    assert all(check.passed for check in verify(bundle, open_backend(bundle, RUNTIME)))
    with pytest.raises(UsageError, match=f"is {precision}, but --cpu-precision bf16 is for fp32 bundles"):
        TorchBackend(bundle, precision="bf16")


def test_int8_bundle_equals_onnx_runtime(rounded_bundles):
    """Both have exact integer sums; only the float operations between them are rounded differently."""
    bundle = Bundle.load(rounded_bundles["int8"])
    ours, theirs = (ids(Captioner.of(bundle, one), num_beams=3) for one in (RUNTIME, Runtime("cpu", threads=1)))
    assert ours == theirs


@pytest.mark.parametrize("zero", [128, 32, 0])
def test_integer_sums_are_exact_beyond_a_float32(zero, tmp_path, bundle):
    """2,048 of the largest products sum up to more than float32 can hold; every last bit must be right."""
    rng = np.random.default_rng(0)
    weight = rng.integers(-127, 128, (2048, 3), np.int8)
    weight[:, 0] = 127
    node = helper.make_node("MatMulInteger", ["x", "w", "zero"], ["y"])
    tensors = [onnx.numpy_helper.from_array(weight, "w"), onnx.numpy_helper.from_array(np.uint8(zero), "zero")]
    graph = graph_of(tmp_path, [node], tensors, [("x", TensorProto.UINT8, [2, 2048])], TensorProto.INT32)
    x = rng.integers(0, 256, (2, 2048), np.uint8)
    x[0] = 255
    (found,) = TorchGraph(graph, WeightStore(bundle, torch.device("cpu"))).run({"x": torch.from_numpy(x)})
    np.testing.assert_array_equal(found, (x.astype(np.int64) - zero) @ weight)
    assert found.max() > 2**24


def graph_of(folder: Path, nodes, tensors, inputs, output):
    """Write a graph with the output y, and read it."""
    values = [helper.make_tensor_value_info(*one) for one in inputs]
    graph = helper.make_graph(nodes, "g", values, [helper.make_tensor_value_info("y", output, None)], tensors)
    path = folder / "g.onnx"
    path.write_bytes(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)]).SerializeToString())
    return read_onnx(path)


@pytest.mark.parametrize("is_flat", [True, False])
def test_attention_operator_equals_its_definition(is_flat, tmp_path, bundle):
    """ONNX's Attention (opset 23): heads side by side in the last axis, or as an axis of their own."""
    q, k, v = (torch.randn(2, 3, length, 8) for length in (4, 6, 6))
    mask = torch.rand(2, 1, 4, 6) > 0.4
    mask[..., 0] = True
    expected = torch.softmax((q @ k.transpose(2, 3) * 0.3).masked_fill(~mask, -np.inf), -1) @ v
    attributes = {"scale": 0.3} | ({"q_num_heads": 3, "kv_num_heads": 3} if is_flat else {})
    node = helper.make_node("Attention", ["q", "k", "v", "m"], ["y"], **attributes)
    inputs = [(name, TensorProto.FLOAT, None) for name in "qkv"] + [("m", TensorProto.BOOL, None)]
    graph = TorchGraph(
        graph_of(tmp_path, [node], [], inputs, TensorProto.FLOAT), WeightStore(bundle, torch.device("cpu"))
    )
    flat = [one.transpose(1, 2).reshape(2, one.shape[2], -1) if is_flat else one for one in (q, k, v)]
    (found,) = graph.run(dict(zip("qkvm", [*flat, mask], strict=True)))
    torch.testing.assert_close(found, expected.transpose(1, 2).reshape(2, 4, -1) if is_flat else expected)


def test_unknown_operators_are_refused_by_name(tmp_path, bundle):
    node = helper.make_node("Einsum", ["x"], ["y"], equation="ij->ji")
    graph = graph_of(tmp_path, [node], [], [("x", TensorProto.FLOAT, [2, 2])], TensorProto.FLOAT)
    opened = TorchGraph(graph, WeightStore(bundle, torch.device("cpu")))
    with pytest.raises(BundleError, match=r"g\.onnx: --backend torch does not support the operator Einsum"):
        opened.run({"x": torch.zeros(2, 2)})


def step_inputs(slots: int, rows: int, positions: int, marks: int) -> StepInputs:
    return StepInputs(
        input_ids=np.ones((slots, rows), np.int64),
        positions=np.zeros((slots, rows), np.int64),
        scores=np.zeros((slots, rows), np.float32),
        marked_ids=np.full((slots, rows, marks), -1),
        penalties=np.ones(2, np.float32),
        ancestry=np.ones((slots, rows, positions + rows), bool),
        num_candidates=2 * rows,
    )


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_encode_step_and_regroup_on_fake_cuda_tensors(precision, model, monkeypatch):
    """FakeTensorMode checks shapes, types and devices as CUDA does, and computes nothing.

    In a build of torch without CUDA it cannot copy to the device, so this test replaces the copies.
    """

    def fake(tensor, device):
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=device)

    monkeypatch.setattr(torch_tape, "upload", fake)
    monkeypatch.setattr("engine.backends.torch.upload", fake)
    monkeypatch.setattr("engine.backends.torch.free_bytes", lambda _: 1 << 30)
    monkeypatch.setattr("engine.backends.torch.to_host", list)
    bundle = Bundle.load(model[1])
    spec, sizes = bundle.image, bundle.model
    with FakeTensorMode(allow_non_fake_inputs=True):
        backend = TorchBackend(bundle, "cuda", precision=precision)
        encoded = backend.encode(np.zeros((2, spec.height, spec.width, 3), np.uint8))
        cache = backend.allocate(2, 64)
        backend.set_recent(cache, 12)
        backend.admit(cache, 1, encoded, 0)
        for at in (0, 3):  # recorded, then replayed
            scores, ids = backend.step(cache, step_inputs(2, 3, 64 + 12, 8), at)
        backend.regroup(cache, np.array([1]), np.zeros((1, 64), np.int64), keep_recent=True)
    dtype = torch.float16 if precision == "fp16" else torch.float32
    for tensor in (*encoded, *cache.cross, *cache.settled, *cache.recent):
        assert (tensor.device.type, tensor.dtype) == ("cuda", dtype)
    assert cache.settled[0].shape == (1, sizes.num_heads, 64, sizes.head_width)
    assert (scores.shape, scores.dtype, scores.device.type) == ((2, 6), torch.float32, "cuda")
    assert (ids.shape, ids.dtype) == ((2, 6), torch.int64)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_is_close_and_rounds(precision, model):
    bundle = Bundle.load(model[1])
    exact, rounded = (Captioner.of(bundle, Runtime("torch", 1, None, one, device="cpu")) for one in ("fp32", precision))
    spec = bundle.image
    pixels = np.stack([np.asarray(picture.resize((spec.width, spec.height))) for picture in PICTURES])
    error = encoder_error(exact.backend, rounded.backend, pixels)
    # half a unit in the last place is 5e-4 and 4e-3; layer norms of random models enlarge it up to 20 times
    assert (1e-4 if precision == "fp16" else 1e-3) < error < (0.02 if precision == "fp16" else 0.2)
    found, expected = (ids(one, num_beams=3) for one in (rounded, exact))
    assert sum(a == b for a, b in zip(found, expected, strict=True)) > len(PICTURES) / 3


def test_half_precision_equals_an_fp16_export(bundle, rounded_bundles):
    """Both keep pixels, scores and log-probabilities in float32, and round everything else at the same places.

    Only scalar factors differ: an export rounds them to float16, here they are Python numbers.
    """
    exported = Captioner.of(Bundle.load(rounded_bundles["fp16"]), RUNTIME)
    rounded = Captioner.of(bundle, Runtime("torch", 1, None, "fp16", device="cpu"))
    for ours, theirs in zip(*(one.caption(PICTURES, num_beams=3) for one in (rounded, exported)), strict=True):
        assert ours.ids == theirs.ids
        assert ours.score == pytest.approx(theirs.score, abs=5e-3)


@pytest.fixture(scope="module")
def image_dir(tmp_path_factory) -> Path:
    return save_pictures(tmp_path_factory.mktemp("images"), 11, name="{:02}.png")


def run(image_dir: Path, folder: Path, out: Path, *more: object):
    words = ["caption", "--input", image_dir, "--bundle", folder, "--out", out, "--beams", 3, "--rows", 6]
    words += ["--threads", 1, *more]
    return CliRunner().invoke(main, [*map(str, words), "--json"])


TORCH = ("--backend", "torch", "--device", "cpu")


def test_interrupted_run_resumes_only_with_same_device_and_precision(image_dir, tiny_bundle, tmp_path, monkeypatch):
    out, step, steps = tmp_path / "run.csv", TorchBackend.step, []

    def interrupted(*arguments, **more):
        steps.append(1)
        if len(steps) > 40:
            raise KeyboardInterrupt
        return step(*arguments, **more)

    assert run(image_dir, tiny_bundle, tmp_path / "whole.csv", "--backend", "cpu").exit_code == 0
    monkeypatch.setattr(TorchBackend, "step", interrupted)
    cut = run(image_dir, tiny_bundle, out, *TORCH)
    assert cut.exit_code == 130, cut.output
    monkeypatch.undo()
    resumed = run(image_dir, tiny_bundle, out, *TORCH)
    assert resumed.exit_code == 0, resumed.output
    summary = json.loads(resumed.stdout.splitlines()[-1])
    assert 0 < summary["resumed"] < 11
    assert "|backend:torch|device:cpu|" in summary["signature"]
    assert "arithmetic" not in summary["signature"]
    assert out.read_bytes() == (tmp_path / "whole.csv").read_bytes()
    out.unlink()
    steps.clear()
    monkeypatch.setattr(TorchBackend, "step", interrupted)
    assert run(image_dir, tiny_bundle, out, *TORCH).exit_code == 130
    monkeypatch.undo()
    rounded = run(image_dir, tiny_bundle, out, *TORCH, "--precision", "bf16")
    assert "was moved to" in rounded.stderr
    summary = json.loads(rounded.stdout.splitlines()[-1])
    assert summary["resumed"] == 0
    assert "|device:cpu|arithmetic:bf16 (not parity)|" in summary["signature"]


def test_several_bundles_equal_onnx_runtime(tiny_bundle, rounded_bundles):
    several = [tiny_bundle, *rounded_bundles.values()]
    ours, theirs = (
        Captioner.load(several, weights=(3, 2, 1), threads=1, **more)
        for more in ({"backend": "torch", "device": "cpu"}, {"backend": "cpu"})
    )
    assert isinstance(ours.backend, PaddedBackend)
    given = {"num_beams": 3, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "bad_words": ("the",)}
    assert ids(ours, **given) == ids(theirs, **given)


def test_out_of_memory_halves_the_images(captioner, monkeypatch):
    """A run continues with fewer images in parallel; torch's messages are recognised."""
    real = TorchGraph.run

    def full(self, feed):
        if next(iter(feed.values())).shape[0] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return real(self, feed)

    expected = ids(captioner, num_beams=3)
    monkeypatch.setattr(TorchGraph, "run", full)
    with pytest.raises(OutOfMemoryError, match="the torch backend failed: CUDA out of memory"):
        ids(captioner, num_beams=3, rows=9)
    assert ids(captioner, num_beams=3, rows=6) == expected


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (("--device", "cuda"), "finds no device cuda: install a build of torch for it, or use --device cpu"),
        (("--device", "xpu:1"), "finds no device xpu"),
        (("--device", "gpu"), "--device must be cuda, cuda:N, xpu, xpu:N, mps or cpu, not 'gpu'"),
        (("--devices", "cuda:0"), "finds no device cuda"),
        (("--device", "cpu", "--devices", "cuda:0"), "--devices are NVIDIA GPUs, but --device is cpu"),
        (("--processes", "2"), "--processes works with the backends cpu and openvino, not with torch"),
        (("--streams", "1"), "streams are for the backend cpu, not for torch"),
        (("--precision", "bf16", "--cpu-precision", "fp16"), "--precision bf16 and --cpu-precision fp16 differ"),
        (("--precision", "int8"), "--precision and --image-size convert a --model"),
        (("--backend", "cpu", "--device", "cpu"), "--device is for the backend torch, not for cpu"),
        (("--backend", "cpu", "--precision", "bf16"), "--precision bf16 is for the backend torch, not for cpu"),
        (("--backend", "openvino", "--cpu-precision", "fp16"), "fp16 is for --backend torch, not for openvino"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has what the messages say is missing")
def test_invalid_options_are_one_line_errors(given, sentence, image_dir, tiny_bundle, tmp_path):
    result = run(image_dir, tiny_bundle, tmp_path / "run.csv", "--backend", "torch", *given)
    assert result.exit_code in (1, 2)
    (line,) = result.stderr.splitlines()
    assert sentence in line
    assert not list(tmp_path.glob("run.csv*"))


def test_precision_is_of_the_arithmetic_with_torch_only():
    """A checkpoint stays float32 when it is converted, so that one bundle serves all precisions of torch."""
    assert divide_precision("torch", "fp16", "fp32") == (None, "fp16")
    assert divide_precision("torch", "int8", "fp32") == ("int8", "fp32")
    assert divide_precision("cpu", "fp16", "bf16") == ("fp16", "bf16")


def test_missing_torch_names_the_extra(image_dir, tiny_bundle, tmp_path):
    block = "import sys; sys.modules['torch'] = None; from engine.cli.app import main; main()"
    command = [sys.executable, "-c", block, "caption", "--input", image_dir, "--bundle", tiny_bundle]
    command += ["--backend", "torch", "--out", tmp_path / "run.csv"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: torch is not installed")
    assert "pip install 'torch>=" in line


def test_other_commands_load_no_torch(image_dir, tiny_bundle, tmp_path):
    """Only --backend torch does, which is named last, to show that the test would see it."""
    common = ["caption", "--input", str(image_dir), "--bundle", str(tiny_bundle), "--threads", "1", "--out"]
    commands = [
        ["info"],
        ["verify", "--bundle", str(tiny_bundle), "--backend", "cpu"],
        [*common, str(tmp_path / "cpu.csv"), "--backend", "cpu"],
        [*common, str(tmp_path / "openvino.csv"), "--backend", "openvino"],
        [*common, str(tmp_path / "torch.csv"), *TORCH],
    ]
    code = (
        "import json, sys; from click.testing import CliRunner; from engine.cli.app import main\n"
        f"for words in json.loads({json.dumps(json.dumps(commands))}):\n"
        "    assert CliRunner().invoke(main, words).exit_code == 0, words\n"
        "    print('torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"] * (len(commands) - 1) + ["True"]


def test_info_lists_torch_without_loading_it():
    facts = json.loads(CliRunner().invoke(main, ["info", "--json"]).stdout)
    assert (
        facts["backends"]["torch"] == f"installed (torch {torch.__version__}): devices are looked for when it is used"
    )


def test_weights_outside_the_bundle_are_refused(bundle_copy_with):
    bundle = bundle_copy_with({"location": "../decoder.onnx.data"})
    with pytest.raises(BundleError, match="is not a graph of this engine's bundles"):
        TorchBackend(bundle)
    bundle = bundle_copy_with({"location": "other.data"})
    with pytest.raises(BundleError, match="is not in the manifest, but a graph reads weights from it"):
        TorchBackend(bundle)
    bundle = bundle_copy_with({"offset": str(1 << 40)})
    with pytest.raises(BundleError, match="is shorter than a graph needs"):
        TorchBackend(bundle)


@pytest.fixture
def bundle_copy_with(tiny_bundle, tmp_path):
    """Return a function that changes where the encoder's largest weight is, without an update of the manifest."""
    import shutil
    from dataclasses import replace

    def change(entries: dict[str, str]) -> Bundle:
        folder = Path(shutil.copytree(tiny_bundle, tmp_path / "copy", dirs_exist_ok=True))
        model = onnx.load(str(tiny_bundle / "encoder.onnx"), load_external_data=False)
        tensor = next(one for one in model.graph.initializer if one.external_data)
        for entry in tensor.external_data:
            entry.value = entries.get(entry.key, entry.value)
        (folder / "encoder.onnx").write_bytes(model.SerializeToString())
        return replace(Bundle.load(tiny_bundle), path=folder)

    return change


def test_device_that_is_missing_is_named(monkeypatch):
    from engine.backends.torch import find_device

    monkeypatch.setattr("engine.backends.torch._count", {"cuda": 2, "cpu": 1}.get)
    assert find_device(None) == "cuda"
    assert find_device("cuda:1") == "cuda:1"
    with pytest.raises(BackendError, match="there is no cuda:2: torch finds cuda:0 to cuda:1"):
        find_device("cuda:2")
    monkeypatch.setattr("engine.backends.torch._count", {"mps": 1, "cpu": 1}.get)
    assert find_device(None) == "mps"


def test_operators_of_all_graph_sets_are_there():
    """Those of the wheel: every architecture that converts without torch, in each precision."""
    used = set()
    for graphs in known_graphs():
        for graph in graphs.graphs:
            used |= {node.op_type for node in onnx.GraphProto.FromString(graph.nodes).node}
    assert len(used) > 35
    assert used <= OPERATORS.keys()
