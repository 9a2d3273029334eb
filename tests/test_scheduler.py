"""JiTFlowMatchScheduler: the published grid and solvers in diffusers' calling convention."""

import itertools

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from pixelrepa_diffusers import JiTFlowMatchScheduler


SAMPLE = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def integrate(scheduler, flow, sample, num_inference_steps):
    """Run the whole loop on the flow velocity `flow(sample, sigma)`."""
    scheduler.set_timesteps(num_inference_steps)
    for timestep in scheduler.timesteps:
        velocity = flow(sample, timestep / scheduler.config.num_train_timesteps)
        sample = scheduler.step(velocity, timestep, sample).prev_sample
    return sample


def cosine_flow(sample, sigma):
    return sample.cos() + sigma


@pytest.mark.parametrize("steps", [1, 2, 6, 10, 49, 50])
def test_times_are_bit_identical_to_the_published_float32_grid(steps):
    grid = torch.linspace(0.0, 1.0, steps + 1)
    euler, heun = JiTFlowMatchScheduler(solver="euler"), JiTFlowMatchScheduler()
    euler.set_timesteps(steps)
    heun.set_timesteps(steps)
    assert torch.equal((1 - euler.sigmas).float(), grid)
    # Heun calls the model at the start and the end of every step but the last.
    expected = torch.stack([time for step in itertools.pairwise(grid) for time in step][:-1])
    assert len(heun.timesteps) == 2 * steps - 1
    assert torch.equal((1 - heun.sigmas[:-1]).float(), expected)
    torch.testing.assert_close(heun.timesteps, 1000 * (1 - expected), rtol=1e-6, atol=0)
    assert (heun.timesteps[0], heun.sigmas[-1]) == (1000, 0)


def test_heun_equals_the_trapezoid_rule_with_an_euler_step_at_the_end():
    def flow(sample, sigma):
        return torch.sin(3 * sample) + sigma

    sample = SAMPLE
    for start, end in itertools.pairwise(torch.linspace(1, 0, 6)):
        velocity = flow(sample, start)
        if end > 0:
            velocity = (velocity + flow(sample + (end - start) * velocity, end)) / 2
        sample = sample + (end - start) * velocity
    torch.testing.assert_close(integrate(JiTFlowMatchScheduler(), flow, SAMPLE, 5), sample, rtol=0, atol=1e-6)


@pytest.mark.parametrize("solver", ["heun", "euler"])
@pytest.mark.parametrize("steps", [1, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_constant_prediction_is_reached_in_a_float32_state(solver, steps, dtype):
    image, start = SAMPLE.flip(0), SAMPLE.to(dtype)
    reached = integrate(JiTFlowMatchScheduler(solver=solver), lambda z, sigma: (z - image) / sigma, start, steps)
    assert reached.dtype == torch.float32
    torch.testing.assert_close(reached, image, rtol=0, atol=1e-5)


@pytest.mark.parametrize("with_begin_index", [False, True])
def test_sampling_can_start_at_any_step(with_begin_index):
    scheduler, states, sample = JiTFlowMatchScheduler(), [], SAMPLE
    scheduler.set_timesteps(5)
    for timestep in scheduler.timesteps:
        states.append(sample)
        sample = scheduler.step(cosine_flow(sample, timestep / 1000), timestep, sample).prev_sample
    # Model calls 3 and 4 have equal timesteps; 4 starts the third step.
    late, restarted = JiTFlowMatchScheduler(), states[4]
    late.set_timesteps(5)
    if with_begin_index:
        late.set_begin_index(4)
    for timestep in late.timesteps[4:]:
        restarted = late.step(cosine_flow(restarted, timestep / 1000), timestep, restarted).prev_sample
    assert torch.equal(restarted, sample)


def test_set_timesteps_clears_an_unfinished_step():
    scheduler = JiTFlowMatchScheduler()
    scheduler.set_timesteps(9)
    output = scheduler.step(SAMPLE, scheduler.timesteps[0], SAMPLE)
    scheduler.set_timesteps(9)
    (prev_sample,) = scheduler.step(SAMPLE, scheduler.timesteps[0], SAMPLE, return_dict=False)
    assert torch.equal(prev_sample, output.prev_sample)


def test_misuse_is_refused():
    with pytest.raises(ValueError, match="`solver`"):
        JiTFlowMatchScheduler(solver="rk4")
    scheduler = JiTFlowMatchScheduler()
    with pytest.raises(ValueError, match="Call `set_timesteps`"):
        scheduler.step(SAMPLE, 1000.0, SAMPLE)
    scheduler.set_timesteps(2)
    with pytest.raises(ValueError, match="must be an entry of"):
        scheduler.step(SAMPLE, 0, SAMPLE)
    with pytest.raises(ValueError, match="must be even"):
        scheduler.set_begin_index(1)


def test_scale_noise_is_the_straight_path():
    scheduler, image, noise = JiTFlowMatchScheduler(), SAMPLE, torch.full_like(SAMPLE, 1e30)
    assert torch.equal(scheduler.scale_noise(image, 0, noise), image)
    assert torch.equal(scheduler.scale_noise(image, 1000, noise), noise)
    mixed = scheduler.scale_noise(image, torch.tensor([0.0, 250.0]), image.flip(0))
    torch.testing.assert_close(mixed, torch.stack([image[0], 0.75 * image[1] + 0.25 * image[0]]))


def test_saving_keeps_the_settings_and_copies_the_source_file(tmp_path):
    JiTFlowMatchScheduler(solver="euler", num_train_timesteps=500).save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"scheduler_config.json", "scheduling_jit.py"}
    loaded = JiTFlowMatchScheduler.from_pretrained(tmp_path)
    assert (loaded.config.solver, loaded.config.num_train_timesteps, len(loaded)) == ("euler", 500, 500)


def test_configurations_convert_to_and_from_other_schedulers():
    config = JiTFlowMatchScheduler(num_train_timesteps=500).config
    assert FlowMatchEulerDiscreteScheduler.from_config(config).config.num_train_timesteps == 500
    unipc = UniPCMultistepScheduler.from_config(config, prediction_type="flow_prediction", use_flow_sigmas=True)
    assert unipc.config.use_flow_sigmas
    assert JiTFlowMatchScheduler.from_config(unipc.config).config.num_train_timesteps == 500
