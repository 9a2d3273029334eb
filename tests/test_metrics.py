import sys
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from accelerate import Accelerator, debug_launcher
from accelerate.state import AcceleratorState
from PIL import Image
from record_torch_fidelity import draw_images, draw_weights
from tiny import TinyClassifier
from training_runs import TEACHER
from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

from pixelrepa_diffusers import evaluation as metrics
from pixelrepa_diffusers.evaluation import (
    FeatureBank,
    FeatureMoments,
    FeatureStatistics,
    InceptionNetwork,
    InceptionScoreSums,
    VisionEncoderNetwork,
    extract,
    frechet_distance,
    gather,
    network_sha256,
    precision_recall,
)


FIXTURES = Path(__file__).parent / "fixtures"


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture(scope="module")
def recorded():
    with np.load(FIXTURES / "metrics" / "torch_fidelity.npz") as file:
        return dict(file)


def moments_of(*batches):
    moments = FeatureMoments()
    for batch in batches:
        moments.update(batch)
    return moments


def random_covariance(rng, size, rank=None):
    factor = rng.normal(size=(size, rank or size))
    return factor @ factor.T


def random_images(rng, count, size=16):
    return rng.integers(0, 256, (count, size, size, 3), dtype=np.uint8)


# ---------------------------------------------------------------------------------------------------------------------
# Fréchet distance


def test_frechet_distance_of_commuting_covariances_is_the_closed_form(rng):
    rotation = np.linalg.qr(rng.normal(size=(40, 40)))[0]
    for zeros in (0, 25):
        a, b = rng.uniform(0.1, 5, (2, 40))
        a[:zeros], b[zeros // 2 : zeros] = 0, 0
        mu1, mu2 = rng.normal(size=(2, 40))
        expected = ((mu1 - mu2) ** 2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
        sigma1, sigma2 = (rotation * a) @ rotation.T, (rotation * b) @ rotation.T
        assert frechet_distance(mu1, sigma1, mu2, sigma2) == pytest.approx(expected, rel=1e-12)


def test_frechet_distance_of_two_dimensional_gaussians_is_the_closed_form(rng):
    # tr (Σ₁Σ₂)^½ of 2 × 2 matrices is √(tr Σ₁Σ₂ + 2·√(det Σ₁ det Σ₂)), commuting or not.
    sigma1, sigma2 = random_covariance(rng, 2), random_covariance(rng, 2)
    root = np.sqrt(np.trace(sigma1 @ sigma2) + 2 * np.sqrt(np.linalg.det(sigma1) * np.linalg.det(sigma2)))
    expected = np.trace(sigma1) + np.trace(sigma2) - 2 * root
    assert frechet_distance(np.zeros(2), sigma1, np.zeros(2), sigma2) == pytest.approx(expected, rel=1e-12)


def test_frechet_distance_equals_the_matrix_square_root(rng):
    sigma1, sigma2, mu = random_covariance(rng, 30), random_covariance(rng, 30), rng.normal(size=30)
    root = scipy.linalg.sqrtm(sigma1 @ sigma2).real
    expected = (mu**2).sum() + np.trace(sigma1 + sigma2 - 2 * root)
    assert frechet_distance(mu, sigma1, np.zeros(30), sigma2) == pytest.approx(expected, rel=1e-10)


def test_frechet_distance_is_exact_for_singular_covariances(rng):
    # Of rank one, A₁ = a and A₂ = b are vectors and tr (Σ₁Σ₂)^½ = |a·b|; eigenvalues of Σ₁Σ₂ give 1e-8 here.
    a, b = rng.normal(size=(2, 200))
    expected = a @ a + b @ b - 2 * abs(a @ b)
    distance = frechet_distance(np.zeros(200), np.outer(a, a), np.zeros(200), np.outer(b, b))
    assert distance == pytest.approx(expected, rel=1e-13)


def test_frechet_distance_of_a_gaussian_to_itself_is_zero(rng):
    mu, sigma = rng.normal(size=50) + 100, random_covariance(rng, 50, rank=20)
    assert abs(frechet_distance(mu, sigma, mu, sigma)) < 1e-12 * np.trace(sigma)


def test_frechet_distance_refuses_what_are_not_two_gaussians(rng):
    with pytest.raises(ValueError, match=r"one width, got means \(3,\) and \(2,\)"):
        frechet_distance(np.zeros(3), np.eye(3), np.zeros(2), np.eye(2))
    with pytest.raises(ValueError, match="Not a covariance: eigenvalues from -1 to 2"):
        frechet_distance(np.zeros(2), np.diag([2.0, -1.0]), np.zeros(2), np.eye(2))


# ---------------------------------------------------------------------------------------------------------------------
# Streaming


def test_streaming_equals_all_at_once(rng):
    features = rng.normal(size=(101, 7)) * rng.uniform(0.01, 10, 7)
    moments = moments_of(*np.split(features, [1, 2, 40, 40, 90]))
    assert moments.count == 101
    np.testing.assert_allclose(moments.mean, features.mean(0), rtol=1e-13)
    np.testing.assert_allclose(moments.covariance, np.cov(features, rowvar=False), rtol=1e-11, atol=1e-14)


def test_a_large_mean_does_not_cancel_the_covariance(rng):
    noise = rng.normal(size=(500, 4))
    moments = moments_of(*np.split(noise + 1e7, 10))
    np.testing.assert_allclose(moments.covariance, np.cov(noise, rowvar=False), atol=1e-8)


def test_merged_halves_equal_the_whole(rng):
    features = rng.normal(size=(64, 5)) + 3
    whole, left = moments_of(features), moments_of(features[:20])
    left.merge(moments_of(features[20:]))
    left.merge(FeatureMoments())
    empty = FeatureMoments()
    empty.merge(whole)
    for merged in (left, empty):
        assert merged.count == 64
        np.testing.assert_allclose(merged.mean, whole.mean, rtol=1e-14)
        np.testing.assert_allclose(merged.scatter, whole.scatter, rtol=1e-12)


def test_merging_leaves_the_other_accumulator_alone(rng):
    empty, other = FeatureMoments(), moments_of(rng.normal(size=(4, 3)))
    empty.merge(other)
    before = other.scatter.copy()
    empty.update(rng.normal(size=(4, 3)))
    assert np.array_equal(other.scatter, before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_features_of_any_type_are_summed_in_float64(rng, dtype):
    features = torch.from_numpy(rng.normal(size=(300, 6))).to(dtype)
    expected = np.cov(features.double().numpy(), rowvar=False)
    np.testing.assert_allclose(moments_of(*features.split(7)).covariance, expected, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("accumulator", [FeatureMoments, FeatureBank])
def test_bad_features_are_named_by_batch_and_change_nothing(accumulator):
    good = accumulator()
    good.update(np.ones((4, 3)))
    bad = np.ones((4, 3))
    bad[2, 1] = np.nan
    with pytest.raises(ValueError, match="Batch 1: NaN or infinite features in 1 of 4 rows, the first is row 2"):
        good.update(bad)
    with pytest.raises(ValueError, match="Batch 1: features of width 2 after batches of width 3"):
        good.update(np.ones((4, 2)))
    with pytest.raises(ValueError, match=r"Batch 1: features must have shape \(images, width\), got \(3,\)"):
        good.update(np.ones(3))
    other = accumulator()
    other.update(np.ones((4, 2)))
    with pytest.raises(ValueError, match="Cannot merge features of widths"):
        good.merge(other)
    good.update(np.ones((1, 3)))
    assert good.count == 5 if accumulator is FeatureMoments else good.features.shape == (5, 3)


def test_a_feature_too_large_for_half_precision_is_refused():
    with pytest.raises(ValueError, match=r"Batch 0: a feature of size 7e\+04 does not fit float16"):
        FeatureBank().update(np.full((1, 2), 7e4))


def _on_two_processes(folder):
    AcceleratorState._reset_state(reset_partial_state=True)  # the parent's, of one process, was forked along
    rank = Accelerator(cpu=True).process_index
    features = np.random.default_rng(1).normal(size=(60, 6)) + 2
    logits = np.random.default_rng(2).normal(size=(60, 5)) * 3
    moments, bank, scores, lonely = FeatureMoments(), FeatureBank(), InceptionScoreSums(60), FeatureMoments()
    for batch in np.array_split(np.arange(60)[rank::2], 4):
        moments.update(features[batch]), bank.update(features[batch]), scores.update(logits[batch], batch)
    if rank == 1:  # process 0 has no batch
        lonely.update(features)
    moments, bank, scores, lonely = (gather(accumulator) for accumulator in (moments, bank, scores, lonely))
    fid = metrics.load("fid", cache_dir=folder)
    if rank == 1:
        fid.add_batch(features=features)
    reference = FeatureStatistics(np.zeros(6), np.eye(6))
    np.savez(
        f"{folder}/{rank}.npz",
        mean=moments.mean,
        covariance=moments.covariance,
        bank=np.sort(bank.features, axis=0),
        scores=list(scores.compute().values()),
        lonely=lonely.covariance,
        fid=fid.compute(reference=reference)["fid"],
    )


def test_two_processes_equal_one_also_when_one_has_no_batch(tmp_path):
    debug_launcher(_on_two_processes, args=(str(tmp_path),), num_processes=2)
    ranks = [dict(np.load(tmp_path / f"{rank}.npz")) for rank in (0, 1)]
    features = np.random.default_rng(1).normal(size=(60, 6)) + 2
    scores = InceptionScoreSums(60)
    scores.update(np.random.default_rng(2).normal(size=(60, 5)) * 3, np.arange(60))
    one = moments_of(features)
    for rank in ranks:
        np.testing.assert_allclose(rank["mean"], one.mean, rtol=1e-13)
        np.testing.assert_allclose(rank["covariance"], one.covariance, rtol=1e-12, atol=1e-15)
        np.testing.assert_allclose(rank["lonely"], one.covariance, rtol=1e-13)
        np.testing.assert_array_equal(rank["bank"], np.sort(features.astype(np.float16), axis=0))
        np.testing.assert_allclose(rank["scores"], list(scores.compute().values()), rtol=1e-13)
        expected = FeatureStatistics.from_moments(one).distance(FeatureStatistics(np.zeros(6), np.eye(6)))
        assert rank["fid"] == pytest.approx(expected, rel=1e-12)
    assert all(np.array_equal(ranks[0][name], ranks[1][name]) for name in ranks[0])


def test_gathering_without_the_other_processes_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match=r"WORLD_SIZE is 2, but accelerate set up 1 process\(es\)"):
        gather(FeatureMoments())


# ---------------------------------------------------------------------------------------------------------------------
# Inception Score


def brute_force_score(logits, order, splits):
    scores = []
    for part in np.array_split(order, splits):
        p = torch.from_numpy(logits[part]).double().softmax(1).numpy()
        divergences = [(row * np.log(row / p.mean(0))).sum() for row in p]
        scores.append(np.exp(np.mean(divergences)))
    return np.mean(scores), np.std(scores)


def test_inception_score_equals_its_definition_in_any_order_of_arrival(rng):
    logits = rng.normal(size=(50, 8)) * 2
    arrival = rng.permutation(50)
    scores, rest = InceptionScoreSums(50, splits=5, shuffle_seed=None), InceptionScoreSums(50, 5, None)
    for batch in np.array_split(arrival[:30], 4):
        scores.update(logits[batch], batch)
    rest.update(torch.from_numpy(logits[arrival[30:]]), arrival[30:])
    scores.merge(rest)
    expected = brute_force_score(logits, np.arange(50), 5)
    assert tuple(scores.compute().values()) == pytest.approx(expected, rel=1e-12)


def test_inception_score_is_one_without_and_the_class_count_with_perfect_variety():
    for logits, expected in ((np.zeros((20, 4)), 1), (np.tile(np.eye(4) * 1000, (5, 1)), 4)):
        scores = InceptionScoreSums(20, splits=5, shuffle_seed=None)
        scores.update(logits, np.arange(20))
        assert scores.compute() == {
            "inception_score": pytest.approx(expected),
            "inception_score_std": pytest.approx(0),
        }


def test_inception_score_refuses_a_wrong_image_count(rng):
    with pytest.raises(ValueError, match="of 9 images cannot be taken in 10 splits"):
        InceptionScoreSums(9)
    scores = InceptionScoreSums(20)
    scores.update(rng.normal(size=(10, 3)), np.arange(10))
    with pytest.raises(ValueError, match="Only 10 of 20 images were counted; index 10 is missing"):
        scores.compute()
    with pytest.raises(ValueError, match="Image index 20 is not in 0 … 19"):
        scores.update(rng.normal(size=(1, 3)), [20])
    with pytest.raises(ValueError, match="counted before"):
        scores.update(rng.normal(size=(1, 3)), [3])
    with pytest.raises(ValueError, match="counted before"):
        scores.update(rng.normal(size=(2, 3)), [11, 11])
    with pytest.raises(ValueError, match="one each is needed"):
        scores.update(rng.normal(size=(2, 3)), [11])
    with pytest.raises(ValueError, match="10 images were counted by two processes"):
        scores.merge(scores)
    with pytest.raises(ValueError, match="Cannot merge scores"):
        scores.merge(InceptionScoreSums(21))


# ---------------------------------------------------------------------------------------------------------------------
# Precision and recall


def brute_force_coverage(queries, centres, k):
    def distance(a, b):
        return np.sqrt(((a - b) ** 2).sum())

    radii = [sorted(distance(a, b) for j, b in enumerate(centres) if j != i)[k - 1] for i, a in enumerate(centres)]
    return np.mean([any(distance(q, c) <= r for c, r in zip(centres, radii, strict=True)) for q in queries])


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("offset", [0, 1e6])
def test_precision_and_recall_equal_brute_force(rng, k, offset):
    generated, real = rng.normal(size=(40, 4)) * 1.2 + 0.5 + offset, rng.normal(size=(30, 4)) + offset
    result = precision_recall(generated, torch.from_numpy(real), k=k, batch_size=7)
    assert result["precision"] == pytest.approx(brute_force_coverage(generated, real, k), abs=1e-15)
    assert result["recall"] == pytest.approx(brute_force_coverage(real, generated, k), abs=1e-15)
    assert 0 < result["precision"] < 1 and 0 < result["recall"] < 1


def test_precision_and_recall_of_copies_equal_brute_force(rng):
    # Coordinates on a coarse lattice: many copies and many equal distances, which rounding must not decide.
    generated, real = (rng.integers(0, 4, (count, 3)) / 3 + 7 for count in (40, 30))
    result = precision_recall(generated, real, k=3, batch_size=11)
    assert result["precision"] == brute_force_coverage(generated, real, 3)
    assert result["recall"] == brute_force_coverage(real, generated, 3)


def test_precision_and_recall_of_identical_and_of_disjoint_sets(rng):
    features = rng.normal(size=(20, 6)).astype(np.float16)
    assert precision_recall(features, features) == {"precision": 1, "recall": 1}
    assert precision_recall(features, features + 100) == {"precision": 0, "recall": 0}
    repeated = np.repeat(rng.normal(size=(30, 6)), 5, axis=0)  # balls of radius 0
    assert precision_recall(repeated, np.roll(repeated, 5, axis=0)) == {"precision": 1, "recall": 1}
    one_image = np.full((10, 6), 0.3)
    assert precision_recall(one_image, one_image) == {"precision": 1, "recall": 1}
    assert precision_recall(one_image, one_image + 1) == {"precision": 0, "recall": 0}


def test_half_precision_features_move_precision_and_recall_by_at_most_a_thousandth(rng):
    generated, real = rng.normal(size=(1000, 64)) * 0.9 + 0.1, rng.normal(size=(1000, 64))
    exact = precision_recall(generated, real)
    halved = precision_recall(generated.astype(np.float16), real.astype(np.float16))
    assert 0.05 < exact["recall"] < 0.95
    assert all(abs(exact[name] - halved[name]) <= 0.001 for name in exact)


def test_precision_and_recall_refuse_sets_they_cannot_compare(rng):
    with pytest.raises(ValueError, match="at least k \\+ 1 images, got 3 real images"):
        precision_recall(rng.normal(size=(9, 2)), rng.normal(size=(3, 2)))
    with pytest.raises(ValueError, match="width 2, real ones 3"):
        precision_recall(rng.normal(size=(9, 2)), rng.normal(size=(9, 3)))


# ---------------------------------------------------------------------------------------------------------------------
# Equality with torch-fidelity, recorded by tests/record_torch_fidelity.py


def test_fid_equals_torch_fidelity(recorded):
    generated, real = (
        FeatureStatistics.from_moments(moments_of(*np.array_split(recorded[f"features_{name}"], 7)))
        for name in ("generated", "real")
    )
    # torch-fidelity averages float32 features in float32; given float64 features it agrees to rounding.
    assert generated.distance(real) == pytest.approx(float(recorded["fid"]), rel=1e-6)
    assert generated.distance(real) == pytest.approx(float(recorded["fid_float64"]), rel=1e-11)


def test_inception_score_equals_torch_fidelity(recorded):
    for seed, prefix in ((2020, "isc"), (None, "isc_unshuffled")):
        scores = InceptionScoreSums(40, shuffle_seed=seed)
        for batch in np.array_split(np.arange(40)[::-1], 3):
            scores.update(recorded["logits_generated"][batch], batch)
        expected = [float(recorded[f"{prefix}_{part}"]) for part in ("mean", "std")]
        assert list(scores.compute().values()) == pytest.approx(expected, rel=1e-12)


def test_precision_and_recall_equal_torch_fidelity(recorded):
    result = precision_recall(recorded["features_generated"][:60], recorded["features_generated"][60:])
    # torch-fidelity returns float32 means.
    assert result == pytest.approx({name: float(recorded[name]) for name in result}, rel=1e-6)


def test_torch_fidelity_statistics_file_is_a_reference(recorded):
    statistics = FeatureStatistics.load(FIXTURES / "metrics" / "torch_fidelity_stat.pt")
    expected = moments_of(recorded["features_real"])
    np.testing.assert_allclose(statistics.mu, expected.mean, rtol=1e-6)
    np.testing.assert_allclose(statistics.sigma, expected.covariance, rtol=1e-5, atol=1e-9)


def test_inception_network_equals_torch_fidelity_where_it_is_installed(recorded, tmp_path, load):
    pytest.importorskip("torch_fidelity", reason="its torchvision cannot be imported beside CPU builds of torch")
    torch.save(draw_weights(int(recorded["weights_seed"])), tmp_path / "weights.pth")
    seed = int(recorded["images_seed"])
    generated, real = draw_images(120, tint=0, seed=seed), draw_images(100, tint=64, seed=seed + 1)
    moments, network = FeatureMoments(), InceptionNetwork(tmp_path / "weights.pth")
    for batch in real.split(64):
        moments.update(extract(network, batch)["features"])
    assert len(moments.mean) == 2048
    with pytest.warns(UserWarning, match="covariance is singular"):
        result = load("fid", network=network).compute(
            images=generated, reference=FeatureStatistics.from_moments(moments)
        )
    # Convolutions sum in another order from one batch size and one build of torch to the next.
    assert result["fid"] == pytest.approx(float(recorded["fid_2048"]), rel=1e-5)
    result = load("inception_score", network=network).compute(images=generated[:40])
    assert result["inception_score"] == pytest.approx(float(recorded["isc_mean"]), rel=1e-5)
    features = extract(InceptionNetwork(tmp_path / "weights.pth", layer="64"), generated[:8])["features"]
    np.testing.assert_allclose(features, recorded["features_generated"][:8], rtol=1e-5)


def test_inception_says_what_to_install_or_which_file_is_wrong(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(ImportError, match=r"pixelrepa-diffusers\[eval\].*torchvision must match the installed torch"):
        InceptionNetwork()
    with pytest.raises(FileNotFoundError, match="No Inception weights"):
        InceptionNetwork(tmp_path / "missing.pth")
    torch.save({"x": Path("x")}, tmp_path / "hostile.pth")
    with pytest.raises(ValueError, match="is not a file of Inception weights"):
        InceptionNetwork(tmp_path / "hostile.pth")


# ---------------------------------------------------------------------------------------------------------------------
# Reference statistics


def test_statistics_survive_saving(rng, tmp_path):
    bank, features = FeatureBank(), rng.normal(size=(9, 4))
    bank.update(features)
    statistics = FeatureStatistics.from_moments(moments_of(features), bank, "a network", "0123")
    statistics.save(tmp_path / "reference.npz")
    loaded = FeatureStatistics.load(tmp_path / "reference.npz")
    assert (loaded.count, loaded.network, loaded.network_sha256) == (9, "a network", "0123")
    assert loaded.sha256 == statistics.sha256
    assert loaded.features.dtype == np.float16 and np.array_equal(loaded.features, bank.features)
    with pytest.raises(FileExistsError, match="exists"):
        statistics.save(tmp_path / "reference.npz")
    assert [path.name for path in tmp_path.iterdir()] == ["reference.npz"]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_files_with_mu_and_sigma_are_references(rng, tmp_path, dtype):
    # The layout of jit_in256_stats.npz and clean-fid; ADM's has more arrays beside them.
    sigma = random_covariance(rng, 5).astype(dtype)
    np.savez(tmp_path / "stats.npz", mu=np.arange(5, dtype=dtype), sigma=sigma, mu_s=np.zeros(7))
    loaded = FeatureStatistics.load(tmp_path / "stats.npz")
    assert loaded.count is None and loaded.mu.dtype == loaded.sigma.dtype == np.float64
    assert np.array_equal(loaded.sigma, sigma)


def test_unusable_reference_files_are_refused_by_name(rng, tmp_path):
    good = {"mu": np.zeros(3), "sigma": np.eye(3)}
    nan, asymmetric = np.eye(3), np.eye(3)
    nan[0, 0], asymmetric[0, 1] = np.nan, 0.1
    for arrays, message in (
        ({"mu": np.zeros(3)}, "does not hold mu and sigma"),
        ({**good, "sigma": np.eye(2)}, r"shapes \(D,\) and \(D, D\), got \(3,\) and \(2, 2\)"),
        ({**good, "sigma": nan}, "sigma contains NaN"),
        ({**good, "sigma": asymmetric}, "not symmetric"),
        ({**good, "mu": np.array([None] * 3)}, "allow_pickle"),
        ({**good, "count": 4, "features": np.zeros((5, 3))}, r"features must have shape .* \(4, 3\), got \(5, 3\)"),
    ):
        np.savez(tmp_path / "bad.npz", **arrays)
        with pytest.raises(ValueError, match=r"bad\.npz cannot be used.*" + message):
            FeatureStatistics.load(tmp_path / "bad.npz")
    (tmp_path / "bad.npz").write_bytes((tmp_path / "bad.npz").read_bytes()[:100])
    assert not zipfile.is_zipfile(tmp_path / "bad.npz")
    with pytest.raises(ValueError, match=r"bad\.npz cannot be used"):
        FeatureStatistics.load(tmp_path / "bad.npz")
    torch.save({**good, "x": Path("x")}, tmp_path / "hostile.pt")
    with pytest.raises(ValueError, match=r"hostile\.pt cannot be used"):
        FeatureStatistics.load(tmp_path / "hostile.pt")
    with pytest.raises(ValueError, match=r"torch-fidelity's \.pt files"):
        FeatureStatistics.load(FIXTURES / "reference_a" / "config.json")
    with pytest.raises(FileNotFoundError, match="No reference statistics at"):
        FeatureStatistics.load(tmp_path / "missing.npz")


def test_statistics_of_different_networks_are_not_compared(rng):
    one, other = (FeatureStatistics(np.zeros(2), np.eye(2), 10, name, name) for name in ("dinov2", "inception"))
    with pytest.raises(ValueError, match=r"different feature networks: 'dinov2' .* and 'inception'"):
        one.distance(other)


def test_fewer_images_than_dimensions_are_scored_with_a_warning(rng):
    few = FeatureStatistics.from_moments(moments_of(rng.normal(size=(10, 20))))
    reference = FeatureStatistics(np.zeros(20), np.eye(20))
    with pytest.warns(UserWarning, match="10 images for features of width 20: the covariance is singular"):
        assert few.distance(reference) > 0
    enough = FeatureStatistics.from_moments(moments_of(rng.normal(size=(21, 20))))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        enough.distance(reference)


def test_identical_images_have_zero_covariance_and_a_defined_distance():
    statistics = FeatureStatistics.from_moments(moments_of(np.full((30, 4), 2.0)))
    assert not statistics.sigma.any()
    assert statistics.distance(statistics) == 0
    assert statistics.distance(FeatureStatistics(np.zeros(4), np.eye(4))) == pytest.approx(4 * 2.0**2 + 4)


def test_one_image_has_no_covariance():
    with pytest.raises(ValueError, match="at least 2 images, got 1"):
        FeatureStatistics.from_moments(moments_of(np.ones((1, 3))))
    with pytest.raises(ValueError, match="at least 2 images, got 0"):
        FeatureStatistics.from_moments(FeatureMoments())


# ---------------------------------------------------------------------------------------------------------------------
# Feature networks


@pytest.mark.parametrize("pooling", ["class", "patches"])
def test_vision_encoder_features_are_its_own_tokens(rng, pooling):
    network = VisionEncoderNetwork.from_pretrained(TEACHER, image_size=70, pooling=pooling)
    images = torch.from_numpy(random_images(rng, 3, size=70)).permute(0, 3, 1, 2)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pixels = (images / 255 - mean[:, None, None]) / std[:, None, None]
    tokens = network.model(pixels).last_hidden_state
    expected = tokens[:, 0] if pooling == "class" else tokens[:, 1:].mean(1)
    torch.testing.assert_close(extract(network, images)["features"], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [20, 33, 100])
def test_vision_encoder_resizes_images_of_any_size_as_pil_does(rng, size):
    network, seen = VisionEncoderNetwork.from_pretrained(TEACHER, image_size=28), []
    network.model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    images = random_images(rng, 2, size=size)
    assert extract(network, images)["features"].shape == (2, 24)
    bands = [[Image.fromarray(image[..., band].astype(np.float32)) for band in range(3)] for image in images]
    resized = [[np.asarray(band.resize((28, 28), Image.Resampling.BICUBIC)) for band in image] for image in bands]
    mean, std = (np.array(value)[:, None, None] for value in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    expected = (np.clip(np.stack(resized) / 255, 0, 1) - mean) / std
    np.testing.assert_allclose(seen[0].numpy(), expected, atol=1e-4)


def test_vision_encoder_settings_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="multiple of the model's patch of 14 pixels, got 32"):
        VisionEncoderNetwork.from_pretrained(TEACHER, image_size=32)
    with pytest.raises(ValueError, match="'class' or 'patches', got 'mean'"):
        VisionEncoderNetwork.from_pretrained(TEACHER, pooling="mean")


def test_encoders_with_and_without_a_class_token_are_told_apart(rng):
    tiny = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    tiny.update(image_size=16, patch_size=8)
    half = ((0.5,) * 3, (0.5,) * 3, 16)
    clip, siglip = CLIPVisionModel(CLIPVisionConfig(**tiny)), SiglipVisionModel(SiglipVisionConfig(**tiny))
    images = random_images(rng, 2)
    for network in (VisionEncoderNetwork(clip, *half), VisionEncoderNetwork(siglip, *half, pooling="patches")):
        assert extract(network, images)["features"].shape == (2, 8)
    with pytest.raises(ValueError, match="it has no class token"):
        extract(VisionEncoderNetwork(siglip, *half, pooling="class"), images)


def test_network_hash_follows_weights_and_settings():
    same = [VisionEncoderNetwork.from_pretrained(TEACHER, image_size=28) for _ in range(2)]
    other = VisionEncoderNetwork.from_pretrained(TEACHER, image_size=42)
    assert network_sha256(same[0]) == network_sha256(same[1]) != network_sha256(other)
    assert network_sha256(TinyClassifier(0)) == network_sha256(TinyClassifier(0)) != network_sha256(TinyClassifier(1))


def test_images_come_as_pil_arrays_or_tensors(rng):
    arrays = random_images(rng, 3)
    tensor = torch.from_numpy(arrays).permute(0, 3, 1, 2)
    for images in (arrays, list(arrays), [Image.fromarray(array) for array in arrays]):
        assert torch.equal(metrics.stack_images(images), tensor)
    assert metrics.stack_images([Image.new("L", (4, 4), 7)]).unique().tolist() == [7]


def test_unusable_images_and_networks_are_refused(rng):
    network = TinyClassifier()
    with pytest.raises(TypeError, match=r"8-bit images \(uint8\), got torch.float32"):
        extract(network, torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match="of one size, got the shapes"):
        extract(network, [np.zeros((8, 8, 3), np.uint8), np.zeros((9, 8, 3), np.uint8)])
    with pytest.raises(ValueError, match=r"shape \(B, 3, H, W\), got \(1, 8, 8, 3\)"):
        extract(network, torch.zeros(1, 8, 8, 3, dtype=torch.uint8))
    with pytest.raises(ValueError, match="train mode"):
        extract(TinyClassifier().train(), random_images(rng, 1))
    with pytest.raises(ValueError, match="one vector per image"):
        extract(torch.nn.Identity().eval(), random_images(rng, 1))


# ---------------------------------------------------------------------------------------------------------------------
# The `evaluate` modules


@pytest.fixture
def load(tmp_path):
    return lambda name, **kwargs: metrics.load(name, cache_dir=str(tmp_path / "evaluate"), **kwargs)


def test_modules_on_images_equal_the_plain_pieces(rng, load, tmp_path):
    network, images, real = TinyClassifier(), random_images(rng, 40), random_images(rng, 40) // 2
    moments, bank = FeatureMoments(), FeatureBank()
    for batch in np.split(real, 4):
        features = extract(network, batch)["features"]
        moments.update(features), bank.update(features)
    origin = metrics.network_name(network), network_sha256(network)
    reference = FeatureStatistics.from_moments(moments, bank, *origin)
    reference.save(tmp_path / "real.npz")
    outputs = extract(network, images)

    expected = FeatureStatistics.from_moments(moments_of(outputs["features"])).distance(reference)
    for name in ("fid", "fd_dinov2"):
        metric = load(name, network=network, batch_size=7)
        assert metric.compute(images=images, reference=tmp_path / "real.npz") == {name: pytest.approx(expected)}
        for image in images:
            metric.add(images=Image.fromarray(image))
        assert metric.compute(reference=reference) == {name: pytest.approx(expected)}

    expected = precision_recall(outputs["features"].half(), bank.features, k=2)
    metric = load("precision_recall", network=network)
    assert metric.compute(images=images, reference=reference, k=2) == expected

    sums = InceptionScoreSums(40, splits=4)
    sums.update(outputs["logits"], np.arange(40))
    metric = load("inception_score", network=network, batch_size=9)
    metric.add_batch(images=images[:25])
    metric.add_batch(images=images[25:])
    assert metric.compute(splits=4) == pytest.approx(sums.compute())


def test_modules_take_features_without_any_network(rng, load):
    features, real = rng.normal(size=(30, 4)), rng.normal(size=(30, 4))
    reference = FeatureStatistics.from_moments(moments_of(real))
    expected = FeatureStatistics.from_moments(moments_of(features)).distance(reference)
    assert load("fid").compute(features=features, reference=reference) == {"fid": pytest.approx(expected)}
    assert load("precision_recall").compute(features=features, reference=real) == precision_recall(
        features.astype(np.float16), real
    )
    assert load("inception_score").compute(features=np.zeros((10, 4)))["inception_score"] == 1


def test_modules_combine(rng, load):
    import evaluate

    network, images = TinyClassifier(), random_images(rng, 20)
    combined = evaluate.combine([load("fid", network=network), load("fd_dinov2", network=network)])
    combined.add_batch(images=images)
    reference = FeatureStatistics(np.zeros(12), np.eye(12))
    result = combined.compute(reference=reference)
    assert result["fid"] == result["fd_dinov2"] > 0


def test_module_refuses_what_it_cannot_score(rng, load):
    network, images = TinyClassifier(), random_images(rng, 20)
    reference = FeatureStatistics(np.zeros(12), np.eye(12), network="another", network_sha256="00")
    with pytest.raises(
        ValueError, match="no metric 'FID'; there are fid, inception_score, precision_recall, fd_dinov2"
    ):
        load("FID")
    with pytest.raises(ValueError, match="either images or features"):
        load("fid").add_batch()
    with pytest.raises(ValueError, match="num_process"):
        load("fid", num_process=2)
    with pytest.raises(ValueError, match=r"different feature networks: .*TinyClassifier.* and 'another'"):
        load("fid", network=network).compute(images=images, reference=reference)
    with pytest.raises(ValueError, match="hold no features"):
        load("precision_recall", network=network).compute(images=images, reference=reference)
    with pytest.raises(ValueError, match=r"needs logits, the network gives \['features'\]"):
        load("inception_score", network=torch.nn.Flatten().eval()).compute(images=images)


def test_module_starts_afresh_after_compute(rng, load):
    features, metric = rng.normal(size=(30, 4)), load("fid")
    reference = FeatureStatistics(np.zeros(4), np.eye(4))
    first = metric.compute(features=features, reference=reference)
    metric.compute(features=features + 1, reference=reference)
    assert metric.compute(features=features, reference=reference) == first
