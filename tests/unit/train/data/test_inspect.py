"""Statistics of a data set: lengths, modalities, sizes, duplicates, overlaps, and the plot."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from PIL import Image

from engine.errors import OutputError, UsageError
from tests.helpers.datasets import picture, write
from tests.helpers.tiny import random_pictures, save_pictures
from train.data.dataset import DataInputs, Example, Split, draw
from train.data.inspect import (
    MODALITIES,
    NO_MODALITY,
    draw_dataset,
    inspect_dataset,
    inspect_directory,
    lines,
    twins_across,
)
from train.finetune import prepare_data
from train.recipe import Recipe

CT, MR, PET = "C0040405", "C0024485", "C0032743"


def made(name: str, rows: list[tuple[str, str, tuple[str, ...]]], root: Path = Path()) -> Split:
    return Split(name, [Example(i, root / f"{i}.png", text, cuis) for i, text, cuis in rows], Path(f"{name}.csv"))


def words(*lengths: int) -> list[tuple[str, str, tuple[str, ...]]]:
    return [(f"i{n}", " ".join(["w"] * length), ()) for n, length in enumerate(lengths)]


def test_lengths_are_counted_in_words_and_tokens():
    stats = inspect_dataset(
        {"train": made("train", words(1, 2, 2, 9))}, images=False, count_tokens=lambda text: len(text.split()) + 2
    )
    found = stats["splits"]["train"]
    assert found["words"] == {
        "min": 1,
        "median": 2.0,
        "mean": 3.5,
        "p95": 9,
        "max": 9,
        "counts": {"1": 1, "2": 2, "9": 1},
    }
    assert found["tokens"]["counts"] == {"3": 1, "4": 2, "11": 1}
    assert json.loads(json.dumps(stats)) == stats
    assert "  words per caption: 1 to 9, median 2, mean 3.5, 95 % have at most 9" in lines(stats)


def test_95th_percentile_is_not_exceeded_by_95_of_100():
    stats = inspect_dataset({"train": made("train", words(*range(1, 101)))}, images=False)
    assert stats["splits"]["train"]["words"]["p95"] == 95


def test_modalities_come_from_concepts_not_captions():
    rows = [
        ("a", "one", (CT, "C0817096")),
        ("a", "another caption of a", (CT, "C0817096")),
        ("b", "two", (PET, CT)),
        ("c", "MRI of the brain, C0024485", ("C0006104",)),
        ("d", "a CT", ()),
    ]
    found = inspect_dataset({"train": made("train", rows)}, images=False)["splits"]["train"]
    counts = {name: count for name, count in found["modalities"]["counts"].items() if count}
    assert counts == {MODALITIES[CT]: 2, MODALITIES[PET]: 1, NO_MODALITY: 2}
    assert (found["modalities"]["images"], found["modalities"]["several"]) == (4, 1)
    assert found["modalities"]["with_concepts"] == 3
    assert (found["images"], found["captions"]) == (4, 5)


def test_sizes_and_modes_come_from_headers(tmp_path):
    Image.new("RGB", (30, 10)).save(tmp_path / "a.png")
    Image.new("L", (10, 20)).save(tmp_path / "b.png")
    Image.new("L", (20, 60)).save(tmp_path / "c.png")
    cut = (tmp_path / "c.png").read_bytes()[:60]  # a complete header, but not all pixels
    (tmp_path / "c.png").write_bytes(cut)
    (tmp_path / "d.png").write_bytes(b"none")
    os.mkfifo(tmp_path / "f.png")
    rows = [(name, name, ()) for name in "abcdef"]
    stats = inspect_dataset({"train": made("train", rows, tmp_path)})
    sizes = stats["splits"]["train"]["sizes"]
    assert sizes["width"] == {"min": 10, "median": 20, "max": 30}
    assert sizes["height"] == {"min": 10, "median": 20, "max": 60}
    assert sizes["modes"] == {"L": 2, "RGB": 1}
    assert sizes["not_rgb"] == pytest.approx(2 / 3, abs=1e-4)
    assert sizes["unread"] == {
        "count": 3,
        "first": [
            ["d", "not an image, or damaged"],
            ["e", "No such file or directory"],
            ["f", "not a file, or too large"],
        ],
    }
    assert "  pixels: width 10 to 30, median 20; height 10 to 60, median 20; 66.7% not RGB (L 2, RGB 1)" in lines(stats)
    assert any(line.startswith("  3 of unknown size: d (not an image") for line in lines(stats))


def test_duplicates_within_and_between_splits(tmp_path):
    shades = {"a": 0, "b": 0, "c": 1, "v": 0, "w": 2, "x": 2}
    for name, shade in shades.items():
        Image.new("L", (2, 2), shade).save(tmp_path / f"{name}.png")
    splits = {
        "train": made("train", [("a", "one", ()), ("b", " one\n", ()), ("c", "two", ()), ("c", "three", ())], tmp_path),
        "valid": made("valid", [("v", "two", ()), ("a", "four", ())], tmp_path),
        "test": made("test", [("w", "five", ()), ("x", "six", ()), ("y", "", ()), ("z", "", ())], tmp_path),
    }
    stats = inspect_dataset(splits)
    files, captions = stats["duplicates"]["files"], stats["duplicates"]["captions"]
    assert files["within"] == {"train": 1, "valid": 1, "test": 1}
    assert files["between"] == {"train and valid": 1}
    assert files["first"] == [["train: a", "train: b", "valid: v", "valid: a"], ["test: w", "test: x"]]
    assert captions["within"] == {"train": 1}
    assert captions["between"] == {"train and valid": 1}
    assert stats["overlaps"] == {
        "train and valid": {"count": 1, "first": ["a"]},
        "train and test": {"count": 0, "first": []},
        "valid and test": {"count": 0, "first": []},
    }
    shown = lines(stats)
    assert "ids in train and valid: 1: a" in shown
    assert "ids in train and test: none" in shown
    assert (
        "images with the same caption: 1 repeat an earlier one of train, 1 shared by train and valid; for example "
        in ("\n".join(shown))
    )


def test_empty_split_has_no_lengths():
    stats = inspect_dataset({"train": made("train", [])}, images=False)
    assert stats["splits"]["train"]["words"] is None
    assert lines(stats)[0] == "train: 0 images, 0 captions (train.csv)"


def drawn(monkeypatch: pytest.MonkeyPatch, stats: dict, out: Path) -> list[dict[str, list[str]]]:
    """Draw a plot and return the texts of its panels."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    panels: list[dict[str, list[str]]] = []
    close = plt.close

    def keep(figure):
        for axes in figure.axes:
            legend = axes.get_legend()
            panels.append(
                {
                    "title": [axes.get_title()],
                    "axes": [axes.get_xlabel(), axes.get_ylabel()],
                    "legend": [text.get_text() for text in legend.get_texts()] if legend else [],
                    "bars": [text.get_text() for text in axes.texts],
                }
            )
        close(figure)

    monkeypatch.setattr(plt, "close", keep)
    draw_dataset(stats, out)
    return panels


def test_plot_shows_lengths_and_modalities_and_notes_cut_tail(tmp_path, monkeypatch):
    rows = [(f"i{n}", " ".join(["w"] * (n % 30 + 1)), (CT,) if n % 2 else (MR,)) for n in range(300)]
    splits = {"train": made("train", [*rows, ("long", "w " * 5000, ())]), "valid": made("valid", rows[:10])}
    stats = inspect_dataset(splits, images=False, count_tokens=lambda text: len(text.split()) + 2)
    panels = drawn(monkeypatch, stats, tmp_path / "plot.png")
    assert [panel["title"][0] for panel in panels] == [
        "Caption length in words",
        "Caption length in tokens",
        "Modality, from the concepts",
    ]
    assert "(1 of 311 captions are longer, up to 5000: not shown)" in panels[0]["axes"][0]
    assert panels[0]["legend"] == ["train: 301 captions, median 16", "valid: 10 captions, median 5.5"]
    assert sorted(panels[2]["bars"]) == sorted(["150", "150", "1", "5", "5", "0"])
    with Image.open(tmp_path / "plot.png") as plot:
        assert plot.width > 1500


def test_plot_omits_panels_without_data(tmp_path, monkeypatch):
    stats = inspect_dataset({"train": made("train", words(1, 2, 3))}, images=False)
    (panel,) = drawn(monkeypatch, stats, tmp_path / "plot.png")
    assert panel["axes"] == ["words per caption", "% of the captions of the split"]
    with pytest.raises(OutputError, match="cannot be written: No such file or directory"):
        draw_dataset(stats, tmp_path / "nowhere" / "plot.png")


def test_inspect_and_finetune_count_captions_that_lose_words(tiny_checkpoint, tiny_reference, tmp_path):
    picture(tmp_path / "data" / "a.png")
    picture(tmp_path / "data" / "b.png")
    write(tmp_path / "data" / "captions.csv", "ID,Caption\na,chest ct\nb,ภาพ\n")
    logged: list[str] = []
    assert inspect_directory(DataInputs(tmp_path / "data"), tmp_path / "out", logged.append, model=tiny_checkpoint)
    line = "1 caption has words that the vocabulary cannot spell, learned as [UNK]: b"
    assert f"train: {line}" in logged
    logged.clear()
    recipe = Recipe(valid_share=0.5, seed=next(s for s in range(50) if (draw("a", s) < 0.5) != (draw("b", s) < 0.5)))
    prepare_data(DataInputs(tmp_path / "data"), recipe, tiny_reference, logged.append)
    assert any(line in entry for entry in logged)


def test_tokens_are_counted_with_transformers_5_tokenizer(tiny_checkpoint, tmp_path):
    save_pictures(tmp_path / "data", 2)
    write(tmp_path / "data" / "captions.csv", "ID,Caption\n0,axial ct\n1,mri\n")
    model = Path(shutil.copytree(tiny_checkpoint, tmp_path / "model"))
    settings = json.loads((model / "tokenizer_config.json").read_text()) | {"tokenizer_class": "TokenizersBackend"}
    (model / "tokenizer_config.json").write_text(json.dumps(settings | {"extra_special_tokens": ["[ENC]"]}))
    assert inspect_directory(DataInputs(tmp_path / "data"), tmp_path / "out", lambda _: None, model=model)
    found = json.loads((tmp_path / "out" / "inspect.json").read_text())
    assert found["splits"]["train"]["tokens"]["max"] == 4


def test_twins_across_splits_are_reported(tmp_path):
    images = random_pictures(5, size=(90, 70))
    for i, image in enumerate(images):
        image.save(tmp_path / f"train_{i}.png")
    images[1].resize((180, 140)).save(tmp_path / "copy.png")
    images[2].transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(tmp_path / "turned.png")
    random_pictures(9, size=(90, 70))[8].save(tmp_path / "new.png")
    splits = {
        "train": made("train", [(f"train_{i}", "a ct", ()) for i in range(5)] + [("train_0", "a scan", ())], tmp_path),
        "valid": made("valid", [("new", "a ct", ()), ("gone", "a ct", ())], tmp_path),
        "test": made("test", [("copy", "a ct", ()), ("turned", "a ct", ())], tmp_path),
    }
    found = twins_across(splits, "clip")
    assert found["train and test"] == {
        "images": 2,
        "of": 2,
        "kinds": {"copy": 1, "mirrored": 1},
        "near": 0,
        "first": [["copy", "train_1", "copy"], ["turned", "train_2", "mirrored"]],
    }
    assert found["train and valid"]["images"] == found["valid and test"]["images"] == 0
    shown = lines(inspect_dataset(splits) | {"twins": found})
    assert shown[-2] == (
        "images of test with a twin in train: 2 of 2 (copy 1, mirrored 1), 0 others with only a near image; "
        "for example copy and train_1 (copy)"
    )
    assert twins_across({"train": splits["train"]}, "clip") == {}


def test_missing_model_folder_is_named(tmp_path):
    with pytest.raises(UsageError, match="--model nowhere: there is no such folder"):
        inspect_directory(DataInputs(tmp_path), tmp_path / "out", lambda _: None, model=Path("nowhere"))
