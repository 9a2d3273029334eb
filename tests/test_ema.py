"""EMA weights with constant decays."""

import pytest
import torch
import torch.nn as nn

from pixelrepa_diffusers.ema import ConstantDecayEMA


def make_module(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2, bias=False)).to(dtype)


def perturb(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter))


def parameters(module):
    return {name: p.detach().double() for name, p in module.named_parameters()}


def test_each_decay_is_constant_from_the_first_step():
    module, steps = make_module(), 6
    ema = ConstantDecayEMA(module, decays=(0.9, 0.0, 0.5))
    states = [parameters(module)]
    for _ in range(steps):
        perturb(module)
        ema.update(module)
        states.append(parameters(module))
    for decay in ema.decays:
        for name, average in ema.state_dict_for(decay).items():
            # In closed form: decay^k on the start, (1 − decay)·decay^(k−i) on the i-th state.
            expected = decay**steps * states[0][name]
            for step, state in enumerate(states[1:], start=1):
                expected = expected + (1 - decay) * decay ** (steps - step) * state[name]
            torch.testing.assert_close(average.double(), expected, rtol=1e-6, atol=1e-6)


def test_ema_of_a_bfloat16_module_is_float32():
    module = make_module(dtype=torch.bfloat16)
    ema = ConstantDecayEMA(module, decays=(0.9999,))
    perturb(module)
    ema.update(module)
    average = ema.state_dict_for(0.9999)["0.weight"]
    assert average.dtype == torch.float32
    assert not torch.equal(average, average.bfloat16().float())  # a step of 1e-4 is below bfloat16's resolution


def test_frozen_parameters_are_shared():
    module = make_module()
    module[0].requires_grad_(False)
    ema = ConstantDecayEMA(module, decays=(0.5, 0.9))
    perturb(module[2])
    ema.update(module)
    for decay in ema.decays:
        weights = ema.state_dict_for(decay)
        assert weights.keys() == dict(module.named_parameters()).keys()
        assert weights["0.weight"].data_ptr() == module[0].weight.data_ptr()
        assert not torch.equal(weights["2.weight"], module[2].weight)


def test_update_changes_nothing_in_the_module_and_skips_buffers():
    module = make_module()
    ema = ConstantDecayEMA(module, decays=(0.5,))
    perturb(module)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    ema.update(module)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    target = make_module(seed=1)
    missing, unexpected = target.load_state_dict(ema.state_dict_for(0.5), strict=False)
    assert not unexpected and all(name.startswith("1.") for name in missing)  # buffers only
    assert torch.equal(target[0].weight, ema.state_dict_for(0.5)["0.weight"])


def test_update_every_n_calls_uses_the_nth_power_of_the_decay():
    module = make_module()
    ema, rare = ConstantDecayEMA(module, (0.9,), update_every=3), ConstantDecayEMA(module, (0.9**3,))
    for step in range(1, 7):
        perturb(module)
        ema.update(module)
        if step % 3 == 0:
            rare.update(module)
    torch.testing.assert_close(ema.state_dict_for(0.9), rare.state_dict_for(0.9**3), rtol=0, atol=0)


@pytest.mark.parametrize("options", [{}, {"offload": True}, {"update_every": 2}])
def test_save_and_load_equals_straight_through(options, tmp_path):
    module = make_module()
    straight = ConstantDecayEMA(module, (0.9, 0.99), **options)
    resumed = ConstantDecayEMA(make_module(seed=1), (0.99, 0.9), **options)
    for step in range(1, 6):
        perturb(module)
        straight.update(module)
        if step == 3:
            torch.save(straight.state_dict(), tmp_path / "ema.pt")
            resumed.load_state_dict(torch.load(tmp_path / "ema.pt", weights_only=True))
        elif step > 3:
            resumed.update(module)
    torch.testing.assert_close(resumed.state_dict(), straight.state_dict(), rtol=0, atol=0)
