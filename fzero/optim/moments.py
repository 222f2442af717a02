"""How an optimizer's state is stored: moments by the policy, and what completes split masters.

    moment dtype float32, bfloat16    a `Sharded` beside the parameters
    moment dtype int8                 a `Quantized`: codes, and a scale for every block of a piece
    master "split"                    `WithRemainder`: the state, and 16 bits for every parameter

A kernel sees a leaf's state as one flat tuple of pieces, in the order in which `fzero.kernels.storage` groups them:
the parameter, its remainder, each moment, its scales.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fzero.kernels.storage import blocks_of
from fzero.sharding.leaf import P, Spec
from fzero.sharding.placement import Placement
from fzero.sharding.sharded import Sharded

# Leaves under this many elements are not quantized: they weigh little, and a block would be most of a leaf.
MIN_QUANTIZED = 1024


class Quantized(NamedTuple):
    """A moment of 8 bits an element.

    Attributes:
        codes: int8 or uint8; bfloat16 where a leaf is too small to quantize, float32 where it is exempt.
        scales: float32, one for every 128 elements of a piece, and so for a leaf as many as all pieces have together;
            `None` where a leaf is not quantized.
    """

    codes: Sharded
    scales: Sharded


Moment = Sharded | Quantized


class WithRemainder(NamedTuple):
    """An optimizer's state, and the int16 remainders that make fp32 masters of bfloat16 parameters."""

    moments: Any
    remainder: Sharded


def zeros(params: Sharded, *, signed: bool) -> Moment:
    """Return a moment that is zero, cut like gradients; `None` at leaves that are not floating-point.

    Args:
        params: as the policy stores them.
        signed: whether the moment may be negative; a quantized one that may not spans twice the powers of two.
    """
    placement = moment_placement(params)
    device = next((x.device for x in params.pieces if x is not None), params.mesh.device)
    pieces: list[Tensor | None] = []
    scales: list[Tensor | None] = []
    for path, piece, spec in zip(params.paths, params.pieces, placement.specs, strict=True):
        if piece is None or not piece.is_floating_point():
            pieces.append(None)
            scales.append(None)
            continue
        length = spec.piece_numel(params.mesh)
        policy = placement.policy_of(path)
        dtype = piece.dtype if policy is None else policy.moment
        if dtype == torch.int8:
            is_small = spec.block_numel(params.mesh) < MIN_QUANTIZED
            dtype = torch.bfloat16 if is_small else torch.int8 if signed else torch.uint8
        pieces.append(torch.zeros(length, dtype=dtype, device=piece.device))
        is_quantized = not dtype.is_floating_point
        scales.append(torch.zeros(blocks_of(length), device=device) if is_quantized else None)
    codes = Sharded(tuple(pieces), placement)
    if params.policy is None or params.policy.moment != torch.int8:
        return codes
    return Quantized(codes, Sharded(tuple(scales), _scale_placement(placement)))


def with_remainder(state: Any, params: Sharded, remainder: Sharded | None) -> Any:
    """Return an optimizer's state together with remainders, where the policy splits masters.

    Args:
        state: of the optimizer.
        params: as the policy stores them.
        remainder: what the parameters lack of the masters; `None` where they are the masters, rounded.
    """
    if params.policy is None or params.policy.master != "split":
        return state
    return WithRemainder(state, remainder_of(params) if remainder is None else remainder)


def without_remainder(state: Any) -> tuple[Any, Sharded | None]:
    """Undo `with_remainder`."""
    return (state.moments, state.remainder) if isinstance(state, WithRemainder) else (state, None)


def remainder_of(params: Sharded) -> Sharded:
    """Return remainders of zero: masters that bfloat16 holds exactly. `None` at leaves that are not split."""
    pieces = [
        torch.zeros_like(piece, dtype=torch.int16) if piece is not None and is_split(params.placement, path) else None
        for path, piece in zip(params.paths, params.pieces, strict=True)
    ]
    return Sharded(tuple(pieces), params.placement)


def is_split(placement: Placement, path: str) -> bool:
    """Whether a floating-point leaf is stored in two halves."""
    policy = placement.policy_of(path)
    return policy is not None and policy.master == "split"


def stored(moments: Sequence[Moment], index: int) -> tuple[Tensor, ...]:
    """Return the pieces of one leaf's moments, in the order that kernels take them in."""
    found: list[Tensor | None] = []
    for moment in moments:
        found += [moment.pieces[index]] if isinstance(moment, Sharded) else [part.pieces[index] for part in moment]
    return tuple(piece for piece in found if piece is not None)


def restored(moments: Sequence[Moment], rows: Sequence[Sequence[Tensor]]) -> list[Any]:
    """Return moments with new pieces, each of the kind that it was.

    Args:
        moments: the old ones.
        rows: for each leaf what `stored` returns for the new ones; empty where the old ones stay.
    """
    taken = [list(row) for row in rows]

    def renewed(old: Sharded) -> Sharded:
        pieces = [
            row.pop(0) if row and piece is not None else piece for piece, row in zip(old.pieces, taken, strict=True)
        ]
        return old.replace(pieces=tuple(pieces))

    return [renewed(m) if isinstance(m, Sharded) else Quantized(*map(renewed, m)) for m in moments]


def moment_placement(params: Sharded) -> Placement:
    """Return where moments lie: as the gradients do."""
    return params.placement.cut_over(params.layout.gradient_cut)


def _scale_placement(placement: Placement) -> Placement:
    """Return where scales lie: a leaf of as many as its pieces have blocks, cut and split as the pieces are."""
    mesh, specs = placement.mesh, []
    for spec in placement.specs:
        axes, count = spec.split_axes, mesh.size(spec.cut) * blocks_of(spec.piece_numel(mesh))
        specs.append(Spec((*(mesh.size(axis) for axis in axes), count), P(*axes), spec.cut))
    return dataclasses.replace(placement, specs=tuple(specs))
