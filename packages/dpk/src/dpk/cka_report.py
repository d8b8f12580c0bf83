"""CKA between any two networks: all layers of one against all layers of the other, over minibatches.

Each layer's Gram matrix is made once for a minibatch; the HSICs of all pairs are then one product of the flattened
matrices (the definition of `alignment`, arranged for many layers).
"""

import dataclasses
import weakref
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

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


Centred = tuple[Float[Tensor, "layers nn"], Float[Tensor, "layers n"], Float[Tensor, " layers"]]


def without_diagonal(grams: Sequence[Float[Tensor, "n n"]]) -> Centred:
    """(Gram matrices with a diagonal of 0, flattened; their row sums; their totals)."""
    stacked = torch.stack(list(grams))
    stacked.diagonal(dim1=-2, dim2=-1).zero_()
    rows = stacked.sum(-1)
    return stacked.flatten(1), rows, rows.sum(-1)


def all_pairs(first: Centred, second: Centred) -> Float[Tensor, "first second"]:
    """HSIC1 of every pair of layers of one minibatch of n > 3 samples: tr(KL) is the inner product of the flattened."""
    (flat, rows, totals), (flat2, rows2, totals2) = first, second
    n = rows.shape[1]
    inner = flat @ flat2.mT + totals[:, None] * totals2 / ((n - 1) * (n - 2)) - 2 / (n - 2) * (rows @ rows2.mT)
    return inner / (n * (n - 3))


def own(layers: Centred) -> Float[Tensor, " layers"]:
    """HSIC1 of every layer with itself."""
    flat, rows, totals = layers
    n = rows.shape[1]
    squares = torch.linalg.vector_norm(flat, dim=1).square()
    inner = squares + totals.square() / ((n - 1) * (n - 2)) - 2 / (n - 2) * rows.square().sum(-1)
    return inner / (n * (n - 3))


Layers = Literal["all", "stages"]


class Recorder:
    """Gram matrices of the outputs of layers during a forward pass.

    Args:
        layers: names, kept in their order; "all": every module that gives a new tensor, in the order in which they
            end; "stages": of these the ones at most two levels deep (stem, stages, their blocks, classifier). A
            module that only hands on what another gave (a container its last part's, an identity) is no new one.

    Raises:
        InputError: a name is not found.
    """

    def __init__(self, model: nn.Module, layers: Sequence[str] | Layers) -> None:
        known = {name: module for name, module in model.named_modules() if name}
        self.named = None if isinstance(layers, str) else list(layers)
        names = [name for name in known if layers == "all" or name.count(".") < 2] if self.named is None else self.named
        for name in names:
            if name not in known:
                raise InputError(f"layer {name}", found="no such module", expected="a name of `named_modules`")
        self.samples = 0
        self.grams: dict[str, Tensor] = {}
        self.given: list[tuple[weakref.ref[Tensor], int]] = []
        self.handles = [known[name].register_forward_hook(self.hook(name)) for name in names]

    def hook(self, name: str) -> Any:
        def record(module: nn.Module, inputs: Any, output: Any) -> None:
            # the sizes are asked first: a Gram matrix of windows or pixels as samples would be large
            if not isinstance(output, Tensor) or output.ndim < 2 or len(output) != self.samples or name in self.grams:
                return
            if self.named is None:
                if any(seen() is output and version == output._version for seen, version in self.given):
                    return
                self.given.append((weakref.ref(output), output._version))
            self.grams[name] = gram(output)

        return record

    def run(self, model: nn.Module, images: Tensor) -> dict[str, Tensor]:
        """By layer, of one minibatch.

        Raises:
            InputError: a layer that was named gives no tensor with a row for every image.
        """
        self.samples, self.grams, self.given = len(images), {}, []
        model(images)
        for name in self.named or ():
            if name not in self.grams:
                raise InputError(
                    f"output of layer {name}", found="none", expected="a tensor with a row for every image"
                )
        return self.grams if self.named is None else {name: self.grams[name] for name in self.named}

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()


@torch.no_grad()
def cka_matrix(
    first: nn.Module,
    second: nn.Module,
    batches: Iterable[Tensor],
    *,
    first_layers: Sequence[str] | Layers = "all",
    second_layers: Sequence[str] | Layers = "all",
    device: str = "cpu",
) -> CKAMatrix:
    """CKA of all layers of two networks (or of one with itself) on the same images.

    Args:
        batches: images as the networks take them; a batch of fewer than four is left out.
        first_layers, second_layers: see `Recorder`. A layer called several times counts with its first output.

    Raises:
        InputError: no batch of at least four images, or a layer that does not exist or gives no tensor.
        WorkError: features that are not finite.
    """
    networks = [first, second]
    modes = [(module, module.training) for network in networks for module in network.modules()]
    layers = (first_layers, second_layers)
    recorders = [Recorder(network.to(device).eval(), chosen) for network, chosen in zip(networks, layers, strict=True)]
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
                grams = recorder.run(network, images)
                kept[index] = kept[index] or list(grams)
                found.append(without_diagonal([grams[name] for name in kept[index]]))
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
