"""Ranks agree at every call: they run together, or all of them raise and can go on."""

from __future__ import annotations

import dataclasses
import functools
import re
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import fzero as fz
from fzero._torch import default_store
from tests import world

DEADLINE = 3.0
MARGIN = 30.0  # seconds to trace and to raise, on a busy machine


@pytest.fixture(autouse=True)
def fresh_group_afterwards():
    yield
    world.fresh()


def state_of(deadline: float = DEADLINE) -> fz.State:
    mesh = fz.make_mesh("cpu", deadline=deadline)
    return fz.init({"w": torch.arange(64.0)}, fz.sgd(0.1), mesh, fz.zero(3), policy="fp32")


def loss(params: Any, batch: Tensor) -> Tensor:
    return (params["w"] * batch).sum()


def step_of(sizes: str = "any") -> Any:
    return fz.train_step(loss, donate=False, sizes=sizes)


def outcome(f: Callable[..., Any], *args: Any) -> tuple[str, str, float]:
    """What a call raised, and after how many seconds."""
    began = time.monotonic()
    try:
        f(*args)
    except Exception as error:
        return type(error).__name__, str(error), time.monotonic() - began
    return "nothing", "", time.monotonic() - began


# ---------------------------------------------------------------------------------------------------------
# Calls that differ, each way of calling against each


def halved(params: Any, batch: Tensor) -> Tensor:
    return (params["w"] * batch).sum() * 0.5


def evaluated(state: fz.State, batch: Tensor) -> Any:
    return fz.call(loss, state, batch)


def eager_step(state: fz.State, batch: Tensor) -> Any:
    _, grads = fz.value_and_grad(loss)(state, batch)
    return fz.apply_gradients(state, grads)


def left_out(state: fz.State, batch: Tensor) -> Any:
    return fz.gather(state.params)


def begun(state: fz.State, batch: Tensor) -> Any:
    return fz.init({"w": torch.ones(64)}, fz.sgd(0.1), state.mesh, policy="fp32")


def weighted(state: fz.State, batch: Tensor) -> Any:
    return fz.accumulate(fz.value_and_grad(loss), 2, weight=lambda batch: batch.shape[0])(state, batch)


def updated(state: fz.State, batch: Tensor) -> Any:
    grads = fz.zeros_like(state.params)
    return state.optimizer.update(grads, state.moments, state.params, step=0, seed=0)


# What a rank may call, and the name under which errors know it.
CALLS: dict[str, tuple[Callable[[], Callable[..., Any]], str]] = {
    "train": (lambda: step_of(), "train_step(loss) (call"),
    "another": (lambda: fz.train_step(halved, donate=False), "train_step(halved) (call"),
    "micro-batches": (lambda: fz.train_step(loss, 2, donate=False), "train_step(loss) (call"),
    "evaluate": (lambda: fz.jit(evaluated), "evaluated (call"),
    "eager step": (lambda: eager_step, "fz.value_and_grad"),
    "eager evaluation": (lambda: evaluated, "fz.call"),
    "gather": (lambda: left_out, "fz.gather"),
    "average": (lambda: lambda state, batch: fz.average(batch, state.mesh), "fz.average"),
    "init": (lambda: begun, "fz.init"),
    "weighted": (lambda: weighted, "fz.accumulate"),
    "update": (lambda: updated, "Optimizer.update"),
    "axis": (lambda: lambda state, batch: state.mesh["data"].sum(batch), "fz.Axis.sum"),
}
PAIRS = [
    ("train", "another"),
    ("train", "micro-batches"),
    ("evaluate", "train"),
    ("eager step", "train"),
    ("gather", "train"),
    ("gather", "eager evaluation"),
    ("eager step", "eager evaluation"),
    ("average", "gather"),
    ("axis", "train"),
    ("weighted", "gather"),
    ("update", "axis"),
    ("init", "gather"),
]


def differ(pairs: list[tuple[str, str]], odd: int, cached: bool) -> list[tuple[str, str, float, Tensor, float]]:
    """One rank makes the second call of a pair while the others make the first; then all make the first."""
    found, calls = [], {name: make() for name, (make, _) in CALLS.items()}
    state, batch = state_of(deadline=60.0), torch.ones(4, 64)
    for name in dict.fromkeys(name for pair in pairs for name in pair) if cached else ():
        calls[name](state, batch)
    for first, second in pairs:
        got = outcome(calls[second if dist.get_rank() == odd else first], state, batch)
        weights = fz.gather(state.params)["w"]
        value = float(calls["train"](state, batch)[1]["loss"])
        found.append((*got, weights, value))
    return found


@pytest.mark.parametrize(
    ("size", "odd", "cached"), [(2, 1, True), (2, 0, False), pytest.param(4, 2, True, marks=pytest.mark.slow)]
)
def test_ranks_that_call_different_things_all_say_so_and_go_on(size: int, odd: int, cached: bool) -> None:
    results = world.run(differ, PAIRS, odd, cached, size=size, deadline=120.0)
    for pair, rows in zip(PAIRS, zip(*results, strict=True), strict=True):
        for kind, message, seconds, weights, value in rows:
            assert kind == "ProgramMismatchError", (pair, message)
            assert all(CALLS[name][1] in message for name in pair), message
            assert seconds < 30.0, "nobody has to wait for a deadline"
            assert torch.equal(weights, torch.arange(64.0)) and value == 4 * sum(range(64)), "the state is as it was"


def joined(params: Any, batch: Tensor, axis: fz.Axis) -> Tensor:
    return (params["w"] * axis.gather(batch).mean()).sum()


def axis_inside() -> tuple[str, str]:
    """Inside an eager gradient that all ranks take, each gathers as many rows as it has."""
    state = state_of(deadline=60.0)
    kind, message, seconds = outcome(fz.grad(joined), state, torch.ones(2 + dist.get_rank(), 64), state.mesh["data"])
    assert seconds < 30.0, "nobody has to wait for a deadline"
    fz.grad(joined)(state, torch.ones(2, 64), state.mesh["data"])
    return kind, message


def test_ranks_agree_on_what_a_function_does_along_an_axis_eagerly() -> None:
    for kind, message in world.run(axis_inside, size=2):
        assert kind == "ProgramMismatchError" and "fz.Axis.gather" in message
        assert "(2, 64) over data" in message and "(3, 64) over data" in message


def branches(params: Any, batch: Any) -> Tensor:
    return (params["a" if batch["first"] else "b"]["w"] * batch["x"]).sum() + params["c"]["w"].sum()


def branch_alone(stage: int, odd: int) -> list[Any]:
    """All take one branch, then the other, then one rank alone takes the first."""
    mesh = fz.make_mesh("cpu", deadline=30.0)
    params = {name: {"w": torch.arange(64.0)} for name in "abc"}
    state = fz.init(params, fz.sgd(0.1), mesh, fz.zero(stage), policy="fp32")
    step, x = fz.train_step(branches, donate=False), torch.ones(64)
    for first in (True, False):
        step(state, {"x": x, "first": first})
    got = outcome(step, state, {"x": x, "first": dist.get_rank() == odd})
    after, _ = step(state, {"x": x, "first": True})
    return [*got, fz.gather(after.params)["a"]["w"]]


@pytest.mark.parametrize(("size", "odd"), [pytest.param(2, 1, marks=pytest.mark.slow), (4, 2)])
def test_a_branch_that_one_rank_takes_alone_is_named_by_leaf_and_argument(size: int, odd: int) -> None:
    for kind, message, _, weights in world.run(branch_alone, 3, odd, size=size):
        assert kind == "ProgramMismatchError"
        assert re.search(rf"rank {odd} has `all_gather_\w+ of a\.w over data", message), message
        assert re.search(r"rank \d has `all_gather_\w+ of b\.w over data", message), message
        assert "batch.first: rank" in message and "has True" in message and "has False" in message
        assert torch.equal(weights, torch.arange(64.0) - 0.1)


def one_takes_another_branch(stage: int, odd: int) -> list[Tensor]:
    """As above; what every rank has in the end beside plain PyTorch, leaf by leaf."""
    mesh = fz.make_mesh("cpu", deadline=30.0)
    params = {name: {"w": torch.arange(64.0)} for name in "abc"}
    state = fz.init(params, fz.sgd(0.1), mesh, fz.zero(stage), policy="fp32")
    own = {name: {"w": torch.arange(64.0, requires_grad=True)} for name in "abc"}
    sgd = torch.optim.SGD([own[name]["w"] for name in "abc"], 0.1)
    step, ranks = fz.train_step(branches, donate=False), range(mesh.size("data"))
    for firsts in ([True for _ in ranks], [False for _ in ranks], [rank == odd for rank in ranks]):
        batches = [{"x": torch.full((64,), 1.0 + rank), "first": firsts[rank]} for rank in ranks]
        state, _ = step(state, batches[dist.get_rank()])
        sgd.zero_grad(set_to_none=False)
        torch.stack([branches(own, batch) for batch in batches]).mean().backward()
        sgd.step()
    full = fz.gather(state.params)
    return [torch.stack([full[name]["w"], own[name]["w"].detach()]) for name in "abc"]


@pytest.mark.parametrize(
    ("stage", "size"), [(1, 2), *(pytest.param(*case, marks=pytest.mark.slow) for case in [(0, 2), (1, 4)])]
)
def test_a_branch_of_which_all_leaves_are_there_anyway_may_be_taken_alone(stage: int, size: int) -> None:
    """Below stage 3 both branches reduce the gradients of all leaves, zeros among them: the same collectives."""
    for leaves in world.run(one_takes_another_branch, stage, 1, size=size):
        for name, (got, right) in zip("abc", leaves, strict=True):
            torch.testing.assert_close(got, right, rtol=1e-6, atol=1e-6, msg=name)


def wrong_then_right(rounds: int, sizes: str) -> list[Any]:
    """Ranks that raise for different programs go on with equal ones."""
    state, step, other = state_of(deadline=20.0), step_of(sizes), fz.train_step(halved, donate=False)
    found: list[Any] = []
    for number in range(rounds):
        odd = dist.get_rank() == number % dist.get_world_size()
        found.append(outcome(other if odd else step, state, torch.ones(4 + number, 64))[0])
        state, metrics = step(state, torch.ones(8 + number, 64))
        found.append(float(metrics["loss"]))
    return found


@pytest.mark.parametrize(
    ("size", "sizes", "rounds"), [(2, "fixed", 1), (2, "any", 2), pytest.param(4, "any", 4, marks=pytest.mark.slow)]
)
def test_ranks_go_on_after_a_mismatch_that_was_caught(size: int, sizes: str, rounds: int) -> None:
    first, *others = world.run(wrong_then_right, rounds, sizes, size=size)
    assert all(other == first for other in others)
    assert first[0::2] == ["ProgramMismatchError"] * rounds


def raises_in_the_trace() -> list[Any]:
    """Rank 1 raises while it traces; the others, which wait for it, hear of it."""
    state = state_of(deadline=60.0)
    found: list[Any] = []

    def picky(params: Any, batch: Any) -> Tensor:
        if dist.get_rank() == 1 and batch.shape[0] == 3:
            raise ValueError("three rows are too many")
        return loss(params, batch)

    for _ in range(2):  # another function of the same name, called for the first time
        step = fz.train_step(picky, donate=False)
        found.append(outcome(step, state, torch.ones(3, 64)))
        found.append(float(step(state, torch.ones(2, 64))[1]["loss"]))
    return found


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_rank_that_raises_in_its_trace_is_heard_by_those_that_wait_for_it(size: int) -> None:
    for rank, (first, value, again, last) in enumerate(world.run(raises_in_the_trace, size=size)):
        for kind, message, seconds in (first, again):
            assert kind == ("ValueError" if rank == 1 else "PeerError")
            assert "three rows are too many" in message
            assert seconds < 30, "nobody waits for the deadline"
        assert value == last == 2 * sum(range(64)), "and the next call runs"


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
# Calls that not all make


def meet(name: str) -> None:
    """Wait for all ranks, by no call of fzero, however long that takes."""
    default_store().set(f"{name}/{dist.get_rank()}", "")
    default_store().wait([f"{name}/{rank}" for rank in range(dist.get_world_size())], timedelta(seconds=60))


def does_nothing(eager: bool) -> list[Any]:
    """All but the last rank call; it comes when the others have given up, and learns of it. Then all call."""
    state, call = state_of(), fz.gather if eager else step_of()
    args = (state.params,) if eager else (state, torch.ones(64))
    if dist.get_rank() == dist.get_world_size() - 1:
        default_store().wait(["gave up"], timedelta(seconds=60))
    first = outcome(call, *args)
    default_store().set("gave up", "")
    meet("all are here")
    return [first, outcome(call, *args)]


@pytest.mark.parametrize(("size", "eager"), [(2, False), (4, True)])
def test_a_rank_that_does_nothing_is_missed_at_the_deadline_and_learns_of_it(size: int, eager: bool) -> None:
    results = world.run(does_nothing, eager, size=size)
    for (kind, message, seconds), (again, *_) in results:
        assert kind == "ProgramMismatchError"
        assert f"rank {size - 1} made no such call within {DEADLINE:.0f} s" in message
        assert seconds < DEADLINE + MARGIN
        assert again == "nothing", "the next call is made by all"


# ---------------------------------------------------------------------------------------------------------
# What ranks need not agree on


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


def fails_alone() -> list[str]:
    state = state_of()
    if dist.get_rank() == 1:
        with pytest.raises(KeyError):
            fz.jit(lambda x: {}[x])(torch.ones(2))
    return [outcome(step_of(), state, torch.ones(64))[0] for _ in range(2)]


def test_an_error_in_such_a_program_disturbs_nobody() -> None:
    assert world.run(fails_alone, size=2) == [["nothing", "nothing"]] * 2


def traced_on_one_rank() -> str:
    state = state_of()
    if dist.get_rank() == 0:
        assert fz.trace(step_of())(state, torch.ones(64)).digest
    return outcome(step_of(), state, torch.ones(64))[0]


def test_a_trace_runs_nothing_and_nobody_waits_for_it() -> None:
    assert world.run(traced_on_one_rank, size=2) == ["nothing"] * 2


# ---------------------------------------------------------------------------------------------------------
# What shows in no collective


class Scaled:
    """A schedule without a text of its own."""

    def __call__(self, step: Tensor) -> Tensor:
        return 0.1 / (step + 1)


def decays(path: str) -> bool:
    return path == "w"


def clipped(limit: float, **kwargs: Any) -> Any:
    return fz.chain(fz.clip_by_global_norm(limit), fz.adamw(1e-2, **kwargs))


def grouped(lr: float) -> Any:
    return fz.partition_by({"w": "w"}, {"w": fz.sgd(lr)})


# What a rank gives `fz.init` -> what others give instead, and what all are told of the two.
def halving(step: Tensor, start: float) -> Tensor:
    return start * 0.5**step


def halving_from(start: float) -> Callable[[Tensor], Tensor]:
    return lambda step: halving(step, start)


GIVEN: dict[str, tuple[Callable[[], dict[str, Any]], Callable[[], dict[str, Any]], tuple[str, str, str]]] = {
    "lr": (lambda: {}, lambda: {"optimizer": fz.sgd(0.2)}, ("optimizer lr", "0.1", "0.2")),
    "clip": (
        lambda: {"optimizer": clipped(1.0)},
        lambda: {"optimizer": clipped(2.0)},
        ("optimizer transforms.0.limit", "1.0", "2.0"),
    ),
    "weight decay": (
        lambda: {"optimizer": clipped(1.0)},
        lambda: {"optimizer": clipped(1.0, weight_decay=0.0)},
        ("optimizer optimizer.weight_decay", "0.01", "0.0"),
    ),
    "kind of optimizer": (
        lambda: {"optimizer": fz.chain(fz.clip_by_global_norm(1.0), fz.sgd(0.1))},
        lambda: {"optimizer": fz.chain(fz.clip_by_leaf_norm(1.0), fz.sgd(0.1))},
        ("optimizer transforms.0", "ClipByGlobalNorm", "ClipByLeafNorm"),
    ),
    "schedule": (
        lambda: {"optimizer": fz.sgd(fz.schedules.constant(0.1))},
        lambda: {"optimizer": fz.sgd(fz.schedules.constant(0.2))},
        ("optimizer lr.value", "0.1", "0.2"),
    ),
    "part of a function": (
        lambda: {"optimizer": fz.sgd(functools.partial(halving, start=0.1))},
        lambda: {"optimizer": fz.sgd(functools.partial(halving, start=0.2))},
        ("optimizer lr", "start=0.1", "start=0.2"),
    ),
    "function that closes over a number": (
        lambda: {"optimizer": fz.sgd(halving_from(0.1))},
        lambda: {"optimizer": fz.sgd(halving_from(0.2))},
        ("optimizer lr", "start=0.1", "start=0.2"),
    ),
    "group": (
        lambda: {"optimizer": grouped(0.1)},
        lambda: {"optimizer": grouped(0.2)},
        ("optimizer optimizers", "sgd(lr=0.1)", "sgd(lr=0.2)"),
    ),
    "policy": (
        lambda: {"policy": "bf16"},
        lambda: {"policy": dataclasses.replace(fz.policy("bf16"), rounding="nearest")},
        ("policy rounding", "'stochastic'", "'nearest'"),
    ),
    "layout": (lambda: {}, lambda: {"layout": fz.zero(1)}, ("layout stage", "3", "1")),
    "seed": (lambda: {}, lambda: {"seed": 1}, ("seed", "0", "1")),
}
# The same, though not the same objects.
ALIKE: dict[str, Callable[[], Any]] = {
    "schedule": lambda: fz.sgd(Scaled()),
    "mask": lambda: fz.adamw(1e-2, mask=decays),
    "lambda": lambda: fz.adamw(lambda step: 0.1 / (step + 1)),
    "labels": lambda: fz.partition_by(lambda path: "all", {"all": fz.adamw(Scaled())}),
}


def first_state(params: Any, **kwargs: Any) -> fz.State:
    given = {"optimizer": fz.sgd(0.1), "layout": fz.zero(3), "policy": "fp32", **kwargs}
    return fz.init(params, mesh=fz.make_mesh("cpu", deadline=60.0), **given)


def told_apart(odd: int) -> list[tuple[str, tuple[str, str, float], str]]:
    """One rank gives something else; then all the same."""

    def start(factory: bool, given: Callable[[], dict[str, Any]]) -> fz.State:
        make = (lambda: torch.nn.Linear(16, 4)) if factory else {"w": torch.ones(4, 16)}
        return first_state(make, **given())

    found = []
    for name, (usual, other, _) in GIVEN.items():
        for factory in (False, True) if name == "lr" else (False,):
            got = outcome(start, factory, other if dist.get_rank() == odd else usual)
            found.append((name, got, outcome(start, factory, usual)[0]))
    return found


@pytest.mark.parametrize(("size", "odd"), [(2, 1), pytest.param(4, 0, marks=pytest.mark.slow)])
def test_init_compares_what_it_is_given(size: int, odd: int) -> None:
    for rows in world.run(told_apart, odd, size=size, deadline=120.0):
        assert len(rows) == len(GIVEN) + 1
        for name, (kind, message, seconds), again in rows:
            assert kind == "ProgramMismatchError", (name, message)
            field, mine, theirs = GIVEN[name][2]
            assert f"{field}: rank " in message and mine in message and theirs in message, message
            assert "fz.init: ranks" in message and message.endswith("Give every rank the same."), message
            assert again == "nothing" and seconds < MARGIN


def replaced(eager: bool) -> list[tuple[str, str, float]]:
    """One rank's state is given another optimizer after its start: later steps find it, those of the same go on."""
    state, batch = first_state({"w": torch.ones(4, 16)}), torch.ones(4, 16)
    own = state.replace(optimizer=fz.sgd(0.1 * (1 + dist.get_rank())))
    step = eager_step if eager else step_of()
    return [outcome(step, given, batch) for given in (state, own, state, own)]


@pytest.mark.parametrize("eager", [False, True])
def test_a_step_compares_the_optimizers_of_states(eager: bool) -> None:
    for first, second, third, fourth in world.run(replaced, eager, size=2):
        assert first[0] == third[0] == "nothing"
        for kind, message, _ in (second, fourth):
            assert kind == "ProgramMismatchError"
            assert re.search(r"rank 0 has .*0\.1.*, rank 1 has .*0\.2", message), message


def equal_values() -> list[str]:
    batch = torch.ones(4 + dist.get_rank(), 64)
    found = []
    for make in ALIKE.values():
        state = fz.init({"w": torch.ones(64)}, make(), fz.make_mesh("cpu", deadline=60.0), policy="fp32")
        found += [outcome(step_of(), state, batch)[1], outcome(eager_step, state, batch)[1]]
    return found


def test_equal_functions_are_equal_on_all_ranks() -> None:
    assert world.run(equal_values, size=2) == [[""] * 2 * len(ALIKE)] * 2
