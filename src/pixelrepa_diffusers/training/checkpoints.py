"""Checkpoints: what is in them, and folders that are complete or absent however a run ends."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import DistributedType
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor, distribute_tensor

from .. import JiTTransformer2DModel
from ..ema import ConstantDecayEMA
from ..files import DamagedFolderError, discard_folder, verify_folder, write_folder
from ..objective import PixelREPAObjective
from .arguments import BookkeepingArguments, TrainingArguments


logger = get_logger(__name__)

_NAME = re.compile(r"checkpoint-(\d+)")


def checkpoint_step(folder: Path) -> int:
    """The step in the name `checkpoint-N`."""
    match = _NAME.fullmatch(folder.name)
    if match is None:
        raise ValueError(f"{folder} is not a checkpoint: its name must be checkpoint-N.")
    return int(match[1])


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Checkpoints of a run, oldest first."""
    found = [path for path in output_dir.glob("checkpoint-*") if path.is_dir() and _NAME.fullmatch(path.name)]
    return sorted(found, key=checkpoint_step)


def find_checkpoint(output_dir: Path, resume: str | None, warn: Callable[[str], None]) -> Path | None:
    """
    The verified checkpoint to resume from, or `None` for a fresh start.

    Args:
        output_dir: The run's folder.
        resume: `None`; "latest", the newest undamaged checkpoint of `output_dir`; or the path of one.
        warn: Told of each damaged checkpoint that is passed over.

    Raises:
        FileNotFoundError: for a path that does not exist.
        DamagedFolderError: for a path to a damaged checkpoint, or when "latest" finds only damaged ones.
        FileExistsError: when nothing is to be resumed but the folder holds checkpoints, or when a path is and the folder
            holds others that are as far or further.
    """

    def undamaged(folder: Path) -> bool:
        try:
            verify_folder(folder)
        except DamagedFolderError as error:
            warn(str(error))
            return False
        return True

    existing = list_checkpoints(output_dir)
    if resume is None:
        if existing:
            raise FileExistsError(
                f"{output_dir} already holds {existing[-1].name}. Continue with --resume_from_checkpoint latest, or "
                "choose another --output_dir."
            )
        return None
    if resume != "latest":
        folder = Path(resume)
        if not folder.is_dir():
            raise FileNotFoundError(f"--resume_from_checkpoint {resume} does not exist.")
        step = checkpoint_step(folder)
        verify_folder(folder)
        # The run would write these steps again, and until it has, "latest" would go on from the others.
        ahead = [path for path in existing if checkpoint_step(path) >= step and not path.samefile(folder)]
        ahead = [path for path in ahead if undamaged(path)]  # "latest" passes over the damaged ones
        if ahead:
            raise FileExistsError(
                f"{output_dir} already holds {ahead[-1].name}, which {folder} is to be continued beside. Move "
                f"{', '.join(path.name for path in ahead)} away, or choose another --output_dir."
            )
        return folder
    for folder in reversed(existing):
        if undamaged(folder):
            return folder
    if existing:
        raise DamagedFolderError(f"All {len(existing)} checkpoints in {output_dir} are damaged.")
    return None


def prune(output_dir: Path, limit: int | None) -> None:
    """Discards the oldest checkpoints beyond `limit`; call it after the newest is in place."""
    if limit is not None:
        for folder in list_checkpoints(output_dir)[:-limit]:
            discard_folder(folder)


# ------------------------------------------------------------------------------------------------------ what is in them

# Arguments in which a run and its continuation may differ without a word.
_FREE = {field.name for field in fields(BookkeepingArguments)} | {
    "dataloader_num_workers",
    "max_train_steps",
    "cache_dir",
}


def with_weights(config: dict, weights: dict[str, torch.Tensor]) -> JiTTransformer2DModel:
    """A transformer that uses the given tensors themselves as its weights."""
    with torch.device("meta"):
        transformer = JiTTransformer2DModel.from_config(config)
    transformer.load_state_dict(weights, assign=True)
    return transformer.eval().requires_grad_(False)


class Checkpointer:
    """
    Saves and restores all that a run needs to go on as if it had never stopped.

    A checkpoint holds `transformer/`, a loadable `transformer_ema_DECAY/` for every average, `adapter/` (of a baseline: its projector), the
    optimizer, loss scale and generators as accelerate saves them, and `progress.json`: step (of which the learning rate
    is a function), data position and resolved arguments. The teacher is in none of it.
    """

    def __init__(
        self,
        args: TrainingArguments,
        accelerator: Accelerator,
        objective: PixelREPAObjective,
        ema: ConstantDecayEMA | None,
        optimizer: torch.optim.Optimizer,
    ):
        self.args, self.accelerator = args, accelerator
        self.objective, self.ema, self.optimizer = objective, ema, optimizer
        self.sharded = accelerator.distributed_type == DistributedType.FSDP
        if not self.sharded:
            # The diffusers folders are the only copy of the weights.
            accelerator.register_save_state_pre_hook(lambda models, weights, folder: weights.clear())
            accelerator.register_load_state_pre_hook(lambda models, folder: models.clear())

    def save(self, step: int, loader_state: dict) -> Path:
        """Writes checkpoint-STEP, on all processes together, and discards the oldest beyond the limit."""
        output_dir = Path(self.args.output_dir)
        folder = output_dir / f"checkpoint-{step}"
        is_main = self.accelerator.is_main_process

        def write(path: Path) -> None:
            self.accelerator.save_state(str(path))
            state = self.accelerator.get_state_dict(self.objective)
            averages = {} if self.ema is None else {decay: self.ema.state_dict_for(decay) for decay in self.ema.decays}
            if self.sharded:
                averages = {
                    decay: {name: shard.full_tensor() for name, shard in average.items()}
                    for decay, average in averages.items()
                }
            if not is_main:
                return
            module = self.accelerator.unwrap_model(self.objective)
            config = module.transformer.config
            with_weights(config, _part(state, "transformer.")).save_pretrained(path / "transformer")
            for decay, average in averages.items():
                with_weights(config, average).save_pretrained(path / f"transformer_ema_{decay}")
            if module.projector is not None:
                module.projector.save_pretrained(path / "adapter", state_dict=_part(state, "projector."))
            progress = {
                "step": step,
                "loader": loader_state,
                "ema_calls": None if self.ema is None else self.ema.num_calls,
                "arguments": self.args.saved(),
            }
            (path / "progress.json").write_text(json.dumps(progress, indent=1), encoding="utf-8")

        write_folder(folder, write, is_main, self.accelerator.wait_for_everyone, manifest=True)
        if is_main:
            prune(output_dir, self.args.checkpoints_total_limit)
        return folder

    def load(self, folder: Path) -> dict:
        """
        Restores a verified checkpoint and returns its progress.json.

        A checksum tells damage, not intent: whoever writes the files writes the manifest. So nothing in a checkpoint may
        run: weights are safetensors, and accelerate unpickles the optimizer and the generators with `weights_only=True`.
        (Sharded checkpoints are torch.distributed.checkpoint's, which unpickles without that: resume those of your own.)

        Raises:
            ValueError: for a checkpoint of another run, or one that is not what `save` writes.
        """
        progress = _read_progress(folder / "progress.json")
        for name, old in progress["arguments"].items():
            new = getattr(self.args, name, old)
            if name not in _FREE and new != old:
                logger.warning(f"--{name} is {new} now and was {old} when {folder.name} was written.")
        try:
            if not self.sharded:
                module = self.accelerator.unwrap_model(self.objective)
                module.transformer.load_state_dict(_weights(folder / "transformer"))
                if module.projector is not None:
                    module.projector.load_state_dict(_weights(folder / "adapter"))
            settings = [
                {name: value for name, value in group.items() if name != "params"}
                for group in self.optimizer.param_groups
            ]
            self.accelerator.load_state(str(folder))
            # accelerate counts micro-steps from the run before, which may have had others to an optimizer step.
            self.accelerator.step = 0
            # The saved state brings its own learning rate, betas and decay: those of the command line are in force.
            for group, given in zip(self.optimizer.param_groups, settings, strict=True):
                group.update(given, initial_lr=given["lr"])
            if self.ema is not None:
                averages = {decay: _weights(folder / f"transformer_ema_{decay}") for decay in self.ema.decays}
                for decay, average in averages.items():
                    for name, own in self.ema.state_dict_for(decay).items():
                        if isinstance(own, DTensor):
                            average[name] = distribute_tensor(average[name], own.device_mesh, own.placements)
                self.ema.load_state_dict({"num_calls": progress["ema_calls"], "averages": averages})
        except pickle.UnpicklingError as error:
            # torch's own message recommends to load the file unsafely.
            refused = re.search(r"GLOBAL (\S+)", str(error))
            raise ValueError(
                f"{folder} is refused: its optimizer.bin is damaged or asks for more than tensors and numbers"
                + (f" (`{refused[1]}`)" if refused else "")
                + ". Nothing of it was run. Resume from a checkpoint that this trainer wrote."
            ) from None
        except (RuntimeError, ValueError, TypeError, OSError, KeyError, AttributeError, SafetensorError) as error:
            raise ValueError(
                f"{folder} does not fit this run: {error} Resume with the arguments in its progress.json."
            ) from error
        return progress


def _read_progress(path: Path) -> dict:
    try:
        progress = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    kinds = {"step": int, "loader": dict, "ema_calls": int | None, "arguments": dict}
    if not isinstance(progress, dict) or not all(
        name in progress and isinstance(progress[name], kind) for name, kind in kinds.items()
    ):
        raise ValueError(f"{path} must hold {', '.join(kinds)}, as a checkpoint's does.")
    if progress["step"] < 0:
        raise ValueError(f"{path}: the step must be at least 0, got {progress['step']}.")
    return progress


def _part(state: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder} holds no weights.")
    tensors = {}
    for file in files:
        try:
            tensors |= load_file(file)
        except SafetensorError as error:
            raise ValueError(f"{file} is no safetensors file: {error}.") from None
    return tensors
