"""Extreme inputs: t at its bounds, large guidance, full and empty masks, zero features, half precision."""

import numpy as np
import pytest
import torch
import torch.nn as nn

from pixelrepa_diffusers import (
    ConvProjector,
    MaskedTransformerAdapter,
    MLPProjector,
    PixelREPAObjective,
)


T_EPS = 0.05
CLAMP_START = [float(np.nextafter(np.float32(1 - T_EPS), np.float32(side))) for side in (0, 1)]
EXTREME_TIMES = [0.0, float(np.finfo(np.float32).smallest_subnormal), *CLAMP_START, 1 - 2**-24, 1.0]
LABELS = torch.tensor([3, 10])
WIDTH, FEATURES = 16, 12


@pytest.fixture
def images():
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture
def adapter():
    torch.manual_seed(0)
    return MaskedTransformerAdapter(WIDTH, 2, FEATURES, num_layers=1, grid_size=4, in_context_len=2, num_classes=10)


def gradients(module: nn.Module) -> list[torch.Tensor]:
    return [parameter.grad for parameter in module.parameters() if parameter.grad is not None]


def finite(*tensors: torch.Tensor) -> bool:
    return all(tensor.isfinite().all() for tensor in tensors)


@pytest.mark.parametrize("t", EXTREME_TIMES)
def test_prediction_velocity_loss_and_gradients_are_finite_at_extreme_times(make_transformer, adapter, images, t):
    transformer = make_transformer(t_eps=T_EPS)
    with torch.no_grad():
        prediction = transformer(images, t, LABELS).sample
    velocity = transformer.velocity(prediction, images, t)
    assert finite(prediction, velocity)
    expected = (prediction - images).double() / max(1 - float(np.float32(t)), T_EPS)
    torch.testing.assert_close(velocity.double(), expected, rtol=1e-6, atol=1e-6)

    objective = PixelREPAObjective(transformer, adapter)
    features = torch.randn(2, 16, FEATURES, generator=torch.Generator().manual_seed(1))
    output = objective(images, LABELS, torch.full((2,), t), torch.randn_like(images), features)
    output.loss.backward()
    assert finite(output.loss, *gradients(objective))
    assert output.denoising_loss < 1 / T_EPS**2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [0, 1, 100.0])
def test_images_are_finite_float32_for_small_and_large_guidance(make_pipeline, make_transformer, dtype, scale):
    transformer = make_transformer().to(dtype)
    transformer.conditioning.time_embedding.float()  # as `from_pretrained` leaves it
    pipeline = make_pipeline(transformer, guidance_interval=(0.0, 1.0))
    images = pipeline([0, 9], guidance_scale=scale, num_inference_steps=4, output_type="pt").images
    assert images.dtype == torch.float32 and finite(images) and images.min() >= 0 and images.max() <= 1


def test_overflowing_guidance_is_refused_unless_raw_values_are_asked_for(make_pipeline):
    pipeline = make_pipeline(guidance_interval=(0.0, 1.0))
    with pytest.raises(ValueError, match=r"NaN or infinite values.* guidance_scale=1e\+200 .* torch.float32"):
        pipeline(1, guidance_scale=1e200, num_inference_steps=3)
    assert not finite(pipeline(1, guidance_scale=1e200, num_inference_steps=3, output_type="latent").images)
    assert pipeline(1, num_inference_steps=1).images[0].size == (16, 16)


def test_fully_masked_and_unmasked_rows_are_finite_and_independent(adapter):
    tokens = torch.randn(3, 16, WIDTH, requires_grad=True)
    keep = torch.ones(3, 16, dtype=torch.bool)
    keep[0] = False
    time, labels = torch.tensor([0.0, 0.5, 1.0]), torch.tensor([0, 5, 10])
    output = adapter(tokens, time, labels, keep)
    output.square().mean().backward()
    assert finite(output, tokens.grad, *gradients(adapter))
    assert not tokens.grad[0].any() and tokens.grad[1].any()
    torch.testing.assert_close(output[1:], adapter(tokens[1:], time[1:], labels[1:]))
    torch.testing.assert_close(output[:1], adapter(torch.full((1, 16, WIDTH), 1e30), time[:1], labels[:1], keep[:1]))


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-12, 1e18])
@pytest.mark.parametrize("kind", ["pixelrepa", "repa", "irepa"])
def test_teacher_features_of_any_norm_give_a_finite_loss(make_transformer, adapter, images, kind, size):
    projector = {
        "pixelrepa": adapter,
        "repa": MLPProjector(WIDTH, FEATURES, projector_dim=8),
        "irepa": ConvProjector(WIDTH, FEATURES, grid_size=4),
    }[kind]
    objective = PixelREPAObjective(make_transformer(), projector, spatial_norm=0.8 if kind == "irepa" else None)
    features = size * torch.randn(2, 16, FEATURES, generator=torch.Generator().manual_seed(1))
    features[0, 0] = 0
    output = objective(images, LABELS, torch.tensor([0.3, 0.8]), torch.randn_like(images), features)
    output.loss.backward()
    assert finite(output.loss, *gradients(objective))
    assert 0 <= output.alignment_loss <= 2
    if not size:
        assert output.alignment_loss == 1
        assert not any(gradient.any() for gradient in gradients(projector))


def test_zero_predicted_features_have_cosine_zero_and_finite_gradients(make_transformer, images):
    projector = MLPProjector(WIDTH, FEATURES, projector_dim=8)
    nn.init.zeros_(projector.projection[4].weight)
    objective = PixelREPAObjective(make_transformer(), projector)
    output = objective(images, LABELS, torch.tensor([0.3, 0.8]), torch.randn_like(images), torch.ones(2, 16, FEATURES))
    output.loss.backward()
    assert output.alignment_loss == 1
    assert finite(*gradients(objective))
