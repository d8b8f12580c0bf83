"""From a network and a budget to plans, in a run folder: what `tmpqdm search` does.

The folder keeps what was expensive: calibration.safetensors, solver.safetensors, sensitivity.json, and the search's
storage. The same call goes on where another one was stopped, with the same result.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from papercore.errors import InputError
from papercore.report import Table, write_html, write_markdown
from papercore.rundir import RunDir
from torch import nn

from tmpqdm.calibration import CalibrationSet, collect_calibration
from tmpqdm.cost import CostModel
from tmpqdm.groups import TimestepGroups
from tmpqdm.joint import SearchConfig, find
from tmpqdm.loading import load_model, load_scheduler
from tmpqdm.plan import Plan
from tmpqdm.report import front_table, sections
from tmpqdm.runs import Found, read_found, read_run, write_found, write_run
from tmpqdm.sampling import Sampling
from tmpqdm.scores import FrechetScore, frechet_score
from tmpqdm.sensitivity import Sensitivity, sweep
from tmpqdm.solver import PrecisionSolver
from tmpqdm.space import Budget, SearchSpace

Grouping = Literal["quadratic", "uniform", "solver-grid", "log-snr"]


@dataclasses.dataclass(frozen=True)
class ScoreOptions:
    """How pictures are made and scored."""

    features: str = "digits"
    """digits, pixels, cifar, inception, or module:function"""
    reference: str = "digits"
    """digits, or an .npz file of real pictures or of mu and sigma"""
    data: Path | None = None
    """data folder, for the features "cifar" """
    weights: Path | None = None
    """weight file, for the features "inception" """
    images: int = 2000
    labels: tuple[int, ...] = ()
    guidance: float | None = None
    sampler: Literal["ddim", "dpmpp-2m"] = "ddim"
    eta: float = 0.0
    batch_size: int = 128
    seed: int = 0

    def score(self, model: nn.Module, scheduler: Any, device: str, final_alpha: float = 1.0) -> FrechetScore:
        """Raises InputError for options that do not fit the model."""
        options = {"data": self.data, "weights": self.weights, "device": device}
        return frechet_score(
            model,
            scheduler,
            features=self.features,
            reference=self.reference,
            images=self.images,
            seed=self.seed,
            labels=self.labels,
            guidance=self.guidance,
            feature_options=options,
            sampler=self.sampler,
            eta=self.eta,
            final_alpha=final_alpha,
            batch_size=self.batch_size,
        )


def make_groups(
    grouping: Grouping,
    steps: int,
    alphas_cumprod: torch.Tensor,
    edges: Sequence[int] = (),
    *,
    allow_fewer: bool = False,
) -> TimestepGroups:
    """Timestep groups by name, or with explicit edges."""
    total = len(alphas_cumprod)
    if edges:
        return TimestepGroups(tuple(edges), total)
    if grouping == "quadratic":
        return TimestepGroups.quadratic(steps, total, allow_fewer=allow_fewer)
    if grouping == "uniform":
        return TimestepGroups.uniform(steps, total)
    if grouping == "solver-grid":
        return TimestepGroups.solver_grid(steps, total, allow_fewer=allow_fewer)
    if grouping == "log-snr":
        return TimestepGroups.log_snr(steps, alphas_cumprod.double().tolist(), allow_fewer=allow_fewer)
    raise InputError("grouping", found=grouping, expected="quadratic, uniform, solver-grid or log-snr")


def parse_budget(text: str) -> Budget:
    """LIMIT, or KIND=LIMIT joined by commas; KIND is bitops-per-step (the default), bitops, bytes or steps.

    Raises:
        InputError: another text.
    """
    fields: dict[str, Any] = {}
    names = {"bitops-per-step": "bitops_per_step", "bitops": "bitops", "bytes": "size_bytes", "steps": "steps"}
    for part in text.split(","):
        kind, given, value = part.partition("=")
        name, value = (names.get(kind.strip()), value) if given else ("bitops_per_step", kind)
        if name is None or name in fields:
            raise InputError("budget", found=part, expected=f"LIMIT, or KIND=LIMIT with KIND of {', '.join(names)}")
        if value.strip().startswith("uniform:") and name != "steps":
            fields[name] = value.strip()
            continue
        try:
            fields[name] = int(value) if name == "steps" else float(value)
        except ValueError:
            raise InputError("budget", found=part, expected="a number, or uniform:BITS") from None
    return Budget(**fields)


def budget_name(text: str) -> str:
    """A budget as part of a file's name."""
    return "".join(c if c.isalnum() or c in ".-" else "-" for c in text)


def search_run(
    model_path: Path,
    out: Path,
    *,
    groups: Callable[[torch.Tensor], TimestepGroups],
    budgets: Sequence[str],
    score_options: ScoreOptions,
    config: SearchConfig,
    solver_path: Path | None = None,
    data: Path | None = None,
    bits: Sequence[int] = (8, 7, 6, 5),
    calibration_samples: int = 32,
    mode: Literal["joint", "timesteps", "bits"] = "joint",
    per_step: bool = False,
    storage: str | None = None,
    join: bool = False,
    device: str = "cpu",
    resume: bool = True,
    say: Callable[[str], None] = lambda text: None,
) -> Table:
    """Calibrates where no solver file is given, searches for every budget, and writes plans and archives.

    Args:
        groups: of cumulative alphas.
        storage: None: a file in the folder.

    Raises:
        InputError, WorkError: see `search.find`.
    """
    named = {budget_name(text): parse_budget(text) for text in budgets}
    if not named:
        raise InputError("budgets", found="none", expected="at least one, for example uniform:6")
    if len(named) != len(budgets):
        raise InputError("budgets", found=list(budgets), expected="different ones")
    model: Any = load_model(model_path).to(device)
    scheduler = load_scheduler(model_path)
    chosen = groups(scheduler.alphas_cumprod)
    score = score_options.score(model, scheduler, device)
    settings = {
        "groups": list(chosen.edges),
        "score": score.describe(),
        "search": dataclasses.asdict(config),
        "bits": list(bits) if solver_path is None else None,
        "solver given": solver_path is not None,
        "data given": data is not None,
        "calibration samples": calibration_samples,
        "mode": mode,
        "per step": per_step,
    }
    run = RunDir.open(out, settings, resume=resume)
    if not resume:
        for name in ("calibration.safetensors", "solver.safetensors", "sensitivity.json", "search.log"):
            (out / name).unlink(missing_ok=True)
    kept = out / "calibration.safetensors"
    if data is not None:
        calibration = CalibrationSet.load(data)
    elif kept.exists():
        calibration = CalibrationSet.load(kept)
    else:
        # not on lists drawn from the groups: some make the sampler overshoot, and whole ranges would take that in
        say("sampling calibration inputs")
        calibration = collect_calibration(
            model,
            scheduler,
            samples=calibration_samples,
            labels=list(score_options.labels) or None,
            guidance=score_options.guidance,
            seed=config.seed,
        )
        calibration.save(kept)
    stored = out / "solver.safetensors" if solver_path is None else solver_path
    if solver_path is not None or stored.exists():
        solver = PrecisionSolver.load(stored, model)
    else:
        say("calibrating with whole ranges; for better bits give --solver with a file of tmpqdm calibrate")
        solver = PrecisionSolver.from_model(model, bits=bits)
        solver.calibrate(calibration, method="minmax", batch_size=min(32, len(calibration)), seed=config.seed)
        solver.save(stored)
    softmax = solver.softmax_bits if isinstance(solver.softmax_bits, int) else None
    cost = CostModel.trace(model, splits=solver.splits, softmax_bits=softmax)
    if cost.shared:
        say(f"called several times, one gene each: {', '.join(cost.shared)}")
    for budget in named.values():  # a budget that cannot be kept costs no sweep
        SearchSpace(solver, chosen, cost, budget)
    sensitivity = None
    if config.init == "sensitivity" and mode != "timesteps":
        path = out / "sensitivity.json"
        sensitivity = Sensitivity.load(path) if path.exists() else sweep(solver, calibration)
        if not path.exists():
            sensitivity.save(path)
    for name, budget in named.items():
        result = find(
            solver,
            chosen,
            cost,
            score,
            budget,
            config=config,
            sensitivity=sensitivity,
            resume=storage or out / "search.log",
            join=join,
            name=name,
            mode=mode,
            per_step=per_step,
            say=say,
        )
        write_found(run.path, name, result)
    write_run(
        out,
        {
            "budgets": list(named),
            "edges": list(chosen.edges),
            "model hash": solver.model_hash,
            "solver": stored.name,
            "score": dataclasses.asdict(score_options),
        },
    )
    return front_table([read_found(out, name) for name in named])


def score_for(plan: Plan, model: nn.Module, scheduler: Any, options: ScoreOptions, device: str) -> FrechetScore:
    """A score with the sampler and the last step of a plan."""
    return dataclasses.replace(options, sampler=plan.sampler).score(model, scheduler, device, plan.final_alpha)


def report_run(
    run: Path, model_path: Path, out: Path, *, solver_path: Path | None = None, images: int = 48, device: str = "cpu"
) -> Mapping[str, Any]:
    """Draws a finished search: front, bits, timesteps, explanation, and pictures on the same noise.

    Args:
        solver_path: None: the solver in the run's folder.
    """
    values = read_run(run)
    found: list[Found] = [read_found(run, name) for name in values["budgets"]]
    model: Any = load_model(model_path).to(device)
    scheduler = load_scheduler(model_path)
    solver = PrecisionSolver.load(solver_path or run / "solver.safetensors", model)
    softmax = solver.softmax_bits if isinstance(solver.softmax_bits, int) else None
    cost = CostModel.trace(model, splits=solver.splits, softmax_bits=softmax)
    options = values["score"]
    first = found[0].plan
    sampling = Sampling.of(
        model,
        scheduler,
        labels=tuple(options["labels"]),
        guidance=options["guidance"],
        sampler=first.sampler,
        eta=options["eta"],
        final_alpha=first.final_alpha,
    )
    for entry in found:
        entry.plan.check_model(solver.model_hash)
        entry.plan.check_schedule(sampling.alphas_cumprod)
    samples = {}
    if images:
        ordinary = list(TimestepGroups(tuple(values["edges"]), len(sampling.alphas_cumprod)).first())
        with solver.full_precision() as network:
            drawn = sampling(network, ordinary, images, 0)
        samples["Full precision, first timesteps of the groups"] = sampling.pictures(drawn)
        for entry in found:
            drawn = sampling(solver.apply(entry.plan), entry.plan.timesteps, images, 0)
            samples[f"Plan {entry.name}"] = sampling.pictures(drawn)
    made = sections(found, {entry.name: cost.table(entry.plan.bits) for entry in found}, values["edges"], samples)
    write_html(out / "report.html", "Joint search of timesteps and bits", made)
    write_markdown(out / "report.md", "Joint search of timesteps and bits", made)
    return {"plans": front_table(found), "report": out / "report.html"}
