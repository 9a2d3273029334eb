"""What a run shows: metrics.jsonl, trackers, curves, samples, metrics, pipelines, and the report of a dry run."""

from __future__ import annotations

import functools
import json
import math
import resource
import shutil
import sys
from pathlib import Path

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from PIL import Image
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, Dinov2Config, PretrainedConfig

from .. import JiTFlowMatchScheduler, JiTTransformer2DModel, PixelREPAPipeline, get_preset
from ..ema import ConstantDecayEMA
from ..evaluation import (
    FeatureSpace,
    InceptionNetwork,
    VisionEncoderNetwork,
    evaluate_pipeline,
    open_spaces,
    pipeline_images,
)
from ..files import write_atomically, write_folder
from ..hub import BackgroundPusher
from ..images import make_grid
from ..sampling import cast_transformer, device_name, seeded, versions
from .arguments import TrainingArguments
from .checkpoints import with_weights


logger = get_logger(__name__)

# How the names of online metrics begin.
MEASURED = ("fid", "fd_", "inception_score", "precision", "recall")


class Journal:
    """metrics.jsonl, the trackers and curves.png. A resumed run repeats what came after its checkpoint."""

    def __init__(self, accelerator: Accelerator, output_dir: Path, step: int):
        self.accelerator, self.path = accelerator, output_dir / "metrics.jsonl"
        self.rows: list[dict] = []
        if accelerator.is_main_process:
            if step and self.path.exists():
                lines = self.path.read_text(encoding="utf-8").splitlines()
                rows = [json.loads(line) for line in lines if line.endswith("}")]  # a kill may cut the last one
                self.rows = [row for row in rows if row["step"] <= step]
            write_atomically(self.path, lambda path: path.write_text("".join(map(_line, self.rows)), encoding="utf-8"))

    def log(self, step: int, values: dict[str, float]) -> None:
        """`values` of a step; those that are not finite, which JSON has no words for, as null."""
        values = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self.accelerator.log({name: value for name, value in values.items() if value is not None}, step=step)
        if self.accelerator.is_main_process:
            self.rows.append({"step": step, **values})
            with self.path.open("a", encoding="utf-8") as file:
                file.write(_line(self.rows[-1]))

    def plot(self) -> Path:
        """Draws curves.png from everything logged so far."""
        from matplotlib.figure import Figure  # slow to import, and needed once

        panels = {
            "denoising_loss": "denoising loss",
            "alignment_cosine": "alignment cosine",
            "grad_norm": "gradient norm",
            "learning_rate": "learning rate",
        }
        measured = {name for row in self.rows for name in row if name.startswith(MEASURED)}
        panels |= {name: name.replace("_", " ") for name in sorted(measured)}
        lines = -(-len(panels) // 2)
        figure = Figure(figsize=(10, 3 * lines), layout="constrained")
        axes = figure.subplots(lines, 2, sharex=True)
        for axis in axes.flat[len(panels) :]:
            axis.set_axis_off()
        for axis, (name, title) in zip(axes.flat, panels.items(), strict=False):
            points = [(row["step"], row[name]) for row in self.rows if row.get(name) is not None]
            if points:
                axis.plot(*zip(*points, strict=True), linewidth=1, marker="." if name in measured else None)
            else:
                axis.text(0.5, 0.5, "not used", ha="center", transform=axis.transAxes)
            axis.set_title(title)
            axis.grid(alpha=0.3)
        for axis in axes[-1]:
            axis.set_xlabel("optimizer step")
        path = self.path.with_name("curves.png")
        write_atomically(path, lambda beside: figure.savefig(beside, format="png", dpi=120))
        return path


def _line(row: dict) -> str:
    return json.dumps(row) + "\n"


@functools.cache
def pipeline_config(name_or_path: str, revision: str | None) -> dict:
    """What is saved with a pipeline; of a checkpoint, which has nothing of the kind, {}, and it is said once."""
    try:
        return PixelREPAPipeline.load_config(name_or_path, revision=revision)
    except OSError as error:
        logger.warning(f"{name_or_path} has no guidance to take over, the preset's is saved ({error}).")
        return {}


@functools.cache
def _guidance_of(name_or_path: str, revision: str | None) -> dict:
    """The guidance saved with a pipeline, {} where there is none. Without classes no scale has a meaning."""
    config = pipeline_config(name_or_path, revision)
    if not config:
        return {}
    names = {"guidance_scale", "guidance_interval"}
    if JiTTransformer2DModel.load_config(name_or_path, subfolder="transformer", revision=revision)["num_classes"] == 1:
        names.remove("guidance_scale")
    return {name: config[name] for name in names if config.get(name) is not None}


def build_pipeline(
    args: TrainingArguments, transformer: JiTTransformer2DModel, id2label: dict[str, str] | None
) -> PixelREPAPipeline:
    """
    The pipeline of a run with the guidance that is saved with it: the arguments', else that of the pipeline the run
    started from, else the papers' for its preset and objective.
    """
    preset = get_preset(args.preset)
    guidance = {
        "guidance_scale": preset.guidance_scale if args.objective == "pixelrepa" else preset.guidance_scale_jit,
        "guidance_interval": preset.guidance_interval,
    }
    if args.pretrained_model_name_or_path is not None:
        guidance |= _guidance_of(args.pretrained_model_name_or_path, args.revision)
    if transformer.config.num_classes == 1:
        guidance["guidance_scale"] = 1.0
    guidance |= {name: getattr(args, name) for name in guidance if getattr(args, name) is not None}
    return PixelREPAPipeline(transformer, JiTFlowMatchScheduler(), id2label=id2label, **guidance)


def publishable(args: TrainingArguments) -> dict:
    """The arguments without places on this machine, which are in arguments.json alone."""
    places = ("train_data_dir", "data_files", "cache_dir", "output_dir", "logging_dir", "teacher_cache_dir")
    places += ("eval_reference", "resume_from_checkpoint")
    repositories = ("teacher_model_name_or_path", "pretrained_model_name_or_path", "dataset_name", "eval_network")
    facts = {name: value for name, value in args.saved().items() if name not in places}
    local = {name for name in repositories if facts[name] is not None and Path(facts[name]).exists()}
    return facts | dict.fromkeys(local, "a local folder")


class Exporter:
    """What a run hands out of its model at any step: samples, metrics, pipeline folders, branches on the Hub.

    All are of the first EMA, or without EMAs of the online weights. Every method is called on every process.

    Args:
        args: of the run.
        accelerator: of the run.
        objective: as prepared by the accelerator.
        ema: the averages, or None.
        id2label: class names, or None.
        journal: receives the metrics.
        spaces: what `evaluate` measures in; see [`open_evaluation`].
        pusher: on the main process of a run that is pushed to the Hub, else None.
        step: where the run starts; samples of later steps are not its own.
    """

    def __init__(
        self,
        args: TrainingArguments,
        accelerator: Accelerator,
        objective: torch.nn.Module,
        ema: ConstantDecayEMA | None,
        id2label: dict[str, str] | None,
        journal: Journal,
        spaces: list[FeatureSpace],
        pusher: BackgroundPusher | None,
        step: int,
    ):
        self.args, self.accelerator, self.objective, self.ema = args, accelerator, objective, ema
        self.id2label, self.journal, self.spaces, self.pusher = id2label, journal, spaces, pusher
        self.output_dir = Path(args.output_dir)
        number = {path: path.stem.removeprefix("step-") for path in self.output_dir.glob("samples/step-*.png")}
        earlier = [path for path, digits in number.items() if digits.isdecimal() and int(digits) <= step]
        self.samples = max(earlier, key=lambda path: int(number[path]), default=None)

    def pipeline(self) -> PixelREPAPipeline:
        """A quiet pipeline whose weights are tensors of their own; never the module that is being trained."""
        trained = self.accelerator.unwrap_model(self.objective).transformer
        weights = trained.state_dict() if self.ema is None else self.ema.state_dict_for(self.ema.decays[0])
        full = {k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in weights.items()}
        transformer = with_weights(trained.config, full).to(self.accelerator.device)
        pipeline = build_pipeline(self.args, transformer, self.id2label)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def save_pipeline(self, folder: Path, step: int) -> None:
        """A folder that generates, with the facts its card is written from."""
        pipeline, device = self.pipeline(), self.accelerator.device
        num_processes = self.accelerator.num_processes
        global_batch_size = self.args.global_batch_size(num_processes)
        facts = {
            **publishable(self.args),
            "steps": step,
            "images_seen": step * global_batch_size,
            "global_batch_size": global_batch_size,
            "num_processes": num_processes,
            "resolved_learning_rate": self.args.resolved_learning_rate(num_processes),
            "device": device_name(device),
            "versions": {**versions(), "datasets": datasets.__version__},
        }

        def write(path: Path) -> None:
            if self.accelerator.is_main_process:
                pipeline.save_pretrained(path)
                (path / "training_arguments.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
                if self.samples is not None and self.samples.exists():
                    shutil.copyfile(self.samples, path / "samples.png")

        write_folder(folder, write, self.accelerator.is_main_process, self.accelerator.wait_for_everyone)

    def push_checkpoint(self, step: int) -> None:
        """The pipeline to a branch named after the checkpoint; the run does not wait for it."""
        folder = self.output_dir / "hub" / f"checkpoint-{step}"
        self.save_pipeline(folder, step)
        if self.pusher is not None:
            for old in folder.parent.iterdir():
                if old != folder and old not in self.pusher.pending | self.pusher.failed:
                    shutil.rmtree(old)
            self.pusher.push(folder, revision=folder.name)

    def evaluate(self, step: int) -> str:
        """Journals --eval_metrics and returns them as a sentence.

        Every process makes its share of the images; none draws from a global random state.
        """
        pipeline, args = self.pipeline(), self.args
        cast_transformer(pipeline.transformer, torch.bfloat16 if args.mixed_precision == "bf16" else torch.float32)
        metrics = evaluate_pipeline(
            pipeline,
            self.spaces,
            args.eval_num_samples,
            batch_size=args.eval_batch_size,
            seed=args.seed,
            num_inference_steps=args.eval_inference_steps,
        )
        self.journal.log(step, metrics)
        return f"Step {step}: " + ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())

    def write_samples(self, step: int) -> None:
        """A grid, from the same noise every time, to samples/ and to the trackers that take images."""
        pipeline = self.pipeline()
        if self.accelerator.is_main_process:
            self._draw_samples(pipeline, step)
        self.accelerator.wait_for_everyone()

    def _draw_samples(self, pipeline: PixelREPAPipeline, step: int) -> None:
        args, num_classes = self.args, pipeline.transformer.config.num_classes
        num_images = args.num_validation_images
        labels = [
            i % num_classes if num_images > num_classes else i * num_classes // num_images for i in range(num_images)
        ]
        images = []
        for start in range(0, num_images, args.train_batch_size):
            chunk = labels[start : start + args.train_batch_size]
            noise = seeded(range(args.seed + start, args.seed + start + len(chunk)))
            with self.accelerator.autocast():
                images += pipeline(chunk, generator=noise, num_inference_steps=args.validation_inference_steps).images
        enlarge = max(1, 64 // pipeline.transformer.config.sample_size)
        images = [image.resize([side * enlarge for side in image.size], Image.Resampling.NEAREST) for image in images]
        names = pipeline.config.id2label or {}
        grid = make_grid(images, labels=None if num_classes == 1 else [names.get(str(i), str(i)) for i in labels])

        path = self.output_dir / "samples" / f"step-{step:07d}.png"
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, lambda beside: grid.save(beside, format="PNG"))
        self.samples = path
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.log_images({"samples": np.asarray(grid)[None]}, step=step, dataformats="NHWC")
            elif hasattr(tracker, "log_images"):
                tracker.log_images({"samples": [grid]}, step=step)


def open_evaluation(args: TrainingArguments, pipeline: PixelREPAPipeline, device: torch.device) -> list[FeatureSpace]:
    """
    The feature space of --eval_metrics, and before it is loaded a look at whether the pipeline can be measured.

    Raises:
        ValueError, FileNotFoundError: see `evaluation.pipeline_images` and `evaluation.open_spaces`.
    """
    pipeline_images(pipeline, args.eval_num_samples, num_inference_steps=args.eval_inference_steps)

    def encoder(name: str) -> VisionEncoderNetwork:
        return VisionEncoderNetwork.from_pretrained(name, args.eval_image_size, args.eval_pooling)

    networks = {
        "inception": lambda: InceptionNetwork(args.eval_network),
        "dinov2": lambda: encoder(args.eval_network or "facebook/dinov2-large"),
        "teacher": lambda: encoder(args.eval_network or args.teacher_model_name_or_path),
    }
    if args.eval_reference is None and args.eval_metrics != ["inception_score"]:
        raise ValueError(
            f"--eval_metrics {' '.join(args.eval_metrics)} compare with real images: make their statistics with "
            "pipelines/prepare_reference.py and give the file as --eval_reference."
        )
    references = dict.fromkeys(networks, args.eval_reference)
    return open_spaces(args.eval_metrics, args.eval_num_samples, networks, references, device)


# ------------------------------------------------------------------------------------------------------------- dry run


def teacher_config(args: TrainingArguments) -> PretrainedConfig:
    """The teacher's vision configuration, without its weights."""
    if args.teacher_model_name_or_path == "facebook/dinov2-base":
        return Dinov2Config()  # its defaults are that model: the published recipes need no network to be checked
    config = AutoConfig.from_pretrained(
        args.teacher_model_name_or_path, revision=args.teacher_revision, trust_remote_code=False
    )
    return getattr(config, "vision_config", config)


def estimate_memory(
    args: TrainingArguments, config: dict, transformer: int, projector: int, teacher: int
) -> dict[str, float]:
    """
    Of the numbers of parameters, and of the transformer's configuration:

    GiB per process at the peak of a step, unsharded. Weights, gradients and optimizer are exact; activations are an
    estimate for eager fused attention: for each token of a block two float32 residuals and, in the compute type, 18 widths
    (norms, queries, keys, values, attention, gates) and 3 feed-forward widths; checkpointing keeps one residual.
    """
    width = config["num_attention_heads"] * config["attention_head_dim"]
    hidden = int(width * config["mlp_ratio"] * 2 / 3)
    tokens = (config["sample_size"] // config["patch_size"]) ** 2
    size = 2 if args.mixed_precision in ("fp16", "bf16") else 4
    per_token = 8 * width + size * (18 * width + 3 * hidden)
    plain = tokens * config["in_context_start"]
    extended = (tokens + config["in_context_len"]) * (config["num_layers"] - config["in_context_start"])
    if args.objective == "pixelrepa":
        extended += (tokens + config["in_context_len"]) * args.adapter_layers
    passed = plain + extended
    activations = passed * (4 * width) + (tokens * per_token) if args.gradient_checkpointing else passed * per_token
    averages = len(args.ema_decays) if args.use_ema and not args.ema_offload else 0
    parts = {
        "weights and gradients": 8 * (transformer + projector),
        "optimizer": (2 if args.use_8bit_adam else 8) * (transformer + projector),
        "EMAs": 4 * averages * transformer,
        "teacher": size * teacher,
        f"activations (estimate, batch {args.train_batch_size})": activations * args.train_batch_size,
    }
    return {name: value / 2**30 for name, value in parts.items()}


def peak_memory(device: torch.device) -> float:
    """GiB: the allocator's peak on a GPU, the process's resident peak on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
