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
from pixelrepa_diffusers.files import discard_folder, only_writer, remove_incomplete, write_json
from pixelrepa_diffusers.guidance_jit import JiTGuidanceHead
from pixelrepa_diffusers.objective import PixelREPAObjective
from pixelrepa_diffusers.sampling import fetch_pipeline, load_pipeline
from pixelrepa_diffusers.training.builders import build_optimizer
from pixelrepa_diffusers.training.checkpoints import find_checkpoint, list_checkpoints
from pixelrepa_diffusers.training.data import DataArguments, ImageLoader, open_source
from pixelrepa_diffusers.training.draws import BatchDraws
from pixelrepa_diffusers.training.guidance_head import (
    GuidanceHeadArguments,
    HeadOnFrozenTransformer,
    generate_images,
    guided_pipeline,
    load_checkpoint,
    save_checkpoint,
    save_pipeline,
    write_samples,
)
from pixelrepa_diffusers.training.reporting import MetricLogger, StepMonitor
from pixelrepa_diffusers.training.step import PreparedBatches, take_step


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
            for folder in ("samples", *(path.relative_to(output_dir) for path in output_dir.glob("generated/*"))):
                remove_incomplete(output_dir / folder)
        accelerator.wait_for_everyone()
        return train(args, accelerator, output_dir)


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


def build_loader(args: GuidanceHeadArguments, accelerator: Accelerator, folder: str | Path, config) -> ImageLoader:
    source = open_source(DataArguments(train_data_dir=str(folder), unconditional=config.num_classes == 1))
    if source.num_classes != config.num_classes:
        raise ValueError(
            f"{folder} has {source.num_classes} classes, the transformer {config.num_classes}. Give the data it was "
            "trained on, or leave --train_data_dir out to train on the model's own images."
        )
    return ImageLoader(
        source,
        config.sample_size,
        args.train_batch_size,
        args.seed,
        center_crop=args.center_crop,
        random_flip=args.random_flip,
        on_bad_image=args.on_bad_image,
        accumulation_steps=args.gradient_accumulation_steps,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        num_workers=args.dataloader_num_workers,
    )


def train(args: GuidanceHeadArguments, accelerator: Accelerator, output_dir: Path) -> Path:
    checkpoint = find_checkpoint(output_dir, args.resume_from_checkpoint)
    accelerator.wait_for_everyone()

    # Models and images
    with accelerator.local_main_process_first():  # which downloads
        source, _ = fetch_pipeline(args.pipeline, args.revision)
        pipe = load_pipeline(source, "float32")
    pipe.set_progress_bar_config(disable=True)
    config = pipe.transformer.config
    trained = HeadOnFrozenTransformer(pipe.transformer, JiTGuidanceHead.from_transformer(pipe.transformer, args.depth))
    loader = build_loader(args, accelerator, args.train_data_dir or generate_images(args, accelerator, pipe), config)

    # Optimization
    max_train_steps, warmup_steps = args.resolved_steps(loader.batches_per_epoch)
    objective = PixelREPAObjective(trained)
    learning_rate = args.resolved_learning_rate(accelerator.num_processes)
    objective, optimizer = accelerator.prepare(objective, build_optimizer(args, objective, learning_rate))
    ema = ConstantDecayEMA(trained, args.ema_decays, args.ema_update_every) if args.use_ema else None
    step = 0
    if checkpoint is not None:
        progress = load_checkpoint(args, accelerator, ema, checkpoint)
        step = progress["step"]
        loader.load_state_dict(progress["loader"])
        logger.info(f"Resumed {checkpoint}.")
    for group in optimizer.param_groups:  # those of the command line take precedence over the saved ones
        group.update(lr=learning_rate, initial_lr=learning_rate)
    lr_scheduler = get_scheduler(
        args.lr_scheduler,
        optimizer,
        num_warmup_steps=warmup_steps,
        num_training_steps=max_train_steps,
        last_epoch=step - 1,
    )

    # Inputs and outputs
    draw = BatchDraws.from_arguments(args, config)
    batches = PreparedBatches(args, loader, draw, None, step, accelerator.device)
    accelerator.init_trackers("guidance_head", config={name: str(value) for name, value in args.saved().items()})
    metrics = MetricLogger(accelerator, output_dir, step)
    monitor = StepMonitor(args, accelerator, metrics, step, max_train_steps)
    if accelerator.is_main_process:
        write_json(output_dir / "arguments.json", args.saved())
    parameters = sum(parameter.numel() for parameter in trained.parameters())
    logger.info(
        f"Training a head of {parameters:,} parameters after {trained.head.config.depth} of {config.num_layers} blocks "
        f"for {max_train_steps} steps of {loader.global_batch_size} images."
    )

    objective.train()
    while step < max_train_steps:
        logging_step = (step + 1) % args.logging_steps == 0 or step + 1 == max_train_steps
        current_rate = lr_scheduler.get_last_lr()[0]
        result = take_step(args, accelerator, objective, optimizer, ema, batches, step, measure=logging_step)
        lr_scheduler.step()
        step += 1
        monitor.add(step, result)
        if logging_step:
            monitor.report(step, result, current_rate, checkpoint)
        finished = step == max_train_steps
        saving_step = finished or step % args.checkpointing_steps == 0
        sampling_step = args.validation_steps and (finished or step % args.validation_steps == 0)
        if saving_step:
            monitor.check_finite(step, objective, checkpoint)
        if sampling_step and accelerator.is_main_process:
            path = output_dir / "samples" / f"step-{step:07d}.png"
            write_samples(args, guided_pipeline(args, pipe, trained, ema), path)
        if saving_step:
            checkpoint = save_checkpoint(args, accelerator, ema, step, result.position)
            if accelerator.is_main_process and args.checkpoints_total_limit is not None:
                for old in list_checkpoints(output_dir)[: -args.checkpoints_total_limit]:
                    discard_folder(old)
        if saving_step or sampling_step:
            monitor.restart_clock(step)
    monitor.bar.close()

    folder = output_dir / "pipeline"
    save_pipeline(args, accelerator, source, guided_pipeline(args, pipe, trained, ema), folder, step)
    if accelerator.is_main_process:
        logger.info(f"Wrote {folder} and {metrics.plot()}.")
    accelerator.end_training()
    return folder


if __name__ == "__main__":
    run(lambda: main(parse(GuidanceHeadArguments, __doc__.partition("\n")[0])))
