"""One trace of a function and its pullback as two: forward, and backward.

    joint      inputs, cotangents → outputs, gradients
    forward    inputs → outputs, saved
    backward   references, saved, cotangents → gradients

The forward is what leads to the outputs and to what is saved, the backward all else that leads to the gradients. Of
the values that were there before the pullback was called, and that the backward reads,

    inputs held by reference, and what comes of them by gathers, casts and views alone, are not saved: the backward
        makes the full leaves again from the pieces;
    a view is made again from what it is a view of;
    every other value is saved, an output or an input among them as it is, without a copy.

In the joint trace the cotangents are no inputs yet, since their shapes are known only once the function has run: each
is an empty tensor with a mark, and becomes an input of the backward here.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, fx

from fzero import tree
from fzero.marks import line_of, mark, marks_of, set_marks
from fzero.operators import written_by
from fzero.program.graph.aliases import alias_of
from fzero.program.graph.collectives import WAIT
from fzero.program.graph.gathers import from_pieces
from fzero.program.graph.trace import Trace, results, with_graph
from fzero.program.graph.values import Values


@dataclass(frozen=True)
class Saved:
    """A tensor that a forward keeps for its backward.

    Attributes:
        shape: its shape.
        dtype: its dtype.
        source: what made it: an operator, or the path of an argument.
        line: file, line and function of the user's code that made it, where that is known.
        block: the module's block that made it, where there is one.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    source: str
    line: tuple[str, int, str] | None = None
    block: str | None = None

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class Source:
    """Where a saved tensor is found after the forward: the `index`-th of its inputs, outputs, or extra results."""

    kind: Literal["input", "output", "extra"]
    index: int


@dataclass(frozen=True)
class Halves:
    """A joint trace cut in two.

    Attributes:
        forward: its result is `(*outputs, extras)`, `extras` a list of what is saved and no output.
        backward: inputs are `references`, then what is saved, then the cotangents.
        references: positions of the forward's inputs that the backward takes by reference.
        sources: where each saved tensor is found.
        saved: what each saved tensor is.
    """

    forward: Trace
    backward: Trace
    references: tuple[int, ...]
    sources: tuple[Source, ...]
    saved: tuple[Saved, ...]


def cotangent_like(output: Tensor, index: int) -> Tensor:
    """Return what stands for the cotangent of an output, the `index`-th, in a joint trace."""
    with mark(cotangent=index):
        return torch.empty(output.shape, dtype=output.dtype, device=output.device)


def partition(joint: Trace, by_reference: Collection[int]) -> Halves:
    """Cut a joint trace in two.

    Args:
        joint: a fresh trace whose output is a tuple, gradients last; cotangents are from `cotangent_like`.
        by_reference: positions of inputs that the backward may read without their being saved.
    """
    assert joint.output is not None, "a joint trace is no loop body"
    graph = joint.module.graph
    values = Values.of(joint)
    inputs = graph.find_nodes(op="placeholder")
    made = results(joint.module)
    *outputs, gradients = joint.output.fill(made)
    wanted = [node for node in tree.leaves(outputs) if isinstance(node, fx.Node)]
    gradient_nodes = [node for node in tree.leaves(gradients) if isinstance(node, fx.Node)]

    writers = _writers(graph, values)
    early = {node for node in graph.nodes if marks_of(node).phase != "backward"} - _hanging_on_cotangents(graph)
    remade = _Remade(graph, values, inputs, by_reference)

    def before_in_forward(node: fx.Node) -> list[fx.Node]:
        return [*node.all_input_nodes, *writers[node]]

    def before_in_backward(node: fx.Node) -> list[fx.Node]:
        if node in early:
            return node.all_input_nodes if node in remade else []
        return [*node.all_input_nodes, *(writer for writer in writers[node] if writer not in early)]

    # A gradient may be overwritten in part after its node: y = g * 2; y[0].zero_(). Nobody reads what `zero_` returns:
    # such writers are found by the memory that they write.
    late_writers = [n for n in _writers_to(values, gradient_nodes) if n not in early]
    backward = _closure([*gradient_nodes, *late_writers], before_in_backward)
    references = [i for i, node in enumerate(inputs) if node in backward and i in by_reference]
    taken = {inputs[i] for i in references}
    saved = [n for n in graph.nodes if n in backward and n not in taken and _is_saved(n, early, remade)]
    # Likewise what writes, in the forward, to memory that is returned or that the backward reads: it belongs to it.
    written = [writer for node in backward for writer in writers[node]] + _writers_to(
        values, [*wanted, *gradient_nodes]
    )
    forward = _closure([*wanted, *saved, *(n for n in written if n in early)], before_in_forward)
    cotangents = sorted((n for n in graph.nodes if marks_of(n).cotangent is not None), key=_cotangent_index)

    positions = {node: i for i, node in reversed(list(enumerate(wanted)))}
    extras = [node for node in saved if node.op != "placeholder" and node not in positions]
    places = {node: Source("extra", i) for i, node in enumerate(extras)}
    places |= {node: Source("output", i) for node, i in positions.items()}
    places |= {node: Source("input", i) for i, node in enumerate(inputs)}

    forward_half = _half(joint, inputs, [n for n in graph.nodes if n in forward], [*wanted, *extras])
    kept = [inputs[i] for i in references]
    rest = [n for n in graph.nodes if n in backward and n not in saved and n not in taken]
    backward_half = _half(joint, [*kept, *saved, *cotangents], rest, gradient_nodes, again=remade)
    kinds = joint.kinds or ("inputs",) * len(inputs)
    saved_kinds = [kinds[places[n].index] if n.op == "placeholder" else "activations" for n in saved]
    return Halves(
        forward_half.replace(inputs=joint.inputs, kinds=joint.kinds, output=_hollow([*outputs, extras])),
        backward_half.replace(
            inputs=(
                *(joint.inputs[i] for i in references),
                *(f"saved.{i}" for i in range(len(saved))),
                *(f"cotangent.{i}" for i in range(len(cotangents))),
            ),
            kinds=(*(kinds[i] for i in references), *saved_kinds, *("inputs",) * len(cotangents)),
            output=_hollow(gradients),
        ),
        tuple(references),
        tuple(places[node] for node in saved),
        tuple(_described(node, joint, places[node]) for node in saved),
    )


class _Remade:
    """The forward values that the backward makes again, and saves nothing for."""

    def __init__(self, graph: fx.Graph, values: Values, inputs: list[fx.Node], by_reference: Collection[int]) -> None:
        self.fixed = values.unrepeatable()
        self.leaves = {inputs[i] for i in by_reference}
        self.cheap = from_pieces(graph, self.fixed, of=self.leaves)

    def __contains__(self, node: fx.Node) -> bool:
        if node.op in ("placeholder", "get_attr") or node in self.cheap:
            return True
        if node in self.fixed or node.target is WAIT or written_by(node) or alias_of(node) is None:
            return False
        # An element of a tuple is a view where the tuple is one of views, as split gives.
        return node.target is not operator.getitem or alias_of(node.all_input_nodes[0]) is not None


def _writers(graph: fx.Graph, values: Values) -> dict[fx.Node, list[fx.Node]]:
    """Return, for each node, what wrote before it to memory that it reads or gives out."""
    found: dict[fx.Node, list[fx.Node]] = {}
    writers: dict[int, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op == "output":
            continue
        buffers = dict.fromkeys((*values.reads[node], *values.holds[node]))
        found[node] = [writer for b in buffers for writer in writers.get(b, ())]
        if node not in values.in_place:
            for b in values.writes.get(node, ()):
                writers.setdefault(b, []).append(node)
    return found


def _writers_to(values: Values, given: Iterable[fx.Node]) -> list[fx.Node]:
    """Return what writes, at any time, to memory that these nodes give out."""
    buffers = {b for node in given for b in values.holds[node]}
    return [n for n, b in values.writes.items() if n not in values.in_place and not buffers.isdisjoint(b)]


def _closure(wanted: Iterable[fx.Node], before: Callable[[fx.Node], Iterable[fx.Node]]) -> set[fx.Node]:
    """Return nodes with all that comes before them."""
    found: set[fx.Node] = set()
    stack = list(wanted)
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack += before(node)
    return found


def _half(
    joint: Trace, inputs: list[fx.Node], body: list[fx.Node], given: list[fx.Node], again: _Remade | None = None
) -> Trace:
    """Return a trace of some nodes of a joint one: from `inputs`, by `body`, to `given`."""
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in inputs:
        copies[node] = graph.placeholder(node.name)
        copies[node].meta = {key: value for key, value in node.meta.items() if key != "alias"}
    for node in body:
        if node in copies:
            continue
        copies[node] = graph.node_copy(node, copies.__getitem__)
        if again is not None and node in again.cheap:
            set_marks(copies[node], marks_of(node).replace(repeated=True, phase="backward"))
    graph.output([copies[node] for node in given])
    used = {str(node.target) for node in graph.find_nodes(op="get_attr")}
    bodies = {name: body for name, body in joint.bodies.items() if name in used}
    return Trace(with_graph(joint.module, graph), (), frozenset(), None, bodies)


def _hanging_on_cotangents(graph: fx.Graph) -> set[fx.Node]:
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if marks_of(node).cotangent is not None or any(source in found for source in node.all_input_nodes):
            found.add(node)
    return found


def _is_saved(node: fx.Node, early: set[fx.Node], remade: _Remade) -> bool:
    return node.op == "placeholder" or (node in early and node not in remade)


def _hollow(given: object) -> tree.Hollow:
    """Return a tree of nodes as one of slots."""
    leaves, treedef = tree.flatten(given)
    return tree.Hollow(treedef, tuple(tree.PICKED if isinstance(leaf, fx.Node) else leaf for leaf in leaves))


def _cotangent_index(node: fx.Node) -> int:
    index = marks_of(node).cotangent
    assert index is not None
    return index


def _described(node: fx.Node, joint: Trace, place: Source) -> Saved:
    value = node.meta["val"]
    made = f"argument {joint.inputs[place.index]}" if place.kind == "input" else _operator(node)
    return Saved(tuple(value.shape), value.dtype, made, line_of(node), marks_of(node).block)


def _operator(node: fx.Node) -> str:
    """Return the name of what made a value: of an element of a tuple, what made that."""
    while node.target is operator.getitem or node.target is WAIT:
        node = node.all_input_nodes[0]
    name = str(node.target)
    return name.removeprefix("aten.").rpartition(".")[0] or name
