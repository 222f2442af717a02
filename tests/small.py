"""A small tree of parameters, and gradients of it that are the same in every world.

Its leaves are awkward: odd sizes that need padding, one too small to cut, a scalar.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

import fzero as fz
from fzero._torch import TorchDispatchMode

SHAPES: dict[str, Any] = {"block": {"bias": (7,), "weight": (23, 5)}, "head": (70,), "scale": ()}


def parameters(seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """A tree of normal draws. With another seed it serves as a gradient."""
    generator = torch.Generator().manual_seed(seed)
    return fz.tree.map(lambda shape: torch.randn(shape, generator=generator, dtype=dtype), SHAPES, is_leaf=is_shape)


def is_shape(x: Any) -> bool:
    return isinstance(x, tuple)


def gradients(steps: int) -> list[dict[str, Any]]:
    return [parameters(seed) for seed in range(1, steps + 1)]


def dot(params: Any, weights: Any) -> Tensor:
    """The function whose gradient is `weights`."""
    pairs = zip(fz.tree.leaves(params), fz.tree.leaves(weights), strict=True)
    return torch.stack([(p * w).sum(dtype=torch.float32) for p, w in pairs]).sum()


def gradient_of(state: fz.State, value: Any) -> fz.Sharded:
    """The sharded gradient of a state whose value is the ranks' mean of `value`.

    Worlds of one, two and four make the same bits of it: multiples of a number by powers of two are exact.
    """
    gradient: fz.Sharded = fz.grad(dot)(state, value)
    return gradient


def flat(tree: Any) -> dict[str, Tensor]:
    """Path to leaf."""
    return dict(zip(fz.tree.paths(tree), fz.tree.leaves(tree), strict=True))


def piece(sharded: fz.Sharded, path: str) -> Tensor:
    """This rank's piece of a leaf that is there."""
    found = sharded.pieces[sharded.paths.index(path)]
    assert found is not None
    return found


def int32(value: int) -> Tensor:
    return torch.tensor(value, dtype=torch.int32)


def copied(tree: Any) -> Any:
    return fz.tree.map(lambda x: x.clone() if isinstance(x, Tensor) else x, tree)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal to the last bit; a NaN equals itself."""
    bits = [x.contiguous().reshape(-1).view(torch.uint8) for x in (a, b)]
    return (a.shape, a.dtype) == (b.shape, b.dtype) and torch.equal(*bits)


def assert_same_bits(actual: Any, expected: Any) -> None:
    """Two trees have the same paths, and the same bits at each."""
    left, right = flat(actual), flat(expected)
    assert left.keys() == right.keys()
    differ = [
        f"{path}: {fz.tree.describe(left[path])} and {fz.tree.describe(right[path])}"
        for path in left
        if not same_bits(left[path], right[path])
    ]
    assert not differ, "\n".join(differ)


def described(tree: Any) -> dict[str, str]:
    """Path to dtype and shape."""
    return {path: fz.tree.describe(leaf) for path, leaf in flat(tree).items()}


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that were made inside and are alive, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()
        self.peak = 0

    def live(self) -> int:
        return sum(storage.nbytes() for storage in self.storages if storage.device.type != "meta")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for t in fz.tree.leaves(result):
            if isinstance(t, Tensor):
                self.storages.add(t.untyped_storage())
        self.peak = max(self.peak, self.live())
        return result
