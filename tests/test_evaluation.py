"""The evaluation library: arithmetic against independent implementations, streaming, references, networks and the loop."""

import os
import sys
import warnings
from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from record_torch_fidelity import draw_images, draw_weights
from tiny import TinyClassifier, encoder, random_images, reference_of
from training_runs import TEACHER, in_two_processes
from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

from pixelrepa_diffusers import evaluation
from pixelrepa_diffusers.evaluation import (
    FeatureBank,
    FeatureMoments,
    FeatureSpace,
    FeatureStatistics,
    InceptionNetwork,
    InceptionScoreSums,
    VisionEncoderNetwork,
    accumulate,
    evaluate_pipeline,
    extract,
    file_images,
    frechet_distance,
    gather,
    network_sha256,
    open_spaces,
    pipeline_images,
    precision_recall,
    results,
    stack_images,
)
from pixelrepa_diffusers.images import list_images
from pixelrepa_diffusers.sampling import seeded


RECORDED = Path(__file__).parent / "fixtures" / "metrics"  # by record_torch_fidelity.py


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture(scope="module")
def recorded():
    with np.load(RECORDED / "torch_fidelity.npz") as file:
        return dict(file)


@pytest.fixture
def load(tmp_path):
    return lambda name, **kwargs: evaluation.load(name, cache_dir=str(tmp_path / "evaluate"), **kwargs)


def moments_of(*batches) -> FeatureMoments:
    moments = FeatureMoments()
    for batch in batches:
        moments.update(batch)
    return moments


def statistics_of(*batches) -> FeatureStatistics:
    return FeatureStatistics.from_moments(moments_of(*batches))


def scores_of(logits, **options) -> InceptionScoreSums:
    """In four batches, the last images first."""
    scores = InceptionScoreSums(len(logits), **options)
    for batch in np.array_split(np.arange(len(logits))[::-1].copy(), 4):
        scores.update(logits[batch], batch)
    return scores


def test_frechet_distance_of_commuting_covariances(rng):
    rotation = np.linalg.qr(rng.normal(size=(40, 40)))[0]
    a, b = rng.uniform(0.1, 5, (2, 40))
    a[:25], b[12:25] = 0, 0
    mu1, mu2 = rng.normal(size=(2, 40))
    expected = ((mu1 - mu2) ** 2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    sigma1, sigma2 = (rotation * a) @ rotation.T, (rotation * b) @ rotation.T
    assert frechet_distance(mu1, sigma1, mu2, sigma2) == pytest.approx(expected, rel=1e-12)


def test_frechet_distance_is_exact_for_singular_covariances(rng):
    # With rank one, A₁ = a and A₂ = b are vectors and tr (Σ₁Σ₂)^½ = |a·b|; eigenvalues of Σ₁Σ₂ give 1e-8 here.
    a, b = rng.normal(size=(2, 200))
    expected = a @ a + b @ b - 2 * abs(a @ b)
    distance = frechet_distance(np.zeros(200), np.outer(a, a), np.zeros(200), np.outer(b, b))
    assert distance == pytest.approx(expected, rel=1e-13)
    constant = statistics_of(np.full((30, 4), 2.0))  # no variance
    assert constant.distance(FeatureStatistics(np.zeros(4), np.eye(4))) == pytest.approx(4 * 2.0**2 + 4)


# ----------------------------------------------------------------------------------------------------------- streaming


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_streamed_moments_equal_numpy(rng, dtype):
    features = torch.from_numpy(rng.normal(size=(101, 7)) * rng.uniform(0.01, 10, 7)).to(dtype)
    moments, exact = moments_of(*features.tensor_split([1, 2, 40, 40, 90])), features.double().numpy()
    assert moments.count == 101
    np.testing.assert_allclose(moments.mean, exact.mean(0), rtol=1e-13, atol=1e-15)
    np.testing.assert_allclose(moments.covariance, np.cov(exact, rowvar=False), rtol=1e-11, atol=1e-14)
    far = moments_of(*np.split(exact[:100] + 1e7, 10))  # a large mean does not cancel the covariance
    np.testing.assert_allclose(far.covariance, np.cov(exact[:100], rowvar=False), atol=1e-6)


@pytest.mark.parametrize(
    "accumulator, value, message", [(FeatureMoments, np.nan, "NaN"), (FeatureBank, 7e4, "overflow float16")]
)
def test_features_that_are_not_finite_are_refused(accumulator, value, message):
    with pytest.raises(ValueError, match=message):
        accumulator().update(np.array([[1, value]]))


def _on_two_processes(folder, features, logits, real):
    rank = Accelerator(cpu=True).process_index
    moments, bank, scores = FeatureMoments(), FeatureBank(), InceptionScoreSums(60)
    for batch in np.array_split(np.arange(60)[rank::2], 4):
        moments.update(features[batch]), bank.update(features[batch]), scores.update(logits[batch], batch)
    moments, bank, scores = (gather(accumulator) for accumulator in (moments, bank, scores))
    fid = evaluation.load("fid", cache_dir=folder)
    if rank == 1:  # process 0 has no images
        fid.add_batch(features=features)
    np.savez(
        f"{folder}/{rank}.npz",
        mean=moments.mean,
        covariance=moments.covariance,
        bank=np.sort(bank.features, axis=0),
        scores=list(scores.compute().values()),
        fid=fid.compute(reference=real)["fid"],
    )


def test_two_processes_equal_one_also_without_images(rng, tmp_path):
    features, logits = rng.normal(size=(60, 6)) + 2, rng.normal(size=(60, 5)) * 3
    real, one = FeatureStatistics(np.zeros(6), np.eye(6)), moments_of(features)
    in_two_processes(_on_two_processes, str(tmp_path), features, logits, real)
    ranks = [dict(np.load(tmp_path / f"{rank}.npz")) for rank in (0, 1)]
    assert all(np.array_equal(ranks[0][name], ranks[1][name]) for name in ranks[0])
    np.testing.assert_allclose(ranks[0]["mean"], one.mean, rtol=1e-13)
    np.testing.assert_allclose(ranks[0]["covariance"], one.covariance, rtol=1e-12, atol=1e-15)
    np.testing.assert_array_equal(ranks[0]["bank"], np.sort(features.astype(np.float16), axis=0))
    np.testing.assert_allclose(ranks[0]["scores"], list(scores_of(logits).compute().values()), rtol=1e-13)
    assert ranks[0]["fid"] == pytest.approx(FeatureStatistics.from_moments(one).distance(real), rel=1e-12)


# ------------------------------------------------------------------------------------------------ precision and recall


def share_inside(queries, centres, k):
    def distance(a, b):
        return np.sqrt(((a - b) ** 2).sum())

    radii = [sorted(distance(a, b) for j, b in enumerate(centres) if j != i)[k - 1] for i, a in enumerate(centres)]
    return np.mean([any(distance(q, c) <= r for c, r in zip(centres, radii, strict=True)) for q in queries])


@pytest.mark.parametrize("k, offset", [(1, 0), (3, 1e6)])
def test_precision_and_recall_equal_brute_force(rng, k, offset):
    generated, real = rng.normal(size=(40, 4)) * 1.2 + 0.5 + offset, rng.normal(size=(30, 4)) + offset
    result = precision_recall(generated, torch.from_numpy(real), k=k, batch_size=7)
    assert result["precision"] == pytest.approx(share_inside(generated, real, k), abs=1e-15)
    assert result["recall"] == pytest.approx(share_inside(real, generated, k), abs=1e-15)
    assert 0 < result["precision"] < 1 and 0 < result["recall"] < 1


def test_rounding_does_not_decide_about_copies(rng):
    # A coarse lattice has many copies and many equal distances.
    generated, real = (rng.integers(0, 4, (count, 3)) / 3 + 7 for count in (40, 30))
    result = precision_recall(generated, real, k=3, batch_size=11)
    assert result == {"precision": share_inside(generated, real, 3), "recall": share_inside(real, generated, 3)}
    repeated = np.repeat(rng.normal(size=(30, 6)), 5, axis=0)  # balls of radius 0
    for features in (rng.normal(size=(20, 6)).astype(np.float16), np.full((10, 6), 0.3), repeated):
        assert precision_recall(features, np.roll(features, 5, axis=0)) == {"precision": 1, "recall": 1}
        assert precision_recall(features, features + 100) == {"precision": 0, "recall": 0}


# --------------------------------------------------------------------------------------- parity with torch-fidelity


def test_fid_equals_torch_fidelity(recorded):
    generated, real = (
        statistics_of(*np.array_split(recorded[f"features_{name}"], 7)) for name in ("generated", "real")
    )
    # torch-fidelity averages float32 features in float32; given float64 features it agrees to rounding.
    assert generated.distance(real) == pytest.approx(float(recorded["fid"]), rel=1e-6)
    assert generated.distance(real) == pytest.approx(float(recorded["fid_float64"]), rel=1e-11)


@pytest.mark.parametrize("seed, prefix", [(2020, "isc"), (None, "isc_unshuffled")])
def test_inception_score_equals_torch_fidelity(recorded, seed, prefix):
    scores = scores_of(recorded["logits_generated"], shuffle_seed=seed)
    expected = [float(recorded[f"{prefix}_{part}"]) for part in ("mean", "std")]
    assert list(scores.compute().values()) == pytest.approx(expected, rel=1e-12)


def test_precision_and_recall_equal_torch_fidelity(recorded):
    result = precision_recall(recorded["features_generated"][:60], recorded["features_generated"][60:])
    # torch-fidelity returns float32 means.
    assert result == pytest.approx({name: float(recorded[name]) for name in result}, rel=1e-6)


def test_inception_network_equals_torch_fidelity_where_installed(recorded, tmp_path, load):
    pytest.importorskip("torch_fidelity", reason="its torchvision cannot be imported beside CPU builds of torch")
    torch.save(draw_weights(int(recorded["weights_seed"])), tmp_path / "weights.pth")
    seed = int(recorded["images_seed"])
    generated, real = draw_images(120, tint=0, seed=seed), draw_images(100, tint=64, seed=seed + 1)
    network = InceptionNetwork(tmp_path / "weights.pth")
    reference = statistics_of(*(extract(network, batch)["features"] for batch in real.split(64)))
    assert len(reference.mu) == 2048
    with pytest.warns(UserWarning, match="covariance is singular"):
        result = load("fid", network=network).compute(images=generated, reference=reference)
    # Convolutions sum in another order from one batch size and one build of torch to the next.
    assert result["fid"] == pytest.approx(float(recorded["fid_2048"]), rel=1e-5)
    result = load("inception_score", network=network).compute(images=generated[:40])
    assert result["inception_score"] == pytest.approx(float(recorded["isc_mean"]), rel=1e-5)


# ------------------------------------------------------------------------------------------------ reference statistics


def test_statistics_survive_saving(tmp_path):
    statistics = reference_of(TinyClassifier(), random_images(9))
    statistics.save(tmp_path / "reference.npz")
    loaded = FeatureStatistics.load(tmp_path / "reference.npz")
    assert (loaded.count, loaded.network, loaded.sha256) == (9, "TinyClassifier", statistics.sha256)
    assert loaded.network_sha256 == statistics.network_sha256 == network_sha256(TinyClassifier())
    assert loaded.features.dtype == np.float16 and np.array_equal(loaded.features, statistics.features)
    assert [path.name for path in tmp_path.iterdir()] == ["reference.npz"]


def test_files_of_other_programs_are_references_unless_damaged(tmp_path):
    # The layout of jit_in256_stats.npz and clean-fid; ADM's files hold more arrays.
    path = tmp_path / "stats.npz"
    np.savez(path, mu=np.arange(5, dtype=np.float32), sigma=np.eye(5, dtype=np.float32), mu_s=[0])
    loaded = FeatureStatistics.load(path)
    assert loaded.count is None and loaded.mu.dtype == loaded.sigma.dtype == np.float64
    assert np.array_equal(loaded.sigma, np.eye(5))
    os.truncate(path, 100)
    with pytest.raises(ValueError, match=r"stats\.npz cannot be read"):
        FeatureStatistics.load(path)


@pytest.mark.parametrize(
    "arrays, message", [({}, "sigma"), ({"sigma": np.eye(2)}, "shape"), ({"sigma": np.full((3, 3), np.nan)}, "finite")]
)
def test_unfit_reference_files_are_refused_by_name(tmp_path, arrays, message):
    np.savez(tmp_path / "bad.npz", mu=np.zeros(3), **arrays)
    with pytest.raises(ValueError, match=r"bad\.npz cannot be read.*" + message):
        FeatureStatistics.load(tmp_path / "bad.npz")


def test_statistics_of_different_networks_are_not_compared():
    one = FeatureStatistics(np.zeros(2), np.eye(2), 10, "dinov2", "00")
    with pytest.raises(ValueError, match=r"dinov2 .* and inception"):
        one.distance(FeatureStatistics(np.zeros(2), np.eye(2), 10, "inception", "11"))
    with pytest.raises(ValueError, match=r"width 2\) and unknown \(width 3"):
        one.distance(FeatureStatistics(np.zeros(3), np.eye(3)))


def test_fewer_images_than_dimensions_warn(rng):
    reference, features = FeatureStatistics(np.zeros(20), np.eye(20)), rng.normal(size=(21, 20))
    with pytest.warns(UserWarning, match="20 images for features of width 20"):
        assert statistics_of(features[:20]).distance(reference) > 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        statistics_of(features).distance(reference)


# ---------------------------------------------------------------------------------------------------- feature networks


@pytest.mark.parametrize("pooling", ["class", "patches"])
@pytest.mark.parametrize("size", [20, 28, 100])
def test_vision_encoder_features_are_tokens_of_images_resized_as_by_pil(rng, size, pooling):
    network = VisionEncoderNetwork.from_pretrained(TEACHER, image_size=28, pooling=pooling)
    images = rng.integers(0, 256, (2, size, size, 3), dtype=np.uint8)
    bands = [[Image.fromarray(image[..., band].astype(np.float32)) for band in range(3)] for image in images]
    resized = [[np.asarray(band.resize((28, 28), Image.Resampling.BICUBIC)) for band in image] for image in bands]
    mean, std = (np.array(value)[:, None, None] for value in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    pixels = (np.clip(np.stack(resized) / 255, 0, 1) - mean) / std
    tokens = network.model(torch.from_numpy(pixels).float()).last_hidden_state
    expected = tokens[:, 0] if pooling == "class" else tokens[:, 1:].mean(1)
    torch.testing.assert_close(extract(network, images)["features"], expected, rtol=1e-3, atol=1e-4)


def test_encoders_with_and_without_a_class_token():
    tiny = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    tiny.update(image_size=16, patch_size=8)
    half = ((0.5,) * 3, (0.5,) * 3, 16)
    clip, siglip = CLIPVisionModel(CLIPVisionConfig(**tiny)), SiglipVisionModel(SiglipVisionConfig(**tiny))
    for network in (VisionEncoderNetwork(clip, *half), VisionEncoderNetwork(siglip, *half, pooling="patches")):
        assert extract(network, random_images(2))["features"].shape == (2, 8)
    with pytest.raises(ValueError, match="no class token"):
        extract(VisionEncoderNetwork(siglip, *half, pooling="class"), random_images(2))
    with pytest.raises(ValueError, match="multiple of the model's patch of 14, got 32"):
        VisionEncoderNetwork.from_pretrained(TEACHER, image_size=32)


def test_network_hash_follows_weights_and_settings():
    assert network_sha256(encoder()) == network_sha256(encoder())
    assert network_sha256(encoder()) != network_sha256(VisionEncoderNetwork.from_pretrained(TEACHER, image_size=42))
    assert network_sha256(TinyClassifier(0)) == network_sha256(TinyClassifier(0)) != network_sha256(TinyClassifier(1))
    # Reference files store the hash, so it must not change between releases.
    assert network_sha256(encoder()).startswith("d8c1be200a467d5222c85b90")


def test_missing_torch_fidelity_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(ImportError, match=r"pixelrepa-diffusers\[eval\]"):
        InceptionNetwork()


def test_images_may_be_pil_arrays_or_tensors():
    tensor = random_images(3)
    arrays = tensor.permute(0, 2, 3, 1).numpy()
    for images in (arrays, list(arrays), [Image.fromarray(array) for array in arrays]):
        assert torch.equal(stack_images(images), tensor)
    assert stack_images([Image.new("L", (4, 4), 7)]).unique().tolist() == [7]
    for images in (tensor.float(), tensor.movedim(1, 3)):
        with pytest.raises(ValueError, match="8-bit RGB"):
            stack_images(images)


# ------------------------------------------------------------------------------------------------------ evaluate modules


def test_modules_on_images_equal_the_functions(rng, load, tmp_path):
    network, images = TinyClassifier(), random_images(40)
    reference = reference_of(network, random_images(40, seed=2) // 2)
    reference.save(tmp_path / "real.npz")
    outputs = extract(network, images)

    expected = pytest.approx(statistics_of(outputs["features"]).distance(reference))
    for name in ("fid", "fd_dinov2"):
        metric = load(name, network=network, batch_size=7)
        assert metric.compute(images=images, reference=tmp_path / "real.npz") == {name: expected}
        for image in images.permute(0, 2, 3, 1).numpy():
            metric.add(images=Image.fromarray(image))
        assert metric.compute(reference=reference) == {name: expected}  # without the images of the first `compute`

    expected = precision_recall(outputs["features"].half(), reference.features, k=2)
    assert load("precision_recall", network=network).compute(images=images, reference=reference, k=2) == expected

    combined = evaluate.combine([load(name, network=network) for name in ("fid", "fd_dinov2")])
    combined.add_batch(images=images)
    assert len(set(combined.compute(reference=reference).values())) == 1

    metric = load("inception_score", network=network, batch_size=9)
    metric.add_batch(images=images[:25])
    metric.add_batch(images=images[25:])
    assert metric.compute(splits=4) == pytest.approx(scores_of(outputs["logits"], splits=4).compute())


def test_modules_take_features_of_any_origin(rng, load):
    features, real = rng.normal(size=(30, 4)), rng.normal(size=(30, 4))
    expected = statistics_of(features).distance(statistics_of(real))
    assert load("fid").compute(features=features, reference=statistics_of(real)) == {"fid": pytest.approx(expected)}
    expected = precision_recall(features.astype(np.float16), real)
    assert load("precision_recall").compute(features=features, reference=real) == expected
    assert load("inception_score").compute(features=np.zeros((10, 4)))["inception_score"] == 1


def test_modules_refuse_features_of_another_network(load):
    reference = FeatureStatistics(np.zeros(12), np.eye(12), 20, "another", "00", features=np.zeros((20, 12)))
    for name in ("fid", "precision_recall"):
        with pytest.raises(ValueError, match="different networks"):
            load(name, network=TinyClassifier()).compute(images=random_images(20), reference=reference)
    with pytest.raises(ValueError, match="choose from fid, inception_score, precision_recall, fd_dinov2"):
        load("FID")


# ------------------------------------------------------------------------------------------------------------- the loop


def test_streamed_metrics_of_a_pipeline_equal_those_of_all_images(make_pipeline):
    network = TinyClassifier()
    reference = reference_of(network, random_images(30))
    metrics = ["fid", "inception_score", "precision_recall"]
    spaces = open_spaces(metrics, 30, {"inception": lambda: network}, {"inception": reference})
    pipeline = make_pipeline(guidance_scale=1.5)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    values = evaluate_pipeline(pipeline, spaces, num_images=30, batch_size=7, seed=5, num_inference_steps=2)
    assert torch.equal(torch.get_rng_state(), state)

    made = pipeline([*range(10)] * 3, generator=seeded(range(5, 35)), num_inference_steps=2).images
    np.testing.assert_array_equal(
        pipeline_images(pipeline, 30, 5, num_inference_steps=2)(range(30)), stack_images(made)
    )
    outputs = extract(network, made)
    fid = statistics_of(outputs["features"]).distance(reference)
    expected = {"fid": fid, **scores_of(outputs["logits"]).compute()}
    expected |= precision_recall(outputs["features"].half(), reference.features)
    assert list(values) == ["fid", "inception_score", "inception_score_std", "precision", "recall"]
    assert values == pytest.approx(expected, rel=1e-5)


def test_resumed_evaluation_is_bit_exact_and_repeats_no_image(tmp_path):
    network, images, state = TinyClassifier(), random_images(50), tmp_path / "state.npz"
    reference = reference_of(network, random_images(40, seed=2))
    space = FeatureSpace("inception", network, ("fid", "inception_score", "precision_recall"), reference)
    options = {"num_shown": 3, "chunk_size": 16, "settings": {"seed": 0}}
    made = []

    def make_images(indices):
        made.append(indices)
        if len(made) == 4:  # in the second chunk
            raise KeyboardInterrupt
        return images[list(indices)]

    with pytest.raises(KeyboardInterrupt):
        accumulate(make_images, 50, [space], 8, state_path=state, **options)
    resumed = accumulate(make_images, 50, [space], 8, state_path=state, **options)
    assert made[4:] == [range(16, 24), range(24, 32), range(32, 40), range(40, 48), range(48, 50)]
    straight = accumulate(lambda indices: images[list(indices)], 50, [space], 8, **options)
    assert results(resumed, [space]) == results(straight, [space])
    assert np.array_equal(resumed.pictures(), images[:3].movedim(1, 3))
    at_once = accumulate(lambda indices: images[list(indices)], 50, [space], 50)
    assert results(resumed, [space]) == pytest.approx(results(at_once, [space]), rel=1e-10)

    with pytest.raises(ValueError, match="seed was 0 and is 1"):
        accumulate(make_images, 50, [space], 8, state_path=state, **{**options, "settings": {"seed": 1}})


@pytest.mark.parametrize(
    "metric, num_images, network, message",
    [
        ("fid", 1, TinyClassifier, "at least 2 images"),
        ("inception_score", 9, TinyClassifier, "at least 10 images"),
        ("precision_recall", 40, TinyClassifier, "--keep_features"),
        ("fid", 40, lambda: TinyClassifier(seed=1), "different networks"),
        ("fid", 40, encoder, "width 12.*width 24"),
    ],
)
def test_unsuitable_references_are_refused_before_an_image_is_made(metric, num_images, network, message):
    reference = reference_of(TinyClassifier(), random_images(40))
    reference.features = None
    with pytest.raises(ValueError, match=message):
        open_spaces([metric], num_images, {"inception": network}, {"inception": reference})


def test_image_files_have_one_size(tmp_path):
    for number, mode in enumerate(("L", "RGB")):
        Image.new(mode, (8, 6), 7).save(tmp_path / f"{number}.png")
    assert file_images(list_images(tmp_path))([0, 1]).shape == (2, 3, 6, 8)
    Image.new("RGB", (6, 8)).save(tmp_path / "2.png")
    with pytest.raises(ValueError, match=r"0\.png has 8×6 pixels, .*2\.png has 6×8"):
        file_images(list_images(tmp_path))
