# Copyright 2026 The pixelrepa_diffusers authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""What every script that samples shares: solvers by name, pipelines by folder or Hub id, seeds, records, whole files."""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

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
from filelock import FileLock, Timeout

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


def describe_pipeline(name_or_path: str, revision: str | None = None) -> PixelREPAPipeline:
    """The pipeline without its weights (on the meta device, with the method's own scheduler).

    It is all that is needed to check labels and settings before anything large is fetched or read.

    Args:
        name_or_path: a saved pipeline's folder, or its id on the Hub.
        revision: branch, tag or commit of a Hub id.
    """
    config = PixelREPAPipeline.load_config(name_or_path, revision=revision)
    transformer_config = JiTTransformer2DModel.load_config(name_or_path, subfolder="transformer", revision=revision)
    with torch.device("meta"):
        transformer = JiTTransformer2DModel.from_config(transformer_config)
    saved = {name: config[name] for name in ("id2label", "guidance_scale", "guidance_interval") if name in config}
    return PixelREPAPipeline(transformer, JiTFlowMatchScheduler(), **saved)


def fetch_pipeline(name_or_path: str, revision: str | None = None) -> tuple[Path, str | None]:
    """The folder of a pipeline, downloaded where it is a Hub id, and then also the commit; None for a folder."""
    if Path(name_or_path).is_dir():
        return Path(name_or_path), None
    folder = Path(PixelREPAPipeline.download(name_or_path, revision=revision))
    return folder, folder.name  # the snapshot's folder is named after the commit


def seeded(seeds: Iterable[int]) -> list[torch.Generator]:
    """One CPU generator per image: its noise then depends neither on the device nor on the other images of a batch."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def check_launch(num_processes: int) -> None:
    """RuntimeError when the launcher started several processes but accelerate runs each of them alone."""
    if int(os.environ.get("WORLD_SIZE", 1)) != num_processes:
        raise RuntimeError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but accelerate set up {num_processes} process(es): each would "
            "make all images. Two processes on a CPU: ACCELERATE_USE_CPU=true accelerate launch --multi_gpu "
            "--num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no SCRIPT."
        )


def write_atomically(path: Path, save: Callable[[Path], object]) -> None:
    """Writes beside `path` and renames, so that a run that is stopped leaves no half-written file under a final name."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.incomplete")
    try:
        save(temporary)
        temporary.replace(path)
    except OSError as error:
        error.filename = error.filename or str(path)  # a full disk is reported without a name
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """
    Makes `folder`, keeps other runs out of it, and removes the files that a killed run left half-written in it.

    The lock is a file `.lock` in the folder, which stays; the operating system ends the hold of a process that is killed.

    Raises:
        RuntimeError: another run is writing to the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        held = FileLock(folder / ".lock").acquire(timeout=0)
    except (Timeout, FileNotFoundError):  # not found: the run that held a passing folder has just removed it
        raise RuntimeError(f"Another run is writing to {folder}. Wait for it, or choose another folder.") from None
    with held:
        remove_incomplete(folder)
        yield


def remove_incomplete(folder: Path) -> None:
    """Removes the files that `write_atomically` of a killed run left in a folder that no other run writes."""
    for path in folder.glob(".*.incomplete"):
        if path.is_file():
            path.unlink()


def cast_transformer(transformer: JiTTransformer2DModel, dtype: torch.dtype) -> None:
    """Casts in place as `from_pretrained(dtype=...)` does: all but the timestep MLP, which stays in float32."""
    transformer.to(dtype)
    transformer.conditioning.time_embedding.float()


def compile_transformer(transformer: JiTTransformer2DModel, cuda_graphs: bool = False) -> None:
    """Compiles the blocks for sampling, one graph for all of them, guided and not; with `cuda_graphs` the whole network,
    which a GPU then replays without waiting for the host."""
    if cuda_graphs:
        # One graph for each batch size, guided and not: a graph of any size could not be recorded.
        transformer.compile(fullgraph=True, dynamic=False, mode="reduce-overhead")
    else:
        transformer.compile_repeated_blocks(fullgraph=True)


def check_cuda_graphs(cuda_graphs: bool, device: torch.device) -> None:
    """ValueError when CUDA graphs are asked for where there are none; torch would leave them out without a word."""
    if cuda_graphs and device.type != "cuda":
        raise ValueError(
            f"--cuda_graphs needs a GPU, this run is on {device}. Leave it out; --compile works anywhere."
        )


def device_name(device: torch.device) -> str:
    """A GPU's product name, or the device in torch's words."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def versions() -> dict[str, str]:
    """Versions of what computes the pixels and the metrics."""
    from . import __version__  # the package is still being imported when this file is

    libraries = {library.__name__: library.__version__ for library in (diffusers, transformers, accelerate, torch)}
    return {"pixelrepa_diffusers": __version__, **libraries, "python": platform.python_version()}
