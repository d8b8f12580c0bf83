"""Accuracy and cost over a data set: every image counts once, whatever the batch size."""

import dataclasses

import torch
from papercore.errors import InputError, WorkError
from papercore.report import Table

from prance.adaptive import AdaptiveViT, Prediction
from prance.data import Pictures
from prance.decision import Decision
from prance.executor import execute
from prance.files import concatenated
from prance.supernet import MetaViT


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Of a model on a data set."""

    accuracy: float
    """share of right answers"""
    images: int
    macs: float
    """mean of the images"""
    macs_std: float
    share: float
    """mean MACs over the largest subnet's"""
    kept: float
    """mean share of tokens after the last decision point"""
    keep_rate: float
    """mean of the product of the keep ratios (the "tk" of published names)"""
    distinct: int
    """different decisions"""
    prediction: Prediction

    def table(self, name: str) -> Table:
        columns = ("model", "accuracy %", "GMAC", "std", "share of largest", "tokens kept", "tk", "decisions")
        row = (name, 100 * self.accuracy, self.macs / 1e9, self.macs_std / 1e9, self.share, self.kept, self.keep_rate)
        return Table(f"{self.images} images", columns, [(*row, self.distinct)])


@torch.no_grad()
def evaluate(model: AdaptiveViT, pictures: Pictures, *, batch_size: int = 256, device: str = "cpu") -> Evaluation:
    """Runs all pictures.

    Raises:
        InputError: no picture, or labels that the network has no class for.
        WorkError: logits that are not finite; names the pictures.
    """
    check_labels(pictures, model.net.num_classes)
    model.to(device).eval()
    parts = [model(images.to(device)) for images in pictures.images.split(batch_size)]
    whole = concatenated(parts)
    bad = (~torch.isfinite(whole.logits).all(1)).nonzero().flatten().tolist()
    if bad:
        raise WorkError(f"logits of images {bad[:10]} are not finite")
    right = (whole.logits.argmax(1).cpu() == pictures.labels).double().mean()
    spent = whole.macs.double()
    decisions = torch.cat([value.double() for value in whole.decisions.tensors()], 1)
    tokens = whole.tokens[:, -1].double() if whole.tokens.shape[1] else torch.full((len(pictures),), model.net.tokens)
    keep = (whole.decisions.prune * whole.decisions.merge).prod(1)
    return Evaluation(
        float(right),
        len(pictures),
        float(spent.mean()),
        float(spent.std(correction=0)),
        float(spent.mean()) / model.full,
        float(tokens.double().mean()) / model.net.tokens,
        float(keep.mean()),
        len(decisions.unique(dim=0)),
        whole,
    )


def check_labels(pictures: Pictures, classes: int) -> None:
    """Raises InputError for an empty set or a label outside 0..classes-1."""
    if not len(pictures):
        raise InputError("the data set", found="no picture", expected="at least one")
    worst = int(pictures.labels.max())
    if worst >= classes or int(pictures.labels.min()) < 0:
        raise InputError("label", found=worst, expected=f"in 0..{classes - 1}")


@torch.no_grad()
def correct_answers(net: MetaViT, pictures: Pictures, *, batch_size: int = 256, device: str = "cpu") -> torch.Tensor:
    """[images] whether the largest subnet is right: what rewards compare with."""
    net.to(device).eval()
    right = []
    for images, labels in zip(pictures.images.split(batch_size), pictures.labels.split(batch_size), strict=True):
        outcome = execute(net, images.to(device), Decision.largest(net.space), path="sliced")
        right.append(outcome.logits.argmax(1).cpu() == labels)
    return torch.cat(right)
