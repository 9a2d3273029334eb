# Copyright 2026 The pixelrepa_diffusers authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The sampling grid and solvers of JiT (arXiv 2511.13720) in diffusers' calling convention.

The method's time runs from noise (t = 0) to image (t = 1) on the grid t_k = k/N. diffusers counts the other way:
sigma = 1 − t, timestep = 1000·sigma, flow velocity = noise − image = −v.

This file is published beside the weights as remote code: it imports torch and diffusers only.
"""

import inspect
import numbers
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput


@dataclass
class JiTFlowMatchSchedulerOutput(BaseOutput):
    """
    The output of [`JiTFlowMatchScheduler.step`].

    Args:
        prev_sample (`torch.Tensor` of shape `(batch_size, channels, height, width)`):
            The sample, float32, at the noise level of the next evaluation.
    """

    prev_sample: torch.Tensor


class JiTFlowMatchScheduler(SchedulerMixin, ConfigMixin):
    """
    Heun's or Euler's method on the uniform grid t_k = k/N, the last step always Euler's: N steps of Heun's method are
    2N − 1 evaluations.

    Parameters:
        num_train_timesteps (`int`, defaults to 1000): The factor between sigma in [0, 1] and diffusers timesteps.
        solver (`str`, defaults to `"heun"`): `"heun"` or `"euler"`.

    Attributes:
        timesteps (`torch.Tensor` of shape `(num_evaluations,)`): One entry per evaluation, num_train_timesteps·(1 − t).
        sigmas (`torch.Tensor` of shape `(num_evaluations + 1,)`): 1 − t of every evaluation, then 0. On the CPU in
            float64, so that 1 − sigma is the float32 grid of the published code to the last bit: guidance starts and
            stops at strict bounds that often lie on the grid.
    """

    _compatibles = []

    @register_to_config
    def __init__(self, num_train_timesteps: int = 1000, solver: str = "heun"):
        if solver not in ("heun", "euler"):
            raise ValueError(f'`solver` must be "heun" or "euler", got {solver!r}.')
        if (
            isinstance(num_train_timesteps, bool)
            or not isinstance(num_train_timesteps, int)
            or not 1 <= num_train_timesteps <= 2**20
        ):
            raise ValueError(
                f"`num_train_timesteps` must be a positive integer of at most {2**20}, got {num_train_timesteps!r}."
            )
        self.order = 2 if solver == "heun" else 1
        self.sigmas = torch.linspace(1, 0, num_train_timesteps + 1, dtype=torch.float64)
        self.timesteps = (self.sigmas[:-1] * num_train_timesteps).float()
        self.num_inference_steps: int | None = None
        self._reset()

    def _reset(self) -> None:
        self._step_index: int | None = None
        self._begin_index: int | None = None
        self._first_velocity: torch.Tensor | None = None
        self._first_sample: torch.Tensor | None = None

    @property
    def step_index(self) -> int | None:
        """The index of the next evaluation, `None` before the first step."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """The index of the first evaluation, set by a pipeline."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Starts at evaluation `begin_index`; without it the first timestep given to `step` decides."""
        last = len(self.timesteps) - 1
        if isinstance(begin_index, bool) or not isinstance(begin_index, int) or not 0 <= begin_index <= last:
            raise ValueError(f"`begin_index` must be an integer from 0 to {last}, got {begin_index!r}.")
        if begin_index % self.order:
            raise ValueError(
                f"`begin_index` must be even: Heun's method evaluates twice a step, and {begin_index} is amid one. Pass "
                f"{begin_index - 1} or {begin_index + 1}."
            )
        self._begin_index = begin_index

    def save_config(self, save_directory, push_to_hub: bool = False, **kwargs):
        """Writes scheduler_config.json and, beside it, this file: it can then be loaded without the package."""
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)
        source = Path(inspect.getfile(type(self)))
        shutil.copyfile(source, Path(save_directory) / source.name)

    @classmethod
    def _dict_from_json_file(cls, json_file):
        try:
            config = super()._dict_from_json_file(json_file)
        except RecursionError:  # what else is no JSON is diffusers' to tell
            raise ValueError(f"{json_file} is nested too deeply for a configuration.") from None
        if not isinstance(config, dict):
            raise ValueError(f"{json_file} must hold a JSON object, it holds a {type(config).__name__}.")
        return config

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """
        Lays out the evaluations of `num_inference_steps` steps.

        Args:
            num_inference_steps (`int`): N, at least 1. Heun's method evaluates the model 2N − 1 times, Euler's N times.
            device (`str` or `torch.device`, *optional*): Where `timesteps` is put. `sigmas` stay on the CPU.
        """
        if (
            isinstance(num_inference_steps, bool)
            or not isinstance(num_inference_steps, numbers.Integral)
            or num_inference_steps < 1
        ):
            raise ValueError(f"`num_inference_steps` must be an integer of at least 1, got {num_inference_steps!r}.")
        num_inference_steps = int(num_inference_steps)
        grid = torch.linspace(0, 1, num_inference_steps + 1, dtype=torch.float32).double()
        sigmas = 1 - grid[:-1]
        if self.config.solver == "heun":
            # An interior grid point is evaluated twice: at the end of one step and at the start of the next.
            sigmas = torch.cat([sigmas[:1], sigmas[1:].repeat_interleave(2)])
        self.num_inference_steps = num_inference_steps
        self.sigmas = torch.cat([sigmas, sigmas.new_zeros(1)])
        self.timesteps = (sigmas * self.config.num_train_timesteps).to(torch.float32).to(device)
        self._reset()

    def index_for_timestep(self, timestep: float | torch.Tensor) -> int:
        """The evaluation that starts a step at `timestep` (of an interior point's two evaluations, the second)."""
        matches = (self.timesteps == torch.as_tensor(timestep, device=self.timesteps.device)).nonzero()
        if len(matches) == 0:
            raise ValueError(
                f"{timestep} is not one of this scheduler's timesteps; pass an entry of `scheduler.timesteps`, which "
                f"run from {self.timesteps[0].item():g} to {self.timesteps[-1].item():g}."
            )
        return matches[-1].item()

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        return_dict: bool = True,
    ) -> JiTFlowMatchSchedulerOutput | tuple[torch.Tensor]:
        """
        Moves the sample to the noise level of the next evaluation, in float32.

        Args:
            model_output (`torch.Tensor`): Flow velocity, noise − image, that is −v.
            timestep (`float` or `torch.Tensor`): The entry of `timesteps` the velocity was evaluated at.
            sample (`torch.Tensor`): The sample the velocity was evaluated at.
            return_dict (`bool`, defaults to `True`): Return a [`JiTFlowMatchSchedulerOutput`] instead of a tuple.
        """
        if self.num_inference_steps is None:
            raise ValueError("Call `set_timesteps` before `step`.")
        if model_output.shape != sample.shape:
            raise ValueError(
                f"`model_output` and `sample` must have one shape, got {tuple(model_output.shape)} and "
                f"{tuple(sample.shape)}."
            )
        if isinstance(timestep, int) or (isinstance(timestep, torch.Tensor) and not timestep.is_floating_point()):
            raise ValueError(f"`timestep` must be an entry of `scheduler.timesteps`, not an index, got {timestep!r}.")
        if self._step_index is None:
            self._step_index = self.index_for_timestep(timestep) if self._begin_index is None else self._begin_index
        if self._step_index >= len(self.timesteps):
            raise ValueError(f"All {len(self.timesteps)} evaluations are done; call `set_timesteps` to start again.")

        velocity, sample = model_output.float(), sample.float()
        if self._first_velocity is None:
            start, end = self._step_index, self._step_index + 1
            prev_sample = torch.add(sample, velocity, alpha=self._width(start, end))
            if self.config.solver == "heun" and end < len(self.timesteps):
                self._first_velocity, self._first_sample = velocity, sample
        else:
            mean_velocity = 0.5 * (self._first_velocity + velocity)
            width = self._width(self._step_index - 1, self._step_index)
            prev_sample = torch.add(self._first_sample, mean_velocity, alpha=width)
            self._first_velocity = self._first_sample = None
        self._step_index += 1

        if not return_dict:
            return (prev_sample,)
        return JiTFlowMatchSchedulerOutput(prev_sample=prev_sample)

    def _width(self, start: int, end: int) -> float:
        return (self.sigmas[end] - self.sigmas[start]).item()

    def scale_noise(self, sample: torch.Tensor, timestep: float | torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """
        The forward process z = t·x + (1 − t)·e at sigma = 1 − t = timestep / num_train_timesteps.

        Args:
            sample (`torch.Tensor` of shape `(batch_size, channels, height, width)`): x, in [-1, 1].
            timestep (`float` or `torch.Tensor` of shape `()` or `(batch_size,)`): In [0, num_train_timesteps].
            noise (`torch.Tensor` of the same shape): e, already multiplied by the model's `noise_scale`.
        """
        if noise.shape != sample.shape:
            raise ValueError(
                f"`noise` and `sample` must have one shape, got {tuple(noise.shape)} and {tuple(sample.shape)}."
            )
        sigma = torch.as_tensor(timestep, dtype=torch.float32, device=sample.device) / self.config.num_train_timesteps
        if tuple(sigma.shape) not in ((), (1,), sample.shape[:1]):
            raise ValueError(
                f"`timestep` must be one number or have the shape ({len(sample)},), one for each image, got "
                f"{tuple(sigma.shape)}."
            )
        sigma = sigma.view(-1, *([1] * (sample.ndim - 1)))
        return (1 - sigma) * sample + sigma * noise

    def __len__(self) -> int:
        return self.config.num_train_timesteps
