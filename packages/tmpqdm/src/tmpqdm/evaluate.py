"""What a plan's pictures are worth, beside those of the full-precision network on the same and on the ordinary list."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from papercore.errors import InputError

from tmpqdm.calibration import trajectory
from tmpqdm.joint import evaluate_settings

if TYPE_CHECKING:
    from tmpqdm.plan import Plan
    from tmpqdm.scores import Score
    from tmpqdm.solver import PrecisionSolver


def steps_of(plan: "Plan") -> list[Mapping[str, Mapping[str, int]]]:
    """The bits of a plan: one set for all steps, or one a step, in the order of its timesteps."""
    if plan.per_step_bits is None:
        return [plan.bits]
    return [step["bits"] for step in plan.per_step_bits]


def evaluate_plan(
    plan: "Plan",
    solver: "PrecisionSolver",
    score: "Score",
    *,
    images: int | None = None,
    seed: int | None = None,
    compare: bool = True,
    force: bool = False,
) -> dict[str, Any]:
    """Scores a plan on fresh noise.

    A list that was found at few bits partly makes up for quantisation: its value in full precision is told as well.

    Args:
        plan: of the solver's model.
        solver: calibrated.
        score: its sampler and last step must be the plan's.
        images, seed: None: the score's number of pictures, and noise that neither search nor final scores have seen.
        compare: also score the full-precision network on the plan's list and on the quadratic list of equal length.
        force: use a plan of another model or noise schedule.

    Returns:
        "quantised", and with `compare` "full precision" and "full precision, quadratic list"; "n" and "seed"; reasons
        of infinite values under "reasons".

    Raises:
        InputError: the plan is for another model, noise schedule or sampler.
    """
    plan.check_model(solver.model_hash, force=force)
    sampling = getattr(score, "sampling", None)
    if sampling is not None:
        plan.check_schedule(sampling.alphas_cumprod, force=force)
        for name in ("sampler", "final_alpha"):
            if getattr(plan, name) != getattr(sampling, name):
                raise InputError(f"{name} of the score", found=getattr(sampling, name), expected=getattr(plan, name))
    seed = score.seed + 2 if seed is None else seed
    images = images or score.images
    value, reason = evaluate_settings(solver, plan.timesteps, steps_of(plan), score, images, seed)
    found: dict[str, Any] = {"quantised": value}
    reasons = {"quantised": reason} if reason else {}
    if compare:
        lists = {"full precision": list(plan.timesteps)}
        if len(plan.timesteps) > 1:
            lists["full precision, quadratic list"] = trajectory(
                len(plan.timesteps), int(plan.schedule["T"]), "quadratic"
            )
        with solver.full_precision() as network:
            for name, timesteps in lists.items():
                found[name], reason = score(network, timesteps, images=images, seed=seed)
                if reason:
                    reasons[name] = reason
    return {**found, "n": images, "seed": seed, "reasons": reasons}
