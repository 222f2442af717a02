"""A loop over micro-batches as one node of a graph.

    totals = run_loop(body, kinds, index, sums, whole, batch)

The body is a graph of its own, `[*sums, index, *whole, *part of batch] -> terms`, and runs once for each micro-batch.
A term of kind "sum" is the sum so far with this round's value added: where the body is lowered it lies in the same
memory. A term of kind "stack" is concatenated along dimension 0; of one that is the "same" each round, the last stays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor, fx

from fzero._torch import get_proxy_mode, torch_pytree, track_tensor_tree

Kind = Literal["sum", "stack", "same"]


def run_loop(
    body: Callable[[list[Tensor]], list[Tensor]],
    kinds: Sequence[Kind],
    index: Tensor,
    sums: Sequence[Tensor],
    whole: Sequence[Tensor],
    batch: Sequence[Tensor],
) -> list[Tensor]:
    """Run the body once for each micro-batch and collect what it returns.

    Args:
        body: see above; may empty the list that it is given.
        kinds: one for each term.
        index: int32 of shape (n,), the numbers of the micro-batches.
        sums: what sums start from, one for each term of that kind; may be overwritten.
        whole: tensors that every round sees.
        batch: tensors that are split along dimension 0.

    Returns:
        One tensor for each term.
    """
    n, totals = index.shape[0], list(sums)
    stacks: list[list[Tensor]] = [[] for kind in kinds if kind == "stack"]
    last: list[Tensor] = []
    for i in range(n):
        inputs = [*totals, index[i], *whole, *(part_of(x, i, n) for x in batch)]
        totals.clear()
        terms = body(inputs)
        totals = [term for term, kind in zip(terms, kinds, strict=True) if kind == "sum"]
        last = [term for term, kind in zip(terms, kinds, strict=True) if kind == "same"]
        for stack, term in zip(
            stacks, (t for t, kind in zip(terms, kinds, strict=True) if kind == "stack"), strict=True
        ):
            stack.append(term)
        del terms
    found = {"sum": iter(totals), "stack": (torch.cat(stack) for stack in stacks), "same": iter(last)}
    return [next(found[kind]) for kind in kinds]


@dataclass(frozen=True)
class LoopCall:
    """The arguments of a loop in a graph, by the names that they have above."""

    body: fx.Node
    kinds: Sequence[Kind]
    index: fx.Node
    sums: Sequence[fx.Node]
    whole: Sequence[fx.Node]
    batch: Sequence[fx.Node]

    @property
    def name(self) -> str:
        """The attribute of the graph's module that is the body."""
        return str(self.body.target)

    @property
    def args(self) -> tuple[Any, ...]:
        """They as a node holds them."""
        return tuple(getattr(self, field.name) for field in fields(self))

    @property
    def rounds(self) -> int:
        """How often the body runs."""
        return int(self.index.meta["val"].shape[0])


def loop_call(node: fx.Node) -> LoopCall:
    """Return what a node that calls `run_loop` gives it."""
    return LoopCall(*node.args)  # type: ignore[arg-type]


def record_loop(args: tuple[Any, ...], results: list[Tensor]) -> list[Tensor]:
    """Put a call of `run_loop` into the graph that is being traced, as one node whose results look like `results`.

    The body, a graph module, becomes an attribute of the graph's own.
    """
    mode = get_proxy_mode()
    assert mode is not None, "recording happens inside a trace"
    tracer: Any = mode.tracer

    def proxy(x: Any) -> Any:
        if isinstance(x, fx.GraphModule):
            name = f"body_{len(list(tracer.root.children()))}"
            tracer.root.add_module(name, x)
            return tracer.create_proxy("get_attr", name, (), {})
        return tracer.unwrap_proxy(x) if isinstance(x, Tensor) else x

    node = tracer.create_proxy("call_function", run_loop, torch_pytree.tree_map(proxy, args), {})
    tracked: list[Tensor] = track_tensor_tree(results, node, constant=None, tracer=tracer)
    return tracked


def part_of(x: Tensor, i: int, n: int) -> Tensor:
    """Return the i-th of n equal parts of dimension 0."""
    size = x.shape[0] // n
    return x.narrow(0, i * size, size)
