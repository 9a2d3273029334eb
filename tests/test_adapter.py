import inspect

import pytest
import torch
import torch.nn.functional as F

from pixelrepa_diffusers.adapter import ConvProjector, MaskedTransformerAdapter, MLPProjector


B, GRID, D, TEACHER_DIM, CLASSES = 3, 4, 32, 24, 5


def make_adapter(**kwargs):
    torch.manual_seed(0)
    arguments = {"grid_size": GRID, "in_context_len": 2, "num_classes": CLASSES, **kwargs}
    adapter = MaskedTransformerAdapter(D, 4, arguments.pop("teacher_dim", TEACHER_DIM), **arguments)
    with torch.no_grad():  # adaLN-zero would make the blocks the identity
        for parameter in adapter.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return adapter


def make_projector(kind):
    torch.manual_seed(0)
    if kind is MLPProjector:
        return MLPProjector(D, TEACHER_DIM, projector_dim=16)
    if kind is ConvProjector:
        return ConvProjector(D, TEACHER_DIM, grid_size=GRID)
    return make_adapter()


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(B, GRID**2, D, generator=generator)
    return states, torch.rand(B, generator=generator), torch.tensor([0, 4, CLASSES])


KINDS = [MaskedTransformerAdapter, MLPProjector, ConvProjector]


@pytest.mark.parametrize("kind", KINDS)
def test_every_projector_takes_the_same_call_to_the_teachers_width(kind, inputs):
    assert make_projector(kind)(*inputs).shape == (B, GRID**2, TEACHER_DIM)


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_projector_loads_to_the_same_function(kind, inputs, tmp_path):
    projector = make_projector(kind).eval()
    projector.save_pretrained(tmp_path)
    loaded = kind.from_pretrained(tmp_path)
    for name in inspect.signature(kind).parameters:
        assert loaded.config[name] == projector.config[name]
    torch.testing.assert_close(loaded(*inputs), projector(*inputs), rtol=0, atol=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]


def test_what_lies_under_the_mask_does_not_reach_the_adapters_output(inputs):
    adapter = make_adapter()
    states, timestep, labels = inputs
    keep_mask = torch.rand(B, GRID**2, generator=torch.Generator().manual_seed(2)) > 0.5
    masked = adapter(states, timestep, labels, keep_mask)
    other = torch.where(keep_mask.unsqueeze(-1), states, torch.full_like(states, 1e3))
    torch.testing.assert_close(adapter(other, timestep, labels, keep_mask), masked, rtol=0, atol=0)
    by_hand = torch.where(keep_mask.unsqueeze(-1), states, adapter.mask_token)
    torch.testing.assert_close(adapter(by_hand, timestep, labels), masked, rtol=0, atol=0)
    assert not torch.allclose(adapter(states, timestep, labels), masked)


def test_a_mask_of_ones_equals_no_mask_and_gives_the_mask_token_a_gradient(inputs):
    adapter = make_adapter()
    features = adapter(*inputs, torch.ones(B, GRID**2, dtype=torch.bool))
    torch.testing.assert_close(features, adapter(*inputs), rtol=0, atol=0)
    features.sum().backward()
    assert all(parameter.grad is not None for parameter in adapter.parameters())
    assert not adapter.mask_token.grad.any()


def test_the_adapter_is_conditioned_on_time_and_class_by_tables_of_its_own(inputs):
    adapter = make_adapter()
    states, timestep, labels = inputs
    features = adapter(states, timestep, labels)
    later, relabelled = adapter(states, timestep + 0.2, labels), adapter(states, timestep, (labels + 1) % CLASSES)
    for changed in (later, relabelled):
        assert all(not torch.allclose(row, reference) for row, reference in zip(changed, features, strict=True))


def test_equal_widths_have_no_projection(inputs):
    adapter = make_adapter(teacher_dim=D)
    assert adapter.projection is None
    assert adapter(*inputs).shape == (B, GRID**2, D)


def test_an_adapter_without_in_context_tokens_works(inputs):
    adapter = make_adapter(in_context_len=0)
    assert not hasattr(adapter, "in_context_positions")
    assert adapter(*inputs).shape == (B, GRID**2, TEACHER_DIM)


def test_gradient_checkpointing_changes_no_gradient(inputs):
    gradients = []
    for checkpointing in (False, True):
        adapter = make_adapter()
        if checkpointing:
            adapter.enable_gradient_checkpointing()
        runs = []
        adapter.blocks[0].attn.register_forward_pre_hook(lambda *_, runs=runs: runs.append(1))
        adapter(*inputs).square().mean().backward()
        assert len(runs) == 1 + checkpointing
        gradients.append({name: p.grad for name, p in adapter.named_parameters() if p.grad is not None})
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=0)


def test_a_fresh_adapter_has_the_published_initialisation():
    torch.manual_seed(0)
    adapter = MaskedTransformerAdapter(256, 4, 24, grid_size=GRID, in_context_len=64, num_classes=500)
    for block in adapter.blocks:
        assert not block.modulation.weight.any() and not block.modulation.bias.any()
    for parameter in (adapter.mask_token, adapter.in_context_positions, adapter.conditioning.class_embedding.weight):
        assert parameter.std().item() == pytest.approx(0.02, rel=0.15)
    bound = (6 / (256 + 24)) ** 0.5
    assert bound * 0.98 < adapter.projection[3].weight.abs().max() <= bound
    assert not adapter.projection[3].bias.any()


def test_the_convolution_sees_the_token_grid_row_by_row(inputs):
    projector = make_projector(ConvProjector)
    features = projector(*inputs).unflatten(1, (GRID, GRID))
    padded = F.pad(inputs[0].unflatten(1, (GRID, GRID)), (0, 0, 1, 1, 1, 1))
    for row, column in ((0, 0), (1, 2), (3, 1)):
        window = padded[:, row : row + 3, column : column + 3]  # (B, 3, 3, D)
        expected = torch.einsum("bhwd,fdhw->bf", window, projector.projection.weight) + projector.projection.bias
        torch.testing.assert_close(features[:, row, column], expected, rtol=1e-5, atol=1e-6)


def test_the_mlp_treats_every_token_by_itself(inputs):
    projector = make_projector(MLPProjector)
    order = torch.randperm(GRID**2, generator=torch.Generator().manual_seed(3))
    shuffled = projector(inputs[0][:, order], *inputs[1:])
    torch.testing.assert_close(shuffled, projector(*inputs)[:, order])


def test_bad_input_is_refused(inputs):
    states, timestep, labels = inputs
    with pytest.raises(ValueError, match="multiple of 4"):
        MaskedTransformerAdapter(36, 6, 24)
    with pytest.raises(ValueError, match=r"`num_layers` must be .*, got 0"):
        MaskedTransformerAdapter(32, 4, 24, num_layers=0)
    adapter = make_adapter()
    for keep_mask in (torch.ones(B, GRID**2), torch.ones(B, GRID**2, 1, dtype=torch.bool)):
        with pytest.raises(ValueError, match="`keep_mask` must be a bool tensor"):
            adapter(states, timestep, labels, keep_mask)
    for kind in (MaskedTransformerAdapter, ConvProjector):
        with pytest.raises(ValueError, match="4×4 = 16 tokens"):
            make_projector(kind)(states[:, 1:], timestep, labels)
    for kind in (MLPProjector, ConvProjector):
        with pytest.raises(ValueError, match="no mask token"):
            make_projector(kind)(states, timestep, labels, torch.ones(B, GRID**2, dtype=torch.bool))
