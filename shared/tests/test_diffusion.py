"""Sampling on any list of timesteps, guidance and the Frechet distance, against goldens and obvious references."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from papercore.diffusion import (
    add_noise,
    ddim_sample,
    frechet_distance,
    guided,
    linear_alphas_cumprod,
    respaced_timesteps,
    statistics,
)
from papercore.errors import InputError

GOLDEN = Path(__file__).parent / "golden"
with np.load(GOLDEN / "sampling.npz") as archive:
    SAMPLING = {key: torch.from_numpy(np.asarray(archive[key])) for key in archive.files}
DDIM = [case for case in json.loads((GOLDEN / "sampling.json").read_text()) if "timesteps_ascending" in case]


def noise_model(alphas: torch.Tensor, dtype: torch.dtype):
    """The closed-form noise model that the golden trajectories were computed with."""
    mu, s = SAMPLING["mu"].to(dtype), float(SAMPLING["s"])

    def predict(x, t):
        a = alphas[int(t[0])].to(dtype)
        return (1 - a).sqrt() * (x - a.sqrt() * mu) / (a * s**2 + 1 - a) + 0.05 * torch.tanh(x)

    return predict


@pytest.mark.parametrize("case", DDIM, ids=lambda c: c["key"])
def test_ddim(case):
    key = case["key"]
    single = SAMPLING[f"{case['schedule']}.alphas_cumprod"]
    noise = SAMPLING.get(f"{key}.noise")
    trajectory, clean = [], []
    ddim_sample(
        noise_model(single, torch.float32),
        SAMPLING["x_T"],
        case["timesteps_ascending"],
        single,
        eta=case["eta"],
        noise=None if noise is None else list(noise),
        observe=lambda _, x, x0: (trajectory.append(x), clean.append(x0)),
    )
    torch.testing.assert_close(torch.stack(trajectory), SAMPLING[f"{key}.traj"], rtol=0, atol=2e-4)
    if f"{key}.final64" in SAMPLING:
        alphas = (1 - SAMPLING[f"{case['schedule']}.betas"].double()).cumprod(0)
        for name, final in (("final64", 1.0), ("final64_ac0", float(alphas[0]))):
            x = ddim_sample(
                noise_model(alphas, torch.float64),
                SAMPLING["x_T"].double(),
                case["timesteps_ascending"],
                alphas,
                final_alpha_cumprod=final,
            )
            assert (x - SAMPLING[f"{key}.{name}"]).abs().max() <= 1e-9


def test_respaced_timesteps_contain_both_ends():
    assert respaced_timesteps(1000, 50)[:4] == [0, 20, 41, 61]
    assert respaced_timesteps(1000, 50)[-2:] == [979, 999]
    assert respaced_timesteps(1000, 1) == [0]
    assert respaced_timesteps(1000, 1000) == list(range(1000))


@pytest.mark.parametrize("bad", [[], [3, 3], [5, 2], [-1, 4], [0, 1000]])
def test_bad_lists_of_timesteps(bad):
    with pytest.raises(InputError, match="timesteps"):
        ddim_sample(lambda x, t: x, torch.zeros(1, 1), bad, linear_alphas_cumprod())


def test_eta_draws_from_the_generator_only():
    def run(seed):
        generator = torch.Generator().manual_seed(seed)
        x, alphas = torch.ones(2, 3), linear_alphas_cumprod()
        return ddim_sample(lambda x, t: x, x, [1, 500, 900], alphas, eta=1, generator=generator)

    assert torch.equal(run(0), run(0))
    assert not torch.equal(run(0), run(1))


def test_noise_is_added_to_unit_variance():
    a = linear_alphas_cumprod()
    x, noise, t = torch.randn(3, 1, 2, 2), torch.randn(3, 1, 2, 2), torch.tensor([0, 500, 999])
    expected = torch.stack([a[k].sqrt() * x[i] + (1 - a[k]).sqrt() * noise[i] for i, k in enumerate(t)]).float()
    torch.testing.assert_close(add_noise(x, noise, t, a), expected)


def test_guidance():
    def predict(x, t, y):
        return x * 0 + y.float()[:, None, None, None] + t.float()[:, None, None, None]

    x, t, y = torch.zeros(2, 4, 1, 1), torch.tensor([1, 1]), torch.tensor([3, 5])
    assert torch.equal(guided(predict, y, 10, None)(x, t), predict(x, t, y))
    mixed = guided(predict, y, 10, 2.0)(x, t)
    assert torch.equal(mixed, 2 * predict(x, t, y) - predict(x, t, torch.tensor([10, 10])))
    partly = guided(predict, y, 10, 2.0, channels=3)(x, t)
    assert torch.equal(partly[:, :3], mixed[:, :3])
    assert torch.equal(partly[:, 3:], predict(x, t, y)[:, 3:])


@pytest.mark.parametrize("case", json.loads((GOLDEN / "frechet.json").read_text()), ids=lambda c: c["case"])
def test_frechet_distance(case):
    with np.load(GOLDEN / "frechet.npz") as data:
        first, second = data[f"{case['case']}.f1"], data[f"{case['case']}.f2"]
    distance = frechet_distance(*statistics(first), *statistics(second))
    assert distance == pytest.approx(case["float64_eigen"], rel=1e-5, abs=1e-6)
    assert distance == pytest.approx(frechet_distance(*statistics(second), *statistics(first)), rel=1e-6, abs=1e-6)


def test_frechet_distance_against_the_matrix_square_root():
    import scipy.linalg

    generator = np.random.default_rng(0)
    first, second = generator.normal(size=(50, 7)), 2 * generator.normal(size=(60, 7)) + 1
    (m1, s1), (m2, s2) = statistics(first), statistics(second)
    root = scipy.linalg.sqrtm(s1 @ s2).real
    expected = ((m1 - m2) ** 2).sum() + np.trace(s1 + s2 - 2 * root)
    assert frechet_distance(m1, s1, m2, s2) == pytest.approx(expected, rel=1e-9)
    assert np.allclose(s1, np.cov(first, rowvar=False))


@pytest.mark.parametrize("bad", [np.zeros((1, 3)), np.zeros(4), np.full((3, 2), np.nan)])
def test_bad_features(bad):
    with pytest.raises(InputError, match="features"):
        statistics(bad)
