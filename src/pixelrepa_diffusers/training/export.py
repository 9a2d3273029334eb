"""Exports of a run: sample grids, evaluations, pipeline folders and pushes to the Hub."""

from __future__ import annotations

import shutil
from pathlib import Path

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.logging import get_logger

from ..ema import ConstantDecayEMA
from ..evaluation import (
    FeatureSpace,
    InceptionNetwork,
    VisionEncoderNetwork,
    evaluate_pipeline,
    open_spaces,
    pipeline_images,
)
from ..files import write_atomically, write_folder, write_json
from ..hub import BackgroundPusher
from ..images import make_grid
from ..pipeline_pixelrepa import PixelREPAPipeline
from ..presets import get_preset
from ..sampling import cast_transformer, device_name, seeded, versions
from ..scheduling_jit import JiTFlowMatchScheduler
from ..transformer_jit import JiTTransformer2DModel
from .arguments import TrainingArguments
from .builders import pretrained_settings
from .checkpoints import gather_weights, with_weights
from .reporting import MetricLogger


logger = get_logger(__name__)


def build_pipeline(
    args: TrainingArguments, transformer: JiTTransformer2DModel, id2label: dict[str, str] | None
) -> PixelREPAPipeline:
    """Build the pipeline of a run. Its guidance is that of the arguments, the pretrained pipeline, or the preset."""
    preset = get_preset(args.preset)
    guidance = {
        "guidance_scale": preset.guidance_scale if args.objective == "pixelrepa" else preset.guidance_scale_jit,
        "guidance_interval": preset.guidance_interval,
    }
    source = args.pretrained_model_name_or_path
    if source is not None:
        saved = dict(pretrained_settings(source, args.revision))
        if "guidance_scale" in saved:
            config = JiTTransformer2DModel.load_config(source, subfolder="transformer", revision=args.revision)
            if config["num_classes"] == 1:
                del saved["guidance_scale"]  # meaningless without classes
        guidance |= {name: saved[name] for name in guidance if name in saved}
    if transformer.config.num_classes == 1:
        guidance["guidance_scale"] = 1.0
    guidance |= {name: getattr(args, name) for name in guidance if getattr(args, name) is not None}
    return PixelREPAPipeline(transformer, JiTFlowMatchScheduler(), id2label=id2label, **guidance)


def publishable(args: TrainingArguments) -> dict:
    """Return the arguments without paths of this machine, which only arguments.json contains."""
    paths = ("train_data_dir", "data_files", "cache_dir", "output_dir", "logging_dir", "teacher_cache_dir")
    paths += ("eval_reference", "resume_from_checkpoint")
    facts = {name: value for name, value in args.saved().items() if name not in paths}
    for name in ("teacher_model_name_or_path", "pretrained_model_name_or_path", "dataset_name", "eval_network"):
        if facts[name] is not None and Path(facts[name]).exists():
            facts[name] = "a local folder"
    return facts


class Exporter:
    """
    Export the sampled weights of a run: the first EMA, or the online weights without EMAs.

    Every method must be called on every process; only the main one has a `pusher`. `settings` are the arguments of the
    pipeline. The run starts from `step`: sample grids of later steps belong to another run.
    """

    def __init__(
        self,
        args: TrainingArguments,
        accelerator: Accelerator,
        objective: torch.nn.Module,
        ema: ConstantDecayEMA | None,
        settings: dict,
        metrics: MetricLogger,
        spaces: list[FeatureSpace],
        pusher: BackgroundPusher | None,
        step: int,
    ):
        self.args, self.accelerator, self.objective, self.ema = args, accelerator, objective, ema
        self.settings, self.metrics, self.spaces, self.pusher = settings, metrics, spaces, pusher
        self.output_dir = Path(args.output_dir)
        grids = sorted(self.output_dir.glob("samples/step-*.png"))
        self.samples = next((path for path in reversed(grids) if path.name <= _grid_name(step)), None)

    def pipeline(self, everywhere: bool = False) -> PixelREPAPipeline | None:
        """Return a pipeline that shares no module with training, on the main process or on all of them."""
        trained = self.accelerator.unwrap_model(self.objective).transformer
        weights = trained.state_dict() if self.ema is None else self.ema.state_dict_for(self.ema.decays[0])
        keep = everywhere or self.accelerator.is_main_process
        weights = gather_weights(weights, keep)
        if not keep:
            return None
        transformer = with_weights(trained, weights).to(self.accelerator.device)
        pipeline = PixelREPAPipeline(transformer, JiTFlowMatchScheduler(), **self.settings)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def save_pipeline(self, folder: Path, step: int) -> None:
        """Save the pipeline, with the facts for its model card."""
        pipeline, num_processes = self.pipeline(), self.accelerator.num_processes
        global_batch_size = self.args.global_batch_size(num_processes)
        facts = {
            **publishable(self.args),
            "steps": step,
            "images_seen": step * global_batch_size,
            "global_batch_size": global_batch_size,
            "num_processes": num_processes,
            "resolved_learning_rate": self.args.resolved_learning_rate(num_processes),
            "device": device_name(self.accelerator.device),
            "versions": {**versions(), "datasets": datasets.__version__},
        }

        def write(path: Path) -> None:
            if self.accelerator.is_main_process:
                pipeline.save_pretrained(path)
                write_json(path / "training_arguments.json", facts)
                if self.samples is not None and self.samples.exists():
                    shutil.copyfile(self.samples, path / "samples.png")

        write_folder(folder, write, self.accelerator.is_main_process, self.accelerator.wait_for_everyone)

    def push_checkpoint(self, step: int) -> None:
        """Push the pipeline to a branch named after the checkpoint, in the background."""
        folder = self.output_dir / "hub" / f"checkpoint-{step}"
        self.save_pipeline(folder, step)
        if self.pusher is not None:
            for old in folder.parent.iterdir():
                if old != folder and old not in self.pusher.unpublished:
                    shutil.rmtree(old)
            self.pusher.push(folder, revision=folder.name)

    def evaluate(self, step: int) -> None:
        """Log --eval_metrics. Every process makes its share of the images; no global random state is used."""
        pipeline, args = self.pipeline(everywhere=True), self.args
        cast_transformer(pipeline.transformer, torch.bfloat16 if args.mixed_precision == "bf16" else torch.float32)
        metrics = evaluate_pipeline(
            pipeline,
            self.spaces,
            args.eval_num_samples,
            batch_size=args.eval_batch_size,
            seed=args.seed,
            num_inference_steps=args.eval_inference_steps,
        )
        self.metrics.log(step, metrics)
        logger.info(f"Step {step}: " + ", ".join(f"{name} {value:.4g}" for name, value in metrics.items()))

    def write_samples(self, step: int) -> None:
        """Write a sample grid, from the same noise at every step, to samples/ and to the trackers that take images."""
        pipeline = self.pipeline()
        if self.accelerator.is_main_process:
            try:
                grid = self._sample_grid(pipeline)
            except ValueError as error:  # NaN in an image; the other processes wait below
                logger.warning(f"No sample grid at step {step}: {error}")
                grid = None
        if self.accelerator.is_main_process and grid is not None:
            self.samples = self.output_dir / "samples" / _grid_name(step)
            self.samples.parent.mkdir(exist_ok=True)
            write_atomically(self.samples, lambda path: grid.save(path, format="PNG"))
            for tracker in self.accelerator.trackers:
                if tracker.name == "tensorboard":
                    tracker.log_images({"samples": np.asarray(grid)[None]}, step=step, dataformats="NHWC")
                elif hasattr(tracker, "log_images"):
                    tracker.log_images({"samples": [grid]}, step=step)
        self.accelerator.wait_for_everyone()

    def _sample_grid(self, pipeline: PixelREPAPipeline):
        """One column per class, or with fewer images than classes a square of evenly spaced classes."""
        args, num_classes = self.args, pipeline.transformer.config.num_classes
        num_images, num_steps = args.num_validation_images, args.validation_inference_steps
        columns = num_classes if 1 < num_classes <= num_images else None
        labels = [i * max(num_classes, num_images) // num_images % num_classes for i in range(num_images)]
        images = []
        for start in range(0, num_images, args.train_batch_size):
            chunk = labels[start : start + args.train_batch_size]
            generators = seeded(range(args.seed + start, args.seed + start + len(chunk)))
            with self.accelerator.autocast():
                images += pipeline(chunk, generator=generators, num_inference_steps=num_steps).images
        names = pipeline.config.id2label or {}
        captions = [names.get(str(label), str(label)) for label in labels]
        return make_grid(images, labels=None if num_classes == 1 else captions, columns=columns)


def _grid_name(step: int) -> str:
    return f"step-{step:07d}.png"


def open_evaluation(args: TrainingArguments, pipeline: PixelREPAPipeline, device: torch.device) -> list[FeatureSpace]:
    """Check that the pipeline can be evaluated, then load the feature network and reference of --eval_metrics."""
    pipeline_images(pipeline, args.eval_num_samples, num_inference_steps=args.eval_inference_steps)

    def encoder(name: str) -> VisionEncoderNetwork:
        return VisionEncoderNetwork.from_pretrained(name, args.eval_image_size, args.eval_pooling)

    networks = {
        "inception": lambda: InceptionNetwork(args.eval_network),
        "dinov2": lambda: encoder(args.eval_network or "facebook/dinov2-large"),
        "teacher": lambda: encoder(args.eval_network or args.teacher_model_name_or_path),
    }
    references = dict.fromkeys(networks, args.eval_reference)
    return open_spaces(args.eval_metrics, args.eval_num_samples, networks, references, device)
