"""Directions in the space of parameters: what forward mode and power iteration move along.

`torch.func.jvp` takes tangents whose tensors look like the primal's, so a direction is a `Sharded` like the parameters:
no factor, every leaf there, cut and typed as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fzero.random.bits import leaf_keys, normal, signed
from fzero.ranks.peers import collective
from fzero.sharding.algebra import add, check_sharded, on_floats
from fzero.sharding.leaf import first_elements
from fzero.sharding.sharded import Sharded, held


@collective("fz.like", held)
def like(a: Sharded, example: Sharded) -> Sharded:
    """Return the values of `a` cut, stored and typed as `example` is: a gradient as a direction for parameters.

    A gradient's tensors need not look like the parameters': it has a factor, has `None` at frozen leaves, may be in
    another dtype, and at stages 1 and 2 is cut where parameters are whole.

    Args:
        a: a gradient, or another tree.
        example: parameters, whose paths and shapes it has; their values do not matter.

    Returns:
        A `Sharded` like `example`, zero where `a` has `None`.

    Raises:
        TypeError, TreeError, LayoutError: as `fz.dot`.

    Example:
        >>> import fzero as fz
        >>> params = fz.shard(torch.ones(4), fz.make_mesh("cpu"), fz.zero(1))
        >>> direction = like(fz.grad(lambda p: (3 * p).sum())(params), params)
        >>> direction.factor, fz.gather(direction)
        (None, tensor([3., 3., 3., 3.]))
    """
    return add(zeros_like(example).replace(factor=None), a)


def zeros_like(example: Sharded) -> Sharded:
    """Return a sharded tree of zeros.

    Args:
        example: its structure, placement, dtypes and `None`s are the result's.

    Raises:
        TypeError: `example` is no `Sharded`.

    Example:
        >>> import fzero as fz
        >>> fz.norm(zeros_like(fz.shard(torch.ones(4), fz.make_mesh("cpu"), fz.zero(3))))
        tensor(0.)
    """
    check_sharded(example, "fz.zeros_like")
    return example.replace(pieces=tuple(None if x is None else torch.zeros_like(x) for x in example.pieces))


def random_like(example: Sharded, key: int | Tensor) -> Sharded:
    """Return a sharded tree of standard normal draws, without a factor: a random direction.

    A draw depends on the key, the leaf's path and the element's index, and not on the number of ranks or the stage.

    Args:
        example: its structure, placement, dtypes and `None`s are the result's. Leaves that are not floating-point
            are zero.
        key: an integer, or an int32 tensor of shape ().

    Raises:
        TypeError: `example` is no `Sharded`, or a leaf is complex.

    Example:
        >>> import fzero as fz
        >>> direction = random_like(fz.shard(torch.ones(4), fz.make_mesh("cpu"), fz.zero(3)), key=0)
        >>> fz.gather(direction).shape
        torch.Size([4])
    """
    mesh = example.mesh
    seed = key if isinstance(key, Tensor) else torch.tensor(signed(key), dtype=torch.int32, device=mesh.device)

    def drawn(i: int, x: Tensor) -> Tensor:
        if x.is_complex():
            raise TypeError(
                f"fz.random_like: leaf {example.paths[i]!r} is {x.dtype}, and draws are real. Store its real and "
                f"imaginary parts: torch.view_as_real(leaf)."
            )
        spec = example.placement.specs[i]
        numel, length = spec.piece_numel(mesh), spec.block_numel(mesh)
        first, number = mesh.index_tensor(spec.cut) * signed(numel), first_elements([spec], mesh)[0]
        draws = normal(leaf_keys(seed.to(torch.int32), torch.zeros_like(first), example.paths[i]), number, numel)
        # What pads the last pieces is no part of the leaf.
        is_there = torch.arange(numel, device=mesh.device) < length - first.to(torch.int64)
        return torch.where(is_there, draws, 0.0).to(x.dtype)

    return on_floats(drawn, zeros_like(example)).replace(factor=None)
