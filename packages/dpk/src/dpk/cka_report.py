"""CKA between any two networks: all layers of one against all layers of the other, over minibatches.

Each layer's Gram matrix is made once for a minibatch; the HSICs of all pairs are then one product of the flattened
matrices (the definition of `alignment`, arranged for many layers).
"""

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from papercore.errors import InputError, WorkError
from torch import Tensor, nn

from dpk.alignment import LEAST, gram


@dataclasses.dataclass(frozen=True)
class CKAMatrix:
    """Similarities of layers."""

    values: Float[Tensor, "first second"]
    """float64; where it is undefined 0"""
    first: tuple[str, ...]
    second: tuple[str, ...]
    batches: int
    samples: int

    def records(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "first": list(self.first),
            "second": list(self.second),
            "cka": self.values.tolist(),
            "batches": self.batches,
            "samples": self.samples,
            "estimator": "unbiased HSIC, pooled over minibatches",
        }


def centred_rows(grams: Float[Tensor, "layers n n"]) -> tuple[Tensor, Tensor, Tensor]:
    """(matrices without their diagonal, flattened; their row sums; their totals)."""
    grams = grams - torch.diag_embed(torch.diagonal(grams, dim1=-2, dim2=-1))
    rows = grams.sum(-1)
    return grams.flatten(1), rows, rows.sum(-1)


def all_pairs(first: Float[Tensor, "first n n"], second: Float[Tensor, "second n n"]) -> Float[Tensor, "first second"]:
    """HSIC1 of every pair of Gram matrices of one minibatch of n > 3 samples."""
    n = first.shape[-1]
    flat, rows, totals = centred_rows(first)
    flat2, rows2, totals2 = centred_rows(second)
    inner = flat @ flat2.mT + totals[:, None] * totals2 / ((n - 1) * (n - 2)) - 2 / (n - 2) * (rows @ rows2.mT)
    return inner / (n * (n - 3))


def own(grams: Float[Tensor, "layers n n"]) -> Float[Tensor, " layers"]:
    """HSIC1 of every matrix with itself."""
    n = grams.shape[-1]
    flat, rows, totals = centred_rows(grams)
    inner = flat.square().sum(-1) + totals.square() / ((n - 1) * (n - 2)) - 2 / (n - 2) * rows.square().sum(-1)
    return inner / (n * (n - 3))


def default_layers(model: nn.Module) -> list[str]:
    """Modules without parts: convolutions, linear layers, norms and activations, in order."""
    return [name for name, module in model.named_modules() if name and not list(module.children())]


def stage_layers(model: nn.Module) -> list[str]:
    """Modules at most two levels deep: stem, stages, their blocks, classifier, in order."""
    return [name for name, _ in model.named_modules() if name and name.count(".") < 2]


class Recorder:
    """Gram matrices of the outputs of some layers during a forward pass."""

    def __init__(self, model: nn.Module, layers: Sequence[str]) -> None:
        known = dict(model.named_modules())
        for name in layers:
            if name not in known:
                raise InputError(f"layer {name}", found="no such module", expected="a name of `named_modules`")
        self.grams: dict[str, Tensor] = {}
        self.handles = [known[name].register_forward_hook(self.hook(name)) for name in layers]

    def hook(self, name: str) -> Any:
        def record(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.ndim > 1 and name not in self.grams:
                self.grams[name] = gram(output)

        return record

    def take(self) -> dict[str, Tensor]:
        taken, self.grams = self.grams, {}
        return taken

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()


@torch.no_grad()
def cka_matrix(
    first: nn.Module,
    second: nn.Module,
    batches: Iterable[Tensor],
    *,
    first_layers: Sequence[str] | None = None,
    second_layers: Sequence[str] | None = None,
    device: str = "cpu",
) -> CKAMatrix:
    """CKA of all layers of two networks (or of one with itself) on the same images.

    Args:
        batches: images as the networks take them; a batch of fewer than four is left out.
        first_layers, second_layers: names; None: see `default_layers`. A layer called several times counts with its
            first output; one that gives no tensor is left out.

    Raises:
        InputError: no batch of at least four images, or a layer that does not exist.
        WorkError: features that are not finite.
    """
    names = [list(first_layers or default_layers(first)), list(second_layers or default_layers(second))]
    networks = [first, second]
    modes = [(module, module.training) for network in networks for module in network.modules()]
    recorders = [Recorder(network.to(device).eval(), layers) for network, layers in zip(networks, names, strict=True)]
    cross = firsts = seconds = None
    count = samples = 0
    kept: list[list[str]] = [[], []]
    try:
        for images in batches:
            if len(images) < LEAST:
                continue
            images = images.to(device)
            found = []
            for index, (network, recorder) in enumerate(zip(networks, recorders, strict=True)):
                network(images)
                grams = recorder.take()
                if not kept[index]:
                    kept[index] = [name for name in names[index] if name in grams and len(grams[name]) == len(images)]
                found.append(torch.stack([grams[name] for name in kept[index]]))
            parts = all_pairs(found[0], found[1]), own(found[0]), own(found[1])
            cross, firsts, seconds = (
                part if total is None else total + part
                for total, part in zip((cross, firsts, seconds), parts, strict=True)
            )
            count, samples = count + 1, samples + len(images)
    finally:
        for recorder in recorders:
            recorder.close()
        for module, mode in modes:
            module.training = mode
    if cross is None or firsts is None or seconds is None:
        raise InputError("images", found="no batch of at least 4", expected="at least one")
    if not bool(torch.isfinite(cross).all()):
        bad = (~torch.isfinite(cross)).nonzero()[0].tolist()
        raise WorkError(f"features of {kept[0][bad[0]]} or {kept[1][bad[1]]} are not finite")
    scale = firsts.clamp(min=0).sqrt()[:, None] * seconds.clamp(min=0).sqrt()
    values = torch.where(scale > 0, cross / torch.where(scale > 0, scale, 1), 0)
    return CKAMatrix(values.cpu(), tuple(kept[0]), tuple(kept[1]), count, samples)


def heat_map(matrix: CKAMatrix, titles: tuple[str, str]) -> Any:
    """A matplotlib figure: the first network's layers from bottom to top, the second's from left to right."""
    from matplotlib.figure import Figure

    rows, columns = matrix.values.shape
    figure = Figure(figsize=(min(14, 2.5 + 0.22 * columns), min(14, 2.0 + 0.22 * rows)), layout="constrained")
    axes = figure.subplots()
    shown = axes.imshow(matrix.values.clamp(0, 1).numpy(), origin="lower", cmap="magma", vmin=0, vmax=1, aspect="auto")
    for axis, layers, title in ((axes.yaxis, matrix.first, titles[0]), (axes.xaxis, matrix.second, titles[1])):
        step = max(1, -(-len(layers) // 40))
        axis.set_ticks(range(0, len(layers), step), [layers[i] for i in range(0, len(layers), step)])
        axis.set_label_text(title)
    axes.tick_params(labelsize=7)
    axes.tick_params(axis="x", rotation=90)
    figure.colorbar(shown, ax=axes, label="CKA (unbiased, minibatch)")
    return figure


def write_report(matrix: CKAMatrix, out: Path, titles: tuple[str, str]) -> None:
    """`cka.json` and `cka.png` in a folder."""
    from papercore.report import Picture
    from papercore.rundir import atomic, write_json

    write_json(out / "cka.json", {"networks": list(titles), **matrix.records()})
    picture = Picture.of_figure("CKA", heat_map(matrix, titles))
    with atomic(out / "cka.png") as temporary:
        temporary.write_bytes(picture.png)
