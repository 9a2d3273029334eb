"""Score self-guidance on the digits: guidance scales × self-guidance scales, over several heads of one transformer.

    python examples/digits/score_guidance.py --data_dir outputs/demo \
        --pipelines outputs/demo/head0/pipeline outputs/demo/head1/pipeline --output_file outputs/demo/guidance.json

Fréchet distances to the real training digits in three spaces: the teacher's class token, which the transformer was aligned
with; 40 principal components of the pixels; and the hidden layer of a small classifier that was fitted on real digits and
knows neither teacher nor generator. Recognition, precision and recall are those of score_digits.py.

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


METRICS = ("fd_teacher", "fd_pixels", "fd_classifier", "recognised", "precision", "recall")


@dataclass
class ScoreGuidanceArguments:
    pipelines: list[str] = flag(help="Pipelines with guidance heads for the same transformer, one per seed.")
    data_dir: str = flag("outputs/demo", "The folder written by prepare_teacher.py.")
    output_file: Path = flag(Path("outputs/demo/guidance.json"), "Scores of every cell; a table lies beside it.")
    guidance_scales: list[float] = flag([1.0, 1.5, 2.0], "Guidance scales.", ge=0)
    self_guidance_scales: list[float] = flag([0.0, 0.25, 0.5], "Self-guidance scales; 0 is scored once.", ge=0)
    num_images: int = flag(1000, "Generated digits per cell, evenly over the ten classes.", ge=10)
    num_inference_steps: int = flag(10, "Sampling steps.", ge=1)
    batch_size: int = flag(100, "Images per batch.", ge=1)


def statistics(features: np.ndarray) -> FeatureStatistics:
    moments = FeatureMoments()
    moments.update(torch.from_numpy(np.ascontiguousarray(features)))
    return FeatureStatistics.from_moments(moments)


class Scorer:
    """Feature spaces and classifiers fitted on the real training digits."""

    def __init__(self, data_dir: Path):
        self.real, labels = read_digits(data_dir / "train")
        components = PCA(40, random_state=0).fit(self.real)
        network = MLPClassifier((64,), max_iter=200, random_state=0).fit(self.real, labels)
        teacher = VisionEncoderNetwork.from_pretrained(str(data_dir / "teacher"), image_size=28)
        self.recognizer = SVC(C=10).fit(self.real, labels)

        def class_tokens(pixels: np.ndarray) -> np.ndarray:
            grey = torch.from_numpy((pixels * 255).round().astype(np.uint8)).view(-1, 1, 16, 16).expand(-1, 3, -1, -1)
            return np.concatenate([extract(teacher, part)["features"].numpy() for part in grey.split(200)])

        self.spaces: dict[str, Callable[[np.ndarray], np.ndarray]] = {
            "fd_teacher": class_tokens,
            "fd_pixels": components.transform,
            "fd_classifier": lambda pixels: np.maximum(pixels @ network.coefs_[0] + network.intercepts_[0], 0),
        }
        self.references = {name: statistics(features(self.real)) for name, features in self.spaces.items()}

    def score(self, pixels: np.ndarray) -> dict[str, float]:
        """Scores of images (n, 256) in [0, 1], image i of class i mod 10."""
        distances = {
            name: statistics(features(pixels)).distance(self.references[name])
            for name, features in self.spaces.items()
        }
        correct = self.recognizer.predict(pixels) == np.arange(len(pixels)) % 10
        return {**distances, "recognised": float(correct.mean()), **precision_recall(pixels, self.real)}


def generate(args: ScoreGuidanceArguments, pipe: DiffusionPipeline, scale: float, self_scale: float) -> np.ndarray:
    make_images = pipeline_images(
        pipe, args.num_images, 0, args.num_inference_steps, scale, self_guidance_scale=self_scale
    )
    batches = np.array_split(np.arange(args.num_images), -(-args.num_images // args.batch_size))
    images = torch.cat([make_images(batch.tolist()) for batch in batches])  # uint8 (n, 3, 16, 16)
    return images.float().mean(dim=1).flatten(1).numpy() / 255


def write_table(path: Path, scores: dict[str, dict[str, float]]) -> str:
    """Mean ± standard deviation over the heads, by (guidance, self-guidance)."""
    cells: dict[str, list[dict[str, float]]] = {}
    for key, score in scores.items():
        cells.setdefault(key.rpartition(" | ")[0], []).append(score)
    lines = [f"| guidance | self-guidance | heads | {' | '.join(METRICS)} |", "|---" * (3 + len(METRICS)) + "|"]
    for cell, rows in sorted(cells.items()):
        values = np.array([[row[metric] for metric in METRICS] for row in rows])
        spread = values.std(axis=0, ddof=1) if len(rows) > 1 else [None] * len(METRICS)
        texts = [
            f"{mean:.3f}" + ("" if deviation is None else f" ± {deviation:.3f}")
            for mean, deviation in zip(values.mean(axis=0), spread, strict=True)
        ]
        lines.append(f"| {cell} | {len(rows)} | {' | '.join(texts)} |")
    table = "\n".join(lines) + "\n"
    path.write_text(table, encoding="utf-8")
    return table


def main(args: ScoreGuidanceArguments) -> dict[str, dict[str, float]]:
    scorer = Scorer(Path(args.data_dir))
    scores = json.loads(args.output_file.read_text()) if args.output_file.exists() else {}
    args.output_file.parent.mkdir(parents=True, exist_ok=True)
    for number, folder in enumerate(args.pipelines):
        pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
        pipe.set_progress_bar_config(disable=True)
        for self_scale in args.self_guidance_scales:
            for scale in args.guidance_scales:
                key = f"{scale:g} | {self_scale:g} | {number if self_scale else 'none'}"
                if key not in scores:
                    scores[key] = scorer.score(generate(args, pipe, scale, self_scale))
                    write_json(args.output_file, scores)
                    print(key, {name: round(value, 3) for name, value in scores[key].items()}, flush=True)
    print(write_table(args.output_file.with_suffix(".md"), scores))
    return scores


if __name__ == "__main__":
    run(lambda: main(parse(ScoreGuidanceArguments, __doc__.partition("\n")[0])))
