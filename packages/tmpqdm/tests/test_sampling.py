"""Samplers on non-uniform lists against the published code and a float64 computation, on a closed-form noise model."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from papercore.diffusion import ddim_sample, dpm_sample, dpm_solver

FOLDER = Path(__file__).parent / "golden"
CASES = json.loads((FOLDER / "sampling.json").read_text())
ARRAYS = {name: torch.as_tensor(array) for name, array in np.load(FOLDER / "sampling.npz", allow_pickle=False).items()}
DDIM = [case for case in CASES if "timesteps_ascending" in case]
DPM = [case for case in CASES if "timesteps_ascending" not in case]


def noise_model(alphas):
    mu, s = ARRAYS["mu"].double(), float(ARRAYS["s"])

    def at(x, a):
        return (1 - a) ** 0.5 * (x - a**0.5 * mu.to(x)) / (a * s**2 + 1 - a) + 0.05 * torch.tanh(x)

    return at, lambda x, t: at(x, float(alphas[int(t[0])]))


@pytest.mark.parametrize("kind", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", DDIM, ids=lambda c: c["key"])
def test_ddim(case, kind):
    alphas = (1 - ARRAYS[f"{case['schedule']}.betas"].double()).cumprod(0)
    _, model = noise_model(alphas)
    x = ARRAYS["x_T"].to(kind)
    seen = []
    noise = ARRAYS.get(f"{case['key']}.noise")
    options = {"eta": case["eta"], "noise": None if noise is None else noise.to(kind)}
    end = ddim_sample(
        model, x, case["timesteps_ascending"], alphas, observe=lambda t, x, clean: seen.append((x, clean)), **options
    )
    for name, index in (("traj", 0), ("x0", 1)):
        if f"{case['key']}.{name}" in ARRAYS:
            found = torch.stack([entry[index] for entry in seen]).float()
            torch.testing.assert_close(found, ARRAYS[f"{case['key']}.{name}"].float(), rtol=0, atol=2e-4)
    for suffix, final in (("final64", 1.0), ("final64_ac0", float(alphas[0]))):
        expected = ARRAYS.get(f"{case['key']}.{suffix}")
        if expected is None:
            continue
        end = ddim_sample(model, x, case["timesteps_ascending"], alphas, final_alpha_cumprod=final, **options)
        atol = 1e-9 if kind == torch.float64 else 2e-4
        torch.testing.assert_close(end.double(), expected.double(), rtol=0, atol=atol)


@pytest.mark.parametrize("case", DPM, ids=lambda c: c["key"])
def test_dpm_solver_on_continuous_times(case):
    """log sqrt(alpha) is interpolated linearly between t_n = (n + 1) / 1000."""
    cumulative = ARRAYS[f"{case['schedule']}.alphas_cumprod"].double().numpy()
    nodes = (np.arange(1000) + 1) / 1000
    times = ARRAYS[f"{case['key']}.t"].double().numpy()
    ascending = np.sort(times)
    alphas = np.exp(2 * np.interp(ascending, nodes, 0.5 * np.log(cumulative)))[::-1].tolist()
    at, _ = noise_model(None)
    end = dpm_solver(lambda x, i: at(x, alphas[i]), ARRAYS["x_T"].double(), alphas)
    torch.testing.assert_close(end, ARRAYS[f"{case['key']}.x"].double(), rtol=0, atol=1e-4)


def test_dpm_solver_on_timesteps_ends_where_it_is_told():
    alphas = ARRAYS["lin.alphas_cumprod"].double()
    at, model = noise_model(alphas)
    x = ARRAYS["x_T"].double()
    steps = [0, 88, 355, 800]
    grid = [float(alphas[t]) for t in reversed(steps)]
    stopped = dpm_sample(model, x, steps, alphas, final_alpha_cumprod=None)
    torch.testing.assert_close(stopped, dpm_solver(lambda x, i: at(x, grid[i]), x, grid))
    calls = []
    whole = dpm_sample(lambda x, t: calls.append(int(t[0])) or model(x, t), x, steps, alphas)
    assert calls == [800, 355, 88, 0]
    torch.testing.assert_close(whole, dpm_solver(lambda x, i: at(x, grid[i]), x, [*grid, 1.0]))
    # with one step both solvers jump to the predicted clean sample
    torch.testing.assert_close(dpm_sample(model, x, [500], alphas), ddim_sample(model, x, [500], alphas))


def test_more_steps_bring_both_solvers_together():
    alphas = ARRAYS["lin.alphas_cumprod"].double()
    _, model = noise_model(alphas)
    x = ARRAYS["x_T"].double()
    exact = ddim_sample(model, x, list(range(0, 1000)), alphas)

    def error(sample, stride: int) -> float:
        return float((sample(model, x, list(range(0, 1000, stride)), alphas) - exact).abs().max())

    assert error(dpm_sample, 5) < error(dpm_sample, 20) / 4
    assert error(dpm_sample, 5) < error(ddim_sample, 5)
