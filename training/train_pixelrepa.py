"""Train a JiT with PixelREPA (arXiv 2603.14366), or as plain JiT, with REPA or with iREPA.

The published B/16 recipe on ImageNet at 256 pixels, 8 GPUs:

    accelerate launch --config_file training/accelerate/8gpu.yaml training/train_pixelrepa.py \
        --config training/configs/pixelrepa_b16.yaml --train_data_dir /path/to/imagenet/train

A tiny run on any CPU, with one sub-folder of images per class and any small DINOv2 as the teacher:

    accelerate launch --config_file training/accelerate/cpu.yaml training/train_pixelrepa.py --preset JiT-Digits/4 \
        --train_data_dir photos --teacher_model_name_or_path teacher --train_batch_size 16 --max_train_steps 20 \
        --lr_warmup_steps 5 --checkpointing_steps 10 --validation_steps 10 --validation_inference_steps 10

Outputs in --output_dir: checkpoint-N/ (transformer, EMAs and adapter as diffusers folders, optimizer, position in the data),
samples/step-N.png, metrics.jsonl, curves.png, and at the end pipeline/, which `DiffusionPipeline.from_pretrained` loads.

Every random draw is a function of (seed, step, image): neither the number of processes and workers nor a restart changes
the run. (Dropout, used by JiT-H only, is keyed by (seed, step, process, micro-step).)
"""

from __future__ import annotations

import contextlib
import json
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
from diffusers.optimization import get_scheduler
from torch.distributed.fsdp import MixedPrecisionPolicy

from pixelrepa_diffusers.cli import check_launch, run
from pixelrepa_diffusers.ema import ConstantDecayEMA
from pixelrepa_diffusers.files import only_writer, remove_incomplete, write_json
from pixelrepa_diffusers.hub import BackgroundPusher
from pixelrepa_diffusers.sampling import check_cuda_graphs
from pixelrepa_diffusers.training.arguments import TrainingArguments, parse_arguments
from pixelrepa_diffusers.training.builders import (
    add_lora,
    apply_switches,
    build_loader,
    build_objective,
    build_optimizer,
    build_projector,
    build_teacher,
    build_transformer,
    load_pretrained,
    transformer_config,
)
from pixelrepa_diffusers.training.checkpoints import Checkpointer, find_checkpoint
from pixelrepa_diffusers.training.data import ImageSource, StreamSource, merge_states, open_source, random_words
from pixelrepa_diffusers.training.draws import BatchDraws
from pixelrepa_diffusers.training.dry_run import dry_run
from pixelrepa_diffusers.training.export import Exporter, build_pipeline, open_evaluation
from pixelrepa_diffusers.training.flops import flops_per_image
from pixelrepa_diffusers.training.loop import TrainingLoop
from pixelrepa_diffusers.training.reporting import MetricLogger, StepMonitor
from pixelrepa_diffusers.training.signals import StopRequest
from pixelrepa_diffusers.training.step import WEIGHT_DRAWS, PreparedBatches
from pixelrepa_diffusers.training.teacher_cache import CachedTeacher


logger = get_logger(__name__)


def main(args: TrainingArguments) -> Path | None:
    """Train and return the folder of the final pipeline (`None` after a dry run)."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S", level=logging.INFO)
    logging.getLogger("accelerate").setLevel(logging.WARNING)
    accelerator = create_accelerator(args)
    if args.dry_run:
        source = open_source(args) if args.train_data_dir is not None or args.dataset_name is not None else None
        accelerator.print(json.dumps(dry_run(args, accelerator.num_processes, source), indent=1, ensure_ascii=False))
        return None

    source, output_dir, pusher = open_source(args), Path(args.output_dir), None
    with contextlib.ExitStack() as stack:
        if accelerator.is_main_process:
            stack.enter_context(only_writer(output_dir))
            remove_incomplete(output_dir / "samples")
            remove_incomplete(output_dir / "hub")
            if args.push_to_hub:
                # Creates the repository now, so that a missing login ends the run before it starts.
                pusher = BackgroundPusher(
                    args.hub_model_id or output_dir.name,
                    private=args.hub_private_repo,
                    token=args.hub_token,
                    license=args.hub_license,
                )
                stack.enter_context(pusher)
        accelerator.wait_for_everyone()
        trainer = Trainer(args, accelerator, source, pusher)
        stack.callback(trainer.checkpointer.wait)  # also when training raises
        stop = stack.enter_context(StopRequest())
        trainer.train(stop)
        folder = trainer.finish()
        stop.exit_if_early(trainer.step, trainer.max_train_steps)
        if pusher is not None:
            pusher.push(folder)
    return folder


def create_accelerator(args: TrainingArguments) -> Accelerator:
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
    check_cuda_graphs(args.cuda_graphs and not args.dry_run, accelerator.device)
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


class Trainer(TrainingLoop):
    """A training run: everything that is built before the first step, and the loop."""

    def __init__(
        self,
        args: TrainingArguments,
        accelerator: Accelerator,
        source: ImageSource | StreamSource,
        pusher: BackgroundPusher | None,
    ):
        self.args, self.accelerator, self.output_dir = args, accelerator, Path(args.output_dir)
        device, num_classes = accelerator.device, source.num_classes
        checkpoint = self.agree_on_checkpoint()
        self.loader = build_loader(args, accelerator, source, transformer_config(args, num_classes)["sample_size"])
        self.max_train_steps, self.warmup_steps = args.resolved_steps(self.loader.batches_per_epoch)

        # Models
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.allow_tf32
        torch.manual_seed(int(random_words(args.seed, 0, 0, purpose=WEIGHT_DRAWS)[0]))
        transformer = build_transformer(args, num_classes)
        config = transformer.config
        teacher = build_teacher(args, config, device)
        pipeline = build_pipeline(args, transformer, source.id2label)
        spaces = open_evaluation(args, pipeline, device) if args.eval_steps else []
        projector = build_projector(args, config, teacher.feature_dim) if teacher is not None else None
        if args.pretrained_model_name_or_path is not None and (checkpoint is None or args.lora_rank):
            load_pretrained(args, transformer, projector, source.id2label)
        if args.lora_rank:
            add_lora(args, transformer)
        objective = build_objective(args, transformer, projector)
        flops = flops_per_image(objective, None if args.teacher_cache_dir is not None else teacher)
        apply_switches(args, objective)
        if args.compile and teacher is not None:
            teacher.compile()

        # Optimization
        optimizer = build_optimizer(args, objective, args.resolved_learning_rate(accelerator.num_processes))
        self.objective, self.optimizer = accelerator.prepare(objective, optimizer)
        self.ema = None
        if args.use_ema:
            transformer = accelerator.unwrap_model(self.objective).transformer
            self.ema = ConstantDecayEMA(transformer, args.ema_decays, args.ema_update_every, args.ema_offload)
        settings = {name: pipeline.config[name] for name in ("id2label", "guidance_scale", "guidance_interval")}
        self.checkpointer = Checkpointer(args, accelerator, self.objective, self.ema, self.optimizer, settings)
        self.step = 0
        if checkpoint is not None:
            progress = self.checkpointer.load(checkpoint)
            self.step = progress["step"]
            if self.step > self.max_train_steps:
                raise ValueError(f"{checkpoint} is beyond the {self.max_train_steps} steps of this run.")
            self.loader.load_state_dict(progress["loader"])
            logger.info(f"Resumed {checkpoint}.")
        # Not given to `accelerator.prepare`, which would step it once per process, and not saved: it is a function of the
        # step and the current arguments.
        self.lr_scheduler = get_scheduler(
            args.lr_scheduler, self.optimizer, None, self.warmup_steps, self.max_train_steps, last_epoch=self.step - 1
        )

        # Inputs
        teach = None
        if teacher is not None and args.teacher_cache_dir is not None:
            teach = CachedTeacher(teacher, args.teacher_cache_dir, len(source))
            self.loader.batch_transform = teach.file.read_into
        elif teacher is not None:
            teach = lambda pixel_values, batch: teacher(pixel_values)  # noqa: E731
        draw = BatchDraws.from_arguments(args, config)
        if args.compile and device.type == "cuda":
            draw.compile()
        self.batches = PreparedBatches(args, self.loader, draw, teach, self.step, device)

        # Outputs
        self.announce(source)
        accelerator.init_trackers(
            args.tracker_project_name,
            config={k: v if isinstance(v, int | float | str | bool) else str(v) for k, v in args.saved().items()},
        )
        self.metrics = MetricLogger(accelerator, self.output_dir, self.step)
        self.monitor = StepMonitor(args, accelerator, self.metrics, self.step, self.max_train_steps, flops)
        self.exporter = Exporter(
            args, accelerator, self.objective, self.ema, settings, self.metrics, spaces, pusher, self.step
        )

    @property
    def last_checkpoint(self) -> Path | None:
        return self.checkpointer.last

    def agree_on_checkpoint(self) -> Path | None:
        checkpoint = find_checkpoint(self.output_dir, self.args.resume_from_checkpoint)
        found = gather_object([str(checkpoint and checkpoint.name)])
        if len(set(found)) > 1:
            raise ValueError(f"--output_dir must be one folder that all machines see: they find {', '.join(found)}.")
        return checkpoint

    def announce(self, source: ImageSource | StreamSource) -> None:
        """Write arguments.json and log what the run consists of."""
        args, accelerator = self.args, self.accelerator
        for warning in args.warnings(self.max_train_steps, self.warmup_steps):
            logger.warning(warning)
        steps = {"resolved_steps": self.max_train_steps, "resolved_warmup_steps": self.warmup_steps}
        if accelerator.is_main_process:
            write_json(self.output_dir / "arguments.json", {**args.saved(), **steps})
        epoch = self.loader.batches_per_epoch
        parameters = sum(p.numel() for group in self.optimizer.param_groups for p in group["params"])
        facts = {
            "images": len(source) if epoch else f"{len(source.shard_names)} shards, {source.num_readers} readers",
            "classes": source.num_classes,
            "trainable parameters": f"{parameters:,}",
            "global batch": f"{self.loader.global_batch_size} ({args.train_batch_size} per process × "
            f"{args.gradient_accumulation_steps} accumulation steps × {accelerator.num_processes} processes)",
            "steps": f"{self.max_train_steps}, {self.warmup_steps} of them warmup",
            "epochs": f"{self.max_train_steps / epoch:.1f}" if epoch else "unknown",
            "learning rate": args.resolved_learning_rate(accelerator.num_processes),
            "device": f"{accelerator.device}, mixed precision {args.mixed_precision}",
        }
        logger.info("Training:" + "".join(f"\n  {name}: {value}" for name, value in facts.items()))

    def train(self, stop: StopRequest) -> None:
        """Train to the last step, or to the step at which a signal stops the run."""
        args, monitor, exporter = self.args, self.monitor, self.exporter
        for result, stopping in self.steps(stop):
            finished = self.step == self.max_train_steps
            saving_step = finished or stopping or self.step % args.checkpointing_steps == 0
            sampling_step = args.validation_steps and (finished or self.step % args.validation_steps == 0)
            evaluation_step = args.eval_steps and (finished or self.step % args.eval_steps == 0)
            pausing = saving_step or sampling_step or evaluation_step
            if pausing:
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
            if pausing:
                monitor.restart_clock(self.step)

    def finish(self) -> Path:
        """Write the pipeline and the curves, and return the pipeline's folder."""
        folder = self.output_dir / "pipeline"
        self.exporter.save_pipeline(folder, self.step)
        if self.accelerator.is_main_process:
            logger.info(f"Wrote {folder} and {self.metrics.plot()}.")
        self.checkpointer.wait()
        self.accelerator.end_training()
        return folder


if __name__ == "__main__":
    run(lambda: main(parse_arguments()))
