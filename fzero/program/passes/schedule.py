"""One order for all nodes that keeps the fewest bytes alive.

As traced, a full leaf is gathered before anything runs, and gradients are reduced and used when all are there. A list
scheduler goes through the nodes in the order of the program and lets some come earlier or later:

    later     what leads from pieces to full leaves, and views: each comes right before what needs it
              Small things that hang on nothing large, such as learning rate, keys and factors, do so too
    first     other small things that hang on inputs alone
    at once   whatever frees more than it makes, together with what follows from it alone: reduce, wait, update. One
              step of such a chain may cost memory, so it is judged as a whole, and taken only while it stays under
              the peak so far; or else it is tried again when there is less alive

Nodes that overwrite memory keep their place between its readers, and where the trace has an order of its collectives,
each comes behind the one before. Such orders are made, one that takes every such chain,
one that minds the peak, and one that takes reductions and updates alone; the best of them and of the order that came in
is returned: no schedule is worse.
"""

from __future__ import annotations

from torch import fx

from fzero.marks import marks_of
from fzero.program.agree.order import chained
from fzero.program.graph.trace import Trace, copied
from fzero.program.graph.values import Values, precedences
from fzero.program.options import Options
from fzero.program.passes.bucket import reorder, sorted_by
from fzero.program.passes.plan import Plan, with_chain
from fzero.program.report.memory import inside_loops, live_bytes

# What is taken out of turn: chains under the peak so far, all chains, or reductions and updates whatever they cost.
_RULES = ("under the peak", "all", "by role")
# Nodes that a chain is followed for.
_CHAIN = 12
# Chains that did not fit under the peak and are tried again after a step.
_RETRIED = 8


def schedule(trace: Trace, options: Options) -> Trace:
    """Return the trace with its nodes in an order of few live bytes."""
    trace = trace.replace(module=copied(trace.module))
    graph = trace.module.graph
    values, chain = Values.of(trace), chained(trace)
    if chain:
        order = sorted_by(graph, with_chain(precedences(graph, values), chain))
        reorder(graph, order or graph.nodes)
        values, chain = Values.of(trace), chain if order else {}
    as_given = list(graph.nodes)
    inside = inside_loops(trace)
    plan = Plan(graph, values, inside, chain)
    orders = [*(_Scheduler(plan, rule).run() for rule in _RULES), as_given]
    # Of equals the first: where something else sets the peak, a schedule still makes room for `overlap`.
    best = min(orders, key=lambda order: max(live_bytes(order, values, inside), default=0))
    if best is not as_given:
        reorder(graph, best)
    return trace


class _Scheduler:
    def __init__(self, plan: Plan, rule: str):
        self.plan = plan
        self.rule = rule
        self.size = plan.values.size
        self.left = list(plan.readers)
        self.missing = {node: len(needed) for node, needed in plan.needs.items()}
        self.emitted: set[fx.Node] = set()
        self.order: list[fx.Node] = []
        self.live = self.peak = 0
        self.refused: dict[fx.Node, None] = {}

    def run(self) -> list[fx.Node]:
        for node in self.plan.nodes:
            if node.op == "placeholder":
                self._emit(node)
        for node in self._prologue():
            self._emit_with(node)
        for node in self.plan.hard:
            if node not in self.emitted:
                self._settle(self._emit_with(node))
        rest = [n for n in self.plan.nodes if n not in self.emitted and n is not self.plan.output]
        for node in (*rest, self.plan.output):
            self.order.append(node)
        return self.order

    def _prologue(self) -> list[fx.Node]:
        """Return small nodes that need nothing large, in order."""
        plan, found = self.plan, dict[fx.Node, None]()
        for node in plan.hard:
            if all(needed in found for needed in plan.needs[node]):
                made = [b for n in (*plan.pulled(node, ()), node, *plan.parts[node]) for b in plan.values.makes[n]]
                if sum(self.size[b] for b in made) <= plan.tiny:
                    found[node] = None
        return list(found)

    def _settle(self, touched: list[fx.Node]) -> None:
        """Take chains that free memory, as long as there are any among what the last nodes touched."""
        waiting = dict.fromkeys([*list(self.refused)[:_RETRIED], *touched])
        while waiting:
            node = min(waiting, key=self.plan.order.__getitem__)
            del waiting[node]
            self.refused.pop(node, None)
            if node in self.emitted or self.missing[node]:
                continue
            if self.rule == "by role":
                if marks_of(node).role in ("reduce", "update"):
                    waiting.update(dict.fromkeys(self._emit_with(node)))
                continue
            chain, net, most = self._chain(node)
            if net > (self.plan.tiny if self._reads_much(chain) else 0):
                continue
            if self.rule == "under the peak" and self.live + most > self.peak:
                self.refused[node] = None
                continue
            for member in chain:
                waiting.update(dict.fromkeys(self._emit_with(member)))

    def _reads_much(self, chain: list[fx.Node]) -> bool:
        """Whether what a chain adds, if that is little, may let something large go: the norm of a gradient does."""
        plan = self.plan
        return any(self.size[b] > plan.tiny for node in chain for b in plan.values.reads[node])

    def _chain(self, node: fx.Node) -> tuple[list[fx.Node], int, int]:
        """Return the start of the chain from a node that frees most: its nodes, the bytes it adds, and its own peak."""
        taken: dict[int, int] = {}
        pulled: set[fx.Node] = set()
        chain: list[fx.Node] = []
        live = most = 0
        best, best_most, best_length = None, 0, 0
        at: fx.Node | None = node
        while at is not None and len(chain) < _CHAIN:
            for n in (*self.plan.pulled(at, _Either(self.emitted, pulled)), at, *self.plan.parts[at]):
                pulled.add(n)
                live, most = self._simulated(n, taken, live, most)
            chain.append(at)
            if best is None or live < best:
                best, best_most, best_length = live, most, len(chain)
            nexts = [u for u in self.plan.users[at] if u not in self.emitted and self._ready_after(u, chain)]
            at = min(nexts, key=self.plan.order.__getitem__) if nexts else None
        assert best is not None
        return chain[:best_length], best, best_most

    def _ready_after(self, node: fx.Node, chain: list[fx.Node]) -> bool:
        if node in chain:
            return False
        return self.missing[node] <= len(chain) and all(n in self.emitted or n in chain for n in self.plan.needs[node])

    def _simulated(self, node: fx.Node, taken: dict[int, int], live: int, most: int) -> tuple[int, int]:
        values = self.plan.values
        for b in values.makes[node]:
            live += self.size[b]
        most = max(most, live + self.plan.inside.get(node, 0))
        for b in values.reads[node]:
            taken[b] = taken.get(b, 0) + 1
            if taken[b] == self.left[b]:
                live -= self.size[b]
        for b in values.makes[node]:
            if self.plan.free[b]:
                live -= self.size[b]
        return live, most

    def _emit_with(self, node: fx.Node) -> list[fx.Node]:
        """Emit a node with what comes with it; return the nodes whose worth may have changed."""
        plan, touched = self.plan, dict[fx.Node, None]()
        for n in (*plan.pulled(node, self.emitted), node, *plan.parts[node]):
            self._emit(n)
            for b in plan.values.reads[n]:
                if self.size[b] > plan.tiny and 0 < self.left[b] <= 4:
                    touched.update((r, None) for r in plan.readers_of.get(b, ()) if r not in self.emitted)
        for user in plan.users[node]:
            self.missing[user] -= 1
            touched[user] = None
        return [n for n in touched if not self.missing[n] and n not in self.emitted]

    def _emit(self, node: fx.Node) -> None:
        self.live, self.peak = self._emitted_bytes(node)
        self.emitted.add(node)
        self.order.append(node)

    def _emitted_bytes(self, node: fx.Node) -> tuple[int, int]:
        values, live = self.plan.values, self.live
        for b in values.makes[node]:
            live += self.size[b]
        peak = max(self.peak, live + self.plan.inside.get(node, 0))
        for b in values.reads[node]:
            self.left[b] -= 1
            if not self.left[b]:
                live -= self.size[b]
        for b in values.makes[node]:
            if self.plan.free[b]:
                live -= self.size[b]
        return live, peak


class _Either:
    """The union of two sets, without making it."""

    def __init__(self, a: set[fx.Node], b: set[fx.Node]):
        self.a, self.b = a, b

    def __contains__(self, node: object) -> bool:
        return node in self.a or node in self.b
