"""Frechet and paired scores: golden distances, common random numbers, independence of the batch size, bad input."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from papercore.data.digits import digits
from papercore.diffusion import frechet_distance, statistics
from papercore.errors import InputError
from papercore.images import write_images
from tmpqdm.features import digits_features, extract, feature_function
from tmpqdm.sampling import Sampling, to_uint8
from tmpqdm.scores import PairedScore, Reference, frechet_score
from tmpqdm.synthetic import tiny_dit, tiny_unet
from torch import nn

FOLDER = Path(__file__).parent / "golden"
STEPS = [0, 88, 355, 800]


@pytest.mark.parametrize("case", json.loads((FOLDER / "frechet.json").read_text()), ids=lambda case: case["case"])
def test_golden_distances(case):
    arrays = np.load(FOLDER / "frechet.npz", allow_pickle=False)
    a, b = arrays[f"{case['case']}.f1"], arrays[f"{case['case']}.f2"]
    found = frechet_distance(*statistics(a), *statistics(b))
    assert found == pytest.approx(case["float64_eigen"], rel=1e-8, abs=1e-9)
    assert found == pytest.approx(case["published"], rel=1e-5, abs=1e-6)


class Shrinks(nn.Module):
    """A noise model without weights that matter."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))

    def forward(self, x, t):
        return self.factor * x + 0.1 * torch.tanh(x)


def sampling(**options) -> Sampling:
    return Sampling(DDPMScheduler().alphas_cumprod.double(), (1, 8, 8), **options)


@pytest.mark.parametrize("options", [{}, {"eta": 0.7}, {"sampler": "dpmpp-2m"}], ids=str)
def test_pictures_belong_to_their_number(options):
    """Not to the batch size, and not to how many there are."""
    model = Shrinks(0.8)
    whole = sampling(batch_size=64, **options)(model, STEPS, 20, 3)
    torch.testing.assert_close(sampling(batch_size=3, **options)(model, STEPS, 7, 3), whole[:7], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(whole, sampling(**options)(model, STEPS, 20, 4), atol=0.1)
    assert not torch.allclose(whole[0], whole[1], atol=0.1)


def test_conditions_belong_to_the_number_too():
    model = tiny_dit().eval()
    made = Sampling.of(model, DDPMScheduler(), labels=(1, 7), batch_size=3)
    alone = Sampling.of(model, DDPMScheduler(), labels=(7,))
    torch.testing.assert_close(made(model, STEPS, 4, 0)[[1, 3]], alone(model, STEPS, 4, 0)[[1, 3]], rtol=0, atol=1e-5)
    guided = Sampling.of(model, DDPMScheduler(), labels=(1, 7), guidance=1.0)
    torch.testing.assert_close(guided(model, STEPS, 2, 0), made(model, STEPS, 2, 0), rtol=0, atol=1e-5)


def test_bits_may_change_before_every_step():
    seen = []
    sampling(batch_size=2)(Shrinks(0.5), STEPS, 3, 0, before=seen.append)
    assert seen == [800, 355, 88, 0] * 2


def test_images_are_truncated_and_not_rounded():
    values = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0, 200 / 127.5 - 1 + 0.9 / 127.5]).reshape(1, 1, 1, 6)
    assert to_uint8(values).flatten().tolist() == [0, 0, 127, 255, 255, 200]
    zero_one = sampling(low=0.0)
    assert zero_one.pictures(torch.tensor([0.0, 0.5, 1.0]).reshape(1, 1, 1, 3)).flatten().tolist() == [0, 127, 255]


def test_real_digits_are_near_and_noise_is_far():
    score = frechet_score(tiny_unet(), DDPMScheduler(), images=300)
    real = to_uint8(digits("test").images)
    noise = torch.randint(0, 256, (300, 8, 8, 1), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    assert score.of_images(real).value < score.of_images(noise).value / 20
    assert score.describe()["n"] == 300 and score.describe()["reference images"] == 1797


def test_a_candidate_is_scored_on_the_same_noise_every_time():
    model = Shrinks(0.9)
    score = frechet_score(model, DDPMScheduler(), images=150, shape=(1, 8, 8))
    first = score(model, STEPS).value
    assert score(model, STEPS).value == first
    assert score(model, STEPS, seed=5).value != first
    expected = frechet_distance(
        *statistics(extract(digits_features, to_uint8(score.sampling(model, STEPS, 150, 0)))),
        score.reference.mu,
        score.reference.sigma,
    )
    assert first == pytest.approx(expected)


def test_images_that_are_not_finite_score_infinity_with_the_reason():
    for make in (
        lambda: frechet_score(Shrinks(1.0), DDPMScheduler(), images=10, shape=(1, 8, 8)),
        lambda: PairedScore(sampling(), Shrinks(1.0), None, images=10),
    ):
        found = make()(Shrinks(math.nan), STEPS)
        assert found.value == math.inf and found.reason == "10 of 10 images are not finite"


def test_few_images_warn_with_the_rank_once():
    score = frechet_score(Shrinks(1.0), DDPMScheduler(), images=20, shape=(1, 8, 8))
    with pytest.warns(UserWarning, match=r"20 images for 64 feature dimensions.*rank \d+"):
        assert math.isfinite(score(Shrinks(0.9), STEPS).value)
    score(Shrinks(0.9), STEPS)


def test_paired_differences():
    model = Shrinks(0.9)
    same = PairedScore(sampling(), model, None, images=8)
    assert same(model, STEPS).value == 0
    worse, bad = same(Shrinks(0.89), STEPS).value, same(Shrinks(0.5), STEPS).value
    assert 0 < worse < bad
    long = PairedScore(sampling(), model, list(range(0, 1000, 10)), images=8)
    assert 0 < long(model, list(range(0, 1000, 20))).value < long(model, STEPS).value


def test_references(tmp_path):
    images = to_uint8(digits("test").images)
    write_images(tmp_path / "real.npz", images)
    from_tensor = Reference.of(images, digits_features)
    from_file = Reference.of(tmp_path / "real.npz", digits_features)
    np.testing.assert_allclose(from_tensor.sigma, from_file.sigma, atol=1e-5)
    with (tmp_path / "known.npz").open("wb") as file:
        np.savez(file, mu=from_file.mu, sigma=from_file.sigma)
    known = Reference.of(tmp_path / "known.npz", digits_features)
    np.testing.assert_array_equal(known.mu, from_file.mu)
    assert known.count is None and from_file.count == 359
    with (tmp_path / "bad.npz").open("wb") as file:
        np.savez(file, mu=np.zeros(3), sigma=np.zeros((2, 2)))
    with pytest.raises(InputError, match="mu and sigma"):
        Reference.of(tmp_path / "bad.npz", digits_features)


def test_features():
    big = digits("test").images.repeat_interleave(4, 2).repeat_interleave(4, 3)
    np.testing.assert_allclose(
        extract(digits_features, to_uint8(big)),
        extract(digits_features, to_uint8(digits("test").images)),
        rtol=1e-4,
        atol=1e-4,
    )
    assert feature_function("papercore.images:images_from_uint8") is not None
    for call, words in (
        (lambda: feature_function("nothing"), "digits, pixels, cifar"),
        (lambda: feature_function("os:nothing"), "importable"),
        (lambda: feature_function("cifar"), "data folder"),
        (lambda: feature_function("inception"), "torch-fidelity"),
        (lambda: extract(digits_features, torch.zeros(2, 8, 8, 3, dtype=torch.uint8)), "image size"),
        (lambda: extract(lambda images: images, torch.zeros(2, 8, 8, 1, dtype=torch.uint8)), "dimensions"),
        (lambda: Sampling.of(tiny_dit(), DDPMScheduler()), "labels: found none"),
        (lambda: Sampling.of(tiny_dit(), DDPMScheduler(), labels=(10,)), "labels: found 10"),
        (lambda: sampling(sampler="euler"), "ddim or dpmpp-2m"),
        (lambda: sampling(sampler="dpmpp-2m", eta=1.0), "eta"),
        (lambda: frechet_score(tiny_unet(), DDPMScheduler(), images=1), "at least 2"),
    ):
        with pytest.raises(InputError, match=words):
            call()
