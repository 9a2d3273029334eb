import pytest
import torch
import torch.nn as nn
from accelerate import Accelerator

from pixelrepa_diffusers.adapter import ConvProjector, MaskedTransformerAdapter, MLPProjector
from pixelrepa_diffusers.objective import PixelREPAObjective, draw_keep_mask, draw_timesteps, drop_labels
from pixelrepa_diffusers.transformer_jit import JiTTransformer2DModel


B, SIZE, GRID, D, TEACHER_DIM, CLASSES, NOISE_SCALE = 3, 16, 4, 32, 24, 5, 2.0


def randomize(module):
    with torch.no_grad():  # adaLN-zero would hide most of the network
        for parameter in module.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return module


def make_transformer(**kwargs):
    torch.manual_seed(0)
    transformer = JiTTransformer2DModel(
        sample_size=SIZE,
        patch_size=SIZE // GRID,
        num_layers=4,
        num_attention_heads=4,
        attention_head_dim=D // 4,
        bottleneck_dim=8,
        in_context_len=2,
        in_context_start=2,
        num_classes=CLASSES,
        noise_scale=NOISE_SCALE,
        **kwargs,
    )
    return randomize(transformer)


def make_adapter():
    torch.manual_seed(1)
    return randomize(
        MaskedTransformerAdapter(D, 4, TEACHER_DIM, grid_size=GRID, in_context_len=2, num_classes=CLASSES)
    )


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(2)
    return {
        "pixel_values": torch.rand(B, 3, SIZE, SIZE, generator=generator) * 2 - 1,
        "class_labels": torch.tensor([0, 3, CLASSES]),
        "timestep": torch.tensor([0.1, 0.5, 0.99]),  # the last one is in the clamp
        "noise": torch.randn(B, 3, SIZE, SIZE, generator=generator),
    }


@pytest.fixture
def features():
    return torch.randn(B, GRID**2, TEACHER_DIM, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def keep_mask():
    return draw_keep_mask(B, GRID**2, torch.Generator().manual_seed(4), mask_ratio=0.3)


def predict(transformer, batch, depth=None):
    """(z, x̂, h), element by element of the batch, with the scaled noise written out."""
    noisy = torch.stack(
        [
            t * image + (1 - t) * NOISE_SCALE * noise
            for t, image, noise in zip(batch["timestep"], batch["pixel_values"], batch["noise"], strict=True)
        ]
    )
    output = transformer(
        noisy, batch["timestep"], batch["class_labels"], return_alignment_states=True, alignment_depth=depth
    )
    return noisy, output.sample, output.alignment_states


def test_the_loss_is_the_velocity_error_plus_lambda_times_one_minus_the_cosine(batch, features, keep_mask):
    transformer, adapter = make_transformer(), make_adapter()
    output = PixelREPAObjective(transformer, adapter, alignment_weight=0.3)(
        **batch, teacher_features=features, keep_mask=keep_mask
    )
    noisy, sample, states = predict(transformer, batch)
    errors = []
    for index, t in enumerate(batch["timestep"]):
        remaining = max(1 - t.item(), 0.05)
        target = (batch["pixel_values"][index] - noisy[index]) / remaining
        errors.append((target - (sample[index] - noisy[index]) / remaining).square().mean())
    predicted = adapter(states, batch["timestep"], batch["class_labels"], keep_mask)
    cosine = (predicted * features).sum(-1) / predicted.norm(dim=-1) / features.norm(dim=-1)
    torch.testing.assert_close(output.denoising_loss, torch.stack(errors).mean())
    torch.testing.assert_close(output.alignment_loss, 1 - cosine.mean())
    torch.testing.assert_close(output.loss, output.denoising_loss + 0.3 * output.alignment_loss, rtol=0, atol=0)


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_the_alignment_depth_chooses_the_tokens_that_are_aligned(depth, batch, features):
    transformer, projector = make_transformer(), MLPProjector(D, TEACHER_DIM, projector_dim=16)
    output = PixelREPAObjective(transformer, projector, alignment_depth=depth)(**batch, teacher_features=features)
    states = predict(transformer, batch, depth)[2]
    predicted = projector(states, batch["timestep"], batch["class_labels"])
    expected = 1 - torch.cosine_similarity(predicted, features, dim=-1).mean()
    torch.testing.assert_close(output.alignment_loss, expected)
    default = PixelREPAObjective(transformer, projector)(**batch, teacher_features=features)
    assert not torch.allclose(default.alignment_loss, output.alignment_loss, rtol=1e-5)


def test_spatial_norm_is_irepas(batch, features):
    transformer, projector = make_transformer(), ConvProjector(D, TEACHER_DIM, grid_size=GRID)
    objective = PixelREPAObjective(transformer, projector, spatial_norm=0.8)
    normed = torch.stack([(f - 0.8 * f.mean(0)) / (f.std(0) + 1e-6) for f in features])
    expected = PixelREPAObjective(transformer, projector)(**batch, teacher_features=normed).alignment_loss
    torch.testing.assert_close(objective(**batch, teacher_features=features).alignment_loss, expected)
    # In float32 whatever the type the teacher's features come in.
    reduced = [
        objective(**batch, teacher_features=f).alignment_loss for f in (features.half(), features.half().float())
    ]
    torch.testing.assert_close(reduced[0], reduced[1], rtol=0, atol=0)


def test_without_a_projector_it_is_the_denoising_loss_alone(batch, features):
    transformer = make_transformer()
    plain = PixelREPAObjective(transformer)(**batch)
    aligned = PixelREPAObjective(transformer, make_adapter())(**batch, teacher_features=features)
    assert plain.alignment_loss is None
    assert plain.loss is plain.denoising_loss
    torch.testing.assert_close(plain.denoising_loss, aligned.denoising_loss, rtol=0, atol=0)


def test_with_alignment_off_every_projector_gradient_is_zero_and_the_rest_unchanged(batch, keep_mask):
    """DDP waits for all of them, so none may be missing."""
    objective, plain = PixelREPAObjective(make_transformer(), make_adapter()), PixelREPAObjective(make_transformer())
    output = objective(**batch, keep_mask=keep_mask)
    assert output.alignment_loss is None
    torch.testing.assert_close(output.loss, output.denoising_loss, rtol=0, atol=0)
    output.loss.backward()
    plain(**batch).loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in objective.projector.parameters())
    expected = {name: p.grad for name, p in plain.transformer.named_parameters()}
    actual = {name: p.grad for name, p in objective.transformer.named_parameters()}
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("aligned", [True, False])
def test_the_transformer_runs_once(aligned, batch, features):
    objective = PixelREPAObjective(make_transformer(), make_adapter())
    calls = []
    objective.transformer.register_forward_hook(lambda *_: calls.append(1))
    objective(**batch, teacher_features=features if aligned else None)
    assert len(calls) == 1


def test_masking_and_alignment_leave_the_denoising_branch_untouched(batch, features):
    objective = PixelREPAObjective(make_transformer(), make_adapter())
    masks = torch.zeros(B, GRID**2, dtype=torch.bool), torch.ones(B, GRID**2, dtype=torch.bool)
    outputs = [objective(**batch, teacher_features=features, keep_mask=mask) for mask in masks]
    assert torch.equal(outputs[0].denoising_loss, outputs[1].denoising_loss)
    assert not torch.allclose(outputs[0].alignment_loss, outputs[1].alignment_loss)


def test_under_autocast_the_path_and_the_losses_stay_float32(batch, features, keep_mask):
    objective = PixelREPAObjective(make_transformer(), make_adapter())
    exact = objective(**batch, teacher_features=features, keep_mask=keep_mask)
    seen = []
    objective.transformer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        reduced = objective(
            **{**batch, "pixel_values": batch["pixel_values"].bfloat16()},
            teacher_features=features.half() * 1e4,  # its square overflows in float16
            keep_mask=keep_mask,
        )
    assert seen[0].dtype == torch.float32
    for name in ("loss", "denoising_loss", "alignment_loss"):
        assert reduced[name].dtype == torch.float32
        torch.testing.assert_close(reduced[name], exact[name], rtol=0.03, atol=0)


def test_features_of_norm_zero_leave_loss_and_gradients_finite(batch, features):
    projector = MLPProjector(D, TEACHER_DIM, projector_dim=16)
    nn.init.zeros_(projector.projection[4].weight)  # the prediction is exactly zero
    objective = PixelREPAObjective(make_transformer(), projector)
    features[0] = 0.0
    output = objective(**batch, teacher_features=features)
    output.loss.backward()
    assert output.alignment_loss == 1.0
    assert all(parameter.grad.isfinite().all() for parameter in objective.parameters() if parameter.grad is not None)


def test_accelerate_carries_the_output_through_mixed_precision(batch, features, keep_mask):
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    objective = accelerator.prepare(PixelREPAObjective(make_transformer(), make_adapter()))
    output = objective(**batch, teacher_features=features, keep_mask=keep_mask)
    accelerator.backward(output.loss)
    assert output.loss.dtype == output.denoising_loss.dtype == output.alignment_loss.dtype == torch.float32
    assert objective(**batch).alignment_loss is None


def test_the_objective_is_one_graph_under_compile(batch, features, keep_mask):
    objective = PixelREPAObjective(make_transformer(), make_adapter())
    compiled = torch.compile(objective, fullgraph=True, backend="eager")
    arguments = {**batch, "teacher_features": features, "keep_mask": keep_mask}
    torch.testing.assert_close(compiled(**arguments).loss, objective(**arguments).loss)


def test_misfits_are_refused(batch, features):
    transformer = make_transformer()
    with pytest.raises(ValueError, match="no projector"):
        PixelREPAObjective(transformer)(**batch, teacher_features=features)
    with pytest.raises(ValueError, match=r"\(3, 16, 24\), the teacher of shape \(3, 15, 24\)"):
        PixelREPAObjective(transformer, make_adapter())(**batch, teacher_features=features[:, 1:])
    with pytest.raises(ValueError, match=r"\[0, 3\], got 4"):
        PixelREPAObjective(transformer, alignment_depth=4)
    for weight in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="finite number"):
            PixelREPAObjective(transformer, alignment_weight=weight)


@pytest.mark.parametrize("timestep", [0.5, torch.tensor(0.5), torch.rand(B + 1)], ids=["number", "scalar", "more"])
def test_every_image_has_a_time_of_its_own(batch, features, timestep):
    objective = PixelREPAObjective(make_transformer(), make_adapter())
    with pytest.raises(ValueError, match=rf"`timestep` must be a tensor of shape \({B},\)"):
        objective(**{**batch, "timestep": timestep}, teacher_features=features)
    with pytest.raises(ValueError, match=rf"`timestep` must be a tensor of shape \({B},\)"):
        make_adapter()(torch.zeros(B, GRID**2, D), timestep, batch["class_labels"])


def test_timesteps_are_logit_normal_and_repeat_with_the_generator():
    t = draw_timesteps(20_000, torch.Generator().manual_seed(0), P_mean=-0.8, P_std=0.8)
    assert t.shape == (20_000,) and t.dtype == torch.float32 and t.min() > 0 and t.max() < 1
    logits = torch.logit(t)
    assert logits.mean().item() == pytest.approx(-0.8, abs=0.02)
    assert logits.std().item() == pytest.approx(0.8, abs=0.02)
    assert torch.equal(t, draw_timesteps(20_000, torch.Generator().manual_seed(0)))


def test_the_keep_mask_drops_each_token_with_the_mask_ratio():
    keep_mask = draw_keep_mask(200, 256, torch.Generator().manual_seed(0), mask_ratio=0.2)
    assert keep_mask.shape == (200, 256) and keep_mask.dtype == torch.bool
    assert keep_mask.float().mean().item() == pytest.approx(0.8, abs=0.01)
    assert keep_mask.sum(1).unique().numel() > 5  # independently, not a fixed fraction of each image
    assert draw_keep_mask(200, 256, torch.Generator(), mask_ratio=0.0).all()
    assert not draw_keep_mask(2, 8, torch.Generator(), mask_ratio=1.0).any()


def test_labels_are_dropped_independently_to_the_null_class_without_changing_the_input():
    labels = torch.arange(20_000) % CLASSES
    before = labels.clone()
    dropped = drop_labels(labels, CLASSES, torch.Generator().manual_seed(0), probability=0.1)
    assert torch.equal(labels, before)
    assert (dropped == CLASSES).float().mean().item() == pytest.approx(0.1, abs=0.01)
    assert torch.equal(dropped[dropped != CLASSES], labels[dropped != CLASSES])
    assert torch.equal(drop_labels(labels, CLASSES, torch.Generator(), probability=0.0), labels)


def test_probabilities_outside_zero_and_one_are_refused():
    for bad in (-0.1, 1.1, 20):
        with pytest.raises(ValueError, match="must lie in"):
            draw_keep_mask(2, 8, torch.Generator(), mask_ratio=bad)
        with pytest.raises(ValueError, match="must lie in"):
            drop_labels(torch.zeros(2), CLASSES, torch.Generator(), probability=bad)
