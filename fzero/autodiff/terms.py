"""What one micro-batch returns, as terms that are added up over all of them.

result ──taken_apart──▶ recipe, terms ──totals over micro-batches──▶ recipe.finish ──▶ a result like that of one
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fzero import tree
from fzero.program.graph.loop import Kind
from fzero.sharding.placement import Placement
from fzero.sharding.sharded import Sharded


@dataclass(frozen=True)
class GradientNode:
    """A `Sharded` among the results: its pieces are summed, its factor is kept."""

    placement: Placement
    dtypes: tuple[torch.dtype | None, ...]

    @property
    def kinds(self) -> list[Kind]:
        """How each of its terms is collected: pieces are summed, the factor of the last round stays."""
        sums: list[Kind] = ["sum" for dtype in self.dtypes if dtype is not None]
        return [*sums, "same"]

    def finish(self, totals: Iterator[Tensor], n: int) -> Sharded:
        """Return the mean gradient of `n` micro-batches: the factor is divided, no piece is touched."""
        pieces = tuple(None if dtype is None else next(totals).to(dtype) for dtype in self.dtypes)
        return Sharded(pieces, self.placement, next(totals) / n)


@dataclass(frozen=True)
class TensorNode:
    """A plain tensor among the results."""

    dtype: torch.dtype
    kind: Kind

    @property
    def kinds(self) -> list[Kind]:
        """How its one term is collected."""
        return [self.kind]

    def finish(self, totals: Iterator[Tensor], n: int) -> Tensor:
        """Return the mean of `n` micro-batches where it was summed, in its own dtype; else what was collected."""
        total = next(totals)
        is_mean = self.kind == "sum" and (self.dtype.is_floating_point or self.dtype.is_complex)
        return (total / n).to(self.dtype) if is_mean else total


@dataclass(frozen=True)
class Recipe:
    """How totals of terms become a result like that of one micro-batch."""

    treedef: tree.TreeDef
    nodes: tuple[Any, ...]
    has_aux: bool

    @property
    def kinds(self) -> list[Kind]:
        """How each term is collected, in order."""
        return [k for node in self.nodes if isinstance(node, GradientNode | TensorNode) for k in node.kinds]

    def finish(self, totals: Sequence[Tensor], n: int) -> Any:
        """Return a result like that of one micro-batch, from the totals over `n`."""
        rest = iter(totals)
        nodes = [x.finish(rest, n) if isinstance(x, GradientNode | TensorNode) else x for x in self.nodes]
        value, aux, gradients = tree.unflatten(self.treedef, nodes)
        return ((value, aux), gradients) if self.has_aux else (value, gradients)


def taken_apart(result: Any, *, keep_factor: bool, weight: Tensor | None = None) -> tuple[Recipe, list[Tensor]]:
    """Return how to put a micro-batch's result together, and the terms that it adds to.

    Gradients of `value_and_grad` carry the same factor each round, so their pieces add up as they are.
    Another function may give each round a factor of its own, and is summed in true values.

    Args:
        result: `(value, gradients)` or `((value, aux), gradients)`.
        keep_factor: whether gradients carry the same factor each round.
        weight: what value and aux of this micro-batch count; gradients have it in them already.
    """
    if not (isinstance(result, tuple) and len(result) == 2):
        raise TypeError(
            f"fz.accumulate: f must return (value, gradients) or ((value, aux), gradients), as fz.value_and_grad "
            f"does; it returned {tree.describe(result)}."
        )
    value, gradients = result
    has_aux = isinstance(value, tuple) and len(value) == 2
    value, aux = value if has_aux else (value, None)
    leaves, treedef = tree.flatten((value, aux, gradients), is_leaf=lambda x: isinstance(x, Sharded))
    aux_from = len(tree.leaves(value))
    aux_to = aux_from + len(tree.leaves(aux, is_leaf=lambda x: isinstance(x, Sharded)))
    nodes: list[Any] = []
    terms: list[Tensor] = []
    for at, leaf in enumerate(leaves):
        if isinstance(leaf, Sharded):
            nodes.append(GradientNode(leaf.placement, tuple(None if p is None else p.dtype for p in leaf.pieces)))
            terms += _gradient_terms(leaf, keep_factor)
        elif isinstance(leaf, Tensor):
            stacked = aux_from <= at < aux_to and leaf.ndim > 0
            nodes.append(TensorNode(leaf.dtype, "stack" if stacked else "sum"))
            wide = leaf.is_floating_point() and not stacked
            term = leaf.to(torch.promote_types(leaf.dtype, torch.float32)) if wide else leaf
            terms.append(_weighted(term, weight) if wide and weight is not None and at < aux_to else term)
        else:
            nodes.append(leaf)
    return Recipe(treedef, tuple(nodes), has_aux), terms


def _gradient_terms(gradient: Sharded, keep_factor: bool) -> list[Tensor]:
    factor = gradient.multiplier
    terms = []
    for path, piece in zip(gradient.paths, gradient.pieces, strict=True):
        if piece is not None:
            policy = gradient.placement.policy_of(path)
            dtype = piece.dtype if policy is None or piece.is_complex() else policy.reduce
            wide = torch.promote_types(piece.dtype, torch.float32)
            terms.append(piece.to(dtype) if keep_factor else (piece.to(wide) * factor).to(dtype))
    return [*terms, factor if keep_factor else torch.ones_like(factor)]


def _weighted(term: Tensor, weight: Tensor) -> Tensor:
    """Return a term times its weight; zero where that is zero, whatever a mean over nothing came to."""
    return torch.where(weight == 0, 0.0, term * weight.to(term.dtype))
