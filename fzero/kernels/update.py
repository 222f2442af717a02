"""What the update kernels share: two ops each, argument checks, and by which of the two forms an op is answered.

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

from fzero.kernels.in_place import register, transformed
from fzero.kernels.launch import launch
from fzero.kernels.reference import Formula, LeafState, reference, run_leaf
from fzero.kernels.storage import blocks_of, grouped, is_quantized

GRADIENT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

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
        _check(self, states, grads, scalars, keys, offsets)
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
        run_leaf(update.formula, leaf, g, scalars, key, offset, named)


def leaves_of(state: list[Tensor], count: int) -> list[list[Tensor]]:
    """Return the tensors of `count` leaves, leaf by leaf."""
    size = len(state) // max(1, count)
    return [state[i * size : (i + 1) * size] for i in range(count)]


def _check(
    update: Update,
    states: Sequence[LeafState],
    grads: Sequence[Tensor],
    scalars: Tensor,
    keys: Tensor,
    offsets: Tensor,
) -> None:
    """Refuse what the kernel does not take.

    Args:
        update: the kernel.
        states: for each leaf its state.
        grads: for each leaf its gradient.
        scalars: what all leaves share.
        keys: int32 of shape (leaves, 2).
        offsets: int32 of shape (leaves,).

    Raises:
        ValueError: a shape, a device or a layout in memory.
        TypeError: a dtype.
    """
    call, count = update.name, len(states)
    if len(grads) != count:
        raise ValueError(f"{call}: {count} states and {len(grads)} gradients. Pass one gradient for each leaf.")
    for name, tensor, dtype, shape in (
        ("scalars", scalars, torch.float32, (update.scalars,)),
        ("keys", keys, torch.int32, (count, 2)),
        ("offsets", offsets, torch.int32, (count,)),
    ):
        _check_tensor(f"{call}: {name}", tensor, (dtype,), shape, scalars.device)
    for i, (leaf, g) in enumerate(zip(states, grads, strict=True)):
        if [x.dtype for x in (*leaf, g)] != [x.dtype for x in (*states[0], grads[0])]:
            raise TypeError(
                f"{call}: leaf {i} has dtypes {[x.dtype for x in (*leaf, g)]} and leaf 0 "
                f"{[x.dtype for x in (*states[0], grads[0])]}. Update leaves of other dtypes by another call."
            )
        _check_leaf(update, i, leaf, g, scalars.device)


def _check_leaf(update: Update, index: int, leaf: LeafState, g: Tensor, device: torch.device) -> None:
    call, of = update.name, f"of leaf {index}"
    stored = grouped(leaf)
    if not len(update.values) - update.optional <= len(stored) <= len(update.values) or is_quantized(stored[0]):
        raise TypeError(
            f"{call}: the state {of} has dtypes {[x.dtype for x in leaf]}, expected those of "
            f"{', '.join(update.values)}, each float32, bfloat16 or float16, bfloat16 and an int16 remainder, or, but "
            f"for p, int8 or uint8 and float32 scales."
        )
    p = leaf[0]
    if p.ndim != 1:
        raise ValueError(f"{call}: p {of} has shape {tuple(p.shape)}, expected one dimension. Pass p.flatten().")
    length = p.shape[0]
    for name, value in zip(update.values, stored, strict=False):
        _check_tensor(f"{call}: {name} {of}", value[0], (value[0].dtype,), (length,), device)
        if len(value) == 2:
            what, size = ("scales", blocks_of(length)) if is_quantized(value) else ("remainder", length)
            _check_tensor(f"{call}: the {what} of {name} {of}", value[1], (value[1].dtype,), (size,), device)
    _check_tensor(f"{call}: the gradient {of}", g, GRADIENT_DTYPES, (length,), device)


def _check_tensor(
    what: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...], device: torch.device
) -> None:
    if tensor.dtype not in dtypes:
        expected = " or ".join(str(dtype) for dtype in dtypes)
        raise TypeError(f"{what} has dtype {tensor.dtype}, expected {expected}. Cast it first.")
    if tensor.shape != shape:
        raise ValueError(f"{what} has shape {tuple(tensor.shape)}, expected {shape}.")
    if tensor.device != device:
        raise ValueError(f"{what} is on {tensor.device}, the scalars on {device}. Move it there.")
    if not tensor.is_contiguous():
        raise ValueError(f"{what} is not contiguous. Pass it through .contiguous().")
