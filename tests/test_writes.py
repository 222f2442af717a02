"""Parameters are read: whoever writes one is stopped, and the state stays what it was, at every stage and world."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fzero as fz
from tests import world

# torch compiles its jvp rules with torch.jit.script on first use, which warns of itself.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")


class Writes(nn.Module):
    """Writes its weight in one of many ways before it uses it."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.inner = nn.Linear(16, 16, bias=False)
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        WAYS[self.way](self.inner)
        return self.inner(x)


def no_grad(m: nn.Linear) -> None:
    with torch.no_grad():
        m.weight.clamp_(max=0.01)


def index(m: nn.Linear) -> None:
    with torch.no_grad():
        m.weight[0] = 0.0


def replaced(m: nn.Linear) -> None:
    m.weight = nn.Parameter(torch.zeros(16, 16))


WAYS: dict[str, Callable[[nn.Linear], Any]] = {
    "no_grad": no_grad,
    "data": lambda m: m.weight.data.mul_(2),
    "copy": lambda m: m.weight.data.copy_(torch.zeros(16, 16)),
    "view": lambda m: m.weight.detach().view(-1)[3:].zero_(),
    "index": index,
    "init": lambda m: nn.init.zeros_(m.weight),
    "foreach": lambda m: torch._foreach_mul_([m.weight.detach()], 2.0),
    "out": lambda m: torch.zeros(16, 16, out=m.weight.detach()),
    "renorm": lambda m: F.embedding(torch.arange(4), m.weight, max_norm=0.1),
    "parameter": replaced,
}
BY_OPERATOR = [way for way in WAYS if way != "parameter"]


def written(stage: int, traced: bool, ways: list[str], by_function: bool) -> None:
    """Every way is refused, and none reaches the state."""
    x = torch.randn(4, 16)
    for way in ways:
        module = Writes(way)
        state = fz.init(module, fz.sgd(0.1), fz.make_mesh("cpu"), fz.zero(stage), policy="fp32")
        before = fz.gather(state.params)["inner"]["weight"]
        apply, _ = fz.functional(module)

        def plain(p: Any, x: Tensor, way: str = way) -> Tensor:
            holder = nn.Linear(16, 16, bias=False)
            del holder.weight
            holder.weight = p["inner"]["weight"]
            WAYS[way](holder)
            return (x @ holder.weight).sum()

        loss = plain if by_function else lambda p, x, apply=apply: apply(p, x).sum()
        gradient = fz.value_and_grad(loss)
        for call in (gradient, lambda s, x, loss=loss: fz.call(loss, s, x)):
            with pytest.raises(fz.ParameterWriteError, match=r"inner\.weight") as raised:
                (fz.jit(call) if traced else call)(state, x)
            text = str(raised.value)
            assert not way.startswith("no_grad") or "m.weight.clamp_(max=0.01)" in text
            assert by_function or way not in BY_OPERATOR or "in module 'inner'" in text or "in module Writes" in text
        assert torch.equal(fz.gather(state.params)["inner"]["weight"], before), way


@pytest.mark.parametrize(
    ("size", "stage", "traced"), [(1, 0, False), (1, 3, True), (1, 0, True), (2, 3, False), (2, 0, True), (4, 1, False)]
)
def test_a_module_that_writes_its_parameter_is_refused(size, stage, traced):
    ways = list(WAYS) if (size, stage) == (1, 0) else ["no_grad", "data", "renorm", "parameter"][: 6 - size]
    world.run(written, stage, traced, ways, False, size=size)


@pytest.mark.parametrize(("size", "stage", "traced"), [(1, 0, False), (2, 3, True)])
def test_a_function_that_writes_a_leaf_is_refused(size, stage, traced):
    world.run(written, stage, traced, BY_OPERATOR if size == 1 else ["no_grad", "data"], True, size=size)


def test_parameters_given_to_the_function_itself_are_not_written_either():
    for way in BY_OPERATOR:
        apply, params = fz.functional(Writes(way))
        before = params["inner"]["weight"].clone()
        with pytest.raises(fz.ParameterWriteError, match=r"'inner\.weight'"):
            apply(params, torch.ones(1, 16))
        assert torch.equal(params["inner"]["weight"], before)


class OtherData(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        self.weight.data = torch.zeros(16, 16)
        return super().forward(x)


def test_other_memory_for_a_parameter_is_refused():
    apply, params = fz.functional(OtherData(16, 16))
    with pytest.raises(fz.ModuleError, match="alone changes them"):
        fz.value_and_grad(lambda p: apply(p, torch.ones(1, 16)).sum())(params)
    with pytest.raises(fz.ParameterWriteError, match="in the place of its parameters weight"):
        apply(params, torch.ones(1, 16))


def test_running_statistics_may_be_buffers_and_not_parameters():
    params = {"mean": torch.zeros(4), "var": torch.ones(4)}
    state = fz.init(params, fz.sgd(0.1), fz.make_mesh("cpu"), policy="fp32")
    with pytest.raises(fz.ParameterWriteError, match=r"native_batch_norm.* writes to the parameter 'mean'"):
        fz.call(lambda p: F.batch_norm(torch.randn(8, 4), p["mean"], p["var"], training=True), state)


def test_what_the_function_made_itself_may_be_written():
    def f(p: Any, x: Tensor) -> Tensor:
        weight = p["w"].clone()
        weight[0] = 0.0
        return x.clone().mul_(2) @ weight.mul_(3)

    state = fz.init({"w": torch.ones(4)}, fz.sgd(0.1), fz.make_mesh("cpu"), fz.zero(0), policy="fp32")
    assert fz.value_and_grad(f)(state, torch.ones(4))[0] == 18
    assert fz.jit(fz.value_and_grad(f))(state, torch.ones(4))[0] == 18


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("make", [nn.Embedding, nn.EmbeddingBag])
def test_a_sparse_embedding_is_refused_under_a_gradient_alone(make, traced):
    module = nn.Sequential(make(64, 16, sparse=True))
    apply, params = fz.functional(module)
    tokens = torch.arange(8).view(2, 4)
    assert torch.equal(apply(params, tokens), module(tokens))
    state = fz.init(module, fz.sgd(0.1), fz.make_mesh("cpu"), policy="fp32")
    gradient = fz.value_and_grad(lambda p, x: apply(p, x).sum())
    with pytest.raises(fz.ModuleError, match=r"sparse gradient, at(.|\n)*in module '0' \(Emb") as info:
        (fz.jit(gradient) if traced else gradient)(state, tokens)
    assert __file__ in str(info.value)
