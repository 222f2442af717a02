"""Collectives started early, and waited for late, where memory leaves room.

A scheduled program gathers a block right before it is used, and waits for it at once; the wire idles while it
computes, and computing idles while the wire is busy. So a gather is issued while the block before it runs, and what
follows from a reduction waits until later reductions have started:

    scheduled    gather 2, wait 2, block 2;  gather 3, wait 3, block 3;   …  reduce 3, wait, update 3;  block 2 backward
    overlapped   wait 2, gather 3, block 2;  wait 3, gather 4, block 3;   …  reduce 3, block 2 backward, wait, update 3

One gather at most is under way ahead of its time: that of block 3 starts behind the wait for block 2's. Where its
bytes would then lift memory over the peak of the schedule plus `overlap` bytes, it starts later, as soon as they fit. A
reduction's wait, with the update behind it, comes later in the same way: as long as what it sends and receives fits,
and until eight later reductions have started, which is about as many as one block has.

Where ranks have agreed on an order of collectives (`fzero.program.agree.order`), that order stays.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import fx

from fzero.program.agree.order import named
from fzero.program.graph.collectives import ISSUES, WAIT, issue_of, waits_of
from fzero.program.graph.gathers import from_pieces
from fzero.program.graph.trace import Trace, copied
from fzero.program.graph.values import Values, precedences
from fzero.program.options import Options
from fzero.program.passes.bucket import reorder
from fzero.program.report.memory import inside_loops, live_bytes

# Reductions that may be under way at once: about those of one block.
_UNDER_WAY = 8


def overlap(trace: Trace, options: Options) -> Trace:
    """Return the trace with collectives under way while something else runs."""
    if options.overlap is None or not any(node.target in ISSUES for node in trace.module.graph.nodes):
        return trace
    trace = trace.replace(module=copied(trace.module))
    graph = trace.module.graph
    values = Values.of(trace)
    order = list(graph.nodes)
    inside = inside_loops(trace)
    live = live_bytes(order, values, inside)
    limit = max(live, default=0) + options.overlap
    cheap = from_pieces(graph, values.overwritten())
    fixed = set() if trace.order is None else {node for _, node in named(trace)}
    order, live = _gathers_early(order, live, limit, values, cheap, fixed)
    late = _reductions_late(order, live, limit, values, cheap, fixed, precedences(graph, values))
    # That counted what waits to be updated, and not what an update makes while it runs late. So the peak is looked at.
    if max(live_bytes(late, values, inside), default=0) <= limit:
        order = late
    reorder(graph, order)
    return trace


def _gathers_early(
    order: list[fx.Node],
    live: list[int],
    limit: int,
    values: Values,
    cheap: set[fx.Node],
    fixed: set[fx.Node],
) -> tuple[list[fx.Node], list[int]]:
    """Issue each gather of stored pieces behind the wait for the one before it."""
    position = {node: i for i, node in enumerate(order)}
    moved: dict[int, list[fx.Node]] = {}  # position -> the gathers, with their casts, to be issued in front of it
    anchor = next((i for i, node in enumerate(order) if node.op != "placeholder"), 0)
    for node in order:
        if node in fixed and (node.target not in ISSUES or node not in cheap):
            anchor = max(anchor, position[node] + 1)
        if node.target not in ISSUES or node not in cheap:
            continue
        group = _issued_with(node, cheap, position, anchor)
        first = position[group[0]]
        size = sum(values.size[b] for member in group for b in values.makes[member])
        start = first
        while start > anchor and live[start - 1] + size <= limit:
            start -= 1
        for i in range(start, first):
            live[i] += size
        moved.setdefault(start, []).extend(group)
        anchor = max(anchor, min((position[wait] for wait in waits_of(node)), default=position[node]) + 1)
    gone = {node for group in moved.values() for node in group}
    new_order, new_live = [], []
    for i, node in enumerate(order):
        for early in moved.get(i, ()):
            new_order.append(early)
            new_live.append(live[i])
        if node not in gone:
            new_order.append(node)
            new_live.append(live[i])
    return new_order, new_live


def _issued_with(issue: fx.Node, cheap: set[fx.Node], position: dict[fx.Node, int], anchor: int) -> list[fx.Node]:
    """Return a gather with the casts that lead to it, as far as they stand behind `anchor`, in order."""
    found, stack = {issue}, [issue]
    while stack:
        for source in stack.pop().all_input_nodes:
            if source in cheap and source not in found and position[source] >= anchor:
                found.add(source)
                stack.append(source)
    return sorted(found, key=position.__getitem__)


@dataclass
class _UnderWay:
    """A reduction that is not waited for yet: what follows from it, in order, and the buffers that live on for it."""

    issue: fx.Node
    late: list[fx.Node] = field(default_factory=list)
    held: set[int] = field(default_factory=set)

    def is_awaited_by(self, node: fx.Node) -> bool:
        return node.target is WAIT and issue_of(node) is self.issue


def _reductions_late(
    order: list[fx.Node],
    live: list[int],
    limit: int,
    values: Values,
    cheap: set[fx.Node],
    fixed: set[fx.Node],
    before: dict[fx.Node, list[fx.Node]],
) -> list[fx.Node]:
    """Put what follows from a reduction behind later ones, or where its bytes would no longer fit."""
    new_order: list[fx.Node] = []
    last = {b: i for i, node in enumerate(order) for b in values.reads.get(node, ())}
    under_way: list[_UnderWay] = []
    belongs: dict[fx.Node, _UnderWay] = {}  # a node that comes late -> the reduction that it follows from

    def end_first() -> None:
        first = under_way.pop(0)
        new_order.extend(first.late)
        for node in first.late:
            del belongs[node]

    for i, node in enumerate(order):
        needs = (*node.all_input_nodes, *before.get(node, ()))
        follows = [r for r in under_way if r.is_awaited_by(node) or any(belongs.get(source) is r for source in needs)]
        issues = node.target in ISSUES and node not in cheap
        if follows and (issues or node in fixed or node.op == "output"):
            while follows[-1] in under_way:
                end_first()
            follows = []
        if issues:
            under_way.append(_UnderWay(node, held={*values.reads[node], *values.makes[node]}))
        while under_way and (
            len(under_way) > _UNDER_WAY
            or node.op == "output"
            or live[i] + sum(values.size[b] for b in set().union(*(r.held for r in under_way))) > limit
        ):
            if issues and len(under_way) == 1:
                break  # the one that starts right here, and cannot end before the next node
            end_first()
        follows = [r for r in follows if r in under_way]
        if follows:
            follows[-1].late.append(node)
            follows[-1].held.update(b for b in values.reads[node] if last[b] == i)
            belongs[node] = follows[-1]
        else:
            new_order.append(node)
    return new_order
