"""Leaves that stay gathered are gathered once, in front of the loop over micro-batches.

A gather that is kept from forward to backward may as well be kept from one micro-batch to the next: the pieces do not
change in between. It moves out of the loop's body, which gets the full leaf as an input instead:

    for each micro-batch:  w = gather(p); …w…        ──▶        w = gather(p);  for each micro-batch:  …w…

Kept are the gathers that `keep_gathered` spares, and those of stages 1 and 2, which gather once a step. Those that
ZeRO-3 repeats for the backward stay where they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import fx

from fzero.marks import marks_of
from fzero.program.graph.collectives import GATHERS, WAIT
from fzero.program.graph.gathers import from_pieces
from fzero.program.graph.loop import loop_call, run_loop
from fzero.program.graph.trace import Trace, copied
from fzero.program.graph.values import Values
from fzero.program.options import Options
from fzero.program.passes.dead import sweep


def hoist(trace: Trace, options: Options) -> Trace:
    """Return the trace with kept gathers taken out of the bodies of its loops."""
    if not trace.bodies:
        return trace
    module, bodies = copied(trace.module), dict(trace.bodies)
    for loop in [node for node in module.graph.nodes if node.target is run_loop]:
        call = loop_call(loop)
        before = bodies[call.name]
        inner = before.replace(module=copied(before.module))
        bodies[call.name], gathered = _taken_out(inner, len(call.sums) + 1, call.whole, module.graph, loop)
        loop.args = replace(call, whole=[*call.whole, *gathered]).args
    return trace.replace(module=module, bodies=bodies)


def _taken_out(
    body: Trace, first: int, whole: Sequence[fx.Node], graph: fx.Graph, loop: fx.Node
) -> tuple[Trace, list[fx.Node]]:
    """Move the kept gathers of a body in front of its loop; return the body, and what they give there."""
    placeholders = body.module.graph.find_nodes(op="placeholder")
    outside = dict(zip(placeholders[first : first + len(whole)], whole, strict=True))
    cheap = from_pieces(body.module.graph, Values.of(body).overwritten())
    gathered, names = [], []
    last = placeholders[first + len(whole) - 1]
    for wait in list(body.module.graph.nodes):
        if wait.target is not WAIT or wait not in cheap or not _is_kept(wait.args[0]):
            continue
        chain = _leading_to(wait, cheap)
        if any(source not in outside and source not in chain for node in chain for source in node.all_input_nodes):
            continue
        copies = dict(outside)
        for node in chain:
            with graph.inserting_before(loop):
                copies[node] = graph.node_copy(node, copies.__getitem__)
        gathered.append(copies[wait])
        with body.module.graph.inserting_after(last):
            last = body.module.graph.placeholder(f"gathered_{len(gathered)}")
        last.meta = dict(wait.meta)
        last.meta.pop("alias", None)
        names.append(last.name)
        wait.replace_all_uses_with(last)
    sweep(body.module.graph)
    at = first + len(whole)
    return body.replace(inputs=(*body.inputs[:at], *names, *body.inputs[at:])), gathered


def _is_kept(gather: object) -> bool:
    return isinstance(gather, fx.Node) and gather.target in GATHERS and marks_of(gather).kept


def _leading_to(wanted: fx.Node, cheap: set[fx.Node]) -> list[fx.Node]:
    """Return a node and what leads to it from the inputs, in order."""
    found, stack = dict[fx.Node, None](), [wanted]
    while stack:
        node = stack.pop()
        if node not in found:
            found[node] = None
            stack += [source for source in node.all_input_nodes if source in cheap]
    return [node for node in wanted.graph.nodes if node in found]
