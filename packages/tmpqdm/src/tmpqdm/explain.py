"""What a search says about the genes: which of them decided, read from the candidates that it scored.

No candidate is scored again. For every gene the archive is split by the gene's value; the share of the scores' variance
(of ranks, so that a few terrible candidates do not rule) that the split explains says how much the gene mattered among
what the search looked at. Candidates of a search are not a random sample: the figures rank genes, they prove nothing.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from papercore.errors import InputError
from papercore.report import Table

Record = Mapping[str, Any]
"""one candidate: "genes" (name -> value) and "fitness" """


@dataclasses.dataclass(frozen=True)
class GeneEffect:
    """One gene over the archive."""

    gene: str
    share: float
    """of the variance of fitness ranks between the gene's values, 0 to 1, less what chance gives"""
    trend: float
    """Spearman's correlation of value and fitness: below 0 means larger values score better"""
    values: int
    """different values in the archive"""


def gene_effects(records: Sequence[Record], *, bins: int = 4) -> list[GeneEffect]:
    """All genes with more than one value, the most decisive first.

    Args:
        records: scored candidates.
        bins: values of a timestep gene are put into so many bins of equal size; bits are taken as they are.

    Raises:
        InputError: fewer than ten candidates with finite scores.
    """
    finite = [record for record in records if np.isfinite(record["fitness"])]
    if len(finite) < 10:
        raise InputError("archive", found=f"{len(finite)} finite candidates", expected="at least ten")
    ranks = _ranks(np.array([record["fitness"] for record in finite], np.float64))
    effects = []
    for gene in finite[0]["genes"]:
        values = np.array([record["genes"][gene] for record in finite], np.float64)
        distinct = np.unique(values)
        if len(distinct) < 2:
            continue
        groups = values
        if len(distinct) > 2 * bins:
            groups = np.searchsorted(np.quantile(values, np.linspace(0, 1, bins + 1)[1:-1]), values)
        kinds = np.unique(groups)
        if len(kinds) < 2:
            continue
        between = sum((groups == k).sum() * (ranks[groups == k].mean() - ranks.mean()) ** 2 for k in kinds)
        share = between / ((ranks - ranks.mean()) ** 2).sum()
        degrees, n = len(kinds) - 1, len(ranks)
        corrected = 1 - (1 - share) * (n - 1) / (n - 1 - degrees) if n > degrees + 1 else 0.0
        trend = float(np.corrcoef(_ranks(values), ranks)[0, 1])
        effects.append(GeneEffect(gene, max(0.0, float(corrected)), trend, len(distinct)))
    return sorted(effects, key=lambda effect: -effect.share)


def effects_table(records: Sequence[Record], *, rows: int = 20) -> Table:
    """The most decisive genes."""
    effects = gene_effects(records)[:rows]
    columns = ("gene", "share of the ranks' variance", "trend", "values seen")
    return Table("genes that decided", columns, [(e.gene, e.share, e.trend, e.values) for e in effects])


def kinds_table(bits: Mapping[str, Mapping[str, int]], costs: Sequence[Mapping[str, Any]]) -> Table:
    """Mean bits and share of the BitOps by kind of operation.

    Args:
        bits: of a plan.
        costs: records of `CostModel.table(bits)`.
    """
    groups: dict[str, list[tuple[Mapping[str, int], float]]] = {}
    shares = {(row["operation"], row["weights"] == 0): float(row["share of BitOps"]) for row in costs}
    for name, genes in bits.items():
        attention = "w" not in genes
        groups.setdefault(kind_of(name, attention), []).append((genes, shares.get((name, attention), 0.0)))
    rows = []
    for kind, members in groups.items():
        left = [value for genes, _ in members for gene, value in genes.items() if gene == "w"]
        right = [value for genes, _ in members for gene, value in genes.items() if gene != "w"]
        rows.append((kind, len(members), _mean(left), _mean(right), sum(share for _, share in members)))
    return Table(
        "bits and cost by kind of operation",
        ("kind", "operations", "mean weight bits", "mean activation bits", "share of BitOps"),
        sorted(rows, key=lambda row: -row[-1]),
    )


def kind_of(name: str, attention: bool) -> str:
    """The kind of an operation, from its name in diffusers' networks."""
    if attention:
        return "attention products"
    for part, kind in (("time", "time embedding"), ("class_embed", "time embedding"), ("emb", "time embedding"),
                       ("shortcut", "shortcuts"), ("to_", "attention projections"), ("sampler", "resampling"),
                       ("norm", "conditioning of norms"), ("ff", "feed-forward"), ("conv_in", "ends"),
                       ("conv_out", "ends"), ("proj_", "ends"), ("conv", "convolutions")):  # fmt: skip
        if part in name:
            return kind
    return "other"


def _mean(values: Sequence[int]) -> float | None:
    return sum(values) / len(values) if values else None


def _ranks(values: np.ndarray) -> np.ndarray:
    return (values[:, None] > values).sum(1) + ((values[:, None] == values).sum(1) - 1) / 2
