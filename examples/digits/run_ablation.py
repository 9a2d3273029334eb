"""Which part of the method helps? The same training run with other objectives, over several seeds, at equal budgets.

    python training/run_ablation.py training/configs/ablation_digits.yaml

The YAML file names a training configuration, the arms (each a set of objective arguments: none, repa, unmasked, …) and the
seeds. Every run is train_pixelrepa.py with the arm's arguments on top; the budget, the data and the seeds are those of all
arms. Each checkpoint's first EMA is then sampled, with the same noise in all runs, and compared with held-out images in a
teacher's feature space; on the digits a classifier that never saw the generator reads them, too.

--output_dir receives ARM/seed-S/ with the run and its result.json, and after every run ablation.md (mean ± standard
deviation over the seeds), ablation.json and curves.png. Run it again after an interruption: finished runs are kept, a
started one goes on from its last checkpoint. About equal runs are no proof: look at the spread before the mean.

For another image folder write such a file with its own training configuration; `classifier_dir` is for the digits alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import re
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
from score_digits import read_digits
from sklearn.svm import SVC

from pixelrepa_diffusers import JiTFlowMatchScheduler, JiTTransformer2DModel, PixelREPAPipeline, get_preset
from pixelrepa_diffusers.evaluation import (
    FeatureSpace,
    VisionEncoderNetwork,
    accumulate,
    feature_statistics,
    finished_record,
    pipeline_images,
    results,
)
from pixelrepa_diffusers.files import write_atomically
from pixelrepa_diffusers.images import list_images, read_image
from pixelrepa_diffusers.sampling import device_name, versions
from pixelrepa_diffusers.training.arguments import ObjectiveArguments, TrainingArguments, parse_arguments
from pixelrepa_diffusers.training.data import open_source


METRIC_TITLES = {"fd_teacher": "Fréchet distance in the teacher's space ↓", "recognised": "recognised ↑"}


TRAINER = Path(__file__).resolve().parents[2] / "training" / "train_pixelrepa.py"


@dataclass
class AblationArguments:
    """The YAML file. Paths are relative to where the command runs.

    Args:
        output_dir: receives runs, tables and plot.
        config: training configuration of every run.
        arms: name to objective arguments of train_pixelrepa.py.
        seeds: training seeds; every arm is run with each.
        arguments: training arguments of every run on top of `config`; `checkpointing_steps` sets the curve's points.
        held_out_dir: real images that training does not see.
        teacher, image_size, pooling: the feature network, see `metrics.VisionEncoderNetwork`.
        num_samples: generated images per point, a multiple of the classes.
        num_inference_steps, guidance_scale, batch_size: of sampling; guidance 1 measures the model alone.
        classifier_dir: real training digits, a sub-folder per digit, that the classifier is fitted on.
        launcher: the words that start a training run on several processes, e.g. [accelerate, launch, --config_file,
            training/accelerate/8gpu.yaml]; its output goes to log.txt. Without it runs are trained in this process.
    """

    output_dir: str
    config: str
    arms: dict[str, dict]
    seeds: list[int]
    held_out_dir: str
    teacher: str
    image_size: int = 224
    pooling: str = "class"
    num_samples: int = 1000
    num_inference_steps: int = 50
    guidance_scale: float = 1.0
    batch_size: int = 250
    classifier_dir: str | None = None
    arguments: dict = field(default_factory=dict)
    launcher: list[str] | None = None

    def __post_init__(self):
        if not isinstance(self.arms, dict) or not all(isinstance(arguments, dict) for arguments in self.arms.values()):
            raise ValueError(f"`arms` must map names to objective arguments ({{}} for none), got {self.arms}.")
        if not isinstance(self.seeds, list) or not all(isinstance(seed, int) for seed in self.seeds):
            raise ValueError(f"`seeds` must be a list of integers, got {self.seeds!r}.")
        if not isinstance(self.arguments, dict):
            raise ValueError(f"`arguments` must map names to values, got {self.arguments!r}.")
        for name in ("image_size", "num_samples", "num_inference_steps", "batch_size"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"`{name}` must be an integer of at least 1, got {value!r}.")
        if not self.arms or not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"Give at least one arm and one seed, no seed twice; got {self.arms}, {self.seeds}.")
        allowed = ObjectiveArguments.__dataclass_fields__
        for arm, arguments in self.arms.items():
            if not isinstance(arm, str) or not re.fullmatch(r"[\w-][\w.-]*", arm):
                raise ValueError(
                    f"An arm's name is a folder's, made of letters, digits, '-', '_' and, after the first, '.'; got {arm!r}."
                )
            foreign = sorted(set(arguments) - set(allowed))
            if foreign:
                raise ValueError(
                    f"The arm {arm!r} sets {foreign[0]}, which is no objective argument: arms differ in the objective "
                    f"alone ({', '.join(allowed)}); what all runs share goes to `arguments`."
                )


def read_config(path: Path) -> AblationArguments:
    """The YAML file. ValueError for names it does not know or lacks."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: no UTF-8, or no such date
        raise ValueError(f"{path} is no YAML file of `name: value` lines: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold `name: value` lines, got {type(values).__name__}.")
    fields = dataclasses.fields(AblationArguments)
    required = {
        one.name for one in fields if one.default is dataclasses.MISSING and one.default_factory is dataclasses.MISSING
    }
    unknown, missing = set(values) - {one.name for one in fields}, required - set(values)
    if unknown or missing:
        raise ValueError(f"{path}: unknown names {sorted(map(str, unknown))}, missing names {sorted(missing)}.")
    return AblationArguments(**values)


# ---------------------------------------------------------------------------------------------------------- measuring


class Referee:
    """What judges every run alike: the feature network, the held-out images, the classifier."""

    def __init__(self, args: AblationArguments, image_size: int):
        self.args = args
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        network = VisionEncoderNetwork.from_pretrained(args.teacher, args.image_size, args.pooling).to(self.device)
        self.image_size = image_size
        bare = FeatureSpace("teacher", network, ("fd_teacher",))
        self.held_out = feature_statistics(self._tally_files(args.held_out_dir, bare), bare)
        self.space = dataclasses.replace(bare, reference=self.held_out)
        self.classifier = SVC(C=10).fit(*read_digits(Path(args.classifier_dir))) if args.classifier_dir else None

    def _tally_files(self, folder: str, space: FeatureSpace):
        paths = list_images(folder)

        def make_images(indices: Sequence[int]) -> torch.Tensor:
            return torch.stack([read_image(paths[index], self.image_size) for index in indices])

        return accumulate(make_images, len(paths), [space], self.args.batch_size, description=folder)

    def judge_real(self, train_dir: str) -> dict[str, float]:
        """What real images score: the mark no generator is expected to pass."""
        values = results(self._tally_files(train_dir, self.space), [self.space])
        if self.classifier is not None:
            pixels, labels = read_digits(Path(self.args.held_out_dir))
            values["recognised"] = float((self.classifier.predict(pixels) == labels).mean())
        return values

    def judge(self, transformer: JiTTransformer2DModel) -> dict[str, float]:
        args = self.args
        pipeline = PixelREPAPipeline(transformer, JiTFlowMatchScheduler()).to(self.device)
        pipeline.set_progress_bar_config(disable=True)
        sample = pipeline_images(
            pipeline,
            args.num_samples,
            num_inference_steps=args.num_inference_steps,
            guidance_scale=args.guidance_scale,
        )
        right = []

        def make_images(indices: Sequence[int]) -> torch.Tensor:
            images = sample(indices)
            if self.classifier is not None:
                pictures = [Image.fromarray(image.permute(1, 2, 0).cpu().numpy()) for image in images]
                pixels = np.stack([np.asarray(picture.convert("L")).reshape(-1) / 255 for picture in pictures])
                labels = np.array(indices) % transformer.config.num_classes
                right.append(self.classifier.predict(pixels) == labels)
            return images

        tally = accumulate(make_images, args.num_samples, [self.space], args.batch_size, description="samples")
        values = results(tally, [self.space])
        if self.classifier is not None:
            values["recognised"] = float(np.concatenate(right).mean())
        return values


# ------------------------------------------------------------------------------------------------------------- running


def command(args: AblationArguments, arm: str, seed: int) -> list[str]:
    """The words after train_pixelrepa.py."""
    values = {
        **args.arguments,
        **args.arms[arm],
        "seed": seed,
        "output_dir": str(Path(args.output_dir) / arm / f"seed-{seed}"),
        "resume_from_checkpoint": "latest",
        "checkpoints_total_limit": 10**6,  # the curve is measured on them
    }
    words = ["--config", args.config]
    for name, value in values.items():
        words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return words


def train(args: AblationArguments, arm: str, seed: int, folder: Path) -> float:
    """Trains one run to its end and returns the seconds of this start."""
    started, end = time.perf_counter(), "it was stopped; run the ablation again to go on"
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "log.txt"
    with log.open("a", encoding="utf-8") as file:
        words = [*(args.launcher or [sys.executable]), str(TRAINER), *command(args, arm, seed)]
        code = subprocess.run(words, stdout=file, stderr=subprocess.STDOUT).returncode
    if code:
        tail = log.read_text(encoding="utf-8").splitlines(keepends=True)[-15:]
        end = f"exit status {code}. The end of {log}:\n{''.join(tail)}"
    if not (folder / "pipeline").is_dir():
        raise RuntimeError(f"The run {arm}, seed {seed}, did not finish: {end}")
    return time.perf_counter() - started


def run(args: AblationArguments, arm: str, seed: int, training: TrainingArguments, referee: Referee) -> dict:
    """One arm and seed: trained, measured at every checkpoint, and kept in result.json."""
    folder = Path(args.output_dir) / arm / f"seed-{seed}"
    measured_with = ("num_samples", "num_inference_steps", "guidance_scale", "image_size", "pooling", "batch_size")
    settings = {
        "training": {name: value for name, value in training.saved().items() if name != "output_dir"},
        "measured_with": {name: getattr(args, name) for name in measured_with},
        "reference_sha256": referee.held_out.sha256,
    }
    record = finished_record(folder / "result.json", settings)
    if record is not None:
        return record
    seconds = 0.0 if (folder / "pipeline").is_dir() else train(args, arm, seed, folder)
    weights = f"transformer_ema_{training.ema_decays[0]}" if training.use_ema else "transformer"
    # Not whatever checkpoints there are: a run that was interrupted has more.
    steps = {*range(training.checkpointing_steps, training.max_train_steps, training.checkpointing_steps)}
    curve = [
        {"step": step, **referee.judge(JiTTransformer2DModel.from_pretrained(folder / f"checkpoint-{step}" / weights))}
        for step in sorted(steps | {training.max_train_steps})
    ]
    record = {**settings, "curve": curve, "training_seconds": round(seconds, 1)}
    write_json(folder / "result.json", record)
    return record


def main(args: AblationArguments) -> dict:
    """Runs what is not finished yet and returns what ablation.json holds."""
    # Every run's arguments are parsed before the first is started.
    parsed = {
        (arm, seed): parse_arguments(command(args, arm, seed)) for seed in args.seeds for arm in args.arms
    }  # seed by seed, so that an interrupted ablation can be compared
    first = next(iter(parsed.values()))
    if first.max_train_steps is None:
        raise ValueError("An ablation needs a budget in steps: set max_train_steps in `config` or `arguments`.")
    num_classes = open_source(first).num_classes
    if args.num_samples % num_classes:
        raise ValueError(f"num_samples must be a multiple of the {num_classes} classes, got {args.num_samples}.")
    referee = Referee(args, first.resolution or get_preset(first.preset).sample_size)
    summary = {
        "reference": f"{referee.held_out.count} held-out images",
        "real": referee.judge_real(first.train_data_dir),
        "budget": {name: getattr(first, name) for name in ("max_train_steps", "train_batch_size", "learning_rate")},
        "device": device_name(referee.device),
        "versions": versions(),
        "arguments": dataclasses.asdict(args),
    }
    records: dict[str, dict[int, dict]] = {arm: {} for arm in args.arms}
    for number, ((arm, seed), training) in enumerate(parsed.items(), start=1):
        print(f"Run {number} of {len(parsed)}: {arm}, seed {seed}", flush=True)
        records[arm][seed] = run(args, arm, seed, training, referee)
        arms = {name: summarise(runs) for name, runs in records.items() if runs}
        report = {**summary, "arms": arms}
        write_json(Path(args.output_dir) / "ablation.json", report)
        table = to_markdown(report)
        write_atomically(
            Path(args.output_dir) / "ablation.md", lambda path, table=table: path.write_text(table, encoding="utf-8")
        )
        plot(Path(args.output_dir) / "curves.png", report)
    print(table)
    return report


# ----------------------------------------------------------------------------------------------------------- reporting


def summarise(runs: dict[int, dict]) -> dict:
    """Per metric and step: the values by seed, their mean and sample standard deviation (None for one seed)."""
    steps = [point["step"] for point in next(iter(runs.values()))["curve"]]
    metrics = [name for name in next(iter(runs.values()))["curve"][0] if name != "step"]
    curve = []
    for place, step in enumerate(steps):
        point = {"step": step}
        for name in metrics:
            values = {seed: record["curve"][place][name] for seed, record in runs.items()}
            spread = float(np.std(list(values.values()), ddof=1)) if len(values) > 1 else None
            point[name] = {"mean": float(np.mean(list(values.values()))), "std": spread, "by_seed": values}
        curve.append(point)
    return {"final": {name: curve[-1][name] for name in metrics}, "curve": curve}


def to_markdown(report: dict) -> str:
    metrics = list(report["real"])
    lines = [
        "| arm | seeds | " + " | ".join(METRIC_TITLES[name] for name in metrics) + " |",
        "|---" * (2 + len(metrics)) + "|",
    ]
    for arm, outcome in report["arms"].items():
        cells = []
        for name in metrics:
            final = outcome["final"][name]
            spread = "" if final["std"] is None else f" ± {_rounded(final['std'])}"
            cells.append(f"{_rounded(final['mean'])}{spread}")
        lines.append(f"| {arm} | {len(final['by_seed'])} | " + " | ".join(cells) + " |")
    real = " | ".join(_rounded(report["real"][name]) for name in metrics)
    lines.append(f"| real images | | {real} |")
    budget = ", ".join(f"{name} {value}" for name, value in report["budget"].items())
    lines.append(
        f"\nMean ± standard deviation over the seeds. Every run: {budget}, on {report['device']}. Reference: "
        f"{report['reference']}; {report['arguments']['num_samples']} samples per run, guidance "
        f"{report['arguments']['guidance_scale']:g}. Real images: the training images against the held-out ones, and the "
        "held-out ones read by the classifier.\n"
    )
    return "\n".join(lines)


def _rounded(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else str(value)


def plot(path: Path, report: dict) -> None:
    """A panel for each metric over the training steps: the seeds' mean, and a band from the lowest to the highest."""
    from matplotlib.figure import Figure  # slow to import

    metrics = list(report["real"])
    figure = Figure(figsize=(6 * len(metrics), 4), layout="constrained")
    for axis, name in zip(figure.subplots(1, len(metrics), squeeze=False)[0], metrics, strict=True):
        for arm, outcome in report["arms"].items():
            steps = [point["step"] for point in outcome["curve"]]
            seeds = [list(point[name]["by_seed"].values()) for point in outcome["curve"]]
            (line,) = axis.plot(steps, [point[name]["mean"] for point in outcome["curve"]], marker=".", label=arm)
            axis.fill_between(steps, list(map(min, seeds)), list(map(max, seeds)), color=line.get_color(), alpha=0.15)
        axis.axhline(report["real"][name], color="grey", linestyle=":", label="real images")
        axis.set_title(METRIC_TITLES[name])
        axis.set_xlabel("optimizer step")
        axis.set_yscale("log" if name == "fd_teacher" else "linear")
        axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=120))


def write_json(path: Path, content: dict) -> None:
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("config", type=Path, help="A YAML file such as training/configs/ablation_digits.yaml.")
    main(read_config(parser.parse_args().config))
