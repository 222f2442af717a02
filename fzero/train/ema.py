"""An average of parameters over the steps of training, in float32.

A weight that moves by a thousandth of itself does not move at all in bfloat16, rounded to nearest, and an average moves
by less. So the average is float32 whatever the policy stores, and takes the exact parameters: of a split master both
halves, which a `State` has and its bare parameters have not.

    average  ──▶  average + (1 − decay) · (parameters − average)
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from fzero import tree
from fzero.autodiff.open import is_float
from fzero.calls.arguments import number
from fzero.errors import LayoutError
from fzero.kernels.storage import join_master
from fzero.optim.moments import WithRemainder
from fzero.precision.policy import policy
from fzero.ranks.peers import together
from fzero.sharding.algebra import check_same_leaves, check_sharded
from fzero.sharding.leaf import scaled
from fzero.sharding.sharded import Sharded
from fzero.train.state import State


@together("fz.ema")
def ema(average: Sharded | None, params: State | Sharded, decay: float | Tensor) -> Sharded:
    """Return an exponential moving average of parameters after one more step: float32, cut as the parameters are.

    Start with `average=None`, outside of a jitted step: it gives the parameters themselves. Inside, pass the average as
    an argument that may be donated. `fz.gather(average)` is a tree of full float32 tensors for `apply`, and a function
    called on the average, `fz.call(f, average)`, sees float32 leaves.

    Args:
        average: what the last call returned; `None` at first.
        params: a `State`, whose exact master is taken where it has one, or its parameters alone, of any policy: under
            `bf16-exact` those are the bfloat16 half. A gradient is taken by its value, leaf × factor.
        decay: share of the old average, from 0 to 1: a number, or a floating-point tensor of shape (), whose values
            change without a retrace.

    Returns:
        `average + (1 - decay) * (params - average)`, computed in float32 (float64 leaves in float64). Leaves that are
        no floating-point tensors are those of `params`. It shares no memory with what was given.

    Raises:
        TypeError: one of the two is no sharded tree, or `decay` is no number.
        ValueError: `decay` is not from 0 to 1.
        TreeError: they have different leaves.
        LayoutError: they are cut differently, or the average is not stored in float32.

    Source: Polyak and Juditsky 1992; as weights to evaluate with, Tarvainen and Valpola 2017, arXiv 1703.01780.

    Example:
        >>> import fzero as fz
        >>> params = fz.shard({"w": torch.ones(2)}, fz.make_mesh("cpu"), fz.zero(3))
        >>> average = ema(None, params, 0.9)
        >>> fz.gather(ema(average, fz.scale(params, 2.0), 0.9))
        {'w': tensor([1.1000, 1.1000])}
    """
    weight = _weight(decay)
    now = _exact(params)
    if average is None:
        return now
    check_same_leaves(average, now, "fz.ema")
    _check_average(average, now)
    pieces = [
        old + (new - old) * weight if new is not None and old is not None and is_float(new) else new
        for old, new in zip(average.pieces, now.pieces, strict=True)
    ]
    return now.replace(pieces=tuple(pieces))


def _weight(decay: float | Tensor) -> float | Tensor:
    """Return 1 − decay, in float64 until then: near 1 the difference has few digits."""
    if isinstance(decay, Tensor):
        if decay.ndim or not decay.is_floating_point():
            raise TypeError(
                f"fz.ema: decay: expected a number or a floating-point tensor of shape (), got {tree.describe(decay)}."
            )
        return (1.0 - decay.double()).to(torch.promote_types(decay.dtype, torch.float32))
    return 1.0 - number("fz.ema", "decay", decay, least=0.0, most=1.0)


def _exact(params: State | Sharded) -> Sharded:
    """Return the values of parameters in float32, a copy, as a policy of float32 stores them."""
    remainders: dict[str, Tensor | None] = {}
    if isinstance(params, State):
        for part in tree.leaves(params.moments, is_leaf=lambda x: isinstance(x, WithRemainder)):
            if isinstance(part, WithRemainder):
                remainders |= zip(part.remainder.paths, part.remainder.pieces, strict=True)
        params = params.params
    check_sharded(params, "fz.ema")
    pieces: list[Tensor | None] = []
    for path, piece in zip(params.paths, params.pieces, strict=True):
        remainder = remainders.get(path)
        if piece is None or not is_float(piece):
            exact = piece if piece is None else piece.clone()
        elif remainder is not None:
            exact = join_master(piece, remainder)
        else:
            exact = piece.to(torch.promote_types(piece.dtype, torch.float32), copy=True)
        pieces.append(exact if exact is None or params.factor is None else scaled(exact, params.factor))
    return Sharded(tuple(pieces), dataclasses.replace(params.placement, policy=policy("fp32")))


def _check_average(average: Sharded, params: Sharded) -> None:
    rows = zip(
        average.paths, average.pieces, params.pieces, average.placement.specs, params.placement.specs, strict=True
    )
    for path, old, new, spec, wanted in rows:
        if spec != wanted or (old is None) != (new is None):
            raise LayoutError(
                f"fz.ema: leaf {path!r} of the average is cut over {spec.cut} and split by {spec.split}, and of the "
                f"parameters over {wanted.cut} and by {wanted.split}. Start one on them: fz.ema(None, params, decay)."
            )
        if old is not None and new is not None and old.dtype != new.dtype:
            raise LayoutError(
                f"fz.ema: leaf {path!r} of the average is {old.dtype}, and is to be kept in {new.dtype}: in less it "
                f"stands still. Start it so: fz.ema(None, params, decay)."
            )
    if average.factor is not None:
        raise LayoutError("fz.ema: the average has a factor, as gradients have. Start it: fz.ema(None, params, decay).")
