"""The training loop of both scripts, and what every run needs before it: accelerator, optimizer, EMAs, reports."""

from __future__ import annotations

import logging
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    gather_object,
)
from diffusers import ModelMixin
from diffusers.optimization import get_scheduler
from torch.distributed.fsdp import MixedPrecisionPolicy

from ..cli import check_launch
from ..ema import ConstantDecayEMA
from .arguments import TrainingArguments
from .builders import build_optimizer
from .checkpoints import Checkpointer, find_checkpoint
from .data import ImageLoader, merge_states
from .export import Exporter
from .reporting import MetricLogger, StepMonitor, announce
from .signals import StopRequest
from .step import PreparedBatches, take_step


logger = get_logger(__name__)


def create_accelerator(args: TrainingArguments) -> Accelerator:
    """Set up log lines and the accelerator; `args.mixed_precision` becomes what accelerate's configuration says."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S", level=logging.INFO)
    logging.getLogger("accelerate").setLevel(logging.WARNING)
    trackers = [name for name in args.report_to if name != "none"]
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        log_with=None if args.dry_run else trackers or None,
        project_config=ProjectConfiguration(args.output_dir, logging_dir=str(Path(args.output_dir, args.logging_dir))),
        # The only buffers are position tables, which are equal everywhere.
        kwargs_handlers=[
            DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
            InitProcessGroupKwargs(timeout=timedelta(seconds=args.ddp_timeout)),
        ],
    )
    check_launch(accelerator.num_processes)
    args.mixed_precision = accelerator.mixed_precision
    if args.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise ValueError("--mixed_precision fp16 is not supported on CPU (accelerate silently falls back to fp32).")
    missing = set() if args.dry_run else {*trackers} - {getattr(t, "value", t) for t in accelerator.log_with} - {"all"}
    if missing:
        raise ImportError(f"--report_to {' '.join(missing)}: not installed.")
    if accelerator.distributed_type == DistributedType.FSDP:
        if not accelerator.is_fsdp2 or args.ema_offload or args.use_8bit_adam or args.lora_rank:
            raise ValueError(
                "FSDP needs `fsdp_version: 2`, as in training/accelerate/fsdp2.yaml, and none of --ema_offload, "
                "--use_8bit_adam and --lora_rank."
            )
        # Autocast selects dtypes as under DDP. accelerate's policy would also round images, noise, timesteps and position
        # tables, and reduce gradients in the compute dtype.
        accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    return accelerator


class TrainingLoop:
    """Base class of a trainer, which builds its models, calls [`prepare`] and sets `batches` and `exporter`."""

    batches: PreparedBatches
    exporter: Exporter

    def __init__(self, args: TrainingArguments, accelerator: Accelerator):
        self.args, self.accelerator, self.output_dir = args, accelerator, Path(args.output_dir)
        self.checkpoint = find_checkpoint(self.output_dir, args.resume_from_checkpoint)
        found = gather_object([str(self.checkpoint and self.checkpoint.name)])
        if len(set(found)) > 1:
            raise ValueError(f"--output_dir must be one folder that all machines see: they find {', '.join(found)}.")

    def prepare(
        self,
        objective: torch.nn.Module,
        models: dict[str, ModelMixin],
        loader: ImageLoader,
        settings: dict,
        flops: tuple[int, int] | None = None,
    ) -> None:
        """
        Prepare optimizer, EMAs, learning rate and reports, all from the checkpoint if there is one.

        Args:
            objective (`torch.nn.Module`): Loss of a batch.
            models (`dict[str, ModelMixin]`): The trained models by name; the EMAs follow the first.
            loader (`ImageLoader`): Batches of images.
            settings (`dict`): Class names and guidance of the pipeline, saved with every checkpoint.
            flops (`tuple[int, int]`, *optional*): FLOPs per image, see [`StepMonitor`].
        """
        args, accelerator = self.args, self.accelerator
        self.max_train_steps, warmup_steps = args.resolved_steps(loader.batches_per_epoch)
        optimizer = build_optimizer(args, objective, args.resolved_learning_rate(accelerator.num_processes))
        self.objective, self.optimizer = accelerator.prepare(objective, optimizer)
        self.ema = None
        if args.use_ema:
            followed = next(iter(models.values()))
            self.ema = ConstantDecayEMA(followed, args.ema_decays, args.ema_update_every, args.ema_offload)
        self.checkpointer = Checkpointer(args, accelerator, self.objective, models, self.ema, self.optimizer, settings)

        self.step = 0
        if self.checkpoint is not None:
            progress = self.checkpointer.load(self.checkpoint)
            self.step = progress["step"]
            if self.step > self.max_train_steps:
                raise ValueError(f"{self.checkpoint} is beyond the {self.max_train_steps} steps of this run.")
            loader.load_state_dict(progress["loader"])
            logger.info(f"Resumed {self.checkpoint}.")
        # Not given to `accelerator.prepare`, which would step it once per process, and not saved: it is a function of the
        # step and the current arguments.
        self.lr_scheduler = get_scheduler(
            args.lr_scheduler, self.optimizer, None, warmup_steps, self.max_train_steps, last_epoch=self.step - 1
        )
        announce(args, accelerator, loader, self.optimizer, self.max_train_steps, warmup_steps)
        self.metrics = MetricLogger(accelerator, self.output_dir, self.step)
        self.monitor = StepMonitor(args, accelerator, self.metrics, self.step, self.max_train_steps, flops)

    def run(self) -> Path:
        """
        Train and return the folder of the final pipeline.

        Raises:
            SystemExit: With 128 + the signal, if one stopped the run before its last step.
        """
        try:
            with StopRequest() as stop:
                self.train(stop)
                folder = self.finish()
        finally:
            self.checkpointer.wait()
        stop.exit_if_early(self.step, self.max_train_steps)
        return folder

    def train(self, stop: StopRequest) -> None:
        """Train to the last step, or to the step at which a signal stops the run."""
        args, accelerator, monitor, exporter = self.args, self.accelerator, self.monitor, self.exporter
        self.objective.train()
        monitor.restart_clock(self.step)
        stopping = False
        while self.step < self.max_train_steps and not stopping:
            logging_step = self.is_due(args.logging_steps, self.step + 1)
            learning_rate = self.lr_scheduler.get_last_lr()[0]
            result = take_step(
                args, accelerator, self.objective, self.optimizer, self.ema, self.batches, self.step, logging_step
            )
            self.lr_scheduler.step()
            self.step += 1
            monitor.add(self.step, result)
            if logging_step:
                monitor.report(self.step, result, learning_rate, self.checkpointer.last)
            stopping = stop.agreed(accelerator, now=logging_step)

            saving_step = stopping or self.is_due(args.checkpointing_steps, self.step)
            sampling_step = self.is_due(args.validation_steps, self.step)
            evaluation_step = self.is_due(args.eval_steps, self.step)
            if saving_step or sampling_step or evaluation_step:
                monitor.check_finite(self.step, self.objective, self.checkpointer.last)
                # Before the checkpoint: a run that is killed in between resumes from an earlier one and repeats them.
                if sampling_step:
                    exporter.write_samples(self.step)
                if evaluation_step:
                    exporter.evaluate(self.step)
                if saving_step:
                    self.checkpointer.save(self.step, merge_states(gather_object([result.position])))
                    if args.push_checkpoints:
                        exporter.push_checkpoint(self.step)
                monitor.restart_clock(self.step)
        monitor.bar.close()

    def is_due(self, every: int, step: int) -> bool:
        """Whether something that happens at every n-th step and the last one (0: never) happens at `step`."""
        return every > 0 and (step % every == 0 or step == self.max_train_steps)

    def finish(self) -> Path:
        """Write the pipeline and the curves, and return the pipeline's folder."""
        folder = self.output_dir / "pipeline"
        self.exporter.save_pipeline(folder, self.step)
        if self.accelerator.is_main_process:
            logger.info(f"Wrote {folder} and {self.metrics.plot()}.")
        self.checkpointer.wait()
        self.accelerator.end_training()
        return folder
