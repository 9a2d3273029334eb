# Copyright 2026 The pixelrepa_diffusers authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""FID, Inception Score, precision and recall, and FD-DINOv2, streamed and distributed.

As `evaluate` modules:

    fid = metrics.load("fid")
    fid.add_batch(images=images)                             # PIL or uint8, or features=…
    fid.compute(reference="jit_in256_stats.npz")             # {"fid": …}

As plain pieces, one pass of the network for several metrics:

    moments, bank, scores = FeatureMoments(), FeatureBank(), InceptionScoreSums(num_images=50_000)
    for indices, images in batches:
        outputs = extract(network, images)                   # uint8 (B, 3, H, W) → features (B, D), logits (B, C)
        moments.update(outputs["features"]), bank.update(outputs["features"]), scores.update(outputs["logits"], indices)
    FeatureStatistics.from_moments(gather(moments)).distance(FeatureStatistics.load("reference.npz"))

Feature width, number of images and numeric type are checked on the way; see the functions.
"""

from ..images import list_images, read_image
from .loop import (
    HIGHER_IS_BETTER,
    METRICS,
    FeatureSpace,
    accumulate,
    evaluate_pipeline,
    feature_statistics,
    file_images,
    finished_record,
    open_spaces,
    pipeline_images,
    results,
)
from .networks import (
    InceptionNetwork,
    VisionEncoderNetwork,
    extract,
    network_name,
    network_sha256,
    stack_images,
)
from .reference import FeatureStatistics
from .statistics import (
    FeatureBank,
    FeatureMoments,
    InceptionScoreSums,
    frechet_distance,
    gather,
    precision_recall,
)


__all__ = [
    "HIGHER_IS_BETTER",
    "METRICS",
    "FeatureBank",
    "FeatureMoments",
    "FeatureSpace",
    "FeatureStatistics",
    "InceptionNetwork",
    "InceptionScoreSums",
    "VisionEncoderNetwork",
    "accumulate",
    "evaluate_pipeline",
    "extract",
    "feature_statistics",
    "file_images",
    "finished_record",
    "frechet_distance",
    "gather",
    "list_images",
    "load",
    "network_name",
    "network_sha256",
    "open_spaces",
    "pipeline_images",
    "precision_recall",
    "read_image",
    "results",
    "stack_images",
]

MODULE_NAMES = ("fid", "inception_score", "precision_recall", "fd_dinov2")


def load(name: str, **kwargs):
    """One of the `evaluate` modules `fid`, `inception_score`, `precision_recall`, `fd_dinov2`.

    Args:
        name: which one.
        kwargs: `network`, `batch_size` and the arguments of `evaluate.Metric`; see `metrics.modules.StreamingMetric`.

    Returns:
        An `evaluate.Metric`; its `inputs_description` says what `compute` takes.

    Raises:
        ValueError: unknown name.
    """
    if name not in MODULE_NAMES:
        raise ValueError(f"There is no metric {name!r}; there are {', '.join(MODULE_NAMES)}.")
    # Late, because importing `evaluate` takes about 4 s.
    from .scores import MODULES

    return MODULES[name](**kwargs)
