"""Outputs written into the memory of donated inputs.

An update kernel exists twice: as a function that returns new tensors, and in place. The trace holds the
first. Where the memory it would overwrite is donated, or was made by the program itself, and nobody reads
it later, this pass puts the second there:

    p', m', v' = adamw([p, m, v], [g], …)    ──▶    adamw_([p, m, v], [g], …);  p' = p,  m' = m,  v' = v

Sums of gradients go the same way. Then outputs are given memory of their own. A result that is a view of an
input that the caller keeps, or of another result, is copied: a later call may overwrite either.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from fzero.kernels.in_place import IN_PLACE, targets_of
from fzero.marks import marks_of, set_marks
from fzero.program.graph.trace import Trace, copied, results
from fzero.program.graph.values import Values
from fzero.program.options import Options


def donate(trace: Trace, options: Options) -> Trace:
    """Return the trace with updates in place where that is safe, and outputs that share no memory."""
    trace = trace.replace(module=copied(trace.module))
    values = Values.of(trace)
    graph = trace.module.graph
    if trace.output is not None:  # what the body of a loop returns goes to the loop, and to no caller
        _own_outputs(trace.module, values)
    for node in values.in_place:
        in_place, _ = IN_PLACE[node.target]
        targets = targets_of(node)
        with graph.inserting_before(node):
            update = graph.call_function(in_place, node.args, node.kwargs)
        update.meta = {"val": None}
        set_marks(update, marks_of(node))
        _replace_results(graph, node, targets)
    return trace


def _replace_results(graph: fx.Graph, node: fx.Node, targets: list[fx.Node]) -> None:
    for user in list(node.users):
        if user.target is operator.getitem and isinstance(user.args[1], int):
            user.replace_all_uses_with(targets[user.args[1]])
            graph.erase_node(user)
    if node.users:
        node.replace_all_uses_with(targets[0])
    graph.erase_node(node)


def _own_outputs(module: fx.GraphModule, values: Values) -> None:
    """Copy results that are views of memory which is the caller's, or of another result."""
    output = module.graph.output_node()
    taken, owned = set(values.kept), []
    for result in results(module):
        (buffer,) = values.holds[result]
        if buffer in taken:
            with module.graph.inserting_before(output):
                copy = module.graph.call_function(torch.ops.aten.clone.default, (result,))
            copy.meta = {"val": result.meta["val"].clone()}
            owned.append(copy)
        else:
            taken.add(buffer)
            owned.append(result)
    output.args = (owned,)
