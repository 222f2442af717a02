"""Which node's value is a view of which: noted while a trace is fresh, true whatever passes do to it.

`node.meta["val"]` tells it only then: a pass that copies a node copies the entry, and the two nodes, which will have
memory of their own, would seem to share it.
"""

from __future__ import annotations

import operator

from torch import Tensor, fx

from fzero._torch import storage_id
from fzero.operators import viewed
from fzero.program.graph.collectives import WAIT


def alias_of(node: fx.Node) -> int | None:
    """Return which of a node's inputs its value is a view of, as recorded by `record_aliases`."""
    found: int | None = node.meta.get("alias")
    return found


def record_aliases(graph: fx.Graph) -> None:
    """Note at each node of a fresh trace which of its inputs its value shares memory with."""
    for node in graph.nodes:
        record_alias(node)


def record_alias(node: fx.Node) -> None:
    """`record_aliases` for one node."""
    if node.op != "call_function":
        return
    if node.target in (WAIT, operator.getitem):
        node.meta["alias"] = 0
        return
    value = node.meta.get("val")
    # A tuple of views, as split gives, is a view as a whole: its elements are.
    first = value[0] if isinstance(value, list | tuple) and value else value
    if isinstance(first, Tensor):
        mine = storage_id(first)
        for i, source in enumerate(node.all_input_nodes):
            other = source.meta.get("val")
            if isinstance(other, Tensor) and storage_id(other) == mine:
                node.meta["alias"] = i
                return
        # A constant is a real tensor, and the val of a view of it is fake: their memory cannot be compared.
        given = [x for x in viewed(node.target, node.args, node.kwargs) if isinstance(x, fx.Node)]
        if constant := next((x for x in given if x.op == "get_attr"), None):
            node.meta["alias"] = node.all_input_nodes.index(constant)
