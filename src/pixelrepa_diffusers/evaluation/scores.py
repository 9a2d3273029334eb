# Copyright 2026 The pixelrepa_diffusers authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The metrics as `evaluate` modules. Importing this file imports `evaluate`, which takes seconds: use `metrics.load`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import numpy as np
import torch
import torch.nn as nn

from .networks import InceptionNetwork, VisionEncoderNetwork, extract, network_name, network_sha256
from .reference import FeatureStatistics
from .statistics import FeatureBank, FeatureMoments, InceptionScoreSums, gather, precision_recall


_INPUTS = """
Args:
    images: PIL images or uint8 arrays (H, W, 3) of one size, or one torch.uint8 tensor (B, 3, H, W); or instead
    features: an array or tensor (B, D) computed elsewhere ({row}).
{options}
Batches go to `add_batch(images=…)` or `add_batch(features=…)` and then `compute(…)`, or all at once to `compute`. Under
accelerate every process adds its own images (none is fine), every process calls `compute`, and every one gets the result.
"""
_REFERENCE = "    reference: a FeatureStatistics or the path of one; see pipelines/prepare_reference.py.\n"


class StreamingMetric(evaluate.Metric):
    """An `evaluate.Metric` that takes its batches into accumulators as they come.

    `evaluate` itself writes every input to a file (images as PNG), hands all of them to `_compute` at the end, and needs a
    shared file system and a batch on every process. Adding and computing are therefore ours; the rest is its own.

    Args:
        network (`nn.Module`, *optional*): A feature network (see `metrics.networks`); the metric's own by default, made when
            the first images come.
        batch_size (`int`, defaults to 64): Images that go through the network at once.
        kwargs: for `evaluate.Metric`, e.g. `cache_dir`.
    """

    summary: str
    row = "one row per image"
    options = ""
    citation_text: str
    output = "features"  # which of the network's outputs is one row of input

    def __init__(self, network: nn.Module | None = None, batch_size: int = 64, **kwargs):
        if kwargs.get("num_process", 1) != 1:
            raise ValueError("Start several processes with accelerate; num_process is not needed and must stay 1.")
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size must be an integer of at least 1, got {batch_size!r}.")
        if network is not None and not isinstance(network, nn.Module):
            raise ValueError(f"network must be a torch.nn.Module or None, got {network!r}.")
        super().__init__(**kwargs)
        self.network, self.batch_size = network, batch_size
        self._reset()

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.summary,
            citation=self.citation_text,
            inputs_description=_INPUTS.format(row=self.row, options=self.options),
            features=[
                datasets.Features({"images": datasets.Image()}),
                datasets.Features({"features": datasets.Sequence(datasets.Value("float32"))}),
            ],
        )

    def default_network(self) -> nn.Module:
        return InceptionNetwork()

    def new_accumulator(self) -> Any:
        raise NotImplementedError

    def _reset(self) -> None:
        self._accumulator = self.new_accumulator()
        self._used_network = False

    def add_batch(self, *, images: Sequence | None = None, features: Any | None = None) -> None:
        """Adds images, or features computed elsewhere. See `inputs_description`."""
        if (images is None) == (features is None):
            raise ValueError("Give either images or features.")
        if features is not None:
            self._accumulator.update(features)
            return
        if self.network is None:
            self.network = self.default_network()
        self._used_network = True
        for start in range(0, len(images), self.batch_size):
            outputs = extract(self.network, images[start : start + self.batch_size])
            if self.output not in outputs:
                raise ValueError(
                    f"{self.name} needs {self.output}, the network gives {sorted(outputs)}: use a classifier."
                )
            self._accumulator.update(outputs[self.output])

    def add(self, *, images: Any | None = None, features: Any | None = None) -> None:
        """Adds one image, or the features of one."""
        self.add_batch(
            images=None if images is None else [images],
            features=None if features is None else np.asarray(features)[None],
        )

    def compute(
        self,
        *,
        predictions: None = None,
        references: None = None,
        images: Sequence | None = None,
        features: Any | None = None,
        **options,
    ) -> dict[str, float]:
        """The metric over everything added since the last `compute` that succeeded. See `inputs_description`."""
        # evaluate.combine passes these two names to every metric, as None.
        if predictions is not None or references is not None:
            raise ValueError(f"{self.name} takes images or features, and its reference statistics as `reference`.")
        if images is not None or features is not None:
            self.add_batch(images=images, features=features)
        result = self._compute(gather(self._accumulator), self.network if self._used_network else None, **options)
        self._reset()
        return result


def _load_reference(reference: FeatureStatistics | str | os.PathLike) -> FeatureStatistics:
    if isinstance(reference, FeatureStatistics):
        return reference
    if not isinstance(reference, str | os.PathLike):
        raise ValueError(f"reference must be a FeatureStatistics or the path of one, got {reference!r}.")
    return FeatureStatistics.load(reference)


class FID(StreamingMetric):
    summary = (
        "Fréchet Inception Distance: the Fréchet distance of Gaussians fitted to Inception features; lower is better."
    )
    options = _REFERENCE
    citation_text = "Heusel et al., GANs Trained by a Two Time-Scale Update Rule, 2017, arXiv 1706.08500"
    result = "fid"

    def new_accumulator(self) -> FeatureMoments:
        return FeatureMoments()

    def _compute(self, moments, network, reference) -> dict[str, float]:
        origin = {}
        if network is not None:
            origin = {"network": network_name(network), "network_sha256": network_sha256(network)}
        return {self.result: FeatureStatistics.from_moments(moments, **origin).distance(_load_reference(reference))}


class FDDINOv2(FID):
    summary = (
        "Fréchet distance of DINOv2 features (FD-DINOv2), which follows human judgement better than Inception's; lower is "
        "better."
    )
    citation_text = "Stein et al., Exposing flaws of generative model evaluation metrics, 2023, arXiv 2306.04675"
    result = "fd_dinov2"

    def default_network(self) -> nn.Module:
        return VisionEncoderNetwork.from_pretrained()


class InceptionScore(StreamingMetric):
    """Keeps float32 logits until `compute`, because the splits depend on the number of images: 4 kB per image. Where that
    number is known beforehand, `metrics.InceptionScoreSums` needs no such memory."""

    summary = "Inception Score: how sure and how varied a classifier's predictions are; higher is better."
    row = "the logits of one image"
    options = (
        "    splits (int, 10), shuffle_seed (int or None, 2020): see metrics.InceptionScoreSums. The order of images is the\n"
        "        order they are added in, process by process.\n"
    )
    citation_text = "Salimans et al., Improved Techniques for Training GANs, 2016, arXiv 1606.03498"
    output = "logits"

    def new_accumulator(self) -> FeatureBank:
        return FeatureBank(np.float32)

    def _compute(self, bank, network, splits: int = 10, shuffle_seed: int | None = 2020) -> dict[str, float]:
        logits = bank.features
        sums = InceptionScoreSums(len(logits), splits, shuffle_seed)
        for indices in np.array_split(np.arange(len(logits)), -(-len(logits) // 1024)):
            sums.update(logits[indices], indices)
        return sums.compute()


class PrecisionRecall(StreamingMetric):
    """Keeps half-precision features until `compute`: 2·D bytes per image.

    The default network is Inception, as in ADM's evaluation; torch-fidelity's default for this metric is VGG-16.
    """

    summary = (
        "Improved precision and recall: the share of images inside the k-nearest-neighbour balls of the other set."
    )
    options = (
        "    reference: features (M, D), or a FeatureStatistics that has features, or the path of one.\n"
        "    k (int, 3): the neighbour that a ball reaches to.\n"
    )
    citation_text = "Kynkäänniemi et al., Improved Precision and Recall Metric, 2019, arXiv 1904.06991"

    def new_accumulator(self) -> FeatureBank:
        return FeatureBank()

    def _compute(self, bank, network, reference, k: int = 3) -> dict[str, float]:
        if not isinstance(reference, (np.ndarray, torch.Tensor)):
            statistics = _load_reference(reference)
            if statistics.features is None:
                raise ValueError(
                    "The reference statistics hold no features, which precision and recall need: make them with "
                    "pipelines/prepare_reference.py --keep_features."
                )
            if network is not None and statistics.network_sha256 not in (None, network_sha256(network)):
                raise ValueError(f"The reference was made with another network: {statistics.network}.")
            reference = statistics.features
        device = next(network.parameters()).device if network is not None else "cpu"
        return precision_recall(bank.features, reference, k=k, device=device)


MODULES = {"fid": FID, "inception_score": InceptionScore, "precision_recall": PrecisionRecall, "fd_dinov2": FDDINOv2}
