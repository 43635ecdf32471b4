"""Submission files: what the organisers' checker accepts and what it rejects."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
from click.testing import CliRunner

from engine.cli.app import main
from engine.errors import DataError, EngineError, UsageError
from engine.submission import (
    FORMATS,
    MEMBER,
    MOST_PROBLEMS,
    Verdict,
    check_submission,
    manifest_ids,
    write_submission,
)

IDS = ["ID2", "ID1", "ID03"]
GOOD = "ID,Caption\nID2,a\nID1,b\nID03,c\n"


def put(path: Path, text: str | bytes, form: str) -> Path:
    content = text if isinstance(text, bytes) else text.encode()
    if FORMATS[form].is_zip:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(MEMBER, content)
    else:
        path.write_bytes(content)
    return path


ACCEPTED = {
    "plain": GOOD,
    "line ends of Windows": GOOD.replace("\n", "\r\n"),
    "no newline at the end": GOOD[:-1],
    "quoted header": GOOD.replace("ID,Caption", '"ID","Caption"'),
    "quoted ids": GOOD.replace("ID1,", '"ID1",'),
    "quoted captions": 'ID,Caption\nID2,"a"\nID1,"b"\nID03,"c"\n',
    "doubled quotes": GOOD.replace("b", '"CT, ""axial"" view"'),
    "quotes in the middle": GOOD.replace("b", 'CT "axial" view'),
    "empty caption": GOOD.replace("b", ""),
    "empty quoted caption": GOOD.replace("b", '""'),
    "long caption": GOOD.replace("b", "word " * 500 + "end"),
    "no-break space inside, accents": GOOD.replace("b", "é\u00a0ü"),
    "TAB in a caption": GOOD.replace("b", '"b\td"'),
    "line break in a caption without a comma": GOOD.replace("b", '"b\nd"'),
    "space at the end": GOOD.replace("b", "b "),
    "space before the closing quote": GOOD.replace("b", '"b "'),
    "form feed, then a caption with a comma": GOOD.replace("b", '"b\fd"').replace(",c", ',"c, d"'),
    "line separator, then a caption with a comma": GOOD.replace("b", "b\u2028d").replace(",c", ',"c, d"'),
}
UNWISE = (
    "form feed, then a caption with a comma",
    "line separator, then a caption with a comma",
    "TAB in a caption",
    "line break in a caption without a comma",
    "space at the end",
)
REFUSED = {
    "byte order mark": ("\ufeff" + GOOD, "byte order mark"),
    "other header": (GOOD.replace("Caption", "caption"), "the header is"),
    "no header": (GOOD.partition("\n")[2], "the header is"),
    "blank line inside": (GOOD.replace("ID1", "\nID1"), "line 3 is blank"),
    "blank line at the end": (GOOD + "\n", "line 5 is blank"),
    "line of spaces": (GOOD + "  \n", "line 5 is blank"),
    "other order": ("ID,Caption\nID1,b\nID2,a\nID03,c\n", "row 1 is ID1 instead of ID2"),
    "missing id": (GOOD.replace("ID03,c\n", ""), "1 id is missing: ID03"),
    "id twice": (GOOD + "ID1,b\n", "1 id occurs twice: ID1"),
    "extra id": (GOOD + "ID9,b\n", "1 id is not in the manifest: ID9"),
    "padded id": (GOOD.replace("ID03", "ID3"), "1 id is not in the manifest: ID3"),
    "third column": (GOOD.replace("ID1,b", "ID1,b,c"), "line 3: 3 columns"),
    "comma without quotes": (GOOD.replace("b", "b, d"), "line 3: 3 columns"),
    "one column": (GOOD.replace("ID1,b", "ID1"), "line 3: 1 column"),
    "file names": (GOOD.replace("ID1,", "ID1.jpg,"), "1 id is not in the manifest: ID1.jpg"),
    "not UTF-8": (GOOD.encode().replace(b"b", b"\xe9"), "byte 21 is not UTF-8"),
    "newline and comma in a caption": (GOOD.replace("b", '"b,\nd"'), "line 3: a caption with a comma must be quoted"),
    "space after the closing quote": (GOOD.replace("b", '"b, d" '), "line 3: a caption with a comma must be quoted"),
    "quote that never closes": (GOOD.replace("b", '"b'), "1 id is missing"),
    "space in the id": (GOOD.replace("ID1", " ID1"), "line 3: white space"),
    "TABs": (GOOD.replace(",", "\t"), "the header is"),
    "nothing": ("", "the file is empty"),
    "form feed at the end of a line": (GOOD.replace("b", "b\f"), "line 3 is blank before or after a line separator"),
    "comma without quotes, after a form feed": (GOOD.replace("b", "b\fd").replace(",c", ",c, d"), "line 4: 3 columns"),
}


@pytest.mark.parametrize("form", ["imageclef2023", "imageclef2024", "imageclef2025", "imageclef2026"])
@pytest.mark.parametrize("case", ACCEPTED)
def test_check_accepts(case, form, tmp_path):
    assert check_submission(put(tmp_path / "x", ACCEPTED[case], form), IDS, form).errors == []


@pytest.mark.parametrize("form", ["imageclef2024", "imageclef2026"])
@pytest.mark.parametrize("case", REFUSED)
def test_check_rejects(case, form, tmp_path):
    text, sentence = REFUSED[case]
    problems = check_submission(put(tmp_path / "x", text, form), IDS, form).errors
    assert any(sentence in problem for problem in problems), problems


@pytest.mark.parametrize("case", UNWISE)
def test_unwise_content_is_a_warning(case, tmp_path):
    verdict = check_submission(put(tmp_path / "x", ACCEPTED[case], "imageclef2026"), IDS, "imageclef2026")
    assert len(verdict.warnings) == 1
    assert verdict.warnings[0].startswith("line 3: ")


CAPTIONS = {
    "ID1": 'CT, "axial" view',
    "ID2": " two\r\nlines\t\x00and \u2028 more ",
    "ID03": "",
}


@pytest.mark.parametrize("form", FORMATS)
def test_written_files_pass_in_manifest_order(form, tmp_path):
    out = tmp_path / ("x.zip" if FORMATS[form].is_zip else "x.csv")
    assert write_submission(CAPTIONS, IDS, form, out) == ["1 caption is empty"]
    assert check_submission(out, IDS, form) == Verdict([], [], empty=1)
    if FORMATS[form].is_zip:
        with zipfile.ZipFile(out) as archive:
            assert archive.namelist() == ["submission.csv"]
            content = archive.read("submission.csv")
    else:
        content = out.read_bytes()
    if form == "imageclef2022":
        assert content == b'ID2|two lines and   more\nID1|CT, "axial" view\nID03|\n'
    else:
        assert content == b'ID,Caption\nID2,"two lines and   more"\nID1,"CT, ""axial"" view"\nID03,""\n'


def test_archives_of_the_same_captions_are_the_same_bytes(tmp_path, monkeypatch):
    contents = []
    for now in (1e9, 1.5e9):
        monkeypatch.setattr("time.time", lambda now=now: now)
        write_submission(CAPTIONS, IDS, "imageclef2026", tmp_path / "x.zip")
        contents.append((tmp_path / "x.zip").read_bytes())
    assert contents[0] == contents[1]


def test_archive_for_a_year_of_plain_files_is_named(tmp_path):
    path = put(tmp_path / "x", ACCEPTED[next(iter(ACCEPTED))], "imageclef2026")
    (error,) = check_submission(path, IDS, "imageclef2024").errors
    assert "it is an archive, but this year's format is a plain file" in error


def test_a_bar_in_a_caption_of_2022_becomes_a_space(tmp_path):
    write_submission({"a": "x|y"}, ["a"], "imageclef2022", tmp_path / "x.csv")
    assert (tmp_path / "x.csv").read_text() == "a|x y\n"


@pytest.mark.parametrize("line", ["ab\n", "ID1,c\n", 'ID1,"c\n', "ID1,"])
def test_archive_with_many_lines_needs_little_memory(line, tmp_path):
    import tracemalloc

    content = "ID,Caption\n" + line * (40_000_000 // len(line))
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(MEMBER, content)
    del content
    tracemalloc.start()
    verdict = check_submission(tmp_path / "x.zip", IDS, "imageclef2026")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert 1 <= len(verdict.errors) <= MOST_PROBLEMS
    assert not verdict.is_whole
    assert peak < 20_000_000


def test_check_stops_after_many_errors(tmp_path):
    ids = [f"ID{i}" for i in range(1000)]
    (tmp_path / "ids.txt").write_text("\n".join(ids))
    (tmp_path / "x.csv").write_text("ID,Caption\n" + "".join(f"{name}\n" for name in ids))
    verdict = check_submission(tmp_path / "x.csv", ids, "imageclef2024")
    assert len(verdict.errors) == MOST_PROBLEMS
    assert not any("missing" in error for error in verdict.errors)  # the rest was not read
    given = ["check", tmp_path / "x.csv", "--manifest", tmp_path / "ids.txt", "--format", "imageclef2024"]
    result = CliRunner().invoke(main, [str(word) for word in given])
    assert result.stderr.endswith("must be quoted (99 more, not checked to the end)\n")


def test_all_warnings_are_counted(tmp_path):
    (tmp_path / "ids.txt").write_text("\n".join(f"ID{i}" for i in range(12)))
    (tmp_path / "x.csv").write_text("ID,Caption\n" + "".join(f"ID{i},a \n" for i in range(12)))
    given = ["check", tmp_path / "x.csv", "--manifest", tmp_path / "ids.txt", "--format", "imageclef2024"]
    result = CliRunner().invoke(main, [str(word) for word in given])
    assert result.exit_code == 0
    assert "warning: 2 more warnings like these" in result.stderr


def test_byte_that_is_not_utf8_is_located(tmp_path):
    content = ('ID,Caption\nID2,"' + "\u00e9" * 70_000).encode() + b"\xff"
    (tmp_path / "x.csv").write_bytes(content)
    expected = [f"byte {len(content) - 1} is not UTF-8"]
    assert check_submission(tmp_path / "x.csv", IDS, "imageclef2024").errors == expected


def test_invalid_archives(tmp_path):
    path = tmp_path / "x.zip"
    path.write_bytes(b"no zip")
    assert "not a zip file" in check_submission(path, IDS, "imageclef2026").errors[0]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(MEMBER, GOOD * 50)
    whole = bytearray(path.read_bytes())
    whole[60:70] = bytes(10)
    path.write_bytes(bytes(whole))
    assert "cannot be read" in check_submission(path, IDS, "imageclef2026").errors[0]
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("run.csv", GOOD)
    assert "holds run.csv instead of only submission.csv" in check_submission(path, IDS, "imageclef2026").errors[0]
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("submission.csv", GOOD)
    assert "instead of only submission.csv" in check_submission(path, IDS, "imageclef2026").errors[0]


@pytest.mark.parametrize(
    ("captions", "form", "out", "sentence"),
    [
        (CAPTIONS, "imageclef2026", "x.csv", "name it submission.zip"),
        (CAPTIONS, "imageclef2024", "x.zip", "name it submission.csv"),
        ({"ID1": "a"}, "imageclef2024", "x.csv", "no caption for 2 ids of the manifest: ID2, ID03"),
        (CAPTIONS | {"new": ""}, "imageclef2024", "x.csv", "1 id that is not in the manifest: new"),
    ],
)
def test_mismatching_runs_are_refused_without_output(captions, form, out, sentence, tmp_path):
    with pytest.raises(UsageError if "name it" in sentence else DataError, match=sentence):
        write_submission(captions, IDS, form, tmp_path / out)
    assert list(tmp_path.iterdir()) == []


def test_submit_and_check_commands(tmp_path):
    (tmp_path / "run.csv").write_text('ID,Caption\nID1,"a, b"\nID2,"c"\nID03,"d"\n')
    (tmp_path / "ids.csv").write_text("ID\nID2\nID1\nID03\n")
    out = tmp_path / "submission.zip"

    def run(*arguments: object):
        return CliRunner().invoke(main, [str(argument) for argument in arguments])

    given = ("--manifest", tmp_path / "ids.csv", "--format", "imageclef2026")
    result = run("submit", "--run", tmp_path / "run.csv", *given, "--out", out)
    assert result.exit_code == 0, result.output
    assert "3 captions" in result.stderr
    assert run("check", out, *given).exit_code == 0
    (tmp_path / "ids.csv").write_text("ID\nID1\nID2\nID03\n")
    result = run("check", out, *given)
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert "the order differs from the manifest: row 1 is ID2 instead of ID1" in line


def test_manifest_out_of_numeric_order_is_noted(tmp_path):
    (tmp_path / "ids.txt").write_text("test_0.jpg\ntest_1.jpg\ntest_10.jpg\ntest_2.jpg\n")
    ids, notes = manifest_ids(tmp_path / "ids.txt")
    assert ids == ["test_0", "test_1", "test_10", "test_2"]
    assert "lists files" in notes[0]
    assert "not in numeric order: row 4 is test_2, after test_10" in notes[1]
    (tmp_path / "ids.txt").write_text("test_0\ntest_2\ntest_10\n")
    assert manifest_ids(tmp_path / "ids.txt") == (["test_0", "test_2", "test_10"], [])


def test_a_failed_submission_keeps_the_earlier_file(tmp_path):
    (tmp_path / "ids.txt").write_text("s1/a.jpg\ns2/a.jpg\n")
    with pytest.raises(DataError, match=r"lists several files of one name, so that ids repeat: a$"):
        manifest_ids(tmp_path / "ids.txt")
    out = tmp_path / "submission.zip"
    write_submission({"a": "x"}, ["a"], "imageclef2026", out)
    before = out.read_bytes()
    with pytest.raises(EngineError, match=r"submission\.zip was not written, .*1 id occurs twice: a"):
        write_submission({"a": "y"}, ["a", "a"], "imageclef2026", out)
    assert out.read_bytes() == before


def test_ids_with_folder_or_suffix_still_match(tmp_path):
    out = tmp_path / "submission.csv"
    assert write_submission({"a": "x", "folder/b": "y"}, ["a.png", "b"], "imageclef2023", out) == []
    assert out.read_text() == 'ID,Caption\na.png,"x"\nb,"y"\n'
