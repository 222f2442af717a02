"""The pass `hoist`: leaves that stay gathered are gathered once for all micro-batches."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fzero as fz
from fzero.marks import marks_of
from fzero.program.graph.collectives import GATHERS
from fzero.program.graph.trace import Trace
from tests import world
from tests.small import assert_same_bits, copied

WIDTH = 32
LEAVES = ("0.weight", "2.weight")


def make_model() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False), nn.Tanh(), nn.Linear(WIDTH, WIDTH, bias=False))


APPLY, _ = fz.functional(make_model)


def new_state(mesh: fz.Mesh, stage: int, policy: str) -> fz.State:
    return fz.init(make_model, fz.adamw(1e-2), mesh, fz.zero(stage), policy=policy)


def loss_fn(params: Any, x: Tensor) -> Tensor:
    return APPLY(params, x.to(params["0"]["weight"].dtype)).float().square().mean()


def gathers(trace: Trace) -> list[str]:
    """The leaves that a graph gathers for the function to see, each call's leaves one by one."""
    nodes = [node for node in trace.module.graph.nodes if node.target in GATHERS]
    marks = [marks_of(node) for node in nodes]
    return sorted(leaf for m in marks if m.role == "gather" for leaf in str(m.leaf).split(", "))


def program(stage: int, policy: str, **options: Any) -> Trace:
    mesh = fz.make_mesh("cpu", data=4, simulate=True)
    step = fz.train_step(loss_fn, microbatches=3, **options)
    return step.trace(new_state(mesh, stage, policy), torch.zeros(6, WIDTH)).trace


@pytest.mark.parametrize(
    ("stage", "policy", "options", "outside", "inside"),
    [
        (3, "bf16", {"keep_gathered": math.inf}, LEAVES, ()),
        (3, "bf16", {}, (), (*LEAVES, "2.weight")),  # the gradient of the first layer reads no weight of it
        (3, "mixed", {"keep_gathered": 2 * WIDTH * WIDTH}, ("2.weight",), ("0.weight",)),
        (1, "mixed", {}, LEAVES, ()),
        (1, "bf16", {}, (), ()),  # whole already
        (0, "fp32", {}, (), ()),
    ],
)
def test_what_is_kept_is_gathered_in_front_of_the_loop(
    stage: int, policy: str, options: dict[str, Any], outside: tuple[str, ...], inside: tuple[str, ...]
) -> None:
    trace = program(stage, policy, **options)
    (body,) = trace.bodies.values()
    assert gathers(trace) == sorted(outside)
    assert gathers(body) == sorted(inside)
    assert len(body.inputs) == len(body.module.graph.find_nodes(op="placeholder"))


def steps_equal(stage: int, policy: str, keep: float) -> None:
    mesh = fz.make_mesh("cpu")
    state = new_state(mesh, stage, policy)
    x = torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(mesh.index("data")))
    step = fz.train_step(loss_fn, microbatches=3, keep_gathered=keep)
    eager = copied(state)
    for _ in range(2):
        state, metrics = step(state, x)
        eager, expected = step.f(eager, x)
        assert_same_bits((state, metrics), (eager, expected))


@pytest.mark.parametrize(
    ("stage", "policy", "keep"),
    [
        (3, "bf16", math.inf),
        (3, "mixed", 2 * WIDTH * WIDTH),
        (1, "mixed", 0),
        pytest.param(3, "bf16", 0, marks=pytest.mark.slow),
        pytest.param(3, "bf16", 2 * WIDTH * WIDTH, marks=pytest.mark.slow),
        pytest.param(3, "mixed", math.inf, marks=pytest.mark.slow),
    ],
)
def test_results_are_those_of_the_eager_step(stage: int, policy: str, keep: float) -> None:
    world.run(steps_equal, stage, policy, keep, size=2)
