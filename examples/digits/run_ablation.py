"""Compare training objectives: one run per objective and seed, equal in everything else, measured alike.

    python examples/digits/run_ablation.py examples/digits/ablation.yaml

The YAML file names a training configuration, the arms (objective arguments of train_pixelrepa.py) and the seeds. Every
checkpoint's first EMA is sampled from the same noise and compared with held-out images in a teacher's feature space; a
classifier fitted on real digits reads the samples, too.

--output_dir receives ARM/seed-S/ with the run and its result.json and, updated after every run, ablation.md (mean ±
standard deviation over the seeds), ablation.json and curves.png. Start it again after an interruption: finished runs are
kept and the interrupted one resumes. For other images, write such a file without `classifier_dir`.
"""

from __future__ import annotations

import argparse
import dataclasses
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image
from score_digits import read_digits, to_vectors
from sklearn.svm import SVC

from pixelrepa_diffusers import JiTFlowMatchScheduler, JiTTransformer2DModel, PixelREPAPipeline, get_preset
from pixelrepa_diffusers.cli import as_words, run
from pixelrepa_diffusers.evaluation import (
    FeatureSpace,
    VisionEncoderNetwork,
    accumulate,
    feature_statistics,
    file_images,
    finished_record,
    pipeline_images,
    results,
)
from pixelrepa_diffusers.files import write_json
from pixelrepa_diffusers.images import list_images
from pixelrepa_diffusers.sampling import device_name, versions
from pixelrepa_diffusers.training.arguments import ObjectiveArguments, TrainingArguments, parse_arguments
from pixelrepa_diffusers.training.data import open_source


TRAINER = Path(__file__).resolve().parents[2] / "training" / "train_pixelrepa.py"
METRIC_TITLES = {"fd_teacher": "Fréchet distance in the teacher's space ↓", "recognised": "recognised ↑"}
MEASURED_WITH = ("num_samples", "num_inference_steps", "guidance_scale", "image_size", "pooling", "batch_size")


@dataclass
class AblationArguments:
    """The YAML file. Paths are relative to the working directory."""

    output_dir: str
    config: str  # training configuration of every run
    arms: dict[str, dict]  # name → objective arguments of train_pixelrepa.py
    seeds: list[int]  # every arm is trained with each of them
    held_out_dir: str  # real images that training does not see
    # The feature network, see VisionEncoderNetwork.from_pretrained.
    teacher: str
    image_size: int = 224
    pooling: str = "class"
    # Sampling at every checkpoint; scale 1 measures the model without guidance.
    num_samples: int = 1000
    num_inference_steps: int = 50
    guidance_scale: float = 1.0
    batch_size: int = 250
    classifier_dir: str | None = None  # real training digits, one sub-folder each, to fit the classifier on
    arguments: dict = field(default_factory=dict)  # on top of `config`; checkpointing_steps sets the curves' points
    # Command that starts a run, such as [accelerate, launch, --config_file, training/accelerate/8gpu.yaml].
    launcher: list[str] = field(default_factory=lambda: [sys.executable])


def read_config(path: Path) -> AblationArguments:
    try:
        args = AblationArguments(**yaml.safe_load(path.read_text(encoding="utf-8")))
    except (TypeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} is not an ablation's YAML file: {error}") from error
    shared = {name for arm in args.arms.values() for name in arm} - ObjectiveArguments.__dataclass_fields__.keys()
    if shared:
        raise ValueError(f"{path}: arms differ in objective arguments only; move {shared} to `arguments`.")
    return args


class Evaluator:
    """Measures every run alike: one feature network, one set of held-out images, one classifier."""

    def __init__(self, args: AblationArguments, resolution: int):
        self.args, self.resolution = args, resolution
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        network = VisionEncoderNetwork.from_pretrained(args.teacher, args.image_size, args.pooling).to(self.device)
        space = FeatureSpace("teacher", network, ("fd_teacher",))
        self.held_out = feature_statistics(self.read_features(args.held_out_dir, space), space)
        self.space = dataclasses.replace(space, reference=self.held_out)
        self.classifier = SVC(C=10).fit(*read_digits(Path(args.classifier_dir))) if args.classifier_dir else None

    def read_features(self, folder: str, space: FeatureSpace):
        paths = list_images(folder)
        images = file_images(paths, self.resolution)
        return accumulate(images, len(paths), [space], self.args.batch_size, description=folder)

    def measure_real(self, train_dir: str) -> dict[str, float]:
        """Scores of real images: an upper bound for a generator."""
        values = results(self.read_features(train_dir, self.space), [self.space])
        if self.classifier is not None:
            values["recognised"] = float(self.classifier.score(*read_digits(Path(self.args.held_out_dir))))
        return values

    def measure(self, transformer: JiTTransformer2DModel) -> dict[str, float]:
        args, num_classes, correct = self.args, transformer.config.num_classes, []
        pipeline = PixelREPAPipeline(transformer, JiTFlowMatchScheduler()).to(self.device)
        pipeline.set_progress_bar_config(disable=True)
        settings = {"num_inference_steps": args.num_inference_steps, "guidance_scale": args.guidance_scale}
        sample = pipeline_images(pipeline, args.num_samples, **settings)

        def make_images(indices: Sequence[int]) -> torch.Tensor:
            images = sample(indices)
            if self.classifier is not None:
                digits = [Image.fromarray(image.permute(1, 2, 0).cpu().numpy()) for image in images]
                correct.extend(self.classifier.predict(to_vectors(digits)) == np.array(indices) % num_classes)
            return images

        tally = accumulate(make_images, args.num_samples, [self.space], args.batch_size, description="samples")
        recognised = {} if self.classifier is None else {"recognised": float(np.mean(correct))}
        return results(tally, [self.space]) | recognised


def training_command(args: AblationArguments, arm: str, seed: int) -> list[str]:
    """The arguments of train_pixelrepa.py for one run."""
    values = {
        "config": args.config,
        **args.arguments,
        **args.arms[arm],
        "seed": seed,
        "output_dir": f"{args.output_dir}/{arm}/seed-{seed}",
        "resume_from_checkpoint": "latest",
        "checkpoints_total_limit": 10**6,  # the curve is measured on them
    }
    return as_words(values)


def finish_run(
    args: AblationArguments, arm: str, seed: int, training: TrainingArguments, evaluator: Evaluator
) -> dict:
    """Train one arm with one seed, measure it at every checkpoint, and keep the outcome in result.json."""
    folder = Path(training.output_dir)
    settings = {
        "training": {name: value for name, value in training.saved().items() if name != "output_dir"},
        "measured_with": {name: getattr(args, name) for name in MEASURED_WITH},
        "reference_sha256": evaluator.held_out.sha256,
    }
    if record := finished_record(folder / "result.json", settings):
        return record
    started, log = time.perf_counter(), folder / "log.txt"
    if not (folder / f"checkpoint-{training.max_train_steps}").is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        with log.open("a", encoding="utf-8") as file:
            words = [*args.launcher, str(TRAINER), *training_command(args, arm, seed)]
            code = subprocess.run(words, stdout=file, stderr=subprocess.STDOUT).returncode
        if code:
            tail = "\n".join(log.read_text(encoding="utf-8").splitlines()[-15:])
            raise SystemExit(f"{arm}, seed {seed}: training ended with status {code}. The end of {log}:\n{tail}")
    seconds = time.perf_counter() - started
    weights = f"transformer_ema_{training.ema_decays[0]}" if training.use_ema else "transformer"
    # Not every checkpoint in the folder: an interrupted run has written one more.
    steps = {*range(training.checkpointing_steps, training.max_train_steps, training.checkpointing_steps)}
    curve = []
    for step in sorted(steps | {training.max_train_steps}):
        transformer = JiTTransformer2DModel.from_pretrained(folder / f"checkpoint-{step}" / weights)
        curve.append({"step": step, **evaluator.measure(transformer)})
    record = {**settings, "curve": curve, "training_seconds": round(seconds, 1)}
    write_json(folder / "result.json", record)
    return record


def main(args: AblationArguments) -> dict:
    """Finish every run and return the content of ablation.json."""
    # Parsed before the first run starts. Seed by seed, so that an interrupted ablation compares all arms.
    runs = {
        (arm, seed): parse_arguments(training_command(args, arm, seed)) for seed in args.seeds for arm in args.arms
    }
    first = next(iter(runs.values()))
    if first.max_train_steps is None:
        raise ValueError("An ablation needs a budget in steps: set max_train_steps in `config` or `arguments`.")
    num_classes = open_source(first).num_classes
    if args.num_samples % num_classes:
        raise ValueError(f"num_samples must be a multiple of the {num_classes} classes, got {args.num_samples}.")
    evaluator = Evaluator(args, first.resolution or get_preset(first.preset).sample_size)
    summary = {
        "reference": f"{evaluator.held_out.count} held-out images",
        "real": evaluator.measure_real(first.train_data_dir),
        "budget": {name: getattr(first, name) for name in ("max_train_steps", "train_batch_size", "learning_rate")},
        "device": device_name(evaluator.device),
        "versions": versions(),
        "arguments": dataclasses.asdict(args),
    }
    curves: dict[str, dict[int, list[dict]]] = {}
    output_dir = Path(args.output_dir)
    for number, ((arm, seed), training) in enumerate(runs.items(), start=1):
        print(f"Run {number} of {len(runs)}: {arm}, seed {seed}", flush=True)
        curves.setdefault(arm, {})[seed] = finish_run(args, arm, seed, training, evaluator)["curve"]
        report = {**summary, "arms": {name: summarize(by_seed) for name, by_seed in curves.items()}}
        write_json(output_dir / "ablation.json", report)
        table = to_markdown(report)
        (output_dir / "ablation.md").write_text(table, encoding="utf-8")
        plot(output_dir / "curves.png", report)
    print(table)
    return report


def summarize(curves: dict[int, list[dict]]) -> dict:
    """Per step and metric: the values by seed, their mean and sample standard deviation (None for one seed)."""

    def spread(by_seed: dict[int, float]) -> dict:
        values = list(by_seed.values())
        std = float(np.std(values, ddof=1)) if len(values) > 1 else None
        return {"mean": float(np.mean(values)), "std": std, "by_seed": by_seed}

    curve = []
    for points in zip(*curves.values(), strict=True):
        step, *_ = points
        metrics = [name for name in step if name != "step"]
        by_seed = {name: {seed: point[name] for seed, point in zip(curves, points, strict=True)} for name in metrics}
        curve.append({"step": step["step"], **{name: spread(values) for name, values in by_seed.items()}})
    return {"final": {name: value for name, value in curve[-1].items() if name != "step"}, "curve": curve}


def to_markdown(report: dict) -> str:
    metrics, settings = list(report["real"]), report["arguments"]
    rows = [["arm", "seeds", *(METRIC_TITLES[name] for name in metrics)], ["---"] * (2 + len(metrics))]
    for arm, outcome in report["arms"].items():
        finals = [outcome["final"][name] for name in metrics]
        cells = [f"{f['mean']:.4g}" + ("" if f["std"] is None else f" ± {f['std']:.4g}") for f in finals]
        rows.append([arm, str(len(finals[0]["by_seed"])), *cells])
    rows.append(["real images", "", *(f"{report['real'][name]:.4g}" for name in metrics)])
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    budget = ", ".join(f"{name} {value}" for name, value in report["budget"].items())
    return (
        f"{table}\n\nMean ± standard deviation over the seeds. Every run: {budget}, on {report['device']}. Reference: "
        f"{report['reference']}; {settings['num_samples']} samples per checkpoint, guidance "
        f"{settings['guidance_scale']:g}. Real images: the training images compared with the held-out ones, and the "
        "held-out ones read by the classifier.\n"
    )


def plot(path: Path, report: dict) -> None:
    """One panel per metric over the training steps: the mean of the seeds, and a band from the lowest to the highest."""
    from matplotlib.figure import Figure  # slow to import

    metrics = list(report["real"])
    figure = Figure(figsize=(6 * len(metrics), 4), layout="constrained")
    for axis, name in zip(figure.subplots(1, len(metrics), squeeze=False)[0], metrics, strict=True):
        for arm, outcome in report["arms"].items():
            steps = [point["step"] for point in outcome["curve"]]
            values = [list(point[name]["by_seed"].values()) for point in outcome["curve"]]
            (line,) = axis.plot(steps, np.mean(values, axis=1), marker=".", label=arm)
            low, high = np.min(values, axis=1), np.max(values, axis=1)
            axis.fill_between(steps, low, high, color=line.get_color(), alpha=0.15)
        axis.axhline(report["real"][name], color="grey", linestyle=":", label="real images")
        scale = "log" if name == "fd_teacher" else "linear"
        axis.set(title=METRIC_TITLES[name], xlabel="optimizer step", yscale=scale)
        axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("config", type=Path, help="A YAML file such as examples/digits/ablation.yaml.")
    run(lambda: main(read_config(parser.parse_args().config)))
