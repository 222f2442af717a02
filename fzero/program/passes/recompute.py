"""Forward values made again for the backward instead of being kept for it.

First blocks, by the policy `remat`. Of what a block makes, `kept` is what the forward uses outside of it; `saved` is
the rest of what the backward reads. The operations that lead from `kept`, from other blocks and from inputs to `saved`
are repeated in front of the first of them that the backward reads:

    forward     x ─block 1─▶ y ─block 2─▶ z               x, y, z are kept, what is inside is not
    backward    block 2 again from y, its backward; block 1 again from x, its backward

A block's last product is not among them: its backward reads what went in, not what came out.

Then gathers: what leads from stored pieces to a full leaf (cast, all-gather, view) costs no arithmetic worth counting,
and full leaves are most of the memory. The uses of a leaf, in order, fall into two groups at the widest gap between
them; the second group gets a gather of its own, and the leaf is gone in between. That is ZeRO-3's second gather, and
there is never a third. `keep_gathered` bytes are spared from it, those with the shortest gap first.

Only what is repeatable is repeated: no operation that writes memory, none on memory that is written. Random draws are
keyed, so the same numbers come again.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from functools import partial

from torch import fx

from fzero.marks import marks_of
from fzero.program.options import Options
from fzero.program.passes.dead import sweep
from fzero.program.pieces import from_pieces
from fzero.program.trace import Trace, copied
from fzero.program.values import Values, nbytes
from fzero.program.wire import GATHERS


def recompute(trace: Trace, options: Options) -> Trace:
    """Return the trace with blocks, and gathers, repeated for the backward."""
    trace = trace.replace(module=copied(trace.module))
    graph = trace.module.graph
    values = Values.of(trace)
    # Donated pieces are overwritten too, but not before their last reader.
    written = {b for node, buffers in values.writes.items() if node not in values.in_place for b in buffers}
    fixed = {node for node, held in values.holds.items() if not written.isdisjoint(held)}
    cheap = from_pieces(graph, fixed)
    if options.remat != "none":
        _blocks(graph, options.remat, fixed, cheap, values)
    _gathers(graph, cheap, options.keep_gathered)
    sweep(graph)
    return trace


def _blocks(graph: fx.Graph, remat: str | int, fixed: set[fx.Node], cheap: set[fx.Node], values: Values) -> None:
    order = {node: i for i, node in enumerate(graph.nodes)}
    blocks: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op == "call_function" and not _backward(node) and (name := marks_of(node).get("block")) is not None:
            blocks.setdefault(name, []).append(node)
    if not blocks and any(_backward(node) for node in graph.nodes):
        raise ValueError(
            f"fz.jit: remat={remat!r} makes blocks again, and the function has none: it runs no module with a "
            f"ModuleList or Sequential through fz.functional. Wrap what is to be made again: fz.remat(f)."
        )
    others = fixed | cheap
    saved = {name: _saved(name, nodes, others) for name, nodes in blocks.items()}
    size = {name: _bytes_saved(nodes, values) for name, nodes in saved.items()}
    left = sum(size.values())
    for name in blocks:
        if isinstance(remat, int) and left <= remat:
            break
        left -= size[name]
        if saved[name]:
            uses = [(node, user) for node in saved[name] for user in node.users if _backward(user) and user in order]
            _repeat(graph, uses, order, partial(_inside, name=name, others=others))


def _saved(name: str, nodes: Iterable[fx.Node], others: set[fx.Node]) -> list[fx.Node]:
    """Return what the backward reads of a block's values and the forward does not read outside of it."""
    found = []
    for node in nodes:
        kept = any(not _backward(user) and marks_of(user).get("block") != name for user in node.users)
        if not kept and node not in others and any(_backward(user) for user in node.users):
            found.append(node)
    return found


def _bytes_saved(nodes: Iterable[fx.Node], values: Values) -> int:
    return sum(values.size[b] for b in dict.fromkeys(b for node in nodes for b in values.holds[node]))


def _inside(node: fx.Node, *, name: str, others: set[fx.Node]) -> bool:
    """Whether a block's node may be repeated: everything but what the forward uses outside of it."""
    if node in others or _backward(node) or marks_of(node).get("block") != name:
        return False
    return all(_backward(user) or marks_of(user).get("block") == name for user in node.users)


def _repeat(
    graph: fx.Graph,
    uses: list[tuple[fx.Node, fx.Node]],
    order: dict[fx.Node, int],
    repeatable: Callable[[fx.Node], bool],
) -> None:
    """Make values again in front of the first of their `(value, user)` uses, and let those users use the new ones."""
    first = min((user for _, user in uses), key=order.__getitem__)
    copies: dict[fx.Node, fx.Node] = {}
    for node in _closure([value for value, _ in uses], repeatable, order):
        with graph.inserting_before(first):
            copies[node] = graph.node_copy(node, lambda n: copies.get(n, n))
        copies[node].meta["custom"] = {**marks_of(node), "phase": marks_of(first).get("phase"), "repeated": True}
    for value, user in uses:
        user.replace_input_with(value, copies[value])


def _closure(
    wanted: Iterable[fx.Node], repeatable: Callable[[fx.Node], bool], order: dict[fx.Node, int]
) -> list[fx.Node]:
    """Return nodes with everything repeatable that leads to them, in order."""
    found: set[fx.Node] = set()
    stack = list(wanted)
    while stack:
        node = stack.pop()
        if node in found:
            continue
        found.add(node)
        stack += [source for source in node.all_input_nodes if source.op == "call_function" and repeatable(source)]
    return sorted(found, key=order.__getitem__)


def _gathers(graph: fx.Graph, cheap: set[fx.Node], keep: float) -> None:
    """Give the later uses of each gathered leaf a gather of their own."""
    nodes = list(graph.nodes)
    order = {node: i for i, node in enumerate(nodes)}
    plans: list[tuple[int, int, list[tuple[fx.Node, fx.Node]]]] = []
    for gather in nodes:
        if gather.target not in GATHERS or gather not in cheap or marks_of(gather).get("role") != "gather":
            continue
        if _is_gathered_on(gather, cheap):
            continue
        if not marks_of(gather).get("again"):
            _keep(gather)
            continue
        uses = _uses(gather, cheap, order)
        if len(uses) < 2 or not any(_backward(user) for _, user in uses):
            plans.append((len(nodes), order[gather], []))  # gathered once in any case
            continue
        gaps = [order[b[1]] - order[a[1]] for a, b in itertools.pairwise(uses)]
        widest = max(range(len(gaps)), key=gaps.__getitem__)
        plans.append((gaps[widest], order[gather], uses[widest + 1 :]))
    for _, at, later in sorted(plans, key=lambda plan: plan[:2]):
        size = nbytes(nodes[at].meta["val"])
        if size <= keep:
            keep -= size
            _keep(nodes[at])
        elif later:
            _repeat(graph, later, order, cheap.__contains__)


def _is_gathered_on(gather: fx.Node, cheap: set[fx.Node]) -> bool:
    """Whether another gather follows, over the next axis: the last one stands for the leaf."""
    stack = list(gather.users)
    while stack:
        node = stack.pop()
        if node in cheap:
            if node.target in GATHERS:
                return True
            stack += node.users
    return False


def _keep(gather: fx.Node) -> None:
    """Mark a gather as one whose leaf stays, for `hoist`."""
    gather.meta["custom"] = {**marks_of(gather), "kept": True}


def _uses(gather: fx.Node, cheap: set[fx.Node], order: dict[fx.Node, int]) -> list[tuple[fx.Node, fx.Node]]:
    """Return `(value, user)` for each use of a gathered leaf that is not itself part of making it, in order."""
    found, stack = [], [gather]
    seen = {gather}
    while stack:
        node = stack.pop()
        for user in node.users:
            if user in cheap:
                if user not in seen:
                    seen.add(user)
                    stack.append(user)
            else:
                found.append((node, user))
    return sorted(found, key=lambda use: (order[use[1]], order[use[0]]))


def _backward(node: fx.Node) -> bool:
    return marks_of(node).get("phase") == "backward"
