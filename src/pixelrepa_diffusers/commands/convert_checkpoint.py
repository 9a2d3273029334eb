"""A published PixelREPA or JiT checkpoint into a diffusers pipeline, and back.

    python pipelines/convert_checkpoint.py --checkpoint_path checkpoint-last.pth --output_dir pixelrepa-b-16
    python pipelines/convert_checkpoint.py --to_original --pipeline pixelrepa-b-16 --output_path back.pth

The folder holds the pipeline (transformer, scheduler, guidance, class names) and, for a PixelREPA checkpoint, `adapter/`:
the Masked Transformer Adapter, which the pipeline ignores and further training needs. Nothing in the pickle is run.

Guidance is saved with the pipeline. It is what the flags say; without them what the paper evaluates the model of these
shapes with (PixelREPA's value with an adapter, JiT's without); for other shapes what the checkpoint's args say.

On the way back the pipeline's one transformer is written as `model`, `model_ema1` and `model_ema2`; the teacher, the
optimizer and the epoch are not written. `pixelrepa_diffusers.checkpoints.save_original_checkpoint` takes EMAs of their own.
"""

import argparse
import contextlib
import json
import shlex
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
from safetensors import SafetensorError

from .. import JiTFlowMatchScheduler, PixelREPAPipeline
from ..adapter import MaskedTransformerAdapter
from ..cli import parse, run
from ..conversion import (
    load_original_checkpoint,
    read_original_checkpoint,
    save_original_checkpoint,
)
from ..files import only_writer
from ..presets import matching_presets
from ..hub import imagenet_id2label


@dataclass
class ConvertArguments:
    to_original: bool = field(default=False, metadata={"help": "From a pipeline to a published checkpoint."})

    checkpoint_path: Path | None = field(default=None, metadata={"help": "The published .pth file."})
    output_dir: Path | None = field(default=None, metadata={"help": "The pipeline's folder: new, or empty."})
    weights: str = field(
        default="ema1",
        metadata={
            "help": "The set to convert: ema1 (decay 0.9999, the evaluated one), ema2 (0.9996), or model.",
            "choices": ["ema1", "ema2", "model"],
        },
    )
    id2label: Path | None = field(
        default=None,
        metadata={"help": 'JSON of class names, {"0": "tench", ...}; ImageNet-1k\'s for the papers\' variants.'},
    )
    guidance_scale: float | None = field(default=None, metadata={"help": "Saved with the pipeline; 1 for none."})
    guidance_interval: list[float] | None = field(
        default=None, metadata={"help": "LOW HIGH, the times guidance acts in; saved with the pipeline."}
    )
    in_context_start: int | None = field(
        default=None, metadata={"help": "Block before which the class tokens enter, for shapes of no preset."}
    )
    noise_scale: float | None = field(
        default=None, metadata={"help": "Standard deviation of the training noise, for a checkpoint that has lost it."}
    )
    dtype: str = field(
        default="float32", metadata={"help": "Of the saved weights.", "choices": ["float32", "bfloat16", "float16"]}
    )
    max_shard_size: str = field(default="10GB", metadata={"help": "Weights beyond it are split into several files."})

    pipeline: Path | None = field(default=None, metadata={"help": "With --to_original: a saved pipeline's folder."})
    output_path: Path | None = field(default=None, metadata={"help": "With --to_original: the new .pth file."})


def read_id2label(path: Path) -> dict[str, str]:
    """Class id → name from a JSON object. The pipeline checks ids and names against its model."""

    def distinct(pairs: list[tuple[str, str]]) -> dict[str, str]:
        keys = [key for key, _ in pairs]
        wrong = [key for key in keys if not key.isdecimal() or str(int(key)) != key or keys.count(key) > 1]
        if wrong:
            raise ValueError(
                f'--id2label: the keys of {path} must be distinct class ids like "0", not so {wrong[:8]}.'
            )
        return dict(pairs)

    try:
        text = path.read_text(encoding="utf-8")
        json.loads(text)
    except (ValueError, RecursionError) as error:  # also: no UTF-8, a number of thousands of digits, absurdly deep
        raise ValueError(f"--id2label: {path} is not valid JSON: {error}") from None
    names = json.loads(text, object_pairs_hook=distinct)
    if not isinstance(names, dict):
        raise ValueError(f"--id2label: {path} must hold a JSON object from class ids to names, got {names!r:.80}.")
    return names


def choose_guidance(
    given: ConvertArguments, config: dict, is_pixelrepa: bool, recorded: argparse.Namespace
) -> tuple[float, tuple[float, float], str]:
    """(scale, interval, where they come from): the flags, the paper's for a preset's shapes, the checkpoint's args."""
    scale, interval = getattr(recorded, "cfg", 1.0), (0.1, 1.0)
    source = (
        "the checkpoint's args"
        if hasattr(recorded, "cfg")
        else "neither a flag, nor a preset, nor the checkpoint names one"
    )
    if hasattr(recorded, "interval_min") and hasattr(recorded, "interval_max"):
        interval = (recorded.interval_min, recorded.interval_max)
    for name, preset in matching_presets(config).items():
        scale = preset.guidance_scale if is_pixelrepa else preset.guidance_scale_jit
        interval, source = preset.guidance_interval, f"the paper's for {name}"
        if hasattr(recorded, "cfg") and recorded.cfg != scale:
            source += f"; the checkpoint's args say {recorded.cfg}"
    if given.guidance_scale is not None:
        scale, source = given.guidance_scale, "--guidance_scale"
    return scale, tuple(given.guidance_interval or interval), source


def write_beside(target: Path, save: Callable[[Path], None]) -> None:
    """Has `save` write a file or folder into a folder beside `target` and moves it into place.

    A run that is stopped leaves nothing half-written at `target`; what a killed one left beside it goes with the next. A
    second conversion to the same place at the same time is refused.

    Raises:
        OSError: the disk is full or does not take the file; the message names the target.
    """
    workshop = target.with_name(f".{target.name}.incomplete")
    with only_writer(workshop):
        partial = workshop / target.name
        try:
            remove(partial)
            save(partial)
            refuse_to_overwrite(target)  # another conversion may have ended since this one looked
            if target.is_dir():
                target.rmdir()
            partial.rename(target)
        except SafetensorError as error:  # it names no file
            free = shutil.disk_usage(workshop).free / 2**20
            raise OSError(f"{target} could not be written: {error} ({free:.0f} MiB are free there).") from error
        finally:
            with contextlib.suppress(OSError):
                remove(partial)
                # The lock goes last: from then on another conversion may hold a new one, and its folder stays.
                (workshop / ".lock").unlink()
                workshop.rmdir()


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def refuse_to_overwrite(target: Path) -> None:
    """FileExistsError unless there is nothing, or an empty folder, at `target`."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target} exists and is not empty. Nothing is overwritten: choose another.")


def from_original(args: ConvertArguments) -> None:
    output_dir = args.output_dir.resolve()
    refuse_to_overwrite(output_dir)
    id2label = read_id2label(args.id2label) if args.id2label else None
    transformer, adapter = load_original_checkpoint(
        args.checkpoint_path, args.weights, args.in_context_start, args.noise_scale
    )
    recorded = read_original_checkpoint(args.checkpoint_path).get("args", argparse.Namespace())
    scale, interval, source = choose_guidance(args, transformer.config, adapter is not None, recorded)
    scheduler = JiTFlowMatchScheduler(solver=getattr(recorded, "sampling_method", "heun"))
    if id2label is None and transformer.config.num_classes == 1000 and matching_presets(transformer.config):
        id2label = imagenet_id2label()
    pipe = PixelREPAPipeline(transformer, scheduler, id2label, scale, interval)
    models = {"transformer": transformer, **({"adapter": adapter} if adapter is not None else {})}
    for model in models.values():
        for name, parameter in model.named_parameters():
            # The timestep embedding stays in float32, as it does when a pipeline is loaded in half precision.
            if not set(name.split(".")) & set(model._keep_in_fp32_modules or ()):
                parameter.data = parameter.data.to(getattr(torch, args.dtype))

    def save(folder: Path) -> None:
        pipe.save_pretrained(folder, max_shard_size=args.max_shard_size)
        if adapter is not None:
            adapter.save_pretrained(folder / "adapter", max_shard_size=args.max_shard_size)

    write_beside(output_dir, save)

    config = transformer.config
    millions = {name: sum(p.numel() for p in model.parameters()) / 1e6 for name, model in models.items()}
    label = 0 if id2label is None else id2label.get("0", 0)
    command = ["python", "pipelines/generate.py", "--pipeline", str(args.output_dir), "--class_labels", str(label)]
    command += ["--seeds", "0-7", "--output_dir", "images"]
    print(
        f"{args.checkpoint_path}, weights {args.weights} → {args.output_dir}, {args.dtype}\n"
        f"  {'PixelREPA' if adapter is not None else 'JiT'}: "
        + ", ".join(f"{name} {count:.2f} M parameters" for name, count in millions.items())
        + f"\n  images {config.sample_size}×{config.sample_size}, patch {config.patch_size}, {config.num_classes} classes "
        f"({'no' if id2label is None else len(id2label)} names), class tokens before block {config.in_context_start}\n"
        f"  noise scale {config.noise_scale}, t_eps {config.t_eps}, {scheduler.config.solver} solver\n"
        f"  guidance {pipe.config.guidance_scale} on {tuple(pipe.config.guidance_interval)} ({source})\n"
        f"Next: {shlex.join(command)}"
    )


def to_original(args: ConvertArguments) -> None:
    if args.output_path.exists():
        raise FileExistsError(f"--output_path {args.output_path} exists. Nothing is overwritten: choose another.")
    if not (args.pipeline / "model_index.json").is_file():
        raise FileNotFoundError(
            f"--pipeline {args.pipeline} is not a saved pipeline's folder: no model_index.json in it."
        )
    pipe = PixelREPAPipeline.from_pretrained(args.pipeline)
    adapter = None
    if (args.pipeline / "adapter").is_dir():
        adapter = MaskedTransformerAdapter.from_pretrained(args.pipeline / "adapter")
    low, high = pipe.config.guidance_interval
    recorded = {"cfg": pipe.config.guidance_scale, "interval_min": low, "interval_max": high}
    if isinstance(pipe.scheduler, JiTFlowMatchScheduler):
        recorded["sampling_method"] = pipe.scheduler.config.solver
    write_beside(
        args.output_path.resolve(),
        lambda path: save_original_checkpoint(path, pipe.transformer, adapter, args=recorded),
    )
    print(
        f"{args.pipeline} → {args.output_path}: the transformer as model, model_ema1 and model_ema2"
        + (", with its adapter" if adapter is not None else ", a plain JiT without adapter")
        + ".\nLeft out: class names; teacher (loaded from its own weights), optimizer and epoch, so that training resumed "
        "by the published code begins at epoch 0."
    )


def main(args: ConvertArguments) -> None:
    """Converts in the direction that `args` names; refuses options that belong to the other one."""
    backward = {"pipeline": args.pipeline, "output_path": args.output_path}
    forward = {"checkpoint_path": args.checkpoint_path, "output_dir": args.output_dir}
    needed = backward if args.to_original else forward
    direction = "with" if args.to_original else "without"
    if missing := [f"--{name}" for name, value in needed.items() if value is None]:
        raise ValueError(f"{' and '.join(missing)} needed {direction} --to_original.")
    others = backward if not args.to_original else {f.name for f in fields(args)} - {"to_original", *backward}
    if foreign := [f"--{f.name}" for f in fields(args) if f.name in others and getattr(args, f.name) != f.default]:
        raise ValueError(f"{', '.join(foreign)} has no meaning {direction} --to_original.")
    if args.to_original:
        to_original(args)
    else:
        from_original(args)


def cli() -> None:
    run(lambda: main(parse(ConvertArguments, __doc__.partition("\n")[0])))
