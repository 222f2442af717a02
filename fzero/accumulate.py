"""Accumulation: one large batch as several micro-batches, traced once.

    for i in range(n):   value, gradients = f(state, batch[i])     one micro-batch at a time
                         sum += value, gradients                   gradients as pieces: sharded sums

Eagerly this is that loop. Inside a trace the body is traced by itself, once however large n is, and one
node of the outer graph, `run_loop`, stands for all its rounds. Both add the same numbers in the same order,
from zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, fx

from fzero import tree
from fzero._torch import FakeTensor, disable_proxy_modes_tracing, get_proxy_mode, is_functorch_wrapped, record_call
from fzero.autodiff import ValueAndGrad
from fzero.errors import BatchError, TraceError
from fzero.layout import Placement, Sharded
from fzero.marks import marks_of
from fzero.program.loop import Kind, part_of, run_loop
from fzero.program.trace import check_keyed, graph_of, results


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
            terms = _run(body, lambda: recipes[0].kinds, index, whole, batch)
        else:
            terms = _record(body, lambda: recipes[0].kinds, index, whole, batch)
        return recipes[0].finish(terms, n)

    return accumulated


def _run(
    body: Callable[[list[Tensor]], list[Tensor]],
    kinds: Callable[[], Sequence[Kind]],
    index: Tensor,
    whole: Sequence[Tensor],
    batch: Sequence[Tensor],
) -> list[Tensor]:
    """Run the body as it is. What it sums is known after its first round."""
    n = index.shape[0]
    first = body([index[0], *whole, *(part_of(x, 0, n) for x in batch)])
    known = kinds()
    sums = [term + torch.zeros_like(term) for term, kind in zip(first, known, strict=True) if kind == "sum"]
    ready = iter([first])

    def added(inputs: list[Tensor]) -> list[Tensor]:
        before, rest = inputs[: len(sums)], inputs[len(sums) :]
        terms = next(ready, None)
        if terms is not None:
            so_far = iter(before)
            return [next(so_far) if kind == "sum" else term for term, kind in zip(terms, known, strict=True)]
        return _added(body(rest), known, before)

    return run_loop(added, known, index, sums, whole, batch)


def _added(terms: Sequence[Tensor], kinds: Sequence[Kind], sums: Sequence[Tensor]) -> list[Tensor]:
    """Return the terms of a round, with the sums so far added to those that are summed."""
    rest = iter(sums)
    return [next(rest) + term if kind == "sum" else term for term, kind in zip(terms, kinds, strict=True)]


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
        parts = [part_of(x, 0, n) for x in batch]
        module = graph_of(lambda *inputs: body(list(inputs)), [index[0], *whole, *parts])
        check_keyed(module)
        _check_closed(module)
        known = tuple(kinds())
        _add_up(module, known)
        shapes = [
            ((term.shape[0] * n, *term.shape[1:]) if kind == "stack" else term.shape, term)
            for term, kind in zip(_outputs(module), known, strict=True)
        ]
        totals = [torch.empty(shape, dtype=term.dtype, device=term.device) for shape, term in shapes]
    sums = [
        torch.zeros(total.shape, dtype=total.dtype, device=total.device)
        for total, kind in zip(totals, known, strict=True)
        if kind == "sum"
    ]
    return record_call(run_loop, (module, known, index, sums, list(whole), list(batch)), totals)


def _add_up(module: fx.GraphModule, kinds: Sequence[Kind]) -> None:
    """Give the body inputs for the sums so far, in front of its others, and add its terms to them."""
    graph, terms = module.graph, results(module)
    output, added = graph.output_node(), []
    first = next(iter(graph.nodes))
    for at, (term, kind) in enumerate(zip(terms, kinds, strict=True)):
        if kind == "sum":
            with graph.inserting_before(first):
                so_far = graph.placeholder(f"sum_{at}")
            so_far.meta = {"val": torch.empty_like(term.meta["val"], memory_format=torch.contiguous_format)}
            with graph.inserting_before(output):
                total = graph.call_function(torch.ops.aten.add.Tensor, (so_far, term))
            # The marks of what is added tell where it belongs.
            total.meta = {"val": torch.empty_like(so_far.meta["val"]), "custom": dict(marks_of(term))}
            added.append(total)
        else:
            added.append(term)
    output.args = (added,)
    module.meta["donated"] = frozenset(range(sum(kind == "sum" for kind in kinds)))


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
    for path, piece in zip(gradient.paths, gradient.pieces, strict=True):
        if piece is not None:
            policy = gradient.placement.policy_of(path)
            dtype = piece.dtype if policy is None else policy.reduce
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
