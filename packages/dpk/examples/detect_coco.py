"""A Faster R-CNN with a ResNet-18 learns from one with a ResNet-50, on the sample of COCO in a data folder.

    python packages/dpk/examples/detect_coco.py DATA [--teacher-weights FILE] [--steps 20] [--device cpu]

Both are torchvision's detectors with feature pyramids. Without trained weights for the teacher the steps show how the
parts fit together and nothing about accuracy. A step on one processor core takes some seconds.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from dpk.coco import coco_sample
from dpk.detection import NeckDistiller
from dpk.dpk_method import DPK
from papercore.cli import write
from papercore.weights import load_exactly, read_tensors
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone


def detector(backbone: str, classes: int, size: int, seed: int) -> FasterRCNN:
    """Fresh weights; pictures are brought to a shorter side of `size` pixels."""
    torch.manual_seed(seed)
    pyramid = resnet_fpn_backbone(backbone_name=backbone, weights=None, trainable_layers=5)
    return FasterRCNN(pyramid, classes, min_size=size, max_size=2 * size)


def main(arguments: Sequence[str] | None = None) -> list[dict[str, float]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--teacher-weights", type=Path)
    parser.add_argument("--teacher", default="resnet50")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--size", type=int, default=160)
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args(arguments)
    images, targets, names = coco_sample(given.data, "train2017", count=given.steps * given.batch_size)
    student, teacher = (detector(name, len(names) + 1, given.size, seed=1) for name in ("resnet18", given.teacher))
    if given.teacher_weights is not None:
        load_exactly(teacher, read_tensors(given.teacher_weights), given.teacher_weights)
    # normalised, because the features of random weights are large
    method = DPK(integrator="conv", samples="auto", ce_weight=0.0, target_norm="layernorm")
    distiller = NeckDistiller(student.train(), teacher, method, size=(given.size, given.size)).to(given.device)
    optimizer = torch.optim.SGD(distiller.trainable_parameters(), lr=0.005, momentum=0.9, weight_decay=1e-4)
    log = []
    for step in range(given.steps):
        chosen = [(step * given.batch_size + k) % len(images) for k in range(given.batch_size)]
        losses = distiller(
            [images[k].to(given.device) for k in chosen],
            [{key: value.to(given.device) for key, value in targets[k].items()} for k in chosen],
        )
        optimizer.zero_grad()
        total = torch.stack(list(losses.values())).sum()
        total.backward()
        torch.nn.utils.clip_grad_norm_(distiller.trainable_parameters(), 10.0)
        optimizer.step()
        info = distiller.method.info()
        log.append({name: float(loss.detach()) for name, loss in losses.items()} | {"rho": float(info["rho"].mean())})
        own = sum(value for name, value in log[-1].items() if name.startswith("loss_"))
        levels = sum(value for name, value in log[-1].items() if name.startswith("dpk."))
        shares = ", ".join(f"{share:.2f}" for share in info["rho"].tolist())
        write(f"step {step}: detector {own:.3f}, levels {levels:.3f}, rho {shares}\n")
    return log


if __name__ == "__main__":
    main()
