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
from ..files import DamagedFolderError, discard_folder, verify_folder, write_folder
from ..transformer_jit import JiTTransformer2DModel
from .arguments import BookkeepingArguments, TrainingArguments


logger = get_logger(__name__)

# Arguments that may change at a resume without a warning.
_FREE_ARGUMENTS = {field.name for field in fields(BookkeepingArguments)} | {
    "dataloader_num_workers",
    "max_train_steps",
    "cache_dir",
}


def checkpoint_step(folder: Path) -> int:
    """Return N of `checkpoint-N`."""
    match = re.fullmatch(r"checkpoint-(\d+)", folder.name)
    if match is None:
        raise ValueError(f"{folder} is not a checkpoint: its name must be checkpoint-N.")
    return int(match[1])


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Return the checkpoints of a run, oldest first."""
    found = [path for path in output_dir.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal()]
    return sorted(found, key=checkpoint_step)


def find_checkpoint(output_dir: Path, resume: str | None) -> Path | None:
    """
    Return the verified checkpoint to resume from, or `None` to start from scratch.

    Args:
        output_dir (`Path`): Folder of the run.
        resume (`str`, *optional*): "latest", the newest intact checkpoint of `output_dir`; or a checkpoint, as a path or
            as a name in `output_dir`.

    Raises:
        FileNotFoundError: If the given checkpoint does not exist.
        DamagedFolderError: If the given checkpoint is damaged, or all that "latest" finds.
        FileExistsError: If the run would overwrite checkpoints.
    """
    existing = list_checkpoints(output_dir)
    if resume is None:
        if existing:
            raise FileExistsError(
                f"{output_dir} already holds {existing[-1].name}. Continue with --resume_from_checkpoint latest, or "
                "choose another --output_dir."
            )
        return None
    if resume == "latest":
        intact = next(filter(_is_intact, reversed(existing)), None)
        if existing and intact is None:
            raise DamagedFolderError(f"All {len(existing)} checkpoints in {output_dir} are damaged.")
        return intact
    folder = Path(resume) if Path(resume).is_dir() else output_dir / resume
    if not folder.is_dir():
        raise FileNotFoundError(f"--resume_from_checkpoint {resume} does not exist.")
    step = checkpoint_step(folder)
    verify_folder(folder)
    # The run would write these steps again; until then, "latest" would resume from the wrong ones.
    later = [path for path in existing if checkpoint_step(path) >= step and not path.samefile(folder)]
    if later := list(filter(_is_intact, later)):
        raise FileExistsError(
            f"{output_dir} already holds {later[-1].name}, which is not older than {folder}. Move "
            f"{', '.join(path.name for path in later)} away, or choose another --output_dir."
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


class Checkpointer:
    """
    Save and load everything a bit-exact resume needs, the frozen teacher excepted.

    A checkpoint contains `transformer/`, `transformer_ema_DECAY/` for every EMA and `adapter/` (the projector) as diffusers
    folders; optimizer, gradient scaler and random states as written by accelerate; and `progress.json`: step, position in
    the data, arguments, class names and guidance. The learning rate is a function of the step.

    Args:
        args (`TrainingArguments`): Arguments of the run.
        accelerator (`Accelerator`): Accelerator of the run.
        objective (`torch.nn.Module`): Objective, as prepared by the accelerator.
        ema (`ConstantDecayEMA`, *optional*): EMA weights.
        optimizer (`torch.optim.Optimizer`): Optimizer, as prepared by the accelerator.
        pipeline_config (`dict`): `id2label`, `guidance_scale` and `guidance_interval` of the run's pipeline.
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
            emas = {} if self.ema is None else {decay: self.ema.state_dict_for(decay) for decay in self.ema.decays}
            if self.sharded:
                emas = {
                    decay: {name: shard.full_tensor() for name, shard in weights.items()}
                    for decay, weights in emas.items()
                }
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
            (path / "progress.json").write_text(json.dumps(progress, indent=1), encoding="utf-8")

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

        Raises:
            ValueError: If the checkpoint belongs to a run with another model or optimizer; names the changed arguments.
        """
        changes = []
        try:
            progress = json.loads((folder / "progress.json").read_text(encoding="utf-8"))
            saved = progress["arguments"]
            changes = [
                f"--{name} {old} → {getattr(self.args, name)}"
                for name, old in saved.items()
                if name not in _FREE_ARGUMENTS and getattr(self.args, name, old) != old
            ]
            if changes:
                logger.warning(f"Arguments changed since {folder.name}: {', '.join(changes)}.")
            self._load_weights(folder, progress)
        except pickle.UnpicklingError as error:
            # torch's own message recommends loading the file unsafely.
            refused = re.search(r"GLOBAL (\S+)", str(error))
            raise ValueError(
                f"{folder} is refused: its optimizer.bin is damaged or contains more than tensors and numbers"
                f"{f' ({refused[1]})' if refused else ''}. Nothing in it was executed."
            ) from None
        except (RuntimeError, ValueError, TypeError, OSError, KeyError) as error:
            changed = f" Arguments changed since: {', '.join(changes)}." if changes else ""
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
        # accelerate continues counting micro-steps, of which the earlier run may have had others per optimizer step.
        self.accelerator.step = 0
        # The saved state contains learning rate, betas and decay; those of the command line take precedence.
        for group, own in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(own, initial_lr=own["lr"])
        if self.ema is not None:
            averages = {decay: _read_weights(folder / f"transformer_ema_{decay}") for decay in self.ema.decays}
            for decay, weights in averages.items():
                for name, own in self.ema.state_dict_for(decay).items():
                    if isinstance(own, DTensor):
                        weights[name] = distribute_tensor(weights[name], own.device_mesh, own.placements)
            self.ema.load_state_dict({"num_calls": progress["ema_calls"], "averages": averages})


def _with_prefix(state: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _read_weights(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder} contains no weights.")
    return {name: tensor for file in files for name, tensor in load_file(file).items()}
