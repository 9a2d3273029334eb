"""One optimizer step: prefetched inputs, forward and backward, update of weights and EMAs."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch.distributed.tensor import DTensor

from ..ema import ConstantDecayEMA
from .arguments import TrainingArguments
from .data import ImageLoader, random_words, to_float
from .draws import BatchDraws


# Purposes of `random_words` here and in the trainer; 104 is guidance_head.py's, and data.py has those of order and crops.
DROPOUT_DRAWS, WEIGHT_DRAWS = 102, 103


class PreparedBatches:
    """
    Endless (inputs of the objective on the device, metadata), one per micro-step.

    On a GPU, [`prefetch`] starts copies, draws and the teacher of the next batch on a side stream, in parallel with the
    student. The teacher is frozen, so this changes no result.

    Args:
        args (`TrainingArguments`): Training arguments.
        loader (`ImageLoader`): Batches of images.
        draw (`BatchDraws`): The random draws.
        teach (`Callable`, *optional*): Maps pixel values and their batch to teacher features.
        step (`int`): Number of completed optimizer steps.
        device (`torch.device`): Device of this process.

    Attributes:
        seconds_waited (`float`): Time spent waiting for the loader.
    """

    def __init__(
        self,
        args: TrainingArguments,
        loader: ImageLoader,
        draw: BatchDraws,
        teach: Callable[[torch.Tensor, dict], torch.Tensor] | None,
        step: int,
        device: torch.device,
    ):
        self.args, self.loader, self.draw, self.teach, self.device = args, loader, draw, teach, device
        self.batches, self.micro_steps = iter(loader), step * args.gradient_accumulation_steps
        self.seconds_waited, self.prefetched, self.side_stream = 0.0, None, None
        if device.type == "cuda":
            self.side_stream = torch.cuda.Stream()
            self.side_stream.wait_stream(torch.cuda.current_stream())  # which still copies the teacher's weights

    def __next__(self) -> tuple[dict, dict]:
        if self.side_stream is None:
            return self.prepare()
        self.prefetch()
        prepared, self.prefetched = self.prefetched, None
        # The student's stream waits for the side stream on the device; the host does not.
        torch.cuda.current_stream().wait_stream(self.side_stream)
        for tensor in prepared[0].values():
            if tensor is not None:
                tensor.record_stream(torch.cuda.current_stream())
        return prepared

    def prefetch(self) -> None:
        """Prepare the next batch on the side stream, if there is one and it has not been done."""
        if self.side_stream is not None and self.prefetched is None:
            with torch.cuda.stream(self.side_stream):
                self.prefetched = self.prepare()

    def prepare(self) -> tuple[dict, dict]:
        """Prepare the next batch on the current stream."""
        started = time.perf_counter()
        batch = next(self.batches)
        self.seconds_waited += time.perf_counter() - started
        metadata = {
            "index": batch["index"].tolist(),
            "skipped": sum(batch["skipped"].tolist()),
            "loader": self.loader.state_dict(),  # read now: once this batch is used, the loader is one further
        }
        step = self.micro_steps // self.args.gradient_accumulation_steps
        self.micro_steps += 1
        pixels, index, labels = (
            batch[name].to(self.device, non_blocking=True) for name in ("pixel_values", "index", "class_labels")
        )
        inputs = self.draw(step, index, labels, pixels.shape[1:])
        inputs["pixel_values"] = to_float(pixels)
        aligns = self.teach is not None and self.args.aligns(step)
        inputs["teacher_features"] = self.teach(inputs["pixel_values"], batch) if aligns else None
        return inputs, metadata


Moment = torch.cuda.Event | float


def now(device: torch.device) -> Moment:
    """This moment on the clock of a device: an event of a GPU, seconds otherwise."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


@dataclass
class StepResult:
    """Result of one optimizer step on this process. Tensors stay on the device."""

    losses: torch.Tensor  # (3,): total, denoising and alignment loss (0 without alignment), means over the micro-steps
    images: list[int]  # indices in the data
    skipped_images: int  # images that replace a bad one
    grad_norm: torch.Tensor | None  # before clipping, if it was computed
    skipped: torch.Tensor | None  # bool, whether a non-finite gradient skipped the update; None if it cannot be
    position: dict  # state of the loader after the step
    seconds: float  # of this process, which on a GPU only launches the step
    seconds_waited: float  # of them, waiting for data
    forward: tuple[Moment, Moment] | None  # begin and end of the last forward pass, if it was measured


def take_step(
    args: TrainingArguments,
    accelerator: Accelerator,
    objective: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    ema: ConstantDecayEMA | None,
    batches: PreparedBatches,
    step: int,
    measure: bool,
) -> StepResult:
    """Take the optimizer step that follows `step` completed ones; `measure` the gradient's norm and the forward pass."""
    started, waited = time.perf_counter(), batches.seconds_waited
    module = getattr(objective, "module", objective)  # accelerate's unwrap_model walks all modules
    dropout_seeds = [None] * args.gradient_accumulation_steps
    if module.transformer.config.dropout:
        dropout_seeds = random_words(
            args.seed, step, accelerator.process_index, DROPOUT_DRAWS, len(dropout_seeds)
        ).tolist()
    losses, images, skipped_images, forward = [], [], 0, None
    for dropout_seed in dropout_seeds:
        inputs, metadata = next(batches)
        if dropout_seed is not None:
            torch.manual_seed(dropout_seed)
        with accelerator.accumulate(objective):
            begin = now(accelerator.device) if measure else None
            with accelerator.autocast():
                output = objective(**inputs)
            forward = (begin, now(accelerator.device)) if measure else None
            accelerator.backward(output.loss)
        parts = (output.loss, output.denoising_loss, output.alignment_loss)
        losses.append(torch.stack([output.loss.new_zeros(()) if part is None else part.detach() for part in parts]))
        images += metadata["index"]
        skipped_images += metadata["skipped"]
        if accelerator.sync_gradients:
            grad_norm, skipped = update_weights(args, accelerator, optimizer, measure)
            if ema is not None:
                ema.update(module.transformer, skipped)
        batches.prefetch()  # now, because the caller may wait for the device
    return StepResult(
        losses=torch.stack(losses).mean(dim=0),
        images=images,
        skipped_images=skipped_images,
        grad_norm=grad_norm,
        skipped=skipped,
        position=metadata["loader"],
        seconds=time.perf_counter() - started,
        seconds_waited=batches.seconds_waited - waited,
        forward=forward,
    )


def update_weights(
    args: TrainingArguments, accelerator: Accelerator, optimizer: torch.optim.Optimizer, measure: bool
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """
    Clip the gradients, update the weights and clear the gradients.

    With `--on_nonfinite skip` or a gradient scaler, a gradient that is not finite changes nothing. The device decides;
    nothing waits for it, except for the 8-bit optimizer.

    Returns:
        The norm of the gradients before clipping, and whether the update was skipped; None for what was not computed.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    may_skip = args.on_nonfinite == "skip" or accelerator.scaler is not None
    grad_norm = skipped = None
    if measure or may_skip or args.max_grad_norm is not None:
        accelerator.unscale_gradients(optimizer)
        # `clip_grad_norm_` at infinity also returns the norm, but turns all gradients to NaN if one is infinite.
        grad_norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if args.max_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, args.max_grad_norm, grad_norm)
        if isinstance(grad_norm, DTensor):
            grad_norm = grad_norm.full_tensor()
    if may_skip:
        skipped = ~grad_norm.isfinite()
    if not may_skip or accelerator.scaler is not None:  # the scaler skips by itself and adapts its scale
        optimizer.step()
    elif args.use_8bit_adam:
        if not skipped:
            optimizer.step()
    else:
        optimizer.optimizer.found_inf = skipped.float()  # read by fused AdamW
        optimizer.step()
    optimizer.zero_grad()
    return grad_norm, skipped
