"""Trees: optree in fzero's namespace, with readable paths.

A `State` and a `Sharded` are nodes of this namespace: `leaves`, `map` and `paths` open them into their
tensors. Under plain `optree` or in another namespace they are leaves.

`None` is an empty subtree, as in JAX. Mappings of any class, dataclasses, classes of attrs, the output classes of
libraries that registered them with torch, and the key-value caches of Transformers, are opened on first sight, and
rebuilt as the same class.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import optree
from torch import Tensor

from fzero.errors import TreeError
from fzero.nodes import Node, node_of

NAMESPACE = "fzero"

TreeDef = optree.PyTreeSpec


def register(
    cls: type,
    flatten: Callable[[Any], tuple[Sequence[Any], Any, Sequence[str]]],
    unflatten: Callable[[Any, Sequence[Any]], Any],
) -> None:
    """Make `cls` a node of fzero's trees.

    Args:
        cls: the class.
        flatten: `instance -> (children, static data, names of the children)`. The static data must be
            hashable and comparable: it is part of the structure.
        unflatten: `(static data, children) -> instance`.

    Raises:
        ValueError: it is a node already.
    """
    optree.register_pytree_node(cls, flatten, unflatten, namespace=NAMESPACE)  # type: ignore[arg-type]


def flatten(
    tree: Any, *, is_leaf: Callable[[Any], bool] | None = None, none_is_leaf: bool = False
) -> tuple[list[Any], TreeDef]:
    """Return the leaves of `tree`, in order, and its structure.

    Args:
        tree: any tree.
        is_leaf: true for nodes to be taken whole, as leaves.
        none_is_leaf: whether `None` is a leaf; it is an empty subtree otherwise.

    Raises:
        RecursionError: the tree holds itself.

    Example:
        >>> leaves, treedef = flatten({"b": 2, "a": (1, None)})
        >>> leaves
        [1, 2]
        >>> unflatten(treedef, [10, 20])
        {'b': 20, 'a': (10, None)}
    """
    while True:
        leaves, treedef = optree.tree_flatten(tree, is_leaf=is_leaf, none_is_leaf=none_is_leaf, namespace=NAMESPACE)
        closed = [(cls, how) for cls in dict.fromkeys(type(leaf) for leaf in leaves) if (how := _closed(cls))]
        if not closed:
            return leaves, treedef
        for cls, how in closed:
            register(cls, *how)


def unflatten(treedef: TreeDef, leaves: Iterable[Any]) -> Any:
    """Rebuild a tree from its structure and its leaves."""
    return optree.tree_unflatten(treedef, leaves)


def leaves(tree: Any, *, is_leaf: Callable[[Any], bool] | None = None, none_is_leaf: bool = False) -> list[Any]:
    """Return the leaves of `tree` in order.

    Args:
        tree: any tree.
        is_leaf: true for nodes to be taken whole.
        none_is_leaf: whether `None` is a leaf.

    Raises:
        RecursionError: the tree holds itself.

    Example:
        >>> leaves({"b": 2, "a": (1, None)})
        [1, 2]
    """
    return flatten(tree, is_leaf=is_leaf, none_is_leaf=none_is_leaf)[0]


def structure(tree: Any, *, is_leaf: Callable[[Any], bool] | None = None, none_is_leaf: bool = False) -> TreeDef:
    """Return the structure of `tree`: two trees fit each other where theirs are equal.

    Args:
        tree: any tree.
        is_leaf: true for nodes to be taken whole.
        none_is_leaf: whether `None` is a leaf.

    Raises:
        RecursionError: the tree holds itself.

    Example:
        >>> structure({"a": 1}) == structure({"a": 2}), structure({"a": 1}) == structure([1])
        (True, False)
    """
    return flatten(tree, is_leaf=is_leaf, none_is_leaf=none_is_leaf)[1]


def map(
    f: Callable[..., Any],
    tree: Any,
    *rest: Any,
    is_leaf: Callable[[Any], bool] | None = None,
    none_is_leaf: bool = False,
) -> Any:
    """Return what `f` makes of the leaves of one tree, or of the leaves of several side by side, as a tree.

    Args:
        f: takes one leaf of each tree.
        tree: its structure is the result's.
        *rest: trees with the structure of `tree`, or with subtrees where `tree` has leaves.
        is_leaf: true for nodes to be passed to `f` whole.
        none_is_leaf: pass `None` to `f` instead of keeping it.

    Raises:
        TreeError: a tree of `rest` does not fit; the message names the path.

    Example:
        >>> map(lambda x, y: x + y, {"a": 1, "b": 2}, {"a": 10, "b": 20})
        {'a': 11, 'b': 22}
    """
    first, treedef = flatten(tree, is_leaf=is_leaf, none_is_leaf=none_is_leaf)
    others = []
    for other in rest:
        flatten(other)  # opens classes that are new
        try:
            others.append(treedef.flatten_up_to(other))
        except ValueError as error:
            where = optree.prefix_errors(tree, other, is_leaf=is_leaf, none_is_leaf=none_is_leaf, namespace=NAMESPACE)
            raise TreeError(str(where[0]("fz.tree.map: tree"))) from error
    return unflatten(treedef, [f(*row) for row in zip(first, *others, strict=True)])


def paths(tree: Any, *, is_leaf: Callable[[Any], bool] | None = None, none_is_leaf: bool = False) -> list[str]:
    """Return the dotted path of every leaf, in the order of `leaves`.

    Args:
        tree: any tree.
        is_leaf: true for nodes to be taken whole.
        none_is_leaf: whether `None` is a leaf.

    Raises:
        RecursionError: the tree holds itself.

    Example:
        >>> paths({"blocks": [{"w": 1}, {"w": 2}], "bias": 3})
        ['bias', 'blocks.0.w', 'blocks.1.w']
    """
    return structure_paths(flatten(tree, is_leaf=is_leaf, none_is_leaf=none_is_leaf)[1])


def structure_paths(treedef: TreeDef) -> list[str]:
    """Return the dotted path of every leaf of a structure."""
    return [".".join(str(entry) for entry in path) for path in treedef.paths()]


class Slot(enum.Enum):
    """The place of a tensor in a tree whose tensors were taken out."""

    PICKED = "picked"
    OTHER = "other"

    __hash__ = object.__hash__  # an enum's own is written in Python, and a signature holds hundreds of slots


PICKED, OTHER = Slot


@dataclasses.dataclass(frozen=True)
class Hollow:
    """A tree without its tensors: slots where they were, and the leaves that are no tensors; made by `split`.

    Attributes:
        treedef: its structure.
        slots: for each leaf `PICKED` or `OTHER`, where a tensor was, else the leaf.
    """

    treedef: TreeDef
    slots: tuple[Any, ...]

    def fill(self, picked: Iterable[Any], others: Iterable[Any] = ()) -> Any:
        """Put tensors back, in order."""
        sources = {PICKED: iter(picked), OTHER: iter(others)}
        return unflatten(self.treedef, [next(sources[s]) if isinstance(s, Slot) else s for s in self.slots])


# In another tree it is static: a constant of a trace, of which no leaf is an input.
register(Hollow, lambda hollow: ((), hollow, ()), lambda hollow, _: hollow)


def split(tree: Any, select: Callable[[Tensor], bool] = lambda _: True) -> tuple[list[Tensor], list[Tensor], Hollow]:
    """Return the tensors of a tree that `select` picks, its other tensors, and the tree without them.

    Example:
        >>> import torch
        >>> picked, _, hollow = split({"x": torch.tensor(1), "name": "a"})
        >>> hollow.fill([7])
        {'x': 7, 'name': 'a'}
    """
    leaves, treedef = flatten(tree)
    slots = [leaf if not isinstance(leaf, Tensor) else PICKED if select(leaf) else OTHER for leaf in leaves]
    picked = [leaf for leaf, slot in zip(leaves, slots, strict=True) if slot is PICKED]
    others = [leaf for leaf, slot in zip(leaves, slots, strict=True) if slot is OTHER]
    return picked, others, Hollow(treedef, tuple(slots))


def describe(leaf: Any) -> str:
    """Return a leaf in a few words: the dtype and shape of a tensor, else its type or value.

    Example:
        >>> import torch
        >>> describe(torch.zeros(2, 3))
        'float32(2, 3)'
    """
    if isinstance(leaf, Tensor):
        return f"{str(leaf.dtype).removeprefix('torch.')}{tuple(leaf.shape)}"
    if leaf is None or isinstance(leaf, bool | int | float | str):
        return repr(leaf)
    return type(leaf).__name__


def differences(
    expected: Any, got: Any, *, same: Callable[[Any, Any], bool] = lambda a, b: describe(a) == describe(b)
) -> list[str]:
    """Return one line for each path at which two trees differ, `path: expected …, got …`.

    Args:
        expected: any tree.
        got: any tree.
        same: whether two leaves at one path are equal. Default: they are described alike: a dtype and a shape, a value.

    Raises:
        RecursionError: a tree holds itself.

    Example:
        >>> differences({"a": 1, "b": 2}, {"a": 1, "c": 2})
        ['b: expected 2, got nothing', 'c: expected nothing, got 2']
    """
    left = dict(zip(paths(expected, none_is_leaf=True), leaves(expected, none_is_leaf=True), strict=True))
    right = dict(zip(paths(got, none_is_leaf=True), leaves(got, none_is_leaf=True), strict=True))
    lines = []
    for path in dict.fromkeys([*left, *right]):
        name = path or "(the whole)"
        if path not in right:
            lines.append(f"{name}: expected {describe(left[path])}, got nothing")
        elif path not in left:
            lines.append(f"{name}: expected nothing, got {describe(right[path])}")
        elif not same(left[path], right[path]):
            want, came = _told_apart(left[path], right[path])
            lines.append(f"{name}: expected {want}, got {came}")
    a, b = structure(expected, none_is_leaf=True), structure(got, none_is_leaf=True)
    if not lines and a != b:
        lines.append(f"(the whole): expected the structure {a}, got {b}")
    return lines


def _told_apart(a: Any, b: Any) -> tuple[str, str]:
    """Describe two leaves that differ, with their devices where nothing else tells them apart."""
    if describe(a) == describe(b) and isinstance(a, Tensor) and isinstance(b, Tensor):
        return f"{describe(a)} on {a.device}", f"{describe(b)} on {b.device}"
    return describe(a), describe(b)


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Turn dotted names into nested dicts.

    Example:
        >>> nest({"a.w": 1, "a.b": 2, "c": 3})
        {'a': {'w': 1, 'b': 2}, 'c': 3}
    """
    root: dict[str, Any] = {}
    for name, value in flat.items():
        *parents, last = name.split(".")
        node = root
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return root


def _closed(cls: type) -> Node | None:
    """Return how a class opens that has not been opened yet; `None` for all others."""
    if issubclass(cls, Tensor) or optree.register_pytree_node.get(cls, namespace=NAMESPACE) is not None:
        return None
    return node_of(cls)
