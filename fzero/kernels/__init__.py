"""Optimizer kernels: for each, a Triton kernel for CUDA beside the torch reference that a CPU runs compiled."""

from __future__ import annotations

from fzero.kernels.adamw import adamw, adamw_, adamw_scalars

__all__ = ["adamw", "adamw_", "adamw_scalars"]
