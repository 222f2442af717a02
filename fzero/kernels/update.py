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
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fzero.kernels import nvidia
from fzero.kernels.compiled import chunks, program_for
from fzero.kernels.in_place import register, transformed
from fzero.kernels.launch import launch
from fzero.kernels.ops import over
from fzero.kernels.reference import Formula, LeafState, Numbers, parts_of, reference, update_in_place
from fzero.kernels.storage import blocks_of, draws, grouped, is_quantized
from fzero.random.bits import signed

GRADIENT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Update:
    """An update kernel: its formula, and what its ops take.

    Attributes:
        name: of the ops.
        formula: new float32 values of an element from old ones, written once, over `fzero.kernels.ops`.
        values: names of the values that an element's state consists of, the parameter first; at most three.
        scalars: how many numbers the formula takes from a tensor. The last is not finite where the step is skipped.
        optional: how many of the last values may be left out.
    """

    name: str
    formula: Formula
    values: tuple[str, ...]
    scalars: int
    optional: int = 0

    def __post_init__(self) -> None:
        _define(self)

    @functools.cached_property
    def kernel(self) -> Any:
        """The formula for Triton, see `fzero.kernels.launch`."""
        return nvidia.jit(over(self.formula, nvidia))

    def __call__(
        self,
        states: Sequence[LeafState],
        grads: Sequence[Tensor],
        scalars: Tensor,
        keys: Tensor,
        offsets: Tensor,
        *,
        numbers: Numbers,
        stochastic: bool,
    ) -> list[tuple[Tensor, ...]]:
        """Return the states of leaves after one step; nothing is overwritten.

        An element that the formula does not change, because its gradient is not finite, keeps its values.

        Args:
            states: for each leaf its tensors in a row, each value as it is stored (see `fzero.kernels.storage`): of
                AdamW (p[, remainder], m[, scales], v[, scales]). 1-D, contiguous, the same dtypes for all leaves.
            grads: for each leaf its gradient: shape of the parameter; float32, bfloat16 or float16.
            scalars: float32 of shape (`self.scalars`,).
            keys: int32 of shape (leaves, 2), from `fzero.random.bits.leaf_keys`.
            offsets: int32 of shape (leaves,): global index of element 0 in its leaf, modulo 2^32.
            numbers: what the formula takes that never changes.
            stochastic: round what does not hold float32 stochastically, by bits drawn for a leaf's keys and an
                element's index; otherwise to nearest.

        Returns:
            The new states, in the form of the old ones. Under `torch.func` transforms differentiable, the rounding as
            the identity.

        Raises:
            ValueError: a shape or a layout in memory that the kernel does not take; 8-bit moments under a transform.
            TypeError: a dtype that it does not take.
        """
        _check(self, states, grads, scalars, keys, offsets)
        state = [x for leaf in states for x in leaf]
        if transformed(*state, *grads, scalars, keys, offsets):
            self._check_differentiable(states)
            how: dict[str, Any] = {"numbers": numbers, "stochastic": stochastic}
            rows = zip(states, grads, keys.unbind(), offsets.unbind(), strict=True)
            return [tuple(reference(self.formula, leaf, g, scalars, key, at, **how)) for leaf, g, key, at in rows]
        op = getattr(torch.ops.fzero, self.name)
        new: list[Tensor] = op(state, list(grads), scalars, keys, offsets, numbers, stochastic)
        return [tuple(leaf) for leaf in leaves_of(new, len(states))]

    def _check_differentiable(self, states: Sequence[LeafState]) -> None:
        if any(is_quantized(stored) for leaf in states for stored in grouped(leaf)):
            raise ValueError(
                f"{self.name}: a state of 8-bit codes has no derivatives and no batch axis; under grad, vjp, jvp and "
                f"vmap keep moments in float32, bfloat16 or float16."
            )


def _define(update: Update) -> None:
    """Register the two ops of a kernel."""
    arguments = "Tensor[] grads, Tensor scalars, Tensor keys, Tensor offsets, float[] numbers, bool stochastic"
    new, in_place = f"fzero::{update.name}", f"fzero::{update.name}_"
    tags = torch.Tag.pt2_compliant_tag
    torch.library.define(new, f"(Tensor[] state, {arguments}) -> Tensor[]", tags=tags)
    torch.library.define(in_place, f"(Tensor(a!)[] state, {arguments}) -> ()", tags=tags)
    for device, run in (("cpu", _run_on_cpu), ("cuda", _run_on_cuda)):
        torch.library.impl(new, device, functools.partial(run, update, False))
        torch.library.impl(in_place, device, functools.partial(run, update, True))
    torch.library.register_fake(new, lambda state, *rest: [torch.empty_like(x) for x in state])
    torch.library.register_fake(in_place, lambda state, *rest: None)
    ops = [getattr(torch.ops.fzero, name).default for name in (update.name, update.name + "_")]
    register(*ops, 0)


def _run_on_cuda(
    update: Update,
    in_place: bool,
    state: list[Tensor],
    grads: list[Tensor],
    scalars: Tensor,
    keys: Tensor,
    offsets: Tensor,
    numbers: Sequence[float],
    stochastic: bool,
) -> list[Tensor] | None:
    """Write new states, by one launch, into the old ones or into new memory."""
    out, count = state if in_place else [torch.empty_like(x) for x in state], len(grads)
    launch(
        leaves_of(out, count), leaves_of(state, count), grads, scalars, keys, offsets,
        formula=update.kernel, numbers=tuple(numbers), stochastic=stochastic,
    )  # fmt: skip
    return None if in_place else out


def _run_on_cpu(
    update: Update,
    in_place: bool,
    state: list[Tensor],
    grads: list[Tensor],
    scalars: Tensor,
    keys: Tensor,
    offsets: Tensor,
    numbers: Sequence[float],
    stochastic: bool,
) -> list[Tensor] | None:
    """Write new states, leaf by leaf, into the old ones or into new memory: by a compiled program, or op by op."""
    out = state if in_place else [x.clone() for x in state]
    # float32 throughout draws nothing: one program for both flags.
    stochastic = stochastic and any(map(draws, grouped(out[: len(out) // max(1, len(grads))])))
    how: dict[str, Any] = {"numbers": tuple(numbers), "stochastic": stochastic}
    for leaf, g, key, offset in zip(leaves_of(out, len(grads)), grads, keys.unbind(), offsets.unbind(), strict=True):
        for start, operands in parts_of(leaf, g):
            constants = scalars, key, offset + signed(start)
            if program := program_for(update_in_place, operands, constants, formula=update.formula, **how):
                program(*operands, *constants)
                continue
            for first, (*old, gradient) in chunks(operands):
                where = scalars, key, offset + signed(start + first)
                for x, new in zip(old, reference(update.formula, old, gradient, *where, **how), strict=True):
                    x.copy_(new)
    return None if in_place else out


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
