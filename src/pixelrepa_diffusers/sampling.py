"""Helpers shared by the sampling commands: solvers by name, pipelines from folders, checkpoints and the Hub, seeded noise."""

import itertools
import json
import os
import platform
from collections.abc import Iterable
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

from .guidance_jit import JiTGuidanceHead
from .pipeline_pixelrepa import PixelREPAPipeline
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

# Models beside the transformer that guidance may need; a pipeline saves them in folders of these names.
GUIDANCE_MODELS = {"guidance_head": JiTGuidanceHead, "guidance_transformer": JiTTransformer2DModel}

DTYPES = ["float32", "bfloat16", "float16"]

# Guidance settings of a call, which are saved with a pipeline, by the component they need.
GUIDANCE_SETTINGS = {
    "transformer": ("guidance_scale", "guidance_interval"),
    "guidance_head": ("self_guidance_scale", "self_guidance_interval"),
    "guidance_transformer": ("autoguidance_scale", "autoguidance_interval"),
}


def saved_guidance(pipeline: PixelREPAPipeline) -> dict[str, Any]:
    """The saved guidance settings, without those of components that the pipeline lacks."""
    parts = [part for part in GUIDANCE_SETTINGS if getattr(pipeline, part, None) is not None]
    return {name: pipeline.config[name] for part in parts for name in GUIDANCE_SETTINGS[part]}


def describe_pipeline(
    name_or_path: str, revision: str | None = None, guidance_transformer: str | None = None
) -> PixelREPAPipeline:
    """
    Build a pipeline without its weights (on the meta device), to check labels and settings before anything large is read.

    Args:
        name_or_path (`str`): Folder of a saved pipeline or a training checkpoint, or a Hub id.
        revision (`str`, *optional*): Branch, tag or commit of a Hub id.
        guidance_transformer (`str`, *optional*): Folder of a second transformer, for autoguidance.

    Raises:
        `OSError`: If there is no pipeline under this name; the message for a training run's folder names what to pass.
    """
    folder, parts = Path(name_or_path), {}
    if _is_checkpoint(folder):
        settings, config = _read_settings(folder), JiTTransformer2DModel.load_config(transformer_folder(folder))
    elif str(name_or_path).startswith((".", "/", "~")) and not folder.exists():
        raise FileNotFoundError(f"There is no folder {folder}.")
    elif folder.exists() and not (folder / "model_index.json").is_file():
        raise FileNotFoundError(f"{folder} is not a saved pipeline: it has no model_index.json.{_suggestion(folder)}")
    else:
        try:
            settings = PixelREPAPipeline.load_config(name_or_path, revision=revision)
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
    known = ("id2label", *itertools.chain(*GUIDANCE_SETTINGS.values()))
    saved = {name: settings[name] for name in known if name in settings}
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
    A saved pipeline or training checkpoint on this process's device, or other folders in the places of its transformer and
    its guidance transformer.
    """
    transformer, settings = transformer or transformer_folder(folder), {"dtype": getattr(torch, dtype)}
    parts = {"transformer": JiTTransformer2DModel.from_pretrained(transformer, **settings)}
    if guidance_transformer is not None:
        parts["guidance_transformer"] = JiTTransformer2DModel.from_pretrained(guidance_transformer, **settings)
    if _is_checkpoint(folder):
        pipeline = PixelREPAPipeline(scheduler=JiTFlowMatchScheduler(), **_read_settings(folder), **parts)
    else:
        pipeline = PixelREPAPipeline.from_pretrained(folder, **settings, **parts)
    process = accelerate.PartialState()
    # None disables the bar outside a terminal: nested bars would write a line per refresh into a log.
    disable = None if process.is_local_main_process else True
    pipeline.set_progress_bar_config(leave=False, position=1, desc="steps", disable=disable)
    return pipeline.to(process.device)


def transformer_folder(folder: Path) -> Path:
    """The weights to sample: those of a saved pipeline, or a training checkpoint's first EMA where it has one."""
    if _is_checkpoint(folder):
        ema = folder / f"transformer_ema_{_read_progress(folder)['arguments']['ema_decays'][0]}"
        if ema.is_dir():
            return ema
    return folder / "transformer"


def _is_checkpoint(folder: Path) -> bool:
    return (folder / "progress.json").is_file()


def _read_progress(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "progress.json").read_text(encoding="utf-8"))


def _read_settings(folder: Path) -> dict[str, Any]:
    """Class names and guidance of a checkpoint; older checkpoints have none."""
    return _read_progress(folder).get("pipeline", {})


def _suggestion(path: Path) -> str:
    if path.is_file():
        return " Convert a published checkpoint with pixelrepa-convert."
    candidates = [path / "pipeline", *sorted(path.glob("checkpoint-*"), key=os.path.getmtime, reverse=True)]
    run = [folder for folder in candidates if (folder / "model_index.json").is_file() or _is_checkpoint(folder)]
    return f" It is a training run: pass {run[0]}." if run else ""


def seeded(seeds: Iterable[int]) -> list[torch.Generator]:
    """One CPU generator per image: its noise then depends neither on the device nor on the other images of a batch."""
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
    """Product name of a GPU, or the device as torch writes it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def versions() -> dict[str, str]:
    """Versions of the libraries that compute the pixels and the metrics."""
    from . import __version__  # the package may still be importing this file

    libraries = {library.__name__: library.__version__ for library in (diffusers, transformers, accelerate, torch)}
    return {"pixelrepa_diffusers": __version__, **libraries, "python": platform.python_version()}
