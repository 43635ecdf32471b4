"""Data sets in the layouts in which they are published: files, names and columns."""

from __future__ import annotations

import json

import pytest

from tests.helpers.datasets import picture, seen, write, write_parquet
from train.data.dataset import read_dataset

CUIS = ("C0040405", "C0817096")


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


def test_imageclef_2023_with_both_tasks(tmp_path):
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


def test_r2gens_file_gives_each_image_its_report(tmp_path):
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
def test_kaggles_roco_maps_ids_to_image_names(named, tmp_path):
    radiology = tmp_path / "train" / "radiology"
    picture(radiology / "images" / named)
    write(radiology / "captions.txt", "ROCO_00002\t axial ct\n")
    write(radiology / "traindata.csv", "id,name,caption\nROCO_00002,PMC1_g002.jpg, axial ct\n")
    split = read_dataset(tmp_path)["train"]
    assert [(e.id, e.image.name) for e in split.examples] == [("ROCO_00002", named)]
    assert not split.problems.missing


def test_img2dataset_shards_with_text_files(tmp_path):
    for shard, key in (("00000", "000000000"), ("00000", "000000001"), ("00001", "000010000")):
        picture(tmp_path / shard / f"{key}.jpg")
        write(tmp_path / shard / f"{key}.txt", f"caption of {key}\n")
        write(tmp_path / shard / f"{key}.json", "{}")
    write(tmp_path / "00000" / "000000002.json", '{"status": "failed_to_download"}')
    write(tmp_path / "00000_stats.json", "{}")
    write_parquet(tmp_path / "00000.parquet", {"key": ["000000000"], "caption": ["of a link"]})
    assert seen(read_dataset(tmp_path), tmp_path) == {
        "train": [
            ("000000000", "00000/000000000.jpg", "caption of 000000000"),
            ("000000001", "00000/000000001.jpg", "caption of 000000001"),
            ("000010000", "00001/000010000.jpg", "caption of 000010000"),
        ]
    }


@pytest.mark.parametrize("suffix", [".txt", ".caption"])
def test_kohyas_folders_may_repeat_names(suffix, tmp_path):
    for folder in ("img/10_thing", "img/5_other"):
        picture(tmp_path / folder / "a.v2.png")
        write(tmp_path / folder / f"a.v2{suffix}", f"one of {folder}\n")
    (split,) = read_dataset(tmp_path).values()
    assert [(e.image.relative_to(tmp_path).as_posix(), e.caption) for e in split.examples] == [
        ("img/10_thing/a.v2.png", "one of img/10_thing"),
        ("img/5_other/a.v2.png", "one of img/5_other"),
    ]
    assert not split.problems


@pytest.mark.parametrize("folder", ["", "Flickr8k_text"])
def test_flickr8k_splits_come_from_its_lists(folder, tmp_path):
    for name in ("a", "b", "c", "d"):
        picture(tmp_path / "Flicker8k_Dataset" / f"{name}.jpg")
    lines = [f"{name}.jpg#{i}\t{name} {i} .\n" for name in ("a", "b", "c", "d") for i in range(2)]
    write(tmp_path / folder / "Flickr8k.token.txt", "".join(lines) + "2258277193_586949ec62.jpg.1#0\tlost .\n")
    for split, name in (("train", "a.jpg\nd.jpg"), ("dev", "b.jpg"), ("test", "c.jpg")):
        write(tmp_path / folder / f"Flickr_8k.{split}Images.txt", f"{name}\n")
    splits = read_dataset(tmp_path)
    assert {name: [e.caption for e in split.examples] for name, split in splits.items()} == {
        "train": ["a 0 .", "a 1 .", "d 0 .", "d 1 ."],
        "valid": ["b 0 .", "b 1 ."],
        "test": ["c 0 .", "c 1 ."],
    }
    assert not any(split.problems for split in splits.values())


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("captions.txt", "image,caption\na.jpg,A dog .\na.jpg,The dog .\n"),
        ("results.csv", "image_name| comment_number| comment\na.jpg| 0| A dog .\na.jpg| 1| The dog .\n"),
        ("results_20130124.token", "a.jpg#0\tA dog .\na.jpg#1\tThe dog .\n"),
        (
            "flickr_annotations_30k.csv",
            'raw,sentids,split,filename,img_id\n"[""A dog ."", ""The dog .""]","[0, 1]",train,a.jpg,0\n',
        ),
    ],
)
def test_flickrs_tables(name, content, tmp_path):
    picture(tmp_path / "flickr30k-images" / "a.jpg")
    write(tmp_path / name, content)
    assert seen(read_dataset(tmp_path), tmp_path) == {
        "train": [("a", "flickr30k-images/a.jpg", "A dog ."), ("a", "flickr30k-images/a.jpg", "The dog .")]
    }
