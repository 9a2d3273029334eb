"""Teacher features on disk: what a frozen teacher says of an image is computed once, not once an epoch.

A data set of n images needs n records, 2·n with flips; a record of DINOv2-base at 256 pixels in bfloat16 has 0.4 MB, so
this is for data sets of up to some hundred thousand images. Records are filled in as the images come by, during the first
epochs, by any number of processes, and may be shared by runs: everything that shapes a feature is in the file's name.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from accelerate.logging import get_logger

from ..evaluation import network_sha256
from ..teacher import SemanticTeacher


logger = get_logger(__name__)

_CHECKSUM = struct.Struct("<Q")


class CachedTeacher:
    """
    A teacher that looks its features up.

    A record holds one view (flipped or not) of one image: a checksum of the view's pixels and its features, and the
    features in the teacher's type. A record that is missing, cut off by a kill, damaged, or of other pixels than it is
    asked for fails its checksum, and is computed and written again; so a stale or broken file costs time, never a result.

    Args:
        teacher: frozen.
        folder: receives the file; created if needed.
        num_images: of the data set.
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
        self._full = False

    def __call__(self, pixel_values: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """
        Args:
            pixel_values: what the teacher is given, (B, 3, H, H) in [-1, 1], on the teacher's device.
            batch: of `data.ImageLoader`, on the CPU; its `pixel_values` are the uint8 originals of `pixel_values`.

        Returns:
            Features (B, N, F) float32 on the device of `pixel_values`.
        """
        places = (2 * batch["index"] + batch["flipped"]).tolist()
        pixels = [zlib.crc32(view.numpy()) for view in batch["pixel_values"].contiguous()]
        stored = list(self._pool.map(self._read, places, pixels))
        if all(record is not None for record in stored):
            rows = torch.stack([torch.frombuffer(record, dtype=self.dtype) for record in stored])
            rows = rows.view(-1, *self.shape)
            if pixel_values.device.type == "cuda":
                rows = rows.pin_memory()
            return rows.to(pixel_values.device, non_blocking=True).float()
        features = self.teacher(pixel_values)
        missing = [place for place, record in enumerate(stored) if record is None]
        rows = features[missing].to("cpu", self.dtype).contiguous().view(torch.uint8).numpy()
        if not self._full:
            for place, row in zip(missing, rows, strict=True):
                self._write(places[place], pixels[place], row.tobytes())
        return features

    def _read(self, place: int, pixels: int) -> bytearray | None:
        record = bytearray(self.record_bytes)
        size = os.preadv(self._file, [record], place * self.record_bytes)
        if size < self.record_bytes or _CHECKSUM.unpack_from(record)[0] != _checksum(
            memoryview(record)[_CHECKSUM.size :], pixels
        ):
            return None
        return record[_CHECKSUM.size :]

    def _write(self, place: int, pixels: int, features: bytes) -> None:
        record = _CHECKSUM.pack(_checksum(features, pixels)) + features
        try:
            written = os.pwrite(self._file, record, place * self.record_bytes)
        except OSError as error:
            self._full = True
            logger.warning(f"Teacher features are no longer stored: {self.path}: {error}.", main_process_only=False)
            return
        if written < len(record):  # the checksum of a part never fits
            self._full = True
            logger.warning(f"Teacher features are no longer stored: {self.path}: the disk is full.")


def _checksum(features: bytes | memoryview, pixels: int) -> int:
    return 1 << 32 | zlib.crc32(features, pixels)  # never 0, which a hole in the file reads as
