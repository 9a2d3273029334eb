# Copyright 2026 The pixelrepa_diffusers authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Exponential moving averages of a model's parameters with constant decays, several at once.

diffusers' `EMAModel` warms its decay up, even when told not to; the method's is constant from the first step.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn as nn


class ConstantDecayEMA:
    r"""
    For every decay β an average m ← β·m + (1 − β)·p of each parameter p, in float32, begun at the parameters' values.

    Parameters only: buffers are not averaged. An update is one fused kernel per decay, without waiting for the device.

    Args:
        module (`nn.Module`): The module to follow, unwrapped (`accelerator.unwrap_model`).
        decays (`Sequence[float]`, defaults to `(0.9999, 0.9996)`): Distinct decays in [0, 1), per optimizer step.
        update_every (`int`, defaults to 1): Average only at every n-th call of `update`, with the equivalent decay βⁿ:
            cheaper, and nearly the same average.
        offload (`bool`, defaults to `False`): Keep the averages in CPU memory. Every averaging step then copies the
            parameters to the CPU and waits for them; use it with `update_every`.
    """

    def __init__(
        self,
        module: nn.Module,
        decays: Sequence[float] = (0.9999, 0.9996),
        update_every: int = 1,
        offload: bool = False,
    ):
        if (
            not isinstance(decays, Sequence)
            or not decays
            or not all(isinstance(decay, int | float) and 0 <= decay < 1 for decay in decays)
            or len(set(decays)) < len(decays)
        ):
            raise ValueError(f"`decays` must be one or more distinct numbers in [0, 1), got {decays!r}.")
        decays = tuple(decays)
        if isinstance(update_every, bool) or not isinstance(update_every, int) or update_every < 1:
            raise ValueError(f"`update_every` must be an integer of at least 1, got {update_every!r}.")
        self.decays, self.update_every, self.offload = decays, update_every, offload
        self.num_calls = 0
        self.names = [name for name, _ in module.named_parameters()]
        parameters = self._parameters(module)
        self.averages = {decay: [parameter.clone() for parameter in parameters] for decay in decays}

    def _parameters(self, module: nn.Module) -> list[torch.Tensor]:
        """The module's parameters, in order, as float32 on the device of the averages."""
        device = "cpu" if self.offload else None
        return [parameter.detach().to(device=device, dtype=torch.float32) for parameter in module.parameters()]

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Takes the parameters of `module`, named as at construction, into the averages; after each optimizer step."""
        names = [name for name, _ in module.named_parameters()]
        if names != self.names:
            strangers = sorted(set(names) ^ set(self.names))[:3]
            raise ValueError(
                f"The module has other parameters than the one these averages were made for, among them {strangers}. "
                "Pass the same module, unwrapped (`accelerator.unwrap_model(model)`)."
            )
        self.num_calls += 1
        if self.num_calls % self.update_every:
            return
        parameters = self._parameters(module)
        for decay, average in self.averages.items():
            torch._foreach_lerp_(average, parameters, 1 - decay**self.update_every)

    def state_dict_for(self, decay: float) -> dict[str, torch.Tensor]:
        """{parameter name: average}, float32, for `module.load_state_dict`. The tensors are the averages themselves."""
        if decay not in self.averages:
            raise ValueError(f"No average with decay {decay!r}; there are {self.decays}.")
        return dict(zip(self.names, self.averages[decay], strict=True))

    def state_dict(self) -> dict[str, Any]:
        """{"num_calls": calls of `update`, "averages": {decay: {parameter name: average}}}."""
        return {
            "num_calls": self.num_calls,
            "averages": {decay: self.state_dict_for(decay) for decay in self.decays},
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """
        Takes over the averages of [`state_dict`]. Everything is checked first: on an error nothing has changed.

        Raises:
            ValueError: when decays, parameter names or shapes differ from those of this object.
        """
        if not isinstance(state_dict.get("averages"), Mapping) or not isinstance(state_dict.get("num_calls"), int):
            raise ValueError(
                'Not the state of these averages: needed are "num_calls", an integer, and "averages", got '
                f"{sorted(state_dict)}."
            )
        averages = state_dict["averages"]
        if set(averages) != set(self.decays):
            raise ValueError(
                f"The saved averages have the decays {sorted(averages)}, needed are {sorted(self.decays)}."
            )
        for decay in self.decays:
            own, saved = self.state_dict_for(decay), averages[decay]
            wrong = sorted(own.keys() ^ saved.keys()) or [n for n in own if own[n].shape != saved[n].shape]
            if wrong:
                raise ValueError(
                    f"The saved averages with decay {decay} belong to another model: {wrong[:3]} (of {len(wrong)}) are "
                    "missing, unknown or of another shape."
                )
        for decay in self.decays:
            for name, average in self.state_dict_for(decay).items():
                average.copy_(averages[decay][name])
        self.num_calls = state_dict["num_calls"]
