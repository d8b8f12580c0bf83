"""The pyramid of a detector as taps."""

from pathlib import Path

import pytest
import torch
from dpk.coco import coco_sample
from dpk.detection import NeckDistiller, pyramid
from papercore.errors import InputError
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

ROOT = Path(__file__).resolve().parents[3]
DATA = ROOT.parent / "shared" / "data"


def detector(seed: int, classes: int = 3) -> FasterRCNN:
    torch.manual_seed(seed)
    backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None, trainable_layers=5)
    return FasterRCNN(backbone, classes, min_size=64, max_size=96, rpn_post_nms_top_n_train=20)


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


def test_samples_of_coco_that_are_damaged(tmp_path):
    with pytest.raises(InputError, match="annotations"):
        coco_sample(tmp_path, "train2017")
    folder = tmp_path / "images" / "coco128"
    folder.mkdir(parents=True)
    (folder / "annotations.json.gz").write_bytes(b"no gzip")
    with pytest.raises(InputError, match="annotations"):
        coco_sample(tmp_path, "train2017")
