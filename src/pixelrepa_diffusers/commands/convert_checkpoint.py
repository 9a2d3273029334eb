"""Convert a published PixelREPA or JiT checkpoint to a diffusers pipeline, or a pipeline back to a checkpoint.

    pixelrepa-convert --checkpoint_path checkpoint-last.pth --output_dir pixelrepa-b-16
    pixelrepa-convert --to_original --pipeline pixelrepa-b-16 --output_path back.pth

The folder holds the pipeline and, for a PixelREPA checkpoint, `adapter/`, which only further training needs.
"""

from __future__ import annotations

import argparse
import json
import shlex
from dataclasses import dataclass
from pathlib import Path

import torch

from .. import JiTFlowMatchScheduler, PixelREPAPipeline
from ..adapter import MaskedTransformerAdapter
from ..cli import flag, parse, run
from ..conversion import load_original_checkpoint, read_original_checkpoint, save_original_checkpoint
from ..files import write_folder
from ..presets import imagenet_id2label, matching_presets
from ..sampling import DTYPES, cast_transformer


@dataclass
class ConvertArguments:
    to_original: bool = flag(False, "Convert a pipeline to a published checkpoint.")

    checkpoint_path: Path | None = flag(None, "The published .pth file.")
    output_dir: Path | None = flag(None, "The folder of the pipeline; new or empty.")
    weights: str = flag(
        "ema1",
        "The weights to convert: ema1 (decay 0.9999, used for evaluation), ema2 (0.9996), or model (no EMA).",
        choices=["ema1", "ema2", "model"],
    )
    id2label: Path | None = flag(
        None, 'JSON file of class names, {"0": "tench", ...}. Default: ImageNet-1k\'s for the papers\' variants.'
    )
    guidance_scale: float | None = flag(
        None,
        "Guidance scale saved with the pipeline; 1 turns guidance off. Default: the paper's for the papers' variants, "
        "else the checkpoint's args.",
        ge=0,
    )
    guidance_interval: list[float] | None = flag(
        None, "LOW HIGH, the guidance interval saved with the pipeline; same default.", ge=0, le=1, nargs=2
    )
    in_context_start: int | None = flag(
        None, "Block before which the class tokens are prepended; needed for sizes of no preset.", ge=0
    )
    noise_scale: float | None = flag(
        None, "Standard deviation of the training noise, if the checkpoint does not record it.", gt=0
    )
    dtype: str = flag("float32", "Dtype of the saved weights.", choices=DTYPES)
    max_shard_size: str = flag("10GB", "Maximum size of a weight file; larger weights are split.")

    pipeline: Path | None = flag(None, "With --to_original: the folder of the pipeline.")
    output_path: Path | None = flag(None, "With --to_original: the new .pth file.")


def read_id2label(args: ConvertArguments, config: dict) -> dict[str, str] | None:
    """Class names of --id2label, else ImageNet's for the papers' variants."""
    if args.id2label is None:
        return imagenet_id2label() if config.num_classes == 1000 and matching_presets(config) else None
    try:
        return dict(json.loads(args.id2label.read_text(encoding="utf-8")))
    except (TypeError, ValueError) as error:
        raise ValueError(f"--id2label {args.id2label} is not a JSON object of class names: {error}") from None


def choose_guidance(
    args: ConvertArguments, config: dict, is_pixelrepa: bool, recorded: argparse.Namespace
) -> tuple[float, tuple[float, ...], str]:
    """(scale, interval, source): from the flags, else the paper's for these sizes, else the checkpoint's args."""
    scale, source = getattr(recorded, "cfg", 1.0), "the checkpoint's args"
    interval = (getattr(recorded, "interval_min", 0.1), getattr(recorded, "interval_max", 1.0))
    for name, preset in matching_presets(config).items():
        scale = preset.guidance_scale if is_pixelrepa else preset.guidance_scale_jit
        interval, source = preset.guidance_interval, f"the paper's for {name}"
    if args.guidance_scale is not None:
        scale, source = args.guidance_scale, "--guidance_scale"
    return scale, tuple(args.guidance_interval or interval), source


def from_original(args: ConvertArguments) -> None:
    if args.output_dir.exists() and any(args.output_dir.iterdir()):
        raise FileExistsError(f"--output_dir {args.output_dir} exists and is not empty. Nothing is overwritten.")
    transformer, adapter = load_original_checkpoint(
        args.checkpoint_path, args.weights, args.in_context_start, args.noise_scale
    )
    config = transformer.config
    id2label = read_id2label(args, config)
    recorded = read_original_checkpoint(args.checkpoint_path).get("args", argparse.Namespace())
    scale, interval, source = choose_guidance(args, config, adapter is not None, recorded)
    scheduler = JiTFlowMatchScheduler(solver=getattr(recorded, "sampling_method", "heun"))
    pipe = PixelREPAPipeline(transformer, scheduler, id2label, scale, interval)
    models = {"transformer": transformer, **({"adapter": adapter} if adapter is not None else {})}
    cast_transformer(transformer, getattr(torch, args.dtype))
    if adapter is not None:
        adapter.to(getattr(torch, args.dtype))

    def save(folder: Path) -> None:
        pipe.save_pretrained(folder, max_shard_size=args.max_shard_size)
        if adapter is not None:
            adapter.save_pretrained(folder / "adapter", max_shard_size=args.max_shard_size)

    write_folder(args.output_dir.resolve(), save)

    sizes = [f"{name} {model.num_parameters() / 1e6:.2f} M" for name, model in models.items()]
    names = "without" if id2label is None else f"with {len(id2label)}"
    label = str((id2label or {}).get("0", 0))
    command = ["pixelrepa-generate", "--pipeline", str(args.output_dir), "--class_labels", label, "--seeds", "0-7"]
    print(
        f"{args.checkpoint_path}, weights {args.weights} → {args.output_dir}, {args.dtype}\n"
        f"  {'JiT' if adapter is None else 'PixelREPA'}, parameters: {', '.join(sizes)}\n"
        f"  {config.sample_size}×{config.sample_size} px, patch {config.patch_size}, {config.num_classes} classes {names} "
        f"names, class tokens before block {config.in_context_start}\n"
        f"  noise scale {config.noise_scale}, t_eps {config.t_eps}, {scheduler.config.solver} solver\n"
        f"  guidance {scale} on {interval} ({source})\n"
        "The weights keep the licence of their authors; name it with --license when you publish them.\n"
        f"Next: {shlex.join([*command, '--output_dir', 'images'])}"
    )


def to_original(args: ConvertArguments) -> None:
    if not (args.pipeline / "model_index.json").is_file():
        raise FileNotFoundError(
            f"--pipeline {args.pipeline} is not the folder of a pipeline: it has no model_index.json."
        )
    pipe = PixelREPAPipeline.from_pretrained(args.pipeline)
    adapter = None
    if (args.pipeline / "adapter").is_dir():
        adapter = MaskedTransformerAdapter.from_pretrained(args.pipeline / "adapter")
    low, high = pipe.config.guidance_interval
    recorded = {"cfg": pipe.config.guidance_scale, "interval_min": low, "interval_max": high}
    if isinstance(pipe.scheduler, JiTFlowMatchScheduler):
        recorded["sampling_method"] = pipe.scheduler.config.solver
    save_original_checkpoint(args.output_path, pipe.transformer, adapter, args=recorded)
    print(
        f"{args.pipeline} → {args.output_path}: the transformer as model, model_ema1 and model_ema2, "
        f"{'without an' if adapter is None else 'with its'} adapter.\n"
        "Not written: class names, teacher, optimizer and epoch; training with the published code starts at epoch 0."
    )


def main(args: ConvertArguments) -> None:
    needed = ["pipeline", "output_path"] if args.to_original else ["checkpoint_path", "output_dir"]
    if missing := [f"--{name}" for name in needed if getattr(args, name) is None]:
        raise ValueError(f"{' and '.join(missing)} needed {'with' if args.to_original else 'without'} --to_original.")
    to_original(args) if args.to_original else from_original(args)


def cli() -> None:
    run(lambda: main(parse(ConvertArguments, __doc__.partition("\n")[0])))
