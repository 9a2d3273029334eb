# Copyright 2026 The pixelrepa_diffusers authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""The arithmetic of evaluation: features arrive in batches, on any number of processes, and nothing is kept but sums.

Three accumulators share one protocol: `update(batch)`, `merge(other)` and, across processes, `gather(accumulator)`:

    FeatureMoments        count, mean and scatter matrix in float64   → Fréchet distances (FID, FD-DINOv2)
    InceptionScoreSums    per split: sum of p and sum of p·log p      → Inception Score
    FeatureBank           the features themselves, half precision     → precision and recall

Letters in the shape trails: B images of a batch, N images, D feature width, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from ..cli import check_launch


def _as_matrix(
    batch: torch.Tensor | np.ndarray | Sequence, what: str, width: int | None, batch_number: int
) -> np.ndarray:
    """A batch as float64 (B, D), or an error that names the batch and what is wrong with it."""
    if isinstance(batch, torch.Tensor):
        batch = batch.detach().cpu().double()  # numpy has no bfloat16
    try:
        matrix = np.asarray(batch, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"Batch {batch_number}: {what} must be numbers of shape (images, width): {error}") from None
    if matrix.ndim != 2 or matrix.shape[1] == 0:
        raise ValueError(f"Batch {batch_number}: {what} must have shape (images, width), got {matrix.shape}.")
    if width is not None and matrix.shape[1] != width:
        raise ValueError(
            f"Batch {batch_number}: {what} of width {matrix.shape[1]} after batches of width {width}. All must come from "
            "one network with one set of options."
        )
    bad = np.flatnonzero(~np.isfinite(matrix).all(axis=1))
    if len(bad):
        raise ValueError(
            f"Batch {batch_number}: NaN or infinite {what} in {len(bad)} of {len(matrix)} rows, the first is row {bad[0]}. "
            "Look at those images, and at the numeric type of the network (float16 overflows at 65504)."
        )
    return matrix


class FeatureMoments:
    """Count, mean and scatter matrix of feature vectors, in float64.

    A batch is centred at its own mean and merged by the pairwise update of Chan, Golub and LeVeque (1979),
    `S = S_a + S_b + (m_b − m_a)(m_b − m_a)ᵀ · n_a·n_b / (n_a + n_b)`, which does not cancel however large the mean is. How
    the images are cut into batches and processes changes the result by rounding only (relative 1e-14).

    Attributes:
        count (`int`): Images so far.
        mean (`np.ndarray` of shape `(D,)` or `None` before the first batch).
        scatter (`np.ndarray` of shape `(D, D)` or `None`): Sum of outer products of the centred features.
    """

    def __init__(self):
        self.count, self.mean, self.scatter = 0, None, None
        self._num_batches = 0

    def update(self, features: torch.Tensor | np.ndarray) -> None:
        """Adds features (B, D) of any numeric type and device; B may be 0.

        Raises:
            ValueError: wrong shape, another width than before, NaN or infinite values; names the batch, counted from 0
                in this process, and changes nothing.
        """
        width = None if self.mean is None else len(self.mean)
        features = _as_matrix(features, "features", width, self._num_batches)  # (B, D)
        self._num_batches += 1
        if len(features):
            mean = features.mean(axis=0)
            centred = features - mean
            self._add(len(features), mean, centred.T @ centred)

    def merge(self, other: FeatureMoments) -> None:
        """Adds the images of `other`, which may be empty. ValueError if its features have another width."""
        if other.count == 0:
            return
        if self.count and len(self.mean) != len(other.mean):
            raise ValueError(f"Cannot merge features of widths {len(self.mean)} and {len(other.mean)}.")
        self._add(other.count, other.mean, other.scatter)

    def _add(self, count: int, mean: np.ndarray, scatter: np.ndarray) -> None:
        if self.count == 0:
            self.count, self.mean, self.scatter = count, mean.copy(), scatter.copy()
            return
        total = self.count + count
        delta = mean - self.mean
        self.scatter += scatter
        self.scatter += np.outer(delta * (self.count * count / total), delta)
        self.mean = self.mean + delta * (count / total)
        self.count = total

    @property
    def covariance(self) -> np.ndarray:
        """(D, D) float64, divided by count − 1 as `numpy.cov` does. ValueError for fewer than two images."""
        if self.count < 2:
            raise ValueError(f"A covariance needs at least 2 images, got {self.count}.")
        return self.scatter / (self.count - 1)


class InceptionScoreSums:
    """Inception Score (arXiv 1606.03498) in constant memory, equal to torch-fidelity's.

    `exp(mean over images of KL(p(y|x) ‖ p(y)))` for each of `splits` parts of the images, then mean and standard
    deviation (numpy's, without Bessel's correction) over the parts. Which part an image belongs to follows from its index
    and the number of images alone, so the value does not depend on batches or processes. What equals what:

    - the defaults equal torch-fidelity's: images are permuted by `numpy.random.RandomState(2020)`, then cut into 10
      parts of consecutive images; softmax and everything after it in float64 (agreement: 1e-12 relative);
    - `shuffle_seed=None` equals torch-fidelity with `samples_shuffle=False`, and the original TensorFlow code, which cuts
      the images in the order given. Images ordered by class then score lower: a part holds a few classes only;
    - published numbers use the unbiased logits of the 2015 Inception (1008 outputs, last layer without its bias).

    Args:
        num_images (`int`): All images of the evaluation, over all processes.
        splits (`int`, defaults to 10).
        shuffle_seed (`int` or `None`, defaults to 2020).

    Raises:
        ValueError: fewer images than splits.
    """

    def __init__(self, num_images: int, splits: int = 10, shuffle_seed: int | None = 2020):
        if not isinstance(splits, int) or not isinstance(num_images, int) or not 1 <= splits <= num_images:
            raise ValueError(f"The Inception Score of {num_images} images cannot be taken in {splits!r} splits.")
        if shuffle_seed is not None and not (isinstance(shuffle_seed, int) and 0 <= shuffle_seed < 2**32):
            raise ValueError(f"shuffle_seed must be an integer in [0, 2³²) or None, got {shuffle_seed!r}.")
        self.num_images, self.splits, self.shuffle_seed = num_images, splits, shuffle_seed
        borders = [split * num_images // splits for split in range(splits + 1)]
        split_of_position = np.repeat(np.arange(splits), np.diff(borders))
        order = np.arange(num_images)
        if shuffle_seed is not None:
            order = np.random.RandomState(shuffle_seed).permutation(num_images)
        self._split_of_image = np.empty(num_images, dtype=np.int64)
        self._split_of_image[order] = split_of_position
        self._seen = np.zeros(num_images, dtype=bool)
        self._sum_p = None  # (splits, C)
        self._sum_p_log_p = np.zeros(splits)
        self._num_batches = 0

    def update(self, logits: torch.Tensor | np.ndarray, indices: Sequence[int] | np.ndarray | torch.Tensor) -> None:
        """Adds logits (B, C) of the images with these `indices` in 0 … num_images − 1.

        Raises:
            ValueError: as `FeatureMoments.update`; or an index out of range or given before.
        """
        width = None if self._sum_p is None else self._sum_p.shape[1]
        logits = _as_matrix(logits, "logits", width, self._num_batches)
        indices = np.asarray(indices, dtype=np.int64)
        if indices.shape != (len(logits),):
            raise ValueError(
                f"Got indices of shape {indices.shape} for {len(logits)} rows of logits: one each is needed."
            )
        outside = indices[(indices < 0) | (indices >= self.num_images)]
        if len(outside):
            raise ValueError(f"Image index {outside[0]} is not in 0 … {self.num_images - 1}: num_images is too small.")
        if len(np.unique(indices)) < len(indices) or self._seen[indices].any():
            raise ValueError(f"Batch {self._num_batches} holds an image that was counted before: {indices.tolist()}.")
        self._num_batches += 1
        self._seen[indices] = True

        shifted = logits - logits.max(axis=1, keepdims=True)
        log_p = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
        p = np.exp(log_p)  # (B, C)
        splits = self._split_of_image[indices]
        if self._sum_p is None:
            self._sum_p = np.zeros((self.splits, p.shape[1]))
        np.add.at(self._sum_p, splits, p)
        np.add.at(self._sum_p_log_p, splits, (p * log_p).sum(axis=1))

    def merge(self, other: InceptionScoreSums) -> None:
        """Adds the images of `other`. ValueError if it was set up differently or holds an image counted here too."""
        settings = [(one.num_images, one.splits, one.shuffle_seed) for one in (self, other)]
        if settings[0] != settings[1]:
            raise ValueError(
                f"Cannot merge scores with (num_images, splits, shuffle_seed) {settings[0]}, {settings[1]}."
            )
        if other._sum_p is None:
            return
        if self._sum_p is not None and self._sum_p.shape != other._sum_p.shape:
            raise ValueError(f"Cannot merge {self._sum_p.shape[1]} classes with {other._sum_p.shape[1]}.")
        twice = np.flatnonzero(self._seen & other._seen)
        if len(twice):
            raise ValueError(f"{len(twice)} images were counted by two processes, the first has index {twice[0]}.")
        self._seen |= other._seen
        self._sum_p = other._sum_p.copy() if self._sum_p is None else self._sum_p + other._sum_p
        self._sum_p_log_p = self._sum_p_log_p + other._sum_p_log_p

    def compute(self) -> dict[str, float]:
        """`inception_score` (mean over the splits) and `inception_score_std`. ValueError while images are missing."""
        if not self._seen.all():
            raise ValueError(
                f"Only {self._seen.sum()} of {self.num_images} images were counted; index {np.argmin(self._seen)} is missing."
            )
        counts = np.bincount(self._split_of_image)  # (splits,)
        q = self._sum_p / counts[:, None]  # (splits, C), the marginal p(y)
        q_log_q = q * np.log(np.where(q > 0, q, 1))
        scores = np.exp(self._sum_p_log_p / counts - q_log_q.sum(axis=1))
        return {"inception_score": float(scores.mean()), "inception_score_std": float(scores.std())}


class FeatureBank:
    """The features of all images, for metrics that compare images with images.

    Half precision takes 2·D bytes per image: 50,000 images of width 2048 are 205 MB. Against float64 features it moved
    precision and recall by at most 0.001 where measured (`tests/test_metrics.py`); FID never uses these copies.

    Args:
        dtype (`np.dtype`, defaults to `np.float16`).
    """

    def __init__(self, dtype: type[np.floating] = np.float16):
        if not (isinstance(dtype, type) and issubclass(dtype, np.floating)):
            raise ValueError(f"FeatureBank keeps a numpy floating point type such as np.float16, got {dtype!r}.")
        self.dtype = dtype
        self._batches: list[np.ndarray] = []

    def update(self, features: torch.Tensor | np.ndarray) -> None:
        """Adds features (B, D). ValueError as `FeatureMoments.update`, or for values too large for the bank's type."""
        width = self._batches[0].shape[1] if self._batches else None
        matrix = _as_matrix(features, "features", width, len(self._batches))
        largest = np.finfo(self.dtype).max
        if np.abs(matrix).max(initial=0) > largest:
            raise ValueError(
                f"Batch {len(self._batches)}: a feature of size {np.abs(matrix).max():.4g} does not fit "
                f"{np.dtype(self.dtype).name}, whose largest number is {largest}. Use FeatureBank(np.float32)."
            )
        self._batches.append(matrix.astype(self.dtype))

    def merge(self, other: FeatureBank) -> None:
        """Appends the images of `other`, which may be empty. ValueError if its features have another width."""
        widths = {batch.shape[1] for bank in (self, other) for batch in bank._batches}
        if len(widths) > 1:
            raise ValueError(f"Cannot merge features of widths {sorted(widths)}.")
        self._batches.extend(other._batches)

    @property
    def features(self) -> np.ndarray:
        """(N, D) in order of arrival; after `gather`, process by process. ValueError while empty."""
        if not self._batches:
            raise ValueError("No features have been added.")
        self._batches = [np.concatenate(self._batches)]
        return self._batches[0]


Accumulator = TypeVar("Accumulator", FeatureMoments, InceptionScoreSums, FeatureBank)


def gather(accumulator: Accumulator) -> Accumulator:
    """The merged accumulator of all processes of `accelerate`, the same on each of them.

    Every process must call it, also one that had no batch. Processes are merged in their order, so all get the same
    bits. The argument is left as it is and keeps counting its own process; with one process it is the result.

    Raises:
        RuntimeError: accelerate was set up for fewer processes than were started; the result would be of a part.
    """
    check_launch(PartialState().num_processes)
    merged, *others = gather_object([accumulator])
    for other in others:
        merged.merge(other)
    return merged


def frechet_distance(mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray) -> float:
    """Squared Fréchet (2-Wasserstein) distance of two Gaussians, Dowson and Landau (1982), in float64.

        |μ₁ − μ₂|² + tr Σ₁ + tr Σ₂ − 2·tr (Σ₁Σ₂)^½

    With Σᵢ = AᵢAᵢᵀ the last trace is the sum of the singular values of A₁ᵀA₂. Unlike the eigenvalues of Σ₁Σ₂, or a matrix
    square root, these do not amplify rounding by a square root when a covariance is singular (fewer images than
    dimensions): there this function is exact and the others drift. Directions whose variance is below D·2.2e-16 of the
    largest one are rounding, not data, and count as zero.

    Args:
        mu1, mu2 (`np.ndarray` of shape `(D,)`).
        sigma1, sigma2 (`np.ndarray` of shape `(D, D)`): Symmetric, positive semidefinite.

    Returns:
        `float`: 0 for equal Gaussians, up to rounding (which may be negative, about 1e-15 of the traces).

    Raises:
        ValueError: shapes that do not fit, or a matrix with a negative eigenvalue, which is no covariance.
    """
    mu1, sigma1, mu2, sigma2 = (np.asarray(array, dtype=np.float64) for array in (mu1, sigma1, mu2, sigma2))
    if mu1.ndim != 1 or mu1.shape != mu2.shape or not sigma1.shape == sigma2.shape == mu1.shape * 2:
        raise ValueError(
            f"The two Gaussians must have one width, got means {mu1.shape} and {mu2.shape}, covariances {sigma1.shape} and "
            f"{sigma2.shape}. Features and reference statistics must come from the same network."
        )
    roots = []
    for sigma in (sigma1, sigma2):
        variances, directions = np.linalg.eigh(sigma)
        largest = max(variances[-1], 0)
        # Statistics stored in float32 have eigenvalues down to about −1e-7 of the largest.
        if variances[0] < -1e-5 * largest or variances[-1] < 0:
            raise ValueError(f"Not a covariance: eigenvalues from {variances[0]:.3g} to {variances[-1]:.3g}.")
        variances[variances < len(variances) * np.finfo(np.float64).eps * largest] = 0
        roots.append(directions * np.sqrt(variances))  # A = V·Λ^½, (D, D)
    trace_of_root = np.linalg.svd(roots[0].T @ roots[1], compute_uv=False).sum()
    return float(np.sum((mu1 - mu2) ** 2) + np.trace(sigma1) + np.trace(sigma2) - 2 * trace_of_root)


def precision_recall(
    generated: torch.Tensor | np.ndarray,
    real: torch.Tensor | np.ndarray,
    k: int = 3,
    device: torch.device | str = "cpu",
    batch_size: int = 1024,
) -> dict[str, float]:
    """Improved precision and recall, Kynkäänniemi et al. (arXiv 1904.06991).

    Every image of a set has a ball that reaches to its k-th nearest neighbour in that set, itself not counted.
    Precision is the share of generated images inside some ball of the real set, recall the share of real images inside
    some ball of the generated set. Equal to torch-fidelity's where float32 rounding decides no image (it measures distances
    in float32, this function in float64).

    Distances within 1e-12 of the largest norm count as equal, so copies of an image lie in each other's balls: identical
    sets score (1, 1), and sets that are each one image repeated score 1 or 0.

    Args:
        generated, real: features (N, D) and (M, D), any numeric type; N and M should be equal, both values depend on them.
        k (`int`, defaults to 3).
        device: Where the distances are computed: a GPU, else the CPU, as other accelerators may lack float64. Each pair of images costs 2·D operations per pass
            (within the generated set, within the real set, across), and `batch_size` rows of distances are kept.

    Returns:
        `precision` and `recall`, in [0, 1].

    Raises:
        ValueError: a set with fewer than k + 1 images, different widths, NaN or infinite features.
    """
    device = device if torch.device(device).type == "cuda" else "cpu"
    sets = {}
    for name, features in (("generated", generated), ("real", real)):
        sets[name] = torch.from_numpy(_as_matrix(features, f"{name} features", None, 0)).to(device)
        if isinstance(k, bool) or not isinstance(k, int) or k < 1 or len(sets[name]) < k + 1:
            raise ValueError(
                f"k={k!r} needs an integer 1 ≤ k and at least k + 1 images, got {len(sets[name])} {name} images."
            )
    generated, real = sets["generated"], sets["real"]
    if generated.shape[1] != real.shape[1]:
        raise ValueError(
            f"Generated features have width {generated.shape[1]}, real ones {real.shape[1]}: use one network for both."
        )
    centre = real.mean(dim=0)  # distances do not change, and the expansion |a|² + |b|² − 2ab loses fewer digits
    generated, real = generated - centre, real - centre
    equal = 1e-12 * max(generated.square().sum(1).max(), real.square().sum(1).max())

    def squared_distances(rows: torch.Tensor, others: torch.Tensor) -> torch.Tensor:  # (b, D), (M, D) → (b, M)
        products = torch.addmm(others.square().sum(1), rows, others.T, alpha=-2)
        return products.add_(rows.square().sum(1, keepdim=True))

    def inside(queries: torch.Tensor, centres: torch.Tensor) -> float:
        # The nearest of k + 1 is the image itself (or a copy of it, which is as far away).
        nearest = [squared_distances(rows, centres).topk(k + 1, largest=False) for rows in centres.split(batch_size)]
        reach = torch.cat([distances.values.amax(dim=1) for distances in nearest]) + equal  # squared radii, (M,)
        hits = [(squared_distances(rows, centres) <= reach).any(dim=1) for rows in queries.split(batch_size)]
        return torch.cat(hits).double().mean().item()

    return {"precision": inside(generated, real), "recall": inside(real, generated)}
