"""Streaming accumulators of features and the metrics computed from them: FID, Inception Score, precision and recall.

Accumulators share `update(batch)` and `merge(other)`; [`gather`] merges the accumulators of all processes.
Shapes: B images of a batch, N images, D feature width, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import torch
from accelerate.utils import gather_object


def _as_matrix(batch: torch.Tensor | np.ndarray, dtype: type[np.floating] = np.float64) -> np.ndarray:
    """A batch (B, D) as a finite numpy array."""
    if isinstance(batch, torch.Tensor):
        batch = batch.detach().cpu().double()  # numpy has no bfloat16
    with np.errstate(over="ignore"):
        matrix = np.asarray(batch, dtype=np.float64).astype(dtype)
    if not np.isfinite(matrix).all():
        raise ValueError(f"Features contain NaN, infinite values, or values that overflow {np.dtype(dtype)}.")
    return matrix


class FeatureMoments:
    """
    Count, mean (D,) and scatter matrix (D, D) of feature vectors, in float64.

    Batches are merged by the pairwise update of Chan, Golub and LeVeque (1979), which does not cancel for large means:

        S = S_a + S_b + (m_b − m_a)(m_b − m_a)ᵀ · n_a·n_b / (n_a + n_b)
    """

    def __init__(self):
        self.count, self.mean, self.scatter = 0, 0.0, 0.0  # scatter: sum of outer products of the centred features

    def update(self, features: torch.Tensor | np.ndarray) -> None:
        """Add features (B, D); B may be 0."""
        features = _as_matrix(features)
        if len(features):
            mean = features.mean(axis=0)
            centred = features - mean
            self._add(len(features), mean, centred.T @ centred)

    def merge(self, other: FeatureMoments) -> None:
        if other.count:
            self._add(other.count, other.mean, other.scatter)

    def _add(self, count: int, mean: np.ndarray, scatter: np.ndarray) -> None:
        total = self.count + count
        delta = mean - self.mean
        self.scatter = self.scatter + scatter
        self.scatter += np.outer(delta * (self.count * count / total), delta)
        self.mean = self.mean + delta * (count / total)
        self.count = total

    @property
    def covariance(self) -> np.ndarray:
        """Unbiased covariance (D, D), as `numpy.cov` computes it."""
        if self.count < 2:
            raise ValueError(f"A covariance needs at least 2 images, got {self.count}.")
        return self.scatter / (self.count - 1)


class InceptionScoreSums:
    """
    Inception Score (https://huggingface.co/papers/1606.03498) in constant memory.

    `exp(mean over images of KL(p(y|x) ‖ p(y)))` is computed for each of `splits` parts of the images. The part of an image
    follows from its index alone, so batches and processes do not change the score. The defaults equal torch-fidelity's;
    `shuffle_seed=None` cuts the images in their order, as the original TensorFlow code does.

    Args:
        num_images (`int`): Number of images over all processes, each of which must be added once.
        splits (`int`, *optional*, defaults to 10): Number of parts.
        shuffle_seed (`int`, *optional*, defaults to 2020): Seed of the permutation, or `None` for no shuffling.
    """

    def __init__(self, num_images: int, splits: int = 10, shuffle_seed: int | None = 2020):
        if num_images < splits:
            raise ValueError(f"An Inception Score with {splits} splits needs as many images, got {num_images}.")
        self.splits = splits
        order = np.arange(num_images)
        if shuffle_seed is not None:
            order = np.random.RandomState(shuffle_seed).permutation(num_images)
        borders = [split * num_images // splits for split in range(splits + 1)]
        self._split_of_image = np.empty(num_images, dtype=np.int64)
        self._split_of_image[order] = np.repeat(np.arange(splits), np.diff(borders))
        self._sum_p = 0.0  # (splits, C)
        self._sum_p_log_p = 0.0  # (splits,)

    def update(self, logits: torch.Tensor | np.ndarray, indices: Sequence[int]) -> None:
        """Add logits (B, C) of the images with these indices, each in [0, num_images)."""
        logits = _as_matrix(logits)
        shifted = logits - logits.max(axis=1, keepdims=True)
        log_p = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
        p = np.exp(log_p)  # (B, C)
        split = np.eye(self.splits)[self._split_of_image[indices]]  # (B, splits), one-hot
        self._sum_p = self._sum_p + split.T @ p
        self._sum_p_log_p = self._sum_p_log_p + split.T @ (p * log_p).sum(axis=1)

    def merge(self, other: InceptionScoreSums) -> None:
        self._sum_p = self._sum_p + other._sum_p
        self._sum_p_log_p = self._sum_p_log_p + other._sum_p_log_p

    def compute(self) -> dict[str, float]:
        """Mean and standard deviation over the splits: `inception_score` and `inception_score_std`."""
        counts = np.bincount(self._split_of_image)  # (splits,)
        q = self._sum_p / counts[:, None]  # (splits, C), the marginal p(y)
        q_log_q = q * np.log(np.where(q > 0, q, 1))
        scores = np.exp(self._sum_p_log_p / counts - q_log_q.sum(axis=1))
        return {"inception_score": float(scores.mean()), "inception_score_std": float(scores.std())}


class FeatureBank:
    """
    The features of all images, for metrics that compare images with images.

    Half precision, the default `dtype`, moved precision and recall by at most 0.001 where measured.
    """

    def __init__(self, dtype: type[np.floating] = np.float16):
        self.dtype = dtype
        self._batches: list[np.ndarray] = []

    def update(self, features: torch.Tensor | np.ndarray) -> None:
        """Add features (B, D)."""
        self._batches.append(_as_matrix(features, self.dtype))

    def merge(self, other: FeatureBank) -> None:
        self._batches.extend(other._batches)

    @property
    def features(self) -> np.ndarray:
        """Features (N, D) in order of arrival; after [`gather`], process by process."""
        self._batches = [np.concatenate(self._batches)]
        return self._batches[0]


Accumulator = TypeVar("Accumulator", FeatureMoments, InceptionScoreSums, FeatureBank)


def gather(accumulator: Accumulator) -> Accumulator:
    """
    Merge the accumulators of all processes of `accelerate`, bit-identically on each of them.

    Every process must call it, even without images. With several processes the argument is not changed.
    """
    merged, *others = gather_object([accumulator])
    for other in others:
        merged.merge(other)
    return merged


def frechet_distance(mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray) -> float:
    """
    Squared Fréchet (2-Wasserstein) distance of two Gaussians, Dowson and Landau (1982), in float64.

        |μ₁ − μ₂|² + tr Σ₁ + tr Σ₂ − 2·tr (Σ₁Σ₂)^½

    With Σᵢ = AᵢAᵢᵀ the last trace is the sum of the singular values of A₁ᵀA₂. Unlike a matrix square root or the
    eigenvalues of Σ₁Σ₂, singular values stay exact when a covariance is singular (fewer images than dimensions).
    """
    mu1, sigma1, mu2, sigma2 = (np.asarray(array, dtype=np.float64) for array in (mu1, sigma1, mu2, sigma2))
    roots = []
    for sigma in (sigma1, sigma2):
        variances, directions = np.linalg.eigh(sigma)
        # Smaller variances are rounding errors, negative ones included.
        variances[variances < len(variances) * np.finfo(np.float64).eps * max(variances[-1], 0)] = 0
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
    """
    Improved precision and recall, Kynkäänniemi et al. (https://huggingface.co/papers/1904.06991).

    Each image of a set has a ball that reaches to its k-th nearest neighbour in that set. Precision is the share of
    generated images inside some ball of the real set; recall is the share of real images inside some ball of the generated
    set. Distances are in float64, and distances within 1e-12 of the largest norm count as equal, so that rounding does not
    decide about copies of an image.

    Features are (N, D) and (M, D); both values depend on N and M. Only a CUDA `device` is used: others may lack float64.
    """
    if min(len(generated), len(real)) <= k:
        raise ValueError(f"Precision and recall need more than {k} images, got {len(generated)} and {len(real)}.")
    device = device if torch.device(device).type == "cuda" else "cpu"
    generated, real = (torch.from_numpy(_as_matrix(features)).to(device) for features in (generated, real))
    # The distances stay the same, and |a|² + |b|² − 2ab loses fewer digits.
    centre = real.mean(dim=0)
    generated, real = generated - centre, real - centre
    tolerance = 1e-12 * max(generated.square().sum(1).max(), real.square().sum(1).max())

    def squared_distances(rows: torch.Tensor, others: torch.Tensor) -> torch.Tensor:  # (b, D), (M, D) → (b, M)
        products = torch.addmm(others.square().sum(1), rows, others.T, alpha=-2)
        return products.add_(rows.square().sum(1, keepdim=True))

    def share_inside(queries: torch.Tensor, centres: torch.Tensor) -> float:
        # The nearest of k + 1 is the image itself, or a copy of it.
        nearest = [squared_distances(rows, centres).topk(k + 1, largest=False) for rows in centres.split(batch_size)]
        radii = torch.cat([distances.values.amax(dim=1) for distances in nearest]) + tolerance  # squared, (M,)
        hits = [(squared_distances(rows, centres) <= radii).any(dim=1) for rows in queries.split(batch_size)]
        return torch.cat(hits).double().mean().item()

    return {"precision": share_inside(generated, real), "recall": share_inside(real, generated)}
