"""The demo's data and teacher: scikit-learn's scanned digits as an image folder, and a small DINOv2 trained on them.

    python training/prepare_teacher.py --output_dir outputs/demo

The digits (1,797 scans of handwriting, 8×8 pixels, UCI Optical Recognition of Handwritten Digits) are enlarged to 16×16
and written as PNG files to train/CLASS/ and, every fifth, to test/CLASS/. The teacher, written to teacher/ in the Hub's
layout, learns to name the training digits from its class token and, each for itself, its patch tokens, shifted and noised
at random; what the demo then aligns to are its patch tokens. It stands in for facebook/dinov2-base, whose weights are a
download.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_digits
from tqdm.auto import trange
from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model

from pixelrepa_diffusers.cli import parse, run
from pixelrepa_diffusers.files import only_writer


NUM_CLASSES = 10


@dataclass
class PrepareTeacherArguments:
    output_dir: str = field(default="outputs/demo", metadata={"help": "Where train/, test/ and teacher/ are written."})
    steps: int = field(default=300, metadata={"help": "Training steps of the teacher."})
    seed: int = field(default=0, metadata={"help": "Seed of its weights and of its batches."})


def digits() -> tuple[np.ndarray, np.ndarray]:
    """(1797, 16, 16) uint8 images and their classes."""
    data = load_digits()
    scans = np.round(data.images * (255 / 16)).astype(np.uint8)
    return np.stack([np.asarray(Image.fromarray(scan).resize((16, 16), Image.BICUBIC)) for scan in scans]), data.target


def write_images(output_dir: Path, images: np.ndarray, labels: np.ndarray) -> None:
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        folder = output_dir / ("test" if index % 5 == 4 else "train") / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{index:04d}.png")


def train_teacher(images: np.ndarray, labels: np.ndarray, steps: int, seed: int) -> Dinov2Model:
    torch.manual_seed(seed)
    config = Dinov2Config(
        image_size=28, patch_size=7, hidden_size=64, num_hidden_layers=4, num_attention_heads=4, mlp_ratio=4
    )
    teacher = Dinov2Model(config).train()
    heads = torch.nn.ModuleList([torch.nn.Linear(config.hidden_size, NUM_CLASSES) for _ in range(2)])
    optimizer = torch.optim.AdamW([*teacher.parameters(), *heads.parameters()], lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps)
    pixels = torch.from_numpy(images).float().div(127.5).sub(1)[:, None]
    pixels = F.interpolate(pixels, size=28, mode="bicubic", antialias=True).expand(-1, 3, -1, -1)
    targets = torch.from_numpy(labels)
    bar = trange(steps, desc="teacher")
    for _ in bar:
        chosen = torch.randint(len(pixels), (128,))
        shift = torch.randint(-3, 4, (2,)).tolist()
        batch = pixels[chosen].roll(shift, dims=(2, 3)) + 0.3 * torch.rand(128, 1, 1, 1) * torch.randn(128, 3, 28, 28)
        tokens = teacher(batch).last_hidden_state
        scores = heads[0](tokens[:, 0])
        patch_scores = heads[1](tokens[:, 1:]).flatten(0, 1)
        loss = F.cross_entropy(scores, targets[chosen])
        loss = loss + F.cross_entropy(patch_scores, targets[chosen].repeat_interleave(tokens.shape[1] - 1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        bar.set_postfix(accuracy=f"{(scores.argmax(-1) == targets[chosen]).float().mean():.3f}")
    return teacher.eval()


def main(args: PrepareTeacherArguments) -> None:
    output_dir = Path(args.output_dir)
    if args.steps < 1:
        raise ValueError(f"--steps must be at least 1, got {args.steps}.")
    if not 0 <= args.seed < 2**63:
        raise ValueError(f"--seed must lie in [0, 2^63), got {args.seed}.")
    with only_writer(output_dir):
        prepare(output_dir, args.steps, args.seed)
    print(f"Wrote {output_dir}/train, {output_dir}/test and {output_dir}/teacher.")


def prepare(output_dir: Path, steps: int, seed: int) -> None:
    existing = [name for name in ("train", "test", "teacher") if (output_dir / name).exists()]
    if existing:
        raise SystemExit(
            f"{output_dir} already has {', '.join(existing)}: remove them or choose another --output_dir."
        )
    beside = output_dir / ".incomplete"
    shutil.rmtree(beside, ignore_errors=True)
    images, labels = digits()
    write_images(beside, images, labels)
    training = np.arange(len(images)) % 5 != 4
    teacher = train_teacher(images[training], labels[training], steps, seed)
    teacher.save_pretrained(beside / "teacher")
    BitImageProcessorPil(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    ).save_pretrained(beside / "teacher")
    for path in beside.iterdir():
        path.rename(output_dir / path.name)
    beside.rmdir()


if __name__ == "__main__":
    run(lambda: main(parse(PrepareTeacherArguments, __doc__.partition("\n")[0])))
