"""What the memory of a program is for: a kind for each buffer.

    params, moments     what stays between steps: inputs that hold it, and what an update makes of it
    gathered            full leaves, from the cast of a piece on
    activations         made in the forward, or again for the backward, and read by the backward
    gradients           full gradients, packed ones, and the pieces that they are reduced to
    inputs              the other arguments, and tensors that the function closes over
    other               what lives from one operation to the next

A full gradient is what a reduction or an update reads, and what leads to that by steps that only reshape, cast, add
or pack: in mm ──▶ view ──▶ cast ──▶ reduce-scatter, what the mm returns and all behind it. What the mm reads are
cotangents of activations: "other".
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from fzero import tree
from fzero._torch import OpOverload
from fzero.kernels.in_place import IN_PLACE, is_in_place, targets_of
from fzero.marks import marks_of
from fzero.program.graph.aliases import alias_of
from fzero.program.graph.loop import loop_call, run_loop
from fzero.program.graph.trace import Trace, results
from fzero.program.graph.values import Values, tensors_of
from fzero.sharding.sharded import Sharded

KINDS = ("params", "moments", "gathered", "activations", "gradients", "inputs", "other")
# What stays between steps. "state" is the rest of a state: step, seed, loss scale.
AT_REST = ("params", "moments", "state")

# Operations whose result is a gradient of the size of what went in, or several of them side by side.
_CARRIES = frozenset(
    (
        torch.ops.aten._to_copy.default,
        torch.ops.aten.clone.default,
        torch.ops.aten.constant_pad_nd.default,
        torch.ops.aten.cat.default,
    )
)


def kinds_in(arguments: Any) -> tuple[str, ...]:
    """Return, for each tensor of a tree, what it is for.

    A `Sharded` holds params, or gradients if it has a factor. A state is what has params that are a `Sharded`, and
    moments.

    Example:
        >>> kinds_in({"batch": torch.ones(2)})
        ('inputs',)
    """
    found: list[str] = []
    for node in tree.leaves(arguments, is_leaf=lambda x: isinstance(x, Sharded) or _is_state(x)):
        if isinstance(node, Sharded):
            kind = "params" if node.factor is None else "gradients"
            found += [kind for x in tree.leaves(node) if isinstance(x, Tensor)]
        elif _is_state(node):
            for path, leaf in zip(tree.paths(node), tree.leaves(node), strict=True):
                part = path.partition(".")[0]
                if isinstance(leaf, Tensor):
                    found.append(part if part in ("params", "moments") else "state")
        elif isinstance(node, Tensor):
            found.append("inputs")
    return tuple(found)


def _is_state(x: Any) -> bool:
    return not isinstance(x, Tensor) and isinstance(getattr(x, "params", None), Sharded) and hasattr(x, "moments")


def kinds_of(trace: Trace, values: Values) -> list[str]:
    """Return the kind of each buffer of a trace, one of `KINDS`."""
    graph = trace.module.graph
    late = _late(graph)
    gradients = _gradients(graph, late, values)
    for_backward = _read_by(values, lambda n: marks_of(n).phase == "backward")
    for_late = _read_by(values, lambda n: n in late)
    kinds = ["other"] * len(values.size)

    def kind_of(node: fx.Node, buffer: int) -> str:
        marks = marks_of(node)
        if marks.role == "gather":
            return "gathered"
        if buffer in gradients or marks.role == "reduce":
            return "gradients"
        read = for_late if marks.repeated else for_backward
        return "activations" if node not in late and buffer in read else "other"

    inputs = iter(trace.kinds or ["inputs"] * len(trace.inputs))
    for node in graph.nodes:
        if node.op == "placeholder":
            kind = next(inputs)
            kind = kind if kind in KINDS else "other"
            for b in values.makes[node]:
                kinds[b] = kind
        elif node.op == "get_attr":
            for b in values.makes[node]:
                kinds[b] = "inputs"
        elif node.op == "call_function":
            for b in values.makes[node]:
                kinds[b] = kind_of(node, b)
            if node.target in IN_PLACE and marks_of(node).role == "update":
                for b, target in zip(values.makes[node], targets_of(node), strict=False):
                    kinds[b] = kinds[values.holds[target][0]]
    _name_results(trace, values, kinds, late)
    return kinds


def _name_results(trace: Trace, values: Values, kinds: list[str], late: set[fx.Node]) -> None:
    """Call a new state's parameters and moments so, where they lie in memory of their own: what was not donated."""
    if trace.output is None:
        return
    nodes = results(trace.module)
    for node, kind in zip(nodes, kinds_in(trace.output.fill(n.meta["val"] for n in nodes)), strict=True):
        for b in values.holds[node]:
            if kind in ("params", "moments") and values.owner[b] in late:
                kinds[b] = kind


def _late(graph: fx.Graph) -> set[fx.Node]:
    """Return the nodes of the backward, and what is computed from them, but for forward values made again."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        marks = marks_of(node)
        if marks.repeated or node.op != "call_function":
            continue
        starts = marks.phase == "backward" or marks.role in ("reduce", "update") or node.target is run_loop
        if starts or any(source in found for source in node.all_input_nodes):
            found.add(node)
    return found


def _gradients(graph: fx.Graph, late: set[fx.Node], values: Values) -> set[int]:
    """Return the buffers that hold gradients of leaves, as the module docstring has it."""
    found: set[fx.Node] = set()
    for node in reversed(list(graph.nodes)):
        role = marks_of(node).role
        sources = [source for source in node.all_input_nodes if source in late]
        if node.target is run_loop:
            found.update(loop_call(node).sums)  # reductions of gradients, and of the loss
        elif role == "reduce":
            found.update(sources)
        elif (node.target in IN_PLACE or is_in_place(node)) and isinstance(given := node.args[1], list | tuple):
            found.update(source for source in given if source in late)  # an update kernel is given them as a list
        elif role == "update" or (node in found and _is_pointwise(node)):
            size = max(_numel(node), *(_numel(source) for source in targets_of(node)), 0)
            found.update(s for s in sources if _numel(s) == size and marks_of(s).role != "update")
        elif node in found and (node.target in _CARRIES or alias_of(node) is not None):
            # Of an operator that returns a tuple, the element that is a gradient, not the others.
            found.update(sources if node.target is not operator.getitem else ())
    return {b for node in found for b in values.holds[node]}


def _is_pointwise(node: fx.Node) -> bool:
    return isinstance(node.target, OpOverload) and torch.Tag.pointwise in node.target.tags


def overwritten(node: fx.Node) -> list[fx.Node]:
    """Return the inputs that an update in place overwrites."""
    return targets_of(node) if is_in_place(node) else []


def _numel(node: fx.Node) -> int:
    return sum(x.numel() for x in tensors_of(node)[:1] if x is not None)


def _read_by(values: Values, reader: Callable[[fx.Node], bool]) -> set[int]:
    return {b for node, buffers in values.reads.items() if reader(node) for b in buffers}
