"""FSDP2 on CPU processes. As a script it runs another one, given with its arguments."""

from __future__ import annotations

import runpy
import sys

from accelerate import state
from accelerate.utils import DistributedType


_initialize = state.AcceleratorState.__init__


def _initialize_with_fsdp(self, *args, fsdp_plugin=None, **kwargs):
    _initialize(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
        state.PartialState._shared_state["distributed_type"] = self.distributed_type = DistributedType.FSDP
        self.fsdp_plugin = fsdp_plugin


def allow_fsdp_on_cpu() -> None:
    """Lift accelerate's refusal of FSDP without an accelerator; the rest of its FSDP code runs as on GPUs."""
    state.AcceleratorState.__init__ = _initialize_with_fsdp


if __name__ == "__main__":
    allow_fsdp_on_cpu()
    script, sys.argv = sys.argv[1], sys.argv[1:]
    runpy.run_path(script, run_name="__main__")
