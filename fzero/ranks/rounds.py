"""Rounds: at each call with collectives, ranks compare what they are about to run, in the store that they share.

A rank enters the round by counting up a number that stands for what it is about to run. Who brings it to the number of
ranks knows that all run the same, and wakes the others, who wait for that and for nothing else:

    rank 1   add 1 to "7/ab3f" ─▶ 1, wait                                ◀─ woken ── run
    rank 0                          add 1 to "7/ab3f" ─▶ 2 = all of us ── wake ───── run

That is one question to the store, on the host; no collective, nothing on a device. Where the number is not reached
within a moment, a thread of each rank that waits writes down in full what its rank is about to run, and reads what the
others are. The first that knows how the round ends takes its count back, so that the number cannot be reached any more,
and writes the end, once and for all:

    agreed       all run the same, and only their numbers of past failures differed       everyone runs it
    different    two run different things                                                 everyone raises
    apart        some rank came to no call before the deadline, or has ended              everyone raises
    raised       some rank raised instead                                                 everyone else raises

Whatever its end, a round that ended is over for all ranks, those that come to it later included.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from typing import Any, Literal
from weakref import WeakKeyDictionary, ref

import torch.distributed as dist

from fzero._torch import default_store, group_deadline, own_connection
from fzero.errors import PeerError, ProgramMismatchError

# Seconds between two looks of the thread, and so what a rank waits before its thread looks.
LOOK = 0.1

# Seconds in the store's own wait, which no signal interrupts; a rank that waits for longer asks by itself.
_BLIND = 1.0

# Seconds between two questions of such a rank.
_ASK = 0.02

# What a rank finds under the key that it waits for: the round is over, or it is to ask by itself.
_WOKEN, _BY_ITSELF = "woken", "ask"

# Seconds that ranks which raise for different programs wait for each other's reasons, or for who decides the end.
_PATIENCE = 10.0

# Seconds that what a round has written stays in the store: another rank's thread may be about to read it.
_KEPT = 3.0

# A count that is taken back adds this: no number of ranks is reached after that.
_TAKEN_BACK = 1 << 40

_WAY_OUT = "Make the same calls on every rank, in the same order."

# The name of the call that all agreed on last, for failures inside of it.
INSIDE = ""


@dataclass(frozen=True)
class _Entry:
    """What a rank is about to run: a hash of its collectives, the call, and by name the calls that failed here."""

    program: str
    call: str
    failed: dict[str, int]

    @property
    def key(self) -> str:
        failed = sorted((name, count) for name, count in self.failed.items() if count)
        return self.program if not failed else hashlib.sha256(repr((self.program, failed)).encode()).hexdigest()[:32]


@dataclass(frozen=True)
class _End:
    kind: Literal["agreed", "different", "apart", "raised"]
    text: str = ""
    ranks: Sequence[int] = ()
    call: str = ""  # that raised, and how often it had then
    count: int = 0


_AGREED = _End("agreed")


@dataclass(eq=False)
class _Waiting:
    """A rank in a round that is not over."""

    number: int
    entry: _Entry
    agreed: int
    since: float = field(default_factory=time.monotonic)
    seen: int = 0  # entries that were written down when this rank looked last
    taken_back: float | None = None
    by_itself: bool = False  # it is to ask the store by itself

    @property
    def counter(self) -> str:
        return f"{self.number}/{self.entry.key}"


class World:
    """What this rank knows of the world that it is in.

    Attributes:
        number: the round that it enters next.
        agreed: the last round that all agreed in.
        failed: how often calls of a name have failed here since then. Ranks in step have the same counts.
    """

    def __init__(self, group: Any, name: str) -> None:
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.name = name
        self.store = self.connection()
        self.number, self.agreed = 0, -1
        self.failed: Counter[str] = Counter()
        self._litter: deque[tuple[int, float, str]] = deque()  # until which round, since when, which key
        self._lock = threading.Lock()
        self._waiting: _Waiting | None = None
        self._verdict: _End | None = None

    def connection(self) -> Any:
        """Return a connection of its own to the store: one in which somebody waits serves nobody else."""
        return own_connection(self.name)

    # -------------------------------------------------------------------------------------------------
    # The caller's side

    def enter(self, program: str, call: str) -> _End:
        """Enter the next round, and return how it ended."""
        number, failed = self.number, dict(self.failed) if self.failed else {}
        waiting = _Waiting(number, _Entry(program, call, failed), self.agreed)
        try:
            count = self.store.add(waiting.counter, 1)
            if count == self.size:
                self._wake_others(number)
                end = _AGREED
            elif count > self.size:
                end = self._end_soon(number)
            else:
                if count == 1:
                    self._drop(number + 1, waiting.counter)
                end = self._wait(waiting)
        except KeyboardInterrupt as error:  # the round goes on without this rank, or it would count twice
            if self.take_back(waiting, self.store):
                self.tell(error, call)
                last = self.failed[call]
                _decide(self.store, number, _End("raised", self._line_of(self.store, call, last), (), call, last))
            self.number += 1
            raise
        self.number += 1
        if end.kind == "agreed":
            self.agreed = number
            self.failed.clear()
        return end

    def _wake_others(self, number: int) -> None:
        keys = [f"{number}/woken/{rank}" for rank in range(self.size) if rank != self.rank]
        if len(keys) > 8 and self.store.has_extended_api():
            self.store.multi_set(keys, [_WOKEN] * len(keys))
            return
        for key in keys:
            self.store.set(key, _WOKEN)

    def _wait(self, waiting: _Waiting) -> _End:
        key = f"{waiting.number}/woken/{self.rank}"
        with self._lock:
            self._waiting, self._verdict = waiting, None
        try:
            self.store.wait([key], timedelta(days=30))  # the thread ends it after a second, if nobody does before
            while waiting.by_itself and self.store.get(key) != _WOKEN.encode():
                time.sleep(_ASK)
        finally:
            with self._lock:
                self._waiting, verdict = None, self._verdict
        self._drop(waiting.number, key)
        return verdict or _AGREED

    def _end_soon(self, number: int) -> _End:
        until = time.monotonic() + _PATIENCE
        while (end := _end_of(self.store, number)) is None:
            if time.monotonic() > until:
                return _decide(self.store, number, _End("apart", f"a round was left without an end. {_WAY_OUT}"))
            time.sleep(0.01)
        return end

    def tell(self, error: BaseException, call: str) -> None:
        """Leave an error in the store. Done again further out, it adds the outer call."""
        calls = [*getattr(error, "told_in", ()), call]
        error.told_in = calls  # type: ignore[attr-defined]
        self.failed[call] += 1
        named = [name for name in calls if name != INSIDE]
        message = {"rank": self.rank, "time": time.time(), "calls": named, "type": type(error).__name__}
        text = json.dumps({**message, "text": str(error)})
        try:
            self.store.set(f"last/{self.rank}", text)
            self.store.set(self._key_of(call, self.failed[call]), text)
        except RuntimeError:  # the store went with the rank that held it; the error itself is what matters
            return

    def told(self, since: float) -> list[str]:
        """Return what other ranks left in the store, one line a rank."""
        lines = []
        for rank in range(self.size):
            try:
                message = None if rank == self.rank else _read(self.store, f"last/{rank}")
            except RuntimeError:
                continue
            if message is not None and message["time"] >= since:
                lines.append(_line(message))
        return lines

    def reasons(self, number: int, ranks: Sequence[int], own: Callable[[], bytes]) -> dict[int, bytes]:
        """Return what ranks that differ tell of what they run, this one included if it is among them."""
        keys = {rank: f"{number}/reasons/{rank}" for rank in ranks}
        if self.rank in keys:
            self.store.set(keys[self.rank], own())
        until = time.monotonic() + _PATIENCE
        while ranks and not self.store.check(list(keys.values())) and time.monotonic() < until:
            time.sleep(0.01)
        return {rank: self.store.get(key) for rank, key in keys.items() if self.store.check([key])}

    # -------------------------------------------------------------------------------------------------
    # The thread's side

    def look(self, store: Any) -> None:
        """Find out how the round ends in which this rank waits; wake it if it did."""
        waiting = self._waiting
        if waiting is None or time.monotonic() - waiting.since < LOOK:
            return
        end, key = self._ended(waiting, store), f"{waiting.number}/woken/{self.rank}"
        if end is None:
            if not waiting.by_itself and time.monotonic() - waiting.since > _BLIND:
                waiting.by_itself = True
                store.compare_set(key, "", _BY_ITSELF)  # unless it has been woken already
            return
        with self._lock:
            if self._waiting is not waiting:
                return
            self._verdict = end
        store.set(key, _WOKEN)

    def _ended(self, waiting: _Waiting, store: Any) -> _End | None:
        number = waiting.number
        if not waiting.seen:
            store.set(f"{number}/entry/{self.rank}", json.dumps(asdict(waiting.entry)))
            waiting.seen = -store.add(f"{number}/entries", 1)
            self._drop(number + 1, f"{number}/entry/{self.rank}")
            if waiting.seen == -1:
                self._drop(number + 1, f"{number}/entries")
        if (end := _end_of(store, number)) is not None:
            return end
        if waiting.taken_back is not None and time.monotonic() - waiting.taken_back < _PATIENCE:
            return None
        found = self._found(waiting, store)
        if found is None or (waiting.taken_back is None and not self.take_back(waiting, store)):
            return None
        return _decide(store, number, found)

    def take_back(self, waiting: _Waiting, store: Any) -> bool:
        """Take a count back; `True` if it is for this rank to write how the round ends.

        Not so if all were there already, who then wake this one, nor if another rank was first to take its count back.
        """
        waiting.taken_back = time.monotonic()
        count = store.add(waiting.counter, _TAKEN_BACK)
        return bool(count < 2 * _TAKEN_BACK and count - _TAKEN_BACK != self.size)

    def _found(self, waiting: _Waiting, store: Any) -> _End | None:
        entry, number = waiting.entry, waiting.number
        for name in (entry.call, INSIDE):
            count = entry.failed.get(name, 0) + 1
            if (message := _read(store, self._key_of(name, count, waiting.agreed))) is not None:
                return _End("raised", _line(message), (), name, count)
        seen = store.add(f"{number}/entries", 0)
        if seen != waiting.seen:
            waiting.seen = seen
            entries = self._entries(store, number)
            if (end := self._compared(entries, store, waiting.agreed)) is not None:
                return end
        waited, deadline = time.monotonic() - waiting.since, group_deadline()
        gone = [rank for rank in range(self.size) if store.check([f"left/{rank}"])] if store.check(["left"]) else []
        if gone:
            lines = "".join(f"\n{line}" for line in self.told(since=0.0))
            return _End("apart", f"{self._waiters(store, number)}; {_ranks(gone)} ended.{lines}\n{_WAY_OUT}")
        if waited > deadline:
            here = self._entries(store, number)
            missing = [rank for rank in range(self.size) if rank not in here]
            return _End(
                "apart",
                f"{self._waiters(store, number)}; {_ranks(missing)} made no such call within {deadline:.0f} s: it does "
                f"something else, or is late. {_WAY_OUT}",
            )
        return None

    def _compared(self, entries: dict[int, _Entry], store: Any, agreed: int) -> _End | None:
        """Return how a round of these entries ends; `None` if that depends on those which are missing."""
        for name in dict.fromkeys([*(entry.call for entry in entries.values()), INSIDE]):
            counts = {rank: entry.failed.get(name, 0) for rank, entry in entries.items()}
            most = max(counts.values())
            if any(e.call == name or name == INSIDE for r, e in entries.items() if counts[r] < most):
                return _End("raised", self._line_of(store, name, most, agreed), (), name, most)
        first = min(entries)
        other = [rank for rank in sorted(entries) if entries[rank].program != entries[first].program]
        if other:
            text = f"ranks {first} and {other[0]} are about to run different things. {_WAY_OUT}"
            return _End("different", text, (first, other[0]))
        return _AGREED if len(entries) == self.size else None

    def _entries(self, store: Any, number: int) -> dict[int, _Entry]:
        found = {rank: _read(store, f"{number}/entry/{rank}") for rank in range(self.size)}
        return {rank: _Entry(**fields) for rank, fields in found.items() if fields is not None}

    def _waiters(self, store: Any, number: int) -> str:
        entries = self._entries(store, number)
        rank = min(entries)
        others = f" and {len(entries) - 1} more wait" if len(entries) > 1 else " waits"
        return f"rank {rank}{others} in {entries[rank].call}"

    def _key_of(self, call: str, count: int, agreed: int | None = None) -> str:
        return f"raised/{self.agreed if agreed is None else agreed}/{call}/{count}"

    def _line_of(self, store: Any, call: str, count: int, agreed: int | None = None) -> str:
        message = _read(store, self._key_of(call, count, agreed))
        return f"  another rank raised in {call}" if message is None else _line(message)

    def _drop(self, number: int, key: str) -> None:
        """Have a key deleted some time after a round."""
        self._litter.append((number, time.monotonic(), key))

    def tidy(self, store: Any) -> None:
        """Delete what rounds behind have left in the store, once nobody can be reading it any more."""
        now = time.monotonic()
        while self._litter and self._litter[0][0] < self.number and now - self._litter[0][1] > _KEPT:
            store.delete_key(self._litter.popleft()[2])


class _Watch(threading.Thread):
    """Looks into the store where its rank waits for long."""

    def __init__(self, group: Any, world: World) -> None:
        super().__init__(name="fzero-watch", daemon=True)
        self.group, self.world = ref(group), world
        self.store = world.connection()
        self.stopped = threading.Event()

    def run(self) -> None:
        while not self.stopped.wait(LOOK * max(1.0, self.world.size / 100)):
            if self.group() is not dist.group.WORLD:  # that world has ended
                atexit.unregister(self.end)
                return
            try:
                self.world.look(self.store)
                self.world.tidy(self.store)
            except (RuntimeError, ValueError, TypeError):
                continue  # the store is gone, of which the rank itself hears, or the world ends at this moment

    def end(self) -> None:
        """Tell that this rank ends; stop, for in the store a thread must not outlive the interpreter."""
        self.stopped.set()
        self.join(10 * LOOK)
        try:
            self.world.store.set(f"left/{self.world.rank}", "")
            self.world.store.set("left", "")
        except RuntimeError:
            return


# One for each default process group.
_worlds: WeakKeyDictionary[Any, World] = WeakKeyDictionary()


def world() -> World:
    """Return what this rank knows of the world that it is in."""
    group = dist.group.WORLD
    here = _worlds.get(group)
    if here is None:
        # A store may serve several worlds, one after another: of as many ranks as there are, each has joined each.
        joined = default_store().add("fzero/joined", 1) - 1
        here = _worlds[group] = World(group, f"fzero/{joined // dist.get_world_size()}")
        watch = _Watch(group, here)
        atexit.register(watch.end)
        watch.start()
    return here


def agree(program: str, call: str, reasons: Callable[[], bytes]) -> dict[int, bytes]:
    """Wait until all ranks are about to run the same, at most as long as a collective may wait.

    Args:
        program: a hash of what this rank is about to run.
        call: the call that it is for.
        reasons: a text from which two can be told apart. It is sent only if they differ.

    Returns:
        Nothing if all run the same, else two ranks that differ and the reasons of each.

    Raises:
        ProgramMismatchError: some rank came to no call, or two differ and their reasons did not come.
        PeerError: some rank raised instead.
    """
    here = world()
    while True:
        number = here.number
        end = here.enter(program, call)
        if end.kind == "agreed":
            return {}
        if end.kind != "raised":
            break
        if here.failed[end.call] < end.count:
            here.failed[end.call] = end.count
            raise PeerError(f"{call}: rank {here.rank} waited for all ranks to come to this call.\n{end.text}")
        # Otherwise the others have heard of an error that this rank has raised as well, and that is behind it.
    found = here.reasons(number, end.ranks, reasons)
    if end.kind == "apart" or len(found) < len(end.ranks):
        raise ProgramMismatchError(f"{call}: {end.text}")
    return found


def first_written(key: str, text: str) -> str:
    """Return the text that the first rank that came wrote under a key, once and for all: this one, or another."""
    found: bytes = world().store.compare_set(key, "", text)
    return found.decode()


def _decide(store: Any, number: int, end: _End) -> _End:
    """End a round, unless it has ended; return how it did."""
    return _End(**json.loads(store.compare_set(f"{number}/end", "", json.dumps(asdict(end)))))


def _end_of(store: Any, number: int) -> _End | None:
    found = _read(store, f"{number}/end")
    return None if found is None else _End(**found)


def _read(store: Any, key: str) -> Any:
    return json.loads(store.get(key)) if store.check([key]) else None


def _ranks(ranks: Sequence[int]) -> str:
    listed = ", ".join(map(str, ranks[:8]))
    return f"rank{'s' if len(ranks) > 1 else ''} {listed}{', …' if len(ranks) > 8 else ''}"


def _line(message: dict[str, Any]) -> str:
    ago, calls = max(time.time() - message["time"], 0.0), ", in ".join(message["calls"])
    return f"  rank {message['rank']} raised {message['type']} in {calls}, {ago:.1f} s ago: {message['text']}"
