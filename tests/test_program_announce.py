"""Ranks that do not run the same program say so: before the first run, or where they wait for each other."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import fzero as fz
from fzero.program.announce import fingerprint, program_text
from tests import world
from tests.small import parameters

DEADLINE = 3.0
MARGIN = 10.0  # seconds to trace and to raise, on a busy machine


@pytest.fixture(autouse=True)
def fresh_group_afterwards():
    yield
    world.fresh()


def state_of(deadline: float = DEADLINE) -> fz.State:
    mesh = fz.make_mesh("cpu", deadline=deadline)
    return fz.init({"w": torch.arange(64.0)}, fz.sgd(0.1), mesh, fz.zero(3), policy="fp32")


def loss(params: Any, batch: Tensor) -> Tensor:
    return (params["w"] * batch).sum()


def step_of() -> Any:
    return fz.train_step(loss, donate=False, sizes="fixed")


def outcome(f: Callable[..., Any], *args: Any) -> tuple[str, str, float]:
    """What a call raised, and after how many seconds."""
    began = time.monotonic()
    try:
        f(*args)
    except Exception as error:
        return type(error).__name__, str(error), time.monotonic() - began
    return "nothing", "", time.monotonic() - began


# ---------------------------------------------------------------------------------------------------------
# A first call that differs


def halved(params: Any, batch: Tensor) -> Tensor:
    return (params["w"] * batch).sum() * 0.5


def scaled(params: Any, batch: Any) -> Tensor:
    return (params["w"] * batch["x"]).sum() * batch["scale"]


def loss_over(params: Any, batch: Any, *, constant: float) -> Tensor:
    return (params["w"] * batch).sum() * constant


def first_call(kind: str, odd: int) -> tuple[str, str, float]:
    """One rank calls its step with something else than the others do."""
    state, is_odd = state_of(deadline=30.0), dist.get_rank() == odd
    step: Any = step_of()
    batch: Any = torch.ones(64)
    if kind == "a shape":
        batch = torch.ones(2, 64) if is_odd else torch.ones(4, 64)
    elif kind == "a dtype":
        batch = batch.double() if is_odd else batch
    elif kind == "a leaf":
        step = fz.train_step(lambda p, b: loss(p, b["x"]), donate=False)
        batch = {"x": batch, "y": batch} if is_odd else {"x": batch}
    elif kind == "a number":
        step = fz.train_step(scaled, donate=False)
        batch = {"x": batch, "scale": 3.0 if is_odd else 2.0}
    elif kind == "a function":
        step = fz.train_step(halved if is_odd else loss, donate=False)
    elif kind == "a constant":
        constant = 3.0 if is_odd else 2.0
        step = fz.train_step(lambda p, b: loss_over(p, b, constant=constant), donate=False)
    return outcome(step, state, batch)


# What is different, how the others have it, and how the odd one.
FIRST_CALLS = {
    "a shape": (r"batch: ", r"has float32\(4, 64\)", r"has float32\(2, 64\)"),
    "a dtype": (r"batch: ", r"has float32\(64,\)", r"has float64\(64,\)"),
    "a leaf": (r"batch\.y: ", r"has nothing", r"has float32\(64,\)"),
    "a number": (r"batch\.scale: ", r"has 2\.0", r"has 3\.0"),
    "a function": ("", r"traced train_step\(loss\) \(call 1\)", r"traced train_step\(halved\) \(call 1\)"),
    "a constant": (
        r"line \d+ of the program: ",
        r"has `\w+ = aten\.mul\.Tensor\(\w+, 2\.0\) [^`]*` \([^)]*test_program_announce\.py:\d+\)",
        r"has `\w+ = aten\.mul\.Tensor\(\w+, 3\.0\)",
    ),
}


@pytest.mark.parametrize(("kind", "words"), FIRST_CALLS.items(), ids=FIRST_CALLS.keys())
@pytest.mark.parametrize(("size", "odd"), [(2, 1), (4, 2)])
def test_a_first_call_that_differs_is_named_on_every_rank(
    kind: str, words: tuple[str, str, str], size: int, odd: int
) -> None:
    results = world.run(first_call, kind, odd, size=size)
    assert [result[0] for result in results] == ["ProgramMismatchError"] * size
    for _, message, seconds in results:
        # Two ranks are told apart, the first that came and differ: the odd one is among them.
        for word in (words[0], rf"[Rr]ank [^{odd}] {words[1]}", rf"[Rr]ank {odd} {words[2]}"):
            assert re.search(word, message), message
        assert seconds < 20.0, "nobody has to wait for a deadline"
    assert len({message.partition(": ")[2] for _, message, _ in results}) == 1, "all tell the same of it"


def wrong_then_right(rounds: int) -> list[Any]:
    """Ranks that raise for different programs go on with equal ones."""
    state, step = state_of(deadline=20.0), step_of()
    found: list[Any] = []
    for number in range(rounds):
        rows = 4 if dist.get_rank() == number % dist.get_world_size() else 2
        found.append(outcome(step, state, torch.ones(rows + number, 64))[0])
        state, metrics = step(state, torch.ones(8 + number, 64))
        found.append(float(metrics["loss"]))
    return [*found, len(step.programs)]


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_go_on_after_a_mismatch_that_was_caught(size: int) -> None:
    first, *others = world.run(wrong_then_right, 3, size=size)
    assert all(other == first for other in others)
    assert first[0:5:2] == ["ProgramMismatchError"] * 3
    assert first[-1] == 3, "a program that was refused is not kept"


def raises_in_the_trace(again: bool) -> list[Any]:
    """Rank 1 raises while it traces; the others, which wait for its announcement, hear of it."""
    state = state_of(deadline=20.0)
    found: list[Any] = []

    def picky(params: Any, batch: Any) -> Tensor:
        if dist.get_rank() == 1 and batch.shape[0] == 3:
            raise ValueError("three rows are too many")
        return loss(params, batch)

    for _ in range(2 if again else 1):  # another function of the same name, called for the first time
        step = fz.train_step(picky, donate=False)
        found.append(outcome(step, state, torch.ones(3, 64)))
        found.append(float(step(state, torch.ones(2, 64))[1]["loss"]))
    return found


@pytest.mark.parametrize("again", [False, True])
def test_a_rank_that_raises_in_its_trace_is_heard_by_those_that_wait_for_it(again: bool) -> None:
    results = world.run(raises_in_the_trace, again, size=4)
    for rank, (first, value, *rest) in enumerate(results):
        for kind, message, seconds in [first, *rest[::2]]:
            assert kind == ("ValueError" if rank == 1 else "PeerError")
            assert "three rows are too many" in message
            assert seconds < 10
        assert value == 2 * sum(range(64)), "and the next call runs"


def all_raise_then_go_on() -> list[Any]:
    state, found = state_of(deadline=20.0), []
    for fails in (True, False, True, False):

        def loss_fn(params: Any, batch: Any, fails: bool = fails) -> Tensor:
            if fails:
                raise KeyError(f"missing on rank {dist.get_rank()}")
            return loss(params, batch)

        step = fz.train_step(loss_fn, donate=False)
        time.sleep(0.2 * dist.get_rank())
        found.append(outcome(step, state, torch.ones(64))[0])
    return found


def test_errors_that_all_ranks_raise_leave_nothing_behind() -> None:
    assert world.run(all_raise_then_go_on, size=2) == [["KeyError", "nothing"] * 2] * 2


# ---------------------------------------------------------------------------------------------------------
# A later call that differs


def later_call(odd: int, others_trace: bool) -> tuple[str, str, float]:
    """After two equal calls, one rank traces anew while the others have their program, or the other way round."""
    state, step = state_of(), step_of()
    for _ in range(2):
        state, _ = step(state, torch.ones(4, 64))
    traces = (dist.get_rank() == odd) != others_trace
    return outcome(step, state, torch.ones(2 if traces else 4, 64))


@pytest.mark.parametrize(("size", "odd"), [(2, 0), (2, 1), (4, 3)])
@pytest.mark.parametrize("others_trace", [False, True])
def test_a_rank_that_traces_alone_is_named_on_every_rank(size: int, odd: int, others_trace: bool) -> None:
    results = world.run(later_call, odd, others_trace, size=size)
    for kind, message, seconds in results:
        assert kind == "ProgramMismatchError", message
        assert "train_step(loss) (call 3) (batch: float32(4, 64) on cpu -> float32(2, 64) on cpu)" in message
        assert seconds < DEADLINE + MARGIN


def evaluates_alone() -> tuple[str, str, float]:
    """Rank 1 calls a function that the others do not."""
    state, step = state_of(), step_of()
    state, _ = step(state, torch.ones(64))
    if dist.get_rank() == 1:
        return outcome(fz.jit(lambda s: fz.gather(s.params)), state)
    return outcome(step, state, torch.ones(64))


def test_another_function_on_one_rank_is_named_on_every_rank() -> None:
    for kind, message, _ in world.run(evaluates_alone, size=2):
        assert kind == "ProgramMismatchError"
        assert "<lambda> (call 1)" in message and "train_step(loss) (call 2)" in message


def waits_eagerly() -> tuple[str, str, float]:
    state = state_of()
    if dist.get_rank() == 0:
        return outcome(fz.gather, state.params)
    return outcome(step_of(), state, torch.ones(64))


def test_a_rank_that_waits_outside_of_a_program_hears_of_it_too() -> None:
    for kind, message, _ in world.run(waits_eagerly, size=2):
        assert kind == "ProgramMismatchError"
        assert "rank 1 traced a new program for train_step(loss) (call 1) (first call)" in message
        assert "fz.gather" in message


def comes_late() -> tuple[str, str, float]:
    state, step = state_of(deadline=1.0), step_of()
    if dist.get_rank() == 1:
        time.sleep(3.0)
    return outcome(step, state, torch.ones(64))


def test_a_rank_that_comes_after_the_deadline_raises_at_once() -> None:
    early, late = world.run(comes_late, size=2)
    assert early[0] == late[0] == "ProgramMismatchError"
    assert "rank 1 traced none within 1 s" in early[1]
    assert early[1] == late[1]
    assert early[2] < 1.0 + MARGIN and late[2] < 1.0


# ---------------------------------------------------------------------------------------------------------
# What need not be announced


def alone() -> int:
    """Each rank traces programs of its own, as many as its rank; then all trace one together."""
    local = fz.jit(lambda x: x * 2)
    for size in range(1, 2 + dist.get_rank()):
        assert torch.equal(local(torch.ones(size)), torch.full((size,), 2.0))
    state = state_of()
    step_of()(state, torch.ones(64))
    return len(local.programs)


def test_a_program_without_collectives_is_its_ranks_own_affair() -> None:
    assert world.run(alone, size=2) == [1, 2]


def raises_alone() -> list[str]:
    state = state_of()
    if dist.get_rank() == 1:
        with pytest.raises(KeyError):
            fz.jit(lambda x: {}[x])(torch.ones(2))
    return [outcome(step_of(), state, torch.ones(64))[0] for _ in range(2)]


def test_an_error_in_such_a_program_disturbs_nobody() -> None:
    assert world.run(raises_alone, size=2) == [["nothing", "nothing"]] * 2


def traced_on_one_rank() -> str:
    state = state_of()
    if dist.get_rank() == 0:
        assert fz.trace(step_of())(state, torch.ones(64)).communicates
    return outcome(step_of(), state, torch.ones(64))[0]


def test_a_trace_runs_nothing_and_is_not_announced() -> None:
    assert world.run(traced_on_one_rank, size=2) == ["nothing"] * 2


# ---------------------------------------------------------------------------------------------------------
# Fingerprints


def fingerprints(stages: tuple[int, ...], axes: dict[str, int]) -> list[str]:
    """One for each stage, of a step with constants of each rank's own and a loop in it."""
    found = []
    for stage in stages:
        mesh = fz.make_mesh("cpu", deadline=None, simulate=False, **axes)
        layout = fz.zero(stage, axis="data", replicate=[name for name in axes if name != "data"])
        state = fz.init(parameters(), fz.adamw(1e-2), mesh, layout, policy="bf16")
        own = torch.full((4, 7), float(mesh.index(mesh.names)), dtype=torch.bfloat16)

        def loss_fn(params: Any, batch: Tensor, own: Tensor = own) -> Tensor:
            return ((params["block"]["bias"] + own[:2]) * batch).float().sum() * params["scale"].float()

        step = fz.train_step(loss_fn, microbatches=2)
        program = fz.trace(step)(state, torch.ones(4, 7, dtype=torch.bfloat16))
        text = "\n".join(program_text(program.trace))
        assert "0x" not in text
        assert "loop body:" in text
        found.append(fingerprint(program.trace))
    return found


@pytest.mark.parametrize("axes", [{"data": 4}, {"node": 2, "data": 2}], ids=str)
def test_a_program_has_one_fingerprint_on_all_ranks(axes: dict[str, int]) -> None:
    stages = (0, 1, 2, 3)
    first, *others = world.run(fingerprints, stages, axes, size=4)
    assert others == [first] * 3
    assert len(set(first)) >= 3, "stages 1 and 2 are one program; the others are their own"


@pytest.mark.slow
def test_two_processes_find_the_same_fingerprint() -> None:
    source = "from tests.test_program_announce import fingerprints; print(fingerprints((0, 3), {'data': 1}))"
    runs = [
        subprocess.run([sys.executable, "-c", source], cwd=Path(__file__).parent.parent, capture_output=True, text=True)
        for _ in range(2)
    ]
    assert all(run.returncode == 0 for run in runs), runs[0].stderr
    assert runs[0].stdout == runs[1].stdout == f"{fingerprints((0, 3), {'data': 1})}\n"


A = torch.arange(6.0)

PROGRAMS: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "the plain one": (lambda x, k: x * 2 + k, (A, 1.0)),
    "a constant": (lambda x, k: x * 3 + k, (A, 1.0)),
    "a constant in the arguments": (lambda x, k: x * 2 + k, (A, 2.0)),
    "an operator": (lambda x, k: x * 2 - k, (A, 1.0)),
    "a shape": (lambda x, k: x * 2 + k, (A[:4], 1.0)),
    "a dtype": (lambda x, k: x * 2 + k, (A.double(), 1.0)),
    "strides": (lambda x, k: x * 2 + k, (A.repeat(2)[::2], 1.0)),
    "an output": (lambda x, k: (x * 2 + k, x), (A, 1.0)),
    "a keyword": (lambda x, k: torch.add(x * 2, x, alpha=2), (A, 1.0)),
    "a closed-over tensor's shape": (lambda x, k: x * 2 + A[:1], (A, 1.0)),
    "a closed-over tensor": (lambda x, k: x * 2 + A, (A, 1.0)),
}


def test_what_differs_has_another_fingerprint() -> None:
    found = {name: fingerprint(fz.trace(f)(*args).trace) for name, (f, args) in PROGRAMS.items()}
    for (a, first), (b, second) in itertools.combinations(found.items(), 2):
        assert first != second, f"{a} and {b}"


def test_values_that_are_closed_over_do_not_count() -> None:
    first, second = (fz.trace(lambda x, own=own: x + own)(A) for own in (A.clone(), A + 1))
    assert fingerprint(first.trace) == fingerprint(second.trace)


def test_loop_bodies_count() -> None:
    def loop(scale: float) -> Any:
        return fz.accumulate(fz.value_and_grad(lambda w, x: (w * x).sum() * scale), 2)

    x = A.view(2, 3)
    first, second, again = (fingerprint(fz.trace(loop(s))(A[:3], x).trace) for s in (1.5, 2.5, 1.5))
    assert first == again != second
