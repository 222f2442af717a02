"""Batches padded to few lengths.

A program serves all sizes of a batch, so padding is rarely needed. It is for what has a program for each size, such as
compiled ones, and for kernels that are quickest at round sizes.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from fzero import tree


def pad_to(batch: Any, multiples: Mapping[int, int], *, value: float | Mapping[str, float] = 0) -> Any:
    """Return a batch whose tensors are padded at their ends to the next multiple.

    What the padding means is the function's affair: give it a mask, or labels that the loss ignores.

    Args:
        batch: a tree of tensors, of any dtype. Leaves that are no tensors stay as they are.
        multiples: dimension, from 0 on, to the number that its size is to be a multiple of. A tensor that does not
            have a dimension is not padded there.
        value: what stands in the padding: a number, or numbers by path, in which `*` stands for anything; 0 elsewhere.

    Returns:
        A new tree. A tensor that fits already is passed on as it is.

    Raises:
        ValueError: a dimension is negative, a multiple is not positive, or a path in `value` is that of no tensor.

    Example:
        >>> import torch
        >>> batch = {"tokens": torch.tensor([[1, 2, 3]]), "labels": torch.tensor([[2, 3, 4]])}
        >>> pad_to(batch, {1: 4}, value={"labels": -100})
        {'tokens': tensor([[1, 2, 3, 0]]), 'labels': tensor([[   2,    3,    4, -100]])}
    """
    for dim, multiple in multiples.items():
        if not (_is_whole(dim) and dim >= 0 and _is_whole(multiple) and multiple >= 1):
            raise ValueError(
                f"fz.pad_to: expected dimensions from 0 on with the multiples that their sizes are to be of, such as "
                f"{{1: 64}}; got {dim!r}: {multiple!r}."
            )
    leaves, treedef = tree.flatten(batch)
    paths = tree.structure_paths(treedef)
    values = value if isinstance(value, Mapping) else {"*": value}
    for pattern in values if isinstance(value, Mapping) else ():
        if not any(
            fnmatch.fnmatchcase(p, pattern) and isinstance(x, Tensor) for p, x in zip(paths, leaves, strict=True)
        ):
            near = difflib.get_close_matches(pattern, paths, 1)
            hint = f" Did you mean {near[0]!r}?" if near else f" Tensors stand at {', '.join(map(repr, paths[:8]))}."
            raise ValueError(f"fz.pad_to: value= names {pattern!r}, and the batch has no tensor there.{hint}")

    def padded(path: str, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        ends = [-size % multiples.get(dim, 1) for dim, size in enumerate(leaf.shape)]
        fill = next((v for pattern, v in values.items() if fnmatch.fnmatchcase(path, pattern)), 0)
        pairs = [x for end in reversed(ends) for x in (0, end)]
        return F.pad(leaf, pairs, value=fill) if any(ends) else leaf

    return tree.unflatten(treedef, [padded(p, x) for p, x in zip(paths, leaves, strict=True)])


def _is_whole(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool)
