"""Problems of data sets, unpacking of parquet files, hold_out and fingerprint."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from engine.errors import DataError, OutputError, UsageError
from engine.inputs.columns import Columns
from export.checkpoints.load import word_pieces
from tests.helpers.datasets import extreme_png, imageless, picture, png, seen, write, write_parquet
from train.data.batches import lost_in_tokens
from train.data.dataset import Example, Split, hold_out, read_dataset
from train.data.examples import Problems, check_split, drop_unusable, fingerprint
from train.data.inspect import inspect_dataset

CUIS = ("C0040405", "C0817096")


def rows(*names: str, shades: tuple[int, ...] = ()) -> dict[str, list]:
    shades = shades or tuple(range(len(names)))
    return {
        "image": [{"bytes": png(shade), "path": None} for shade in shades],
        "image_id": list(names),
        "caption": [f"of {name}" for name in names],
        "cui": [list(CUIS) for _ in names],
    }


@pytest.mark.parametrize("folder", ["", "data"])
def test_parquet_is_unpacked_once_into_files(folder, tmp_path):
    write_parquet(tmp_path / folder / "train-00000-of-00002.parquet", rows("a", "b"))
    write_parquet(tmp_path / folder / "train-00001-of-00002.parquet", rows("c"))
    write_parquet(tmp_path / folder / "validation-00000-of-00001.parquet", {**rows("d"), "cui": ["C1;C2"]})
    splits = read_dataset(tmp_path)
    assert seen(splits, tmp_path) == {
        "train": [(name, f"unpacked/train/{name}.png", f"of {name}") for name in "abc"],
        "valid": [("d", "unpacked/valid/d.png", "of d")],
    }
    assert (tmp_path / "unpacked" / "train" / "b.png").read_bytes() == png(1)
    assert [splits[name].examples[0].concepts for name in splits] == [CUIS, ("C1", "C2")]
    before = (tmp_path / "unpacked" / "train").stat().st_ino
    assert read_dataset(tmp_path) == splits
    assert (tmp_path / "unpacked" / "train").stat().st_ino == before
    assert sorted(os.listdir(tmp_path / "unpacked")) == ["train", "valid"]


def test_parquet_ids_cannot_escape_the_folder(tmp_path):
    names = ["../../outside", "/etc/outside", "..", ".hidden", "a/b", "a\0b", "x" * 300, "A", "a", "ü", "index.jsonl"]
    write_parquet(tmp_path / "set" / "train-0.parquet", rows(*names))
    split = read_dataset(tmp_path / "set", unpack_into=tmp_path / "out" / "deep")["train"]
    assert [example.id for example in split.examples] == names
    folder = tmp_path / "out" / "deep" / "train"
    assert {example.image.parent for example in split.examples} == {folder}
    assert [example.image.read_bytes() for example in split.examples] == [png(i) for i in range(len(names))]
    assert len({example.image.name.lower() for example in split.examples}) == len(names)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.parent for path in files} == {folder, tmp_path / "set"}
    assert len(files) == len(names) + 2


def test_interrupted_unpacking_is_repeated(tmp_path, monkeypatch):
    write_parquet(tmp_path / "train-0.parquet", rows("a", "b"))

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("train.data.parquet.os.fsync", stop)
    with pytest.raises(KeyboardInterrupt):
        read_dataset(tmp_path)
    assert os.listdir(tmp_path / "unpacked") == [".train.partial"]
    monkeypatch.undo()
    assert [e.image.name for e in read_dataset(tmp_path)["train"].examples] == ["a.png", "b.png"]
    assert os.listdir(tmp_path / "unpacked") == ["train"]


def test_changed_parquet_is_unpacked_again(tmp_path):
    write_parquet(tmp_path / "train-0.parquet", rows("a", "b"))
    read_dataset(tmp_path)
    write_parquet(tmp_path / "train-0.parquet", rows("c"))
    assert [e.id for e in read_dataset(tmp_path)["train"].examples] == ["c"]
    assert sorted(os.listdir(tmp_path / "unpacked" / "train")) == ["c.png", "index.jsonl"]


def test_untrusted_index_cannot_escape_the_folder(tmp_path):
    write_parquet(tmp_path / "set" / "train-0.parquet", rows("a"))
    picture(tmp_path / "secret.png")
    read_dataset(tmp_path / "set")
    index = tmp_path / "set" / "unpacked" / "train" / "index.jsonl"
    index.write_text(index.read_text().replace("a.png", "../../../secret.png"))
    split = read_dataset(tmp_path / "set")["train"]
    assert split.examples[0].image == index.with_name("secret.png")
    assert [name for name, _ in split.problems.missing] == ["a"]


def test_unpacking_does_not_overwrite_other_folders(tmp_path):
    write_parquet(tmp_path / "set" / "train-0.parquet", rows("a"))
    mine = write(tmp_path / "out" / "train" / "mine.txt", "mine")
    with pytest.raises(OutputError, match="was not unpacked from parquet"):
        read_dataset(tmp_path / "set", unpack_into=tmp_path / "out")
    assert mine.read_text() == "mine"


def test_parquet_rows_with_shared_ids_or_missing_cells(tmp_path):
    columns = rows("a", "a", "a", "b", "c", shades=(1, 2, 1, 3, 4))
    columns["image"][3] = None
    columns["caption"][4] = None
    write_parquet(tmp_path / "train-0.parquet", columns)
    split = read_dataset(tmp_path)["train"]
    assert [e.image.name for e in split.examples] == ["a.png", "a~2.png", "a.png", "b.missing", "c.png"]
    assert split.examples[1].image.read_bytes() == png(2)
    assert split.problems.repeated == [("a", "of 2 images")]
    assert [name for name, _ in split.problems.missing] == ["b"]
    assert split.problems.empty == [("c", "no text")]


def test_parquet_without_ids_uses_file_name_or_row_number(tmp_path):
    columns = rows("", "", "")
    del columns["image_id"]
    columns["image"] = [{"bytes": png(), "path": path} for path in ("x/one.jpg", None, "")]
    write_parquet(tmp_path / "train-0.parquet", columns)
    ids = [e.id for e in read_dataset(tmp_path)["train"].examples]
    assert ids == ["one", "train_00000002", "train_00000003"]


@pytest.mark.parametrize(
    ("columns", "chosen", "ids"),
    [
        ({"jpg": [png()], "txt": ["CT"], "__key__": ["000001"]}, Columns(), ["000001"]),
        ({"image": [png()], "report": ["CT"], "text": ["other"], "uid": ["u1"]}, Columns("uid", "report"), ["u1"]),
        ({"images": [[{"bytes": png(), "path": "x/a.png"}]], "caption": ["CT"]}, Columns(), ["a"]),
    ],
)
def test_parquet_with_plain_bytes_or_chosen_columns(columns, chosen, ids, tmp_path):
    write_parquet(tmp_path / "train-0.parquet", columns)
    (example,) = read_dataset(tmp_path, columns=chosen)["train"].examples
    assert ([example.id], example.caption) == (ids, "CT")
    assert example.image.read_bytes() == png()


def test_other_caption_column_unpacks_parquet_again(tmp_path):
    write_parquet(tmp_path / "train-0.parquet", {"image": [png()], "findings": ["one"], "impression": ["two"]})
    for column, caption in (("findings", "one"), ("impression", "two")):
        (example,) = read_dataset(tmp_path, columns=Columns(caption=column))["train"].examples
        assert example.caption == caption


def test_read_only_data_set_names_unpack_into(tmp_path, monkeypatch):
    write_parquet(tmp_path / "train-0.parquet", rows("a"))

    def refuse(path: Path, **_: object) -> None:
        raise OSError(30, "Read-only file system", str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(OutputError, match=r"Read-only file system: .* set --unpack-into to another folder"):
        read_dataset(tmp_path)


@pytest.mark.parametrize("content", [b"PAR1", b""])
def test_invalid_parquet_is_named(content, tmp_path):
    (tmp_path / "train-0.parquet").write_bytes(content)
    with pytest.raises(DataError, match=r"train-0\.parquet cannot be read as parquet"):
        read_dataset(tmp_path)
    write_parquet(tmp_path / "train-0.parquet", {"image_id": ["a"], "caption": ["one"]})
    with pytest.raises(DataError, match=r"train-0\.parquet has no images"):
        read_dataset(tmp_path)


def make_faulty(root: Path) -> Split:
    """Return a split with two good images and one problem of each category."""
    for name in ("good", "better", "blank", "twice", "left"):
        picture(root / "train" / f"{name}.jpg")
    write(root / "train" / "damaged.jpg", "no picture")
    (root / "train" / "pipe.png").symlink_to("nowhere")
    captions = [
        "good,one two three",
        "better,one two three four",
        "blank,  ",
        "twice,x",
        "twice,y",
        "gone,x",
        "damaged,x",
        "pipe,x",
    ]
    write(root / "train_captions.csv", "ID,Caption\n" + "".join(f"{line}\n" for line in captions))
    return read_dataset(root)["train"]


def test_every_problem_has_its_category(tmp_path):
    split = make_faulty(tmp_path)
    found = check_split(split, count_tokens=lambda text: len(text.split()) + 2, max_tokens=5)
    assert [name for name, _ in found.missing] == ["gone"]
    assert found.unreadable == [("damaged", "not an image, or damaged"), ("pipe", "No such file or directory")]
    assert found.empty == [("blank", "white space only")]
    assert found.uncaptioned == [("train/left.jpg", "")]
    assert found.repeated == [("twice", "2 captions")]
    assert found.cut == [("better", "6 tokens, at most 5 fit")]
    assert found.lines() == [
        "1 missing image: gone (no such image in train/)",
        "2 unreadable images: damaged (not an image, or damaged), pipe (No such file or directory)",
        "1 empty caption: blank (white space only)",
        "1 image without caption: train/left.jpg",
        "1 id with several captions: twice (2 captions)",
        "1 caption that will be cut: better (6 tokens, at most 5 fit)",
    ]


def test_images_with_more_than_8_bits_are_named_unless_scaled(tmp_path):
    Image.fromarray(np.full((8, 8), 3000, np.uint16)).save(tmp_path / "deep.png")
    split = Split("train", [Example("deep", tmp_path / "deep.png", "a scan")], tmp_path)
    assert check_split(split).lines() == [
        "1 image with more than 8 bits per channel: deep (values above 255 become white; high_bit_depth scale keeps "
        "their range)"
    ]
    assert not check_split(split, depth="scale")


def test_captions_that_the_tokenizer_changes_are_counted(tmp_path):
    captions = {"plain": "A CT.", "accents": "tórax", "words": "ภาพ", "sign": "5 µm \u2265 x"}
    split = Split("train", [Example(name, tmp_path, text) for name, text in captions.items()], tmp_path)
    letters = "abcdefghijklmnopqrstuvwxyz5µμ≥."
    write(
        tmp_path / "vocab.txt", "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *letters, *(f"##{c}" for c in letters)])
    )
    tokenizer = word_pieces(tmp_path / "vocab.txt", do_lower_case=True)
    found = check_split(split, decode=False, lost_in=lambda text: lost_in_tokens(tokenizer, text))
    assert [name for name, _ in found.accents] == ["accents"]
    assert found.lines()[-1] == "1 caption has words that the vocabulary cannot spell, learned as [UNK]: words"
    assert not found.fatal


def test_dropped_transparency_and_frames_are_named(tmp_path):
    Image.new("RGBA", (8, 8)).save(tmp_path / "clear.png")
    Image.new("L", (8, 8)).save(tmp_path / "film.tif", save_all=True, append_images=[Image.new("L", (8, 8), 9)])
    split = Split("train", [Example(path.stem, path, "a scan") for path in sorted(tmp_path.iterdir())], tmp_path)
    assert check_split(split).lines() == [
        "1 image with transparency: clear (which is dropped)",
        "1 image with several frames: film (the first is used)",
    ]


def test_dicom_files_without_an_image_are_counted(tmp_path):
    picture(tmp_path / "train" / "a.png")
    imageless(tmp_path / "train" / "DICOMDIR", "1.2.840.10008.1.3.10")
    write(tmp_path / "train_captions.csv", "ID,Caption\na,a scan\n")
    split = read_dataset(tmp_path)["train"]
    assert check_split(split).lines() == ["1 DICOM file without an image, skipped: train/DICOMDIR"]


def test_image_with_extreme_side_is_unreadable(tmp_path):
    (tmp_path / "wide.png").write_bytes(extreme_png(1_000_001, 1))
    split = Split("train", [Example("wide", tmp_path / "wide.png", "a scan")], tmp_path)
    reason = "refused: a side of 1000001 pixels, the limit is 1000000"
    assert check_split(split).unreadable == [("wide", reason)]
    assert inspect_dataset({"train": split})["splits"]["train"]["sizes"]["unread"]["first"] == [["wide", reason]]


def test_checks_can_be_switched_off(tmp_path):
    split = make_faulty(tmp_path)
    assert check_split(split, decode=False) == split.problems
    assert not check_split(split, decode=False).cut


def test_long_lists_are_shortened():
    problems = Problems(unreadable=[("a", "truncated"), ("b", "x"), ("c", "y"), ("d", "z")])
    assert problems.lines(2) == ["4 unreadable images: a (truncated), b (x), ... and 2 more"]
    assert Problems().lines() == []
    assert not Problems()
    assert problems


def test_unusable_examples_are_dropped(tmp_path):
    split = make_faulty(tmp_path)
    problems = check_split(split)
    assert bool(problems.fatal)
    assert not replace(problems, missing=[], unreadable=[], empty=[]).fatal
    rest = drop_unusable(split, problems)
    assert [e.id for e in rest.examples] == ["good", "better", "twice", "twice"]
    assert not rest.problems.fatal
    assert rest.problems.repeated == problems.repeated
    assert not check_split(rest).fatal
    only_blank = replace(split, examples=[e for e in split.examples if e.id == "blank"])
    with pytest.raises(DataError, match=r"train_captions\.csv: split train has no usable examples: 1 missing"):
        drop_unusable(only_blank, problems)


def test_only_empty_captions_of_an_image_are_dropped(tmp_path):
    picture(tmp_path / "a.jpg")
    write(tmp_path / "train.jsonl", '{"image": "a.jpg", "captions": ["one", "", "two"]}\n')
    split = read_dataset(tmp_path)["train"]
    assert [e.caption for e in drop_unusable(split, split.problems).examples] == ["one", "two"]


def test_missing_images_name_the_searched_folders(tmp_path):
    write(tmp_path / "set" / "test_captions.csv", "ID,Caption\n../../secret,one\nb,two\n")
    picture(tmp_path / "secret.jpg")
    (tmp_path / "set" / "test").mkdir()
    split = read_dataset(tmp_path / "set")["test"]
    where = f"no such image in test/images/, test/, images/, {tmp_path / 'set'}/"
    assert split.problems.missing == [("../../secret", where), ("b", where)]
    assert {e.image.parent for e in split.examples} == {tmp_path / "set" / "test" / "images"}


def test_uncaptioned_image_in_shared_folder_is_reported_once(tmp_path):
    for name in ("a", "b", "left"):
        picture(tmp_path / "images" / f"{name}.jpg")
    write(tmp_path / "train_captions.csv", "ID,Caption\na,one\n")
    write(tmp_path / "valid_captions.csv", "ID,Caption\nb,two\n")
    splits = read_dataset(tmp_path)
    assert splits["train"].problems.uncaptioned == [("images/left.jpg", "")]
    assert splits["valid"].problems.uncaptioned == []


def test_links_and_non_utf8_file_names_are_images(tmp_path):
    picture(tmp_path / "elsewhere" / "a.jpg")
    (tmp_path / "set" / "train").mkdir(parents=True)
    (tmp_path / "set" / "train" / "a.jpg").symlink_to(tmp_path / "elsewhere" / "a.jpg")
    name = os.fsdecode(b"caf\xe9")
    picture(tmp_path / "set" / "train" / f"{name}.jpg")
    for stem in ("a", name):
        write(tmp_path / "set" / "train" / f"{stem}.txt", "one")
    split = read_dataset(tmp_path / "set")["train"]
    assert sorted(e.id for e in split.examples) == sorted(["a", name])
    assert not check_split(split)
    assert len(fingerprint(split)) == 64
    assert sum(map(len, (s.examples for s in hold_out(split, 0.5, seed_that_divides(split))))) == 2


def seed_that_divides(split: Split) -> int:
    for seed in range(100):
        try:
            hold_out(split, 0.5, seed)
        except DataError:
            continue
        return seed
    raise AssertionError("no seed divides two ids")


def made_split(names: list[str]) -> Split:
    examples = [Example(name, Path(f"{name}.jpg"), f"{kind} of {name}") for name in names for kind in ("CT", "MR")]
    problems = Problems(empty=[(names[0], ""), (names[1], "")], uncaptioned=[("left.jpg", "")])
    return Split("train", examples, Path("captions.csv"), problems)


def test_hold_out_is_stable_when_images_are_added():
    names = [f"image{i}" for i in range(400)]
    train, valid = hold_out(made_split(names[100:]), 0.2, 7)
    more_train, more_valid = hold_out(made_split(list(reversed(names))), 0.2, 7)
    taken = {e.id for e in valid.examples}
    assert taken < {e.id for e in more_valid.examples}
    assert {e.id for e in train.examples} < {e.id for e in more_train.examples}
    assert taken != {e.id for e in hold_out(made_split(names[100:]), 0.2, 8)[1].examples}
    assert 40 <= len(taken) <= 80


def test_hold_out_keeps_captions_and_problems_of_an_id_together():
    split = made_split([f"image{i}" for i in range(50)])
    train, valid = hold_out(split, 0.3, 0)
    assert (train.name, valid.name) == ("train", "valid")
    for part in (train, valid):
        captions = [e.caption for e in part.examples]
        assert all(f"{kind} of {e.id}" in captions for e in part.examples for kind in ("CT", "MR"))
        assert {name for name, _ in part.problems.empty} == {"image0", "image1"} & {e.id for e in part.examples}
    assert len(train.examples) + len(valid.examples) == 100
    assert train.problems.uncaptioned == [("left.jpg", "")]
    assert valid.problems.uncaptioned == []


@pytest.mark.parametrize(("fraction", "error"), [(0.0, UsageError), (1.0, UsageError), (1e-9, DataError)])
def test_hold_out_refuses_empty_parts(fraction, error):
    with pytest.raises(error, match="share"):
        hold_out(made_split(["a", "b"]), fraction, 0)


def test_fingerprint_ignores_folders_only(tmp_path):
    def made(root: Path, captions: str, extra: bytes = b"") -> str:
        for name in "ab":
            picture(root / "train" / f"{name}.jpg")
        with (root / "train" / "b.jpg").open("ab") as stream:
            stream.write(extra)
        write(root / "train_captions.csv", "ID,Caption\n" + captions)
        return fingerprint(read_dataset(root)["train"])

    first = made(tmp_path / "1", "a,one\nb,two\n")
    assert made(tmp_path / "2", "a,one\nb,two\n") == first
    others = [
        made(tmp_path / "3", "a,one\nb,three\n"),
        made(tmp_path / "4", "b,two\na,one\n"),
        made(tmp_path / "5", "a,one\nb,two\n", b"more"),
        made(tmp_path / "6", "a,one\nc,two\n"),
    ]
    assert len({first, *others}) == 5


def test_reading_and_checking_data_sets_needs_no_torch():
    code = "import sys, train.data.inspect, train.data.examples, train.data.dataset; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
