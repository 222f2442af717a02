"""The pass `dead`: what nobody uses goes, collectives included, and what writes memory stays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fzero as fz
from fzero.program.options import Options
from fzero.program.passes.dead import dead
from fzero.program.pipeline import applied
from fzero.ranks.collectives import all_gather, all_reduce
from tests.small import assert_same_bits
from tests.test_program_trace import run, targets, traced

A, B = torch.arange(6.0), torch.ones(6)
MESH = fz.make_mesh("cpu", data=2, simulate=True)


def with_unused(x: Tensor, y: Tensor) -> Tensor:
    chain = (x * y).exp().sin()
    chain.sum()
    return x + y


def with_unused_collectives(x: Tensor, y: Tensor) -> Tensor:
    all_reduce(x, MESH, "data")
    all_gather(x.exp(), MESH, "data").sum()
    return x + y


def with_a_write(x: Tensor, y: Tensor) -> Tensor:
    x.add_(y)
    return y * 2


def with_a_write_through_a_view(x: Tensor, y: Tensor) -> Tensor:
    x[2:4].copy_(y[2:4].exp())
    return y * 2


CASES: dict[str, tuple[Callable[..., Any], list[str]]] = {
    "unused chains": (with_unused, ["aten.add.Tensor"]),
    "unused collectives and their waits": (with_unused_collectives, ["aten.add.Tensor"]),
    "a write": (with_a_write, ["aten.add_.Tensor", "aten.mul.Tensor"]),
    "a write through a view": (
        with_a_write_through_a_view,
        ["aten.slice.Tensor", "aten.slice.Tensor", "aten.exp.default", "aten.copy_.default", "aten.mul.Tensor"],
    ),
    "nothing is dead": (lambda x, y: (x + y) * x, ["aten.add.Tensor", "aten.mul.Tensor"]),
    "all is dead": (lambda x, y: [None, x + y][0], []),
}
every_case = pytest.mark.parametrize(("f", "left"), CASES.values(), ids=CASES.keys())


@every_case
def test_what_is_used_or_writes_is_left(f: Callable[..., Any], left: list[str]) -> None:
    assert sorted(targets(dead(traced(f, A, B), Options()).module)) == sorted(left)


@every_case
def test_values_and_inputs_are_those_of_the_function(f: Callable[..., Any], left: list[str]) -> None:
    trace = dead(traced(f, A, B), Options())
    assert trace.inputs == ("0", "1")
    if f is not with_unused_collectives:
        x, x_eager = A.clone(), A.clone()
        assert_same_bits((run(trace, x, B), x), (f(x_eager, B), x_eager))


@every_case
def test_the_pass_is_pure_and_deterministic(f: Callable[..., Any], left: list[str]) -> None:
    trace = traced(f, A, B)
    before = str(trace.module.graph)
    once, again = dead(trace, Options()), dead(trace, Options())
    assert str(trace.module.graph) == before
    assert once.module is not trace.module
    assert str(once.module.graph) == str(again.module.graph)
    assert targets(dead(once, Options()).module) == targets(once.module), "twice is once"


def test_bodies_of_loops_are_swept_too() -> None:
    def loss(w: Tensor, x: Tensor) -> Tensor:
        all_reduce(w, MESH, "data")
        return (w * x).sum()

    trace = traced(fz.accumulate(fz.value_and_grad(loss), 2), A[:3], A.view(2, 3))
    (body,) = trace.bodies.values()
    assert any("all_gather" in target for target in targets(body.module))
    (swept,) = applied(dead, trace, Options()).bodies.values()
    assert not any("c10d" in target for target in targets(swept.module))
    assert any("all_gather" in target for target in targets(body.module)), "and the original was left alone"
