"""Where each operation of a program comes from: a line of the user's code, and the block that it runs in.

A forward operation is marked with both while it is traced. A backward operation is marked with the line that calls the
pullback, which is the same for all; what it is the backward of shows in the flow of data: it reads what the forward
operation read or made. The backward of y = tanh(x) reads y. Of all forward values that an operation reads, the one made
last tells where it belongs. Where it reads cotangents alone, it belongs where they do. That is right for nearly all
operations, and a neighbour for the others.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePath

from torch import fx

from fzero.marks import Line, line_of, marks_of
from fzero.program.graph.kinds import overwritten
from fzero.program.graph.values import tensors_of


@dataclass(frozen=True)
class Origin:
    """Where an operation comes from.

    Attributes:
        line: file, line and function; `None` where nothing is known.
        block: the block of the module; `None` outside of blocks.
        backward: whether it is the backward of what stands there.
    """

    line: Line | None
    block: str | None
    backward: bool = False

    def __str__(self) -> str:
        if self.line is None:
            return ""
        file, line, function = self.line
        name = function.replace("<locals>.", "")
        return f"{'backward of ' if self.backward else ''}{PurePath(file).name}:{line} in {name}"


def origins_of(graph: fx.Graph) -> dict[fx.Node, Origin]:
    """Return the origin of each operation of a graph."""
    found: dict[fx.Node, Origin] = {}
    latest: dict[fx.Node, Origin] = {}  # of values: that of the last operation that wrote them
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        own = Origin(line_of(node), marks_of(node).block)
        found[node] = own
        if _is_backward(node):
            read = _forward_sources(node, own.line)
            before = [latest[source] for source in node.all_input_nodes if source in latest and latest[source].backward]
            if read:
                nearest = found[max(read, key=order.__getitem__)]
                found[node] = Origin(nearest.line, nearest.block, backward=True)
            elif before:
                found[node] = before[-1]
        latest[node] = found[node]
        for target in overwritten(node):
            latest[target] = found[node]
    return found


def _forward_sources(node: fx.Node, pullback: Line | None) -> list[fx.Node]:
    """Return the forward operations that a backward one reads from.

    What bears the line of the pullback's call was made for the backward, of what is asked for instead.
    """
    found: list[fx.Node] = []
    stack = [source for source in node.all_input_nodes if _is_forward(source)]
    while stack:
        at = _used_at(stack.pop())
        if line_of(at) == pullback:
            stack += [source for source in at.all_input_nodes if _is_forward(source)]
        else:
            found.append(at)
    return found


def _is_backward(node: fx.Node) -> bool:
    marks = marks_of(node)
    return marks.phase == "backward" and not marks.repeated and marks.role is None


def _is_forward(node: fx.Node) -> bool:
    marks = marks_of(node)
    is_marked = node.op == "call_function" and marks.role is None and marks.line is not None
    return is_marked and (marks.phase != "backward" or marks.repeated)


def _used_at(node: fx.Node) -> fx.Node:
    """Return the forward operation that a value tells of: for indices, the one that looks up by them."""
    value = next((x for x in tensors_of(node) if x is not None), None)
    if value is not None and not value.is_floating_point():
        for user in node.users:
            made = next((x for x in tensors_of(user) if x is not None), None)
            if _is_forward(user) and made is not None and made.is_floating_point():
                return user
    return node
