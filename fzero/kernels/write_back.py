"""The end of an update whose direction was made elsewhere, rounding included. See `fzero.kernels.update`.

For optimizers whose direction is no function of an element alone: Muon, Adafactor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fzero.kernels import ops
from fzero.kernels.update import Update


def formula(values: ops.Value, direction: ops.Value, scalars: ops.Value, numbers: ops.Value) -> tuple[Any, Any]:
    """Return `p * decay - step_size * direction`; an element whose direction is not finite stays."""
    decay, step_size = scalars
    return (values[0] * decay - step_size * direction,), ops.is_finite(direction)


# Called with directions in the place of gradients, and no numbers.
WRITE_BACK = Update("write_back", formula, ("p",), scalars=2)


def write_back_scalars(step_size: Tensor, lr: Tensor, weight_decay: float) -> Tensor:
    """Return what a write-back needs beside its tensors: (decay, step size).

    Computed in float64, returned as float32 of shape (2,).

    Args:
        step_size: 0-d: what the direction is multiplied by.
        lr: learning rate, 0-d.
        weight_decay: decoupled, multiplied by the learning rate.
    """
    rate = lr.to(torch.float64)
    return torch.stack([1 - rate * weight_decay, step_size.to(torch.float64)]).to(torch.float32)
