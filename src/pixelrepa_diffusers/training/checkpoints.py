"""Atomic training checkpoints, from which interrupted runs resume bit-exactly."""

from __future__ import annotations

import json
import pickle
import re
import shutil
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import fields
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import DistributedType
from diffusers import ModelMixin
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.tensor import DTensor

from ..ema import ConstantDecayEMA
from ..files import DamagedFolderError, discard_folder, verify_folder, write_folder, write_json
from ..pipeline_pixelrepa import PixelREPAPipeline
from .arguments import BookkeepingArguments, TrainingArguments


logger = get_logger(__name__)

# Arguments that may change at a resume without a warning.
_FREE_ARGUMENTS = {field.name for field in fields(BookkeepingArguments)}
_FREE_ARGUMENTS |= {"dataloader_num_workers", "cache_dir"}


def checkpoint_step(folder: Path) -> int:
    """Return N of `checkpoint-N`, -1 for other names."""
    match = re.fullmatch(r"checkpoint-(\d+)", folder.name)
    return int(match[1]) if match else -1


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Return the checkpoints of a run, oldest first."""
    found = [path for path in output_dir.glob("checkpoint-*") if checkpoint_step(path) >= 0]
    return sorted(found, key=checkpoint_step)


def delete_oldest(newest: Path, limit: int) -> None:
    """Delete the oldest checkpoints but `limit` up to the `newest`. Later ones are damaged: the resume skipped them."""
    written = [path for path in list_checkpoints(newest.parent) if checkpoint_step(path) <= checkpoint_step(newest)]
    for folder in written[:-limit]:
        discard_folder(folder)


def find_checkpoint(output_dir: Path, resume: str | None) -> Path | None:
    """
    Return the verified checkpoint to resume from, or `None` to start from scratch.

    Args:
        output_dir (`Path`): Folder of the run.
        resume (`str`, *optional*): "latest", the newest intact checkpoint of `output_dir`; or the path of a checkpoint,
            or its name in `output_dir`.
    """
    existing = list_checkpoints(output_dir)
    if resume is None and not existing:
        return None
    if resume is None:
        raise FileExistsError(
            f"{output_dir} already holds {existing[-1].name}. Continue with --resume_from_checkpoint latest, or choose "
            "another --output_dir."
        )
    if resume == "latest":
        intact = next(filter(_is_intact, reversed(existing)), None)
        if existing and intact is None:
            raise DamagedFolderError(f"All {len(existing)} checkpoints in {output_dir} are damaged.")
        return intact
    folder = Path(resume) if Path(resume).is_dir() else output_dir / resume
    step = checkpoint_step(folder)
    if step < 0 or not folder.is_dir():
        raise FileNotFoundError(f"--resume_from_checkpoint {resume} does not exist or is no checkpoint-N.")
    verify_folder(folder)
    # The run would write these steps again; until then, "latest" would resume from the wrong ones.
    later = [path for path in existing if checkpoint_step(path) >= step and not path.samefile(folder)]
    if later := ", ".join(path.name for path in filter(_is_intact, later)):
        raise FileExistsError(
            f"{output_dir} holds later checkpoints. Move {later} away, or choose another --output_dir."
        )
    return folder


def _is_intact(folder: Path) -> bool:
    try:
        verify_folder(folder)
    except DamagedFolderError as error:
        logger.warning(str(error))
        return False
    return True


def with_weights(model: ModelMixin, weights: dict[str, torch.Tensor]) -> ModelMixin:
    """Build a model of the same configuration around existing tensors, without copying them. LoRA layers are merged."""
    config = {name: value for name, value in model.config.items() if not name.startswith("_")}
    with torch.device("meta"):
        copy = type(model)(**config)
    copy.load_state_dict(merge_lora(weights), assign=True)
    return copy.eval().requires_grad_(False)


def merge_lora(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the weights W + B·A of a model whose LoRA layers have the scale 1."""
    merged = {}
    for name, value in weights.items():
        layer = name.removesuffix("base_layer.weight")
        if (down := weights.get(f"{layer}lora_A.default.weight")) is not None:
            value = value + weights[f"{layer}lora_B.default.weight"] @ down
        if ".lora_" not in name:
            merged[name.replace("base_layer.", "")] = value
    return merged


def save_lora(weights: dict[str, torch.Tensor], folder: Path) -> None:
    """Save the LoRA weights among `weights`, if any, for `pipe.load_lora_weights(folder)`."""
    if lora := {name.replace(".default", ""): value for name, value in weights.items() if ".lora_" in name}:
        PixelREPAPipeline.save_lora_weights(folder, lora)


def gather_weights(weights: dict[str, torch.Tensor], keep: bool = True) -> dict[str, torch.Tensor]:
    """Assemble FSDP's shards one tensor at a time, on all processes together. Processes that do not `keep` them get none."""
    gathered = {}
    for name, value in weights.items():
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        if keep:
            gathered[name] = whole
    return gathered


def read_tensors(folder: Path, likes: dict[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    """Read the safetensors files of a folder, whole or sharded. Tensors that are sharded in `likes` come sharded."""
    reader = dcp.HuggingFaceStorageReader(str(folder))
    tensors = {}
    for name, entry in reader.read_metadata().state_dict_metadata.items():
        like, dtype = (likes or {}).get(name), entry.properties.dtype
        if isinstance(like, DTensor) and like.shape == entry.size:
            tensors[name] = torch.empty_like(like, dtype=dtype)
        else:
            tensors[name] = torch.empty(entry.size, dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is no process group
        dcp.load(tensors, storage_reader=reader, no_dist=True)
    return tensors


class Checkpointer:
    """
    Save and load everything that a bit-exact resume needs, except the frozen teacher.

    A checkpoint folder contains

    - `transformer/`, `transformer_ema_DECAY/` and `adapter/` (the projector), or `guidance_head/` and its EMAs: diffusers
      folders, LoRA layers merged
    - `lora/`, `lora_ema_DECAY/`: the LoRA weights alone, if any
    - `optimizer/`: optimizer state by parameter name
    - `progress.json`: step, position in the data, EMA updates, gradient scaler, arguments, class names and guidance

    It depends neither on the number of processes nor on sharding.

    Training waits only while the state is copied to CPU memory, which stays allocated; a thread writes the copy. Without
    sharding the main process does so alone.

    Args:
        args, accelerator, objective, ema, optimizer: Parts of the run; objective and optimizer are prepared.
        models (`dict[str, ModelMixin]`): The trained models by folder name; the EMAs follow the first.
        pipeline_config (`dict`): Class names and guidance, with which the checkpoint can be sampled.
    """

    def __init__(
        self,
        args: TrainingArguments,
        accelerator: Accelerator,
        objective: torch.nn.Module,
        models: dict[str, ModelMixin],
        ema: ConstantDecayEMA | None,
        optimizer: torch.optim.Optimizer,
        pipeline_config: dict,
    ):
        self.args, self.accelerator, self.pipeline_config = args, accelerator, pipeline_config
        self.module, self.ema, self.optimizer = accelerator.unwrap_model(objective), ema, optimizer
        self.models, self.main = models, next(iter(models))
        self.sharded, self.group = accelerator.distributed_type == DistributedType.FSDP, None
        if self.sharded:
            # The writing threads need a process group of their own: training uses the default one meanwhile.
            self.group = dist.new_group(timeout=timedelta(seconds=args.ddp_timeout), backend="gloo")
        on_gpu = accelerator.device.type == "cuda"
        self.stager = DefaultStager(
            StagingOptions(on_gpu, False, use_async_staging=False, use_non_blocking_copy=on_gpu)
        )
        self.thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self.pending: Future[Path] | None = None
        self._last: Path | None = None

    def wait(self) -> Path | None:
        """Wait until the last checkpoint is written and return it. Raises what its writing raised."""
        if self.pending is not None:
            pending, self.pending = self.pending, None
            self._last = pending.result()
        return self._last

    @property
    def last(self) -> Path | None:
        """The last completely written checkpoint. Raises what its writing raised."""
        return self.wait() if self.pending is not None and self.pending.done() else self._last

    def save(self, step: int, loader_state: dict) -> None:
        """Write checkpoint-STEP in the background, on all processes together, and delete the oldest beyond the limit."""
        self.wait()
        state = {name: model.state_dict() for name, model in self.models.items()}
        for decay in () if self.ema is None else self.ema.decays:
            state[f"{self.main}_ema_{decay}"] = self.ema.state_dict_for(decay)
        optimizer = {
            f"{name}.{key}": value
            for name, parameter in self._parameters().items()
            for key, value in self.optimizer.state[parameter].items()
        }
        state["optimizer"] = {name: value for name, value in optimizer.items() if isinstance(value, torch.Tensor)}
        progress = {
            "step": step,
            "loader": loader_state,
            "ema_calls": None if self.ema is None else self.ema.num_calls,
            "optimizer": {name: value for name, value in optimizer.items() if name not in state["optimizer"]},
            "scaler": None if self.accelerator.scaler is None else self.accelerator.scaler.state_dict(),
            "arguments": self.args.saved(),
            "pipeline": self.pipeline_config,
        }
        if self.sharded or self.accelerator.is_main_process:
            folder = Path(self.args.output_dir) / f"checkpoint-{step}"
            self.pending = self.thread.submit(self._write, folder, self.stager.stage(state), progress)

    def _write(self, folder: Path, state: dict[str, dict[str, torch.Tensor]], progress: dict) -> Path:
        is_main = self.accelerator.is_main_process

        def write(path: Path) -> None:
            if self.sharded:
                for name, tensors in state.items():
                    storage = dcp.HuggingFaceStorageWriter(str(path / name), save_distributed=True)
                    try:
                        dcp.save(tensors, storage_writer=storage, process_group=self.group)
                    except CheckpointException as error:  # no `Exception`; holds those of the processes
                        raise next(iter(error.failures.values()))[0] from error
            else:
                (path / "optimizer").mkdir()
                save_file(state["optimizer"], path / "optimizer" / "optimizer.safetensors")
            if not is_main:
                return
            for name in state.keys() - {"optimizer"}:
                weights = state[name]
                if self.sharded:  # merge the shards, which are safe on disk, one model at a time
                    weights = read_tensors(path / name)
                    shutil.rmtree(path / name)
                model = self.models.get(name, self.models[self.main])
                with_weights(model, weights).save_pretrained(path / name)
                save_lora(weights, path / name.replace("transformer", "lora"))
            write_json(path / "progress.json", progress)

        def barrier() -> None:
            if self.sharded:
                dist.barrier(self.group)

        write_folder(folder, write, is_main, barrier, manifest=True)
        if is_main and self.args.checkpoints_total_limit is not None:
            delete_oldest(folder, self.args.checkpoints_total_limit)
        logger.info(f"Wrote {folder}.")
        return folder

    def load(self, folder: Path) -> dict:
        """
        Load a verified checkpoint and return its progress.json.

        The checksums detect damage, not intent, so no content of a checkpoint is executed: it consists of safetensors and
        JSON. (The optimizer state of earlier versions is unpickled with `weights_only=True`.)
        """
        progress = json.loads((folder / "progress.json").read_text(encoding="utf-8"))
        # Other schedules depend on the length of the run.
        free = _FREE_ARGUMENTS | ({"max_train_steps"} if self.args.lr_scheduler.startswith("constant") else set())
        changes = ", ".join(
            f"--{name} {old} → {getattr(self.args, name)}"
            for name, old in progress["arguments"].items()
            if name not in free and getattr(self.args, name, old) != old
        )
        if changes:
            logger.warning(f"Arguments changed since {folder.name}: {changes}.")
        try:
            self._load_weights(folder, progress)
            self._load_optimizer(folder, progress)
        except pickle.UnpicklingError:  # torch's own message recommends loading the file unsafely
            raise ValueError(f"{folder} is refused: its optimizer state is more than tensors and numbers.") from None
        except (RuntimeError, ValueError, OSError, KeyError) as error:
            changed = f" Arguments changed since: {changes}." if changes else ""
            raise ValueError(f"{folder} does not fit this run.{changed} {error}") from error
        self._last = folder
        return progress

    def _load_weights(self, folder: Path, progress: dict) -> None:
        for name, model in self.models.items():
            model.load_state_dict(self._read(folder / name, model.state_dict()))
        if self.ema is not None:
            averages = {
                decay: self._read(folder / f"{self.main}_ema_{decay}", self.ema.state_dict_for(decay))
                for decay in self.ema.decays
            }
            self.ema.load_state_dict({"num_calls": progress["ema_calls"], "averages": averages})

    def _read(self, folder: Path, own: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if self.args.lora_rank is None or folder.name == "adapter":
            return read_tensors(folder, own)
        # The weights in `folder` are merged; the LoRA weights lie beside it, and the others are those of this run.
        lora = load_file(folder.with_name(folder.name.replace("transformer", "lora")) / LORA_WEIGHT_NAME_SAFE)
        return own | {
            name.removeprefix("transformer.").replace(".weight", ".default.weight"): v for name, v in lora.items()
        }

    def _load_optimizer(self, folder: Path, progress: dict) -> None:
        parameters, scaler = self._parameters(), progress.get("scaler")
        if (folder / "optimizer.bin").exists():  # earlier versions
            saved = torch.load(folder / "optimizer.bin", map_location="cpu", weights_only=True)["state"]
            saved = {list(parameters)[index]: entries for index, entries in saved.items()}
            if (folder / "scaler.pt").exists():
                scaler = torch.load(folder / "scaler.pt", weights_only=True)
        else:
            likes = {f"{n}.{key}": p for n, p in parameters.items() for key in ("exp_avg", "exp_avg_sq")}
            saved = {name: {} for name in parameters}
            for name, value in (read_tensors(folder / "optimizer", likes) | progress["optimizer"]).items():
                parameter, _, key = name.rpartition(".")
                saved[parameter][key] = value
        # Learning rate, betas and decay of the command line take precedence over the saved ones.
        groups = [{**group, "initial_lr": group["lr"]} for group in self.optimizer.state_dict()["param_groups"]]
        state = dict(enumerate(saved[name] for name in parameters))
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        if self.accelerator.scaler is not None and scaler is not None:
            self.accelerator.scaler.load_state_dict(scaler)

    def _parameters(self) -> dict[str, torch.nn.Parameter]:
        """Trained parameters by name, in the order of the optimizer."""
        names = {id(parameter): name for name, parameter in self.module.named_parameters()}
        return {names[id(p)]: p for group in self.optimizer.param_groups for p in group["params"]}
