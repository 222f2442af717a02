"""Sharded trees: the pieces of this rank, made of full leaves and gathered again."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from fzero import tree
from fzero._torch import FakeTensor, torch_pytree
from fzero.calls.chosen import chosen, pruned
from fzero.display.html import html_of
from fzero.display.listing import of_sharded
from fzero.display.text import text_of
from fzero.errors import LayoutError, MeshError
from fzero.precision.policy import Policy
from fzero.ranks.mesh import Mesh
from fzero.ranks.peers import collective
from fzero.sharding.alike import check_leaves
from fzero.sharding.layout import Layout
from fzero.sharding.leaf import P, join, piece_of, scaled
from fzero.sharding.placement import Placement, place
from fzero.wrapped import unwrapped


@dataclass(frozen=True, eq=False)
class Sharded:
    """A tree as data: this rank's pieces, and statically everything needed to make it whole.

    Attributes:
        pieces: one 1-D tensor a leaf, in the order of `placement.paths`; `None` where a gradient does
            not exist.
        placement: structure, paths, shapes, mesh, layout and policy.
        factor: for gradients, an fp32 scalar: the value of a leaf is its pieces times this.

    Example:
        >>> from fzero.ranks.mesh import make_mesh
        >>> from fzero.sharding.layout import zero
        >>> sharded = shard({"w": torch.ones(2, 3)}, make_mesh("cpu"), zero(3))
        >>> sharded.paths, sharded.shapes, sharded.pieces[0].shape
        (('w',), ((2, 3),), torch.Size([6]))
    """

    pieces: tuple[Tensor | None, ...]
    placement: Placement
    factor: Tensor | None = None

    @property
    def mesh(self) -> Mesh:
        """The processes that hold the pieces."""
        return self.placement.mesh

    @property
    def layout(self) -> Layout:
        """How the leaves were cut."""
        return self.placement.layout

    @property
    def policy(self) -> Policy | None:
        """The precision of the leaves; `None` for a tree without one: functions see the dtypes that are stored."""
        return self.placement.policy

    @property
    def paths(self) -> tuple[str, ...]:
        """The dotted path of each leaf, such as `blocks.0.weight`."""
        return self.placement.paths

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """The full shape of each leaf."""
        return tuple(spec.shape for spec in self.placement.specs)

    @property
    def multiplier(self) -> Tensor:
        """The factor; one where there is none."""
        return torch.ones((), device=self.mesh.device) if self.factor is None else self.factor

    def replace(self, **changes: Any) -> Sharded:
        """Return a copy with some attributes changed."""
        return dataclasses.replace(self, **changes)

    def select(self, indices: Sequence[int]) -> Sharded:
        """Return some of the leaves, as a flat dict from path to leaf."""
        return Sharded(tuple(self.pieces[i] for i in indices), self.placement.select(indices), self.factor)

    def __getitem__(self, key: object) -> NoReturn:
        below = [path for path in self.paths if path == key or path.startswith(f"{key}.")]
        only = None if not below else key if below == [key] else f"{key}.*"
        way_out = f"fz.gather(sharded, only={only!r})" if only else f"fz.gather(sharded)[{key!r}]"
        raise TypeError(
            f"fz.Sharded: [{key!r}]: a Sharded holds this rank's pieces and is not indexed. Gather what you want on "
            f"every rank: {way_out}. Its leaves are {', '.join(self.paths[:5])}{', …' if len(self.paths) > 5 else ''}."
        )

    def __reduce__(self) -> Any:
        # Pieces are of a place in the mesh, which a pickle has to name: a mesh stands for whatever process it is in.
        return _loaded, (self.pieces, self.placement, self.factor, _place_of(self.placement))

    def __repr__(self) -> str:
        return text_of(of_sharded(self))

    def _repr_html_(self) -> str:
        return html_of(of_sharded(self))


def shard(tree: Any, mesh: Mesh, layout: Layout | P, *, policy: Policy | None = None) -> Sharded:
    """Cut a tree of full tensors into this rank's pieces.

    Args:
        tree: any tree of tensors on the mesh's device, equal on every rank.
        mesh: the processes.
        layout: a ZeRO layout, whose placement of parameters is used; or one `P` for every leaf.
        policy: recorded in the result; it says in which dtype functions see the leaves.

    Returns:
        The pieces: copies, never views of what was given.

    Raises:
        LayoutError: a leaf is no tensor or is on another device, or a dimension does not divide.
        MeshError: the layout names an axis that the mesh does not have.

    Example:
        >>> from fzero.ranks.mesh import make_mesh
        >>> from fzero.sharding.layout import zero
        >>> pieces = shard({"w": torch.ones(2, 3)}, make_mesh("cpu"), zero(3))
        >>> gather(pieces)["w"].shape
        torch.Size([2, 3])
    """
    return _shard(tree, mesh, layout, policy)


def _shard(tree_: Any, mesh: Mesh, layout: Layout | P, policy: Policy | None) -> Sharded:
    if not isinstance(mesh, Mesh):
        raise TypeError(f"fz.shard: mesh: expected a mesh, such as fz.make_mesh(), got {tree.describe(mesh)}.")
    if policy is not None and not isinstance(policy, Policy):
        raise TypeError(f"fz.shard: policy: expected a Policy, such as fz.policy('bf16'), got {policy!r}.")
    if isinstance(tree_, Sharded):
        raise LayoutError("fz.shard: got a Sharded, which is cut already. Pass full tensors: fz.gather(...).")
    leaves, treedef = tree.flatten(tree_)
    paths = tree.structure_paths(treedef)
    check_leaves(leaves, paths, mesh, "fz.shard")
    if isinstance(layout, P):
        layout = Layout(0, (), split=(("*", layout),))
    placed = place([tuple(leaf.shape) for leaf in leaves], treedef, mesh, layout, policy)
    if mesh.simulated:
        leaves = [leaf.to("meta") for leaf in leaves]
    pieces = tuple(piece_of(leaf.detach(), spec, mesh) for leaf, spec in zip(leaves, placed.specs, strict=True))
    return Sharded(pieces, placed)


@collective("fz.gather", lambda sharded, *, only=None: held(sharded if only is None else _some(sharded, only)))
def gather(sharded: Any, *, only: str | Sequence[str] | None = None) -> Any:
    """Return full tensors of true shapes for a `Sharded`, or for every `Sharded` in a tree.

    A collective: every rank calls it.

    Args:
        sharded: a `Sharded`, or any tree; a `State` comes back with full trees for its parameters and moments.
        only: of one `Sharded`, the leaves to gather: a pattern of dotted paths (`*` matches anything), or several. The
            others cost nothing.

    Returns:
        The tree that was cut, on every rank, in the pieces' dtype. It shares no memory with the pieces. Of
        gradients, the true values: leaf × factor; `None` where there is none. With `only`, the chosen leaves in nested
        dicts, whose keys are what the tree is indexed by.

    Raises:
        DonatedError: the pieces' memory was donated.
        MeshError: the mesh is simulated.
        TreeError: a pattern of `only` fits no leaf.
        TypeError: `only` is no pattern, or is asked of something else than a `Sharded`.

    Example:
        >>> from fzero.ranks.mesh import make_mesh
        >>> from fzero.sharding.layout import zero
        >>> pieces = shard({"w": torch.ones(2), "blocks": [torch.zeros(1), torch.ones(1)]}, make_mesh("cpu"), zero(3))
        >>> gather(pieces)
        {'w': tensor([1., 1.]), 'blocks': [tensor([0.]), tensor([1.])]}
        >>> gather(pieces, only="blocks.1")
        {'blocks': {1: tensor([1.])}}
    """
    if only is not None:
        some = _some(sharded, only)
        check_not_simulated(some, "fz.gather")
        indices = chosen("fz.gather", sharded.paths, only)
        return pruned(sharded.placement.treedef, indices, list(_gather_node(some).values()))
    nodes, treedef = tree.flatten(sharded, is_leaf=lambda x: isinstance(x, Sharded))
    for node in nodes:
        if isinstance(node, Sharded):
            check_not_simulated(node, "fz.gather")
    return tree.unflatten(treedef, [_gather_node(node) for node in nodes])


def _some(sharded: Any, only: str | Sequence[str]) -> Sharded:
    """Return the leaves of a `Sharded` that were asked for."""
    if not isinstance(sharded, Sharded):
        way_out = "fz.gather(state.params, only=...)" if hasattr(sharded, "params") else "fz.gather(tree)"
        raise TypeError(
            f"fz.gather: only= chooses leaves of one Sharded, such as parameters or gradients, got "
            f"{tree.describe(sharded)}. Write {way_out}."
        )
    return sharded.select(chosen("fz.gather", sharded.paths, only))


def _gather_node(node: Any) -> Any:
    if not isinstance(node, Sharded):
        return node.clone() if isinstance(node, Tensor) else node
    whole: list[Tensor | None] = []
    for piece, spec in zip(node.pieces, node.placement.specs, strict=True):
        if piece is None:
            whole.append(None)
            continue
        leaf = join(piece, spec, node.mesh)
        if node.factor is not None:
            leaf = scaled(leaf, node.factor)
        owns_memory = node.factor is not None or node.mesh.size(spec.axes) > 1
        whole.append(leaf if owns_memory else leaf.clone())
    return tree.unflatten(node.placement.treedef, whole)


def held(*arguments: Any) -> list[str]:
    """Return what the collectives of the `Sharded` in a tree depend on: each leaf's path, shape, cut, dtype; policies.

    Ranks compare these lines of text before they run. There are none without ranks.
    """
    lines: list[str] = []
    for node in tree.leaves(arguments, is_leaf=lambda x: isinstance(x, Sharded)):
        if isinstance(node, Sharded):
            rows = zip(node.placement.lines, node.pieces, strict=False)
            lines += [f"{line} {None if piece is None else piece.dtype}" for line, piece in rows]
            lines += [node.placement.policy_line] if node.placement.lines else []
    return lines


def check_not_simulated(sharded: Sharded, call: str) -> None:
    """Raise where values are asked of a world that does not exist. Inside a trace there are none to ask."""
    if not sharded.mesh.simulated:
        return
    pieces = [piece for piece in sharded.pieces if piece is not None]
    if all(piece.device.type == "meta" for piece in pieces):
        raise MeshError(f"{call}: the mesh is simulated, so there are no values. Use fz.trace, or make a real mesh.")
    is_cut = any(spec.axes for spec in sharded.placement.specs)
    if is_cut and not any(isinstance(unwrapped(piece), FakeTensor) for piece in pieces):
        ranks = sharded.mesh.size(sharded.mesh.names)
        raise MeshError(
            f"{call}: these are the pieces of one rank of {ranks}, loaded where the others are not. Load them after "
            f"fz.make_mesh() in {ranks} processes, each on its own rank; or pickle what fz.gather returns."
        )


def _place_of(placement: Placement) -> tuple[int, int, int] | None:
    """Return the number of this rank's pieces, its rank, and how many ranks there are; `None` for whole leaves."""
    mesh, axes = placement.mesh, placement.axes
    if mesh.simulated or mesh.size(axes) == 1:
        return None
    return mesh.index(axes), dist.get_rank(), mesh.size(mesh.names)


def _loaded(
    pieces: tuple[Tensor | None, ...], placement: Placement, factor: Tensor | None, saved: tuple[int, int, int] | None
) -> Sharded:
    """Return what was pickled or copied, on a rank that holds the same pieces, or where there are no ranks.

    A process by itself may look at the pieces of one rank; to it their mesh is a simulated one.
    """
    here = _place_of(placement)
    if saved is not None and dist.is_initialized() and (here is None or here[0] != saved[0]):
        raise MeshError(
            f"fz: these are the pieces of rank {saved[1]} of {saved[2]}, pickled there, and this is rank "
            f"{dist.get_rank()} of {dist.get_world_size()}, which holds others. Pickle what fz.gather returns, which "
            f"any process can load; or load on each rank what it pickled."
        )
    return Sharded(pieces, placement, factor)


def _flatten_sharded(x: Sharded) -> tuple[tuple[Tensor | None, ...], Placement, tuple[str, ...]]:
    return (*x.pieces, x.factor), x.placement, (*x.placement.paths, "factor")


def _unflatten_sharded(placement: Placement, children: Iterable[Tensor | None]) -> Sharded:
    *pieces, factor = children
    return Sharded(tuple(pieces), placement, factor)


def _torch_flatten_sharded(x: Sharded) -> tuple[list[Tensor], tuple[Placement, tuple[bool, ...]]]:
    children = (*x.pieces, x.factor)
    return [c for c in children if c is not None], (x.placement, tuple(c is not None for c in children))


def _torch_unflatten_sharded(children: Iterable[Tensor], context: tuple[Placement, tuple[bool, ...]]) -> Sharded:
    placement, present = context
    rest = iter(children)
    return _unflatten_sharded(placement, [next(rest) if here else None for here in present])


tree.register(Sharded, _flatten_sharded, _unflatten_sharded)
# torch.func takes its trees from torch, where None is a leaf, and no transform takes such a leaf.
torch_pytree.register_pytree_node(Sharded, _torch_flatten_sharded, _torch_unflatten_sharded)
