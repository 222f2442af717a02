"""Gradient transforms, and optimizers made of others: `chain`, `clip_by_global_norm`, `partition_by`."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fzero import tree
from fzero.collectives import all_reduce, pad
from fzero.layout import Sharded
from fzero.mesh import Mesh
from fzero.optim.base import ByPath, Optimizer
from fzero.pieces import Spec


class GradientTransform(ABC):
    """A pure `(init, update)` pair on gradients."""

    def init(self, params: Sharded) -> Any:
        return ()

    @abstractmethod
    def update(self, grads: Sharded, state: Any, params: Sharded) -> tuple[Sharded, Any]: ...


def global_norm(grads: Sharded, *, finite_only: bool = False) -> tuple[Tensor, Tensor]:
    """Return the norm of a sharded gradient and whether it is finite, over all ranks by one all-reduce.

    A leaf that every rank holds whole counts once. Squares are taken piece by piece, as they would be if the
    leaf were cut, and added up in float64, so that the norm does not depend on the layout.

    Args:
        grads: the gradient.
        finite_only: leave out elements that are not finite, instead of returning NaN.

    Returns:
        The 2-norm of the true values, fp32 of shape (); whether every element is finite, bool of shape ().
    """
    mesh = grads.mesh
    sums: dict[tuple[str, ...], list[Tensor]] = {}
    for piece, spec in zip(grads.pieces, grads.placement.specs, strict=True):
        if piece is None:
            continue
        values = torch.nan_to_num(piece, nan=0.0, posinf=0.0, neginf=0.0) if finite_only else piece
        rows = _as_if_cut(values, spec, mesh, grads.layout.axis)
        square = torch.linalg.vector_norm(rows, dim=-1, dtype=torch.float32).to(torch.float64).square().sum()
        bad = (piece * 0).sum().isnan().to(torch.float64)  # inf × 0 is NaN; several times faster than isfinite
        sums.setdefault(_axes(spec), []).append(torch.stack([square, bad]))
    total = torch.zeros(2, dtype=torch.float64, device=mesh.device)
    for axes, parts in sums.items():
        part = torch.stack(parts).sum(0)
        for axis in axes:
            part = all_reduce(part, mesh, axis)
        total = total + part
    factor = grads.multiplier
    finite = (total[1] == 0) & torch.isfinite(factor)
    norm = (total[0].sqrt() * factor).to(torch.float32)
    return (norm if finite_only else torch.where(finite, norm, torch.nan)), finite


def _as_if_cut(piece: Tensor, spec: Spec, mesh: Mesh, axes: tuple[str, ...]) -> Tensor:
    """Return a piece as rows: one, or where the leaf is whole here, one for each rank that could hold a piece."""
    ranks = mesh.size(axes)
    if spec.cut or ranks == 1 or not piece.numel():
        return piece.reshape(1, -1)
    rows = math.ceil(piece.numel() / ranks)
    return pad(piece, ranks * rows).view(ranks, rows)


@dataclass(frozen=True)
class ClipByGlobalNorm(GradientTransform):
    """See `clip_by_global_norm`."""

    limit: float

    def update(self, grads: Sharded, state: Any, params: Sharded) -> tuple[Sharded, Any]:
        norm, _ = global_norm(grads, finite_only=True)
        shrink = (self.limit / (norm + 1e-6)).clamp(max=1.0)
        return grads.replace(factor=grads.multiplier * shrink), state


def clip_by_global_norm(limit: float) -> ClipByGlobalNorm:
    """Return a transform that scales gradients down to a 2-norm of at most `limit`, over all leaves and ranks.

    It multiplies the factor and touches no leaf; all gradients have to be there before the first update.
    Elements that are not finite do not count: they are skipped by the update.

    Args:
        limit: the largest norm, above 0.

    Raises:
        ValueError: the limit is not above 0.

    Example:
        >>> from fzero.optim.adamw import adamw
        >>> chain(clip_by_global_norm(1.0), adamw(1e-3)).learning_rate(torch.tensor(0))
        tensor(0.0010)
    """
    if not limit > 0:
        raise ValueError(f"fz.clip_by_global_norm: the limit must be above 0, got {limit!r}.")
    return ClipByGlobalNorm(limit)


@dataclass(frozen=True)
class Chain(Optimizer):
    """See `chain`."""

    transforms: tuple[GradientTransform, ...]
    optimizer: Optimizer

    def init_sharded(self, params: Sharded) -> Any:
        return (*(t.init(params) for t in self.transforms), self.optimizer.init_sharded(params))

    def update_sharded(
        self, grads: Sharded, opt_state: Any, params: Sharded, *, step: Tensor, seed: Tensor
    ) -> tuple[Sharded, Any]:
        *states, last = opt_state
        moved = []
        for transform, state in zip(self.transforms, states, strict=True):
            grads, state = transform.update(grads, state, params)
            moved.append(state)
        params, last = self.optimizer.update_sharded(grads, last, params, step=step, seed=seed)
        return params, (*moved, last)

    def learning_rate(self, step: Tensor) -> Any:
        return self.optimizer.learning_rate(step)

    def frozen(self, paths: Sequence[str]) -> frozenset[str]:
        return self.optimizer.frozen(paths)


def chain(*transforms_then_optimizer: Any) -> Chain:
    """Return an optimizer whose gradients pass through transforms first, in order.

    Args:
        *transforms_then_optimizer: gradient transforms, then one optimizer.

    Raises:
        TypeError: the last is no optimizer, or another is no gradient transform.

    Example:
        >>> from fzero.optim.sgd import sgd
        >>> opt, w, zero = chain(clip_by_global_norm(1.0), sgd(1.0)), torch.zeros(2), torch.tensor(0, dtype=torch.int32)
        >>> opt.update(torch.tensor([3.0, 4.0]), opt.init(w), w, step=zero, seed=zero)[0]
        tensor([-0.6000, -0.8000])
    """
    *transforms, optimizer = transforms_then_optimizer or (None,)
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"fz.chain: the last argument must be an optimizer, got {tree.describe(optimizer)}.")
    for position, transform in enumerate(transforms):
        if not isinstance(transform, GradientTransform):
            raise TypeError(
                f"fz.chain: argument {position} must be a gradient transform, got {tree.describe(transform)}."
            )
    return Chain(tuple(transforms), optimizer)


@dataclass(frozen=True)
class PartitionBy(Optimizer):
    """See `partition_by`."""

    labels: Callable[[str], str]
    optimizers: tuple[tuple[str, Optimizer | None], ...]

    def init_sharded(self, params: Sharded) -> dict[str, Any]:
        groups = self._groups(params.paths)
        return {label: opt.init_sharded(params.select(groups[label])) for label, opt in self._trained()}

    def update_sharded(
        self, grads: Sharded, opt_state: Any, params: Sharded, *, step: Tensor, seed: Tensor
    ) -> tuple[Sharded, dict[str, Any]]:
        groups, pieces, moved = self._groups(params.paths), list(params.pieces), {}
        for label, optimizer in self._trained():
            group = groups[label]
            new, moved[label] = optimizer.update_sharded(
                grads.select(group), opt_state[label], params.select(group), step=step, seed=seed
            )
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

    def _trained(self) -> list[tuple[str, Optimizer]]:
        return [(label, optimizer) for label, optimizer in self.optimizers if optimizer is not None]

    def _groups(self, paths: Sequence[str]) -> dict[str, list[int]]:
        groups: dict[str, list[int]] = {label: [] for label, _ in self.optimizers}
        for i, path in enumerate(paths):
            label = self.labels(path)
            if label not in groups:
                raise ValueError(
                    f"fz.partition_by: leaf {path!r} has the label {label!r}, and there are optimizers for "
                    f"{list(groups)}. Add one, or None to freeze such leaves."
                )
            groups[label].append(i)
        return groups


def partition_by(labels: Any, optimizers: Mapping[str, Optimizer | None]) -> PartitionBy:
    """Return an optimizer that gives each group of leaves its own.

    Args:
        labels: the label of each leaf: a function of its dotted path, or a tree of labels like the parameters.
        optimizers: label to optimizer; `None` freezes a group: no gradient, no moments, no change.

    Returns:
        An optimizer. Its learning rate is a dict, label to rate. A `chain` inside a group sees that group's
        gradients alone; to clip over all of them put the `chain` outside.

    Raises:
        ValueError: from `init` or `update`, for a leaf whose label has no optimizer.

    Example:
        >>> from fzero.optim.adamw import adamw
        >>> opt = partition_by(lambda path: path.split(".")[0], {"head": adamw(1e-3), "body": None})
        >>> sorted(opt.frozen(["body.w", "head.w"]))
        ['body.w']
    """
    if not callable(labels):
        labels = ByPath.of(labels, "tree of labels")
    return PartitionBy(labels, tuple(optimizers.items()))


def _axes(spec: Spec) -> tuple[str, ...]:
    return spec.cut + tuple(axis for axis in spec.split if axis is not None)
