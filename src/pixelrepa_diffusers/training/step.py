"""One optimizer step: random draws, prefetched inputs, forward and backward, update of weights and EMAs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch.distributed.tensor import DTensor

from ..ema import ConstantDecayEMA
from ..objective import draw_keep_mask, draw_timesteps, drop_labels
from .arguments import TrainingArguments
from .data import ImageLoader, draws, to_float


# Purposes of the draws made here and in the trainer; data.py has those of order, crops and flips.
IMAGE_DRAWS, DROPOUT_DRAWS, WEIGHT_DRAWS = 101, 102, 103


def draw(
    args: TrainingArguments, batch: dict, step: int, num_tokens: int, num_classes: int, device: torch.device
) -> dict:
    """
    Draw timesteps, dropped labels, keep masks and noise of a batch.

    They depend on (seed, step, image) and on the kind of device, on which the noise is made, but not on how images are
    distributed over batches and processes.
    """
    timesteps, labels, keep_masks, noise_seeds = [], [], [], []
    for index, label in zip(batch["index"].tolist(), batch["class_labels"], strict=True):
        seed, noise_seed = draws(args.seed, step, index, purpose=IMAGE_DRAWS, count=2)
        generator = torch.Generator().manual_seed(int(seed))
        timesteps.append(draw_timesteps(1, generator, args.P_mean, args.P_std))
        labels.append(drop_labels(label[None], num_classes, generator, args.label_drop_prob))
        keep_masks.append(draw_keep_mask(1, num_tokens, generator, args.mask_ratio))
        noise_seeds.append(int(noise_seed))

    noise = torch.empty(batch["pixel_values"].shape, device=device)
    generator = torch.Generator(device)
    for image_noise, noise_seed in zip(noise, noise_seeds, strict=True):
        image_noise.normal_(generator=generator.manual_seed(noise_seed))

    def to_device(parts: list[torch.Tensor]) -> torch.Tensor:
        whole = torch.cat(parts)
        return (whole.pin_memory() if device.type == "cuda" else whole).to(device, non_blocking=True)

    return {
        "class_labels": to_device(labels),
        "timestep": to_device(timesteps),
        "noise": noise,
        "keep_mask": to_device(keep_masks) if args.objective == "pixelrepa" else None,
    }


def prepared_batches(
    args: TrainingArguments,
    loader: ImageLoader,
    teach: Callable[[torch.Tensor, dict], torch.Tensor] | None,
    step: int,
    num_tokens: int,
    num_classes: int,
    device: torch.device,
) -> Iterator[tuple[dict, dict]]:
    """
    Yield (inputs of the objective on the device, metadata) for every micro-step, endlessly.

    On a GPU, copies, draws and the teacher run one batch ahead on a side stream, in parallel with the student. The
    teacher is frozen, so this changes no result. `teach` maps pixel values and their batch to teacher features, and `step`
    is the number of completed optimizer steps.
    """

    def prepare(batch: dict, step: int) -> tuple[dict, dict]:
        metadata = {
            "index": batch["index"].tolist(),
            "skipped": int(batch["skipped"].sum()),
            "loader": loader.state_dict(),  # read now: once this batch is used, the loader is one further
        }
        inputs = draw(args, batch, step, num_tokens, num_classes, device)
        inputs["pixel_values"] = to_float(batch["pixel_values"].to(device, non_blocking=True))
        aligns = teach is not None and args.aligns(step)
        inputs["teacher_features"] = teach(inputs["pixel_values"], batch) if aligns else None
        return inputs, metadata

    side_stream = torch.cuda.Stream() if device.type == "cuda" else None
    prefetched = None
    for number, batch in enumerate(loader):
        batch_step = step + number // args.gradient_accumulation_steps
        if side_stream is None:
            yield prepare(batch, batch_step)
            continue
        with torch.cuda.stream(side_stream):
            following = prepare(batch, batch_step)
        if prefetched is not None:
            yield prefetched
        # The student's stream waits for the side stream on the device; the host does not.
        torch.cuda.current_stream().wait_stream(side_stream)
        for tensor in following[0].values():
            if tensor is not None:
                tensor.record_stream(torch.cuda.current_stream())
        prefetched = following


@dataclass
class StepResult:
    """Result of one optimizer step on this process. Tensors stay on the device."""

    losses: torch.Tensor  # (3,): total, denoising and alignment loss (0 without alignment), means over the micro-steps
    images: list[int]  # indices in the data
    skipped_images: int  # images that replace a bad one
    grad_norm: torch.Tensor | None  # before clipping, if it was computed
    skipped: bool  # whether the update was skipped because the gradient is not finite
    position: dict  # state of the loader after the step


def take_step(
    args: TrainingArguments,
    accelerator: Accelerator,
    objective: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    ema: ConstantDecayEMA | None,
    batches: Iterator[tuple[dict, dict]],
    step: int,
    needs_grad_norm: bool,
) -> StepResult:
    """Take the optimizer step that follows `step` completed ones."""
    losses, images, skipped_images = [], [], 0
    for dropout_seed in draws(
        args.seed, step, accelerator.process_index, DROPOUT_DRAWS, args.gradient_accumulation_steps
    ):
        inputs, metadata = next(batches)
        torch.manual_seed(int(dropout_seed))
        with accelerator.accumulate(objective):
            with accelerator.autocast():
                output = objective(**inputs)
            accelerator.backward(output.loss)
        parts = (output.loss, output.denoising_loss, output.alignment_loss)
        losses.append(torch.stack([output.loss.new_zeros(()) if part is None else part.detach() for part in parts]))
        images += metadata["index"]
        skipped_images += metadata["skipped"]

    grad_norm, skipped = None, False
    if needs_grad_norm or args.max_grad_norm is not None or args.on_nonfinite == "skip":
        max_norm = float("inf") if args.max_grad_norm is None else args.max_grad_norm
        grad_norm = accelerator.clip_grad_norm_(objective.parameters(), max_norm)
        if isinstance(grad_norm, DTensor):
            grad_norm = grad_norm.full_tensor()
        skipped = args.on_nonfinite == "skip" and not torch.isfinite(grad_norm)
    if not skipped or accelerator.scaler is not None:  # the gradient scaler skips by itself and adapts its scale
        optimizer.step()
    optimizer.zero_grad()
    if ema is not None and not (skipped or accelerator.optimizer_step_was_skipped):
        ema.update(accelerator.unwrap_model(objective).transformer)
    return StepResult(torch.stack(losses).mean(dim=0), images, skipped_images, grad_norm, skipped, metadata["loader"])
