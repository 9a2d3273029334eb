"""
FID, Inception Score, precision and recall, and FD-DINOv2, streamed and distributed.

As `evaluate` modules:

    fid = load("fid")
    fid.add_batch(images=images)                             # PIL or uint8, or features=…
    fid.compute(reference="jit_in256_stats.npz")             # {"fid": …}

Several metrics of a pipeline in one pass, see [`evaluate_pipeline`]:

    networks, references = {"inception": InceptionNetwork}, {"inception": "jit_in256_stats.npz"}
    spaces = open_spaces(["fid", "inception_score"], 50_000, networks, references)
    evaluate_pipeline(pipeline, spaces, num_images=50_000)   # {"fid": …, "inception_score": …, …}

As plain functions: [`extract`] features, accumulate them in [`FeatureMoments`], [`FeatureBank`] or [`InceptionScoreSums`],
[`gather`] over processes, and compare [`FeatureStatistics`].
"""

from .loop import (
    HIGHER_IS_BETTER,
    METRICS,
    FeatureSpace,
    MakeImages,
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
    "MakeImages",
    "VisionEncoderNetwork",
    "accumulate",
    "evaluate_pipeline",
    "extract",
    "feature_statistics",
    "file_images",
    "finished_record",
    "frechet_distance",
    "gather",
    "load",
    "network_name",
    "network_sha256",
    "open_spaces",
    "pipeline_images",
    "precision_recall",
    "results",
    "stack_images",
]


def load(name: str, **kwargs):
    """
    Create one of the `evaluate` modules `fid`, `inception_score`, `precision_recall` and `fd_dinov2`.

    Args:
        name (`str`): The metric.
        kwargs: `network`, `batch_size` and arguments of `evaluate.Metric`, see [`~scores.StreamingMetric`].

    Returns:
        `evaluate.Metric`: Its `inputs_description` documents the arguments of `compute`.
    """
    from .scores import MODULES  # importing `evaluate` takes seconds

    if name not in MODULES:
        raise ValueError(f"Unknown metric {name!r}, choose from {', '.join(MODULES)}.")
    return MODULES[name](**kwargs)
