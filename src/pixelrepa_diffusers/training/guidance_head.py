"""Parts of `train_guidance_head.py`: arguments, generated images, the head called like a transformer, exports."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn as nn
from accelerate import Accelerator
from tqdm.auto import tqdm

from ..cli import flag
from ..files import write_atomically, write_json
from ..guidance_jit import JiTGuidanceHead
from ..hub import LOCAL
from ..pipeline_pixelrepa import PixelREPAPipeline
from ..sampling import seeded
from ..transformer_jit import JiTTransformer2DModel, JiTTransformer2DModelOutput
from .arguments import OptimizationArguments
from .data import random_words
from .export import Exporter


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
    guidance_scale: float | None = flag(None, "Guidance scale of these images (default: the saved one).", ge=0)
    guidance_interval: list[float] | None = flag(
        None, "Guidance interval LOW HIGH in t of these images; same default.", nargs=2
    )
    num_inference_steps: int = flag(50, "Sampling steps of these images and the sample grids.", ge=1)
    generation_batch_size: int = flag(64, "Sampling batch size per process.", ge=1)

    num_train_epochs: int = flag(20, "Epochs; --max_train_steps overrides them.", ge=1)
    lr_warmup_steps: int | None = flag(100, "Warmup in optimizer steps.", ge=0)
    ema_decays: list[float] = flag(
        [0.999], "Constant EMA decays of the head; the first is sampled and saved.", ge=0, lt=1
    )
    random_flip: bool = flag(False, "Flip half of the images horizontally.")
    label_drop_prob: float = flag(0.1, "Probability that a label is replaced by the null class.", ge=0, le=1)
    P_mean: float = flag(-0.8, "Mean of the logit-normal timesteps, as in the training of the transformer.")
    P_std: float = flag(0.8, "Standard deviation of the logit-normal timesteps.", gt=0)

    self_guidance_scale: float = flag(0.5, "w of sample grids, saved with the pipeline.", ge=0)
    self_guidance_interval: list[float] = flag(
        [0.0, 1.0], "Its interval LOW HIGH in t, likewise.", nargs=2, ge=0, le=1
    )
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

    # What the trainer asks of its arguments and has no flag here.
    objective = "none"
    mask_ratio = 0.0
    lora_rank = None
    ema_offload = False
    eval_steps = 0
    push_checkpoints = False
    dry_run = False
    ddp_timeout = 600
    logging_dir = "logs"
    tracker_project_name = "guidance_head"

    @property
    def validation_inference_steps(self) -> int:
        return self.num_inference_steps

    def aligns(self, step: int) -> bool:
        return False


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
    Sample the image folder `generated/` on all processes and return it. Images of an interrupted run with the same settings
    are kept.

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


def guided_pipeline(args: GuidanceHeadArguments, pipe: PixelREPAPipeline, head: JiTGuidanceHead) -> PixelREPAPipeline:
    """Return the pipeline with a trained head."""
    settings = {name: value for name, value in pipe.config.items() if not name.startswith("_")}
    settings |= {name: getattr(args, name) for name in ("self_guidance_scale", "self_guidance_interval")}
    return PixelREPAPipeline(**{**settings, **pipe.components, "guidance_head": head})


class GuidedExporter(Exporter):
    """Exporter of a pipeline with its head; `source` is the folder of the pipeline without it."""

    def __init__(self, source: Path, *parts):
        super().__init__(*parts)
        self.source = source

    def write_record(self, folder: Path, facts: dict) -> None:
        """Write the record of the head beside its weights; the record of the transformer's training stays."""
        facts["train_data_dir"] = self.args.train_data_dir and LOCAL
        write_json(folder / "guidance_head" / "training_arguments.json", facts)
        if (self.source / "training_arguments.json").is_file():
            shutil.copyfile(self.source / "training_arguments.json", folder / "training_arguments.json")
