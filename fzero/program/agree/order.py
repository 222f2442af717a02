"""The collectives of a program in their order: what ranks have to have in common to run together.

Programs of one function may differ in everything else: each rank has a batch of its own length, or another constant.
What collectives send has to be equal in size, too. Leaves are. Something that depends on the batch, such as `axis.sum`
of a loss for each row, may not be: so the names of a program with open sizes are taken at the sizes of each call.

But passes order collectives by the bytes around them, and so by the sizes of the batch. So the program of a function
that is there first decides: its order is written into the store, and later programs with the same collectives, of this
rank and of others, keep to it.

    rank 0   trace, length 4 ─▶ passes ─▶ order A ─▶ store: A is first
    rank 1   trace, length 9 ─▶ passes ─▶ order B ─▶ store ─▶ A ─▶ passes again, in the order of A
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor, fx
from torch.fx.node import map_arg

from fzero.marks import marks_of
from fzero.program.graph.collectives import is_collective
from fzero.program.graph.loop import loop_call, run_loop
from fzero.program.graph.trace import Trace
from fzero.program.graph.walk import body_of
from fzero.ranks.agree import first_written

_T = TypeVar("_T")

# The names of a program's collectives, in order; of a loop that holds some, its name and those of its body.
Order = list[Any]


def collectives(trace: Trace) -> Iterator[tuple[str, fx.Node]]:
    """Yield the name of each collective of a program with its node; those of a loop behind the loop."""
    for name, node in named(trace):
        yield (name if node.target is run_loop else _name(node, sizes=True)), node
        if node.target is run_loop:
            for inner, place in collectives(body_of(trace, node)):
                yield f"    {inner}", place


def digest(function: str, trace: Trace, told: Mapping[str, str]) -> str:
    """Return a hash of a function's name, its program's collectives, and what else ranks have to have in common.

    It is nothing where there are no collectives.
    """
    names = [name for name, _ in collectives(trace)]
    lines = (function, *names, *(f"{name}: {text}" for name, text in told.items()))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:32] if names else ""


def named(trace: Trace) -> list[tuple[str, fx.Node]]:
    """Return the collectives of a graph, and its loops that hold some, in order; without sizes, except of leaves."""
    found = []
    for node in trace.module.graph.nodes:
        if is_collective(node):
            found.append((_name(node, sizes=marks_of(node).leaf is not None), node))
        elif node.target is run_loop and (inside := order_of(body_of(trace, node))):
            text = json.dumps(_sorted(inside)).encode()
            found.append((f"loop, {loop_call(node).rounds} rounds of {hashlib.sha256(text).hexdigest()[:12]}", node))
    return found


def order_of(trace: Trace) -> Order:
    """Return the order of a program's collectives as data."""
    return [[name, order_of(body_of(trace, node))] if node.target is run_loop else name for name, node in named(trace)]


def with_order(trace: Trace, order: Order) -> Trace:
    """Return a trace whose passes keep its collectives in an order."""
    bodies = dict(trace.bodies)
    loops: dict[str, Order] = {x[0]: x[1] for x in order if isinstance(x, list)}
    for name, node in named(trace):
        if name in loops:
            at = loop_call(node).name
            bodies[at] = with_order(bodies[at], loops[name])
    return trace.replace(bodies=bodies, order=tuple(x if isinstance(x, str) else x[0] for x in order))


def chained(trace: Trace) -> dict[fx.Node, fx.Node]:
    """Return, for each collective but the first, the one that has to come before it by the order of the trace."""
    by_name: dict[str, list[fx.Node]] = {}
    for name, node in named(trace) if trace.order else ():
        by_name.setdefault(name, []).append(node)
    if sorted(trace.order or ()) != sorted(name for name, nodes in by_name.items() for _ in nodes):
        return {}
    nodes = [by_name[name].pop(0) for name in trace.order or ()]
    return dict(zip(nodes[1:], nodes, strict=False))


def in_first_order(function: str, passes: Callable[[Order | None], tuple[Trace, _T]]) -> tuple[Trace, _T]:
    """Run passes, in the order of the first program of a function with these collectives.

    Args:
        function: its name, the same on every rank.
        passes: take the order that collectives are to have; `None` for the one that is best.
    """
    done, passed = passes(None)
    order = order_of(done)
    if not order or not dist.is_initialized():
        return done, passed
    members = json.dumps([function, _sorted(order)]).encode()
    first = json.loads(first_written(f"order/{hashlib.sha256(members).hexdigest()}", json.dumps(order)))
    return (done, passed) if first == order else passes(first)


def _sorted(order: Order) -> Order:
    return sorted(([x[0], _sorted(x[1])] if isinstance(x, list) else [x] for x in order), key=repr)


def _name(node: fx.Node, *, sizes: bool) -> str:
    marks = marks_of(node)
    operation = str(node.target).removeprefix("_c10d_functional.").removesuffix(".default")
    leaf = "" if marks.leaf is None else f" of {marks.leaf}"
    axis = "" if marks.axis is None else f" over {marks.axis}"
    kind = " ".join(word for word in (marks.role, marks.phase) if word is not None)
    sent, *rest = map_arg(node.args, lambda source: source.meta.get("val"))
    constants = [x for x in rest[:-1] if sizes or not isinstance(x, list | tuple)]  # the last one is the group
    return f"{operation}{leaf}{axis}: {_kinds(sent, sizes)} {constants} {kind}".rstrip()


def _kinds(value: Any, sizes: bool) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{tuple(value.shape) if sizes else ''}"
    return ", ".join(_kinds(x, sizes) for x in value) if isinstance(value, list | tuple) else str(value)
