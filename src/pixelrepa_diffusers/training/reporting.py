"""Progress of a run: losses and throughput, metrics.jsonl, trackers and curves."""

from __future__ import annotations

import json
import math
import resource
import sys
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import gather_object
from torch.distributed.tensor import DTensor
from tqdm.auto import tqdm

from ..files import write_atomically, write_json
from .arguments import TrainingArguments
from .data import ImageLoader
from .flops import measure_peak_flops
from .step import StepResult


logger = get_logger(__name__)

# Prefixes of the metrics that evaluations during training log.
EVALUATION_METRICS = ("fid", "fd_", "inception_score", "precision", "recall")


class NonFiniteLossError(FloatingPointError):
    """The loss became NaN or infinite."""


def announce(
    args: TrainingArguments,
    accelerator: Accelerator,
    loader: ImageLoader,
    optimizer: torch.optim.Optimizer,
    max_train_steps: int,
    warmup_steps: int,
) -> None:
    """Write arguments.json, start the trackers, and log the size and schedule of the run with [`TrainingArguments.warnings`]."""
    for warning in args.warnings(max_train_steps, warmup_steps):
        logger.warning(warning)
    steps = {"resolved_steps": max_train_steps, "resolved_warmup_steps": warmup_steps}
    if accelerator.is_main_process:
        write_json(Path(args.output_dir) / "arguments.json", {**args.saved(), **steps})
    accelerator.init_trackers(
        args.tracker_project_name,
        config={k: v if isinstance(v, int | float | str | bool) else str(v) for k, v in args.saved().items()},
    )
    source, epoch = loader.source, loader.batches_per_epoch
    parameters = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    facts = {
        "images": len(source) if epoch else f"{len(source.shard_names)} shards, {source.num_readers} readers",
        "classes": source.num_classes,
        "trainable parameters": f"{parameters:,}",
        "global batch": f"{loader.global_batch_size} ({args.train_batch_size} per process × "
        f"{args.gradient_accumulation_steps} accumulation steps × {accelerator.num_processes} processes)",
        "steps": f"{max_train_steps}, {warmup_steps} of them warmup",
        "epochs": f"{max_train_steps / epoch:.1f}" if epoch else "unknown",
        "learning rate": args.resolved_learning_rate(accelerator.num_processes),
        "device": f"{accelerator.device}, mixed precision {args.mixed_precision}",
    }
    logger.info("Training:" + "".join(f"\n  {name}: {value}" for name, value in facts.items()))


class MetricLogger:
    """Log metrics to metrics.jsonl, where rows after the `step` of a resume are dropped, and the trackers; plot them."""

    def __init__(self, accelerator: Accelerator, output_dir: Path, step: int):
        self.accelerator, self.path = accelerator, output_dir / "metrics.jsonl"
        self.rows: list[dict] = []
        if accelerator.is_main_process:
            if step and self.path.exists():
                lines = self.path.read_text(encoding="utf-8").splitlines()
                rows = [json.loads(line) for line in lines if line.endswith("}")]  # a kill may cut off the last line
                self.rows = [row for row in rows if row["step"] <= step]
            text = "".join(json.dumps(row) + "\n" for row in self.rows)
            write_atomically(self.path, lambda path: path.write_text(text, encoding="utf-8"))

    def log(self, step: int, values: dict[str, float]) -> None:
        """Log the values of a step; non-finite ones become null, because JSON has no NaN."""
        values = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self.accelerator.log({name: value for name, value in values.items() if value is not None}, step=step)
        if self.accelerator.is_main_process:
            self.rows.append({"step": step, **values})
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(self.rows[-1]) + "\n")

    def plot(self) -> Path:
        """Plot everything logged so far to curves.png."""
        from matplotlib.figure import Figure  # slow to import

        measured = {name for row in self.rows for name in row if name.startswith(EVALUATION_METRICS)}
        logged = {name for row in self.rows for name, value in row.items() if value is not None}
        panels = ["denoising_loss", "alignment_cosine", "grad_norm", "learning_rate", *sorted(measured)]
        panels = [name for name in panels if name in logged]
        num_rows = max(1, math.ceil(len(panels) / 2))  # a run may stop before its first log line
        figure = Figure(figsize=(10, 3 * num_rows), layout="constrained")
        axes = figure.subplots(num_rows, 2, sharex=True, squeeze=False)
        for axis, name in zip(axes.flat, panels, strict=False):
            points = [(row["step"], row[name]) for row in self.rows if row.get(name) is not None]
            marker = "." if name in measured or len(points) == 1 else None
            axis.plot(*zip(*points, strict=True), linewidth=1, marker=marker)
            axis.set_title(name.replace("_", " "))
            axis.grid(alpha=0.3, which="both")
        for axis in axes.flat[len(panels) :]:
            axis.set_axis_off()
        axes[0, 0].set_yscale("log")
        figure.supxlabel("optimizer step")
        path = self.path.with_name("curves.png")
        write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=120))
        return path


class StepMonitor:
    """
    Collect the results of optimizer steps and report their means; only reports and checks synchronize the device.
    Without a terminal, log lines replace the progress bar.

    Args:
        args, accelerator, metrics: Training arguments, accelerator and metric logger.
        step (`int`): Number of completed steps.
        max_train_steps (`int`): Number of steps of the run.
        flops (`tuple[int, int]`, *optional*): FLOPs per image, from [`flops_per_image`]; enables the MFU.
    """

    def __init__(
        self,
        args: TrainingArguments,
        accelerator: Accelerator,
        metrics: MetricLogger,
        step: int,
        max_train_steps: int,
        flops: tuple[int, int] | None = None,
    ):
        self.args, self.accelerator, self.metrics, self.max_train_steps = args, accelerator, metrics, max_train_steps
        self.flops, device = flops, accelerator.device
        if flops is not None:
            # A CPU multiplies bfloat16 slower than float32.
            half = {"bf16": torch.bfloat16, "fp16": torch.float16} if device.type == "cuda" else {}
            self.peak_flops = measure_peak_flops(device, half.get(accelerator.mixed_precision, torch.float32))
        self.pending: list[tuple[int, StepResult]] = []
        self.skipped_images = self.skipped_steps = 0
        hidden = not accelerator.is_local_main_process or not sys.stderr.isatty()
        self.bar = tqdm(total=max_train_steps, initial=step, desc="steps", disable=hidden)
        self.restart_clock(step)

    def restart_clock(self, step: int) -> None:
        """Measure the throughput from here, so that it excludes checkpoints, samples and evaluations."""
        self.started, self.started_step = time.perf_counter(), step

    def add(self, step: int, result: StepResult) -> None:
        """Record the result of `step`."""
        self.bar.update()
        self.skipped_images += result.skipped_images
        self.pending.append((step, result))

    def check_losses(self, last_checkpoint: Path | None) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Return the losses since the last report, (processes, steps, 3), and whether each step was skipped, (steps,), if the
        losses are finite, or belong to steps skipped on request.
        """
        losses = torch.stack([result.losses for _, result in self.pending])
        never = losses.new_zeros((), dtype=torch.bool)
        skipped = torch.stack([never if r.skipped is None else r.skipped for _, r in self.pending]).cpu()
        losses = self.accelerator.gather(losses[None]).cpu()
        bad = ~losses.isfinite().all(dim=(0, 2))
        if self.args.on_nonfinite == "skip":
            bad &= ~skipped
        if bad.any():
            step, result = self.pending[bad.nonzero()[0].item()]
            raise NonFiniteLossError(
                f"The loss of step {step} is not finite. Its images (indices in the data) were "
                f"{sorted(gather_object(result.images))}. The last good checkpoint is {last_checkpoint}: resume from it "
                "with a smaller --learning_rate, --max_grad_norm 1, --mixed_precision bf16 or no, or --on_nonfinite skip."
            )
        return losses, skipped

    def check_finite(self, step: int, objective: torch.nn.Module, last_checkpoint: Path | None) -> None:
        """Check the losses since the last report and the weights after `step`, before they are saved."""
        if self.pending:
            self.check_losses(last_checkpoint)
        # A loss is computed before the update: a NaN gradient shows in the weights first.
        weights = [parameter.detach() for parameter in objective.parameters()]
        weights = [weight.to_local() if isinstance(weight, DTensor) else weight for weight in weights]
        # The norm of an empty shard is undefined.
        largest = torch.nn.utils.get_total_norm([w for w in weights if w.numel()], norm_type=float("inf"))
        if not self.accelerator.gather(largest[None]).isfinite().all():
            raise NonFiniteLossError(
                f"The weights after step {step} are not finite, because its gradient was not. The last good checkpoint is "
                f"{last_checkpoint}: resume from it with a smaller --learning_rate, --max_grad_norm 1 or --on_nonfinite skip."
            )

    def report(self, step: int, result: StepResult, learning_rate: float, last_checkpoint: Path | None) -> None:
        """Log the mean losses since the last report, and the throughput."""
        losses, skipped = self.check_losses(last_checkpoint)
        total, denoising, alignment = losses[:, ~skipped].mean(dim=(0, 1)).tolist()
        self.skipped_steps += int(skipped.sum())
        if self.args.on_nonfinite == "skip":
            for (number, other), was_skipped in zip(self.pending, skipped, strict=True):
                if was_skipped:
                    images = sorted(gather_object(other.images))
                    logger.warning(f"Step {number} was skipped: its gradient is not finite. Its images were {images}.")
        values = {
            "loss": total,
            "denoising_loss": denoising,
            "grad_norm": float(result.grad_norm),
            "learning_rate": learning_rate,
            "memory_GiB": peak_memory(self.accelerator.device),
            "skipped_images": sum(gather_object([self.skipped_images])),
            "skipped_steps": self.skipped_steps,
            **self.throughput(step, result),
        }
        text = f"denoise {denoising:.4f}, {values['images_per_second']:.1f} img/s"
        if "mfu" in values:
            text += f", MFU {values['mfu']:.0%}, data {values['data_ms']:.0f} ms"
        if self.args.aligns(step - 1):
            values |= {"alignment_loss": alignment, "alignment_cosine": 1 - alignment}
            text += f", align {alignment:.4f}"
        self.metrics.log(step, values)
        self.bar.set_postfix_str(text)
        if self.bar.disable:
            logger.info(f"Step {step} of {self.max_train_steps}: {text}")
        self.pending.clear()
        self.restart_clock(step)

    def throughput(self, step: int, result: StepResult) -> dict[str, float]:
        """
        Return the speed since the last report. Times are milliseconds per step, each of its slowest process: `host_ms` is the
        time to launch the first step after a report, when the device's queue is empty (on a CPU: to compute it), `data_ms`
        the wait for images, `forward_ms` the device's time for the forward pass of the last micro-step.
        """
        processes, device = self.accelerator.num_processes, self.accelerator.device
        steps, seconds = step - self.started_step, time.perf_counter() - self.started
        images = steps * self.args.global_batch_size(processes) / seconds
        first, (begin, end) = self.pending[0][1], result.forward
        forward = begin.elapsed_time(end) / 1000 if device.type == "cuda" else end - begin
        waited = sum(result.seconds_waited for _, result in self.pending) / len(self.pending)
        times = torch.tensor([[first.seconds - first.seconds_waited, waited, forward]], device=device) * 1000
        times = self.accelerator.gather(times).cpu()  # (processes, 3)
        values = {"images_per_second": images, "images_per_second_per_process": images / processes}
        values |= zip(("host_ms", "data_ms", "forward_ms"), times.amax(dim=0).tolist(), strict=True)
        if processes > 1:
            values["slowest_rank"] = times[:, 1:].sum(dim=1).argmax().item()
        if self.flops is not None:
            student, alignment = self.flops
            flops = student + alignment * self.args.aligns(step - 1)
            values["mfu"] = flops * images / processes / self.peak_flops
        return values


def peak_memory(device: torch.device) -> float:
    """Return the peak memory in GiB: allocated on a GPU, resident in the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
