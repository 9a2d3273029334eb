"""One optimizer step: the random draws, the prepared batches, and the method."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.distributed.tensor import DTensor

from ..ema import ConstantDecayEMA
from ..objective import draw_keep_mask, draw_timesteps, drop_labels
from ..transformer_jit import JiTTransformer2DModel
from .arguments import TrainingArguments
from .data import ImageLoader, draws, to_float


# Keys of the draws made here; data.py has those of order, crops and flips.
IMAGE_DRAWS, DROPOUT_DRAWS, WEIGHT_DRAWS = 101, 102, 103


class NonFiniteLossError(RuntimeError):
    """The loss became NaN or infinite; the message names the step, the images and the last good checkpoint."""


class LossRecord:
    """Losses of the steps since the last log, kept on the device, and the images they were of."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.losses: list[torch.Tensor] = []
        self.images: list[list[int]] = []

    def __len__(self) -> int:
        return len(self.losses)

    def add(self, losses: torch.Tensor, images: list[int]) -> None:
        """losses (3,): total, denoising, alignment."""
        self.losses.append(losses)
        self.images.append(images)

    def clear(self) -> None:
        self.losses.clear()
        self.images.clear()

    def check(self, step: int, last_checkpoint: Path | None) -> torch.Tensor:
        """
        (processes, steps, 3) on the host, after a look at each: the one place where the device is waited for.

        Raises:
            NonFiniteLossError: a loss is NaN or infinite; `step` is the last step's number.
        """
        losses = self.accelerator.gather(torch.stack(self.losses)[None]).cpu()
        bad = (~losses.isfinite().all(dim=(0, 2))).nonzero()
        if len(bad):
            index = bad[0].item()
            images = gather_object(self.images[index])
            raise NonFiniteLossError(
                f"The loss of step {step - len(self) + index + 1} is not finite. Its images (places in the data) were "
                f"{sorted(images)}. The last good checkpoint is {last_checkpoint}: resume from it with a smaller "
                "--learning_rate, --max_grad_norm 1, --mixed_precision bf16 or no, or --on_nonfinite skip."
            )
        return losses


def draw(args: TrainingArguments, batch: dict, step: int, num_tokens: int, num_classes: int, device) -> dict:
    """
    Times, dropped labels, keep mask and noise of a batch: functions of (seed, step, image) and of the kind of
    device, on which the noise is made.
    """
    timesteps, labels, keep, seeds = [], [], [], []
    for index, label in zip(batch["index"].tolist(), batch["class_labels"], strict=True):
        small, large = draws(args.seed, step, index, purpose=IMAGE_DRAWS, count=2)
        generator = torch.Generator().manual_seed(int(small))
        timesteps.append(draw_timesteps(1, generator, args.P_mean, args.P_std))
        labels.append(drop_labels(label[None], num_classes, generator, args.label_drop_prob))
        keep.append(draw_keep_mask(1, num_tokens, generator, args.mask_ratio))
        seeds.append(int(large))
    noise = torch.empty(batch["pixel_values"].shape, device=device)
    generator = torch.Generator(device)
    for image, seed in zip(noise, seeds, strict=True):
        image.normal_(generator=generator.manual_seed(seed))

    def send(parts: list[torch.Tensor]) -> torch.Tensor:
        whole = torch.cat(parts)
        return (whole.pin_memory() if device.type == "cuda" else whole).to(device, non_blocking=True)

    return {
        "class_labels": send(labels),
        "timestep": send(timesteps),
        "noise": noise,
        "keep_mask": send(keep) if args.objective == "pixelrepa" else None,
    }


def prepared_batches(
    args, loader: ImageLoader, teach: Callable | None, step: int, num_tokens: int, num_classes: int, device
) -> Iterator:
    """
    Batches with everything the objective takes, on the device, and what the trainer remembers about each.

    On a GPU copies, draws and the teacher run on their own stream one batch ahead, beside the student's work on the
    batch before. The teacher is frozen, so nothing it is given depends on the student.

    `teach` makes features of pixels and of the batch they are from; None for plain JiT.
    """
    stream = torch.cuda.Stream() if device.type == "cuda" else None

    def prepare(batch: dict, step: int) -> tuple[dict, dict]:
        about = {
            "index": batch["index"].tolist(),
            "skipped": int(batch["skipped"].sum()),
            "loader": loader.state_dict(),  # read now: the loader will be a batch ahead when this one is used
        }
        inputs = draw(args, batch, step, num_tokens, num_classes, device)
        inputs["pixel_values"] = to_float(batch["pixel_values"].to(device, non_blocking=True))
        taught = teach is not None and args.aligns(step)
        inputs["teacher_features"] = teach(inputs["pixel_values"], batch) if taught else None
        return inputs, about

    def numbered() -> Iterator[tuple[dict, int]]:
        for number, batch in enumerate(loader):
            yield batch, step + number // args.gradient_accumulation_steps

    if stream is None:
        for batch, number in numbered():
            yield prepare(batch, number)
        return

    ahead = None
    for batch, number in numbered():
        with torch.cuda.stream(stream):
            following = prepare(batch, number)
        if ahead is not None:
            yield ahead
        # The student's stream waits for the side stream on the device; the host does not.
        torch.cuda.current_stream().wait_stream(stream)
        for tensor in following[0].values():
            if tensor is not None:
                tensor.record_stream(torch.cuda.current_stream())
        ahead = following


@dataclass
class Step:
    """
    What an optimizer step leaves behind; on the device, until someone logs it.

    Attributes:
        losses: (3,): total, denoising and alignment loss (0 where there is none), means over the micro-steps.
        images: places in the data of this process's images.
        skipped_images: how many of this process's images could not be read and were replaced.
        grad_norm: before clipping, where it was asked for.
        skipped: the gradient was not finite, and nothing was changed.
        position: of the loader, behind the step's images.
    """

    losses: torch.Tensor
    images: list[int]
    skipped_images: int
    grad_norm: torch.Tensor | None
    skipped: bool
    position: dict


def take_step(
    args: TrainingArguments,
    accelerator: Accelerator,
    objective: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    transformer: JiTTransformer2DModel,
    ema: ConstantDecayEMA | None,
    batches: Iterator,
    step: int,
    wants_norm: bool,
) -> Step:
    """One step of the method; `step` counts those before it, `transformer` is the objective's, which `ema` averages."""
    losses, images, skipped_images = [], [], 0
    for micro_step in range(args.gradient_accumulation_steps):
        inputs, about = next(batches)
        dropout_seeds = draws(args.seed, step, accelerator.process_index, DROPOUT_DRAWS, micro_step + 1)
        torch.manual_seed(int(dropout_seeds[micro_step]))
        with accelerator.accumulate(objective):
            with accelerator.autocast():
                output = objective(**inputs)
            accelerator.backward(output.loss)
        parts = (output.loss, output.denoising_loss, output.alignment_loss)
        losses.append(torch.stack([output.loss.new_zeros(()) if part is None else part.detach() for part in parts]))
        images += about["index"]
        skipped_images += about["skipped"]

    grad_norm, skipped = None, False
    if wants_norm or args.max_grad_norm is not None or args.on_nonfinite == "skip":
        bound = float("inf") if args.max_grad_norm is None else args.max_grad_norm
        grad_norm = accelerator.clip_grad_norm_(objective.parameters(), bound)
        if isinstance(grad_norm, DTensor):
            grad_norm = grad_norm.full_tensor()
        skipped = args.on_nonfinite == "skip" and not torch.isfinite(grad_norm)
    if not skipped or accelerator.scaler is not None:  # the scaler skips by itself, and learns from it
        optimizer.step()
    optimizer.zero_grad()
    if ema is not None and not skipped:
        ema.update(transformer)
    return Step(torch.stack(losses).mean(dim=0), images, skipped_images, grad_norm, skipped, about["loader"])
