"""A look at the other ranks where this one begins no new run for long.

A rank that runs a program it already has, where another rank has traced a new one, waits in a collective to
which the other never comes, up to a deadline that may be half an hour away. So a thread of it looks into the store
once a second while no run begins. If another rank holds a round there before a run that this rank has begun, the two
are apart for certain, and the thread ends the round: the other raises now, and this rank once its collective fails,
which is when the other's process ends, or at the deadline.

A rank whose runs are short looks at nothing; each run counts one up.
"""

from __future__ import annotations

import atexit
import threading
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch.distributed as dist

from fzero.peers import end_apart, world
from fzero.program.program import Program

# Seconds between two looks.
INTERVAL = 1.0


def count_run(program: Program, call: str) -> None:
    """Note that this rank begins to run a program. Only those with collectives count."""
    group = dist.group.WORLD if program.communicates else None
    if group is None:
        return
    watch = _watches.get(group)
    if watch is None:
        watch = _watches[group] = _Watch(group)
        atexit.register(watch.end)
        watch.start()
    watch.call = call
    watch.here.runs += 1


class _Watch(threading.Thread):
    """Looks into the store of one world."""

    def __init__(self, group: Any) -> None:
        super().__init__(name="fzero-watch", daemon=True)
        self.call = ""
        self.here = world()
        self.group = ref(group)
        self.stopped = threading.Event()

    def run(self) -> None:
        before = -1
        while not self.stopped.wait(INTERVAL):
            group, runs = self.group(), self.here.runs
            if group is None or group is not dist.group.WORLD:  # that world has ended
                atexit.unregister(self.end)
                return
            if runs == before:
                self._look(runs)
            before = runs
            del group

    def _look(self, runs: int) -> None:
        try:
            end_apart(f"runs {self.call}, a program that it had", begun=runs)
        except (RuntimeError, ValueError, TypeError):  # the store is gone, or the world ends at this moment
            return

    def end(self) -> None:
        """Stop, and wait until it has: in the store, a thread must not outlive the interpreter."""
        self.stopped.set()
        self.join(INTERVAL)


_watches: WeakKeyDictionary[Any, _Watch] = WeakKeyDictionary()
