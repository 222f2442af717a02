"""Accumulation: one large batch as several micro-batches, traced once.

    for i in range(n):   value, gradients = f(state, batch[i])     one micro-batch at a time
                         sum += value, gradients                   gradients as pieces: sharded sums

Eagerly this is that loop. Inside a trace the body is traced by itself, once however large n is, and one
node of the outer graph, `run_loop`, stands for all its rounds. Both add the same numbers in the same order,
from zero.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fzero import tree
from fzero._torch import (
    FakeTensor,
    disable_proxy_modes_tracing,
    get_proxy_mode,
    is_functorch_wrapped,
    record_call,
    traced_node,
)
from fzero.autodiff.batch import Batch, HasMicrobatches, check_whole, parameters_of
from fzero.autodiff.terms import Recipe, taken_apart
from fzero.autodiff.vjp import ValueAndGrad
from fzero.autodiff.weights import mean_over, ranks_of, relative, weight_of
from fzero.errors import BatchError, TraceError
from fzero.marks import marks_of, set_marks
from fzero.program.graph.loop import Kind, part_of, run_loop
from fzero.program.graph.sizes import part_like
from fzero.program.graph.trace import check_keyed, graph_of, results
from fzero.random.keyed import current_draw, drawing_from
from fzero.ranks.peers import together


def accumulate(
    f: Callable[..., Any],
    n: int,
    weight: Callable[..., Any] | None = None,
    whole: int | str | Sequence[int | str] = (),
) -> Callable[..., Any]:
    """Return a function equal to `f` that splits its batch into `n` micro-batches and averages.

    Args:
        f: from `fz.value_and_grad`, or a function that returns `(value, gradients)` or
            `((value, aux), gradients)` likewise. Under `fz.jit` it is traced once, for one micro-batch.
        n: the number of micro-batches.
        weight: what a micro-batch counts, such as its number of tokens: `weight(batch)` is a number, or a tensor of
            shape (). It is called with the arguments that are split. Value, gradients and floating-point scalars of
            `aux` are then weighted means over the micro-batches and over the ranks, the same on every rank. Left
            out, all count the same, and a value is this rank's own.
        whole: positions, or names, of arguments that every micro-batch gets whole.

    Returns:
        A function with the arguments and results of `f`. Differentiated arguments, every `State` and `Sharded`, and
        those of `whole` are passed to each micro-batch whole, and so are tensors of shape () and what is no tensor.
        All other tensors are split along dimension 0, whatever tree they stand in.
        Value and gradients are means over the micro-batches; gradients of a `State` stay sharded and are summed
        in the policy's `reduce` dtype. Of `aux`, floating-point scalars are averaged, integer scalars added up,
        and tensors with dimensions concatenated along dimension 0. Where all weights are zero, so are value and
        gradients.

    Raises:
        BatchError: from the call: a tensor of the batch does not split into `n`, an argument holds tensors where
            they are not seen, or nothing can be split.
        TypeError: `weight` with a function that is not of `fz.value_and_grad`; from the call: it gives no number.
        TraceError: from the call under `fz.jit`: `f` closes over a tensor that is being differentiated.

    Example:
        >>> from fzero.autodiff.vjp import value_and_grad
        >>> gradient = accumulate(value_and_grad(lambda w, x: (w * x).mean()), 2)
        >>> gradient(torch.tensor(1.0), torch.tensor([1.0, 2.0, 3.0, 4.0]))
        (tensor(2.5000), tensor(2.5000))
    """
    if not isinstance(n, int) or n < 1:
        raise BatchError(f"fz.accumulate: n must be a whole number of at least 1, got {n!r}.")
    if weight is not None and not isinstance(f, ValueAndGrad):
        raise TypeError(
            "fz.accumulate: weight= has to reach the cotangent, before ranks meet: pass what fz.value_and_grad "
            f"returned, and not {getattr(f, '__name__', tree.describe(f))}, which is around it."
        )
    differentiated = f.differentiated if isinstance(f, ValueAndGrad) else (0,)
    function = f.f if isinstance(f, ValueAndGrad) else f
    names = parameters_of(function)
    chosen = check_whole((whole,) if isinstance(whole, int | str) else tuple(whole), function)

    def accumulated(*args: Any, **kwargs: Any) -> Any:
        batch = Batch.of(args, kwargs, n, differentiated, chosen, names)
        recipes: list[Recipe] = []

        def body(inputs: list[Tensor], weights: Tensor | None = None) -> list[Tensor]:
            index, rest = inputs[0], inputs[1:]
            positional, keywords = batch.arguments(rest[: len(batch.whole)], rest[len(batch.whole) :])
            positional = [_for_microbatch(a, index) for a in positional]
            keywords = {name: _for_microbatch(a, index) for name, a in keywords.items()}
            if weights is None:
                result = f(*positional, **keywords)
            else:
                assert isinstance(f, ValueAndGrad), "checked above"
                result = f.weighted(weights, *positional, **keywords)
            recipe, terms = taken_apart(result, keep_factor=isinstance(f, ValueAndGrad), weight=weights)
            recipes[:] = [recipe]
            return terms

        def weighted(inputs: list[Tensor]) -> list[Tensor]:
            return body(inputs[:-1], inputs[-1].reshape(()))

        index = torch.arange(n, dtype=torch.int32, device=_device(batch.whole, batch.split))
        if weight is None:
            terms = _loop(body, lambda: recipes[0].kinds, index, batch.whole, batch.split)
            return recipes[0].finish(terms, n)
        ranks = ranks_of([args[i] for i in differentiated if i < len(args)])
        with together("fz.accumulate"):
            own = _weights(weight, index, batch.only_counted())
        weights = relative(own, ranks)
        # A single micro-batch needs no loop.
        loop = _loop if n > 1 else _run
        terms = loop(weighted, lambda: recipes[0].kinds, index, batch.whole, [*batch.split, weights])
        value, gradients = recipes[0].finish(terms, n)
        return mean_over(ranks, value, has_aux=recipes[0].has_aux), gradients

    return accumulated


def _weights(weight: Callable[..., Any], index: Tensor, batch: Batch) -> Tensor:
    """Return what each micro-batch counts."""

    def body(inputs: list[Tensor]) -> list[Tensor]:
        rest = inputs[1:]
        positional, keywords = batch.arguments(rest[: len(batch.whole)], rest[len(batch.whole) :])
        return [weight_of(weight(*positional, **keywords), index.device)]

    loop = _loop if index.shape[0] > 1 else _run
    (weights,) = loop(body, lambda: ["stack"], index, batch.whole, batch.split)
    return weights


def _loop(
    body: Callable[[list[Tensor]], list[Tensor]],
    kinds: Callable[[], Sequence[Kind]],
    index: Tensor,
    whole: Sequence[Tensor],
    batch: Sequence[Tensor],
) -> list[Tensor]:
    """Run the body for each micro-batch: now, or as a node of the graph that is being traced."""
    around = current_draw()
    if around is not None:
        keys, scope = around.of_microbatches()
        body, whole = _drawing(body, scope, len(keys)), [*keys, *whole]
    traced = get_proxy_mode() is not None and not any(is_functorch_wrapped(x) for x in (*whole, *batch))
    return (_record if traced else _run)(body, kinds, index, whole, batch)


def _drawing(
    body: Callable[[list[Tensor]], list[Tensor]], scope: Callable[..., drawing_from], count: int
) -> Callable[[list[Tensor]], list[Tensor]]:
    """Return a body that draws from keys of its micro-batch, made of the first `count` of its inputs."""

    def drawing(inputs: list[Tensor]) -> list[Tensor]:
        index, keys, rest = inputs[0], inputs[1 : 1 + count], inputs[1 + count :]
        with scope(index, keys):
            return body([index, *rest])

    return drawing


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
        parts = [part_like(x, n) for x in batch]
        module = graph_of(lambda *inputs: _undifferentiated(body(list(inputs))), [index[0], *whole, *parts])
        check_keyed(module)
        closed = _closed_over(module, 1 + len(whole))
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
    for tensor in closed:
        if traced_node(tensor) is None:
            raise _closes_over(tensor, "another trace computes")
    return record_call(run_loop, (module, known, index, sums, [*whole, *closed], list(batch)), totals)


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
            # A sum is marked as what is added to it: of a gradient of leaf `w`, as that.
            total.meta = {"val": torch.empty_like(so_far.meta["val"])}
            set_marks(total, marks_of(term))
            added.append(total)
        else:
            added.append(term)
    output.args = (added,)
    module.meta["donated"] = frozenset(range(sum(kind == "sum" for kind in kinds)))


def _for_microbatch(argument: Any, index: Tensor) -> Any:
    is_node = lambda x: isinstance(x, HasMicrobatches)  # noqa: E731
    return tree.map(lambda x: x.for_microbatch(index) if is_node(x) else x, argument, is_leaf=is_node)


def _closed_over(module: fx.GraphModule, at: int) -> list[Tensor]:
    """Return what a body closes over of the trace around it; the body gets it as inputs, from the one at `at` on."""
    graph = module.graph
    found: list[Tensor] = []
    last = [node for node in graph.nodes if node.op == "placeholder"][at - 1]
    for node in graph.find_nodes(op="get_attr"):
        value = getattr(module, str(node.target))
        if isinstance(value, FakeTensor):
            with graph.inserting_after(last):
                last = graph.placeholder(f"closed_{len(found)}")
            last.meta = {**node.meta, "val": value}
            node.replace_all_uses_with(last)
            graph.erase_node(node)
            found.append(value)
    return found


def _undifferentiated(terms: list[Tensor]) -> list[Tensor]:
    """Return the terms of a body, if no transform around the loop differentiates what it closes over."""
    for term in terms:
        if is_functorch_wrapped(term):
            raise _closes_over(term, "is being differentiated")
    return terms


def _closes_over(tensor: Tensor, what: str) -> TraceError:
    return TraceError(
        f"fz.accumulate: the function closes over a tensor of {tree.describe(tensor)} that {what}. Pass it as an "
        f"argument, which every micro-batch gets whole if it has no dimension, or is named in whole=."
    )


def _outputs(module: fx.GraphModule) -> list[Tensor]:
    return [node.meta["val"] for node in results(module)]


def _device(*groups: Sequence[Tensor]) -> torch.device:
    return next((x.device for group in groups for x in group), torch.device("cpu"))
