"""Arguments of `train_pixelrepa.py`, grouped by what they change.

Defaults are the published recipe (PixelREPA, arXiv 2603.14366, and its code) wherever it has one.
"""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml
from transformers import HfArgumentParser

from ..cli import as_words, check_ranges, flag
from ..evaluation import METRICS
from ..presets import PRESETS
from .data import DataArguments


@dataclass
class ModelArguments:
    """Model (changes results). The preset provides what is not given."""

    preset: str = flag("JiT-B/16", "Variant of the papers, or the small one of the demo.", choices=list(PRESETS))
    pretrained_model_name_or_path: str | None = flag(
        None,
        "Start from the transformer (and the adapter, if it fits) of this pipeline or checkpoint: a folder or Hub id. "
        "Architecture, resolution and guidance are then the pipeline's, not the preset's.",
    )
    revision: str | None = flag(None, "Revision of --pretrained_model_name_or_path.")
    lora_rank: int | None = flag(
        None,
        "Freeze that transformer and train LoRA layers of this rank in its attention.",
        ge=1,
    )
    resolution: int | None = flag(None, "Image size in pixels.", ge=1)
    patch_size: int | None = flag(None, "Patch size in pixels.", ge=1)
    num_layers: int | None = flag(None, "Number of transformer blocks.", ge=1)
    num_attention_heads: int | None = flag(None, "Number of attention heads.", ge=1)
    attention_head_dim: int | None = flag(None, "Width of an attention head.", ge=1)
    bottleneck_dim: int | None = flag(None, "Bottleneck width of the patch embedding.", ge=1)
    in_context_len: int | None = flag(None, "Number of in-context class tokens.", ge=0)
    in_context_start: int | None = flag(None, "Block before which the class tokens are inserted.", ge=0)
    dropout: float | None = flag(None, "Dropout in the middle half of the blocks.", ge=0, lt=1)
    noise_scale: float | None = flag(None, "Standard deviation of the noise (1 at 256 pixels, 2 at 512).", gt=0)


@dataclass
class ObjectiveArguments:
    """Objective (changes results)."""

    objective: Literal["pixelrepa", "none", "repa", "irepa"] = flag(
        "pixelrepa",
        "Projector: pixelrepa: the Masked Transformer Adapter; none: plain JiT; repa: an MLP; irepa: a convolution.",
    )
    alignment_weight: float = flag(0.1, "λ, the weight of the alignment loss.", ge=0)
    mask_ratio: float = flag(0.2, "Probability that a token is replaced by the mask token (pixelrepa).", ge=0, le=1)
    alignment_depth: int | None = flag(
        None, "Number of blocks before the aligned tokens (default: in_context_start).", ge=0
    )
    adapter_layers: int = flag(2, "Number of adapter blocks (pixelrepa).", ge=1)
    spatial_norm: float = flag(0.8, "γ of the spatial normalization of the teacher features (irepa).", ge=0)
    stop_alignment_after_step: int | None = flag(None, "Train with the denoising loss alone after this step.", ge=0)
    label_drop_prob: float = flag(0.1, "Probability that a label is replaced by the null class.", ge=0, le=1)
    P_mean: float = flag(-0.8, "Mean of the logit-normal timesteps: t = sigmoid(P_mean + P_std·n), n ~ N(0, 1).")
    P_std: float = flag(0.8, "Standard deviation of the logit-normal timesteps.", gt=0)
    t_eps: float | None = flag(None, "Lower bound of 1 − t in the velocity (default: 0.05).", gt=0, le=1)
    teacher_model_name_or_path: str = flag(
        "facebook/dinov2-base", "Teacher: any transformers vision encoder with patch tokens."
    )
    teacher_revision: str | None = flag(None, "Revision of the teacher.")
    teacher_mode: Literal["resample", "resize"] = flag(
        "resample", "resample: interpolate the teacher features to the student's grid; resize: resize its input image."
    )

    def aligns(self, step: int) -> bool:
        """Return whether the step after `step` completed steps has an alignment loss."""
        last = self.stop_alignment_after_step
        return self.objective != "none" and (last is None or step < last)


@dataclass
class OptimizationArguments:
    """Optimization (changes results)."""

    seed: int = flag(0, "Seed of the weights and of every random draw.", ge=0, lt=2**63)
    train_batch_size: int = flag(128, "Images per process and micro-step.", ge=1)
    gradient_accumulation_steps: int = flag(1, "Micro-steps per optimizer step.", ge=1)
    num_train_epochs: int = flag(600, "Epochs; --max_train_steps overrides them.", ge=1)
    max_train_steps: int | None = flag(None, "Optimizer steps.", ge=1)
    learning_rate: float = flag(2e-4, "Learning rate (published: 5e-5 · global batch / 256).", gt=0)
    scale_lr: bool = flag(False, "Multiply --learning_rate by global batch / 256, the published rule.")
    lr_scheduler: Literal["constant", "constant_with_warmup", "linear", "cosine"] = flag(
        "constant_with_warmup", "Learning-rate schedule."
    )
    lr_warmup_steps: int | None = flag(None, "Warmup in optimizer steps (default: 5 epochs, as published).", ge=0)
    adam_beta1: float = flag(0.9, "AdamW β1.", ge=0, lt=1)
    adam_beta2: float = flag(0.95, "AdamW β2.", ge=0, lt=1)
    adam_weight_decay: float = flag(0.0, "Weight decay of matrices; biases and norms have none.", ge=0)
    adam_epsilon: float = flag(1e-8, "AdamW ε.", gt=0)
    use_8bit_adam: bool = flag(False, "AdamW with 8-bit state (needs bitsandbytes and a GPU).")
    max_grad_norm: float | None = flag(None, "Gradient clipping; off by default, as published.", gt=0)
    use_ema: bool = flag(True, "Keep EMA weights.")
    ema_decays: list[float] = flag(
        [0.9999, 0.9996], "Constant EMA decays; the first is sampled and published.", ge=0, lt=1
    )
    ema_update_every: int = flag(1, "Update the EMAs every n steps with the equivalent decay.", ge=1)
    center_crop: bool = flag(True, "Center crop as in ADM; otherwise a random square of the short side.")
    random_flip: bool = flag(True, "Flip half of the images horizontally.")
    on_nonfinite: Literal["stop", "skip"] = flag(
        "stop", "At a non-finite gradient stop the run, or skip the step. (fp16 skips overflows by itself.)"
    )

    def saved(self) -> dict:
        """Return the arguments without the access token, for files and trackers."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "hub_token"}

    def global_batch_size(self, num_processes: int) -> int:
        """Return the number of images per optimizer step."""
        return self.train_batch_size * self.gradient_accumulation_steps * num_processes

    def resolved_learning_rate(self, num_processes: int) -> float:
        """Return the peak learning rate."""
        return self.learning_rate * (self.global_batch_size(num_processes) / 256 if self.scale_lr else 1)

    def resolved_steps(self, steps_per_epoch: int | None) -> tuple[int, int]:
        """Return (optimizer steps, warmup steps). The default warmup is five epochs, as published."""
        total = self.max_train_steps or self.num_train_epochs * steps_per_epoch
        warmup = 5 * steps_per_epoch if self.lr_warmup_steps is None else self.lr_warmup_steps
        return total, warmup

    def warnings(self, steps: int, warmup: int) -> list[str]:
        """Return warnings about settings that are valid but rarely intended."""
        warnings = []
        if warmup >= steps and self.lr_scheduler != "constant":
            warnings.append(
                f"The warmup ({warmup} steps) is not shorter than the run ({steps} steps): the learning rate never "
                "reaches its peak. Set --lr_warmup_steps."
            )
        initial = self.ema_decays[0] ** steps if self.use_ema else 0.0
        if initial > 0.1:
            cure = f"smaller --ema_decays, such as {1 - 5 / steps:.4f}" if steps > 10 else "--use_ema false"
            warnings.append(
                f"After {steps} steps the EMA weights with decay {self.ema_decays[0]}, which are sampled and published, "
                f"still consist of {initial:.0%} initial weights. Set {cure}."
            )
        return warnings


@dataclass
class PerformanceArguments:
    """Performance (changes rounding at most)."""

    mixed_precision: Literal["no", "fp16", "bf16"] | None = flag(None, "Default: accelerate's configuration.")
    allow_tf32: bool = flag(False, "Use TF32 for float32 matrix products.")
    gradient_checkpointing: bool = flag(False, "Recompute activations to save memory.")
    compile: bool = flag(False, "Compile blocks, teacher and, on a GPU, draws. Changes the dropout masks of JiT-H.")
    cuda_graphs: bool = flag(
        False, "With --compile: replay the whole objective as CUDA graphs, for few images per GPU; starts slowly."
    )
    attention_backend: str | None = flag(None, "diffusers attention backend of the student, such as _native_cudnn.")
    teacher_cache_dir: str | None = flag(
        None, "Store the teacher features here and compute them once instead of every epoch (small data sets)."
    )
    dataloader_num_workers: int = flag(4, "Image decoding processes per training process.", ge=0)
    ema_offload: bool = flag(False, "Keep the EMAs in CPU memory (use with --ema_update_every).")


@dataclass
class BookkeepingArguments:
    """Bookkeeping (changes no weights)."""

    output_dir: str = flag("outputs/pixelrepa", "Folder for checkpoints, samples, curves and the final pipeline.")
    checkpointing_steps: int = flag(5000, "Steps between checkpoints.", ge=1)
    checkpoints_total_limit: int | None = flag(None, "Number of checkpoints to keep; the oldest are deleted.", ge=1)
    resume_from_checkpoint: str | None = flag(
        None, '"latest" (starts from scratch if there is none), or a checkpoint: a path or a name in --output_dir.'
    )
    ddp_timeout: int = flag(
        3600, "Seconds that processes wait for each other, for example while one writes a checkpoint.", ge=1
    )
    logging_steps: int = flag(50, "Steps between log lines; only these synchronize the device.", ge=1)
    validation_steps: int = flag(5000, "Steps between sample grids; 0 for none.", ge=0)
    num_validation_images: int = flag(16, "Images of a sample grid, spread over the classes.", ge=1)
    validation_inference_steps: int = flag(50, "Sampling steps of a sample grid.", ge=1)
    eval_steps: int = flag(0, "Steps between evaluations of the first EMA; 0 for none.", ge=0)
    eval_metrics: list[str] = flag(
        ["fd_teacher"], "Metrics, as in pixelrepa-evaluate.", choices=list(METRICS), nargs="+"
    )
    eval_reference: str | None = flag(
        None, "Statistics of real images for --eval_metrics, written by pixelrepa-prepare-reference."
    )
    eval_num_samples: int = flag(10_000, "Images of an evaluation, a multiple of the number of classes.", ge=1)
    eval_inference_steps: int = flag(50, "Sampling steps of an evaluation.", ge=1)
    eval_batch_size: int = flag(64, "Sampling batch size of an evaluation, per process.", ge=1)
    eval_network: str | None = flag(
        None,
        "Feature network: the teacher, facebook/dinov2-large, or a file of torch-fidelity's Inception weights "
        "(default: --teacher_model_name_or_path, that model, or their download).",
    )
    eval_image_size: int = flag(224, "Input size of a vision encoder in an evaluation.", ge=1)
    eval_pooling: Literal["class", "patches"] = flag(
        "class", "Features of that encoder: class token, or mean of patch tokens."
    )
    guidance_scale: float | None = flag(
        None,
        "Guidance scale of sample grids and evaluations, saved with the pipeline (default: that of "
        "--pretrained_model_name_or_path, else the preset's).",
    )
    guidance_interval: list[float] | None = flag(None, "Guidance interval LOW HIGH in t (default: as above).", nargs=2)
    report_to: list[str] = flag(["tensorboard"], "tensorboard, wandb, trackio, … or none.", nargs="+")
    logging_dir: str = flag("logs", "Tracker folder inside --output_dir.")
    tracker_project_name: str = flag("pixelrepa", "Project name for the trackers.")
    push_to_hub: bool = flag(False, "Push the final pipeline to the Hub.")
    push_checkpoints: bool = flag(False, "Also push the sampled weights of each checkpoint, in the background.")
    hub_model_id: str | None = flag(None, "Hub repository (default: the name of --output_dir).")
    hub_private_repo: bool = flag(False, "Create the repository as private.")
    hub_license: str | None = flag(None, "License of the published weights (default: none in the model card).")
    hub_token: str | None = flag(None, "Access token (default: the login's). It is never saved.")
    dry_run: bool = flag(False, "Print arguments, parameters, learning rate, steps and memory, then exit.")
    dry_run_processes: int | None = flag(None, "Number of processes assumed by --dry_run.", ge=1)


@dataclass
class TrainingArguments(
    BookkeepingArguments,
    PerformanceArguments,
    OptimizationArguments,
    ObjectiveArguments,
    ModelArguments,
    DataArguments,
):
    """All arguments; checks the rules that span several of them."""

    def __post_init__(self):
        check_ranges(self)
        if self.hub_token and "wandb" in self.report_to:
            raise ValueError("wandb records the command line and with it --hub_token: use `hf auth login` instead.")
        if (self.push_checkpoints or self.hub_model_id) and not self.push_to_hub:
            raise ValueError("--push_checkpoints and --hub_model_id need --push_to_hub.")
        if self.lora_rank and self.pretrained_model_name_or_path is None:
            raise ValueError("--lora_rank needs --pretrained_model_name_or_path, the pipeline to fine-tune.")
        if self.streaming and (self.max_train_steps is None or self.lr_warmup_steps is None):
            raise ValueError("The length of a stream is unknown: give --max_train_steps and --lr_warmup_steps.")
        if self.cuda_graphs and (not self.compile or self.gradient_accumulation_steps > 1):
            # Replaying a graph would overwrite the gradients of the micro-step before.
            raise ValueError("--cuda_graphs needs --compile, and no --gradient_accumulation_steps.")
        if self.teacher_cache_dir is not None and (self.streaming or not self.center_crop):
            raise ValueError("--teacher_cache_dir needs --center_crop and no --streaming.")
        if self.eval_steps and len({METRICS[metric][0] for metric in self.eval_metrics}) > 1:
            raise ValueError("--eval_metrics need several feature networks: choose metrics of one network.")


def parse_arguments(argv: list[str] | None = None) -> TrainingArguments:
    """
    Parse the command line and, with `--config FILE`, a YAML file of the same names. The command line takes precedence.

    A file may name another one as its `base`, relative to itself, and lists only what differs.

    Raises:
        SystemExit: With status 2 and a message, for unknown names and wrong values on the command line or in a file.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    groups = TrainingArguments.__bases__[::-1]
    for group in groups:
        group._argument_group_name = group.__doc__.split(".")[0].lower()
    parser = HfArgumentParser(groups, description="Train a JiT with PixelREPA.", allow_abbrev=False)
    parser.add_argument("--config", help="YAML file of arguments; the command line takes precedence.")
    config = parser.parse_known_args([word for word in argv if word not in ("-h", "--help")])[0].config
    try:
        words = [] if config is None else as_words(_read_config(Path(config)))
        parsed = vars(parser.parse_args(words + argv))
        del parsed["config"]
        return TrainingArguments(**parsed)
    except (OSError, ValueError, yaml.YAMLError) as error:
        parser.error(str(error))


def _read_config(path: Path) -> dict:
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        raise ValueError(f"--config {path} must consist of `name: value` lines.")
    base = values.pop("base", None)
    return values if base is None else {**_read_config(path.parent / base), **values}
