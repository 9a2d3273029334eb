"""How fast sampling is, what was gained, and which solver and which cache are near the exact images for how little work.

    python pipelines/benchmark.py --pipeline FOLDER_OR_HUB_ID --solvers heun euler unipc dpmpp_2m --caches

Speed alone needs no weights (`OMP_NUM_THREADS=2` for two CPU cores; `--dtype bfloat16 --compile yes` on a GPU):

    python pipelines/benchmark.py --preset JiT-B/16 --batch_size 4 --num_inference_steps 50

Three tables, each for the same labels and the same noise:

1. *speed*: the pipeline beside the published code's way of sampling, on the same weights, taking turns in one process, at
   the same evaluations. Published means: a conditional and an unconditional pass at every evaluation, one after the other,
   attention scores and softmax written out in float32, normalisation and rotation in float32 steps, and the host waiting at
   every evaluation. The pipeline makes one batched pass, and no unconditional one outside the guidance interval.
2. *solvers*: the distance to the solution of the method's 50-step Heun and of a 1000-step one, by number of evaluations.
   `rmse` is the root mean square over pixels in [-1, 1]; two levels of 255 are 0.0157.
3. *caches*: diffusers' caches under the saved scheduler: time, share of the uncached time, distance to the uncached images.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from diffusers import (
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    SeaCacheConfig,
    TaylorSeerCacheConfig,
)
from published import (
    format_table,
    measure_peak_flops,
    median_ratio,
    synchronize,
    time_interleaved,
    transformer_flops,
    with_published_arithmetic,
)

from pixelrepa_diffusers import JiTFlowMatchScheduler, JiTTransformer2DModel, PixelREPAPipeline, get_preset
from pixelrepa_diffusers.cli import parse, run
from pixelrepa_diffusers.files import write_atomically
from pixelrepa_diffusers.sampling import (
    SCHEDULERS,
    cast_transformer,
    check_cuda_graphs,
    compile_transformer,
    device_name,
    fetch_pipeline,
    seeded,
    versions,
)


# Evaluations of N steps.
EVALUATIONS = {"heun": lambda steps: 2 * steps - 1, "flow_match_heun": lambda steps: 2 * steps - 1}
SEA_CALLBACK = {"raw_vision_callback": lambda module, args, kwargs: list(args[0].unsqueeze(2))}
# Of a pipeline and its number of evaluations. MagCache's ratios are a model's own and need a calibration; ones skip by
# count alone.
CACHES: dict[str, Callable[[PixelREPAPipeline, int], object]] = {
    "first block, 0.05": lambda pipe, n: FirstBlockCacheConfig(threshold=0.05),
    "first block, 0.1": lambda pipe, n: FirstBlockCacheConfig(threshold=0.1),
    "first block, 0.2": lambda pipe, n: FirstBlockCacheConfig(threshold=0.2),
    "MagCache, uncalibrated": lambda pipe, n: MagCacheConfig(mag_ratios=torch.ones(n), num_inference_steps=n),
    "TaylorSeer, every 2nd": lambda pipe, n: TaylorSeerCacheConfig(
        cache_interval=2, taylor_factors_dtype=torch.float32
    ),
    "TaylorSeer, every 3rd": lambda pipe, n: TaylorSeerCacheConfig(
        cache_interval=3, taylor_factors_dtype=torch.float32
    ),
    "pyramid attention, 2": lambda pipe, n: PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_block_identifiers=("transformer_blocks",),
        current_timestep_callback=lambda: pipe.current_timestep,
    ),
    "SeaCache, 0.1": lambda pipe, n: SeaCacheConfig(threshold=0.1, **SEA_CALLBACK),
    "SeaCache, 0.25": lambda pipe, n: SeaCacheConfig(threshold=0.25, **SEA_CALLBACK),
}


@dataclass
class BenchmarkArguments:
    pipeline: str | None = field(
        default=None, metadata={"help": "A saved pipeline's folder or Hub id; or give --preset."}
    )
    preset: str | None = field(default=None, metadata={"help": "This variant with random weights: speed alone."})
    batch_size: int = field(default=4, metadata={"help": "Images per call."})
    num_inference_steps: int = field(default=50, metadata={"help": "Of the speed and cache tables."})
    guidance_scale: float | None = field(default=None, metadata={"help": "Default: the saved one, the preset's."})
    guidance_interval: list[float] = field(
        default_factory=lambda: [0.1, 1.0], metadata={"help": "LOW HIGH, the times guidance acts in."}
    )
    dtype: str = field(default="float32", metadata={"help": "Of the network.", "choices": ["float32", "bfloat16"]})
    compile: str = field(
        default="no",
        metadata={"help": "Compile the blocks: of both arithmetics, or of ours.", "choices": ["no", "yes", "ours"]},
    )
    cuda_graphs: bool = field(
        default=False, metadata={"help": "On a GPU: compile our whole network and replay it as CUDA graphs."}
    )
    fuse_qkv: bool = field(default=False, metadata={"help": "One product for queries, keys and values."})
    attention_backend: str | None = field(default=None, metadata={"help": "A diffusers attention backend."})
    num_rounds: int = field(default=3, metadata={"help": "Turns of each arithmetic and of each cache."})

    solvers: list[str] = field(
        default_factory=list, metadata={"help": f"Of the solver table: {', '.join(SCHEDULERS)}."}
    )
    evaluations: list[int] = field(
        default_factory=lambda: [9, 19, 29, 49, 99], metadata={"help": "Of the solver table."}
    )
    reference_steps: list[int] = field(
        default_factory=lambda: [50, 1000], metadata={"help": "Heun steps of the exact solutions."}
    )
    caches: bool = field(default=False, metadata={"help": "Measure the caches."})

    device: str | None = field(default=None, metadata={"help": "Default: cuda where there is one, else cpu."})
    output_dir: Path = field(
        default=Path("outputs/benchmark/sampling"), metadata={"help": "Receives benchmark.json and benchmark.png."}
    )
    seed: int = field(default=0, metadata={"help": "Of noise, and of a preset's weights."})

    def __post_init__(self):
        if (self.pipeline is None) == (self.preset is None):
            raise ValueError("Give exactly one of --pipeline and --preset.")
        unknown = [name for name in self.solvers if name not in SCHEDULERS]
        if unknown:
            raise ValueError(f"--solvers may be {', '.join(SCHEDULERS)}, got {', '.join(unknown)}.")
        if self.preset is not None and (self.solvers or self.caches):
            raise ValueError(
                "--solvers and --caches measure errors, which random weights do not have: give --pipeline."
            )
        for name in ("batch_size", "num_inference_steps", "num_rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(self, name)}.")
        for name in ("evaluations", "reference_steps"):
            if min(getattr(self, name)) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(self, name)}.")
        self.device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        check_cuda_graphs(self.cuda_graphs, torch.device(self.device))


def build_pipeline(args: BenchmarkArguments) -> PixelREPAPipeline:
    dtype = getattr(torch, args.dtype)
    if args.pipeline is not None:
        pipe = PixelREPAPipeline.from_pretrained(fetch_pipeline(args.pipeline)[0], dtype=dtype)
    else:
        preset = get_preset(args.preset)
        torch.manual_seed(args.seed)
        transformer = JiTTransformer2DModel(**preset.transformer_config())
        for parameter in transformer.parameters():
            if not parameter.any():  # the initial zeros, which would hide the network from its output
                torch.nn.init.normal_(parameter, std=0.02)
        cast_transformer(transformer, dtype)
        pipe = PixelREPAPipeline(transformer, JiTFlowMatchScheduler(), guidance_scale=preset.guidance_scale)
    pipe.transformer.eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(args.device)


class Sampler:
    """The images of fixed labels and fixed noise, as raw float32 tensors."""

    def __init__(self, args: BenchmarkArguments, pipe: PixelREPAPipeline):
        self.args, self.pipe = args, pipe
        num_classes = pipe.transformer.config.num_classes
        self.labels = [index * num_classes // args.batch_size % num_classes for index in range(args.batch_size)]
        self.scale = pipe.config.guidance_scale if args.guidance_scale is None else args.guidance_scale

    def ours(self, num_inference_steps: int) -> torch.Tensor:
        return self.pipe(
            self.labels,
            guidance_scale=self.scale,
            guidance_interval=self.args.guidance_interval,
            num_inference_steps=num_inference_steps,
            generator=seeded(range(self.args.seed, self.args.seed + self.args.batch_size)),
            output_type="latent",
        ).images

    @torch.no_grad()
    def published(self, twin: JiTTransformer2DModel, num_inference_steps: int) -> torch.Tensor:
        """`twin` computes as the published code does; two passes at every evaluation, the method's Heun solver."""
        pipe, device = self.pipe, torch.device(self.args.device)
        generators = seeded(range(self.args.seed, self.args.seed + self.args.batch_size))
        latents = pipe.prepare_latents(self.args.batch_size, device, generators, None)
        labels = torch.tensor(self.labels, device=device)
        null = torch.full_like(labels, twin.config.num_classes)
        timesteps, times = pipe.prepare_timesteps(num_inference_steps, device)
        times = torch.tensor(times, dtype=torch.float32, device=device)
        for timestep, t in zip(timesteps, times, strict=True):
            conditional, unconditional = (
                twin.velocity(twin(latents, t, given).sample, latents, t) for given in (labels, null)
            )
            scale = torch.where(inside(t, self.args.guidance_interval), self.scale, 1.0)
            velocity = unconditional + scale * (conditional - unconditional)
            latents = pipe.scheduler.step(-velocity, timestep, latents).prev_sample
            synchronize(device)
        return latents


def inside(times: torch.Tensor, interval: list[float]) -> torch.Tensor:
    """low < t < high, strict and in float32 as published; low = 0 includes the start."""
    low, high = interval
    return (times < high) & ((times > low) | (low == 0))


def rmse(images: torch.Tensor, reference: torch.Tensor) -> float:
    return (images - reference).double().square().mean().sqrt().item()


def measure_speed(args: BenchmarkArguments, pipe: PixelREPAPipeline) -> list[dict]:
    """The pipeline and the published way, at the same evaluations."""
    device, steps, sampler = torch.device(args.device), args.num_inference_steps, Sampler(args, pipe)
    twin = with_published_arithmetic(pipe.transformer)
    if args.fuse_qkv:
        pipe.transformer.fuse_qkv_projections()
    if args.attention_backend is not None:
        pipe.transformer.set_attention_backend(args.attention_backend)
    if args.compile != "no" or args.cuda_graphs:
        compile_transformer(pipe.transformer, args.cuda_graphs)
    if args.compile == "yes":
        compile_transformer(twin)
    saved_scheduler, pipe.scheduler = pipe.scheduler, JiTFlowMatchScheduler()
    functions = {"ours": lambda: sampler.ours(steps), "published": lambda: sampler.published(twin, steps)}
    apart = rmse(functions["ours"](), functions["published"]())  # and the warm-up
    seconds = time_interleaved(functions, device, args.num_rounds, warmup=0)
    evaluations = pipe.num_timesteps
    times = torch.tensor(pipe.prepare_timesteps(steps, device)[1], dtype=torch.float32)
    guided = inside(times, args.guidance_interval).sum().item()
    pipe.scheduler = saved_scheduler
    passes = {"ours": evaluations + (guided if sampler.scale != 1 else 0), "published": 2 * evaluations}
    peak, flops = measure_peak_flops(device, getattr(torch, args.dtype)), transformer_flops(pipe.transformer)
    rows = []
    for name in functions:
        median = statistics.median(seconds[name])
        rate = flops * args.batch_size * passes[name] / median
        rows.append(
            {
                "arithmetic": name,
                "evaluations": evaluations,
                "passes per image": passes[name],
                "s/image": median / args.batch_size,
                "best s/image": min(seconds[name]) / args.batch_size,
                "TFLOP/s": rate / 1e12,
                "MFU": rate / peak,
                "ratio": median_ratio(seconds[name], seconds["published"]),
                "rmse to published": apart if name == "ours" else 0.0,
            }
        )
    return rows


def measure_solvers(args: BenchmarkArguments, pipe: PixelREPAPipeline) -> list[dict]:
    """One row for each solver and number of evaluations; numbers a solver cannot have are rounded down to one it can."""
    sampler, saved_scheduler = Sampler(args, pipe), pipe.scheduler
    pipe.scheduler = JiTFlowMatchScheduler()
    references = {steps: sampler.ours(steps) for steps in args.reference_steps}
    rows = []
    for solver in args.solvers:
        for wanted in args.evaluations:
            steps = max(1, (wanted + 1) // 2 if solver in EVALUATIONS else wanted)
            pipe.scheduler = SCHEDULERS[solver]()
            images = sampler.ours(steps)
            distances = {f"rmse to {n}-step Heun": rmse(images, exact) for n, exact in references.items()}
            rows.append({"solver": solver, "steps": steps, "evaluations": pipe.num_timesteps, **distances})
    pipe.scheduler = saved_scheduler
    return rows


def measure_caches(args: BenchmarkArguments, pipe: PixelREPAPipeline) -> list[dict]:
    """One row for each cache, each in turn with the uncached pipeline."""
    device, steps, sampler = torch.device(args.device), args.num_inference_steps, Sampler(args, pipe)
    exact = sampler.ours(steps)
    rows = []
    for name, build in CACHES.items():

        def cached(build=build) -> torch.Tensor:
            pipe.transformer.enable_cache(build(pipe, pipe.num_timesteps))
            try:
                return sampler.ours(steps)
            finally:
                pipe.transformer.disable_cache()

        distance = rmse(cached(), exact)
        functions = {"cached": cached, "uncached": lambda: sampler.ours(steps)}
        seconds = time_interleaved(functions, device, args.num_rounds, warmup=0)
        rows.append(
            {
                "cache": name,
                "s/image": statistics.median(seconds["cached"]) / args.batch_size,
                "ratio": median_ratio(seconds["cached"], seconds["uncached"]),
                "rmse": distance,
            }
        )
    return rows


def plot(report: dict, path: Path) -> None:
    """Error by evaluations for every solver, and error by time for every cache; without them, the times."""
    from matplotlib.figure import Figure  # slow to import, and needed once

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    axes = figure.subplots(1, 1 + bool(report["solvers"]) + bool(report["caches"]), squeeze=False)[0]
    bars = axes[0].bar([row["arithmetic"] for row in report["speed"]], [row["s/image"] for row in report["speed"]])
    axes[0].bar_label(bars, fmt="%.3g")
    axes[0].set_ylabel("seconds per image")
    if report["solvers"]:
        finest = f"rmse to {max(report['arguments']['reference_steps'])}-step Heun"
        for solver in report["arguments"]["solvers"]:
            points = [(r["evaluations"], r[finest]) for r in report["solvers"] if r["solver"] == solver]
            axes[1].loglog(*zip(*sorted(points), strict=True), marker="o", label=solver)
        axes[1].set(xlabel="evaluations", ylabel=finest)
        axes[1].legend()
    if report["caches"]:
        for row in report["caches"]:
            axes[-1].plot(row["ratio"], row["rmse"], "o", label=row["cache"])
        axes[-1].set(xlabel="share of the uncached time", ylabel="rmse to the uncached images")
        axes[-1].legend(fontsize="small")
    for axis in axes:
        axis.grid(alpha=0.3)
    write_atomically(path, lambda beside: figure.savefig(beside, format="png", dpi=120))


def main(args: BenchmarkArguments) -> dict:
    """Measures, prints the tables, writes benchmark.json and benchmark.png, and returns what the JSON file holds."""
    args.output_dir.mkdir(parents=True, exist_ok=True)
    pipe = build_pipeline(args)
    # Errors before speed, which may fuse and compile the model.
    solvers = measure_solvers(args, pipe) if args.solvers else []
    caches = measure_caches(args, pipe) if args.caches else []
    report = {
        "arguments": {**asdict(args), "output_dir": str(args.output_dir)},
        "device": device_name(torch.device(args.device)),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],  # above the number of cores, the times are those of a busy machine
        "versions": versions(),
        "speed": measure_speed(args, pipe),
        "solvers": solvers,
        "caches": caches,
    }
    print(f"\n{report['device']}, {report['threads']} CPU threads, load average {report['load_average']:.1f}")
    for name in ("speed", "solvers", "caches"):
        if report[name]:
            print(f"\n{name}\n{format_table(report[name])}")
    path = args.output_dir / "benchmark.json"
    write_atomically(path, lambda beside: beside.write_text(json.dumps(report, indent=1), encoding="utf-8"))
    plot(report, args.output_dir / "benchmark.png")
    return report


if __name__ == "__main__":
    run(lambda: main(parse(BenchmarkArguments, __doc__.partition("\n")[0])))
