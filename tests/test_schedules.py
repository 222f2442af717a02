"""Schedules: their shapes against plain Python, and that they are data."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fzero as fz
from fzero.optim.schedules import constant, linear, warmup_cosine, wsd
from tests.small import int32

Schedule = Callable[[torch.Tensor], torch.Tensor]


def cosine_in_python(step: int, peak: float, warmup: int, total: int, floor: float) -> float:
    if step < warmup:
        return peak * (step + 1) / warmup
    done = min((step - warmup) / (total - warmup), 1.0)
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * done))


def wsd_in_python(step: int, peak: float, warmup: int, decay: int, total: int, floor: float) -> float:
    if step < warmup:
        return peak * (step + 1) / warmup
    done = min(max(step - (total - decay), 0) / decay, 1.0)
    return peak + (floor - peak) * done


CASES: dict[str, tuple[Schedule, Callable[[int], float]]] = {
    "constant": (constant(0.3), lambda step: 0.3),
    "linear": (linear(0.5, 0.1, steps=10), lambda step: 0.5 - 0.4 * min(step / 10, 1.0)),
    "linear, rising": (linear(0.0, 1.0, steps=7), lambda step: min(step / 7, 1.0)),
    "warmup_cosine": (warmup_cosine(2.0, 4, 20, floor=0.5), lambda step: cosine_in_python(step, 2.0, 4, 20, 0.5)),
    "warmup_cosine, no warmup": (warmup_cosine(2.0, 0, 9), lambda step: cosine_in_python(step, 2.0, 0, 9, 0.0)),
    "wsd": (wsd(2.0, 4, 6, 20, floor=0.5), lambda step: wsd_in_python(step, 2.0, 4, 6, 20, 0.5)),
    "wsd, no stay": (wsd(2.0, 4, 16, 20), lambda step: wsd_in_python(step, 2.0, 4, 16, 20, 0.0)),
}
every_schedule = pytest.mark.parametrize(("schedule", "expected"), CASES.values(), ids=CASES.keys())


@every_schedule
def test_each_step_has_the_rate_of_the_formula(schedule: Schedule, expected: Callable[[int], float]) -> None:
    for step in range(25):
        rate = schedule(int32(step))
        assert (rate.dtype, rate.shape) == (torch.float32, ())
        assert rate.item() == pytest.approx(expected(step), rel=1e-6, abs=1e-7), f"at step {step}"


@every_schedule
def test_traced_and_eager_rates_are_equal_and_a_new_step_is_no_new_trace(schedule: Schedule, expected: object) -> None:
    traced = fz.jit(schedule)
    assert all(torch.equal(traced(int32(step)), schedule(int32(step))) for step in range(25))
    assert len(traced.programs) == 1


def test_schedules_are_equal_by_value_and_hashable() -> None:
    assert wsd(1.0, 2, 3, 10) == wsd(1.0, 2, 3, 10)
    assert wsd(1.0, 2, 3, 10) != wsd(1.0, 2, 3, 11)
    assert len({constant(0.1), constant(0.1), linear(0.1, 0.0, 5)}) == 2


peaks = st.floats(1e-5, 10.0)
steps = st.integers(0, 2**31 - 1)


@given(peaks, st.integers(0, 100), st.integers(1, 100), st.integers(0, 100), steps)
def test_rates_stay_between_floor_and_peak(peak: float, warmup: int, decay: int, stay: int, step: int) -> None:
    floor, total = peak / 8, warmup + stay + decay
    for schedule in (warmup_cosine(peak, warmup, total, floor), wsd(peak, warmup, decay, total, floor)):
        rate = schedule(int32(step)).item()
        assert 0.0 < rate <= peak * (1 + 1e-6)
        if step >= warmup:
            assert rate >= floor * (1 - 1e-5)
        if step >= total:
            assert rate == pytest.approx(floor, rel=1e-5)


@given(peaks, st.integers(1, 100), st.integers(2, 100))
def test_the_first_step_moves_and_warmup_rises_to_the_peak(peak: float, warmup: int, rest: int) -> None:
    for schedule in (warmup_cosine(peak, warmup, warmup + rest), wsd(peak, warmup, rest - 1, warmup + rest)):
        rates = [schedule(int32(step)).item() for step in range(warmup)]
        assert rates[0] > 0.0
        assert all(a < b for a, b in itertools.pairwise(rates))
        assert rates[-1] == pytest.approx(peak)


def test_an_optimizer_with_an_equal_schedule_runs_the_same_program() -> None:
    params = {"w": torch.ones(4)}
    step = fz.train_step(lambda p, x: (p["w"] * x).sum())
    for _ in range(2):
        optimizer = fz.adamw(fz.schedules.linear(0.1, 0.0, steps=5))
        state = fz.init(params, optimizer, fz.make_mesh("cpu"), policy="fp32")
        step(state, torch.ones(4))
    assert len(step.programs) == 1
