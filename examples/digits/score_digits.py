"""Score generated digits: recognition by an independent classifier, and precision and recall against the real digits.

    python examples/digits/score_digits.py --pipeline outputs/demo/run/pipeline --data_dir outputs/demo

The classifier, scikit-learn's support vector machine, is fitted on the real training digits and checked on the held-out
ones; it never sees the generator. k-nearest-neighbour precision and recall (k = 3, arXiv 1904.06991), in pixels, and the
distance to the nearest training digit reveal copies (high precision at a small distance) and collapse (low recall).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from sklearn.neighbors import NearestNeighbors
from sklearn.svm import SVC
from tqdm.auto import trange

from pixelrepa_diffusers.cli import flag, parse, run
from pixelrepa_diffusers.evaluation import pipeline_images, precision_recall
from pixelrepa_diffusers.files import write_json
from pixelrepa_diffusers.images import list_images, make_grid
from pixelrepa_diffusers.sampling import DTYPES


@dataclass
class ScoreArguments:
    pipeline: Path = flag(help="A pipeline folder written by train_pixelrepa.py.")
    data_dir: Path = flag(Path("outputs/demo"), "The folder written by prepare_teacher.py.")
    num_images: int = flag(1000, "Generated digits, evenly over the ten classes.", ge=10)
    num_inference_steps: int = flag(10, "Sampling steps.", ge=1)
    batch_size: int = flag(100, "Images per batch.", ge=1)
    dtype: str = flag("float32", "Data type of the network; part of the file names.", choices=DTYPES)


def to_vectors(images: Iterable[Image.Image]) -> np.ndarray:
    """Grey values in [0, 1], (n, pixels)."""
    return np.stack([np.asarray(image.convert("L")).reshape(-1) / 255 for image in images])


def read_digits(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Pixels (n, 256) in [0, 1] and classes of an image folder."""
    paths = list_images(folder)
    return to_vectors(Image.open(path) for path in paths), np.array([int(path.parent.name) for path in paths])


def generate(pipeline: DiffusionPipeline, args: ScoreArguments, guidance_scale: float) -> list[Image.Image]:
    """Image i is of class i mod 10 and starts from the noise of seed i."""
    make_images = pipeline_images(pipeline, args.num_images, 0, args.num_inference_steps, guidance_scale)
    images = []
    for start in trange(0, args.num_images, args.batch_size, desc=f"guidance {guidance_scale:g}", disable=None):
        batch = make_images(range(start, min(start + args.batch_size, args.num_images)))
        images += [Image.fromarray(image) for image in batch.permute(0, 2, 3, 1).numpy()]
    return images


def main(args: ScoreArguments) -> dict:
    real, real_labels = read_digits(args.data_dir / "train")
    held_out, held_out_labels = read_digits(args.data_dir / "test")
    classifier, neighbors = SVC(C=10).fit(real, real_labels), NearestNeighbors(n_neighbors=1).fit(real)
    dtype, suffix = getattr(torch, args.dtype), "" if args.dtype == "float32" else f"_{args.dtype}"
    pipeline = DiffusionPipeline.from_pretrained(args.pipeline, trust_remote_code=True, dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)

    saved_scale = pipeline.config.guidance_scale
    scores = {"classifier on held-out real digits": classifier.score(held_out, held_out_labels)}
    for name, guidance_scale in ((f"guidance {saved_scale:g}", saved_scale), ("no guidance", 1.0)):
        images = generate(pipeline, args, guidance_scale)
        pixels, labels = to_vectors(images), np.arange(len(images)) % 10
        correct = classifier.predict(pixels) == labels
        by_class = [correct[labels == label].mean() for label in range(10)]
        spread = precision_recall(pixels, real)
        scores[name] = {
            "recognised": float(correct.mean()),
            "worst class": f"{int(np.argmin(by_class))} ({min(by_class):.3f})",
            "precision (k=3)": spread["precision"],
            "recall (k=3)": spread["recall"],
            "mean distance to the nearest real training digit": float(neighbors.kneighbors(pixels)[0].mean()),
        }
        grid = make_grid(images[:100], columns=10)
        grid.save(args.pipeline.parent / f"digits_{name.replace(' ', '_')}{suffix}.png")
    distance = float(neighbors.kneighbors(held_out)[0].mean())
    scores["mean distance of a held-out real digit to the nearest training digit"] = distance
    write_json(args.pipeline.parent / f"scores{suffix}.json", scores)
    for name, score in scores.items():
        print(f"{name}: {score}")
    return scores


if __name__ == "__main__":
    run(lambda: main(parse(ScoreArguments, __doc__.partition("\n")[0])))
