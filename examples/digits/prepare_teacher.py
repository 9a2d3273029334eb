"""Prepare the demo: scikit-learn's scanned digits as an image folder, and a small DINOv2 trained on them.

    python examples/digits/prepare_teacher.py --output_dir outputs/demo

The 1,797 scans (8×8 pixels, UCI Optical Recognition of Handwritten Digits) are enlarged to 16×16 and written to
train/CLASS/ and, every fifth one, to test/CLASS/. The teacher learns to classify the training digits, from its class
token and from each patch token. It stands in for facebook/dinov2-base, so the demo needs no download.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_digits
from tqdm.auto import trange
from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model

from pixelrepa_diffusers.cli import flag, parse, run
from pixelrepa_diffusers.files import write_folder


@dataclass
class PrepareTeacherArguments:
    output_dir: Path = flag(Path("outputs/demo"), "Folder for train/, test/ and teacher/.")
    steps: int = flag(300, "Training steps of the teacher.", ge=1)
    seed: int = flag(0, "Seed of the teacher's weights and batches.", ge=0)


def train_teacher(images: np.ndarray, labels: np.ndarray, steps: int, seed: int) -> Dinov2Model:
    torch.manual_seed(seed)
    config = Dinov2Config(
        image_size=28, patch_size=7, hidden_size=64, num_hidden_layers=4, num_attention_heads=4, mlp_ratio=4
    )
    teacher = Dinov2Model(config).train()
    class_head, patch_head = (torch.nn.Linear(teacher.config.hidden_size, 10) for _ in range(2))
    parameters = [*teacher.parameters(), *class_head.parameters(), *patch_head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps)
    pixels = torch.from_numpy(images).float().div(127.5).sub(1)[:, None]
    pixels = F.interpolate(pixels, size=28, mode="bicubic", antialias=True).expand(-1, 3, -1, -1)
    targets = torch.from_numpy(labels)
    bar = trange(steps, desc="teacher", disable=None)
    for _ in bar:
        chosen = torch.randint(len(pixels), (128,))
        shift = torch.randint(-3, 4, (2,)).tolist()
        batch = pixels[chosen].roll(shift, dims=(2, 3)) + 0.3 * torch.rand(128, 1, 1, 1) * torch.randn(128, 3, 28, 28)
        tokens = teacher(batch).last_hidden_state  # (B, 1 + N, D)
        scores = class_head(tokens[:, 0])
        patch_scores = patch_head(tokens[:, 1:]).flatten(0, 1)
        loss = F.cross_entropy(scores, targets[chosen])
        loss = loss + F.cross_entropy(patch_scores, targets[chosen].repeat_interleave(tokens.shape[1] - 1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        bar.set_postfix(accuracy=f"{(scores.argmax(-1) == targets[chosen]).float().mean():.3f}", refresh=False)
    return teacher.eval()


def main(args: PrepareTeacherArguments) -> None:
    folder = args.output_dir / "teacher"
    if folder.exists():
        raise FileExistsError(f"{folder} exists: remove it or choose another --output_dir.")
    data = load_digits()
    scans = [Image.fromarray(scan) for scan in np.round(data.images * (255 / 16)).astype(np.uint8)]
    images = np.stack([np.asarray(scan.resize((16, 16), Image.BICUBIC)) for scan in scans])
    held_out = np.arange(len(images)) % 5 == 4
    for index, (image, label) in enumerate(zip(images, data.target, strict=True)):
        path = args.output_dir / ("test" if held_out[index] else "train") / str(label) / f"{index:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    teacher = train_teacher(images[~held_out], data.target[~held_out], args.steps, args.seed)
    processor = BitImageProcessorPil(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    write_folder(folder, lambda path: (teacher.save_pretrained(path), processor.save_pretrained(path)))
    print(f"Wrote {args.output_dir}/train, {args.output_dir}/test and {folder}.")


if __name__ == "__main__":
    run(lambda: main(parse(PrepareTeacherArguments, __doc__.partition("\n")[0])))
