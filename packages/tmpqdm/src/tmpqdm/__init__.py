"""Joint search of fewer, non-uniform sampling timesteps and per-layer bit-widths for diffusion models (TMPQ-DM,
arXiv 2404.09532).

Names are imported when they are first used, so that `import tmpqdm` and `tmpqdm --help` do not load torch.
"""

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_WHERE = {
    "Budget": "tmpqdm.space",
    "CostModel": "tmpqdm.cost",
    "NonUniformDDIMScheduler": "tmpqdm.schedulers",
    "Plan": "tmpqdm.plan",
    "PrecisionSolver": "tmpqdm.solver",
    "SearchSpace": "tmpqdm.space",
    "TimestepGroups": "tmpqdm.groups",
    "collect_calibration": "tmpqdm.calibration",
    "evaluate_plan": "tmpqdm.evaluate",
    "frechet_score": "tmpqdm.scores",
    "search": "tmpqdm.joint",
}

__all__ = [
    "Budget",
    "CostModel",
    "NonUniformDDIMScheduler",
    "Plan",
    "PrecisionSolver",
    "SearchSpace",
    "TimestepGroups",
    "collect_calibration",
    "evaluate_plan",
    "frechet_score",
    "search",
]

if TYPE_CHECKING:
    from tmpqdm.calibration import collect_calibration
    from tmpqdm.cost import CostModel
    from tmpqdm.evaluate import evaluate_plan
    from tmpqdm.groups import TimestepGroups
    from tmpqdm.joint import search
    from tmpqdm.plan import Plan
    from tmpqdm.schedulers import NonUniformDDIMScheduler
    from tmpqdm.scores import frechet_score
    from tmpqdm.solver import PrecisionSolver
    from tmpqdm.space import Budget, SearchSpace


def __getattr__(name: str) -> object:
    if name in _WHERE:
        return getattr(importlib.import_module(_WHERE[name]), name)
    raise AttributeError(f"module 'tmpqdm' has no attribute {name!r}")
