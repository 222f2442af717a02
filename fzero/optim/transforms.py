"""Gradient transforms, and optimizers made of others: `chain`, `partition_by`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from fzero import tree
from fzero.calls import shown
from fzero.calls.arguments import named
from fzero.calls.nearest import nearest
from fzero.optim.base import Optimizer, kind_of
from fzero.optim.masks import ByPath
from fzero.optim.norm import Squares, measure
from fzero.optim.step import Step
from fzero.sharding.sharded import Sharded


class GradientTransform(ABC):
    """A pure `(init, update)` pair on gradients."""

    def init(self, params: Sharded) -> Any:
        """Return what it keeps for gradients of these parameters: nothing, unless a subclass does."""
        return ()

    @abstractmethod
    def update(self, grads: Sharded, state: Any, params: Sharded) -> tuple[Sharded, Any]:
        """Return `(gradients, state)`: changed gradients, and what it keeps for the next step."""


class NormTransform(GradientTransform):
    """A gradient transform that looks at the norm of the gradient, which a chain measures once for all of them."""

    def update(self, grads: Sharded, state: Any, params: Sharded) -> tuple[Sharded, Any]:
        return self.update_by(grads, state, params, measure(grads))

    @abstractmethod
    def update_by(self, grads: Sharded, state: Any, params: Sharded, squares: Squares) -> tuple[Sharded, Any]:
        """Return what `update` does, given what was measured of `grads`."""


@dataclass(frozen=True)
class Chain(Optimizer):
    """See `chain`."""

    transforms: tuple[GradientTransform, ...]
    optimizer: Optimizer

    def __repr__(self) -> str:
        return shown.call("chain", *self.transforms, self.optimizer)

    def init_sharded(self, params: Sharded, remainder: Sharded | None = None) -> Any:
        return (*(t.init(params) for t in self.transforms), self.optimizer.init_sharded(params, remainder))

    def update_sharded(self, grads: Sharded, opt_state: Any, params: Sharded, at: Step) -> tuple[Sharded, Any]:
        *states, last = opt_state
        moved, squares = [], at.squares
        for transform, state in zip(self.transforms, states, strict=True):
            if isinstance(transform, NormTransform):
                if squares is None or not squares.are_of(grads):
                    squares = measure(grads)
                grads, state = transform.update_by(grads, state, params, squares)
            else:
                grads, state = transform.update(grads, state, params)
            moved.append(state)
        params, last = self.optimizer.update_sharded(grads, last, params, replace(at, squares=squares))
        return params, (*moved, last)

    def learning_rate(self, step: Tensor) -> Any:
        return self.optimizer.learning_rate(step)

    def frozen(self, paths: Sequence[str]) -> frozenset[str]:
        return self.optimizer.frozen(paths)

    def check_paths(self, own: Sequence[str], everyone: Sequence[str]) -> None:
        self.optimizer.check_paths(own, everyone)

    def parts(self, opt_state: Any) -> list[tuple[str, Any]]:
        *states, last = opt_state
        own = [(kind_of(transform), state) for transform, state in zip(self.transforms, states, strict=True)]
        return own + self.optimizer.parts(last)


def chain(*transforms_then_optimizer: Any) -> Chain:
    """Return an optimizer whose gradients pass through transforms first, in order.

    Args:
        *transforms_then_optimizer: gradient transforms, then one optimizer.

    Raises:
        TypeError: the last is no optimizer, or another is no gradient transform.

    Example:
        >>> import torch
        >>> from fzero.optim.clip import clip_by_global_norm
        >>> from fzero.optim.sgd import sgd
        >>> opt, w, zero = chain(clip_by_global_norm(1.0), sgd(1.0)), torch.zeros(2), torch.tensor(0, dtype=torch.int32)
        >>> opt.update(torch.tensor([3.0, 4.0]), opt.init(w), w, step=zero, seed=zero)[0]
        tensor([-0.6000, -0.8000])
    """
    *transforms, optimizer = transforms_then_optimizer or (None,)
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"fz.chain: the last argument must be an optimizer, got {tree.describe(optimizer)}. Transforms come first, "
            f"as gradients pass them: fz.chain(fz.clip_by_global_norm(1.0), fz.adamw(3e-4))."
        )
    for position, transform in enumerate(transforms):
        if not isinstance(transform, GradientTransform):
            raise TypeError(
                f"fz.chain: argument {position} must be a gradient transform, got {tree.describe(transform)}. Only the "
                f"last one is an optimizer; several are for groups of leaves: fz.partition_by."
            )
    return Chain(tuple(transforms), optimizer)


@dataclass(frozen=True)
class PartitionBy(Optimizer):
    """See `partition_by`."""

    labels: Callable[[str], str]
    optimizers: tuple[tuple[str, Optimizer | None], ...]

    def __repr__(self) -> str:
        return shown.call("partition_by", self.labels, dict(self.optimizers))

    def init_sharded(self, params: Sharded, remainder: Sharded | None = None) -> dict[str, Any]:
        groups = self._groups(params.paths)
        return {
            label: optimizer.init_sharded(
                params.select(groups[label]), None if remainder is None else remainder.select(groups[label])
            )
            for label, optimizer in self._trained()
        }

    def update_sharded(self, grads: Sharded, opt_state: Any, params: Sharded, at: Step) -> tuple[Sharded, Any]:
        groups, pieces, moved = self._groups(params.paths), list(params.pieces), {}
        for label, optimizer in self._trained():
            group = groups[label]
            given = grads.select(group), opt_state[label], params.select(group)
            new, moved[label] = optimizer.update_sharded(*given, replace(at, squares=None))
            for i, piece in zip(group, new.pieces, strict=True):
                pieces[i] = piece
        return params.replace(pieces=tuple(pieces)), moved

    def learning_rate(self, step: Tensor) -> dict[str, Any]:
        return {label: optimizer.learning_rate(step) for label, optimizer in self._trained()}

    def frozen(self, paths: Sequence[str]) -> frozenset[str]:
        groups = self._groups(paths)
        still = {paths[i] for label, optimizer in self.optimizers if optimizer is None for i in groups[label]}
        inner = [opt.frozen([paths[i] for i in groups[label]]) for label, opt in self._trained()]
        return frozenset(still.union(*inner))

    def check_paths(self, own: Sequence[str], everyone: Sequence[str]) -> None:
        if isinstance(self.labels, ByPath):
            self.labels.check(everyone)
        groups = self._groups(own)
        for label, optimizer in self._trained():
            # In a group of another partition_by this one sees some of the leaves, and may have labels for others.
            if not groups[label] and len(own) == len(everyone):
                used = [name for name, group in groups.items() if group]
                raise ValueError(
                    f"fz.partition_by: there is an optimizer for {label!r}, and no leaf has this label; leaves have "
                    f"{used}. Label a leaf so, or leave the optimizer out."
                )
            optimizer.check_paths([own[i] for i in groups[label]], everyone)

    def parts(self, opt_state: Any) -> list[tuple[str, Any]]:
        return [
            (f"{label}: {name}", part)
            for label, optimizer in self._trained()
            for name, part in optimizer.parts(opt_state[label])
        ]

    def _trained(self) -> list[tuple[str, Optimizer]]:
        return [(label, optimizer) for label, optimizer in self.optimizers if optimizer is not None]

    def _groups(self, paths: Sequence[str]) -> dict[str, list[int]]:
        groups: dict[str, list[int]] = {label: [] for label, _ in self.optimizers}
        for i, path in enumerate(paths):
            label = self.labels(path)
            if label not in groups:
                raise ValueError(
                    f"fz.partition_by: leaf {path!r} has the label {label!r}, and there are optimizers for "
                    f"{list(groups)}.{nearest(label, groups)} Add one, or None to freeze such leaves."
                )
            groups[label].append(i)
        return groups


@named("fz.partition_by")
def partition_by(labels: Any, optimizers: Mapping[str, Optimizer | None]) -> PartitionBy:
    """Return an optimizer that gives each group of leaves its own.

    Args:
        labels: the label of each leaf: a function of its dotted path, or a tree of labels like the parameters.
        optimizers: label to optimizer; `None` freezes a group: no gradient, no moments, no change.

    Returns:
        An optimizer. A step tells the rate of each group as `lr/label`, and the largest as `lr`. A `chain` inside a
        group sees that group's gradients alone; to clip over all of them put the `chain` outside.

    Raises:
        TypeError: `optimizers` is no dict of optimizers.
        ValueError: from `fz.init`: a leaf's label has no optimizer, or an optimizer's label no leaf.
        TreeError: from `fz.init`: a tree of labels has a path that no leaf has, or lacks one.

    Example:
        >>> from fzero.optim.adamw import adamw
        >>> opt = partition_by(lambda path: path.split(".")[0], {"head": adamw(1e-3), "body": None})
        >>> sorted(opt.frozen(["body.w", "head.w"]))
        ['body.w']
    """
    if not isinstance(optimizers, Mapping) or not optimizers:
        raise TypeError(
            f"fz.partition_by: optimizers: expected a dict from label to optimizer, got {tree.describe(optimizers)}. "
            f"Write {{'train': fz.adamw(3e-4), 'frozen': None}}."
        )
    for label, optimizer in optimizers.items():
        if optimizer is not None and not isinstance(optimizer, Optimizer):
            raise TypeError(
                f"fz.partition_by: optimizers[{label!r}]: expected an fz optimizer, or None to freeze the group, got "
                f"{tree.describe(optimizer)}. Try fz.adamw(lr)."
            )
    if not callable(labels):
        labels = ByPath.of(labels, "fz.partition_by: the tree of labels")
    return PartitionBy(labels, tuple(optimizers.items()))
