"""Residuals: what a forward leaves for its backward, as data, and as a table to read."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fzero import tree
from fzero.errors import ResidualsError
from fzero.program.graph.partition import Halves, Saved
from fzero.program.signature import Signature


@dataclass(frozen=True)
class Residuals:
    """What a forward leaves for its backward: a pytree.

    Attributes:
        pieces: tensors of sharded primals that the backward reads, by reference: nothing is copied.
        saved: all else that it reads. An argument or output of the forward stands here as it is.
        signature: the forward's arguments without their tensors, by which the backward is found.
        program: a hash of the backward: residuals of another function are refused.

    Example:
        >>> from fzero.autodiff.split_vjp import split_vjp
        >>> forward, backward = split_vjp(lambda w, x: torch.tanh(w * x))
        >>> out, residuals = forward(torch.ones(3), torch.ones(3))
        >>> residuals
        Residuals(3 tensors saved, 36 bytes; 0 by reference)
        >>> len(backward(residuals, torch.ones(3)))
        2
    """

    pieces: tuple[Tensor, ...]
    saved: tuple[Tensor, ...]
    signature: Signature = field(repr=False)
    program: str = field(repr=False)

    @property
    def nbytes(self) -> int:
        """Bytes of `saved` on this rank."""
        return sum(x.numel() * x.element_size() for x in self.saved)

    def to(self, device: torch.device | str) -> Residuals:
        """Return residuals with `saved` on another device; the pieces stay where their state is."""
        return self.replace(saved=tuple(x.to(device) for x in self.saved))

    def replace(self, **changes: Any) -> Residuals:
        """Return a copy with some attributes changed."""
        return dataclasses.replace(self, **changes)

    def __repr__(self) -> str:
        return f"Residuals({len(self.saved)} tensors saved, {self.nbytes:,} bytes; {len(self.pieces)} by reference)"


tree.register(
    Residuals,
    lambda r: ((r.pieces, r.saved), (r.signature, r.program), ("pieces", "saved")),
    lambda static, children: Residuals(children[0], children[1], *static),
)


_UNCHANGED = "Pass what the forward of this function returned."


class SavedResiduals(tuple[Saved, ...]):
    """What a forward would save, largest first: printed, a table of bytes, shapes, operators and lines.

    Example:
        >>> from fzero.autodiff.split_vjp import residuals
        >>> saved = residuals(torch.tanh)(torch.ones(3))
        >>> saved.nbytes, saved[0].shape, saved[0].dtype
        (12, (3,), torch.float32)
    """

    @property
    def nbytes(self) -> int:
        """Bytes of all that is saved, on this rank."""
        return sum(saved.nbytes for saved in self)

    def __repr__(self) -> str:
        rows = [(f"{s.nbytes:,}", _type(s), s.source, _place(s)) for s in self]
        widths = [max((len(row[i]) for row in rows), default=0) for i in range(3)]
        lines = [f"{a:>{widths[0]}}  {b:<{widths[1]}}  {c:<{widths[2]}}  {d}".rstrip() for a, b, c, d in rows]
        return "\n".join([*lines, f"{self.nbytes:,} bytes in {len(self)} tensors"])


def check_held(held: Sequence[Tensor], halves: Halves) -> list[Tensor]:
    """Return the tensors of residuals as the backward was traced for them.

    Raises:
        ResidualsError: they are others.
        DonatedError: the memory of one was donated.
    """
    inputs = halves.backward.module.graph.find_nodes(op="placeholder")
    expected = [node.meta["val"] for node in inputs][: len(halves.references) + len(halves.sources)]
    names = [
        *halves.backward.inputs[: len(halves.references)],
        *(f"saved.{i} ({s.source})" for i, s in enumerate(halves.saved)),
    ]
    if len(held) != len(expected):
        raise ResidualsError(
            f"fz.split_vjp: backward expected residuals of {len(expected)} tensors, and got {len(held)}. {_UNCHANGED}"
        )
    for name, x, like in zip(names, held, expected, strict=True):
        if (x.shape, x.dtype) != (like.shape, like.dtype) or not _is_where_it_belongs(x, like):
            moved = (x.shape, x.dtype) == (like.shape, like.dtype)
            way_out = f"Move residuals back before: residuals.to({str(like.device)!r})." if moved else _UNCHANGED
            raise ResidualsError(
                f"fz.split_vjp: backward expected {name} as {tree.describe(like)} on {like.device}, and got "
                f"{tree.describe(x)} on {x.device}. {way_out}"
            )

    # Views are made again of what is saved: they need the strides of the trace, which a copy to elsewhere may lose.
    return [
        x
        if x.stride() == like.stride() or 0 in like.stride()
        else torch.empty_strided(like.shape, like.stride(), dtype=x.dtype, device=x.device).copy_(x)
        for x, like in zip(held, expected, strict=True)
    ]


def _is_where_it_belongs(x: Tensor, like: Tensor) -> bool:
    """Whether a residual is on the device of the trace.

    cuDNN's attention leaves the seed and the offset of its draws, an integer each, on the CPU, and its fake form says
    that they are on the GPU. So an integer may be on the CPU.
    """
    return x.device == like.device or (x.device.type == "cpu" and x.numel() == 1 and not x.is_floating_point())


def _type(saved: Saved) -> str:
    return f"{str(saved.dtype).removeprefix('torch.')}{list(saved.shape)}"


def _place(saved: Saved) -> str:
    parts = [f"in {saved.block}"] if saved.block else []
    if saved.line is not None:
        file, number, function = saved.line
        parts.append(f"{file}:{number} ({function})")
    return " at ".join(parts) if len(parts) == 2 else "".join(parts)
