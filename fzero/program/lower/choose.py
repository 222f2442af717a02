"""Which lowering runs a program."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from fzero.program.graph.trace import Trace, attribute
from fzero.program.lower.cudagraph import lower_cudagraph
from fzero.program.lower.inductor import lower_inductor
from fzero.program.lower.python import Lowered, lower_graph
from fzero.program.options import Lower, Options


class Late:
    """A lowering that takes long, made when it is first needed: a program that is only looked at needs no compiler."""

    def __init__(self, make: Callable[[], Lowered]):
        self.make = make
        self.made: Lowered | None = None

    def make_ready(self) -> Lowered:
        """Make it, unless that has been done."""
        self.made = self.made or self.make()
        return self.made

    def __call__(self, inputs: list[Tensor]) -> list[Tensor]:
        return self.make_ready()(inputs)


def lowered(trace: Trace, options: Options) -> Lowered:
    """Return a trace, after all passes, as a function of a list of inputs, which it empties.

    Raises:
        ValueError: a CUDA graph is asked for, and an input of the program is not on CUDA.
    """
    lower = options.lower or default_lower(trace)
    if lower == "cudagraph":
        return lower_cudagraph(trace)
    if lower == "inductor":
        return Late(lambda: lower_inductor(trace))
    return lower_graph(trace.module, trace.bodies)


def takes_any_size(leaves: Sequence[Tensor], options: Options) -> bool:
    """Return whether a program of these inputs may leave sizes open: Inductor and CUDA graphs fix them."""
    return options.sizes == "any" and (options.lower or _default_for(leaves)) == "graph"


def default_lower(trace: Trace) -> Lower:
    """Return the lowering for the device of the inputs, or of the constants where there is no input."""
    graph, module = trace.module.graph, trace.module
    values = [node.meta["val"] for node in graph.find_nodes(op="placeholder")]
    values += [attribute(module, str(node.target)) for node in graph.find_nodes(op="get_attr")]
    return _default_for(values)


def _default_for(values: Sequence[Any]) -> Lower:
    on_cuda = any(x.device.type == "cuda" for x in values if isinstance(x, Tensor))
    return "inductor" if on_cuda else "graph"
