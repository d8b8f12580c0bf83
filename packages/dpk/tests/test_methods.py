"""The methods that DPK is compared with, against the peers' numbers."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from dpk.method import FeatureInfo, Outputs
from dpk.methods import DKD, KD, AttentionTransfer, FitNet, ReviewKD
from dpk.methods.features import at_loss
from dpk.methods.logits import dkd_loss, dkd_parts, kd_loss
from dpk.methods.review import hcl_loss
from papercore.errors import InputError
from torch.nn import functional as F

GOLDEN = Path(__file__).parent / "golden"


def golden(name: str):
    arrays = np.load(GOLDEN / f"{name}.npz", allow_pickle=False)
    return json.loads((GOLDEN / f"{name}.json").read_text()), {k: torch.as_tensor(arrays[k]) for k in arrays.files}


LOGITS, ARRAYS = golden("logits_a")


@pytest.mark.parametrize(("case", "index"), [(c["case"], i) for c in LOGITS for i in range(len(c["results"]))])
def test_losses_of_logits(case, index):
    result = LOGITS[case]["results"][index]
    student, teacher, target = (ARRAYS[f"c{case}_{name}"].clone() for name in ("student", "teacher", "target"))
    student.requires_grad_()
    if result["loss"] == "kd":
        loss = kd_loss(student, teacher, result["T"])
    else:
        loss = dkd_loss(student, teacher, target, result["alpha"], result["beta"], result["T"])
        parts = dkd_parts(student, teacher, target, result["T"])
        assert [float(p.detach()) for p in parts] == pytest.approx([result["tckd"], result["nckd"]], rel=1e-9)
    assert float(loss.detach()) == pytest.approx(result["value"], rel=1e-9)
    (gradient,) = torch.autograd.grad(loss, student)
    torch.testing.assert_close(gradient, ARRAYS[result["grad_key"]], rtol=1e-9, atol=1e-12)


def test_decoupled_losses_stand_extreme_logits():
    student = torch.tensor([[2000.0, -2000.0, 0.0], [-3000.0, 3000.0, 2999.0]], requires_grad=True)
    teacher = torch.tensor([[-1500.0, 1500.0, 1499.0], [0.0, 0.0, 0.0]])
    loss = dkd_loss(student, teacher, torch.tensor([0, 1]), temperature=1.0)
    loss.backward()
    assert math.isfinite(float(loss.detach()))
    assert bool(torch.isfinite(student.grad).all())
    two = torch.tensor([[1.0, 2.0]])
    assert float(dkd_parts(two, two + 1, torch.tensor([1]))[1]) == 0  # no other class but one


FEATURES, MAPS = golden("features_a")


@pytest.mark.parametrize("case", range(len(FEATURES)))
def test_losses_of_features(case):
    entry = FEATURES[case]
    student, teacher = ([MAPS[f"c{case}_{who}{i}"] for i in range(entry["pairs"])] for who in "st")
    assert float(at_loss(student, teacher)) == pytest.approx(entry["at_p2"], rel=1e-9)
    if "hcl" in entry:
        assert float(hcl_loss(student, teacher)) == pytest.approx(entry["hcl"], rel=1e-9)
        mse = [float(F.mse_loss(s, t)) for s, t in zip(student, teacher, strict=True)]
        assert mse == pytest.approx(entry["mse"], rel=1e-9)


def outputs(maps, logits=None, pooled=None) -> Outputs:
    return Outputs(torch.zeros(len(maps[0]), 3) if logits is None else logits, list(maps), pooled)


def infos(maps) -> list[FeatureInfo]:
    return [FeatureInfo(f"tap{i}", m.shape[1], m.shape[2], m.shape[3]) for i, m in enumerate(maps)]


def test_knowledge_review():
    entry, arrays = golden("reviewkd_a")
    student, teacher = ([arrays[f"{who}{i}"] for i in range(3)] for who in "st")
    method = ReviewKD(weight=1.0, middle=entry["mid_channels"], warmup=0, ce_weight=0)
    method.build(infos(student), infos(teacher))
    method.double()
    method.fusions.load_state_dict({k[2:]: v for k, v in arrays.items() if k.startswith("w.")})
    fused = method.fuse(student, teacher)
    for i, out in enumerate(fused):
        torch.testing.assert_close(out, arrays[f"out{i}"], rtol=0, atol=1e-8)
    assert float(hcl_loss(fused, teacher).detach()) == pytest.approx(entry["loss"], abs=1e-8)
    losses = method(outputs(student), outputs(teacher), torch.zeros(3, dtype=torch.long), generator=None)
    assert list(losses) == ["review_0", "review_1", "review_2"]


def test_the_pooled_vector_is_the_deepest_level():
    maps = [torch.randn(2, 4, 8, 8), torch.randn(2, 6, 4, 4)]
    targets = [torch.randn(2, 5, 8, 8), torch.randn(2, 7, 4, 4)]
    method = ReviewKD()
    method.build(infos(maps), infos(targets), (3, 3), pooled=(6, 7))
    student, teacher = outputs(maps, pooled=torch.randn(2, 6)), outputs(targets, pooled=torch.randn(2, 7))
    method.epoch(0)
    with torch.no_grad():
        losses = method(student, teacher, torch.tensor([0, 1]), generator=None)
    assert list(losses) == ["ce", "review_0", "review_1", "review_2"]
    method.epoch(40)
    with torch.no_grad():
        later = method(student, teacher, torch.tensor([0, 1]), generator=None)
    assert float(later["review_0"] / losses["review_0"]) == pytest.approx(20, rel=1e-4)
    assert float(later["ce"]) == float(losses["ce"])


@pytest.mark.parametrize(("size", "target"), [(8, 8), (8, 4), (4, 8), (7, 5)])
def test_regressors_meet_the_teachers_size(size, target):
    maps, targets = [torch.randn(3, 4, size, size)], [torch.randn(3, 6, target, target)]
    method = FitNet(weight=2.0)
    method.build(infos(maps), infos(targets))
    assert method.regressors[0](maps[0]).shape == targets[0].shape
    losses = method(outputs(maps), outputs(targets), torch.tensor([0, 1, 2]), generator=None)
    expected = 2 * F.mse_loss(method.regressors[0](maps[0]), targets[0])
    torch.testing.assert_close(losses["fitnet_0"], expected)
    assert float(method.regressors[0](maps[0]).detach().min()) >= 0


def test_maps_that_no_regressor_meets():
    maps, targets = [torch.randn(3, 4, 4, 4)], [torch.randn(3, 6, 7, 7)]
    with pytest.raises(InputError, match="from tap0 to tap0: found 4 x 4 to 7 x 7"):
        FitNet().build(infos(maps), infos(targets))


def test_methods_are_weighted_sums():
    student, teacher = torch.randn(5, 4), torch.randn(5, 4)
    targets = torch.tensor([0, 1, 2, 3, 0])
    s, t = Outputs(student, []), Outputs(teacher, [])
    kd, dkd = KD(), DKD(warmup=10)
    for method in (kd, dkd):
        method.build([], [], (4, 4))
    losses = kd(s, t, targets, generator=None)
    torch.testing.assert_close(losses["ce"], 0.1 * F.cross_entropy(student, targets))
    torch.testing.assert_close(losses["kd"], 0.9 * kd_loss(student, teacher, 4.0))
    dkd.epoch(4)
    losses = dkd(s, t, targets, generator=None)
    torch.testing.assert_close(losses["tckd"] + losses["nckd"], 0.5 * dkd_loss(student, teacher, targets))
    maps = [torch.randn(5, 4, 4, 4)]
    at = AttentionTransfer()
    at.build(infos(maps), infos(maps))
    losses = at(Outputs(student, maps), Outputs(teacher, [m + 1 for m in maps]), targets, generator=None)
    torch.testing.assert_close(losses["at_0"], 1000 * at_loss(maps, [m + 1 for m in maps]))


def test_logits_of_different_classes_are_not_compared():
    for method in (KD(), DKD()):
        with pytest.raises(InputError, match="10 classes of the student, 7 of the teacher"):
            method.build([], [], (10, 7))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: KD(temperature=0), "temperature"),
        (lambda: KD(weight=-1), "weight"),
        (lambda: DKD(beta=float("nan")), "beta"),
        (lambda: AttentionTransfer(power=0), "power"),
        (lambda: FitNet(weight=float("inf")), "weight"),
    ],
)
def test_arguments_that_are_wrong(make, words):
    with pytest.raises(InputError, match=words):
        make()
