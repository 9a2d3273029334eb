"""Inference equals the published implementation, recorded in tests/fixtures/reference_a (float32, CPU)."""

import numpy as np
import pytest
import torch
from safetensors import safe_open
from tiny import REFERENCE

from pixelrepa_diffusers import JiTFlowMatchScheduler


with safe_open(REFERENCE / "tensors.safetensors", framework="pt") as file:
    SAMPLES = sorted(name for name in file.keys() if name.startswith("sample_"))  # noqa: SIM118


def assert_close(actual, expected, atol):
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


@torch.no_grad()
def test_alignment_states_and_predictions_are_the_published_ones(reference):
    tensors, null_class = reference.tensors, reference.config["classes"]
    conditional = reference.transformer(tensors["z"], tensors["t"], tensors["labels"], return_alignment_states=True)
    unconditional = reference.transformer(tensors["z"], tensors["t"], torch.full_like(tensors["labels"], null_class))
    assert_close(conditional.alignment_states, tensors["encoded"], 2e-5)
    assert_close(conditional.sample, tensors["x_pred"], 2e-5)
    assert_close(unconditional.sample, tensors["x_pred_null"], 2e-5)


@pytest.mark.parametrize("name", SAMPLES)
def test_samples_are_the_published_ones(name, reference, make_pipeline):
    _, solver, guidance, interval = name.split("_")
    pipeline = make_pipeline(reference.transformer, JiTFlowMatchScheduler(solver=solver))

    def sample(output_type):
        return pipeline(
            reference.tensors["labels"],
            guidance_scale=float(guidance.removeprefix("cfg")),
            guidance_interval=tuple(float(bound) for bound in interval.removeprefix("i").split("-")),
            num_inference_steps=reference.config["steps"],
            latents=reference.tensors["noise"],
            output_type=output_type,
        ).images

    expected = reference.tensors[name]
    images = (expected / 2 + 0.5).clamp(0, 1)
    assert_close(sample("latent"), expected, 2e-5)
    assert_close(sample("pt"), images, 5e-5)
    # Values halfway between two levels may round either way.
    levels = np.stack([np.asarray(image, dtype=np.int16) for image in sample("pil")])
    expected_levels = (255 * images).round().permute(0, 2, 3, 1).numpy().astype(np.int16)
    assert np.abs(levels - expected_levels).max() <= 1
    assert (levels != expected_levels).mean() < 1e-3


def test_both_solvers_are_recorded_with_and_without_guidance():
    assert len(SAMPLES) == 8
