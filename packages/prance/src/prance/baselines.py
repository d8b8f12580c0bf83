"""Static configurations, one for all images: random ones at equal MACs, and a search of them without learning.

Both cover what a selector may choose: every block of a decided group gets its own width and MLP ratio, every decision
point its keep ratios; the first group runs at the largest choice. A good static configuration is a strong baseline for
a selector.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from papercore.errors import InputError
from papercore.rundir import drop_torn_line
from torch import Tensor

from prance.decision import MODES, Decision, Tokens
from prance.macs import Geometry, macs
from prance.space import SearchSpace

DRAWS = 4096
ROUNDS = 200
Evaluate = Callable[[Decision], float]
"""accuracy of one static decision"""


@dataclasses.dataclass(frozen=True)
class Static:
    """A static configuration and what it reaches."""

    decision: Decision
    macs: int
    accuracy: float


def first_group_largest(decision: Decision) -> Decision:
    """With the largest choices in the blocks that no selector decides."""
    space = decision.space
    embed, ratio = decision.embed.clone(), decision.mlp_ratio.clone()
    embed[:, : space.group], ratio[:, : space.group] = space.embed[-1], space.mlp_ratio[-1]
    return dataclasses.replace(decision, embed=embed, mlp_ratio=ratio)


def random_static(
    geometry: Geometry,
    space: SearchSpace,
    tokens: Tokens | None,
    target: float,
    *,
    count: int = 12,
    tolerance: float = 0.015,
    seed: int = 0,
) -> Decision:
    """Random configurations (one a row) whose MACs are the target's.

    Uniform choices and keep ratios, drawn until `count` of them fit.

    Args:
        tokens: which keep ratios are drawn; None keeps all tokens.
        target: MACs of an image.
        tolerance: how far the MACs may be off, as a share of those of the largest subnet.

    Raises:
        InputError: numbers out of range, or hardly any configuration has such MACs; the interval of those drawn is
            given.
    """
    if tokens is not None and tokens not in MODES:
        raise InputError("token mode", found=tokens, expected=" or ".join(MODES))
    if count < 1 or not 0 < tolerance < 1:
        raise InputError("count, tolerance", found=(count, tolerance), expected="at least 1; between 0 and 1")
    generator = torch.Generator().manual_seed(seed)
    slack = tolerance * int(macs(geometry, Decision.largest(space)))
    found: list[Decision] = []
    total, low, high = 0, float("inf"), 0.0
    for _ in range(ROUNDS):
        drawn = first_group_largest(Decision.random(space, generator, batch=DRAWS, tokens=tokens))
        cost = macs(geometry, drawn).double()
        low, high = min(low, float(cost.min())), max(high, float(cost.max()))
        fits = ((cost - target).abs() <= slack).nonzero().flatten()
        if len(fits):
            found.append(drawn[fits[: count - total]])
            total += len(found[-1])
        if total >= count:
            rows = zip(*(part.tensors() for part in found), strict=True)
            return Decision(space, *(torch.cat(values) for values in rows))
    raise InputError(
        "target",
        found=f"{target / 1e9:.4g} GMAC",
        expected=f"{low / 1e9:.4g} to {high / 1e9:.4g} GMAC, where random configurations are",
    )


def evaluate_static(geometry: Geometry, decisions: Decision, evaluate: Evaluate) -> list[Static]:
    """Accuracy and MACs of every row."""
    cost = macs(geometry, decisions).tolist()
    return [Static(decisions[i], cost[i], float(evaluate(decisions[i]))) for i in range(len(decisions))]


def pareto(cost: Float[Tensor, " points"], accuracy: Float[Tensor, " points"]) -> list[int]:
    """Points that no other one beats in both, by rising cost; of equal points the first."""
    order = sorted(range(len(cost)), key=lambda i: (float(cost[i]), -float(accuracy[i]), i))
    front, best = [], -float("inf")
    for i in order:
        if float(accuracy[i]) > best:
            front.append(i)
            best = float(accuracy[i])
    return front


def search_static(
    geometry: Geometry,
    space: SearchSpace,
    tokens: Tokens | None,
    evaluate: Evaluate,
    *,
    trials: int = 200,
    population: int = 20,
    seed: int = 0,
    storage: Path | str | None = None,
    name: str = "static",
    least: float = 0.05,
) -> list[Static]:
    """The Pareto front of accuracy and MACs that Optuna's NSGA-II finds; by rising MACs.

    What is tried next depends on the seed and on the trials before it, so that a search which is cut off goes on as
    if it had not been.

    Args:
        trials: in all, those already in the storage included.
        storage: a file of JSON lines or a database URL; None: memory.
        least: smallest keep ratio that is tried.

    Raises:
        InputError: numbers out of range, or a storage of another search.
    """
    import optuna

    if tokens is not None and tokens not in MODES:
        raise InputError("token mode", found=tokens, expected=" or ".join(MODES))
    if trials < 1 or population < 2 or not 0 < least <= 1:
        raise InputError(
            "trials, population, least", found=(trials, population, least), expected="at least 1, at least 2, in (0, 1]"
        )
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        storage=_storage(storage), study_name=name, directions=["maximize", "minimize"], load_if_exists=True
    )
    what = json.dumps([seed, population, tokens, least, dataclasses.asdict(space), dataclasses.asdict(geometry)])
    if study.user_attrs.setdefault("search", what) != what:
        raise InputError("search storage", where=storage, found="another search", expected="a file of this one")
    study.set_user_attr("search", what)

    def objective(trial: Any) -> tuple[float, float]:
        decision = _suggested(trial, space, tokens, least)
        return float(evaluate(decision)), float(int(macs(geometry, decision)))

    done = (optuna.trial.TrialState.COMPLETE,)
    while (number := len(study.get_trials(deepcopy=False, states=done))) < trials:
        study.sampler = optuna.samplers.NSGAIISampler(population_size=population, seed=hash((seed, number)) % 2**32)
        study.optimize(objective, n_trials=1)
    complete = study.get_trials(deepcopy=False, states=done)[:trials]
    accuracy, cost = (torch.tensor([trial.values[i] for trial in complete], dtype=torch.float64) for i in (0, 1))
    chosen = [complete[i] for i in pareto(cost, accuracy)]
    fixed = [optuna.trial.FixedTrial(trial.params) for trial in chosen]
    return [
        Static(_suggested(known, space, tokens, least), int(trial.values[1]), trial.values[0])
        for known, trial in zip(fixed, chosen, strict=True)
    ]


def _suggested(trial: Any, space: SearchSpace, tokens: Tokens | None, least: float) -> Decision:
    """The configuration that a trial stands for."""
    decided = range(space.group, space.depth) if space.points else range(0)
    embed, ratio = [space.embed[-1]] * space.depth, [space.mlp_ratio[-1]] * space.depth
    for block in decided:
        embed[block] = trial.suggest_categorical(f"embed{block}", list(space.embed))
        ratio[block] = trial.suggest_categorical(f"ratio{block}", list(space.mlp_ratio))
    keep = {"prune": [1.0] * len(space.points), "merge": [1.0] * len(space.points)}
    for mode, values in keep.items():
        if tokens is not None and mode in tokens.split("_"):
            for point in range(len(values)):
                values[point] = trial.suggest_float(f"{mode}{point}", least, 1.0)
    return Decision.static(space, embed, ratio, prune=keep["prune"], merge=keep["merge"])


def _storage(storage: Path | str | None) -> Any:
    """As Optuna wants it; a last line that a crash has torn is cut off."""
    if storage is None or "://" in str(storage):
        return storage
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    path = Path(storage)
    if path.is_dir():
        raise InputError("is a folder", where=path, expected="a file, or a database URL")
    path.parent.mkdir(parents=True, exist_ok=True)
    drop_torn_line(path)
    return JournalStorage(JournalFileBackend(str(path)))
