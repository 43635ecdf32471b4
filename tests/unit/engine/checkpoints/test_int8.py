"""Rotated weights: the same model, whose activations have no large channels, with the same bits everywhere."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from engine.checkpoints.int8 import RotatedWeights, quantise_weight, rotated
from export.families import family_of
from export.reference.huggingface import Reference
from tests.helpers.tiny import random_pictures


@pytest.mark.parametrize("width", [1, 3, 8, 24, 384, 320])
def test_rotation_is_orthogonal_and_keeps_the_mean(width):
    matrix = rotated(np.eye(width, dtype=np.float32))
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(width), atol=2e-6)
    np.testing.assert_allclose(matrix.sum(1), 1, atol=2e-6)
    np.testing.assert_array_equal(matrix, matrix.T)


def test_weights_in_8_bits_are_rounded_to_the_nearest_step():
    weight = np.random.default_rng(0).normal(size=(40, 70)).astype(np.float32)
    weight[3] = 0
    quantised, scale = quantise_weight(weight)
    errors = np.abs(quantised.T * scale[:, None] - weight)
    assert (errors <= 0.5001 * scale[:, None]).all()
    assert (np.abs(quantised).max(0) == np.where(np.arange(40) == 3, 0, 127)).all()


def test_rotation_spreads_a_large_channel():
    matrix = rotated(np.eye(384, dtype=np.float32))
    assert np.abs(matrix).max() < 0.25


def test_rotation_applies_to_the_first_axis_of_any_shape():
    array = np.random.default_rng(0).normal(size=(24, 3, 5)).astype(np.float32)
    matrix = rotated(np.eye(24, dtype=np.float32))
    np.testing.assert_allclose(rotated(array), np.einsum("ij,jkl->ikl", matrix, array), atol=1e-6)


@pytest.fixture
def outlier_model(tiny_reference: Reference):
    """The tiny model with trained-looking layer norms: weights and biases that differ, one channel that is large."""
    model = copy.deepcopy(tiny_reference.model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
            if name.endswith(("fc2.bias", "projection.bias")):
                parameter[5] += 20
    return model


def test_rotated_model_gives_the_same_keys_without_outliers(outlier_model, tiny_reference):
    weights = {name: weight.detach().numpy() for name, weight in outlier_model.named_parameters()}
    residual = family_of(outlier_model).rules.residual(outlier_model.config.to_dict())
    found = RotatedWeights(weights, residual)
    assert set(found) == set(weights)
    rotated_model = copy.deepcopy(outlier_model)
    changed = {name for name in found if not np.array_equal(found[name], weights[name])}
    assert all(name.startswith("vision_model.") or ".crossattention.self." in name for name in changed)
    rotated_model.load_state_dict({name: torch.from_numpy(found[name].copy()) for name in found}, strict=False)
    pixels = tiny_reference.image_processor(random_pictures(3), return_tensors="pt")["pixel_values"]
    inputs: dict[str, list[torch.Tensor]] = {"before": [], "after": []}

    def keys(model: torch.nn.Module, seen: list[torch.Tensor]) -> list[torch.Tensor]:
        for name, layer in model.vision_model.named_modules():
            if name.endswith(("qkv", "fc1")):
                layer.register_forward_hook(lambda _, given, __: seen.append(given[0]))
        with torch.no_grad():
            encoded = model.vision_model(pixels)[0]
            layers = model.text_decoder.bert.encoder.layer
            return [getattr(layer.crossattention.self, kind)(encoded) for layer in layers for kind in ("key", "value")]

    expected, same = keys(outlier_model, inputs["before"]), keys(rotated_model, inputs["after"])
    for mine, theirs in zip(same, expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-4, rtol=2e-4)
    peaks = {kind: max(float((x.abs().amax(-1) / x.std(-1)).max()) for x in rows[1:]) for kind, rows in inputs.items()}
    assert peaks["after"] < 0.9 * peaks["before"]
