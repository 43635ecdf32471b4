"""Penalties, banned words and prompts per image from the command line, and bundles from before these existed."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from engine.captioner import Captioner
from engine.cli import main
from engine.errors import UsageError
from tests.helpers.earlier import bundle_of_084ae4d
from tests.helpers.tiny import random_pictures, save_pictures

WINNER = (
    "--beams",
    3,
    "--repetition-penalty",
    2.5,
    "--length-penalty",
    2,
    "--min-new-tokens",
    8,
    "--max-new-tokens",
    64,
)
"""Decoding options of the winner of ImageCLEF 2026."""


def caption(*arguments):
    return CliRunner().invoke(main, ["caption", *map(str, arguments)])


def rows_of(run: Path) -> list[list[str]]:
    with run.open(newline="") as file:
        return list(csv.reader(file))[1:]


@pytest.fixture
def pictures(tmp_path) -> Path:
    return save_pictures(tmp_path / "pictures", 5)


@pytest.fixture(scope="module")
def older_bundle(tmp_path_factory) -> Path:
    return bundle_of_084ae4d(tmp_path_factory.mktemp("older") / "bundle")


def test_winner_settings_from_the_command_line(tmp_path):
    out = tmp_path / "run.csv"
    result = caption("--input", "examples/images", "--out", out, "--n-best-out", tmp_path / "run.jsonl", *WINNER)
    assert result.exit_code == 0, result.output
    assert "repetition_penalty:2.5" in result.stderr
    found = [json.loads(line) for line in (tmp_path / "run.jsonl").read_text().splitlines()]
    plain = Captioner.load().caption(sorted(Path("examples/images").iterdir())[:2], num_beams=3, length_penalty=2.0)
    assert all(mine["hypotheses"][0]["score"] < one.score for mine, one in zip(found, plain, strict=False))
    assert len(rows_of(out)) == len(found) > 2


def signature_of(log: str) -> str:
    return re.search(r"bad_words:2:\w+", log).group()


def test_banned_words_from_a_file(pictures, tiny_bundle, tiny_captioner, tmp_path):
    words = tmp_path / "words.txt"
    words.write_text("the\n\nwhite arrow\n")
    arguments = ("--bundle", tiny_bundle, "--input", pictures, "--beams", 2, "--out", tmp_path / "run.csv")
    result = caption(*arguments, "--bad-words", words)
    assert result.exit_code == 0, result.output
    assert "bad_words:2:" in result.stderr
    expected = tiny_captioner.caption(sorted(pictures.iterdir()), num_beams=2, bad_words=["the", "white arrow"])
    found = [text for _, text in rows_of(tmp_path / "run.csv")]
    assert found == [one.text for one in expected]
    assert not any("the" in text.split() for text in found)
    words.write_text("the\n\nchest\n")
    other = caption(*arguments, "--bad-words", words)
    assert "bad_words:2:" in other.stderr
    assert signature_of(other.stderr) != signature_of(result.stderr), "a journal of one list must not serve the other"


@pytest.mark.parametrize(
    ("option", "value", "sentence"),
    [
        ("--repetition-penalty", 0, "repetition_penalty must be a number of at least 0.01"),
        ("--repetition-penalty", "nan", "repetition_penalty must be a number"),
        ("--suppress-tokens", "7;8", "'7;8' is not a list of whole numbers"),
        ("--suppress-tokens", 99999, "banned token id 99999 is not in the vocabulary: ids must be below 66"),
        ("--bad-words", "nowhere.txt", "nowhere.txt cannot be read"),
        ("--bad-words", "zebra\n", "the vocabulary cannot spell the banned word 'zebra'"),
        ("--bad-words", "[SEP]\n", "spells a special token"),
    ],
)
def test_invalid_options_are_one_line_errors(option, value, sentence, pictures, tiny_bundle, tmp_path):
    if str(value).endswith("\n"):
        (tmp_path / "words.txt").write_text(value)
        value = tmp_path / "words.txt"
    out = tmp_path / "run.csv"
    result = caption("--bundle", tiny_bundle, "--input", pictures, "--out", out, option, value)
    assert result.exit_code == 2
    assert sentence in result.stderr.splitlines()[-1]
    assert not out.exists()


def test_old_bundle_supports_bans_but_no_penalty(older_bundle):
    older, newer = Captioner.load(older_bundle), Captioner.load()
    assert (older.bundle.format, newer.bundle.format) == (1, 2)
    files = sorted(Path("examples/images").iterdir())[:3]
    for given in ({"num_beams": 4}, {"num_beams": 1}, {"num_beams": 3, "bad_words": ["brain", "the left"]}):
        found, expected = (
            [(one.ids, one.score) for one in captioner.caption(files, **given)] for captioner in (older, newer)
        )
        assert found == expected
    with pytest.raises(
        UsageError, match="exported before its decoder supported a repetition penalty: export its checkpoint"
    ):
        older.caption(files, repetition_penalty=1.2)


def test_prompts_per_image_are_checked_at_once(tiny_captioner):
    pictures = random_pictures(2)
    with pytest.raises(UsageError, match="spells a special token"):
        tiny_captioner.caption(pictures, prompts={"0": "a", "1": "[SEP]"})
    with pytest.raises(UsageError, match="exclude each other"):
        tiny_captioner.caption(pictures, prompts={"0": "a", "1": "the"}, prompt="mri")
    with pytest.raises(UsageError, match="image 1 has no prompt"):
        list(tiny_captioner.caption(pictures, prompts={"0": "a"}))


@pytest.fixture
def prompts(tmp_path) -> Path:
    table = tmp_path / "prompts.csv"
    table.write_text("ID,prompt\n0,mri of the brain\n1,\n2.png,a\n3,ct of the\n4,a\n")
    return table


def test_table_of_prompts_from_the_command_line(pictures, prompts, tiny_bundle, tmp_path):
    """One and two processes write the same bytes. Only the images whose prompt changed are captioned again."""
    given = ("--bundle", tiny_bundle, "--input", pictures, "--beams", 2, "--max-new-tokens", 9)
    run, other = tmp_path / "run.csv", tmp_path / "other.csv"
    result = caption(*given, "--prompts", prompts, "--out", run, "--update")
    assert result.exit_code == 0, result.output
    expected = {}
    for name, prompt in (("0", "mri of the brain"), ("1", None), ("2", "a"), ("3", "ct of the"), ("4", "a")):
        alone = caption(
            *given[:3], pictures / f"{name}.png", *given[4:], "--out", other, *(("--prompt", prompt) if prompt else ())
        )
        assert alone.exit_code == 0, alone.output
        expected[name] = rows_of(other)[0][1]
    assert dict(rows_of(run)) == expected
    result = caption(*given, "--prompts", prompts, "--out", other, "--processes", 2, "--threads", 2)
    assert result.exit_code == 0, result.output
    assert other.read_bytes() == run.read_bytes()
    prompts.write_text(prompts.read_text().replace("ct of the", "mri"))
    result = caption(*given, "--prompts", prompts, "--out", run, "--update", "--json")
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout.splitlines()[-1])
    assert (summary["captions"], summary["resumed"]) == (5, 4)
    assert {name for name, text in rows_of(run) if text != expected[name]} == {"3"}


@pytest.mark.parametrize(
    ("rows", "more", "sentence"),
    [
        ("0,a\n", (), "prompts.csv has no prompt for 4 of 5 images (1, 2, 3 and 1 more): add their rows"),
        ("".join(f"{i},[SEP]\n" for i in range(5)), (), "'[SEP]' spells a special token"),
        ("".join(f"{i},a\n" for i in range(5)), ("--prompt", "mri"), "exclude each other: give one"),
        ("".join(f"{i},{'a ' * 60}\n" for i in range(5)), (), "does not fit: this bundle takes"),
    ],
)
def test_invalid_table_of_prompts_is_refused(rows, more, sentence, pictures, prompts, tiny_bundle, tmp_path):
    prompts.write_text("ID,prompt\n" + rows)
    out = tmp_path / "run.csv"
    result = caption("--bundle", tiny_bundle, "--input", pictures, "--out", out, "--prompts", prompts, *more)
    assert result.exit_code in (1, 2)
    assert sentence in result.stderr.splitlines()[-1]
    assert not out.exists()


def test_equal_images_with_different_prompts_differ(tiny_captioner):
    (picture,) = random_pictures(1)
    found = list(tiny_captioner.caption([picture] * 3, prompts={"0": "a", "1": "mri of", "2": "a"}, num_beams=2))
    assert found[0].ids == found[2].ids != found[1].ids
    assert found[1].text.startswith("mri of")
    for one, prompt in zip(found, ("a", "mri of", "a"), strict=True):
        ((alone),) = tiny_captioner.caption([picture], num_beams=2, prompt=prompt)
        assert one.ids == alone.ids
