"""How parameters that are given become the pieces of a state, at the lowest peak of memory.

A tree or a module is cut leaf by leaf, and cast as it is cut. A factory's model is built leaf by leaf as well: a leaf
is made, cut and let go before the next.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from fzero import tree
from fzero.errors import LayoutError, PolicyError
from fzero.kernels.storage import split_master
from fzero.modules.deferred import deferred
from fzero.modules.functional import functional
from fzero.modules.labels import warn_of_frozen
from fzero.precision.policy import Policy
from fzero.ranks.mesh import Mesh
from fzero.sharding.alike import check_agreement, check_leaves
from fzero.sharding.layout import Layout
from fzero.sharding.leaf import piece_of
from fzero.sharding.parameters import check_updated
from fzero.sharding.placement import Placement, place
from fzero.sharding.sharded import Sharded

# The pieces of parameters, and under a policy that splits masters the remainders of those.
Cut = tuple[Sharded, Sharded | None]


def cut(
    params: Any,
    mesh: Mesh,
    layout: Layout,
    policy: Policy,
    seed: int,
    frozen: Callable[[Sequence[str]], frozenset[str]] = frozenset,
) -> Cut:
    """Return this rank's pieces of parameters, as the policy stores them, and what they lack of split masters.

    Args:
        params: as `fz.init` takes them: a tree of tensors, a module, or a factory.
        mesh: the processes.
        layout: where leaves live.
        policy: how they are stored.
        seed: of the draws of a factory's model.
        frozen: of some paths, those that the optimizer leaves alone; of a module those are looked at that say so.
    """
    _check_axes(mesh, layout)
    if isinstance(params, nn.Module):
        warn_of_frozen(params, frozen)
        params = functional(params)[1]
    if callable(params):
        pieces, remainder = _from_factory(params, mesh, layout, policy, seed, frozen)
    else:
        pieces, remainder = _from_tree(params, mesh, layout, policy)
    _check_exempt(policy, pieces.paths)
    return pieces, remainder


def _check_axes(mesh: Mesh, layout: Layout) -> None:
    if not isinstance(layout, Layout):
        way_out = f"fz.zero({layout})" if type(layout) is int and 0 <= layout <= 3 else "fz.zero(3)"
        raise TypeError(f"fz.init: layout must be made by fz.zero, got {tree.describe(layout)}. Pass layout={way_out}.")
    used = {*layout.data_axes, *(axis for _, split in layout.split for axis in split)}
    if idle := [name for name, size in mesh.axes if size > 1 and name not in used]:
        raise LayoutError(
            f"fz.init: the layout says nothing of the mesh axes {idle}, so ranks along them would train apart. "
            f"Copy over them, fz.zero({layout.stage}, replicate={idle[0]!r}), or cut or split over them."
        )


def _check_exempt(policy: Policy, paths: Sequence[str]) -> None:
    if idle := [pattern for pattern in policy.exempt if not any(fnmatchcase(path, pattern) for path in paths)]:
        raise PolicyError(
            f"fz.init: the policy exempts {idle}, and no leaf has such a path. The paths are {', '.join(paths[:5])}"
            f"{', …' if len(paths) > 5 else ''}; '*' matches anything."
        )


def _from_tree(params: Any, mesh: Mesh, layout: Layout, policy: Policy) -> Cut:
    leaves, treedef = tree.flatten(params)
    paths = tree.structure_paths(treedef)
    check_leaves(leaves, paths, mesh, "fz.init")
    check_updated("fz.init", paths, leaves)
    check_agreement(leaves, paths, mesh, "fz.init")
    placed = place([tuple(leaf.shape) for leaf in leaves], treedef, mesh, layout, policy)
    return _pieces(placed, [leaf.dtype for leaf in leaves], lambda i: leaves[i].detach())


def _from_factory(
    factory: Callable[[], nn.Module],
    mesh: Mesh,
    layout: Layout,
    policy: Policy,
    seed: int,
    frozen: Callable[[Sequence[str]], frozenset[str]],
) -> Cut:
    model = deferred(factory, seed)
    warn_of_frozen(model.module, frozen)
    leaves, treedef = tree.flatten(tree.nest({name: p.detach() for name, p in model.module.named_parameters()}))
    check_updated("fz.init", tree.structure_paths(treedef), leaves)
    placed = place([tuple(leaf.shape) for leaf in leaves], treedef, mesh, layout, policy)
    if mesh.simulated:
        return _pieces(placed, [leaf.dtype for leaf in leaves], lambda i: leaves[i])
    return _pieces(placed, [leaf.dtype for leaf in leaves], lambda i: model.materialize(placed.paths[i], mesh.device))


def _pieces(placed: Placement, dtypes: Sequence[torch.dtype], leaf: Callable[[int], Tensor]) -> Cut:
    """Cut leaves one at a time, so that no two are whole together."""
    mesh, policy = placed.mesh, placed.policy
    assert policy is not None
    pieces: list[Tensor | None] = []
    remainders: list[Tensor | None] = []
    for i, (path, spec, dtype) in enumerate(zip(placed.paths, placed.specs, dtypes, strict=True)):
        own = policy.of(path)
        is_split = own.master == "split" and dtype.is_floating_point
        stored = torch.float32 if is_split else own.stored if dtype.is_floating_point else dtype
        if mesh.simulated:
            piece = torch.empty(spec.piece_numel(mesh), dtype=stored, device="meta")
        else:
            piece = piece_of(leaf(i), spec, mesh, dtype=stored)
        piece, remainder = split_master(piece) if is_split else (piece, None)
        pieces.append(piece)
        remainders.append(remainder)
    params = Sharded(tuple(pieces), placed)
    return params, Sharded(tuple(remainders), placed) if policy.master == "split" else None
