"""The memory behind a graph: which buffers its nodes make, share, read and overwrite.

A buffer is what the allocator hands out. A node that computes makes one for each tensor it returns; a view, a wait and
an element of a tuple stand for buffers that are there already. Everything that moves nodes, or counts bytes, asks here:

    makes[node]     buffers that running it allocates
    holds[node]     buffers that its value lies in: its own, or those it is a view of
    reads[node]     buffers that have to be there while it runs; a wait reads what its collective sends
    writes[node]    buffers that it overwrites

`p2 = adamw(p, g)` on donated memory counts as a write into that of `p`, which it is once the pass `donate` has run.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor, fx

from fzero.kernels.in_place import IN_PLACE, targets_of
from fzero.operators import written_by
from fzero.program.graph.aliases import alias_of
from fzero.program.graph.collectives import ISSUES, WAIT, issue_of, sent_for
from fzero.program.graph.loop import loop_call, run_loop
from fzero.program.graph.sizes import is_size
from fzero.program.graph.trace import Trace

Buffers = tuple[int, ...]


def nbytes(value: object) -> int:
    """Return the bytes that a tensor's memory takes."""
    return value.untyped_storage().nbytes() if isinstance(value, Tensor) else 0


def tensors_of(node: fx.Node) -> Sequence[Tensor | None]:
    """Return what a node returns, as a sequence; `None` where an element is no tensor."""
    value = node.meta.get("val")
    many = value if isinstance(value, list | tuple) else (value,)
    return [x if isinstance(x, Tensor) else None for x in many]


@dataclass
class Values:
    """See above. A buffer is a number: its bytes are `size[number]`, and the node that made it is `owner[number]`."""

    size: list[int] = field(default_factory=list)
    owner: list[fx.Node] = field(default_factory=list)
    makes: dict[fx.Node, Buffers] = field(default_factory=dict)
    holds: dict[fx.Node, Buffers] = field(default_factory=dict)
    reads: dict[fx.Node, Buffers] = field(default_factory=dict)
    writes: dict[fx.Node, Buffers] = field(default_factory=dict)
    in_place: list[fx.Node] = field(default_factory=list)  # functional updates that may overwrite what they update
    kept: frozenset[int] = frozenset()  # buffers of inputs that the caller keeps, and of constants

    @staticmethod
    def of(trace: Trace) -> Values:
        """Look at a trace in the order in which it stands."""
        values, graph = Values(), trace.module.graph
        order = {node: i for i, node in enumerate(graph.nodes)}
        kept: set[int] = set()
        inputs = 0
        for node in graph.nodes:
            if node.op == "output":
                continue
            values._add(node, order, kept)
            if node.op == "get_attr" or (node.op == "placeholder" and inputs not in trace.donated):
                kept.update(values.holds[node])
            inputs += node.op == "placeholder"
        values.kept = frozenset(kept)
        return values

    def overwritten(self) -> set[fx.Node]:
        """Return the nodes that read, or give out, memory that the function itself overwrites.

        They cannot be moved freely. Updates do not count: they come behind the last reader.
        """
        written = {b for node, buffers in self.writes.items() if node not in self.in_place for b in buffers}
        return {n for n in self.holds if written and not written.isdisjoint((*self.holds[n], *self.reads[n]))}

    def unrepeatable(self) -> set[fx.Node]:
        """Return the nodes that may not run again later: they write memory, or use what is overwritten by then."""
        written: set[int] = set()
        found: set[fx.Node] = set()
        for node in reversed(self.holds):
            if not written.isdisjoint((*self.holds[node], *self.reads[node])):
                found.add(node)
            if node in self.writes and node not in self.in_place:
                found.add(node)
                written.update(self.writes[node])
        return found

    def _add(self, node: fx.Node, order: dict[fx.Node, int], kept: set[int]) -> None:
        self.reads[node] = self._reads_of(node)
        if node.op == "call_function":
            shared = self._shared(node)
            if shared is None and self._overwrites(node, order, kept):
                self.in_place.append(node)
                shared = self.writes[node] = tuple(self.holds[target][0] for target in targets_of(node))
            elif written := self._writes_of(node):
                self.writes[node] = written
            if shared is not None:
                self.holds[node], self.makes[node] = shared, ()
                return
        made, held = [], []
        sums = self._summed(node)
        for i, value in enumerate(tensors_of(node)):
            if i in sums:
                held.append(sums[i])
                continue
            made.append(len(self.size))
            held.append(len(self.size))
            self.size.append(nbytes(value))
            self.owner.append(node)
        self.holds[node], self.makes[node] = tuple(held), tuple(made)
        if sums:
            self.writes[node] = tuple(sums.values())

    def _shared(self, node: fx.Node) -> Buffers | None:
        """Return the buffers of another node in which this one's value lies."""
        if node.target is operator.getitem:
            source, position = node.args
            assert isinstance(source, fx.Node) and isinstance(position, int)
            buffers = self.holds[source]
            return buffers if alias_of(source) is not None and len(buffers) == 1 else (buffers[position],)
        if node.target is run_loop:
            return None
        alias = alias_of(node)
        return None if alias is None else self.holds[node.all_input_nodes[min(alias, len(node.all_input_nodes) - 1)]]

    def _summed(self, node: fx.Node) -> dict[int, int]:
        """Return, for a loop, the buffers of the results that it sums up in the memory of what they start from."""
        if node.target is not run_loop:
            return {}
        call = loop_call(node)
        rest = iter(call.sums)
        return {i: self.holds[next(rest)][0] for i, kind in enumerate(call.kinds) if kind == "sum"}

    def _reads_of(self, node: fx.Node) -> Buffers:
        if is_size(node):
            return ()  # sizes are looked up before anything runs
        sources = [*node.all_input_nodes, *(sent_for(node) if node.target is WAIT else ())]
        return tuple(dict.fromkeys(b for source in sources for b in self.holds[source]))

    def _writes_of(self, node: fx.Node) -> Buffers:
        return tuple(b for source in written_by(node) for b in self.holds[source])

    def _overwrites(self, node: fx.Node, order: dict[fx.Node, int], kept: set[int]) -> bool:
        """Whether a functional update may overwrite what it updates: nobody else has that memory, or reads it later."""
        if node.target not in IN_PLACE:
            return False
        targets, made = targets_of(node), tensors_of(node)
        if len(targets) != len(made):  # the target is a number
            return False
        buffers: list[int] = []
        for target, result in zip(targets, made, strict=True):
            if result is None or not _looks_like(target.meta["val"], result):
                return False
            buffers += self.holds[target]
        others = [n for n in node.all_input_nodes if n not in targets]
        if len(set(buffers)) < len(targets) or not kept.isdisjoint(buffers):
            return False
        if any(b in self.holds[other] for other in others for b in buffers):
            return False
        return all(order[r] < order[node] for b in buffers for r in self._readers(b) if r is not node)

    def _readers(self, buffer: int) -> list[fx.Node]:
        """Return the nodes that read a buffer: users of what lies in it, of views of that, waits for collectives."""
        readers, stack = [], list(self.owner[buffer].users)
        while stack:
            reader = stack.pop()
            readers.append(reader)
            # A wait gives out what its collective made, not what that was given.
            is_view = issue_of(reader) is self.owner[buffer] if reader.target is WAIT else alias_of(reader) is not None
            if is_view or buffer in self.writes.get(reader, ()) or reader.target in ISSUES:
                stack += reader.users
        return readers


def _looks_like(old: Tensor, new: Tensor) -> bool:
    """Whether a new tensor can be written where an old one lies, which fills its memory."""
    same = (old.shape, old.stride(), old.dtype) == (new.shape, new.stride(), new.dtype)
    return same and old.untyped_storage().nbytes() == new.untyped_storage().nbytes()


def precedences(graph: fx.Graph, values: Values) -> dict[fx.Node, list[fx.Node]]:
    """Return, for each node, those that have to come before it because one of the two overwrites what the other reads.

    Beside these only the flow of data orders nodes.
    """
    written = {b for buffers in values.writes.values() for b in buffers}
    before: dict[fx.Node, list[fx.Node]] = {}
    last_write: dict[int, fx.Node] = {}
    readers: dict[int, list[fx.Node]] = {}
    if not written:
        return before
    for node in graph.nodes:
        if node.op == "output":
            continue
        earlier: dict[fx.Node, None] = {}
        for b in values.reads[node]:
            if b in written:
                if b in last_write:
                    earlier[last_write[b]] = None
                readers.setdefault(b, []).append(node)
        for b in values.writes.get(node, ()):
            earlier.update(dict.fromkeys(readers.pop(b, ())))
            if b in last_write:
                earlier[last_write[b]] = None
            last_write[b] = node
        earlier.pop(node, None)
        if earlier:
            before[node] = list(earlier)
    return before
