"""How good are generated digits? Their recognition by an independent classifier, and their spread among the real ones.

    python training/score_digits.py --pipeline outputs/demo/run/pipeline --data_dir outputs/demo

The classifier (scikit-learn's support vector machine) never meets the generator: it is trained on the real training digits
and checked on the held-out ones. k-nearest-neighbour precision and recall (k = 3, arXiv 1904.06991) against the real
training digits, in pixels, would show copies (precision near 1 with a small distance to the nearest real one) or
collapse (low recall).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from sklearn.neighbors import NearestNeighbors
from sklearn.svm import SVC
from tqdm.auto import trange

from pixelrepa_diffusers.cli import parse, run
from pixelrepa_diffusers.evaluation import precision_recall
from pixelrepa_diffusers.images import make_grid
from pixelrepa_diffusers.sampling import seeded


@dataclass
class ScoreArguments:
    pipeline: str = field(metadata={"help": "A pipeline folder written by train_pixelrepa.py."})
    data_dir: str = field(default="outputs/demo", metadata={"help": "What prepare_teacher.py wrote."})
    num_images: int = field(default=1000, metadata={"help": "Generated digits, evenly over the ten classes."})
    num_inference_steps: int = field(default=10, metadata={"help": "Sampling steps."})
    batch_size: int = field(default=100, metadata={"help": "Images at a time."})
    dtype: str = field(
        default="float32",
        metadata={"help": "Of the network; names the files too.", "choices": ["float32", "bfloat16", "float16"]},
    )


def read_digits(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Pixels (n, 256) in [0, 1] and classes of an image folder."""
    paths = sorted(folder.glob("*/*.png"))
    if not paths:
        raise FileNotFoundError(f"There are no digits in {folder}/CLASS/*.png: prepare_teacher.py writes them.")
    pixels = np.stack([np.asarray(Image.open(path).convert("L")).reshape(-1) / 255 for path in paths])
    return pixels, np.array([int(path.parent.name) for path in paths])


def generate(pipeline: DiffusionPipeline, args: ScoreArguments, guidance_scale: float | None):
    """PIL images, their pixels and their labels; image i comes from seed i."""
    labels = [i % 10 for i in range(args.num_images)]
    images = []
    for start in trange(0, len(labels), args.batch_size, desc=f"guidance {guidance_scale or 'as saved'}"):
        chunk = labels[start : start + args.batch_size]
        images += pipeline(
            chunk,
            guidance_scale=guidance_scale,
            generator=seeded(range(start, start + len(chunk))),
            num_inference_steps=args.num_inference_steps,
        ).images
    pixels = np.stack([np.asarray(image.convert("L")).reshape(-1) / 255 for image in images])
    return images, pixels, np.array(labels)


def main(args: ScoreArguments) -> dict:
    for name in ("num_images", "num_inference_steps", "batch_size"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(args, name)}.")
    if not (Path(args.pipeline) / "model_index.json").is_file():
        raise FileNotFoundError(
            f"--pipeline {args.pipeline} is not a saved pipeline's folder: no model_index.json in it."
        )
    real, real_labels = read_digits(Path(args.data_dir) / "train")
    held_out, held_out_labels = read_digits(Path(args.data_dir) / "test")
    classifier = SVC(C=10).fit(real, real_labels)
    scores = {"classifier on held-out real digits": float((classifier.predict(held_out) == held_out_labels).mean())}
    pipeline = DiffusionPipeline.from_pretrained(
        args.pipeline, trust_remote_code=True, dtype=getattr(torch, args.dtype)
    )
    suffix = "" if args.dtype == "float32" else f"_{args.dtype}"
    pipeline.set_progress_bar_config(disable=True)
    for name, guidance_scale in ((f"guidance {pipeline.config.guidance_scale:g}", None), ("no guidance", 1.0)):
        images, pixels, labels = generate(pipeline, args, guidance_scale)
        correct = classifier.predict(pixels) == labels
        by_class = [float(correct[labels == label].mean()) for label in range(10)]
        spread = precision_recall(pixels, real)
        nearest = NearestNeighbors(n_neighbors=1).fit(real)
        scores[name] = {
            "recognised": float(correct.mean()),
            "worst class": f"{int(np.argmin(by_class))} ({min(by_class):.3f})",
            "precision (k=3)": spread["precision"],
            "recall (k=3)": spread["recall"],
            "mean distance to the nearest real training digit": float(nearest.kneighbors(pixels)[0].mean()),
        }
        grid = make_grid([image.resize((32, 32), Image.NEAREST) for image in images[:100]], columns=10)
        grid.save(Path(args.pipeline).parent / f"digits_{name.replace(' ', '_')}{suffix}.png")
    scores["mean distance of a held-out real digit to the nearest training digit"] = float(
        NearestNeighbors(n_neighbors=1).fit(real).kneighbors(held_out)[0].mean()
    )
    print(json.dumps(scores, indent=1))
    (Path(args.pipeline).parent / f"scores{suffix}.json").write_text(json.dumps(scores, indent=1), encoding="utf-8")
    return scores


if __name__ == "__main__":
    run(lambda: main(parse(ScoreArguments, __doc__.partition("\n")[0])))
