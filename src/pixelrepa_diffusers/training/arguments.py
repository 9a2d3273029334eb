"""The arguments of train_pixelrepa.py, grouped by what changing one changes, and how they are read.

Defaults are the published recipe (PixelREPA, arXiv 2603.14366, and its code) wherever it has one.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import yaml
from transformers import HfArgumentParser

from .. import get_preset
from ..evaluation import METRICS
from .data import DataArguments


def _flag(default, help: str, **metadata):
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help, **metadata})
    return field(default=default, metadata={"help": help, **metadata})


@dataclass
class ModelArguments:
    """What is trained. Whatever is not given comes from the preset; whatever is given wins over it."""

    preset: str = _flag("JiT-B/16", "A variant of the papers (JiT-B/16 … JiT-H/32) or JiT-Digits/4.")
    pretrained_model_name_or_path: str | None = _flag(
        None,
        "Start from the transformer (and the adapter, where there is one that fits) of this pipeline or checkpoint (folder "
        "or Hub id). Architecture and resolution are its own, not the preset's, and so is a pipeline's guidance.",
    )
    revision: str | None = _flag(None, "Revision of --pretrained_model_name_or_path.")
    resolution: int | None = _flag(None, "Side of the training images in pixels.")
    patch_size: int | None = _flag(None, "Side of a patch in pixels.")
    num_layers: int | None = _flag(None, "Transformer blocks.")
    num_attention_heads: int | None = _flag(None, "Attention heads.")
    attention_head_dim: int | None = _flag(None, "Width of a head.")
    bottleneck_dim: int | None = _flag(None, "Bottleneck of the patch embedding.")
    in_context_len: int | None = _flag(None, "In-context class tokens.")
    in_context_start: int | None = _flag(None, "The block before which they enter.")
    dropout: float | None = _flag(None, "Dropout in the middle half of the blocks.")
    noise_scale: float | None = _flag(None, "Standard deviation of the noise (1 at 256 pixels, 2 at 512).")


@dataclass
class ObjectiveArguments:
    """What is learnt."""

    objective: Literal["pixelrepa", "none", "repa", "irepa"] = _flag(
        "pixelrepa", "pixelrepa; none = plain JiT; repa = an MLP on every token; irepa = a convolution over the grid."
    )
    alignment_weight: float = _flag(0.1, "λ, the weight of the alignment loss.")
    mask_ratio: float = _flag(0.2, "Probability that a token is replaced by the mask token (pixelrepa).")
    alignment_depth: int | None = _flag(None, "Blocks the aligned tokens have passed (default: in_context_start).")
    adapter_layers: int = _flag(2, "Blocks of the adapter (pixelrepa).")
    spatial_norm: float = _flag(0.8, "γ of the normalisation of the teacher's features (irepa).")
    stop_alignment_after_step: int | None = _flag(None, "Train on with the denoising loss alone after this step.")
    label_drop_prob: float = _flag(0.1, "Probability that a label is replaced by the null class.")
    P_mean: float = _flag(-0.8, "t = sigmoid(P_mean + P_std·n), n ~ N(0, 1).")
    P_std: float = _flag(0.8, "See P_mean.")
    t_eps: float | None = _flag(None, "Lower clamp of 1 − t in the velocity (default: 0.05).")
    teacher_model_name_or_path: str = _flag(
        "facebook/dinov2-base", "Any transformers vision encoder with patch tokens."
    )
    teacher_revision: str | None = _flag(None, "Revision of the teacher.")
    teacher_mode: Literal["resample", "resize"] = _flag(
        "resample", "Fit the teacher's patches to the student's grid, or resize the image to the teacher's patches."
    )


@dataclass
class OptimizationArguments:
    """How it is learnt."""

    seed: int = _flag(0, "Seed of weights, order, crops, flips, noise, masks: of everything.")
    train_batch_size: int = _flag(128, "Images per process and micro-step.")
    gradient_accumulation_steps: int = _flag(1, "Micro-steps per optimizer step.")
    num_train_epochs: int = _flag(600, "Epochs, unless --max_train_steps is given.")
    max_train_steps: int | None = _flag(None, "Optimizer steps.")
    learning_rate: float = _flag(2e-4, "Learning rate (the papers': 5e-5 · global batch / 256).")
    scale_lr: bool = _flag(False, "Multiply --learning_rate by global batch / 256, the papers' rule.")
    lr_scheduler: Literal["constant", "constant_with_warmup", "linear", "cosine"] = _flag(
        "constant_with_warmup", "Learning-rate schedule."
    )
    lr_warmup_steps: int | None = _flag(None, "Warm-up in optimizer steps (default: 5 epochs, as published).")
    adam_beta1: float = _flag(0.9, "AdamW β1.")
    adam_beta2: float = _flag(0.95, "AdamW β2.")
    adam_weight_decay: float = _flag(0.0, "Weight decay of matrices; biases and norms have none.")
    adam_epsilon: float = _flag(1e-8, "AdamW ε.")
    use_8bit_adam: bool = _flag(False, "AdamW with 8-bit state (needs bitsandbytes and a GPU).")
    max_grad_norm: float | None = _flag(None, "Clip the gradient's norm; off by default, as published.")
    use_ema: bool = _flag(True, "Keep exponential moving averages.")
    ema_decays: list[float] = _flag([0.9999, 0.9996], "Their constant decays; the first is sampled and published.")
    ema_update_every: int = _flag(1, "Update them every n steps with the equivalent decay.")
    center_crop: bool = _flag(True, "Centre crop as in ADM; otherwise a random square of the full short side.")
    random_flip: bool = _flag(True, "Flip half of the images.")
    on_nonfinite: Literal["stop", "skip"] = _flag(
        "stop", "A non-finite loss stops the run, or its step is skipped (waits for the device at every step)."
    )


@dataclass
class SpeedArguments:
    """How fast, on what."""

    mixed_precision: Literal["no", "fp16", "bf16"] | None = _flag(None, "Default: what accelerate is configured to.")
    allow_tf32: bool = _flag(False, "TF32 matrix products where float32 is left.")
    gradient_checkpointing: bool = _flag(False, "Recompute activations to save memory.")
    compile: bool = _flag(False, "Compile the blocks and the teacher.")
    attention_backend: str | None = _flag(
        None, "A diffusers attention backend for the student, such as _native_cudnn."
    )
    teacher_cache_dir: str | None = _flag(
        None,
        "Keep the teacher's features here, for data sets small enough: they are computed once, not once an epoch.",
    )
    dataloader_num_workers: int = _flag(4, "Processes that decode images, for every training process.")
    ema_offload: bool = _flag(False, "Keep the averages in CPU memory (use with --ema_update_every).")


@dataclass
class BookkeepingArguments:
    """What is written, where and when. None of it changes the weights."""

    output_dir: str = _flag("outputs/pixelrepa", "Checkpoints, samples, curves and the final pipeline.")
    checkpointing_steps: int = _flag(5000, "Steps between checkpoints.")
    checkpoints_total_limit: int | None = _flag(None, "Checkpoints to keep; the oldest go.")
    resume_from_checkpoint: str | None = _flag(
        None, '"latest" (a fresh start when there is none) or a path (an error when it is missing or damaged).'
    )
    logging_steps: int = _flag(50, "Steps between log lines; the device is waited for at these steps only.")
    validation_steps: int = _flag(5000, "Steps between sample grids; 0 for none.")
    num_validation_images: int = _flag(16, "Images of a sample grid, evenly over the classes.")
    validation_inference_steps: int = _flag(50, "Sampling steps of a sample grid.")
    eval_steps: int = _flag(0, "Steps between evaluations of the first EMA; 0 for none.")
    eval_metrics: list[str] = _flag(
        ["fd_teacher"], "What is measured, as in pipelines/evaluate.py.", choices=list(METRICS), nargs="+"
    )
    eval_reference: str | None = _flag(
        None, "Statistics of real images in the space of --eval_metrics (pipelines/prepare_reference.py makes them)."
    )
    eval_num_samples: int = _flag(10_000, "Images of an evaluation, a multiple of the classes.")
    eval_inference_steps: int = _flag(50, "Sampling steps of an evaluation.")
    eval_batch_size: int = _flag(64, "Images of an evaluation at a time, per process.")
    eval_network: str | None = _flag(
        None,
        "The feature network: the teacher, facebook/dinov2-large, or a file of torch-fidelity's Inception weights "
        "(default: --teacher_model_name_or_path, that one, or their download).",
    )
    eval_image_size: int = _flag(224, "Side a vision encoder's images are resized to in an evaluation.")
    eval_pooling: Literal["class", "patches"] = _flag("class", "Its class token, or the mean of its patches.")
    guidance_scale: float | None = _flag(
        None,
        "Guidance of sample grids and evaluations, saved with the pipeline (default: that of the pipeline "
        "the run starts from, else the preset's).",
    )
    guidance_interval: list[float] | None = _flag(None, "Times guidance acts in, likewise.", nargs=2)
    report_to: list[str] = _flag(["tensorboard"], "tensorboard, wandb, trackio, … or none.", nargs="+")
    logging_dir: str = _flag("logs", "Trackers' folder inside --output_dir.")
    tracker_project_name: str = _flag("pixelrepa", "Project name for the trackers.")
    push_to_hub: bool = _flag(False, "Push the final pipeline to the Hub.")
    push_checkpoints: bool = _flag(False, "Also push each checkpoint's first EMA, in the background.")
    hub_model_id: str | None = _flag(None, "Repository to push to (default: the name of --output_dir).")
    hub_private_repo: bool = _flag(False, "Create it private.")
    hub_token: str | None = _flag(None, "Token (default: the one you are logged in with). Never saved.")
    dry_run: bool = _flag(False, "Print arguments, parameters, learning rate, steps and memory, and stop.")
    dry_run_processes: int | None = _flag(None, "Processes the dry run reckons with (default: those it runs on).")


GROUPS = {
    "data (changes results)": DataArguments,
    "model (changes results)": ModelArguments,
    "objective (changes results)": ObjectiveArguments,
    "optimization (changes results)": OptimizationArguments,
    "speed (rounding aside, changes nothing else)": SpeedArguments,
    "bookkeeping": BookkeepingArguments,
}


@dataclass
class TrainingArguments(
    BookkeepingArguments, SpeedArguments, OptimizationArguments, ObjectiveArguments, ModelArguments, DataArguments
):
    """All of them, checked for what can be checked without looking at data or devices."""

    def __post_init__(self):
        get_preset(self.preset)
        for name in (
            "train_batch_size",
            "gradient_accumulation_steps",
            "num_train_epochs",
            "max_train_steps",
            "adapter_layers",
            "checkpointing_steps",
            "checkpoints_total_limit",
            "logging_steps",
            "num_validation_images",
            "validation_inference_steps",
            "ema_update_every",
            "eval_num_samples",
            "eval_inference_steps",
            "eval_batch_size",
            "eval_image_size",
            "dry_run_processes",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} must be at least 1, got {value}.")
        for name in (
            "validation_steps",
            "eval_steps",
            "lr_warmup_steps",
            "stop_alignment_after_step",
            "dataloader_num_workers",
        ):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"--{name} must be at least 0, got {value}.")
        for name in ("mask_ratio", "label_drop_prob"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"--{name} is a probability in [0, 1], got {getattr(self, name)}.")
        for name in ("learning_rate", "adam_epsilon", "P_std"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ValueError(f"--{name} must be positive and finite, got {getattr(self, name)}.")
        for name in ("alignment_weight", "spatial_norm", "adam_weight_decay"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ValueError(f"--{name} must be finite and at least 0, got {getattr(self, name)}.")
        if not math.isfinite(self.P_mean):
            raise ValueError(f"--P_mean must be finite, got {self.P_mean}.")
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"--{name} must lie in [0, 1), got {getattr(self, name)}.")
        if self.use_ema and (
            len(set(self.ema_decays)) < len(self.ema_decays) or not all(0 <= decay < 1 for decay in self.ema_decays)
        ):
            raise ValueError(f"--ema_decays must be distinct numbers in [0, 1), got {self.ema_decays}.")
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise ValueError(
                f"--max_grad_norm must be positive, got {self.max_grad_norm}; leave it out for no clipping."
            )
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"--seed must lie in [0, 2^63), got {self.seed}.")
        if self.push_to_hub and self.hub_token and "wandb" in self.report_to:
            raise ValueError(
                "--hub_token on the command line would be recorded by wandb. Run `hf auth login` and leave it out."
            )
        if (self.push_checkpoints or self.hub_model_id) and not self.push_to_hub:
            raise ValueError("--push_checkpoints and --hub_model_id need --push_to_hub.")
        if self.push_checkpoints and not self.use_ema:
            raise ValueError("--push_checkpoints pushes the EMA; it needs --use_ema.")
        spaces = {METRICS[metric][0] for metric in self.eval_metrics}
        if self.eval_steps and len(spaces) != 1:
            raise ValueError(
                f"--eval_metrics {' '.join(self.eval_metrics)} need {len(spaces)} feature networks; during training one is "
                "kept beside the model. Name metrics of one space; pipelines/evaluate.py measures in several."
            )
        if self.teacher_cache_dir is not None and (self.streaming or not self.center_crop):
            raise ValueError(
                "--teacher_cache_dir keeps features of images that come again: it needs --center_crop and no --streaming."
            )
        if self.use_8bit_adam and importlib.util.find_spec("bitsandbytes") is None:
            raise ValueError("--use_8bit_adam needs bitsandbytes: pip install bitsandbytes.")
        if self.streaming and (self.max_train_steps is None or self.lr_warmup_steps is None):
            raise ValueError("The length of a stream is unknown: give --max_train_steps and --lr_warmup_steps.")

    def saved(self) -> dict:
        """What may be written to disk or sent to a tracker: everything but the token."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "hub_token"}

    def global_batch_size(self, num_processes: int) -> int:
        """Images of an optimizer step."""
        return self.train_batch_size * self.gradient_accumulation_steps * num_processes

    def resolved_learning_rate(self, num_processes: int) -> float:
        """The peak learning rate; with --scale_lr, --learning_rate is that of 256 images per step."""
        return self.learning_rate * (self.global_batch_size(num_processes) / 256 if self.scale_lr else 1)

    def resolved_steps(self, steps_per_epoch: int | None) -> tuple[int, int]:
        """(optimizer steps, warm-up steps); a warm-up not given is five epochs, as published."""
        total = self.max_train_steps or self.num_train_epochs * steps_per_epoch
        warmup = 5 * steps_per_epoch if self.lr_warmup_steps is None else self.lr_warmup_steps
        return total, warmup

    def aligns(self, step: int) -> bool:
        """Whether there is an alignment loss in the step that follows `step` others."""
        ends = self.stop_alignment_after_step
        return self.objective != "none" and (ends is None or step < ends)

    def doubts(self, steps: int, warmup: int) -> list[str]:
        """What is allowed and rarely meant, of a run of so many steps and warm-up steps."""
        doubts = []
        if warmup >= steps and self.lr_scheduler != "constant":
            doubts.append(
                f"The warm-up of {warmup} steps outlasts the {steps} steps of the run, whose learning rate never reaches "
                "its peak: give --lr_warmup_steps."
            )
        start = self.ema_decays[0] ** steps if self.use_ema else 0.0
        if start > 0.1:
            doubts.append(
                f"After {steps} steps {start:.0%} of the average that is sampled and published (decay "
                f"{self.ema_decays[0]}) are still the initial weights: give smaller --ema_decays, such as "
                f"{max(0.0, round(1 - 5 / steps, 4))}."
            )
        return doubts


def parse_arguments(argv: list[str] | None = None) -> TrainingArguments:
    """
    Reads the command line and, with `--config FILE`, a YAML file of the same names; the command line wins.

    Raises:
        SystemExit: on an unknown name or a value of the wrong type, in the file as on the command line.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    for title, group in GROUPS.items():
        group._argument_group_name = title
    parser = HfArgumentParser(
        list(GROUPS.values()), description="Train a JiT with PixelREPA.", allow_abbrev=False, add_help=True
    )
    parser.add_argument("--config", help="A YAML file of arguments; the command line wins over it.")
    config = parser.parse_known_args([arg for arg in argv if arg not in ("-h", "--help")])[0].config
    if config is not None:
        argv = [*_yaml_to_argv(Path(config), parser), *argv]
    *groups, _, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    if unknown:
        parser.error(f"unknown arguments: {' '.join(unknown)}. See --help.")
    merged = {name: value for group in groups for name, value in vars(group).items()}
    try:
        return TrainingArguments(**merged)
    except (ValueError, KeyError) as error:
        parser.error(error.args[0])


def _yaml_to_argv(path: Path, parser: HfArgumentParser) -> list[str]:
    """The file as command-line words, so that both pass the same checks."""
    if not path.is_file():
        parser.error(f"--config {path} is not a file.")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: no UTF-8, or no such date
        parser.error(f"{path} is no YAML file of `name: value` lines: {error}")
    if not isinstance(values, dict):
        parser.error(f"{path} must hold `name: value` lines, got {type(values).__name__}.")
    known = {name for group in GROUPS.values() for name in group.__dataclass_fields__}
    unknown = sorted(map(str, set(values) - known))
    if unknown:
        parser.error(f"{path} has unknown arguments: {', '.join(unknown)}.")
    argv = []
    for name, value in values.items():
        if isinstance(value, dict) or (
            isinstance(value, list) and any(isinstance(item, dict | list) for item in value)
        ):
            parser.error(
                f"{path}: {name} must be a value or a list of values, it holds a {type(value).__name__} of more."
            )
        if value is not None:
            argv += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return argv
