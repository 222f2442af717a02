"""A trace with open sizes, settled for the passes: sizes in front, values at the sizes first seen.

While such a trace is made, torch computes sizes where they are needed, from whatever tensor is at hand. Here each
becomes an expression of the inputs' sizes, computed once, before anything else runs, so that no tensor is kept alive
for its shape:

    x, w = inputs                             s = x.size(0)
    mm = aten.mm(x, w)                ──▶     n = size[s * 4](s)
    n = mm.size(0) * 4                        mm = aten.mm(x, w)
    view = aten.view(mm, [n])                 view = aten.view(mm, [n])

Passes and reports look at values: those of a settled trace have the sizes of one call, and `at_shapes` gives it those
of another.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from fzero._torch import FakeTensorMode, python_of
from fzero.errors import TraceError
from fzero.program.graph.aliases import alias_of
from fzero.program.graph.collectives import is_collective
from fzero.program.graph.loop import loop_call, part_of, run_loop
from fzero.program.graph.sizes import SizeOf, Symbols
from fzero.program.graph.trace import Trace, attribute, copied, results, with_graph
from fzero.program.graph.walk import body_of


def settled(trace: Trace, symbols: Symbols) -> Trace:
    """Return a trace that was made with these symbols as the passes take it."""
    sizes = {symbol: dim for dim, symbol in symbols.symbols.items()}
    open_sizes = dataclasses.replace(symbols.sizes_of(), sent=_sends_open_sizes(trace))
    trace = _settled(trace, symbols, sizes).replace(sizes=open_sizes)
    return at_shapes(trace, symbols.shapes)


def _settled(trace: Trace, symbols: Symbols, places: Mapping[Any, tuple[int, int]]) -> Trace:
    bodies = {}
    for name, body in trace.bodies.items():
        bodies[name] = _settled(body, symbols, _places(body))
    return trace.replace(module=_sizes_in_front(trace.module, symbols, places), bodies=bodies)


def _places(body: Trace) -> dict[Any, tuple[int, int]]:
    """Return where the symbols of a loop's body show: as sizes of its inputs."""
    found: dict[Any, tuple[int, int]] = {}
    for i, node in enumerate(body.module.graph.find_nodes(op="placeholder")):
        for d, size in enumerate(node.meta["val"].shape):
            if isinstance(size, torch.SymInt) and size.node.expr.is_symbol:
                found.setdefault(size.node.expr, (i, d))
    return found


def _sizes_in_front(module: fx.GraphModule, symbols: Symbols, places: Mapping[Any, tuple[int, int]]) -> fx.GraphModule:
    graph, mapping = fx.Graph(), dict[fx.Node, Any]()
    front = _Front(graph, symbols, places)
    for node in module.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt) and node.op == "call_function":
            mapping[node] = front.size(value)
            continue
        mapping[node] = copy = graph.node_copy(node, mapping.__getitem__)
        if (alias := alias_of(node)) is not None:
            copy.meta["alias"] = copy.all_input_nodes.index(mapping[node.all_input_nodes[alias]])
        if node.op == "placeholder":
            front.inputs.append(mapping[node])
    return with_graph(module, graph)


class _Front:
    """The sizes that a graph computes right behind its inputs."""

    def __init__(self, graph: fx.Graph, symbols: Symbols, places: Mapping[Any, tuple[int, int]]) -> None:
        self.graph, self.symbols, self.places = graph, symbols, places
        self.inputs: list[fx.Node] = []
        self.made: dict[Any, fx.Node] = {}

    def size(self, value: torch.SymInt) -> int | fx.Node:
        """Return a size as a node, or as the number that it turned out to be."""
        expression = value.node.expr
        if expression.is_number:
            return int(expression)
        if any(symbol not in self.places for symbol in expression.free_symbols):
            expression = expression.subs(self.symbols.env.parts)
        if expression not in self.made:
            self.made[expression] = self._expression(expression)
        return self.made[expression]

    def _expression(self, expression: Any) -> fx.Node:
        if expression.is_symbol:
            if expression not in self.places:
                raise TraceError(f"fz.jit: the size {expression} of a loop's body is that of none of its inputs.")
            i, d = self.places[expression]
            return self._put(torch.ops.aten.sym_size.int, (self.inputs[i], d))
        names = sorted(expression.free_symbols, key=str)
        sources = tuple(self.made.setdefault(name, self.made.get(name) or self._expression(name)) for name in names)
        return self._put(SizeOf(python_of(expression), [str(name) for name in names]), sources)

    def _put(self, target: Any, args: tuple[Any, ...]) -> fx.Node:
        last = [*self.inputs, *self.made.values()][-1]
        with self.graph.inserting_after(last):
            return self.graph.call_function(target, args)


def at_shapes(trace: Trace, shapes: Sequence[Sequence[int]]) -> Trace:
    """Return a trace with values such as it has for inputs of these shapes."""
    inputs = trace.module.graph.find_nodes(op="placeholder")
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        given = [_like(node.meta["val"], shape) for node, shape in zip(inputs, shapes, strict=True)]
        return _valued(trace, given)


def _like(x: Tensor, shape: Sequence[int]) -> Tensor:
    """Return a fake tensor of a shape, whose dimensions lie in memory in the order of those of `x`."""
    if all(isinstance(size, int) for size in x.shape) and tuple(x.shape) == tuple(shape):
        return torch.empty_strided(shape, x.stride(), dtype=x.dtype, device=x.device)
    order = sorted(range(len(shape)), key=lambda d: _hint(x.stride(d)), reverse=True)
    return torch.empty_permuted(shape, order, dtype=x.dtype, device=x.device)


def _hint(size: Any) -> int:
    return int(size.node.hint) if isinstance(size, torch.SymInt) else int(size)


def _valued(trace: Trace, given: Sequence[Any]) -> Trace:
    """Run a graph on fake tensors and note what each node gives."""
    module, bodies = copied(trace.module), dict(trace.bodies)
    inputs = iter(given)
    values: dict[fx.Node, Any] = {}
    for node in module.graph.nodes:
        if node.op == "output":
            continue
        if node.op == "placeholder":
            values[node] = next(inputs)
        elif node.op == "get_attr":
            if node.target not in bodies:
                values[node] = attribute(module, str(node.target))
            continue
        elif node.target is run_loop:
            bodies[loop_call(node).name], values[node] = _looped(body_of(trace, node), node, values)
        else:
            args, kwargs = map_arg(node.args, values.__getitem__), map_arg(node.kwargs, values.__getitem__)
            values[node] = node.target(*args, **kwargs)
        node.meta["val"] = values[node]
    return trace.replace(module=module, bodies=bodies)


def _looped(body: Trace, loop: fx.Node, values: Mapping[fx.Node, Any]) -> tuple[Trace, list[Tensor]]:
    """Return the body of a loop with its values, and what the loop gives."""
    call = loop_call(loop)
    sums, whole, batch = ([values[x] for x in some] for some in (call.sums, call.whole, call.batch))
    index, n = values[call.index], call.rounds
    parts = [_fresh(part_of(x, 0, n)) for x in batch]
    body = _valued(body, [*map(_fresh, sums), _fresh(index[0]), *map(_fresh, whole), *parts])
    terms = [node.meta["val"] for node in results(body.module)]
    found = [
        torch.empty((term.shape[0] * n, *term.shape[1:]), dtype=term.dtype, device=term.device)
        if kind == "stack"
        else torch.empty_like(term)
        for term, kind in zip(terms, call.kinds, strict=True)
    ]
    return body, found


def _fresh(x: Tensor) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)


def _sends_open_sizes(trace: Trace) -> bool:
    """Return whether a trace that is made with symbols has collectives of which a size is open."""
    nodes = [node for node in trace.module.graph.nodes if is_collective(node)]
    values = (x for node in nodes for source in node.all_input_nodes for x in _sizes_in(source.meta.get("val")))
    return any(isinstance(x, torch.SymInt) for x in values) or any(map(_sends_open_sizes, trace.bodies.values()))


def _sizes_in(value: Any) -> Iterator[Any]:
    """Yield the sizes in a value: itself, or those of tensors."""
    if isinstance(value, list | tuple):
        for part in value:
            yield from _sizes_in(part)
    elif isinstance(value, Tensor):
        yield from value.shape
    else:
        yield value
