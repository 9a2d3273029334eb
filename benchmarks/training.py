"""How fast a training step is, where its time goes, how near it comes to the hardware's limit, and what was gained.

One H100, the published batch, beside the published code's way of computing it (every list is a sweep):

    python training/benchmark.py --presets JiT-B/16 JiT-L/16 JiT-H/16 --batch_sizes 128 --mixed_precision bf16 --compile yes

Two CPU cores, float32, student and adapter alone:

    OMP_NUM_THREADS=2 python training/benchmark.py --batch_sizes 4 --teacher none --num_rounds 5

How cost grows with the batch, the classes, the data and the alignment; and what reading images costs:

    python training/benchmark.py --batch_sizes 1 2 4 --num_classes 10 1000 10000 --objectives pixelrepa none
    python training/benchmark.py --presets no --train_data_dirs photos prepared_photos

It runs the trainer's own functions. `--arithmetic ours published` runs both on the same weights and inputs, taking turns
in one process (learning rate 0, so the weights stay the same), and prints the ratio and the difference of their losses
and gradients. *published* means: attention scores and softmax written out in float32, normalisation and rotation in
float32 steps, an optimizer that is not fused, averages parameter by parameter, no work ahead of the student, and the
host waiting for the loss at every step. With `--compile yes` both are compiled, with `--compile ours`
ours alone.

Columns: `data` (draws, copies, uint8 to float) and `teacher` are timed alone, because on a GPU they run beside the student;
`forward` to `ema` are parts of the step. `TFLOP/s` are those of the architecture (`benchmarking.transformer_flops`, three
times the forward pass, plus the adapter's and the teacher's one forward pass) done per second; `MFU` is their share of the
rate of a large matrix product in the same run. `GiB` is the peak of a fresh process that runs two steps (`--memory no`
leaves it out). `ratio` is the median over the rounds of the time over the published arithmetic's in the same round.
"""

from __future__ import annotations

import io
import itertools
import json
import multiprocessing
import os
import statistics
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image
from published import (
    StepClock,
    adapter_flops,
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
from pixelrepa_diffusers.cli import parse, run
from pixelrepa_diffusers.ema import ConstantDecayEMA
from pixelrepa_diffusers.files import write_atomically
from pixelrepa_diffusers.sampling import device_name, versions
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


# Of facebook/dinov2-base's preprocessor.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PARTS = ("forward", "backward", "optimizer", "ema")


def _sweep(default: list, help: str):
    return field(default_factory=lambda: list(default), metadata={"help": help})


@dataclass
class BenchmarkArguments:
    """Every list is a sweep; a row is measured for each combination."""

    presets: list[str] = _sweep(["JiT-B/16"], "Variants; `no` for data alone.")
    arithmetic: list[str] = _sweep(["ours", "published"], "ours, published; see the head of this file.")
    objectives: list[str] = _sweep(["pixelrepa"], "pixelrepa, none, repa, irepa.")
    batch_sizes: list[int] = _sweep([128], "Images per step.")
    num_classes: list[int] = _sweep([1000], "Classes.")
    mixed_precision: list[str] = _sweep(["no"], "no, bf16.")
    compile: list[str] = _sweep(
        ["no"], "no, yes, ours: the blocks and the teacher; ours leaves the published ones as they are."
    )
    attention_backends: list[str] = _sweep(["default"], "diffusers' attention backends, for our arithmetic.")
    gradient_checkpointing: list[str] = _sweep(["no"], "no, yes.")
    teacher: str = field(
        default="random",
        metadata={"help": "random (DINOv2-base's size), none (features are given), or a folder or Hub id."},
    )
    train_data_dirs: list[str] = _sweep([], "Folders whose reading is timed, such as raw and prepared images.")
    data_sizes: list[int] = _sweep([], "Sizes of made-up data sets whose reading is timed.")
    memory: str = field(default="yes", metadata={"help": "Peak memory, in fresh processes.", "choices": ["yes", "no"]})
    device: str | None = field(default=None, metadata={"help": "Default: cuda where there is one, else cpu."})
    num_rounds: int = field(default=3, metadata={"help": "Turns of each arithmetic."})
    steps_per_round: int | None = field(default=None, metadata={"help": "Default: 10 on a GPU, 1 on a CPU."})
    output_dir: Path = field(
        default=Path("outputs/benchmark/training"), metadata={"help": "Receives benchmark.json and benchmark.png."}
    )
    seed: int = field(default=0, metadata={"help": "Of weights and inputs."})

    def __post_init__(self):
        choices = {
            "presets": (*PRESETS, "no"),
            "arithmetic": ("ours", "published"),
            "objectives": ("pixelrepa", "none", "repa", "irepa"),
            "mixed_precision": ("no", "bf16"),
            "compile": ("no", "yes", "ours"),
            "gradient_checkpointing": ("no", "yes"),
        }
        for name, allowed in choices.items():
            unknown = [value for value in getattr(self, name) if value not in allowed]
            if unknown:
                raise ValueError(f"--{name} may be {', '.join(allowed)}, got {', '.join(unknown)}.")
        for name in ("batch_sizes", "num_classes", "data_sizes"):
            if min(getattr(self, name), default=1) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(self, name)}.")
        if self.num_rounds < 1 or (self.steps_per_round is not None and self.steps_per_round < 1):
            raise ValueError("--num_rounds and --steps_per_round must be at least 1.")
        self.device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.steps_per_round = self.steps_per_round or (10 if self.device.startswith("cuda") else 1)


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
    """Endlessly one batch of random images, in place of the trainer's `ImageLoader`."""

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
    """What both arithmetics share for one setting: weights, inputs, teacher."""

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
        self.config = config = transformer.config
        self.grid_size = config.sample_size // config.patch_size
        self.teacher = self.build_teacher(args.teacher)
        teacher_dim = Dinov2Config().hidden_size if self.teacher is None else self.teacher.feature_dim
        projector = build_projector(self.training_args, config, teacher_dim)
        self.objective = build_objective(self.training_args, transformer, projector)
        # Zeros of the initialisation would hide most of the network from outputs and gradients.
        for parameter in self.objective.parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.02)
        self.objective.to(self.device).train()
        apply_switches(self.training_args, self.objective)
        self.loader = RepeatedBatch(setting.batch_size, config.sample_size, setting.num_classes, args.seed)
        shape = (setting.batch_size, self.grid_size**2, teacher_dim)
        # What the teacher would have given, where it is left out.
        self.features = torch.randn(shape, device=self.device) if setting.objective != "none" else None

    def build_teacher(self, name: str) -> SemanticTeacher | None:
        if name == "none" or self.setting.objective == "none":
            return None
        dtype = torch.bfloat16 if self.setting.mixed_precision == "bf16" else torch.float32
        sizes = {"grid_size": self.grid_size, "image_size": self.config.sample_size, "dtype": dtype}
        if name == "random":
            config = Dinov2Config(image_size=518, patch_size=14)
            teacher = SemanticTeacher(Dinov2Model(config), image_mean=IMAGENET_MEAN, image_std=IMAGENET_STD, **sizes)
        else:
            teacher = SemanticTeacher.from_pretrained(name, **sizes)
        return teacher.to(self.device)

    def autocast(self):
        enabled = self.setting.mixed_precision == "bf16"
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=enabled)

    def batches(self) -> Iterator:
        num_tokens, num_classes = self.grid_size**2, self.setting.num_classes
        teach = (lambda pixel_values, batch: self.teacher(pixel_values)) if self.teacher is not None else None
        return prepared_batches(self.training_args, self.loader, teach, 0, num_tokens, num_classes, self.device)

    def step_flops(self) -> int:
        """Of a training step: 3 × (student + projector) + teacher, for the whole batch."""
        projector, shape = self.objective.projector, (1, self.grid_size**2)
        flops = 3 * transformer_flops(self.objective.transformer)
        if isinstance(projector, MaskedTransformerAdapter):
            flops += 3 * adapter_flops(projector)
        elif projector is not None:
            flops += 3 * count_flops(projector, torch.zeros(*shape, projector.config.hidden_size), None, None)
        if self.teacher is not None:
            side = self.teacher.input_size
            flops += count_flops(self.teacher.model, torch.zeros(1, 3, side, side, dtype=self.teacher.model.dtype))
        return flops * self.setting.batch_size

    def time_apart(self, repeats: int) -> dict[str, float]:
        """Median seconds of the data and of the teacher, each alone."""
        batch = self.loader.batch
        pixel_values = to_float(batch["pixel_values"].to(self.device))

        def prepare():
            to_float(batch["pixel_values"].to(self.device, non_blocking=True))
            draw(self.training_args, batch, 0, self.grid_size**2, self.setting.num_classes, self.device)

        functions = {"data": prepare}
        if self.teacher is not None:
            functions["teacher"] = lambda: self.teacher(pixel_values)
        seconds = time_interleaved(functions, self.device, repeats)
        return {name: statistics.median(values) for name, values in seconds.items()}


def count_flops(module: torch.nn.Module, *inputs) -> int:
    """Of one forward pass, by torch's counter: for modules whose formula is not ours to know."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        on_device = next(module.parameters()).device
        module(*(value.to(on_device) if isinstance(value, torch.Tensor) else value for value in inputs))
    return counter.get_total_flops()


class Trainee:
    """One arithmetic's step: module, optimizer and averages, on the bench's weights."""

    def __init__(self, bench: Bench, arithmetic: str):
        self.bench, self.published = bench, arithmetic == "published"
        self.objective = with_published_arithmetic(bench.objective) if self.published else bench.objective
        setting = bench.setting
        if setting.attention_backend != "default" and not self.published:
            self.objective.transformer.set_attention_backend(setting.attention_backend)
        if setting.compile == "yes" or (setting.compile == "ours" and not self.published):
            compile_blocks(self.objective)
        # Learning rate 0: all the work, and the weights stay what they are for the other arithmetic.
        self.optimizer = build_optimizer(bench.training_args, self.objective, learning_rate=0.0)
        if self.published:
            # torch's default, foreach on a GPU and a loop on a CPU; the groups carry every setting, `fused` among them.
            groups = [{**group, "fused": None} for group in self.optimizer.param_groups]
            self.optimizer = torch.optim.AdamW(groups)
        self.ema = ConstantDecayEMA(self.objective.transformer)
        self.batches = bench.batches()
        self.clock = StepClock(bench.device)

    def next_inputs(self) -> dict:
        inputs, _ = next(self.batches)
        if inputs["teacher_features"] is None:
            inputs["teacher_features"] = self.bench.features
        return inputs

    def step(self) -> None:
        """One optimizer step as the trainer takes it, or as the published code does."""
        inputs = self.next_inputs()
        if self.published:
            synchronize(self.bench.device)  # the teacher's work is done, nothing runs beside the student
        self.clock.mark(None)
        with self.bench.autocast():
            output = self.objective(**inputs)
        self.clock.mark("forward")
        output.loss.backward()
        self.clock.mark("backward")
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.clock.mark("optimizer")
        transformer = self.objective.transformer
        if self.published:
            output.loss.item()
            with torch.no_grad():
                for decay, averages in self.ema.averages.items():
                    for average, parameter in zip(averages, transformer.parameters(), strict=True):
                        average.mul_(decay).add_(parameter.detach(), alpha=1 - decay)
        else:
            self.ema.update(transformer)
        self.clock.mark("ema")

    def warm_up(self) -> tuple[float, list[torch.Tensor]]:
        """A step untimed, for what only a first step does (compilation, optimizer state); its loss and gradients."""
        inputs = self.next_inputs()
        torch.manual_seed(0)  # of dropout, which must be the same for both
        with self.bench.autocast():
            loss = self.objective(**inputs).loss
        loss.backward()
        gradients = [parameter.grad for parameter in self.objective.parameters() if parameter.grad is not None]
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item(), gradients


def difference(ours: tuple[float, list[torch.Tensor]], published: tuple[float, list[torch.Tensor]]) -> dict:
    """|Δloss| / |loss|, and |Δgradient| / |gradient| over all parameters, of two warm-ups."""
    (loss, gradients), (reference, references) = ours, published
    pairs = list(zip(gradients, references, strict=True))
    apart = sum((mine - theirs).double().square().sum().item() for mine, theirs in pairs) ** 0.5
    length = sum(theirs.double().square().sum().item() for _, theirs in pairs) ** 0.5
    return {"loss_difference": abs(loss - reference) / abs(reference), "gradient_difference": apart / length}


def peak_of_two_steps(args: BenchmarkArguments, setting: Setting, arithmetic: str) -> float:
    """GiB; meant for a fresh process, which has no other peak."""
    trainee = Trainee(Bench(args, setting), arithmetic)
    for _ in range(2):
        trainee.step()
    synchronize(trainee.bench.device)
    return peak_memory(trainee.bench.device)


def measure(args: BenchmarkArguments, setting: Setting) -> list[dict]:
    """One row for each arithmetic; where a setting cannot run, rows that say why."""
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
    apart = difference(**first) if len(first) == 2 else {}
    del first

    def run(trainee: Trainee) -> None:
        for _ in range(args.steps_per_round):
            trainee.step()

    functions = {name: lambda trainee=trainee: run(trainee) for name, trainee in trainees.items()}
    seconds = time_interleaved(functions, bench.device, args.num_rounds, warmup=0)
    dtype = torch.bfloat16 if setting.mixed_precision == "bf16" else torch.float32
    peak, flops, alone = measure_peak_flops(bench.device, dtype), bench.step_flops(), bench.time_apart(args.num_rounds)
    rows = []
    for name, trainee in trainees.items():
        step_seconds = statistics.median(seconds[name]) / args.steps_per_round
        compared = name == "ours" and "published" in trainees
        rows.append(
            {
                **asdict(setting),
                "arithmetic": name,
                "images/s": setting.batch_size / step_seconds,
                "step s": step_seconds,
                "best s": min(seconds[name]) / args.steps_per_round,
                "data": alone["data"],
                "teacher": alone.get("teacher", 0.0),
                **trainee.clock.medians(),
                "GiB": memory[name],
                "TFLOP/s": flops / step_seconds / 1e12,
                "MFU": flops / step_seconds / peak,
                "ratio": median_ratio(seconds[name], seconds["published"]) if compared else None,
                "peak_tflops": peak / 1e12,
                "step_tflop": flops / 1e12,
                **apart,
                "reason": None,
            }
        )
    return rows


def measure_all(args: BenchmarkArguments) -> list[dict]:
    """The rows of the whole sweep."""
    rows = []
    for values in itertools.product(
        [preset for preset in args.presets if preset != "no"],
        args.objectives,
        args.batch_sizes,
        args.num_classes,
        args.mixed_precision,
        args.compile,
        args.attention_backends,
        args.gradient_checkpointing,
    ):
        setting = Setting(*values)
        try:
            rows += measure(args, setting)
        except (ImportError, RuntimeError, AssertionError) as error:
            # Out of memory, a backend that is not installed, torch without CUDA: the table says so, the sweep goes on.
            reason = str(error).splitlines()[0]
            rows += [{**asdict(setting), "arithmetic": name, "reason": reason} for name in args.arithmetic]
        torch._dynamo.reset()  # all settings compile one function, whose cache is bounded
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
    return rows


def measure_data(args: BenchmarkArguments) -> list[dict]:
    """Images per second that one process reads, decodes and crops: of folders, and of made-up data sets by size."""
    rows = []
    resolution = PRESETS["JiT-B/16" if args.presets[0] == "no" else args.presets[0]].sample_size
    for folder in args.train_data_dirs:
        source = open_source(DataArguments(train_data_dir=folder))
        rows.append({"data": folder, "images": len(source), "resolution": source.resolution or resolution})
        rows[-1]["images/s per core"] = measure_throughput(source, rows[-1]["resolution"], min(512, len(source)))
    if args.data_sizes:
        picture, file = np.random.default_rng(args.seed).integers(0, 256, (24, 24, 3), dtype=np.uint8), io.BytesIO()
        Image.fromarray(picture).resize((500, 375), Image.Resampling.BICUBIC).save(file, "JPEG")
        for size in args.data_sizes:
            one = datasets.Dataset.from_dict({"image": [{"bytes": file.getvalue(), "path": None}]})
            source = ImageSource(one.select(np.zeros(size, dtype=np.int64)), np.arange(size) % 10)
            rows.append({"data": "500×375 JPEG, made up", "images": size, "resolution": resolution})
            rows[-1]["images/s per core"] = measure_throughput(source, resolution, min(512, size))
    return rows


def plot(rows: list[dict], path: Path) -> None:
    """A bar for each row: the parts of its step, and images/s beside it."""
    from matplotlib.figure import Figure  # slow to import, and needed once

    measured = [row for row in rows if row["reason"] is None]
    swept = [name for name in Setting.__dataclass_fields__ if len({row[name] for row in measured}) > 1]
    labels = [" · ".join(str(row[name]) for name in ("arithmetic", *swept)) for row in measured]
    figure = Figure(figsize=(10, 1.5 + 0.5 * len(measured)), layout="constrained")
    axis = figure.subplots()
    left = np.zeros(len(measured))
    for part in PARTS:
        widths = np.array([row[part] for row in measured])
        axis.barh(labels, widths, left=left, label=part)
        left += widths
    for place, row in enumerate(measured):
        axis.text(left[place], place, f" {row['images/s']:.3g} images/s", va="center")
    axis.set_xlim(right=1.25 * max(left, default=1))
    axis.invert_yaxis()
    axis.set_xlabel("seconds per step (student, optimizer, averages)")
    axis.legend()
    write_atomically(path, lambda beside: figure.savefig(beside, format="png", dpi=120))


def main(args: BenchmarkArguments) -> dict:
    """Measures, prints the tables, writes benchmark.json and benchmark.png, and returns what the JSON file holds."""
    args.output_dir.mkdir(parents=True, exist_ok=True)
    rows, data_rows = measure_all(args), measure_data(args)
    load = os.getloadavg()[0]  # above the number of cores, the times are those of a busy machine
    report = {
        "arguments": {**asdict(args), "output_dir": str(args.output_dir)},
        "device": device_name(torch.device(args.device)) if torch.cuda.is_available() else args.device,
        "threads": torch.get_num_threads(),
        "load_average": load,
        "versions": versions(),
        "steps": rows,
        "data": data_rows,
    }
    print(f"\n{report['device']}, {report['threads']} CPU threads, load average {load:.1f}")
    swept = [name for name in Setting.__dataclass_fields__ if len({row[name] for row in rows}) > 1]
    columns = ("images/s", "step s", "best s", "data", "teacher", *PARTS, "GiB", "TFLOP/s", "MFU", "ratio")
    if rows:
        print(format_table([{n: row.get(n) for n in (*swept, "arithmetic", *columns)} for row in rows]))
    for row in rows:
        if row["reason"] is not None:
            print(f"not measured ({row['preset']}, {row['arithmetic']}): {row['reason']}")
        elif row["ratio"] is not None:
            floor = row["step_tflop"] / row["peak_tflops"]
            print(
                f"{row['preset']}, batch {row['batch_size']}: {row['ratio']:.3f} of the published arithmetic's time; "
                f"relative difference of the loss {row['loss_difference']:.1e}, of the gradients "
                f"{row['gradient_difference']:.1e}. The matrix products alone would take {floor:.3g} s at the "
                f"{row['peak_tflops']:.3g} TFLOP/s measured for a large one."
            )
    if data_rows:
        print(format_table(data_rows))
    path = args.output_dir / "benchmark.json"
    write_atomically(path, lambda beside: beside.write_text(json.dumps(report, indent=1), encoding="utf-8"))
    if any(row["reason"] is None for row in rows):
        plot(rows, args.output_dir / "benchmark.png")
    return report


if __name__ == "__main__":
    run(lambda: main(parse(BenchmarkArguments, __doc__.partition("\n")[0])))
