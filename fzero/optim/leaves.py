"""The leaves of a step: what an update takes of each, and where it puts what it gives back.

A leaf's state is flat: the parameter, its remainder if it is split, each moment, its scales if it is quantized.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fzero.optim.moments import WithRemainder, restored, stored, without_remainder
from fzero.optim.step import Rounding, Step, roundings
from fzero.sharding.leaf import join_block, own_piece
from fzero.sharding.sharded import Sharded

LeafState = Sequence[Tensor]


class Leaves:
    """The state of a step that is being made, group of leaves by group of leaves: `take`, `put`, and at last `done`.

    Args:
        grads: of the step; leaves without a gradient stay as they are.
        opt_state: of the optimizer: a named tuple of moments, or `WithRemainder`.
        params: as the policy stores them.
        at: which step.
    """

    def __init__(self, grads: Sharded, opt_state: Any, params: Sharded, at: Step) -> None:
        self._grads, self._params = grads, params
        self._moments, self._remainder = without_remainder(opt_state)
        self._beside = self._moments if self._remainder is None else (self._remainder, *self._moments)
        self._roundings = roundings(grads, params, at)
        self._pieces = list(params.pieces)
        self._rows: list[tuple[Tensor, ...]] = [()] * len(self._pieces)

    @property
    def indices(self) -> list[int]:
        """Which leaves have a piece and a gradient here."""
        pairs = enumerate(zip(self._params.pieces, self._grads.pieces, strict=True))
        return [i for i, (piece, gradient) in pairs if piece is not None and gradient is not None]

    def kind(self, index: int) -> tuple[Any, ...]:
        """What has to be equal for leaves to be updated together: dtypes, and the policy."""
        pieces = self._params.pieces[index], self._grads.pieces[index], *stored(self._beside, index)
        dtypes = tuple(piece.dtype for piece in pieces if piece is not None)
        return dtypes, self._params.placement.policy_of(self._params.paths[index])

    def name(self, group: Sequence[int]) -> str:
        """What a program calls the update of a group."""
        return self._params.paths[group[0]] + (f" and {len(group) - 1} more" if len(group) > 1 else "")

    def take(self, group: Sequence[int]) -> tuple[list[LeafState], list[Tensor], Rounding]:
        """Return this rank's part of the states of some leaves, of their gradients, and what they round by."""
        states: list[LeafState] = [(own_of(self._grads, self._params, i), *stored(self._beside, i)) for i in group]
        gradients = [gradient for i in group if (gradient := self._grads.pieces[i]) is not None]
        return states, gradients, Rounding.joined([self._roundings[i] for i in group])

    def put(self, group: Sequence[int], states: Sequence[LeafState]) -> None:
        """Keep the new states of leaves."""
        for i, (own, *row) in zip(group, states, strict=True):
            self._pieces[i], self._rows[i] = joined(own, self._grads, self._params, i), tuple(row)

    def done(self) -> tuple[Sharded, Any]:
        """Return the parameters and the optimizer's state after the step."""
        new = restored(self._beside, self._rows)
        moments = type(self._moments)(*(new if self._remainder is None else new[1:]))
        state = moments if self._remainder is None else WithRemainder(moments, new[0])
        return self._params.replace(pieces=tuple(self._pieces)), state


def own_of(grads: Sharded, params: Sharded, index: int) -> Tensor:
    """Return this rank's own piece of a parameter, cut as its gradient is."""
    piece, spec = params.pieces[index], grads.placement.specs[index]
    assert piece is not None
    return own_piece(piece, spec, params.mesh) if _is_stored_whole(grads, params, index) else piece


def joined(own: Tensor, grads: Sharded, params: Sharded, index: int) -> Tensor:
    """Return a parameter as it is stored, of the pieces that ranks have updated. Undoes `own_of`."""
    spec = grads.placement.specs[index]
    return join_block(own, spec, params.mesh) if _is_stored_whole(grads, params, index) else own


def _is_stored_whole(grads: Sharded, params: Sharded, index: int) -> bool:
    return grads.placement.specs[index].cut != params.placement.specs[index].cut
