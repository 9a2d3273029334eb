"""Cache of teacher features on disk: the frozen teacher sees each view of an image once, not once per epoch.

Two records per image (flipped or not) fill in during the first epochs. A record of DINOv2-base at 256 pixels in bfloat16 has
0.4 MB, so the cache suits up to some hundred thousand images. Any number of processes and runs may share it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from ..evaluation import network_sha256
from ..teacher import SemanticTeacher


logger = logging.getLogger(__name__)

_CHECKSUM = struct.Struct("<Q")


class CachedTeacher:
    """
    A teacher that looks up its features in a file, whose name depends on everything that determines them.

    A record holds a checksum of one view's pixels and features, and the features in the teacher's dtype. A record that is
    missing, truncated, damaged or of other pixels fails its checksum and is computed again, so a stale file costs time but
    never changes a result.

    Args:
        teacher (`SemanticTeacher`): The frozen teacher.
        folder (`str` or `Path`): Folder of the file; created if needed.
        num_images (`int`): Size of the data set.
    """

    def __init__(self, teacher: SemanticTeacher, folder: str | Path, num_images: int):
        self.teacher = teacher
        self.dtype = teacher.model.dtype
        self.shape = (teacher.grid_size**2, teacher.feature_dim)
        self.record_bytes = _CHECKSUM.size + self.shape[0] * self.shape[1] * self.dtype.itemsize
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
        self.path = Path(folder) / f"{name}.features"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        self._pool = ThreadPoolExecutor(8)  # reading and checksums release the interpreter lock
        self._disk_is_full = False

    def __call__(self, pixel_values: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """
        Args:
            pixel_values (`torch.Tensor`): Teacher input, (B, 3, H, H) in [-1, 1] on the teacher's device.
            batch (`dict[str, torch.Tensor]`): The batch of `ImageLoader`, on the CPU, with the uint8 originals.

        Returns:
            `torch.Tensor`: Features (B, N, F) in float32 on the device of `pixel_values`.
        """
        positions = (2 * batch["index"] + batch["flipped"]).tolist()
        pixels = [zlib.crc32(view.numpy()) for view in batch["pixel_values"].contiguous()]
        stored = list(self._pool.map(self._read, positions, pixels))
        if all(record is not None for record in stored):
            features = torch.stack([torch.frombuffer(record, dtype=self.dtype) for record in stored])
            features = features.view(-1, *self.shape)
            if pixel_values.device.type == "cuda":
                features = features.pin_memory()
            return features.to(pixel_values.device, non_blocking=True).float()

        features = self.teacher(pixel_values)
        missing = [row for row, record in enumerate(stored) if record is None]
        records = features[missing].to("cpu", self.dtype).contiguous().view(torch.uint8).numpy()
        for row, record in zip(missing, records, strict=True):
            self._write(positions[row], pixels[row], record.tobytes())
        return features

    def _read(self, position: int, pixels: int) -> bytearray | None:
        record = bytearray(self.record_bytes)
        size = os.preadv(self._file, [record], position * self.record_bytes)
        (expected,) = _CHECKSUM.unpack_from(record)
        features = record[_CHECKSUM.size :]
        return features if size == self.record_bytes and _checksum(features, pixels) == expected else None

    def _write(self, position: int, pixels: int, features: bytes) -> None:
        if self._disk_is_full:
            return
        record = _CHECKSUM.pack(_checksum(features, pixels)) + features
        try:
            os.pwrite(self._file, record, position * self.record_bytes)
        except OSError as error:
            self._disk_is_full = True
            logger.warning("Teacher features are no longer cached: %s: %s", self.path, error)


def _checksum(features: bytes | bytearray, pixels: int) -> int:
    return 1 << 32 | zlib.crc32(features, pixels)  # never 0, which is what a hole in the file reads as
