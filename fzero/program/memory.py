"""The bytes that are alive while a program runs."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from fzero.program.loop import run_loop
from fzero.program.trace import Trace
from fzero.program.values import Values


def live_bytes(order: Sequence[fx.Node], values: Values, inside: dict[fx.Node, int] | None = None) -> list[int]:
    """Return the bytes alive while each node of an order runs: what is there, what it makes, what it has inside.

    A buffer dies after the last node that reads it, as the lowering lets it; what the caller keeps, and what is
    returned, does not.
    """
    last: dict[int, int] = {}
    for i, node in enumerate(order):
        if node.op == "output":
            last.update((b, len(order)) for source in node.all_input_nodes for b in values.holds[source])
            continue
        for b in (*values.makes[node], *values.reads[node]):
            last[b] = i
    last.update((b, len(order)) for b in values.kept)
    dying: dict[int, int] = {}
    for b, i in last.items():
        dying[i] = dying.get(i, 0) + values.size[b]
    live, found = 0, []
    for i, node in enumerate(order):
        if node.op != "output":
            live += sum(values.size[b] for b in values.makes[node])
        found.append(live + (inside or {}).get(node, 0))
        live -= dying.get(i, 0)
    return found


def peak_bytes(trace: Trace) -> int:
    """Return the most bytes alive at once, those inside loops included."""
    values = Values.of(trace)
    return max(live_bytes(list(trace.module.graph.nodes), values, inside_loops(trace)), default=0)


def inside_loops(trace: Trace) -> dict[fx.Node, int]:
    """Return, for each loop, the bytes of its body's peak beyond the inputs that the graph around it holds."""
    found = {}
    for node in trace.module.graph.nodes:
        if node.target is run_loop:
            body = trace.bodies[str(node.args[0].target)]
            found[node] = peak_bytes(body) - input_bytes(body)
    return found


def input_bytes(trace: Trace) -> int:
    values = Values.of(trace)
    return sum(values.size[b] for n in trace.module.graph.find_nodes(op="placeholder") for b in values.makes[n])
