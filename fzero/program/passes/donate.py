"""Outputs written into the memory of donated inputs.

An update kernel exists twice: as a function that returns new tensors, and in place. The trace holds the
first. Where the memory it would overwrite is donated, or was made by the program itself, and nobody reads
it later, this pass puts the second there:

    p', m', v' = adamw(p, m, v, g, …)    ──▶    adamw_(p, m, v, g, …);  p' = p,  m' = m,  v' = v

Then outputs are given memory of their own. A result that is a view of an input that the caller keeps, or
of another result, is copied: a later call may overwrite either.
"""

from __future__ import annotations

import operator
from collections import defaultdict

import torch
from torch import fx

from fzero._torch import storage_id
from fzero.kernels.in_place import IN_PLACE
from fzero.program.trace import Trace, copied, results


def donate(trace: Trace) -> Trace:
    """Return the trace with updates in place where that is safe, and outputs that share no memory."""
    module = copied(trace.module)
    graph = module.graph
    memory = _Memory(graph)
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    donated = {memory.of(placeholders[i]) for i in trace.donated}
    kept = {memory.of(node) for node in (*placeholders, *(n for n in graph.nodes if n.op == "get_attr"))} - donated
    for node in list(graph.nodes):
        if node.target in IN_PLACE:
            in_place, positions = IN_PLACE[node.target]
            targets = [arg for i in positions if isinstance(arg := node.args[i], fx.Node)]
            if memory.writable(node, targets, kept):
                with graph.inserting_before(node):
                    update = graph.call_function(in_place, node.args, node.kwargs)
                memory.replaced(node, update, targets)
                _replace_results(graph, node, targets)
    _own_outputs(module, memory, kept)
    return trace.replace(module=module)


class _Memory:
    """Which nodes share memory; kept up to date while updates come to be in place."""

    def __init__(self, graph: fx.Graph):
        self.order = {node: i for i, node in enumerate(graph.nodes)}
        self.merged: dict[int | None, int | None] = {}
        self.sharing: dict[int | None, list[fx.Node]] = defaultdict(list)
        for node in graph.nodes:
            self.sharing[self.of(node)].append(node)

    def of(self, node: fx.Node) -> int | None:
        """Return what nodes that share memory have in common; `None` where that is not known."""
        value = node.meta.get("val")
        storage = storage_id(value) if isinstance(value, torch.Tensor) else None
        while storage in self.merged:
            storage = self.merged[storage]
        return storage

    def writable(self, node: fx.Node, targets: list[fx.Node], kept: set[int | None]) -> bool:
        """Whether no target's memory is the caller's, shared with another target, or read after `node`."""
        storages = [self.of(target) for target in targets]
        if None in storages or len(set(storages)) < len(storages) or kept & set(storages):
            return False
        readers = (user for s in storages for sharer in self.sharing[s] for user in sharer.users if user is not node)
        return all(self.order[reader] < self.order[node] for reader in readers)

    def replaced(self, node: fx.Node, update: fx.Node, targets: list[fx.Node]) -> None:
        """Note that `update` stands for `node`: its results, and what are views of them, lie in `targets`."""
        self.order[update] = self.order[node]
        for user in node.users:
            position = user.args[1]
            assert isinstance(position, int)
            result, target = self.of(user), self.of(targets[position])
            self.sharing[target] += self.sharing.pop(result)
            self.merged[result] = target


def _replace_results(graph: fx.Graph, node: fx.Node, targets: list[fx.Node]) -> None:
    for user in list(node.users):
        assert user.target is operator.getitem, "an update returns a tuple"
        position = user.args[1]
        assert isinstance(position, int)
        user.replace_all_uses_with(targets[position])
        graph.erase_node(user)
    graph.erase_node(node)


def _own_outputs(module: fx.GraphModule, memory: _Memory, kept: set[int | None]) -> None:
    """Copy results that are views of memory which is the caller's, or of another result."""
    output = module.graph.output_node()
    taken, owned = set(kept), []
    for result in results(module):
        storage = memory.of(result)
        if storage in taken:
            with module.graph.inserting_before(output):
                copy = module.graph.call_function(torch.ops.aten.clone.default, (result,))
            copy.meta = {"val": result.meta["val"].clone()}
            owned.append(copy)
        else:
            taken.add(storage)
            owned.append(result)
    output.args = (owned,)
