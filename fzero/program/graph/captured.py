"""Writes to tensors that a traced function closes over.

Such a tensor is part of the program. A write to it would be done again by each run, on the same tensor, behind
the back of whoever holds it, and on every rank for itself. A step gives out new values instead.

The write is found after tracing. Of a tensor and a number, as in `count.add_(1)`, torch does it while it traces:
such a tensor has changed once when the error is raised.
"""

from __future__ import annotations

import linecache
import operator
from typing import Any

from torch import Tensor, fx

from fzero.errors import TraceError
from fzero.marks import line_of
from fzero.operators import viewed, written_by
from fzero.tree import describe


def check_captured(module: fx.GraphModule) -> None:
    """Raise if a graph, or the body of a loop in it, writes to one of its constants, or to a view of one.

    Raises:
        TraceError: names the tensor, the operator, and the line that did it.
    """
    for body in module.children():
        if isinstance(body, fx.GraphModule):
            check_captured(body)
    constants: dict[fx.Node, Any] = {}  # a node to the constant that its value lies in
    for node in module.graph.nodes:
        if node.op == "get_attr":
            constants[node] = getattr(module, str(node.target))
            continue
        for source in written_by(node):
            if isinstance(constants.get(source), Tensor):
                raise TraceError(
                    f"fz.jit: {node.target} writes to a tensor of {describe(constants[source])} that the function "
                    f"closes over, {_line(node)}\n"
                    f"A program has arguments and results, and no state of its own: pass the tensor as an argument and "
                    f"return the new value, or write to a copy (.clone())."
                )
        for source in _views(node):
            if source in constants:
                constants[node] = constants[source]


def _views(node: fx.Node) -> list[fx.Node]:
    """Return the arguments whose memory the value of a node may lie in."""
    if node.target is operator.getitem:
        return node.all_input_nodes
    return [x for x in viewed(node.target, node.args, node.kwargs) if isinstance(x, fx.Node)]


def _line(node: fx.Node) -> str:
    found = line_of(node)
    if found is None:
        return "at a line that is not known."
    file, line, function = found
    return f"at\n  {file}:{line} in {function}\n    {linecache.getline(file, line).strip()}"
