"""Exponential moving averages (EMAs) of a model's parameters with constant decays.

diffusers' `EMAModel` always warms its decay up; PixelREPA and JiT use a constant decay from the first step.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn as nn


class ConstantDecayEMA:
    r"""
    Maintain EMA weights m ← β·m + (1 − β)·p in float32 for several decays β, starting at the parameters' values.

    Buffers are not averaged, and frozen parameters are shared instead of copied. An update is one fused kernel per decay and
    does not synchronize with the device.

    Args:
        module (`nn.Module`): The module to follow, unwrapped (`accelerator.unwrap_model`).
        decays (`Sequence[float]`, *optional*, defaults to `(0.9999, 0.9996)`): Distinct decays in [0, 1), per optimizer
            step.
        update_every (`int`, *optional*, defaults to 1): Average only at every n-th `update`, with the equivalent decay βⁿ.
        offload (`bool`, *optional*, defaults to `False`): Keep the EMA weights in CPU memory. Each averaging step then
            copies the parameters to the CPU and synchronizes; combine it with `update_every`.
    """

    def __init__(
        self,
        module: nn.Module,
        decays: Sequence[float] = (0.9999, 0.9996),
        update_every: int = 1,
        offload: bool = False,
    ):
        self.decays, self.update_every, self.offload = tuple(decays), update_every, offload
        self.num_calls = 0
        self.names = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
        self.frozen = {name: p.detach() for name, p in module.named_parameters() if not p.requires_grad}
        self._followed = (None, [])
        parameters = self._parameters(module)
        self.averages = {decay: [parameter.detach().clone() for parameter in parameters] for decay in self.decays}

    def _parameters(self, module: nn.Module) -> list[torch.Tensor]:
        """Return the trained parameters in order, as float32 on the device of the EMA weights."""
        if module is not self._followed[0]:  # a walk through all modules takes as long as an update
            self._followed = (module, [parameter for parameter in module.parameters() if parameter.requires_grad])
        parameters = self._followed[1]
        if self.offload or any(parameter.dtype != torch.float32 for parameter in parameters):
            device = "cpu" if self.offload else None
            parameters = [parameter.to(device=device, dtype=torch.float32) for parameter in parameters]
        return parameters

    @torch.no_grad()
    def update(self, module: nn.Module, skipped: torch.Tensor | None = None) -> None:
        """
        Update the EMA weights from `module`; call it after every optimizer step.

        A true `skipped` (bool, on the device) leaves them as they are, without a device sync.
        """
        self.num_calls += 1
        if self.num_calls % self.update_every:
            return
        parameters = self._parameters(module)
        for decay, average in self.averages.items():
            weight = 1 - decay**self.update_every
            if skipped is not None:
                weight = [weight * ~skipped.to(average[0].device)] * len(average)
            torch._foreach_lerp_(average, parameters, weight)

    def state_dict_for(self, decay: float) -> dict[str, torch.Tensor]:
        """EMA weights by parameter name, float32, for `module.load_state_dict`; the tensors are not copies."""
        return self.frozen | dict(zip(self.names, self.averages[decay], strict=True))

    def state_dict(self) -> dict[str, Any]:
        """Return `{"num_calls": calls of update, "averages": {decay: {parameter name: EMA weight}}}`."""
        return {"num_calls": self.num_calls, "averages": {decay: self.state_dict_for(decay) for decay in self.decays}}

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Copy the EMA weights of [`state_dict`] into this object, which has the same decays."""
        for decay in self.decays:
            for name, average in zip(self.names, self.averages[decay], strict=True):
                average.copy_(state_dict["averages"][decay][name])
        self.num_calls = state_dict["num_calls"]
