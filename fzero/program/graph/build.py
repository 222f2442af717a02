"""Making new nodes in a graph, complete with what passes and reports read of a node."""

from __future__ import annotations

from typing import Any

from torch import fx
from torch.fx.node import map_arg

from fzero._torch import FakeTensorMode
from fzero.marks import Marks, set_marks
from fzero.program.graph.aliases import record_alias


def call(graph: fx.Graph, mode: FakeTensorMode, target: Any, args: tuple[Any, ...], marks: Marks) -> fx.Node:
    """Put a call of an operator at the graph's insertion point.

    Args:
        graph: where.
        mode: the fake tensors' mode of the graph's vals.
        target: the operator.
        args: its arguments, with nodes where values stand.
        marks: what the node is for.
    """
    node = graph.call_function(target, args)
    with mode:
        value = target(*map_arg(args, lambda n: n.meta["val"]))
    node.meta = {"val": value}
    set_marks(node, marks)
    record_alias(node)
    return node


def mode_of(graph: fx.Graph) -> FakeTensorMode:
    """Return the mode of a traced graph's vals."""
    for node in graph.nodes:
        value = node.meta.get("val")
        if hasattr(value, "fake_mode"):
            mode: FakeTensorMode = value.fake_mode
            return mode
    return FakeTensorMode(allow_non_fake_inputs=True)
