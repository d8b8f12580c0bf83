"""One step: what trains, what stays, what is refused, and that nothing waits for the device."""

import copy
import warnings

import pytest
import torch
from dpk.alignment import cka
from dpk.distiller import Distiller
from dpk.dpk_method import DPK
from dpk.method import CrossEntropy, Pair
from papercore.errors import InputError, WorkError
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode


class NoWaiting(TorchDispatchMode):
    """Fails on what makes the host wait for a device: reading a number, a shape that depends on values."""

    forbidden = frozenset(
        {
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.nonzero.default,
            torch.ops.aten.masked_select.default,
            torch.ops.aten.is_nonzero.default,
            torch.ops.aten.equal.default,
        }
    )

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in self.forbidden, f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


def distiller(net, method=None, **changes):
    student, teacher = net(6), net(16, seed=1)
    method = method or DPK(**{"dim": 24, "heads": 4, **changes})
    return Distiller(student, teacher, method, torch.zeros(2, 1, 8, 8), seed=5)


def test_a_step_gives_losses_and_moves_only_the_student_and_the_method(net, batch):
    d = distiller(net)
    teacher = copy.deepcopy(d.teacher.state_dict())
    d.teacher.train()  # as a training loop may do it
    optimizer = torch.optim.SGD(d.trainable_parameters(), 0.1)
    before = copy.deepcopy(d.state_dict())
    out = d(*batch)
    assert set(out.losses) == {"ce", "feature.stage1", "feature.stage2"}
    torch.testing.assert_close(out.total, torch.stack(list(out.losses.values())).sum())
    assert out.info["rho"].shape == out.info["cka"].shape == (2,)
    assert not out.info["rho"].requires_grad
    out.total.backward()
    optimizer.step()
    assert all(torch.equal(value, teacher[name]) for name, value in d.teacher.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in d.teacher.parameters())
    moved = {name for name, value in d.state_dict().items() if not torch.equal(value, before[name])}
    assert {name for name, _ in d.named_parameters()} <= moved
    plain = net(6, seed=9)
    plain.load_state_dict(d.student_state_dict())
    assert not any(name.startswith("teacher") for name in d.state_dict())


def test_the_ratio_is_one_minus_the_cka_of_the_raw_features(net, batch):
    d = distiller(net, rho_max=1.0)
    d.train()
    student, teacher = copy.deepcopy(d).run(0, batch[0]), d.teach(batch[0])
    out = d(*batch)
    for index in range(2):
        expected = float(cka(student.features[index].detach(), teacher.features[index]))
        assert out.info["cka"][index].item() == pytest.approx(expected, abs=1e-6)
        assert out.info["rho"][index].item() == pytest.approx(min(max(1 - expected, 0), 1), abs=1e-6)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"momentum": 0.9, "target_norm": "layernorm", "mask": "block"},
        {"per_image": True, "target_norm": "batch", "mask": "highest-error"},
        {"ratio": 0.25, "integrator": "conv", "samples": "tokens"},
        {"pairs": [Pair("stage1", "stage1", patch=3)], "samples": "auto"},
    ],
)
def test_no_step_waits_for_the_device(net, batch, changes):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        d = distiller(net, **changes)
    with NoWaiting():
        out = d(*batch)
        out.total.backward()
    assert all(torch.isfinite(loss) for loss in out.losses.values())
    assert float(out.info["rho"].min()) >= 0
    assert float(out.info["rho"].max()) <= 0.9
    with pytest.raises(AssertionError, match="waits"), NoWaiting():
        out.info["rho"][0].item()


def test_the_same_generator_gives_the_same_masks(net, batch):
    losses = []
    for _ in range(2):
        d = distiller(net)
        losses.append(d(*batch).total.item())
        other = d(*batch, generator=torch.Generator().manual_seed(8)).total.item()
    assert losses[0] == losses[1] != other


def test_a_kept_answer_of_the_teacher_gives_the_same_losses(net, batch):
    d, again = distiller(net), distiller(net)
    kept = again.teach(batch[0])
    again.teacher.forward = None  # must not be called
    assert torch.equal(d(*batch).total, again(*batch, taught=kept).total)


def test_with_all_of_the_teacher_the_student_gets_no_gradient_from_the_stage(net, batch):
    gradients = {}
    for share in (0.0, 1.0):
        d = distiller(net, ratio=share, ce_weight=0.0)
        out = d(*batch)
        out.total.backward()
        gradients[share] = sum(float(p.grad.abs().sum()) for p in d.student.stage1.parameters() if p.grad is not None)
    assert gradients[1.0] == 0 < gradients[0.0]


def test_warm_up_and_schedules_follow_the_epoch(net, batch):
    d = distiller(net, ratio=(0.8, 0.0, 5), warmup=4)
    full = d.method
    assert full.warm == 1
    assert (full.share, [d.epoch(k) or (full.warm, round(full.share, 6)) for k in (0, 2, 4, 9)]) == (
        0.8,
        [(0.25, 0.8), (0.75, 0.4), (1.0, 0.0), (1.0, 0.0)],
    )
    d = distiller(net, ratio=lambda epoch: 0.1 * epoch)
    d.epoch(3)
    assert d(*batch).info["rho"].tolist() == pytest.approx([0.3, 0.3])
    with pytest.raises(InputError, match=r"ratio in epoch 11: found 1.1"):
        d.epoch(11)


def test_smoothed_cka_starts_at_one_half_and_is_kept(net, batch):
    d = distiller(net, momentum=0.9)
    first = d(*batch).info["cka"]
    raw = distiller(net)(*batch).info["cka"].clamp(0, 1)
    torch.testing.assert_close(first, 0.45 + 0.1 * raw)
    torch.testing.assert_close(d.state_dict()["method.gap.smoothed"].float(), first)


def test_small_batches_use_the_smoothed_value_or_the_largest_ratio(net, batch):
    images, targets = batch[0][:3], batch[1][:3]
    with pytest.warns(UserWarning, match="CKA needs 4 images, the batch has 3"):
        assert distiller(net)(images, targets).info["rho"].tolist() == pytest.approx([0.9, 0.9])
    d = distiller(net, momentum=0.5)
    with pytest.warns(UserWarning, match="CKA needs 4"):
        assert d(images, targets).info["rho"].tolist() == pytest.approx([0.5, 0.5])


def test_detectors_batches_take_pixels_or_the_last_images(net, batch):
    d = distiller(net, samples="auto")
    few = d(batch[0][:2], batch[1][:2]).info
    assert few["tokenwise"] == 1
    assert bool((few["cka"] != 0).all())
    sums = []
    for part in range(3):
        chosen = slice(4 * part, 4 * part + 4)
        info = d(batch[0][chosen], batch[1][chosen]).info
        sums.append(d.method.gap.recent[:, 0].clone())
    assert info["tokenwise"] == 0
    total = torch.stack(sums).sum(0)
    torch.testing.assert_close(
        info["cka"].double(), total[:, 0] / (total[:, 1] * total[:, 2]).sqrt(), atol=1e-6, rtol=0
    )


def test_constant_features_have_no_similarity(net, batch):
    d = distiller(net, preactivation=False)
    with torch.no_grad():
        d.student.stage2[1].weight.zero_()
        d.student.stage2[1].bias.fill_(0.7)
    info = d(*batch).info
    assert info["cka"][1] == 0
    assert info["rho"][1].item() == pytest.approx(0.9)


@pytest.mark.parametrize("network", ["student", "teacher"])
def test_features_that_are_not_finite_are_named(net, batch, network):
    d = distiller(net)
    d(*batch)
    d.epoch(0)
    with torch.no_grad():
        getattr(d, network).stage2[0].weight[0, 0] = torch.inf
    d(*batch)
    with pytest.raises(WorkError, match=f"features of the {network} at stage stage2 are not finite at step 1"):
        d.epoch(1)


def test_odd_sizes_are_padded_and_the_loss_is_on_real_pixels(net, batch):
    with pytest.warns(UserWarning, match="stage1: 8 x 8 is no multiple of the patch 3"):
        d = distiller(net, pairs=[Pair("stage1", "stage1", patch=3)], ratio=0.0)
    integrator = d.method.integrators[0]
    with torch.no_grad():  # generates the value 5 everywhere, also beyond the edge
        integrator.output.weight.zero_()
        integrator.output.bias.fill_(5.0)
    found = d(*batch).losses["feature.stage1"]
    expected = (d.teach(batch[0]).features[0] - 5).square().mean()
    torch.testing.assert_close(found, expected)


def test_sizes_and_channels_may_differ(net):
    student = nn.Sequential(nn.Conv2d(1, 5, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    d = Distiller(
        nn.Sequential(*student, nn.Linear(5, 10)),
        net(16),
        DPK(pairs=[("1", "stage2"), ("1", "stage1")], dim=64),
        torch.zeros(2, 1, 8, 8),
    )
    smaller = Distiller(net(6), d.student, DPK(pairs=[("stage2", "1")]), torch.zeros(2, 1, 8, 8))
    x, y = torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, 3])
    for each in (d, smaller):
        out = each(x, y)
        out.total.backward()
        assert torch.isfinite(out.total)
    # sizes may also change between calls
    d(torch.randn(4, 1, 12, 10), y).total.backward()


def test_wrapped_networks_are_looked_through(net, batch):
    teacher = nn.DataParallel(net(16))
    with pytest.warns(UserWarning, match="the teacher runs on one device"):
        d = Distiller(net(6), teacher, DPK(dim=24, heads=4), torch.zeros(2, 1, 8, 8))
    assert torch.isfinite(d(*batch).total)


def test_without_distillation_no_teacher_is_needed(net, batch):
    d = Distiller(net(6), None, CrossEntropy(), torch.zeros(2, 1, 8, 8))
    out = d(*batch)
    torch.testing.assert_close(out.total, nn.functional.cross_entropy(out.logits, batch[1]))
    with pytest.raises(InputError, match="DPK needs a teacher"):
        Distiller(net(6), None, DPK(), torch.zeros(2, 1, 8, 8))


def test_what_cannot_work_is_refused_before_the_first_step(net):
    x = torch.zeros(2, 1, 8, 8)
    student = net(6)
    for given, message in (
        ({"pairs": []}, "at least one pair"),
        ({"pairs": [("a", "b", "c", "d", "e", "f", "g")]}, "pair: found"),
        ({"pairs": [{"of": 1}]}, "pair: found"),
        ({"pairs": [Pair("stage1", "stage1", patch=9)]}, "patch of stage1: found 9, expected 1 to 8"),
        ({"stages": 0}, "stages: found 0"),
        ({"dim": 30}, "dim: found 30"),
        ({"ratio": 1.5}, "ratio in epoch 0: found 1.5"),
        ({"ratio": "static"}, "ratio: found static"),
        ({"ratio": (1, 0)}, "ratio: found"),
        ({"rho_max": 1.2}, "rho_min, rho_max"),
        ({"momentum": 1.0}, "momentum: found 1.0"),
        ({"mask": "none"}, "mask: found none"),
        ({"weight": [1.0]}, "weight: found 1 numbers, expected one or 2"),
        ({"ratio": 0.5, "per_image": True}, "per_image"),
        ({"encoder_depth": 5}, "encoder_depth: found 5"),
        ({"ce_weight": -1.0}, "ce_weight: found -1.0"),
    ):
        with pytest.raises(InputError, match=message):
            Distiller(student, net(16), DPK(**given), x)
    with pytest.raises(InputError, match="teacher: found the student itself"):
        Distiller(student, student, DPK(), x)
    method = DPK()
    Distiller(student, net(16), method, x)
    with pytest.raises(InputError, match="DPK is in use"):
        Distiller(student, net(16), method, x)
    with pytest.raises(InputError, match=r"compares logits.*10 classes of the student, 7 of the teacher"):
        Distiller(student, net(16, classes=7), DPK(logit="kd"), x)
    Distiller(student, net(16, classes=7), DPK(), x)  # features alone do not mind
