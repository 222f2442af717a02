"""`inline`: a trace inside another, with its marks, its lines, and its loops as loops."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import fzero as fz
from fzero.marks import line_of, marks_of
from fzero.program.graph.loop import run_loop


def squared(w: Tensor, x: Tensor) -> Tensor:
    return torch.tanh(w * x)


def test_nodes_keep_the_lines_and_phases_of_the_inner_trace() -> None:
    forward, backward = fz.split_vjp(squared)

    def step(w: Tensor, x: Tensor) -> Any:
        out, residuals = forward(w, x)
        return backward(residuals, torch.ones_like(out))

    nodes = {str(n.target): n for n in fz.trace(step)(torch.ones(3), torch.ones(3)).trace.module.graph.nodes}
    line = squared.__code__.co_firstlineno + 1
    assert line_of(nodes["aten.tanh.default"]) == (__file__, line, "squared")
    assert marks_of(nodes["aten.tanh.default"]).phase is None
    assert marks_of(nodes["aten.tanh_backward.default"]).phase == "backward"


def test_a_loop_stays_one_node() -> None:
    gradient = fz.accumulate(fz.value_and_grad(lambda w, x: (w * x).square().mean()), 4)

    def inner(w: Tensor, x: Tensor) -> Tensor:
        value: Tensor = gradient(w, x)[0]
        return value

    forward, _ = fz.split_vjp(lambda v, w, x: v * inner(w.detach(), x.detach()))
    v, w, x = torch.tensor(2.0), torch.tensor(3.0), torch.arange(8.0)
    jitted = fz.jit(lambda v, w, x: forward(v, w, x)[0])
    assert torch.equal(jitted(v, w, x), v * inner(w, x))
    (program,) = jitted.programs
    assert program.flops() >= 0
    loops = [n for n in program.trace.module.graph.nodes if n.target is run_loop]
    assert len(loops) <= 1
