"""What a schedule looks at: who needs whom, which nodes are placed by themselves, and which come with another."""

from __future__ import annotations

import operator
from collections.abc import Container

from torch import fx

from fzero.program.graph.aliases import alias_of
from fzero.program.graph.collectives import ISSUES, waits_of
from fzero.program.graph.gathers import from_pieces
from fzero.program.graph.values import Values, precedences


def with_chain(before: dict[fx.Node, list[fx.Node]], chain: dict[fx.Node, fx.Node]) -> dict[fx.Node, list[fx.Node]]:
    """Return who has to come before a node with the order of collectives in it."""
    return {**before, **{node: [*before.get(node, ()), previous] for node, previous in chain.items()}}


class Plan:
    """What a schedule looks at, in each of its tries: who needs whom, and which nodes come with their consumer.

    Attributes:
        inside: the bytes that a loop holds while it runs, for each loop.
        nodes: all nodes, in the order that was given.
        order: the place of a node in it.
        values: the buffers behind the nodes.
        output: the node that returns the results.
        before: for a node, those that have to come earlier.
        in_place: updates that overwrite what they read.
        tiny: values of fewer bytes are small: 4,096, or less where the largest buffer is below 1 MiB.
        lazy: nodes that are placed right before who first reads them: constants, views, the joining of gathered pieces
            into a leaf, and small values that hang on inputs alone.
        parts: for an operation, the nodes that pick its results apart.
        readers: for a buffer, how many nodes read it.
        free: for a buffer, whether nobody reads it.
        hard: the operations that a schedule places.
        needs: for each of these, those of them that it reads from, be it through lazy nodes.
        users: the other way round.
        readers_of: for a buffer, those of them that read it.
    """

    def __init__(self, graph: fx.Graph, values: Values, inside: dict[fx.Node, int], chain: dict[fx.Node, fx.Node]):
        self.inside = inside
        self.nodes = list(graph.nodes)
        self.order = {node: i for i, node in enumerate(self.nodes)}
        self.values = values
        self.output = graph.output_node()
        self.before = with_chain(precedences(graph, values), chain)
        self.in_place = set(values.in_place)
        cheap = from_pieces(graph, values.overwritten())
        views = {n for n in self.nodes if alias_of(n) is not None and n not in values.writes}
        self.tiny = min(4096, max(values.size, default=0) // 256)
        self.lazy = {n for n in self.nodes if n.op == "get_attr" or n in cheap or n in views}
        self._add_small()
        self.parts = {n: _parts(n) for n in self.nodes if n.op == "call_function" and n not in self.lazy}
        self.lazy.difference_update(part for parts in self.parts.values() for part in parts)
        self.readers = [0] * len(values.size)
        for reads in values.reads.values():
            for b in reads:
                self.readers[b] += 1
        for b in values.kept.union(*(values.holds[n] for n in self.output.all_input_nodes)):
            self.readers[b] += 1
        self.free = [self.readers[b] == 0 for b in range(len(values.size))]
        whole = {part: n for n, parts in self.parts.items() for part in parts}
        self.hard = [n for n in self.nodes if n in self.parts and n not in whole]
        self.needs = {node: self._hard_needs(node, whole) for node in self.hard}
        self.users: dict[fx.Node, list[fx.Node]] = {node: [] for node in self.hard}
        for node, needed in self.needs.items():
            for other in needed:
                self.users[other].append(node)
        self.readers_of: dict[int, list[fx.Node]] = {}
        for node in self.hard:
            for b in dict.fromkeys(
                b for n in (*self.pulled(node, ()), node, *self.parts[node]) for b in values.reads[n]
            ):
                self.readers_of.setdefault(b, []).append(node)

    def _add_small(self) -> None:
        """Let what is small, and hangs on inputs alone, come late too."""
        given: set[fx.Node] = set()
        for node in self.nodes:
            if given.issuperset((*node.all_input_nodes, *self.before.get(node, ()))):
                if node.op == "call_function" and self._is_small(node):
                    self.lazy.add(node)
                if node.op == "placeholder" or node in self.lazy:
                    given.add(node)

    def _is_small(self, node: fx.Node) -> bool:
        """Whether a node makes something small of something small, and does nothing else."""
        if node in self.inside or node.target in ISSUES or (node in self.values.writes and node not in self.in_place):
            return False
        return all(self.values.size[b] <= self.tiny for b in (*self.values.reads[node], *self.values.makes[node]))

    def _hard_needs(self, node: fx.Node, whole: dict[fx.Node, fx.Node]) -> list[fx.Node]:
        """Return the nodes that must have run before this one can, those behind views and gathers included."""
        found: dict[fx.Node, None] = {}
        stack, seen = [node, *self.parts[node]], {node, *self.parts[node]}
        while stack:
            at = stack.pop()
            for source in (*at.all_input_nodes, *self.before.get(at, ())):
                if source in seen or source.op == "placeholder":
                    continue
                seen.add(source)
                if source in self.lazy:
                    stack.append(source)
                else:
                    found[whole.get(source, source)] = None
        return list(found)

    def pulled(self, node: fx.Node, emitted: Container[fx.Node]) -> list[fx.Node]:
        """Return the views and gathers that come with a node, in order; with an update, those of what it overwrites."""
        found: set[fx.Node] = set()
        stack = [node]
        while stack:
            at = stack.pop()
            for source in (*at.all_input_nodes, *self.before.get(at, ())):
                if source in self.lazy and source not in emitted and source not in found:
                    found.add(source)
                    stack.append(source)
        return sorted(found, key=self.order.__getitem__) if len(found) > 1 else list(found)


def _parts(node: fx.Node) -> list[fx.Node]:
    """Return what follows a node at once: the elements of a tuple, so that those nobody wants die; waits."""
    parts = [user for user in node.users if user.target is operator.getitem]
    return parts + waits_of(node) if node.target in ISSUES else parts
