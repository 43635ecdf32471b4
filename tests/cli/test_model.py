"""`--model`, `engine get` and `engine models`: checkpoints by name, converted once.

The hub is on the loopback interface. Programs run in their own processes, because the client of the hub reads its
environment when it is imported.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from transformers import BlipConfig

from engine.bundle.manifest import Bundle, FileDigests
from engine.checkpoints import cache, convert
from engine.checkpoints import hub as hub_module
from engine.checkpoints.cache import ModelRef, bundle_of
from engine.checkpoints.graphs import EXTRA_GRAPHS, save_graphs
from engine.cli.app import main
from engine.errors import BackendError, CheckpointError, EngineError, OutputError, UsageError
from export.bundle import export_bundle
from export.graphsets import make_graphs
from tests.cli.test_hub import published_as_base
from tests.helpers.hub import Hub, loopback_hub
from tests.helpers.tiny import make_checkpoint, save_pictures
from tests.helpers.tiny_florence import make_florence_checkpoint
from tests.helpers.tiny_git import make_git_checkpoint
from tests.helpers.tiny_pairs import make_pair

VIT_GPT2, GIT = "nlpconnect/vit-gpt2-image-captioning", "microsoft/git-base"
FLORENCE, NATIVE_FLORENCE = "microsoft/Florence-2-base", "florence-community/Florence-2-base"
BASE, LARGE = "Salesforce/blip-image-captioning-base", "Salesforce/blip-image-captioning-large"
CAPTION = ("--beams", "2", "--max-new-tokens", "8", "--input", "images", "--out", "run.csv")
NOWHERE = "http://127.0.0.1:9"


@dataclass
class Machine:
    """A machine with an empty home and a folder of images, on which `engine` runs in its own process."""

    folder: Path
    hub: Hub
    variables: dict[str, str] = field(default_factory=dict)

    @property
    def cache(self) -> Path:
        return self.folder / "cache/blip-caption-engine/models"

    def start(self, *arguments: object, **variables: str) -> subprocess.Popen[str]:
        environment = os.environ | {
            "HF_ENDPOINT": self.hub.endpoint,
            "HF_HOME": str(self.folder / "hf"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_ETAG_TIMEOUT": "3",
            "XDG_CACHE_HOME": str(self.folder / "cache"),
            "CONVERTER_STARTED": str(self.folder / "started"),
            "PYTHONPATH": str(Path(__file__).parents[2]),
        }
        return subprocess.Popen(
            [sys.executable, "-m", "tests.helpers.converter", *map(str, arguments)],
            env=environment | self.variables | variables,
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: object, **variables: str) -> list[str]:
        """Run a command that succeeds; return the lines of its log."""
        process = self.start(*arguments, **variables)
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        return [*err.splitlines(), *out.splitlines()]

    def refused(self, *arguments: object, **variables: str) -> str:
        """Run a command that fails; return its error, which is one line and the last."""
        process = self.start(*arguments, **variables)
        _, err = process.communicate(timeout=300)
        assert process.returncode in (1, 2), err
        *others, last = err.splitlines()
        assert last.startswith("error: "), err
        assert not [line for line in others if line.startswith(("error", "Traceback"))], err
        return last

    def captions(self) -> str:
        return (self.folder / "run.csv").read_text()

    def converted(self) -> list[Path]:
        return sorted(path for path in self.cache.iterdir() if path.is_dir() and path.name != "names")


@pytest.fixture(scope="module", autouse=True)
def graph_sets(tiny_checkpoint, tmp_path_factory) -> Iterator[None]:
    """Register the graph sets of the tiny architecture, made as those in the wheel are."""
    folder = tmp_path_factory.mktemp("graphs")
    for graphs in make_graphs("tiny", BlipConfig.from_pretrained(tiny_checkpoint)):
        save_graphs(graphs, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(EXTRA_GRAPHS, str(folder))
        yield


@pytest.fixture(scope="module")
def served(tiny_checkpoint, tmp_path_factory) -> dict[str, Path]:
    """Folders with the file lists of the published -base, which is pickled only, and -large."""
    folder = tmp_path_factory.mktemp("served")
    for name in ("base", "large"):
        (folder / name).mkdir()
        published_as_base(tiny_checkpoint, folder / name)
        (folder / name / "train.py").write_text("raise SystemExit")
    weights = load_file(tiny_checkpoint / "model.safetensors")
    torch.save(weights, folder / "base/pytorch_model.bin")  # in torch's zip format, as there
    shutil.copy(tiny_checkpoint / "model.safetensors", folder / "large")
    return {BASE: folder / "base", LARGE: folder / "large"}


@pytest.fixture
def machine(served, tmp_path) -> Iterator[Machine]:
    save_pictures(tmp_path / "images", 3)
    with loopback_hub() as hub:
        hub.repositories |= served
        yield Machine(tmp_path, hub, {})


@pytest.fixture
def expected(machine, tiny_bundle) -> str:
    machine.run("caption", "--bundle", tiny_bundle, *CAPTION)
    return machine.captions()


def test_hub_id_is_fetched_converted_and_cached(machine, expected):
    first = machine.run("caption", "--model", BASE, *CAPTION)
    assert machine.captions() == expected
    fetching = next(line for line in first if line.startswith("fetching"))
    commit = next((machine.folder / "hf/hub").glob("models--*/snapshots/*")).name
    assert f"fetching {BASE} at commit {commit[:12]}: 7 files, 0." in fetching
    assert fetching.endswith(f" MB -> {machine.folder}/hf/hub")
    assert not [name for name in machine.hub.asked if name.split()[0] in ("train.py", "tf_model.h5", "README.md")]
    (bundle,) = machine.converted()
    assert f"model: {BASE}, commit {commit[:12]}, fp32 -> {bundle}" in first
    assert "commit" in (bundle / "manifest.json").read_text()
    machine.hub.asked.clear()
    second = machine.run("caption", "--model", BASE, *CAPTION, HF_ENDPOINT=NOWHERE, HF_HUB_OFFLINE="1")
    assert machine.captions() == expected
    assert f"model: {BASE}, commit {commit[:12]}, fp32 -> {bundle}" in second
    assert not [line for line in second if line.startswith(("fetching", "converting"))]


def test_safetensors_are_preferred_to_pickles(machine, expected):
    machine.run("caption", "--model", f"{LARGE}@main", *CAPTION)
    assert machine.captions() == expected
    fetched = {line.split()[0] for line in machine.hub.asked}
    assert "model.safetensors" in fetched
    assert "pytorch_model.bin" not in fetched


@pytest.fixture(scope="module")
def served_others(tmp_path_factory) -> dict[str, Path]:
    """Folders with the published file lists; vit-gpt2-image-captioning and microsoft's Florence-2 are pickled only."""
    folder = tmp_path_factory.mktemp("others")
    vit_gpt2 = make_pair(folder / "vit-gpt2", "vit", "gpt2")
    weights = load_file(vit_gpt2 / "model.safetensors")
    (vit_gpt2 / "model.safetensors").unlink()
    masks = {"decoder.transformer.h.0.attn.bias": torch.ones(1, 1, 64, 64, dtype=torch.uint8).tril()}
    masks |= {"decoder.transformer.h.0.attn.masked_bias": torch.tensor(-1e4)}  # as older releases wrote
    torch.save(weights | masks, vit_gpt2 / "pytorch_model.bin")
    git = make_git_checkpoint(folder / "git")
    torch.save(load_file(git / "model.safetensors"), git / "pytorch_model.bin")
    vocabulary = json.loads((git / "tokenizer.json").read_text())["model"]["vocab"]
    (git / "vocab.txt").write_text("\n".join(sorted(vocabulary, key=vocabulary.__getitem__)) + "\n")
    settings = {"preprocessor_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"}
    both = settings | {"config.json", "pytorch_model.bin"}
    for one, more in (
        (vit_gpt2, {"vocab.json", "merges.txt"}),
        (git, {"generation_config.json", "model.safetensors", "vocab.txt"}),
    ):
        for path in one.iterdir():
            if path.name not in both | more:
                path.unlink()
        assert {path.name for path in one.iterdir()} == both | more
    first = make_florence_checkpoint(folder / "first", is_first=True, end_bias=0.5)
    native = make_florence_checkpoint(folder / "native", end_bias=0.5)
    for path in [*first.iterdir(), *native.iterdir()]:
        if path.name in ("merges.txt", "vocab.json") and path.parent == native:
            path.unlink()
    names = {"config.json", "generation_config.json", "preprocessor_config.json", "pytorch_model.bin", "tokenizer.json"}
    names |= {"tokenizer_config.json", "vocab.json", "modeling_florence2.py"}
    assert names == {path.name for path in first.iterdir()} - {"merges.txt"}
    return {VIT_GPT2: vit_gpt2, GIT: git, FLORENCE: first, NATIVE_FLORENCE: native}


@pytest.mark.parametrize("name", [VIT_GPT2, GIT, FLORENCE, NATIVE_FLORENCE])
def test_other_families_are_converted_by_name(name, served_others, other_families, machine, tmp_path):
    machine.hub.repositories |= served_others
    graphs = str(other_families / "graphs")
    export_bundle(served_others[name], tmp_path / "exported", lambda _: None)
    machine.run("caption", "--bundle", tmp_path / "exported", *CAPTION)
    expected = machine.captions()
    machine.run("caption", "--model", name, *CAPTION, ENGINE_GRAPHS=graphs)
    assert machine.captions() == expected
    offline = {"HF_ENDPOINT": NOWHERE, "HF_HUB_OFFLINE": "1", "ENGINE_GRAPHS": graphs}
    again = machine.run("caption", "--model", name, *CAPTION, **offline)
    assert machine.captions() == expected
    assert not [line for line in again if line.startswith(("fetching", "converting"))]
    (machine.folder / "images/broken.png").write_bytes(b"no image")
    assert "1 of 4 images cannot be read" in machine.refused("caption", "--model", name, *CAPTION, **offline)
    (machine.folder / "images/broken.png").unlink()
    resumed = machine.run("caption", "--model", name, *CAPTION, **offline)
    assert any("3 captions of an earlier run are taken from" in line for line in resumed)
    assert machine.captions() == expected
    assert not [line for line in machine.hub.asked if ".py" in line]
    if "Florence" in name:
        machine.run("caption", "--model", name, "--task", "<MORE_DETAILED_CAPTION>", *CAPTION, **offline)
        assert machine.captions() != expected


def test_models_are_averaged_and_processes_get_the_bundle(machine, tiny_bundle, tmp_path):
    make_checkpoint(tmp_path / "other", seed=1)
    two = ("--model", tiny_bundle, "--model", tmp_path / "other", "--bundle-weight", 2, "--bundle-weight", 1)
    one = machine.run("caption", *two, *CAPTION)
    first = machine.captions()
    (bundle,) = machine.converted()
    machine.run("caption", *two, *CAPTION, "--processes", 2, "--threads", 2)
    assert machine.captions() == first
    assert machine.converted() == [bundle]
    assert f"+1.0*{Bundle.load(bundle).digest[:12]}" in one[-1]
    error = machine.refused("caption", "--model", tiny_bundle, "--model", f"{tiny_bundle}/", *CAPTION)
    assert "given twice" in error


def test_interrupted_run_resumes_with_the_same_model(machine, tiny_checkpoint):
    save_pictures(machine.folder / "images", 40)
    (machine.folder / "images/broken.png").write_bytes(b"no image")
    first = ("caption", "--model", tiny_checkpoint, *CAPTION)
    assert "1 of 41 images cannot be read" in machine.refused(*first)
    (machine.folder / "images/broken.png").unlink()
    assert any("40 captions of an earlier run are taken from" in line for line in machine.run(*first))


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("owner/missing", "there is no such repository, or it is private: check the name, or set HF_TOKEN"),
        (f"{BASE}@v9", "has no revision v9: see its page for the revisions"),
        ("owner/gated", "it is gated: ask for access on its page, then set HF_TOKEN"),
        ("owner/bundle", "is a bundle, not a checkpoint: pass it as hf://owner/bundle"),
        ("nowhere", "nowhere does not exist, and it is not an id on the Hugging Face Hub such as owner/name"),
    ],
)
def test_wrong_names_are_one_line(name, sentence, machine, tiny_bundle):
    machine.hub.gated.add("owner/gated")
    machine.hub.repositories["owner/bundle"] = tiny_bundle
    assert sentence in machine.refused("caption", "--model", name, *CAPTION)


def test_offline_and_no_cache_are_one_line(machine):
    line = machine.refused("caption", "--model", BASE, *CAPTION, HF_ENDPOINT=NOWHERE)
    assert "the hub cannot be reached, and the checkpoint is not cached" in line
    line = machine.refused("caption", "--model", BASE, *CAPTION, HF_HUB_OFFLINE="1")
    assert "the hub is not used (HF_HUB_OFFLINE is set), and the checkpoint is not cached" in line


def test_interrupted_download_resumes(machine, expected):
    machine.hub.cut.add("pytorch_model.bin")
    process = machine.start("caption", "--model", BASE, *CAPTION)
    _, err = process.communicate(timeout=300)
    if process.returncode:  # the client of some releases resumes by itself
        assert "run the same command again to resume the download" in err.splitlines()[-1]
        machine.run("caption", "--model", BASE, *CAPTION)
    assert machine.captions() == expected
    assert sum(line.startswith("pytorch_model.bin from") for line in machine.hub.asked) > 1


def test_concurrent_runs_convert_once(machine, expected):
    runs = [
        machine.start("caption", "--model", BASE, *CAPTION[:-1], f"{number}.csv", CONVERTER_SECONDS="2")
        for number in range(3)
    ]
    for number, process in enumerate(runs):
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        assert (machine.folder / f"{number}.csv").read_text() == expected
    assert len((machine.folder / "started").read_text().split()) == 1
    assert len(machine.converted()) == 1


def test_killed_conversion_leaves_nothing_that_counts(machine, expected):
    process = machine.start("caption", "--model", BASE, *CAPTION, CONVERTER_SECONDS="60")
    while not (machine.folder / "started").exists():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    (draft,) = machine.converted()
    assert draft.name.startswith(".unfinished-")
    assert machine.run("models")[-1].endswith("nothing yet, see `engine get --help`")
    machine.run("get", BASE, "--precision", "int8")
    (other,) = machine.converted()
    assert len(other.name) == 64, "the draft of the killed process is removed"
    machine.run("caption", "--model", BASE, *CAPTION)
    assert machine.captions() == expected
    assert len(machine.converted()) == 2


def test_get_looks_for_a_newer_commit(machine):
    first = machine.run("get", BASE)
    (bundle,) = machine.converted()
    assert first[-1] == str(bundle)
    assert f"{BASE} is up to date" in machine.run("get", BASE)
    machine.hub.commits[BASE] = "ab" * 20
    machine.hub.asked.clear()
    newer = machine.run("get", BASE)
    assert f"fetching {BASE} at commit abababababab" in "\n".join(newer)
    assert machine.converted() == [bundle], "no file has changed"
    (line,) = [line for line in machine.run("models") if BASE in line]
    assert "commit abababababab, fp32: " in line
    offline = machine.run("get", BASE, HF_ENDPOINT=NOWHERE)
    assert f"note: the hub cannot be reached: newer commits of {BASE} were not looked for" in offline


def test_get_repairs_and_copies(machine, tmp_path):
    machine.run("get", BASE)
    (bundle,) = machine.converted()
    digest = Bundle.load(bundle).digest
    with (bundle / "decoder.onnx.data").open("r+b") as stream:
        stream.write(b"damage")
    out = tmp_path / "deep/bundle"
    lines = machine.run("get", BASE, "--out", out)
    assert "decoder.onnx.data has changed" in "\n".join(lines)
    assert lines[-1] == str(out)
    assert [Bundle.load(folder).digest for folder in (bundle, out)] == [digest, digest]
    machine.run("get", BASE, "--out", out)
    (out / "thesis.txt").write_text("mine")
    assert "exists and is not a bundle" in machine.refused("get", BASE, "--out", out)
    assert (out / "thesis.txt").read_text() == "mine"


def test_models_are_listed_and_removed(machine, tiny_checkpoint):
    machine.run("get", BASE)
    machine.run("get", f"{BASE}@main")
    machine.run("get", tiny_checkpoint, "--precision", "int8")
    listed = machine.run("models")
    assert "BLIP-base (fp32, fp16, int8)" in listed[0]
    assert [line.split(",")[0].strip() for line in listed[2:]] == sorted([str(tiny_checkpoint), BASE, f"{BASE}@main"])
    assert len(json.loads(machine.run("models", "--json")[0])["cached"]) == 3
    kept = machine.converted()
    machine.run("models", "--remove", BASE)
    assert machine.converted() == kept, f"{BASE}@main has the same bundle"
    machine.run("models", "--remove", f"{BASE}@main")
    (bundle,) = machine.converted()
    machine.run("models", "--remove", bundle.name[:12])
    assert machine.converted() == []
    for name in (BASE, "../../images", bundle.name[:12]):
        assert "`engine models` lists what it has" in machine.refused("models", "--remove", name)
    assert (machine.folder / "images").is_dir()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--model", BASE, "--bundle", "x"], "--model and --bundle exclude each other"),
        (["--precision", "int8"], "--precision and --image-size convert a --model: add --model"),
        (["--bundle", "x", "--image-size", "224"], "--precision and --image-size convert a --model: add --model"),
        (["--model", BASE, "--bundle-weight", "1"], "--bundle-weight needs at least two --bundle options (or --model"),
        (["--checkpoint", BASE], "did you mean --model?"),
    ],
)
@pytest.mark.parametrize("command", [["caption", *CAPTION], ["bench"]])
def test_wrong_combinations_of_options(command, options, sentence):
    result = CliRunner().invoke(main, [*command, *options])
    assert result.exit_code == 2
    assert sentence in result.stderr


# From here on in this process, without the hub's client.


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A copy of the tiny checkpoint's folder, with an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return make_checkpoint(tmp_path / "checkpoint")


def age(checkpoint: Path) -> None:
    """Wait until the stamps of all files count, see COARSE_NS. The time of a change of status cannot be set."""
    newest = max(path.stat().st_ctime_ns for path in checkpoint.iterdir())
    time.sleep(max(0, (newest + 1.5 * cache.COARSE_NS - time.time_ns()) / 1e9))


def test_local_checkpoint_is_hashed_only_when_it_changed(here, monkeypatch):
    monkeypatch.setattr(cache, "COARSE_NS", 10**8)
    age(here)
    hashed, log = [], []
    plain = FileDigests.__call__
    monkeypatch.setattr(FileDigests, "__call__", lambda self, path: hashed.append(path.name) or plain(self, path))
    first = bundle_of(str(here), log=log.append)
    assert "model.safetensors" in hashed
    hashed.clear()
    assert bundle_of(str(here), log=log.append) == first
    assert hashed == []
    os.utime(here / "tokenizer.json")
    age(here)
    assert bundle_of(str(here), log=log.append) == first, "the content is the same"
    assert hashed
    assert sum(line.startswith("converting") for line in log) == 1


def test_changed_checkpoint_is_converted_again(here, tiny_bundle):
    first = bundle_of(str(here), log=print)
    (here / "training.log").write_text("not a part of the model")
    assert bundle_of(str(here), log=print) == first
    config = json.loads((here / "generation_config.json").read_text()) | {"num_beams": 3}
    (here / "generation_config.json").write_text(json.dumps(config))
    second = bundle_of(str(here), log=print)
    assert second != first
    assert len({first, second, bundle_of(str(here), precision="fp16", log=print)}) == 3
    assert bundle_of(str(tiny_bundle), log=print) == tiny_bundle
    (unnamed,) = [one for one in cache.cached_bundles() if one.entry is None]
    assert unnamed.key == first.name


def test_checkpoint_that_changes_during_conversion_is_refused(here, monkeypatch):
    plain = convert.convert

    def changing(*arguments, **options):
        plain(*arguments, **options)
        (here / "config.json").write_text((here / "config.json").read_text() + " ")

    monkeypatch.setattr(convert, "convert", changing)
    with pytest.raises(CheckpointError, match="changed while it was converted: run the same command again"):
        bundle_of(str(here), log=print)
    assert cache.cached_bundles() == []


def test_options_of_a_bundle_are_those_it_has(tiny_bundle):
    for options, what in (({"precision": "int8"}, "--precision int8"), ({"image_size": 64}, "--image-size 64")):
        with pytest.raises(UsageError, match=f"{what} is for checkpoints, but .* is a bundle with"):
            ModelRef((str(tiny_bundle),), **options).located(print)
    same = ModelRef((str(tiny_bundle),), precision="fp32", image_size=32)
    assert same.located(print).folders() == same.folders() == [tiny_bundle]


def test_full_disk_is_one_line_before_and_during_conversion(here, monkeypatch):
    usage = shutil.disk_usage(here)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
        with pytest.raises(OutputError, match=r"needs .* MB in .*/models, but only 0.0 MB are free: free space there"):
            bundle_of(str(here), log=print)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(convert, "convert", full)
    with pytest.raises(OutputError, match=r"cannot be written \(No space left on device\): free space there"):
        bundle_of(str(here), log=print)
    assert cache.cached_bundles() == []


def test_download_needs_space_for_files_and_bundle(tmp_path, monkeypatch):
    from engine.files.atomic import require_space

    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, 1_500_000_000))
    needs = {tmp_path / "hub": 990_000_000, tmp_path / "models": 990_000_000}
    with pytest.raises(OutputError) as error:
        require_space(needs, BASE)
    assert str(error.value).startswith(
        f"{BASE} needs 990.0 MB in {tmp_path}/hub and 990.0 MB in {tmp_path}/models, but only 1,500.0 MB are free"
    )
    require_space({tmp_path / "hub": 990_000_000}, BASE)


def test_cache_of_another_user_is_refused(here, monkeypatch):
    bundle_of(str(here), log=print)
    owner = here.stat().st_uid
    with monkeypatch.context() as patch:
        patch.setattr(os, "getuid", lambda: owner + 1)
        with pytest.raises(BackendError, match="belongs to another user, and the bundles cached there decide captions"):
            bundle_of(str(here), log=print)
    cache.models_folder().chmod(0o777)
    for use in (lambda: bundle_of(str(here), log=print), cache.cached_bundles):
        with pytest.raises(BackendError, match="others may write into"):
            use()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"key": "../../x"}', '{"key": 3}'])
def test_damaged_entry_is_ignored(content, here):
    first = bundle_of(str(here), log=print)
    (entry,) = cache._names().glob("*.json")
    entry.write_text(content)
    assert bundle_of(str(here), log=print) == first


def test_python_api_converts(here, tiny_bundle, caplog):
    from engine import Captioner
    from tests.helpers.tiny import random_pictures

    with caplog.at_level("INFO", logger="engine"):
        captioner = Captioner.load(here, backend="cpu", threads=1)
    assert any(line.startswith("converting") for line in caplog.messages)
    expected = Captioner.load(tiny_bundle, backend="cpu", threads=1).caption(random_pictures(2), num_beams=2)
    assert [c.ids for c in captioner.caption(random_pictures(2), num_beams=2)] == [c.ids for c in expected]
    with pytest.raises(CheckpointError, match="does not exist, and it is not an id"):
        Captioner.load("nowhere")
    with pytest.raises(EngineError, match="no such directory"):
        Captioner.load(Path("owner/name"))


def test_invalid_precision_is_a_usage_error(here):
    from engine import Captioner

    with pytest.raises(UsageError, match="unknown precision 'bf8': choose one of fp32, fp16, int8"):
        Captioner.load(here, precision="bf8", backend="cpu")
    with pytest.raises(UsageError, match="precision and image size convert a checkpoint"):
        Captioner.load(precision="int8")


def test_disk_that_fills_up_during_a_download_is_one_line():
    with pytest.raises(CheckpointError, match=r"is full \(No space left on device\): free space there, or set HF_HOME"):
        hub_module._explain(BASE, BASE, "", OSError(28, "No space left on device"))


def test_choice_of_weight_files():
    weights_of = hub_module.weights_of
    assert weights_of(["a.bin", "pytorch_model.bin", "config.json"]) == ["pytorch_model.bin"]
    assert weights_of(["model.safetensors", "model.fp16.safetensors", "pytorch_model.bin"]) == ["model.safetensors"]
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    index = "model.safetensors.index.json"
    assert weights_of([*reversed(shards), index, "pytorch_model.bin", "checkpoint-5/model.safetensors"]) == shards
    assert weights_of([*shards, "model_ema.safetensors", "pytorch_model.bin"]) == ["pytorch_model.bin"]
    assert weights_of(["adapter_model.safetensors", "blip.safetensors"]) == ["blip.safetensors"]
    assert weights_of(["training_args.bin", "x/pytorch_model.bin"]) == []
