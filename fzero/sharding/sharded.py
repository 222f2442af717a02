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
import functools
import zlib
from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fzero import tree
from fzero._torch import FakeTensor, torch_pytree
from fzero.calls import shown
from fzero.calls.arguments import named
from fzero.calls.chosen import chosen, pruned
from fzero.display.html import html_of
from fzero.display.listing import of_sharded
from fzero.display.text import text_of
from fzero.errors import LayoutError, MeshError
from fzero.precision.policy import Policy
from fzero.ranks.collectives import all_gather
from fzero.ranks.mesh import Mesh
from fzero.ranks.peers import collective
from fzero.sharding.leaf import P, Spec, cut_axes, join, piece_of, scaled
from fzero.sharding.parameters import check_dense


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
        return self.gradient_cut if self.stage == 3 or (policy is not None and policy.has_master) else ()

    def split_of(self, path: str) -> P:
        return next((spec for pattern, spec in self.split if fnmatch.fnmatchcase(path, pattern)), P())

    def __repr__(self) -> str:
        axes = {"axis": self.axis} if self.axis != ("data",) else {}
        axes |= {"replicate": self.replicate} if self.replicate else {}
        named = {name: names[0] if len(names) == 1 else names for name, names in axes.items()}
        return shown.call("zero", self.stage, **named, **({"split": dict(self.split)} if self.split else {}))


@named("fz.zero")
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
    cut, copies = _axes("axis", axis), _axes("replicate", replicate)
    for pattern, spec in (split or {}).items():
        if not isinstance(pattern, str) or not isinstance(spec, P):
            raise LayoutError(
                f"fz.zero: split={split!r}; expected a dict from patterns of paths to P, such as "
                f"{{'*.weight': fz.P('model', None)}}."
            )
    if twice := sorted(name for name, count in Counter(cut + copies).items() if count > 1):
        raise LayoutError(
            f"fz.zero: {twice} stand twice in axis={axis!r}, replicate={replicate!r}. Name each axis once."
        )
    return Layout(stage, cut, copies, tuple((split or {}).items()))


def _axes(name: str, given: str | Sequence[str]) -> tuple[str, ...]:
    axes = (given,) if isinstance(given, str) else given
    if not isinstance(axes, tuple | list) or not all(isinstance(axis, str) for axis in axes):
        raise LayoutError(f"fz.zero: {name}={given!r}; expected the name of a mesh axis, or several in a tuple.")
    return tuple(axes)


@dataclass(frozen=True)
class Placement:
    """What is static in a `Sharded`: structure, paths, one `Spec` a leaf, mesh, layout, policy."""

    treedef: tree.TreeDef
    paths: tuple[str, ...]
    specs: tuple[Spec, ...]
    mesh: Mesh
    layout: Layout
    policy: Policy | None = None

    @functools.cached_property
    def lines(self) -> tuple[str, ...]:
        """What collectives on the leaves depend on, one line each, the same on every rank; none on one rank."""
        if self.mesh.processes is None:
            return ()
        axes, stage = dict(self.mesh.axes), self.layout.stage
        rows = zip(self.paths, self.specs, strict=True)
        return tuple(f"{path}: {spec.shape} over {spec.cut} {spec.split} of {axes}, {stage}" for path, spec in rows)

    def __hash__(self) -> int:  # dataclass would hash every spec, and this is a cache key on every call
        return hash((self.paths, self.layout))

    def policy_of(self, path: str) -> Policy | None:
        """Return the policy of one leaf, which may be exempt from that of the others."""
        return None if self.policy is None else self.policy.of(path)

    def cut_over(self, axes: tuple[str, ...]) -> Placement:
        """Return the same leaves with their blocks cut over other axes."""
        specs = tuple(dataclasses.replace(s, cut=cut_axes(s, self.mesh, axes)) for s in self.specs)
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
        owns_memory = node.factor is not None or node.mesh.size(spec.cut + tuple(a for a in spec.split if a)) > 1
        whole.append(leaf if owns_memory else leaf.clone())
    return tree.unflatten(node.placement.treedef, whole)


def held(*arguments: Any) -> list[str]:
    """Return what collectives on the `Sharded` in a tree depend on, as lines of text; none if they are not cut."""
    lines: list[str] = []
    for node in tree.leaves(arguments, is_leaf=lambda x: isinstance(x, Sharded)):
        if isinstance(node, Sharded):
            rows = zip(node.placement.lines, node.pieces, strict=False)
            lines += [f"{line} {None if piece is None else piece.dtype}" for line, piece in rows]
    return lines


def check_not_simulated(sharded: Sharded, call: str) -> None:
    """Raise where values are asked of a world that does not exist. Inside a trace there are none to ask."""
    abstract = all(piece is None or piece.device.type == "meta" for piece in sharded.pieces)
    if sharded.mesh.simulated and abstract:
        raise MeshError(f"{call}: the mesh is simulated, so there are no values. Use fz.trace, or make a real mesh.")


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
    if twice := sorted({path for path in paths if paths.count(path) > 1}) if len(set(paths)) < len(paths) else []:
        raise LayoutError(f"fz: two leaves have the path {twice[0]!r}; a key with a dot in it looks like two keys.")
    specs = []
    for path, shape in zip(paths, shapes, strict=True):
        spec = Spec(shape, layout.split_of(path))
        _check_split(path, spec, mesh, layout)
        cut = layout.parameter_cut(None if policy is None else policy.of(path))
        specs.append(dataclasses.replace(spec, cut=cut_axes(spec, mesh, cut)))
    return Placement(treedef, paths, tuple(specs), mesh, layout, policy)


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
