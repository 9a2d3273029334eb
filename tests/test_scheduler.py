"""JiTFlowMatchScheduler: the published grid and solvers in diffusers' calling convention."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from pixelrepa_diffusers import JiTFlowMatchScheduler


def integrate(scheduler, flow, sample, num_inference_steps):
    """Runs the whole loop on the flow velocity `flow(sample, sigma)`."""
    scheduler.set_timesteps(num_inference_steps)
    for timestep in scheduler.timesteps:
        velocity = flow(sample, timestep / scheduler.config.num_train_timesteps)
        sample = scheduler.step(velocity, timestep, sample).prev_sample
    return sample


@pytest.mark.parametrize("solver, evaluations", [("heun", 99), ("euler", 50)])
def test_fifty_steps_are_the_published_number_of_evaluations(solver, evaluations):
    scheduler = JiTFlowMatchScheduler(solver=solver)
    scheduler.set_timesteps(50)
    assert len(scheduler.timesteps) == evaluations
    assert len(scheduler.sigmas) == evaluations + 1
    assert scheduler.timesteps[0] == 1000
    assert scheduler.sigmas[-1] == 0


@pytest.mark.parametrize("steps", [1, 2, 6, 10, 49, 50])
def test_times_are_the_published_float32_grid_to_the_last_bit(steps):
    grid = torch.linspace(0.0, 1.0, steps + 1)
    euler, heun = JiTFlowMatchScheduler(solver="euler"), JiTFlowMatchScheduler(solver="heun")
    euler.set_timesteps(steps)
    heun.set_timesteps(steps)
    assert torch.equal((1 - euler.sigmas).float(), grid)
    # Heun's method evaluates the start and the end of every step but the last.
    expected = [time for start in range(steps) for time in (grid[start], grid[start + 1])][: 2 * steps - 1]
    assert torch.equal((1 - heun.sigmas[:-1]).float(), torch.stack(expected))
    torch.testing.assert_close(heun.timesteps, 1000 * (1 - torch.stack(expected)), rtol=1e-6, atol=0)


def test_one_step_is_eulers_whatever_the_solver():
    noise = torch.randn(2, 3, 4, 4)
    results = [
        integrate(JiTFlowMatchScheduler(solver=solver), lambda sample, sigma: sample, noise, 1)
        for solver in ("heun", "euler")
    ]
    assert torch.equal(*results)


@pytest.mark.parametrize("solver, order", [("euler", 1), ("heun", 2)])
def test_the_error_falls_with_the_solvers_order(solver, order):
    # dz/dsigma = z·cos(sigma): the exact solution at sigma 0 is z·exp(−sin(1)). Heun's last, Euler, step is second
    # order too, as it is only one.
    def error(steps):
        sample = integrate(
            JiTFlowMatchScheduler(solver=solver), lambda z, sigma: z * math.cos(sigma), torch.ones(1, 1, 1, 1), steps
        )
        return abs(sample.item() - math.exp(-math.sin(1)))

    assert error(10) / error(20) == pytest.approx(2**order, rel=0.2)


@pytest.mark.parametrize("begin_index", [1, 3])
def test_heun_does_not_begin_amid_a_step(begin_index):
    # first and second evaluation would be at one time, of step after step: the sample would not move
    scheduler = JiTFlowMatchScheduler()
    scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match=f"must be even.* Pass {begin_index - 1} or {begin_index + 1}"):
        scheduler.set_begin_index(begin_index)
    euler = JiTFlowMatchScheduler(solver="euler")
    euler.set_timesteps(4)
    euler.set_begin_index(begin_index)


def test_heun_is_the_trapezoid_rule_written_out():
    def flow(sample, sigma):
        return torch.sin(3 * sample) + sigma

    noise = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    sample, grid = noise, torch.linspace(1, 0, 6)
    for start, end in itertools.pairwise(grid):
        velocity = flow(sample, start)
        if end > 0:
            velocity = (velocity + flow(sample + (end - start) * velocity, end)) / 2
        sample = sample + (end - start) * velocity
    torch.testing.assert_close(integrate(JiTFlowMatchScheduler(), flow, noise, 5), sample, rtol=0, atol=1e-6)


@pytest.mark.parametrize("solver", ["heun", "euler"])
def test_a_constant_prediction_is_reached_exactly(solver):
    image, noise = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    sample = integrate(JiTFlowMatchScheduler(solver=solver), lambda z, sigma: (z - image) / sigma, noise, 7)
    torch.testing.assert_close(sample, image, rtol=0, atol=1e-5)


def test_the_state_is_float32_whatever_comes_in():
    scheduler = JiTFlowMatchScheduler()
    scheduler.set_timesteps(4)
    sample = torch.randn(1, 3, 4, 4)
    for timestep in scheduler.timesteps:
        sample = scheduler.step(torch.randn(1, 3, 4, 4).bfloat16(), timestep, sample).prev_sample
        assert sample.dtype == torch.float32
    scheduler.set_timesteps(1)
    assert scheduler.step(sample.half(), scheduler.timesteps[0], sample.half()).prev_sample.dtype == torch.float32


def test_a_tuple_holds_what_the_output_holds():
    results = []
    for return_dict in (True, False):
        scheduler = JiTFlowMatchScheduler()
        scheduler.set_timesteps(3)
        results.append(
            scheduler.step(torch.ones(1, 1, 2, 2), scheduler.timesteps[0], torch.ones(1, 1, 2, 2), return_dict)
        )
    assert torch.equal(results[0].prev_sample, results[1][0])


def test_a_sample_may_enter_at_any_step():
    flow, noise = (lambda sample, sigma: sample.cos() + sigma), torch.randn(1, 1, 4, 4)
    scheduler = JiTFlowMatchScheduler()
    scheduler.set_timesteps(5)
    states, sample = [], noise
    for timestep in scheduler.timesteps:
        states.append(sample)
        sample = scheduler.step(flow(sample, timestep / 1000), timestep, sample).prev_sample
    for explicit in (False, True):
        # Evaluation 4 opens the third step: of its two evaluations at one time, 3 closed the second.
        late = JiTFlowMatchScheduler()
        late.set_timesteps(5)
        if explicit:
            late.set_begin_index(4)
        entered = states[4]
        for timestep in late.timesteps[4:]:
            entered = late.step(flow(entered, timestep / 1000), timestep, entered).prev_sample
        assert torch.equal(entered, sample)


def test_set_timesteps_starts_anew_in_the_middle_of_a_step():
    flow, noise = (lambda sample, sigma: sample.cos() + sigma), torch.randn(1, 1, 4, 4)
    expected = integrate(JiTFlowMatchScheduler(), flow, noise, 4)
    scheduler = JiTFlowMatchScheduler()
    scheduler.set_timesteps(9)
    scheduler.step(noise, scheduler.timesteps[0], noise)
    assert torch.equal(integrate(scheduler, flow, noise, 4), expected)
    assert torch.equal(integrate(copy.deepcopy(scheduler), flow, noise, 4), expected)


def test_numpy_integers_count_steps():
    scheduler = JiTFlowMatchScheduler()
    scheduler.set_timesteps(np.int64(3))
    assert len(scheduler.timesteps) == 5
    assert type(scheduler.num_inference_steps) is int


def test_misuse_of_step_is_refused_with_the_remedy():
    scheduler, sample = JiTFlowMatchScheduler(), torch.ones(1, 1, 2, 2)
    with pytest.raises(ValueError, match="Call `set_timesteps`"):
        scheduler.step(sample, 1000.0, sample)
    scheduler.set_timesteps(2)
    with pytest.raises(ValueError, match="not an index"):
        scheduler.step(sample, 0, sample)
    with pytest.raises(ValueError, match=r"123.0 is not one of .* run from 1000 to 500"):
        scheduler.step(sample, 123.0, sample)
    for timestep in scheduler.timesteps:
        scheduler.step(sample, timestep, sample)
    with pytest.raises(ValueError, match="All 3 evaluations are done"):
        scheduler.step(sample, scheduler.timesteps[-1], sample)


def test_scale_noise_is_the_straight_path():
    scheduler = JiTFlowMatchScheduler()
    image, noise = torch.randn(3, 3, 4, 4), torch.randn(3, 3, 4, 4)
    assert torch.equal(scheduler.scale_noise(image, 0, noise), image)
    assert torch.equal(scheduler.scale_noise(image, 1000, noise), noise)
    mixed = scheduler.scale_noise(image, torch.tensor([0.0, 250.0, 1000.0]), noise)
    torch.testing.assert_close(mixed[1], 0.75 * image[1] + 0.25 * noise[1])
    torch.testing.assert_close(mixed[::2], torch.stack([image[0], noise[2]]))


def test_it_survives_saving_and_brings_its_file(tmp_path):
    JiTFlowMatchScheduler(solver="euler", num_train_timesteps=500).save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"scheduler_config.json", "scheduling_jit.py"}
    loaded = JiTFlowMatchScheduler.from_pretrained(tmp_path)
    assert (loaded.config.solver, loaded.config.num_train_timesteps) == ("euler", 500)
    assert len(loaded) == 500


def test_configurations_convert_to_and_from_other_schedulers():
    config = JiTFlowMatchScheduler(num_train_timesteps=500).config
    assert FlowMatchEulerDiscreteScheduler.from_config(config).config.num_train_timesteps == 500
    unipc = UniPCMultistepScheduler.from_config(config, prediction_type="flow_prediction", use_flow_sigmas=True)
    assert unipc.config.use_flow_sigmas
    assert JiTFlowMatchScheduler.from_config(unipc.config).config.num_train_timesteps == 500
