"""
Record what torch-fidelity computes, for tests/test_evaluation.py: `python tests/record_torch_fidelity.py OUTPUT_FOLDER`.

Needs torch-fidelity and a torchvision that fits torch. Recorded with torch-fidelity 0.4.0 and torch 2.13.0 on a CPU, in
float32, with one thread. Images are random and so is the Inception network: He-normal kernels, untouched batch norm, and a last
layer scaled so that predictions differ between images. `torch_fidelity.npz` then holds

    images_seed, weights_seed                   seeds of `draw_images` and `draw_weights`
    features_generated, features_real           layer 64, (120, 64) and (100, 64) float32
    logits_generated                            logits_unbiased of the first 40 generated images, (40, 1008) float32
    fid, fid_2048                               of the two sets at layers 64 and 2048
    fid_float64                                 its functions on the features of layer 64 in float64
    precision, recall                           of the first and the last 60 generated images, layer 64
    isc_mean, isc_std                           of the 40 images, with torch-fidelity's defaults (10 splits, shuffled)
    isc_unshuffled_mean, isc_unshuffled_std     the same with samples_shuffle=False

and `torch_fidelity_stat.pt` is its cache of the FID statistics of the real images.
"""

import shutil
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
    """A random state dict of torch-fidelity's Inception."""
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

    class Images(torch.utils.data.Dataset):
        def __init__(self, images):
            self.images = images

        def __len__(self):
            return len(self.images)

        def __getitem__(self, index):
            return self.images[index]

    torch.set_num_threads(1)
    output.mkdir(parents=True, exist_ok=True)
    generated = draw_images(120, tint=0, seed=IMAGES_SEED)
    real = draw_images(100, tint=64, seed=IMAGES_SEED + 1)
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "weights.pth"
        torch.save(draw_weights(WEIGHTS_SEED), weights)
        common = {
            "feature_extractor": "inception-v3-compat",
            "cuda": False,
            "feature_extractor_weights_path": str(weights),
            "verbose": False,
        }
        pair = {**common, "input1": Images(generated), "input2": Images(real), "cache_root": folder}
        pair["input2_cache_name"] = "real"
        at_64 = calculate_metrics(fid=True, feature_layer_fid="64", **pair)
        at_2048 = calculate_metrics(fid=True, **pair)
        halves = {**common, "input1": Images(generated[:60]), "input2": Images(generated[60:]), "cache": False}
        prc = calculate_metrics(prc=True, feature_layer_prc="64", **halves)
        first = {**common, "isc": True, "input1": Images(generated[:40]), "cache": False}
        isc, unshuffled = calculate_metrics(**first), calculate_metrics(samples_shuffle=False, **first)
        (cached,) = Path(folder).glob("*stat-fid-64.pt")
        shutil.copyfile(cached, output / "torch_fidelity_stat.pt")

        def run(layer: str, images: torch.Tensor) -> np.ndarray:
            network = FeatureExtractorInceptionV3("random", [layer], feature_extractor_weights_path=str(weights))
            return torch.cat([network(batch)[0] for batch in images.split(64)]).numpy()

        features = [run("64", images) for images in (generated, real)]
        statistics = [fid_features_to_statistics(torch.from_numpy(array).double()) for array in features]
        np.savez_compressed(
            output / "torch_fidelity.npz",
            images_seed=IMAGES_SEED,
            weights_seed=WEIGHTS_SEED,
            features_generated=features[0],
            features_real=features[1],
            logits_generated=run("logits_unbiased", generated[:40]),
            fid=at_64["frechet_inception_distance"],
            fid_float64=fid_statistics_to_metric(*statistics, False)["frechet_inception_distance"],
            fid_2048=at_2048["frechet_inception_distance"],
            precision=prc["precision"],
            recall=prc["recall"],
            isc_mean=isc["inception_score_mean"],
            isc_std=isc["inception_score_std"],
            isc_unshuffled_mean=unshuffled["inception_score_mean"],
            isc_unshuffled_std=unshuffled["inception_score_std"],
        )
    for name, array in np.load(output / "torch_fidelity.npz").items():
        print(name, array if array.ndim == 0 else (array.shape, array.mean(), array.std()))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
