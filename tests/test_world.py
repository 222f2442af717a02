"""tests.world itself: results, tracebacks, stuck and dead ranks, changes of size."""

from __future__ import annotations

import os
import signal
import time
import warnings

import pytest
import torch
import torch.distributed as dist

from tests import world


def total(x: float) -> float:
    if not dist.is_initialized():
        return x
    value = torch.tensor(x)
    dist.all_reduce(value)
    return value.item()


def rank_and_threads() -> tuple[int, int, int]:
    return dist.get_rank(), dist.get_world_size(), torch.get_num_threads()


def tensors() -> dict[str, torch.Tensor]:
    return {"rank": torch.full((3,), dist.get_rank(), dtype=torch.bfloat16), "noise": torch.rand(2)}


def identity() -> tuple[int, int]:
    return os.getpid(), id(dist.group.WORLD)


def fails() -> None:
    raise KeyError(f"rank {dist.get_rank()}")


def fails_on_last() -> None:
    if dist.get_rank() == dist.get_world_size() - 1:
        raise KeyError("the last one")


def stuck_on_last() -> None:
    if dist.get_rank() == dist.get_world_size() - 1:
        time.sleep(60)
    else:
        raise KeyError("not stuck")


def dies_on_last() -> None:
    if dist.get_rank() == dist.get_world_size() - 1:
        os.kill(os.getpid(), signal.SIGKILL)


def warns() -> None:
    warnings.warn("careful", UserWarning, stacklevel=1)


def not_picklable() -> object:
    return lambda: None


def test_results_in_rank_order():
    assert world.run(rank_and_threads, size=2) == [(0, 2, 1), (1, 2, 1)]


def test_tensors_outlive_their_rank():
    first, second = world.run(tensors, size=2)
    world.close()
    assert torch.equal(first["rank"], torch.zeros(3, dtype=torch.bfloat16))
    assert torch.equal(second["rank"], torch.ones(3, dtype=torch.bfloat16))
    assert torch.equal(first["noise"], second["noise"])


def test_sizes_change():
    for size in (1, 2, 4, 3, 4, 1, 2):
        assert world.run(total, 3.0, size=size) == [3.0 * size] * size
    with pytest.raises(ValueError, match="1 to 4, and is 5"):
        world.run(total, 3.0, size=5)


def test_processes_and_group_are_kept():
    assert world.run(identity, size=2) == world.run(identity, size=2)


def test_error_of_each_rank():
    errors = world.raises(KeyError, fails, size=2, match="rank")
    assert {rank: error.message for rank, error in errors.items()} == {0: "'rank 0'", 1: "'rank 1'"}
    assert "in fails" in errors[0].traceback
    assert world.run(total, 1.0, size=2) == [2.0, 2.0]


def test_error_of_one_rank():
    with pytest.raises(
        world.WorldError, match=r"fails_on_last on 2 ranks(.|\n)*rank 1 raised(.|\n)*the last one"
    ) as caught:
        world.run(fails_on_last, size=2)
    assert list(caught.value.errors) == [1]
    assert not caught.value.stuck
    with pytest.raises(world.WorldError):
        world.raises(KeyError, fails_on_last, size=2)
    with pytest.raises(AssertionError, match="no rank raised KeyError"):
        world.raises(KeyError, total, 1.0, size=2)


def test_stuck_rank():
    start = time.monotonic()
    with pytest.raises(world.WorldError, match="rank 1 did not answer") as caught:
        world.run(stuck_on_last, size=2, deadline=3)
    assert time.monotonic() - start < 20
    assert caught.value.errors[0].type == "KeyError"
    assert "stuck_on_last" in caught.value.stuck[1]
    assert world.run(total, 1.0, size=2) == [2.0, 2.0]


def test_dead_rank():
    with pytest.raises(world.WorldError, match="rank 1 raised:\nthe process ended with exit code -9"):
        world.run(dies_on_last, size=2)
    assert world.run(total, 1.0, size=2) == [2.0, 2.0]


def test_warnings_are_errors_there_too():
    world.raises(UserWarning, warns, size=1, match="careful")


def test_result_that_cannot_travel():
    with pytest.raises(world.WorldError, match="rank 0 raised"):
        world.run(not_picklable, size=1)
