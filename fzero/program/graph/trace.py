"""Tracing: a function of trees into one flat graph of tensor operations.

The function runs once, on fake tensors. What comes of it is straight-line: forward, backward, collectives
and update in program order, nothing hidden. Python values in the arguments are constants of the trace;
tensors that the function closes over are read where they stand when the program runs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from fzero import tree
from fzero._torch import (
    FakeTensor,
    FakeTensorMode,
    OpOverload,
    data_dependent_errors,
    dispatch_modes,
    distributions_unchecked,
    make_fx,
)
from fzero.errors import FzeroError, RandomOpError, TraceError
from fzero.marks import line_of, recorded
from fzero.modules.explain import explaining, line_of_user, module_of
from fzero.modules.foreign import collectives_replaced
from fzero.modules.known import answering
from fzero.modules.looks import without_looks
from fzero.operators import draws
from fzero.program.graph.aliases import record_aliases
from fzero.program.graph.captured import check_captured
from fzero.program.graph.composites import sizes_left_open
from fzero.program.graph.dtypes import check_dtypes
from fzero.program.graph.remedies import remedy
from fzero.program.graph.sizes import Sizes
from fzero.random.keyed import current_draw


@dataclass(frozen=True)
class Trace:
    """A traced function, on its way through the passes.

    Attributes:
        module: the graph, with its constants; one placeholder for each input. Its own `forward` is not kept up
            to date by the passes: a lowering reads the graph.
        inputs: the path of each input in the arguments.
        donated: positions of inputs whose memory may be overwritten.
        output: the output's tree without its tensors; `None` for the body of a loop, which returns a list.
        bodies: the loop bodies that the graph refers to, by the name of the attribute.
        kinds: what each input is for, as `fzero.program.graph.kinds.kinds_in` says; empty where nobody asked.
        sizes: which sizes of the inputs are left open; `None` where all are fixed.
        order: the names of its collectives in the order in which passes keep them, see `fzero.program.agree.order`.
    """

    module: fx.GraphModule
    inputs: tuple[str, ...]
    donated: frozenset[int]
    output: tree.Hollow | None
    bodies: Mapping[str, Trace] = field(default_factory=dict)
    kinds: tuple[str, ...] = ()
    sizes: Sizes | None = None
    order: tuple[str, ...] | None = None

    def replace(self, **changes: Any) -> Trace:
        """Return a copy with some attributes changed."""
        return dataclasses.replace(self, **changes)


def trace_flat(
    f: Callable[..., Any],
    examples: Sequence[Tensor],
    arguments: tree.Hollow,
    *,
    paths: Sequence[str],
    donated: frozenset[int] = frozenset(),
) -> Trace:
    """Trace `f(*args, **kwargs)` for arguments of these shapes.

    Args:
        f: the function.
        examples: the arguments' tensors; only shapes, strides, dtypes and devices are looked at.
        arguments: `(args, kwargs)` without its tensors.
        paths: where each tensor stands in the arguments.
        donated: positions of tensors that the program may overwrite.

    Raises:
        TraceError: the function looks at the values of tensors, writes to one that it closes over, or calls an operator
            with dtypes that it refuses.
        RandomOpError: it draws random numbers that are not keyed.
    """
    outputs: list[tree.Hollow] = []

    def flat(*tensors: Tensor) -> list[Tensor]:
        args, kwargs = arguments.fill(tensors)
        results, _, hollow = tree.split(f(*args, **kwargs))
        outputs[:] = [hollow]
        return results

    around = current_draw()
    used = 0 if around is None else around.used
    module = graph_of(flat, examples)
    if around is not None and around.used != used:
        raise RandomOpError(
            "fz.jit: the function draws from the key of the fz.keyed, fz.call or pullback around it, which would "
            "become a constant of the program. Give it the key as an argument, and draw inside: fz.keyed(f)(key, ...)."
        )
    check_keyed(module)
    check_captured(module)
    check_dtypes(module)
    return Trace(_named(module, paths), tuple(paths), donated, outputs[0], _bodies(module))


def graph_of(f: Callable[..., Sequence[Tensor]], examples: Sequence[Tensor]) -> fx.GraphModule:
    """Trace a function of tensors that returns a list of tensors.

    Raises:
        TraceError: it looks at the values of tensors.
        RandomOpError: it draws random numbers that are not keyed, by the one operator that torch.fx cannot write down.
    """
    mode = next((x.fake_mode for x in examples if isinstance(x, FakeTensor)), None)
    mode = mode or next((m for m in reversed(dispatch_modes()) if isinstance(m, FakeTensorMode)), None)
    mode = mode or FakeTensorMode(allow_non_fake_inputs=True)
    # Fresh tensors: one object passed twice would become one input.
    with mode:
        fakes = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device) for x in examples]

    def without_values(*tensors: Tensor) -> Sequence[Tensor]:
        with answering(), without_looks(), distributions_unchecked(), collectives_replaced():
            return f(*tensors)

    try:
        with recorded(), explaining("fz.jit"), sizes_left_open() if mode.shape_env else contextlib.nullcontext():
            return make_fx(without_values, tracing_mode="fake", _allow_non_fake_inputs=True)(*fakes)
    except data_dependent_errors() as error:
        operator = getattr(error, "func", None)
        by = "" if operator is None else f", by {operator}"
        name = operator._schema.name if isinstance(operator, OpOverload) else None
        raise TraceError(
            f"fz.jit: the function looks at the value of a tensor{by}, which a trace does not have, at\n"
            f"{line_of_user(error)}\n{module_of(error)}{remedy(name)}."
        ) from error
    except RuntimeError as error:
        if not isinstance(error, FzeroError) and not any("fz.jit" in note for note in getattr(error, "__notes__", ())):
            error.add_note(f"fz.jit traced the function, and came to\n{line_of_user(error)}")
        raise
    except SyntaxError as error:
        # torch.fx writes each new graph as Python, where the name of this one operator is a keyword.
        if ".random_.from(" not in (error.text or ""):
            raise
        raise _not_keyed("aten.random_.from") from error


def check_keyed(module: fx.GraphModule) -> None:
    """Raise if the graph draws from a hidden generator: recomputation would draw other numbers."""
    for node in module.graph.nodes:
        if node.op == "call_function" and draws(node.target, node.args, node.kwargs):
            raise _not_keyed(node.target, node)


def _not_keyed(target: Any, node: fx.Node | None = None) -> RandomOpError:
    line = None if node is None else line_of(node)
    where = "" if line is None else f", at {line[0]}:{line[1]} in {line[2]}"
    return RandomOpError(
        f"fz.jit: {target} draws from the global random generator{where}. Differentiate with respect to a State, "
        f"whose seed and step key such draws, or wrap the function: fz.keyed(f)(key, ...)."
    )


def results(module: fx.GraphModule) -> list[fx.Node]:
    """Return the nodes whose values a graph returns."""
    found = module.graph.output_node().args[0]
    assert isinstance(found, list | tuple)
    nodes = [node for node in found if isinstance(node, fx.Node)]
    assert len(nodes) == len(found), "a graph returns a list of tensors"
    return nodes


def copied(module: fx.GraphModule) -> fx.GraphModule:
    """Return a module with a copy of the graph. Constants are shared."""
    graph, mapping = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in module.graph.nodes:
        mapping[node] = graph.node_copy(node, mapping.__getitem__)
    return with_graph(module, graph)


def with_graph(module: fx.GraphModule, graph: fx.Graph) -> fx.GraphModule:
    """Return a module with the constants of another, and a graph that refers to them."""
    return _Uncompiled(module, graph)


class _Uncompiled(fx.GraphModule):
    """A graph and its constants, without the code that torch.fx would write for each new graph."""

    def recompile(self) -> Any:
        return None


def _bodies(module: fx.GraphModule) -> dict[str, Trace]:
    """Return the loop bodies of a graph as traces."""
    found = {}
    for name, body in module.named_children():
        if isinstance(body, fx.GraphModule):
            inputs = [node.name for node in body.graph.find_nodes(op="placeholder")]
            found[name] = Trace(_named(body, inputs), tuple(inputs), body.meta["donated"], None, _bodies(body))
    return found


def _named(module: fx.GraphModule, paths: Sequence[str]) -> fx.GraphModule:
    """Return the graph with its inputs named by their paths."""
    graph, mapping = fx.Graph(), dict[fx.Node, fx.Node]()
    names = iter(paths)
    for node in module.graph.nodes:
        if node.op == "placeholder":
            name = next(names).replace(".", "_")
            mapping[node] = graph.placeholder(name if name.isidentifier() else f"arg{name}")
            mapping[node].meta = dict(node.meta)
        else:
            mapping[node] = graph.node_copy(node, mapping.__getitem__)
    record_aliases(graph)
    return _Uncompiled(module, graph)


def attribute(module: fx.GraphModule, path: str) -> Any:
    """Return what a `get_attr` node of a graph stands for."""
    value: Any = module
    for name in path.split("."):
        value = getattr(value, name)
    return value


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """Keep Python's garbage collector from going over a growing graph again and again: a quarter of the time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
