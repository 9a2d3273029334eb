"""Random draws of training: the published generator, the arguments' distributions, and functions of (seed, step, image)."""

import itertools
import math

import pytest
import torch

from pixelrepa_diffusers.training.draws import BatchDraws, philox


SETTINGS = {"seed": 3, "P_mean": 0.3, "P_std": 0.5, "label_drop_prob": 0.3, "mask_ratio": 0.4}
CLASSES, TOKENS = 7, 25


def drawn(indices, step: int = 5, shape=(3, 2, 2), **changes) -> dict[str, torch.Tensor]:
    """Draws for images of `shape`, 25 tokens and 7 classes; the class of image i is i % 7."""
    index = torch.as_tensor(indices)
    draws = BatchDraws(num_classes=CLASSES, num_tokens=TOKENS, **{**SETTINGS, **changes})
    return draws(step, index, index % CLASSES, torch.Size(shape))


def correlation(one: torch.Tensor, other: torch.Tensor) -> float:
    """Correlation of two samples in standard deviations of that of independent ones."""
    return torch.corrcoef(torch.stack([one.flatten(), other.flatten()]).double())[0, 1].item() * math.sqrt(one.numel())


def excess(counts: torch.Tensor, expected: torch.Tensor) -> float:
    """The χ² of counts in standard deviations above its mean."""
    freedom = counts.numel() - 1
    return (((counts - expected) ** 2 / expected).sum().item() - freedom) / math.sqrt(2 * freedom)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_has_the_known_answers_of_random123(counter, key, expected):
    counter, key, expected = ([int(word, 16) for word in words.split()] for words in (counter, key, expected))
    assert [word.item() for word in philox(tuple(map(torch.tensor, counter)), tuple(key))] == expected


# ------------------------------------------------------------------------------------------------------- distributions


def test_noise_is_normal_in_its_moments_quantiles_and_maximum():
    noise = drawn(range(64), shape=(3, 105, 105))["noise"].double().flatten()  # 2.1 million
    n = len(noise)
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((noise**power).mean().item() - moment) < 4.5 * math.sqrt(variance / n), power
    assert noise.abs().max() > 4.9  # as in one of seven samples not; a radius of 16 bits ends at 4.85
    counts = torch.histc(torch.special.ndtr(noise), 4096, 0, 1)
    assert abs(excess(counts, torch.tensor(n / 4096))) < 4.5


def test_timesteps_labels_and_masks_have_the_distributions_of_the_arguments():
    n = 100_000
    draws = drawn(range(n), shape=(1, 1, 1))
    logits = (draws["timestep"].double().logit() - 0.3) / 0.5
    assert abs(logits.mean()) < 4.5 / math.sqrt(n) and abs(logits.square().mean() - 1) < 4.5 * math.sqrt(2 / n)
    assert abs(excess(torch.histc(torch.special.ndtr(logits), 256, 0, 1), torch.tensor(n / 256))) < 4.5
    given, dropped = torch.arange(n) % CLASSES, draws["class_labels"] == CLASSES
    assert torch.equal(draws["class_labels"][~dropped], given[~dropped])
    assert abs(dropped.double().mean() - 0.3) < 4.5 * math.sqrt(0.21 / n)
    # Every token has the rate, and an image's number of kept tokens is binomial: they are independent.
    assert excess(draws["keep_mask"].sum(0), torch.tensor(0.6 * n)) < 4.5
    binomial = torch.distributions.Binomial(TOKENS, torch.tensor(0.6)).log_prob(torch.arange(TOKENS + 1.0)).exp() * n
    counts = draws["keep_mask"].sum(1).bincount(minlength=TOKENS + 1)
    assert abs(excess(counts[7:23], binomial[7:23])) < 4.5  # bins of at least 30


def test_extreme_probabilities_drop_nothing_and_everything():
    for probability in (0.0, 1.0):
        draws = drawn(range(1000), label_drop_prob=probability, mask_ratio=probability)
        assert (draws["class_labels"] == CLASSES).all() == (draws["keep_mask"] == 0).all() == bool(probability)
        assert (draws["class_labels"] < CLASSES).all() == draws["keep_mask"].all() == (not probability)
    assert drawn([0], mask_ratio=None)["keep_mask"] is None


# --------------------------------------------------------------------------------------------------------- independence

# Neighbours, and those that agree in the low or high words of their counters.
SEEDS, STEPS, IMAGES = (0, 1, 2**32, 2**63 - 1), (0, 1, 2, 65536), (0, 1, 2, 3, 255, 256, 65536, 1_281_166)


def test_no_draw_repeats_between_images_steps_seeds_and_elements():
    noise = torch.stack([drawn(IMAGES, step, (3, 64, 64), seed=s)["noise"] for s in SEEDS for step in STEPS])
    pairs = noise.reshape(-1, 2).view(torch.int64)  # 786 thousand; by chance two of 64 bits agree once in 10⁷ runs
    assert len(pairs.unique()) == len(pairs)


def test_draws_are_uncorrelated_between_images_steps_seeds_and_elements():
    draws = [drawn(range(500), step, (1, 4, 4), seed=seed) for seed in (0, 1) for step in range(8)]
    values = {name: torch.stack([one[name] for one in draws]).view(2, 8, 500, -1).float() for name in draws[0]}
    values["class_labels"] = (values["class_labels"] == CLASSES).float()
    for name, value in values.items():
        for dim, size in enumerate(value.shape):  # seed, step, image, and what an image has several of
            for lag in (lag for lag in (1, 2, 4) if lag < size):
                one, other = (value.narrow(dim, start, size - lag) for start in (0, lag))
                assert abs(correlation(one, other)) < 4.5, (name, dim, lag)
                assert abs(correlation(one.square(), other.square())) < 4.5, (name, dim, lag)
    firsts = [value[..., 0] for value in values.values()]
    assert all(abs(correlation(one, other)) < 4.5 for one, other in itertools.combinations(firsts, 2))


# ---------------------------------------------------------------------------------------------------------- invariance


def test_draws_of_an_image_do_not_depend_on_its_batch_or_on_the_masks():
    shape = (3, 100, 100)  # several chunks
    draws, indices = drawn(range(20), shape=shape), [13, 4, 17]
    for name, rows in drawn(indices, shape=shape).items():
        assert torch.equal(rows, draws[name][indices]), name
    for name, values in drawn(range(20), shape=shape, mask_ratio=None).items():
        assert values is None or torch.equal(values, draws[name]), name


def test_compiled_draws_are_one_graph_with_the_same_values(monkeypatch):
    compile_function = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *args, **kwargs: compile_function(*args, **kwargs, backend="eager"))
    draws = BatchDraws(num_classes=CLASSES, num_tokens=TOKENS, **SETTINGS)
    draws.compile()
    with torch.compiler.set_stance("eager_on_recompile"), torch._dynamo.config.patch(error_on_recompile=True):
        for step in (5, 6):
            index = torch.arange(8)
            expected = drawn(range(8), step)
            for name, values in draws(step, index, index % CLASSES, torch.Size([3, 2, 2])).items():
                assert torch.equal(values, expected[name]), name
