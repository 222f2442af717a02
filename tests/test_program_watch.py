"""A rank that traces alone learns at once that the others have begun another run, and a slow rank is not blamed."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import fzero as fz
from fzero.collectives import all_gather
from fzero.peers import world as known
from fzero.program import watch
from tests import world

DEADLINE = 8.0


@pytest.fixture(autouse=True)
def fresh_group_afterwards():
    yield
    world.fresh()


def gathered(mesh: fz.Mesh) -> Any:
    return fz.jit(lambda x: all_gather(x, mesh, "data").sum())


def traces_alone() -> tuple[str, str, float]:
    total = gathered(fz.make_mesh("cpu", deadline=DEADLINE))
    total(torch.ones(4))
    began = time.monotonic()
    try:
        total(torch.ones(4 if dist.get_rank() else 2))
    except fz.ProgramMismatchError as error:
        return "apart", str(error), time.monotonic() - began
    return "nothing", "", 0.0


def test_a_rank_that_traces_alone_need_not_wait_for_the_deadline() -> None:
    results = world.run(traces_alone, size=2)
    for kind, message, _ in results:
        assert kind == "apart"
        assert "rank 0 traced a new program" in message and "rank 1 traced none: it runs" in message
        assert "(call 2), a program that it had" in message
    assert results[0][2] < 2 * watch.INTERVAL + 2 < DEADLINE


torch.library.define("fzero_tests::sleep", "(Tensor x, Tensor seconds) -> Tensor")


@torch.library.impl("fzero_tests::sleep", "cpu")
def _sleep(x: Tensor, seconds: Tensor) -> Tensor:
    time.sleep(seconds.item())
    return x.clone()


@torch.library.register_fake("fzero_tests::sleep")
def _(x: Tensor, seconds: Tensor) -> Tensor:
    return torch.empty_like(x)


def is_slow() -> tuple[list[float], int]:
    """Rank 1 is still in the call before when rank 0 holds a round for the next one."""
    mesh = fz.make_mesh("cpu", deadline=30.0)

    def slow(x: Tensor, seconds: Tensor) -> Tensor:
        return torch.ops.fzero_tests.sleep(all_gather(x, mesh, "data"), seconds).sum()

    jitted = fz.jit(slow)
    seconds = torch.tensor(3.5 * watch.INTERVAL * dist.get_rank())
    values = [float(jitted(torch.ones(size), seconds)) for size in (4, 3, 4)]
    return values, known().runs


def test_a_slow_rank_is_not_blamed() -> None:
    assert world.run(is_slow, size=2) == [([8.0, 6.0, 8.0], 3)] * 2


def counts() -> list[int]:
    """Runs of programs with collectives count; ranks agree on the number at each new trace."""
    mesh, found = fz.make_mesh("cpu"), []
    total, local = gathered(mesh), fz.jit(lambda x: x + 1)
    for size in (2, 2, 3):
        for _ in range(1 + dist.get_rank()):
            local(torch.ones(size))
        total(torch.ones(size))
        found.append(known().runs)
    return found


def test_runs_that_all_ranks_share_are_counted() -> None:
    assert world.run(counts, size=2) == [[1, 2, 3]] * 2


def has_thread(wanted: bool) -> bool:
    """Whether the thread is there, or is not, as wanted, within a few of its intervals."""
    until = time.monotonic() + 3 * watch.INTERVAL
    while (found := any(t.name == "fzero-watch" for t in threading.enumerate())) != wanted and time.monotonic() < until:
        time.sleep(0.05)
    return found


def threads() -> list[bool]:
    found = [has_thread(False)]  # that of a former world ends
    gathered(fz.make_mesh("cpu"))(torch.ones(2))
    found.append(has_thread(True))
    dist.destroy_process_group()
    return [*found, has_thread(False)]


def test_the_thread_lives_as_long_as_its_world() -> None:
    assert world.run(threads, size=2) == [[False, True, False]] * 2
