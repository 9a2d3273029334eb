# Copyright 2026 The pixelrepa_diffusers authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Statistics of a set of images: what Fréchet distances compare, and the files they are kept in."""

from __future__ import annotations

import hashlib
import os
import pickle
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy._core.multiarray import _reconstruct

from ..files import write_atomically
from .statistics import FeatureBank, FeatureMoments, frechet_distance


# What a pickled numpy array consists of; a file that names anything else is refused by `weights_only=True`.
_NUMPY_GLOBALS = [
    np.dtype,
    np.ndarray,
    type(np.dtype(np.float32)),
    type(np.dtype(np.float64)),
    (_reconstruct, "numpy.core.multiarray._reconstruct"),  # as written by numpy 1
    (_reconstruct, "numpy._core.multiarray._reconstruct"),
]


@dataclass
class FeatureStatistics:
    """Mean and covariance of the features of a set of images, and where they come from.

    Args:
        mu (`np.ndarray` of shape `(D,)`): float64.
        sigma (`np.ndarray` of shape `(D, D)`): float64, divided by count − 1.
        count (`int`, *optional*): Number of images; unknown for files of other programs.
        network (`str`, *optional*): The feature network, in words.
        network_sha256 (`str`, *optional*): `networks.network_sha256` of it. Distances between different ones are refused.
        features (`np.ndarray` of shape `(count, D)`, *optional*): For precision and recall.

    Raises:
        ValueError: shapes that do not fit, NaN or infinite values, an asymmetric `sigma`.
    """

    mu: np.ndarray
    sigma: np.ndarray
    count: int | None = None
    network: str | None = None
    network_sha256: str | None = None
    features: np.ndarray | None = None

    def __post_init__(self):
        try:
            self.mu, self.sigma = np.asarray(self.mu, np.float64), np.asarray(self.sigma, np.float64)
        except (TypeError, ValueError) as error:
            raise ValueError(f"mu and sigma must be arrays of numbers: {error}") from None
        if self.count is not None and (not isinstance(self.count, int) or self.count < 1):
            raise ValueError(
                f"count must be an integer, a number of images of at least 1, or None, got {self.count!r}."
            )
        if self.mu.ndim != 1 or len(self.mu) == 0 or self.sigma.shape != self.mu.shape * 2:
            raise ValueError(
                f"mu and sigma must have shapes (D,) and (D, D), got {self.mu.shape} and {self.sigma.shape}."
            )
        for name in ("mu", "sigma"):
            if not np.isfinite(getattr(self, name)).all():
                raise ValueError(f"{name} contains NaN or infinite values.")
        asymmetry, size = np.abs(self.sigma - self.sigma.T).max(), np.abs(self.sigma).max()
        if asymmetry > 1e-6 * size:
            raise ValueError(f"sigma is not symmetric: elements up to {size:.3g} differ by up to {asymmetry:.3g}.")
        if self.features is not None and self.features.shape != (self.count, len(self.mu)):
            raise ValueError(
                f"features must have shape (count, D) = {(self.count, len(self.mu))}, got {self.features.shape}."
            )

    @classmethod
    def from_moments(
        cls,
        moments: FeatureMoments,
        bank: FeatureBank | None = None,
        network: str | None = None,
        network_sha256: str | None = None,
    ) -> FeatureStatistics:
        """Statistics of what was streamed; `bank` holds the same images. ValueError for fewer than two images."""
        features = None if bank is None else bank.features
        return cls(moments.mean, moments.covariance, moments.count, network, network_sha256, features)

    @property
    def sha256(self) -> str:
        """Of the numbers in mu and sigma, whatever file they came in."""
        return hashlib.sha256(self.mu.tobytes() + self.sigma.tobytes()).hexdigest()

    def distance(self, other: FeatureStatistics) -> float:
        """`frechet_distance` to `other`.

        Of Inception features it is FID. torch-fidelity averages features in float32, so its value is off by about 1e-7 of
        the features' size over the difference of the two means: a relative 1e-7 where sets differ clearly, 1e-6 where
        their means nearly agree. Given the same features in float64 it returns this value to 1e-11.

        Warns when a set has no more images than dimensions: its covariance is singular, and the distance, defined all the
        same, is biased upwards and comparable only between sets of that size.

        Raises:
            ValueError: statistics of different networks or widths.
        """
        if self.network_sha256 and other.network_sha256 and self.network_sha256 != other.network_sha256:
            raise ValueError(
                f"The statistics come from different feature networks: {self.network!r} ({self.network_sha256[:12]}) and "
                f"{other.network!r} ({other.network_sha256[:12]}). Compute the reference again with the network in use."
            )
        for statistics in (self, other):
            if statistics.count is not None and statistics.count <= len(statistics.mu):
                warnings.warn(
                    f"{statistics.count} images for features of width {len(statistics.mu)}: the covariance is singular and "
                    "the Fréchet distance biased upwards. Compare it only with distances of as many images."
                )
        return frechet_distance(self.mu, self.sigma, other.mu, other.sigma)

    def save(self, path: str | os.PathLike) -> None:
        """Writes `.npz` with `mu` and `sigma`, which every FID program reads, and the other fields that are known.

        The file appears under its name only when complete. FileExistsError rather than overwrite.
        """
        path = Path(path)
        if path.suffix != ".npz":
            raise ValueError(f"Statistics are saved as .npz, got {path}.")
        if path.exists():
            raise FileExistsError(f"{path} exists. Remove it or choose another name.")
        known = {name: value for name, value in vars(self).items() if value is not None}

        def write(temporary: Path) -> None:
            with open(temporary, "wb") as file:
                np.savez(file, **known)

        write_atomically(path, write)

    @classmethod
    def load(cls, path: str | os.PathLike) -> FeatureStatistics:
        """Reads statistics; no file can run code.

        - `.npz` with `mu` and `sigma`: the published `jit_in256_stats.npz`, ADM, pytorch-fid and clean-fid, and `save`.
        - `.pt`: torch-fidelity's cache, `…-stat-fid-2048.pt`.

        Raises:
            FileNotFoundError, ValueError: naming the file.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"No reference statistics at {path}.")
        try:
            if path.suffix == ".npz":
                with np.load(path, allow_pickle=False) as file:
                    arrays = {name: file[name] for name in cls.__dataclass_fields__ if name in file}
            elif path.suffix == ".pt":
                with torch.serialization.safe_globals(_NUMPY_GLOBALS):
                    stored = torch.load(path, map_location="cpu", weights_only=True)
                arrays = {name: np.asarray(stored[name]) for name in ("mu", "sigma") if name in stored}
            else:
                raise ValueError("statistics are .npz or torch-fidelity's .pt files")
            if not {"mu", "sigma"} <= arrays.keys():
                raise ValueError("it does not hold mu and sigma")
            for name, convert in (("count", int), ("network", str), ("network_sha256", str)):
                if name in arrays:
                    arrays[name] = convert(arrays[name])
            return cls(**arrays)
        except (
            ValueError,
            TypeError,
            OSError,
            EOFError,
            RuntimeError,
            MemoryError,  # a header that claims more than there is
            zipfile.BadZipFile,
            pickle.UnpicklingError,
        ) as error:
            raise ValueError(f"{path} cannot be used as reference statistics: {error}") from error
