from __future__ import annotations

import random
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

import fzero as fz
from fzero.peers import Entry, end_apart, hold_round, together
from tests import world

DEADLINE = 2.0


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
    assert waiting[2] < DEADLINE + 5


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


def plain_timeout() -> str:
    """A rank that only is late is not blamed for an error."""
    state = make(deadline=1.0)
    if dist.get_rank() == 1:
        time.sleep(3.0)
        return "late"
    try:
        fz.gather(state.params)
    except fz.PeerError as error:
        return "timed out" if "no other rank left an error" in str(error) else f"blamed: {error}"
    return "no error"


def test_a_late_rank_is_a_plain_timeout():
    assert world.run(plain_timeout, size=2) == ["timed out", "late"]


# ---------------------------------------------------------------------------------------------------------
# Rounds


def hold(program: str, call: str, cause: str = "first call") -> str:
    """How a round ended for this rank."""
    try:
        with together(call):
            if program == "none":
                raise ValueError(f"{call} went wrong")
            different = hold_round(Entry(program, call, cause), lambda: f"{program} of {call}".encode())
    except (ValueError, fz.PeerError, fz.ProgramMismatchError) as error:
        return type(error).__name__
    return "different" if different else "agreed"


def many_rounds(seed: int, rounds: int) -> list[tuple[str, bool, str]]:
    """Ranks come in any order; some hold another program now and then, some raise, and all go on."""
    make(deadline=30.0)
    shared, own, found = random.Random(seed), random.Random(f"{seed} {dist.get_rank()}"), []
    for number in range(rounds):
        odd, what = shared.randrange(dist.get_world_size()), shared.choice(["same", "same", "other", "none"])
        program = what if dist.get_rank() == odd else "same"
        time.sleep(own.choice([0.0, 0.0, 0.005, 0.05]))
        found.append((what, odd == dist.get_rank(), hold(program, f"step (call {number})")))
    return found


OUTCOMES = {
    ("same", True): "agreed",
    ("same", False): "agreed",
    ("other", True): "different",
    ("other", False): "different",
    ("none", True): "ValueError",
    ("none", False): "PeerError",
}


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("seed", [0, 1])
def test_every_round_ends_alike_for_all_ranks_and_the_next_one_is_not_disturbed(size: int, seed: int) -> None:
    for rank, found in enumerate(world.run(many_rounds, seed, 40, size=size)):
        assert [outcome for *_, outcome in found] == [OUTCOMES[what, odd] for what, odd, _ in found], rank


def reasons_of_two() -> dict[int, bytes]:
    make()
    program = "b" if dist.get_rank() == 1 else "a"
    return hold_round(Entry(program, "step (call 1)", "first call"), program.encode)


def test_ranks_that_differ_learn_each_others_reasons() -> None:
    assert world.run(reasons_of_two, size=2) == [{0: b"a", 1: b"b"}] * 2


def held_alone(held: bool) -> tuple[bool, str]:
    """Rank 0 holds a round, in which rank 1 does not take part; it waits elsewhere."""
    make(deadline=20.0)
    if dist.get_rank() == 0:
        return held, hold("a", "step (call 7)", "1.x: 4 -> 2") if held else "nothing"
    time.sleep(0.5)
    end = end_apart("waits in fz.gather", begun=0)  # rank 0 has begun as many runs: this rank may be late
    assert end is None
    end = end_apart("waits in fz.gather", begun=1)
    return end is not None, "" if end is None else end.text


@pytest.mark.parametrize("held", [True, False])
def test_a_rank_that_is_elsewhere_ends_the_round_that_others_hold(held: bool) -> None:
    (_, outcome), (ended, text) = world.run(held_alone, held, size=2)
    assert outcome == ("ProgramMismatchError" if held else "nothing")
    assert ended == held
    if held:
        assert "rank 0 traced a new program for step (call 7) (1.x: 4 -> 2); rank 1 traced none" in text
        assert "waits in fz.gather" in text


def outer_and_inner() -> Any:
    make(deadline=20.0)
    if dist.get_rank() == 1:
        with pytest.raises(KeyError), together("step (call 1)"), together("fz.vjp"):
            raise KeyError("w2")
        return None
    try:
        hold_round(Entry("a", "step (call 1)", "first call"), bytes)
    except fz.PeerError as error:
        return str(error)


def test_an_error_is_told_with_the_calls_around_it() -> None:
    message, _ = world.run(outer_and_inner, size=2)
    assert "rank 1 raised KeyError in fz.vjp, in step (call 1)" in message
