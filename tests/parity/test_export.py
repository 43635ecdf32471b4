"""The export: contents of the files, and checkpoints that are refused."""

from __future__ import annotations

import copy
import errno
import hashlib
import json
import re
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from click.testing import CliRunner
from transformers import BlipForConditionalGeneration

from engine.bundle.manifest import Bundle
from engine.captioner import Captioner
from engine.cli.app import main as engine_main
from engine.errors import ExportError
from engine.files.lock import OutputLock
from engine.machine.verify import Golden, first_difference, replay, verify
from engine.options import DECODE_OPTIONS, DEFAULTS, SAMPLING, DecodeOptions
from export import bundle as export_module
from export.__main__ import main
from export.bundle import export_bundle
from export.checkpoints.load import load_checkpoint
from export.families.modules import IS_5
from export.graphs.exporters import write_graphs
from export.parity import main as parity_main
from export.reference.golden import FORCED, GOLDEN_SETTINGS
from export.reference.huggingface import Reference
from export.reference.trace import Divergence
from export.restore import restore_checkpoint
from tests.helpers.tiny import make_checkpoint, make_tie_rich_checkpoint, random_pictures
from train.demo.build import round_to_fp16


def export(*arguments: object):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture
def checkpoint_copy(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_graphs_store_each_tensor_once_by_name(tiny_bundle, tiny_reference):
    names = {t.name for t in onnx.load(tiny_bundle / "decoder.onnx").graph.initializer}
    assert "text_decoder.bert.embeddings.word_embeddings.weight" in names
    assert "text_decoder.cls.predictions.decoder.weight" not in names, "the tied LM head must not be stored again"
    stored = sum((tiny_bundle / f"{part}.onnx.data").stat().st_size for part in ("encoder", "decoder"))
    unique = sum(p.numel() for p in tiny_reference.model.parameters()) * 4
    assert stored < unique * 1.1


def test_only_standard_operators(tiny_bundle):
    for part in ("encoder", "decoder", "regroup"):
        model = onnx.load(tiny_bundle / f"{part}.onnx")
        assert {node.domain for node in model.graph.node} <= {"", "ai.onnx"}
        assert [entry.version for entry in model.opset_import] == [18]


def test_weights_exact_in_fp16_are_stored_as_fp16(checkpoint_copy, tmp_path):
    model = BlipForConditionalGeneration.from_pretrained(checkpoint_copy)
    round_to_fp16(model)
    model.save_pretrained(checkpoint_copy)
    bundle = export_bundle(checkpoint_copy, tmp_path / "bundle", lambda _: None)
    types = {t.data_type for t in onnx.load(bundle.path / "decoder.onnx").graph.initializer if len(t.dims) == 2}
    assert types == {onnx.TensorProto.FLOAT16}
    reference, pictures = Reference.load(checkpoint_copy), random_pictures(4)
    options = DecodeOptions(num_beams=3)
    theirs = reference.generate(reference.pixels(pictures), options)
    ours = Captioner.load(bundle.path, backend="cpu").caption(pictures, options)
    assert [caption.ids for caption in ours] == [best.ids for best, *_ in theirs]


def test_bundle_restores_its_checkpoint(tiny_bundle, tiny_reference, tmp_path):
    restored = load_checkpoint(restore_checkpoint(tiny_bundle, tmp_path / "restored"))
    for name, tensor in tiny_reference.model.state_dict().items():
        assert torch.equal(restored.state_dict()[name], tensor), name
    for part in ("text_config", "vision_config"):
        ours, theirs = (getattr(model.config, part).to_dict() for model in (restored, tiny_reference.model))
        differing = {key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)}
        assert differing <= {"_name_or_path", "transformers_version", "_attn_implementation_autoset"}
    assert restored.text_decoder.generation_config.use_cache


@pytest.mark.parametrize(
    "changes",
    [
        {"do_normalize": False},
        {"do_rescale": False},
        {"rescale_factor": 1 / 127.5},
        {"image_mean": [0.2, 0.3, 0.4], "image_std": 0.5},
        {"resample": 1},
    ],
)
def test_image_processor_settings_reach_bundle_and_restore(changes, checkpoint_copy, tmp_path):
    edit_json(checkpoint_copy / "preprocessor_config.json", **changes)
    bundle = export_bundle(checkpoint_copy, tmp_path / "bundle", lambda _: None)
    pictures, options = random_pictures(5), DecodeOptions(num_beams=2)
    ours = [caption.ids for caption in Captioner.load(bundle.path, backend="cpu").caption(pictures, options)]
    for checkpoint in (checkpoint_copy, restore_checkpoint(bundle.path, tmp_path / "restored")):
        reference = Reference.load(checkpoint)
        theirs = reference.generate(reference.pixels(pictures), options)
        assert ours == [best.ids for best, *_ in theirs]


def test_tokenizer_padding_does_not_affect_prompts(checkpoint_copy, tmp_path):
    tokenizer = Reference.load(checkpoint_copy).tokenizer
    tokenizer(["a chest"], padding="max_length", truncation=True, max_length=4)
    tokenizer.save_pretrained(checkpoint_copy)
    assert json.loads((checkpoint_copy / "tokenizer.json").read_text())["truncation"], (
        "the tokenizer was saved without truncation: the test shows nothing"
    )
    bundle = export_bundle(checkpoint_copy, tmp_path / "bundle", lambda _: None)
    ids = Captioner.load(bundle.path, backend="cpu").tokenizer.prompt_ids("a picture of the chest")
    assert len(ids) == 6


@pytest.mark.parametrize(
    "settings",
    [
        {"min_length": 15},
        {"length_penalty": -1.0, "num_beams": 3},
        {"early_stopping": True, "num_beams": 2},
        {"max_position_embeddings": 30},
        {"tie_word_embeddings": False},
    ],
)
def test_checkpoint_defaults_do_not_prevent_export(settings, tmp_path):
    checkpoint = make_checkpoint(tmp_path / "checkpoint", text=settings)
    export_bundle(checkpoint, tmp_path / "bundle", lambda _: None)


@pytest.mark.parametrize(
    ("text", "vision"),
    [
        ({"num_attention_heads": 2, "num_hidden_layers": 3}, {"num_hidden_layers": 1}),
        ({"hidden_size": 40, "num_attention_heads": 5, "hidden_act": "relu"}, {"num_attention_heads": 2}),
        ({"encoder_hidden_size": 48, "layer_norm_eps": 0.02}, {"hidden_size": 48, "layer_norm_eps": 0.05}),
        ({"hidden_act": "gelu_new"}, {"hidden_act": "quick_gelu"}),
    ],
)
def test_sizes_and_eps_come_from_the_checkpoint(text, vision, tmp_path):
    checkpoint = make_checkpoint(tmp_path / "checkpoint", text=text, vision=vision)
    export_bundle(checkpoint, tmp_path / "bundle", lambda _: None)  # replays its golden recordings
    bundle = Bundle.load(tmp_path / "bundle")
    assert bundle.model.num_layers == text.get("num_hidden_layers", 2)


def test_export_hashes_each_file_once(tiny_checkpoint, tmp_path, monkeypatch):
    """Seven graphs (three, and four of the split decoder) are opened twice each: as written, then optimised."""
    hashed: Counter[str] = Counter()
    opened: Counter[str] = Counter()
    digest, session = hashlib.file_digest, onnxruntime.InferenceSession

    def count_digest(stream, *arguments):
        hashed[Path(stream.name).name] += 1
        return digest(stream, *arguments)

    def count_session(path, *arguments, **settings):
        opened[Path(path).name] += 1
        return session(path, *arguments, **settings)

    monkeypatch.setattr(hashlib, "file_digest", count_digest)
    monkeypatch.setattr(onnxruntime, "InferenceSession", count_session)
    bundle = export_bundle(tiny_checkpoint, tmp_path / "bundle", lambda _: None)
    assert hashed == dict.fromkeys([*bundle.files, "model.safetensors"], 1)
    twice = dict.fromkeys(("decoder.onnx", "log_probs.onnx", "choice.onnx"), 2)
    assert opened == twice | {"encoder.onnx": 4, "regroup.onnx": 4}


@pytest.mark.parametrize("is_tie", [True, False])
def test_golden_image_is_skipped_only_at_a_tie(is_tie, tiny_checkpoint, tmp_path, monkeypatch):
    """Change the engine's caption of image 1 in setting 2, and let the trace call it a tie or a real mismatch."""
    plain = export_module.replay

    def changed_caption(captioner, golden, setting):
        found = plain(captioner, golden, setting)
        if setting == 2:
            best = found[1][0]
            found[1][0] = replace(best, ids=(*best.ids[:-1], best.ids[-1] + 1))
        return found

    monkeypatch.setattr(export_module, "replay", changed_caption)
    monkeypatch.setattr("engine.machine.verify.replay", changed_caption)
    verdict = "tie" if is_tie else "real"
    monkeypatch.setattr(export_module, "judge", lambda *_: (verdict, Divergence(0, 1e-7, is_tie)))
    result = export("--checkpoint", tiny_checkpoint, "--out", tmp_path / "bundle")
    if not is_tie:
        assert "do not give PyTorch's captions" in result.stderr
        return
    assert result.exit_code == 0, result.output
    golden = Golden.load(tmp_path / "bundle" / "golden.npz")
    skipped = [[ids is None for ids in golden.expected(i)] for i in range(len(golden.settings))]
    assert skipped == [[False, i == 2, False] for i in range(len(golden.settings))]


@pytest.mark.parametrize(
    "wanted",
    [
        {"max_length": 13, "num_beams": 3, "no_repeat_ngram_size": 2},
        {"num_beams": 3, "repetition_penalty": 2.5, "length_penalty": 2.0, "min_length": 8, "max_length": 64},
        {
            "repetition_penalty": 1.3,
            "bad_words_ids": [[7], [8, 9]],
            "suppress_tokens": [10],
            "begin_suppress_tokens": [6],
        },
    ],
)
def test_bundle_stores_generation_defaults(wanted, checkpoint_copy, tmp_path):
    config = json.loads((checkpoint_copy / "config.json").read_text())
    config["text_config"] |= wanted
    (checkpoint_copy / "config.json").write_text(json.dumps(config))
    bundle = export_bundle(checkpoint_copy, tmp_path / "bundle", lambda _: None)
    assert dict(bundle.generation) == wanted
    model, pictures = Reference.load(checkpoint_copy), random_pictures(3)
    theirs = model.model.generate(pixel_values=model.pixels(pictures))
    ours = Captioner.load(bundle.path, backend="cpu").caption(pictures)
    assert [mine.ids for mine in ours] == [cut(expected, bundle) for expected in theirs.tolist()]


def cut(ids: list[int], bundle: Bundle) -> tuple[int, ...]:
    """Cut after the first end token."""
    end = ids.index(bundle.tokens.eos) + 1 if bundle.tokens.eos in ids else len(ids)
    return tuple(ids[:end])


def test_position_table_is_resized_as_in_hugging_face(tiny_checkpoint, tmp_path):
    """16 px images on a 32 px table: the exported graph equals generate(interpolate_pos_encoding=True)."""
    bundle = export_bundle(tiny_checkpoint, tmp_path / "bundle", lambda _: None, image_size=16)
    reference, pictures = Reference.load(tiny_checkpoint), random_pictures(4)
    reference.image_processor.size = {"height": 16, "width": 16}
    ids = reference.model.generate(
        pixel_values=reference.pixels(pictures), interpolate_pos_encoding=True, num_beams=3, max_new_tokens=10
    )
    ours = Captioner.load(tmp_path / "bundle", backend="cpu").caption(
        pictures, DecodeOptions(num_beams=3, max_new_tokens=10)
    )
    assert [mine.ids for mine in ours] == [cut(expected, bundle) for expected in ids.tolist()]


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda d: (d / "config.json").unlink(), "has no config.json"),
        (lambda d: (d / "config.json").write_text("{"), "not valid JSON"),
        (lambda d: edit_json(d / "config.json", model_type="bert"), "is not a BLIP or "),
        (
            lambda d: edit_json(d / "config.json", architectures=["BlipForQuestionAnswering"]),
            "is not a BLIP or ",
        ),
        (
            lambda d: edit_json(
                d / "config.json",
                text_config=json.loads((d / "config.json").read_text())["text_config"] | {"renormalize_logits": True},
            ),
            "has settings that the engine does not support (renormalize_logits=True)",
        ),
        (
            lambda d: edit_json(
                d / "config.json",
                text_config=json.loads((d / "config.json").read_text())["text_config"] | {"is_decoder": False},
            ),
            "cannot attend to an image",
        ),
        (lambda d: edit_json(d / "preprocessor_config.json", do_resize=False), "(do_resize=False)"),
        (
            lambda d: edit_json(d / "preprocessor_config.json", size={"shortest_edge": 32}),
            "BLIP needs a height and a width",
        ),
        (lambda d: edit_json(d / "config.json", auto_map={"AutoModel": "evil.py"}), "custom code"),
        (lambda d: (d / "model.safetensors").unlink(), "no weights"),
        (
            lambda d: (d / "model.safetensors").rename(d / "tf_model.h5"),
            "can be read, only tf_model.h5",
        ),
        (lambda d: (d / "model.safetensors").write_bytes(b"x" * 100), "model.safetensors cannot be read"),
        (
            lambda d: edit_json(d / "preprocessor_config.json", size={"height": 16, "width": 16}),
            "pass --image-size 16",
        ),
        (
            lambda d: edit_json(
                d / "config.json",
                vision_config=json.loads((d / "config.json").read_text())["vision_config"] | {"image_size": 64},
            ),
            "position_embedding has the shape (1, 17, 24), but config.json requires (1, 65, 24)",
        ),
        (
            lambda d: [(d / n).unlink(missing_ok=True) for n in ("tokenizer.json", "vocab.txt")],
            "has no tokenizer (tokenizer.json, vocab.txt or vocab.json)",
        ),
    ],
)
def test_bad_checkpoint_gives_one_error_and_no_files(damage, sentence, checkpoint_copy, tmp_path):
    damage(checkpoint_copy)
    result = export("--checkpoint", checkpoint_copy, "--out", tmp_path / "bundle")
    assert result.exit_code == 1
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, result.output
    assert sentence in errors[0]
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


@pytest.mark.skipif(IS_5, reason="optimum's exporter needs transformers 4")
def test_both_exporters_write_the_same_bytes(tiny_checkpoint, tiny_bundle, tmp_path):
    bundle = export_bundle(tiny_checkpoint, tmp_path / "bundle", lambda _: None, exporter="optimum")
    names = [name for name in bundle.files if ".onnx" in name]
    assert len(names) == 7
    for name in names:
        assert (bundle.path / name).read_bytes() == (tiny_bundle / name).read_bytes(), name


@pytest.mark.parametrize("manifest", [None, '{"name": "my web app"}', '{"format": 1, "files": {}}'])
def test_directory_with_other_files_is_not_replaced(manifest, tiny_checkpoint, tmp_path):
    (tmp_path / "precious.txt").write_text("x")
    if manifest:
        (tmp_path / "manifest.json").write_text(manifest)
    result = export("--checkpoint", tiny_checkpoint, "--out", tmp_path)
    assert result.exit_code == 1
    assert "exists and is not a bundle" in result.stderr
    assert (tmp_path / "precious.txt").exists()


def test_existing_bundle_is_replaced(tiny_checkpoint, tiny_bundle, tmp_path):
    shutil.copytree(tiny_bundle, tmp_path / "bundle")
    (tmp_path / "bundle" / "golden.npz").write_bytes(b"damaged")
    assert export("--checkpoint", tiny_checkpoint, "--out", tmp_path / "bundle").exit_code == 0
    Bundle.load(tmp_path / "bundle")
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


@pytest.fixture(scope="module")
def tie_rich(tmp_path_factory) -> Path:
    return make_tie_rich_checkpoint(tmp_path_factory.mktemp("tied") / "checkpoint")


@pytest.fixture
def few_settings(monkeypatch) -> None:
    monkeypatch.setattr("export.reference.golden.GOLDEN_SETTINGS", GOLDEN_SETTINGS[:3])


@pytest.mark.usefixtures("few_settings")
def test_ties_do_not_refuse_an_export(tie_rich, tmp_path):
    """Early ties lead to captions with very different scores: the first divergence decides, not the final scores."""
    result = export("--checkpoint", tie_rich, "--out", tmp_path / "bundle")
    assert result.exit_code == 0, result.output
    ties = [line for line in result.output.splitlines() if "its captions tie" in line]
    assert ties, "the checkpoint has no ties: the test shows nothing"
    arguments = ["verify", "--bundle", str(tmp_path / "bundle"), "--backend", "cpu"]
    assert CliRunner().invoke(engine_main, arguments).exit_code == 0


@pytest.mark.usefixtures("few_settings")
def test_wrong_graphs_are_refused_in_one_line(tie_rich, tmp_path, monkeypatch):
    """Ties do not excuse other errors: one weight of the graphs is wrong."""

    def write_wrong_graphs(model, *arguments, **settings):
        wrong = copy.deepcopy(model)
        with torch.no_grad():
            wrong.get_parameter("text_decoder.bert.encoder.layer.1.output.dense.weight").mul_(1.2)
        return write_graphs(wrong, *arguments, **settings)

    monkeypatch.setattr(export_module, "write_graphs", write_wrong_graphs)
    result = export("--checkpoint", tie_rich, "--out", tmp_path / "bundle")
    assert result.exit_code == 1
    (error,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert "the exported graphs do not give PyTorch's captions" in error
    assert "of 3 golden images" in error
    assert not re.search(r"\w+\(\w+=", error), "the message contains the repr of an object"
    assert not list(tmp_path.iterdir())


def test_golden_settings_cover_every_option(tiny_bundle):
    """Every option must change a golden setting, so that `engine verify` tests it. Sampling is excluded by name.

    Forced tokens are recorded for checkpoints that force them: tests/parity/test_florence.py.
    """
    recorded = Golden.load(tiny_bundle / "golden.npz").settings
    off = DEFAULTS | {"num_beams": 1}
    for name in set(DECODE_OPTIONS) - {*SAMPLING, *FORCED}:
        values = [setting[name] for setting in recorded if setting.get(name, off[name]) != off[name]]
        assert values, f"no golden setting has {name}: add one to GOLDEN_SETTINGS or BANS"
    assert set(SAMPLING) == {"do_sample", "temperature", "top_k", "top_p", "seed"}


def test_parity_accepts_every_option():
    flags = {flag for parameter in parity_main.params for flag in parameter.opts}
    for name, (declaration, _) in DECODE_OPTIONS.items():
        assert not declaration.flag or (declaration.flag in flags) == (name not in SAMPLING), name


def test_golden_options_change_captions(tiny_bundle, tiny_captioner):
    """A recording tests an option only if the captions differ without it."""
    golden = Golden.load(tiny_bundle / "golden.npz")
    for name in ("suppress_tokens", "begin_suppress_tokens", "bad_words", "bad_words_ids", "repetition_penalty"):
        (number,) = [i for i, setting in enumerate(golden.settings) if name in setting][-1:]
        others = [{k: v for k, v in s.items() if k != name} for s in golden.settings]
        without = replay(tiny_captioner, replace(golden, settings=others), number)
        assert [best.ids for best, *_ in without] != golden.expected(number), name


def test_verify_compares_alternatives(tiny_bundle, tiny_captioner):
    golden = Golden.load(tiny_bundle / "golden.npz")
    (number,) = golden.alternatives
    assert golden.alternatives[number].shape[:2] == (3, 2)
    assert all(check.passed for check in verify(tiny_captioner.bundle, tiny_captioner.backend))
    golden.alternatives[number][1, 1, 2] += 1
    found = replay(tiny_captioner, golden, number)
    ranks = [first_difference(found[i], expected) for i, expected in enumerate(golden.n_best(number))]
    assert ranks == [None, 2, None]
    golden.skip(number, 1, 2)
    assert [len(captions) for captions in golden.n_best(number)] == [3, 2, 3]


@pytest.fixture
def quick_export(tiny_bundle, monkeypatch) -> None:
    """Replace the slow steps of an export: its draft is a copy of an existing bundle."""
    monkeypatch.setattr(
        export_module, "_write_files", lambda _reference, out, *_: shutil.copytree(tiny_bundle, out, dirs_exist_ok=True)
    )
    monkeypatch.setattr(export_module, "_skip_ties", lambda *_: None)
    monkeypatch.setattr(export_module, "verify", lambda *_: [])
    monkeypatch.setattr(export_module, "verify_halves", lambda *_: [])


@pytest.mark.usefixtures("quick_export")
def test_existing_bundle_survives_a_failed_move(tiny_checkpoint, tiny_bundle, tmp_path, monkeypatch):
    out = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    before, rename = (out / "manifest.json").stat().st_ino, Path.replace

    def fail(path, target):
        if path.name == "bundle" and Path(target) == out:
            raise OSError(errno.EDQUOT, "Disk quota exceeded")
        return rename(path, target)

    monkeypatch.setattr(Path, "replace", fail)
    result = export("--checkpoint", tiny_checkpoint, "--out", out)
    assert result.exit_code == 1
    assert f"error: {tmp_path} cannot be written (Disk quota exceeded)" in result.stderr
    assert (out / "manifest.json").stat().st_ino == before
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


@pytest.mark.usefixtures("quick_export")
@pytest.mark.parametrize("step", ["_write_files", "write_manifest", "move_bundle"])
def test_full_disk_is_reported(step, tiny_checkpoint, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(export_module, step, full)
    result = export("--checkpoint", tiny_checkpoint, "--out", tmp_path / "bundle")
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].startswith(f"error: {tmp_path} cannot be written (No space left on device)")
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("quick_export")
def test_drafts_of_killed_exports_are_removed(tiny_checkpoint, tmp_path):
    dead, stranger, kept = tmp_path / ".bundle.a1_b2c3d", tmp_path / ".bundle.notes", tmp_path / ".bundle.abcdefgh"
    (dead / "bundle").mkdir(parents=True)
    (dead / "bundle" / "encoder.onnx").write_bytes(b"half")
    stranger.mkdir()
    kept.mkdir()
    (kept / "thesis.txt").write_text("x")
    result = export("--checkpoint", tiny_checkpoint, "--out", tmp_path / "bundle")
    assert result.exit_code == 0, result.output
    assert f"removed {dead}" in result.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"bundle", stranger.name, kept.name}


@pytest.mark.usefixtures("quick_export")
def test_bundle_moved_by_killed_export_is_restored(tiny_checkpoint, tiny_bundle, tmp_path, monkeypatch):
    dead = tmp_path / ".bundle.a1_b2c3d"
    shutil.copytree(tiny_bundle, dead / "replaced")
    (dead / "bundle").mkdir()
    monkeypatch.setattr(export_module, "_write_files", lambda *_: (_ for _ in ()).throw(ExportError("stopped")))
    assert export("--checkpoint", tiny_checkpoint, "--out", tmp_path / "bundle").exit_code == 1
    Bundle.load(tmp_path / "bundle")
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


@pytest.mark.usefixtures("quick_export")
def test_concurrent_exports_to_one_folder_are_refused(tiny_checkpoint, tmp_path):
    with OutputLock(tmp_path / "bundle"):
        result = export("--checkpoint", tiny_checkpoint, "--out", tmp_path / "bundle")
    assert result.exit_code == 2
    assert "is being written by process" in result.stderr
