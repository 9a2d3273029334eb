"""Exports of a run: sample grids, evaluations, pipeline folders and pushes to the Hub."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from diffusers import ModelMixin
from PIL import Image

from ..ema import ConstantDecayEMA
from ..evaluation import (
    FeatureSpace,
    evaluate_pipeline,
    open_network,
    open_spaces,
    pipeline_images,
)
from ..files import write_atomically, write_folder, write_json
from ..hub import BackgroundPusher, publishable
from ..pipeline_pixelrepa import PixelREPAPipeline
from ..presets import get_preset
from ..sampling import cast_transformer, device_name, sample_grid, versions
from ..scheduling_jit import JiTFlowMatchScheduler
from ..transformer_jit import JiTTransformer2DModel
from .arguments import TrainingArguments
from .builders import pretrained_settings
from .checkpoints import gather_weights, save_lora, with_weights
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


def training_facts(args: TrainingArguments, accelerator: Accelerator, step: int) -> dict:
    """Return the content of training_arguments.json, for the model card."""
    global_batch_size = args.global_batch_size(accelerator.num_processes)
    return {
        **publishable(args.saved()),
        "steps": step,
        "images_seen": step * global_batch_size,
        "global_batch_size": global_batch_size,
        "num_processes": accelerator.num_processes,
        "resolved_learning_rate": args.resolved_learning_rate(accelerator.num_processes),
        "device": device_name(accelerator.device),
        "versions": {**versions(), "datasets": datasets.__version__},
    }


class Exporter:
    """
    Export the sampled weights of a run: the first EMA, or the online weights without EMAs.

    Every method must be called on every process.

    Args:
        args, accelerator, ema, metrics: Parts of the run.
        model (`ModelMixin`): The trained model, which the EMAs follow.
        make_pipeline (`Callable`): Maps a copy of the model to its pipeline.
        step (`int`): Where the run starts: sample grids of later steps belong to another run.
        spaces (`list[FeatureSpace]`, *optional*): What evaluations measure.
        pusher (`BackgroundPusher`, *optional*): On the main process, where checkpoints are pushed.
    """

    def __init__(
        self,
        args: TrainingArguments,
        accelerator: Accelerator,
        model: ModelMixin,
        ema: ConstantDecayEMA | None,
        make_pipeline: Callable[[ModelMixin], PixelREPAPipeline],
        metrics: MetricLogger,
        step: int,
        spaces: Sequence[FeatureSpace] = (),
        pusher: BackgroundPusher | None = None,
    ):
        self.args, self.accelerator, self.model, self.ema = args, accelerator, model, ema
        self.make_pipeline, self.metrics, self.spaces, self.pusher = make_pipeline, metrics, spaces, pusher
        self.output_dir = Path(args.output_dir)
        grids = sorted(self.output_dir.glob("samples/step-*.png"))
        self.samples = next((path for path in reversed(grids) if path.name <= _grid_name(step)), None)

    def _weights(self) -> dict[str, torch.Tensor]:
        return self.model.state_dict() if self.ema is None else self.ema.state_dict_for(self.ema.decays[0])

    def pipeline(self, everywhere: bool = False) -> PixelREPAPipeline | None:
        """Return a pipeline that shares no module with training, on the main process or on all of them."""
        keep = everywhere or self.accelerator.is_main_process
        weights = gather_weights(self._weights(), keep)
        if not keep:
            return None
        pipeline = self.make_pipeline(with_weights(self.model, weights).to(self.accelerator.device))
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def save_pipeline(self, folder: Path, step: int) -> None:
        """Save the pipeline, with the facts for its model card."""
        pipeline, facts = self.pipeline(), training_facts(self.args, self.accelerator, step)

        def write(path: Path) -> None:
            if self.accelerator.is_main_process:
                pipeline.save_pretrained(path)
                save_lora(self._weights(), path / "lora")
                self.write_record(path, facts)
                if self.samples is not None and self.samples.exists():
                    shutil.copyfile(self.samples, path / "samples.png")

        write_folder(folder, write, self.accelerator.is_main_process, self.accelerator.wait_for_everyone)

    def write_record(self, folder: Path, facts: dict) -> None:
        """Write the facts of the training into the pipeline's folder."""
        write_json(folder / "training_arguments.json", facts)

    def push_checkpoint(self, step: int) -> None:
        """Push the pipeline to a branch named after the checkpoint, in the background, then delete the local copy."""
        folder = self.output_dir / "hub" / f"checkpoint-{step}"
        self.save_pipeline(folder, step)
        if self.pusher is not None:
            push = self.pusher.push(folder, revision=folder.name)
            push.add_done_callback(lambda done: done.exception() or shutil.rmtree(folder))

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
            args = self.args
            number, num_steps = args.num_validation_images, args.validation_inference_steps
            try:
                with self.accelerator.autocast():
                    grid = sample_grid(pipeline, number, num_steps, args.train_batch_size, args.seed)
            except ValueError as error:  # NaN in an image; the other processes wait below
                logger.warning(f"No sample grid at step {step}: {error}")
            else:
                self._show(grid, step)
        self.accelerator.wait_for_everyone()

    def _show(self, grid: Image.Image, step: int) -> None:
        self.samples = self.output_dir / "samples" / _grid_name(step)
        self.samples.parent.mkdir(exist_ok=True)
        write_atomically(self.samples, lambda path: grid.save(path, format="PNG"))
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.log_images({"samples": np.asarray(grid)[None]}, step=step, dataformats="NHWC")
            elif hasattr(tracker, "log_images"):
                tracker.log_images({"samples": [grid]}, step=step)


def _grid_name(step: int) -> str:
    return f"step-{step:07d}.png"


def open_evaluation(args: TrainingArguments, pipeline: PixelREPAPipeline, device: torch.device) -> list[FeatureSpace]:
    """Check that the pipeline can be evaluated, then load the feature network and reference of --eval_metrics."""
    pipeline_images(pipeline, args.eval_num_samples, num_inference_steps=args.eval_inference_steps)

    encoder = {"image_size": args.eval_image_size, "pooling": args.eval_pooling}
    networks = {
        "inception": partial(open_network, "inception", args.eval_network),
        "dinov2": partial(open_network, args.eval_network or "facebook/dinov2-large", **encoder),
        "teacher": partial(open_network, args.eval_network or args.teacher_model_name_or_path, **encoder),
    }
    references = dict.fromkeys(networks, args.eval_reference)
    return open_spaces(args.eval_metrics, args.eval_num_samples, networks, references, device)
