"""Rounds: at each call with collectives, ranks compare what they are about to run, in the store that they share.

A rank enters the round by counting up a number that stands for what it is about to run. Who brings it to the number of
ranks knows that all run the same, and wakes the others, who wait for that and for nothing else:

    rank 1   add 1 to "7/ab3f" ─▶ 1, wait                                ◀─ woken ── run
    rank 0                          add 1 to "7/ab3f" ─▶ 2 = all of us ── wake ───── run

That is one question to the store, on the host; no collective, nothing on a device. Where the number is not reached
within 0.1 s, a thread of each rank that waits writes down in full what its rank is about to run, and reads what the
others are. The first that knows how the round ends takes its count back, so that the number cannot be reached any more
(it adds 2^40: of four ranks, three that wait become 2^40 + 3, and the fourth never finds a 4), and writes the end, once
and for all:

    agreed       all run the same, though some have errors behind them that others lack   everyone runs it
    different    two run different things                                                 everyone raises
    apart        some rank came to no call before the deadline, or has ended              everyone raises
    raised       some rank raised instead                                                 everyone else raises

Whatever its end, a round that ended is over for all ranks, those that come to it later included.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from typing import Any, Literal

import torch.distributed as dist

from fzero._torch import own_connection

# A rank that has waited for a second asks the store by itself, every so many seconds: Ctrl-C reaches it in between.
_ASK = 0.02

# What a rank finds under the key that it waits for: the round is over, or it is to ask by itself.
WOKEN, BY_ITSELF = "woken", "ask"

# Seconds that ranks which raise for different programs wait for each other's reasons, or for who decides the end.
PATIENCE = 10.0

# What a rank adds to take its count back: after that the count is no number of ranks.
_TAKEN_BACK = 1 << 40

WAY_OUT = "Make the same calls on every rank, in the same order."

# The name under which failures inside of the call are counted that all agreed on last. It is the same call on every
# rank, so it needs no name of its own.
INSIDE = ""


@dataclass(frozen=True)
class Entry:
    """What a rank is about to run: a hash of its collectives, the call, and how often calls failed here, by name."""

    program: str
    call: str
    failed: dict[str, int]

    @property
    def key(self) -> str:
        """What ranks that agree have in common: the hash, with the failures where there were any."""
        failed = sorted((name, count) for name, count in self.failed.items() if count)
        return self.program if not failed else hashlib.sha256(repr((self.program, failed)).encode()).hexdigest()[:32]


@dataclass(frozen=True)
class End:
    """How a round ended, and what those who raise for it say: the call that had raised, and how often by then."""

    kind: Literal["agreed", "different", "apart", "raised"]
    text: str = ""
    ranks: Sequence[int] = ()
    call: str = ""
    count: int = 0


AGREED = End("agreed")


@dataclass(eq=False)
class Waiting:
    """A rank in a round that is not over."""

    number: int
    entry: Entry
    agreed: int
    since: float = field(default_factory=time.monotonic)
    seen: int = 0  # entries that were written down when this rank looked last
    taken_back: float | None = None
    by_itself: bool = False  # it is to ask the store by itself

    @property
    def counter(self) -> str:
        """The key in the store under which ranks are counted: `7/ab3f` in round 7."""
        return f"{self.number}/{self.entry.key}"


class World:
    """What this rank knows of the world that it is in.

    Attributes:
        number: the round that it enters next.
        agreed: the last round that all agreed in.
        failed: name of a call to how often it has failed here since then, such as {"step (call 7)": 1}. A rank that
            has not heard of a failure has a lower count, and is told of it at the next call.
        waiting: the round that this rank waits in; `None` where it waits in none.
        verdict: how that round ended, where the thread of `fzero.ranks.watch` has found out.
        lock: held by who reads or writes the two.
        litter: keys of rounds that are over, to be deleted from the store: the round from which on nobody reads it,
            when it was put on this list, and the key.
    """

    def __init__(self, group: Any, name: str) -> None:
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.name = name
        self.store = self.connection()
        self.number, self.agreed = 0, -1
        self.failed: Counter[str] = Counter()
        self.litter: deque[tuple[int, float, str]] = deque()
        self.lock = threading.Lock()
        self.waiting: Waiting | None = None
        self.verdict: End | None = None

    def connection(self) -> Any:
        """Return a connection of its own to the store: one in which somebody waits serves nobody else."""
        return own_connection(self.name)

    def enter(self, program: str, call: str) -> End:
        """Enter the next round, and return how it ended."""
        number, failed = self.number, dict(self.failed) if self.failed else {}
        waiting = Waiting(number, Entry(program, call, failed), self.agreed)
        try:
            count = self.store.add(waiting.counter, 1)
            if count == self.size:
                self._wake_others(number)
                end = AGREED
            elif count > self.size:
                end = self._end_soon(number)
            else:
                if count == 1:
                    self.drop(number + 1, waiting.counter)
                end = self._wait(waiting)
        except KeyboardInterrupt as error:  # the round goes on without this rank, or it would count twice
            if self.take_back(waiting, self.store):
                self.tell(error, call)
                last = self.failed[call]
                decide(self.store, number, End("raised", self.line_of(self.store, call, last), (), call, last))
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
            self.store.multi_set(keys, [WOKEN] * len(keys))
            return
        for key in keys:
            self.store.set(key, WOKEN)

    def _wait(self, waiting: Waiting) -> End:
        key = f"{waiting.number}/woken/{self.rank}"
        with self.lock:
            self.waiting, self.verdict = waiting, None
        try:
            self.store.wait([key], timedelta(days=30))  # the thread ends it after a second, if nobody does before
            while waiting.by_itself and self.store.get(key) != WOKEN.encode():
                time.sleep(_ASK)
        finally:
            with self.lock:
                self.waiting, verdict = None, self.verdict
        self.drop(waiting.number, key)
        return verdict or AGREED

    def _end_soon(self, number: int) -> End:
        until = time.monotonic() + PATIENCE
        while (end := end_of(self.store, number)) is None:
            if time.monotonic() > until:
                return decide(self.store, number, End("apart", f"a round was left without an end. {WAY_OUT}"))
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
            self.store.set(self.key_of(call, self.failed[call]), text)
        except RuntimeError:  # the store went with the rank that held it; the error itself is what matters
            return

    def told(self, since: float, store: Any) -> list[str]:
        """Return what other ranks left in the store, one line a rank.

        Args:
            since: seconds since the epoch; what is older is left out.
            store: the caller's connection to it. Another thread may be waiting in that of this world, for days.
        """
        lines = []
        for rank in range(self.size):
            try:
                message = None if rank == self.rank else read(store, f"last/{rank}")
            except RuntimeError:
                continue
            if message is not None and message["time"] >= since:
                lines.append(line(message))
        return lines

    def reasons(self, number: int, ranks: Sequence[int], own: Callable[[], bytes]) -> dict[int, bytes]:
        """Return what ranks that differ tell of what they run, this one included if it is among them."""
        keys = {rank: f"{number}/reasons/{rank}" for rank in ranks}
        if self.rank in keys:
            self.store.set(keys[self.rank], own())
        until = time.monotonic() + PATIENCE
        while ranks and not self.store.check(list(keys.values())) and time.monotonic() < until:
            time.sleep(0.01)
        return {rank: self.store.get(key) for rank, key in keys.items() if self.store.check([key])}

    def take_back(self, waiting: Waiting, store: Any) -> bool:
        """Take this rank's count back; return whether this rank is the one to write how the round ends.

        It is not where all ranks have come: the last of them wakes this one. Nor is it where another rank took its
        count back earlier: that one writes.
        """
        waiting.taken_back = time.monotonic()
        count = store.add(waiting.counter, _TAKEN_BACK)
        return bool(count < 2 * _TAKEN_BACK and count - _TAKEN_BACK != self.size)

    def key_of(self, call: str, count: int, agreed: int | None = None) -> str:
        """Return the key in the store of the `count`-th error in a call, since the last round that all agreed in."""
        return f"raised/{self.agreed if agreed is None else agreed}/{call}/{count}"

    def line_of(self, store: Any, call: str, count: int, agreed: int | None = None) -> str:
        """Return that error as a line of a message."""
        message = read(store, self.key_of(call, count, agreed))
        return f"  another rank raised in {call}" if message is None else line(message)

    def drop(self, number: int, key: str) -> None:
        """Have a key deleted some time after a round."""
        self.litter.append((number, time.monotonic(), key))


def decide(store: Any, number: int, end: End) -> End:
    """End a round, unless it has ended; return how it did."""
    return End(**json.loads(store.compare_set(f"{number}/end", "", json.dumps(asdict(end)))))


def end_of(store: Any, number: int) -> End | None:
    """Return how a round ended; `None` for one that has not."""
    found = read(store, f"{number}/end")
    return None if found is None else End(**found)


def read(store: Any, key: str) -> Any:
    """Return what is written under a key, or `None`."""
    return json.loads(store.get(key)) if store.check([key]) else None


def line(message: dict[str, Any]) -> str:
    """Return an error that a rank has left in the store as a line of a message."""
    ago, calls = max(time.time() - message["time"], 0.0), ", in ".join(message["calls"])
    return f"  rank {message['rank']} raised {message['type']} in {calls}, {ago:.1f} s ago: {message['text']}"
