"""Prompts of a data set: read in every layout, one per image, and counted with the caption."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from engine.errors import DataError, UsageError
from tests.helpers.datasets import picture, png, write, write_parquet
from tests.helpers.tiny import make_tokenizer
from train.data.batches import check_fit, prompt_ids
from train.data.dataset import Example, Split, read_dataset
from train.data.examples import check_split, fingerprint
from train.data.inspect import inspect_dataset, lines

HUB = {"image": [{"bytes": png(i), "path": f"{name}.png"} for i, name in enumerate("ab")], "caption": ["one", "two"]}


def prompts(root: Path) -> list[tuple[str, str, str]]:
    return [(e.id, e.prompt, e.caption) for split in read_dataset(root).values() for e in split.examples]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("train_captions.csv", 'ID,Caption,Prompt\na,one,"axial, ct of"\nb,two,\n'),
        ("captions.csv", 'file_name,split,prompt,text\na.png,train,"axial, ct of",one\nb.png,train,  ,two\n'),
        ("train.tsv", "ID\tCaption\tPROMPT\na\tone\taxial, ct of\nb\ttwo\t\n"),
        (
            "metadata.jsonl",
            '{"file_name": "a.png", "text": "one", "prompt": "axial, ct of"}\n'
            '{"file_name": "b.png", "text": "two", "prompt": null}\n',
        ),
        (
            "annotations/captions_train.json",
            json.dumps(
                {
                    "images": [{"id": 1, "file_name": "a.png"}, {"id": 2, "file_name": "b.png"}],
                    "annotations": [
                        {"image_id": 1, "caption": "one", "prompt": "axial, ct of"},
                        {"image_id": 2, "caption": "two"},
                    ],
                }
            ),
        ),
    ],
)
def test_prompt_is_read_with_its_caption(name, content, tmp_path):
    picture(tmp_path / "images" / "a.png")
    picture(tmp_path / "images" / "b.png")
    write(tmp_path / name, content)
    assert prompts(tmp_path) == [("a", "axial, ct of", "one"), ("b", "", "two")]


def test_parquet_unpacked_without_prompts_is_unpacked_again(tmp_path):
    write_parquet(tmp_path / "train-0.parquet", HUB | {"Prompt": ["axial ct of", None]})
    expected = [("a", "axial ct of", "one"), ("b", "", "two")]
    assert prompts(tmp_path) == expected
    index = tmp_path / "unpacked" / "train" / "index.jsonl"
    (made_of, *rows) = map(json.loads, index.read_text().splitlines())
    old = [[entry[:3] for entry in made_of], *({k: v for k, v in row.items() if k != "prompt"} for row in rows)]
    index.write_text("".join(json.dumps(entry) + "\n" for entry in old))
    assert prompts(tmp_path) == expected
    assert json.loads(index.read_text().splitlines()[0]) == made_of


def test_parquet_without_prompts_is_not_unpacked_again(tmp_path):
    write_parquet(tmp_path / "train-0.parquet", HUB)
    assert prompts(tmp_path) == [("a", "", "one"), ("b", "", "two")]
    header, row, _ = map(json.loads, (tmp_path / "unpacked" / "train" / "index.jsonl").read_text().splitlines())
    assert [len(entry) for entry in header] == [3]
    assert row == {"id": "a", "file": "a.png", "caption": "one", "cui": []}


@pytest.mark.parametrize("value", [["axial"], 7])
def test_prompt_column_without_text_is_refused(value, tmp_path):
    write_parquet(tmp_path / "train-0.parquet", HUB | {"prompt": [value, value]})
    with pytest.raises(DataError, match=r"the column prompt holds .*, not prompts: text"):
        read_dataset(tmp_path)


def test_prompt_column_alone_holds_captions(tmp_path):
    picture(tmp_path / "a.png")
    write(tmp_path / "captions.csv", "file_name,prompt\na.png,a white cat\n")
    assert prompts(tmp_path) == [("a", "", "a white cat")]


def test_captions_of_one_image_share_its_prompt(tmp_path):
    picture(tmp_path / "a.png")
    write(tmp_path / "train.csv", "ID,Caption,prompt\na,one,ct of\na,two,ct of\n")
    assert prompts(tmp_path) == [("a", "ct of", "one"), ("a", "ct of", "two")]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("train.csv", "ID,Caption,prompt\na,one,ct of\na,two,mri of\n"),
        ("train.csv", "ID,Caption,prompt\na,one,ct of\na,two,\n"),
        ("train.jsonl", '{"id": "a", "caption": "one", "prompt": "ct of"}\n{"id": "a", "caption": "two"}\n'),
        ("train-0.parquet", HUB | {"image_id": ["a", "a"], "prompt": ["ct of", "mri of"]}),
    ],
)
def test_different_prompts_of_one_image_are_refused(name, content, tmp_path):
    picture(tmp_path / "a.png")
    if isinstance(content, str):
        write(tmp_path / name, content)
    else:
        write_parquet(tmp_path / name, content)
    with pytest.raises(DataError, match=rf"{name}: a has captions with different prompts") as caught:
        read_dataset(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("prompt", ["axial\\nct", "\\ud800"])
def test_unprintable_prompt_is_refused(prompt, tmp_path):
    picture(tmp_path / "a.png")
    write(tmp_path / "train.jsonl", f'{{"id": "a", "caption": "one", "prompt": "{prompt}"}}\n')
    with pytest.raises(DataError, match=r"train\.jsonl: the prompt of a contains unprintable characters") as caught:
        read_dataset(tmp_path)
    assert prompt in str(caught.value)


def test_fingerprint_depends_on_prompts(tmp_path):
    examples = [Example("a", tmp_path / "a.png", "one"), Example("b", tmp_path / "b.png", "two")]
    split = Split("train", examples, tmp_path)
    earlier_version = "05b67c24bc37dbd7"
    found = {fingerprint(replace(split, examples=[replace(examples[0], prompt=p), examples[1]])) for p in ("x", "y")}
    assert len(found | {fingerprint(split)}) == 3
    assert fingerprint(split)[:16] == earlier_version


def test_prompt_counts_toward_caption_length(tmp_path):
    examples = [Example("a", tmp_path / "a", "w w", prompt="p p p"), Example("b", tmp_path / "b", "w")]
    split = Split("train", examples, tmp_path)
    count = lambda text: len(text.split()) + 2  # noqa: E731
    assert check_split(split, decode=False, count_tokens=count, max_tokens=6).cut == [("a", "7 tokens, at most 6 fit")]
    stats = inspect_dataset({"train": split}, images=False, count_tokens=count)
    found = stats["splits"]["train"]
    assert (found["words"]["counts"], found["tokens"]["counts"]) == ({"1": 1, "2": 1}, {"3": 1, "7": 1})
    assert found["prompts"] == 1
    assert "  prompts: 1 of 2 captions have one; tokens include it" in lines(stats)
    without = replace(split, examples=split.examples[1:])
    assert not any("prompts" in line for line in lines(inspect_dataset({"train": without}, images=False)))


def test_too_long_or_special_token_prompts_are_refused(tmp_path):
    tokenizer = make_tokenizer(tmp_path)
    assert prompt_ids(tokenizer, "axial ct") == tuple(tokenizer("axial ct")["input_ids"][1:-1])
    assert prompt_ids(tokenizer, "") == ()
    examples = [Example("a", tmp_path / "a", "mri"), Example("b", tmp_path / "b", "mri", prompt="axial ct of the")]
    check_fit(examples, tmp_path, tokenizer, 7)  # [DEC] axial ct of the mri [SEP]
    with pytest.raises(UsageError, match=r"prompts of up to 4 tokens leave no room for a caption within 6 \(b\)"):
        check_fit(examples, tmp_path, tokenizer, 6)
    with pytest.raises(DataError, match=r"the prompt of b contains a special token of the tokenizer: ct \[SEP\]"):
        check_fit([replace(examples[1], prompt="ct [SEP]")], tmp_path, tokenizer, 20)
