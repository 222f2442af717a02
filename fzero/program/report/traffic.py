"""The bytes that a rank receives while a program runs.

Of N ranks along an axis, each receives from the N − 1 others: of what a gather returns (N − 1)/N, of what a
reduce-scatter or an exchange is given (N − 1)/N. That is what any algorithm has to move; a ring moves no more.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from fzero._torch import c10d
from fzero.marks import marks_of
from fzero.program.graph.collectives import GATHERS, ISSUES, WAIT
from fzero.program.graph.trace import Trace
from fzero.program.graph.walk import calls, vals

COLLECTIVES = ("all_gather", "reduce_scatter", "all_to_all", "all_reduce", "broadcast")

_SCATTERS = frozenset((c10d.reduce_scatter_tensor.default, c10d.reduce_scatter_tensor_coalesced.default))
_SUM = torch.ops.fzero.sum_parts.default


@dataclass(frozen=True)
class Message:
    """What one call of a collective moves.

    Attributes:
        collective: one of `COLLECTIVES`. An all-to-all whose parts are added is a reduce-scatter.
        axis: the mesh axis; the group's name where the call does not come from a mesh.
        ranks: ranks of the group; 0 where the call does not say.
        received: bytes that a rank receives.
    """

    collective: str
    axis: str
    ranks: int
    received: int


@dataclass(frozen=True)
class Traffic:
    """Bytes that a rank receives in one run of a program.

    Attributes:
        total: all of them.
        by_axis: by mesh axis.
        by_collective: by collective, each of `COLLECTIVES`.
        calls: how many calls there are of each collective; a bucket is one.
    """

    total: int
    by_axis: Mapping[str, int]
    by_collective: Mapping[str, int]
    calls: Mapping[str, int]


def traffic_of(trace: Trace) -> Traffic:
    """Return what a program receives, what is inside loops once for each round."""
    by_axis, by_collective, count = Counter[str](), Counter[str](), Counter[str]()
    for node, times in calls(trace):
        if node.target in ISSUES:
            found = message_of(node)
            by_axis[found.axis] += found.received * times
            by_collective[found.collective] += found.received * times
            count[found.collective] += times
    return Traffic(
        total=sum(by_axis.values()),
        by_axis=dict(by_axis),
        by_collective={name: by_collective[name] for name in COLLECTIVES},
        calls={name: count[name] for name in COLLECTIVES},
    )


def received_bytes(trace: Trace) -> tuple[int, int]:
    """Return the bytes that a program receives, and the calls of collectives that bring them."""
    found = traffic_of(trace)
    return found.total, sum(found.calls.values())


def message_of(issue: fx.Node) -> Message:
    """Return what a collective moves."""
    given, *rest = vals(issue.args)
    sent = sum(x.numel() * x.element_size() for x in (given if isinstance(given, list | tuple) else (given,)))
    axis = str(marks_of(issue).get("axis", rest[-1]))
    if issue.target in GATHERS:
        return Message("all_gather", axis, rest[0], sent * (rest[0] - 1))
    if issue.target in _SCATTERS:
        return Message("reduce_scatter", axis, rest[1], sent * (rest[1] - 1) // rest[1])
    if issue.target is c10d.all_to_all_single.default:
        value: Tensor = issue.meta["val"]
        ranks = len(rest[0])
        received = value.numel() * value.element_size() * (ranks - 1) // ranks
        return Message("reduce_scatter" if _is_summed(issue) else "all_to_all", axis, ranks, received)
    if issue.target is c10d.broadcast.default:
        return Message("broadcast", axis, 0, sent)
    # The call does not tell its number of ranks; a ring of many receives this much, and none receives more.
    return Message("all_reduce", axis, 0, 2 * sent)


def _is_summed(exchange: fx.Node) -> bool:
    """Whether what an all-to-all brings is added up part by part, and is there for nothing else."""
    waits = list(exchange.users)
    return all(wait.target is WAIT and all(user.target is _SUM for user in wait.users) for wait in waits)
