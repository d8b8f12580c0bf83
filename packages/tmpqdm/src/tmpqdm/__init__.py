"""Joint search of fewer, non-uniform sampling timesteps and per-layer bit-widths for diffusion models.

No working part yet.
"""

__version__ = "0.1.0"
