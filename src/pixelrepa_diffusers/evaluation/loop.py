"""
The evaluation loop: numbered images, generated or read, through feature networks to metrics, in one pass.

Generated image i has class i mod num_classes and starts from the noise of seed + i. Whole batches of consecutive images are
dealt to the processes of accelerate, so neither the number of processes nor a restart changes an image or a batch.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from accelerate import PartialState
from tqdm.auto import tqdm

from ..images import open_image, read_image, to_uint8
from ..pipeline_pixelrepa import PixelREPAPipeline
from ..sampling import sampling_settings, seeded
from .networks import extract, network_name, network_sha256
from .reference import FeatureStatistics, load_reference, write_arrays
from .statistics import FeatureBank, FeatureMoments, InceptionScoreSums, gather, precision_recall


# Metric → its feature space and the kind of accumulator it needs.
METRICS = {
    "fid": ("inception", "moments"),
    "inception_score": ("inception", "scores"),
    "precision_recall": ("inception", "banks"),
    "fd_dinov2": ("dinov2", "moments"),
    "precision_recall_dinov2": ("dinov2", "banks"),
    "fd_teacher": ("teacher", "moments"),
    "precision_recall_teacher": ("teacher", "banks"),
}
HIGHER_IS_BETTER = ("inception_score", "precision", "recall")
NEIGHBOUR = 3  # precision and recall
SCORE_SPLITS = 10  # Inception Score
MINIMUM_IMAGES = {"moments": 2, "scores": SCORE_SPLITS, "banks": NEIGHBOUR + 1}

# Maps image numbers to torch.uint8 (B, 3, H, W).
MakeImages = Callable[[Sequence[int]], torch.Tensor]


@dataclass(frozen=True)
class FeatureSpace:
    """A feature network with the metrics that use its features, and the statistics of the real images."""

    name: str  # "inception", "dinov2" or "teacher"
    network: nn.Module
    metrics: tuple[str, ...]  # names in `METRICS`
    reference: FeatureStatistics | None = None

    @property
    def kinds(self) -> set[str]:
        return {METRICS[metric][1] for metric in self.metrics}

    def describe(self) -> dict[str, str]:
        return {"network": network_name(self.network), "sha256": network_sha256(self.network)}


def open_spaces(
    metrics: Sequence[str],
    num_images: int,
    networks: Mapping[str, Callable[[], nn.Module]],
    references: Mapping[str, FeatureStatistics | str | os.PathLike | None],
    device: torch.device | str = "cpu",
) -> list[FeatureSpace]:
    """
    Load the networks and references of the metrics, and check all that can be checked before an image is made.

    `networks` maps a space to a function that loads its network, `references` to its statistics or their file.

    Raises:
        ValueError: If a metric needs more images or has no suitable reference.
    """
    loaded = {}
    for metric in metrics:  # references before networks, which may be downloads
        name, kind = METRICS[metric]
        if num_images < MINIMUM_IMAGES[kind]:
            raise ValueError(f"{metric} needs at least {MINIMUM_IMAGES[kind]} images, got {num_images}.")
        if kind == "scores":
            continue
        if references.get(name) is None:
            raise ValueError(
                f"{metric} needs --{name}_reference (in training: --eval_reference): see pixelrepa-prepare-reference."
            )
        if name not in loaded:
            loaded[name] = load_reference(references[name])
        if kind == "banks":
            loaded[name].require_features()

    spaces = []
    for name in dict.fromkeys(METRICS[metric][0] for metric in metrics):
        network, reference = networks[name]().to(device), loaded.get(name)
        if reference is not None:
            width = extract(network, torch.zeros(1, 3, 32, 32, dtype=torch.uint8))["features"].shape[1]
            reference.check_network(network_name(network), network_sha256(network), width)
        own_metrics = tuple(metric for metric in metrics if METRICS[metric][0] == name)
        spaces.append(FeatureSpace(name, network, own_metrics, reference))
    return spaces


class Tally:
    """The accumulators of every space by (kind, space), and the first images for a grid."""

    def __init__(self, spaces: Sequence[FeatureSpace], num_images: int, num_shown: int = 0):
        scores = partial(InceptionScoreSums, num_images, SCORE_SPLITS)
        new = {"moments": FeatureMoments, "scores": scores, "banks": FeatureBank}
        self.accumulators = {(kind, space.name): new[kind]() for space in spaces for kind in space.kinds}
        self.num_shown = num_shown
        self.shown: dict[int, np.ndarray] = {}

    def update(self, spaces: Sequence[FeatureSpace], images: torch.Tensor, indices: Sequence[int]) -> None:
        for space in spaces:
            outputs = extract(space.network, images)
            for kind in space.kinds:
                inputs = (outputs["logits"], indices) if kind == "scores" else (outputs["features"],)
                self.accumulators[kind, space.name].update(*inputs)
        for index, image in zip(indices, images, strict=True):
            if index < self.num_shown:
                self.shown[index] = image.permute(1, 2, 0).cpu().numpy()  # (H, W, 3)

    def merge(self, other: Tally) -> None:
        for key, accumulator in self.accumulators.items():
            accumulator.merge(other.accumulators[key])
        self.shown |= other.shown

    def pictures(self) -> list[np.ndarray]:
        """The first `num_shown` images in order, uint8 (H, W, 3)."""
        return [self.shown[index] for index in sorted(self.shown)]

    def save(self, path: Path, done: int, settings: dict) -> None:
        """Write the state after `done` images, with the settings they were made with, as plain arrays."""
        arrays = {"done": done, "settings": json.dumps(settings, sort_keys=True)}
        for (kind, space), accumulator in self.accumulators.items():
            state = {"features": accumulator.features} if kind == "banks" else vars(accumulator)
            arrays |= {f"{kind}/{space}/{name}": value for name, value in state.items()}
        arrays |= {f"shown/{index}": image for index, image in self.shown.items()}
        write_arrays(path, **arrays)

    def load(self, path: Path, settings: dict) -> int:
        """Restore what `save` wrote and return the number of images done."""
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
        _check_settings(path, json.loads(str(arrays["settings"])), settings)
        for (kind, space), accumulator in self.accumulators.items():
            if kind == "banks":
                accumulator.update(arrays[f"banks/{space}/features"])
                continue
            for name in vars(accumulator):
                value = arrays[f"{kind}/{space}/{name}"]
                setattr(accumulator, name, value if value.ndim else value.item())
        self.shown = {int(key.removeprefix("shown/")): arrays[key] for key in arrays if key.startswith("shown/")}
        return int(arrays["done"])


def finished_record(path: Path, settings: dict) -> dict | None:
    """The record in a metrics.json, `None` if there is no such file; a `ValueError` if its settings differ."""
    if not path.is_file():
        return None
    record = json.loads(path.read_text(encoding="utf-8"))
    _check_settings(path, {name: record.get(name) for name in settings}, settings)
    return record


def _check_settings(path: Path, stored: dict, settings: dict) -> None:
    settings = json.loads(json.dumps(settings))  # tuples become lists, as in the file
    different = sorted(name for name in stored.keys() | settings.keys() if stored.get(name) != settings.get(name))
    if different:
        changes = "; ".join(f"{name} was {stored.get(name)!r} and is {settings.get(name)!r}" for name in different)
        raise ValueError(f"{path} holds another evaluation: {changes}. Use the old settings or another output folder.")


def accumulate(
    make_images: MakeImages,
    num_images: int,
    spaces: Sequence[FeatureSpace],
    batch_size: int,
    *,
    num_shown: int = 0,
    state_path: Path | None = None,
    settings: dict | None = None,
    chunk_size: int = 5000,
    description: str = "images",
) -> Tally:
    """
    Make images 0 … num_images − 1 once and run them through every space, shared among the processes of accelerate.

    Every process must call this function and gets the same tally, with the first `num_shown` images. The file `state_path` is
    written every `chunk_size` images, and resumed from if it was written with the same `settings` (JSON values).
    """
    process, settings = PartialState(), settings or {}
    total = Tally(spaces, num_images, num_shown)
    start = total.load(state_path, settings) if state_path is not None and state_path.exists() else 0
    batches = [range(first, min(first + batch_size, num_images)) for first in range(start, num_images, batch_size)]
    # Chunks are whole rounds of all processes, so that none waits for another.
    chunk = -(-chunk_size // (batch_size * process.num_processes)) * process.num_processes
    disable = None if process.is_main_process else True  # None: only in a terminal
    with tqdm(total=num_images, initial=start, desc=description, disable=disable) as bar:
        for first in range(0, len(batches), chunk):
            part = Tally(spaces, num_images, num_shown)
            for place, batch in enumerate(batches[first : first + chunk]):
                if place % process.num_processes == process.process_index:
                    part.update(spaces, make_images(batch), batch)
                bar.update(len(batch))
            total.merge(gather(part))
            if state_path is not None and process.is_main_process:
                total.save(state_path, batches[first : first + chunk][-1].stop, settings)
    return total


def results(tally: Tally, spaces: Sequence[FeatureSpace]) -> dict[str, float]:
    """The metrics of a complete tally, in the order of the spaces."""
    values = {}
    for space in spaces:
        for metric in space.metrics:
            kind = METRICS[metric][1]
            if kind == "moments":
                values[metric] = feature_statistics(tally, space).distance(space.reference)
            elif kind == "scores":
                values |= tally.accumulators[kind, space.name].compute()
            else:
                generated, real = tally.accumulators[kind, space.name].features, space.reference.features
                device = next(space.network.parameters()).device
                pair = precision_recall(generated, real, k=NEIGHBOUR, device=device)
                values |= {name + metric.removeprefix("precision_recall"): value for name, value in pair.items()}
    return values


def feature_statistics(tally: Tally, space: FeatureSpace) -> FeatureStatistics:
    """Mean and covariance of a tally's features; the space has a Fréchet distance among its metrics."""
    return FeatureStatistics.from_moments(tally.accumulators["moments", space.name], network=space.network)


def pipeline_images(
    pipeline: PixelREPAPipeline,
    num_images: int,
    seed: int = 0,
    num_inference_steps: int = 50,
    guidance_scale: float | None = None,
    guidance_interval: Sequence[float] | None = None,
    **model_guidance,
) -> MakeImages:
    """
    Generated images by number, equally many of each class, rounded to 8 bits like saved files.

    Image i starts from the noise of seed + i. Guidance arguments default to the values saved with the pipeline;
    `model_guidance` are those of self-guidance and autoguidance. Settings are checked before an image is made.
    """
    config = pipeline.transformer.config
    if num_images % config.num_classes:
        raise ValueError(
            f"The number of images must be a multiple of the model's {config.num_classes} classes, got {num_images}."
        )
    given = {"guidance_scale": guidance_scale, "guidance_interval": guidance_interval, **model_guidance}
    settings = sampling_settings(pipeline, 0, num_inference_steps, given)

    def make_images(indices: Sequence[int]) -> torch.Tensor:
        labels = [index % config.num_classes for index in indices]
        generators = seeded(seed + index for index in indices)
        return to_uint8(pipeline(labels, generator=generators, output_type="pt", **settings).images, (0, 1))

    return make_images


def evaluate_pipeline(
    pipeline: PixelREPAPipeline,
    spaces: Sequence[FeatureSpace],
    num_images: int,
    batch_size: int = 64,
    **sampling,
) -> dict[str, float]:
    """
    Measure a pipeline; every process must call this function with the same weights, and gets the metrics.

    Global random state is not used. `sampling` are arguments of [`pipeline_images`].
    """
    make_images = pipeline_images(pipeline, num_images, **sampling)
    return results(accumulate(make_images, num_images, spaces, batch_size), spaces)


def file_images(paths: Sequence[Path], size: int | None = None) -> MakeImages:
    """Image files by number, as RGB: all of one size, or cropped to squares of `size`."""
    path_of_size = {}
    for path in paths if size is None else ():
        with open_image(path) as image:  # header only
            path_of_size.setdefault(image.size, path)
    if len(path_of_size) > 1:
        sizes = ", ".join(f"{path} has {w}×{h} pixels" for (w, h), path in [*path_of_size.items()][:2])
        raise ValueError(
            f"The images must have one size: {sizes}. Choose some with a pattern such as 'images/0*.png'."
        )
    return lambda indices: torch.stack([read_image(paths[index], size) for index in indices])
