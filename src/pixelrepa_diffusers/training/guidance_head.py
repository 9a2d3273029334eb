"""Parts of `train_guidance_head.py`: arguments, the model's own images, the head in the place of a transformer, exports."""

from __future__ import annotations

import dataclasses
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn as nn
from accelerate import Accelerator
from accelerate.logging import get_logger
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from ..cli import flag
from ..ema import ConstantDecayEMA
from ..files import write_atomically, write_folder, write_json
from ..guidance_jit import JiTGuidanceHead
from ..hub import LOCAL
from ..pipeline_pixelrepa import PixelREPAPipeline
from ..sampling import seeded
from ..transformer_jit import JiTTransformer2DModel, JiTTransformer2DModelOutput
from .arguments import OptimizationArguments, TrainingArguments
from .checkpoints import delete_oldest
from .data import random_words
from .export import training_facts


logger = get_logger(__name__)

GENERATION_DRAWS = 104  # a purpose of `random_words`, beside those of step.py


@dataclass(kw_only=True)
class GuidanceHeadArguments(OptimizationArguments):
    pipeline: str = flag(help="Pipeline to guide: a saved pipeline, a training checkpoint or a Hub id.")
    revision: str | None = flag(None, "Branch, tag or commit of a Hub id.")
    output_dir: str = flag(
        "outputs/guidance_head", "Folder for images, checkpoints, samples, curves and the pipeline."
    )
    depth: int | None = flag(None, "Number of blocks before the head (default: half of them).", ge=0)

    train_data_dir: str | None = flag(
        None, "Train on this image folder, one sub-folder per class, instead of the model's own images."
    )
    on_bad_image: Literal["error", "skip"] = flag("error", "A damaged image stops the run, or the next replaces it.")
    num_generated_images: int = flag(10_000, "Number of the model's own images, evenly over the classes.", ge=1)
    guidance_scale: float | None = flag(None, "Their guidance scale (default: the saved one).", ge=0)
    guidance_interval: list[float] | None = flag(None, "Their guidance interval in t; same default.", nargs=2)
    num_inference_steps: int = flag(50, "Sampling steps of these images and of the sample grids.", ge=1)
    generation_batch_size: int = flag(64, "Sampling batch size per process.", ge=1)

    num_train_epochs: int = flag(20, "Epochs; --max_train_steps overrides them.", ge=1)
    lr_warmup_steps: int | None = flag(100, "Warmup in optimizer steps.", ge=0)
    ema_decays: list[float] = flag(
        [0.999], "Constant EMA decays of the head; the first is sampled and saved.", ge=0, lt=1
    )
    random_flip: bool = flag(False, "Flip half of the images horizontally.")
    label_drop_prob: float = flag(0.1, "Probability that a label is replaced by the null class.", ge=0, le=1)
    P_mean: float = flag(-0.8, "Mean of the logit-normal timesteps, as in the training of the transformer.")
    P_std: float = flag(0.8, "Their standard deviation.", gt=0)

    self_guidance_scale: float = flag(0.5, "w of the sample grids, saved with the pipeline.", ge=0)
    self_guidance_interval: list[float] = flag([0.0, 1.0], "LOW HIGH in t; likewise.", nargs=2, ge=0, le=1)
    mixed_precision: Literal["no", "fp16", "bf16"] | None = flag(None, "Default: accelerate's configuration.")
    dataloader_num_workers: int = flag(4, "Image decoding processes per training process.", ge=0)
    checkpointing_steps: int = flag(1000, "Steps between checkpoints.", ge=1)
    checkpoints_total_limit: int | None = flag(None, "Number of checkpoints to keep.", ge=1)
    resume_from_checkpoint: str | None = flag(
        None, '"latest" (starts from scratch if there is none), or a checkpoint.'
    )
    logging_steps: int = flag(50, "Steps between log lines.", ge=1)
    validation_steps: int = flag(1000, "Steps between sample grids; 0 for none.", ge=0)
    num_validation_images: int = flag(16, "Images of a sample grid.", ge=1)
    report_to: list[str] = flag(["none"], "tensorboard, wandb, … or none.", nargs="+")

    # What the trainer's parts ask of their arguments.
    objective = "none"
    mask_ratio = 0.0
    aligns = TrainingArguments.aligns
    stop_alignment_after_step = None
    global_batch_size = TrainingArguments.global_batch_size
    resolved_learning_rate = TrainingArguments.resolved_learning_rate
    resolved_steps = TrainingArguments.resolved_steps

    def saved(self) -> dict:
        return dataclasses.asdict(self)


class HeadOnFrozenTransformer(nn.Module):
    """
    A frozen transformer whose prediction is the head's, so that [`PixelREPAObjective`] trains the head with the
    transformer's own loss.

    The transformer is not a submodule: it is in no checkpoint, no EMA and no gradient synchronization.
    """

    def __init__(self, transformer: JiTTransformer2DModel, head: JiTGuidanceHead):
        super().__init__()
        self.head = head
        self._frozen = (transformer.eval().requires_grad_(False),)  # a tuple does not register it
        self.config, self.velocity = transformer.config, transformer.velocity

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        class_labels: torch.Tensor,
        return_alignment_states: bool = False,
        alignment_depth: int | None = None,
    ) -> JiTTransformer2DModelOutput:
        with torch.no_grad():
            states = self._frozen[0](
                hidden_states,
                timestep,
                class_labels,
                return_alignment_states=True,
                alignment_depth=self.head.config.depth,
            ).alignment_states
        return JiTTransformer2DModelOutput(sample=self.head(states, timestep, class_labels))


def generate_images(args: GuidanceHeadArguments, accelerator: Accelerator, pipe: PixelREPAPipeline) -> Path:
    """
    Make the model's own images as an image folder `generated/`, shared among the processes, and return it. Images that exist
    from an interrupted run with the same settings are kept.

    Raises:
        ValueError: If the folder holds images of other settings, or there are fewer images than classes.
    """
    folder, num_classes = Path(args.output_dir) / "generated", pipe.transformer.config.num_classes
    if args.num_generated_images < num_classes:
        raise ValueError(f"--num_generated_images must be at least the number of classes, {num_classes}.")
    sampling = {
        "guidance_scale": pipe.config.guidance_scale if args.guidance_scale is None else args.guidance_scale,
        "guidance_interval": list(args.guidance_interval or pipe.config.guidance_interval),
        "num_inference_steps": args.num_inference_steps,
    }
    # A pipeline that already has a head is sampled without it.
    sampling |= {"self_guidance_scale": 0.0, "autoguidance_scale": 1.0}
    settings = {"pipeline": args.pipeline, "num_images": args.num_generated_images, "seed": args.seed, **sampling}
    record = folder / "settings.json"
    if record.is_file() and (made := json.loads(record.read_text(encoding="utf-8"))) != settings:
        changed = ", ".join(f"{name} was {made.get(name)}" for name in settings if made.get(name) != settings[name])
        raise ValueError(f"{folder} holds images of other settings ({changed}). Choose another --output_dir.")
    accelerator.wait_for_everyone()  # every process looks before any writes
    if accelerator.is_main_process:
        for label in range(num_classes):
            (folder / f"{label:06d}").mkdir(parents=True, exist_ok=True)
        write_json(record, settings)
    accelerator.wait_for_everyone()

    paths = [folder / f"{index % num_classes:06d}" / f"{index:08d}.png" for index in range(args.num_generated_images)]
    size, is_main = args.generation_batch_size, accelerator.is_main_process
    batches = [range(start, min(start + size, len(paths))) for start in range(0, len(paths), size)]
    mine = batches[accelerator.process_index :: accelerator.num_processes]
    for batch in tqdm(mine, desc="the model's own images", disable=None if is_main else True):
        if all(paths[index].is_file() for index in batch):
            continue
        # Keyed draws, not seeds 0, 1, …, from which evaluations sample.
        seeds = (int(random_words(args.seed, 0, index, purpose=GENERATION_DRAWS)[0]) for index in batch)
        images = pipe([index % num_classes for index in batch], generator=seeded(seeds), **sampling).images
        for index, image in zip(batch, images, strict=True):
            write_atomically(paths[index], lambda path, image=image: image.save(path, "PNG"))
    accelerator.wait_for_everyone()
    return folder


def save_checkpoint(
    args: GuidanceHeadArguments,
    accelerator: Accelerator,
    ema: ConstantDecayEMA | None,
    step: int,
    loader_state: dict,
) -> Path:
    """
    Write checkpoint-STEP, all that a bit-exact resume needs: head, EMAs, optimizer, random states and position. The oldest
    beyond the limit are deleted.
    """
    folder = Path(args.output_dir) / f"checkpoint-{step}"

    def write(path: Path) -> None:
        accelerator.save_state(str(path))
        if accelerator.is_main_process:
            for decay in () if ema is None else ema.decays:
                save_file(ema.state_dict_for(decay), path / f"ema_{decay}.safetensors")
            calls = None if ema is None else ema.num_calls
            write_json(
                path / "progress.json",
                {"step": step, "loader": loader_state, "ema_calls": calls, "arguments": args.saved()},
            )

    write_folder(folder, write, accelerator.is_main_process, accelerator.wait_for_everyone, manifest=True)
    if accelerator.is_main_process and args.checkpoints_total_limit is not None:
        delete_oldest(folder, args.checkpoints_total_limit)
    return folder


def load_checkpoint(
    args: GuidanceHeadArguments, accelerator: Accelerator, ema: ConstantDecayEMA | None, folder: Path
) -> dict:
    """
    Load a verified checkpoint and return its progress.json. Nothing in a checkpoint is executed.

    Raises:
        ValueError: If the checkpoint belongs to a run with another head, optimizer or EMAs.
    """
    progress = json.loads((folder / "progress.json").read_text(encoding="utf-8"))
    try:
        accelerator.load_state(str(folder))
        if ema is not None:
            averages = {decay: load_file(folder / f"ema_{decay}.safetensors") for decay in ema.decays}
            ema.load_state_dict({"num_calls": progress["ema_calls"], "averages": averages})
    except (RuntimeError, ValueError, OSError, KeyError) as error:
        raise ValueError(f"{folder} does not fit this run: {error}") from error
    accelerator.step = 0  # accelerate continues counting micro-steps
    return progress


def guided_pipeline(
    args: GuidanceHeadArguments,
    pipe: PixelREPAPipeline,
    trained: HeadOnFrozenTransformer,
    ema: ConstantDecayEMA | None,
) -> PixelREPAPipeline:
    """The pipeline with a copy of the head: its first EMA, or its weights without EMAs."""
    weights = trained.state_dict() if ema is None else ema.state_dict_for(ema.decays[0])
    head = JiTGuidanceHead.from_config(trained.head.config).to(pipe.transformer.device)
    head.load_state_dict({name.removeprefix("head."): weight for name, weight in weights.items()})
    settings = {name: value for name, value in pipe.config.items() if not name.startswith("_")}
    settings |= {
        "self_guidance_scale": args.self_guidance_scale,
        "self_guidance_interval": args.self_guidance_interval,
    }
    settings |= {**pipe.components, "guidance_head": head.eval().requires_grad_(False)}
    guided = PixelREPAPipeline(**settings)
    guided.set_progress_bar_config(disable=True)
    return guided


def save_pipeline(
    args: GuidanceHeadArguments,
    accelerator: Accelerator,
    source: Path,
    pipe: PixelREPAPipeline,
    folder: Path,
    step: int,
) -> None:
    """Save the guided pipeline; the record of the transformer's training stays, the head's lies beside its weights."""
    facts = training_facts(args, accelerator, step) | {"train_data_dir": args.train_data_dir and LOCAL}

    def write(path: Path) -> None:
        if accelerator.is_main_process:
            pipe.save_pretrained(path)
            write_json(path / "guidance_head" / "training_arguments.json", facts)
            if (source / "training_arguments.json").is_file():
                shutil.copyfile(source / "training_arguments.json", path / "training_arguments.json")
            samples = sorted((Path(args.output_dir) / "samples").glob("step-*.png"))
            if samples:
                shutil.copyfile(samples[-1], path / "samples.png")

    write_folder(folder, write, accelerator.is_main_process, accelerator.wait_for_everyone)
