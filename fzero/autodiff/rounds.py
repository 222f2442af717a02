"""The rounds of an accumulation: run one after another, or recorded as one node of the graph that is being traced."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from fzero import tree
from fzero._torch import FakeTensor, disable_proxy_modes_tracing, get_proxy_mode, is_functorch_wrapped
from fzero.errors import TraceError
from fzero.marks import marks_of, set_marks
from fzero.program.graph.loop import Kind, part_of, record_loop, run_loop
from fzero.program.graph.sizes import part_like
from fzero.program.graph.trace import check_keyed, graph_of, results
from fzero.random.keyed import current_draw, drawing_from
from fzero.wrapped import traced_node


@dataclass(frozen=True)
class Rounds:
    """What runs once for each micro-batch: the arguments of `run_loop`, before its sums are known.

    Attributes:
        body: `[index, *whole, *part of batch] -> terms`.
        kinds: one for each term, once the body has run.
        index: int32 of shape (n,), the numbers of the micro-batches.
        whole: tensors that every round sees.
        batch: tensors that are split along dimension 0.
    """

    body: Callable[[list[Tensor]], list[Tensor]]
    kinds: Callable[[], Sequence[Kind]]
    index: Tensor
    whole: Sequence[Tensor]
    batch: Sequence[Tensor]

    @property
    def n(self) -> int:
        """The number of micro-batches."""
        return self.index.shape[0]


def in_loop(rounds: Rounds) -> list[Tensor]:
    """Run the body for each micro-batch: now, or as a node of the graph that is being traced."""
    around = current_draw()
    if around is not None:
        keys, scope = around.of_microbatches()
        rounds = replace(rounds, body=_drawing(rounds.body, scope, len(keys)), whole=[*keys, *rounds.whole])
    plain = not any(is_functorch_wrapped(x) for x in (*rounds.whole, *rounds.batch))
    return (_record if get_proxy_mode() is not None and plain else one_by_one)(rounds)


def _drawing(
    body: Callable[[list[Tensor]], list[Tensor]], scope: Callable[..., drawing_from], count: int
) -> Callable[[list[Tensor]], list[Tensor]]:
    """Return a body that draws from keys of its micro-batch, made of the first `count` of its inputs."""

    def drawing(inputs: list[Tensor]) -> list[Tensor]:
        index, keys, rest = inputs[0], inputs[1 : 1 + count], inputs[1 + count :]
        with scope(index, keys):
            return body([index, *rest])

    return drawing


def one_by_one(rounds: Rounds) -> list[Tensor]:
    """Run the body as it is. What it sums is known after its first round."""
    first = rounds.body([rounds.index[0], *rounds.whole, *(part_of(x, 0, rounds.n) for x in rounds.batch)])
    known = rounds.kinds()
    sums = [term + torch.zeros_like(term) for term, kind in zip(first, known, strict=True) if kind == "sum"]
    ready = iter([first])

    def added(inputs: list[Tensor]) -> list[Tensor]:
        before, rest = inputs[: len(sums)], inputs[len(sums) :]
        so_far, made = iter(before), next(ready, None)
        if made is not None:
            return [next(so_far) if kind == "sum" else term for term, kind in zip(made, known, strict=True)]
        terms = zip(rounds.body(rest), known, strict=True)
        return [next(so_far) + term if kind == "sum" else term for term, kind in terms]

    return run_loop(added, known, rounds.index, sums, rounds.whole, rounds.batch)


def _record(rounds: Rounds) -> list[Tensor]:
    """Trace the body once, and put a call of `run_loop` into the graph that is being traced."""
    n, whole = rounds.n, rounds.whole
    with disable_proxy_modes_tracing():
        examples = [rounds.index[0], *whole, *(part_like(x, n) for x in rounds.batch)]
        module = graph_of(lambda *inputs: _undifferentiated(rounds.body(list(inputs))), examples)
        check_keyed(module)
        closed = _closed_over(module, 1 + len(whole))
        known = tuple(rounds.kinds())
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
    return record_loop((module, known, rounds.index, sums, [*whole, *closed], list(rounds.batch)), totals)


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
