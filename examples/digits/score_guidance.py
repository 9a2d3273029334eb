"""Score self-guidance on the digits: guidance scales × self-guidance scales, over several heads of one transformer.

    python examples/digits/score_guidance.py --data_dir outputs/demo \
        --pipelines outputs/demo/head0/pipeline outputs/demo/head1/pipeline --output_file outputs/demo/guidance.json

Fréchet distances to the real training digits in three spaces: the teacher's class token, which the transformer was aligned
with; 40 principal components of the pixels; and the hidden layer of a small classifier that was fitted on real digits and
knows neither teacher nor generator. Recognition, precision and recall are those of score_digits.py.

Each pipeline starts from noise of its own, the same noise in every cell: the spread over pipelines is that of heads and
noise. A Fréchet distance falls with the number of images, so the images of all pipelines are scored together, too.

The training digits have 127 to 161 images per class, the generated ones equally many, and that difference alone is a distance.
fd_teacher_balanced weights the real digits so that all classes count alike. The row "real" scores as many real digits, drawn
with replacement and evenly over the classes: the distance that no generator can avoid at this number of images.

Cells that --output_file already holds are kept.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from score_digits import read_digits
from sklearn.decomposition import PCA
from sklearn.neural_network import MLPClassifier
from sklearn.svm import SVC

from pixelrepa_diffusers.cli import flag, parse, run
from pixelrepa_diffusers.evaluation import (
    FeatureMoments,
    FeatureStatistics,
    VisionEncoderNetwork,
    extract,
    pipeline_images,
    precision_recall,
)
from pixelrepa_diffusers.files import write_json
from pixelrepa_diffusers.images import make_grid


METRICS = (
    "fd_teacher",
    "fd_teacher_balanced",
    "fd_pixels",
    "fd_classifier",
    "recognised",
    "precision",
    "recall",
)
REAL = "real | –"


@dataclass
class ScoreGuidanceArguments:
    pipelines: list[str] = flag(help="Pipelines with guidance heads for the same transformer, one per seed.")
    data_dir: str = flag("outputs/demo", "The folder written by prepare_teacher.py.")
    output_file: Path = flag(Path("outputs/demo/guidance.json"), "Scores of every cell; a table lies beside it.")
    guidance_scales: list[float] = flag([1.0, 1.5, 2.0], "Guidance scales.", ge=0)
    self_guidance_scales: list[float] = flag([0.0, 0.25, 0.5], "Self-guidance scales; 0 is scored once.", ge=0)
    num_images: int = flag(1000, "Generated digits per pipeline and cell, evenly over the ten classes.", ge=10)
    num_inference_steps: int = flag(10, "Sampling steps.", ge=1)
    guidance_interval: list[float] | None = flag(None, "LOW HIGH in t (default: the saved one).", nargs=2)
    self_guidance_interval: list[float] = flag([0.0, 1.0], "LOW HIGH in t.", nargs=2)
    seed: int = flag(0, "Image i of pipeline k starts from the noise of seed + k · num_images + i.", ge=0)
    picture: Path | None = flag(
        None, "Write a PNG of the best cell without self-guidance beside the best cell with the first head."
    )
    batch_size: int = flag(100, "Images per batch.", ge=1)


def statistics(features: np.ndarray) -> FeatureStatistics:
    moments = FeatureMoments()
    moments.update(torch.from_numpy(np.ascontiguousarray(features)))
    return FeatureStatistics.from_moments(moments)


class Scorer:
    """Feature spaces and classifiers fitted on the real training digits."""

    def __init__(self, data_dir: Path):
        self.real, self.labels = read_digits(data_dir / "train")
        components = PCA(40, random_state=0).fit(self.real)
        network = MLPClassifier((64,), max_iter=200, random_state=0).fit(self.real, self.labels)
        teacher = VisionEncoderNetwork.from_pretrained(str(data_dir / "teacher"), image_size=28)
        self.recognizer = SVC(C=10).fit(self.real, self.labels)

        def class_tokens(pixels: np.ndarray) -> np.ndarray:
            grey = torch.from_numpy((pixels * 255).round().astype(np.uint8)).view(-1, 1, 16, 16).expand(-1, 3, -1, -1)
            return np.concatenate([extract(teacher, part)["features"].numpy() for part in grey.split(200)])

        self.spaces: dict[str, Callable[[np.ndarray], np.ndarray]] = {
            "fd_teacher": class_tokens,
            "fd_pixels": components.transform,
            "fd_classifier": lambda pixels: np.maximum(pixels @ network.coefs_[0] + network.intercepts_[0], 0),
        }
        # Ten thousand rows of each class, so that every digit of a class weighs the same to about 1 %.
        balanced = np.concatenate([np.resize(np.flatnonzero(self.labels == label), 10_000) for label in range(10)])
        self.references = {name: statistics(features(self.real)) for name, features in self.spaces.items()}
        self.balanced_reference = statistics(class_tokens(self.real)[balanced])

    def draw_real(self, number: int, seed: int) -> np.ndarray:
        """Real digits (number, 256), drawn with replacement, image i of class i mod 10."""
        random = np.random.default_rng(seed)
        columns = [random.choice(np.flatnonzero(self.labels == label), number // 10) for label in range(10)]
        return self.real[np.stack(columns, axis=1).reshape(-1)]

    def score(self, pixels: np.ndarray) -> dict[str, float]:
        """Scores of images (n, 256) in [0, 1], image i of class i mod 10."""
        features = {name: statistics(space(pixels)) for name, space in self.spaces.items()}
        distances = {name: of_images.distance(self.references[name]) for name, of_images in features.items()}
        distances["fd_teacher_balanced"] = features["fd_teacher"].distance(self.balanced_reference)
        correct = self.recognizer.predict(pixels) == np.arange(len(pixels)) % 10
        return {**distances, "recognised": float(correct.mean()), **precision_recall(pixels, self.real)}


def generate(
    args: ScoreGuidanceArguments, pipe: DiffusionPipeline, seed: int, scale: float, self_scale: float, num_images: int
) -> torch.Tensor:
    """The images of the first seeds of a cell, uint8 (n, 3, 16, 16)."""
    make_images = pipeline_images(
        pipe,
        num_images,
        seed,
        args.num_inference_steps,
        scale,
        args.guidance_interval,
        self_guidance_scale=self_scale,
        self_guidance_interval=args.self_guidance_interval,
    )
    batches = torch.arange(num_images).split(args.batch_size)
    return torch.cat([make_images(batch.tolist()) for batch in batches])


def score_cell(
    args: ScoreGuidanceArguments,
    scorer: Scorer,
    pipes: list[DiffusionPipeline],
    scale: float,
    self_scale: float,
) -> dict[str, list[dict[str, float]]]:
    """Scores of each pipeline's images, and of all together."""
    images = [
        generate(args, pipe, args.seed + number * args.num_images, scale, self_scale, args.num_images)
        for number, pipe in enumerate(pipes)
    ]
    pixels = [part.float().mean(dim=1).flatten(1).numpy() / 255 for part in images]
    return {"each": [scorer.score(part) for part in pixels], "together": [scorer.score(np.concatenate(pixels))]}


def draw_best(
    args: ScoreGuidanceArguments, pipe: DiffusionPipeline, cells: dict[str, dict[str, list[dict[str, float]]]]
) -> Image.Image:
    """Five digits per class of the best cell without self-guidance, and to the right, from the same noise, of the best with."""
    settings = {key: tuple(map(float, key.split(" | "))) for key in cells if key != REAL}
    halves = []
    for guided in (False, True):
        keys = [key for key, (_, self_scale) in settings.items() if bool(self_scale) == guided]
        best = min(keys, key=lambda key: cells[key]["together"][0]["fd_teacher"])
        print(f"{args.picture}: {best}")
        images = generate(args, pipe, args.seed, *settings[best], 50)
        halves.append(images.movedim(1, 3).unflatten(0, (5, 10)))  # (5, 10, 16, 16, 3)
    rows = torch.cat([halves[0], torch.full_like(halves[0][:, :1], 255), halves[1]], dim=1)
    return make_grid(list(rows.flatten(0, 1).numpy()), columns=21)


def write_table(path: Path, cells: dict[str, dict[str, list[dict[str, float]]]]) -> str:
    """Two rows per cell: mean ± standard deviation over the pipelines, and all images together."""
    lines = [f"| guidance | self-guidance | images | {' | '.join(METRICS)} |", "|---" * (3 + len(METRICS)) + "|"]
    for key, cell in sorted(cells.items()):
        for images, scores in cell.items():
            values = np.array([[score[metric] for metric in METRICS] for score in scores])
            texts = [f"{mean:.3f}" for mean in values.mean(axis=0)]
            if len(scores) > 1:
                texts = [f"{text} ± {std:.3f}" for text, std in zip(texts, values.std(axis=0, ddof=1), strict=True)]
            lines.append(f"| {key} | {images} | {' | '.join(texts)} |")
    table = "\n".join(lines) + "\n"
    path.write_text(table, encoding="utf-8")
    return table


def main(args: ScoreGuidanceArguments) -> dict[str, dict[str, list[dict[str, float]]]]:
    scorer = Scorer(Path(args.data_dir))
    pipes = [DiffusionPipeline.from_pretrained(folder, trust_remote_code=True) for folder in args.pipelines]
    for pipe in pipes:
        pipe.set_progress_bar_config(disable=True)
    varying = ("output_file", "guidance_scales", "self_guidance_scales", "picture", "batch_size")
    settings = {name: str(value) for name, value in vars(args).items() if name not in varying}
    record = (
        json.loads(args.output_file.read_text()) if args.output_file.exists() else {"settings": settings, "cells": {}}
    )
    if record["settings"] != settings:
        raise ValueError(f"{args.output_file} holds scores of other settings: {record['settings']}.")
    args.output_file.parent.mkdir(parents=True, exist_ok=True)
    cells = record["cells"]

    if REAL not in cells:
        samples = [scorer.draw_real(args.num_images, args.seed + number) for number in range(len(pipes))]
        cells[REAL] = {
            "each": [scorer.score(sample) for sample in samples],
            "together": [scorer.score(np.concatenate(samples))],
        }
    for self_scale in args.self_guidance_scales:
        for scale in args.guidance_scales:
            key = f"{scale:g} | {self_scale:g}"
            if key not in cells:
                cells[key] = score_cell(args, scorer, pipes, scale, self_scale)
                write_json(args.output_file, record)
                print(key, {name: round(value, 3) for name, value in cells[key]["together"][0].items()}, flush=True)
    print(write_table(args.output_file.with_suffix(".md"), cells))
    if args.picture:
        draw_best(args, pipes[0], cells).save(args.picture)
    return cells


if __name__ == "__main__":
    run(lambda: main(parse(ScoreGuidanceArguments, __doc__.partition("\n")[0])))
