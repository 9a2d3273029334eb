"""Train a JiT with PixelREPA (arXiv 2603.14366), or as plain JiT, with REPA or with iREPA.

The published B/16 recipe on ImageNet at 256 pixels, 8 GPUs:

    accelerate launch --config_file training/accelerate/8gpu.yaml training/train_pixelrepa.py \
        --config training/configs/pixelrepa_b16.yaml --train_data_dir /path/to/imagenet/train

A tiny run on any CPU, on a folder with one sub-folder of images per class and any small DINOv2 as the teacher:

    accelerate launch --config_file training/accelerate/cpu.yaml training/train_pixelrepa.py --preset JiT-Digits/4 \
        --train_data_dir photos --teacher_model_name_or_path teacher --train_batch_size 16 --max_train_steps 20 \
        --lr_warmup_steps 5 --checkpointing_steps 10 --validation_steps 10 --validation_inference_steps 10

What is written to --output_dir: checkpoint-N/ (transformer, every EMA and the adapter as diffusers folders, optimizer,
position), samples/step-N.png, metrics.jsonl, curves.png, and at the end pipeline/, which
`DiffusionPipeline.from_pretrained` loads.

Every random draw is keyed by (seed, step, image), so neither the number of processes nor a restart changes the run, on the
same kind of device. (Dropout alone, in JiT-H, is keyed by (seed, step, process, micro-step).)
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, ProjectConfiguration, gather_object
from diffusers.optimization import get_scheduler
from torch.distributed.fsdp import MixedPrecisionPolicy
from tqdm.auto import tqdm

from pixelrepa_diffusers import JiTTransformer2DModel, get_preset
from pixelrepa_diffusers.cli import run
from pixelrepa_diffusers.ema import ConstantDecayEMA
from pixelrepa_diffusers.files import only_writer, remove_incomplete, write_json
from pixelrepa_diffusers.hub import BackgroundPusher
from pixelrepa_diffusers.training.arguments import TrainingArguments, parse_arguments
from pixelrepa_diffusers.training.builders import (
    apply_switches,
    build_objective,
    build_optimizer,
    build_projector,
    build_teacher,
    build_transformer,
    compare_classes,
    load_pretrained,
    load_pretrained_projector,
    transformer_config,
)
from pixelrepa_diffusers.training.checkpoints import Checkpointer, find_checkpoint
from pixelrepa_diffusers.training.data import (
    ImageLoader,
    ImageSource,
    StreamSource,
    check_global_batch,
    draws,
    open_source,
)
from pixelrepa_diffusers.training.reporting import (
    Exporter,
    Journal,
    build_pipeline,
    estimate_memory,
    open_evaluation,
    peak_memory,
    teacher_config,
)
from pixelrepa_diffusers.training.step import WEIGHT_DRAWS, LossRecord, prepared_batches, take_step
from pixelrepa_diffusers.training.teacher_cache import CachedTeacher


logger = get_logger(__name__)


def dry_run(args: TrainingArguments, accelerator: Accelerator, source: ImageSource | StreamSource | None) -> dict:
    """Prints, and returns, what the run would be; without data the preset's classes and ImageNet's size are assumed."""
    num_classes = source.num_classes if source else args.num_classes or get_preset(args.preset).num_classes
    num_images = len(source) if isinstance(source, ImageSource) else 1_281_167
    num_processes = args.dry_run_processes or accelerator.num_processes
    check_global_batch(num_images, args.train_batch_size, args.gradient_accumulation_steps, num_processes)
    batch = args.global_batch_size(num_processes)
    steps, warmup = args.resolved_steps(num_images // batch)
    count = {}
    with torch.device("meta"):
        transformer = JiTTransformer2DModel.from_config(transformer_config(args, num_classes))
        count["transformer"] = sum(p.numel() for p in transformer.parameters())
        count["projector"] = count["teacher (frozen)"] = 0
        if args.objective != "none":
            config = teacher_config(args)
            projector = build_projector(args, transformer.config, config.hidden_size)
            count["projector"] = sum(p.numel() for p in projector.parameters())
            count["teacher (frozen)"] = sum(p.numel() for p in transformers.AutoModel.from_config(config).parameters())
    memory = estimate_memory(args, transformer.config, *count.values())
    report = {
        "arguments": args.saved(),
        "transformer": {k: v for k, v in transformer.config.items() if not k.startswith("_")},
        "parameters": count,
        "images": num_images,
        "processes": num_processes,
        "global_batch_size": batch,
        "learning_rate": args.resolved_learning_rate(num_processes),
        "steps": steps,
        "warmup_steps": warmup,
        "epochs": round(steps * batch / num_images, 2),
        "doubts": args.doubts(steps, warmup),
        "memory_GiB": {name: round(value, 2) for name, value in {**memory, "sum": sum(memory.values())}.items()},
    }
    accelerator.print(json.dumps(report, indent=1, ensure_ascii=False))
    return report


class StopRequest:
    """SIGTERM and Ctrl-C ask for a checkpoint and an orderly end; a second Ctrl-C interrupts at once."""

    def __init__(self):
        self.received: str | None = None

    def __call__(self, number: int, frame) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name


def agreed(stop: StopRequest, accelerator: Accelerator, now: bool) -> str | None:
    """The signal to stop at. Several processes must stop at one step: they compare when it is `now`, on all of them."""
    if accelerator.num_processes == 1:
        return stop.received
    return next((name for name in gather_object([stop.received]) if name), None) if now else None


@contextlib.contextmanager
def stop_signals() -> Iterator[StopRequest]:
    request = StopRequest()
    before = {number: signal.signal(number, request) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def prepare_fsdp(args: TrainingArguments, accelerator: Accelerator) -> None:
    """Refuses what FSDP cannot do, and leaves the choice of types to autocast as under DDP.

    accelerate's own policy rounds whatever enters the objective, images, noise, times and position tables, and reduces
    gradients in the compute type.
    """
    if not accelerator.is_fsdp2:
        raise ValueError(
            "FSDP version 1 is not supported: set `fsdp_version: 2`, as training/accelerate/fsdp2.yaml does."
        )
    if args.ema_offload:
        raise ValueError(
            "--ema_offload does not work with FSDP, which shards the averages over the GPUs: leave it out."
        )
    accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(cast_forward_inputs=False)


def main(args: TrainingArguments) -> Path | None:
    """Trains as the arguments say and returns the folder of the final pipeline (None after a dry run or a stop)."""
    output_dir = Path(args.output_dir)
    trackers = [name for name in args.report_to if name != "none"]
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        log_with=None if args.dry_run else trackers or None,
        project_config=ProjectConfiguration(
            project_dir=args.output_dir, logging_dir=str(output_dir / args.logging_dir)
        ),
        # The only buffers are position tables, equal everywhere.
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)],
    )
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S", level=logging.INFO)
    if accelerator.num_processes != int(os.environ.get("WORLD_SIZE", 1)):
        raise RuntimeError(
            f"The launcher asked for {os.environ['WORLD_SIZE']} processes, but accelerate runs {accelerator.num_processes}. "
            "For several CPU processes see training/accelerate/cpu_2processes.yaml."
        )
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise ValueError(
            "--mixed_precision fp16 cannot be had on cpu: accelerate would train in float32 without a word. Ask for bf16 or "
            "no, or train on a GPU."
        )
    absent = {} if args.dry_run else {*trackers} - {getattr(t, "value", t) for t in accelerator.log_with} - {"all"}
    if absent:
        raise ImportError(
            f"--report_to {' '.join(absent)}: not installed, nothing would be recorded. Install or drop it."
        )
    if accelerator.distributed_type == DistributedType.FSDP:
        prepare_fsdp(args, accelerator)
    args.mixed_precision = accelerator.mixed_precision
    with_data = args.train_data_dir is not None or args.dataset_name is not None
    source = open_source(args) if with_data or not args.dry_run else None
    if args.dry_run:
        dry_run(args, accelerator, source)
        return None

    with contextlib.ExitStack() as stack:
        if accelerator.is_main_process:
            stack.enter_context(only_writer(output_dir))
            remove_incomplete(output_dir / "samples")
            remove_incomplete(output_dir / "hub")
        accelerator.wait_for_everyone()
        pusher = None
        if args.push_to_hub and accelerator.is_main_process:
            # Left after the run, it waits for what is being pushed, and says what was not.
            pusher = stack.enter_context(
                BackgroundPusher(
                    args.hub_model_id or output_dir.name, private=args.hub_private_repo, token=args.hub_token
                )
            )
        stop = stack.enter_context(stop_signals())
        return train(args, accelerator, source, output_dir, stop, pusher)


def train(
    args: TrainingArguments,
    accelerator: Accelerator,
    source: ImageSource | StreamSource,
    output_dir: Path,
    stop: StopRequest,
    pusher: BackgroundPusher | None,
) -> Path | None:
    device = accelerator.device
    checkpoint = find_checkpoint(output_dir, args.resume_from_checkpoint, logger.warning)
    found = gather_object([str(checkpoint and checkpoint.name)])
    if len(set(found)) > 1:
        raise RuntimeError(
            f"The processes would start from different checkpoints ({', '.join(found)}): --output_dir must be one folder "
            "that all machines see."
        )
    num_classes = source.num_classes
    loader = ImageLoader(
        source,
        transformer_config(args, num_classes)["sample_size"],
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
    max_train_steps, warmup_steps = args.resolved_steps(loader.batches_per_epoch)
    for doubt in args.doubts(max_train_steps, warmup_steps):
        logger.warning(doubt)

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.allow_tf32
    torch.manual_seed(int(draws(args.seed, 0, 0, purpose=WEIGHT_DRAWS)[0]))
    transformer = build_transformer(args, num_classes)
    config = transformer.config
    num_tokens = (config.sample_size // config.patch_size) ** 2
    teacher = build_teacher(args, config, device)
    plan = build_pipeline(args, transformer, source.id2label)  # refuses wrong guidance or names now
    spaces = open_evaluation(args, plan, device) if args.eval_steps else []
    projector = build_projector(args, config, teacher.feature_dim) if teacher is not None else None
    if args.pretrained_model_name_or_path is not None and checkpoint is None:
        compare_classes(args, source.id2label)
        load_pretrained(args, "transformer", transformer)
        if projector is not None:
            load_pretrained_projector(args, projector)
    objective = build_objective(args, transformer, projector)
    apply_switches(args, objective)
    if args.compile and teacher is not None:
        teacher.compile()

    optimizer = build_optimizer(args, objective, args.resolved_learning_rate(accelerator.num_processes))
    objective, optimizer = accelerator.prepare(objective, optimizer)
    transformer = accelerator.unwrap_model(objective).transformer
    ema = None
    if args.use_ema:
        ema = ConstantDecayEMA(
            transformer,
            args.ema_decays,
            update_every=args.ema_update_every,
            offload=args.ema_offload,
        )
    checkpointer = Checkpointer(args, accelerator, objective, ema, optimizer)

    step = 0
    if checkpoint is not None:
        progress = checkpointer.load(checkpoint)
        step = progress["step"]
        loader.load_state_dict(progress["loader"])
        logger.info(f"Resumed {checkpoint}.")
    # Outside `prepare`, where accelerate would step it once for every process, and out of the checkpoint: it is a function
    # of the step and of the arguments in force now.
    lr_scheduler = get_scheduler(
        args.lr_scheduler,
        optimizer,
        num_warmup_steps=warmup_steps,
        num_training_steps=max_train_steps,
        last_epoch=step - 1,
    )
    if step > max_train_steps:
        raise ValueError(f"{checkpoint} is at step {step}, beyond the {max_train_steps} steps asked for.")
    if accelerator.is_main_process:
        resolved = {**args.saved(), "resolved_steps": max_train_steps, "resolved_warmup_steps": warmup_steps}
        write_json(output_dir / "arguments.json", resolved)
        logger.info("Arguments: " + json.dumps(resolved))
    accelerator.init_trackers(
        args.tracker_project_name,
        config={k: v if isinstance(v, int | float | str | bool) else str(v) for k, v in args.saved().items()},
    )
    journal = Journal(accelerator, output_dir, step)
    last_checkpoint = checkpoint

    exporter = Exporter(args, accelerator, objective, ema, source.id2label, journal, spaces, pusher, step)
    losses = LossRecord(accelerator)

    teach = None
    if teacher is not None and args.teacher_cache_dir is not None:
        teach = CachedTeacher(teacher, args.teacher_cache_dir, len(source))
    elif teacher is not None:
        teach = lambda pixel_values, batch: teacher(pixel_values)  # noqa: E731
    batches = prepared_batches(args, loader, teach, step, num_tokens, num_classes, device)
    bar = tqdm(total=max_train_steps, initial=step, desc="steps", disable=not accelerator.is_local_main_process)
    skipped_images = skipped_steps = 0
    objective.train()
    started, started_step = time.perf_counter(), step
    stopping = None
    while step < max_train_steps and stopping is None:
        logs = (step + 1) % args.logging_steps == 0 or step + 1 == max_train_steps
        learning_rate = lr_scheduler.get_last_lr()[0]
        taken = take_step(args, accelerator, objective, optimizer, transformer, ema, batches, step, wants_norm=logs)
        lr_scheduler.step()
        step += 1
        bar.update()
        skipped_images += taken.skipped_images
        if taken.skipped:
            skipped_steps += 1
            images = sorted(gather_object(taken.images))
            logger.warning(f"Step {step} was skipped: its gradient is not finite. Its images were {images}.")
        else:
            losses.add(taken.losses, taken.images)

        if logs and losses:
            total, denoising, alignment = losses.check(step, last_checkpoint).mean(dim=(0, 1)).tolist()
            elapsed = time.perf_counter() - started
            values = {
                "loss": total,
                "denoising_loss": denoising,
                "grad_norm": float(taken.grad_norm),
                "learning_rate": learning_rate,
                "images_per_second": (step - started_step) * loader.global_batch_size / elapsed,
                "memory_GiB": peak_memory(device),
                "skipped_images": sum(gather_object([skipped_images])),
                "skipped_steps": skipped_steps,
            }
            shown = {"denoise": f"{denoising:.4f}"}
            if args.aligns(step - 1):
                values |= {"alignment_loss": alignment, "alignment_cosine": 1 - alignment}
                shown["align"] = f"{alignment:.4f}"
            journal.log(step, values)
            bar.set_postfix(shown | {"img/s": f"{values['images_per_second']:.1f}"})
            losses.clear()
            started, started_step = time.perf_counter(), step
        stopping = agreed(stop, accelerator, logs)

        last = step == max_train_steps or stopping is not None
        saves = step % args.checkpointing_steps == 0 or last
        shows = args.validation_steps and (step % args.validation_steps == 0 or step == max_train_steps)
        measures = args.eval_steps and (step % args.eval_steps == 0 or step == max_train_steps)
        if saves and losses:
            losses.check(step, last_checkpoint)
        # Before the checkpoint: a run that is killed in between resumes at an earlier one and makes these again.
        if shows:
            exporter.write_samples(step)
        if measures:
            logger.info(exporter.evaluate(step))
        if saves:
            last_checkpoint = checkpointer.save(step, taken.position)
            logger.info(f"Wrote {last_checkpoint}.")
        if saves and args.push_checkpoints:
            exporter.push_checkpoint(step)
        if saves or shows or measures:
            started, started_step = time.perf_counter(), step  # images/s is the training's alone
    bar.close()

    if step < max_train_steps:
        logger.warning(
            f"Stopped by {stopping} at step {step} of {max_train_steps}; go on with --resume_from_checkpoint latest."
        )
        accelerator.end_training()
        return None

    folder = output_dir / "pipeline"
    exporter.save_pipeline(folder, step)
    if accelerator.is_main_process:
        logger.info(f"Wrote {folder} and {journal.plot()}.")
    if pusher is not None:
        pusher.push(folder)
    accelerator.end_training()
    return folder


if __name__ == "__main__":
    run(lambda: main(parse_arguments()))
