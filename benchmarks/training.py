"""Measure a training step: its time by parts, MFU, peak memory, and the gain over the published code's arithmetic.

The published batch on a GPU (every list is a sweep):

    python benchmarks/training.py --presets JiT-B/16 JiT-L/16 JiT-H/16 --batch_sizes 128 --mixed_precision bf16 --compile yes

Two CPU cores, float32, student and adapter alone:

    OMP_NUM_THREADS=2 python benchmarks/training.py --batch_sizes 4 --teacher none --num_rounds 5

Cost by batch, classes and objective; cost of reading images:

    python benchmarks/training.py --batch_sizes 1 2 4 --num_classes 10 1000 10000 --objectives pixelrepa none
    python benchmarks/training.py --presets no --train_data_dirs photos prepared_photos

The benchmark calls the trainer's own functions. `--arithmetic ours published` runs both on the same weights and inputs,
taking turns in one process (learning rate 0 keeps the weights), and prints the difference of their losses and gradients.
*published* writes out attention and normalization in float32, uses an optimizer that is not fused, updates the EMA
parameter by parameter, prefetches nothing, and synchronizes at every step. `--compile yes` compiles both, `--compile ours`
only ours.

Columns: `data` (draws, copies, uint8 to float) and `teacher` are timed alone, because on a GPU they overlap with the
student; `forward` to `ema` are parts of the step. `TFLOP/s` counts the architecture's matrix products (three forward passes
of student and adapter, one of the teacher); `MFU` is relative to a large matrix product measured in the same run. `GiB` is
the peak memory of a fresh process that runs two steps (`--memory no` skips it). `ratio` is the median over the rounds of
our time over the published arithmetic's.
"""

from __future__ import annotations

import io
import itertools
import multiprocessing
import statistics
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image
from published import (
    StepClock,
    adapter_flops,
    describe_machine,
    fill_zeros,
    format_table,
    measure_peak_flops,
    median_ratio,
    synchronize,
    time_interleaved,
    transformer_flops,
    with_published_arithmetic,
)
from torch.utils.flop_counter import FlopCounterMode
from transformers import Dinov2Config, Dinov2Model

from pixelrepa_diffusers import PRESETS
from pixelrepa_diffusers.adapter import MaskedTransformerAdapter
from pixelrepa_diffusers.cli import flag, parse, run
from pixelrepa_diffusers.ema import ConstantDecayEMA
from pixelrepa_diffusers.files import write_json
from pixelrepa_diffusers.teacher import SemanticTeacher
from pixelrepa_diffusers.training.arguments import TrainingArguments
from pixelrepa_diffusers.training.builders import (
    apply_switches,
    build_objective,
    build_optimizer,
    build_projector,
    build_transformer,
    compile_blocks,
)
from pixelrepa_diffusers.training.data import DataArguments, ImageSource, measure_throughput, open_source, to_float
from pixelrepa_diffusers.training.reporting import peak_memory
from pixelrepa_diffusers.training.step import draw, prepared_batches


IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PARTS = ("forward", "backward", "optimizer", "ema")


@dataclass
class BenchmarkArguments:
    presets: list[str] = flag(["JiT-B/16"], "Variants; `no` for data alone.", choices=[*PRESETS, "no"])
    arithmetic: list[str] = flag(["ours", "published"], "See the docstring.", choices=["ours", "published"])
    objectives: list[str] = flag(["pixelrepa"], "Objectives.", choices=["pixelrepa", "none", "repa", "irepa"])
    batch_sizes: list[int] = flag([128], "Images per step.", ge=1)
    num_classes: list[int] = flag([1000], "Classes.", ge=1)
    mixed_precision: list[str] = flag(["no"], "Autocast type.", choices=["no", "bf16"])
    compile: list[str] = flag(
        ["no"], "Compile blocks and teacher: of both arithmetics (yes), or only ours.", choices=["no", "yes", "ours"]
    )
    attention_backends: list[str] = flag(["default"], "diffusers' attention backends, for our arithmetic.")
    gradient_checkpointing: list[str] = flag(["no"], "Recompute activations.", choices=["no", "yes"])
    teacher: str = flag("random", "random (DINOv2-base's size), none (features are given), or a folder or Hub id.")
    train_data_dirs: list[str] = flag([], "Folders whose reading is timed, such as raw and prepared images.")
    data_sizes: list[int] = flag([], "Sizes of synthetic data sets whose reading is timed.", ge=1)
    memory: str = flag("yes", "Measure peak memory, in fresh processes.", choices=["yes", "no"])
    device: str = flag("cuda" if torch.cuda.is_available() else "cpu", "Device.")
    num_rounds: int = flag(3, "Turns of each arithmetic.", ge=1)
    steps_per_round: int | None = flag(None, "Default: 10 on a GPU, 1 on a CPU.", ge=1)
    output_dir: Path = flag(Path("outputs/benchmark/training"), "Receives benchmark.json.")
    seed: int = flag(0, "Seed of weights and inputs.", ge=0)


@dataclass(frozen=True)
class Setting:
    """One combination of the sweep, without the arithmetic."""

    preset: str
    objective: str
    batch_size: int
    num_classes: int
    mixed_precision: str
    compile: str
    attention_backend: str
    gradient_checkpointing: str


class RepeatedBatch:
    """One batch of random images over and over, with the interface of the trainer's `ImageLoader`."""

    def __init__(self, batch_size: int, resolution: int, num_classes: int, seed: int):
        generator = torch.Generator().manual_seed(seed)
        pixels = torch.randint(0, 256, (batch_size, 3, resolution, resolution), generator=generator, dtype=torch.uint8)
        self.batch = {
            "pixel_values": pixels.pin_memory() if torch.cuda.is_available() else pixels,
            "class_labels": torch.randint(0, num_classes, (batch_size,), generator=generator),
            "index": torch.arange(batch_size),
            "skipped": torch.zeros(batch_size, dtype=torch.int64),
        }

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return itertools.repeat(self.batch)

    def state_dict(self) -> dict:
        return {}


class Bench:
    """Weights, inputs and teacher of one setting, shared by both arithmetics."""

    def __init__(self, args: BenchmarkArguments, setting: Setting):
        self.setting, self.device = setting, torch.device(args.device)
        self.training_args = TrainingArguments(
            preset=setting.preset,
            objective=setting.objective,
            train_batch_size=setting.batch_size,
            mixed_precision=setting.mixed_precision,
            gradient_checkpointing=setting.gradient_checkpointing == "yes",
            seed=args.seed,
        )
        torch.manual_seed(args.seed)
        transformer = build_transformer(self.training_args, setting.num_classes)
        config = transformer.config
        self.num_tokens = (config.sample_size // config.patch_size) ** 2
        self.teacher = self.build_teacher(args.teacher, config)
        teacher_dim = Dinov2Config().hidden_size if self.teacher is None else self.teacher.feature_dim
        projector = build_projector(self.training_args, config, teacher_dim)
        self.objective = build_objective(self.training_args, transformer, projector)
        fill_zeros(self.objective)
        self.objective.to(self.device).train()
        apply_switches(self.training_args, self.objective)
        self.loader = RepeatedBatch(setting.batch_size, config.sample_size, setting.num_classes, args.seed)
        # Stand in for the teacher's features where it is left out.
        self.features = None
        if setting.objective != "none":
            self.features = torch.randn(setting.batch_size, self.num_tokens, teacher_dim, device=self.device)

    def build_teacher(self, name: str, config) -> SemanticTeacher | None:
        if name == "none" or self.setting.objective == "none":
            return None
        sizes = {
            "grid_size": config.sample_size // config.patch_size,
            "image_size": config.sample_size,
            "dtype": torch.bfloat16 if self.setting.mixed_precision == "bf16" else torch.float32,
        }
        if name == "random":
            model = Dinov2Model(Dinov2Config(image_size=518, patch_size=14))
            teacher = SemanticTeacher(model, image_mean=IMAGENET_MEAN, image_std=IMAGENET_STD, **sizes)
        else:
            teacher = SemanticTeacher.from_pretrained(name, **sizes)
        return teacher.to(self.device)

    def autocast(self):
        enabled = self.setting.mixed_precision == "bf16"
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=enabled)

    def batches(self) -> Iterator:
        teach = None if self.teacher is None else lambda pixel_values, batch: self.teacher(pixel_values)
        classes = self.setting.num_classes
        return prepared_batches(self.training_args, self.loader, teach, 0, self.num_tokens, classes, self.device)

    def step_flops(self) -> int:
        """FLOPs of a training step: batch · (3 · (student + projector) + teacher)."""
        projector = self.objective.projector
        flops = 3 * transformer_flops(self.objective.transformer)
        if isinstance(projector, MaskedTransformerAdapter):
            flops += 3 * adapter_flops(projector)
        elif projector is not None:
            states = torch.zeros(1, self.num_tokens, projector.config.hidden_size)
            flops += 3 * count_flops(projector, states, None, None)
        if self.teacher is not None:
            side = self.teacher.input_size
            flops += count_flops(self.teacher.model, torch.zeros(1, 3, side, side, dtype=self.teacher.model.dtype))
        return flops * self.setting.batch_size

    def time_alone(self, repeats: int) -> dict[str, float]:
        """Median seconds of the data preparation and of the teacher, each alone."""
        batch = self.loader.batch
        pixel_values = to_float(batch["pixel_values"].to(self.device))

        def prepare():
            to_float(batch["pixel_values"].to(self.device, non_blocking=True))
            draw(self.training_args, batch, 0, self.num_tokens, self.setting.num_classes, self.device)

        functions = {"data": prepare}
        if self.teacher is not None:
            functions["teacher"] = lambda: self.teacher(pixel_values)
        seconds = time_interleaved(functions, self.device, repeats)
        return {"teacher": 0.0, **{name: statistics.median(values) for name, values in seconds.items()}}


def count_flops(module: torch.nn.Module, *inputs) -> int:
    """FLOPs of one forward pass by torch's counter, for modules without a formula here."""
    device = next(module.parameters()).device
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(*(value if value is None else value.to(device) for value in inputs))
    return counter.get_total_flops()


class Trainee:
    """Module, optimizer and EMA of one arithmetic, on the weights of a bench."""

    def __init__(self, bench: Bench, arithmetic: str):
        self.bench, self.published = bench, arithmetic == "published"
        self.objective = with_published_arithmetic(bench.objective) if self.published else bench.objective
        setting = bench.setting
        if setting.attention_backend != "default" and not self.published:
            self.objective.transformer.set_attention_backend(setting.attention_backend)
        if setting.compile == "yes" or (setting.compile == "ours" and not self.published):
            compile_blocks(self.objective)
        # Learning rate 0: all the work, but the weights stay equal for the other arithmetic.
        self.optimizer = build_optimizer(bench.training_args, self.objective, learning_rate=0.0)
        if self.published:  # torch's default: foreach on a GPU, a loop on a CPU
            groups = [{**group, "fused": None} for group in self.optimizer.param_groups]
            self.optimizer = torch.optim.AdamW(groups)
        self.ema = ConstantDecayEMA(self.objective.transformer)
        self.batches = bench.batches()
        self.clock = StepClock(bench.device)

    def forward(self, inputs: dict) -> torch.Tensor:
        with self.bench.autocast():
            return self.objective(**inputs).loss

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def next_inputs(self) -> dict:
        inputs, _ = next(self.batches)
        if inputs["teacher_features"] is None:
            inputs["teacher_features"] = self.bench.features
        return inputs

    def step(self) -> None:
        """One optimizer step like the trainer's, or like the published code's."""
        inputs = self.next_inputs()
        if self.published:
            synchronize(self.bench.device)  # the teacher does not overlap with the student
        self.clock.mark(None)
        loss = self.forward(inputs)
        self.clock.mark("forward")
        loss.backward()
        self.clock.mark("backward")
        self.update()
        self.clock.mark("optimizer")
        if self.published:
            loss.item()
            self.update_ema_one_by_one()
        else:
            self.ema.update(self.objective.transformer)
        self.clock.mark("ema")

    @torch.no_grad()
    def update_ema_one_by_one(self) -> None:
        for decay, averages in self.ema.averages.items():
            for average, parameter in zip(averages, self.objective.transformer.parameters(), strict=True):
                average.mul_(decay).add_(parameter, alpha=1 - decay)

    def warm_up(self) -> tuple[float, list[torch.Tensor]]:
        """One step that is not timed (compilation, optimizer state); returns its loss and gradients."""
        inputs = self.next_inputs()
        torch.manual_seed(0)  # equal dropout for both arithmetics
        loss = self.forward(inputs)
        loss.backward()
        gradients = [parameter.grad for parameter in self.objective.parameters() if parameter.grad is not None]
        self.update()
        return loss.item(), gradients


def relative_difference(ours: tuple[float, list[torch.Tensor]], published: tuple[float, list[torch.Tensor]]) -> dict:
    """|Δloss| / |loss|, and |Δgradient| / |gradient| over all parameters, of two warm-ups."""

    def norm(tensors) -> float:
        return sum(tensor.double().square().sum().item() for tensor in tensors) ** 0.5

    (loss, gradients), (reference, references) = ours, published
    difference = norm(own - other for own, other in zip(gradients, references, strict=True))
    return {
        "loss_difference": abs(loss - reference) / abs(reference),
        "gradient_difference": difference / norm(references),
    }


def peak_of_two_steps(args: BenchmarkArguments, setting: Setting, arithmetic: str) -> float:
    """Peak memory in GiB; runs in a fresh process, which has no earlier peak."""
    trainee = Trainee(Bench(args, setting), arithmetic)
    for _ in range(2):
        trainee.step()
    synchronize(trainee.bench.device)
    return peak_memory(trainee.bench.device)


def measure(args: BenchmarkArguments, setting: Setting) -> list[dict]:
    """One row per arithmetic."""
    memory = dict.fromkeys(args.arithmetic)
    if args.memory == "yes":
        for arithmetic in args.arithmetic:
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                memory[arithmetic] = pool.submit(peak_of_two_steps, args, setting, arithmetic).result()
    bench = Bench(args, setting)
    if setting.compile != "no" and bench.teacher is not None:
        bench.teacher.compile()
    trainees = {arithmetic: Trainee(bench, arithmetic) for arithmetic in args.arithmetic}
    first = {arithmetic: trainee.warm_up() for arithmetic, trainee in trainees.items()}
    difference = relative_difference(**first) if len(first) == 2 else {}
    del first

    steps = args.steps_per_round or (10 if bench.device.type == "cuda" else 1)

    def train(trainee: Trainee) -> None:
        for _ in range(steps):
            trainee.step()

    functions = {name: lambda trainee=trainee: train(trainee) for name, trainee in trainees.items()}
    seconds = time_interleaved(functions, bench.device, args.num_rounds, warmup=0)
    dtype = torch.bfloat16 if setting.mixed_precision == "bf16" else torch.float32
    peak, flops, alone = measure_peak_flops(bench.device, dtype), bench.step_flops(), bench.time_alone(args.num_rounds)
    rows = []
    for name, trainee in trainees.items():
        step_seconds = statistics.median(seconds[name]) / steps
        compared = name == "ours" and "published" in trainees
        rows.append(
            {
                **asdict(setting),
                "arithmetic": name,
                "images/s": setting.batch_size / step_seconds,
                "step s": step_seconds,
                "best s": min(seconds[name]) / steps,
                **alone,
                **trainee.clock.medians(),
                "GiB": memory[name],
                "TFLOP/s": flops / step_seconds / 1e12,
                "MFU": flops / step_seconds / peak,
                "ratio": median_ratio(seconds[name], seconds["published"]) if compared else None,
                "peak_tflops": peak / 1e12,
                "step_tflop": flops / 1e12,
                **difference,
                "reason": None,
            }
        )
    return rows


def measure_all(args: BenchmarkArguments) -> list[dict]:
    """The rows of the whole sweep; a setting that cannot run gets rows with the reason."""
    rows = []
    settings = itertools.product(
        *([preset for preset in args.presets if preset != "no"], args.objectives, args.batch_sizes, args.num_classes),
        *(args.mixed_precision, args.compile, args.attention_backends, args.gradient_checkpointing),
    )
    for setting in itertools.starmap(Setting, settings):
        try:
            rows += measure(args, setting)
        except (ImportError, RuntimeError, AssertionError) as error:  # out of memory, no such backend, no CUDA
            reason = str(error).splitlines()[0]
            rows += [{**asdict(setting), "arithmetic": name, "reason": reason} for name in args.arithmetic]
        torch._dynamo.reset()  # all settings compile one function, whose cache is bounded
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
    return rows


def measure_data(args: BenchmarkArguments) -> list[dict]:
    """Images per second that one process reads, decodes and crops: of folders, and of synthetic data sets by size."""
    resolution = PRESETS["JiT-B/16" if args.presets[0] == "no" else args.presets[0]].sample_size
    sources = [(folder, open_source(DataArguments(train_data_dir=folder))) for folder in args.train_data_dirs]
    if args.data_sizes:
        picture, file = np.random.default_rng(args.seed).integers(0, 256, (24, 24, 3), dtype=np.uint8), io.BytesIO()
        Image.fromarray(picture).resize((500, 375), Image.Resampling.BICUBIC).save(file, "JPEG")
        one = datasets.Dataset.from_dict({"image": [{"bytes": file.getvalue(), "path": None}]})
        for size in args.data_sizes:
            images = one.select(np.zeros(size, dtype=np.int64))
            sources.append(("synthetic 500×375 JPEG", ImageSource(images, np.arange(size) % 10)))
    rows = []
    for name, source in sources:
        size = source.resolution or resolution
        rate = measure_throughput(source, size, min(512, len(source)))
        rows.append({"data": name, "images": len(source), "resolution": size, "images/s per core": rate})
    return rows


def print_steps(rows: list[dict]) -> None:
    columns = ("images/s", "step s", "best s", "data", "teacher", *PARTS, "GiB", "TFLOP/s", "MFU", "ratio")
    varied = [name for name in Setting.__dataclass_fields__ if len({row[name] for row in rows}) > 1]
    print(format_table([{name: row.get(name) for name in (*varied, "arithmetic", *columns)} for row in rows]))
    for row in rows:
        if row["reason"] is not None:
            print(f"not measured ({row['preset']}, {row['arithmetic']}): {row['reason']}")
        elif row["ratio"] is not None:
            print(
                f"{row['preset']}, batch {row['batch_size']}: {row['ratio']:.3f} of the published arithmetic's time; "
                f"relative difference of the loss {row['loss_difference']:.1e}, of the gradients "
                f"{row['gradient_difference']:.1e}. Its matrix products alone take "
                f"{row['step_tflop'] / row['peak_tflops']:.3g} s at the measured {row['peak_tflops']:.3g} TFLOP/s."
            )


def main(args: BenchmarkArguments) -> dict:
    """Print the tables, write benchmark.json, and return its content."""
    rows, data_rows = measure_all(args), measure_data(args)
    device = torch.device(args.device if torch.cuda.is_available() else "cpu")
    report = {
        "arguments": {**asdict(args), "output_dir": str(args.output_dir)},
        **describe_machine(device),
        "steps": rows,
        "data": data_rows,
    }
    print(f"{report['device']}, {report['threads']} CPU threads, load average {report['load_average']:.1f}")
    if rows:
        print_steps(rows)
    if data_rows:
        print(format_table(data_rows))
    args.output_dir.mkdir(parents=True, exist_ok=True)
    write_json(args.output_dir / "benchmark.json", report)
    return report


if __name__ == "__main__":
    run(lambda: main(parse(BenchmarkArguments, __doc__.partition("\n")[0])))
