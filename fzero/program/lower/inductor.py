"""Lowering through Inductor: the whole step as fused kernels, in the order that the passes chose.

    graph ── constants become inputs ──▶ Inductor ──▶ compiled(*inputs, *constants)

Inductor sees the final graph: collectives stay where they are, and updates in place stay in place. It fuses what is
pointwise and keeps wider intermediate values inside a kernel, so results are close to those of the graph lowering, not
equal bit by bit. On CUDA the compiled program is recorded at its second call, see `fzero.program.lower.cudagraph`.

Constants are computed and the graph is compiled on a thread of its own, which has none of the caller's modes (fake
tensors, tracing, autocast).

Inductor takes straight-line graphs only. Of a graph with a loop it compiles the body, where the work is, and the graph
around it runs as generated Python.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from fzero._torch import standalone_compile_static
from fzero.own_thread import in_own_thread
from fzero.program.graph.trace import Trace, attribute
from fzero.program.lower.constants import constants_of
from fzero.program.lower.python import Lowered, lower_graph

SETTINGS = {
    "reorder_for_locality": False,  # the order is ours: memory and overlap were decided in the passes
    "reorder_for_peak_memory": False,
    "cpp.dynamic_threads": True,  # as many as the caller has when it calls
}
# On a CPU the compiler runs in this process and leaves no workers behind. On CUDA Inductor has hundreds of kernels to
# compile, and its own pool of processes, which takes as many cores as there are.
SETTINGS_ON_CPU = {"compile_threads": 1}


def lower_inductor(trace: Trace) -> Lowered:
    """Return the graph, compiled, as a function of a list of inputs, which it empties.

    Args:
        trace: a trace after all passes; it stays as it is.

    Raises:
        RuntimeError: Inductor cannot compile it here.
    """
    if trace.bodies:
        return lower_graph(trace.module, trace.bodies, lower_body=lower_inductor)
    if not trace.module.graph.output_node().args[0]:
        return lower_graph(trace.module)  # Inductor asks for a result
    module, like, constants = _closed(trace.module)
    compiled = _compiled(module, like)

    def run(inputs: list[Tensor]) -> list[Tensor]:
        given = (*inputs, *constants)
        inputs.clear()
        return list(compiled(*given))

    return run


def _closed(module: fx.GraphModule) -> tuple[fx.GraphModule, list[Tensor], list[Tensor]]:
    """Return a copy of the graph whose constants are inputs, what its inputs look like, and the constants.

    Constants are tensors that the function closes over: inside Inductor their values of today would be compiled in. And
    they are those that the program would compute of nothing at every call.
    """
    graph, mapping = fx.Graph(), dict[fx.Node, fx.Node]()
    inputs = module.graph.find_nodes(op="placeholder")
    attributes: dict[str, fx.Node] = {}
    constants: list[Tensor] = []
    for node in inputs:
        mapping[node] = graph.placeholder(node.name)
    determined = in_own_thread(lambda: constants_of(module))
    for node, value in determined.items():
        mapping[node] = graph.placeholder(node.name)
        constants.append(value)
    for node in module.graph.find_nodes(op="get_attr"):
        path = str(node.target)
        if path not in attributes:
            attributes[path] = graph.placeholder(node.name)
            constants.append(attribute(module, path))
        mapping[node] = attributes[path]
    for node in module.graph.nodes:
        if node not in mapping:
            mapping[node] = graph.node_copy(node, mapping.__getitem__)
            mapping[node].meta = {}  # marks are ours; shapes are found again
    like = [*(node.meta["val"] for node in inputs), *constants]
    return fx.GraphModule(torch.nn.Module(), graph), like, constants


def _compiled(module: fx.GraphModule, like: list[Tensor]) -> Callable[..., Any]:
    device = next((x.device for x in like if x.device.type == "cuda"), None)
    on_device = contextlib.nullcontext() if device is None else torch.cuda.device(device)

    def compile_it() -> Callable[..., Any]:
        with torch.no_grad(), on_device, warnings.catch_warnings():
            # What torch deprecates in itself is not the user's, and under `-W error` it would end the compilation.
            warnings.simplefilter("ignore")
            return standalone_compile_static(module, like, SETTINGS | ({} if device else SETTINGS_ON_CPU))

    try:
        return in_own_thread(compile_it)
    except Exception as error:  # Inductor and the tools under it raise anything
        raise RuntimeError(
            f"fz.jit: Inductor could not compile the program: {type(error).__name__}: {error}\nA C++ compiler with its "
            f'headers (CXX names it), or Triton on CUDA, is what is usually missing. lower="graph" needs neither.'
        ) from error
