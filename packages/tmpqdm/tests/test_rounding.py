"""Learned rounding against the published class, and the reconstruction loop against its golden runs."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tmpqdm.quantisers import LearnedStep, Step
from tmpqdm.reconstruction import learn_rounding, learn_steps, reconstruction_loss
from tmpqdm.rounding import (
    JointRounding,
    SoftRounding,
    nearest_up,
    pack_flags,
    rectified_sigmoid,
    regulariser,
    rounded_weight,
    temperature,
    unpack_flags,
)

GOLDEN = Path(__file__).parent / "golden"
DATA, RECON = np.load(GOLDEN / "adaround.npz"), np.load(GOLDEN / "recon.npz")
CASES = json.loads((GOLDEN / "adaround.json").read_text())
LOOPS = json.loads((GOLDEN / "recon.json").read_text())


def tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.array(array))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["key"])
def test_adaround(case):
    def golden(name: str) -> torch.Tensor:
        return tensor(DATA[f"{case['key']}.{name}"])

    part = SoftRounding(tensor(DATA[case["tensor"]]), golden("delta"), golden("zero"), case["bits"])
    torch.testing.assert_close(part.alpha.detach(), golden("alpha0"), rtol=0, atol=1e-3)
    for end in "01":
        with torch.no_grad():
            part.alpha.copy_(golden(f"alpha{end}"))
        weight, h = part.soft()
        torch.testing.assert_close(h, golden(f"h{end}"), rtol=0, atol=1e-5)
        torch.testing.assert_close(weight, golden(f"soft{end}"), rtol=0, atol=1e-5)
        torch.testing.assert_close(part.hard(), golden(f"hard{end}"), rtol=0, atol=1e-5)
    weight, h = part.soft()
    found = [float(regulariser(h, beta).detach()) for beta in (20, 10, 2)]
    np.testing.assert_allclose(found, golden("reg1_b20_b10_b2"), rtol=1e-5)
    (regulariser(h, 10) + weight.square().sum()).backward()
    assert part.alpha.grad is not None
    torch.testing.assert_close(part.alpha.grad, golden("dalpha1"), rtol=0, atol=1e-4)


def test_sigmoid_curve_and_schedule():
    np.testing.assert_allclose(rectified_sigmoid(tensor(DATA["curve.alpha"])), DATA["curve.h"], atol=1e-5)
    (key,) = (key for key in DATA if key.startswith("decay"))
    for total, warmup, start, end, step, beta, active in DATA[key]:
        found = temperature(int(step), int(total), warmup=warmup, start=start, end=end)
        assert (found is not None) == bool(active)
        if found is not None:
            assert found == pytest.approx(beta, rel=1e-6)


def run_case(case):
    """The golden loop with our parts."""
    name = case["case"]
    weight, bias, x, y = (
        tensor(RECON[f"{name}.{part}"]) for part in ("weight", "bias", "x_quantized_prefix", "y_target")
    )
    c = case["split"]
    halves = [weight[:, :c], weight[:, c:]] if c else [weight]
    parts = []
    for i, half in enumerate(halves):
        part = SoftRounding(half, tensor(RECON[f"{name}.delta{i}"]), tensor(RECON[f"{name}.zero{i}"]), case["bits"])
        torch.testing.assert_close(part.alpha.detach(), tensor(RECON[f"{name}.alpha_init{i}"]), rtol=0, atol=1e-3)
        with torch.no_grad():
            part.alpha.copy_(tensor(RECON[f"{name}.alpha_init{i}"]))
        parts.append(part)

    def output(weights, inputs):
        w = torch.cat(list(weights), 1)
        if case["kind"] == "linear":
            return torch.nn.functional.linear(inputs, w, bias)
        return torch.nn.functional.conv2d(inputs, w, bias, padding=(w.shape[-1] - 1) // 2)

    return parts, output, x, y


@pytest.mark.parametrize("case", [c for c in LOOPS if c["case"].startswith("recon")], ids=lambda c: c["case"])
def test_reconstruction_loop(case):
    name = case["case"]
    parts, output, x, y = run_case(case)
    losses = []

    def observe(step: int, loss: float) -> None:
        losses.append(loss)
        for i, part in enumerate(parts):
            if f"{name}.alpha_{step}_{i}" in RECON:
                expected = tensor(RECON[f"{name}.alpha_{step}_{i}"])
                torch.testing.assert_close(part.alpha.detach(), expected, rtol=0, atol=1e-4)

    batches = list(tensor(RECON[f"{name}.batch_index"]).long())
    learn_rounding(parts, lambda w, i: output(w, x[i]), y, batches, case["iters"], rate=case["lr"], observe=observe)
    np.testing.assert_allclose(losses, RECON[f"{name}.loss"], rtol=1e-4)
    np.testing.assert_allclose(output([p.hard() for p in parts], x).detach(), RECON[f"{name}.y_hard"], atol=1e-4)


@pytest.mark.parametrize("case", [c for c in LOOPS if c["case"].startswith("delta")], ids=lambda c: c["case"])
def test_learned_step(case):
    name = case["case"]
    x, w = tensor(RECON[f"{name}.x"]), tensor(RECON[f"{name}.w"])
    start, zero = (tensor(RECON[f"{name}.{part}"]).float() for part in ("delta_init", "zero"))
    learned = LearnedStep(Step(start, zero, case["bits"], case["symmetric"]))
    targets = torch.nn.functional.conv2d(x, w)
    deltas, losses = [], []

    def observe(step: int, loss: float) -> None:
        deltas.append(float(learned.delta.detach()))
        losses.append(loss)

    learn_steps(
        [learned],
        lambda i: torch.nn.functional.conv2d(learned(x[i]), w),
        targets,
        list(tensor(RECON[f"{name}.batch_index"]).long()),
        case["iters"],
        rate=case["lr"],
        observe=observe,
    )
    np.testing.assert_allclose(deltas, RECON[f"{name}.delta"], atol=1e-5)
    np.testing.assert_allclose(losses, RECON[f"{name}.loss"], rtol=1e-4)


def test_a_learned_step_never_reaches_zero():
    step = Step(torch.tensor(1e-4), torch.tensor(0.0), 8, symmetric=True)
    learned = LearnedStep(step)
    x = torch.full((4, 2), 1e-3)
    learn_steps([learned], lambda i: learned(x[i]), torch.zeros(4, 2), [torch.arange(4)] * 50, 50)
    assert float(learned.delta.detach()) == pytest.approx(0.25e-4)


@pytest.mark.parametrize("beta", [None, 20.0, 3.5, 2.0])
def test_joint_gradient_is_that_of_autograd(beta):
    generator = torch.Generator().manual_seed(0)
    parts, slow = [], []
    for shape, bits in (((5, 3, 3, 3), 3), ((4, 6), 4)):
        weight = torch.randn(shape, generator=generator)
        delta = weight.abs().flatten(1).amax(1).reshape(-1, *[1] * (weight.ndim - 1)) / 2**bits  # some are clipped
        zero = torch.full_like(delta, 2.0 ** (bits - 1))
        for made in (parts, slow):
            made.append(SoftRounding(weight, delta, zero, bits))
        with torch.no_grad():
            noise = 2 * torch.randn(shape, generator=generator)
            parts[-1].alpha += noise
            slow[-1].alpha += noise
    factors = [torch.randn(part.alpha.shape, generator=generator) for part in parts]
    joint = JointRounding(parts)
    found = joint.weights()
    gradient = joint.gradient(factors, beta, 0.01)
    loss = torch.zeros(())
    for part, factor, weight in zip(slow, factors, found, strict=True):
        soft, h = part.soft()
        torch.testing.assert_close(weight.detach(), soft.detach())
        loss = loss + (soft * factor).sum() + (0 if beta is None else regulariser(h, beta))
    expected = torch.autograd.grad(loss, [part.alpha for part in slow])
    torch.testing.assert_close(gradient, torch.cat([g.reshape(-1) for g in expected]), rtol=1e-4, atol=1e-6)
    joint.alpha.add_(1)
    assert torch.equal(parts[1].alpha, slow[1].alpha.detach() + 1)


def test_loss():
    a, b = torch.randn(3, 4, 5), torch.randn(3, 4, 5)
    assert reconstruction_loss(a, b) == pytest.approx(float((a - b).square().sum() / 15), rel=1e-6)
    assert reconstruction_loss(a, b, 2.4) == pytest.approx(float((a - b).abs().pow(2.4).sum() / 15), rel=1e-6)


@pytest.mark.parametrize("shape", [(3, 5), (8,), (2, 3, 3, 3)])
def test_rounding_flags(shape):
    flags = torch.rand(shape) > 0.5
    packed = pack_flags(flags)
    assert len(packed) == -(-flags.numel() // 8) and torch.equal(unpack_flags(packed, flags.shape), flags)


def test_nearest_is_round():
    w = torch.cat([torch.randn(5, 64), torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 0, 1] * 8])])
    delta, zero = torch.ones(6, 1), torch.full((6, 1), 4.0)
    expected = ((w / delta).round() + zero).clamp(0, 15) - zero
    assert torch.equal(rounded_weight(w, delta, zero, nearest_up(w, delta), 4), expected)
    assert torch.equal(rectified_sigmoid(torch.tensor([-30.0, 30.0])), torch.tensor([0.0, 1.0]))
