"""A world on one machine: run a function on N processes, bring back what each rank returned or raised.

    totals = world.run(total, 3, size=4)                    # [12, 12, 12, 12], one result a rank
    world.raises(DonatedError, reads_donated, size=2)       # every rank has to raise it

The processes are forked from one that has imported torch and fzero and has run nothing (`tests.preload`), so a
new one starts in no time; they live between cases, and a case of size k uses the first k of them. Their gloo
process group stays while the size is unchanged and the last case ended well. A world of one has no process
group at all.

    caller    pickle (function, args) ─▶ k pipes ─▶ wait for k answers or the deadline
    rank      join the group, where it is a new one ─▶ unpickle ─▶ call ─▶ result or traceback

Functions travel by reference: they stand at the top level of a module that can be imported. Results travel
as bytes, tensors too, so they outlive the process that made them. A case runs under the warning filters of
its caller, on one thread, with torch's random state freshly seeded.
"""

from __future__ import annotations

import atexit
import faulthandler
import multiprocessing
import os
import pickle
import re
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from fzero.ranks.groups import one_gloo_thread

MAX_SIZE = 4
START_DEADLINE = 120.0  # seconds for a new process; before the first, torch is imported
GRACE = 10.0  # seconds that the others have left once a rank has failed: they may wait for it in a collective


class RankError(NamedTuple):
    """What one rank raised."""

    type: str
    message: str
    traceback: str


class WorldError(Exception):
    """A case in which some rank raised, died or did not answer.

    `errors` holds what ranks raised, `stuck` the stack of each rank that did not answer in time.
    """

    def __init__(self, case: str, errors: dict[int, RankError], stuck: dict[int, str]) -> None:
        self.errors, self.stuck = errors, stuck
        parts = [f"rank {rank} raised:\n{error.traceback.rstrip()}" for rank, error in sorted(errors.items())]
        parts += [f"rank {rank} did not answer; it was at:\n{stack.rstrip()}" for rank, stack in sorted(stuck.items())]
        super().__init__("\n\n".join([case, *parts]))


def run(function: Callable[..., Any], *args: Any, size: int, deadline: float = 60.0, **kwargs: Any) -> list[Any]:
    """Return `function(*args, **kwargs)` of every rank of a world of `size` processes, in rank order.

    Args:
        function: a module-level function.
        *args: positional arguments, the same for each rank, pickled.
        size: number of ranks, 1 to `MAX_SIZE`.
        deadline: seconds until a rank that has not answered counts as stuck. Starting processes does not count.
        **kwargs: keyword arguments, likewise.

    Raises:
        WorldError: a rank raised, died or was stuck. Where one was stuck, the processes are replaced.
    """
    if not 1 <= size <= MAX_SIZE:
        raise ValueError(f"world.run: size has to be 1 to {MAX_SIZE}, and is {size}")
    body = pickle.dumps((function, args, kwargs))
    try:
        results, errors, stuck = _pool.run(body, size, deadline)
    except BaseException:  # an interrupt between question and answer leaves pipes that cannot be trusted
        _pool.kill()
        raise
    if errors or stuck:
        raise WorldError(f"{function.__qualname__} on {size} ranks failed", errors, stuck)
    return [results[rank] for rank in range(size)]


def raises(
    expected: type[BaseException],
    function: Callable[..., Any],
    *args: Any,
    size: int,
    match: str = "",
    deadline: float = 60.0,
    **kwargs: Any,
) -> dict[int, RankError]:
    """Run a case in which every rank has to raise exactly `expected`, and return what each raised.

    Args:
        expected: the class; a subclass does not count.
        function: as for `run`, and so are `args`, `size`, `deadline` and `kwargs`.
        match: a regular expression that has to be found in each message.
    """
    try:
        run(function, *args, size=size, deadline=deadline, **kwargs)
    except WorldError as failure:
        others = {
            r: e for r, e in failure.errors.items() if e.type != expected.__name__ or not re.search(match, e.message)
        }
        if others or len(failure.errors) < size:
            raise
        return failure.errors
    raise AssertionError(f"{function.__qualname__} on {size} ranks: no rank raised {expected.__name__}")


def fresh() -> None:
    """Give the next case a new process group: for cases that leave theirs unusable."""
    _pool.group = None


def close() -> None:
    """End the processes. The next case starts new ones."""
    _pool.close()


# ---------------------------------------------------------------------------------------------------------
# The caller's side


class _Worker:
    """One process, its pipe, and the file it writes its stack to."""

    def __init__(self, stack: Path) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.preload"])
        self.stack = stack
        self.pipe, theirs = context.Pipe()
        self.process: ForkServerProcess = context.Process(target=_serve, args=(theirs, str(stack)), daemon=True)
        self.process.start()
        theirs.close()

    def post(self, *messages: bytes) -> None:
        try:
            for message in messages:
                self.pipe.send_bytes(message)
        except OSError:
            pass  # it has died; reading its answer says so

    def where(self) -> str:
        """Ask a stuck process for its stack. The handler is C code, so it answers out of a collective too."""
        assert self.process.pid is not None
        os.kill(self.process.pid, signal.SIGUSR1)
        time.sleep(0.3)
        return self.stack.read_text()

    def death(self) -> RankError:
        self.process.join(5)
        message = f"the process ended with exit code {self.process.exitcode}"
        return RankError("ProcessDied", message, f"{message}\n{self.stack.read_text()}")

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.process.close()
        self.pipe.close()


class _Pool:
    def __init__(self) -> None:
        self.workers: list[_Worker] = []
        self.files: tempfile.TemporaryDirectory[str] | None = None
        self.group: tuple[int, str] | None = None  # size and store of the process group that the ranks are in
        self.count = 0  # files handed out

    def run(
        self, body: bytes, size: int, deadline: float
    ) -> tuple[dict[int, Any], dict[int, RankError], dict[int, str]]:
        self.grow(size)
        if size == 1:
            self.group = None
        elif self.group is None or self.group[0] != size:
            self.group = (size, str(self.file("store")))
        results, errors, stuck = self.ask(body, size, deadline)
        if errors and not stuck:  # they may hold half a collective: leave the group now, not in the next case
            self.group = None
            left = self.ask(pickle.dumps((_nothing, (), {})), size, GRACE)[0]
            if len(left) < size:
                self.kill()
        elif stuck:
            self.kill()
        return results, errors, stuck

    def grow(self, size: int) -> None:
        new = [_Worker(self.file("stack")) for _ in range(size - len(self.workers))]
        self.workers += new
        for worker in new:
            if not worker.pipe.poll(START_DEADLINE):
                raise RuntimeError(f"world: a process did not start within {START_DEADLINE:.0f} s")
            worker.pipe.recv_bytes()

    def ask(
        self, body: bytes, size: int, deadline: float
    ) -> tuple[dict[int, Any], dict[int, RankError], dict[int, str]]:
        """Pose one case to the first `size` processes; return results, errors and stacks, each by rank."""
        for rank, worker in enumerate(self.workers[:size]):
            worker.post(pickle.dumps((rank, self.group, list(warnings.filters))), body)
        results: dict[int, Any] = {}
        errors: dict[int, RankError] = {}
        waiting = {worker.pipe: rank for rank, worker in enumerate(self.workers[:size])}
        until = time.monotonic() + deadline
        while waiting and (left := until - time.monotonic()) > 0:
            for pipe in wait(list(waiting), left):
                assert isinstance(pipe, Connection)
                rank = waiting.pop(pipe)
                try:
                    answer = pickle.loads(pipe.recv_bytes())
                except (EOFError, OSError):
                    answer = self.workers[rank].death()
                if isinstance(answer, RankError):
                    errors[rank] = answer
                    until = min(until, time.monotonic() + GRACE)
                else:
                    (results[rank],) = answer
        return results, errors, {rank: self.workers[rank].where() for rank in waiting.values()}

    def file(self, name: str) -> Path:
        if self.files is None:
            self.files = tempfile.TemporaryDirectory(prefix="world-")
        self.count += 1
        return Path(self.files.name, f"{name}-{self.count}")

    def close(self) -> None:
        for worker in self.workers:
            worker.post(b"")
        for worker in self.workers:
            worker.process.join(2)
        self.kill()

    def kill(self) -> None:
        for worker in self.workers:
            worker.end()
        if self.files is not None:
            self.files.cleanup()
        self.workers, self.files, self.group = [], None, None


_pool = _Pool()
atexit.register(close)


# ---------------------------------------------------------------------------------------------------------
# The rank's side


def _serve(pipe: Connection, stack: str) -> None:
    """Answer one case after another until the pipe closes or an empty message comes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is the caller's to handle
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    with open(stack, "w") as file:
        faulthandler.enable(file)
        faulthandler.register(signal.SIGUSR1, file)
        pipe.send_bytes(b"ready")
        joined = None
        while head := _receive(pipe):
            rank, group, filters = pickle.loads(head)
            body = pipe.recv_bytes()
            try:
                if group != joined:
                    joined = None
                    _join(rank, group)
                    joined = group
                answer = _call(body, filters)
            except BaseException as error:
                answer = pickle.dumps(RankError(type(error).__name__, str(error), traceback.format_exc()))
            pipe.send_bytes(answer)


def _receive(pipe: Connection) -> bytes:
    try:
        return pipe.recv_bytes()
    except EOFError:
        return b""


def _join(rank: int, group: tuple[int, str] | None) -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
    if group is not None:
        size, store = group
        with one_gloo_thread():  # as `fz.make_mesh` starts a world
            dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)


def _call(body: bytes, filters: list[Any]) -> bytes:
    with warnings.catch_warnings():
        warnings.filters = filters
        torch.manual_seed(0)
        function, args, kwargs = pickle.loads(body)
        return pickle.dumps((function(*args, **kwargs),))


def _nothing() -> None:
    pass
