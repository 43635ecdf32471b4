"""Layouts of users' data sets, the splits of their images, and directories of unknown layout."""

from __future__ import annotations

import json

import pytest

from engine.errors import DataError, UsageError
from engine.inputs.columns import Columns
from tests.helpers.datasets import picture, png, seen, write, write_parquet
from train.data.dataset import Example, read_dataset
from train.data.layouts import split_of

CUIS = ("C0040405", "C0817096")


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
def test_split_of_name(name, split):
    assert split_of(name) == split


def test_labels_file_needs_caption_header(tmp_path):
    picture(tmp_path / "val" / "a.jpg")
    write(tmp_path / "val_labels.csv", "ID|Caption\na|one\n")
    assert [e.caption for e in read_dataset(tmp_path)["valid"].examples] == ["one"]
    write(tmp_path / "val_labels.csv", "ID,CUIs\na,C1\n")
    with pytest.raises(DataError, match=r"not a data set of a known layout: .* Looked for"):
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


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("train.jsonl", '{"image": "a.jpg", "caption": ["one", "two"]}\n'),
        ("training.csv", "ID,Caption\na,one\na,two\n"),
        ("train.tsv", "file_name\tcaption\ner/a.jpg\tone\ner/a.jpg\ttwo\n"),
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
def test_single_table_with_split_column(folder, tmp_path):
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
def test_row_with_unknown_split_is_named(value, tmp_path):
    picture(tmp_path / "a.jpg")
    write(tmp_path / "captions.csv", f"ID,Caption,split\na,one,train\nb,two,{value}\n")
    with pytest.raises(DataError, match=rf"captions\.csv: b has the split '{value}'"):
        read_dataset(tmp_path)


@pytest.mark.parametrize("name", ["captions.csv", "metadata.csv"])
def test_single_table_without_splits_is_train(name, tmp_path):
    picture(tmp_path / "images" / "a.jpg")
    write(tmp_path / name, "file_name,caption\na.jpg,one\n")
    assert seen(read_dataset(tmp_path), tmp_path) == {"train": [("a", "images/a.jpg", "one")]}


def test_text_files_next_to_images(tmp_path):
    for split in ("train", "test"):
        picture(tmp_path / split / "a.jpg")
        write(tmp_path / split / "a.txt", f"of {split}\n")
    found = seen(read_dataset(tmp_path), tmp_path)
    assert found == {"train": [("a", "train/a.jpg", "of train")], "test": [("a", "test/a.jpg", "of test")]}
    assert seen(read_dataset(tmp_path / "test"), tmp_path) == {"train": [("a", "test/a.jpg", "of test")]}


def test_unknown_directory_lists_expected_layouts(tmp_path):
    picture(tmp_path / "a.jpg")
    with pytest.raises(DataError, match=r"not a data set of a known layout: .* Looked for \{split\}_captions\.csv"):
        read_dataset(tmp_path)
    with pytest.raises(UsageError, match="nowhere is not a directory"):
        read_dataset(tmp_path / "nowhere")


def test_ambiguous_captions_files_are_refused(tmp_path):
    picture(tmp_path / "train" / "a.jpg")
    for year in (2014, 2017):
        write(tmp_path / "annotations" / f"captions_train{year}.json", "[]")
    with pytest.raises(DataError, match=r"captions of train: captions_train2014\.json, captions_train2017\.json"):
        read_dataset(tmp_path)


def test_images_that_share_an_id_need_suffixes(tmp_path):
    picture(tmp_path / "images" / "a.jpg")
    picture(tmp_path / "images" / "a.png")
    write(tmp_path / "captions.csv", "ID,Caption\na,one\n")
    with pytest.raises(DataError, match=r"two images with the id 'a': a\.jpg and a\.png; .* or rename one"):
        read_dataset(tmp_path)
    write(tmp_path / "captions.csv", "ID,Caption\na.png,one\na.jpg,other\n")
    examples = read_dataset(tmp_path)["train"].examples
    assert [(example.image.name, example.caption) for example in examples] == [("a.png", "one"), ("a.jpg", "other")]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("ID,CUIs\na,C1,C2\n", "line 2: 3 columns"),
        ("a,b\nc,d\n", "the columns ID"),
        ('ID,CUIs\na,"C1\n', "line 2"),
    ],
)
def test_unreadable_concepts_are_named(content, sentence, tmp_path):
    picture(tmp_path / "train" / "a.jpg")
    write(tmp_path / "train_captions.csv", "ID,Caption\na,one\n")
    write(tmp_path / "train_concepts.csv", content)
    with pytest.raises(DataError, match=rf"train_concepts\.csv.*{sentence}"):
        read_dataset(tmp_path)


def test_concepts_file_without_header_is_refused(tmp_path):
    picture(tmp_path / "train" / "a.jpg")
    write(tmp_path / "train_captions.csv", "ID,Caption\na,one\n")
    write(tmp_path / "train_concept_detection.csv", "a,C1\nb,C2\n")
    with pytest.raises(DataError, match=r"train_concept_detection\.csv is not a table of concepts"):
        read_dataset(tmp_path)


def test_txt_list_of_ids_is_not_captions(tmp_path):
    picture(tmp_path / "a.jpg")
    write(tmp_path / "train.txt", "a\n")
    write(tmp_path / "captions.csv", "ID,Caption\na,one\n")
    assert seen(read_dataset(tmp_path), tmp_path) == {"train": [("a", "a.jpg", "one")]}


def test_image_in_another_folder_is_missing(tmp_path):
    picture(tmp_path / "train" / "a.jpg")
    picture(tmp_path / "removed" / "b.jpg")
    write(tmp_path / "train_captions.csv", "ID,Caption\na,one\nb,two\n")
    split = read_dataset(tmp_path)["train"]
    assert split.problems.missing == [("b", "no such image in train/")]
    assert split.problems.uncaptioned == []


def test_list_column_gives_several_captions_per_image(tmp_path):
    columns = {"image": [{"bytes": png(1), "path": "0.png"}], "captions": [["a dog", "the dog"]]}
    write_parquet(tmp_path / "default/train/0000.parquet", columns)
    examples = read_dataset(tmp_path)["train"].examples
    assert [example.caption for example in examples] == ["a dog", "the dog"]
    assert len({example.image for example in examples}) == 1


def test_numbered_columns_give_several_captions(tmp_path):
    columns = {"image": [{"bytes": png(1), "path": "0.png"}], "caption_0": ["a dog"], "caption_1": ["the dog"]}
    write_parquet(tmp_path / "train-0.parquet", columns)
    assert [example.caption for example in read_dataset(tmp_path)["train"].examples] == ["a dog", "the dog"]


@pytest.mark.parametrize("value", [{"raw": "a dog"}, 7])
def test_caption_column_without_text_is_refused(value, tmp_path):
    write_parquet(tmp_path / "train-0.parquet", {"image": [{"bytes": png(1), "path": "0.png"}], "caption": [value]})
    with pytest.raises(DataError, match=r"the column caption holds .*, not captions"):
        read_dataset(tmp_path)


def test_same_names_in_class_folders_are_found_by_path(tmp_path):
    for name in ("cat/1.png", "dog/1.png"):
        picture(tmp_path / name)
    write(tmp_path / "metadata.csv", "file_name,text\ncat/1.png,a cat\ndog/1.png,a dog\n")
    split = read_dataset(tmp_path)["train"]
    assert [(e.id, e.caption, e.image.parent.name) for e in split.examples] == [
        ("cat/1", "a cat", "cat"),
        ("dog/1", "a dog", "dog"),
    ]
    assert not split.problems.missing


@pytest.mark.parametrize("column", ["text", "prompt"])
def test_metadata_in_parquet(column, tmp_path):
    picture(tmp_path / "train" / "a.png")
    write_parquet(tmp_path / "train" / "metadata.parquet", {"file_name": ["a.png"], column: ["a dog"]})
    assert seen(read_dataset(tmp_path), tmp_path) == {"train": [("a", "train/a.png", "a dog")]}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            ["train/data-00000-of-00001.arrow", "dataset_dict.json"],
            "1 .arrow, 1 .json in the folders train; .arrow is a",
        ),
        (["00000.tar", "00001.tar"], "2 .tar; .tar is shards in tar files: unpack them into images"),
        (["train/a.png", "train/b.png"], "none of the 2 images has a text file .* no train/metadata.csv with"),
        (["a.png", "mine.csv:image_id,caption\na,x"], "mine.csv contains captions: name it captions.csv"),
        (
            ["a.png", "mine.csv:name,age\na,7"],
            "closest layout is one table .*, but mine.csv lacks a column of ids",
        ),
        (["a.pkl"], "pickle, not opened because it can run code"),
        (["notes.md"], "images and captions are missing"),
        ([], "it contains no files"),
    ],
)
def test_unknown_layout_suggests_the_closest(files, message, tmp_path):
    for file in files:
        name, _, content = file.partition(":")
        picture(tmp_path / name) if name.endswith(".png") else write(tmp_path / name, content)
    with pytest.raises(DataError, match=f"not a data set of a known layout: .*{message}.* Looked for"):
        read_dataset(tmp_path)


def test_missing_image_is_not_taken_from_another_folder(tmp_path):
    picture(tmp_path / "train" / "cat" / "1.png")
    picture(tmp_path / "valid" / "1.png")
    write(tmp_path / "train" / "metadata.csv", "file_name,text\ncat/1.png,a cat\ndog/1.png,a dog\nvalid/1.png,b\n")
    split = read_dataset(tmp_path)["train"]
    assert [name for name, _ in split.problems.missing] == ["dog/1"]
    assert [e.image.relative_to(tmp_path).as_posix() for e in split.examples if e.id != "dog/1"] == [
        "train/cat/1.png",
        "valid/1.png",
    ]


@pytest.mark.parametrize("table", ["file_name,text\ndog/1.png,a dog\n", "ID,Caption\ndog/1,a dog\n"])
def test_folder_in_table_must_match(table, tmp_path):
    picture(tmp_path / "images" / "cat" / "1.png")
    write(tmp_path / "captions.csv", table)
    assert len(read_dataset(tmp_path)["train"].problems.missing) == 1


def test_two_names_of_one_image_are_refused(tmp_path):
    picture(tmp_path / "images" / "1.png")
    write(tmp_path / "captions.csv", "ID,Caption\na/1,x\nb/1,y\n")
    with pytest.raises(DataError, match=r"captions\.csv: a/1 and b/1 are two names of .*1\.png"):
        read_dataset(tmp_path)


@pytest.mark.parametrize("folder", ["", "images/"])
@pytest.mark.parametrize("is_whole", [True, False])
@pytest.mark.parametrize("name", ["metadata.csv", "captions.csv"])
def test_single_table_takes_splits_from_folders(folder, is_whole, name, tmp_path):
    files = [f"{folder}Training/0.png", f"{folder}val/1.png", f"{folder}testing/2.png"]
    for file in files:
        picture(tmp_path / file)
    rows = "".join(f"{file if is_whole else file.rpartition('/')[2]},text\n" for file in files)
    write(tmp_path / name, "file_name,caption\n" + rows)
    logged: list[str] = []
    splits = read_dataset(tmp_path, log=logged.append)
    assert {name: [e.image for e in split.examples] for name, split in splits.items()} == {
        split: [tmp_path / file] for split, file in zip(("train", "valid", "test"), files, strict=True)
    }
    (line,) = logged
    assert line.endswith("train 1, valid 1, test 1")


def test_single_table_with_images_outside_split_folders_is_refused(tmp_path):
    for file in ("train/0.png", "test/1.png", "more/2.png"):
        picture(tmp_path / file)
    write(tmp_path / "metadata.csv", "file_name,text\ntrain/0.png,a\ntest/1.png,b\nmore/2.png,c\n")
    with pytest.raises(DataError, match=r"2 images are in folders named after a split .* 1 are not \(more/2\.png\)"):
        read_dataset(tmp_path)
    write(tmp_path / "metadata.csv", "file_name,text,split\ntrain/0.png,a,train\nmore/2.png,c,train\n")
    assert len(read_dataset(tmp_path)["train"].examples) == 2


def test_class_folders_are_not_splits(tmp_path):
    for file in ("train/cat/0.png", "train/dog/1.png"):
        picture(tmp_path / "data" / file)
    write(tmp_path / "captions.csv", "file_name,text\ndata/train/cat/0.png,a\ndata/train/dog/1.png,b\n")
    assert len(read_dataset(tmp_path)["train"].examples) == 2


def test_captions_json_next_to_images(tmp_path):
    picture(tmp_path / "images" / "a.png")
    write(tmp_path / "captions.json", json.dumps({"a.png": "a report"}))
    assert seen(read_dataset(tmp_path), tmp_path) == {"train": [("a", "images/a.png", "a report")]}


def test_columns_are_chosen_by_name(tmp_path):
    picture(tmp_path / "images" / "a.png")
    write(tmp_path / "train.csv", "uid,findings,impression,hint\na,long,short,look\n")
    (example,) = read_dataset(tmp_path, columns=Columns("uid", "impression", "hint"))["train"].examples
    assert (example.id, example.caption, example.prompt) == ("a", "short", "look")
    with pytest.raises(DataError, match=r"--caption-column nowhere: .*train\.csv has no such column, only uid"):
        read_dataset(tmp_path, columns=Columns("uid", "nowhere"))
