"""Muon: momentum whose matrices are orthogonalized, for hidden layers; another optimizer has the other leaves.

The momentum is cut like gradients. Its direction is gathered, every rank orthogonalizes the whole matrix, which gives
the same bits on any number of ranks, and updates its own piece of the parameter:

    ḡ, m ──momentum──▶ m, direction ──all-gather, bf16──▶ matrix ──Newton-Schulz──▶ own piece ──write-back──▶ p

The gather and the write-back are those of any leaf; a leaf that `P` splits is gathered over those axes too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fzero.calls import shown
from fzero.calls.arguments import flag, named, number, rate_of, whole
from fzero.kernels.muon import momentum, orthogonalize
from fzero.kernels.storage import grouped
from fzero.kernels.write_back import WRITE_BACK, write_back_scalars
from fzero.marks import mark
from fzero.optim.adamw import adamw
from fzero.optim.base import Optimizer, kind_of
from fzero.optim.leaves import LeafState, Leaves
from fzero.optim.masks import ByPath, Mask, check_mask, mask_of
from fzero.optim.moments import Moment, with_remainder, zeros
from fzero.optim.step import Rate, Rounding, Step, rate
from fzero.ranks.mesh import Mesh
from fzero.sharding.leaf import Spec, block_of, join, own_piece
from fzero.sharding.sharded import Sharded

# An orthogonal matrix times this and the root of its longer side moves elements about as far as AdamW does.
ADAMW_SCALE = 0.2


class Momentum(NamedTuple):
    """The running mean of the gradients of matrices."""

    momentum: Moment


class MuonState(NamedTuple):
    """What `Muon` keeps: of the matrices, and of the other leaves."""

    matrices: Any
    others: Any


@dataclass(frozen=True, repr=False)
class Muon(Optimizer):
    """See `muon`."""

    lr: Rate
    others: Optimizer
    momentum: float = 0.95
    nesterov: bool = True
    weight_decay: float = 0.0
    mask: Mask | None = None
    steps: int = 5
    matrix: Mask | None = None
    shares_rate: bool = True

    def __repr__(self) -> str:
        return shown.made("muon", self, leave_out=("shares_rate", "others") if self.shares_rate else ("shares_rate",))

    def init_sharded(self, params: Sharded, remainder: Sharded | None = None) -> MuonState:
        matrices, rest = self._groups(params)
        own, others = (None, None) if remainder is None else (remainder.select(matrices), remainder.select(rest))
        state = Momentum(zeros(params.select(matrices), signed=True))
        return MuonState(
            with_remainder(state, params.select(matrices), own), self.others.init_sharded(params.select(rest), others)
        )

    def update_sharded(self, grads: Sharded, opt_state: Any, params: Sharded, at: Step) -> tuple[Sharded, Any]:
        matrices, rest = self._groups(params)
        at = replace(at, squares=None)  # they are those of all leaves
        moved, own = self._update_matrices(grads.select(matrices), opt_state.matrices, params.select(matrices), at)
        given = grads.select(rest), opt_state.others, params.select(rest)
        moved_rest, others = self.others.update_sharded(*given, at)
        new = dict(zip((*matrices, *rest), (*moved.pieces, *moved_rest.pieces), strict=True))
        return params.replace(pieces=tuple(new[i] for i in range(len(new)))), MuonState(own, others)

    def learning_rate(self, step: Tensor) -> Any:
        own = rate(self.lr, step)
        return own if self.shares_rate else {"matrices": own, "others": self.others.learning_rate(step)}

    def frozen(self, paths: Sequence[str]) -> frozenset[str]:
        return self.others.frozen([path for path in paths if self.matrix is None or not self.matrix(path)])

    def check_paths(self, own: Sequence[str], everyone: Sequence[str]) -> None:
        super().check_paths(own, everyone)
        if isinstance(self.matrix, ByPath):
            check_mask(self.matrix, own, everyone, "")
        self.others.check_paths(own, everyone)

    def parts(self, opt_state: MuonState) -> list[tuple[str, Any]]:
        others = [(f"others: {name}", part) for name, part in self.others.parts(opt_state.others)]
        return [(kind_of(self), opt_state.matrices), *others]

    def _update_matrices(self, grads: Sharded, opt_state: Any, params: Sharded, at: Step) -> tuple[Sharded, Any]:
        leaves, scalars = Leaves(grads, opt_state, params, at), self._scalars(params, at.count)
        for i in leaves.indices:
            with mark(role="update", leaf=params.paths[i]):
                (state,), (gradient,), rounding = leaves.take([i])
                spec = grads.placement.specs[i]
                new = self._update_leaf(state, gradient, grads.multiplier, scalars[i], rounding, spec, params.mesh)
                leaves.put([i], [new])
        return leaves.done()

    def _update_leaf(
        self, state: LeafState, gradient: Tensor, factor: Tensor, scalars: Tensor, rounding: Rounding, spec: Spec,
        mesh: Mesh,
    ) -> LeafState:  # fmt: skip
        parameter, old = grouped(state)
        ((direction, *mean),) = momentum(
            [old], [gradient], factor.view(1), *rounding.source,
            decay=self.momentum, nesterov=self.nesterov, stochastic=rounding.stochastic,
        )  # fmt: skip
        whole = join(direction, spec, mesh)
        # NaN marks the elements that stay: they count as zero here, and are NaN again for the write-back.
        matrix = torch.where(torch.isfinite(whole), whole, 0.0).reshape(spec.shape[0], math.prod(spec.shape[1:]))
        orthogonal = orthogonalize(matrix, steps=self.steps).reshape(spec.shape)
        own = own_piece(block_of(orthogonal, spec, mesh), spec, mesh)
        own = torch.where(torch.isfinite(direction), own, torch.nan)
        (parameter,) = WRITE_BACK(
            [parameter], [own], scalars, *rounding.source, numbers=(), stochastic=rounding.stochastic
        )
        return (*parameter, *mean)

    def _scalars(self, params: Sharded, step: Tensor) -> list[Tensor]:
        """Return what the write-back of each leaf takes, made once for leaves of one size."""
        lr = rate(self.lr, step)
        made: dict[tuple[int, bool], Tensor] = {}
        found = []
        for path, (first, *others) in zip(params.paths, params.shapes, strict=True):
            longer, decays = max(first, math.prod(others)), self.mask is None or bool(self.mask(path))
            if (longer, decays) not in made:
                step_size = lr.to(torch.float64) * (ADAMW_SCALE * math.sqrt(longer))
                made[longer, decays] = write_back_scalars(step_size, lr, self.weight_decay if decays else 0.0)
            found.append(made[longer, decays])
        return found

    def _groups(self, params: Sharded) -> tuple[list[int], list[int]]:
        """Return the positions of matrices and of the other leaves."""
        groups: tuple[list[int], list[int]] = [], []
        frozen = self.frozen(params.paths)
        for i, (path, shape, piece) in enumerate(zip(params.paths, params.shapes, params.pieces, strict=True)):
            is_float = piece is None or piece.is_floating_point()
            chosen = len(shape) >= 2 and is_float if self.matrix is None else bool(self.matrix(path))
            if chosen and len(shape) < 2:
                raise ValueError(
                    f"fz.muon: matrix= chooses leaf {path!r} of shape {shape}, and only leaves of two or more "
                    f"dimensions can be orthogonalized. Leave it to `others`."
                )
            groups[not chosen or path in frozen].append(i)
        return groups


@named("fz.muon")
def muon(
    lr: Rate,
    momentum: float = 0.95,
    nesterov: bool = True,
    weight_decay: float = 0.0,
    mask: Any = None,
    *,
    steps: int = 5,
    matrix: Any = None,
    others: Optimizer | None = None,
) -> Muon:
    """Return Muon for matrices, and another optimizer for the other leaves.

    The update of a matrix is scaled by `0.2 · sqrt(max(rows, columns))`, so that AdamW's learning rate and weight
    decay serve both. A leaf of more than two dimensions is the matrix of its first against the others.

    Args:
        lr: learning rate: a number, or a function of the step tensor.
        momentum: decay of the running mean of gradients.
        nesterov: orthogonalize the momentum looked ahead.
        weight_decay: decoupled: `lr * weight_decay` of each parameter goes at each step.
        mask: which leaves decay, see `adamw`.
        steps: of the Newton-Schulz iteration.
        matrix: which leaves are orthogonalized: a function of the dotted path, or a tree of booleans like the
            parameters. Embeddings and heads do better without. Default: all of two or more dimensions but those that
            `others` freezes.
        others: optimizer of the other leaves. Default: `adamw` with the same learning rate, weight decay and mask.

    Returns:
        An optimizer. With `others` a step tells `lr/matrices` and `lr/others`, and the larger as `lr`.

    Raises:
        TypeError, ValueError: a number is none, or out of its range; `others` is no optimizer; or, from `init`,
            `matrix` chooses a leaf of fewer than two dimensions.

    Source: Jordan et al. 2024, kellerjordan.github.io/posts/muon; the scale: Liu et al. 2025, arXiv 2502.16982.

    Example:
        >>> opt, w, zero = muon(0.1), torch.zeros(2, 2), torch.tensor(0, dtype=torch.int32)
        >>> new, _ = opt.update(torch.eye(2), opt.init(w), w, step=zero, seed=zero)
        >>> (new.diagonal() < -0.02).all(), new[0, 1]
        (tensor(True), tensor(0.))
    """
    rate_of("fz.muon", lr)
    number("fz.muon", "momentum", momentum, least=0, below=1)
    flag("fz.muon", "nesterov", nesterov)
    number("fz.muon", "weight_decay", weight_decay, least=0)
    steps = int(whole("fz.muon", "steps", steps, least=1))
    if others is not None and not isinstance(others, Optimizer):
        raise TypeError(f"fz.muon: others must be an fz optimizer, got {others!r}. Try fz.adamw(lr).")
    decay_mask = mask_of("fz.muon", mask)
    rest = adamw(lr, weight_decay=weight_decay, mask=decay_mask) if others is None else others
    matrices = mask_of("fz.muon", matrix, "matrix")
    return Muon(lr, rest, momentum, nesterov, weight_decay, decay_mask, steps, matrices, others is None)
