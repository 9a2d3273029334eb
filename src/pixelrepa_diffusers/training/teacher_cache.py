"""Cache of teacher features on disk: the frozen teacher encodes each view of an image once, not once per epoch.

The cache has two records per image (plain and flipped) and fills during the first epochs. A record of DINOv2-base at 256
pixels in bfloat16 has 0.4 MB, so the cache suits up to some hundred thousand images. Processes and runs may share it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import struct
import zlib
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..evaluation import network_sha256
from ..teacher import SemanticTeacher


logger = logging.getLogger(__name__)

_CHECKSUM = struct.Struct("<Q")


@dataclass(frozen=True)
class FeatureFile:
    """
    File of feature records, read by the loader's workers and written by the training process.

    A record holds the features of a view and a checksum of its pixels and features. A record that is missing, truncated,
    damaged or belongs to other pixels fails its checksum and is computed again: a stale file costs time and never changes a
    result.
    """

    path: Path
    record_bytes: int

    def read_into(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """
        Add the stored features to a batch of [`ImageLoader`].

        Returns:
            The batch with `records`, uint8 (B, record_bytes), if all images have one, and `missing`, int64 (B,): the
            checksum of the pixels of an image without a record, otherwise -1.
        """
        records = torch.empty(len(batch["index"]), self.record_bytes, dtype=torch.uint8)
        missing = torch.full((len(records),), -1)
        file = os.open(self.path, os.O_RDONLY)
        try:
            views = zip(batch["pixel_values"].numpy(), records.numpy(), positions(batch), strict=True)
            for row, (pixels, record, position) in enumerate(views):
                size = os.preadv(file, [record], position * self.record_bytes)
                pixels = zlib.crc32(pixels)
                (expected,) = _CHECKSUM.unpack_from(record)
                if size != self.record_bytes or _checksum(record[_CHECKSUM.size :], pixels) != expected:
                    missing[row] = pixels
        finally:
            os.close(file)
        return {**batch, "missing": missing} | ({} if (missing >= 0).any() else {"records": records})

    def write(self, rows: list[int], pixels: list[int], features: np.ndarray) -> None:
        """Write features (rows, bytes) of images with these pixel checksums."""
        file = os.open(self.path, os.O_WRONLY)
        try:
            for row, checksum, content in zip(rows, pixels, features, strict=True):
                record = _CHECKSUM.pack(_checksum(content, checksum)) + content.tobytes()
                os.pwrite(file, record, row * self.record_bytes)
        finally:
            os.close(file)


class CachedTeacher:
    """
    Teacher with a file of its features, whose name is a hash of everything that determines them.

    The loader's workers read the file (`loader.batch_transform = cached_teacher.file.read_into`) and a thread writes it, so
    the training process only copies a batch of records to the device.

    Args:
        teacher (`SemanticTeacher`): The frozen teacher.
        folder (`str` or `Path`): Folder of the file; created if needed.
        num_images (`int`): Size of the data set.
    """

    def __init__(self, teacher: SemanticTeacher, folder: str | Path, num_images: int):
        self.teacher, self.dtype = teacher, teacher.model.dtype
        self.shape = (teacher.grid_size**2, teacher.feature_dim)
        identity = {
            "weights": network_sha256(teacher.model),
            "input_size": teacher.input_size,
            "interpolation": teacher.interpolation,
            "scale": teacher.pixel_scale.flatten().tolist(),
            "shift": teacher.pixel_shift.flatten().tolist(),
            "shape": self.shape,
            "num_images": num_images,
        }
        name = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
        path = Path(folder) / f"{name}.features"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        self.file = FeatureFile(path, _CHECKSUM.size + self.shape[0] * self.shape[1] * self.dtype.itemsize)
        self._writer = ThreadPoolExecutor(1)
        self._written: Future | None = None
        self._disk_is_full = False

    def __call__(self, pixel_values: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """
        Return the stored features of a batch, or compute and store them.

        Args:
            pixel_values (`torch.Tensor`): Teacher input, (B, 3, H, H) in [-1, 1] on the teacher's device.
            batch (`dict[str, torch.Tensor]`): Result of [`FeatureFile.read_into`], on the CPU.

        Returns:
            `torch.Tensor`: Features (B, N, F) in the teacher's dtype on the device of `pixel_values`.
        """
        if "records" in batch:
            records = batch["records"].to(pixel_values.device, non_blocking=True)
            return records[:, _CHECKSUM.size :].view(self.dtype).unflatten(1, self.shape)
        features = self.teacher(pixel_values)
        missing = (batch["missing"] >= 0).nonzero().flatten()
        # At most one batch waits to be written: a slow disk slows the filling instead of exhausting the memory.
        self.wait()
        if not self._disk_is_full:
            stored = features[missing.to(features.device)].to("cpu", self.dtype, non_blocking=True)
            copied = None
            if features.device.type == "cuda":
                copied = torch.cuda.Event()
                copied.record()
            rows, pixels = positions(batch)[missing], batch["missing"][missing]
            self._written = self._writer.submit(self._write, rows.tolist(), pixels.tolist(), stored, copied)
        return features

    def wait(self) -> None:
        """Wait until everything submitted so far is written."""
        if self._written is not None:
            self._written.result()

    def _write(
        self, rows: list[int], pixels: list[int], features: torch.Tensor, copied: torch.cuda.Event | None
    ) -> None:
        if copied is not None:
            copied.synchronize()
        try:
            self.file.write(rows, pixels, features.flatten(1).view(torch.uint8).numpy())
        except OSError as error:
            self._disk_is_full = True
            logger.warning("Teacher features are no longer cached: %s: %s", self.file.path, error)


def positions(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the number of each image's record: two per image, plain and flipped."""
    return 2 * batch["index"] + batch["flipped"]


def _checksum(features: np.ndarray, pixels: int) -> int:
    return 1 << 32 | zlib.crc32(features, pixels)  # never 0, because holes in the file read as 0
