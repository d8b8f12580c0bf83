"""The interference of bit-widths made visible: with and without the scheduler and the distortion term."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from papercore.errors import InputError
from papercore.report import Picture, Section, Table, write_html, write_markdown
from papercore.rundir import RunDir, write_json

from oneshot_mpq.checkpoint import load_supernet
from oneshot_mpq.lsq import FLOAT
from oneshot_mpq.supernet import Supernet
from oneshot_mpq.turbulence import turbulence, unstable
from oneshot_mpq.workflow import Project, train_supernet

REMEDIES: Mapping[str, Mapping[str, Any]] = {
    "neither": {"scheduler": False, "idm": 0.0},
    "scheduler": {"scheduler": True, "idm": 0.0},
    "mitigation": {"scheduler": False, "idm": 0.01},
    "both": {"scheduler": True, "idm": 0.01},
}
"""settings of the training"""


@dataclasses.dataclass(frozen=True)
class Inspected:
    """One supernet and the lines that its training wrote at the ends of its epochs."""

    name: str
    net: Supernet
    epochs: Sequence[Mapping[str, Any]]


def train_remedies(
    project: Project, out: Path, *, device: str = "auto", resume: bool = True, **changes: Any
) -> list[Inspected]:
    """The same network trained in the four settings, each in a folder of `out`, watched."""
    found = []
    for name, remedy in REMEDIES.items():
        config = project.train_config(**{**changes, **remedy})
        train_supernet(
            project,
            config,
            out / name,
            device=device,
            resume=resume,
            watch=True,
            float_out=out / "float",
            label=f"oneshot-mpq: {name}",
        )
        found.append(read_inspected(out / name, name))
    return found


def read_inspected(folder: Path, name: str | None = None) -> Inspected:
    """A folder that `oneshot-mpq train --watch` wrote.

    Raises:
        InputError: no supernet there, or one whose training was not watched.
    """
    net = load_supernet(folder)
    epochs = {record["epoch"]: record for record in RunDir(folder / "run").records() if "epoch" in record}
    if not epochs:
        raise InputError("log", where=folder / "run", found="nothing about interference", expected="train --watch")
    return Inspected(name or folder.name, net, [epochs[epoch] for epoch in sorted(epochs)])


def turbulence_table(net: Supernet) -> Table:
    """Of every layer: T, the unstable share at every width, and the weight bits allowed now."""
    bits = [b for b in net.bits if b < FLOAT]
    rows = []
    for name, layer in net.layers.items():
        shares = []
        for b in bits:
            if b not in layer.weight_choices:
                shares.append(None)
                continue
            quantizer = layer.weight_quantizer
            step = quantizer.step(b).detach()
            step = step if quantizer.channels is None else step.reshape(-1, *[1] * (layer.weight.ndim - 1))
            shares.append(float(unstable(layer.weight.detach(), step, b)) / layer.weight.numel())
        allowed = ", ".join(map(str, layer.allowed_weight_bits))
        rows.append((name, float(turbulence(layer, layer.weight_choices)), *shares, allowed))
    columns = ("layer", "turbulence", *(f"unstable at {b} bits" for b in bits), "weight bits allowed")
    return Table(f"turbulence by layer of {net.name}", columns, rows)


def comparison_table(found: Sequence[Inspected]) -> Table:
    """At the end of every training."""
    bits = [b for b in found[0].net.bits if b < FLOAT]
    columns = (
        "training",
        "turbulence",
        *(f"oscillation W{b}" for b in bits),
        *(f"accuracy W{b}A{b}" for b in bits),
    )
    rows = [(item.name, *(item.epochs[-1].get(column) for column in columns[1:])) for item in found]
    return Table("interference at the end (oscillation: share of weights a step; accuracy in %)", columns, rows)


def interference_picture(found: Sequence[Inspected]) -> Picture:
    """Turbulence, oscillation and accuracy at the lowest width over the epochs, one line a training."""
    from matplotlib.figure import Figure

    lowest = min(b for b in found[0].net.bits)
    panels = {
        "turbulence": "turbulence",
        f"oscillation W{lowest}": f"oscillation at {lowest} bits",
        f"oscillation W{4 if 4 in found[0].net.bits else lowest}": "oscillation at 4 bits",
        f"accuracy W{lowest}A{lowest}": f"accuracy W{lowest}A{lowest} (%)",
    }
    figure = Figure(figsize=(3.4 * len(panels), 3.2), layout="constrained")
    for number, (key, title) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(1, len(panels), number)
        for item in found:
            axes.plot([r["epoch"] for r in item.epochs], [r[key] for r in item.epochs], label=item.name)
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("epoch")
        axes.grid(alpha=0.3)
    figure.axes[0].legend(frameon=False, fontsize=8)
    return Picture.of_figure("Interference over the training", figure, "Batch statistics, search images.")


def accuracy_picture(found: Sequence[Inspected]) -> Picture:
    """Accuracy by uniform width at the end."""
    from matplotlib.figure import Figure

    bits = [b for b in found[0].net.bits if b < FLOAT]
    figure = Figure(figsize=(5, 3.2), layout="constrained")
    axes = figure.add_subplot()
    for item in found:
        axes.plot(bits, [item.epochs[-1][f"accuracy W{b}A{b}"] for b in bits], "o-", label=item.name)
    axes.set_xlabel("bits of weights and activations")
    axes.set_ylabel("accuracy (%)")
    axes.set_xticks(bits)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    return Picture.of_figure("Accuracy by width", figure, "Every uniform width of the same supernet, batch statistics.")


def write_inspection(found: Sequence[Inspected], out: Path) -> list[Table]:
    """`inspection.html`, `inspection.md` and `inspection.json` in `out`; gives the tables."""
    tables = [comparison_table(found), *(turbulence_table(item.net) for item in found)]
    tables = [
        dataclasses.replace(table, title=f"{item.name}: {table.title}") if item else table
        for table, item in zip(tables, (None, *found), strict=True)
    ]
    sections = [
        Section(
            "Interference of bit-widths",
            EXPLANATION,
            tables[:1],
            (interference_picture(found), accuracy_picture(found)),
        ),
        Section("Layers", tables=tables[1:]),
    ]
    write_markdown(out / "inspection.md", "Bit-width interference", sections)
    write_html(out / "inspection.html", "Bit-width interference", sections)
    write_json(
        out / "inspection.json",
        {item.name: {"epochs": list(item.epochs), "layers": turbulence_table(item.net).records()} for item in found},
    )
    return tables


EXPLANATION = (
    "One weight serves codes of very different grids. Turbulence counts the weights further than 0.375 of a step from "
    "their code's centre, low bits more; oscillation is the share of weights whose integer code turns back in a step. "
    "The scheduler takes the lowest bit away from the most turbulent layers for a while; the mitigation draws the "
    "outputs of layers at their lowest bit to those at the most bits."
)
