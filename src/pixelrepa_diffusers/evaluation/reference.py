"""Statistics of a set of images, which Fréchet distances compare, and the files they are stored in."""

from __future__ import annotations

import hashlib
import os
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch.nn as nn

from ..files import write_atomically
from .networks import network_name, network_sha256
from .statistics import FeatureBank, FeatureMoments, frechet_distance


@dataclass
class FeatureStatistics:
    """Mean and covariance of the features of a set of images."""

    mu: np.ndarray  # (D,)
    sigma: np.ndarray  # (D, D), unbiased
    count: int | None = None  # number of images; unknown for files of other programs
    network: str | None = None
    network_sha256: str | None = None
    features: np.ndarray | None = None  # (count, D), for precision and recall

    def __post_init__(self):
        self.mu, self.sigma = np.asarray(self.mu, np.float64), np.asarray(self.sigma, np.float64)

    @classmethod
    def from_moments(
        cls, moments: FeatureMoments, bank: FeatureBank | None = None, network: nn.Module | None = None
    ) -> FeatureStatistics:
        """Statistics of accumulated features of `network`; `bank` holds the same images."""
        statistics = cls(
            moments.mean, moments.covariance, moments.count, features=None if bank is None else bank.features
        )
        if network is not None:
            statistics.network, statistics.network_sha256 = network_name(network), network_sha256(network)
        return statistics

    @property
    def sha256(self) -> str:
        """Hash of mu and sigma, independent of the file format."""
        return hashlib.sha256(self.mu.tobytes() + self.sigma.tobytes()).hexdigest()

    def distance(self, other: FeatureStatistics) -> float:
        """
        [`frechet_distance`] to `other`; with Inception features it is the FID.

        Equal to torch-fidelity's up to the float32 rounding of its means (relative 1e-6). Warns when a set has no more images
        than dimensions.

        Raises:
            ValueError: If the statistics come from different networks.
        """
        self.check_network(other.network, other.network_sha256, len(other.mu))
        for statistics in (self, other):
            if statistics.count is not None and statistics.count <= len(statistics.mu):
                warnings.warn(
                    f"{statistics.count} images for features of width {len(statistics.mu)}: the covariance is singular and "
                    "the Fréchet distance biased upwards. Compare it only with distances of as many images."
                )
        return frechet_distance(self.mu, self.sigma, other.mu, other.sigma)

    def check_network(self, network: str | None, sha256: str | None, width: int) -> None:
        """Raise a `ValueError` unless features of `network` can be compared with these statistics."""
        if width != len(self.mu) or len({self.network_sha256, sha256} - {None}) > 1:
            raise ValueError(
                f"Features of different networks cannot be compared: {self.network or 'unknown'} (width {len(self.mu)}) and "
                f"{network or 'unknown'} (width {width}). Use the weights, image size and pooling of the reference, or make "
                "it again with pixelrepa-prepare-reference."
            )

    def require_features(self) -> np.ndarray:
        """The features, or a `ValueError` that says how to store them."""
        if self.features is None:
            raise ValueError(
                "Precision and recall need a reference with features: make it with pixelrepa-prepare-reference --keep_features."
            )
        return self.features

    def save(self, path: str | os.PathLike) -> None:
        """Write a `.npz` file with `mu` and `sigma`, which every FID program reads, and the other fields that are known."""
        write_arrays(Path(path), **{name: value for name, value in vars(self).items() if value is not None})

    @classmethod
    def load(cls, path: str | os.PathLike) -> FeatureStatistics:
        """
        Read a `.npz` file with `mu` and `sigma`, without running code from it: the published `jit_in256_stats.npz`, files of
        ADM, pytorch-fid, clean-fid and [`~FeatureStatistics.save`].

        Raises:
            ValueError: If the file is damaged or holds something else.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                stored = {name: file[name] for name in file.keys() & cls.__dataclass_fields__.keys()}
            statistics = cls(**{name: value if value.ndim else value.item() for name, value in stored.items()})
            mu, sigma = statistics.mu, statistics.sigma
            if sigma.shape != mu.shape * 2 or not np.isfinite(sigma).all():
                raise ValueError(f"they must be finite, of shapes (D,) and (D, D), got {mu.shape} and {sigma.shape}")
        except Exception as error:  # numpy raises many types
            raise ValueError(f"{path} cannot be read as reference statistics (mu and sigma): {error!r}") from error
        return statistics


def load_reference(reference: FeatureStatistics | str | os.PathLike) -> FeatureStatistics:
    return reference if isinstance(reference, FeatureStatistics) else FeatureStatistics.load(reference)


def write_arrays(path: Path, **arrays) -> None:
    """Write a `.npz` file atomically."""

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:  # numpy would change the suffix of a path
            np.savez(file, **arrays)

    write_atomically(path, write)
