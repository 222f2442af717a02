"""Collectives in a graph: one table of what there is to know of each.

Passes ask it which nodes start a collective and how several share a call, reports what a rank receives, messages what
it is called. A new collective is a row here, beside its function in `fzero.ranks.collectives`.

Of N ranks along an axis, each receives from the N − 1 others: of what a gather returns (N − 1)/N, of what a
reduce-scatter or an exchange is given (N − 1)/N. That is what any algorithm has to move; a ring moves no more.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import fx

from fzero._torch import OpOverload, c10d
from fzero.ranks.sums import SUM_PARTS

WAIT = c10d.wait_tensor.default


@dataclass(frozen=True)
class Collective:
    """A row of the table.

    Attributes:
        name: what reports and messages call it.
        operator: the operator that starts it. Its last argument is the group, its first what is sent.
        coalesced: the one that takes a list, and returns one; `None` where there is none.
        ranks: the number of ranks, from the arguments behind the first; 0 where the call does not tell it.
        received: bytes that a rank receives, from those that it sends, those that are made, and the number of ranks.
        packs: how several share a call: `"listed"`, by the coalesced form, so that each arrives in a tensor of its own;
            `"in rows"`, side by side in one tensor, each rank's parts of all in a row; `None` where none do.
        is_personal: each rank gets parts that no other rank does, so nodes cannot fetch them once for all their ranks.
    """

    name: str
    operator: OpOverload
    coalesced: OpOverload | None
    ranks: Callable[[Sequence[Any]], int]
    received: Callable[[int, int, int], int]
    packs: Literal["listed", "in rows"] | None = None
    is_personal: bool = False


_ALL_GATHER = Collective(
    "all_gather",
    c10d.all_gather_into_tensor.default,
    c10d.all_gather_into_tensor_coalesced.default,
    ranks=lambda rest: rest[0],
    received=lambda sent, made, n: sent * (n - 1),
    packs="listed",
)
_REDUCE_SCATTER = Collective(
    "reduce_scatter",
    c10d.reduce_scatter_tensor.default,
    c10d.reduce_scatter_tensor_coalesced.default,
    ranks=lambda rest: rest[1],
    received=lambda sent, made, n: sent * (n - 1) // n,
    packs="listed",
)
_ALL_TO_ALL = Collective(
    "all_to_all",
    c10d.all_to_all_single.default,
    None,
    ranks=lambda rest: len(rest[0]),
    received=lambda sent, made, n: made * (n - 1) // n,
    packs="in rows",
    is_personal=True,
)
# The call does not tell its number of ranks; a ring of many receives this much, and none receives more.
_ALL_REDUCE = Collective(
    "all_reduce",
    c10d.all_reduce.default,
    c10d.all_reduce_coalesced.default,
    ranks=lambda rest: 0,
    received=lambda sent, made, n: 2 * sent,
)
_BROADCAST = Collective(
    "broadcast",
    c10d.broadcast.default,
    None,
    ranks=lambda rest: 0,
    received=lambda sent, made, n: sent,
)

COLLECTIVES = {row.name: row for row in (_ALL_GATHER, _REDUCE_SCATTER, _ALL_TO_ALL, _ALL_REDUCE, _BROADCAST)}
# By the operator that starts it, of one tensor or of several.
ISSUES: dict[Any, Collective] = {
    op: row for row in COLLECTIVES.values() for op in (row.operator, row.coalesced) if op is not None
}
GATHERS = frozenset(op for op, row in ISSUES.items() if row is _ALL_GATHER)


def is_collective(node: fx.Node) -> bool:
    """Return whether a node starts a collective, or sends something to one rank."""
    target = node.target
    return isinstance(target, OpOverload) and target.namespace == "_c10d_functional" and target is not WAIT


def name_of(issue: fx.Node) -> str:
    """Return what a collective is called: an all-to-all whose parts are added up is a reduce-scatter."""
    row = ISSUES[issue.target]
    return _REDUCE_SCATTER.name if row is _ALL_TO_ALL and sum_of(issue) is not None else row.name


def sum_of(exchange: fx.Node) -> fx.Node | None:
    """Return the sum that an all-to-all is exchanged for, where that is all it is for."""
    node = exchange
    for target in (WAIT, SUM_PARTS):
        users = list(node.users)
        if len(users) != 1 or users[0].target is not target:
            return None
        node = users[0]
    return node


def issue_of(wait: fx.Node) -> fx.Node | None:
    """Return the collective that a wait is for."""
    source = wait.args[0]
    if isinstance(source, fx.Node) and source.target is operator.getitem:
        source = source.args[0]
    return source if isinstance(source, fx.Node) and source.target in ISSUES else None


def waits_of(issue: fx.Node) -> list[fx.Node]:
    """Return the waits for a collective: one, or of a coalesced one those for each of its tensors."""
    parts = [user for user in issue.users if user.target is operator.getitem]
    return [user for sent in (issue, *parts) for user in sent.users if user.target is WAIT]


def sent_for(wait: fx.Node) -> list[fx.Node]:
    """Return what is on its way until a wait: of a coalesced collective, the tensor that this result comes of."""
    issue = issue_of(wait)
    if issue is None:
        return []
    inputs, element = issue.args[0], wait.args[0]
    if isinstance(inputs, list | tuple):
        assert isinstance(element, fx.Node)
        inputs = inputs[element.args[1]]  # type: ignore[index]
    return [inputs] if isinstance(inputs, fx.Node) else []
