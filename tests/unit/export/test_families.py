"""The seam between model families and everything else."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from engine.checkpoints.families import RULES, rules_named
from engine.errors import CheckpointError
from export.families import FAMILIES, family_at, family_of

ROOT = Path(__file__).parents[3]
FAMILY_FILES = {
    *("export/families/__init__.py", "export/families/blip.py"),
    *("engine/checkpoints/families.py",),
}
NAMES_BLIP = FAMILY_FILES | {
    "train/demo/build.py",  # makes the demo's model from weights of other models
    "benchmarks/workload.py",  # makes models with random weights
    "benchmarks/programs.py",  # the usual ONNX loop of a BLIP
    "benchmarks/gpu/first.py",  # tries another operator in BLIP's graphs
}
"""Files that import BLIP's classes."""
PARTS = {"text_config", "vision_config", "vision_model", "text_decoder"}
"""Attributes of BLIP's model and configuration."""


def modules(*packages: str) -> dict[str, ast.Module]:
    return {
        path.relative_to(ROOT).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
        for package in packages
        for path in (ROOT / package).rglob("*.py")
    }


def imported(tree: ast.Module) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_blip_is_imported_by_listed_files_only():
    names = {file: imported(tree) for file, tree in modules("engine", "export", "train", "benchmarks").items()}
    found = {file for file, of_file in names.items() if any("blip" in name.lower() for name in of_file)}
    assert found == NAMES_BLIP


def test_parts_of_blip_are_read_by_its_family_only():
    """Training reads some of them as well: it is for BLIP alone. GIT and others have parts of the same names."""
    found = {
        file
        for file, tree in modules("engine", "export").items()
        if any(isinstance(node, ast.Attribute) and node.attr in PARTS for node in ast.walk(tree))
    }
    assert found == {f"export/families/{name}.py" for name in ("blip", "florence2", "git", "image_prefix")}


def test_look_up_a_family(tiny_checkpoint, tiny_reference):
    blip = FAMILIES["blip"]
    assert family_at(tiny_checkpoint) is family_of(tiny_reference.model) is tiny_reference.family is blip
    assert rules_named("blip", [], tiny_checkpoint) is RULES["blip"]
    for name, family in FAMILIES.items():
        assert family.rules.model_type == family.config_class.model_type == name
        assert family.rules.architecture == family.model_class.__name__
        assert type(RULES[name]) is type(family.rules)


@pytest.mark.parametrize(
    ("model_type", "architectures"),
    [
        ("pix2struct", ["Pix2StructForConditionalGeneration"]),
        ("blip-2", []),
        (None, []),
        (["blip"], []),
        ("blip", ["BlipForQuestionAnswering"]),
    ],
)
def test_other_models_are_refused_by_name(model_type, architectures):
    with pytest.raises(CheckpointError) as refused:
        rules_named(model_type, architectures, Path("checkpoint"))
    message = str(refused.value)
    assert "\n" not in message
    for expected in ("checkpoint is not a BLIP or ", repr(model_type), str(architectures)):
        assert expected in message
    for rules in RULES.values():
        assert repr(rules.model_type) in message
        assert rules.architecture in message


def test_sizes_fit_the_exported_bundle(tiny_bundle, tiny_reference):
    from dataclasses import asdict

    from engine.bundle.manifest import Bundle

    bundle, sizes = Bundle.load(tiny_bundle), asdict(tiny_reference.sizes)
    more = {"image_size": bundle.image.height, "tokens": asdict(bundle.tokens), "has_tasks": False}
    assert sizes == asdict(bundle.model) | more
    table = tiny_reference.model.vision_model.embeddings.position_embedding
    assert sizes["encoder_positions"] == table.shape[1]


def test_other_families_are_imported_by_their_own_files_only():
    others = [family for name, family in FAMILIES.items() if name != "blip"]
    classes = {one.__name__ for family in others for one in (family.config_class, family.model_class)}
    files = modules("engine", "export", "train", "benchmarks")
    found = {file for file, tree in files.items() if classes & {name.rpartition(".")[2] for name in imported(tree)}}
    assert found == {f"export/families/{name}.py" for name in ("florence2", "git", "vision_encoder_decoder")}
