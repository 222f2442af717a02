"""Buffers of a module over the ranks: statistics that each rank has measured on its own batch, averaged.

`fz.functional(module, buffers=True)` gives a function that takes buffers and returns new ones. A step passes
them on as they are, each rank its own, or averaged:

    (loss, buffers), grads = fz.value_and_grad(loss_fn, has_aux=True)(state, buffers, batch)
    buffers = fz.average(buffers, state.mesh)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fzero import tree
from fzero.ranks.collectives import all_reduce
from fzero.ranks.mesh import Mesh
from fzero.ranks.peers import collective


def _shapes(values: Any, mesh: Mesh, axes: str | Sequence[str] | None = None) -> list[str]:
    if mesh.processes is None:
        return []
    floats = [x for x in tree.leaves(values) if isinstance(x, Tensor) and x.is_floating_point()]
    return [f"over {axes}", *(f"{tuple(x.shape)} {x.dtype}" for x in floats)] if floats else []


@collective("fz.average", _shapes)
def average(values: Any, mesh: Mesh, axes: str | Sequence[str] | None = None) -> Any:
    """Return a tree whose floating-point tensors are the means over the ranks, the same bits on every rank.

    Of batch norm's running variance that is the mean of the ranks' variances, as DDP's users average it: the spread
    of the ranks' means is not in it.

    Args:
        values: any tree, such as the buffers of a module. Its floating-point tensors have the same shapes on
            every rank; all other leaves, such as counts, stay as they are.
        mesh: where the ranks stand.
        axes: the mesh axes to average over. Default: all of them.

    Returns:
        A tree like `values`. It takes one sum an axis, in fp32 (and another in fp64, for such leaves).

    Raises:
        MeshError: the mesh has no such axis.

    Example:
        >>> from fzero.ranks.mesh import make_mesh
        >>> average({"mean": torch.tensor([1.0, 2.0]), "count": torch.tensor(3)}, make_mesh("cpu"))
        {'mean': tensor([1., 2.]), 'count': tensor(3)}
    """
    names = mesh.names if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)
    leaves, treedef = tree.flatten(values)
    where = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    for i, mean in zip(where, means([leaves[i] for i in where], mesh, names), strict=True):
        leaves[i] = mean.to(leaves[i].dtype)
    return tree.unflatten(treedef, leaves)


def means(tensors: Sequence[Tensor], mesh: Mesh, axes: Sequence[str]) -> list[Tensor]:
    """Return the means of floating-point tensors over mesh axes, in at least fp32; one sum an axis and dtype.

    Over a single rank they are the tensors themselves.
    """
    found, count = list(tensors), mesh.size(axes)
    groups: dict[torch.dtype, list[int]] = {}
    for i, x in enumerate(tensors if count > 1 else ()):
        groups.setdefault(torch.promote_types(x.dtype, torch.float32), []).append(i)
    for dtype, where in groups.items():
        total = torch.cat([tensors[i].reshape(-1).to(dtype) for i in where])
        for axis in axes:
            total = all_reduce(total, mesh, axis)
        for i, part in zip(where, (total / count).split([tensors[i].numel() for i in where]), strict=True):
            found[i] = part.reshape(tensors[i].shape)
    return found
