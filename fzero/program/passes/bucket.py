"""A block's collectives in one call, packed in the order of the parameters.

A collective costs a latency whatever it carries; a block has a dozen leaves. Leaves of one block (of one list index in
their paths, or of one module) that go the same way over the same axis in the same dtype share a call:

    all-gathers         one coalesced call: each leaf arrives in a tensor of its own, nothing is copied
    reduce-scatters     one coalesced call
    all-to-all + sum    (what a reduce-scatter is on gloo) packed side by side, sent, and added as one:

        grads   (N·a), (N·b), …  ──cat──▶ (N, a+b+…) ──all-to-all──▶ (N, a+b+…) ──sum──▶ (a+b+…) ──split──▶ (a), (b), …

Leaves of two trees stay apart, whatever their names, and so do two gradients of one leaf: a block of another model, or
of another pullback, runs at another time. No bucket carries more than `bucket` bytes. A collective never joins a bucket
whose result it needs: were a second gather computed from the first one's leaf, one call could not do both. That holds
through other buckets too. On NCCL the order of a sum may depend on what it is packed with: that is the one last bit a
pass may move.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from fzero._torch import FakeTensorMode
from fzero.marks import Marks, marks_of
from fzero.program.graph.build import call, mode_of
from fzero.program.graph.collectives import ISSUES, WAIT, sum_of
from fzero.program.graph.trace import Trace, copied
from fzero.program.graph.values import Values, nbytes, precedences
from fzero.program.options import Options
from fzero.ranks.sums import SUM_PARTS

# A leaf of more bytes than this is sent by itself: to copy it beside others would take longer than a call.
_PACKED = 256 * 1024


@dataclass
class _Bucket:
    key: tuple[Any, ...]
    number: int
    members: list[fx.Node] = field(default_factory=list)
    size: int = 0
    needs: int = 0  # the buckets that something in this one depends on, as bits: 0b101 for buckets 0 and 2


def bucket(trace: Trace, options: Options) -> Trace:
    """Return the trace with the collectives of each block in one call."""
    if not options.bucket:
        return trace
    trace = trace.replace(module=copied(trace.module))
    graph = trace.module.graph
    values = Values.of(trace)
    before = precedences(graph, values)
    fixed = values.overwritten()
    merged = [found for found in _collected(graph, before, fixed, options.bucket) if len(found.members) > 1]
    mode = mode_of(graph)
    for found in merged:
        with graph.inserting_before(graph.output_node()):
            merge = _listed if ISSUES[found.members[0].target].packs == "listed" else _in_rows
            merge(graph, mode, found.members)
    if merged:
        _sort(graph, before)
    return trace


def _collected(
    graph: fx.Graph, before: Mapping[fx.Node, Sequence[fx.Node]], fixed: set[fx.Node], limit: int
) -> list[_Bucket]:
    """Sort the collectives into buckets, without a cycle between them."""
    buckets: list[_Bucket] = []
    open_: dict[tuple[Any, ...], _Bucket] = {}
    needs: dict[fx.Node, int] = {}
    for node in graph.nodes:
        bits = 0
        for source in (*node.all_input_nodes, *before.get(node, ())):
            bits |= needs[source]
        key = None if node in fixed else _key(node)
        if key is not None:
            size, all_needed = _wire_bytes(node), _closure(bits, buckets)
            found = open_.get(key)
            full = found is None or found.size + size > limit or _is_there(node, found)
            if found is None or full or all_needed >> found.number & 1:
                found = open_[key] = _Bucket(key, len(buckets))
                buckets.append(found)
            found.members.append(node)
            found.size += size
            found.needs |= bits
            bits |= 1 << found.number
        needs[node] = bits
    return buckets


def _is_there(node: fx.Node, found: _Bucket) -> bool:
    """Whether a bucket holds a leaf of this path already: then this one is of another pullback, or of another tree."""
    return any(marks_of(member).leaf == marks_of(node).leaf for member in found.members)


def _closure(bits: int, buckets: list[_Bucket]) -> int:
    """Return the bits of these buckets and of all that they depend on, be it through others."""
    done = 0
    while new := bits & ~done:
        number = new.bit_length() - 1
        done |= 1 << number
        bits |= buckets[number].needs
    return done


def _key(node: fx.Node) -> tuple[Any, ...] | None:
    """Return what has to be equal for two collectives to share a call; `None` for what is left alone."""
    row = ISSUES.get(node.target)
    if row is None or row.packs is None or node.target is not row.operator or not (block := _block(node)):
        return None
    value, marks = node.args[0].meta["val"], marks_of(node)  # type: ignore[union-attr]
    kind = (marks.tree, marks.role, marks.phase, marks.repeated)
    if row.packs == "listed":
        return (node.target, value.dtype, repr(node.args[1:]), block, *kind)
    total = sum_of(node)
    if value.ndim != 1 or total is None or nbytes(value) > _PACKED:
        return None
    _, ranks, dtype = total.args
    return (node.target, value.dtype, repr((ranks, node.args[-1])), dtype, block, *kind)


def _block(node: fx.Node) -> str | None:
    """Return the block that a leaf belongs to: its path up to the first number in it, or else its module."""
    leaf = marks_of(node).leaf
    if leaf is None:
        return None
    keys = leaf.split(".")
    numbers = [i for i, key in enumerate(keys) if key.isdigit()]
    return ".".join(keys[: numbers[0] + 1] if numbers else keys[:-1])


def _wire_bytes(node: fx.Node) -> int:
    return max(nbytes(node.meta["val"]), nbytes(node.args[0].meta["val"]))  # type: ignore[union-attr]


def _marks(members: list[fx.Node]) -> Marks:
    return marks_of(members[0]).replace(leaf=", ".join(marks_of(member).leaf or "" for member in members))


def _listed(graph: fx.Graph, mode: FakeTensorMode, members: list[fx.Node]) -> None:
    """Put one coalesced call in the place of several."""
    inputs, coalesced = [member.args[0] for member in members], ISSUES[members[0].target].coalesced
    issue = call(graph, mode, coalesced, (inputs, *members[0].args[1:]), _marks(members))
    for i, member in enumerate(members):
        own = call(graph, mode, operator.getitem, (issue, i), marks_of(member))
        member.replace_all_uses_with(own)
        graph.erase_node(member)


def _in_rows(graph: fx.Graph, mode: FakeTensorMode, members: list[fx.Node]) -> None:
    """Send tensors side by side, and add what arrives as one."""
    totals = [total for member in members if (total := sum_of(member)) is not None]
    _, parts, dtype = totals[0].args
    aten, marks = torch.ops.aten, _marks(members)
    sizes = [member.args[0].meta["val"].numel() // parts for member in members]  # type: ignore[union-attr]
    rows = [
        call(graph, mode, aten.view.default, (member.args[0], [parts, n]), marks_of(member))
        for member, n in zip(members, sizes, strict=True)
    ]
    pack = call(graph, mode, aten.cat.default, (rows, 1), marks)
    ones = [1] * parts  # type: ignore[operator]
    received = call(graph, mode, members[0].target, (pack, ones, ones, members[0].args[-1]), marks)
    arrived = call(graph, mode, WAIT, (received,), marks)
    total = call(graph, mode, SUM_PARTS, (arrived, parts, dtype), marks)
    flat = call(graph, mode, aten.view.default, (total, [-1]), marks)
    split = call(graph, mode, aten.split_with_sizes.default, (flat, sizes), marks)
    for i, (member, old) in enumerate(zip(members, totals, strict=True)):
        own = call(graph, mode, operator.getitem, (split, i), marks_of(member))
        old.replace_all_uses_with(own)
        for gone in (old, old.args[0], member):
            graph.erase_node(gone)  # type: ignore[arg-type]


def _sort(graph: fx.Graph, before: Mapping[fx.Node, Sequence[fx.Node]]) -> None:
    """Bring new nodes, which stand at the end, in front of what first needs them; keep the order otherwise."""
    order = sorted_by(graph, before)
    assert order is not None, "no bucket needs itself"
    reorder(graph, order)


def sorted_by(graph: fx.Graph, before: Mapping[fx.Node, Sequence[fx.Node]]) -> list[fx.Node] | None:
    """Return the nodes in their order, what must come before another brought in front of it; `None` if none can be."""
    emitted: dict[fx.Node, None] = {}
    present = set(graph.nodes)
    for wanted in graph.nodes:
        stack, under_way = [wanted], {wanted}
        while stack:
            needed = (*stack[-1].all_input_nodes, *before.get(stack[-1], ()))
            missing = next((source for source in needed if source not in emitted and source in present), None)
            if missing is None:
                under_way.discard(stack[-1])
                emitted[stack.pop()] = None
            elif missing in under_way:
                return None
            else:
                stack.append(missing)
                under_way.add(missing)
    return list(emitted)


def reorder(graph: fx.Graph, nodes: Iterable[fx.Node]) -> None:
    """Bring a graph's nodes into this order."""
    last = graph._root
    for node in nodes:
        last.append(node)
        last = node
