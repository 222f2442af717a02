"""Which node's value is a view of which: noted while a trace is fresh, true whatever passes do to it; who writes what.

Vals tell it only then: a node that a pass copies shares its val, and so its memory, with the original.
"""

from __future__ import annotations

import operator

import torch
from torch import Tensor, fx

from fzero._torch import OpOverload, storage_id
from fzero.program.wire import WAIT

_ATEN = torch.ops.aten
# Batch norms overwrite the running mean and variance that they are given, and their schemas do not say so.
_BATCH_NORMS = (_ATEN.native_batch_norm.default, _ATEN.cudnn_batch_norm.default, _ATEN.miopen_batch_norm.default)
_RUNNING, _IS_TRAINING = (3, 4), 5


def written_by(node: fx.Node) -> list[fx.Node]:
    """Return the arguments whose memory an operator overwrites."""
    if not isinstance(node.target, OpOverload):
        return []
    if node.target in _BATCH_NORMS:
        given = [node.args[i] for i in _RUNNING if node.args[_IS_TRAINING]]
        return [source for source in given if isinstance(source, fx.Node)]
    if not node.target._schema.is_mutable:
        return []
    found: list[fx.Node] = []
    for position, argument in enumerate(node.target._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = node.args[position] if position < len(node.args) else node.kwargs.get(argument.name)
            many = value if isinstance(value, list | tuple) else (value,)
            found += [source for source in many if isinstance(source, fx.Node)]
    return found


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
