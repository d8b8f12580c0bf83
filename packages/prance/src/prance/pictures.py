"""Pictures: which patches every image keeps and merges, how MACs spread over images, accuracy against MACs."""

import colorsys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float, Int
from papercore.errors import InputError
from torch import Tensor

from prance.executor import Outcome

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DIM = 0.25
"""what is left of a dropped patch's contrast"""
TINT = 0.4
"""share of the group's colour in a merged patch"""


def patch_groups(assignment: Int[Tensor, " tokens"], prefix: int, side: int) -> Int[np.ndarray, "side side"]:
    """For every patch of the image -1 when it was dropped, 0 when it stands alone, else the number of its group.

    Groups are numbered from 1, the one with the most patches first. Patches that a prefix token took up are dropped.
    """
    holder = assignment[prefix:].cpu().clone()
    held_by_prefix = torch.isin(holder, assignment[:prefix].cpu()) & (holder >= 0)
    holder[held_by_prefix] = -1
    values, counts = holder[holder >= 0].unique(return_counts=True)
    ordered = sorted(zip(counts.tolist(), values.tolist(), strict=True), key=lambda pair: (-pair[0], pair[1]))
    groups = torch.where(holder >= 0, 0, -1)
    for number, value in enumerate((v for count, v in ordered if count > 1), start=1):
        groups[holder == value] = number
    return groups.view(side, side).numpy()


def colour(group: int) -> tuple[float, float, float]:
    """A colour for a group; neighbours in number are far apart in hue."""
    return colorsys.hsv_to_rgb(group * 0.618034 % 1, 0.75, 1.0)


def painted(
    image: Float[np.ndarray, "height width three"], groups: Int[np.ndarray, "side side"]
) -> Float[np.ndarray, "height width three"]:
    """The image with dropped patches dimmed to grey, merged patches tinted and their groups outlined."""
    side = len(groups)
    cell = len(image) // side
    pixel = max(1, 192 // len(image))
    large = image.repeat(pixel, 0).repeat(pixel, 1).copy()
    cell *= pixel
    fine = groups.repeat(cell, 0).repeat(cell, 1)
    grey = large.mean(2, keepdims=True)
    large = np.where((fine == -1)[:, :, None], 0.85 - (0.85 - grey) * DIM, large)
    line = max(1, cell // 12)
    for row, column in zip(*np.nonzero(groups > 0), strict=True):
        group = groups[row, column]
        tone = np.array(colour(int(group)))
        top, left = row * cell, column * cell
        part = large[top : top + cell, left : left + cell]
        part[:] = (1 - TINT) * part + TINT * tone
        if row == 0 or groups[row - 1, column] != group:
            part[:line] = tone
        if row == side - 1 or groups[row + 1, column] != group:
            part[-line:] = tone
        if column == 0 or groups[row, column - 1] != group:
            part[:, :line] = tone
        if column == side - 1 or groups[row, column + 1] != group:
            part[:, -line:] = tone
    return large.clip(0, 1)


def picture(image: Float[Tensor, "channels height width"]) -> Float[np.ndarray, "height width three"]:
    """An image in [0, 1] as matplotlib wants it; one channel becomes grey.

    Raises:
        InputError: another number of channels.
    """
    if image.ndim != 3 or image.shape[0] not in (1, 3):
        raise InputError("picture", found=tuple(image.shape), expected="(1 or 3, height, width)")
    array = image.detach().cpu().float().clamp(0, 1).permute(1, 2, 0).numpy()
    return np.repeat(array, 3, 2) if array.shape[2] == 1 else array


def kept_patches(
    images: Float[Tensor, "batch channels height width"],
    outcome: Outcome,
    *,
    prefix: int = 1,
    titles: Sequence[str] = (),
    most: int = 8,
) -> "Figure":
    """A row for every image: itself, then its patches after every decision.

    Dropped patches are dimmed; the patches of one merged token share a colour and an outline.

    Args:
        images: with values in [0, 1], not normalised.
        outcome: of the same images.
        titles: one for every image, beside it.
        most: images that are drawn at most.

    Raises:
        InputError: no images, another number of them than in the outcome, or no decision point.
    """
    from matplotlib.figure import Figure

    if len(images) == 0 or len(images) != len(outcome.logits):
        raise InputError("images", found=len(images), expected=f"the {len(outcome.logits)} of the outcome, at least 1")
    points = outcome.decision.space.points
    if not points:
        raise InputError("decision points", found="none", expected="a space with several groups")
    rows = min(most, len(images))
    side = round((outcome.origin.shape[1] - prefix) ** 0.5)
    figure = Figure(figsize=(2.3 * (1 + len(points)), 2.55 * rows + 0.2), layout="constrained")
    axes = figure.subplots(rows, 1 + len(points), squeeze=False)
    for row in range(rows):
        image = picture(images[row])
        axes[row][0].imshow(image, interpolation="nearest")
        axes[row][0].set_title(titles[row] if row < len(titles) else f"image {row}", fontsize=8)
        for point, block in enumerate(points):
            groups = patch_groups(outcome.assignments[point][row], prefix, side)
            axes[row][1 + point].imshow(painted(image, groups), interpolation="nearest")
            tokens = int(outcome.count[row, point])
            dropped, merged = int((groups == -1).sum()), int(groups.max(initial=0))
            text = f"block {block}: {tokens} tokens\n{dropped} patches dropped, {merged} merged groups"
            axes[row][1 + point].set_title(text, fontsize=8)
        for axis in axes[row]:
            axis.set_axis_off()
    return figure


def macs_histogram(
    cost: Int[Tensor, " batch"],
    images: Float[Tensor, "batch channels height width"],
    *,
    correct: Tensor | None = None,
    shown: int = 6,
) -> "Figure":
    """How many MACs images get, and those that get the fewest and the most.

    Args:
        cost: MACs of every image.
        images: with values in [0, 1].
        correct: whether each is classified rightly; the histogram is then split, and frames are green or red.
        shown: images at either end.

    Raises:
        InputError: no images, or another number of them.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    if len(cost) == 0 or len(cost) != len(images):
        raise InputError("images", found=len(images), expected=f"{max(1, len(cost))}, as many as MACs")
    unit, name = (1e9, "GMAC") if float(cost.max()) >= 1e8 else (1e6, "MMAC")
    values = cost.cpu().double().numpy() / unit
    shown = max(1, min(shown, len(cost)))
    order = cost.cpu().argsort(stable=True).tolist()
    figure = Figure(figsize=(1.25 * shown + 0.5, 5.8), layout="constrained")
    grid = figure.add_gridspec(4, shown, height_ratios=[2.2, 1, 1, 0.01])
    axis = figure.add_subplot(grid[0, :])
    edges = np.histogram_bin_edges(values, bins=min(40, max(5, len(values) // 4))).tolist()
    if correct is None:
        axis.hist(values, edges, color="#4477aa")
    else:
        right = correct.cpu().bool().numpy()
        axis.hist([values[right], values[~right]], edges, stacked=True, color=["#4477aa", "#cc6677"])
        axis.legend(["right", "wrong"], frameon=False, fontsize=8)
    axis.axvline(values.mean(), color="black", linestyle="--", linewidth=1)
    axis.set_xlabel(f"{name} an image (dashed: mean {values.mean():.3g})", fontsize=9)
    axis.set_ylabel("images", fontsize=9)
    axis.yaxis.set_major_locator(MaxNLocator(integer=True))
    ends = {"fewest": order[:shown], "most": order[::-1][:shown]}
    for line, (end, chosen) in enumerate(ends.items(), start=1):
        for column, index in enumerate(chosen):
            place = figure.add_subplot(grid[line, column])
            place.imshow(picture(images[index]), interpolation="nearest")
            place.set_xticks([])
            place.set_yticks([])
            label = f"{values[index]:.3g} {name}"
            place.set_title(f"{end}: {label}" if column == 0 else label, fontsize=8)
            if correct is not None:
                for spine in place.spines.values():
                    spine.set(edgecolor="green" if bool(correct[index]) else "red", linewidth=2)
    return figure


def pareto_plot(series: Mapping[str, Sequence[tuple[float, float]]], *, full: float | None = None) -> "Figure":
    """Accuracy against MACs; what no other point of its series beats is joined by a line.

    Args:
        series: name -> (MACs, accuracy in [0, 1]).
        full: MACs of the largest subnet, drawn as a vertical line.

    Raises:
        InputError: a number that is not finite.
    """
    from matplotlib.figure import Figure

    from prance.baselines import pareto

    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = figure.add_subplot()
    everything = [cost for points in series.values() for cost, _ in points]
    unit, name = (1e9, "GMAC") if max([*everything, full or 0.0], default=0.0) >= 1e8 else (1e6, "MMAC")
    for number, (label, points) in enumerate(series.items()):
        if not np.isfinite(np.array(points, dtype=float)).all():
            raise InputError(f"points of {label}", found="NaN or infinity", expected="finite numbers")
        if not points:
            continue
        cost, accuracy = (torch.tensor(values, dtype=torch.float64) for values in zip(*points, strict=True))
        front = pareto(cost, accuracy)
        tone = f"C{number}"
        axis.scatter(cost / unit, 100 * accuracy, s=14, alpha=0.6, color=tone, label=label)
        axis.plot(cost[front] / unit, 100 * accuracy[front], color=tone, linewidth=1)
    if full is not None:
        axis.axvline(full / unit, color="grey", linestyle=":", linewidth=1)
    axis.set_xlabel(f"mean {name} an image")
    axis.set_ylabel("accuracy in %")
    if series:
        axis.legend(frameon=False, fontsize=8)
    return figure


def save(figure: "Figure", path: Path | str) -> Path:
    """Writes the figure; the kind of file is that of the name.

    Raises:
        InputError: a kind that matplotlib does not write.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        figure.savefig(path, dpi=110)
    except ValueError as error:
        raise InputError("kind of picture", where=path, found=path.suffix, expected=".png, .svg or .pdf") from error
    return path
