"""An error out of a program names the operation that failed, and what it was for."""

from __future__ import annotations

import time
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, fx, nn

import fzero as fz
from fzero.marks import Marks, set_marks
from fzero.program.failure import described, failed_node
from fzero.program.program import Program
from tests import world

A = torch.arange(6.0)


@pytest.fixture(autouse=True)
def fresh_group_afterwards():
    yield
    world.fresh()


def described_in(program: fz.Program) -> list[str]:
    traces = [program.trace, *program.trace.bodies.values()]
    nodes = [node for trace in traces for node in trace.module.graph.nodes if node.op == "call_function"]
    return [described(node) for node in nodes]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).relu()
        return x


def program_of(**options: Any) -> fz.Program:
    apply, params = fz.functional(Model())
    state = fz.init(params, fz.sgd(0.1), fz.make_mesh("cpu", data=4, simulate=True), fz.zero(3), policy="fp32")
    return fz.trace(fz.train_step(lambda p, x: apply(p, x).sum(), **options))(state, torch.ones(4, 32))


@pytest.mark.parametrize("microbatches", [1, 2])
def test_a_collective_is_described_by_its_leaf_and_phase(microbatches: int) -> None:
    found = described_in(program_of(microbatches=microbatches, bucket=0))
    assert "all_gather of leaf 'layers.1.weight'" in found
    assert "reduce_scatter of leaf 'layers.1.weight' (backward)" in found


def node_with(target: Any, **marks: Any) -> fx.Node:
    node = fx.Graph().call_function(target)
    set_marks(node, Marks(**marks))
    return node


GATHER = torch.ops._c10d_functional.all_gather_into_tensor
MARKED: dict[str, dict[str, Any]] = {
    "all_gather of leaf 'w' (backward, block 'layers.0')": {"leaf": "w", "phase": "backward", "block": "layers.0"},
    "all_gather of leaf 'w' (block 'layers.0')": {"leaf": "w", "block": "layers.0"},
    "all_gather of leaves 'a', 'b'": {"leaf": "a,b"},
    "all_gather of leaves 'a', 'b', 'c' and 2 more": {"leaf": "a, b, c, d, e"},
    "all_gather (node all_gather_into_tensor) (backward)": {"phase": "backward"},
}


@pytest.mark.parametrize(("text", "marks"), MARKED.items(), ids=MARKED.keys())
def test_marks_are_told(text: str, marks: dict[str, str]) -> None:
    assert described(node_with(GATHER.default, **marks)) == text.replace("tensor)", "tensor_default)")


def test_a_collective_of_several_tensors_has_the_name_of_one() -> None:
    coalesced = node_with(torch.ops._c10d_functional.all_gather_into_tensor_coalesced.default, leaf="w")
    assert described(coalesced) == "all_gather of leaf 'w'"


def test_what_has_no_marks_is_described_by_its_node() -> None:
    program = fz.trace(lambda x: x.exp())(A)
    assert described_in(program)[0] == "exp (node exp)"


def out_of_range(x: Tensor, index: Tensor) -> Tensor:
    y = x.sin()
    z = y[index]
    return z.cos()


def test_the_operation_that_raised_is_found_by_its_line() -> None:
    program = fz.trace(out_of_range)(A, torch.tensor([0, 1]))
    with pytest.raises(IndexError) as info:
        program([A, torch.tensor([0, 17])])
    node = failed_node(info.value)
    assert node is not None and node.target is torch.ops.aten.index.Tensor
    assert info.value.waiting_in == "index (node index)"  # type: ignore[attr-defined]


def test_an_operation_in_a_loop_body_is_found() -> None:
    step = fz.accumulate(fz.value_and_grad(lambda w, i: w[i].sum()), 2)
    program = fz.trace(step)(A, torch.tensor([[0], [1]]))
    with pytest.raises(IndexError) as info:
        program([A, torch.tensor([[0], [17]])])
    node = failed_node(info.value)
    assert node is not None and node.target is torch.ops.aten.index.Tensor


def test_an_error_from_elsewhere_has_no_place() -> None:
    assert failed_node(ValueError("never raised")) is None


def is_late() -> str:
    """Rank 1 comes to the third call, which both have a program for, and stops before it has sent anything."""
    mesh = fz.make_mesh("cpu", deadline=1.5)
    apply, params = fz.functional(Model())
    state = fz.init(params, fz.sgd(0.1), mesh, fz.zero(3), policy="fp32")
    step = fz.train_step(lambda p, x: apply(p, x).sum(), bucket=0)
    for _ in range(2):
        state, _ = step(state, torch.ones(4, 32))
    if dist.get_rank() == 1:
        with patch.object(Program, "__call__", lambda *_: time.sleep(4.0)):
            step(state, torch.ones(4, 32))
        return "late"
    with pytest.raises(fz.PeerError) as info:
        step(state, torch.ones(4, 32))
    return str(info.value)


def test_a_rank_says_what_it_waited_for_and_in_which_call() -> None:
    message, _ = world.run(is_late, size=2)
    assert "train_step(<lambda>) (call 3): rank 0 waited in all_gather of leaf 'layers." in message, message
    assert "no other rank left an error" in message
