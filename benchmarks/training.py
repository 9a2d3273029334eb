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
only ours, `--compile graphs` only ours, as CUDA graphs.

Columns: `data` (draws, copies, uint8 to float) and `teacher` are timed alone, because on a GPU they overlap with the
student; `forward` to `ema` are parts of the step. `TFLOP/s` counts the architecture's matrix products (three forward passes
of student and adapter, one of the teacher); `MFU` is relative to a large matrix product measured in the same run. `GiB` is
the peak memory of a fresh process that runs two steps (`--memory no` skips it). `ratio` is the median over the rounds of
our time over the published arithmetic's.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
import multiprocessing
import statistics
import time
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
    fill_zeros,
    median_ratio,
    synchronize,
    time_interleaved,
    with_published_arithmetic,
    write_report,
)
from transformers import Dinov2Config, Dinov2Model

from pixelrepa_diffusers import PRESETS
from pixelrepa_diffusers.cli import flag, parse, run
from pixelrepa_diffusers.ema import ConstantDecayEMA
from pixelrepa_diffusers.teacher import SemanticTeacher
from pixelrepa_diffusers.training.arguments import TrainingArguments
from pixelrepa_diffusers.training.builders import (
    apply_switches,
    build_objective,
    build_optimizer,
    build_projector,
    build_teacher,
    build_transformer,
    compile_blocks,
    compile_whole,
)
from pixelrepa_diffusers.training.data import DataArguments, ImageLoader, ImageSource, open_source, to_float
from pixelrepa_diffusers.training.draws import BatchDraws
from pixelrepa_diffusers.training.flops import flops_per_image, measure_peak_flops
from pixelrepa_diffusers.training.reporting import peak_memory
from pixelrepa_diffusers.training.step import PreparedBatches


DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
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
        ["no"],
        "Compile blocks and teacher: of both arithmetics (yes), or only ours; or replay ours as CUDA graphs.",
        choices=["no", "yes", "ours", "graphs"],
    )
    gradient_checkpointing: list[str] = flag(
        ["no"], "Recompute activations, in both arithmetics.", choices=["no", "yes"]
    )
    attention_backends: list[str] = flag(["native"], "diffusers' attention backends, for our arithmetic.")
    teacher: str = flag("random", "random (DINOv2-base's size), none (features are given), or a folder or Hub id.")
    train_data_dirs: list[str] = flag([], "Folders whose reading is timed, such as raw and prepared images.")
    data_sizes: list[int] = flag([], "Sizes of synthetic data sets whose reading is timed.", ge=1)
    memory: str = flag("yes", "Measure peak memory, in fresh processes.", choices=["yes", "no"])
    num_rounds: int = flag(3, "Turns of each arithmetic.", ge=1)
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
    gradient_checkpointing: str = "no"


class RepeatedBatch:
    """One batch of random images over and over, with the interface of the trainer's `ImageLoader`."""

    def __init__(self, batch_size: int, resolution: int, num_classes: int, seed: int):
        generator = torch.Generator().manual_seed(seed)
        pixels = torch.randint(0, 256, (batch_size, 3, resolution, resolution), generator=generator, dtype=torch.uint8)
        self.batch = {
            "pixel_values": pixels.pin_memory() if DEVICE.type == "cuda" else pixels,
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
        self.setting = setting
        self.dtype = torch.bfloat16 if setting.mixed_precision == "bf16" else torch.float32
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
        self.draw = BatchDraws.from_arguments(self.training_args, config)
        self.teacher = self.build_teacher(args.teacher, config)
        teacher_dim = Dinov2Config().hidden_size if self.teacher is None else self.teacher.feature_dim
        projector = build_projector(self.training_args, config, teacher_dim)
        self.objective = build_objective(self.training_args, transformer, projector)
        apply_switches(self.training_args, self.objective)
        fill_zeros(self.objective)
        self.objective.to(DEVICE).train()
        self.loader = RepeatedBatch(setting.batch_size, config.sample_size, setting.num_classes, args.seed)
        # Stand in for the teacher's features where it is left out.
        self.features = None
        if projector is not None:
            self.features = torch.randn(setting.batch_size, self.num_tokens, teacher_dim, device=DEVICE)

    def build_teacher(self, name: str, config) -> SemanticTeacher | None:
        if name == "none" or self.setting.objective == "none":
            return None
        if name != "random":
            return build_teacher(
                dataclasses.replace(self.training_args, teacher_model_name_or_path=name), config, DEVICE
            )
        return SemanticTeacher(
            Dinov2Model(Dinov2Config(image_size=518, patch_size=14)),
            grid_size=config.sample_size // config.patch_size,
            image_size=config.sample_size,
            image_mean=IMAGENET_MEAN,
            image_std=IMAGENET_STD,
            dtype=self.dtype,
        ).to(DEVICE)

    def batches(self) -> PreparedBatches:
        teach = None if self.teacher is None else lambda pixel_values, batch: self.teacher(pixel_values)
        return PreparedBatches(self.training_args, self.loader, self.draw, teach, 0, DEVICE)

    def step_flops(self) -> int:
        """FLOPs of a training step."""
        return sum(flops_per_image(self.objective, self.teacher)) * self.setting.batch_size

    def time_alone(self, repeats: int) -> dict[str, float]:
        """Median seconds of the data preparation and of the teacher, each alone."""
        batch = self.loader.batch
        pixel_values = to_float(batch["pixel_values"].to(DEVICE))

        def prepare():
            pixels, index, labels = (
                batch[name].to(DEVICE, non_blocking=True) for name in ("pixel_values", "index", "class_labels")
            )
            to_float(pixels)
            self.draw(0, index, labels, pixels.shape[1:])

        functions = {"data": prepare}
        if self.teacher is not None:
            functions["teacher"] = lambda: self.teacher(pixel_values)
        seconds = time_interleaved(functions, DEVICE, repeats)
        return {"teacher": 0.0, **{name: statistics.median(values) for name, values in seconds.items()}}


class Trainee:
    """Module, optimizer and EMA of one arithmetic, on the weights of a bench."""

    def __init__(self, bench: Bench, arithmetic: str):
        self.bench, self.published = bench, arithmetic == "published"
        self.objective = with_published_arithmetic(bench.objective) if self.published else bench.objective
        if not self.published:
            self.objective.transformer.set_attention_backend(bench.setting.attention_backend)
        if bench.setting.compile == "graphs" and not self.published:
            compile_whole(self.objective)
        elif bench.setting.compile == "yes" or (bench.setting.compile == "ours" and not self.published):
            compile_blocks(self.objective)
        # Learning rate 0: all the work, but the weights stay equal for the other arithmetic.
        self.optimizer = build_optimizer(bench.training_args, self.objective, learning_rate=0.0)
        if self.published:  # torch's default: foreach on a GPU, a loop on a CPU
            self.optimizer = torch.optim.AdamW([{**group, "fused": None} for group in self.optimizer.param_groups])
        self.ema = ConstantDecayEMA(self.objective.transformer)
        self.batches = bench.batches()
        self.clock = StepClock(DEVICE)

    def forward(self, inputs: dict) -> torch.Tensor:
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=self.bench.dtype == torch.bfloat16):
            return self.objective(**inputs).loss

    def next_inputs(self) -> dict:
        inputs, _ = next(self.batches)
        if inputs["teacher_features"] is None:
            inputs["teacher_features"] = self.bench.features
        return inputs

    def step(self) -> None:
        """One optimizer step like the trainer's, or like the published code's."""
        inputs = self.next_inputs()
        if self.published:
            synchronize(DEVICE)  # the teacher does not overlap with the student
        self.clock.mark(None)
        loss = self.forward(inputs)
        self.clock.mark("forward")
        loss.backward()
        self.clock.mark("backward")
        self.optimizer.step()
        self.optimizer.zero_grad()
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
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item(), gradients


def relative_difference(ours: tuple[float, list[torch.Tensor]], published: tuple[float, list[torch.Tensor]]) -> dict:
    """|Δloss| / |loss|, and |Δgradient| / |gradient| over all parameters, of two warm-ups."""
    (loss, gradients), (reference, references) = ours, published
    differences = [own - other for own, other in zip(gradients, references, strict=True)]
    return {
        "loss_difference": abs(loss - reference) / abs(reference),
        "gradient_difference": (
            torch.nn.utils.get_total_norm(differences) / torch.nn.utils.get_total_norm(references)
        ).item(),
    }


def peak_of_two_steps(args: BenchmarkArguments, setting: Setting, arithmetic: str) -> float:
    """Peak memory in GiB; runs in a fresh process, which has no earlier peak."""
    trainee = Trainee(Bench(args, setting), arithmetic)
    for _ in range(2):
        trainee.step()
    synchronize(DEVICE)
    return peak_memory(DEVICE)


def measure(args: BenchmarkArguments, setting: Setting) -> list[dict]:
    """One row per arithmetic."""
    memory = dict.fromkeys(args.arithmetic)
    if args.memory == "yes":
        for arithmetic in args.arithmetic:
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                memory[arithmetic] = pool.submit(peak_of_two_steps, args, setting, arithmetic).result()
    bench = Bench(args, setting)
    flops = bench.step_flops()
    if setting.compile != "no" and bench.teacher is not None:
        bench.teacher.compile()
    trainees = {arithmetic: Trainee(bench, arithmetic) for arithmetic in args.arithmetic}
    first = {arithmetic: trainee.warm_up() for arithmetic, trainee in trainees.items()}
    difference = relative_difference(**first) if len(first) == 2 else {}
    del first

    steps = 10 if DEVICE.type == "cuda" else 1

    def train(trainee: Trainee) -> None:
        for _ in range(steps):
            trainee.step()

    functions = {name: lambda trainee=trainee: train(trainee) for name, trainee in trainees.items()}
    seconds = time_interleaved(functions, DEVICE, args.num_rounds, warmup=0)
    peak, alone = measure_peak_flops(DEVICE, bench.dtype), bench.time_alone(args.num_rounds)
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
        except (ImportError, RuntimeError, ValueError) as error:  # out of memory, no such backend
            reason = f"not measured: {str(error).splitlines()[0]}"
            rows += [{**asdict(setting), "arithmetic": name, "reason": reason} for name in args.arithmetic]
        torch._dynamo.reset()  # all settings compile one function, whose cache is bounded
        if DEVICE.type == "cuda":
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
        loader = ImageLoader(source, size, batch_size=1, seed=0)
        indices = np.random.default_rng(args.seed).permutation(len(source))[:512].tolist()
        start = time.perf_counter()
        for index in indices:
            loader.make_item(0, index, source[index])
        rate = len(indices) / (time.perf_counter() - start)
        rows.append({"data": name, "images": len(source), "resolution": size, "images/s per core": rate})
    return rows


def main(args: BenchmarkArguments) -> dict:
    return write_report(args, DEVICE, {"steps": measure_all(args), "data": measure_data(args)})


if __name__ == "__main__":
    run(lambda: main(parse(BenchmarkArguments, __doc__.partition("\n")[0])))
