"""Whether a kernel's op may be called, or its torch reference has to stand in."""

from __future__ import annotations

import torch
from torch import Tensor

from fzero import _torch


def transformed(*tensors: Tensor) -> bool:
    """Whether derivatives or a batch axis are wanted, which the ops do not give and their references do."""
    tracked = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    return tracked or any(_torch.is_functorch_wrapped(t) for t in tensors)
