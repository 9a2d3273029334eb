"""The adapter and the baselines' projectors."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from tiny import perturbed

from pixelrepa_diffusers.adapter import ConvProjector, MaskedTransformerAdapter, MLPProjector


B, GRID, D, TEACHER_DIM, CLASSES = 3, 4, 32, 24, 5


def make_adapter(teacher_dim=TEACHER_DIM, in_context_len=2):
    torch.manual_seed(0)
    sizes = {"grid_size": GRID, "in_context_len": in_context_len, "num_classes": CLASSES}
    return perturbed(MaskedTransformerAdapter(D, 4, teacher_dim, **sizes))


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(B, GRID**2, D, generator=generator)
    return states, torch.rand(B, generator=generator), torch.tensor([0, 4, CLASSES])


@pytest.mark.parametrize(
    "projector",
    [make_adapter(), MLPProjector(D, TEACHER_DIM, projector_dim=16), ConvProjector(D, TEACHER_DIM, grid_size=GRID)],
    ids=lambda projector: type(projector).__name__,
)
def test_saved_projectors_load_to_the_same_function(projector, inputs, tmp_path):
    projector.eval().save_pretrained(tmp_path)
    loaded = type(projector).from_pretrained(tmp_path)
    for name in inspect.signature(type(projector)).parameters:
        assert loaded.config[name] == projector.config[name]
    features = projector(*inputs)
    assert features.shape == (B, GRID**2, TEACHER_DIM)
    torch.testing.assert_close(loaded(*inputs), features, rtol=0, atol=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]


def test_masked_tokens_are_replaced_by_the_mask_token(inputs):
    adapter = make_adapter()
    states, timestep, labels = inputs
    keep_mask = torch.rand(B, GRID**2, generator=torch.Generator().manual_seed(2)) > 0.5
    masked = adapter(states, timestep, labels, keep_mask)
    other = torch.where(keep_mask.unsqueeze(-1), states, torch.full_like(states, 1e3))
    torch.testing.assert_close(adapter(other, timestep, labels, keep_mask), masked, rtol=0, atol=0)
    by_hand = torch.where(keep_mask.unsqueeze(-1), states, adapter.mask_token)
    torch.testing.assert_close(adapter(by_hand, timestep, labels), masked, rtol=0, atol=0)
    assert not torch.allclose(adapter(states, timestep, labels), masked)


def test_mask_token_is_not_rounded_under_autocast(inputs):
    adapter = make_adapter()
    states, timestep, labels = inputs
    with torch.autocast("cpu", dtype=torch.bfloat16):
        nothing_kept = torch.zeros(B, GRID**2, dtype=torch.bool)
        masked = adapter(states.bfloat16(), timestep, labels, nothing_kept)
        expected = adapter(adapter.mask_token.expand_as(states), timestep, labels)
    torch.testing.assert_close(masked, expected, rtol=0, atol=0)


def test_mask_of_ones_equals_no_mask_and_gives_every_parameter_a_gradient(inputs):
    adapter = make_adapter()
    features = adapter(*inputs, torch.ones(B, GRID**2, dtype=torch.bool))
    torch.testing.assert_close(features, adapter(*inputs), rtol=0, atol=0)
    features.sum().backward()
    assert all(parameter.grad is not None for parameter in adapter.parameters())
    assert not adapter.mask_token.grad.any()


def test_projection_and_in_context_tokens_are_optional(inputs):
    adapter = make_adapter(teacher_dim=D, in_context_len=0)
    assert adapter.projection is None and not hasattr(adapter, "in_context_positions")
    assert adapter(*inputs).shape == (B, GRID**2, D)


def test_convolution_reads_the_token_grid_in_row_major_order(inputs):
    projector = ConvProjector(D, TEACHER_DIM, grid_size=GRID)
    features = projector(*inputs).unflatten(1, (GRID, GRID))
    padded = F.pad(inputs[0].unflatten(1, (GRID, GRID)), (0, 0, 1, 1, 1, 1))
    for row, column in ((0, 0), (1, 2), (3, 1)):
        window = padded[:, row : row + 3, column : column + 3]  # (B, 3, 3, D)
        expected = torch.einsum("bhwd,fdhw->bf", window, projector.projection.weight) + projector.projection.bias
        torch.testing.assert_close(features[:, row, column], expected, rtol=1e-5, atol=1e-6)
