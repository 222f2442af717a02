"""What nobody uses goes, collectives included.

torch.fx takes a collective, and a wait for one, for something with an effect beside its result, and keeps
it. For a step its result is all it is for: a reduction of gradients that no update reads would only cost
time on the wire. Every rank runs the same program, so every rank drops it. What stays is what writes memory.
"""

from __future__ import annotations

from torch import fx

from fzero.operators import written_by
from fzero.program.graph.trace import Trace, copied
from fzero.program.options import Options


def dead(trace: Trace, options: Options) -> Trace:
    """Return the trace without the nodes whose results nobody uses."""
    module = copied(trace.module)
    sweep(module.graph)
    return trace.replace(module=module)


def sweep(graph: fx.Graph) -> None:
    """Take the nodes whose results nobody uses out of a graph."""
    for node in reversed(list(graph.nodes)):
        if node.op not in ("placeholder", "output") and not node.users and not written_by(node):
            graph.erase_node(node)
