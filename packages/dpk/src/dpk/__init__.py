"""Knowledge distillation with dynamic prior knowledge (DPK, arXiv 2206.06067), and what it is compared with.

Names are imported when they are first used, so that `import dpk` and `dpk --help` do not load torch.
"""

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_WHERE = {
    "AttentionTransfer": "dpk.methods",
    "CrossEntropy": "dpk.method",
    "DKD": "dpk.methods",
    "DPK": "dpk.dpk_method",
    "Distiller": "dpk.distiller",
    "FitNet": "dpk.methods",
    "KD": "dpk.methods",
    "Method": "dpk.method",
    "MinibatchCKA": "dpk.alignment",
    "Pair": "dpk.method",
    "ReviewKD": "dpk.methods",
    "cka": "dpk.alignment",
    "evaluate": "dpk.training",
    "prior_mask": "dpk.prior",
    "train": "dpk.training",
}

__all__ = [
    "DKD",
    "DPK",
    "KD",
    "AttentionTransfer",
    "CrossEntropy",
    "Distiller",
    "FitNet",
    "Method",
    "MinibatchCKA",
    "Pair",
    "ReviewKD",
    "cka",
    "evaluate",
    "prior_mask",
    "train",
]

if TYPE_CHECKING:
    from dpk.alignment import MinibatchCKA, cka
    from dpk.distiller import Distiller
    from dpk.dpk_method import DPK
    from dpk.method import CrossEntropy, Method, Pair
    from dpk.methods import DKD, KD, AttentionTransfer, FitNet, ReviewKD
    from dpk.prior import prior_mask
    from dpk.training import evaluate, train


def __getattr__(name: str) -> object:
    if name in _WHERE:
        return getattr(importlib.import_module(_WHERE[name]), name)
    raise AttributeError(f"module 'dpk' has no attribute {name!r}")
