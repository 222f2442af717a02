"""A thread of each rank that finds out how a round ends in which the rank waits for long.

It writes down in full what its rank is about to run, reads what the others are, and looks for errors that they left,
for ranks that have ended, and at the clock. `fzero.ranks.rounds` says how a round can end.
"""

from __future__ import annotations

import atexit
import json
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any
from weakref import ref

import torch.distributed as dist

from fzero._torch import group_deadline
from fzero.ranks.rounds import (
    AGREED,
    BY_ITSELF,
    INSIDE,
    PATIENCE,
    WAY_OUT,
    WOKEN,
    End,
    Entry,
    Waiting,
    World,
    decide,
    end_of,
    line,
    read,
)

# Seconds between two looks of the thread. A round that ends sooner, as nearly all do, costs no look.
LOOK = 0.1

# The longest that a rank waits inside of the store, where no Ctrl-C reaches it; from then on it asks by itself.
_BLIND = 1.0

# Seconds that what a round has written stays in the store after it: another rank's thread may be about to read it.
_KEPT = 3.0


class Watch(threading.Thread):
    """Looks into the store where its rank waits for longer than 0.1 s."""

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
                self._look()
                self._tidy()
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

    def _look(self) -> None:
        """Find out how the round ends in which this rank waits; wake it if it did."""
        waiting = self.world.waiting
        if waiting is None or time.monotonic() - waiting.since < LOOK:
            return
        end, key = self._ended(waiting), f"{waiting.number}/woken/{self.world.rank}"
        if end is None:
            if not waiting.by_itself and time.monotonic() - waiting.since > _BLIND:
                waiting.by_itself = True
                self.store.compare_set(key, "", BY_ITSELF)  # unless it has been woken already
            return
        with self.world.lock:
            if self.world.waiting is not waiting:
                return
            self.world.verdict = end
        self.store.set(key, WOKEN)

    def _ended(self, waiting: Waiting) -> End | None:
        number = waiting.number
        if not waiting.seen:
            self.store.set(f"{number}/entry/{self.world.rank}", json.dumps(asdict(waiting.entry)))
            waiting.seen = -self.store.add(f"{number}/entries", 1)
            self.world.drop(number + 1, f"{number}/entry/{self.world.rank}")
            if waiting.seen == -1:
                self.world.drop(number + 1, f"{number}/entries")
        if (end := end_of(self.store, number)) is not None:
            return end
        if waiting.taken_back is not None and time.monotonic() - waiting.taken_back < PATIENCE:
            return None
        found = self._found(waiting)
        if found is None or (waiting.taken_back is None and not self.world.take_back(waiting, self.store)):
            return None
        return decide(self.store, number, found)

    def _found(self, waiting: Waiting) -> End | None:
        entry, number = waiting.entry, waiting.number
        for name in (entry.call, INSIDE):
            count = entry.failed.get(name, 0) + 1
            if (message := read(self.store, self.world.key_of(name, count, waiting.agreed))) is not None:
                return End("raised", line(message), (), name, count)
        seen = self.store.add(f"{number}/entries", 0)
        if seen != waiting.seen:
            waiting.seen = seen
            entries = self._entries(number)
            if (end := self._compared(entries, waiting.agreed)) is not None:
                return end
        waited, deadline = time.monotonic() - waiting.since, group_deadline()
        some_left = self.store.check(["left"])
        gone = [rank for rank in range(self.world.size) if some_left and self.store.check([f"left/{rank}"])]
        if gone:
            lines = "".join(f"\n{line}" for line in self.world.told(0.0, self.store))
            return End("apart", f"{self._waiters(number)}; {_ranks(gone)} ended.{lines}\n{WAY_OUT}")
        if waited > deadline:
            here = self._entries(number)
            missing = [rank for rank in range(self.world.size) if rank not in here]
            return End(
                "apart",
                f"{self._waiters(number)}; {_ranks(missing)} made no such call within {deadline:.0f} s: it does "
                f"something else, or is late. {WAY_OUT}",
            )
        return None

    def _compared(self, entries: dict[int, Entry], agreed: int) -> End | None:
        """Return how a round ends by the entries that are there; `None` while a missing one may still decide it."""
        for name in dict.fromkeys([*(entry.call for entry in entries.values()), INSIDE]):
            counts = {rank: entry.failed.get(name, 0) for rank, entry in entries.items()}
            most = max(counts.values())
            if any(e.call == name or name == INSIDE for r, e in entries.items() if counts[r] < most):
                return End("raised", self.world.line_of(self.store, name, most, agreed), (), name, most)
        first = min(entries)
        other = [rank for rank in sorted(entries) if entries[rank].program != entries[first].program]
        if other:
            text = f"ranks {first} and {other[0]} are about to run different things. {WAY_OUT}"
            return End("different", text, (first, other[0]))
        return AGREED if len(entries) == self.world.size else None

    def _entries(self, number: int) -> dict[int, Entry]:
        found = {rank: read(self.store, f"{number}/entry/{rank}") for rank in range(self.world.size)}
        return {rank: Entry(**fields) for rank, fields in found.items() if fields is not None}

    def _waiters(self, number: int) -> str:
        entries = self._entries(number)
        rank = min(entries)
        others = f" and {len(entries) - 1} more wait" if len(entries) > 1 else " waits"
        return f"rank {rank}{others} in {entries[rank].call}"

    def _tidy(self) -> None:
        """Delete what rounds behind have left in the store, once nobody can be reading it any more."""
        now, litter = time.monotonic(), self.world.litter
        while litter and litter[0][0] < self.world.number and now - litter[0][1] > _KEPT:
            self.store.delete_key(litter.popleft()[2])


def _ranks(ranks: Sequence[int]) -> str:
    listed = ", ".join(map(str, ranks[:8]))
    return f"rank{'s' if len(ranks) > 1 else ''} {listed}{', …' if len(ranks) > 8 else ''}"
