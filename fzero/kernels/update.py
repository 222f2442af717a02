"""What the update kernels share: two ops each, argument checks, the torch reference and how it runs, the launch.

A kernel is a formula in float32. Around it stand loading the state of an element from however it is stored, and storing
the new one, rounded; see `fzero.kernels.storage`. An op takes many leaves, so that the small ones share a launch:

    fzero::adamw     returns the new states
    fzero::adamw_    overwrites the old ones

Both are opaque to a trace. CUDA runs a Triton kernel; a CPU runs the torch reference leaf by leaf, compiled where that
is possible. All do the same float32 operations in the same order, one rounding each, so they agree bit for bit (but for
the payload of a NaN).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fzero.kernels.checks import check
from fzero.kernels.compiled import run_in_place
from fzero.kernels.in_place import register
from fzero.kernels.launch import launch
from fzero.kernels.storage import BLOCK, Stored, blocks_of, draws, grouped, is_quantized, load, store
from fzero.kernels.transformed import transformed
from fzero.random import bits as random
from fzero.random.bits import signed

LeafState = Sequence[Tensor]
# (values, gradient as it came, scalars, compiled=, **statics) -> new values, and which elements to change.
Formula = Callable[..., tuple[list[Tensor], Tensor]]
# (update, out, state, grads, scalars, keys, offsets, *statics, stochastic)
Write = Callable[..., None]


@dataclass(frozen=True)
class Update:
    """An update kernel: its formula, and what its ops take.

    Attributes:
        name: of the ops and of the public function.
        formula: new float32 values of an element from old ones.
        values: names of the values that an element's state consists of, the parameter first; at most three.
        scalars: how many numbers the formula takes from a tensor.
        statics: names of those that are fixed; what they are, float or bool, the formula's annotations say.
        kernel: the formula for Triton, see `fzero.kernels.launch`. Without it CUDA runs the reference op by op.
        numbers: makes of the statics what the Triton formula takes.
        optional: how many of the last values may be left out.
    """

    name: str
    formula: Formula
    values: tuple[str, ...]
    scalars: int
    statics: tuple[str, ...]
    kernel: Any = None
    numbers: Callable[..., tuple[float, ...]] | None = None
    optional: int = 0

    def __call__(
        self,
        states: Sequence[LeafState],
        grads: Sequence[Tensor],
        scalars: Tensor,
        keys: Tensor,
        offsets: Tensor,
        *,
        stochastic: bool,
        **statics: Any,
    ) -> list[tuple[Tensor, ...]]:
        """Return new states, one for each leaf; see the kernel's public function."""
        check(self, states, grads, scalars, keys, offsets)
        state = [x for leaf in states for x in leaf]
        numbers = [statics[name] for name in self.statics]
        if transformed(*state, *grads, scalars, keys, offsets):
            self._check_differentiable(states)
            rows = zip(states, grads, keys.unbind(), offsets.unbind(), strict=True)
            return [
                tuple(reference(self.formula, leaf, g, scalars, key, offset, stochastic, **statics))
                for leaf, g, key, offset in rows
            ]
        op = getattr(torch.ops.fzero, self.name)
        new: list[Tensor] = op(state, list(grads), scalars, keys, offsets, *numbers, stochastic)
        return [tuple(leaf) for leaf in leaves_of(new, len(states))]

    def _check_differentiable(self, states: Sequence[LeafState]) -> None:
        if any(is_quantized(stored) for leaf in states for stored in grouped(leaf)):
            raise ValueError(
                f"{self.name}: a state of 8-bit codes has no derivatives and no batch axis; under grad, vjp, jvp and "
                f"vmap keep moments in float32, bfloat16 or float16."
            )


def reference(
    formula: Formula,
    state: LeafState,
    g: Tensor,
    scalars: Tensor,
    keys: Tensor,
    offset: Tensor,
    stochastic: bool,
    compiled: bool = False,
    **statics: Any,
) -> list[Tensor]:
    """Return the new state of one leaf, in plain torch operations: what a kernel computes.

    Args:
        formula: of the kernel.
        state: its tensors, 1-D; or (rows, 128), with scales of shape (rows,).
        g: gradient: shape of the parameter.
        scalars: float32, from the kernel's function for them.
        keys: int32 of shape (2,).
        offset: int32, 0-d: index of element 0.
        stochastic: how to round.
        compiled: whether Inductor traces it, see `fzero.kernels.compiled.run_in_place`.
        **statics: of the formula.
    """
    stored = grouped(state)
    new, ok = formula([load(x) for x in stored], g, scalars, compiled=compiled, **statics)
    noise = _noise(keys, offset, g) if stochastic and any(map(draws, stored)) else [None] * 3
    results: list[Tensor] = []
    for value, old, noise16 in zip(new, stored, noise, strict=False):
        results += store(value, old, ok, noise16)
    return results


def _noise(keys: Tensor, offset: Tensor, like: Tensor) -> Sequence[Tensor | None]:
    word = random.bits(keys, offset, like.numel()).view(like.shape)
    return word & 0xFFFF, random.shift_right(word, 16), random.remix(word) & 0xFFFF


def update_in_place(
    *tensors: Tensor, formula: Formula, stochastic: bool, compiled: bool = False, **statics: Any
) -> None:
    """Overwrite a leaf's state by what `reference` returns. `tensors` are the state, then `g` to `offset` there."""
    *state, g, scalars, keys, offset = tensors
    new = reference(formula, state, g, scalars, keys, offset, stochastic, compiled, **statics)
    for old, x in zip(state, new, strict=True):
        old.copy_(x)


def _run_leaf(
    update: Update, state: LeafState, g: Tensor, scalars: Tensor, keys: Tensor, offset: Tensor, statics: dict[str, Any]
) -> None:
    """Overwrite the state of one leaf."""
    stored = grouped(state)
    # float32 throughout draws nothing: one program for both flags.
    statics = statics | {"formula": update.formula, "stochastic": statics["stochastic"] and any(map(draws, stored))}
    if g.is_cuda:
        update_in_place(*state, g, scalars, keys, offset, **statics)
        return
    if not any(map(is_quantized, stored)):
        run_in_place(update_in_place, (*state, g), (scalars, keys), offset, **statics)
        return
    rows, tail = divmod(g.shape[0], BLOCK)
    whole = rows * BLOCK
    run_in_place(
        update_in_place,
        [*_by_rows(stored, 0, whole), g[:whole].view(-1, BLOCK)], (scalars, keys), offset, **statics,
    )  # fmt: skip
    if tail:
        parts = [*_by_rows(stored, whole, whole + tail), g[whole:].view(1, tail)]
        update_in_place(*parts, scalars, keys, offset + signed(whole), **statics)


def _by_rows(stored: Sequence[Stored], start: int, stop: int) -> list[Tensor]:
    """Return a range of a leaf's state with a row for each block, its last row cut if the range ends in it."""
    width = min(BLOCK, stop - start) or BLOCK
    parts: list[Tensor] = []
    for value in stored:
        x, *rest = value
        parts.append(x[start:stop].view(-1, width))
        for other in rest:
            scales = other[start // BLOCK : blocks_of(stop)]
            parts.append(scales if is_quantized(value) else other[start:stop].view(-1, width))
    return parts


def define(update: Update) -> None:
    """Register the two ops of a kernel."""
    fixed = "".join(f"{update.formula.__annotations__[name]} {name}, " for name in update.statics)
    arguments = f"Tensor[] grads, Tensor scalars, Tensor keys, Tensor offsets, {fixed}bool stochastic"
    new, in_place = f"fzero::{update.name}", f"fzero::{update.name}_"
    tags = torch.Tag.pt2_compliant_tag
    torch.library.define(new, f"(Tensor[] state, {arguments}) -> Tensor[]", tags=tags)
    torch.library.define(in_place, f"(Tensor(a!)[] state, {arguments}) -> ()", tags=tags)
    on_cuda = _write_leaf_by_leaf if update.kernel is None else _write_by_one_launch
    for device, write in (("cpu", _write_leaf_by_leaf), ("cuda", on_cuda)):
        torch.library.impl(new, device, functools.partial(_renew, write, update))
        torch.library.impl(in_place, device, functools.partial(_overwrite, write, update))
    torch.library.register_fake(new, lambda state, *rest: [torch.empty_like(x) for x in state])
    torch.library.register_fake(in_place, lambda state, *rest: None)
    ops = [getattr(torch.ops.fzero, name).default for name in (update.name, update.name + "_")]
    register(*ops, 0)


def _renew(write: Write, update: Update, state: list[Tensor], *rest: Any) -> list[Tensor]:
    out = [torch.empty_like(x) for x in state]
    write(update, out, state, *rest)
    return out


def _overwrite(write: Write, update: Update, state: list[Tensor], *rest: Any) -> None:
    write(update, state, state, *rest)


def _write_by_one_launch(
    update: Update,
    out: list[Tensor],
    state: list[Tensor],
    grads: list[Tensor],
    scalars: Tensor,
    keys: Tensor,
    offsets: Tensor,
    *statics: Any,
) -> None:
    """Write new states into `out`, by one launch."""
    assert update.numbers is not None, "a kernel comes with what it takes"
    count = len(grads)
    launch(
        leaves_of(out, count), leaves_of(state, count), grads, scalars, keys, offsets,
        formula=update.kernel, numbers=update.numbers(*statics[:-1]), stochastic=statics[-1],
    )  # fmt: skip


def _write_leaf_by_leaf(
    update: Update,
    out: list[Tensor],
    state: list[Tensor],
    grads: list[Tensor],
    scalars: Tensor,
    keys: Tensor,
    offsets: Tensor,
    *statics: Any,
) -> None:
    """Write new states into `out`, leaf by leaf."""
    if out is not state:
        for new, old in zip(out, state, strict=True):
            new.copy_(old)
    named = dict(zip((*update.statics, "stochastic"), statics, strict=True))
    for leaf, g, key, offset in zip(leaves_of(out, len(grads)), grads, keys.unbind(), offsets.unbind(), strict=True):
        _run_leaf(update, leaf, g, scalars, key, offset, named)


def leaves_of(state: list[Tensor], count: int) -> list[list[Tensor]]:
    """Return the tensors of `count` leaves, leaf by leaf."""
    size = len(state) // max(1, count)
    return [state[i * size : (i + 1) * size] for i in range(count)]
