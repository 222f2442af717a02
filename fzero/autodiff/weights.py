"""Weighted means over micro-batches and ranks.

A mean over tokens is not the mean of micro-batches' means where these have different numbers of them. So each one
counts by its weight, divided by the mean of all weights on all ranks:

    weights of this rank's micro-batches  ──one small sum over ranks──▶  w · count / total

Such a weight is about 1. It multiplies the cotangent, so the mean over micro-batches and ranks that follows is the
weighted one, loss scales fit as they do without, and no leaf is touched.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fzero import tree
from fzero.autodiff.open import HasPrimal
from fzero.ranks.average import average
from fzero.ranks.collectives import all_reduce
from fzero.ranks.mesh import Mesh
from fzero.ranks.peers import collective
from fzero.sharding.sharded import Sharded


class Ranks(NamedTuple):
    """The ranks that a gradient is a mean over."""

    mesh: Mesh
    axes: tuple[str, ...]


def ranks_of(arguments: Sequence[Any]) -> Ranks | None:
    """Return the ranks of the first `State` or `Sharded` in what is differentiated; `None` where there is none."""
    for node in tree.leaves(list(arguments), is_leaf=lambda x: isinstance(x, (Sharded, HasPrimal))):
        if isinstance(node, Sharded | HasPrimal):
            params = node if isinstance(node, Sharded) else node.as_primal().params
            return Ranks(params.mesh, params.layout.data_axes)
    return None


def weight_of(given: Any, device: torch.device) -> Tensor:
    """Return what a weight function gave as fp64 of shape (1,)."""
    if isinstance(given, Tensor):
        if given.numel() == 1 and not given.is_complex():
            return given.detach().reshape(1).to(torch.float64)
    elif isinstance(given, int | float):
        return torch.full((1,), float(given), dtype=torch.float64, device=device)
    raise TypeError(
        f"fz.accumulate: weight must return a number, or a tensor of shape (), for a micro-batch; it returned "
        f"{tree.describe(given)}. Sum it up: (labels != -100).sum()."
    )


@collective("fz.accumulate", lambda weights, ranks: [] if ranks is None else [f"weights over {ranks.axes}"])
def relative(weights: Tensor, ranks: Ranks | None) -> Tensor:
    """Return weights divided by their mean over micro-batches and ranks; zeros where all are zero.

    Args:
        weights: fp64 of shape (n,), those of this rank's micro-batches.
        ranks: who has others; `None` for nobody.
    """
    total, count = weights.sum(), weights.shape[0]
    if ranks is not None:
        count *= ranks.mesh.size(ranks.axes)
        for axis in ranks.axes:
            total = all_reduce(total, ranks.mesh, axis)
    return torch.where(total == 0, 0.0, weights * count / total)


def mean_over(ranks: Ranks | None, value: Any, *, has_aux: bool) -> Any:
    """Return a value, or `(value, aux)`, whose floating-point scalars are means over ranks."""
    if ranks is None or ranks.mesh.size(ranks.axes) == 1:
        return value
    leaves, treedef = tree.flatten(value)
    own = len(tree.leaves(value[0])) if has_aux else len(leaves)
    scalars = {i: x for i, x in enumerate(leaves) if isinstance(x, Tensor) and (i < own or x.ndim == 0)}
    means = average(scalars, ranks.mesh, ranks.axes)
    return tree.unflatten(treedef, [means.get(i, x) for i, x in enumerate(leaves)])
