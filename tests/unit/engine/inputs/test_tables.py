"""Captions and ids in all supported layouts of challenges and data sets."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from engine.errors import DataError, UsageError
from engine.inputs.columns import Columns
from engine.inputs.ids import Ids
from engine.inputs.readers import read_ids
from engine.inputs.tables import MAX_SIDECAR_BYTES, read_table

EXPECTED = {"a1": ("CT, axial view",), "b 2": ("NA",), "003": ("null",)}

LAYOUTS = {
    "comma.csv": 'ID,Caption\na1,"CT, axial view"\nb 2,NA\n003,null\n',
    "quoted.csv": '"ID","Caption"\r\n"a1","CT, axial view"\r\n"b 2","NA"\r\n"003","null"\r\n',
    "mark.csv": '\ufeffID,Caption\na1,"CT, axial view"\nb 2,NA\n003,null',
    "no_header.csv": 'a1,"CT, axial view"\nb 2,NA\n003,null\n',
    "bar_2022.csv": "a1|CT, axial view\nb 2|NA\n003|null\n",
    "tab_2023.csv": "ID\tCaption\na1\tCT, axial view\nb 2\tNA\n003\tnull\n",
    "roco_captions.txt": "a1\t CT, axial view\nb 2\t NA\n003\t null\n",
    "folder.csv": 'file_name,caption\nx/a1.jpg,"CT, axial view"\nb 2.png,NA\n003.jpg,null\n',
    "semicolon.csv": "ID;Caption\na1;CT, axial view\nb 2;NA\n003;null\n",
    "pandas.csv": ',ID,Caption\n0,a1,"CT, axial view"\n1,b 2,NA\n2,003,null\n',
    "windows.csv": 'file_name,caption\nx\\a1.jpg,"CT, axial view"\nx\\b 2.jfif,NA\nx\\003.AVIF,null\n',
    "names.tsv": "a1.jpg\tCT, axial view\nb 2.png\tNA\n003.jpg\tnull\n",
    "flickr30k.csv": "image_name| comment_number| comment\na1.jpg| 0| CT, axial view\nb 2.jpg| 0| NA\n003.jpg| 0| null",
    "flickr8k.token.txt": "a1.jpg#0\tCT, axial view\nb 2.jpg#0\tNA\n003.jpg#1\tnull\n",
    "blip.json": json.dumps(
        [
            {"image_id": f"coco_{i}", "image": f"val2014/{k}.jpg", "caption": v}
            for i, (k, (v,)) in enumerate(EXPECTED.items())
        ]
    ),
    "lines.jsonl": "\n".join(json.dumps({"id": k, "caption": v}) for k, (v,) in EXPECTED.items()),
    "n_best.jsonl": "\n".join(
        json.dumps({"id": k, "hypotheses": [{"text": v}, {"text": "other"}]}) for k, (v,) in EXPECTED.items()
    ),
    "coco.json": json.dumps(
        {
            "images": [{"id": i, "file_name": f"{name}.jpg"} for i, name in enumerate(EXPECTED)],
            "annotations": [{"image_id": i, "caption": v} for i, (v,) in enumerate(EXPECTED.values())],
        }
    ),
    "coco_results.json": json.dumps([{"image_id": k, "caption": v} for k, (v,) in EXPECTED.items()]),
    "object.json": json.dumps({k: v for k, (v,) in EXPECTED.items()}),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_all_layouts_give_the_same_captions(name, tmp_path):
    (tmp_path / name).write_bytes(LAYOUTS[name].encode())
    table = read_table(tmp_path / name)
    assert table.captions == EXPECTED
    assert list(table.captions) == list(EXPECTED)
    assert table.single() == {k: v for k, (v,) in EXPECTED.items()}


def test_parquet(tmp_path):
    columns = {
        "image_id": list(EXPECTED),
        "caption": [v for (v,) in EXPECTED.values()],
        "image": [{"bytes": b"x"}] * 3,
        "cui": ["C1", "C2", ""],
    }
    parquet.write_table(pa.table(columns), tmp_path / "x.parquet")
    table = read_table(tmp_path / "x.parquet")
    assert table.captions == EXPECTED
    assert table.columns["cui"]["a1"] == "C1"


def test_parquet_of_images_uses_their_file_names(tmp_path):
    rows = {
        "image": [{"bytes": b"x", "path": f"train/{name}.jpg"} for name in EXPECTED],
        "caption": [v for (v,) in EXPECTED.values()],
        "cui": [["C1", "C2"], [], ["C3"]],
    }
    parquet.write_table(pa.table(rows), tmp_path / "x.parquet")
    table = read_table(tmp_path / "x.parquet")
    assert table.captions == EXPECTED
    assert table.columns["cui"]["a1"] == "C1;C2"
    parquet.write_table(pa.table({"image": ["a1.jpg"], "caption": ["x"], "n": [1]}), tmp_path / "y.parquet")
    assert read_table(tmp_path / "y.parquet").captions == {"a1": ("x",)}


def test_coco_images_have_a_number_and_a_file_name(tmp_path):
    (tmp_path / "coco.json").write_text(LAYOUTS["coco.json"])
    assert read_table(tmp_path / "coco.json").aliases == {"0": "a1", "1": "b 2", "2": "003"}


@pytest.mark.parametrize(
    ("content", "ids"),
    [
        ("image_id,caption\n007,x\n", ["007"]),
        ("file_name,caption\na/007.jpg,x\n", ["007"]),
        ('"ID"\n"007"\n', ["007"]),
        ('ID\tCaption\n007\t"CT" of chest\n', ["007"]),
    ],
)
def test_manifests_with_other_headers(content, ids, tmp_path):
    (tmp_path / "ids").write_text(content)
    assert read_ids(tmp_path / "ids") == ids


def test_caption_with_an_extra_tab_is_reported(tmp_path):
    (tmp_path / "captions.txt").write_text("a\t one, two\nb\t three\t, four\n")
    with pytest.raises(DataError, match="line 2: 3 columns"):
        read_table(tmp_path / "captions.txt")


def test_folders_with_text_files_or_metadata(tmp_path):
    for name, (caption,) in EXPECTED.items():
        (tmp_path / f"{name}.txt").write_text(caption + "\n")
        (tmp_path / f"{name}.jpg").touch()
    (tmp_path / "readme.txt").write_text("no picture of this name")
    assert dict(read_table(tmp_path).captions) == dict(sorted(EXPECTED.items()))
    (tmp_path / "metadata.csv").write_text(LAYOUTS["folder.csv"])
    assert read_table(tmp_path).captions == EXPECTED


def test_several_references_and_further_columns(tmp_path):
    (tmp_path / "x.csv").write_text("ID,Caption,Modality\na,one,CT\nb,two,MR\na,three,CT\n")
    table = read_table(tmp_path / "x.csv")
    assert table.captions == {"a": ("one", "three"), "b": ("two",)}
    assert table.columns == {"Modality": {"a": "CT", "b": "MR"}}
    with pytest.raises(DataError, match="more than one caption for a"):
        table.single()
    (tmp_path / "y.jsonl").write_text('{"id": "a", "captions": ["one", "three"]}\n')
    assert read_table(tmp_path / "y.jsonl").captions == {"a": ("one", "three")}


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("x.csv", b"", "is not a table of captions"),
        ("x.csv", b"ID,Caption\n", "holds no captions"),
        ("x.csv", b"ID,Caption\na,b,c\n", "line 2: 3 columns, but the header has 2"),
        ("x.csv", b'ID,Caption\na,b\nc,"open\n', "line 3"),
        ("x.csv", b"ID,Caption\n,b\n", "line 2: an empty id"),
        ("x.csv", b"ID,Caption\na,\xff\n", "byte 13 is not UTF-8"),
        ("x.csv", b"a;b\nc;d\n", "is not a table of captions"),
        ("x.csv", b"a|b|c\nd|e|f\n", "line 1: 3 columns instead of an id and a caption"),
        ("x.json", b"{", "not valid JSON"),
        ("x.json", b"3", "neither COCO captions"),
        ("x.jsonl", b'{"id": "a"}', "line 1: no caption for a"),
        ("x.jsonl", b'{"caption": "a"}', "line 1: no id"),
        ("x.jsonl", b"[1]", "line 1: not an object"),
        ("x.json", b"[" * 200_000, "not valid JSON"),
        (
            "x.json",
            b'{"images": [{"id": 1}], "annotations": [{"image_id": 1, "caption": "a"}]}',
            "not in a known layout",
        ),
        ("x.json", b'{"annotations": [3]}', "not in a known layout"),
        ("x.jsonl", b'{"id": "a", "hypotheses": ["x"]}', "not in a known layout"),
        ("x.jsonl", b'{"id": "a", "caption": "x\\ud800"}', "half a character"),
        ("x.parquet", b"PAR1", "cannot be read as parquet"),
    ],
)
def test_invalid_tables_give_one_line_with_the_location(name, content, sentence, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=sentence):
        read_table(tmp_path / name)


def test_ids_are_never_parsed_sorted_or_padded(tmp_path):
    (tmp_path / "ids").write_text("ID\n007\n1e5\nNA\n b\n")
    assert read_ids(tmp_path / "ids") == ["007", "1e5", "NA", " b"]


def test_missing_file_is_reported(tmp_path):
    with pytest.raises(UsageError, match=r"nowhere\.csv cannot be read: No such file"):
        read_table(Path(tmp_path / "nowhere.csv"))


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig"])
def test_utf_16_with_a_byte_order_mark_is_read(encoding, tmp_path):
    (tmp_path / "x.csv").write_bytes("ID,Caption\na,Schädel\n".encode(encoding))
    assert read_table(tmp_path / "x.csv").captions == {"a": ("Schädel",)}


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("ID;Caption\na;Schädel\n".encode("cp1252"), "byte 16 is not UTF-8 .*CSV UTF-8"),
        ("ID,Caption\na,x\n".encode("utf-16-le"), "UTF-16 without a byte order mark"),
    ],
)
def test_other_encodings_are_reported(content, sentence, tmp_path):
    (tmp_path / "x.csv").write_bytes(content)
    with pytest.raises(DataError, match=sentence):
        read_table(tmp_path / "x.csv")


def test_several_captions_of_a_file_belong_to_one_image(tmp_path):
    (tmp_path / "t.txt").write_text("a.jpg#0\tone\na.jpg#1\ttwo\n")
    assert read_table(tmp_path / "t.txt").captions == {"a": ("one", "two")}


def test_equal_names_in_two_folders_keep_their_folders(tmp_path):
    (tmp_path / "x.csv").write_text("file_name,caption\ncat/1.png,a cat\ndog\\1.png,a dog\n")
    assert read_table(tmp_path / "x.csv").captions == {"cat/1": ("a cat",), "dog/1": ("a dog",)}


@pytest.mark.parametrize(
    "content", ["a.png\nb.v2.jpg\n", ",ID,Caption\n0,a,\n1,b.v2,\n", "file_name;x\np/a.png;1\np/b.v2.jpg;2\n"]
)
def test_manifests_with_suffixes_indices_and_paths(content, tmp_path):
    (tmp_path / "ids").write_text(content)
    names = read_ids(tmp_path / "ids")
    assert [Ids(["a", "b.v2"]).find(name) for name in names] == ["a", "b.v2"]


HEADERS = (
    "uid,caption",
    "ID,CUIs",
    "report,dicom_id",
    "ID,Predicted Caption",
    "findings,impression,study_id",
    "key,gist",
)


@pytest.mark.parametrize("header", HEADERS)
def test_unknown_header_is_an_error_and_not_a_row(header, tmp_path):
    rest = ",x" * (header.count(",") - 1)
    (tmp_path / "x.csv").write_text(f"{header}\nr1,an axial view{rest}\nr2,a lesion{rest}\n")
    with pytest.raises(DataError, match=rf"only {header.replace(',', ', ')}: give --(id|caption)-column"):
        read_table(tmp_path / "x.csv")


@pytest.mark.parametrize("content", ["slice,caption\nr1,a mass\n", "uid,gist\na.png,a mass\n"])
def test_unknown_header_of_a_table_with_one_row(content, tmp_path):
    (tmp_path / "x.csv").write_text(content)
    with pytest.raises(DataError, match=r"give --id-column"):
        read_table(tmp_path / "x.csv")
    (tmp_path / "x.csv").write_text("r2,text\nr1,a mass\n")
    assert read_table(tmp_path / "x.csv").captions == {"r2": ("text",), "r1": ("a mass",)}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.csv", "uid,report,my prompt\na.png,CT,look\nb.png,MR,\n"),
        ("x.tsv", "my prompt\tReport\tUID\nlook\tCT\ta\n\tMR\tb\n"),
        (
            "x.jsonl",
            '{"uid": "a", "report": "CT", "my prompt": "look"}\n{"uid": "b", "report": "MR", "my prompt": ""}\n',
        ),
    ],
)
def test_columns_are_chosen_by_name(name, content, tmp_path):
    (tmp_path / name).write_text(content)
    columns = Columns("uid", "report", "my prompt")
    table = read_table(tmp_path / name, columns)
    columns.require_found()
    assert table.captions == {"a": ("CT",), "b": ("MR",)}
    assert table.columns["prompt"] == {"a": "look", "b": ""}


def test_chosen_column_that_no_table_has_is_reported(tmp_path):
    (tmp_path / "run.csv").write_text("ID,Caption\na,CT\n")
    columns = Columns(caption="impresion")
    assert read_table(tmp_path / "run.csv", columns).captions == {"a": ("CT",)}
    with pytest.raises(UsageError, match=r"--caption-column impresion: no table has this column: .*run.csv has ID, "):
        columns.require_found()


@pytest.mark.parametrize("header", ["image_path,caption", "Image Index,Caption", "imageID,Captions", "img_path,text"])
def test_known_columns_are_read_in_any_spelling(header, tmp_path):
    (tmp_path / "x.csv").write_text(f"{header}\nx/a.png,CT\n")
    assert read_table(tmp_path / "x.csv").captions == {"a": ("CT",)}


@pytest.mark.parametrize(
    "content",
    [
        'ID, Caption\na, "CT, axial"\nb, "MR"\n',
        'a, "CT, axial"\nb, "MR"\n',
        'sep=,\r\nID,Caption\r\na,"CT, axial"\r\nb,MR\r\n',
        "sep=|\nID|Caption\na|CT, axial\nb|MR\n",
        '\n\nID,Caption\na,"CT, axial"\nb,MR\n   \n,\n',
        '# made by hand\nID,Caption\na,"CT, axial"\nb,MR\n',
        "a.png,CT, axial\nb.png,MR\n",
    ],
)
def test_tables_written_by_hand_are_read(content, tmp_path):
    (tmp_path / "x.csv").write_bytes(content.encode())
    assert read_table(tmp_path / "x.csv").captions == {"a": ("CT, axial",), "b": ("MR",)}


def test_quotes_escaped_by_backslashes_are_read(tmp_path):
    (tmp_path / "x.csv").write_text('ID,Caption\na,"the \\"left\\" lung, upper"\n')
    assert read_table(tmp_path / "x.csv").captions == {"a": ('the "left" lung, upper',)}
    (tmp_path / "y.csv").write_text('ID,Caption\na,"one\nb,"two, \\" three\n')
    with pytest.raises(DataError, match=r"y\.csv, line \d"):
        read_table(tmp_path / "y.csv")


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("x.csv.gz", b"\x1f\x8b\x08", "a gzip archive: unpack it"),
        ("submission.zip", b"PK\x03\x04submission.csv", "a zip archive: unpack it"),
        ("x.xlsx", b"PK\x03\x04[Content_Types].xml", "an Excel workbook: save it as `CSV UTF-8`"),
        ("x.csv", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    ],
)
def test_packed_tables_are_reported(name, content, sentence, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"{name} is not text but .*{sentence}"):
        read_table(tmp_path / name)


def test_dictionaries_of_pycocoevalcap(tmp_path):
    content = {"a": [{"caption": "CT"}, {"caption": "MR", "id": 3}], "b": {"caption": "US"}, "c": ["x", "y"]}
    (tmp_path / "x.json").write_text(json.dumps(content))
    assert read_table(tmp_path / "x.json").captions == {"a": ("CT", "MR"), "b": ("US",), "c": ("x", "y")}


def test_conversations_with_one_answer_are_captions(tmp_path):
    turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "a CT"}]
    (tmp_path / "x.json").write_text(json.dumps([{"id": "1", "image": "x/a.png", "conversations": turns}]))
    assert read_table(tmp_path / "x.json").captions == {"a": ("a CT",)}
    (tmp_path / "x.json").write_text(json.dumps([{"id": "1", "image": "x/a.png", "conversations": turns * 2}]))
    with pytest.raises(DataError, match=r"no caption for x/a\.png among"):
        read_table(tmp_path / "x.json")


def test_file_without_caption_is_named_as_written(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"file_name": "a.png", "text": null}\n')
    with pytest.raises(DataError, match=r"no caption for a\.png$"):
        read_table(tmp_path / "x.jsonl")


def test_ids_but_not_captions_may_be_invalid_utf8(tmp_path):
    (tmp_path / "x.csv").write_bytes(b"ID,Caption\ncaf\xe9,CT\n")
    assert read_table(tmp_path / "x.csv").captions == {os.fsdecode(b"caf\xe9"): ("CT",)}
    (tmp_path / "x.csv").write_bytes(b"ID,Modality,Caption\na,\xe9,CT\n")
    with pytest.raises(DataError, match=r"byte 22 is not UTF-8 \(if it comes from Excel"):
        read_table(tmp_path / "x.csv")


def test_sidecar_links_pipes_and_large_files_are_refused(tmp_path):
    folder, text = tmp_path / "in", tmp_path / "in" / "a.txt"
    folder.mkdir()
    (folder / "a.png").touch()
    (folder / "b.txt").write_text("inside")
    (tmp_path / "secret").write_text("secret")
    text.symlink_to("b.txt")
    assert read_table(folder).captions == {"a": ("inside",)}
    for make, sentence in (
        (lambda: text.symlink_to("../secret"), "a link to a file outside"),
        (lambda: os.mkfifo(text), "a pipe or a device"),
        (lambda: text.write_bytes(b"x" * (MAX_SIDECAR_BYTES + 1)), "larger than"),
    ):
        text.unlink()
        make()
        with pytest.raises(DataError, match=sentence):
            read_table(folder)


@pytest.mark.parametrize(
    ("content", "expected"),
    [("uid\n1\n2\n", None), ("uid,findings\n1,x\n", None), ("image_path\nx/1.png\nx/2.png\n", ["1", "2"])],
)
def test_manifests_with_unknown_headers_are_refused(content, expected, tmp_path):
    (tmp_path / "ids").write_text(content)
    if expected is None:
        with pytest.raises(DataError, match="give --id-column"):
            read_ids(tmp_path / "ids")
        assert read_ids(tmp_path / "ids", Columns("uid"))[0] == "1"
    else:
        assert [Ids(["1", "2"]).find(name) for name in read_ids(tmp_path / "ids")] == expected


def test_incomplete_manifest_is_refused(tmp_path):
    (tmp_path / "ids.csv").write_text("split,ID\ntest,a\ntest")
    with pytest.raises(DataError, match=r"ids\.csv, line 3: no column 'ID': the row or the file is incomplete"):
        read_ids(tmp_path / "ids.csv")


def test_files_that_differ_only_in_suffix_keep_it(tmp_path):
    (tmp_path / "run.csv").write_text('ID,Caption\nIMG_1.jpg,"one"\n./IMG_1.png,"other"\n')
    assert read_table(tmp_path / "run.csv").captions == {"IMG_1.jpg": ("one",), "IMG_1.png": ("other",)}
    (tmp_path / "run.csv").write_text('ID,Caption\ns/IMG_1.jpg,"one"\nt/IMG_1.png,"other"\n')
    assert list(read_table(tmp_path / "run.csv").captions) == ["s/IMG_1", "t/IMG_1"]
    (tmp_path / "run.csv").write_text('ID,Caption\ns/IMG_1.jpg#0,"one"\ns/IMG_1.jpg#1,"other"\n')
    assert read_table(tmp_path / "run.csv").captions == {"IMG_1": ("one", "other")}
