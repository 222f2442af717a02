"""All passes together: whatever a user chooses, a traced step has the bits of the eager one."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest

import fzero as fz
from fzero.program.options import Options
from fzero.program.pipeline import PASSES, run_passes
from tests import world
from tests.programs import matmuls, misplaced, raw, simulated, text, tokens, training
from tests.small import assert_same_bits, copied

Case = dict[str, Any]

FACTORS: dict[str, tuple[Any, ...]] = {
    "size": (1, 2, 4),
    "stage": (3, 0, 1),
    "microbatches": (1, 2),
    "remat": ("block", "none", 3000, "user"),
    "dropout": (0.0, 0.1),
    "keep_gathered": (0, math.inf),
    "policy": ("bf16", "fp32", "mixed"),
    "clip": (False, True),
}


def product(**fixed: Any) -> list[Case]:
    """Every case with these choices."""
    choices = {name: (fixed[name],) if name in fixed else values for name, values in FACTORS.items()}
    return [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]


def thinned(cases: Sequence[Case]) -> list[Case]:
    """As few cases as it takes for every two choices to meet, found greedily."""

    def pairs(case: Case) -> set[Any]:
        return set(itertools.combinations(case.items(), 2))

    left = set().union(*map(pairs, cases))
    chosen = []
    while left:
        chosen.append(max(cases, key=lambda case: len(pairs(case) & left)))
        left -= pairs(chosen[-1])
    return chosen


def traced_and_eager(cases: Sequence[Case]) -> None:
    mesh = fz.make_mesh("cpu")
    rank = mesh.index("data")
    for case in cases:
        case = {name: choice for name, choice in case.items() if name != "size"}
        remat = case.pop("remat")
        state, step = training(
            mesh, **case, remat_blocks=remat == "user", **({} if remat == "user" else {"remat": remat})
        )
        eager = copied(state)
        for number in range(2):
            batch = tokens(rank, number)
            state, metrics = step(state, batch)
            eager, expected = step.f(eager, batch)
            try:
                assert_same_bits((state, metrics), (eager, expected))
            except AssertionError as error:
                raise AssertionError(f"{case}, remat={remat!r}, step {number}:\n{error}") from None
        assert len(step.programs) == 1


@pytest.mark.parametrize("size", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_traced_step_has_the_bits_of_the_eager_one(size: int) -> None:
    cases = [case for case in thinned(product()) if case["size"] == size]
    world.run(traced_and_eager, cases, size=size, deadline=200.0)


@pytest.mark.slow
@pytest.mark.parametrize("remat", FACTORS["remat"])
@pytest.mark.parametrize("clip", FACTORS["clip"])
@pytest.mark.parametrize("policy", FACTORS["policy"])
@pytest.mark.parametrize("stage", FACTORS["stage"])
@pytest.mark.parametrize("size", FACTORS["size"])
def test_every_choice_has_the_bits_of_the_eager_step(
    size: int, stage: int, policy: str, clip: bool, remat: Any
) -> None:
    cases = product(size=size, stage=stage, policy=policy, clip=clip, remat=remat)
    world.run(traced_and_eager, cases, size=size, deadline=200.0)


def test_the_thinned_cases_let_every_two_choices_meet() -> None:
    chosen = thinned(product())
    for (a, values_a), (b, values_b) in itertools.combinations(FACTORS.items(), 2):
        met = {(case[a], case[b]) for case in chosen}
        assert met == set(itertools.product(values_a, values_b))


def off_and_on(stage: int, policy: str, microbatches: int) -> None:
    mesh = fz.make_mesh("cpu")
    results = []
    for options in (
        {"bucket": 0, "overlap": None, "remat": "none", "keep_gathered": math.inf},
        {"bucket": 2**20, "overlap": 2**20, "remat": "block", "keep_gathered": 0},
    ):
        state, step = training(mesh, stage, policy=policy, dropout=0.1, clip=True, microbatches=microbatches, **options)
        for number in range(2):
            state, metrics = step(state, tokens(mesh.index("data"), number))
        results.append((state, metrics))
    assert_same_bits(*results)


@pytest.mark.parametrize(
    ("stage", "policy", "microbatches"),
    [
        (3, "bf16", 1),
        pytest.param(3, "mixed", 2, marks=pytest.mark.slow),
        pytest.param(1, "bf16", 2, marks=pytest.mark.slow),
    ],
)
def test_every_option_off_equals_all_on(stage: int, policy: str, microbatches: int) -> None:
    world.run(off_and_on, stage, policy, microbatches, size=2)


def test_options_do_change_the_program() -> None:
    state, step = training(simulated(2), 3)
    trace = raw(step, state, tokens())
    plain, _ = run_passes(trace, Options(bucket=0, overlap=None, keep_gathered=math.inf))
    all_on, _ = run_passes(trace, Options(remat="block"))
    assert matmuls(all_on) > matmuls(plain)
    assert text(all_on) != text(plain)


@pytest.mark.parametrize("microbatches", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_passes_are_pure_and_deterministic(microbatches: int) -> None:
    state, step = training(simulated(2), 3, clip=True, microbatches=microbatches, dropout=0.1)
    trace = raw(step, state, tokens())
    before = text(trace)
    options = Options(remat="block")
    (once, stages), (again, _) = run_passes(trace, options), run_passes(trace, options)
    assert text(trace) == before
    assert text(once) == text(again)
    assert not list(misplaced(once))
    assert [stage.name for stage in stages] == ["trace", *(run.__name__ for run in PASSES)]


def test_twice_traced_is_the_same_program() -> None:
    programs = []
    for _ in range(2):
        state, step = training(simulated(4), 3, clip=True)
        programs.append(text(step.trace(state, tokens()).trace))
    assert programs[0] == programs[1]
