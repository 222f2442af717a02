"""Lowering: a graph as straight-line Python that frees every value at its last use.

    def program(inputs):
        params_w, batch = inputs
        inputs.clear()                     # the caller holds no input alive
        mm = aten_mm_default(batch, params_w)
        del batch, params_w
        return [mm]

Each line calls the operator itself, the way that costs least: the overhead is that of eager PyTorch.
"""

from __future__ import annotations

import keyword
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from fzero._torch import OpOverload, c10d
from fzero.program.graph.sizes import is_size
from fzero.program.graph.trace import Trace, attribute
from fzero.program.lower.quickest import quickest
from fzero.ranks import pairs

Lowered = Callable[[list[Tensor]], list[Tensor]]

# Collectives that messages between pairs of ranks do in less time, where that is so.
BY_PAIRS: dict[Any, Callable[..., Any]] = {
    c10d.all_gather_into_tensor.default: pairs.all_gather,
    c10d.all_gather_into_tensor_coalesced.default: pairs.all_gather_coalesced,
    c10d.wait_tensor.default: pairs.wait,
}

# Under this name the globals of generated code hold a dict from line number to the node that the line came from.
NODES = "__nodes__"


def lower_graph(
    module: fx.GraphModule,
    bodies: Mapping[str, Trace] | None = None,
    lower_body: Callable[[Trace], Lowered] | None = None,
) -> Lowered:
    """Return the graph as a function of a list of inputs, which it empties.

    Args:
        module: a graph whose output is a list of tensors.
        bodies: the loop bodies that it refers to.
        lower_body: how these are lowered; likewise where it is left out.
    """
    lower_body = lower_body or (lambda body: lower_graph(body.module, body.bodies))
    loops = {name: lower_body(body) for name, body in (bodies or {}).items()}
    source, scope = python_source(module, loops)
    exec(compile(source, f"<program {id(module):x}>", "exec"), scope)
    return scope["program"]


def python_source(module: fx.GraphModule, loops: Mapping[str, Lowered] | None = None) -> tuple[str, dict[str, Any]]:
    """Return the lines of a graph, and the names that they refer to."""
    scope = _Scope(module, loops or {})
    last = _last_uses(module.graph)
    lines, inputs = [], []
    nodes: list[tuple[int, fx.Node]] = []
    for node in _sizes_first(module.graph):
        if node.op == "placeholder":
            inputs.append(node.name)
            continue
        if node.op == "output":
            lines.append(f"return {scope.text(node.args[0])}")
            continue
        if node.op == "get_attr":
            continue
        assert node.op == "call_function", f"make_fx gives no {node.op}"
        call = _call(scope, node)
        nodes.append((len(lines), node))
        lines.append(f"{node.name} = {call}" if node.users else call)
        if dying := last.get(node):
            lines.append("del " + ", ".join(n.name for n in dying))
    unused = [n.name for n in module.graph.nodes if n.op == "placeholder" and not n.users]
    header = ["def program(inputs):"]
    if inputs:
        header += [f"    {', '.join(inputs)}, = inputs", "    inputs.clear()"]
    if unused:
        header.append(f"    del {', '.join(unused)}")
    scope.values[NODES] = {len(header) + 1 + at: node for at, node in nodes}
    return "\n".join(header + ["    " + line for line in lines]) + "\n", scope.values


def _sizes_first(graph: fx.Graph) -> list[fx.Node]:
    """Return the nodes in order, those that stand for sizes in front: no tensor is kept alive for its shape."""
    return sorted(graph.nodes, key=lambda node: 0 if node.op == "placeholder" else 1 if is_size(node) else 2)


def _call(scope: _Scope, node: fx.Node) -> str:
    function, args = node.target, node.args
    if function is operator.getitem:
        return f"{scope.text(args[0])}[{scope.text(args[1])}]"
    if function in BY_PAIRS:
        return f"{scope.name(BY_PAIRS[function], _target_name(function))}({', '.join(map(scope.text, args))})"
    if isinstance(function, OpOverload) and all(scope.value(source) is not None for source in node.all_input_nodes):
        function, args = quickest(function, args, node.kwargs, node.meta.get("val"), scope.value)
    texts = [*map(scope.text, args), *(f"{key}={scope.text(value)}" for key, value in node.kwargs.items())]
    return f"{scope.name(function, _target_name(node.target))}({', '.join(texts)})"


class _Scope:
    """The names that generated code refers to: one for each object."""

    def __init__(self, module: fx.GraphModule, loops: Mapping[str, Lowered]) -> None:
        self.module = module
        self.loops = loops
        self.values: dict[str, Any] = {"inf": float("inf"), "nan": float("nan"), "torch": torch}
        self.locals = {node.name for node in module.graph.nodes}
        self.known: dict[int, str] = {}

    def name(self, value: Any, hint: str) -> str:
        if id(value) not in self.known:
            base = "".join(c if c.isalnum() else "_" for c in hint)
            base = f"_{base}" if keyword.iskeyword(base) or base[:1].isdigit() else base
            name, count = base, 1
            while name in self.values or name in self.locals:
                name, count = f"{base}_{count}", count + 1
            self.values[name] = value
            self.known[id(value)] = name
        return self.known[id(value)]

    def value(self, node: fx.Node) -> Any:
        """Return a tensor such as a node will stand for, or the constant that it stands for."""
        return attribute(self.module, str(node.target)) if node.op == "get_attr" else node.meta.get("val")

    def text(self, argument: Any) -> str:
        if isinstance(argument, fx.Node):
            if argument.op == "get_attr":
                name = str(argument.target)
                return self.name(self.loops.get(name) or attribute(self.module, name), name)
            return argument.name
        if isinstance(argument, tuple):
            return f"({''.join(self.text(a) + ', ' for a in argument)})"
        if isinstance(argument, list):
            return f"[{', '.join(self.text(a) for a in argument)}]"
        if isinstance(argument, slice):
            return f"slice({self.text(argument.start)}, {self.text(argument.stop)}, {self.text(argument.step)})"
        if argument is None or isinstance(argument, bool | int | float | str):
            return repr(argument)
        if isinstance(argument, torch.dtype):
            return str(argument)
        return self.name(argument, f"constant_{type(argument).__name__}")


def _last_uses(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """Return, for each node, the tensors' nodes that nothing after it reads."""
    seen: set[fx.Node] = set()
    dying: dict[fx.Node, list[fx.Node]] = {}
    for user in reversed(_sizes_first(graph)):
        if user.op == "output":
            seen.update(user.all_input_nodes)
            continue
        here = [n for n in user.all_input_nodes if n not in seen and n.op != "get_attr" and not is_size(n)]
        seen.update(here)
        dying[user] = here
    return dying


def _target_name(target: Any) -> str:
    if isinstance(target, OpOverload):
        return str(target)
    return getattr(target, "__name__", type(target).__name__)


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
