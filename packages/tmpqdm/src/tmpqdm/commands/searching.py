"""`tmpqdm groups`, `tmpqdm search` and `tmpqdm report`."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from papercore import cli
from papercore.errors import InputError
from papercore.rundir import check_output_folder

from tmpqdm.commands.options import Device, Positional, Scoring
from tmpqdm.commands.solver import pick_device, say


@dataclasses.dataclass(frozen=True, kw_only=True)
class Groups(cli.Command):
    """Show timestep groups: edges, first timesteps, and how many lists there are."""

    steps: int = 10
    """visited timesteps"""
    train_steps: int = 1000
    """T, the length of the training schedule"""
    grouping: Literal["quadratic", "uniform", "solver-grid", "log-snr"] = "quadratic"
    """quadratic: narrow near the picture; log-snr: equal steps of it, for linear betas"""
    edges: tuple[int, ...] = ()
    """explicit edges from 0 to --train-steps, instead of --grouping"""
    allow_fewer: bool = False
    """accept that groups fall together"""

    def run(self) -> Mapping[str, Any]:
        from papercore.diffusion import linear_alphas_cumprod
        from papercore.report import Table

        from tmpqdm.workflow import make_groups

        if self.train_steps < 1:
            raise InputError("--train-steps", found=self.train_steps, expected="at least 1")
        alphas = linear_alphas_cumprod(self.train_steps)
        groups = make_groups(self.grouping, self.steps, alphas, self.edges, allow_fewer=self.allow_fewer)
        rows = [(i, group.start, group.stop - 1, len(group)) for i, group in enumerate(groups.groups)]
        return {
            "groups": Table("groups", ("group", "first", "last", "timesteps"), rows),
            "edges": list(groups.edges),
            "log10 of lists with one timestep a group": groups.log10_size(),
            "log10 of lists without groups": groups.log10_unconstrained(),
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Search(Scoring):
    """Search timesteps and bits together, for one or several budgets: a plan each.

    Interrupted, it goes on where it stopped when the same command is called again.
    """

    model: Positional[Path]
    """diffusers folder, or .safetensors file"""
    out: Path
    """folder for plans, archives, and what is kept on the way"""
    solver: Path | None = None
    """file of tmpqdm calibrate; none: whole ranges, calibrated here"""
    calibration: Path | None = None
    """calibration set; none: sampled here, 20 of 100 steps of every trajectory"""
    calibration_samples: int = 32
    """trajectories to sample for it"""
    bits: tuple[int, ...] = (8, 7, 6, 5)
    """the menu, where no solver is given"""
    steps: int = 10
    """visited timesteps"""
    grouping: Literal["quadratic", "uniform", "solver-grid", "log-snr"] = "quadratic"
    """groups that timesteps are drawn from"""
    edges: tuple[int, ...] = ()
    """explicit edges of groups, instead"""
    allow_fewer: bool = False
    """accept that groups fall together"""
    budget: tuple[str, ...] = ("uniform:6",)
    """a search each: uniform:BITS or a number of BitOps a step; or KIND=LIMIT,... with kinds bitops-per-step, bitops,
    bytes, steps"""
    mode: Literal["joint", "timesteps", "bits"] = "joint"
    """what is searched; the rest is the first timestep of every group, or the most uniform bits in the budget"""
    per_step: bool = False
    """every step has bits of its own"""
    init: Literal["sensitivity", "paper", "random"] = "sensitivity"
    """start: bits from sensitivities; the published uniform bits and mutations of them; or random plans"""
    sampler: Literal["ddim", "dpmpp-2m"] = "ddim"
    """DDIM, or DPM-Solver++ of order 2"""
    population: int = 50
    """candidates of a generation"""
    generations: int = 20
    """generations"""
    top_k: int = 10
    """best candidates that are parents"""
    mutation: float = 0.25
    """probability that a gene of a mutation is redrawn"""
    finalists: int = 10
    """best candidates that are scored again on fresh noise"""
    final_images: tuple[int, ...] = ()
    """pictures of those scores, ascending; after each the better half goes on; none: as --images"""
    storage: str | None = None
    """database address of Optuna, for several workers; none: a file in --out"""
    join: bool = False
    """other workers search on the same --storage at the same time"""
    seed: int = 0
    """of everything random"""
    device: Device = "auto"
    """where to compute"""
    resume: bool = True
    """go on with an interrupted search; --no-resume starts anew"""

    def run(self) -> Mapping[str, Any]:
        check_output_folder(self.out)
        from tmpqdm.joint import SearchConfig
        from tmpqdm.workflow import make_groups, search_run

        config = SearchConfig(
            population=self.population,
            generations=self.generations,
            top_k=self.top_k,
            mutation=self.mutation,
            init=self.init,
            finalists=self.finalists,
            final_images=self.final_images,
            seed=self.seed,
        )
        plans = search_run(
            self.model,
            self.out,
            groups=lambda alphas: make_groups(
                self.grouping, self.steps, alphas, self.edges, allow_fewer=self.allow_fewer
            ),
            budgets=self.budget,
            score_options=self.score_options(self.seed, sampler=self.sampler),
            config=config,
            solver_path=self.solver,
            data=self.calibration,
            bits=self.bits,
            calibration_samples=self.calibration_samples,
            mode=self.mode,
            per_step=self.per_step,
            storage=self.storage,
            join=self.join,
            device=pick_device(self.device),
            resume=self.resume,
            say=say,
        )
        return {"plans": plans, "folder": self.out}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report(cli.Command):
    """Draw a finished search: front, bits of every layer, timesteps, what decided, and sampled pictures."""

    run_folder: Positional[Path]
    """folder of tmpqdm search"""
    model: Path
    """the network that was searched"""
    out: Path
    """folder for report.html and report.md"""
    solver: Path | None = None
    """the solver file, where the search was given one"""
    images: int = 48
    """pictures of every plan; 0 for none"""
    device: Device = "auto"
    """where to compute"""

    def run(self) -> Mapping[str, Any]:
        check_output_folder(self.out)
        if self.images < 0:
            raise InputError("--images", found=self.images, expected="at least 0")
        from tmpqdm.workflow import report_run

        return report_run(
            self.run_folder,
            self.model,
            self.out,
            solver_path=self.solver,
            images=self.images,
            device=pick_device(self.device),
        )
