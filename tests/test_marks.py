"""Marks: what the nodes of a trace are for."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.fx import traceback

import fzero as fz
from fzero.marks import Marks, blocks_marked, blocks_of, line_of, mark, marks_of
from fzero.program.graph.collectives import GATHERS, ISSUES
from fzero.program.graph.trace import Trace
from tests.programs import DEPTH, nodes, raw, simulated, tokens, training
from tests.test_program_trace import traced


def named(trace: Trace, name: str) -> fx.Node:
    return next(n for n in nodes(trace) if n.name == name)


def test_operations_keep_the_marks_that_stand_around_them() -> None:
    def f(x: Tensor) -> Tensor:
        y = x.exp()
        with mark(role="gather", leaf="w"):
            y = y.sin()
            with mark(leaf="v", axis="data"):
                y = y.cos()
            y = y.tanh()
        return y.neg()

    trace = traced(f, torch.ones(3))
    assert {n.name: marks_of(n).replace(line=None) for n in nodes(trace)} == {
        "exp": Marks(),
        "sin": Marks(role="gather", leaf="w"),
        "cos": Marks(role="gather", leaf="v", axis="data"),
        "tanh": Marks(role="gather", leaf="w"),
        "neg": Marks(),
    }


def test_what_others_annotate_stays() -> None:
    def f(x: Tensor) -> Tensor:
        with traceback.annotate({"theirs": 1}), mark(role="gather"):
            return x.exp()

    (node,) = nodes(traced(f, torch.ones(3)))
    assert node.meta["custom"]["theirs"] == 1
    assert marks_of(node).role == "gather"


def test_outside_of_a_trace_nothing_is_marked() -> None:
    before = dict(traceback.current_meta)
    assert mark(leaf="a") is mark(leaf="b"), "nothing is made for it"
    with mark(role="gather"):
        assert traceback.current_meta == before
    block = nn.Sequential(nn.Linear(2, 2))
    with blocks_marked(block):
        assert not block[0]._forward_hooks
        assert not block[0]._forward_pre_hooks
        block(torch.ones(1, 2))
    assert traceback.current_meta == before


def test_hooks_are_gone_after_a_trace_also_where_it_raised() -> None:
    class Fails(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(2, 2)])

        def forward(self, x: Tensor) -> Tensor:
            self.layers[0](x)
            raise RuntimeError("half-way")

    model = Fails()

    def f(x: Tensor) -> Tensor:
        with blocks_marked(model):
            return model(x)

    before = dict(traceback.current_meta)
    with pytest.raises(RuntimeError, match="half-way"):
        traced(f, torch.ones(1, 2))
    assert not model.layers[0]._forward_hooks
    assert not model.layers[0]._forward_pre_hooks
    assert traceback.current_meta == before


def test_the_line_of_the_users_code_is_kept() -> None:
    def f(x: Tensor) -> Tensor:
        return torch.nn.functional.gelu(x) + 1

    trace = traced(f, torch.ones(3))
    for name in ("gelu", "add"):
        found = line_of(named(trace, name))
        assert found is not None
        file, line, function = found
        assert (file, line) == (__file__, f.__code__.co_firstlineno + 1)
        assert function.endswith("f")


# ---------------------------------------------------------------------------------------------------------
# A training step


@pytest.mark.parametrize("microbatches", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_step_is_marked(microbatches: int) -> None:
    state, step = training(simulated(2), 3, policy="bf16", microbatches=microbatches)
    found = nodes(raw(step, state, tokens()))
    marks = [marks_of(n) for n in found]
    cut = {path for path, spec in zip(state.params.paths, state.params.placement.specs, strict=True) if spec.cut}
    by_role = {
        role: {m.leaf for m in marks if m.role == role and m.leaf is not None}
        for role in ("gather", "reduce", "update")
    }
    assert by_role["gather"] == by_role["reduce"] == by_role["update"] == set(state.params.paths)
    gathers = [marks_of(n) for n in found if n.target in GATHERS and marks_of(n).role == "gather"]
    assert Counter(m.leaf for m in gathers) == dict.fromkeys(cut, 1), "the others are whole: a view is all it takes"
    assert all(m.again and m.axis == "data" and m.phase is None for m in gathers)
    assert all(marks_of(n).axis == "data" for n in found if n.target in ISSUES)
    assert all(m.phase == "backward" for m in marks if m.role == "reduce")
    assert all(m.phase is None for m in marks if m.role == "update")
    assert {m.block for m in marks if m.block is not None} == {f"blocks.{i}" for i in range(DEPTH)}


def test_below_stage_3_nothing_is_gathered_again() -> None:
    """At stage 3 all may be, as above."""
    state, step = training(simulated(2), 1, policy="mixed")
    found = [marks_of(n) for n in nodes(raw(step, state, tokens())) if n.target in GATHERS]
    assert {m.again for m in found if m.role == "gather"} == {False}


def blocks_in(model: nn.Module, x: Tensor) -> dict[str, list[str]]:
    """The operations of a model's forward by block."""
    apply, params = fz.functional(model)
    found: dict[str, list[str]] = {}
    for n in nodes(traced(apply, params, x)):
        if (block := marks_of(n).block) is not None:
            found.setdefault(block, []).append(str(n.target).split(".")[1])
    return found


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(2, 2)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(2, 2), nn.Tanh()) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).exp()
        for layer in self.layers:
            x = layer(x).sin()
        return x


def test_what_runs_in_a_block_is_marked_with_its_name() -> None:
    linear = ["t", "addmm"]
    assert blocks_in(Layers(), torch.ones(1, 2)) == {name: [*linear, "tanh"] for name in ("layers.0", "layers.1")}
    sequential = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2))
    assert blocks_in(sequential, torch.ones(1, 2)) == {"0": linear, "2": linear}
    assert blocks_in(nn.Linear(2, 2), torch.ones(1, 2)) == {}


def test_a_backward_is_marked_and_its_forward_is_not() -> None:
    apply, params = fz.functional(Layers())

    def f(params: Any, x: Tensor) -> Any:
        return fz.value_and_grad(lambda p: apply(p, x).sum())(params)

    marks = {n.name: marks_of(n) for n in nodes(traced(f, params, torch.ones(1, 2)))}
    assert marks["tanh"].phase is None
    assert marks["tanh_backward"].phase == "backward"
    assert marks["tanh_backward"].block is None


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        shared = nn.Linear(2, 2)
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList([shared, nn.Sequential(nn.Linear(2, 2)), nn.Tanh()])})
        self.decoder = nn.Sequential(nn.Linear(2, 2), shared)


def test_blocks_are_what_the_outermost_lists_hold() -> None:
    assert [name for name, _ in blocks_of(Nested())] == ["encoder.layers.0", "encoder.layers.1", "decoder.0"]
    assert blocks_of(nn.Linear(2, 2)) == []
    assert [name for name, _ in blocks_of(nn.Sequential(nn.Sequential(nn.Linear(2, 2))))] == ["0"]
