"""Accumulation: one large batch as several micro-batches, traced once.

    for i in range(n):   value, gradients = f(state, batch[i])     one micro-batch at a time
                         sum += value, gradients                   gradients as pieces: sharded sums

Eagerly this is that loop. Inside a trace the body is traced by itself, once however large n is, and one
node of the outer graph, `run_loop`, stands for all its rounds. Both add the same numbers in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, fx

from fzero import tree
from fzero._torch import FakeTensor, disable_proxy_modes_tracing, get_proxy_mode, is_functorch_wrapped, record_call
from fzero.autodiff import ValueAndGrad
from fzero.errors import BatchError, TraceError
from fzero.layout import Placement, Sharded
from fzero.program.trace import check_keyed, graph_of, results

# What becomes of a tensor that the body returns: added up, concatenated along dimension 0, or the same each round.
Kind = Literal["sum", "stack", "same"]


@runtime_checkable
class HasMicrobatches(Protocol):
    """An argument whose random draws differ between micro-batches."""

    def for_microbatch(self, index: Tensor) -> Any: ...


def accumulate(f: Callable[..., Any], n: int) -> Callable[..., Any]:
    """Return a function equal to `f` that splits its batch into `n` micro-batches and averages.

    Args:
        f: from `fz.value_and_grad`, or a function that returns `(value, gradients)` or
            `((value, aux), gradients)` likewise. Under `fz.jit` it is traced once, for one micro-batch.
        n: the number of micro-batches.

    Returns:
        A function with the arguments and results of `f`. Differentiated arguments, and every `State` and
        `Sharded`, are passed to each micro-batch whole. Of the others, every tensor is split along dimension 0.
        Value and gradients are means over the micro-batches; gradients of a `State` stay sharded and are summed
        in the policy's `reduce` dtype. Of `aux`, floating-point scalars are averaged, integer scalars added up,
        and tensors with dimensions concatenated along dimension 0.

    Raises:
        BatchError: from the call: a tensor of the batch does not split into `n`.
        TraceError: from the call under `fz.jit`: `f` closes over a tensor that is being traced.

    Example:
        >>> from fzero.autodiff import value_and_grad
        >>> gradient = accumulate(value_and_grad(lambda w, x: (w * x).mean()), 2)
        >>> gradient(torch.tensor(1.0), torch.tensor([1.0, 2.0, 3.0, 4.0]))
        (tensor(2.5000), tensor(2.5000))
    """
    if not isinstance(n, int) or n < 1:
        raise BatchError(f"fz.accumulate: n must be a whole number of at least 1, got {n!r}.")
    whole_positions = f.differentiated if isinstance(f, ValueAndGrad) else (0,)

    def accumulated(*args: Any) -> Any:
        batch_at = [i for i, a in enumerate(args) if i not in whole_positions and not _is_whole(a)]
        whole, _, whole_tree = tree.split([None if i in batch_at else a for i, a in enumerate(args)])
        batch, _, batch_tree = tree.split([args[i] for i in batch_at])
        _check_batch(batch_tree, batch, batch_at, n)
        recipes: list[_Recipe] = []

        def body(inputs: list[Tensor]) -> list[Tensor]:
            index, rest = inputs[0], inputs[1:]
            arguments = whole_tree.fill(rest[: len(whole)])
            for position, part in zip(batch_at, batch_tree.fill(rest[len(whole) :]), strict=True):
                arguments[position] = part
            recipe, terms = _taken_apart(
                f(*(_for_microbatch(a, index) for a in arguments)), keep_factor=isinstance(f, ValueAndGrad)
            )
            recipes[:] = [recipe]
            return terms

        index = torch.arange(n, dtype=torch.int32, device=_device(whole, batch))
        if get_proxy_mode() is None or any(is_functorch_wrapped(x) for x in (*whole, *batch)):
            terms = run_loop(body, lambda: recipes[0].kinds, index, whole, batch)
        else:
            terms = _record(body, lambda: recipes[0].kinds, index, whole, batch)
        return recipes[0].finish(terms, n)

    return accumulated


def run_loop(
    body: Callable[[list[Tensor]], list[Tensor]],
    kinds: Callable[[], Sequence[Kind]] | Sequence[Kind],
    index: Tensor,
    whole: Sequence[Tensor],
    batch: Sequence[Tensor],
) -> list[Tensor]:
    """Run the body once for each micro-batch and collect what it returns.

    Args:
        body: `[index, *whole, *batch] -> terms`; may empty the list.
        kinds: one for each term, or a function that tells them once the body has run.
        index: int32 of shape (n,), the numbers of the micro-batches.
        whole: tensors that every round sees.
        batch: tensors that are split along dimension 0.

    Returns:
        One tensor for each term.
    """
    n, totals, stacks = index.shape[0], [], {}
    for i in range(n):
        parts = [x.narrow(0, i * (x.shape[0] // n), x.shape[0] // n) for x in batch]
        terms = body([index[i], *whole, *parts])
        if i == 0:
            known = kinds() if callable(kinds) else kinds
            totals = list(terms)
            stacks = {at: [terms[at]] for at, kind in enumerate(known) if kind == "stack"}
            continue
        for at, kind in enumerate(known):
            if kind == "sum":
                totals[at] = totals[at] + terms[at]
            elif kind == "stack":
                stacks[at].append(terms[at])
    for at, stack in stacks.items():
        totals[at] = torch.cat(stack)
    return totals


def _record(
    body: Callable[[list[Tensor]], list[Tensor]],
    kinds: Callable[[], Sequence[Kind]],
    index: Tensor,
    whole: Sequence[Tensor],
    batch: Sequence[Tensor],
) -> list[Tensor]:
    """Trace the body once, and put a call of `run_loop` into the graph that is being traced."""
    n = index.shape[0]
    with disable_proxy_modes_tracing():
        parts = [x.narrow(0, 0, x.shape[0] // n) for x in batch]
        module = graph_of(lambda *inputs: body(list(inputs)), [index[0], *whole, *parts])
        check_keyed(module)
        _check_closed(module)
        totals = []
        for term, kind in zip(_outputs(module), kinds(), strict=True):
            shape = (term.shape[0] * n, *term.shape[1:]) if kind == "stack" else term.shape
            totals.append(torch.empty(shape, dtype=term.dtype, device=term.device))
    return record_call(run_loop, (module, tuple(kinds()), index, list(whole), list(batch)), totals)


@dataclass(frozen=True)
class _GradientNode:
    """A `Sharded` among the results: its pieces are summed, its factor is kept."""

    placement: Placement
    dtypes: tuple[torch.dtype | None, ...]

    @property
    def kinds(self) -> list[Kind]:
        sums: list[Kind] = ["sum" for dtype in self.dtypes if dtype is not None]
        return [*sums, "same"]

    def finish(self, totals: Iterator[Tensor], n: int) -> Sharded:
        pieces = tuple(None if dtype is None else next(totals).to(dtype) for dtype in self.dtypes)
        return Sharded(pieces, self.placement, next(totals) / n)


@dataclass(frozen=True)
class _TensorNode:
    """A plain tensor among the results."""

    dtype: torch.dtype
    kind: Kind

    @property
    def kinds(self) -> list[Kind]:
        return [self.kind]

    def finish(self, totals: Iterator[Tensor], n: int) -> Tensor:
        total = next(totals)
        return (total / n).to(self.dtype) if self.kind == "sum" and self.dtype.is_floating_point else total


@dataclass(frozen=True)
class _Recipe:
    """How totals of terms become a result like that of one micro-batch."""

    treedef: tree.TreeDef
    nodes: tuple[Any, ...]
    has_aux: bool

    @property
    def kinds(self) -> list[Kind]:
        return [k for node in self.nodes if isinstance(node, _GradientNode | _TensorNode) for k in node.kinds]

    def finish(self, totals: Sequence[Tensor], n: int) -> Any:
        rest = iter(totals)
        nodes = [x.finish(rest, n) if isinstance(x, _GradientNode | _TensorNode) else x for x in self.nodes]
        value, aux, gradients = tree.unflatten(self.treedef, nodes)
        return ((value, aux), gradients) if self.has_aux else (value, gradients)


def _taken_apart(result: Any, *, keep_factor: bool) -> tuple[_Recipe, list[Tensor]]:
    """Return how to put a micro-batch's result together, and the terms that it adds to.

    Gradients of `value_and_grad` carry the same factor each round, so their pieces add up as they are.
    Another function may give each round a factor of its own, and is summed in true values.
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
            nodes.append(_GradientNode(leaf.placement, tuple(None if p is None else p.dtype for p in leaf.pieces)))
            terms += _gradient_terms(leaf, keep_factor)
        elif isinstance(leaf, Tensor):
            stacked = aux_from <= at < aux_to and leaf.ndim > 0
            nodes.append(_TensorNode(leaf.dtype, "stack" if stacked else "sum"))
            wide = leaf.is_floating_point() and not stacked
            terms.append(leaf.to(torch.promote_types(leaf.dtype, torch.float32)) if wide else leaf)
        else:
            nodes.append(leaf)
    return _Recipe(treedef, tuple(nodes), has_aux), terms


def _gradient_terms(gradient: Sharded, keep_factor: bool) -> list[Tensor]:
    factor = gradient.multiplier
    terms = []
    for piece in gradient.pieces:
        if piece is not None:
            dtype = piece.dtype if gradient.policy is None else gradient.policy.reduce
            wide = torch.promote_types(piece.dtype, torch.float32)
            terms.append(piece.to(dtype) if keep_factor else (piece.to(wide) * factor).to(dtype))
    return [*terms, factor if keep_factor else torch.ones_like(factor)]


def _is_whole(argument: Any) -> bool:
    is_node = lambda x: isinstance(x, (Sharded, HasMicrobatches))  # noqa: E731
    return any(is_node(node) for node in tree.leaves(argument, is_leaf=is_node))


def _for_microbatch(argument: Any, index: Tensor) -> Any:
    is_node = lambda x: isinstance(x, HasMicrobatches)  # noqa: E731
    return tree.map(lambda x: x.for_microbatch(index) if is_node(x) else x, argument, is_leaf=is_node)


def _check_batch(batch: tree.Hollow, leaves: Sequence[Tensor], positions: Sequence[int], n: int) -> None:
    paths = tree.structure_paths(batch.treedef)
    paths = [p for p, slot in zip(paths, batch.slots, strict=True) if isinstance(slot, tree.Slot)]
    for path, leaf in zip(paths, leaves, strict=True):
        if leaf.ndim == 0 or leaf.shape[0] % n:
            first, _, rest = path.partition(".")
            where = f"argument {positions[int(first)]}" + (f", {rest!r}" if rest else "")
            size = "no dimension" if leaf.ndim == 0 else f"{leaf.shape[0]} rows"
            raise BatchError(
                f"fz.accumulate: {where} has {size} (shape {tuple(leaf.shape)}), which do not split into {n} "
                f"micro-batches. Choose a number that divides them; pass constants as numbers, or close over them."
            )


def _check_closed(module: fx.GraphModule) -> None:
    for node in module.graph.nodes:
        value = getattr(module, str(node.target)) if node.op == "get_attr" else None
        if isinstance(value, FakeTensor):
            raise TraceError(
                f"fz.accumulate: the function closes over a tensor of shape {tuple(value.shape)} that the step "
                f"computes. Pass it as an argument."
            )


def _outputs(module: fx.GraphModule) -> list[Tensor]:
    return [node.meta["val"] for node in results(module)]


def _device(*groups: Sequence[Tensor]) -> torch.device:
    return next((x.device for group in groups for x in group), torch.device("cpu"))
