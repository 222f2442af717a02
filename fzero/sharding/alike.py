"""Whether leaves can be sharded, and whether all ranks hold the same."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fzero import tree
from fzero._torch import FakeTensor
from fzero.errors import LayoutError
from fzero.ranks.collectives import all_gather
from fzero.ranks.mesh import Mesh
from fzero.ranks.peers import collective
from fzero.sharding.parameters import check_dense


def check_leaves(leaves: Sequence[Any], paths: Sequence[str], mesh: Mesh, call: str) -> None:
    """Raise where a leaf is no tensor, or is not where the mesh keeps its tensors."""
    for path, leaf in zip(paths, leaves, strict=True):
        if not isinstance(leaf, Tensor):
            raise LayoutError(f"{call}: leaf {path!r} is {tree.describe(leaf)}, and only tensors can be sharded.")
        check_dense(call, path, leaf)
        if leaf.device.type != mesh.device.type and not mesh.simulated:
            raise LayoutError(
                f"{call}: leaf {path!r} is on {leaf.device} and the mesh is on {mesh.device}. "
                f"Move it with .to({mesh.device.type!r}), or make the mesh there: make_mesh({leaf.device.type!r})."
            )


def check_agreement(leaves: Sequence[Tensor], paths: Sequence[str], mesh: Mesh, call: str) -> None:
    """Raise on every rank if ranks hold different leaves: pieces of different trees make no tree.

    Compares names, shapes, dtypes and a checksum of each leaf's bits, by two small all-gathers an axis.
    """
    if mesh.processes is None or any(isinstance(leaf, FakeTensor) for leaf in leaves):
        return
    compared = collective(call, lambda *_: [f"leaves are compared over {dict(mesh.axes)}"])(_check_agreement)
    compared(leaves, paths, mesh, call)


def _check_agreement(leaves: Sequence[Tensor], paths: Sequence[str], mesh: Mesh, call: str) -> None:
    text = repr([(path, tuple(leaf.shape), leaf.dtype) for path, leaf in zip(paths, leaves, strict=True)])
    if not _agree(torch.tensor([zlib.crc32(text.encode())], device=mesh.device), mesh).all():
        raise LayoutError(f"{call}: the ranks hold trees of different names, shapes or dtypes. Build the same model.")
    if leaves:
        agree = _agree(torch.stack([_checksum(leaf) for leaf in leaves]), mesh)
        if different := [path for path, same in zip(paths, agree.tolist(), strict=True) if not same]:
            raise LayoutError(
                f"{call}: the ranks hold different values at {', '.join(different[:5])}"
                f"{f' and {len(different) - 5} more' if len(different) > 5 else ''}. Seed every rank alike before "
                f"building the model, or pass a factory: fz.init draws the same values on all ranks."
            )


def _agree(x: Tensor, mesh: Mesh) -> Tensor:
    """Return, for each element, whether all ranks have the same."""
    same = torch.ones_like(x, dtype=torch.bool)
    for axis in mesh.names:
        rows = all_gather(torch.stack([x, same.to(x.dtype)]), mesh, axis).view(-1, 2, x.shape[0])
        same = (rows[:, 0] == rows[0, 0]).all(0) & rows[:, 1].all(0)
    return same


def _checksum(leaf: Tensor) -> Tensor:
    """Return the sum of a leaf's bits taken as integers."""
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = leaf.detach().contiguous()
    bits = torch.view_as_real(bits) if bits.is_complex() else bits
    return bits.view(integers[bits.element_size()]).sum(dtype=torch.int64)
