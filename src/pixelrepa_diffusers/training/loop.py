"""The optimizer steps that the training scripts have in common."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import Accelerator

from ..ema import ConstantDecayEMA
from .arguments import TrainingArguments
from .reporting import StepMonitor
from .signals import StopRequest
from .step import PreparedBatches, StepResult, take_step


class TrainingLoop:
    """Base class of a trainer, which sets these attributes and decides what follows a step."""

    args: TrainingArguments
    accelerator: Accelerator
    objective: torch.nn.Module
    optimizer: torch.optim.Optimizer
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler
    ema: ConstantDecayEMA | None
    batches: PreparedBatches
    monitor: StepMonitor
    last_checkpoint: Path | None
    step: int
    max_train_steps: int

    def steps(self, stop: StopRequest) -> Iterator[tuple[StepResult, bool]]:
        """
        Take optimizer steps to the last, or to the one at which a signal stops the run. Yields the result of each and
        whether the run stops after it by a signal.
        """
        args, monitor, stopping = self.args, self.monitor, False
        self.objective.train()
        monitor.restart_clock(self.step)
        while self.step < self.max_train_steps and not stopping:
            logging_step = (self.step + 1) % args.logging_steps == 0 or self.step + 1 == self.max_train_steps
            learning_rate = self.lr_scheduler.get_last_lr()[0]
            result = take_step(
                args, self.accelerator, self.objective, self.optimizer, self.ema, self.batches, self.step, logging_step
            )
            self.lr_scheduler.step()
            self.step += 1
            monitor.add(self.step, result)
            if logging_step:
                monitor.report(self.step, result, learning_rate, self.last_checkpoint)
            stopping = stop.agreed(self.accelerator, now=logging_step)
            yield result, stopping
        monitor.bar.close()
