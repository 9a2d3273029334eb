"""The places where arithmetic could break: t at its ends, extreme guidance, masks of all or nothing, features of norm zero,
half precision. What comes out is finite, or refused."""

import numpy as np
import pytest
import torch
import torch.nn as nn

from pixelrepa_diffusers import JiTFlowMatchScheduler, JiTTransformer2DModel
from pixelrepa_diffusers.adapter import ConvProjector, MaskedTransformerAdapter, MLPProjector
from pixelrepa_diffusers.objective import PixelREPAObjective, draw_keep_mask, draw_timesteps


T_EPS = 0.05
BESIDE = [
    float(np.nextafter(np.float32(1 - T_EPS), np.float32(side))) for side in (0, 1)
]  # the last t before the clamp of 1 − t, the first in it
ENDS = [
    0.0,
    float(np.finfo(np.float32).smallest_subnormal),
    *BESIDE,
    float(np.nextafter(np.float32(1), np.float32(0))),
    1.0,
]
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


# ------------------------------------------------------------------------------------------------------ time's ends


@pytest.mark.parametrize("t", ENDS)
def test_prediction_and_velocity_are_finite_at_the_ends_of_time(make_transformer, images, t):
    transformer = make_transformer(t_eps=T_EPS)
    with torch.no_grad():
        prediction = transformer(images, t, LABELS).sample
    velocity = transformer.velocity(prediction, images, t)
    assert finite(prediction, velocity)
    expected = (prediction - images).double() / max(1 - float(np.float32(t)), T_EPS)
    torch.testing.assert_close(velocity.double(), expected, rtol=1e-6, atol=1e-6)


def test_the_velocity_does_not_jump_where_the_clamp_sets_in(make_transformer, images):
    before, after = (make_transformer(t_eps=T_EPS).velocity(torch.zeros_like(images), images, t) for t in BESIDE)
    torch.testing.assert_close(before, after, rtol=1e-5, atol=0)


@pytest.mark.parametrize("t", ENDS)
def test_loss_and_gradients_are_finite_at_the_ends_of_time(make_transformer, adapter, images, t):
    objective = PixelREPAObjective(make_transformer(t_eps=T_EPS), adapter)
    features = torch.randn(2, 16, FEATURES, generator=torch.Generator().manual_seed(1))
    output = objective(images, LABELS, torch.full((2,), t), torch.randn_like(images), features)
    output.loss.backward()
    assert finite(output.loss, *gradients(objective))
    # v̂ − v = (x̂ − x)/max(1 − t, t_eps): no time makes more of an error than the clamp does.
    assert output.denoising_loss < 1 / T_EPS**2


def test_times_drawn_far_out_are_exactly_zero_or_one_and_no_more():
    for P_mean, end in ((-1e6, 0.0), (1e6, 1.0)):
        assert (draw_timesteps(4, torch.Generator(), P_mean, 0.8) == end).all()


@pytest.mark.parametrize("t", [-1e-9, 1.0000001, 500.0, 1000, float("nan"), float("inf")])
def test_a_number_that_is_no_time_is_refused_with_the_conversion(make_transformer, images, t):
    with pytest.raises(ValueError, match=r"`timestep` must be a time t in \[0, 1\] .*1000·\(1 − t\)\), got"):
        make_transformer()(images, t, LABELS)


@pytest.mark.parametrize("solver", ["heun", "euler"])
@pytest.mark.parametrize("steps", [1, 2, 50])
def test_the_scheduler_walks_from_sigma_one_to_zero_and_stays_finite(solver, steps):
    scheduler, sample = JiTFlowMatchScheduler(solver=solver), torch.ones(1, 1, 2, 2)
    scheduler.set_timesteps(steps)
    assert (scheduler.sigmas[0], scheduler.sigmas[-1]) == (1, 0)
    for timestep in scheduler.timesteps:
        sample = scheduler.step(torch.full_like(sample, 1e4), timestep, sample).prev_sample
    torch.testing.assert_close(sample, torch.full_like(sample, 1 - 1e4))
    # The ends of the path are its ends to the bit: at sigma 0 no noise is left, at sigma 1 no image.
    noise = torch.full((1, 1, 2, 2), 1e30)
    assert torch.equal(scheduler.scale_noise(sample, 0.0, noise), sample)
    assert torch.equal(scheduler.scale_noise(sample, 1000.0, noise), noise)


# ----------------------------------------------------------------------------------------------------------- guidance


@pytest.mark.parametrize("scale", [0, 1, 1e3])
def test_guidance_from_none_to_a_thousandfold_stays_finite(make_pipeline, scale):
    pipeline = make_pipeline(guidance_interval=(0.0, 1.0))
    latents = pipeline([1, 2], guidance_scale=scale, num_inference_steps=5, output_type="latent").images
    assert finite(latents)
    images = pipeline([1, 2], guidance_scale=scale, num_inference_steps=5, output_type="np").images
    assert np.isfinite(images).all() and images.min() >= 0 and images.max() <= 1


@pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
def test_guidance_that_overflows_is_refused_not_clipped_to_black(make_pipeline, output_type):
    pipeline = make_pipeline(guidance_interval=(0.0, 1.0))
    with pytest.raises(
        ValueError, match=r"NaN or infinite values: .* guidance_scale=1e\+200 or the type torch.float32 is too much"
    ):
        pipeline(1, guidance_scale=1e200, num_inference_steps=3, output_type=output_type)
    latents = pipeline(1, guidance_scale=1e200, num_inference_steps=3, output_type="latent").images
    assert not finite(latents)  # the raw state is handed out as it is
    assert pipeline(1, num_inference_steps=1).images[0].size == (16, 16)  # and nothing of it stays


def test_guidance_zero_is_the_unconditional_image(make_pipeline):
    pipeline = make_pipeline(guidance_interval=(0.0, 1.0))
    noise = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    first, second = (
        pipeline(label, guidance_scale=0, num_inference_steps=4, latents=noise, output_type="latent").images
        for label in (1, 7)
    )
    torch.testing.assert_close(first, second, rtol=0, atol=1e-5)


# -------------------------------------------------------------------------------------------------------------- masks


def test_rows_masked_wholly_or_not_at_all_are_finite_and_what_they_should_be(adapter):
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


@pytest.mark.parametrize("ratio, kept", [(0.0, True), (0, True), (1.0, False), (1, False)])
def test_a_mask_ratio_of_zero_keeps_and_of_one_masks_every_token(ratio, kept):
    assert (draw_keep_mask(64, 256, torch.Generator().manual_seed(0), ratio) == kept).all()


# -------------------------------------------------------------------------------------------------- features of norm zero


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-12, 1e18])
@pytest.mark.parametrize("kind", ["pixelrepa", "repa", "irepa"])
def test_teacher_features_of_any_size_leave_loss_and_gradients_finite(make_transformer, adapter, images, kind, size):
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


def test_predicted_features_of_norm_zero_have_cosine_zero_and_finite_gradients(make_transformer, images):
    projector = MLPProjector(WIDTH, FEATURES, projector_dim=8)
    nn.init.zeros_(projector.projection[4].weight)
    objective = PixelREPAObjective(make_transformer(), projector)
    output = objective(images, LABELS, torch.tensor([0.3, 0.8]), torch.randn_like(images), torch.ones(2, 16, FEATURES))
    output.loss.backward()
    assert output.alignment_loss == 1
    assert finite(*gradients(objective))


def test_a_token_without_a_teachers_feature_pulls_at_nothing(make_transformer, images):
    projector = MLPProjector(WIDTH, FEATURES, projector_dim=8)
    objective = PixelREPAObjective(make_transformer(), projector)
    inputs = images, LABELS, torch.tensor([0.3, 0.8]), torch.randn_like(images)
    objective(*inputs, torch.zeros(2, 16, FEATURES)).alignment_loss.backward()
    assert not any(gradient.any() for gradient in gradients(projector))


def test_a_spread_over_one_token_is_refused():
    transformer = JiTTransformer2DModel(4, 4, num_layers=1, in_context_start=0, num_attention_heads=1, num_classes=2)
    with pytest.raises(ValueError, match=r"images of 4 pixels in patches of 4 have one token: it must be None"):
        PixelREPAObjective(transformer, ConvProjector(64, 8, grid_size=1), spatial_norm=0.8)


# ------------------------------------------------------------------------------------------------------ half precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_training_step_in_half_precision_is_finite_and_near_the_one_in_full(
    make_transformer, adapter, images, dtype
):
    objective = PixelREPAObjective(make_transformer(), adapter)
    features, noise = torch.randn(2, 16, FEATURES), torch.randn_like(images)
    inputs = images, LABELS, torch.tensor([0.0, 1.0]), noise, features, draw_keep_mask(2, 16, torch.Generator())
    exact = objective(*inputs).loss.item()
    optimizer = torch.optim.AdamW(objective.parameters(), lr=1e-3)
    for _ in range(3):
        with torch.autocast("cpu", dtype=dtype):
            output = objective(*inputs)
        assert output.loss.dtype == torch.float32
        output.loss.backward()
        assert finite(output.loss, *gradients(objective))
        optimizer.step()
        optimizer.zero_grad()
        if exact is not None:
            assert output.loss.item() == pytest.approx(exact, rel=0.02)
            exact = None
    assert finite(*objective.parameters())
    assert objective(*inputs).loss < output.loss * 1.05


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [3.0, 100.0])
def test_sampling_in_half_precision_is_finite(make_pipeline, make_transformer, dtype, scale):
    transformer = make_transformer().to(dtype)
    transformer.conditioning.time_embedding.float()  # as `from_pretrained` leaves it
    pipeline = make_pipeline(transformer, guidance_interval=(0.0, 1.0))
    images = pipeline([0, 9], guidance_scale=scale, num_inference_steps=4, output_type="pt").images
    assert images.dtype == torch.float32 and finite(images)


def test_a_network_that_overflows_in_float16_is_refused_not_drawn(make_pipeline, make_transformer):
    transformer = make_transformer()
    with torch.no_grad():
        transformer.final_layer.linear.weight.mul_(1e6)
    pipeline = make_pipeline(transformer.to(torch.float16))
    with pytest.raises(ValueError, match=r"NaN or infinite values: .*torch.float16 is too much"):
        pipeline(0, num_inference_steps=2)
