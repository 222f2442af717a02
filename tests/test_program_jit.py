"""`fz.jit`: the same bits as the function itself, one trace a signature, and what a trace cannot do."""

from __future__ import annotations

import functools
import itertools
import logging
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fzero as fz
from tests import world
from tests.small import assert_same_bits, copied, gradient_of, parameters

POLICIES = ("fp32", "mixed", "bf16")


# ---------------------------------------------------------------------------------------------------------
# Traced equals eager


@functools.cache
def model(dropout: float) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 23), nn.Dropout(dropout), nn.Tanh(), nn.Linear(23, 9), nn.LayerNorm(9))


def training(stage: int, policy: str, dropout: float, microbatches: int, donate: bool) -> tuple[fz.State, Any]:
    apply, params = fz.functional(model(dropout))
    optimizer = fz.chain(fz.clip_by_global_norm(1.0), fz.adamw(fz.schedules.linear(1e-2, 0.0, steps=9)))
    state = fz.init(params, optimizer, fz.make_mesh("cpu"), fz.zero(stage), policy=policy, seed=3)

    def loss(p: Any, batch: Any) -> Tensor:
        return nn.functional.mse_loss(apply(p, batch["x"]).float(), batch["y"])

    return state, fz.train_step(loss, microbatches=microbatches, donate=donate)


def batch_of(rank: int, step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(100 * rank + step)
    return {"x": torch.randn(4, 5, generator=generator), "y": torch.randn(4, 9, generator=generator)}


def traced_and_eager(stages: tuple[int, ...], policy: str, dropout: float, microbatches: int, steps: int) -> None:
    for stage, donate in zip(stages, itertools.cycle((True, False)), strict=False):
        state, step = training(stage, policy, dropout, microbatches, donate)
        eager, rank = copied(state), state.mesh.index("data")
        for number in range(steps):
            batch = batch_of(rank, number)
            batch = {key: x.to(state.policy.compute) if key == "x" else x for key, x in batch.items()}
            state, metrics = step(state, batch)
            eager, eager_metrics = step.f(eager, batch)
            assert_same_bits((state, metrics), (eager, eager_metrics))
        assert len(step.programs) == 1


# Each factor at each of its values; the full product is slow.
QUICK = [
    (1, (3,), "fp32", 0.3, 1),
    (1, (3, 0), "mixed", 0.0, 2),
    (1, (0,), "bf16", 0.3, 1),
    (2, (0,), "fp32", 0.3, 1),
    (2, (1,), "mixed", 0.0, 2),
    (2, (3,), "bf16", 0.3, 2),
]
FULL = [
    (size, stages, *case)
    for size, stages in [(1, (3, 0)), (2, (0, 1, 3))]
    for case in itertools.product(POLICIES, (0.0, 0.3), (1, 2))
]


@pytest.mark.parametrize(
    ("size", "stages", "policy", "dropout", "microbatches"),
    [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in FULL)],
)
def test_traced_steps_have_the_bits_of_eager_ones(
    size: int, stages: tuple[int, ...], policy: str, dropout: float, microbatches: int
) -> None:
    world.run(traced_and_eager, stages, policy, dropout, microbatches, steps=2, size=size)


def test_dropout_is_another_in_each_step() -> None:
    losses = []
    state, step = training(3, "fp32", dropout=0.5, microbatches=1, donate=False)
    for number in range(3):
        at_another_step = state.replace(step=state.step + number)
        losses.append(step(at_another_step, batch_of(0, 0))[1]["loss"].item())
    assert len(set(losses)) == 3
    assert len(step.programs) == 1


def test_two_updates_in_one_program_have_the_bits_of_two_steps() -> None:
    def twice(state: fz.State, first: Any, second: Any) -> Any:
        state, _ = fz.apply_gradients(state, gradient_of(state, first))
        between = fz.gather(state.params)
        state, info = fz.apply_gradients(state, gradient_of(state, second))
        return state, between, info

    state = fz.init(parameters(), fz.adamw(1e-2), fz.make_mesh("cpu"), policy="bf16")
    expected = twice(state, parameters(1), parameters(2))
    assert_same_bits(fz.jit(twice, donate=0)(copied(state), parameters(1), parameters(2)), expected)


# ---------------------------------------------------------------------------------------------------------
# One trace a signature


def double(x: Any, scale: Any = 2) -> Any:
    return fz.tree.map(lambda leaf: leaf * scale, x)


A = torch.arange(6.0)
NEW_TRACES: dict[str, tuple[tuple[Any, ...], dict[str, Any], tuple[Any, ...], dict[str, Any], str]] = {
    "a shape": (({"x": A},), {}, ({"x": A[:4]},), {}, r"x\.x: float32\(6,\) on cpu -> float32\(4,\) on cpu"),
    "a dtype": ((A,), {}, (A.double(),), {}, r"x: float32\(6,\) on cpu -> float64\(6,\) on cpu"),
    "strides": ((A.view(2, 3),), {}, (A.view(3, 2).T,), {}, r"x: float32\(2, 3\) on cpu -> .* strides \(1, 2\)"),
    "a number": ((A, 2.0), {}, (A, 3.0), {}, r"scale: 2\.0 -> 3\.0"),
    "a keyword": ((A,), {"scale": 2}, (A,), {"scale": 3}, r"scale: 2 -> 3"),
    "a leaf more": (({"x": A},), {}, ({"x": A, "y": A},), {}, r"x\.y: nothing -> float32\(6,\)"),
}


def ours(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    return [record for record in caplog.records if record.name.startswith("fzero")]


@pytest.mark.parametrize("case", NEW_TRACES.values(), ids=NEW_TRACES.keys())
def test_a_new_signature_is_traced_once_and_says_why(case: Any, caplog: pytest.LogCaptureFixture) -> None:
    args, kwargs, new_args, new_kwargs, cause = case
    jitted = fz.jit(double)
    for _ in range(2):
        assert_same_bits(jitted(*args, **kwargs), double(*args, **kwargs))
    assert len(jitted.programs) == 1
    with caplog.at_level(logging.WARNING, logger="fzero"):
        for _ in range(2):
            assert_same_bits(jitted(*new_args, **new_kwargs), double(*new_args, **new_kwargs))
            assert_same_bits(jitted(*args, **kwargs), double(*args, **kwargs))
    assert len(jitted.programs) == 2
    (record,) = ours(caplog)
    assert f"tracing {double.__name__} (program 2)" in record.message
    for text in (record.message, jitted.programs[1].cause):
        assert re.search(cause, text), text


def test_a_first_trace_is_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="fzero"):
        fz.jit(double)(A)
    assert [record.levelname for record in ours(caplog)] == ["INFO"]


def test_a_changed_batch_is_named_by_its_path(caplog: pytest.LogCaptureFixture) -> None:
    state, step = training(3, "fp32", dropout=0.0, microbatches=1, donate=True)
    state, _ = step(state, batch_of(0, 0))
    with caplog.at_level(logging.WARNING, logger="fzero"):
        step(state, {key: x[:2] for key, x in batch_of(0, 0).items()})
    (record,) = ours(caplog)
    assert "batch.x: float32(4, 5) on cpu -> float32(2, 5) on cpu" in record.message
    assert "params" not in record.message


def test_static_data_that_changes_is_a_new_trace() -> None:
    state = fz.init(parameters(), fz.adamw(1e-2), fz.make_mesh("cpu"), policy="fp32")
    step = fz.jit(lambda s, value: fz.apply_gradients(s, gradient_of(s, value)))
    for rate in (1e-2, 1e-2, 1e-3):
        changed = state.replace(optimizer=fz.adamw(rate))
        assert_same_bits(step(changed, parameters(1)), step.f(changed, parameters(1)))
    assert len(step.programs) == 2
    assert step.programs[1].cause == "s.optimizer lr: 0.01 -> 0.001"


STATICS = [3, 0.5, True, None, "name", (1, "a"), torch.float32, frozenset({1})]


@pytest.mark.parametrize("static", STATICS, ids=repr)
def test_what_is_no_tensor_is_a_constant_of_the_program(static: Any) -> None:
    jitted = fz.jit(lambda x, s: (x + 1, s))
    for _ in range(2):
        assert jitted(A, static)[1] == static
    assert len(jitted.programs) == 1


def test_constants_that_python_calls_equal_are_different_programs() -> None:
    jitted = fz.jit(lambda x, s: x * s)
    x = torch.arange(3)
    constants = (1, 1.0, True, 0, 0.0, -0.0, False)
    for constant in constants:
        assert_same_bits(jitted(x, constant), x * constant)
    assert len(jitted.programs) == len(constants)


def test_one_nan_is_another() -> None:
    jitted = fz.jit(lambda x, s: x * s)
    for _ in range(2):
        jitted(A, float("nan"))
    assert len(jitted.programs) == 1


class Unhashable:
    __hash__ = None  # type: ignore[assignment]


def test_what_cannot_be_a_constant_is_refused() -> None:
    with pytest.raises(TypeError, match=r"fz\.jit: .*neither a tensor nor hashable.*Pass tensors, numbers"):
        fz.jit(lambda x, s: x)(A, Unhashable())


# ---------------------------------------------------------------------------------------------------------
# What a trace cannot do


def by_item(x: Tensor) -> Tensor:
    return x * x.sum().item()  # the line


def by_if(x: Tensor) -> Tensor:
    if x.sum() > 0:  # the line
        return x
    return -x


def by_float(x: Tensor) -> Tensor:
    return x * float(x[0])  # the line


@pytest.mark.parametrize("f", [by_item, by_if, by_float])
def test_looking_at_a_value_names_the_line(f: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(fz.TraceError, match=r"the function looks at the value of a tensor[^$]*# the line") as info:
        fz.jit(f)(A)
    assert __file__ in str(info.value)


def test_drawing_without_a_key_is_refused() -> None:
    with pytest.raises(fz.RandomOpError, match="draws from the global random generator"):
        fz.jit(lambda x: x + torch.rand_like(x))(A)


def test_an_error_of_the_function_arrives_as_it_is() -> None:
    def fails(x: Tensor) -> Tensor:
        raise KeyError("mine")

    jitted = fz.jit(fails)
    with pytest.raises(KeyError, match="mine"):
        jitted(A)
    assert not jitted.programs


def test_an_unknown_lowering_is_refused() -> None:
    with pytest.raises(ValueError, match="lower='cloud' is not known"):
        fz.jit(double, lower="cloud")


# ---------------------------------------------------------------------------------------------------------
# Arguments and results


def test_a_jitted_function_inside_another_is_part_of_it() -> None:
    inner = fz.jit(double)
    outer = fz.jit(lambda x: inner(x) + 1)
    assert_same_bits(outer(A), A * 2 + 1)
    assert not inner.programs
    assert_same_bits(fz.jit(outer)(A), A * 2 + 1)


def test_a_jitted_function_can_be_differentiated() -> None:
    value, gradient = fz.value_and_grad(fz.jit(lambda x: (x * x).sum()))(A)
    assert_same_bits((value, gradient), ((A * A).sum(), 2 * A))


def test_a_closed_over_tensor_is_read_when_the_program_runs() -> None:
    offset = torch.zeros(())
    jitted = fz.jit(lambda x: x + offset)
    assert_same_bits(jitted(A), A)
    offset.fill_(5.0)
    assert_same_bits(jitted(A), A + 5)


def test_one_tensor_in_two_places_is_two_inputs() -> None:
    jitted = fz.jit(lambda x, y: x - 2 * y)
    assert_same_bits(jitted(A, A), A - 2 * A)
    other = torch.ones(6)
    assert_same_bits(jitted(A, other), A - 2 * other)
    assert len(jitted.programs) == 1


def test_what_needs_a_gradient_comes_back_without_history() -> None:
    x = torch.ones(3, requires_grad=True)
    result = fz.jit(lambda x: x * 2)(x)
    assert not result.requires_grad
    assert_same_bits(result, torch.full((3,), 2.0))


OUTPUTS: dict[str, Callable[[Tensor], Any]] = {
    "an input": lambda x: x,
    "an input twice": lambda x: (x, x),
    "a view of an input": lambda x: x[1:],
    "a view of a result": lambda x: ((x + 1), (x + 1).view(2, 3)),
    "one result twice": lambda x: (lambda y: (y, y, y[0]))(x + 1),
    "a tensor closed over": lambda x: A,
    "nothing": lambda x: None,
    "constants": lambda x: {"a": 1, "b": "text", "c": (None, [])},
    "a fresh tensor": lambda x: torch.zeros(3),
}


@pytest.mark.parametrize("f", OUTPUTS.values(), ids=OUTPUTS.keys())
def test_results_are_those_of_the_function_and_own_their_memory(f: Callable[[Tensor], Any]) -> None:
    x = torch.arange(6.0)
    result = fz.jit(f)(x)
    assert_same_bits(_tensors(result), _tensors(f(x)))
    assert fz.tree.structure(result) == fz.tree.structure(f(x))
    tensors = [x, A, *_tensors(result)]
    assert len({leaf.untyped_storage().data_ptr() for leaf in tensors}) == len(tensors)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in fz.tree.leaves(tree) if isinstance(leaf, Tensor)]


def test_a_jitted_function_keeps_name_and_docstring() -> None:
    @fz.jit(donate=())
    def documented(x: Tensor) -> Tensor:
        """What it does."""
        return x

    assert documented.__name__ == "documented"
    assert documented.__doc__ == "What it does."


# ---------------------------------------------------------------------------------------------------------
# fz.trace


def test_trace_runs_nothing() -> None:
    calls = []
    state, step = training(3, "fp32", dropout=0.3, microbatches=1, donate=True)
    kept = copied(state)

    def watched(s: fz.State, batch: Any) -> Any:
        calls.append(all(type(leaf) is not Tensor for leaf in fz.tree.leaves(s)))
        return step(s, batch)

    program = fz.trace(watched, donate=0)(state, batch_of(0, 0))
    assert calls == [True], "the function saw tensors without values, once"
    assert_same_bits(state, kept)
    assert not step.programs
    assert program.trace.inputs


def test_a_trace_of_a_jitted_function_is_the_program_it_runs() -> None:
    state, step = training(3, "fp32", dropout=0.3, microbatches=1, donate=True)
    before = fz.trace(step)(state, batch_of(0, 0)).text()
    step(state, batch_of(0, 0))
    assert step.programs[0].text() == before


def test_a_simulated_state_can_be_traced_and_not_run() -> None:
    apply, params = fz.functional(model(0.0))
    mesh = fz.make_mesh("cpu", data=16, simulate=True)
    state = fz.init(params, fz.adamw(1e-2), mesh, policy="bf16")
    step = fz.train_step(lambda p, batch: apply(p, batch["x"]).float().mean())
    batch = {"x": torch.zeros(2, 5, dtype=torch.bfloat16)}
    text = fz.trace(step)(state, batch).text()
    assert "all_gather" in text
    with pytest.raises(fz.MeshError, match="simulated"):
        step(state, batch)


def test_torch_compile_around_a_program_is_refused_at_once():
    step = fz.jit(lambda x: x + 1)
    with pytest.raises(fz.TraceError, match=r"under torch\.compile.*Call it as it is"):
        torch.compile(step, backend="eager")(torch.ones(3))
    assert step.programs == ()
    assert step(torch.ones(3)).tolist() == [2, 2, 2]
