"""Calibration data: trajectories, indices, files, and wrong files."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from papercore.diffusion.sampling import ddim_sample
from papercore.errors import InputError
from tmpqdm.calibration import CalibrationSet, as_noise, collect_calibration, recorded_steps, trajectory
from tmpqdm.synthetic import tiny_dit, tiny_text_unet, tiny_unet

GOLDEN = json.loads((Path(__file__).parent / "golden" / "calibration_index.json").read_text())


@pytest.fixture(scope="module")
def unet():
    return tiny_unet()


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: f"{case['requested']} of {case['nsteps']}")
def test_indices(case):
    found = recorded_steps(case["nsteps"], case["requested"])
    assert len(found) == case["requested"] and found == sorted(set(found)) and found[0] == 0
    if case["nsteps"] % case["requested"] == 0:  # else the published rule gives more than was asked for
        assert found == case["published"]


def test_ordinary_lists():
    assert trajectory(10, 1000, "quadratic") == [0, 9, 39, 88, 158, 246, 355, 483, 632, 800]
    assert trajectory(4, 1000, "uniform") == [0, 250, 500, 750]
    assert len(trajectory(100, 1000, "quadratic")) == 96
    with pytest.raises(InputError, match="steps: found 1"):
        trajectory(1, 1000, "uniform")
    with pytest.raises(InputError, match="steps to use: found 9"):
        recorded_steps(8, 9)


def test_inputs_are_those_of_the_sampler(unet):
    scheduler, visited = DDPMScheduler(), [10, 200, 700]
    data = collect_calibration(unet, scheduler, samples=3, timesteps=visited, seed=5, batch_size=2)
    assert data.t.tolist() == [t for t in visited for _ in range(3)] and data.x.shape == (9, 1, 8, 8)
    seen = {}
    alphas = scheduler.alphas_cumprod.double()
    start = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(5))
    model = unet.eval()

    def noise(x, t):
        seen[int(t[0])] = x
        return model(x, t).sample

    ddim_sample(noise, start, visited, alphas)
    for i, t in enumerate(visited):
        torch.testing.assert_close(data.x[3 * i : 3 * i + 3], seen[t], rtol=1e-4, atol=1e-5)


def test_steps_and_mode(unet):
    unet.train()
    data = collect_calibration(unet, DDPMScheduler(), samples=2, steps=12, use=4)
    visited = trajectory(12, 1000, "quadratic")
    assert sorted(set(data.t.tolist())) == [visited[i] for i in recorded_steps(len(visited), 4)]
    assert unet.training
    again = collect_calibration(unet, DDPMScheduler(), samples=2, steps=12, use=4)
    assert torch.equal(again.x, data.x)
    assert not torch.equal(collect_calibration(unet, DDPMScheduler(), samples=2, steps=12, use=4, seed=1).x, data.x)


def test_lists_drawn_from_groups(unet):
    class Groups:
        def sample(self, rng):
            return [int(rng.integers(a, b)) for a, b in ((0, 100), (100, 500), (500, 1000))]

    data = collect_calibration(unet, DDPMScheduler(), samples=6, timesteps=Groups())
    assert len(data) == 18 and len(set(data.t.tolist())) == 6
    assert data.t.tolist() == sorted(data.t.tolist())


def test_guidance_keeps_both_inputs():
    data = collect_calibration(tiny_dit(), DDPMScheduler(), samples=4, timesteps=[5, 500], labels=[3, 7], guidance=2.0)
    assert len(data) == 16 and data.cond["class_labels"][:8].tolist() == [3, 7, 3, 7, 10, 10, 10, 10]
    assert torch.equal(data.x[:4], data.x[4:8])
    text = {"encoder_hidden_states": torch.randn(4, 5, 12)}
    data = collect_calibration(tiny_text_unet(), DDPMScheduler(), samples=4, timesteps=[5, 500], cond=text)
    assert data.cond["encoder_hidden_states"].shape == (8, 5, 12)
    with pytest.raises(InputError, match="uncond"):
        collect_calibration(tiny_text_unet(), DDPMScheduler(), samples=4, timesteps=[5], cond=text, guidance=2.0)
    with pytest.raises(InputError, match="condition encoder_hidden_states: found 4 rows"):
        collect_calibration(tiny_text_unet(), DDPMScheduler(), samples=3, timesteps=[5], cond=text)
    with pytest.raises(InputError, match="labels"):
        collect_calibration(tiny_dit(), DDPMScheduler(), samples=4, timesteps=[5])


@pytest.mark.parametrize("timesteps", [[], [3, 3], [9, 2], [-1, 4], [5, 1000], [1.5]])
def test_wrong_timesteps(unet, timesteps):
    with pytest.raises(InputError, match="timesteps"):
        collect_calibration(unet, DDPMScheduler(), samples=1, timesteps=timesteps)


def test_prediction_types():
    x, clean, a = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4), 0.3
    eps = (x - a**0.5 * clean) / (1 - a) ** 0.5
    velocity = a**0.5 * eps - (1 - a) ** 0.5 * clean
    for output, kind in ((eps, "epsilon"), (velocity, "v_prediction"), (clean, "sample")):
        torch.testing.assert_close(as_noise(output, x, a, kind), eps, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(as_noise(torch.cat([eps, clean], 1), x, a, "epsilon"), eps)
    with pytest.raises(InputError, match="4 channels"):
        as_noise(torch.randn(2, 4, 4, 4), x, a, "epsilon")
    with pytest.raises(InputError, match="prediction type"):
        as_noise(eps, x, a, "other")


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
def test_files(tmp_path, suffix):
    data = CalibrationSet(torch.randn(5, 2, 3, 3), torch.arange(5), {"class_labels": torch.arange(5)})
    path = tmp_path / f"set{suffix}"
    data.save(path)
    again = CalibrationSet.load(path)
    assert torch.equal(again.x, data.x) and torch.equal(again.t, data.t)
    assert torch.equal(again.cond["class_labels"], data.cond["class_labels"])
    assert torch.equal(again[1:3].x, data.x[1:3])
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def good() -> dict:
    return {"x": torch.randn(4, 1, 8, 8), "t": torch.arange(4), "cond": {"class_labels": torch.arange(4)}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(0, 1, 8, 8)}, "field x: found no samples"),
        ({"x": torch.zeros(4, 8, 8)}, "field x"),
        ({"x": torch.tensor([0.0, 1, float("nan"), float("inf")]).reshape(4, 1, 1, 1)}, "sample 2"),
        (
            {"cond": {"c": torch.full((4, 2), float("nan"))}},
            "field cond/c: found values that are not finite in sample 0",
        ),
        ({"x": torch.zeros(4, 3, 8, 8)}, "3 channels, expected 1 of the model"),
        ({"t": torch.tensor([0, 1, 2, 1000])}, "field t: found 1000 in sample 3, expected timesteps in 0..999"),
        ({"t": torch.tensor([0, -1, 2, 3])}, "found -1 in sample 1"),
        ({"t": torch.arange(4.0)}, "field t"),
        ({"t": torch.arange(3)}, "field t: found 3 rows, expected 4 as in x"),
        ({"cond": {"c": torch.zeros(5)}}, "field cond/c: found 5 rows"),
    ],
)
def test_wrong_data(unet, changes, message):
    CalibrationSet(**good()).validate(unet, batch_size=4)
    with pytest.raises(InputError, match=message):
        CalibrationSet(**(good() | changes)).validate(unet)


def test_fewer_samples_than_a_batch(unet):
    with pytest.raises(InputError, match="found 4 samples, expected at least a batch of 5"):
        CalibrationSet(**good()).validate(unet, batch_size=5)


def test_wrong_files(tmp_path):
    with pytest.raises(InputError, match=r"name of a calibration set: found set\.pt"):
        CalibrationSet(**good()).save(tmp_path / "set.pt")
    for suffix in (".npz", ".safetensors"):
        path = tmp_path / f"broken{suffix}"
        path.write_bytes(b"no archive")
        with pytest.raises(InputError, match=f"broken{suffix}"):
            CalibrationSet.load(path)
    np.savez(tmp_path / "pickled.npz", x=np.array([{}], dtype=object), t=np.arange(1))
    with pytest.raises(InputError, match="pickled"):
        CalibrationSet.load(tmp_path / "pickled.npz")
    np.savez(tmp_path / "half.npz", x=np.zeros((1, 1, 2, 2), np.float32))
    with pytest.raises(InputError, match=r"half\.npz: field t: found nothing"):
        CalibrationSet.load(tmp_path / "half.npz")
    np.savez(tmp_path / "more.npz", x=np.zeros((1, 1, 2, 2), np.float32), t=np.arange(1), y=np.arange(1))
    with pytest.raises(InputError, match="field y"):
        CalibrationSet.load(tmp_path / "more.npz")
    np.savez(tmp_path / "nan.npz", x=np.full((1, 1, 2, 2), np.nan, np.float32), t=np.arange(1))
    with pytest.raises(InputError, match=r"nan\.npz: field x: found values that are not finite in sample 0"):
        CalibrationSet.load(tmp_path / "nan.npz")


def test_q_diffusion_layout(tmp_path):
    xs = [torch.full((3, 1, 2, 2), float(i)) for i in range(10)]
    ts = [torch.full((3,), 10 * i) for i in range(10)]
    path = tmp_path / "cali.pt"
    torch.save({"xs": xs, "ts": ts}, path)
    data = CalibrationSet.from_q_diffusion(path, use=4, samples=2)
    assert data.t.tolist() == [0, 0, 20, 20, 50, 50, 70, 70] and data.x[:, 0, 0, 0].tolist() == [0, 0, 2, 2, 5, 5, 7, 7]
    cs, ucs = ([torch.full((3, 4, 6), v) for _ in range(10)] for v in (1.0, 0.0))
    torch.save({"xs": xs, "ts": ts, "cs": cs, "ucs": ucs}, path)
    data = CalibrationSet.from_q_diffusion(path, use=2, samples=2)
    assert len(data) == 8 and data.cond["encoder_hidden_states"][:, 0, 0].tolist() == [1.0] * 4 + [0.0] * 4
    torch.save({"xs": xs, "ts": ts[:9]}, path)
    with pytest.raises(InputError, match="field ts: found 9 steps"):
        CalibrationSet.from_q_diffusion(path)
    torch.save({"xs": xs}, path)
    with pytest.raises(InputError, match="expected xs and ts"):
        CalibrationSet.from_q_diffusion(path)
    torch.save({"xs": xs, "ts": Path("x")}, path)  # an object that needs unpickling of code
    with pytest.raises(InputError, match="weights_only"):
        CalibrationSet.from_q_diffusion(path)
