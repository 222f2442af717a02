"""Which lowering runs a program."""

from __future__ import annotations

from fzero.program.graph.trace import Trace, attribute
from fzero.program.lower.cudagraph import lower_cudagraph, replayed_if_possible
from fzero.program.lower.inductor import lower_inductor
from fzero.program.lower.python import Late, Lowered, lower_graph
from fzero.program.options import Lower, Options, default_for


def lowered(trace: Trace, options: Options) -> Lowered:
    """Return a trace, after all passes, as a function of a list of inputs, which it empties.

    Raises:
        ValueError: a CUDA graph is asked for, and an input of the program is not on CUDA.
    """
    lower = options.lower or default_lower(trace)
    if lower == "cudagraph":
        return lower_cudagraph(trace)
    if lower == "inductor":
        return Late(lambda: replayed_if_possible(lower_inductor(trace), trace))
    return lower_graph(trace.module, trace.bodies)


def default_lower(trace: Trace) -> Lower:
    """Return the lowering for the device of the inputs, or of the constants where there is no input."""
    graph, module = trace.module.graph, trace.module
    values = [node.meta["val"] for node in graph.find_nodes(op="placeholder")]
    values += [attribute(module, str(node.target)) for node in graph.find_nodes(op="get_attr")]
    return default_for(values)
