"""Which op is the in-place form of which, and when no op may be called. Update kernels register theirs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from fzero import _torch

# Op that returns new tensors -> (op that overwrites, positions of the arguments it overwrites, in the order of the
# results of the first). Of an argument that is a list all elements are overwritten.
IN_PLACE: dict[Any, tuple[Any, tuple[int, ...]]] = {}
_OVERWRITES: dict[Any, tuple[int, ...]] = {}


def register(op: Any, in_place: Any, *positions: int) -> None:
    """Say that `in_place` writes what `op` returns into its arguments at `positions`."""
    IN_PLACE[op] = in_place, positions
    _OVERWRITES[in_place] = positions


register(torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor, 0)


def is_in_place(node: fx.Node) -> bool:
    """Whether a node is an update that overwrites."""
    return node.target in _OVERWRITES


def targets_of(node: fx.Node) -> list[fx.Node]:
    """Return what an update overwrites, or makes anew, one node for each result; nothing for any other node."""
    positions = IN_PLACE[node.target][1] if node.target in IN_PLACE else _OVERWRITES.get(node.target, ())
    found: list[fx.Node] = []
    for position in positions:
        argument = node.args[position]
        many = argument if isinstance(argument, list | tuple) else (argument,)
        found += [target for target in many if isinstance(target, fx.Node)]
    return found


def transformed(*tensors: Tensor) -> bool:
    """Whether derivatives or a batch axis are wanted, which the ops do not give and their references do."""
    tracked = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    return tracked or any(_torch.is_functorch_wrapped(t) for t in tensors)
