"""Calls that all ranks make together: what they agree on first, and what they hear of each other's errors.

A rank that raises never reaches the collective in which the others wait, and ranks that run different things would wait
in different collectives. So ranks agree at every call that has collectives, before the first of them, and leave their
errors where the others find them: in the store through which the processes found each other.

    rank 1    raises ValueError   ──▶ store ──▶   leaves
    rank 0    waits …  ──▶ PeerError: rank 1 raised ValueError

    rank 1    step(state, batch)  ──▶ store ◀──   fz.gather(state)   rank 0        ProgramMismatchError on both

A call goes like this. Start reading here, and go on in the order of the steps:

    1  `together`, in this file: whatever is raised inside is left in the store.
    2  `compare`, in this file: a hash of the collectives that this rank is about to run stands for all of them.
    3  `World.enter`, in `rounds`: the rank adds 1 to a counter that is named by that hash. Who brings it to the number
       of ranks wakes the others, and all run. Nearly every call ends here: one question to the store.
    4  `Watch`, in `watch`: a rank that has waited for 0.1 s has a thread find out why. Two hashes differ, a rank left
       an error or has ended, or time is up: whoever finds out first writes down how the round ends, for all.
    5  `agree`, in the file of that name, turns that end into what is raised; where two ranks differ, each sends what it
       is about to run, and `_explained`, in this file, names the first difference.

A rank that has raised may go on to its next call, while the others have not heard of the error yet. Its counter must
not be theirs then, or they would run on as if nothing had been. So the errors since the last agreement, counted by
call, are part of the hash in step 3; ranks in step have the same counts, as where all of them raised the same error.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import re
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

import torch.distributed as dist

from fzero._torch import get_proxy_mode, group_deadline
from fzero.errors import PeerError, ProgramMismatchError
from fzero.ranks.agree import agree, world
from fzero.ranks.rounds import INSIDE

# Where a collective fails, errors of other ranks count as its cause if they were left after the call began, or at most
# this many seconds before: a rank may fail a little before this one gets there. Older ones were another matter.
_WINDOW = 60.0

# Differences that a message lists.
_LISTED = 4

_P = ParamSpec("_P")
_R = TypeVar("_R")


class _Here(threading.local):
    """Whether this thread is inside an eager call that all ranks have agreed on: a `gather` in `vjp` needs no more."""

    agreed = False


_here = _Here()


@contextmanager
def together(call: str) -> Iterator[None]:
    """Inside, this rank does what all ranks do. An error of its own is left in the store, where the others find it.

    Where a collective fails since another rank has left, that rank's error is raised here, as a `PeerError`.

    Args:
        call: what is being done, for the message.

    Raises:
        PeerError: a collective failed, and another rank had raised.
    """
    if not dist.is_initialized():
        yield
        return
    began, agreed = time.time(), world().agreed
    try:
        yield
    except ProgramMismatchError:
        raise
    except Exception as error:
        here = world()
        if not isinstance(error, PeerError) and not _from_network(error):
            here.tell(error, call)
        if here.agreed > agreed and INSIDE not in getattr(error, "told_in", ()):
            _failed_inside(error)
        if isinstance(error, PeerError) or not _from_network(error):
            raise
        where = getattr(error, "waiting_in", "a collective")
        told = here.told(began - _WINDOW, here.store) or [
            f"  no other rank left an error: one is late by more than the {group_deadline():.0f} s that a collective "
            f"waits, or ended outside of fzero.\n  {error}"
        ]
        lost = PeerError(f"{call}: rank {dist.get_rank()} waited in {where}.\n" + "\n".join(told))
        lost.told_in = getattr(error, "told_in", ())  # type: ignore[attr-defined]
        raise lost from error


def _failed_inside(error: Exception) -> None:
    """Count a failure inside of a call that all had agreed on; leave it for the others where it arose on this rank."""
    if isinstance(error, PeerError) or _from_network(error):
        error.told_in = [*getattr(error, "told_in", ()), INSIDE]  # type: ignore[attr-defined]
        world().failed[INSIDE] += 1
    else:
        world().tell(error, INSIDE)


def collective(
    call: str, of: Callable[..., Sequence[str]], *, within: bool = False
) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Make a function one that all ranks call together, and that they agree on before it runs.

    Inside another such call, or inside a trace, it is part of that, and is not agreed on by itself.

    Args:
        call: its name.
        of: what its collectives depend on, as lines of text: a function of its arguments. No lines, no collectives.
        within: whether ranks agree on it inside another such call too. `axis.sum(x)` stands in the user's function,
            where one rank may call it and another not; the gathers of `vjp` come on every rank.
    """

    def decorated(f: Callable[_P, _R]) -> Callable[_P, _R]:
        @functools.wraps(f)
        def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            if not dist.is_initialized():
                return f(*args, **kwargs)
            with together(call):
                part = (_here.agreed and not within) or get_proxy_mode() is not None
                lines = [] if part else of(*args, **kwargs)
                if not lines:
                    return f(*args, **kwargs)
                digest = hashlib.sha256("\n".join((call, *lines)).encode()).hexdigest()[:32]
                compare(digest, call, dict, lambda: [(line, None) for line in lines])
                before, _here.agreed = _here.agreed, True
                try:
                    return f(*args, **kwargs)
                finally:
                    _here.agreed = before

        return run

    return decorated


def compare(
    digest: str,
    call: str,
    arguments: Callable[[], Mapping[str, str]],
    lines: Callable[[], Sequence[tuple[str, str | None]]],
) -> None:
    """Wait until all ranks are about to run the same.

    Args:
        digest: a hash of what this rank is about to run.
        call: the call that it is for, such as `step (call 7)`.
        arguments: path to dtype and shape, or to the constant that stands there.
        lines: what there is to compare, and the place in the user's code that each line comes of.

    Raises:
        ProgramMismatchError: another rank is about to run something else, or nothing as long as a collective may wait.
        PeerError: another rank raised in this call.
    """

    def reasons() -> bytes:
        told = {"call": call, "arguments": dict(arguments()), "lines": list(lines())}
        return zlib.compress(json.dumps(told).encode())

    if different := agree(digest, call, reasons):
        told = {rank: json.loads(zlib.decompress(reason)) for rank, reason in different.items()}
        raise ProgramMismatchError(f"{call}: {_explained(told)}")


def _from_network(error: Exception) -> bool:
    """Whether a collective failed, not the code around it. gloo has no exception class of its own."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error).lower())


def _explained(told: Mapping[int, dict[str, Any]]) -> str:
    (first, a), (second, b) = told.items()
    head = f"the ranks are about to run different things. Rank {first} calls {a['call']}, rank {second} {b['call']}"
    way_out = "Call the same function on every rank, and let no rank alone take a branch that uses other parameters."
    rows = []
    if a["call"].partition(" (call ")[0] == b["call"].partition(" (call ")[0] and a["lines"] == b["lines"]:
        head = f"ranks {first} and {second} were given different things"
        way_out = "Give every rank the same."
    elif [text for text, _ in a["lines"]] != [text for text, _ in b["lines"]]:
        rows += [_different_line(a["lines"], b["lines"])]
    rows += _different_arguments(a["arguments"], b["arguments"])
    listed = [f"{path}: rank {first} has {mine}, rank {second} has {theirs}" for path, mine, theirs in rows[:_LISTED]]
    more = [f"and {len(rows) - _LISTED} more"] if len(rows) > _LISTED else []
    return f"{'; '.join([head, *listed, *more])}. {way_out}"


def _different_arguments(mine: Mapping[str, str], theirs: Mapping[str, str]) -> list[tuple[str, str, str]]:
    rows = []
    for path in dict.fromkeys([*mine, *theirs]):
        a, b = (portable(side.get(path, "nothing")) for side in (mine, theirs))
        if a != b:
            short = [x.replace(" on cpu", "").replace(" on cuda", "") for x in (a, b)]
            a, b = short if short[0] != short[1] else (a, b)
            rows.append((path, a, b))
    return rows


def portable(text: str) -> str:
    """Return the description of an argument without the number of its device and addresses of objects."""
    return re.sub(r"\b0x[0-9a-fA-F]+", "0x", re.sub(r"\b(on |device=')(cuda):\d+", r"\1\2", text))


def _different_line(mine: list[list[Any]], theirs: list[list[Any]]) -> tuple[str, str, str]:
    pairs = enumerate(itertools.zip_longest(mine, theirs, fillvalue=("nothing", None)), 1)
    number, sides = next((n, (a, b)) for n, (a, b) in pairs if a[0] != b[0])
    told = [f"`{text.strip()}`{f' ({place})' if place else ''}" for text, place in sides]
    return f"collective {number}", told[0], told[1]
