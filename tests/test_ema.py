import pytest
import torch
import torch.nn as nn

from pixelrepa_diffusers.ema import ConstantDecayEMA


def make_module(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2, bias=False)).to(dtype)


def disturb(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter))


def trajectory(steps):
    """(module, the states it goes through, the first included)."""
    module = make_module()
    states = [{name: p.detach().double() for name, p in module.named_parameters()}]
    for _ in range(steps):
        disturb(module)
        states.append({name: p.detach().double() for name, p in module.named_parameters()})
    return states


def load_parameters(module, state):
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(state[name])


def test_every_average_has_its_constant_decay_from_the_first_step():
    states = trajectory(6)
    module = make_module()
    ema = ConstantDecayEMA(module, decays=(0.9, 0.0, 0.5))
    for state in states[1:]:
        load_parameters(module, state)
        ema.update(module)
    for decay in (0.9, 0.0, 0.5):
        for name, average in ema.state_dict_for(decay).items():
            # The sum written out: decay^k on the start, (1 − decay)·decay^(k−i) on the i-th state.
            expected = decay**6 * states[0][name]
            for step, state in enumerate(states[1:], start=1):
                expected = expected + (1 - decay) * decay ** (6 - step) * state[name]
            torch.testing.assert_close(average.double(), expected, rtol=1e-6, atol=1e-6)


def test_the_averages_are_float32_even_of_a_bfloat16_module():
    module = make_module(dtype=torch.bfloat16)
    ema = ConstantDecayEMA(module, decays=(0.9999,))
    disturb(module)
    ema.update(module)
    average = ema.state_dict_for(0.9999)["0.weight"]
    assert average.dtype == torch.float32
    assert not torch.equal(average, average.bfloat16().float())  # a step of 1e-4 is below bfloat16's resolution


def test_updating_changes_neither_the_module_nor_its_buffers_and_averages_no_buffer():
    module = make_module()
    ema = ConstantDecayEMA(module, decays=(0.5,))
    disturb(module)
    module[1].running_mean.fill_(3.0)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    ema.update(module)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert list(ema.state_dict_for(0.5)) == [name for name, _ in module.named_parameters()]


def test_updating_every_n_calls_uses_the_nth_power_of_the_decay():
    states = trajectory(6)
    module, sparse = make_module(), make_module()
    ema, rare = ConstantDecayEMA(module, (0.9,), update_every=3), ConstantDecayEMA(sparse, (0.9**3,))
    for step, state in enumerate(states[1:], start=1):
        load_parameters(module, state)
        ema.update(module)
        if step % 3 == 0:
            load_parameters(sparse, state)
            rare.update(sparse)
    for name, average in ema.state_dict_for(0.9).items():
        torch.testing.assert_close(average, rare.state_dict_for(0.9**3)[name], rtol=0, atol=0)


@pytest.mark.parametrize("options", [{}, {"offload": True}, {"update_every": 2}])
def test_save_and_load_in_the_middle_equals_straight_through(options, tmp_path):
    module = make_module()
    straight = ConstantDecayEMA(module, (0.9, 0.99), **options)
    states = trajectory(5)
    for step, state in enumerate(states[1:], start=1):
        load_parameters(module, state)
        straight.update(module)
        if step == 3:
            torch.save(straight.state_dict(), tmp_path / "ema.pt")
            resumed = ConstantDecayEMA(make_module(seed=1), (0.99, 0.9), **options)
            resumed.load_state_dict(torch.load(tmp_path / "ema.pt", weights_only=True))
        elif step > 3:
            resumed.update(module)
    for decay in (0.9, 0.99):
        for name, average in straight.state_dict_for(decay).items():
            assert torch.equal(resumed.state_dict_for(decay)[name], average)


def test_an_average_loads_into_the_module():
    module = make_module()
    ema = ConstantDecayEMA(module, (0.5,))
    disturb(module)
    ema.update(module)
    target = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2, bias=False))
    missing, unexpected = target.load_state_dict(ema.state_dict_for(0.5), strict=False)
    assert not unexpected and all(name.startswith("1.") for name in missing)  # buffers alone
    torch.testing.assert_close(target[0].weight.detach(), ema.state_dict_for(0.5)["0.weight"], rtol=0, atol=0)


def test_a_state_of_other_decays_names_or_shapes_is_refused_and_changes_nothing():
    ema = ConstantDecayEMA(make_module(), (0.9, 0.99))
    before = [average.clone() for average in ema.averages[0.9]]
    with pytest.raises(ValueError, match=r"decays \[0.5\], needed are \[0.9, 0.99\]"):
        ema.load_state_dict(ConstantDecayEMA(make_module(1), (0.5,)).state_dict())
    other = ConstantDecayEMA(make_module(1), (0.9, 0.99)).state_dict()
    other["averages"][0.99]["0.weight"] = torch.zeros(2, 2)
    with pytest.raises(ValueError, match=r"decay 0.99 belong to another model: \['0.weight'\]"):
        ema.load_state_dict(other)
    del other["averages"][0.99]["0.weight"]
    with pytest.raises(ValueError, match=r"decay 0.99 belong to another model: \['0.weight'\]"):
        ema.load_state_dict(other)
    assert all(torch.equal(a, b) for a, b in zip(ema.averages[0.9], before, strict=True))


def test_a_wrapped_or_other_module_is_refused():
    module = make_module()
    ema = ConstantDecayEMA(module, (0.9,))
    with pytest.raises(ValueError, match="unwrap_model"):
        ema.update(nn.ModuleDict({"module": module}))


def test_an_unknown_decay_and_a_bad_interval_are_refused():
    with pytest.raises(ValueError, match=r"there are \(0.9,\)"):
        ConstantDecayEMA(make_module(), (0.9,)).state_dict_for(0.99)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        ConstantDecayEMA(make_module(), (0.9,), update_every=0)
