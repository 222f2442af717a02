"""All passes together: whatever a user chooses, a traced step has the bits of the eager one."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest

import fzero as fz
from fzero.program.options import Options
from fzero.program.pipeline import PASSES, run_passes
from tests import world
from tests.pairwise import pairwise
from tests.programs import matmuls, misplaced, raw, simulated, text, tokens, training
from tests.small import assert_same_bits, copied

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


@functools.cache
def thinned() -> list[tuple[Any, ...]]:
    return pairwise(*FACTORS.values())


def traced_and_eager(rows: Sequence[tuple[Any, ...]]) -> None:
    mesh = fz.make_mesh("cpu")
    rank = mesh.index("data")
    for row in rows:
        case = dict(zip(FACTORS, row, strict=True))
        del case["size"]
        remat = case.pop("remat")
        options = {"remat_blocks": True} if remat == "user" else {"remat": remat}
        depth = min(mesh.size("data"), 2)  # a world of one has no gathers to pack or to hide
        state, step = training(mesh, depth=depth, **case, **options)
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
    world.run(traced_and_eager, [row for row in thinned() if row[0] == size], size=size, deadline=200.0)


@pytest.mark.slow
@pytest.mark.parametrize("remat", FACTORS["remat"])
@pytest.mark.parametrize("clip", FACTORS["clip"])
@pytest.mark.parametrize("policy", FACTORS["policy"])
@pytest.mark.parametrize("stage", FACTORS["stage"])
@pytest.mark.parametrize("size", FACTORS["size"])
def test_every_choice_has_the_bits_of_the_eager_step(
    size: int, stage: int, policy: str, clip: bool, remat: Any
) -> None:
    fixed = {"size": size, "stage": stage, "policy": policy, "clip": clip, "remat": remat}
    choices = [(fixed[name],) if name in fixed else values for name, values in FACTORS.items()]
    world.run(traced_and_eager, list(itertools.product(*choices)), size=size, deadline=200.0)


def test_the_thinned_cases_let_every_two_choices_meet() -> None:
    for (a, values_a), (b, values_b) in itertools.combinations(enumerate(FACTORS.values()), 2):
        met = {(row[a], row[b]) for row in thinned()}
        assert met == set(itertools.product(values_a, values_b))


def off_and_on(stage: int, policy: str, microbatches: int) -> None:
    mesh = fz.make_mesh("cpu")
    results = []
    for options in (
        {"bucket": 0, "overlap": None, "remat": "none", "keep_gathered": math.inf},
        {"bucket": 2**20, "overlap": 2**20, "remat": "block", "keep_gathered": 0},
    ):
        state, step = training(
            mesh, stage, policy=policy, dropout=0.1, clip=True, depth=2, microbatches=microbatches, **options
        )
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
    state, step = training(simulated(2), 3, depth=2)
    trace = raw(step, state, tokens())
    plain, _ = run_passes(trace, Options(bucket=0, overlap=None, keep_gathered=math.inf))
    all_on, _ = run_passes(trace, Options(remat="block"))
    assert matmuls(all_on) > matmuls(plain)
    assert text(all_on) != text(plain)


@pytest.mark.parametrize("microbatches", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_passes_are_pure_and_deterministic(microbatches: int) -> None:
    state, step = training(simulated(2), 3, clip=True, depth=2, microbatches=microbatches, dropout=0.1)
    trace = raw(step, state, tokens())
    before = text(trace)
    options = Options(remat="block")
    (once, stages), (again, _) = run_passes(trace, options), run_passes(trace, options)
    assert text(trace) == before
    assert text(once) == text(again)
    assert not list(misplaced(once))
    assert [stage.name for stage in stages] == ["trace", *(run.__name__ for run in PASSES)]


def test_each_pass_leaves_a_sound_graph() -> None:
    state, step = training(simulated(2), 3, clip=True, depth=2, microbatches=2, dropout=0.1)
    trace, options = raw(step, state, tokens()), Options(remat="block", keep_gathered=0)
    for run in PASSES:
        trace = run(trace, options)
        for graph in (trace.module.graph, *(body.module.graph for body in trace.bodies.values())):
            graph.lint()
            assert not any(use.graph is not graph for node in graph.nodes for use in node.users), run.__name__


def test_twice_traced_is_the_same_program() -> None:
    programs = []
    for _ in range(2):
        state, step = training(simulated(4), 3, depth=1)
        programs.append(text(step.trace(state, tokens()).trace))
    assert programs[0] == programs[1]
