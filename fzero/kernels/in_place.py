"""Which kernel op is the in-place form of which."""

from __future__ import annotations

from typing import Any

import torch

import fzero.kernels.adamw  # noqa: F401 - defines the ops

# Op that returns new tensors -> (op that overwrites, positions of the arguments it overwrites, in the order
# of the results of the first).
IN_PLACE: dict[Any, tuple[Any, tuple[int, ...]]] = {
    torch.ops.fzero.adamw.default: (torch.ops.fzero.adamw_.default, (0, 1, 2)),
    torch.ops.aten.add.Tensor: (torch.ops.aten.add_.Tensor, (0,)),
}
