"""One training for all mixed-precision configurations of a network, then search without retraining.

After "Retraining-free Model Quantization via One-Shot Weight-Coupling Learning" (arXiv 2401.01543). Names are imported
when they are first used, so that `import oneshot_mpq` and `oneshot-mpq --help` do not load torch.
"""

import importlib
import sys
import types
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_WHERE = {
    "BatchNormBank": "oneshot_mpq.batchnorm",
    "BitConfig": "oneshot_mpq.bitconfig",
    "Cost": "oneshot_mpq.cost",
    "CostModel": "oneshot_mpq.cost",
    "FreezeScheduler": "oneshot_mpq.schedule",
    "LSQ": "oneshot_mpq.lsq",
    "QuantLayer": "oneshot_mpq.layers",
    "Supernet": "oneshot_mpq.supernet",
    "TrainConfig": "oneshot_mpq.fit",
    "export_onnx": "oneshot_mpq.export",
    "fit": "oneshot_mpq.fit",
    "freeze": "oneshot_mpq.freeze",
    "load_supernet": "oneshot_mpq.checkpoint",
    "lsq_fake_quantize": "oneshot_mpq.quantize",
    "recalibrate": "oneshot_mpq.recalibrate",
    "report": "oneshot_mpq.report",
    "save_supernet": "oneshot_mpq.checkpoint",
    "search": "oneshot_mpq.search",
}

__all__ = [
    "LSQ",
    "BatchNormBank",
    "BitConfig",
    "Cost",
    "CostModel",
    "FreezeScheduler",
    "QuantLayer",
    "Supernet",
    "TrainConfig",
    "export_onnx",
    "fit",
    "freeze",
    "load_supernet",
    "lsq_fake_quantize",
    "recalibrate",
    "report",
    "save_supernet",
    "search",
]

if TYPE_CHECKING:
    from oneshot_mpq.batchnorm import BatchNormBank
    from oneshot_mpq.bitconfig import BitConfig
    from oneshot_mpq.checkpoint import load_supernet, save_supernet
    from oneshot_mpq.cost import Cost, CostModel
    from oneshot_mpq.export import export_onnx
    from oneshot_mpq.fit import TrainConfig, fit
    from oneshot_mpq.freeze import freeze
    from oneshot_mpq.layers import QuantLayer
    from oneshot_mpq.lsq import LSQ
    from oneshot_mpq.quantize import lsq_fake_quantize
    from oneshot_mpq.recalibrate import recalibrate
    from oneshot_mpq.report import report
    from oneshot_mpq.schedule import FreezeScheduler
    from oneshot_mpq.search import search
    from oneshot_mpq.supernet import Supernet


class _Package(types.ModuleType):
    """Python binds a submodule to its package when it is imported; `search` and others must stay functions."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _WHERE and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> object:
    if name in _WHERE:
        return getattr(importlib.import_module(_WHERE[name]), name)
    raise AttributeError(f"module 'oneshot_mpq' has no attribute {name!r}")
