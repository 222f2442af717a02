"""Clips: transforms that scale gradients down where their norm is above a limit.

They differ in what an update waits for, and so in what has to be kept until then:

    clip_by_global_norm    the norm of all gradients       every gradient piece is kept until it is known
    clip_by_leaf_norm      the norm of its own leaf        nothing is kept
    clip_by_last_norm      the norm of the step before     nothing is kept, and nothing is waited for

Elements that are not finite do not count: the update skips them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fzero.calls import shown
from fzero.calls.arguments import named, number
from fzero.optim.norm import Squares, measure_leaf
from fzero.optim.transforms import GradientTransform, NormTransform
from fzero.sharding.leaf import scaled
from fzero.sharding.sharded import Sharded


@dataclass(frozen=True)
class ClipByGlobalNorm(NormTransform):
    """See `clip_by_global_norm`."""

    limit: float

    def __repr__(self) -> str:
        return shown.call("clip_by_global_norm", self.limit)

    def update_by(self, grads: Sharded, state: Any, params: Sharded, squares: Squares) -> tuple[Sharded, Any]:
        shrink = _shrink(self.limit, squares.norm(grads.multiplier))
        return grads.replace(factor=grads.multiplier * shrink), state


@dataclass(frozen=True)
class ClipByLeafNorm(GradientTransform):
    """See `clip_by_leaf_norm`."""

    limit: float

    def __repr__(self) -> str:
        return shown.call("clip_by_leaf_norm", self.limit)

    def update(self, grads: Sharded, state: Any, params: Sharded) -> tuple[Sharded, Any]:
        pieces: list[Tensor | None] = []
        for i, piece in enumerate(grads.pieces):
            if piece is not None:
                piece = scaled(piece, _shrink(self.limit, measure_leaf(grads, i).norm(grads.multiplier)))
            pieces.append(piece)
        return grads.replace(pieces=tuple(pieces)), state


class LastNorm(NamedTuple):
    """The norm of the step before, fp32 of shape (); 0 where there was none."""

    norm: Tensor


@dataclass(frozen=True)
class ClipByLastNorm(NormTransform):
    """See `clip_by_last_norm`."""

    limit: float

    def __repr__(self) -> str:
        return shown.call("clip_by_last_norm", self.limit)

    def init(self, params: Sharded) -> LastNorm:
        device = torch.device("meta") if params.mesh.simulated else params.mesh.device
        return LastNorm(torch.zeros((), device=device))

    def update_by(self, grads: Sharded, state: LastNorm, params: Sharded, squares: Squares) -> tuple[Sharded, LastNorm]:
        norm = squares.norm(grads.multiplier)
        # A limit below what _shrink adds to the norm would clip the first step too.
        shrink = torch.where(state.norm > 0, _shrink(self.limit, state.norm), 1.0)
        # A skipped step has no norm, and must not leave one that skips the next.
        return grads.replace(factor=grads.multiplier * shrink), LastNorm(torch.where(norm.isfinite(), norm, state.norm))


@named("fz.clip_by_global_norm")
def clip_by_global_norm(limit: float) -> ClipByGlobalNorm:
    """Return a transform that scales gradients down to a 2-norm of at most `limit`, over all leaves and ranks.

    It multiplies the factor and touches no leaf; all gradients have to be there before the first update.
    Elements that are not finite do not count: they are skipped by the update.

    Args:
        limit: the largest norm, above 0.

    Raises:
        TypeError, ValueError: the limit is no number above 0.

    Example:
        >>> from fzero.optim.adamw import adamw
        >>> from fzero.optim.transforms import chain
        >>> chain(clip_by_global_norm(1.0), adamw(1e-3)).learning_rate(torch.tensor(0))
        tensor(0.0010)
    """
    return ClipByGlobalNorm(_checked("fz.clip_by_global_norm", limit))


@named("fz.clip_by_leaf_norm")
def clip_by_leaf_norm(limit: float) -> ClipByLeafNorm:
    """Return a transform that scales each leaf's gradient down to a 2-norm of at most `limit` by itself.

    The norm is that of the whole leaf, over the ranks that hold its pieces. A leaf waits for its own gradient only, so
    gradients need never all live at once. Directions change: large leaves are clipped more than small ones. The leaf is
    multiplied in fp32 and rounded once, to nearest, to the gradient's dtype; a leaf within the limit keeps its bits.
    Elements that are not finite do not count: they are skipped by the update.

    Args:
        limit: the largest norm of a leaf, above 0.

    Raises:
        TypeError, ValueError: the limit is no number above 0.

    Example:
        >>> from fzero.optim.sgd import sgd
        >>> from fzero.optim.transforms import chain
        >>> opt, zero = chain(clip_by_leaf_norm(1.0), sgd(1.0)), torch.tensor(0, dtype=torch.int32)
        >>> params = {"a": torch.zeros(2), "b": torch.zeros(1)}
        >>> grads = {"a": torch.tensor([3.0, 4.0]), "b": torch.ones(1)}
        >>> opt.update(grads, opt.init(params), params, step=zero, seed=zero)[0]
        {'a': tensor([-0.6000, -0.8000]), 'b': tensor([-1.0000])}
    """
    return ClipByLeafNorm(_checked("fz.clip_by_leaf_norm", limit))


@named("fz.clip_by_last_norm")
def clip_by_last_norm(limit: float) -> ClipByLastNorm:
    """Return a transform that scales gradients by what would have clipped those of the step before.

    Where the norm of the last step was above `limit`, over all leaves and ranks, these gradients are multiplied by
    limit / norm; the first step is not clipped. No update waits for a norm: the present one is kept for the next step.
    A gradient that grows from one step to the next passes with a norm above the limit. It multiplies the factor and
    touches no leaf. Elements that are not finite do not count, and a skipped step leaves the kept norm as it is.

    Args:
        limit: the norm above which the next step is clipped, above 0.

    Raises:
        TypeError, ValueError: the limit is no number above 0.

    Example:
        >>> from fzero.optim.sgd import sgd
        >>> from fzero.optim.transforms import chain
        >>> opt, w, zero = chain(clip_by_last_norm(1.0), sgd(1.0)), torch.zeros(2), torch.tensor(0, dtype=torch.int32)
        >>> g, opt_state = torch.tensor([3.0, 4.0]), opt.init(w)
        >>> first, opt_state = opt.update(g, opt_state, w, step=zero, seed=zero)
        >>> second, opt_state = opt.update(g, opt_state, w, step=zero, seed=zero)
        >>> first, second, opt_state[0].norm
        (tensor([-3., -4.]), tensor([-0.6000, -0.8000]), tensor(5.))
    """
    return ClipByLastNorm(_checked("fz.clip_by_last_norm", limit))


def _shrink(limit: float, norm: Tensor) -> Tensor:
    return (limit / (norm + 1e-6)).clamp(max=1.0)


def _checked(call: str, limit: float) -> float:
    checked: float = number(call, "limit", limit, above=0, finite=False)
    return checked
