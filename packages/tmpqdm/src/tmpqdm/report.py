"""Pictures and tables of a search: the front, the bits of every layer, the chosen timesteps, sampled pictures."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from papercore.images import grid_png
from papercore.report import Picture, Section, Table
from torch import Tensor

from tmpqdm.explain import effects_table, kinds_table
from tmpqdm.runs import Found


def front_table(found: Sequence[Found]) -> Table:
    """A row a budget."""
    rows = []
    for entry in found:
        plan = entry.plan
        fresh = next((s["value"] for s in plan.scores if s.get("role") == "fresh noise"), None)
        searched = next((s["value"] for s in plan.scores if s.get("role") == "search"), None)
        full = plan.cost.get("full_precision_per_step")
        per_step = plan.cost.get("bitops_per_step")
        rows.append(
            (
                entry.name,
                len(plan.timesteps),
                per_step,
                plan.cost.get("bitops"),
                full / per_step if full and per_step else None,
                plan.cost.get("size_bytes"),
                searched,
                fresh,
            )
        )
    columns = ("budget", "steps", "BitOps/step", "BitOps/image", "saving a step", "bytes", "search score",
               "fresh score")  # fmt: skip
    return Table("plans", columns, rows)


def front_picture(found: Sequence[Found]) -> Picture:
    """Score against BitOps: all candidates of all budgets, and the plans."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5))
    axes = figure.add_subplot()
    for entry in found:
        finite = [r for r in entry.archive if math.isfinite(r["fitness"])]
        axes.scatter([r["bitops"] for r in finite], [r["fitness"] for r in finite], s=8, alpha=0.35, label=entry.name)
    points = []
    for entry in found:
        fresh = next((s["value"] for s in entry.plan.scores if s.get("role") == "fresh noise"), None)
        if fresh is not None:
            points.append((entry.plan.cost["bitops"], fresh))
    points.sort()
    axes.plot([x for x, _ in points], [y for _, y in points], "k*-", markersize=11, label="plans, fresh noise")
    axes.set_xlabel("BitOps of an image")
    axes.set_ylabel("score (smaller is better)")
    axes.set_yscale("log")
    axes.legend(fontsize=8)
    return Picture.of_figure("Front", figure, "Dots are scored candidates on the search's noise.")


def bits_picture(bits: Mapping[str, Mapping[str, int]], title: str = "Bits of every operation") -> Picture:
    """A column an operation in the order of the network, a row for weights and one for every activation."""
    from matplotlib.figure import Figure

    genes = [gene for gene in ("w", "a", "q", "k", "v", "p") if any(gene in row for row in bits.values())]
    grid = [[row.get(gene, math.nan) for row in bits.values()] for gene in genes]
    figure = Figure(figsize=(min(24.0, max(6.0, 0.16 * len(bits) + 2)), 0.35 * len(genes) + 1.6))
    axes = figure.add_subplot()
    values = [value for row in bits.values() for value in row.values()]
    drawn = axes.imshow(grid, aspect="auto", cmap="viridis", vmin=min(values) - 0.5, vmax=max(values) + 0.5)
    axes.set_yticks(range(len(genes)), genes)
    every = max(1, len(bits) // 40)
    axes.set_xticks(range(0, len(bits), every), list(bits)[::every], rotation=90, fontsize=5)
    figure.colorbar(drawn, ax=axes, ticks=sorted(set(values)), label="bits")
    return Picture.of_figure(title, figure, "w weights, a their input; q, k, v, p the operands of attention.")


def timesteps_picture(found: Sequence[Found], edges: Sequence[int]) -> Picture:
    """The visited timesteps of every plan; lines are the edges of the groups."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 0.5 * len(found) + 1.4))
    axes = figure.add_subplot()
    for edge in edges:
        axes.axvline(edge, color="0.8", linewidth=0.8, zorder=0)
    rows = [("first of groups", edges[:-1]), *((entry.name, entry.plan.timesteps) for entry in found)]
    for y, (_, timesteps) in enumerate(rows):
        axes.plot(timesteps, [y] * len(timesteps), "o", markersize=4)
    axes.set_yticks(range(len(rows)), [name for name, _ in rows])
    axes.set_ylim(-0.5, len(rows) - 0.5)
    axes.set_xlabel("timestep")
    return Picture.of_figure("Visited timesteps", figure, "Grey lines: edges of the groups.")


def sections(
    found: Sequence[Found],
    costs: Mapping[str, Table],
    edges: Sequence[int],
    samples: Mapping[str, Tensor],
    columns: int = 16,
) -> list[Section]:
    """The report of a run.

    Args:
        found: a search a budget.
        costs: name of a search -> `CostModel.table` with its plan's bits.
        edges: of the groups.
        samples: title -> uint8 pictures [n, h, w, c].
        columns: pictures a row.
    """
    pictures = [
        Picture(title, grid_png(images, columns, zoom=max(1, 32 // images.shape[1])))
        for title, images in samples.items()
    ]
    made = [
        Section("Plans", tables=(front_table(found),), pictures=(front_picture(found), timesteps_picture(found, edges)))
    ]
    for entry in found:
        tables = [kinds_table(entry.plan.bits, costs[entry.name].records())]
        if sum(math.isfinite(r["fitness"]) for r in entry.archive) >= 10:
            tables.append(effects_table(entry.archive))
        tables.append(rungs_table(entry))
        made.append(Section(f"Budget {entry.name}", tables=tables, pictures=(bits_picture(entry.plan.bits),)))
    if pictures:
        made.append(Section("Pictures", "The same noise everywhere.", pictures=pictures))
    return made


def rungs_table(entry: Found) -> Table:
    """How well fewer pictures, and the search's own noise, ranked the finalists."""
    rows: list[tuple[Any, ...]] = [("search noise to fresh noise", None, entry.correlation)]
    rows += [(f"round of {rung['images']} images", len(rung["values"]), rung["correlation"]) for rung in entry.rungs]
    return Table("rank correlations of scores", ("of", "candidates", "Spearman's, with the one before"), rows)
