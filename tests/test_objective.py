"""The training objective equals its equations; the random draws have their distributions."""

import pytest
import torch
from accelerate import Accelerator
from tiny import perturbed

from pixelrepa_diffusers.adapter import ConvProjector, MaskedTransformerAdapter, MLPProjector
from pixelrepa_diffusers.objective import PixelREPAObjective, draw_keep_mask, draw_timesteps, drop_labels
from pixelrepa_diffusers.training.builders import compile_blocks, compile_whole


B, SIZE, GRID, D, TEACHER_DIM, CLASSES, NOISE_SCALE = 3, 16, 4, 16, 24, 10, 2.0  # of conftest's transformer


@pytest.fixture
def transformer(make_transformer):
    return make_transformer(noise_scale=NOISE_SCALE)


@pytest.fixture
def adapter():
    torch.manual_seed(1)
    return perturbed(MaskedTransformerAdapter(D, 2, TEACHER_DIM, 2, GRID, in_context_len=2, num_classes=CLASSES))


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(2)
    return {
        "pixel_values": torch.rand(B, 3, SIZE, SIZE, generator=generator) * 2 - 1,
        "class_labels": torch.tensor([0, 3, CLASSES]),
        "timestep": torch.tensor([0.1, 0.5, 0.99]),  # the last one is clamped
        "noise": torch.randn(B, 3, SIZE, SIZE, generator=generator),
    }


@pytest.fixture
def features():
    return torch.randn(B, GRID**2, TEACHER_DIM, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def keep_mask():
    return draw_keep_mask(B, GRID**2, torch.Generator().manual_seed(4), mask_ratio=0.3)


def predict(transformer, batch, depth=None):
    """(z, x̂, h), image by image, with the scaled noise written out."""
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


def test_loss_is_the_velocity_error_plus_weighted_cosine_distance(transformer, adapter, batch, features, keep_mask):
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
def test_alignment_depth_selects_the_aligned_tokens(depth, transformer, batch, features):
    projector = MLPProjector(D, TEACHER_DIM, projector_dim=16)
    output = PixelREPAObjective(transformer, projector, alignment_depth=depth)(**batch, teacher_features=features)
    predicted = projector(predict(transformer, batch, depth)[2], batch["timestep"], batch["class_labels"])
    expected = 1 - torch.cosine_similarity(predicted, features, dim=-1).mean()
    torch.testing.assert_close(output.alignment_loss, expected)
    default = PixelREPAObjective(transformer, projector)(**batch, teacher_features=features)
    assert not torch.allclose(default.alignment_loss, output.alignment_loss, rtol=1e-5)


def test_spatial_norm_is_irepas(transformer, batch, features):
    projector = ConvProjector(D, TEACHER_DIM, grid_size=GRID)
    objective = PixelREPAObjective(transformer, projector, spatial_norm=0.8)
    normed = torch.stack([(f - 0.8 * f.mean(0)) / (f.std(0) + 1e-6) for f in features])
    expected = PixelREPAObjective(transformer, projector)(**batch, teacher_features=normed).alignment_loss
    torch.testing.assert_close(objective(**batch, teacher_features=features).alignment_loss, expected)
    half = objective(**batch, teacher_features=features.half()).alignment_loss
    widened = objective(**batch, teacher_features=features.half().float()).alignment_loss
    torch.testing.assert_close(half, widened, rtol=0, atol=0)


def test_with_alignment_off_projector_gradients_are_zero_and_the_others_those_of_plain_jit(
    make_transformer, adapter, batch, keep_mask
):
    """DDP waits for a gradient of every parameter."""
    objective, plain = PixelREPAObjective(make_transformer(), adapter), PixelREPAObjective(make_transformer())
    output, expected = objective(**batch, keep_mask=keep_mask), plain(**batch)
    assert output.alignment_loss is expected.alignment_loss is None
    assert output.loss == output.denoising_loss == expected.loss
    output.loss.backward()
    expected.loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in objective.projector.parameters())
    expected = {name: p.grad for name, p in plain.transformer.named_parameters()}
    actual = {name: p.grad for name, p in objective.transformer.named_parameters()}
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_both_losses_share_one_forward_pass_of_unmasked_tokens(transformer, adapter, batch, features):
    objective = PixelREPAObjective(transformer, adapter)
    calls = []
    transformer.register_forward_hook(lambda *_: calls.append(1))
    masks = torch.zeros(B, GRID**2, dtype=torch.bool), torch.ones(B, GRID**2, dtype=torch.bool)
    outputs = [objective(**batch, teacher_features=features, keep_mask=mask) for mask in masks]
    assert len(calls) == 2
    assert torch.equal(outputs[0].denoising_loss, outputs[1].denoising_loss)
    assert not torch.allclose(outputs[0].alignment_loss, outputs[1].alignment_loss)


def test_path_and_losses_are_float32_under_autocast(transformer, adapter, batch, features, keep_mask):
    objective = PixelREPAObjective(transformer, adapter)
    exact = objective(**batch, teacher_features=features, keep_mask=keep_mask)
    seen = []
    transformer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
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


def test_accelerate_carries_the_output_through_mixed_precision(transformer, adapter, batch, features, keep_mask):
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    objective = accelerator.prepare(PixelREPAObjective(transformer, adapter))
    output = objective(**batch, teacher_features=features, keep_mask=keep_mask)
    accelerator.backward(output.loss)
    assert output.loss.dtype == output.denoising_loss.dtype == output.alignment_loss.dtype == torch.float32
    assert objective(**batch).alignment_loss is None


@pytest.mark.parametrize("compile_parts", [compile_blocks, compile_whole])
def test_compiled_objective_has_the_same_gradients(make_transformer, batch, features, monkeypatch, compile_parts):
    compile_module = torch.nn.Module.compile  # traced like any other, without machine code
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda part, mode=None, **o: compile_module(part, **o, backend="eager")
    )

    def gradients(compiled: bool) -> dict:
        torch.manual_seed(0)
        adapter = MaskedTransformerAdapter(D, 2, TEACHER_DIM, 1, GRID, in_context_len=2, num_classes=CLASSES)
        objective = PixelREPAObjective(make_transformer(num_layers=2, in_context_start=1), perturbed(adapter))
        if compiled:
            compile_parts(objective)
        objective(**batch, teacher_features=features).loss.backward()
        return {name: parameter.grad for name, parameter in objective.named_parameters()}

    torch.testing.assert_close(gradients(compiled=True), gradients(compiled=False), rtol=1e-4, atol=1e-6)


def test_parts_that_do_not_fit_are_refused(transformer, adapter, batch, features):
    with pytest.raises(ValueError, match="do not match"):
        PixelREPAObjective(transformer, adapter)(**batch, teacher_features=features[:, 1:])
    with pytest.raises(ValueError, match="`grid_size` is 5"):
        PixelREPAObjective(transformer, ConvProjector(D, TEACHER_DIM, grid_size=5))
    with pytest.raises(ValueError, match="`hidden_size`"):
        PixelREPAObjective(transformer, MLPProjector(2 * D, TEACHER_DIM, projector_dim=16))
    with pytest.raises(ValueError, match="`alignment_depth`"):
        PixelREPAObjective(transformer, alignment_depth=4)


def test_public_draws_have_their_distributions_and_bounds():
    generator, labels = torch.Generator().manual_seed(0), torch.arange(20_000) % CLASSES
    timestep = draw_timesteps(20_000, generator, P_mean=-0.8, P_std=0.8)
    assert timestep.dtype == torch.float32 and timestep.min() > 0 and timestep.max() < 1
    assert timestep.logit().mean().item() == pytest.approx(-0.8, abs=0.02)
    assert timestep.logit().std().item() == pytest.approx(0.8, abs=0.02)
    keep_mask = draw_keep_mask(200, 256, generator, mask_ratio=0.2)
    assert keep_mask.float().mean().item() == pytest.approx(0.8, abs=0.01)
    assert keep_mask.sum(1).unique().numel() > 5  # not a fixed fraction of each image
    dropped = drop_labels(labels, CLASSES, generator, probability=0.1)
    assert (dropped == CLASSES).float().mean().item() == pytest.approx(0.1, abs=0.01)
    assert torch.equal(dropped[dropped != CLASSES], labels[dropped != CLASSES])
    for extreme in (0, 1):
        assert (draw_keep_mask(64, 256, generator, mask_ratio=extreme) == (not extreme)).all()
        assert ((drop_labels(labels, CLASSES, generator, extreme) == CLASSES) == bool(extreme)).all()
        assert (draw_timesteps(4, generator, P_mean=2e6 * extreme - 1e6) == extreme).all()
