# Copyright 2026 The pixelrepa_diffusers authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Evaluation in one pass: images by number, from a pipeline or from files, to metrics in several feature spaces.

    networks = {"teacher": lambda: VisionEncoderNetwork.from_pretrained("teacher", image_size=28)}
    spaces = open_spaces(["fd_teacher"], num_images=1000, networks=networks, references={"teacher": "test.npz"})
    evaluate_pipeline(pipeline, spaces, num_images=1000)                     # {"fd_teacher": …}, on every process

Image i is of class i mod num_classes and starts from the noise of seed + i, so the set of images is a function of the
weights and the settings alone. Whole batches of consecutive images are dealt to the processes of accelerate and each image
is made once, so neither the number of processes nor a restart changes a batch.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from accelerate import PartialState
from PIL import ExifTags
from tqdm.auto import tqdm

from ..files import write_atomically
from ..images import list_images, open_image, read_image, to_uint8  # noqa: F401
from ..pipeline_pixelrepa import PixelREPAPipeline
from ..sampling import seeded
from .networks import extract, network_name, network_sha256
from .reference import FeatureStatistics
from .statistics import FeatureBank, FeatureMoments, InceptionScoreSums, gather, precision_recall


# Metric → feature space, and what `Tally` accumulates for it.
METRICS = {
    "fid": ("inception", "moments"),
    "inception_score": ("inception", "scores"),
    "precision_recall": ("inception", "bank"),
    "fd_dinov2": ("dinov2", "moments"),
    "precision_recall_dinov2": ("dinov2", "bank"),
    "fd_teacher": ("teacher", "moments"),
    "precision_recall_teacher": ("teacher", "bank"),
}
HIGHER_IS_BETTER = ("inception_score", "precision", "recall")
NEIGHBOUR = 3  # k of precision and recall (arXiv 1904.06991)
SCORE_SPLITS = 10  # of the Inception Score

# What makes the images with these numbers: torch.uint8 (B, 3, H, W).
MakeImages = Callable[[Sequence[int]], torch.Tensor]


@dataclass(frozen=True)
class FeatureSpace:
    """A feature network, what it is asked for, and the reference its features are compared with.

    Args:
        name: "inception", "dinov2" or "teacher".
        network: see `metrics.networks`.
        metrics: of `METRICS`, all of this space.
        reference: statistics of the real images; None where no metric needs them.
    """

    name: str
    network: nn.Module
    metrics: tuple[str, ...]
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
    references: Mapping[str, FeatureStatistics | str | os.PathLike],
    device: torch.device | str = "cpu",
) -> list[FeatureSpace]:
    """The feature spaces that `metrics` need, with everything checked that can be without an image.

    Args:
        metrics: names in `METRICS`.
        num_images: of the evaluation.
        networks: space to a function that loads its network; only those that are needed are called.
        references: space to its reference statistics or their file.
        device: where the networks run.

    Raises:
        ValueError, FileNotFoundError: an unknown or repeated metric, too few images for one, a reference that is missing,
            unreadable, of another network or width, or without the features that precision and recall need.
    """
    unknown = [metric for metric in metrics if metric not in METRICS]
    if unknown or not metrics or len(set(metrics)) < len(metrics):
        raise ValueError(f"The metrics must be different ones of {', '.join(METRICS)}, got {list(metrics)}.")
    fewest = {"moments": 2, "scores": SCORE_SPLITS, "bank": NEIGHBOUR + 1}
    for metric in metrics:
        if num_images < fewest[METRICS[metric][1]]:
            raise ValueError(f"{metric} needs at least {fewest[METRICS[metric][1]]} images, got {num_images}.")

    loaded = {}
    for metric in metrics:  # all references before any network, which may be a large file or a download
        name, kind = METRICS[metric]
        if kind == "scores":
            continue
        if references.get(name) is None:
            raise ValueError(
                f"{metric} compares with reference statistics in the space {name!r}, and none are given. Make them "
                f"with pipelines/prepare_reference.py and pass them (--{name}_reference FILE)."
            )
        if name not in loaded:
            reference = references[name]
            loaded[name] = reference if isinstance(reference, FeatureStatistics) else FeatureStatistics.load(reference)
        if kind == "bank" and loaded[name].features is None:
            raise ValueError(
                f"{metric} needs the reference's features, and {references[name]} holds none: make it again with "
                "pipelines/prepare_reference.py --keep_features."
            )

    spaces = []
    for name in dict.fromkeys(METRICS[metric][0] for metric in metrics):
        network = networks[name]().to(device)
        reference = loaded.get(name)
        width = extract(network, torch.zeros(1, 3, 32, 32, dtype=torch.uint8))["features"].shape[1]
        if reference is not None and len(reference.mu) != width:
            raise ValueError(
                f"The reference {references[name]} has features of width {len(reference.mu)}, {network_name(network)} "
                f"gives {width}: they come from different networks."
            )
        if reference is not None and reference.network_sha256 not in (None, network_sha256(network)):
            raise ValueError(
                f"The reference {references[name]} was made with another network ({reference.network}) than "
                f"{network_name(network)}: make it again with the one in use."
            )
        spaces.append(FeatureSpace(name, network, tuple(m for m in metrics if METRICS[m][0] == name), reference))
    return spaces


class Tally:
    """What is kept of the images seen so far: the accumulators of every space, and the first images for a grid."""

    def __init__(self, spaces: Sequence[FeatureSpace], num_images: int, num_shown: int = 0):
        self.moments = {space.name: FeatureMoments() for space in spaces if "moments" in space.kinds}
        self.scores = {
            space.name: InceptionScoreSums(num_images, SCORE_SPLITS) for space in spaces if "scores" in space.kinds
        }
        self.banks = {space.name: FeatureBank() for space in spaces if "bank" in space.kinds}
        self.num_shown = num_shown
        self.shown: dict[int, np.ndarray] = {}

    def update(self, spaces: Sequence[FeatureSpace], images: torch.Tensor, indices: Sequence[int]) -> None:
        for space in spaces:
            outputs = extract(space.network, images)
            if space.name in self.moments:
                self.moments[space.name].update(outputs["features"])
            if space.name in self.banks:
                self.banks[space.name].update(outputs["features"])
            if space.name in self.scores:
                self.scores[space.name].update(outputs["logits"], indices)
        for index, image in zip(indices, images, strict=True):
            if index < self.num_shown:
                self.shown[index] = image.permute(1, 2, 0).cpu().numpy()  # (H, W, 3)

    def merge(self, other: Tally) -> None:
        for mine, others in zip(self._groups(), other._groups(), strict=True):
            for name, accumulator in mine.items():
                accumulator.merge(others[name])
        self.shown |= other.shown

    def _groups(self) -> tuple[dict, dict, dict]:
        return self.moments, self.scores, self.banks

    def pictures(self) -> list[np.ndarray]:
        """The first `num_shown` images in order, uint8 (H, W, 3)."""
        return [self.shown[index] for index in sorted(self.shown)]

    def save(self, path: Path, done: int, settings: dict) -> None:
        """Writes everything as plain arrays, with the number of images done and the settings they were made with."""
        arrays = {"done": done, "settings": json.dumps(settings, sort_keys=True)}
        for group, accumulators in (("moments", self.moments), ("scores", self.scores)):
            for name, accumulator in accumulators.items():
                values = {key: value for key, value in vars(accumulator).items() if value is not None}
                arrays |= {f"{group}/{name}/{key}": value for key, value in values.items()}
        arrays |= {f"banks/{name}": bank.features for name, bank in self.banks.items()}
        arrays |= {f"shown/{index}": image for index, image in self.shown.items()}

        def write(temporary: Path) -> None:
            with temporary.open("wb") as file:
                np.savez(file, **arrays)

        write_atomically(path, write)

    def load(self, path: Path, settings: dict) -> int:
        """Takes up what `save` wrote and returns the number of images done. ValueError for other settings."""
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = dict(file)
            stored, done = json.loads(str(arrays.pop("settings"))), int(arrays.pop("done"))
        except (
            *(ValueError, OSError, EOFError, KeyError, TypeError, AttributeError, RecursionError, MemoryError),
            zipfile.BadZipFile,
        ) as error:
            raise ValueError(f"{path} cannot be read ({error}): remove it to start this evaluation again.") from error
        _check_settings(stored, settings, path)
        groups = (("moments", self.moments), ("scores", self.scores))
        accumulators = {f"{group}/{name}": one for group, ones in groups for name, one in ones.items()}
        for key, array in arrays.items():
            group, _, rest = key.partition("/")
            name, _, attribute = rest.partition("/")
            if group == "shown" and name.isdecimal():
                self.shown[int(name)] = array
            elif group == "banks" and name in self.banks:
                self.banks[name].update(array)
            elif f"{group}/{name}" in accumulators and attribute in vars(accumulators[f"{group}/{name}"]):
                setattr(accumulators[f"{group}/{name}"], attribute, array if array.ndim else array.item())
            else:
                raise ValueError(f"{path} holds the unknown {key!r}: remove it to start this evaluation again.")
        return done


def _check_settings(stored: dict, settings: dict, path: Path) -> None:
    if not isinstance(stored, dict):
        raise ValueError(f"{path} holds no settings but a {type(stored).__name__}: remove it to measure again.")
    now = json.loads(json.dumps(settings))
    different = sorted(name for name in stored.keys() | now.keys() if stored.get(name) != now.get(name))
    if different:
        changes = "; ".join(f"{name} was {stored.get(name)!r} and is {now.get(name)!r}" for name in different)
        raise ValueError(
            f"{path} holds another evaluation: {changes}. Go on with the old settings, or choose another folder."
        )


def finished_record(path: Path, settings: dict) -> dict | None:
    """The metrics.json at `path`, None where there is none yet. ValueError when it was measured with other settings."""
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}): remove it to measure again.") from None
    stored = {name: record.get(name) for name in settings} if isinstance(record, dict) else record
    _check_settings(stored, settings, path)
    return record


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
    """Makes images 0 … num_images − 1 and runs them through every space, shared among the processes of accelerate.

    Every process must call it and gets the same tally. No image is made twice, and a process without a batch at the end
    waits for the others.

    Args:
        make_images: makes the images of a batch.
        batch_size: images that are made, and go through the networks, at once.
        num_shown: the first images, kept for a grid.
        state_path: what has been merged is kept here, at least every `chunk_size` images, and taken up where the file
            exists, by any number of processes.
        settings: JSON values that shape the images and features; a state of other settings is refused.
    """
    process = PartialState()
    total, start = Tally(spaces, num_images, num_shown), 0
    if state_path is not None and state_path.exists():
        start = total.load(state_path, settings)
    batches = [range(first, min(first + batch_size, num_images)) for first in range(start, num_images, batch_size)]
    # Whole rounds of all processes, so that none waits at the end of a chunk.
    chunk = -(-chunk_size // (batch_size * process.num_processes)) * process.num_processes
    with tqdm(total=num_images, initial=start, desc=description, disable=not process.is_main_process) as bar:
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
    """The metrics of a complete tally, in the order they were asked for."""
    values = {}
    for space in spaces:
        for metric in space.metrics:
            kind = METRICS[metric][1]
            if kind == "moments":
                values[metric] = feature_statistics(tally, space).distance(space.reference)
            elif kind == "scores":
                values |= tally.scores[space.name].compute()
            else:
                pair = precision_recall(
                    tally.banks[space.name].features,
                    space.reference.features,
                    k=NEIGHBOUR,
                    device=next(space.network.parameters()).device,
                )
                values |= {name + metric.removeprefix("precision_recall"): value for name, value in pair.items()}
    return values


def feature_statistics(tally: Tally, space: FeatureSpace) -> FeatureStatistics:
    """Mean and covariance of a tally's features in a space that has a Fréchet distance among its metrics."""
    return FeatureStatistics.from_moments(
        tally.moments[space.name], network=network_name(space.network), network_sha256=network_sha256(space.network)
    )


def pipeline_images(
    pipeline: PixelREPAPipeline,
    num_images: int,
    seed: int = 0,
    num_inference_steps: int = 50,
    guidance_scale: float | None = None,
    guidance_interval: Sequence[float] | None = None,
) -> MakeImages:
    """Generated images by number, as many of each class, rounded to 8 bits as if saved.

    Args:
        num_images: a multiple of the number of classes.
        seed: image i starts from the noise of seed + i.
        num_inference_steps, guidance_scale, guidance_interval: see [`PixelREPAPipeline`]; None means the saved value.

    Raises:
        ValueError: a number of images that is no multiple of the classes, a model whose images are not RGB, seeds that do
            not fit 63 bits, or settings the pipeline refuses.
    """
    config = pipeline.transformer.config
    if config.in_channels != 3:
        raise ValueError(f"The feature networks take RGB images; this model makes {config.in_channels} channels.")
    if num_images < 1 or num_images % config.num_classes:
        nearest = max(1, round(num_images / config.num_classes)) * config.num_classes
        raise ValueError(
            f"The number of images must be a multiple of the model's {config.num_classes} classes, so that each has as "
            f"many; got {num_images}. The nearest is {nearest}."
        )
    if not 0 <= seed <= 2**63 - num_images:
        raise ValueError(f"Seeds {seed} … {seed + num_images - 1} must lie in [0, 2^63).")
    settings = {
        "guidance_scale": pipeline.config.guidance_scale if guidance_scale is None else guidance_scale,
        "guidance_interval": list(
            pipeline.config.guidance_interval if guidance_interval is None else guidance_interval
        ),
        "num_inference_steps": num_inference_steps,
    }
    pipeline.check_inputs(
        0, *settings.values(), generator=None, latents=None, output_type="pt", callback_on_step_end_tensor_inputs=[]
    )

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
    seed: int = 0,
    num_inference_steps: int = 50,
    guidance_scale: float | None = None,
    guidance_interval: Sequence[float] | None = None,
) -> dict[str, float]:
    """The metrics of a pipeline, on every process; each process must call it with the same weights.

    Args and errors: see `pipeline_images` and `accumulate`. No global random state is used, so it may run inside training.
    """
    make_images = pipeline_images(pipeline, num_images, seed, num_inference_steps, guidance_scale, guidance_interval)
    return results(accumulate(make_images, num_images, spaces, batch_size), spaces)


# -------------------------------------------------------------------------------------------------------------- files


def file_images(paths: Sequence[Path]) -> MakeImages:
    """Image files by number, made RGB by [`~images.to_rgb`], otherwise as they are.

    Raises:
        ValueError: sizes differ; the first odd file is named.
    """
    sizes = {}
    for path in paths:  # headers only
        with open_image(path) as image:
            width, height = image.size
            if width != height and image.getexif().get(ExifTags.Base.Orientation, 1) >= 5:  # lies on its side
                width, height = height, width
            sizes.setdefault((width, height), path)
    if len(sizes) > 1:
        (first, one), (second, other) = list(sizes.items())[:2]
        raise ValueError(
            f"Images of several sizes: {one} has {first[0]}×{first[1]} pixels, {other} has {second[0]}×{second[1]}. "
            "Generated images have one size; leave out what is none of them with a pattern such as 'images/0*.png'."
        )

    def make_images(indices: Sequence[int]) -> torch.Tensor:
        return torch.stack([read_image(paths[index]) for index in indices])

    return make_images
