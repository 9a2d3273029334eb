"""Helpers shared by the sampling commands: solvers by name, pipelines from folders, checkpoints and the Hub, seeded noise."""

import json
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import accelerate
import diffusers
import torch
import transformers
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from PIL import Image

from .guidance_jit import JiTGuidanceHead
from .images import make_grid
from .pipeline_pixelrepa import _GUIDANCE_KINDS, PixelREPAPipeline
from .scheduling_jit import JiTFlowMatchScheduler
from .transformer_jit import JiTTransformer2DModel


SCHEDULERS = {
    "heun": lambda: JiTFlowMatchScheduler(solver="heun"),
    "euler": lambda: JiTFlowMatchScheduler(solver="euler"),
    "flow_match_euler": FlowMatchEulerDiscreteScheduler,
    "flow_match_heun": FlowMatchHeunDiscreteScheduler,
    "unipc": lambda: UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
    "dpmpp_2m": lambda: DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
}

# Optional models of guidance; a pipeline saves them in folders of these names.
GUIDANCE_MODELS = {"guidance_head": JiTGuidanceHead, "guidance_transformer": JiTTransformer2DModel}

DTYPES = ["float32", "bfloat16", "float16"]

# Guidance settings of a call, which are also saved with a pipeline.
GUIDANCE_NAMES = tuple(f"{kind}_{setting}" for kind in _GUIDANCE_KINDS for setting in ("scale", "interval"))


def saved_guidance(pipeline: PixelREPAPipeline) -> dict[str, Any]:
    """Return the saved guidance settings, without those of components that the pipeline lacks."""
    saved = {}
    for kind, (_, component) in _GUIDANCE_KINDS.items():
        if getattr(pipeline, component) is not None:
            saved |= {name: pipeline.config[name] for name in (f"{kind}_scale", f"{kind}_interval")}
    return saved


def sampling_settings(
    pipeline: PixelREPAPipeline,
    class_labels: Sequence[int] | int,
    num_inference_steps: int,
    given: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the arguments of a call, checked: `given` guidance settings that are not `None`, the others as saved."""
    settings = {"num_inference_steps": num_inference_steps, **saved_guidance(pipeline)}
    settings |= {name: value for name, value in given.items() if value is not None}
    pipeline.check_inputs(class_labels, **settings)
    return settings


def class_names(pipeline: PixelREPAPipeline) -> list[str]:
    """Return the name of every class, or its id where it has none."""
    known = pipeline.config.id2label or {}
    return [known.get(str(label), str(label)) for label in range(pipeline.transformer.config.num_classes)]


def sample_grid(
    pipeline: PixelREPAPipeline, num_images: int, num_inference_steps: int, batch_size: int, seed: int = 0
) -> Image.Image:
    """Sample a grid with one column per class, or with fewer images than classes a square of evenly spaced classes."""
    names = class_names(pipeline)
    labels = [index * max(len(names), num_images) // num_images % len(names) for index in range(num_images)]
    images = []
    for start in range(0, num_images, batch_size):
        part = labels[start : start + batch_size]
        generators = seeded(range(seed + start, seed + start + len(part)))
        images += pipeline(part, generator=generators, num_inference_steps=num_inference_steps).images
    captions = [names[label].split(",")[0] for label in labels] if len(names) > 1 else None
    return make_grid(images, captions, columns=len(names) if 1 < len(names) <= num_images else None)


def describe_pipeline(
    name_or_path: str, revision: str | None = None, guidance_transformer: str | None = None
) -> PixelREPAPipeline:
    """
    Build a pipeline without its weights (on the meta device), to check labels and settings before anything large is read.

    Args:
        name_or_path: Folder of a saved pipeline or a training checkpoint, or a Hub id.

    Raises:
        `OSError`: If there is no pipeline under this name; the message for a training run's folder names what to pass.
    """
    folder, parts = Path(name_or_path), {}
    if str(name_or_path).startswith((".", "/", "~")) and not folder.exists():
        raise FileNotFoundError(f"There is no folder {folder}.")
    if folder.exists() and not is_checkpoint(folder) and not (folder / "model_index.json").is_file():
        raise FileNotFoundError(f"{folder} is not a saved pipeline: it has no model_index.json.{_suggestion(folder)}")
    try:
        settings = read_settings(name_or_path, revision)
        config = JiTTransformer2DModel.load_config(name_or_path, subfolder="transformer", revision=revision)
        for name, part in GUIDANCE_MODELS.items():
            if name in settings:
                parts[name] = part.load_config(name_or_path, subfolder=name, revision=revision)
    except OSError as error:
        raise OSError(
            f"{name_or_path} is neither a folder with a pipeline nor one that the Hub could deliver: {error}"
        ) from error
    if guidance_transformer is not None:
        parts["guidance_transformer"] = JiTTransformer2DModel.load_config(guidance_transformer)
    with torch.device("meta"):
        transformer = JiTTransformer2DModel.from_config(config)
        parts = {name: GUIDANCE_MODELS[name].from_config(part) for name, part in parts.items()}
    saved = {name: settings[name] for name in ("id2label", *GUIDANCE_NAMES) if name in settings}
    return PixelREPAPipeline(transformer, JiTFlowMatchScheduler(), **saved, **parts)


def fetch_pipeline(name_or_path: str, revision: str | None = None) -> tuple[Path, str | None]:
    """Return (folder, commit) of a pipeline; a Hub id is downloaded, and only then there is a commit."""
    if Path(name_or_path).is_dir():
        return Path(name_or_path), None
    folder = Path(PixelREPAPipeline.download(name_or_path, revision=revision))
    return folder, folder.name  # the snapshot's folder is named after the commit


def load_pipeline(
    folder: Path, dtype: str, transformer: Path | None = None, guidance_transformer: str | None = None
) -> PixelREPAPipeline:
    """
    Load a saved pipeline or training checkpoint onto this process's device.

    `transformer` and `guidance_transformer` are folders that replace these components.
    """
    transformer, settings = transformer or transformer_folder(folder), {"dtype": getattr(torch, dtype)}
    parts = {"transformer": JiTTransformer2DModel.from_pretrained(transformer, **settings)}
    if guidance_transformer is not None:
        parts["guidance_transformer"] = JiTTransformer2DModel.from_pretrained(guidance_transformer, **settings)
    if is_checkpoint(folder):
        pipeline = PixelREPAPipeline(scheduler=JiTFlowMatchScheduler(), **read_settings(folder), **parts)
    else:
        pipeline = PixelREPAPipeline.from_pretrained(folder, **settings, **parts)
    process = accelerate.PartialState()
    # None disables the bar outside a terminal: nested bars would write a line per refresh into a log.
    disable = None if process.is_local_main_process else True
    pipeline.set_progress_bar_config(leave=False, position=1, desc="steps", disable=disable)
    return pipeline.to(process.device)


def transformer_folder(folder: Path) -> Path:
    """Return the folder of the weights to sample; those of a training checkpoint are its first EMA, if it has one."""
    if is_checkpoint(folder):
        ema = folder / f"transformer_ema_{read_progress(folder)['arguments']['ema_decays'][0]}"
        if ema.is_dir():
            return ema
    return folder / "transformer"


def is_checkpoint(name_or_path: str | Path) -> bool:
    return Path(name_or_path, "progress.json").is_file()


def read_progress(checkpoint: str | Path) -> dict[str, Any]:
    return json.loads(Path(checkpoint, "progress.json").read_text(encoding="utf-8"))


def read_settings(name_or_path: str | Path, revision: str | None = None) -> dict[str, Any]:
    """Read the class names and guidance saved with a pipeline or a training checkpoint; older checkpoints have none."""
    if is_checkpoint(name_or_path):
        return read_progress(name_or_path).get("pipeline", {})
    return PixelREPAPipeline.load_config(name_or_path, revision=revision)


def _suggestion(path: Path) -> str:
    if path.is_file():
        return " Convert a published checkpoint with pixelrepa-convert."
    candidates = [path / "pipeline", *sorted(path.glob("checkpoint-*"), key=os.path.getmtime, reverse=True)]
    run = [folder for folder in candidates if (folder / "model_index.json").is_file() or is_checkpoint(folder)]
    return f" It is a training run: pass {run[0]}." if run else ""


def seeded(seeds: Iterable[int]) -> list[torch.Generator]:
    """Make one CPU generator per image, so that its noise depends neither on the device nor on the rest of the batch."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def cast_transformer(transformer: JiTTransformer2DModel, dtype: torch.dtype) -> None:
    """Cast in place as `from_pretrained(dtype=...)` does: the timestep MLP stays in float32."""
    for name, parameter in transformer.named_parameters():
        parameter.data = parameter.data.to(torch.float32 if "time_embedding" in name else dtype)


def compile_transformer(transformer: JiTTransformer2DModel, cuda_graphs: bool = False) -> None:
    """Compile the blocks, one graph for all of them, or with `cuda_graphs` the whole network."""
    if cuda_graphs:
        # CUDA graphs need static shapes: one graph per batch size, guided and unguided.
        transformer.compile(fullgraph=True, dynamic=False, mode="reduce-overhead")
    else:
        transformer.compile_repeated_blocks(fullgraph=True)


def check_cuda_graphs(cuda_graphs: bool, device: torch.device) -> None:
    """Refuse --cuda_graphs without a GPU; torch would silently ignore it."""
    if cuda_graphs and device.type != "cuda":
        raise ValueError(f"--cuda_graphs needs a GPU, this run is on {device}; --compile works anywhere.")


def device_name(device: torch.device) -> str:
    """Return the product name of a GPU, or the device as torch writes it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def versions() -> dict[str, str]:
    """Return the versions of the libraries that compute the pixels and the metrics."""
    from . import __version__  # the package may still be importing this file

    libraries = {library.__name__: library.__version__ for library in (diffusers, transformers, accelerate, torch)}
    return {"pixelrepa_diffusers": __version__, **libraries, "python": platform.python_version()}
