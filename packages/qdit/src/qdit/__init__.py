"""Post-training quantisation of diffusion transformers (Q-DiT, arXiv 2406.17343).

Names are imported when they are first used, so that `import qdit` and `qdit --help` do not load torch.
"""

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_WHERE = {
    "Calibration": "qdit.calibration",
    "DiffusersConfig": "qdit.hub",
    "GPTQResult": "qdit.rounding",
    "Hessian": "qdit.rounding",
    "LayerCost": "papercore.quant",
    "QDiTConfig": "qdit.config",
    "QuantLinear": "qdit.layers",
    "RangeObserver": "papercore.quant",
    "collect_calibration": "qdit.calibration",
    "dequantize": "qdit.convert",
    "fake_quantize": "papercore.quant",
    "frechet_distance": "papercore.diffusion",
    "from_original": "qdit.original",
    "gptq": "qdit.rounding",
    "group_dequantize": "papercore.quant",
    "group_gemm": "papercore.kernels",
    "inception_score": "qdit.metrics",
    "precision_recall": "qdit.metrics",
    "group_quantize": "papercore.quant",
    "images_to_uint8": "papercore.images",
    "layer_cost": "papercore.quant",
    "load_pretrained": "qdit.pipeline",
    "model_cost": "qdit.estimate",
    "noise_error": "qdit.convert",
    "pack_codes": "papercore.quant",
    "precomputed_conditioning": "qdit.conditioning",
    "quantize": "qdit.convert",
    "register": "qdit.hub",
    "respaced_timesteps": "papercore.diffusion",
    "sample": "qdit.sampling",
    "save_pretrained": "qdit.pipeline",
    "search_group_sizes": "qdit.granularity",
    "SearchResult": "qdit.granularity",
    "share_embedders": "qdit.conditioning",
    "unpack_codes": "papercore.quant",
}

__all__ = [
    "Calibration",
    "DiffusersConfig",
    "GPTQResult",
    "Hessian",
    "LayerCost",
    "QDiTConfig",
    "QuantLinear",
    "RangeObserver",
    "SearchResult",
    "collect_calibration",
    "dequantize",
    "fake_quantize",
    "frechet_distance",
    "from_original",
    "gptq",
    "group_dequantize",
    "group_gemm",
    "group_quantize",
    "images_to_uint8",
    "inception_score",
    "layer_cost",
    "load_pretrained",
    "model_cost",
    "noise_error",
    "pack_codes",
    "precision_recall",
    "precomputed_conditioning",
    "quantize",
    "register",
    "respaced_timesteps",
    "sample",
    "save_pretrained",
    "search_group_sizes",
    "share_embedders",
    "unpack_codes",
]

if TYPE_CHECKING:
    from papercore.diffusion import frechet_distance, respaced_timesteps
    from papercore.images import images_to_uint8
    from papercore.kernels import group_gemm
    from papercore.quant import (
        LayerCost,
        RangeObserver,
        fake_quantize,
        group_dequantize,
        group_quantize,
        layer_cost,
        pack_codes,
        unpack_codes,
    )

    from qdit.calibration import Calibration, collect_calibration
    from qdit.conditioning import precomputed_conditioning, share_embedders
    from qdit.config import QDiTConfig
    from qdit.convert import dequantize, noise_error, quantize
    from qdit.estimate import model_cost
    from qdit.granularity import SearchResult, search_group_sizes
    from qdit.hub import DiffusersConfig, register
    from qdit.layers import QuantLinear
    from qdit.metrics import inception_score, precision_recall
    from qdit.original import from_original
    from qdit.pipeline import load_pretrained, save_pretrained
    from qdit.rounding import GPTQResult, Hessian, gptq
    from qdit.sampling import sample


def __getattr__(name: str) -> object:
    if name in _WHERE:
        return getattr(importlib.import_module(_WHERE[name]), name)
    raise AttributeError(f"module 'qdit' has no attribute {name!r}")
