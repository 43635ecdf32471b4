"""Weight files that are damaged, that lie, or that ask to run something."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import AutoImageProcessor

from engine.checkpoints import pickles
from engine.checkpoints.cache import checkpoint_files
from engine.checkpoints.files import read_config_file, weight_files
from engine.checkpoints.rules import outer_settings
from engine.checkpoints.weights import open_weights
from engine.errors import CheckpointError
from export.reference.huggingface import Reference
from tests.helpers.tiny import random_pictures

VALUES = {"a": torch.arange(12.0).view(3, 4), "b": torch.tensor([1.5])}


def read(path: Path) -> dict[str, np.ndarray]:
    weights = open_weights([path], path)
    return {name: weights[name] for name in weights}


def saved(path: Path, content: object = VALUES, **settings: object) -> Path:
    torch.save(content, path, **settings)
    return path


def archive(path: Path, pickled: bytes, compression: int = zipfile.ZIP_STORED, **records: bytes) -> Path:
    """Write a torch.save file from its parts: data.pkl, and the numbers of storages by key."""
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("archive/data.pkl", pickled)
        for name, content in records.items():
            file.writestr(f"archive/{name}" if name == "byteorder" else f"archive/data/{name}", content)
    return path


def tensor(
    *, kind: str = "FloatStorage", key: object = "0", numel: object = 4, offset: object = 0, size=(2, 2), stride=(2, 1)
):
    """Return a pickle of {"a": a tensor with these arguments}, as torch.save writes it."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            return ("storage", getattr(torch, kind), key, "cpu", numel) if value == "STORAGE" else None

    class View:
        def __reduce__(self):
            return torch._utils._rebuild_tensor_v2, ("STORAGE", offset, size, stride, False, OrderedDict())

    stream = io.BytesIO()
    Pickler(stream, 2).dump({"a": View()})
    return stream.getvalue()


def refused(path: Path, sentence: str) -> None:
    with pytest.raises(CheckpointError, match=sentence) as error:
        read(path)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


def test_parts_make_a_file(tmp_path):
    found = read(archive(tmp_path / "x.bin", tensor(), **{"0": np.arange(4, dtype="<f4").tobytes()}))
    assert found["a"].tolist() == [[0, 1], [2, 3]]
    numbers = np.arange(4, dtype=">f4").tobytes()
    found = read(archive(tmp_path / "x.bin", tensor(stride=(1, 2)), byteorder=b"big", **{"0": numbers}))
    assert found["a"].tolist() == [[0, 2], [1, 3]]


def test_newer_pickle_protocol_is_read(tmp_path):
    found = read(saved(tmp_path / "x.bin", pickle_protocol=4))
    assert all(np.array_equal(found[name], one.numpy()) for name, one in VALUES.items())


class Call:
    def __init__(self, function, *arguments: object) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


@pytest.mark.parametrize(
    ("function", "arguments", "name"),
    [
        (os.system, ("touch {mark}",), r"(posix|nt)\.system"),
        (subprocess.Popen, (["touch", "{mark}"],), r"(subprocess|commands)\.Popen"),
        (eval, ("open('{mark}', 'w')",), r"builtins\.eval|__builtin__\.eval"),
        (getattr, (OrderedDict, "fromkeys"), r"getattr"),
        (torch.load, ("{mark}",), r"torch\.serialization\.load"),
        (np.dtype, ("f4",), r"numpy\.dtype"),
    ],
    ids=["system", "Popen", "eval", "getattr", "load", "dtype"],
)
@pytest.mark.parametrize("protocol", [2, 4])
def test_pickle_that_asks_for_more_is_refused_and_not_run(function, arguments, name, protocol, tmp_path):
    mark = tmp_path / "ran"
    arguments = [one.format(mark=mark) if isinstance(one, str) else one for one in arguments]
    content = VALUES | {"x": Call(function, *arguments)}
    refused(
        saved(tmp_path / "x.bin", content, pickle_protocol=protocol),
        rf"x\.bin is refused: it asks to load \S*({name}), but only weights are read",
    )
    assert not mark.exists()


def test_operations_that_set_attributes_have_no_effect(tmp_path):
    """BUILD on a function of the reader would change the reader itself."""
    code = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}X\x0c\x00\x00\x00__defaults__)sb0}."
    before = vars(pickles._rebuild_tensor).copy(), pickles._rebuild_tensor.__defaults__
    with pytest.raises(CheckpointError):
        read(archive(tmp_path / "x.bin", code))
    assert (vars(pickles._rebuild_tensor), pickles._rebuild_tensor.__defaults__) == before


@pytest.mark.parametrize(
    ("pickled", "records", "sentence"),
    [
        (tensor(numel=5), {"0": bytes(16)}, "sizes that do not fit its storage"),
        (tensor(numel=4), {"0": bytes(12)}, "sizes that do not fit its storage"),
        (tensor(offset=1), {"0": bytes(16)}, "numbers outside its storage"),
        (tensor(offset=-1), {"0": bytes(16)}, "that is negative or too large"),
        (tensor(size=(-2, -2)), {"0": bytes(16)}, "that is negative or too large"),
        (tensor(stride=(-1, 1)), {"0": bytes(16)}, "that is negative or too large"),
        (tensor(size=(1 << 40, 1 << 40), stride=(0, 0)), {"0": bytes(16)}, "numbers outside its storage"),
        (tensor(size=(1 << 99,), stride=(0,)), {"0": bytes(16)}, "that is negative or too large"),
        (tensor(numel=1 << 62), {"0": bytes(16)}, "that is negative or too large"),
        (tensor(size=(1,) * 40, stride=(1,) * 40), {"0": bytes(16)}, "a shape that is not a tuple"),
        (tensor(size=(2,)), {"0": bytes(16)}, "sizes that do not fit|argument"),
        (tensor(key="1"), {"0": bytes(16)}, "data/1 is missing"),
        (tensor(key="../data.pkl"), {"0": bytes(16)}, "is missing"),
        (tensor(), {"0": bytes(16), "byteorder": b"middle"}, "byte order is unknown"),
        (b"\x80\x02" + b"(" * 100, {}, "cannot be read"),
        (b"\x80\x02" + b"]" * (3 << 20) + b".", {}, "more than weights need"),
        (b"\x80\x02}N" + b"\x85" * 500_000 + b"Ns.", {}, "keys that are not text or numbers"),
        (b"\x80\x02}q\x00X\x05\x00\x00\x00modelh\x00s.", {}, "nests its weights too deeply"),
        (b"\x80\x02]q\x00h\x00a.", {}, "holds a list instead of a dict of weights"),
        (b"\x80\x02\x8a\x04\xff\xff\xff\x7f.", {}, "holds a int instead of a dict of weights"),
        (b"\x80\x02r\xff\xff\xff\xff.", {}, "cannot be read"),
        (b"cos\nsystem\n.", {}, r"asks to load os\.system"),
        (b"(S'x'\nios\nsystem\n.", {}, "refused: it asks to load something with pickle's operation"),
        (b"", {}, "cannot be read"),
    ],
)
def test_archive_that_lies_is_one_line(pickled, records, sentence, tmp_path):
    refused(archive(tmp_path / "x.bin", pickled, **records), sentence)


def test_compressed_archive_is_refused(tmp_path):
    """A small file could become gigabytes."""
    refused(archive(tmp_path / "x.bin", tensor(), zipfile.ZIP_DEFLATED, **{"0": bytes(16)}), "compressed or encrypted")


def test_archive_with_a_huge_directory_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.bin", "w") as file:
        for number in range(45_000):
            file.writestr(f"archive/data/{number:064}", b"")
    refused(tmp_path / "x.bin", "its directory is too large")


def test_format_that_needs_torch_names_the_export(tmp_path):
    refused(saved(tmp_path / "x.bin", _use_new_zipfile_serialization=False), r"torch before 1\.6.*`python -m export`")
    (tmp_path / "y.bin").write_bytes(b"x" * 99)
    refused(tmp_path / "y.bin", "cannot be read as a torch.save file")


def header(path: Path, length: int | None = None, data: bytes = bytes(16), **entry: object) -> Path:
    content = json.dumps({"a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]} | entry}).encode()
    path.write_bytes(struct.pack("<Q", len(content) if length is None else length) + content + data)
    return path


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"data_offsets": [4, 20]}, "cannot be read"),
        ({"data_offsets": [0, 1 << 50]}, "cannot be read"),
        ({"data_offsets": [16, 0]}, "cannot be read"),
        ({"shape": [1 << 40, 1 << 40]}, "cannot be read"),
        ({"shape": [2, 3]}, "cannot be read"),
        ({"dtype": "F33"}, "cannot be read"),
        ({"data": b""}, "cannot be read"),
        ({"data": bytes(17)}, "cannot be read"),
        ({"length": 1 << 62}, "its header has 4611686018427387904 bytes"),
        ({"length": 3}, "cannot be read"),
        ({"dtype": "F8_E4M3", "data_offsets": [0, 4], "data": bytes(4)}, "numbers of type F8_E4M3"),
    ],
)
def test_safetensors_header_that_lies_is_one_line(changes, sentence, tmp_path):
    path = header(tmp_path / "x.safetensors")
    assert read(path)["a"].tolist() == [[0, 0], [0, 0]]
    refused(header(path, **changes), sentence)


def test_file_that_changes_is_noticed(tmp_path):
    for path in (saved(tmp_path / "x.bin"), tmp_path / "x.safetensors"):
        if path.suffix == ".safetensors":
            save_file(VALUES, path)
        weights = open_weights([path], path)
        path.write_bytes(path.read_bytes()[:-40])
        with pytest.raises(CheckpointError, match="changed while it was read"):
            weights["a"]


def test_memory_is_bounded_by_the_largest_tensor(tmp_path):
    """Sixteen tensors of 16 MiB (as float32), read one by one in a process of their own."""
    values = {f"{number}": torch.ones(4 << 20, dtype=torch.bfloat16) for number in range(16)}
    save_file(values, tmp_path / "x.safetensors")
    saved(tmp_path / "x.bin", {name: one.float() for name, one in values.items()})
    program = """
import sys
from pathlib import Path
from engine.checkpoints.weights import open_weights
def anonymous():
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) << 10
before, most = anonymous(), 0
for name in sys.argv[1:]:
    weights = open_weights([Path(name)], Path(name))
    for key in weights:
        assert weights[key][0] == 1
        most = max(most, anonymous())
print(most - before)
"""
    files = [str(tmp_path / name) for name in ("x.safetensors", "x.bin")]
    output = subprocess.run([sys.executable, "-c", program, *files], check=True, capture_output=True, text=True).stdout
    assert int(output) < 3 * (16 << 20) + (20 << 20)


SEEDS: list[bytes] = []


def seeds() -> list[bytes]:
    if not SEEDS:
        stream = io.BytesIO()
        torch.save(OrderedDict(VALUES), stream)
        SEEDS.append(stream.getvalue())
    return SEEDS


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], deadline=None)
@given(data=st.data(), suffix=st.sampled_from([".bin", ".safetensors"]))
def test_damaged_file_gives_weights_or_one_error(data, suffix, tmp_path):
    path = tmp_path / f"x{suffix}"
    if suffix == ".bin":
        content = bytearray(data.draw(st.sampled_from(seeds())))
    else:
        save_file(VALUES, path)
        content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    end = data.draw(st.sampled_from([data.draw(st.integers(0, len(content))), len(content)]))
    path.write_bytes(content[:end])
    try:
        found = read(path)
    except CheckpointError as error:
        assert "\n" not in str(error)
    else:
        assert all(one.dtype == np.float32 for one in found.values())


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], deadline=None)
@given(data=st.data())
def test_damaged_pickle_gives_weights_or_one_error(data, tmp_path):
    """The pickle alone is damaged, so that the archive around it is read each time."""
    content = bytearray(tensor())
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = archive(tmp_path / "x.bin", bytes(content), **{"0": bytes(16)})
    try:
        found = read(path)
    except CheckpointError as error:
        assert "\n" not in str(error)
    else:
        assert all(one.dtype == np.float32 for one in found.values())


def test_weight_files_are_those_of_transformers(tmp_path):
    for name in ("model_ema.safetensors", "adapter_model.safetensors"):
        save_file({"a": torch.ones(2)}, tmp_path / name)
    assert [path.name for path in weight_files(tmp_path)] == ["model_ema.safetensors"]
    torch.save(VALUES, tmp_path / "pytorch_model.bin")
    assert [path.name for path in weight_files(tmp_path)] == ["pytorch_model.bin"]
    save_file(VALUES, tmp_path / "weights-1.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "weights-1.safetensors"}}')
    assert [path.name for path in weight_files(tmp_path)] == ["weights-1.safetensors"]
    assert {"weights-1.safetensors", "model.safetensors.index.json"} == set(checkpoint_files(tmp_path))


def test_one_weight_in_two_files_is_refused(tmp_path):
    for name in ("epoch1.safetensors", "epoch2.safetensors"):
        save_file(VALUES, tmp_path / name)
    with pytest.raises(CheckpointError, match=r"epoch2\.safetensors has the weight a, which another file"):
        open_weights(weight_files(tmp_path), tmp_path)


def test_quantised_checkpoints_are_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "blip", "quantization_config": {"load_in_8bit": true}}')
    with pytest.raises(CheckpointError, match="the weights are quantised"):
        read_config_file(tmp_path)


def test_deeply_nested_json_is_one_line(tmp_path):
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match=r"config\.json is not valid JSON"):
        read_config_file(tmp_path)


def test_new_tokens_of_config_json_do_not_replace_generation_config():
    copied = {"_from_model_config": True, "num_beams": 3}
    assert outer_settings({"max_new_tokens": 1, "min_new_tokens": 1}, copied)[0].source == "generation_config.json"
    assert outer_settings({"num_beams": 2}, copied)[0].source == "config.json"


def test_null_switches_an_image_step_off(tiny_checkpoint, tmp_path):
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"do_normalize": None, "do_rescale": None}))
    slow = AutoImageProcessor.from_pretrained(folder, use_fast=False)
    picture = random_pictures(1)[0]
    theirs = np.asarray(slow(picture, return_tensors="pt")["pixel_values"])
    ours = np.asarray(Reference.load(folder).pixels([picture]))
    np.testing.assert_array_equal(ours, theirs)
    assert ours.max() > 200
