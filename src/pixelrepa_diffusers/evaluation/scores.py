"""The metrics as `evaluate` modules; use [`pixelrepa_diffusers.evaluation.load`], as importing `evaluate` takes seconds."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import datasets
import evaluate
import numpy as np
import torch
import torch.nn as nn

from .networks import InceptionNetwork, VisionEncoderNetwork, extract, network_name, network_sha256
from .reference import FeatureStatistics, load_reference
from .statistics import FeatureBank, FeatureMoments, InceptionScoreSums, gather, precision_recall


_INPUTS = """
Args:
    images: PIL images or uint8 arrays (H, W, 3) of one size, or a torch.uint8 tensor (B, 3, H, W); or instead
    features: an array or tensor (B, D) computed elsewhere; logits for the Inception Score.
    {options}
Pass batches to `add_batch(images=…)` or `add_batch(features=…)` and then call `compute(…)`, or pass everything to `compute`.
Under accelerate every process adds its own images and calls `compute`, and every process gets the result.
"""


class StreamingMetric(evaluate.Metric):
    """
    An `evaluate.Metric` that accumulates batches as they come.

    `evaluate` itself writes all inputs to a file (images as PNG), hands them to `_compute` at the end, and needs a shared
    file system and a batch on every process.

    Args:
        network (`nn.Module`, *optional*): Feature network; by default the metric's own, loaded with the first images.
        batch_size (`int`, *optional*, defaults to 64): Images that go through the network at once.
        kwargs: Arguments of `evaluate.Metric`, such as `cache_dir`.
    """

    summary: str
    citation_text: str
    options = "reference: a FeatureStatistics or the path of one, see pixelrepa-prepare-reference."
    output = "features"  # the output of the network that is accumulated
    default_network = InceptionNetwork
    new_accumulator = FeatureMoments

    def __init__(self, network: nn.Module | None = None, batch_size: int = 64, **kwargs):
        super().__init__(**kwargs)
        self.network, self.batch_size = network, batch_size
        self._reset()

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.summary,
            citation=self.citation_text,
            inputs_description=_INPUTS.format(options=self.options),
            features=[
                datasets.Features({"images": datasets.Image()}),
                datasets.Features({"features": datasets.Sequence(datasets.Value("float32"))}),
            ],
        )

    def _reset(self) -> None:
        self._accumulator = self.new_accumulator()
        self._origin = None  # the network that the features come from, if it is known

    def add_batch(self, *, images: Sequence | None = None, features: Any | None = None) -> None:
        """Add images, or features computed elsewhere."""
        if features is not None:
            self._accumulator.update(features)
            return
        if self.network is None:
            self.network = self.default_network()
        self._origin = self.network
        for start in range(0, len(images), self.batch_size):
            outputs = extract(self.network, images[start : start + self.batch_size])
            self._accumulator.update(outputs[self.output])

    def add(self, **example: Any) -> None:
        """Add one image, or the features of one."""
        self.add_batch(**{name: [value] for name, value in example.items()})

    def compute(self, *, images: Sequence | None = None, features: Any | None = None, **options) -> dict[str, float]:
        """The metric of everything added since the last successful `compute`."""
        if images is not None or features is not None:
            self.add_batch(images=images, features=features)
        # `evaluate.combine` passes `predictions` and `references` to every metric, as None.
        options = {name: value for name, value in options.items() if name not in ("predictions", "references")}
        result = self._compute(gather(self._accumulator), **options)
        self._reset()
        return result


class FID(StreamingMetric):
    summary = (
        "Fréchet Inception Distance: the Fréchet distance of Gaussians fitted to Inception features; lower is better."
    )
    citation_text = "Heusel et al., GANs Trained by a Two Time-Scale Update Rule, 2017, arXiv 1706.08500"
    result = "fid"

    def _compute(self, moments, reference) -> dict[str, float]:
        statistics = FeatureStatistics.from_moments(moments, network=self._origin)
        return {self.result: statistics.distance(load_reference(reference))}


class FDDINOv2(FID):
    summary = "FD-DINOv2: Fréchet distance of DINOv2 features, closer to human judgement than FID; lower is better."
    citation_text = "Stein et al., Exposing flaws of generative model evaluation metrics, 2023, arXiv 2306.04675"
    result = "fd_dinov2"
    default_network = VisionEncoderNetwork.from_pretrained


class InceptionScore(StreamingMetric):
    """
    Keeps float32 logits until `compute`, 4 kB per image, because the splits depend on the number of images.
    [`InceptionScoreSums`] needs no such memory where that number is known beforehand.
    """

    summary = "Inception Score: how confident and how varied the predictions of a classifier are; higher is better."
    citation_text = "Salimans et al., Improved Techniques for Training GANs, 2016, arXiv 1606.03498"
    options = (
        "splits (int, 10), shuffle_seed (int or None, 2020): see InceptionScoreSums; images count process by process."
    )
    output = "logits"
    new_accumulator = staticmethod(partial(FeatureBank, np.float32))

    def _compute(self, bank, splits: int = 10, shuffle_seed: int | None = 2020) -> dict[str, float]:
        logits = bank.features
        sums = InceptionScoreSums(len(logits), splits, shuffle_seed)
        for indices in np.array_split(np.arange(len(logits)), -(-len(logits) // 1024)):
            sums.update(logits[indices], indices)
        return sums.compute()


class PrecisionRecall(StreamingMetric):
    """
    Keeps half-precision features until `compute`, 2·D bytes per image. The default network is Inception, as in ADM's
    evaluation; torch-fidelity's is VGG-16.
    """

    summary = "Improved precision and recall: share of images inside the k-nearest-neighbour balls of the other set."
    citation_text = "Kynkäänniemi et al., Improved Precision and Recall Metric, 2019, arXiv 1904.06991"
    options = (
        "reference: features (M, D), or a FeatureStatistics that has features, or the path of one.\n"
        "    k (int, 3): the neighbour that a ball reaches to."
    )
    new_accumulator = FeatureBank

    def _compute(self, bank, reference, k: int = 3) -> dict[str, float]:
        network, device = self._origin, "cpu"
        if not isinstance(reference, np.ndarray | torch.Tensor):
            statistics = load_reference(reference)
            reference = statistics.require_features()
            if network is not None:
                statistics.check_network(network_name(network), network_sha256(network), bank.features.shape[1])
        if network is not None:
            device = next(network.parameters()).device
        return precision_recall(bank.features, reference, k=k, device=device)


MODULES = {"fid": FID, "inception_score": InceptionScore, "precision_recall": PrecisionRecall, "fd_dinov2": FDDINOv2}
