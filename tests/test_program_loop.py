"""Loops over micro-batches: what is summed, stacked or the same, eager and as one node of a graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fzero as fz
from fzero.program.graph.loop import part_of, run_loop
from fzero.program.lower.python import lower_graph
from fzero.program.options import Options
from fzero.program.pipeline import run_passes
from tests.programs import nodes
from tests.small import assert_same_bits, copied
from tests.test_program_trace import traced


def test_a_loop_sums_stacks_and_keeps_the_last() -> None:
    seen: list[list[Tensor]] = []

    def body(inputs: list[Tensor]) -> list[Tensor]:
        total, index, weight, part = inputs
        seen.append(list(inputs))
        inputs.clear()
        return [part * weight, total + part.sum(), index * 10]

    batch = torch.arange(6.0).view(6, 1)
    found = run_loop(
        body,
        ("stack", "sum", "same"),
        torch.arange(3, dtype=torch.int32),
        [torch.zeros(())],
        [torch.tensor(2.0)],
        [batch],
    )
    assert_same_bits(found, [batch * 2, batch.sum(), torch.tensor(20, dtype=torch.int32)])
    assert [round_[1].item() for round_ in seen] == [0, 1, 2]
    assert [round_[0].item() for round_ in seen] == [0.0, 1.0, 6.0], "each round is given the sum so far"
    assert all(round_[2].item() == 2.0 for round_ in seen)


def test_results_stand_in_the_order_of_their_kinds() -> None:
    kinds: list[Any] = ["same", "sum", "stack", "sum", "same", "stack"]

    def body(inputs: list[Tensor]) -> list[Tensor]:
        first, second, _, part = inputs
        return [part, first + 1, part + 1, second + 2, part * 2, part - 1]

    index, batch = torch.arange(2, dtype=torch.int32), torch.tensor([1.0, 2.0])
    found = run_loop(body, kinds, index, [torch.zeros(1), torch.zeros(1)], [], [batch])
    last = batch[1:]
    assert_same_bits(found, [last, torch.tensor([2.0]), batch + 1, torch.tensor([4.0]), last * 2, batch - 1])


def test_parts_are_views_of_equal_size() -> None:
    x = torch.arange(12).view(6, 2)
    parts = [part_of(x, i, 3) for i in range(3)]
    assert torch.equal(torch.cat(parts), x)
    assert {part.untyped_storage().data_ptr() for part in parts} == {x.untyped_storage().data_ptr()}


def loss(w: Tensor, x: Tensor) -> Any:
    y = torch.tanh(x @ w)
    return y.square().sum(), {"rows": y, "most": y.max()}


@pytest.mark.parametrize("n", [1, 2, 4])
def test_a_loop_in_a_graph_has_the_bits_of_the_eager_one(n: int) -> None:
    f = fz.accumulate(fz.value_and_grad(loss, has_aux=True), n)
    torch.manual_seed(0)
    w, x = torch.randn(3, 3), torch.randn(8, 3)
    trace, _ = run_passes(traced(f, w, x), Options())
    loops = [node for node in trace.module.graph.nodes if node.target is run_loop]
    assert len(loops) == 1
    assert sum(str(node.target) == "aten.tanh.default" for node in nodes(trace)) == 1, "the body is traced once"
    expected = fz.tree.leaves(f(w, x))
    inputs = [w, x]
    found = lower_graph(trace.module, trace.bodies)(copied(inputs))
    assert trace.output is not None
    assert_same_bits(fz.tree.leaves(trace.output.fill(found)), expected)


def test_sums_are_added_in_place() -> None:
    f = fz.accumulate(fz.value_and_grad(loss, has_aux=True), 4)
    trace, _ = run_passes(traced(f, torch.zeros(3, 3), torch.zeros(8, 3)), Options())
    (body,) = trace.bodies.values()
    sums = {n for n in body.module.graph.find_nodes(op="placeholder") if n.name.startswith("sum_")}
    added = {n.args[0] for n in body.module.graph.nodes if str(n.target) == "aten.add_.Tensor"}
    assert len(sums) == 3, "the loss, the largest, and the gradient"
    assert sums <= added


def test_what_is_given_is_not_overwritten() -> None:
    f = fz.jit(fz.accumulate(fz.value_and_grad(loss, has_aux=True), 2))
    w, x = torch.randn(3, 3), torch.randn(8, 3)
    before = copied((w, x))
    first, second = f(w, x), f(w, x)
    assert_same_bits((w, x), before)
    assert_same_bits(first, second)
