"""Train a guidance head for a PixelREPA or JiT pipeline (self-guidance of a frozen model, arXiv 2607.29122).

On the model's own guided samples, which the script makes and keeps in --output_dir:

    accelerate launch --config_file training/accelerate/8gpu.yaml training/train_guidance_head.py \
        --pipeline FOLDER_OR_HUB_ID --num_generated_images 50000 --train_batch_size 32 --output_dir outputs/guidance_head

The pipeline of the demo, on any CPU:

    accelerate launch --config_file training/accelerate/cpu.yaml training/train_guidance_head.py \
        --pipeline outputs/demo/run/pipeline --num_generated_images 1500 --num_inference_steps 10 --max_train_steps 300 \
        --train_batch_size 64 --learning_rate 1e-3 --lr_warmup_steps 20 --ema_decays 0.98 --output_dir outputs/demo/head

Outputs in --output_dir: generated/, checkpoint-N/, samples/step-N.png, metrics.jsonl, curves.png, and at the end pipeline/,
the pipeline with its head, which `DiffusionPipeline.from_pretrained` loads. The transformer does not change.
"""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path

from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import DistributedType, ProjectConfiguration
from diffusers.optimization import get_scheduler

from pixelrepa_diffusers.cli import check_launch, parse, run
from pixelrepa_diffusers.ema import ConstantDecayEMA
from pixelrepa_diffusers.files import only_writer, remove_incomplete, write_atomically, write_json
from pixelrepa_diffusers.guidance_jit import JiTGuidanceHead
from pixelrepa_diffusers.objective import PixelREPAObjective
from pixelrepa_diffusers.pipeline_pixelrepa import PixelREPAPipeline
from pixelrepa_diffusers.sampling import fetch_pipeline, load_pipeline, sample_grid
from pixelrepa_diffusers.training.builders import build_loader, build_optimizer
from pixelrepa_diffusers.training.checkpoints import find_checkpoint
from pixelrepa_diffusers.training.data import DataArguments, open_source
from pixelrepa_diffusers.training.draws import BatchDraws
from pixelrepa_diffusers.training.guidance_head import (
    GuidanceHeadArguments,
    HeadOnFrozenTransformer,
    generate_images,
    guided_pipeline,
    load_checkpoint,
    save_checkpoint,
    save_pipeline,
)
from pixelrepa_diffusers.training.loop import TrainingLoop
from pixelrepa_diffusers.training.reporting import MetricLogger, StepMonitor
from pixelrepa_diffusers.training.signals import StopRequest
from pixelrepa_diffusers.training.step import PreparedBatches


logger = get_logger(__name__)


def main(args: GuidanceHeadArguments) -> Path:
    """Train and return the folder of the pipeline with its head."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S", level=logging.INFO)
    logging.getLogger("accelerate").setLevel(logging.WARNING)
    accelerator = create_accelerator(args)
    output_dir = Path(args.output_dir)
    with contextlib.ExitStack() as stack:
        if accelerator.is_main_process:
            stack.enter_context(only_writer(output_dir))
            for folder in (output_dir / "samples", *output_dir.glob("generated/*")):
                remove_incomplete(folder)
        accelerator.wait_for_everyone()
        trainer = HeadTrainer(args, accelerator)
        stop = stack.enter_context(StopRequest())
        trainer.train(stop)
        folder = trainer.finish()
        stop.exit_if_early(trainer.step, trainer.max_train_steps)
    return folder


def create_accelerator(args: GuidanceHeadArguments) -> Accelerator:
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        log_with=[name for name in args.report_to if name != "none"] or None,
        project_config=ProjectConfiguration(args.output_dir, logging_dir=str(Path(args.output_dir, "logs"))),
    )
    check_launch(accelerator.num_processes)
    if accelerator.distributed_type == DistributedType.FSDP:
        raise ValueError("A guidance head is too small to shard: use DDP, as in training/accelerate/8gpu.yaml.")
    return accelerator


class HeadTrainer(TrainingLoop):
    """A training run: everything that is built before the first step, and the loop."""

    def __init__(self, args: GuidanceHeadArguments, accelerator: Accelerator):
        self.args, self.accelerator, self.output_dir = args, accelerator, Path(args.output_dir)
        self.last_checkpoint = checkpoint = find_checkpoint(self.output_dir, args.resume_from_checkpoint)
        accelerator.wait_for_everyone()

        # Models and images
        with accelerator.local_main_process_first():  # which downloads
            self.source, _ = fetch_pipeline(args.pipeline, args.revision)
            self.pipe = pipe = load_pipeline(self.source, "float32")
        pipe.set_progress_bar_config(disable=True)
        config = pipe.transformer.config
        head = JiTGuidanceHead.from_transformer(pipe.transformer, args.depth)
        self.trained = HeadOnFrozenTransformer(pipe.transformer, head)
        folder = str(args.train_data_dir or generate_images(args, accelerator, pipe))
        images = open_source(DataArguments(train_data_dir=folder, unconditional=config.num_classes == 1))
        if images.num_classes != config.num_classes:
            raise ValueError(
                f"{folder} has {images.num_classes} classes, the transformer {config.num_classes}. Give the data it was "
                "trained on, or leave --train_data_dir out to train on the model's own images."
            )
        self.loader = build_loader(args, accelerator, images, config.sample_size)

        # Optimization
        self.max_train_steps, warmup_steps = args.resolved_steps(self.loader.batches_per_epoch)
        objective = PixelREPAObjective(self.trained)
        learning_rate = args.resolved_learning_rate(accelerator.num_processes)
        optimizer = build_optimizer(args, objective, learning_rate)
        self.objective, self.optimizer = accelerator.prepare(objective, optimizer)
        self.ema = ConstantDecayEMA(self.trained, args.ema_decays, args.ema_update_every) if args.use_ema else None
        self.step = 0
        if checkpoint is not None:
            progress = load_checkpoint(args, accelerator, self.ema, checkpoint)
            self.step = progress["step"]
            self.loader.load_state_dict(progress["loader"])
            logger.info(f"Resumed {checkpoint}.")
        for group in self.optimizer.param_groups:  # those of the command line take precedence over the saved ones
            group.update(lr=learning_rate, initial_lr=learning_rate)
        self.lr_scheduler = get_scheduler(
            args.lr_scheduler, self.optimizer, None, warmup_steps, self.max_train_steps, last_epoch=self.step - 1
        )

        # Inputs and outputs
        draw = BatchDraws.from_arguments(args, config)
        self.batches = PreparedBatches(args, self.loader, draw, None, self.step, accelerator.device)
        accelerator.init_trackers("guidance_head", config={name: str(value) for name, value in args.saved().items()})
        self.metrics = MetricLogger(accelerator, self.output_dir, self.step)
        self.monitor = StepMonitor(args, accelerator, self.metrics, self.step, self.max_train_steps)
        if accelerator.is_main_process:
            write_json(self.output_dir / "arguments.json", args.saved())
        logger.info(
            f"Training a head of {head.num_parameters():,} parameters after {head.config.depth} of {config.num_layers} "
            f"blocks for {self.max_train_steps} steps of {self.loader.global_batch_size} images."
        )

    def train(self, stop: StopRequest) -> None:
        """Train to the last step, or to the step at which a signal stops the run."""
        args, accelerator, monitor = self.args, self.accelerator, self.monitor
        for result, stopping in self.steps(stop):
            finished = self.step == self.max_train_steps
            saving_step = finished or stopping or self.step % args.checkpointing_steps == 0
            sampling_step = args.validation_steps and (finished or self.step % args.validation_steps == 0)
            pausing = saving_step or sampling_step
            if pausing:
                monitor.check_finite(self.step, self.objective, self.last_checkpoint)
            if sampling_step and accelerator.is_main_process:
                self.write_samples()
            if saving_step:
                self.last_checkpoint = save_checkpoint(args, accelerator, self.ema, self.step, result.position)
                logger.info(f"Wrote {self.last_checkpoint}.")
            if pausing:
                monitor.restart_clock(self.step)

    def guided_pipeline(self) -> PixelREPAPipeline:
        return guided_pipeline(self.args, self.pipe, self.trained, self.ema)

    def write_samples(self) -> None:
        """Write a grid of guided samples, from the same noise at every step."""
        args, path = self.args, self.output_dir / "samples" / f"step-{self.step:07d}.png"
        number, num_steps = args.num_validation_images, args.num_inference_steps
        grid = sample_grid(self.guided_pipeline(), number, num_steps, args.generation_batch_size)
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, lambda temporary: grid.save(temporary, "PNG"))

    def finish(self) -> Path:
        """Write the pipeline and the curves, and return the pipeline's folder."""
        folder = self.output_dir / "pipeline"
        save_pipeline(self.args, self.accelerator, self.source, self.guided_pipeline(), folder, self.step)
        if self.accelerator.is_main_process:
            logger.info(f"Wrote {folder} and {self.metrics.plot()}.")
        self.accelerator.end_training()
        return folder


if __name__ == "__main__":
    run(lambda: main(parse(GuidanceHeadArguments, __doc__.partition("\n")[0])))
