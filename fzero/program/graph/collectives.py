"""Collectives in a graph: which operators they are, and what they move."""

from __future__ import annotations

import operator

from torch import fx

from fzero._torch import OpOverload, c10d

WAIT = c10d.wait_tensor.default
ISSUES = frozenset(
    packet.default
    for packet in (
        c10d.all_gather_into_tensor,
        c10d.all_gather_into_tensor_coalesced,
        c10d.reduce_scatter_tensor,
        c10d.reduce_scatter_tensor_coalesced,
        c10d.all_to_all_single,
        c10d.all_reduce,
        c10d.all_reduce_coalesced,
        c10d.broadcast,
    )
)
GATHERS = frozenset((c10d.all_gather_into_tensor.default, c10d.all_gather_into_tensor_coalesced.default))


def is_collective(node: fx.Node) -> bool:
    """Return whether a node starts a collective, or sends something to one rank."""
    target = node.target
    return isinstance(target, OpOverload) and target.namespace == "_c10d_functional" and target is not WAIT


def issue_of(wait: fx.Node) -> fx.Node | None:
    """Return the collective that a wait is for."""
    source = wait.args[0]
    if isinstance(source, fx.Node) and source.target is operator.getitem:
        source = source.args[0]
    return source if isinstance(source, fx.Node) and source.target in ISSUES else None


def sent_for(wait: fx.Node) -> list[fx.Node]:
    """Return what is on its way until a wait: of a coalesced collective, the tensor that this result comes of."""
    issue = issue_of(wait)
    if issue is None:
        return []
    inputs, element = issue.args[0], wait.args[0]
    if isinstance(inputs, list | tuple):
        assert isinstance(element, fx.Node)
        inputs = inputs[element.args[1]]  # type: ignore[index]
    return [inputs] if isinstance(inputs, fx.Node) else []
