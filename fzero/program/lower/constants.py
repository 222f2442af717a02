"""What a program computes of nothing: rotation tables, position codes, windows. It is the same at every call.

Inductor takes such a chain into each kernel that reads it, and works it out again there: of a GPT of 12 blocks with
rotary positions, 48 kernels took sines and cosines. Computed once, when the program is compiled, they are read.

Only chains with an operation that costs more than a read are taken, such as a sine; a mask of comparisons is cheaper
made than read. What is kept this way is bounded.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from fzero._torch import OpOverload, storage_id
from fzero.operators import is_pure, written_by

# Operations whose result is worth keeping, by the name of their packet.
COSTLY = frozenset(
    f"aten.{name}"
    for name in ("sin", "cos", "tan", "exp", "exp2", "expm1", "log", "log1p", "log2", "tanh", "erf", "pow", "polar")
)
# Bytes of one tensor that is kept, and of all that one program keeps.
MOST, MOST_TOGETHER = 16 << 20, 64 << 20


def constants_of(module: fx.GraphModule) -> dict[fx.Node, Tensor]:
    """Return the nodes that stand for the same tensor at every call and are worth keeping, with their values.

    They are the last of their chains: what reads them depends on an input, or is too large to keep.

    Args:
        module: a graph after all passes. Tensors that it closes over may change, so they count as inputs.
    """
    chain: dict[fx.Node, bool] = {}  # those that depend on no input; whether a costly operation led there
    for node in module.graph.nodes:
        if _is_determined(node) and all(source in chain for source in node.all_input_nodes):
            costly = str(getattr(node.target, "overloadpacket", "")) in COSTLY
            chain[node] = costly or any(chain[source] for source in node.all_input_nodes)
    (output,) = module.graph.find_nodes(op="output")
    # What is overwritten is another tensor afterwards, and what is handed out is the caller's to overwrite.
    others = [*output.all_input_nodes, *(x for node in module.graph.nodes for x in written_by(node))]
    taken = {storage_id(x.meta["val"]) for x in others if isinstance(x.meta.get("val"), Tensor)}
    ends = [
        node
        for node, costly in chain.items()
        if costly and any(user not in chain for user in node.users) and storage_id(node.meta["val"]) not in taken
    ]
    kept: list[fx.Node] = []
    for node in ends:
        size = _bytes(node)
        if 0 < size <= MOST and sum(map(_bytes, kept)) + size <= MOST_TOGETHER:
            kept.append(node)
    return _values(module, kept)


def _is_determined(node: fx.Node) -> bool:
    """Whether a node makes the same of the same, and one tensor that nobody writes."""
    return (
        node.op == "call_function"
        and isinstance(node.target, OpOverload)
        and node.target.namespace in ("aten", "prims")
        and is_pure(node.target)
        and isinstance(node.meta.get("val"), Tensor)
    )


def _bytes(node: fx.Node) -> int:
    value = node.meta["val"]
    return int(value.numel() * value.element_size())


def _values(module: fx.GraphModule, wanted: list[fx.Node]) -> dict[fx.Node, Tensor]:
    known: dict[fx.Node, Any] = {}
    needed = set(wanted)
    for node in reversed(module.graph.nodes):
        if node in needed:
            needed.update(node.all_input_nodes)
    with torch.no_grad():
        for node in module.graph.nodes:
            if node in needed:
                target: Any = node.target
                known[node] = target(*map_arg(node.args, known.__getitem__), **map_arg(node.kwargs, known.__getitem__))
    return {node: known[node] for node in wanted}
