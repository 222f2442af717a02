from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist

import fzero as fz
from tests import world

DEADLINE = 3.0
MARGIN = 30.0  # seconds to trace and to raise, on a busy machine


@pytest.fixture(autouse=True)
def fresh_group_afterwards():
    yield
    world.fresh()


def make(deadline: float | None = DEADLINE) -> fz.State:
    mesh = fz.make_mesh("cpu", deadline=deadline)
    return fz.init({"w": torch.ones(64)}, fz.sgd(0.1), mesh, fz.zero(3), policy="fp32")


def raises_on_one_rank(jitted: bool) -> tuple[str, str, float]:
    """Rank 1 raises inside its loss, and goes on living; return what each rank saw, and after how long."""
    state = make()

    def loss(params, batch):
        if dist.get_rank() == 1:
            raise ValueError("no images in this batch")
        return (params["w"] * batch).sum()

    step = fz.train_step(loss) if jitted else fz.value_and_grad(loss)
    began = time.monotonic()
    try:
        step(state, torch.ones(64))
    except Exception as error:
        seconds = time.monotonic() - began
        return type(error).__name__, str(error), seconds
    raise AssertionError("every rank has to raise")


@pytest.mark.parametrize("jitted", [False, True])
def test_the_others_get_the_error_of_the_rank_that_raised(jitted):
    waiting, raising = world.run(raises_on_one_rank, jitted, size=2)
    assert raising[:2] == ("ValueError", "no images in this batch")
    assert waiting[0] == "PeerError"
    assert "rank 1 raised ValueError" in waiting[1] and "no images in this batch" in waiting[1]
    assert waiting[2] < DEADLINE + MARGIN


def all_raise_then_go_on() -> float:
    state = make(deadline=None)

    def wrong(params, batch):
        raise KeyError("w2")

    for _ in range(2):
        try:
            fz.value_and_grad(wrong)(state, torch.ones(64))
        except KeyError:
            continue
    return float(fz.value_and_grad(lambda p, b: (p["w"] * b).sum())(state, torch.ones(64))[0])


def test_an_error_on_every_rank_leaves_the_world_usable():
    assert world.run(all_raise_then_go_on, size=2) == [64.0, 64.0]


def other_names() -> str:
    """Both ranks are about to gather the same leaf, for functions of other names, traced before."""
    state = make(deadline=30.0)

    def first(params, batch):
        return (params["w"] * batch).sum()

    def second(params, batch):
        return (params["w"] * batch).mean()

    steps = [fz.train_step(f, donate=False) for f in (first, second)]
    for step in steps:
        step(state, torch.ones(64))
    with pytest.raises(fz.ProgramMismatchError) as info:
        steps[dist.get_rank()](state, torch.ones(64))
    return str(info.value)


def test_programs_that_differ_in_name_alone_are_told_apart():
    for message in world.run(other_names, size=2):
        assert "Rank 0 calls train_step(first)" in message
        assert "rank 1 train_step(second)" in message
