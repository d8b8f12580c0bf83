"""The pyramid of a detector as taps."""

import math
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from dpk import DPK, KD, AttentionTransfer, FitNet, ReviewKD
from dpk.coco import coco_sample
from dpk.detection import NeckDistiller, pyramid
from papercore.errors import InputError
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead

ROOT = Path(__file__).resolve().parents[3]
DATA = ROOT.parent / "shared" / "data"


def detector(seed: int, classes: int = 3) -> FasterRCNN:
    torch.manual_seed(seed)
    backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None, trainable_layers=5)
    head, predictor = (
        TwoMLPHead(256 * 7 * 7, 32),
        FastRCNNPredictor(32, classes),
    )  # small: quick to make
    small: dict[str, Any] = {"box_head": head, "box_predictor": predictor, "rpn_post_nms_top_n_train": 20}
    return FasterRCNN(backbone, min_size=64, max_size=96, **small)


def sample(count: int = 2):
    generator = torch.Generator().manual_seed(1)
    images = [torch.rand(3, 64, 80, generator=generator) for _ in range(count)]
    box = torch.tensor([[8.0, 8.0, 40.0, 48.0]])
    return images, [{"boxes": box, "labels": torch.tensor([1])} for _ in range(count)]


@pytest.fixture(scope="module")
def distiller() -> NeckDistiller:
    return NeckDistiller(detector(0), detector(1), size=(64, 96))


def test_levels_are_distilled_beside_the_detectors_losses(distiller):
    images, targets = sample()
    distiller.student.train()
    before = [b.clone() for b in distiller.teacher.buffers()]
    losses = distiller(images, targets)
    assert {"loss_classifier", "loss_box_reg"} <= losses.keys()
    extra = {name: loss for name, loss in losses.items() if name.startswith("dpk.")}
    assert len(extra) == len(distiller.levels) == 5
    sum(losses.values()).backward()
    stem = distiller.student.backbone.body.conv1.weight
    assert float(stem.grad.abs().sum()) > 0
    assert all(p.grad is None for p in distiller.teacher.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, distiller.teacher.buffers(), strict=True))
    assert not distiller.student.backbone._forward_hooks
    assert not any(name.startswith("_teacher") for name, _ in distiller.named_parameters())


def test_a_step_lowers_the_levels_losses(distiller):
    images, targets = sample()
    optimizer = torch.optim.SGD(distiller.method.parameters(), lr=0.05)
    values = []
    for _ in range(4):
        losses = distiller(images, targets)
        loss = sum(value for name, value in losses.items() if name.startswith("dpk."))
        values.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert values[-1] < values[0]


def test_both_see_one_picture_whatever_size_the_student_draws():
    """torchvision draws the size of the pictures anew in every training step."""
    student = detector(0)
    student.transform.min_size = (64, 48, 32)
    drawn = NeckDistiller(student.train(), detector(1), size=(64, 96))
    images, targets = sample()
    shapes = []
    handle = drawn.teacher.backbone.register_forward_hook(lambda m, x, y: shapes.append(tuple(y["0"].shape)))
    mine = student.backbone.register_forward_hook(lambda m, x, y: shapes.append(tuple(y["0"].shape)))
    for _ in range(6):
        drawn(images, targets)
    handle.remove()
    mine.remove()
    assert shapes[::2] == shapes[1::2]
    assert len(set(shapes)) > 1
    info = drawn.method.info()
    assert info["rho"].shape == (5,)
    assert float(info["tokenwise"]) == 1  # two images are too few for CKA over images
    drawn(*sample(4))
    assert float(drawn.method.info()["tokenwise"]) == 0
    drawn.epoch(1)
    assert drawn.student_state_dict().keys() == detector(2).state_dict().keys()
    assert len(drawn.trainable_parameters()) > len([p for p in student.parameters() if p.requires_grad])


def test_other_methods_of_features_and_those_that_need_logits():
    student = detector(0).train()
    for method in (FitNet(ce_weight=0), ReviewKD(ce_weight=0), AttentionTransfer(ce_weight=0)):
        losses = NeckDistiller(student, detector(1), method, levels=["1", "2"], size=(64, 96))(*sample())
        assert sum(name.startswith("dpk.") for name in losses) == 2
    for method in (FitNet(), KD(ce_weight=0), DPK(ce_weight=0, logit="kd")):
        with pytest.raises(InputError, match="ce_weight=0"):
            NeckDistiller(student, detector(1), method)
    with pytest.raises(InputError, match="in evaluation mode"):
        NeckDistiller(student.eval(), detector(1), size=(64, 96))(*sample())
    with pytest.raises(InputError, match="the student itself"):
        NeckDistiller(student, student)


def test_networks_without_a_pyramid():
    with pytest.raises(InputError, match="with a backbone"):
        pyramid(torch.nn.Linear(2, 2), torch.zeros(1, 3, 8, 8))
    with pytest.raises(InputError, match="level 7: found not in both"):
        NeckDistiller(detector(0), detector(1), levels=["7"], size=(64, 64))


def test_pictures_of_coco():
    if not (DATA / "images" / "coco128").is_dir():
        pytest.skip("no sample of COCO beside the repository")
    images, targets, names = coco_sample(DATA, "train2017", count=2)
    assert len(names) == 80
    assert all(float(image.max()) <= 1 and image.shape[0] == 3 for image in images)
    for image, target in zip(images, targets, strict=True):
        height, width = image.shape[1:]
        assert bool((target["boxes"][:, 2:] > target["boxes"][:, :2]).all())
        assert float(target["boxes"][:, 2].max()) <= width + 1
        assert float(target["boxes"][:, 3].max()) <= height + 1
        assert int(target["labels"].min()) >= 1  # 0 is the background
    student, teacher = detector(0, 81), detector(1, 81)
    losses = NeckDistiller(student.train(), teacher)(images, targets)
    assert all(bool(torch.isfinite(loss)) for loss in losses.values())


def test_the_example_on_coco_runs():
    if not (DATA / "images" / "coco128").is_dir():
        pytest.skip("no sample of COCO beside the repository")
    example = runpy.run_path(str(Path(__file__).parents[1] / "examples" / "detect_coco.py"))
    log = example["main"]([str(DATA), "--teacher", "resnet18", "--steps", "1", "--batch-size", "2", "--size", "48"])
    assert len(log) == 1
    assert all(math.isfinite(value) for record in log for value in record.values())
    assert 0 <= log[0]["rho"] <= 0.9 + 1e-6


def test_samples_of_coco_that_are_damaged(tmp_path):
    with pytest.raises(InputError, match="annotations"):
        coco_sample(tmp_path, "train2017")
    folder = tmp_path / "images" / "coco128"
    folder.mkdir(parents=True)
    (folder / "annotations.json.gz").write_bytes(b"no gzip")
    with pytest.raises(InputError, match="annotations"):
        coco_sample(tmp_path, "train2017")
