"""Atomic training checkpoints, from which interrupted runs resume bit-exactly."""

from __future__ import annotations

import json
import pickle
import re
from dataclasses import fields
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor, distribute_tensor

from ..ema import ConstantDecayEMA
from ..files import DamagedFolderError, discard_folder, verify_folder, write_folder, write_json
from ..transformer_jit import JiTTransformer2DModel
from .arguments import BookkeepingArguments, TrainingArguments


logger = get_logger(__name__)

# Arguments that may change at a resume without a warning.
_FREE_ARGUMENTS = {field.name for field in fields(BookkeepingArguments)}
_FREE_ARGUMENTS |= {"dataloader_num_workers", "max_train_steps", "cache_dir"}


def checkpoint_step(folder: Path) -> int:
    """Return N of `checkpoint-N`, -1 for other names."""
    match = re.fullmatch(r"checkpoint-(\d+)", folder.name)
    return int(match[1]) if match else -1


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Return the checkpoints of a run, oldest first."""
    found = [path for path in output_dir.glob("checkpoint-*") if checkpoint_step(path) >= 0]
    return sorted(found, key=checkpoint_step)


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


def with_weights(config: dict, weights: dict[str, torch.Tensor]) -> JiTTransformer2DModel:
    """Build a transformer around existing tensors, without copying them."""
    with torch.device("meta"):
        transformer = JiTTransformer2DModel.from_config(config)
    transformer.load_state_dict(weights, assign=True)
    return transformer.eval().requires_grad_(False)


def gather_weights(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Assemble weights that FSDP shards, on all processes together."""
    return {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in weights.items()}


class Checkpointer:
    """
    Save and load everything a bit-exact resume needs, the frozen teacher excepted.

    A checkpoint contains `transformer/`, `transformer_ema_DECAY/` for every EMA and `adapter/` (the projector) as diffusers
    folders; optimizer, gradient scaler and random states as written by accelerate; and `progress.json`: step, position in
    the data, EMA updates, arguments, and the class names and guidance of the run's pipeline.
    """

    def __init__(
        self,
        args: TrainingArguments,
        accelerator: Accelerator,
        objective: torch.nn.Module,
        ema: ConstantDecayEMA | None,
        optimizer: torch.optim.Optimizer,
        pipeline_config: dict,
    ):
        self.args, self.accelerator, self.pipeline_config = args, accelerator, pipeline_config
        self.objective, self.ema, self.optimizer = objective, ema, optimizer
        self.sharded = accelerator.distributed_type == DistributedType.FSDP
        if not self.sharded:
            # The diffusers folders are the only copy of the weights.
            accelerator.register_save_state_pre_hook(lambda models, weights, folder: weights.clear())
            accelerator.register_load_state_pre_hook(lambda models, folder: models.clear())

    def save(self, step: int, loader_state: dict) -> Path:
        """Write checkpoint-STEP, on all processes together, and delete the oldest beyond the limit."""
        output_dir = Path(self.args.output_dir)
        folder = output_dir / f"checkpoint-{step}"
        is_main = self.accelerator.is_main_process

        def write(path: Path) -> None:
            self.accelerator.save_state(str(path))
            state = self.accelerator.get_state_dict(self.objective)
            emas = {} if self.ema is None else {d: gather_weights(self.ema.state_dict_for(d)) for d in self.ema.decays}
            if not is_main:
                return
            module = self.accelerator.unwrap_model(self.objective)
            config = module.transformer.config
            with_weights(config, _with_prefix(state, "transformer.")).save_pretrained(path / "transformer")
            for decay, weights in emas.items():
                with_weights(config, weights).save_pretrained(path / f"transformer_ema_{decay}")
            if module.projector is not None:
                module.projector.save_pretrained(path / "adapter", state_dict=_with_prefix(state, "projector."))
            progress = {
                "step": step,
                "loader": loader_state,
                "ema_calls": None if self.ema is None else self.ema.num_calls,
                "arguments": self.args.saved(),
                "pipeline": self.pipeline_config,
            }
            write_json(path / "progress.json", progress)

        write_folder(folder, write, is_main, self.accelerator.wait_for_everyone, manifest=True)
        if is_main and self.args.checkpoints_total_limit is not None:
            for old in list_checkpoints(output_dir)[: -self.args.checkpoints_total_limit]:
                discard_folder(old)
        return folder

    def load(self, folder: Path) -> dict:
        """
        Load a verified checkpoint and return its progress.json.

        The checksums detect damage, not intent, so no content of a checkpoint is executed: weights are safetensors, and
        accelerate unpickles the rest with `weights_only=True`. (Sharded checkpoints go through
        torch.distributed.checkpoint, which does not: resume only your own.)
        """
        progress = json.loads((folder / "progress.json").read_text(encoding="utf-8"))
        changes = ", ".join(
            f"--{name} {old} → {getattr(self.args, name)}"
            for name, old in progress["arguments"].items()
            if name not in _FREE_ARGUMENTS and getattr(self.args, name, old) != old
        )
        if changes:
            logger.warning(f"Arguments changed since {folder.name}: {changes}.")
        try:
            self._load_weights(folder, progress)
        except pickle.UnpicklingError:  # torch's own message recommends loading the file unsafely
            raise ValueError(
                f"{folder}/optimizer.bin is refused: it contains more than tensors and numbers."
            ) from None
        except (RuntimeError, ValueError, OSError, KeyError) as error:
            changed = f" Arguments changed since: {changes}." if changes else ""
            raise ValueError(f"{folder} does not fit this run.{changed} {error}") from error
        return progress

    def _load_weights(self, folder: Path, progress: dict) -> None:
        if not self.sharded:
            module = self.accelerator.unwrap_model(self.objective)
            module.transformer.load_state_dict(_read_weights(folder / "transformer"))
            if module.projector is not None:
                module.projector.load_state_dict(_read_weights(folder / "adapter"))
        settings = [
            {name: value for name, value in group.items() if name != "params"} for group in self.optimizer.param_groups
        ]
        self.accelerator.load_state(str(folder))
        # accelerate would continue the saved micro-step count, which is wrong if gradient_accumulation_steps changed.
        self.accelerator.step = 0
        # The saved state contains learning rate, betas and decay; those of the command line take precedence.
        for group, own in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(own, initial_lr=own["lr"])
        if self.ema is not None:
            averages = {decay: _read_weights(folder / f"transformer_ema_{decay}") for decay in self.ema.decays}
            for decay, weights in averages.items():
                for name, own in self.ema.state_dict_for(decay).items() if self.sharded else ():
                    weights[name] = distribute_tensor(weights[name], own.device_mesh, own.placements)
            self.ema.load_state_dict({"num_calls": progress["ema_calls"], "averages": averages})


def _with_prefix(state: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _read_weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
