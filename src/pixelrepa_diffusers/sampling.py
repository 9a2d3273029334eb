"""What the sampling commands share: solvers by name, pipelines from folders, checkpoints and the Hub, seeded noise."""

import json
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

# Optional components of a pipeline, in folders of these names.
GUIDANCE_PARTS = {"guidance_head": JiTGuidanceHead, "guidance_transformer": JiTTransformer2DModel}

DTYPES = ["float32", "bfloat16", "float16"]

_SETTINGS = (
    "id2label",
    "guidance_scale",
    "guidance_interval",
    "self_guidance_scale",
    "self_guidance_interval",
    "autoguidance_scale",
    "autoguidance_interval",
)


def describe_pipeline(
    name_or_path: str, revision: str | None = None, guidance_transformer: str | None = None
) -> PixelREPAPipeline:
    """
    Build a pipeline without its weights (on the meta device, with the method's own scheduler), to check labels and
    settings before anything large is downloaded or read.

    Args:
        name_or_path (`str`): Folder of a saved pipeline or a training checkpoint, or a Hub id.
        revision (`str`, *optional*): Branch, tag or commit of a Hub id.
        guidance_transformer (`str`, *optional*): Folder of a second transformer, for autoguidance.

    Raises:
        `OSError`: If there is no pipeline under this name; a training run's folder is answered with what to pass instead.
    """
    folder = Path(name_or_path)
    if folder.exists() and not _is_checkpoint(folder) and not (folder / "model_index.json").is_file():
        raise FileNotFoundError(f"{folder} is not a saved pipeline: it has no model_index.json.{_suggestion(folder)}")
    parts = {}
    try:
        if _is_checkpoint(folder):
            config, settings = JiTTransformer2DModel.load_config(transformer_folder(folder)), _read_settings(folder)
        else:
            settings = PixelREPAPipeline.load_config(name_or_path, revision=revision)
            config = JiTTransformer2DModel.load_config(name_or_path, subfolder="transformer", revision=revision)
            for name, part in GUIDANCE_PARTS.items():
                if name in settings:
                    parts[name] = part, part.load_config(name_or_path, subfolder=name, revision=revision)
    except OSError as error:
        if folder.is_dir():
            raise
        raise OSError(
            f"{name_or_path!r} is neither a folder on this machine nor a pipeline that the Hub could deliver: {error}"
        ) from error
    if guidance_transformer is not None:
        parts["guidance_transformer"] = JiTTransformer2DModel, JiTTransformer2DModel.load_config(guidance_transformer)
    with torch.device("meta"):
        transformer = JiTTransformer2DModel.from_config(config)
        parts = {name: part.from_config(part_config) for name, (part, part_config) in parts.items()}
    settings = {name: settings[name] for name in _SETTINGS if name in settings}
    return PixelREPAPipeline(transformer, JiTFlowMatchScheduler(), **settings, **parts)


def fetch_pipeline(name_or_path: str, revision: str | None = None) -> tuple[Path, str | None]:
    """Return (folder, commit) of a pipeline; a Hub id is downloaded, and only then there is a commit."""
    if Path(name_or_path).is_dir():
        return Path(name_or_path), None
    folder = Path(PixelREPAPipeline.download(name_or_path, revision=revision))
    return folder, folder.name  # the snapshot's folder is named after the commit


def load_pipeline(
    folder: Path, dtype: torch.dtype, transformer: Path | None = None, guidance_transformer: str | None = None
) -> PixelREPAPipeline:
    """
    Load a saved pipeline or a training checkpoint, optionally with the weights of another `transformer` folder and with a
    second transformer for autoguidance.
    """
    parts = {}
    if guidance_transformer is not None:
        parts["guidance_transformer"] = JiTTransformer2DModel.from_pretrained(guidance_transformer, dtype=dtype)
    transformer = JiTTransformer2DModel.from_pretrained(transformer or transformer_folder(folder), dtype=dtype)
    if _is_checkpoint(folder):
        return PixelREPAPipeline(transformer, JiTFlowMatchScheduler(), **_read_settings(folder), **parts)
    return PixelREPAPipeline.from_pretrained(folder, transformer=transformer, dtype=dtype, **parts)


def transformer_folder(folder: Path) -> Path:
    """The weights to sample: those of a saved pipeline, or a training checkpoint's first EMA where it has one."""
    if _is_checkpoint(folder):
        for decay in (_read_progress(folder)["arguments"].get("ema_decays") or [])[:1]:
            if (folder / f"transformer_ema_{decay}").is_dir():
                return folder / f"transformer_ema_{decay}"
    return folder / "transformer"


def _is_checkpoint(folder: Path) -> bool:
    return (folder / "progress.json").is_file()


def _read_progress(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / "progress.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{folder / 'progress.json'} is damaged: {error}") from error


def _read_settings(folder: Path) -> dict[str, Any]:
    """Class names and guidance of a checkpoint; older checkpoints have none."""
    return _read_progress(folder).get("pipeline", {})


def _suggestion(path: Path) -> str:
    if path.is_file():
        return " Convert a published checkpoint with pixelrepa-convert."
    if (path / "pipeline" / "model_index.json").is_file():
        return f" It is a training run: pass {path / 'pipeline'}."
    checkpoints = [folder for folder in path.glob("checkpoint-*") if _is_checkpoint(folder)]
    if checkpoints:
        return f" It is a training run: pass {max(checkpoints, key=lambda folder: folder.stat().st_mtime)}."
    return ""


def seeded(seeds: Iterable[int]) -> list[torch.Generator]:
    """One CPU generator per image: its noise then depends neither on the device nor on the other images of a batch."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def cast_transformer(transformer: JiTTransformer2DModel, dtype: torch.dtype) -> None:
    """Cast in place as `from_pretrained(dtype=...)` does: the timestep MLP stays in float32."""
    transformer.to(dtype)
    transformer.conditioning.time_embedding.float()


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
        raise ValueError(
            f"--cuda_graphs needs a GPU, this run is on {device}. Leave it out; --compile works anywhere."
        )


def device_name(device: torch.device) -> str:
    """Product name of a GPU, or the device as torch writes it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def versions() -> dict[str, str]:
    """Versions of the libraries that compute the pixels and the metrics."""
    from . import __version__  # the package may still be importing this file

    libraries = {library.__name__: library.__version__ for library in (diffusers, transformers, accelerate, torch)}
    return {"pixelrepa_diffusers": __version__, **libraries, "python": platform.python_version()}
