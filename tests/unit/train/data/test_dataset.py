"""Data sets in every layout, what is wrong with them, and the part that is held out."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from engine.errors import DataError, OutputError, UsageError
from train.data.check import check_split, drop_unusable, fingerprint
from train.data.dataset import Example, Split, hold_out, read_dataset
from train.data.layouts import split_of
from train.data.problems import Problems

CUIS = ("C0040405", "C0817096")


def picture(path: Path, shade: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (4, 3), shade).save(path)
    return path


def png(shade: int = 0) -> bytes:
    stream = io.BytesIO()
    Image.new("L", (4, 3), shade).save(stream, "PNG")
    return stream.getvalue()


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())
    return path


def seen(splits: dict[str, Split], root: Path) -> dict[str, list[tuple[str, str, str]]]:
    """Return (id, picture below the root, caption) of every example."""
    return {
        name: [(e.id, e.image.relative_to(root).as_posix(), e.caption) for e in split.examples]
        for name, split in splits.items()
    }


@pytest.mark.parametrize(
    "folder", ["{}", "{}_images", "images/{}", "images", "{}/images", "ImageCLEF_2023_{}_images/{}"]
)
def test_rocov2(folder, tmp_path):
    for split in ("train", "valid", "test"):
        picture(tmp_path / folder.replace("{}", split) / f"{split}_1.jpg")
        write(tmp_path / f"{split}_captions.csv", f'ID,Caption\n{split}_1,"NA, axial"\n')
        write(tmp_path / f"{split}_concepts.csv", f"ID,CUIs\n{split}_1,{';'.join(CUIS)}\n")
        write(tmp_path / f"{split}_concepts_manual.csv", f"ID,CUIs\n{split}_1,C1\n")
    splits = read_dataset(tmp_path)
    expected = {
        split: [(f"{split}_1", f"{folder.replace('{}', split)}/{split}_1.jpg", "NA, axial")]
        for split in ("train", "valid", "test")
    }
    assert seen(splits, tmp_path) == expected
    assert list(splits) == ["train", "valid", "test"]
    assert splits["train"].examples[0].concepts == CUIS
    assert splits["train"].captions_file == tmp_path / "train_captions.csv"
    assert not any(split.problems for split in splits.values())


def test_imageclef_2023_has_both_tasks_beside_each_other(tmp_path):
    stem = "ImageCLEFmedical_Caption_2023_"
    for split in ("train", "valid"):
        picture(tmp_path / f"{stem}{split}_images" / split / "a.jpg")
        write(tmp_path / f"{stem}caption_prediction_{split}_labels.csv", f"ID\tcaption\na\t{split}, one\n")
        write(tmp_path / f"{stem}concept_detection_{split}_labels.csv", "ID\tcuis\na\tC1;C2\n")
    write(tmp_path / f"{stem}caption_prediction_trainval_labels.csv", "ID\tcaption\na\tboth\n")
    splits = read_dataset(tmp_path)
    assert {name: [e.caption for e in split.examples] for name, split in splits.items()} == {
        "train": ["train, one"],
        "valid": ["valid, one"],
    }
    assert splits["valid"].examples[0].concepts == ("C1", "C2")


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train2017", "train"),
        ("Validation", "valid"),
        ("captions_val2014.json", "valid"),
        ("dev.tsv", "valid"),
        ("test-00000-of-00001.parquet", "test"),
        ("trainval_labels.csv", None),
        ("train_val_captions.csv", None),
        ("latest.csv", None),
    ],
)
def test_a_name_belongs_to_the_one_split_among_its_words(name, split):
    assert split_of(name) == split


def test_labels_are_captions_only_where_their_header_says_so(tmp_path):
    picture(tmp_path / "val" / "a.jpg")
    write(tmp_path / "val_labels.csv", "ID|Caption\na|one\n")
    assert [e.caption for e in read_dataset(tmp_path)["valid"].examples] == ["one"]
    write(tmp_path / "val_labels.csv", "ID,CUIs\na,C1\n")
    with pytest.raises(DataError, match="no data set of a known layout: looked for"):
        read_dataset(tmp_path)
    write(tmp_path / "validation_caption.csv", "ID,Caption\na,two\n")
    assert read_dataset(tmp_path)["valid"].examples == [Example("a", tmp_path / "val" / "a.jpg", "two", ("C1",))]


def test_imagefolder(tmp_path):
    picture(tmp_path / "train" / "sub" / "a.png")
    picture(tmp_path / "validation" / "b.png")
    write(tmp_path / "train" / "metadata.csv", "file_name,caption\nsub/a.png,one\n")
    write(tmp_path / "validation" / "metadata.jsonl", '{"file_name": "b.png", "text": "two", "cui": ["C1", "C2"]}\n')
    splits = read_dataset(tmp_path)
    assert seen(splits, tmp_path) == {
        "train": [("a", "train/sub/a.png", "one")],
        "valid": [("b", "validation/b.png", "two")],
    }
    assert splits["valid"].examples[0].concepts == ("C1", "C2")


@pytest.mark.parametrize("folders", [("train2017", "val2017"), ("images", "images")])
def test_coco_has_an_example_for_every_caption(folders, tmp_path):
    for split, number, folder in (("train", 1, folders[0]), ("val", 2, folders[1])):
        name = f"{number:012d}.jpg"
        picture(tmp_path / folder / name)
        content = {
            "images": [{"id": number, "file_name": name}],
            "annotations": [{"image_id": number, "caption": text} for text in ("one", "two")],
        }
        write(tmp_path / "annotations" / f"captions_{split}2017.json", json.dumps(content))
        write(tmp_path / "annotations" / f"instances_{split}2017.json", "{}")
    splits = read_dataset(tmp_path)
    assert seen(splits, tmp_path) == {
        "train": [("000000000001", f"{folders[0]}/000000000001.jpg", text) for text in ("one", "two")],
        "valid": [("000000000002", f"{folders[1]}/000000000002.jpg", text) for text in ("one", "two")],
    }
    assert not splits["train"].problems


def test_roco(tmp_path):
    for split in ("train", "validation", "test"):
        picture(tmp_path / split / "radiology" / "images" / f"ROCO_{split}.jpg")
        picture(tmp_path / split / "non-radiology" / "images" / "ROCO_x.jpg")
        write(tmp_path / split / "radiology" / "captions.txt", f'ROCO_{split}\t CT of the "{split}", axial\n')
    splits = read_dataset(tmp_path)
    assert seen(splits, tmp_path)["valid"] == [
        ("ROCO_validation", "validation/radiology/images/ROCO_validation.jpg", 'CT of the "validation", axial')
    ]
    assert list(splits) == ["train", "valid", "test"]
    assert not splits["train"].problems


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("train.jsonl", '{"image": "a.jpg", "caption": ["one", "two"]}\n'),
        ("training.csv", "ID,Caption\na,one\na,two\n"),
        ("train.tsv", "file_name\tcaption\nx/a.jpg\tone\nx/a.jpg\ttwo\n"),
        ("train.csv", "image_id,caption\na.jpg,one\na.jpg,two\n"),
        ("train.json", '[{"file_name": "a.jpg", "caption": ["one", "two"]}]'),
    ],
)
@pytest.mark.parametrize("folder", ["", "images", "train", "deep/er"])
def test_one_file_for_each_split(name, content, folder, tmp_path):
    picture(tmp_path / folder / "a.jpg")
    write(tmp_path / name, content)
    (split,) = read_dataset(tmp_path).values()
    assert split.name == "train"
    assert [(e.image, e.caption) for e in split.examples] == [
        (tmp_path / folder / "a.jpg", "one"),
        (tmp_path / folder / "a.jpg", "two"),
    ]
    assert not split.problems


@pytest.mark.parametrize("folder", ["", "images"])
def test_a_single_table_with_a_column_of_splits(folder, tmp_path):
    lines = [{"image": f"{s}.jpg", "caption": s, "split": s, "plane": "axial"} for s in ("test", "val", "Train")]
    for line in lines:
        picture(tmp_path / folder / line["image"])
    write(tmp_path / "pairs.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    found = seen(read_dataset(tmp_path), tmp_path)
    prefix = f"{folder}/" if folder else ""
    assert found == {
        "train": [("Train", f"{prefix}Train.jpg", "Train")],
        "valid": [("val", f"{prefix}val.jpg", "val")],
        "test": [("test", f"{prefix}test.jpg", "test")],
    }


@pytest.mark.parametrize("value", ["", "unused"])
def test_a_row_of_an_unknown_split_is_named(value, tmp_path):
    picture(tmp_path / "a.jpg")
    write(tmp_path / "captions.csv", f"ID,Caption,split\na,one,train\nb,two,{value}\n")
    with pytest.raises(DataError, match=rf"captions\.csv: b has the split '{value}'"):
        read_dataset(tmp_path)


@pytest.mark.parametrize("name", ["captions.csv", "metadata.csv"])
def test_a_single_table_without_splits_is_for_training(name, tmp_path):
    picture(tmp_path / "images" / "a.jpg")
    write(tmp_path / name, "file_name,caption\na.jpg,one\n")
    assert seen(read_dataset(tmp_path), tmp_path) == {"train": [("a", "images/a.jpg", "one")]}


def test_text_files_beside_pictures(tmp_path):
    for split in ("train", "test"):
        picture(tmp_path / split / "a.jpg")
        write(tmp_path / split / "a.txt", f"of {split}\n")
    found = seen(read_dataset(tmp_path), tmp_path)
    assert found == {"train": [("a", "train/a.jpg", "of train")], "test": [("a", "test/a.jpg", "of test")]}
    assert seen(read_dataset(tmp_path / "test"), tmp_path) == {"train": [("a", "test/a.jpg", "of test")]}


def test_what_is_no_data_set_hears_what_was_looked_for(tmp_path):
    picture(tmp_path / "a.jpg")
    with pytest.raises(DataError, match=r"no data set of a known layout: looked for \{split\}_captions\.csv"):
        read_dataset(tmp_path)
    with pytest.raises(UsageError, match="nowhere is not a directory"):
        read_dataset(tmp_path / "nowhere")


def test_two_files_that_could_be_meant_are_named_and_none_is_read(tmp_path):
    picture(tmp_path / "train" / "a.jpg")
    for year in (2014, 2017):
        write(tmp_path / "annotations" / f"captions_train{year}.json", "[]")
    with pytest.raises(DataError, match=r"captions of train: captions_train2014\.json, captions_train2017\.json"):
        read_dataset(tmp_path)


def test_pictures_that_share_an_id_are_told(tmp_path):
    picture(tmp_path / "images" / "a.jpg")
    picture(tmp_path / "images" / "a.png")
    write(tmp_path / "captions.csv", "ID,Caption\na,one\n")
    with pytest.raises(DataError, match="two images with the id 'a'"):
        read_dataset(tmp_path)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [("ID,CUIs\na,C1,C2\n", "line 2: 3 columns"), ("a,b\nc,d\n", "names no ID"), ('ID,CUIs\na,"C1\n', "line 2")],
)
def test_concepts_that_cannot_be_read_are_named(content, sentence, tmp_path):
    picture(tmp_path / "train" / "a.jpg")
    write(tmp_path / "train_captions.csv", "ID,Caption\na,one\n")
    write(tmp_path / "train_concepts.csv", content)
    with pytest.raises(DataError, match=rf"train_concepts\.csv.*{sentence}"):
        read_dataset(tmp_path)


def test_a_file_that_calls_itself_concepts_is_not_passed_over_without_a_header(tmp_path):
    picture(tmp_path / "train" / "a.jpg")
    write(tmp_path / "train_captions.csv", "ID,Caption\na,one\n")
    write(tmp_path / "train_concept_detection.csv", "a,C1\nb,C2\n")
    with pytest.raises(DataError, match=r"train_concept_detection\.csv is no table of concepts"):
        read_dataset(tmp_path)


def test_a_list_of_ids_named_after_a_split_is_no_captions_file(tmp_path):
    picture(tmp_path / "a.jpg")
    write(tmp_path / "train.txt", "a\n")
    write(tmp_path / "captions.csv", "ID,Caption\na,one\n")
    assert seen(read_dataset(tmp_path), tmp_path) == {"train": [("a", "a.jpg", "one")]}


def test_a_picture_set_aside_in_another_folder_is_missing(tmp_path):
    picture(tmp_path / "train" / "a.jpg")
    picture(tmp_path / "removed" / "b.jpg")
    write(tmp_path / "train_captions.csv", "ID,Caption\na,one\nb,two\n")
    split = read_dataset(tmp_path)["train"]
    assert split.problems.missing == [("b", "no such picture in train/")]
    assert split.problems.uncaptioned == []


def rows(*names: str, shades: tuple[int, ...] = ()) -> dict[str, list]:
    shades = shades or tuple(range(len(names)))
    return {
        "image": [{"bytes": png(shade), "path": None} for shade in shades],
        "image_id": list(names),
        "caption": [f"of {name}" for name in names],
        "cui": [list(CUIS) for _ in names],
    }


def write_parquet(path: Path, columns: dict[str, list], rows_a_group: int = 1) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.table(columns), path, row_group_size=rows_a_group)
    return path


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


def test_ids_of_parquet_never_leave_the_folder(tmp_path):
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


def test_an_unpacking_that_was_cut_off_is_done_again(tmp_path, monkeypatch):
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


def test_parquet_that_changed_is_unpacked_again(tmp_path):
    write_parquet(tmp_path / "train-0.parquet", rows("a", "b"))
    read_dataset(tmp_path)
    write_parquet(tmp_path / "train-0.parquet", rows("c"))
    assert [e.id for e in read_dataset(tmp_path)["train"].examples] == ["c"]
    assert sorted(os.listdir(tmp_path / "unpacked" / "train")) == ["c.png", "index.jsonl"]


def test_an_index_that_came_with_the_data_set_leads_nowhere_else(tmp_path):
    write_parquet(tmp_path / "set" / "train-0.parquet", rows("a"))
    picture(tmp_path / "secret.png")
    read_dataset(tmp_path / "set")
    index = tmp_path / "set" / "unpacked" / "train" / "index.jsonl"
    index.write_text(index.read_text().replace("a.png", "../../../secret.png"))
    split = read_dataset(tmp_path / "set")["train"]
    assert split.examples[0].image == index.with_name("secret.png")
    assert [name for name, _ in split.problems.missing] == ["a"]


def test_a_folder_of_others_is_not_overwritten_by_unpacking(tmp_path):
    write_parquet(tmp_path / "set" / "train-0.parquet", rows("a"))
    mine = write(tmp_path / "out" / "train" / "mine.txt", "mine")
    with pytest.raises(OutputError, match="was not unpacked from parquet"):
        read_dataset(tmp_path / "set", unpack_into=tmp_path / "out")
    assert mine.read_text() == "mine"


def test_rows_of_parquet_that_share_an_id_or_lack_something_are_told(tmp_path):
    columns = rows("a", "a", "a", "b", "c", shades=(1, 2, 1, 3, 4))
    columns["image"][3] = None
    columns["caption"][4] = None
    write_parquet(tmp_path / "train-0.parquet", columns)
    split = read_dataset(tmp_path)["train"]
    assert [e.image.name for e in split.examples] == ["a.png", "a~2.png", "a.png", "b.jpg", "c.png"]
    assert split.examples[1].image.read_bytes() == png(2)
    assert split.problems.repeated == [("a", "3 captions")]
    assert [name for name, _ in split.problems.missing] == ["b"]
    assert split.problems.empty == [("c", "no text")]


def test_parquet_without_ids_is_named_by_file_or_row(tmp_path):
    columns = rows("", "", "")
    del columns["image_id"]
    columns["image"] = [{"bytes": png(), "path": path} for path in ("x/one.jpg", None, "")]
    write_parquet(tmp_path / "train-0.parquet", columns)
    ids = [e.id for e in read_dataset(tmp_path)["train"].examples]
    assert ids == ["one", "train_00000002", "train_00000003"]


@pytest.mark.parametrize("content", [b"PAR1", b""])
def test_parquet_that_is_none_is_named(content, tmp_path):
    (tmp_path / "train-0.parquet").write_bytes(content)
    with pytest.raises(DataError, match=r"train-0\.parquet cannot be read as parquet"):
        read_dataset(tmp_path)
    write_parquet(tmp_path / "train-0.parquet", {"image_id": ["a"], "caption": ["one"]})
    with pytest.raises(DataError, match=r"train-0\.parquet has no pictures"):
        read_dataset(tmp_path)


def make_faulty(root: Path) -> Split:
    """Return a split with one problem of each category beside two good images."""
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
    told: list[tuple[int, int]] = []
    found = check_split(
        split, count_tokens=lambda text: len(text.split()) + 2, max_tokens=5, progress=lambda *n: told.append(n)
    )
    assert [name for name, _ in found.missing] == ["gone"]
    assert found.unreadable == [("damaged", "not an image, or damaged"), ("pipe", "No such file or directory")]
    assert found.empty == [("blank", "white space only")]
    assert found.uncaptioned == [("train/left.jpg", "")]
    assert found.repeated == [("twice", "2 captions")]
    assert found.cut == [("better", "6 tokens where 5 fit")]
    assert told == [(6, 6)]
    assert found.lines() == [
        "1 missing image: gone (no such picture in train/)",
        "2 unreadable images: damaged (not an image, or damaged), pipe (No such file or directory)",
        "1 empty caption: blank (white space only)",
        "1 image without caption: train/left.jpg",
        "1 id with several captions: twice (2 captions)",
        "1 caption that will be cut: better (6 tokens where 5 fit)",
    ]


def test_images_of_more_than_8_bits_are_named_unless_they_are_scaled(tmp_path):
    Image.fromarray(np.full((8, 8), 3000, np.uint16)).save(tmp_path / "deep.png")
    split = Split("train", [Example("deep", tmp_path / "deep.png", "a scan")], tmp_path)
    assert check_split(split).lines() == [
        "1 image of more than 8 bits a channel: deep (values above 255 become white; high_bit_depth scale keeps their "
        "range)"
    ]
    assert not check_split(split, depth="scale")


def test_what_is_not_asked_for_is_not_checked(tmp_path):
    split = make_faulty(tmp_path)
    assert check_split(split, decode=False) == split.problems
    assert not check_split(split, decode=False).cut


def test_long_lists_are_counted():
    problems = Problems(unreadable=[("a", "truncated"), ("b", "x"), ("c", "y"), ("d", "z")])
    assert problems.lines(2) == ["4 unreadable images: a (truncated), b (x), ... and 2 more"]
    assert Problems().lines() == []
    assert not Problems()
    assert problems


def test_fatal_problems_can_be_left_out(tmp_path):
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
    with pytest.raises(DataError, match=r"train_captions\.csv: no usable example is left of split train: 1 missing"):
        drop_unusable(only_blank, problems)


def test_of_several_captions_only_the_empty_one_is_left_out(tmp_path):
    picture(tmp_path / "a.jpg")
    write(tmp_path / "train.jsonl", '{"image": "a.jpg", "captions": ["one", "", "two"]}\n')
    split = read_dataset(tmp_path)["train"]
    assert [e.caption for e in drop_unusable(split, split.problems).examples] == ["one", "two"]


def test_pictures_that_are_all_missing_are_told_with_where_was_looked(tmp_path):
    write(tmp_path / "set" / "test_captions.csv", "ID,Caption\n../../secret,one\nb,two\n")
    picture(tmp_path / "secret.jpg")
    (tmp_path / "set" / "test").mkdir()
    split = read_dataset(tmp_path / "set")["test"]
    where = f"no such picture in test/images/, test/, images/, {tmp_path / 'set'}/"
    assert split.problems.missing == [("../../secret", where), ("b", where)]
    assert {e.image.parent for e in split.examples} == {tmp_path / "set" / "test" / "images"}


def test_pictures_in_a_shared_folder_are_left_over_only_once_and_only_if_no_split_has_them(tmp_path):
    for name in ("a", "b", "left"):
        picture(tmp_path / "images" / f"{name}.jpg")
    write(tmp_path / "train_captions.csv", "ID,Caption\na,one\n")
    write(tmp_path / "valid_captions.csv", "ID,Caption\nb,two\n")
    splits = read_dataset(tmp_path)
    assert splits["train"].problems.uncaptioned == [("images/left.jpg", "")]
    assert splits["valid"].problems.uncaptioned == []


def test_links_and_file_names_that_are_not_utf8_are_pictures_like_others(tmp_path):
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


def test_the_held_out_part_is_stable_when_images_are_added():
    names = [f"image{i}" for i in range(400)]
    train, valid = hold_out(made_split(names[100:]), 0.2, 7)
    more_train, more_valid = hold_out(made_split(list(reversed(names))), 0.2, 7)
    taken = {e.id for e in valid.examples}
    assert taken < {e.id for e in more_valid.examples}
    assert {e.id for e in train.examples} < {e.id for e in more_train.examples}
    assert taken != {e.id for e in hold_out(made_split(names[100:]), 0.2, 8)[1].examples}
    assert 40 <= len(taken) <= 80


def test_the_held_out_part_takes_all_captions_and_problems_of_an_id():
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
def test_a_share_that_leaves_nothing_is_refused(fraction, error):
    with pytest.raises(error, match="share"):
        hold_out(made_split(["a", "b"]), fraction, 0)


def test_the_fingerprint_follows_ids_captions_order_and_sizes_and_no_folder(tmp_path):
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
    code = "import sys, train.data.inspect, train.data.check, train.data.dataset; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_column_of_lists_has_several_captions_a_picture(tmp_path):
    columns = {"image": [{"bytes": png(1), "path": "0.png"}], "captions": [["a dog", "the dog"]]}
    write_parquet(tmp_path / "default/train/0000.parquet", columns)
    examples = read_dataset(tmp_path)["train"].examples
    assert [example.caption for example in examples] == ["a dog", "the dog"]
    assert len({example.image for example in examples}) == 1


def test_numbered_columns_are_several_captions(tmp_path):
    columns = {"image": [{"bytes": png(1), "path": "0.png"}], "caption_0": ["a dog"], "caption_1": ["the dog"]}
    write_parquet(tmp_path / "train-0.parquet", columns)
    assert [example.caption for example in read_dataset(tmp_path)["train"].examples] == ["a dog", "the dog"]


@pytest.mark.parametrize("value", [{"raw": "a dog"}, 7])
def test_a_column_that_holds_no_text_is_named(value, tmp_path):
    write_parquet(tmp_path / "train-0.parquet", {"image": [{"bytes": png(1), "path": "0.png"}], "caption": [value]})
    with pytest.raises(DataError, match=r"the column caption holds .*, not captions"):
        read_dataset(tmp_path)


@pytest.mark.parametrize("name", ["train.json", "coco_karpathy_train.json", "annotations/coco_karpathy_train.json"])
def test_blips_own_annotation_files(name, tmp_path):
    picture(tmp_path / "val2014/COCO_val2014_000000522418.jpg")
    path = "val2014/COCO_val2014_000000522418.jpg"
    write(tmp_path / name, json.dumps([{"caption": "A woman", "image": path, "image_id": "coco_522418"}]))
    split = read_dataset(tmp_path)["train"]
    assert [(example.caption, example.image.name) for example in split.examples] == [("A woman", path[8:])]
    assert not split.problems.missing


def test_vizwiz(tmp_path):
    picture(tmp_path / "train/VizWiz_train_00000000.jpg")
    content = {
        "images": [{"id": 0, "file_name": "VizWiz_train_00000000.jpg"}],
        "annotations": [{"image_id": 0, "caption": "a leaf"}],
    }
    write(tmp_path / "annotations/train.json", json.dumps(content))
    split = read_dataset(tmp_path)["train"]
    assert [example.id for example in split.examples] == ["VizWiz_train_00000000"]
    assert not split.problems.missing


def test_pictures_of_one_name_in_class_folders_are_found_by_their_paths(tmp_path):
    for name in ("cat/1.png", "dog/1.png"):
        picture(tmp_path / name)
    write(tmp_path / "metadata.csv", "file_name,text\ncat/1.png,a cat\ndog/1.png,a dog\n")
    split = read_dataset(tmp_path)["train"]
    assert [(e.id, e.caption, e.image.parent.name) for e in split.examples] == [
        ("cat/1", "a cat", "cat"),
        ("dog/1", "a dog", "dog"),
    ]
    assert not split.problems.missing


def test_karpathys_file_has_all_splits(tmp_path):
    images = [
        {
            "filename": f"{name}.jpg",
            "filepath": "val2014",
            "split": split,
            "sentences": [{"raw": "A b."}, {"raw": "C."}],
        }
        for name, split in (("a", "train"), ("b", "restval"), ("c", "val"), ("d", "test"))
    ]
    for name in "abcd":
        picture(tmp_path / "val2014" / f"{name}.jpg")
    write(tmp_path / "dataset_coco.json", json.dumps({"images": images, "dataset": "coco"}))
    splits = read_dataset(tmp_path)
    assert {name: [(e.id, e.caption) for e in split.examples] for name, split in splits.items()} == {
        "train": [("a", "A b."), ("a", "C."), ("b", "A b."), ("b", "C.")],
        "valid": [("c", "A b."), ("c", "C.")],
        "test": [("d", "A b."), ("d", "C.")],
    }
    assert not splits["train"].problems.missing


def test_r2gens_file_has_a_report_for_each_picture(tmp_path):
    reports = {
        "train": [{"id": "x", "report": "normal heart", "image_path": ["x/0.png", "x/1.png"], "split": "train"}],
        "val": [{"id": "y", "report": "a mass", "image_path": ["y/0.png"], "split": "val"}],
        "test": [],
    }
    for name in ("x/0", "x/1", "y/0"):
        picture(tmp_path / "images" / f"{name}.png")
    write(tmp_path / "annotation.json", json.dumps(reports))
    splits = read_dataset(tmp_path)
    assert seen(splits, tmp_path) == {
        "train": [("x/0", "images/x/0.png", "normal heart"), ("x/1", "images/x/1.png", "normal heart")],
        "valid": [("y/0", "images/y/0.png", "a mass")],
    }


@pytest.mark.parametrize("named", ["PMC1_g002.jpg", "ROCO_00002.jpg"])
def test_kaggles_roco_leads_from_ids_to_names(named, tmp_path):
    radiology = tmp_path / "train" / "radiology"
    picture(radiology / "images" / named)
    write(radiology / "captions.txt", "ROCO_00002\t axial ct\n")
    write(radiology / "traindata.csv", "id,name,caption\nROCO_00002,PMC1_g002.jpg, axial ct\n")
    split = read_dataset(tmp_path)["train"]
    assert [(e.id, e.image.name) for e in split.examples] == [("ROCO_00002", named)]
    assert not split.problems.missing
