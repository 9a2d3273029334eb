"""
Record what torch-fidelity computes, for tests/test_evaluation.py: `python tests/record_torch_fidelity.py OUTPUT_FILE.npz`.

Needs torch-fidelity and a torchvision that fits torch. Recorded with torch-fidelity 0.4.0 and torch 2.13.0 on a CPU, in
float32, with one thread. Images are random and so is the Inception network.
"""

import sys
import tempfile
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch


IMAGES_SEED, WEIGHTS_SEED = 0, 1


def draw_images(count: int, tint: int, seed: int) -> torch.Tensor:
    """Blurry random images, uint8 (count, 3, 32, 32); `tint` shifts the mean of a set."""
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 128, (count, 3, 4, 4)).repeat(8, axis=2).repeat(8, axis=3)
    return torch.from_numpy((coarse + generator.integers(0, 64, (count, 3, 32, 32)) + tint).astype(np.uint8))


def draw_weights(seed: int) -> dict[str, torch.Tensor]:
    """A state dict of torch-fidelity's Inception: He-normal kernels, and a last layer whose predictions differ."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    # Its constructor always loads weights.
    with (
        patch("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", return_value={}),
        patch.object(FeatureExtractorInceptionV3, "load_state_dict"),
    ):
        model = FeatureExtractorInceptionV3("random", ["2048"])
    generator = torch.Generator().manual_seed(seed)
    state_dict = model.state_dict()
    for name, weight in state_dict.items():
        if weight.ndim == 4:
            weight.normal_(0, (2 / weight[0].numel()) ** 0.5, generator=generator)
        elif name.startswith("fc."):
            weight.normal_(0, 1.0, generator=generator)
    return state_dict


def main(output: Path) -> None:
    from torch_fidelity import calculate_metrics
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    class Images(torch.utils.data.TensorDataset):
        def __getitem__(self, index):
            return self.tensors[0][index]

    torch.set_num_threads(1)
    generated = draw_images(120, tint=0, seed=IMAGES_SEED)
    real = draw_images(100, tint=64, seed=IMAGES_SEED + 1)
    with tempfile.TemporaryDirectory() as folder:
        weights = str(Path(folder) / "weights.pth")
        torch.save(draw_weights(WEIGHTS_SEED), weights)

        def measure(first: torch.Tensor, second: torch.Tensor | None = None, **options) -> dict[str, float]:
            inputs = {"input1": Images(first)} | ({} if second is None else {"input2": Images(second)})
            return calculate_metrics(
                **{**inputs, **options},
                feature_extractor="inception-v3-compat",
                feature_extractor_weights_path=weights,
                cuda=False,
                cache=False,
                verbose=False,
            )

        def run(layer: str, images: torch.Tensor) -> np.ndarray:
            network = FeatureExtractorInceptionV3("random", [layer], feature_extractor_weights_path=weights)
            return torch.cat([network(batch)[0] for batch in images.split(64)]).numpy()

        features = [run("64", images) for images in (generated, real)]
        statistics = [fid_features_to_statistics(torch.from_numpy(array).double()) for array in features]
        at_64, at_2048 = (measure(generated, real, fid=True, feature_layer_fid=layer) for layer in ("64", "2048"))
        halves = measure(generated[:60], generated[60:], prc=True, feature_layer_prc="64")
        isc, unshuffled = (measure(generated[:40], isc=True, samples_shuffle=shuffle) for shuffle in (True, False))
        np.savez_compressed(
            output,
            images_seed=IMAGES_SEED,
            weights_seed=WEIGHTS_SEED,
            features_generated=features[0],  # layer 64
            features_real=features[1],
            logits_generated=run("logits_unbiased", generated[:40]),
            fid=at_64["frechet_inception_distance"],
            fid_float64=fid_statistics_to_metric(*statistics, False)["frechet_inception_distance"],
            fid_2048=at_2048["frechet_inception_distance"],
            precision=halves["precision"],
            recall=halves["recall"],
            isc_mean=isc["inception_score_mean"],
            isc_std=isc["inception_score_std"],
            isc_unshuffled_mean=unshuffled["inception_score_mean"],
            isc_unshuffled_std=unshuffled["inception_score_std"],
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
