"""Going through a program, its loops included."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import fx
from torch.fx.node import map_arg

from fzero.program.graph.loop import loop_call, run_loop
from fzero.program.graph.trace import Trace


def calls(trace: Trace, times: int = 1) -> Iterator[tuple[fx.Node, int]]:
    """Yield every operation of a program with the number of times that it runs; a loop as what its body holds."""
    for node in trace.module.graph.nodes:
        if node.target is run_loop:
            yield from calls(body_of(trace, node), times * loop_call(node).rounds)
        elif node.op == "call_function":
            yield node, times


def body_of(trace: Trace, loop: fx.Node) -> Trace:
    """Return what a loop of a trace runs in each round."""
    return trace.bodies[loop_call(loop).name]


def vals(arguments: Any) -> Any:
    """Return arguments of a node with fake tensors in the place of nodes."""
    return map_arg(arguments, lambda n: n.meta.get("val"))
