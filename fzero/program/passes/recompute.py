"""Forward values made again for the backward instead of being kept for it.

First blocks, by the policy `remat`. Of what a block makes, `kept` is what the forward uses outside of it; `saved` is
the rest of what the backward reads. The operations that lead from `kept`, from other blocks and from inputs to `saved`
are repeated in front of the first of them that the backward reads:

    forward     x ─block 1─▶ y ─block 2─▶ z               x, y, z are kept, what is inside is not
    backward    block 2 again from y, its backward; block 1 again from x, its backward

A block's last matrix product is not run again: its backward reads the product's inputs, and nobody reads its output.

Then gathers: what leads from stored pieces to a full leaf (cast, all-gather, view) costs no arithmetic worth counting,
and full leaves are most of the memory. The uses of a leaf, in order, fall into two groups at the widest gap between
them: uses at nodes 10, 12, 90 and 91 into 10, 12 and 90, 91. The second group gets a gather of its own, and the leaf is
gone in between. That is ZeRO-3's second gather, and there is never a third. `keep_gathered` bytes of leaves are spared
from it, those with the shortest gap first.

Only what is repeatable is repeated: no operation that writes memory, none on memory that is written. Random draws are
keyed, so the same numbers come again.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from fzero.marks import marks_of, set_marks
from fzero.operators import written_by
from fzero.program.graph.aliases import alias_of
from fzero.program.graph.build import call, mode_of
from fzero.program.graph.collectives import GATHERS
from fzero.program.graph.gathers import from_pieces
from fzero.program.graph.trace import Trace, copied
from fzero.program.graph.values import Values, nbytes
from fzero.program.options import Options
from fzero.program.passes.dead import sweep

# The nodes of one run through a block, in order.
_Run = dict[fx.Node, None]


def recompute(trace: Trace, options: Options) -> Trace:
    """Return the trace with blocks, and gathers, repeated for the backward."""
    trace = trace.replace(module=copied(trace.module))
    graph = trace.module.graph
    if options.remat != "none":
        _without_writes(graph)
    values = Values.of(trace)
    fixed = values.unrepeatable()
    cheap = from_pieces(graph, fixed)
    if options.remat != "none":
        _blocks(graph, options.remat, fixed, cheap, values)
    _gathers(graph, cheap, options.keep_gathered)
    sweep(graph)
    return trace


def _without_writes(graph: fx.Graph) -> None:
    """Turn `aten.div_(mask, 0.9)`, on a mask that the graph made itself, into `aten.div`, which may be repeated."""
    mode = mode_of(graph)
    for node in list(graph.nodes):
        written = written_by(node)
        if len(written) != 1 or written[0] is not node.args[0] or node.kwargs or written[0].op != "call_function":
            continue
        plain = _plain(str(node.target))
        if plain is None or len(written[0].users) > 1 or alias_of(written[0]) is not None:
            continue
        with graph.inserting_before(node):
            new = call(graph, mode, plain, node.args, marks_of(node))
        same = all(f(new.meta["val"]) == f(node.meta["val"]) for f in (Tensor.stride, lambda x: (x.shape, x.dtype)))
        (node if same else new).replace_all_uses_with(new if same else node)
        graph.erase_node(node if same else new)


def _plain(name: str) -> Any:
    """Return the operator that returns what this one writes: of `aten.div_.Scalar`, `aten.div.Scalar`."""
    namespace, operation, overload = name.split(".") if name.count(".") == 2 else ("", "", "")
    if namespace != "aten" or not operation.endswith("_"):
        return None
    return getattr(getattr(torch.ops.aten, operation[:-1], None), overload, None)


def _blocks(graph: fx.Graph, remat: str | int, fixed: set[fx.Node], cheap: set[fx.Node], values: Values) -> None:
    order = {node: i for i, node in enumerate(graph.nodes)}
    runs = _runs(graph)
    if not runs and any(_backward(node) for node in graph.nodes):
        raise ValueError(
            f"fz.jit: remat={remat!r} makes blocks again, and the function has none: it runs no module with a "
            f"ModuleList or Sequential through fz.functional. Wrap what is to be made again: fz.remat(f)."
        )
    others = fixed | cheap
    saved = [_saved(run, others) for run in runs]
    size = [_bytes_saved(nodes, run, values) for nodes, run in zip(saved, runs, strict=True)]
    left = sum(size)
    for run, nodes, freed in zip(runs, saved, size, strict=True):
        if isinstance(remat, int) and left <= remat:
            break
        left -= freed
        if nodes:
            uses = [(node, user) for node in nodes for user in node.users if _backward(user) and user in order]
            _repeat(graph, uses, order, partial(_inside, run=run, others=others))


def _runs(graph: fx.Graph) -> list[_Run]:
    """Return the nodes of each run through a block. A block that runs twice, or has a namesake, gives two."""
    runs: list[_Run] = []
    last = None
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        name = None if _backward(node) else marks_of(node).block
        if name is not None and name != last:
            runs.append({})
        if name is not None:
            runs[-1][node] = None
        if name is not None or _backward(node):
            last = name
    return runs


def _saved(run: _Run, others: set[fx.Node]) -> list[fx.Node]:
    """Return what the backward reads of a block's values and the forward does not read outside of it."""
    return [n for n in run if n not in others and not _leaves(n, run) and any(_backward(u) for u in n.users)]


def _bytes_saved(saved: Iterable[fx.Node], run: _Run, values: Values) -> int:
    """Return the bytes that are freed if these values are not saved: a view of what is kept in any case frees none."""
    staying = {b for node in run if _leaves(node, run) for b in values.holds[node]}
    held = {b for node in saved for b in values.holds[node] if values.owner[b] in run}
    return sum(values.size[b] for b in held - staying)


def _leaves(node: fx.Node, run: _Run) -> bool:
    """Whether the forward uses a value outside of the block that makes it."""
    return any(not _backward(user) and user not in run for user in node.users)


def _inside(node: fx.Node, *, run: _Run, others: set[fx.Node]) -> bool:
    """Whether a block's node may be repeated: everything but what the forward uses outside of it."""
    return node in run and node not in others and not _leaves(node, run)


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
        set_marks(copies[node], marks_of(node).replace(phase=marks_of(first).phase, repeated=True))
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
    plans: list[tuple[int, int, int, list[tuple[fx.Node, fx.Node]]]] = []
    for gather in nodes:
        if gather.target not in GATHERS or gather not in cheap or marks_of(gather).role != "gather":
            continue
        if _is_gathered_on(gather, cheap):
            continue
        if not marks_of(gather).again:
            _keep(gather)
            continue
        if marks_of(gather).repeated:  # the second one: `split_vjp` has cut the first off with the forward
            continue
        uses = _uses(gather, cheap, order)
        # Of a leaf that is cast once it is here, the larger form.
        size = max((nbytes(value.meta["val"]) for value, _ in uses), default=0)
        if len(uses) < 2 or not any(_backward(user) for _, user in uses):
            plans.append((len(nodes), order[gather], size, []))  # gathered once in any case
            continue
        gaps = [order[b[1]] - order[a[1]] for a, b in itertools.pairwise(uses)]
        widest = max(range(len(gaps)), key=gaps.__getitem__)
        plans.append((gaps[widest], order[gather], size, uses[widest + 1 :]))
    for _, at, size, later in sorted(plans, key=lambda plan: plan[:2]):
        if size <= keep:
            keep -= size
            _keep(nodes[at])
        elif later:
            _repeat(graph, later, order, cheap.__contains__)


def _is_gathered_on(gather: fx.Node, cheap: set[fx.Node]) -> bool:
    """Whether another gather follows, over the next axis of the mesh. Of such a chain the last one gives the leaf."""
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
    set_marks(gather, marks_of(gather).replace(kept=True))


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
    return marks_of(node).phase == "backward"
