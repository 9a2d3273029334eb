"""Checkpoints: what is in them, and folders that are complete or absent however a run ends."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import DistributedType
from arguments import BookkeepingArguments, TrainingArguments
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor, distribute_tensor

from pixelrepa_diffusers import JiTTransformer2DModel
from pixelrepa_diffusers.ema import ConstantDecayEMA
from pixelrepa_diffusers.objective import PixelREPAObjective


logger = get_logger(__name__)

MANIFEST = "manifest.json"
_NAME = re.compile(r"checkpoint-(\d+)")


class DamagedCheckpointError(ValueError):
    """A checkpoint that is incomplete or altered; the message names the first wrong file."""


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


def write_folder(
    folder: Path,
    write: Callable[[Path], None],
    is_main: bool,
    barrier: Callable[[], None],
    manifest: bool = False,
) -> None:
    """
    Calls `write(path)` on every process with a folder beside `folder`, then renames it into place on the main one.

    Every file is on the disk before the rename, so a kill or a power cut at any moment leaves either the whole folder
    or none. `manifest` adds the sizes and checksums that [`verify`] compares. An older folder of that name gives way at
    the rename.

    Raises:
        OSError: something could not be written; the message names the folder, the cause and the space left.
    """
    beside = folder.with_name(f".{folder.name}.incomplete")
    if is_main:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
    barrier()
    try:
        write(beside)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch.save says nothing of a full disk
        free = shutil.disk_usage(beside.parent).free / 2**20
        raise OSError(
            f"{folder} could not be written: {error} ({free:.0f} MiB are free there). Everything before it is whole: make "
            "room and go on with --resume_from_checkpoint latest."
        ) from error
    barrier()
    if is_main:
        if manifest:
            fingerprints = {name: _fingerprint(beside / name) for name in _files(beside)}
            (beside / MANIFEST).write_text(json.dumps(fingerprints, indent=1), encoding="utf-8")
        for path in (*beside.rglob("*"), beside):
            _sync(path)
        if folder.exists():
            discard_folder(folder)
        os.replace(beside, folder)
        _sync(folder.parent)
    barrier()


def discard_folder(folder: Path) -> None:
    """Removes a folder; a kill half-way does not leave one that looks complete."""
    trash = folder.with_name(f".{folder.name}.discarded")
    shutil.rmtree(trash, ignore_errors=True)
    os.replace(folder, trash)
    shutil.rmtree(trash)


def sweep(output_dir: Path) -> None:
    """Removes the folders and files that a killed run left half-written or half-removed."""
    for folder in (output_dir, output_dir / "samples", output_dir / "hub"):
        for path in (*folder.glob(".*.incomplete"), *folder.glob(".*.discarded")):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def verify(folder: Path) -> None:
    """Raises [`DamagedCheckpointError`] unless every file is as it was written."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedCheckpointError(f"{folder} is not a complete checkpoint: {MANIFEST}: {error}.") from error
    if not isinstance(manifest, dict) or not all(
        isinstance(entry, dict) and entry.keys() == {"size", "crc32"} for entry in manifest.values()
    ):
        raise DamagedCheckpointError(f"{folder} is damaged: {MANIFEST} does not list files with their size and crc32.")
    if strangers := [name for name in manifest if Path(name).is_absolute() or ".." in Path(name).parts]:
        raise DamagedCheckpointError(f"{folder} is damaged: {MANIFEST} names {strangers[0]!r}, which lies outside it.")

    def check(name: str) -> None:
        path = folder / name
        if not path.is_file():
            raise DamagedCheckpointError(f"{folder} is damaged: {name} is missing.")
        if path.stat().st_size != manifest[name]["size"] or _fingerprint(path) != manifest[name]:
            raise DamagedCheckpointError(f"{folder} is damaged: {name} is not as it was written.")

    with ThreadPoolExecutor() as pool:
        list(pool.map(check, manifest))


def find_checkpoint(output_dir: Path, resume: str | None, warn: Callable[[str], None]) -> Path | None:
    """
    The verified checkpoint to resume from, or `None` for a fresh start.

    Args:
        output_dir: The run's folder.
        resume: `None`; "latest", the newest undamaged checkpoint of `output_dir`; or the path of one.
        warn: Told of each damaged checkpoint that is passed over.

    Raises:
        FileNotFoundError: for a path that does not exist.
        DamagedCheckpointError: for a path to a damaged checkpoint, or when "latest" finds only damaged ones.
        FileExistsError: when nothing is to be resumed but the folder holds checkpoints, or when a path is and the folder
            holds others that are as far or further.
    """

    def undamaged(folder: Path) -> bool:
        try:
            verify(folder)
        except DamagedCheckpointError as error:
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
        verify(folder)
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
        raise DamagedCheckpointError(f"All {len(existing)} checkpoints in {output_dir} are damaged.")
    return None


def prune(output_dir: Path, limit: int | None) -> None:
    """Discards the oldest checkpoints beyond `limit`; call it after the newest is in place."""
    if limit is not None:
        for folder in list_checkpoints(output_dir)[:-limit]:
            discard_folder(folder)


def _files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _fingerprint(path: Path) -> dict[str, int]:
    checksum, size = 0, 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 24):
            checksum, size = zlib.crc32(chunk, checksum), size + len(chunk)
    return {"size": size, "crc32": checksum}


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
