"""Values that a trace knows: those that none of its inputs decides.

A traced function sees tensors without values. What it makes of nothing but constants has a value all the same,
and a model may ask for it: are these positions, counted from zero, one sequence? Inside `answering` such a
question is answered by running, on the CPU, the few operations that lead to it:

    arange(8) ──▶ diff ──▶ != 1 ──▶ any ──▶ bool(...)        every one known: False
    batch     ──▶ any ──▶ bool(...)                          comes from an input: refused, as before
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from fzero._torch import OpOverload, TorchDispatchMode, modes_off, storage_id
from fzero.operators import is_pure, written_by
from fzero.random.keyed import check_can_be_keyed
from fzero.wrapped import traced_node

# What reads values. Operations whose result has a shape that depends on values stay refused.
_READS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default)


class answering(TorchDispatchMode):  # noqa: N801 - used as a context manager, `with answering():`
    """While active inside a trace, answers questions for values that the trace knows; a generator it refuses."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _READS:
            asked = [traced_node(x) for x in args if isinstance(x, Tensor)]
            nodes = [node for node in asked if node is not None]
            if nodes and len(nodes) == len(asked) and (order := _sources(nodes)) is not None:
                with modes_off():
                    values = _values(order)
                    return func(*(values[node] for node in nodes))
        if kwargs and kwargs.get("generator") is not None:  # torch 2.11 cannot write it into a graph
            check_can_be_keyed("fz.jit", func, args, kwargs)
        return func(*args, **(kwargs or {}))


def is_known(x: Tensor) -> bool:
    """Return whether the trace that is running knows the value of `x`: no input decides it."""
    node = traced_node(x)
    return node is not None and _sources([node]) is not None


def _sources(nodes: list[fx.Node]) -> list[fx.Node] | None:
    """Return the operations that lead to some values, in order; `None` where they are not all known."""
    found: set[fx.Node] = set()
    pending = list(nodes)
    while pending:
        node = pending.pop()
        if node in found:
            continue
        if not _is_known(node):
            return None
        found.add(node)
        pending += node.all_input_nodes
    order, memory = [], {_memory(node) for node in found}
    for node in nodes[0].graph.nodes:
        if node in found:
            order.append(node)
        elif not memory.isdisjoint(_memory(target) for target in _written(node)):
            return None  # such as x = zeros(3); x[0] = batch.sum()
    return order


def _is_known(node: fx.Node) -> bool:
    return node.op == "call_function" and is_pure(node.target) and isinstance(node.meta.get("val"), Tensor)


def _written(node: fx.Node) -> list[fx.Node]:
    """Return the arguments that an operation writes to; all of them for what is no plain operator."""
    return written_by(node) if isinstance(node.target, OpOverload) else list(node.all_input_nodes)


def _memory(node: fx.Node) -> Any:
    value = node.meta.get("val")
    return storage_id(value) if isinstance(value, Tensor) else node


def _values(order: list[fx.Node]) -> dict[fx.Node, Tensor]:
    values: dict[fx.Node, Tensor] = {}
    for node in order:
        args = map_arg(node.args, values.__getitem__)
        kwargs = dict(map_arg(node.kwargs, values.__getitem__))
        # They are few numbers, and a program may be traced for a device that is not there.
        if "device" in kwargs:
            kwargs["device"] = torch.device("cpu")
        values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    return values
