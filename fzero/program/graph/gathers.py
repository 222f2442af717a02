"""Which nodes of a graph only make stored pieces into full leaves."""

from __future__ import annotations

import operator
from collections.abc import Container

import torch
from torch import fx

from fzero.program.graph.aliases import alias_of
from fzero.program.graph.collectives import GATHERS, WAIT

_CASTS = frozenset((torch.ops.aten._to_copy.default, torch.ops.aten.clone.default))


def from_pieces(graph: fx.Graph, fixed: Container[fx.Node] = (), of: Container[fx.Node] | None = None) -> set[fx.Node]:
    """Return the nodes between stored pieces and full leaves: gathers, casts and views of inputs, nothing else.

    Args:
        graph: where.
        fixed: nodes that are not to be among them.
        of: the inputs that count as pieces. Default: all.
    """
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op != "call_function" or node in fixed:
            continue
        is_step = node.target in GATHERS or node.target in _CASTS or node.target in (WAIT, operator.getitem)
        is_step = is_step or alias_of(node) is not None
        if is_step and all(_is_stored(s, of) or s in found for s in node.all_input_nodes):
            found.add(node)
    return found


def _is_stored(node: fx.Node, of: Container[fx.Node] | None) -> bool:
    return node.op == "get_attr" or (node.op == "placeholder" and (of is None or node in of))
