"""
FID, Inception Score, precision and recall, and FD-DINOv2, streamed and distributed.

[`load`] creates `evaluate` modules; [`open_spaces`] and [`evaluate_pipeline`] measure several metrics of a pipeline in one
pass; [`extract`], the accumulators, [`gather`] and [`FeatureStatistics`] are the parts they are made of.
"""

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
    open_network,
    stack_images,
)
from .reference import FeatureStatistics
from .statistics import FeatureBank, FeatureMoments, InceptionScoreSums, frechet_distance, gather, precision_recall


def load(name: str, **kwargs):
    """
    Create an `evaluate` module.

        fid = load("fid")
        fid.add_batch(images=images)                             # PIL or uint8, or features=…
        fid.compute(reference="jit_in256_stats.npz")             # {"fid": …}

    Args:
        name (`str`): `"fid"`, `"inception_score"`, `"precision_recall"` or `"fd_dinov2"`.
        kwargs: `network`, `batch_size` and arguments of `evaluate.Metric`, see [`~scores.StreamingMetric`].

    Returns:
        `evaluate.Metric`: Its `inputs_description` documents the arguments of `compute`.
    """
    from .scores import MODULES  # importing `evaluate` takes seconds

    if name not in MODULES:
        raise ValueError(f"Unknown metric {name!r}, choose from {', '.join(MODULES)}.")
    return MODULES[name](**kwargs)
