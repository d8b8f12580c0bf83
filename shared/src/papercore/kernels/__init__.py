"""Operators with a slow, obvious reference and faster implementations."""

from papercore.kernels.group_gemm import group_gemm

__all__ = ["group_gemm"]
