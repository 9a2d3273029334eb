"""Measure sampling: speed beside the published code, and the error of solvers and caches at a smaller budget.

    python benchmarks/sampling.py --pipeline FOLDER_OR_HUB_ID --solvers heun euler unipc dpmpp_2m --caches

Speed alone needs no weights (`OMP_NUM_THREADS=2` on two CPU cores; `--dtype bfloat16 --compile yes` on a GPU):

    python benchmarks/sampling.py --preset JiT-B/16 --batch_size 4 --num_inference_steps 50

Three tables, each for the same labels and the same noise:

1. *speed*: the pipeline and the published way of sampling, on the same weights, taking turns in one process at the same
   NFE. The published way runs a conditional and an unconditional pass one after the other, writes out attention and
   normalization in float32, and synchronizes at every evaluation. The pipeline runs both passes as one batch, and no
   unconditional one outside the guidance interval.
2. *solvers*: RMSE (pixels in [-1, 1]; one level of 255 is 0.0078) to the solution of 50 and of 1000 Heun steps, by NFE.
3. *caches*: diffusers' caches under the saved scheduler: time, share of the uncached time, RMSE to the uncached images.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
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
    fill_zeros,
    median_ratio,
    synchronize,
    time_interleaved,
    with_published_arithmetic,
    write_report,
)

from pixelrepa_diffusers import PRESETS, JiTFlowMatchScheduler, JiTTransformer2DModel, PixelREPAPipeline, get_preset
from pixelrepa_diffusers.cli import flag, parse, run
from pixelrepa_diffusers.sampling import (
    SCHEDULERS,
    cast_transformer,
    check_cuda_graphs,
    compile_transformer,
    fetch_pipeline,
    seeded,
)
from pixelrepa_diffusers.training.flops import count_flops, measure_peak_flops


@dataclass
class BenchmarkArguments:
    pipeline: str | None = flag(None, "A saved pipeline's folder or Hub id; or give --preset.")
    preset: str | None = flag(None, "This variant with random weights, for speed alone.", choices=list(PRESETS))
    batch_size: int = flag(4, "Images per call.", ge=1)
    num_inference_steps: int = flag(50, "Sampling steps of the speed and cache tables.", ge=1)
    dtype: str = flag("float32", "Data type of the network.", choices=["float32", "bfloat16"])
    compile: str = flag(
        "no", "Compile the blocks: of both arithmetics (yes), or only ours.", choices=["no", "yes", "ours"]
    )
    cuda_graphs: bool = flag(False, "On a GPU: compile our whole network and replay it as CUDA graphs.")
    attention_backend: str | None = flag(None, "A diffusers attention backend for our arithmetic.")
    num_rounds: int = flag(3, "Turns of each arithmetic and of each cache.", ge=1)

    solvers: list[str] = flag([], "Rows of the solver table.", choices=list(SCHEDULERS))
    evaluations: list[int] = flag([9, 19, 29, 49, 99], "NFE of the solver table.", ge=1)
    reference_steps: list[int] = flag([50, 1000], "Heun steps of the reference solutions.", ge=1)
    caches: bool = flag(False, "Measure the caches.")

    output_dir: Path = flag(Path("outputs/benchmark/sampling"), "Receives benchmark.json.")
    seed: int = flag(0, "Seed of the noise and of a preset's weights.", ge=0)


# Built from a pipeline and its NFE. MagCache's ratios are calibrated per model; ones make it skip by count alone.
CACHES: dict[str, Callable[[PixelREPAPipeline, int], object]] = {
    "first block, 0.05": lambda pipe, nfe: FirstBlockCacheConfig(threshold=0.05),
    "first block, 0.1": lambda pipe, nfe: FirstBlockCacheConfig(threshold=0.1),
    "first block, 0.2": lambda pipe, nfe: FirstBlockCacheConfig(threshold=0.2),
    "MagCache, uncalibrated": lambda pipe, nfe: MagCacheConfig(mag_ratios=torch.ones(nfe), num_inference_steps=nfe),
    "TaylorSeer, every 2": lambda pipe, nfe: TaylorSeerCacheConfig(2, taylor_factors_dtype=torch.float32),
    "TaylorSeer, every 3": lambda pipe, nfe: TaylorSeerCacheConfig(3, taylor_factors_dtype=torch.float32),
    "pyramid attention, every 2": lambda pipe, nfe: PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_block_identifiers=("transformer_blocks",),
        current_timestep_callback=lambda: pipe.current_timestep,
    ),
    "SeaCache, 0.1": lambda pipe, nfe: SeaCacheConfig(0.1, raw_vision_callback=noisy_images),
    "SeaCache, 0.25": lambda pipe, nfe: SeaCacheConfig(0.25, raw_vision_callback=noisy_images),
}


def noisy_images(module, args, kwargs) -> list[torch.Tensor]:
    return list(args[0].unsqueeze(2))


def build_pipeline(args: BenchmarkArguments) -> PixelREPAPipeline:
    dtype = getattr(torch, args.dtype)
    if args.pipeline is not None:
        pipe = PixelREPAPipeline.from_pretrained(fetch_pipeline(args.pipeline)[0], dtype=dtype)
    else:
        preset = get_preset(args.preset)
        torch.manual_seed(args.seed)
        transformer = JiTTransformer2DModel(**preset.transformer_config())
        fill_zeros(transformer)
        cast_transformer(transformer, dtype)
        pipe = PixelREPAPipeline(transformer, JiTFlowMatchScheduler(), guidance_scale=preset.guidance_scale)
    pipe.transformer.eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe.to("cuda" if torch.cuda.is_available() else "cpu")


class Sampler:
    """Images of fixed labels and fixed noise, as raw float32 tensors."""

    def __init__(self, args: BenchmarkArguments, pipe: PixelREPAPipeline):
        num_classes = pipe.transformer.config.num_classes
        self.pipe, self.seeds = pipe, range(args.seed, args.seed + args.batch_size)
        self.labels = [index * num_classes // args.batch_size % num_classes for index in range(args.batch_size)]

    def ours(self, num_inference_steps: int) -> torch.Tensor:
        generator = seeded(self.seeds)
        return self.pipe(
            self.labels, num_inference_steps=num_inference_steps, generator=generator, output_type="latent"
        ).images

    @torch.no_grad()
    def published(self, twin: JiTTransformer2DModel, num_inference_steps: int) -> torch.Tensor:
        """Two passes of `twin`, which has the published arithmetic, at every evaluation."""
        pipe, device = self.pipe, self.pipe.device
        latents = pipe.prepare_latents(len(self.labels), device, seeded(self.seeds), None)
        labels = torch.tensor(self.labels, device=device)
        null = torch.full_like(labels, twin.config.num_classes)
        timesteps, times = pipe.prepare_timesteps(num_inference_steps, device)
        for timestep, t in zip(timesteps, torch.tensor(times, dtype=torch.float32, device=device), strict=True):
            conditional, unconditional = (
                twin.velocity(twin(latents, t, given).sample, latents, t) for given in (labels, null)
            )
            scale = torch.where(is_guided(pipe, t), pipe.config.guidance_scale, 1.0)
            velocity = unconditional + scale * (conditional - unconditional)
            latents = pipe.scheduler.step(-velocity, timestep, latents).prev_sample
            synchronize(device)
        return latents


def is_guided(pipe: PixelREPAPipeline, times: torch.Tensor) -> torch.Tensor:
    """low < t < high, strict and in float32 like the published code; low = 0 includes the start."""
    low, high = pipe.config.guidance_interval
    return (times < high) & ((times > low) | (low == 0))


def rmse(images: torch.Tensor, reference: torch.Tensor) -> float:
    return (images - reference).double().square().mean().sqrt().item()


def measure_speed(args: BenchmarkArguments, pipe: PixelREPAPipeline) -> list[dict]:
    """One row for the pipeline and one for the published way, at the same NFE."""
    device, steps, sampler = pipe.device, args.num_inference_steps, Sampler(args, pipe)
    pipe.scheduler = JiTFlowMatchScheduler()
    twin = with_published_arithmetic(pipe.transformer)
    config = pipe.transformer.config
    flops = count_flops(pipe.transformer, (config.sample_size // config.patch_size) ** 2)
    if args.attention_backend is not None:
        pipe.transformer.set_attention_backend(args.attention_backend)
    if args.compile != "no" or args.cuda_graphs:
        compile_transformer(pipe.transformer, args.cuda_graphs)
    if args.compile == "yes":
        compile_transformer(twin)
    functions = {"ours": lambda: sampler.ours(steps), "published": lambda: sampler.published(twin, steps)}
    difference = rmse(functions["ours"](), functions["published"]())  # also warms up
    seconds = time_interleaved(functions, device, args.num_rounds, warmup=0)
    nfe, times = pipe.num_timesteps, torch.tensor(pipe.prepare_timesteps(steps, device)[1], dtype=torch.float32)
    guided = is_guided(pipe, times).sum().item() if pipe.config.guidance_scale != 1 else 0
    passes = {"ours": nfe + guided, "published": 2 * nfe}
    peak = measure_peak_flops(device, getattr(torch, args.dtype))
    rows = []
    for name in functions:
        per_image = statistics.median(seconds[name]) / args.batch_size
        rate = flops * passes[name] / per_image
        rows.append(
            {
                "arithmetic": name,
                "NFE": nfe,
                "passes per image": passes[name],
                "s/image": per_image,
                "best s/image": min(seconds[name]) / args.batch_size,
                "TFLOP/s": rate / 1e12,
                "MFU": rate / peak,
                "ratio": median_ratio(seconds[name], seconds["published"]),
                "rmse to published": difference if name == "ours" else 0.0,
            }
        )
    return rows


def measure_solvers(args: BenchmarkArguments, pipe: PixelREPAPipeline) -> list[dict]:
    """One row per solver and NFE, rounded down to what the solver can have (Heun's is odd)."""
    sampler, saved_scheduler = Sampler(args, pipe), pipe.scheduler
    pipe.scheduler = JiTFlowMatchScheduler()
    references = {steps: sampler.ours(steps) for steps in args.reference_steps}
    rows = []
    for solver in args.solvers:
        for nfe in args.evaluations:
            steps = (nfe + 1) // 2 if solver.endswith("heun") else nfe
            pipe.scheduler = SCHEDULERS[solver]()
            images = sampler.ours(steps)
            errors = {f"rmse to {n}-step Heun": rmse(images, reference) for n, reference in references.items()}
            rows.append({"solver": solver, "steps": steps, "NFE": pipe.num_timesteps, **errors})
    pipe.scheduler = saved_scheduler
    return rows


def measure_caches(args: BenchmarkArguments, pipe: PixelREPAPipeline) -> list[dict]:
    """One row per cache, timed in turn with the uncached pipeline."""
    steps, sampler = args.num_inference_steps, Sampler(args, pipe)
    uncached = sampler.ours(steps)
    rows = []
    for name, build in CACHES.items():

        def cached(build=build) -> torch.Tensor:
            pipe.transformer.enable_cache(build(pipe, pipe.num_timesteps))
            try:
                return sampler.ours(steps)
            finally:
                pipe.transformer.disable_cache()

        error = rmse(cached(), uncached)
        functions = {"cached": cached, "uncached": lambda: sampler.ours(steps)}
        seconds = time_interleaved(functions, pipe.device, args.num_rounds, warmup=0)
        per_image = statistics.median(seconds["cached"]) / args.batch_size
        ratio = median_ratio(seconds["cached"], seconds["uncached"])
        rows.append({"cache": name, "s/image": per_image, "ratio": ratio, "rmse": error})
    return rows


def main(args: BenchmarkArguments) -> dict:
    if (args.pipeline is None) == (args.preset is None):
        raise ValueError("Give exactly one of --pipeline and --preset.")
    if args.preset is not None and (args.solvers or args.caches):
        raise ValueError(
            "--solvers and --caches mean nothing for random weights: give --pipeline instead of --preset."
        )
    pipe = build_pipeline(args)
    check_cuda_graphs(args.cuda_graphs, pipe.device)
    # Errors before speed, which may compile the model.
    tables = {
        "solvers": measure_solvers(args, pipe) if args.solvers else [],
        "caches": measure_caches(args, pipe) if args.caches else [],
        "speed": measure_speed(args, pipe),
    }
    return write_report(args, pipe.device, tables)


if __name__ == "__main__":
    run(lambda: main(parse(BenchmarkArguments, __doc__.partition("\n")[0])))
