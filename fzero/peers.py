"""What ranks tell each other through the store that the processes share.

A rank that raises never reaches the collective in which the others wait. They end when its process does,
or at the process group's deadline, with an error of the network that says nothing of the cause. So the
rank leaves its error in the store, and the others raise that instead:

    rank 1    raises ValueError   ──▶ store ──▶   leaves
    rank 0    waits in a collective … connection closed, or deadline ──▶ PeerError: rank 1 raised ValueError

Ranks that run different programs would wait in different collectives. So a rank that has traced a new program
holds a round before it runs it: each rank enters what it is about to run, and the first that knows how the
round ends writes the end, once and for all:

    agreed       all ranks entered the same program                                everyone runs it
    different    two ranks entered different ones                                  everyone raises
    apart        some rank entered none before the deadline, or waits elsewhere    everyone raises
    raised       some rank raised instead                                          everyone raises

Whatever its end, a round that ended is over for all ranks: the next trace opens the next one.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch.distributed as dist

from fzero._torch import default_store, group_deadline
from fzero.errors import PeerError, ProgramMismatchError

# Seconds before a call began within which another rank's error still counts as the cause of this one's.
_WINDOW = 60.0

# Seconds that ranks which raise for different programs wait for each other's reasons.
_PATIENCE = 10.0

_WAY_OUT = "Make the same calls on every rank, with arguments of the same shapes, dtypes and constants."


@contextmanager
def together(call: str) -> Iterator[None]:
    """Inside, this rank does what all ranks do. If it raises, the others are told; if another does, it is.

    Args:
        call: what is being done, for the message.

    Raises:
        PeerError: a collective failed, and another rank had raised.
        ProgramMismatchError: a collective failed, and another rank had traced a program that this one did not.
    """
    if not dist.is_initialized():
        yield
        return
    began = time.time()
    try:
        yield
    except (PeerError, ProgramMismatchError):
        raise
    except Exception as error:
        if not _from_network(error):
            _tell(error, call)
            raise
        where = getattr(error, "waiting_in", "a collective")
        if apart := _found_apart(f"waited in {where}, {call}"):
            raise ProgramMismatchError(f"{call}: {apart}") from error
        told = _told(since=began - _WINDOW) or [
            f"  no other rank left an error: one is late by more than the {group_deadline():.0f} s that a collective "
            f"waits, ended outside of fzero, or runs something else.\n  {error}"
        ]
        raise PeerError(f"{call}: rank {dist.get_rank()} waited in {where}.\n" + "\n".join(told)) from error


# ---------------------------------------------------------------------------------------------------------
# Errors


def _from_network(error: Exception) -> bool:
    """Whether a collective failed, not the code around it. gloo has no exception class of its own."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error).lower())


def _tell(error: Exception, call: str) -> None:
    """Leave an error in the store. Done again further out, it adds the outer call."""
    calls = [*getattr(error, "told_in", ()), call]
    error.told_in = calls  # type: ignore[attr-defined]
    here = world()
    here.told.add(call)
    here.failed += len(calls) == 1
    message = {"rank": dist.get_rank(), "time": time.time(), "calls": calls, "type": type(error).__name__}
    text = json.dumps({**message, "text": str(error), "agreed": here.agreed, "failed": here.failed})
    try:
        default_store().set(f"fzero/raised/{dist.get_rank()}", text)
        default_store().set(f"fzero/raised/in/{call}", text)
    except RuntimeError:  # the store went with the rank that held it; the error itself is what matters
        return


def _told(since: float) -> list[str]:
    """Return what other ranks left in the store, one line a rank."""
    lines = []
    for rank in range(dist.get_world_size()):
        try:
            message = None if rank == dist.get_rank() else _read(f"fzero/raised/{rank}")
        except RuntimeError:
            continue
        if message is not None and message["time"] >= since:
            lines.append(_line(message))
    return lines


def _told_in(call: str) -> str | None:
    """Return the line of an error for which another rank does not come to the round that `call` holds."""
    here, message = world(), _read(f"fzero/raised/in/{call}")
    # Where this rank has failed as often, the error is of an earlier call: functions may have one name.
    news = message is not None and message["agreed"] == here.agreed and message["failed"] > here.failed
    return _line(message) if news else None


def _line(message: dict[str, Any]) -> str:
    ago, calls = max(time.time() - message["time"], 0.0), ", in ".join(message["calls"])
    return f"  rank {message['rank']} raised {message['type']} in {calls}, {ago:.1f} s ago: {message['text']}"


# ---------------------------------------------------------------------------------------------------------
# Rounds


@dataclass(frozen=True)
class Entry:
    """What a rank is about to run.

    Attributes:
        program: its fingerprint.
        call: the call that it is for.
        cause: why it was traced.
        runs: as this rank counts in its `World`, and so is `failed`.
    """

    program: str
    call: str
    cause: str
    runs: int = 0
    failed: int = 0


@dataclass(frozen=True)
class _End:
    kind: Literal["agreed", "different", "apart", "raised"]
    text: str = ""
    ranks: Sequence[int] = ()
    entry: dict[str, Any] = field(default_factory=dict)  # of the rank that ended it


@dataclass
class World:
    """What this rank knows of one world.

    Attributes:
        ended: rounds before this one are over, and this rank took part in them or knows how they ended.
        agreed: the last round that all agreed in.
        failed: calls that have failed here since then. Ranks in step have failed equally often.
        told: those in which this rank raised.
        runs: programs with collectives that it has begun to run. Ranks in step have begun equally many.
    """

    ended: int = 0
    agreed: int = -1
    failed: int = 0
    told: set[str] = field(default_factory=set)
    runs: int = 0


# One for each default process group: another one has another store.
_worlds: WeakKeyDictionary[Any, World] = WeakKeyDictionary()


def world() -> World:
    """Return what this rank knows of the world that it is in."""
    return _worlds.setdefault(dist.group.WORLD, World())


def hold_round(entry: Entry, reasons: Callable[[], bytes]) -> dict[int, bytes]:
    """Enter a program and wait until all ranks have entered one, at most as long as a collective may wait.

    Args:
        entry: what this rank is about to run.
        reasons: a text from which two programs can be told apart. It is sent only if they differ.

    Returns:
        Nothing if all ranks entered the same program, else two that differ and the reasons of each.

    Raises:
        ProgramMismatchError: some rank entered nothing: it runs a program that it has, or something else. Or two
            differ, and their reasons did not come.
        PeerError: some rank raised instead.
    """
    here = world()
    entry = replace(entry, runs=here.runs, failed=here.failed)
    while True:
        number, here.ended = here.ended, here.ended + 1
        # A round may have ended without this rank: the others did not wait for it, and it raises as they did.
        end = _end_of(number) or _end_behind(number, here) or _enter(number, entry) or _wait(number, entry)
        # Or it was for an earlier call, in which this rank has raised already.
        if not _is_behind(end.entry, here):
            break
    if end.kind == "agreed":
        here.agreed, here.failed, here.runs = number, 0, end.entry["runs"]
        here.told.clear()
        return {}
    here.failed += 1
    found = _reasons(number, end.ranks, reasons)
    if end.kind == "raised":
        raise PeerError(f"{entry.call}: rank {dist.get_rank()} waited for all ranks to trace the program.\n{end.text}")
    if end.kind == "apart" or len(found) < len(end.ranks):
        raise ProgramMismatchError(f"{entry.call}: {end.text}")
    return found


def _is_behind(entry: Mapping[str, Any], here: World) -> bool:
    """Whether an entry is for a call in which this rank has raised already."""
    return bool(entry) and entry["call"] in here.told and entry["failed"] < here.failed


def _end_behind(number: int, here: World) -> _End | None:
    """End a round in which others wait for this rank in a call that it has left by raising."""
    entries = _entries(number) if here.told else {}
    behind = next((e for e in map(asdict, entries.values()) if _is_behind(e, here)), None)
    if behind is None:
        return None
    return _decide(number, _End("raised", _line(_read(f"fzero/raised/in/{behind['call']}")), entry=behind))


def end_apart(doing: str, begun: int | None = None) -> _End | None:
    """End the round that other ranks hold while this one does something else; `None` if they hold none.

    Args:
        doing: what it does, for their message.
        begun: only if this rank has begun this many runs and some that holds the round fewer: it may be late.
    """
    number = world().ended
    while _end_of(number) is not None:
        number += 1
    entries = _entries(number) if default_store().check([f"{_key(number)}/count"]) else {}
    if not entries:
        return None
    if begun is not None and all(entry.runs >= begun for entry in entries.values()):
        return None
    here = f"rank {dist.get_rank()} traced none: it {doing}"
    return _decide(number, _End("apart", f"{_traced(entries)}; {here}. {_WAY_OUT}"))


def _enter(number: int, entry: Entry) -> _End | None:
    """Put an entry into the store. Return the round's end if this entry decides it.

    Each rank reads and writes a few keys, however many ranks there are.
    """
    store, key = default_store(), _key(number)
    store.set(f"{key}/entry/{dist.get_rank()}", json.dumps(asdict(entry)))
    # After the entry is there: a rank that raises later sees it, in `_end_behind`.
    if line := _told_in(entry.call):
        return _decide(number, _End("raised", line, entry=asdict(entry)))
    store.add(f"{key}/same/{entry.program}", 1)
    count = store.add(f"{key}/count", 1)
    # Who counts here has entered its program before. So a lower number of equals means that another is among them.
    if store.add(f"{key}/same/{entry.program}", 0) < count:
        entries = _entries(number)
        first = min(entries)
        other = min(rank for rank in entries if entries[rank].program != entries[first].program)
        text = f"ranks {first} and {other} traced different programs. {_WAY_OUT}"
        return _decide(number, _End("different", text, (first, other), asdict(entry)))
    return _decide(number, _End("agreed", entry=asdict(entry))) if count == dist.get_world_size() else None


def _wait(number: int, entry: Entry) -> _End:
    began, deadline = time.monotonic(), group_deadline()
    while (end := _end_of(number)) is None:
        waited = time.monotonic() - began
        if line := _told_in(entry.call):
            return _decide(number, _End("raised", line, entry=asdict(entry)))
        if waited > deadline:
            if lines := _told(since=time.time() - waited - _WINDOW):
                return _decide(number, _End("raised", "\n".join(lines), entry=asdict(entry)))
            return _decide(number, _End("apart", _missing(number, deadline), entry=asdict(entry)))
        time.sleep(min(0.001 + waited / 8, 0.1))
    return end


def _reasons(number: int, ranks: Sequence[int], reasons: Callable[[], bytes]) -> dict[int, bytes]:
    """Return what ranks that differ tell of their programs, this one included if it is among them."""
    store, keys = default_store(), {rank: f"{_key(number)}/reasons/{rank}" for rank in ranks}
    if dist.get_rank() in keys:
        store.set(keys[dist.get_rank()], reasons())
    until = time.monotonic() + _PATIENCE
    while ranks and not store.check(list(keys.values())) and time.monotonic() < until:
        time.sleep(0.01)
    return {rank: store.get(key) for rank, key in keys.items() if store.check([key])}


def _found_apart(doing: str) -> str | None:
    """Return what others traced while this rank did something else, if they did."""
    here, text = world(), None
    try:
        while (end := _end_of(here.ended) or end_apart(doing)) is not None:
            here.ended += 1
            text = end.text if end.kind in ("apart", "different") else text
    except RuntimeError:  # the store is gone
        return text
    return text


def _decide(number: int, end: _End) -> _End:
    """End a round, unless it has ended; return how it did."""
    return _End(**json.loads(default_store().compare_set(f"{_key(number)}/end", "", json.dumps(asdict(end)))))


def _end_of(number: int) -> _End | None:
    found = _read(f"{_key(number)}/end")
    return None if found is None else _End(**found)


def _entries(number: int) -> dict[int, Entry]:
    found = {rank: _read(f"{_key(number)}/entry/{rank}") for rank in range(dist.get_world_size())}
    return {rank: Entry(**fields) for rank, fields in found.items() if fields is not None}


def _missing(number: int, deadline: float) -> str:
    entries = _entries(number)
    missing = [str(rank) for rank in range(dist.get_world_size()) if rank not in entries]
    ranks = f"rank{'s' if len(missing) > 1 else ''} {', '.join(missing[:8])}{', …' if len(missing) > 8 else ''}"
    return (
        f"{_traced(entries)}; {ranks} traced none within {deadline:.0f} s: a program that was there before runs, "
        f"or another function, or the rank is late. {_WAY_OUT}"
    )


def _traced(entries: dict[int, Entry]) -> str:
    rank = min(entries)
    others = f" and {len(entries) - 1} more" if len(entries) > 1 else ""
    return f"rank {rank}{others} traced a new program for {entries[rank].call} ({entries[rank].cause})"


def _read(key: str) -> Any:
    store = default_store()
    return json.loads(store.get(key)) if store.check([key]) else None


def _key(number: int) -> str:
    return f"fzero/round/{number}"
