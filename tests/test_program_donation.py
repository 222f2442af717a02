"""Donation: memory is reused, whoever holds the old tensors is told, and nothing handed out is overwritten later."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fzero as fz
from fzero.program import donation
from fzero.program.lower import inductor as lower_inductor
from tests import world
from tests.small import assert_same_bits, copied, dot, gradient_of, gradients, parameters, piece

A = torch.arange(6.0)


def state_of(optimizer: fz.Optimizer | None = None, policy: str = "fp32", stage: int = 3) -> fz.State:
    return fz.init(parameters(), optimizer or fz.adamw(1e-2), fz.make_mesh("cpu"), fz.zero(stage), policy=policy)


def step_of(state: fz.State, value: Any) -> tuple[fz.State, dict[str, Any]]:
    loss, grads = fz.value_and_grad(dot)(state, value)
    state, info = fz.apply_gradients(state, grads)
    return state, {"loss": loss, **info}


def addresses(*trees: Any) -> set[int]:
    return {leaf.untyped_storage().data_ptr() for leaf in fz.tree.leaves(trees) if isinstance(leaf, Tensor)}


# ---------------------------------------------------------------------------------------------------------
# Whoever holds a donated tensor is told

READS: dict[str, Callable[[Tensor], Any]] = {
    "add": lambda x: x + 1,
    "add from the right": lambda x: 1 + x,
    "matmul": lambda x: A @ x,
    "in place": lambda x: x.add_(1),
    "item": lambda x: x[0].item(),
    "sum": lambda x: x.sum(),
    "index": lambda x: x[0],
    "write an index": lambda x: x.__setitem__(0, 1.0),
    "torch function": torch.exp,
    "a list of tensors": lambda x: torch.stack([A, x]),
    "a keyword": lambda x: torch.add(input=A, other=x),
    "out": lambda x: torch.exp(A, out=x),
    "clone": lambda x: x.clone(),
    "cast": lambda x: x.to(torch.float64),
    "shape": lambda x: x.shape,
    "numpy": lambda x: x.numpy(),
    "tolist": lambda x: x.tolist(),
    "iteration": list,
    "truth": bool,
    "comparison": lambda x: x == A,
    "copy into another": lambda x: A.clone().copy_(x),
    "vjp": lambda x: fz.vjp(torch.exp, x),
    "another jitted call": lambda x: fz.jit(torch.exp)(x),
    "shard": lambda x: fz.shard({"w": x}, fz.make_mesh("cpu"), fz.zero(3)),
    "deepcopy": copy.deepcopy,
    "pickle": pickle.dumps,
    "init": lambda x: fz.init({"w": x}, fz.adamw(1e-3), fz.make_mesh("cpu")),
}


def double(x: Tensor) -> Tensor:
    return x * 2


@pytest.mark.parametrize("read", READS.values(), ids=READS.keys())
def test_every_read_names_the_call_that_has_the_memory(read: Callable[[Tensor], Any]) -> None:
    jitted = fz.jit(double, donate=0)
    jitted(torch.ones(6))
    x = A.clone()
    alias = x
    jitted(x)
    with pytest.raises(fz.DonatedError, match=r"donated to double \(call 2\).*\.clone\(\)") as info:
        read(alias)
    assert str(info.value).startswith("fz: this tensor's memory was donated to double (call 2)")
    assert not re.search(r"__\w+__|is_\w+", str(info.value))


NAMED = {
    "sum": lambda x: x.sum(),
    "stack": lambda x: torch.stack([A, x]),
    "exp": torch.exp,
    "clone": lambda x: x.clone(),
}


@pytest.mark.parametrize("name", NAMED)
def test_a_function_of_torch_that_reads_it_is_named(name: str) -> None:
    x = A.clone()
    fz.jit(double, donate=0)(x)
    with pytest.raises(fz.DonatedError, match=f"and {name} reads it"):
        NAMED[name](x)


def test_printing_says_it_and_does_not_raise() -> None:
    x = A.clone()
    fz.jit(double, donate=0)(x)
    assert repr(x) == str(x) == f"{x}" == f"{x:>10}" == "<donated to double (call 1)>"
    assert "donated" in repr([x])


OLD_STATE: dict[str, Callable[[fz.State], Any]] = {
    "gather": lambda state: fz.gather(state.params),
    "gather of moments": lambda state: fz.gather(state.moments),
    "gradient": lambda state: fz.grad(dot)(state, parameters(1)),
    "call": lambda state: fz.call(dot, state, parameters(1)),
    "step": lambda state: state.step + 1,
    "the step again": lambda state: fz.jit(step_of, donate=0)(state, parameters(1)),
}


@pytest.mark.parametrize("read", OLD_STATE.values(), ids=OLD_STATE.keys())
def test_an_old_state_cannot_be_used(read: Callable[[fz.State], Any]) -> None:
    step, state = fz.jit(step_of, donate=0), state_of()
    step(state, parameters(1))
    with pytest.raises(fz.DonatedError, match=r"donated to step_of \(call 1\)"):
        read(state)
    assert "State(4 leaves" in repr(state)


def read_an_old_state(stage: int) -> None:
    step, state = fz.jit(step_of, donate=0), state_of(stage=stage)
    step(state, parameters(1))
    fz.gather(state.params)


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_every_rank_is_told(stage: int) -> None:
    world.raises(fz.DonatedError, read_an_old_state, stage, size=2, match=r"donated to step_of \(call 1\)")


# ---------------------------------------------------------------------------------------------------------
# Until its program runs, a call takes nothing


def mistyped(state: fz.State, batch: Any) -> Any:
    return fz.value_and_grad(lambda p, b: p.wieght.sum())(state, batch)


def looks_at_values(state: fz.State, batch: Any) -> Any:
    return state if batch.sum() > 0 else None


def is_interrupted(state: fz.State, batch: Any) -> Any:
    raise KeyboardInterrupt


def product(params: Any, batch: Tensor) -> Tensor:
    return (batch @ params["head"]).sum()


NOTHING_RUN: dict[str, tuple[Callable[..., Any], Any, type[BaseException]]] = {
    "a typo": (fz.jit(mistyped, donate=0), A, AttributeError),
    "a value that is looked at": (fz.jit(looks_at_values, donate=0), A, fz.TraceError),
    "an interrupt while it traces": (fz.jit(is_interrupted, donate=0), A, KeyboardInterrupt),
    "a batch that does not split": (fz.train_step(product, microbatches=4), torch.ones(6, 5), fz.BatchError),
    "a shape": (fz.train_step(product), torch.ones(6, 7), RuntimeError),
    "a dtype": (fz.train_step(product), torch.ones(6, 5).double(), RuntimeError),
    "a lowering": (fz.jit(step_of, donate=0, lower="cudagraph"), parameters(1), ValueError),
    "an argument that cannot be a constant": (fz.train_step(product), [set()], TypeError),
}


@pytest.mark.parametrize(("step", "batch", "error"), NOTHING_RUN.values(), ids=NOTHING_RUN.keys())
def test_what_is_raised_before_the_program_runs_leaves_the_arguments(
    step: Callable[..., Any], batch: Any, error: type[BaseException]
) -> None:
    state = state_of()
    kept, places = copied(state), addresses(state)
    with pytest.raises(error):
        step(state, batch)
    assert_same_bits(state, kept)
    assert addresses(state) == places


def test_swapped_arguments_leave_the_batch() -> None:
    state, batch = state_of(), {"x": torch.ones(6, 5)}
    with pytest.raises(Exception):  # noqa: B017 - whatever the function says of them
        fz.train_step(product)(batch, state)
    assert_same_bits(batch, {"x": torch.ones(6, 5)})


def test_a_compilation_that_fails_leaves_the_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise OSError("no compiler")

    monkeypatch.setattr(lower_inductor, "standalone_compile_static", broken)
    x = A.clone()
    with pytest.raises(RuntimeError, match="no compiler"):
        fz.jit(double, donate=0, lower="inductor")(x)
    assert_same_bits(x, A)


@pytest.mark.parametrize("taken", [0, 1, 5])
@pytest.mark.parametrize("moment", ["before", "after"])
def test_an_interrupt_while_memory_is_taken_gives_it_all_back(
    taken: int, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bury, calls = donation._bury, []

    def interrupted(leaf: Tensor, call: str) -> None:
        calls.append(leaf)
        if moment == "after" or len(calls) <= taken:
            bury(leaf, call)
        if len(calls) > taken:
            raise KeyboardInterrupt

    step, state = fz.jit(step_of, donate=0), state_of()
    kept, places = copied(state), addresses(state)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(donation, "_bury", interrupted)
        step(state, parameters(1))
    assert_same_bits(state, kept)
    assert addresses(state) == places
    assert_same_bits(step(state, parameters(1)), step_of(kept, parameters(1)))


def different_programs() -> None:
    rank, state = torch.distributed.get_rank(), state_of()
    kept = copied(state)
    axis = state.mesh["data"]
    loss = (lambda p, batch: axis.sum(dot(p, batch))) if rank else dot  # one sends more than the other
    with pytest.raises(fz.ProgramMismatchError):
        fz.train_step(loss)(state, parameters(1))
    assert_same_bits(state, kept)


def test_ranks_that_do_not_agree_keep_their_states() -> None:
    world.run(different_programs, size=2)


def test_an_interrupt_of_a_running_program_says_what_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    x = A.clone()
    jitted = fz.jit(double, donate=0)
    program = jitted.trace(x)

    def interrupted(inputs: list[Tensor]) -> list[Tensor]:
        inputs.clear()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as info:
        donation.run_donating(dataclasses.replace(program, run=interrupted), [x], {0}, "double (call 1)")
    assert info.value.__notes__ == ["double (call 1) was running, so the arguments that were donated to it are gone."]
    with pytest.raises(fz.DonatedError):
        x.sum()


@pytest.mark.parametrize("policy", ["fp32", "fp16", "bf16-exact", "bf16-8bit"])
def test_a_copy_as_the_message_says_goes_on_alone(policy: str) -> None:
    step, state = fz.jit(step_of, donate=0), state_of(policy=policy)
    copy = fz.tree.map(torch.clone, state)
    values = [fz.tree.map(lambda x: x.to(state.policy.compute), value) for value in gradients(2)]
    step(state, values[0])
    with pytest.raises(fz.DonatedError, match=r"a state by fz\.tree\.map\(torch\.clone, state\)"):
        state.step.item()
    assert_same_bits(step(copy, values[0]), step_of(state_of(policy=policy), values[0]))


def test_a_call_that_fails_when_it_runs_has_taken_the_memory_too() -> None:
    x, index = A.clone(), torch.tensor([100])
    with pytest.raises(IndexError):
        fz.jit(lambda x, index: x.index_select(0, index), donate=0)(x, index)
    with pytest.raises(fz.DonatedError):
        x.sum()


def test_what_is_not_donated_stays() -> None:
    x, y = A.clone(), A.clone()
    jitted = fz.jit(lambda x, y: x + y, donate=1)
    assert_same_bits(jitted(x, y), A + A)
    assert_same_bits(x, A)
    with pytest.raises(fz.DonatedError):
        y.sum()


def test_a_trace_donates_nothing() -> None:
    state = state_of()
    kept = copied(state)
    fz.trace(step_of, donate=0)(state, parameters(1))
    assert_same_bits(state, kept)


def test_a_donating_function_inside_another_is_part_of_it_and_donates_nothing() -> None:
    x = A.clone()
    inner = fz.jit(double, donate=0)
    assert_same_bits(fz.jit(lambda x: inner(x) + x)(x), A * 3)
    assert_same_bits(x, A)


# ---------------------------------------------------------------------------------------------------------
# One memory in two places

TWICE: dict[str, tuple[Callable[[Tensor], tuple[Any, ...]], str]] = {
    "in one argument": (lambda x: ({"a": x, "b": x}, A), "'0.a' is donated, and '0.b' is the same memory"),
    "also passed plainly": (lambda x: ({"a": x}, x), "'0.a' is donated, and '1' is the same memory"),
    "a view of it": (lambda x: ({"a": x}, x[2:]), "'0.a' is donated, and '1' is the same memory"),
    "two views": (lambda x: ({"a": x[:3], "b": x[3:]}, A), "'0.a' is donated, and '0.b' is the same memory"),
}


@pytest.mark.parametrize(("arguments", "message"), TWICE.values(), ids=TWICE.keys())
def test_memory_in_two_places_cannot_be_donated(arguments: Callable[[Tensor], tuple[Any, ...]], message: str) -> None:
    x = A.clone()
    with pytest.raises(ValueError, match=message):
        fz.jit(lambda x, y: x, donate=0)(*arguments(x))
    assert_same_bits(x, A)


def test_a_state_donated_and_passed_as_reference_names_both() -> None:
    state = state_of()
    with pytest.raises(ValueError, match=r"fz\.jit: .*'0\..*' is donated, and '1\..*' is the same memory"):
        fz.jit(lambda s, reference: s, donate=0)(state, state)
    assert state.step == 0


# ---------------------------------------------------------------------------------------------------------
# What is handed out is never overwritten


def watched_step(state: fz.State, value: Any) -> Any:
    """Everything that could alias the state: its own tensors as metrics, views of them, gathered parameters."""
    before = fz.gather(state.params)
    loss, grads = fz.value_and_grad(dot)(state, value)
    new, info = fz.apply_gradients(state, grads)
    metrics = {
        "loss": loss,
        **info,
        "before": before,
        "after": fz.gather(new.params),
        "step": new.step,
        "piece": piece(new.params, "head"),
        "view": piece(new.params, "head")[3:10],
        "scalar": piece(new.params, "scale")[0],
        "moments": fz.tree.leaves(new.moments),
        "gradient": grads,
    }
    return new, metrics


def steps_overwrite_nothing(stage: int, policy: str) -> None:
    step, state = fz.jit(watched_step, donate=0), state_of(policy=policy, stage=stage)
    eager = copied(state)
    handed_out, kept = [], []
    for value in gradients(3):
        state, metrics = step(state, value)
        eager, expected = watched_step(eager, value)
        outside = fz.gather(state.params)
        assert not addresses(state) & addresses(metrics, outside)
        handed_out += [metrics, outside]
        kept += [copied(metrics), copied(outside)]
        assert_same_bits((state, metrics), (eager, expected))
    assert_same_bits(handed_out, kept)


QUICK = [(1, 3, "bf16"), (2, 0, "fp32"), (2, 1, "mixed"), (2, 3, "bf16")]
FULL = itertools.product((1, 2), (0, 1, 3), ("fp32", "mixed", "bf16"))


@pytest.mark.parametrize(
    ("size", "stage", "policy"), [pytest.param(*x, marks=() if x in QUICK else pytest.mark.slow) for x in FULL]
)
def test_later_steps_overwrite_nothing_that_was_handed_out(size: int, stage: int, policy: str) -> None:
    world.run(steps_overwrite_nothing, stage, policy, size=size)


def test_init_and_shard_copy_what_they_are_given() -> None:
    params = parameters()
    kept = copied(params)
    state = fz.init(params, fz.adamw(1e-2), fz.make_mesh("cpu"), policy="fp32")
    sharded = fz.shard(params, fz.make_mesh("cpu"), fz.zero(3))
    assert not addresses(params) & addresses(state, sharded)
    fz.jit(step_of, donate=0)(state, parameters(1))
    assert_same_bits(params, kept)


# ---------------------------------------------------------------------------------------------------------
# Memory is reused


def test_micro_batches_too_leave_the_state_where_it_is() -> None:
    state = state_of()
    step = fz.train_step(lambda params, x: sum((p * x.mean()).sum() for p in fz.tree.leaves(params)), microbatches=2)
    before = addresses(state.params, state.moments)
    state, _ = step(state, torch.ones(4))
    assert addresses(state.params, state.moments) == before


@pytest.mark.parametrize("policy", ["fp32", "mixed", "bf16"])
def test_new_parameters_and_moments_lie_where_the_old_ones_were(policy: str) -> None:
    step, state = fz.jit(step_of, donate=0), state_of(policy=policy)
    for value in gradients(2):
        before = addresses(state.params, state.moments)
        state, _ = step(state, value)
        assert addresses(state.params, state.moments) == before


def test_without_donation_the_old_state_stays() -> None:
    step, state = fz.jit(step_of), state_of()
    kept = copied(state)
    new, _ = step(state, parameters(1))
    assert not addresses(state) & addresses(new)
    assert_same_bits(state, kept)


def test_frozen_leaves_pass_through_where_they_are() -> None:
    optimizer = fz.partition_by(lambda path: path.split(".")[0], {"block": None, "head": fz.sgd(0.1), "scale": None})
    step, state = fz.jit(step_of, donate=0), state_of(optimizer)
    before = {path: piece(state.params, path).data_ptr() for path in state.params.paths if path != "head"}
    state, _ = step(state, parameters(1))
    assert {path: piece(state.params, path).data_ptr() for path in before} == before


def test_two_updates_in_one_program_keep_views_of_the_first() -> None:
    def twice(state: fz.State, value: Any) -> Any:
        first, _ = fz.apply_gradients(state, gradient_of(state, value))
        view = piece(first.params, "head")[3:10]
        second, _ = fz.apply_gradients(first, gradient_of(first, value))
        return second, view

    state = state_of()
    expected = twice(copied(state), parameters(1))
    assert_same_bits(fz.jit(twice, donate=0)(state, parameters(1)), expected)
