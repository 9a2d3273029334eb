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

from ..files import write_atomically
from .arguments import TrainingArguments
from .step import StepResult


logger = get_logger(__name__)

# Prefixes of the metrics that evaluations during training log.
EVALUATION_METRICS = ("fid", "fd_", "inception_score", "precision", "recall")


class NonFiniteLossError(FloatingPointError):
    """The loss became NaN or infinite."""


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
    """

    def __init__(
        self, args: TrainingArguments, accelerator: Accelerator, metrics: MetricLogger, step: int, max_train_steps: int
    ):
        self.args, self.accelerator, self.metrics, self.max_train_steps = args, accelerator, metrics, max_train_steps
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
        if result.skipped:
            self.skipped_steps += 1
            images = sorted(gather_object(result.images))
            logger.warning(f"Step {step} was skipped: its gradient is not finite. Its images were {images}.")
        else:
            self.pending.append((step, result))

    def check_losses(self, last_checkpoint: Path | None) -> torch.Tensor:
        """Return the losses since the last report, of shape `(processes, steps, 3)`, if all are finite."""
        losses = torch.stack([result.losses for _, result in self.pending])
        losses = self.accelerator.gather(losses[None]).cpu()
        bad = (~losses.isfinite().all(dim=(0, 2))).nonzero()
        if len(bad):
            step, result = self.pending[bad[0].item()]
            raise NonFiniteLossError(
                f"The loss of step {step} is not finite. Its images (indices in the data) were "
                f"{sorted(gather_object(result.images))}. The last good checkpoint is {last_checkpoint}: resume from it "
                "with a smaller --learning_rate, --max_grad_norm 1, --mixed_precision bf16 or no, or --on_nonfinite skip."
            )
        return losses

    def check_finite(self, step: int, objective: torch.nn.Module, last_checkpoint: Path | None) -> None:
        """Check the losses since the last report and the weights after `step`, before they are saved."""
        if self.pending:
            self.check_losses(last_checkpoint)
        # A loss is computed before the update: a NaN gradient shows in the weights first.
        weights = [parameter.detach() for parameter in objective.parameters()]
        norm = torch.nn.utils.get_total_norm(weights)
        if not (norm.full_tensor() if isinstance(norm, DTensor) else norm).isfinite():
            raise NonFiniteLossError(
                f"The weights after step {step} are not finite, because its gradient was not. The last good checkpoint is "
                f"{last_checkpoint}: resume from it with a smaller --learning_rate, --max_grad_norm 1 or --on_nonfinite skip."
            )

    def report(self, step: int, result: StepResult, learning_rate: float, last_checkpoint: Path | None) -> None:
        """Log the mean losses since the last report, and the throughput."""
        total, denoising, alignment = self.check_losses(last_checkpoint).mean(dim=(0, 1)).tolist()
        global_batch_size = self.args.global_batch_size(self.accelerator.num_processes)
        images = (step - self.started_step) * global_batch_size
        values = {
            "loss": total,
            "denoising_loss": denoising,
            "grad_norm": float(result.grad_norm),
            "learning_rate": learning_rate,
            "images_per_second": images / (time.perf_counter() - self.started),
            "memory_GiB": peak_memory(self.accelerator.device),
            "skipped_images": sum(gather_object([self.skipped_images])),
            "skipped_steps": self.skipped_steps,
        }
        text = f"denoise {denoising:.4f}, {values['images_per_second']:.1f} img/s"
        if self.args.aligns(step - 1):
            values |= {"alignment_loss": alignment, "alignment_cosine": 1 - alignment}
            text += f", align {alignment:.4f}"
        self.metrics.log(step, values)
        self.bar.set_postfix_str(text)
        if self.bar.disable:
            logger.info(f"Step {step} of {self.max_train_steps}: {text}")
        self.pending.clear()
        self.restart_clock(step)


def peak_memory(device: torch.device) -> float:
    """Peak memory in GiB: the allocator's on a GPU, the resident memory of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
