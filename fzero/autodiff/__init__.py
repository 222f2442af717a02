"""Gradients as pullbacks, and how much of the forward they keep."""
