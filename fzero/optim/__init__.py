"""Optimizers as pure `(init, update)` pairs, gradient transforms, and schedules."""
