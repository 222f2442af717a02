"""The bytes that are alive while a program runs: at most, over its schedule, and what they are for."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import fx

from fzero.display.listing import amount
from fzero.display.picture import Picture
from fzero.display.svg import timeline
from fzero.program.graph.kinds import AT_REST, KINDS, kinds_of
from fzero.program.graph.loop import loop_call, run_loop
from fzero.program.graph.trace import Trace
from fzero.program.graph.values import Values, nbytes
from fzero.program.graph.walk import body_of


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
            body = body_of(trace, node)
            found[node] = max(peak_bytes(body) - input_bytes(body), _stacked(node))
    return found


def _stacked(loop: fx.Node) -> int:
    """Return the bytes of what a loop's rounds give to be concatenated: at its end that is there twice."""
    kinds = loop_call(loop).kinds
    return sum(nbytes(x) for x, kind in zip(loop.meta["val"], kinds, strict=True) if kind == "stack")


def input_bytes(trace: Trace) -> int:
    """Return the bytes of a trace's inputs."""
    values = Values.of(trace)
    return sum(values.size[b] for n in trace.module.graph.find_nodes(op="placeholder") for b in values.makes[n])


@dataclass(frozen=True)
class Memory:
    """The bytes of tensors that a rank holds while a program runs. Printed, it is a table.

    Attributes:
        at_rest: what stays between steps: the tensors of states and of other sharded arguments. Where there are none
            of those, all arguments.
        peak: the most that is alive at once, `at_rest` included.
        by_kind: what that is for: params, moments, gathered, activations, gradients, inputs, other.
        where: the operation that runs at the peak.
        live: by kind, the bytes alive while each operation runs, in order; a loop's body stands in its place, once.
        operations: their names.
    """

    at_rest: int
    peak: int
    by_kind: Mapping[str, int]
    where: str
    live: Mapping[str, Sequence[int]] = field(repr=False)
    operations: Sequence[str] = field(repr=False)

    @property
    def total(self) -> list[int]:
        """The bytes alive while each operation runs."""
        return [sum(column) for column in zip(*self.live.values(), strict=True)]

    def table(self) -> str:
        """Return what is alive at the peak, by kind, as text."""
        rows = [(kind, size) for kind, size in self.by_kind.items() if size]
        lines = [f"peak {amount(self.peak)} in {self.where}; at rest {amount(self.at_rest)}"]
        lines += [f"  {kind:<12}{amount(size):>12}{size / self.peak:>8.1%}" for kind, size in rows]
        return "\n".join(lines)

    __str__ = table

    def plot(self, path: str | Path | None = None) -> Picture:
        """Draw the live bytes over the schedule, stacked by kind.

        Args:
            path: where to save the picture as well: a file that ends in `.svg`.

        Returns:
            The picture: displayed in a notebook; in a terminal its text is the table. `.svg` gives it away.

        Raises:
            ValueError: the file would be of another kind.
        """
        picture = Picture(self.table(), timeline(self.live, self.operations, self.at_rest))
        if path is not None:
            if Path(path).suffix != ".svg":
                raise ValueError(
                    f"program.memory().plot: the picture is SVG, and {str(path)!r} ends in {Path(path).suffix!r}. Save "
                    f"it as {str(Path(path).with_suffix('.svg'))!r}, which browsers and converters read."
                )
            Path(path).write_text(picture.svg)
        return picture


def memory_of(trace: Trace) -> Memory:
    """Return what a program keeps alive, operation by operation."""
    values = Values.of(trace)
    live, names = _curves(trace, values)
    total = [sum(column) for column in zip(*live.values(), strict=True)]
    at = max(range(len(total)), key=total.__getitem__)
    kinds = trace.kinds or ("inputs",) * len(trace.inputs)
    placeholders = trace.module.graph.find_nodes(op="placeholder")
    sizes = [sum(values.size[b] for b in values.makes[node]) for node in placeholders]
    stays = [size for size, kind in zip(sizes, kinds, strict=True) if kind in AT_REST]
    return Memory(
        at_rest=sum(stays or sizes),
        peak=total[at],
        by_kind={kind: curve[at] for kind, curve in live.items()},
        where=names[at],
        live=live,
        operations=names,
    )


def _curves(trace: Trace, values: Values, *, without_inputs: bool = False) -> tuple[dict[str, list[int]], list[str]]:
    """Return, by kind, the bytes alive while each operation runs, those of loops in their place; and their names."""
    order = list(trace.module.graph.nodes)
    kinds = kinds_of(trace, values)
    sizes = list(values.size)
    if without_inputs:
        for node in trace.module.graph.find_nodes(op="placeholder"):
            for b in values.makes[node]:
                sizes[b] = 0
    flat = {}
    for kind in KINDS:
        own = dataclasses.replace(values, size=[s if k == kind else 0 for s, k in zip(sizes, kinds, strict=True)])
        flat[kind] = live_bytes(order, own)
    curves: dict[str, list[int]] = {kind: [] for kind in KINDS}
    names: list[str] = []
    for i, node in enumerate(order):
        if node.op in ("placeholder", "get_attr"):  # there from the start
            continue
        inner: dict[str, list[int]] = {kind: [0] for kind in KINDS}
        inner_names = [node.name]
        if node.target is run_loop:
            body = body_of(trace, node)
            inner, inner_names = _curves(body, Values.of(body), without_inputs=True)
            inner_names = [*(f"{name} in {node.name}" for name in inner_names), node.name]
            for kind in KINDS:
                inner[kind].append(_stacked(node) if kind == "other" else 0)
        for kind in KINDS:
            curves[kind] += [flat[kind][i] + x for x in inner[kind]]
        names += inner_names
    return curves, names
