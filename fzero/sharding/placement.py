"""Placements: where each leaf of one tree lives, without its pieces."""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from fzero import tree
from fzero.errors import LayoutError
from fzero.precision.policy import Policy
from fzero.ranks.mesh import Mesh
from fzero.sharding.layout import Layout
from fzero.sharding.leaf import Spec, cut_axes


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
        """What the collectives of each leaf depend on, as a line of text that ranks compare; none without ranks.

        Such as `w: (8, 4) over ('data',) (None, None) of {'data': 2}, 3`.
        """
        if self.mesh.processes is None:
            return ()
        axes, stage = dict(self.mesh.axes), self.layout.stage
        rows = zip(self.paths, self.specs, strict=True)
        return tuple(f"{path}: {spec.shape} over {spec.cut} {spec.split} of {axes}, {stage}" for path, spec in rows)

    @property
    def axes(self) -> tuple[str, ...]:
        """The mesh axes whose ranks hold different pieces of some leaf, in the order of the mesh."""
        used = {axis for spec in self.specs for axis in spec.axes}
        return tuple(axis for axis in self.mesh.names if axis in used)

    @functools.cached_property
    def policy_line(self) -> str:
        """The policy as a line of text that ranks compare: the dtype of what they send is its."""
        return f"policy {self.policy}"

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
    named = Counter(spec.split_axes + layout.data_axes)
    if twice := [axis for axis in spec.split_axes if named[axis] > 1]:
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
