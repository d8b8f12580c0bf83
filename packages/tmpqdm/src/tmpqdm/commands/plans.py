"""`tmpqdm evaluate` and `tmpqdm sample`: what a plan's pictures are worth, and how they look."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from papercore import cli
from papercore.errors import InputError
from papercore.rundir import check_output_file

from tmpqdm.commands.options import Device, Positional, Scoring
from tmpqdm.commands.solver import pick_device


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluate(Scoring):
    """Score a plan on fresh noise, beside the full-precision network on its list and on the quadratic one."""

    plan: Positional[Path]
    """plan of a search"""
    model: Path
    """the network the plan is for"""
    solver: Path
    """its solver file"""
    compare: bool = True
    """also score the full-precision network"""
    force: bool = False
    """use a plan that was made for another model or noise schedule"""
    seed: int = 12345
    """of the noise; a search uses its own seed and the one after it"""
    device: Device = "auto"
    """where to compute"""

    def run(self) -> Mapping[str, Any]:
        from tmpqdm.evaluate import evaluate_plan
        from tmpqdm.loading import load_model, load_scheduler
        from tmpqdm.plan import Plan
        from tmpqdm.solver import PrecisionSolver
        from tmpqdm.workflow import score_for

        plan, device = Plan.load(self.plan), pick_device(self.device)
        model: Any = load_model(self.model).to(device)
        solver = PrecisionSolver.load(self.solver, model)
        score = score_for(plan, model, load_scheduler(self.model), self.score_options(self.seed), device)
        found = evaluate_plan(plan, solver, score, seed=self.seed, compare=self.compare, force=self.force)
        return {**found, "bitops of an image": plan.cost.get("bitops"), "features": self.features}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample(cli.Command):
    """Sample pictures with a plan: an .npz of uint8 images and a grid as PNG."""

    plan: Positional[Path]
    """plan of a search"""
    model: Path
    """the network the plan is for"""
    solver: Path
    """its solver file"""
    out: Path
    """file to write, .npz; the grid lies beside it as .png"""
    images: int = 64
    """pictures"""
    labels: tuple[int, ...] = ()
    """classes of class-conditional networks, repeated over the pictures"""
    guidance: float | None = None
    """classifier-free guidance"""
    full_precision: bool = False
    """the plan's timesteps without its bits"""
    force: bool = False
    """use a plan that was made for another model or noise schedule"""
    seed: int = 0
    """of the noise"""
    device: Device = "auto"
    """where to compute"""

    def run(self) -> Mapping[str, Any]:
        check_output_file(self.out, ".npz")
        if self.images < 1:
            raise InputError("--images", found=self.images, expected="at least 1")
        import torch
        from papercore.images import grid_png, write_images
        from papercore.rundir import atomic

        from tmpqdm.loading import load_model, load_scheduler
        from tmpqdm.plan import Plan
        from tmpqdm.sampling import Sampling
        from tmpqdm.solver import PrecisionSolver

        plan, device = Plan.load(self.plan), pick_device(self.device)
        model: Any = load_model(self.model).to(device)
        solver = PrecisionSolver.load(self.solver, model)
        sampling = Sampling.of(
            model,
            load_scheduler(self.model),
            labels=self.labels,
            guidance=self.guidance,
            sampler=plan.sampler,
            final_alpha=plan.final_alpha,
        )
        plan.check_model(solver.model_hash, force=self.force)
        plan.check_schedule(sampling.alphas_cumprod, force=self.force)
        network = model if self.full_precision else solver.apply(plan)
        samples = sampling(network, plan.timesteps, self.images, self.seed)
        if not torch.isfinite(samples).all():
            raise InputError("samples", found="values that are not finite", expected="numbers")
        images = sampling.pictures(samples)
        if images.shape[-1] not in (1, 3):
            raise InputError("samples", found=f"{images.shape[-1]} channels", expected="1 or 3, which are pixels")
        write_images(self.out, images)
        grid = self.out.with_suffix(".png")
        with atomic(grid) as temporary:
            temporary.write_bytes(grid_png(images, min(16, len(images)), zoom=max(1, 32 // images.shape[1])))
        return {"samples": self.out, "grid": grid, "images": len(images)}
