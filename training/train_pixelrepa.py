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
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, ProjectConfiguration, gather_object
from arguments import TrainingArguments, parse_arguments
from checkpointing import Checkpointer, find_checkpoint, sweep
from data import ImageLoader, ImageSource, StreamSource, check_global_batch, draws, open_source, to_float
from diffusers.optimization import get_scheduler
from reporting import (
    Exporter,
    Journal,
    build_pipeline,
    estimate_memory,
    open_evaluation,
    pipeline_config,
    teacher_config,
)
from teacher_cache import CachedTeacher
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from tqdm.auto import tqdm

from pixelrepa_diffusers import JiTTransformer2DModel, get_preset
from pixelrepa_diffusers.adapter import ConvProjector, MaskedTransformerAdapter, MLPProjector
from pixelrepa_diffusers.ema import ConstantDecayEMA
from pixelrepa_diffusers.hub import BackgroundPusher
from pixelrepa_diffusers.objective import PixelREPAObjective, draw_keep_mask, draw_timesteps, drop_labels
from pixelrepa_diffusers.sampling import only_writer, write_atomically
from pixelrepa_diffusers.teacher import SemanticTeacher
from pixelrepa_diffusers.transformer_jit import JiTBlock


logger = get_logger(__name__)

# Arguments of the transformer that the command line may name.
TRANSFORMER_ARGUMENTS = (
    "patch_size", "num_layers", "num_attention_heads", "attention_head_dim", "bottleneck_dim", "in_context_len",
    "in_context_start", "dropout", "noise_scale", "t_eps",
)  # fmt: skip

# Keys of the draws made here; data.py has those of order, crops and flips.
IMAGE_DRAWS, DROPOUT_DRAWS, WEIGHT_DRAWS = 101, 102, 103


class NonFiniteLossError(RuntimeError):
    """The loss became NaN or infinite; the message names the step, the images and the last good checkpoint."""


class LossRecord:
    """Losses of the steps since the last log, kept on the device, and the images they were of."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.losses: list[torch.Tensor] = []
        self.images: list[list[int]] = []

    def __len__(self) -> int:
        return len(self.losses)

    def add(self, losses: torch.Tensor, images: list[int]) -> None:
        """losses (3,): total, denoising, alignment."""
        self.losses.append(losses)
        self.images.append(images)

    def clear(self) -> None:
        self.losses.clear()
        self.images.clear()

    def check(self, step: int, last_checkpoint: Path | None) -> torch.Tensor:
        """
        (processes, steps, 3) on the host, after a look at each: the one place where the device is waited for.

        Raises:
            NonFiniteLossError: a loss is NaN or infinite; `step` is the last step's number.
        """
        losses = self.accelerator.gather(torch.stack(self.losses)[None]).cpu()
        bad = (~losses.isfinite().all(dim=(0, 2))).nonzero()
        if len(bad):
            index = bad[0].item()
            images = gather_object(self.images[index])
            raise NonFiniteLossError(
                f"The loss of step {step - len(self) + index + 1} is not finite. Its images (places in the data) were "
                f"{sorted(images)}. The last good checkpoint is {last_checkpoint}: resume from it with a smaller "
                "--learning_rate, --max_grad_norm 1, --mixed_precision bf16 or no, or --on_nonfinite skip."
            )
        return losses


# ---------------------------------------------------------------------------------------------------- what is trained


def transformer_config(args: TrainingArguments, num_classes: int) -> dict:
    """
    The preset, overridden by whatever the command line names; or the pretrained transformer's, of which the command line
    may change what is no matter of shape.
    """
    given = {name: getattr(args, name) for name in TRANSFORMER_ARGUMENTS if getattr(args, name) is not None}
    if args.resolution is not None:
        given["sample_size"] = args.resolution
    source = args.pretrained_model_name_or_path
    if source is None:
        return {**get_preset(args.preset).transformer_config(), **given, "num_classes": num_classes}
    config = JiTTransformer2DModel.load_config(source, subfolder="transformer", revision=args.revision)
    for name, value in given.items():
        if value != config[name] and name not in ("dropout", "noise_scale", "t_eps"):
            flag = "resolution" if name == "sample_size" else name
            raise ValueError(f"--{flag} is {value}, but {source} was trained with {config[name]}: leave it out.")
    return {**config, **given, "num_classes": num_classes}


def build_transformer(args: TrainingArguments, num_classes: int) -> JiTTransformer2DModel:
    return JiTTransformer2DModel.from_config(transformer_config(args, num_classes))


def build_teacher(args: TrainingArguments, config: dict, device: torch.device) -> SemanticTeacher | None:
    if args.objective == "none":
        return None
    return SemanticTeacher.from_pretrained(
        args.teacher_model_name_or_path,
        grid_size=config["sample_size"] // config["patch_size"],
        image_size=config["sample_size"],
        mode=args.teacher_mode,
        dtype=torch.bfloat16 if args.mixed_precision == "bf16" else torch.float32,
        revision=args.teacher_revision,
    ).to(device)


def build_projector(args: TrainingArguments, config: dict, teacher_dim: int) -> torch.nn.Module | None:
    width = config["num_attention_heads"] * config["attention_head_dim"]
    grid_size = config["sample_size"] // config["patch_size"]
    match args.objective:
        case "none":
            return None
        case "repa":
            return MLPProjector(width, teacher_dim)
        case "irepa":
            return ConvProjector(width, teacher_dim, grid_size=grid_size)
        case "pixelrepa":
            return MaskedTransformerAdapter(
                width,
                config["num_attention_heads"],
                teacher_dim,
                num_layers=args.adapter_layers,
                grid_size=grid_size,
                in_context_len=config["in_context_len"],
                num_classes=config["num_classes"],
                mlp_ratio=config["mlp_ratio"],
            )


def load_pretrained(args: TrainingArguments, part: str, model: torch.nn.Module) -> None:
    """Takes over the weights of `part` of the pretrained pipeline, where other classes are learnt all but theirs."""
    source = args.pretrained_model_name_or_path
    trained = type(model).from_pretrained(source, subfolder=part, revision=args.revision)
    state, num_classes = trained.state_dict(), model.config.get("num_classes")
    if trained.config.get("num_classes") != num_classes:
        logger.warning(
            f"The {part} of {source} knows {trained.config.num_classes} classes, the data have {num_classes}: its class "
            "embedding starts anew."
        )
        name = "conditioning.class_embedding.weight"
        state[name] = model.state_dict()[name]
    model.load_state_dict(state)


def load_pretrained_projector(args: TrainingArguments, projector: torch.nn.Module) -> None:
    """Goes on with the projector beside the pretrained transformer where there is one that fits, and says so."""
    source = args.pretrained_model_name_or_path
    try:
        config = type(projector).load_config(source, subfolder="adapter", revision=args.revision)
    except OSError as error:
        logger.warning(f"{source} has no adapter, a new one is trained ({error}).")
        return
    shape = {name: value for name, value in projector.config.items() if name[0] != "_" and name != "num_classes"}
    needed = {"_class_name": type(projector).__name__, **shape}
    other = [
        f"{name} {config.get(name)}, needed is {needed[name]}" for name in needed if config.get(name) != needed[name]
    ]
    if other:
        logger.warning(f"The adapter of {source} does not fit ({', '.join(other)}): a new one is trained.")
        return
    load_pretrained(args, "adapter", projector)
    logger.info(f"Goes on with the adapter of {source}.")


def compare_classes(args: TrainingArguments, id2label: dict[str, str] | None) -> None:
    """Warns where the pretrained pipeline calls as many classes by other names: each goes on from that of its number."""
    source = args.pretrained_model_name_or_path
    known = pipeline_config(source, args.revision).get("id2label")
    if known and id2label and len(known) == len(id2label) and known != id2label:
        number = next(number for number in id2label if known.get(number) != id2label[number])
        logger.warning(
            f"The classes of {source} have other names than those of the data (class {number}: {known.get(number)!r}, "
            f"here {id2label[number]!r}). Each class goes on from the embedding of its number: check the order."
        )


def build_objective(args: TrainingArguments, transformer: JiTTransformer2DModel, projector) -> PixelREPAObjective:
    return PixelREPAObjective(
        transformer,
        projector,
        alignment_weight=args.alignment_weight,
        spatial_norm=args.spatial_norm if args.objective == "irepa" else None,
        alignment_depth=args.alignment_depth,
    )


def compile_blocks(objective: PixelREPAObjective) -> None:
    """Compiles every block, the projector's too, in place."""
    # It would cut each block's graph where DDP's gradient buckets end; blocks are short enough to overlap as they are.
    torch._dynamo.config.optimize_ddp = False
    for block in objective.modules():
        if isinstance(block, JiTBlock):
            block.compile(fullgraph=True)


def apply_switches(args: TrainingArguments, objective: PixelREPAObjective) -> None:
    """Checkpointing, attention kernel, compilation: how the objective is computed, not what."""
    if args.gradient_checkpointing:
        objective.transformer.enable_gradient_checkpointing()
        if isinstance(objective.projector, MaskedTransformerAdapter):
            objective.projector.enable_gradient_checkpointing()
    if args.attention_backend is not None:
        objective.transformer.set_attention_backend(args.attention_backend)
    if args.compile:
        compile_blocks(objective)


def build_optimizer(args: TrainingArguments, objective: PixelREPAObjective, learning_rate: float):
    """AdamW; biases and norm weights are never decayed."""
    parameters = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": args.adam_weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    settings = {"lr": learning_rate, "betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    if not args.use_8bit_adam:
        return torch.optim.AdamW(groups, fused=True, **settings)
    import bitsandbytes  # not a dependency; the arguments have been checked for it

    return bitsandbytes.optim.AdamW8bit(groups, **settings)


# ------------------------------------------------------------------------------------------------ what a step is given


def draw(args: TrainingArguments, batch: dict, step: int, num_tokens: int, num_classes: int, device) -> dict:
    """
    Times, dropped labels, keep mask and noise of a batch: functions of (seed, step, image) and of the kind of
    device, on which the noise is made.
    """
    timesteps, labels, keep, seeds = [], [], [], []
    for index, label in zip(batch["index"].tolist(), batch["class_labels"], strict=True):
        small, large = draws(args.seed, step, index, purpose=IMAGE_DRAWS, count=2)
        generator = torch.Generator().manual_seed(int(small))
        timesteps.append(draw_timesteps(1, generator, args.P_mean, args.P_std))
        labels.append(drop_labels(label[None], num_classes, generator, args.label_drop_prob))
        keep.append(draw_keep_mask(1, num_tokens, generator, args.mask_ratio))
        seeds.append(int(large))
    noise = torch.empty(batch["pixel_values"].shape, device=device)
    generator = torch.Generator(device)
    for image, seed in zip(noise, seeds, strict=True):
        image.normal_(generator=generator.manual_seed(seed))

    def send(parts: list[torch.Tensor]) -> torch.Tensor:
        whole = torch.cat(parts)
        return (whole.pin_memory() if device.type == "cuda" else whole).to(device, non_blocking=True)

    return {
        "class_labels": send(labels),
        "timestep": send(timesteps),
        "noise": noise,
        "keep_mask": send(keep) if args.objective == "pixelrepa" else None,
    }


def prepared_batches(
    args, loader: ImageLoader, teach: Callable | None, step: int, num_tokens: int, num_classes: int, device
) -> Iterator:
    """
    Batches with everything the objective takes, on the device, and what the trainer remembers about each.

    On a GPU copies, draws and the teacher run on their own stream one batch ahead, beside the student's work on the
    batch before. The teacher is frozen, so nothing it is given depends on the student.

    `teach` makes features of pixels and of the batch they are from; None for plain JiT.
    """
    stream = torch.cuda.Stream() if device.type == "cuda" else None

    def prepare(batch: dict, step: int) -> tuple[dict, dict]:
        about = {
            "index": batch["index"].tolist(),
            "skipped": int(batch["skipped"].sum()),
            "loader": loader.state_dict(),  # read now: the loader will be a batch ahead when this one is used
        }
        inputs = draw(args, batch, step, num_tokens, num_classes, device)
        inputs["pixel_values"] = to_float(batch["pixel_values"].to(device, non_blocking=True))
        taught = teach is not None and args.aligns(step)
        inputs["teacher_features"] = teach(inputs["pixel_values"], batch) if taught else None
        return inputs, about

    def numbered() -> Iterator[tuple[dict, int]]:
        for number, batch in enumerate(loader):
            yield batch, step + number // args.gradient_accumulation_steps

    if stream is None:
        for batch, number in numbered():
            yield prepare(batch, number)
        return

    ahead = None
    for batch, number in numbered():
        with torch.cuda.stream(stream):
            following = prepare(batch, number)
        if ahead is not None:
            yield ahead
        # The student's stream waits for the side stream on the device; the host does not.
        torch.cuda.current_stream().wait_stream(stream)
        for tensor in following[0].values():
            if tensor is not None:
                tensor.record_stream(torch.cuda.current_stream())
        ahead = following


# ---------------------------------------------------------------------------------------------------------- the method


@dataclass
class Step:
    """
    What an optimizer step leaves behind; on the device, until someone logs it.

    Attributes:
        losses: (3,): total, denoising and alignment loss (0 where there is none), means over the micro-steps.
        images: places in the data of this process's images.
        skipped_images: how many of this process's images could not be read and were replaced.
        grad_norm: before clipping, where it was asked for.
        skipped: the gradient was not finite, and nothing was changed.
        position: of the loader, behind the step's images.
    """

    losses: torch.Tensor
    images: list[int]
    skipped_images: int
    grad_norm: torch.Tensor | None
    skipped: bool
    position: dict


def take_step(
    args: TrainingArguments,
    accelerator: Accelerator,
    objective: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    transformer: JiTTransformer2DModel,
    ema: ConstantDecayEMA | None,
    batches: Iterator,
    step: int,
    wants_norm: bool,
) -> Step:
    """One step of the method; `step` counts those before it, `transformer` is the objective's, which `ema` averages."""
    losses, images, skipped_images = [], [], 0
    for micro_step in range(args.gradient_accumulation_steps):
        inputs, about = next(batches)
        dropout_seeds = draws(args.seed, step, accelerator.process_index, DROPOUT_DRAWS, micro_step + 1)
        torch.manual_seed(int(dropout_seeds[micro_step]))
        with accelerator.accumulate(objective):
            with accelerator.autocast():
                output = objective(**inputs)
            accelerator.backward(output.loss)
        parts = (output.loss, output.denoising_loss, output.alignment_loss)
        losses.append(torch.stack([output.loss.new_zeros(()) if part is None else part.detach() for part in parts]))
        images += about["index"]
        skipped_images += about["skipped"]

    grad_norm, skipped = None, False
    if wants_norm or args.max_grad_norm is not None or args.on_nonfinite == "skip":
        bound = float("inf") if args.max_grad_norm is None else args.max_grad_norm
        grad_norm = accelerator.clip_grad_norm_(objective.parameters(), bound)
        if isinstance(grad_norm, DTensor):
            grad_norm = grad_norm.full_tensor()
        skipped = args.on_nonfinite == "skip" and not torch.isfinite(grad_norm)
    if not skipped or accelerator.scaler is not None:  # the scaler skips by itself, and learns from it
        optimizer.step()
    optimizer.zero_grad()
    if ema is not None and not skipped:
        ema.update(transformer)
    return Step(torch.stack(losses).mean(dim=0), images, skipped_images, grad_norm, skipped, about["loader"])


# ------------------------------------------------------------------------------------------------------------- the run


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
            sweep(output_dir)
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
        text = json.dumps(resolved, indent=1)
        write_atomically(output_dir / "arguments.json", lambda path: path.write_text(text, encoding="utf-8"))
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


def peak_memory(device: torch.device) -> float:
    """GiB: the allocator's peak on a GPU, the process's resident peak on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


if __name__ == "__main__":
    main(parse_arguments())
