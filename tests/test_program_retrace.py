"""Why a call was traced anew, in the user's names; what to do about it; and how many programs are kept."""

from __future__ import annotations

import collections
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import fzero as fz
from tests.small import assert_same_bits, dot, gradient_of, parameters

A = torch.arange(6.0)


class Pair(NamedTuple):
    x: Tensor
    y: Tensor


def ours(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.startswith("fzero")]


def state_of(optimizer: fz.Optimizer | None = None, stage: int = 3, policy: str | fz.Policy = "fp32") -> fz.State:
    return fz.init(parameters(), optimizer or fz.adamw(1e-3), fz.make_mesh("cpu"), fz.zero(stage), policy=policy)


def causes(f: Callable[..., Any], *calls: Any) -> list[str]:
    """Why each call was traced; nothing is run."""
    jitted, found = fz.jit(f), []
    for args in calls:
        before = len(jitted.programs)
        jitted(*args)
        found += [program.cause for program in jitted.programs[before:]]
    return found


def update(state: fz.State, batch: Any) -> Any:
    return fz.apply_gradients(state, gradient_of(state, batch))


def falling(step: Tensor) -> Tensor:
    return 1.0 / (step + 1)


def rising(step: Tensor) -> Tensor:
    return step + 1.0


NO_DECAY = fz.adamw(1e-3, mask=lambda path: path != "head")
CHAIN = fz.chain(fz.clip_by_global_norm(1.0), fz.adamw(1e-3))
# What a state is changed to, and what is said of it.
STATES: dict[str, tuple[fz.State, list[str]]] = {
    "learning rate": (state_of(fz.adamw(3e-4)), ["state.optimizer lr: 0.001 -> 0.0003"]),
    "two numbers": (
        state_of(fz.adamw(3e-4, b2=0.9)),
        ["state.optimizer lr: 0.001 -> 0.0003", "state.optimizer b2: 0.999 -> 0.9"],
    ),
    "schedule": (state_of(fz.adamw(falling)), ["state.optimizer lr: 0.001 -> falling (test_program_retrace.py:"]),
    "mask": (state_of(NO_DECAY), ["state.optimizer mask: None -> <lambda> (test_program_retrace.py:"]),
    "another optimizer": (state_of(fz.sgd(1e-3)), ["state.optimizer"]),
    "policy": (
        state_of(policy="mixed"),
        ["state.params policy.param: torch.float32 -> None", "state.params policy.compute: "],
    ),
    "exempt": (state_of(policy=fz.policy("fp32", exempt=["head"])), ["state.params policy.exempt: () -> ('head',)"]),
    "stage": (state_of(stage=0), ["state.params layout.stage: 3 -> 0"]),
}


@pytest.mark.parametrize(("other", "lines"), STATES.values(), ids=STATES.keys())
def test_static_parts_of_a_state_are_named_with_old_and_new(other: fz.State, lines: list[str]) -> None:
    batch = fz.tree.map(lambda x: x.to(other.policy.compute), parameters(1))
    first, second = causes(lambda state, x: fz.value_and_grad(dot)(state, x), (state_of(), batch), (other, batch))
    assert first == "first call"
    for line in lines:
        assert line in second, second
    # The layout and the policy stand in parameters and moments too: once is enough.
    assert second.count("stage: ") <= 1
    assert second.count(" compute: ") <= 1


def test_inside_a_chain_and_between_functions_of_one_name() -> None:
    chained = fz.chain(fz.clip_by_global_norm(1.0), fz.adamw(3e-4))
    _, cause = causes(update, (state_of(CHAIN), parameters(1)), (state_of(chained), parameters(1)))
    assert cause == "state.optimizer optimizer.lr: 0.001 -> 0.0003"
    others = fz.chain(fz.clip_by_leaf_norm(1.0), fz.adamw(1e-3))
    _, cause = causes(update, (state_of(CHAIN), parameters(1)), (state_of(others), parameters(1)))
    assert cause == "state.optimizer transforms.0: ClipByGlobalNorm -> ClipByLeafNorm"
    rates = [lambda step: falling(step) for _ in range(2)]
    _, cause = causes(update, *((state_of(fz.adamw(rate)), parameters(1)) for rate in rates))
    assert "state.optimizer lr: <lambda> (test_program_retrace.py:" in cause and "-> another <lambda> (" in cause


def test_a_split_leaf_of_bare_parameters() -> None:
    mesh = fz.make_mesh("cpu", data=1, model=1)
    whole, split = (
        fz.shard(parameters(), mesh, fz.zero(3, replicate="model", split=split)) for split in ({}, {"head": fz.P(None)})
    )
    _, cause = causes(lambda params: fz.gather(params), (whole,), (split,))
    assert "params layout.split: () -> (('head', P(None)),)" in cause
    assert "params head.split: P() -> P(None)" in cause


ARGUMENTS: dict[str, tuple[Callable[..., Any], tuple[Any, ...], tuple[Any, ...], str]] = {
    "a tensor": (lambda x, scale: x, (A, 2), (A[:4], 2), "x: float32(6,) on cpu -> float32(4,) on cpu"),
    "a number": (lambda x, scale: x, (A, 2), (A, 3), "scale: 2 -> 3"),
    "a path": (lambda batch: batch, ({"x": [A]},), ({"x": [A[:4]]},), "batch.x.0: float32(6,) on cpu -> float32(4,)"),
    "one of several": (lambda x, *more: x, (A, A, A), (A, A, A[:2]), "more.1: float32(6,) on cpu -> float32(2,)"),
    "one more": (lambda x, *more: x, (A, A), (A, A, A), "more.1: nothing -> float32(6,) on cpu"),
    "a name that a function lacks": (torch.exp, (A,), (A[:4],), "0: float32(6,) on cpu -> float32(4,) on cpu"),
    "a tuple": (lambda batch: batch, ((A, A),), ([A, A],), "batch: tuple -> list"),
    "a tuple inside": (lambda batch: batch, ({"x": [(A, 1)]},), ({"x": [[A, 1]]},), "batch.x.0: tuple -> list"),
    "a dict": (lambda batch: batch, ({"x": A},), (collections.OrderedDict(x=A),), "batch: dict -> OrderedDict"),
    "a named tuple": (lambda batch: batch, ((A, A),), (Pair(A, A),), "batch: tuple -> Pair"),
    "a key": (lambda x: x, ({"a": A},), ({"b": A},), "x.a: float32(6,) on cpu -> nothing; x.b: nothing -> float32"),
}


@pytest.mark.parametrize(("f", "before", "after", "line"), ARGUMENTS.values(), ids=ARGUMENTS.keys())
def test_arguments_go_by_their_names(f: Any, before: tuple[Any, ...], after: tuple[Any, ...], line: str) -> None:
    assert causes(f, before, after)[1].startswith(line)


def test_what_stands_around_a_call_is_named() -> None:
    jitted = fz.jit(lambda x: x * 2)
    jitted(A)
    with torch.no_grad():
        jitted(A)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        jitted(A)
    assert jitted.programs[1].cause == "grad mode: True -> False"
    assert jitted.programs[2].cause.startswith("autocast on a CPU: (False, ")


def test_a_call_is_compared_with_the_nearest_program() -> None:
    # Of a short batch with another scale, after a long one: the last short one is nearest.
    found = causes(lambda x, scale, name: x, (A[:4], 2, "a"), (A, 3, "b"), (A[:4], 2, "c"))
    assert found[2] == "name: 'a' -> 'c'"


def test_a_long_report_ends() -> None:
    batches = [{f"x{i}": A[:n] for i in range(12)} for n in (6, 4)]
    assert causes(lambda batch: batch, *((batch,) for batch in batches))[1].endswith("; and 4 more")
    assert len(causes(lambda text: text, ("a" * 1000,), ("b" * 1000,))[1]) < 200


def test_the_third_number_says_to_pass_a_tensor(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="fzero"):
        found = causes(lambda x, scale: x * scale, *((A, float(scale)) for scale in range(5)))
    advice = "This is trace 3 for a new number scale, which is a constant of the program: pass a tensor"
    assert [advice in cause for cause in found] == [False, False, False, True, False]
    assert "This is trace 4" in found[4]
    assert advice in ours(caplog)[2]
    jitted = fz.jit(lambda x, scale: x * scale)
    for scale in range(5):  # and that helps
        assert_same_bits(jitted(A, torch.tensor(float(scale))), A * scale)
    assert len(jitted.programs) == 1


def test_lengths_and_names_are_no_numbers_to_pass_as_tensors() -> None:
    for calls in ([(A[:n], 1) for n in range(1, 6)], [(A, name) for name in "abcde"], [(A, n > 2) for n in range(5)]):
        assert not any("pass a tensor" in cause for cause in causes(lambda x, y: x, *calls))


def test_a_learning_rate_that_changes_says_what_helps() -> None:
    found = causes(update, *((state_of(fz.adamw(rate)), parameters(1)) for rate in (0.1, 0.2, 0.3, 0.4)))
    assert "pass a tensor that a function reads, such as lr=lambda step: lr_tensor" in found[3]
    rate = torch.tensor(0.1)
    state, jitted = state_of(fz.sgd(lambda step: rate)), fz.jit(update)
    for value in (0.1, 0.2):
        rate.fill_(value)
        new, info = jitted(state, parameters(1))
        assert info["lr"].item() == pytest.approx(value)
        assert_same_bits(new.params, fz.apply_gradients(state, gradient_of(state, parameters(1)))[0].params)
    assert len(jitted.programs) == 1


def test_the_program_not_used_for_longest_goes_and_the_log_says_so(caplog: pytest.LogCaptureFixture) -> None:
    jitted = fz.jit(lambda x, scale: x * scale, keep_programs=2)
    with caplog.at_level(logging.WARNING, logger="fzero"):
        for scale in (1, 2, 1):
            jitted(A, scale)
        assert not [line for line in ours(caplog) if "keeps" in line]
        jitted(A, 3)
        kept = jitted.programs
        jitted(A, 4)
    (line,) = [line for line in ours(caplog) if "keeps" in line]
    assert "keeps 2 programs, as keep_programs= says, and lets go of the one that was not used for longest" in line
    assert [program.cause for program in kept] == ["first call", "scale: 1 -> 3"], "2 was used before 1"
    assert len(jitted.programs) == 2
    for scale in (1, 2, 3, 4):
        assert_same_bits(jitted(A, scale), A * scale)


@pytest.mark.parametrize("keep", [0, -1, 2.5, True, None])
def test_a_bound_that_keeps_nothing_is_refused(keep: Any) -> None:
    with pytest.raises(ValueError, match=r"fz\.jit: keep_programs=.*at least 1"):
        fz.jit(lambda x: x, keep_programs=keep)
