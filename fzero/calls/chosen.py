"""Some leaves of a tree, chosen by patterns of their paths.

{"blocks": [{"w": a, "b": b}, {"w": c, "b": d}]}   ──"blocks.1.*"──▶   {"blocks": {1: {"w": c, "b": d}}}
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

from fzero import tree
from fzero.calls.nearest import nearest
from fzero.errors import TreeError

# Paths that a message lists.
_LISTED = 5


def chosen(call: str, paths: Sequence[str], only: str | Iterable[str]) -> list[int]:
    """Return the positions of the leaves whose paths fit a pattern, in the order of the leaves.

    Args:
        call: for the message.
        paths: of all leaves.
        only: a pattern, or several; `*` matches anything, dots too.

    Raises:
        TypeError: a pattern is no string.
        TreeError: a pattern fits no path.

    Example:
        >>> chosen("fz.f", ["head.w", "body.0.w", "body.1.w"], ["body.1.*", "head.w"])
        [0, 2]
        >>> chosen("fz.f", ["head.w", "a.0.w"], "a.0")
        Traceback (most recent call last):
        fzero.errors.TreeError: fz.f: only='a.0' fits no leaf. Did you mean 'a.0.*'? The paths are head.w, a.0.w.
    """
    patterns = (only,) if isinstance(only, str) else tuple(only) if isinstance(only, list | tuple | set) else ()
    if not patterns or not all(isinstance(pattern, str) for pattern in patterns):
        raise TypeError(
            f"{call}: only: expected a pattern of dotted paths, or several, such as 'blocks.0.*', got "
            f"{tree.describe(only)}."
        )
    for pattern in patterns:
        if not any(fnmatchcase(path, pattern) for path in paths):
            whole = dict.fromkeys(
                f"{path.rsplit('.', n)[0]}.*" for path in paths for n in range(1, path.count(".") + 1)
            )
            listing = ", ".join(paths[:_LISTED]) + (", …" if len(paths) > _LISTED else "")
            near = nearest(f"{pattern}.*", whole) if f"{pattern}.*" in whole else nearest(pattern, (*paths, *whole))
            raise TreeError(f"{call}: only={pattern!r} fits no leaf.{near} The paths are {listing}.")
    return [i for i, path in enumerate(paths) if any(fnmatchcase(path, pattern) for pattern in patterns)]


def pruned(treedef: tree.TreeDef, indices: Sequence[int], leaves: Sequence[Any]) -> Any:
    """Return some leaves of a tree as nested dicts, whose keys are what the tree itself is indexed by.

    Args:
        treedef: of the whole tree.
        indices: positions of the leaves.
        leaves: their values; the one leaf of a tree without nodes comes back as it is.

    Example:
        >>> pruned(tree.structure({"a": [1, 2], "b": 3}), [1], [20])
        {'a': {1: 20}}
    """
    entries = treedef.paths()
    root: dict[Any, Any] = {}
    for i, leaf in zip(indices, leaves, strict=True):
        if not entries[i]:
            return leaf
        *parents, last = entries[i]
        node = root
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return root
