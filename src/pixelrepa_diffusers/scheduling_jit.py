"""Sampling grid and solvers of JiT (arXiv 2511.13720) in diffusers' calling convention.

The method's time runs from noise (t = 0) to image (t = 1) on the grid t_k = k/N. diffusers counts the other way:
sigma = 1 − t, timestep = 1000·sigma, flow velocity = noise − image = −v.

The file is published beside the weights as remote code and imports only torch and diffusers.
"""

import inspect
import shutil
from pathlib import Path

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput


class JiTFlowMatchScheduler(SchedulerMixin, ConfigMixin):
    """
    Heun or Euler solver on the uniform grid t_k = k/N. The last step is always an Euler step, so N Heun steps take
    2N − 1 model calls (NFE).

    Args:
        num_train_timesteps (`int`, defaults to 1000): Factor between sigma in [0, 1] and diffusers' timesteps.
        solver (`str`, defaults to `"heun"`): `"heun"` or `"euler"`.

    Attributes:
        timesteps (`torch.Tensor` of shape `(NFE,)`): num_train_timesteps·(1 − t) of every model call.
        sigmas (`torch.Tensor` of shape `(NFE + 1,)`):
            1 − t of every model call, then 0; float64 on the CPU. 1 − sigma is then bit-identical to the float32 grid of
            the published code, which matters for the strict bounds of the guidance interval.
    """

    _compatibles = []

    @register_to_config
    def __init__(self, num_train_timesteps: int = 1000, solver: str = "heun"):
        if solver not in ("heun", "euler"):
            raise ValueError(f'`solver` must be "heun" or "euler", got {solver!r}.')
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
        """Index of the next model call, `None` before the first step."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """Index of the first model call, if `set_begin_index` was called."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """
        Start at model call `begin_index`. Without `set_begin_index`, `step` starts at the first timestep it is given.

        Args:
            begin_index (`int`, defaults to 0): Index into `timesteps`; even for the Heun solver.
        """
        if begin_index % self.order:
            raise ValueError(f"`begin_index` must be even, the start of a Heun step, got {begin_index}.")
        self._begin_index = begin_index

    def save_config(self, save_directory, push_to_hub: bool = False, **kwargs):
        """Save scheduler_config.json and a copy of this file, so that the scheduler loads without this package."""
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)
        source = Path(inspect.getfile(type(self)))
        shutil.copyfile(source, Path(save_directory) / source.name)

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """
        Set the timesteps of all model calls and clear the solver's state.

        Args:
            num_inference_steps (`int`): Number of steps N; 2N − 1 model calls with Heun, N with Euler.
            device (`str` or `torch.device`, *optional*): Device of `timesteps`. `sigmas` stay on the CPU.
        """
        grid = torch.linspace(0, 1, num_inference_steps + 1, dtype=torch.float32).double()
        sigmas = 1 - grid[:-1]
        if self.config.solver == "heun":
            # Interior grid points have two model calls: at the end of one step and at the start of the next.
            sigmas = torch.cat([sigmas[:1], sigmas[1:].repeat_interleave(2)])
        self.num_inference_steps = num_inference_steps
        self.sigmas = torch.cat([sigmas, sigmas.new_zeros(1)])
        self.timesteps = (sigmas * self.config.num_train_timesteps).to(torch.float32).to(device)
        self._reset()

    def index_for_timestep(self, timestep: float | torch.Tensor) -> int:
        """Return the index of the model call that starts a step at `timestep`: the last of equal timesteps."""
        matches = (self.timesteps == torch.as_tensor(timestep, device=self.timesteps.device)).nonzero()
        if len(matches) == 0:
            raise ValueError(f"`timestep` must be an entry of `scheduler.timesteps`, got {timestep}.")
        return matches[-1].item()

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[torch.Tensor]:
        """
        Move the sample to the noise level of the next model call, in float32.

        Args:
            model_output (`torch.Tensor`): Flow velocity noise − image, that is −v.
            timestep (`float` or `torch.Tensor`): Entry of `timesteps`, the timestep of the velocity.
            sample (`torch.Tensor`): Sample of the velocity.
            return_dict (`bool`, defaults to `True`): Whether to return a [`SchedulerOutput`] or a tuple.
        """
        if self.num_inference_steps is None:
            raise ValueError("Call `set_timesteps` before `step`.")
        if self._step_index is None:
            self._step_index = self.index_for_timestep(timestep) if self._begin_index is None else self._begin_index

        velocity, sample, index = model_output.float(), sample.float(), self._step_index
        if self._first_velocity is None:
            step_size = (self.sigmas[index + 1] - self.sigmas[index]).item()
            prev_sample = torch.add(sample, velocity, alpha=step_size)
            if self.config.solver == "heun" and index + 1 < len(self.timesteps):
                self._first_velocity, self._first_sample = velocity, sample
        else:
            step_size = (self.sigmas[index] - self.sigmas[index - 1]).item()
            mean_velocity = 0.5 * (self._first_velocity + velocity)
            prev_sample = torch.add(self._first_sample, mean_velocity, alpha=step_size)
            self._first_velocity = self._first_sample = None
        self._step_index += 1

        if not return_dict:
            return (prev_sample,)
        return SchedulerOutput(prev_sample=prev_sample)

    def scale_noise(self, sample: torch.Tensor, timestep: float | torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """
        Forward process z = t·x + (1 − t)·e with 1 − t = timestep / num_train_timesteps.

        Args:
            sample (`torch.Tensor` of shape `(batch_size, channels, height, width)`): x, in [-1, 1].
            timestep (`float` or `torch.Tensor` of shape `()` or `(batch_size,)`): In [0, num_train_timesteps].
            noise (`torch.Tensor` of the same shape as `sample`): e, already multiplied by the model's `noise_scale`.
        """
        sigma = torch.as_tensor(timestep, dtype=torch.float32, device=sample.device) / self.config.num_train_timesteps
        sigma = sigma.view(-1, *([1] * (sample.ndim - 1)))
        return (1 - sigma) * sample + sigma * noise

    def __len__(self) -> int:
        return self.config.num_train_timesteps
