"""Layouts: where each leaf of a tree lives, and the trees of pieces that come of it.

A leaf is laid out in two steps. `P` splits dimensions over mesh axes (tensor parallelism), which leaves
this rank a block. ZeRO then cuts the block over the data axes: flattened, padded at its end by at most
N − 1 zeros, cut into N equal contiguous pieces. A block of under 16·N elements stays whole on every rank.

    leaf (rows, columns) ──P──▶ block ──flatten──▶ 0 1 2 3 4 5 6 0 ──cut──▶ │0 1│2 3│4 5│6 0│

Every piece is a 1-D tensor, also the whole ones, so that an update kernel sees only one kind.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import math
from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fzero import tree
from fzero._torch import torch_pytree
from fzero.collectives import all_gather, all_reduce, pad, reduce_scatter
from fzero.errors import LayoutError, MeshError
from fzero.mesh import Mesh
from fzero.peers import together
from fzero.policy import Policy

# Leaves smaller than this many elements a rank are not worth a collective's latency.
_WHOLE_BELOW = 16


class P(tuple[str | None, ...]):
    """The mesh axis that each dimension of a leaf is split over; `None` for a dimension kept whole.

    Example:
        >>> P("model", None)
        P('model', None)
    """

    def __new__(cls, *axes: str | None) -> P:
        return super().__new__(cls, axes)

    def __getnewargs__(self) -> tuple[str | None, ...]:  # for pickle and copy, which would pass one tuple
        return tuple(self)

    def __repr__(self) -> str:
        return f"P({', '.join(map(repr, self))})"


@dataclass(frozen=True)
class Layout:
    """Where parameters, gradients and moments live; made by `zero`.

    Attributes:
        stage: the ZeRO stage, 0 to 3.
        axis: data axes that leaves are cut over.
        replicate: data axes that hold copies.
        split: `(pattern of paths, P)` pairs; the first pattern that fits a path splits that leaf.
    """

    stage: int
    axis: tuple[str, ...]
    replicate: tuple[str, ...] = ()
    split: tuple[tuple[str, P], ...] = ()

    @property
    def data_axes(self) -> tuple[str, ...]:
        """The axes over which batches differ, and gradients are averaged."""
        return self.replicate + self.axis

    @property
    def gradient_cut(self) -> tuple[str, ...]:
        """The axes over which gradients and moments are cut."""
        return self.axis if self.stage >= 1 else ()

    def parameter_cut(self, policy: Policy | None) -> tuple[str, ...]:
        """The axes over which stored parameters are cut.

        A master is only read by the update, so stages 1 and 2 cut it like the moments.
        """
        has_master = policy is not None and policy.master is not None
        return self.gradient_cut if self.stage == 3 or has_master else ()

    def split_of(self, path: str) -> P:
        return next((spec for pattern, spec in self.split if fnmatch.fnmatchcase(path, pattern)), P())


def zero(
    stage: int,
    axis: str | Sequence[str] = "data",
    *,
    replicate: str | Sequence[str] = (),
    split: Mapping[str, P] | None = None,
) -> Layout:
    """Return a ZeRO layout.

    Args:
        stage: 0 copies everything to every rank; 1 and 2 cut gradients and moments (as one program they
            are the same thing); 3 cuts the parameters too.
        axis: the mesh axis, or axes, to cut over.
        replicate: mesh axes that hold copies and see different batches, such as `node` where `data` runs
            inside a node.
        split: pattern of leaf paths (`*` matches anything) to the `P` that splits such leaves.

    Raises:
        LayoutError: the stage is not 0 to 3, or an axis is named twice.

    Source: ZeRO, Rajbhandari et al. 2019, arXiv 1910.02054.

    Example:
        >>> zero(3, axis="data", replicate="node").data_axes
        ('node', 'data')
    """
    if stage not in (0, 1, 2, 3):
        raise LayoutError(f"fz.zero: there is no stage {stage!r}. Use 0, 1, 2 or 3.")
    cut = (axis,) if isinstance(axis, str) else tuple(axis)
    copies = (replicate,) if isinstance(replicate, str) else tuple(replicate)
    if twice := sorted(name for name, count in Counter(cut + copies).items() if count > 1):
        raise LayoutError(
            f"fz.zero: {twice} stand twice in axis={axis!r}, replicate={replicate!r}. Name each axis once."
        )
    return Layout(stage, cut, copies, tuple((split or {}).items()))


@dataclass(frozen=True)
class Spec:
    """How one leaf is laid out: its full shape, its dimensions' axes, the axes its flat block is cut over."""

    shape: tuple[int, ...]
    split: P
    cut: tuple[str, ...] = ()

    def block_shape(self, mesh: Mesh) -> tuple[int, ...]:
        parts = [1 if axis is None else mesh.size(axis) for axis in self.split]
        parts += [1] * (len(self.shape) - len(parts))
        return tuple(size // n for size, n in zip(self.shape, parts, strict=True))

    def block_numel(self, mesh: Mesh) -> int:
        return math.prod(self.block_shape(mesh))

    def piece_numel(self, mesh: Mesh) -> int:
        return math.ceil(self.block_numel(mesh) / mesh.size(self.cut))


@dataclass(frozen=True)
class Placement:
    """What is static in a `Sharded`: structure, paths, one `Spec` a leaf, mesh, layout, policy."""

    treedef: tree.TreeDef
    paths: tuple[str, ...]
    specs: tuple[Spec, ...]
    mesh: Mesh
    layout: Layout
    policy: Policy | None = None

    def __hash__(self) -> int:  # dataclass would hash every spec, and this is a cache key on every call
        return hash((self.paths, self.layout))

    def cut_over(self, axes: tuple[str, ...]) -> Placement:
        """Return the same leaves with their blocks cut over other axes."""
        specs = tuple(dataclasses.replace(s, cut=_cut_axes(s, self.mesh, axes)) for s in self.specs)
        return dataclasses.replace(self, specs=specs)

    def select(self, indices: Sequence[int]) -> Placement:
        """Return some of the leaves, as a flat dict from path to leaf."""
        paths = tuple(self.paths[i] for i in indices)
        treedef = tree.structure(OrderedDict.fromkeys(paths, 0))  # a dict would be sorted
        return dataclasses.replace(self, treedef=treedef, paths=paths, specs=tuple(self.specs[i] for i in indices))


@dataclass(frozen=True, eq=False)
class Sharded:
    """A tree as data: this rank's pieces, and statically everything needed to make it whole.

    Attributes:
        pieces: one 1-D tensor a leaf, in the order of `placement.paths`; `None` where a gradient does
            not exist.
        placement: structure, paths, shapes, mesh, layout and policy.
        factor: for gradients, an fp32 scalar: the value of a leaf is its pieces times this.
    """

    pieces: tuple[Tensor | None, ...]
    placement: Placement
    factor: Tensor | None = None

    @property
    def mesh(self) -> Mesh:
        return self.placement.mesh

    @property
    def layout(self) -> Layout:
        return self.placement.layout

    @property
    def policy(self) -> Policy | None:
        return self.placement.policy

    @property
    def paths(self) -> tuple[str, ...]:
        return self.placement.paths

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """The full shape of each leaf."""
        return tuple(spec.shape for spec in self.placement.specs)

    def replace(self, **changes: Any) -> Sharded:
        """Return a copy with some attributes changed."""
        return dataclasses.replace(self, **changes)

    def select(self, indices: Sequence[int]) -> Sharded:
        """Return some of the leaves, as a flat dict from path to leaf."""
        return Sharded(tuple(self.pieces[i] for i in indices), self.placement.select(indices), self.factor)

    def __repr__(self) -> str:
        total = sum(math.prod(shape) for shape in self.shapes)
        return (
            f"Sharded({len(self.paths)} leaves, {total:,} elements, ZeRO-{self.layout.stage} "
            f"over {' × '.join(f'{n}={s}' for n, s in self.mesh.axes)})"
        )


def shard(tree_: Any, mesh: Mesh, layout: Layout | P, *, policy: Policy | None = None) -> Sharded:
    """Cut a tree of full tensors into this rank's pieces.

    Args:
        tree_: any tree of tensors on the mesh's device, equal on every rank.
        mesh: the processes.
        layout: a ZeRO layout, whose placement of parameters is used; or one `P` for every leaf.
        policy: recorded in the result; it says in which dtype functions see the leaves.

    Returns:
        The pieces: copies, never views of what was given.

    Raises:
        LayoutError: a leaf is no tensor or is on another device, or a dimension does not divide.
        MeshError: the layout names an axis that the mesh does not have.

    Example:
        >>> from fzero.mesh import make_mesh
        >>> pieces = shard({"w": torch.ones(2, 3)}, make_mesh("cpu"), zero(3))
        >>> gather(pieces)["w"].shape
        torch.Size([2, 3])
    """
    if isinstance(tree_, Sharded):
        raise LayoutError("fz.shard: got a Sharded, which is cut already. Pass full tensors: fz.gather(...).")
    leaves, treedef = tree.flatten(tree_)
    paths = tree.structure_paths(treedef)
    for path, leaf in zip(paths, leaves, strict=True):
        if not isinstance(leaf, Tensor):
            raise LayoutError(f"fz.shard: leaf {path!r} is {tree.describe(leaf)}, and only tensors can be sharded.")
        if leaf.device.type != mesh.device.type and not mesh.simulated:
            raise LayoutError(
                f"fz.shard: leaf {path!r} is on {leaf.device} and the mesh is on {mesh.device}. "
                f"Move it with .to({mesh.device.type!r}), or make the mesh there: make_mesh({leaf.device.type!r})."
            )
    if isinstance(layout, P):
        layout = Layout(0, (), split=(("*", layout),))
    placed = place([tuple(leaf.shape) for leaf in leaves], treedef, mesh, layout, policy)
    if mesh.simulated:
        leaves = [leaf.to("meta") for leaf in leaves]
    pieces = tuple(piece_of(leaf.detach(), spec, mesh) for leaf, spec in zip(leaves, placed.specs, strict=True))
    return Sharded(pieces, placed)


@together("fz.gather")
def gather(sharded: Any) -> Any:
    """Return full tensors of true shapes for a `Sharded`, or for every `Sharded` in a tree.

    A collective: every rank calls it. What comes back shares no memory with the pieces. Of gradients it
    returns the true values: leaf × factor.
    """
    nodes, treedef = tree.flatten(sharded, is_leaf=lambda x: isinstance(x, Sharded))
    for node in nodes:
        if isinstance(node, Sharded):
            check_not_simulated(node, "fz.gather")
    return tree.unflatten(treedef, [_gather_node(node) for node in nodes])


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
        owns_memory = node.factor is not None or node.mesh.size(spec.cut + tuple(a for a in spec.split if a)) > 1
        whole.append(leaf if owns_memory else leaf.clone())
    return tree.unflatten(node.placement.treedef, whole)


def scaled(leaf: Tensor, factor: Tensor) -> Tensor:
    """Return the value of a gradient leaf, multiplied in at least float32."""
    return (leaf.to(torch.promote_types(leaf.dtype, torch.float32)) * factor).to(leaf.dtype)


def check_not_simulated(sharded: Sharded, call: str) -> None:
    """Raise where values are asked of a world that does not exist. Inside a trace there are none to ask."""
    abstract = all(piece is None or piece.device.type == "meta" for piece in sharded.pieces)
    if sharded.mesh.simulated and abstract:
        raise MeshError(f"{call}: the mesh is simulated, so there are no values. Use fz.trace, or make a real mesh.")


def place(
    shapes: Sequence[tuple[int, ...]],
    treedef: tree.TreeDef,
    mesh: Mesh,
    layout: Layout,
    policy: Policy | None = None,
) -> Placement:
    """Return the placement of parameters with these shapes; nothing is moved."""
    if not isinstance(layout, Layout):
        raise TypeError(f"fz.shard: expected a layout, such as fz.zero(3), got {tree.describe(layout)}.")
    mesh.size(layout.data_axes)  # every axis exists
    paths = tuple(tree.structure_paths(treedef))
    specs = []
    for path, shape in zip(paths, shapes, strict=True):
        spec = Spec(shape, layout.split_of(path))
        _check_split(path, spec, mesh, layout)
        specs.append(dataclasses.replace(spec, cut=_cut_axes(spec, mesh, layout.parameter_cut(policy))))
    return Placement(treedef, paths, tuple(specs), mesh, layout, policy)


def join(piece: Tensor, spec: Spec, mesh: Mesh) -> Tensor:
    """Make a leaf whole from the ranks' pieces. Differentiable; may alias `piece` where nothing moves."""
    leaf = join_block(piece, spec, mesh).reshape(spec.block_shape(mesh))
    for dim, axis in enumerate(spec.split):
        if axis is not None:
            leaf = all_gather(leaf.movedim(dim, 0), mesh, axis).movedim(0, dim)
    return leaf


def join_block(piece: Tensor, spec: Spec, mesh: Mesh) -> Tensor:
    """Make a flattened block whole from its pieces: what `own_piece` undoes."""
    flat = piece
    for axis in reversed(spec.cut):  # the last axis varies fastest, so its pieces are neighbours
        flat = all_gather(flat, mesh, axis)
    numel = spec.block_numel(mesh)
    return flat if flat.shape[0] == numel else flat[:numel]


def piece_of(leaf: Tensor, spec: Spec, mesh: Mesh, *, dtype: torch.dtype | None = None) -> Tensor:
    """Return this rank's piece of a leaf that every rank has whole, as `dtype`: a copy, and the only one made."""
    flat, numel = block_of(leaf, spec, mesh), spec.piece_numel(mesh)
    start = min(mesh.index(spec.cut) * numel, flat.shape[0])
    part = flat[start : start + numel].to(dtype or leaf.dtype, copy=True)
    return pad(part, numel)


def block_of(leaf: Tensor, spec: Spec, mesh: Mesh) -> Tensor:
    """Return this rank's block of a whole leaf, flattened. May alias it."""
    for dim, axis in enumerate(spec.split):
        if axis is not None and mesh.size(axis) > 1:
            leaf = leaf.unflatten(dim, (mesh.size(axis), -1)).index_select(dim, mesh.index_tensor(axis)).squeeze(dim)
    return leaf.reshape(-1)


def own_piece(flat: Tensor, spec: Spec, mesh: Mesh) -> Tensor:
    """Return this rank's piece of a flattened block. May alias it where nothing is cut."""
    ranks = mesh.size(spec.cut)
    if ranks == 1:
        return flat
    numel = spec.piece_numel(mesh)
    # A row picked by an index tensor, not a slice: a trace must be the same on every rank.
    return pad(flat, ranks * numel).view(ranks, numel).index_select(0, mesh.index_tensor(spec.cut)).squeeze(0)


def reduce_leaf(leaf: Tensor, spec: Spec, mesh: Mesh, *, axes: tuple[str, ...], dtype: torch.dtype) -> Tensor:
    """Sum a full leaf over the ranks of the data axes; return this rank's piece of the sum, as `dtype`.

    Reduce-scatters over the axes that cut the leaf, outermost first so that later wires carry less; then
    all-reduces the piece over the axes that hold copies.
    """
    flat = block_of(leaf, spec, mesh)
    if mesh.size(spec.cut) > 1:
        flat = pad(flat, mesh.size(spec.cut) * spec.piece_numel(mesh))
    for axis in spec.cut:
        flat = reduce_scatter(flat, mesh, axis, dtype=dtype)
    for axis in axes:
        if axis not in spec.cut:
            flat = all_reduce(flat, mesh, axis, dtype=dtype)
    return flat.to(dtype)


def _cut_axes(spec: Spec, mesh: Mesh, axes: tuple[str, ...]) -> tuple[str, ...]:
    return axes if spec.block_numel(mesh) >= _WHOLE_BELOW * mesh.size(axes) else ()


def _check_split(path: str, spec: Spec, mesh: Mesh, layout: Layout) -> None:
    named = Counter([*filter(None, spec.split), *layout.data_axes])
    if twice := [axis for axis in spec.split if axis is not None and named[axis] > 1]:
        raise LayoutError(
            f"fz.shard: {spec.split} splits leaf {path!r} over {twice[0]!r}, which another dimension or the data axes "
            f"{layout.data_axes} take already. Give each its own mesh axis."
        )
    if len(spec.split) > len(spec.shape):
        raise LayoutError(f"fz.shard: {spec.split} names more dimensions than leaf {path!r} has: {spec.shape}.")
    for dim, axis in enumerate(spec.split):
        if axis is not None and spec.shape[dim] % mesh.size(axis):
            raise LayoutError(
                f"fz.shard: {spec.split} splits dimension {dim} of leaf {path!r}, of size {spec.shape[dim]}, "
                f"over {mesh.size(axis)} ranks of {axis!r}, which does not divide it. Split another dimension."
            )


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
