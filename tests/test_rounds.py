from __future__ import annotations

import os
import random
import signal
import socket
import threading
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

import fzero as fz
from fzero._torch import default_store
from fzero.ranks.agree import agree
from fzero.ranks.agree import world as known
from fzero.ranks.peers import together
from fzero.ranks.watch import LOOK
from tests import world


@pytest.fixture(autouse=True)
def fresh_group_afterwards():
    yield
    world.fresh()


def hold(program: str, call: str) -> str:
    """How a round ended for this rank."""
    try:
        with together(call):
            if program == "none":
                raise ValueError(f"{call} went wrong")
            different = agree(program.removesuffix(" breaks"), call, f"{program} of {call}".encode)
            if program.endswith(" breaks"):
                raise KeyError("inside")
    except (KeyError, ValueError, fz.PeerError, fz.ProgramMismatchError) as error:
        return type(error).__name__
    return "different" if different else "agreed"


def many_rounds(seed: int, rounds: int) -> list[tuple[str, bool, str]]:
    """Ranks come in any order; some hold another program now and then, some raise, and all go on."""
    fz.make_mesh("cpu", deadline=30.0)
    shared, own, found = random.Random(seed), random.Random(f"{seed} {dist.get_rank()}"), []
    for number in range(rounds):
        odd, what = shared.randrange(dist.get_world_size()), shared.choice(["same", "same", "other", "none"])
        program = what if dist.get_rank() == odd else "same"
        time.sleep(own.choice([0.0, 0.0, 0.005, 1.5 * LOOK]))
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


@pytest.mark.parametrize(("size", "seed"), [(2, 0), (3, 1), (4, 2)])
def test_every_round_ends_alike_for_all_ranks_and_the_next_one_is_not_disturbed(size: int, seed: int) -> None:
    for rank, found in enumerate(world.run(many_rounds, seed, 15, size=size)):
        assert [outcome for *_, outcome in found] == [OUTCOMES[what, odd] for what, odd, _ in found], rank


def one_name() -> list[str]:
    """Eager calls have one name. All fail in it, one later than the other; then all make it again."""
    fz.make_mesh("cpu", deadline=30.0)
    found = []
    for programs in (
        ("none", "none"),
        ("a", "a"),
        ("none", "a"),
        ("a", "a"),
        ("a", "none"),
        ("none", "none"),
        ("a", "a"),
    ):
        time.sleep(0.3 * dist.get_rank())
        found.append(hold(programs[dist.get_rank()], "fz.gather"))
    return found


def test_an_error_that_both_ranks_raise_is_no_news() -> None:
    first, second = world.run(one_name, size=2)
    assert first == ["ValueError", "agreed", "ValueError", "agreed", "PeerError", "ValueError", "agreed"]
    assert second == ["ValueError", "agreed", "PeerError", "agreed", "ValueError", "ValueError", "agreed"]


def fails_inside(late: int) -> list[str]:
    """Rank 1 fails in a call that all had agreed on, after its collectives, and makes the next one all the same."""
    fz.make_mesh("cpu", deadline=30.0)
    breaks = dist.get_rank() == 1
    found = [hold("a breaks" if breaks else "a", "step (call 1)")]
    time.sleep(0.5 if dist.get_rank() == late else 0.0)
    return [*found, *(hold("a", "step") for _ in range(1 if breaks else 2))]


@pytest.mark.parametrize("late", [0, 1])
def test_who_did_not_fail_in_a_call_hears_at_the_next_one_that_another_did(late: int) -> None:
    mine, theirs = world.run(fails_inside, late, size=2)
    assert mine == ["agreed", "PeerError", "agreed"] and theirs == ["KeyError", "agreed"]


def reasons_of_two() -> dict[int, bytes]:
    fz.make_mesh("cpu", deadline=30.0)
    program = "b" if dist.get_rank() == 1 else "a"
    return agree(program, "step (call 1)", program.encode)


def test_ranks_that_differ_learn_each_others_reasons() -> None:
    assert world.run(reasons_of_two, size=2) == [{0: b"a", 1: b"b"}] * 2


def outer_and_inner() -> Any:
    fz.make_mesh("cpu", deadline=20.0)
    if dist.get_rank() == 1:
        with pytest.raises(KeyError), together("step (call 1)"), together("fz.vjp"):
            raise KeyError("w2")
        return None
    try:
        agree("a", "step (call 1)", bytes)
    except fz.PeerError as error:
        return str(error)


def test_an_error_is_told_with_the_calls_around_it() -> None:
    message, _ = world.run(outer_and_inner, size=2)
    assert "rank 1 raised KeyError in fz.vjp, in step (call 1)" in message


def is_slow() -> list[str]:
    """Rank 1 is far behind at each call, though not by the deadline."""
    fz.make_mesh("cpu", deadline=30.0)
    found = []
    for number in range(4):
        time.sleep(4 * LOOK * dist.get_rank())
        found.append(hold("a", f"step (call {number})"))
    return found


def test_a_slow_rank_is_not_blamed() -> None:
    assert world.run(is_slow, size=2) == [["agreed"] * 4] * 2


def litter() -> tuple[int, int]:
    """How many keys of rounds are in the store after a few rounds, and after many, some of which were waited for."""
    fz.make_mesh("cpu", deadline=30.0)
    keys = [f"fzero/0/{n}/{key}" for n in range(200) for key in ("a", "entries", "woken/0", "woken/1", "entry/0")]
    found = []
    for rounds in (10, 90):
        for number in range(rounds):
            time.sleep(1.5 * LOOK if number % 30 == dist.get_rank() else 0.0)
            agree("a", "step", bytes)
        time.sleep(4.0 + 5 * LOOK)
        name = known().name
        found.append(sum(default_store().check([key.replace("fzero/0", name)]) for key in keys))
    return found[0], found[1]


def test_the_store_does_not_grow_with_the_rounds() -> None:
    for few, many in world.run(litter, size=2):
        assert many <= few <= 6


def has_thread(wanted: bool) -> bool:
    """Whether the thread is there, or is not, as wanted, within a moment."""
    until = time.monotonic() + 20 * LOOK
    while (found := any(t.name == "fzero-watch" for t in threading.enumerate())) != wanted and time.monotonic() < until:
        time.sleep(0.05)
    return found


def threads() -> list[bool]:
    found = [has_thread(False)]  # that of a former world ends
    mesh = fz.make_mesh("cpu")
    fz.average(torch.ones(2), mesh)
    found.append(has_thread(True))
    dist.destroy_process_group()
    return [*found, has_thread(False)]


def test_the_thread_lives_as_long_as_its_world() -> None:
    assert world.run(threads, size=2) == [[False, True, False]] * 2


def interrupted() -> str:
    """Rank 0 waits for rank 1, which is late, and is interrupted as by Ctrl-C."""
    fz.make_mesh("cpu", deadline=60.0)
    agree("same", "step (call 1)", bytes)
    if dist.get_rank() == 1:
        time.sleep(4.0)
        return hold("same", "step (call 2)")
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    begun = time.monotonic()
    threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT)).start()
    try:
        agree("same", "step (call 2)", bytes)
    except KeyboardInterrupt:
        return "interrupted at once" if time.monotonic() - begun < 3.0 else "interrupted late"
    finally:
        signal.signal(signal.SIGINT, previous)
    return "not interrupted"


def test_a_rank_that_waits_for_others_can_be_interrupted_and_they_hear_of_it() -> None:
    assert world.run(interrupted, size=2) == ["interrupted at once", "PeerError"]


def ended(port: int) -> str:
    """Rank 1 ends at once, as a process does whose data is shorter; rank 0 is about to wait for it.

    By a store over TCP, as launchers give it: who waits in a connection to it holds that connection.
    """
    rank = dist.get_rank()
    dist.destroy_process_group()
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    fz.make_mesh("cpu", deadline=60.0)
    agree("same", "step (call 1)", bytes)
    if dist.get_rank() == 1:
        here = known()
        here.store.set("left/1", "")
        here.store.set("left", "")
        return "ended"
    return hold("same", "step (call 2)")


def test_a_rank_that_ends_is_missed_by_who_begins_to_wait_for_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    assert world.run(ended, port, size=2, deadline=20.0) == ["ProgramMismatchError", "ended"]
