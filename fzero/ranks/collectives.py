"""Differentiable collectives along one axis of a mesh.

Each is a linear function of the ranks' tensors taken together, and each is the other's transpose:

    all_gather      ↔  reduce_scatter
    all_to_all      ↔  all_to_all
    all_reduce      =  all_gather ∘ reduce_scatter, its own transpose

so they are differentiable to any order, in forward mode too, and under vmap. A gradient that passes
through one is the gradient of the **sum** over ranks; means are taken where gradients are made. The exception is
`total`, whose result is one number that the ranks share, and so is its cotangent.

All act on dimension 0 and split it evenly. Along an axis of one rank each is the identity.

On gloo a reduce-scatter is an all-to-all whose pieces are added here: half the time of gloo's own, the wire
carries the small dtype while the sum is wide, and the order of the sum is the order of the ranks, whatever
the layout. On NCCL, and in a simulated world, it is one reduce-scatter.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor

from fzero._torch import c10d
from fzero.marks import mark
from fzero.ranks.sums import SUM_PARTS, sum_parts

# An all-reduce that receives at most so many elements (N times what it is given) is one all-gather and a sum: one
# message instead of two.
_SMALL = 65536

# Dtypes that gloo or NCCL does not send, as others of the same bytes.
_SENT_AS = {
    torch.int16: torch.int8,
    torch.uint16: torch.uint8,
    torch.uint32: torch.int32,
    torch.uint64: torch.int64,
    torch.float8_e4m3fn: torch.uint8,
    torch.float8_e5m2: torch.uint8,
    torch.float8_e4m3fnuz: torch.uint8,
    torch.float8_e5m2fnuz: torch.uint8,
}


class Ranks(Protocol):
    """Where ranks stand: what a collective asks of a mesh."""

    @property
    def device(self) -> torch.device:
        """Where this rank keeps its tensors."""

    @property
    def simulated(self) -> bool:
        """Whether the ranks do not exist."""

    def size(self, axes: str | Iterable[str]) -> int:
        """Return the number of ranks along one axis, or along several together."""

    def index_tensor(self, axes: str | Iterable[str]) -> Tensor:
        """Return this rank's coordinate, int32 of shape ()."""

    def group(self, axis: str) -> str:
        """Return the name of the process group along an axis."""


def all_gather(x: Tensor, mesh: Ranks, axis: str) -> Tensor:
    """Return the ranks' tensors stacked along dimension 0, in rank order: `(n, ...) -> (N·n, ...)`."""
    if mesh.size(axis) == 1:
        return x
    if x.is_complex():
        return torch.view_as_complex(all_gather(_parts(x), mesh, axis))
    if (sent := _SENT_AS.get(x.dtype)) is not None:
        return all_gather(x.contiguous().view(sent), mesh, axis).view(x.dtype)
    gathered: Tensor = _AllGather.apply(x, mesh, axis)
    return gathered


def reduce_scatter(x: Tensor, mesh: Ranks, axis: str, *, dtype: torch.dtype | None = None) -> Tensor:
    """Return this rank's share of the sum over ranks: `(N·n, ...) -> (n, ...)`.

    Args:
        x: `(N·n, ...)`, the same shape on every rank.
        mesh: where the ranks stand.
        axis: the mesh axis to sum over.
        dtype: dtype of the sum and of the result. Default: that of `x`.
    """
    dtype = dtype or x.dtype
    if x.is_complex() and mesh.size(axis) > 1:
        return torch.view_as_complex(reduce_scatter(_parts(x), mesh, axis, dtype=dtype.to_real()))
    return x.to(dtype) if mesh.size(axis) == 1 else _ReduceScatter.apply(x, mesh, axis, dtype)


def all_to_all(x: Tensor, mesh: Ranks, axis: str) -> Tensor:
    """Send the i-th of N equal parts of dimension 0 to rank i; return the parts received, in rank order."""
    return x if mesh.size(axis) == 1 else _AllToAll.apply(x, mesh, axis)


def all_reduce(x: Tensor, mesh: Ranks, axis: str, *, dtype: torch.dtype | None = None) -> Tensor:
    """Return the sum over ranks of tensors of any shape, the same bits on every rank.

    It is a reduce-scatter and an all-gather (what a ring all-reduce is), or for few elements an
    all-gather and a sum. All three add in rank order, so that layouts which reduce differently agree.
    """
    dtype = dtype or x.dtype
    ranks = mesh.size(axis)
    if ranks == 1 or x.numel() == 0:
        return x.to(dtype)
    if x.is_complex():
        return torch.view_as_complex(all_reduce(_parts(x), mesh, axis, dtype=dtype.to_real()))
    flat = x.reshape(-1)
    if flat.numel() * ranks <= _SMALL:
        return sum_parts(all_gather(flat, mesh, axis), ranks, dtype).reshape(x.shape)
    padded = pad(flat, math.ceil(flat.numel() / ranks) * ranks)
    whole = all_gather(reduce_scatter(padded, mesh, axis, dtype=dtype), mesh, axis)
    return (whole if whole.numel() == flat.numel() else whole[: flat.numel()]).reshape(x.shape)


def total(x: Tensor, mesh: Ranks, axis: str) -> Tensor:
    """Return the sum over ranks as one value that they share: each rank's part has the value's own cotangent.

    Through `all_reduce` it would have the sum of the ranks' cotangents: N times as much.
    """
    return x if mesh.size(axis) == 1 else _Total.apply(x, mesh, axis)


def _parts(x: Tensor) -> Tensor:
    """Return a complex tensor as real and imaginary parts, which all networks send."""
    return torch.view_as_real(x.resolve_conj())


def pad(flat: Tensor, length: int) -> Tensor:
    """Return a 1-D tensor with zeros at its end up to `length`; itself where it has that length."""
    missing = length - flat.shape[0]
    return flat if missing == 0 else torch.nn.functional.pad(flat, (0, missing))


# Under vmap a batch of K members is (K, N·n, ...), and a collective splits the first dimension over N ranks. So the two
# change places before it, and back after it: left as they were received, members would lie between one another in
# memory, and a step that returned such strides would be traced again for them.


def _ranks_first(x: Tensor, ranks: int) -> Tensor:
    """Return `(K, N·n, ...)` as `(N·K, n, ...)`."""
    return x.unflatten(1, (ranks, x.shape[1] // ranks)).transpose(0, 1).flatten(0, 1)


def _members_first(x: Tensor, ranks: int) -> Tensor:
    """Return `(N·K, n, ...)` as `(K, N·n, ...)`."""
    return x.unflatten(0, (ranks, x.shape[0] // ranks)).transpose(0, 1).flatten(1, 2)


class _Along(torch.autograd.Function):
    """A function of `(x, mesh, axis, ...)` that remembers along which axis it went."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.mesh, ctx.axis = inputs


class _AllGather(_Along):
    @staticmethod
    def forward(x: Tensor, mesh: Ranks, axis: str) -> Tensor:
        with mark(axis=axis):
            return c10d.wait_tensor(c10d.all_gather_into_tensor(x.contiguous(), mesh.size(axis), mesh.group(axis)))

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, None, None]:
        return reduce_scatter(cotangent, ctx.mesh, ctx.axis), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        return all_gather(tangent, ctx.mesh, ctx.axis)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int, None, None], x: Tensor, mesh: Ranks, axis: str) -> tuple[Tensor, int]:
        return _members_first(all_gather(x.movedim(in_dims[0], 0), mesh, axis), mesh.size(axis)), 0


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, mesh: Ranks, axis: str, dtype: torch.dtype) -> Tensor:
        ranks, group = mesh.size(axis), mesh.group(axis)
        if x.device.type == "cuda" or mesh.simulated:
            wide = x.to(dtype).contiguous()
            with mark(axis=axis):
                return c10d.wait_tensor(c10d.reduce_scatter_tensor(wide, "sum", ranks, group))
        splits = [x.shape[0] // ranks] * ranks
        with mark(axis=axis):
            received = c10d.wait_tensor(c10d.all_to_all_single(x.contiguous(), splits, splits, group))
        return SUM_PARTS(received, ranks, dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, ctx.mesh, ctx.axis, ctx.dtype = inputs
        ctx.wire = x.dtype

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, None, None, None]:
        return all_gather(cotangent.to(ctx.wire), ctx.mesh, ctx.axis), None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        return reduce_scatter(tangent, ctx.mesh, ctx.axis, dtype=ctx.dtype)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int, None, None, None], x: Tensor, mesh: Ranks, axis: str, dtype: torch.dtype
    ) -> tuple[Tensor, int]:
        return reduce_scatter(_ranks_first(x.movedim(in_dims[0], 0), mesh.size(axis)), mesh, axis, dtype=dtype), 0


class _AllToAll(_Along):
    @staticmethod
    def forward(x: Tensor, mesh: Ranks, axis: str) -> Tensor:
        ranks = mesh.size(axis)
        splits = [x.shape[0] // ranks] * ranks
        with mark(axis=axis):
            return c10d.wait_tensor(c10d.all_to_all_single(x.contiguous(), splits, splits, mesh.group(axis)))

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, None, None]:
        return all_to_all(cotangent, ctx.mesh, ctx.axis), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        return all_to_all(tangent, ctx.mesh, ctx.axis)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int, None, None], x: Tensor, mesh: Ranks, axis: str) -> tuple[Tensor, int]:
        sent = _ranks_first(x.movedim(in_dims[0], 0), mesh.size(axis))
        return _members_first(all_to_all(sent, mesh, axis), mesh.size(axis)), 0


class _Total(_Along):
    @staticmethod
    def forward(x: Tensor, mesh: Ranks, axis: str) -> Tensor:
        return all_reduce(x, mesh, axis)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, None, None]:
        return _Spread.apply(cotangent, ctx.mesh, ctx.axis), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        return total(tangent, ctx.mesh, ctx.axis)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int, None, None], x: Tensor, mesh: Ranks, axis: str) -> tuple[Tensor, int]:
        return total(x, mesh, axis), in_dims[0]


class _Spread(_Along):
    """The transpose of `_Total`, which sums: every rank's part has the cotangent of the sum, so that is passed on."""

    @staticmethod
    def forward(x: Tensor, mesh: Ranks, axis: str) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, None, None]:
        return _Total.apply(cotangent, ctx.mesh, ctx.axis), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        return tangent.view_as(tangent)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int, None, None], x: Tensor, mesh: Ranks, axis: str) -> tuple[Tensor, int]:
        return _Spread.apply(x, mesh, axis), in_dims[0]
