"""The bytes that a rank receives while a program runs, by what `fzero.program.graph.collectives` knows of each call."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, fx

from fzero.marks import marks_of
from fzero.program.graph.collectives import COLLECTIVES, ISSUES, name_of
from fzero.program.graph.trace import Trace
from fzero.program.graph.walk import calls, vals


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
    row, (given, *rest) = ISSUES[issue.target], vals(issue.args)
    ranks = row.ranks(rest)
    received = row.received(_nbytes(given), _nbytes(issue.meta["val"]), ranks)
    axis = marks_of(issue).axis
    return Message(name_of(issue), str(rest[-1]) if axis is None else axis, ranks, received)


def _nbytes(value: Tensor | Sequence[Tensor]) -> int:
    return sum(x.numel() * x.element_size() for x in (value if isinstance(value, list | tuple) else (value,)))
