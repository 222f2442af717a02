"""Optimizer kernels: for each, a Triton kernel for CUDA beside the torch reference that a CPU runs compiled."""
