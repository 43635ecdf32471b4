"""A checkpoint converted without torch: the same files as the export writes, byte for byte."""

from __future__ import annotations

import json
import lzma
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

from engine.bundle.manifest import MANIFEST, Bundle
from engine.captioner import Captioner
from engine.checkpoints import write
from engine.checkpoints.convert import convert
from engine.checkpoints.families import RULES
from engine.checkpoints.graphs import (
    EXTRA_GRAPHS,
    SUFFIX,
    GraphSet,
    find_graphs,
    known_architectures,
    known_graphs,
    save_graphs,
    shipped_graphs,
)
from engine.checkpoints.read import Checkpoint, read_checkpoint
from engine.cli.app import main as engine_main
from engine.errors import CheckpointError, OutputError
from engine.options import PRECISIONS
from export.families import PUBLISHED, family_of
from export.graphs.exporters import trace, without_weights, write_graphs
from export.graphs.templates import filled
from export.graphsets import Example, fingerprint, make_graphs, model_of, numbers_of
from export.parity import main as parity_main
from export.reference.huggingface import Reference, normalisation
from export.restore import main as restore_main
from tests.helpers.tiny import make_checkpoint, random_pictures, save_pictures
from tests.helpers.tiny_florence import make_florence_checkpoint
from tests.helpers.tiny_git import make_git_checkpoint
from tests.helpers.tiny_pairs import make_pair
from tests.parity.test_pairs import IS_FULL


class Changed(Mapping):
    """The weights of a checkpoint, some of them replaced, or removed if the replacement is None."""

    def __init__(self, weights, replaced) -> None:
        self.weights, self.replaced = weights, replaced

    def __getitem__(self, name):
        if self.replaced.get(name, self) is None:
            raise KeyError(name)
        return self.replaced[name] if name in self.replaced else self.weights[name]

    def are_equal(self, name, other):
        return np.array_equal(self[name], self[other])

    def __iter__(self):
        return (name for name in self.weights if self.replaced.get(name, self) is not None)

    def __len__(self) -> int:
        return len(list(iter(self)))

    def shape(self, name: str) -> tuple[int, ...]:
        return self[name].shape


def changed(checkpoint: Checkpoint, **replaced) -> Checkpoint:
    return replace(checkpoint, weights=Changed(checkpoint.weights, replaced))


@pytest.fixture(scope="module")
def graphs(tiny_checkpoint, tmp_path_factory) -> Path:
    """A folder with the graph sets of the tiny architecture, made as those in the wheel."""
    folder = tmp_path_factory.mktemp("graphs")
    for one in make_graphs("tiny", Reference.load(tiny_checkpoint).model.config):
        save_graphs(one, folder)
    return folder


@pytest.fixture(autouse=True)
def registered(graphs, monkeypatch):
    monkeypatch.setenv(EXTRA_GRAPHS, str(graphs))


def converted(checkpoint, out: Path, precision: str = "fp32") -> Path:
    graphs = find_graphs(checkpoint.family, checkpoint.shape, precision)
    convert(checkpoint, graphs, out, source={}, log=lambda _: None)
    return out


def same_files(ours: Path, theirs: Path) -> list[str]:
    """Compare all files of two folders that both have but the manifest; returns their names."""
    names = sorted({path.name for path in ours.iterdir()} & {path.name for path in theirs.iterdir()} - {MANIFEST})
    for name in names:
        assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name
    return names


FILES = [
    *("choice.onnx", "decoder.onnx", "decoder.onnx.data", "encoder.onnx", "encoder.onnx.data"),
    *("log_probs.onnx", "regroup.onnx", "tokenizer.json"),
]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_files_equal_the_export(precision, tiny_checkpoint, tiny_bundle, rounded_bundles, tmp_path):
    exported = {"fp32": tiny_bundle, **rounded_bundles}[precision]
    out = converted(read_checkpoint(tiny_checkpoint), tmp_path / "bundle", precision)
    assert same_files(out, exported) == FILES
    assert sorted(path.name for path in out.iterdir()) == [*FILES[:5], "log_probs.onnx", MANIFEST, *FILES[6:]]
    ours, theirs = Bundle.load(out), Bundle.load(exported)
    same = (
        *("model", "image", "tokens", "precision", "generation", "generation_from", "checkpoint"),
        *("clean_up_tokenization_spaces", "format", "activation_scales"),
    )
    for name in same:
        assert getattr(ours, name) == getattr(theirs, name), name


VARIANTS = {
    "other sizes": {"image_size": 48, "text": {"vocab_size": 100, "max_position_embeddings": 80}},
    "larger image": {"image_size": 128},
}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_sizes_are_filled_in(variant, precision, tmp_path):
    folder = make_checkpoint(tmp_path / "checkpoint", seed=4, **VARIANTS[variant])
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    settings |= {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.3, 0.2, 0.1], "rescale_factor": 0.0071}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    check_against_export(folder, tmp_path, precision)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_exact_half_weights_are_stored_as_the_export_does(precision, tmp_path):
    """Casts depend on values: half of the weights is rounded to float16, and one biases of 0 are not."""
    folder = make_checkpoint(tmp_path / "checkpoint", seed=5)
    weights = load_file(folder / "model.safetensors")
    rounded = {n: w.astype(np.float16).astype(np.float32) if i % 2 else w for i, (n, w) in enumerate(weights.items())}
    save_file(rounded, folder / "model.safetensors", metadata={"format": "pt"})
    out = check_against_export(folder, tmp_path, precision)
    assert (b".fp16" in (out / "decoder.onnx").read_bytes()) == (precision != "fp16")


def check_against_export(folder: Path, tmp_path: Path, precision: str) -> Path:
    """Compare a converted checkpoint with the graphs that the export traces from it."""
    reference, exported = Reference.load(folder), tmp_path / "exported"
    exported.mkdir()
    model = reference.model.half() if precision == "fp16" else reference.model
    write_graphs(model, exported, normalisation(reference.image_processor), is_int8=precision == "int8")
    out = converted(read_checkpoint(folder), tmp_path / "bundle", precision)
    assert same_files(out, exported) == FILES[:-1]
    Captioner.load(out, backend="cpu").caption(random_pictures(1), num_beams=2, max_new_tokens=4)
    return out


OTHERS = ("vit-gpt2", "trocr", "git", "florence", "first florence")
"""Checkpoints of other families that are converted."""


@pytest.fixture
def registered_others(other_families, monkeypatch):
    monkeypatch.setenv(EXTRA_GRAPHS, str(other_families / "graphs"))


@pytest.mark.usefixtures("registered_others")
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", OTHERS)
def test_other_families_equal_the_export(name, precision, other_families, tmp_path):
    out = check_against_export(other_families / name, tmp_path, precision)
    tokenizer = Reference.load(other_families / name).tokenizer.backend_tokenizer
    assert (out / "tokenizer.json").read_text() == tokenizer.to_str(pretty=True)


@pytest.mark.usefixtures("registered_others")
@pytest.mark.parametrize("name", OTHERS)
def test_sizes_of_other_families_are_filled_in(name, tmp_path):
    """Other image sizes, vocabularies, positions, mean and std than those of the checkpoint that made the sets."""
    sizes = {"image_size": 48}
    if name == "git":
        folder = make_git_checkpoint(tmp_path / name, max_position_embeddings=80, **sizes)
    elif "florence" in name:  # with the image size of the sets, which hold it
        text = {"vocab_size": 1300, "max_position_embeddings": 110}
        folder = make_florence_checkpoint(tmp_path / name, is_first=name != "florence", text=text)
    else:
        text = {"n_positions": 50} if name == "vit-gpt2" else {"max_position_embeddings": 50}
        more = {"qkv_bias": False} if name == "trocr" else {}
        decoder = {"vit-gpt2": "gpt2"}.get(name, name)
        folder = make_pair(tmp_path / name, "vit", decoder, vision=sizes | more, text=text | {"vocab_size": 200})
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    settings |= {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.3, 0.2, 0.1], "rescale_factor": 0.0071}
    size = {"height": 48, "width": 48}
    if "florence" not in name:
        settings |= {"size": {"shortest_edge": 50}, "crop_size": size} if name == "git" else {"size": size}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    check_against_export(folder, tmp_path, "fp32")


@pytest.mark.usefixtures("registered_others")
@pytest.mark.parametrize("name", OTHERS)
def test_captions_of_other_families_equal_generate(name, other_families, tmp_path):
    checkpoint = other_families / name
    parity(checkpoint, converted(read_checkpoint(checkpoint), tmp_path / "bundle"), tmp_path)


def test_captions_equal_generate(tiny_checkpoint, tmp_path):
    parity(tiny_checkpoint, converted(read_checkpoint(tiny_checkpoint), tmp_path / "bundle"), tmp_path)


def parity(checkpoint: Path, bundle: Path, tmp_path: Path) -> None:
    """Compare captions of a few images with those of `generate`."""
    save_pictures(tmp_path / "images", 6)
    options = ["--images", tmp_path / "images", "--beams", "1,4", "--out", tmp_path / "parity.json"]
    arguments = ["--checkpoint", checkpoint, "--bundle", bundle, *options]
    result = CliRunner().invoke(parity_main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    assert "pass: 0 real mismatches" in result.output


def test_manifest_says_what_was_not_checked(tiny_checkpoint, tmp_path):
    source = {"hub": "owner/name", "commit": "0123"}
    for precision in ("fp32", "int8"):
        out = tmp_path / precision
        checkpoint = read_checkpoint(tiny_checkpoint)
        graphs = find_graphs(checkpoint.family, checkpoint.shape, precision)
        convert(checkpoint, graphs, out, source=source, log=lambda _: None)
        manifest = json.loads((out / MANIFEST).read_text())
        version = find_graphs("blip", read_checkpoint(tiny_checkpoint).shape, precision).version
        expected = {"architecture": "tiny", "graphs": version, "golden": "not recorded"}
        assert manifest["converted"] == expected | ({} if precision == "fp32" else {"bounds": "not checked"})
        assert manifest["checkpoint"].items() >= source.items()


@pytest.mark.parametrize("command", ["verify", "restore"])
def test_what_needs_an_export_is_refused_in_one_line(command, tiny_checkpoint, tmp_path):
    out = converted(read_checkpoint(tiny_checkpoint), tmp_path / "bundle")
    if command == "verify":
        result = CliRunner().invoke(engine_main, ["verify", "--bundle", str(out), "--backend", "cpu"])
        assert "has no recorded answers of PyTorch" in result.stderr
    else:
        result = CliRunner().invoke(restore_main, ["--bundle", str(out), "--out", str(tmp_path / "restored")])
        assert "was converted without torch" in result.stderr
    assert result.exit_code == 1
    assert len(result.stderr.strip().splitlines()) == 1


def test_checkpoints_without_graphs_are_refused(tiny_checkpoint):
    shape = read_checkpoint(tiny_checkpoint).shape
    name = next(name for name, value in shape.items() if isinstance(value, int))
    sizes = rf"its sizes are not those of tiny: {name} .*BLIP-base, .*ViT-GPT2, tiny.*python -m export"
    with pytest.raises(CheckpointError, match=sizes):
        find_graphs("blip", shape | {name: 7}, "fp32")
    with pytest.raises(CheckpointError, match="no graphs of its family 'other' in fp32"):
        find_graphs("other", shape, "fp32")
    with pytest.raises(CheckpointError, match="no graphs of its family 'blip' in fp8"):
        find_graphs("blip", shape, "fp8")


WEIGHT = "text_decoder.bert.encoder.layer.1.output.dense.weight"


def test_weights_that_do_not_fit_are_refused_before_writing(tiny_checkpoint, tmp_path):
    checkpoint = read_checkpoint(tiny_checkpoint)
    with pytest.raises(CheckpointError, match=f"no weight {WEIGHT}"):
        converted(changed(checkpoint, **{WEIGHT: None}), tmp_path / "bundle")
    narrow = changed(checkpoint, **{WEIGHT: checkpoint.weights[WEIGHT][:, :-1]})
    with pytest.raises(CheckpointError, match=rf"{WEIGHT} has the shape \(32, 63\), but \(32, 64\) according"):
        converted(narrow, tmp_path / "bundle")
    fewer_words = replace(checkpoint, model=replace(checkpoint.model, vocab_size=65))
    with pytest.raises(CheckpointError, match=r"word_embeddings\.weight has the shape"):
        converted(fewer_words, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_vocabularies_too_small_for_int8_are_refused(tiny_checkpoint, tmp_path):
    checkpoint = read_checkpoint(tiny_checkpoint)
    few = replace(checkpoint, model=replace(checkpoint.model, vocab_size=32))
    with pytest.raises(CheckpointError, match=r"has 32 tokens, but int8 needs more than 32: use --precision fp32"):
        converted(few, tmp_path / "bundle", "int8")
    assert not (tmp_path / "bundle").exists()


def test_untied_heads_are_refused(tiny_checkpoint, tmp_path):
    checkpoint = read_checkpoint(tiny_checkpoint)
    head = "text_decoder.cls.predictions.decoder.weight"
    checkpoint = changed(checkpoint, **{head: checkpoint.weights[head] * 2})
    with pytest.raises(CheckpointError, match=rf"{head} differs from .*word_embeddings.*python -m export"):
        converted(checkpoint, tmp_path / "bundle")


def test_numbers_too_large_for_float16_are_refused(tiny_checkpoint, tmp_path):
    checkpoint = read_checkpoint(tiny_checkpoint)
    weight = checkpoint.weights[WEIGHT].copy()
    weight[-1, -1] = 65520  # rounds to infinity; 65519 would round to 65504
    checkpoint = changed(checkpoint, **{WEIGHT: weight})
    with pytest.raises(CheckpointError, match=rf"{WEIGHT} has numbers up to 6.55e\+04.*use --precision fp32"):
        converted(checkpoint, tmp_path / "half", "fp16")
    converted(checkpoint, tmp_path / "single")


def test_full_disk_is_one_line(tiny_checkpoint, tmp_path, monkeypatch):
    def fail(_file, _array):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(write._DataFile, "append", fail)
    with pytest.raises(OutputError, match="bundle cannot be written: No space left on device: make room"):
        converted(read_checkpoint(tiny_checkpoint), tmp_path / "bundle")


def test_damaged_graph_sets_are_refused(graphs, tmp_path, monkeypatch):
    content = lzma.decompress((graphs / f"tiny-fp32{SUFFIX}").read_bytes())
    for damaged in (b"no archive", lzma.compress(b"{}\n"), lzma.compress(content[:-1])):
        (tmp_path / f"damaged-fp32{SUFFIX}").write_bytes(damaged)
        monkeypatch.setenv(EXTRA_GRAPHS, str(tmp_path))
        with pytest.raises(CheckpointError, match="is not a graph set of this release"):
            list(known_graphs())
        (tmp_path / f"damaged-fp32{SUFFIX}").unlink()


def test_shipped_sets_are_small_and_complete(monkeypatch):
    monkeypatch.delenv(EXTRA_GRAPHS)
    assert known_architectures() == [(name, tuple(sorted(PRECISIONS))) for name in sorted(PUBLISHED)]
    sizes = [path.stat().st_size for path in shipped_graphs().iterdir()]
    assert max(sizes) < 1 << 20
    assert sum(sizes) < 2 << 20
    for graphs in known_graphs():
        assert graphs == GraphSet.from_bytes(graphs.to_bytes())


@pytest.mark.parametrize("architecture", PUBLISHED)
def test_shipped_sets_are_of_this_export(architecture, monkeypatch):
    """Fails if the export's graphs have changed since: run `python -m export.graphsets`."""
    monkeypatch.delenv(EXTRA_GRAPHS)
    made_by = fingerprint(PUBLISHED[architecture])
    assert {graphs.made_by for graphs in known_graphs() if graphs.architecture == architecture} == {made_by}


TRACED = [name for name in PUBLISHED if IS_FULL or not name.endswith("-large")]
"""Those of large sizes differ from base in numbers only; they take long and are traced by `make test-families`."""


@pytest.mark.parametrize("architecture", TRACED)
def test_shipped_graphs_equal_a_fresh_trace(architecture, monkeypatch):
    """With sizes that the set was not made from. float16 and int8 follow from the same code."""
    monkeypatch.delenv(EXTRA_GRAPHS)
    config = PUBLISHED[architecture]
    example = Example(4, 211, 40, (0.5, [0.5, 0.25, 0.125], [0.75, 0.5, 0.25]))
    model, numbers = model_of(config, example), numbers_of(config, example)
    fresh = without_weights(trace(model, example.normalisation), family_of(model).sizes(model.config))
    shipped = find_graphs(config.model_type, RULES[config.model_type].shape(config.to_dict()), "fp32")
    assert tuple(filled(graph, numbers) for graph in shipped.graphs) == fresh


def test_sets_that_did_not_change_are_not_written_again(graphs, tmp_path):
    for path in graphs.iterdir():
        shutil.copy(path, tmp_path)
        one = GraphSet.from_bytes(lzma.decompress(path.read_bytes()))
        other = lzma.compress(one.to_bytes(), preset=0)  # as another release of the compressor might
        (tmp_path / path.name).write_bytes(other)
        save_graphs(one, tmp_path)
        assert (tmp_path / path.name).read_bytes() == other
        save_graphs(replace(one, made_by="another"), tmp_path)
        assert (tmp_path / path.name).read_bytes() != other
