"""Errors that come through a module: they name its path and class, the line, and the way out."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fzero as fz

# torch.compile warns of the transform around it before it fails.
pytestmark = pytest.mark.filterwarnings("ignore")


class Inner(nn.Module):
    def __init__(self, f: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
        self.f = f

    def forward(self, x: Tensor) -> Tensor:
        return self.f(x * self.weight)


class Network(nn.Module):
    def __init__(self, f: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Sequential(Inner(f))])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class OldStyle(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, bar: Tensor) -> Tensor:
        return bar * 2


@torch.library.custom_op("fzero_tests::opaque", mutates_args=())
def opaque(x: Tensor) -> Tensor:
    return x.clone()


def branch(x: Tensor) -> Tensor:
    return x if x.sum() > 0 else -x  # the line


X = torch.ones(2, 4)
PLACE = r"in module 'layers\.1\.0' \(Inner\)\n"


def gradient(f: Callable[[Tensor], Any]) -> tuple[Any, Any]:
    apply, params = fz.functional(Network(f))
    return fz.grad(lambda p: apply(p, X).sum()), params


@pytest.mark.parametrize(
    ("name", "f"),
    {
        "if": branch,
        "item": lambda x: x * x.sum().item(),
        "mask": lambda x: x[x > 0].sum(),
    }.items(),
)
def test_a_value_that_a_trace_does_not_have(name: str, f: Callable[[Tensor], Any]):
    g, params = gradient(f)
    with pytest.raises(fz.TraceError, match=PLACE) as info:
        fz.jit(g)(params)
    assert __file__ in str(info.value)
    if f is branch:
        assert "return x if x.sum() > 0 else -x  # the line" in str(info.value)


EITHER: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "numpy": (lambda x: x + torch.from_numpy(x.numpy()), "no memory to look into"),
    "data_ptr": (lambda x: x + x.data_ptr(), "no memory to look into"),
    "an old autograd.Function": (OldStyle.apply, "setup_context and call"),
    "an operator": (lambda x: opaque(x), r"fz\.AttentionKernel"),
    "a checkpoint": (lambda x: checkpoint(torch.sin, x, use_reentrant=False), r"fz\.remat"),
    "an old checkpoint": (lambda x: checkpoint(torch.sin, x, use_reentrant=True), r"fz\.remat"),
    "requires_grad_": (lambda x: x.requires_grad_(), r"activation_checkpointing_disable"),
    "backward": (lambda x: (x.sum().backward(), x)[1], r"or fz\.grad, which nest"),
}


@pytest.mark.parametrize(("f", "advice"), EITHER.values(), ids=EITHER)
@pytest.mark.parametrize("traced", [False, True])
def test_what_cannot_be_part_of_a_function(f: Callable[[Tensor], Any], advice: str, traced: bool):
    g, params = gradient(f)
    with pytest.raises(fz.ModuleError, match=advice) as info:
        (fz.jit(g) if traced else g)(params)
    assert __file__ in str(info.value)
    assert re.search(PLACE, f"{info.value}\n")


def test_compiled_parts_run_as_they_are_and_are_refused_by_a_trace():
    g, params = gradient(torch.compile(torch.sin, backend="eager"))
    plain, _ = gradient(torch.sin)
    torch.testing.assert_close(g(params), plain(params))
    with pytest.raises(fz.ModuleError, match=rf"{PLACE}.*without torch\.compile"):
        fz.jit(g)(params)


def test_an_operator_without_shapes_is_refused_by_a_trace_alone():
    apply, params = fz.functional(Network(lambda x: opaque(x)))
    assert apply(params, X).shape == X.shape
    with pytest.raises(fz.ModuleError, match=f"{PLACE}.*register_fake"):
        fz.jit(apply)(params, X)


def test_a_function_without_a_module_is_helped_too():
    with pytest.raises(fz.ModuleError, match=r"fz\.jit: (.|\n)*no memory to look into"):
        fz.jit(lambda x: torch.from_numpy(x.numpy()))(X)


def test_errors_of_the_module_itself_pass_as_they_are_with_a_note():
    apply, params = fz.functional(Network(lambda x: {"weight": x}["key"]))
    with pytest.raises(KeyError, match="key") as info:
        apply(params, X)
    assert info.value.__notes__ == ["in module 'layers.1.0' (Inner)"]
    root, params = fz.functional(Inner(lambda x: x @ torch.ones(3)))
    with pytest.raises(RuntimeError, match="size mismatch") as failed:
        root(params, X)
    assert failed.value.__notes__ == ["in module Inner"]


def test_draws_without_a_key_are_refused_at_their_line():
    g, params = gradient(lambda x: x * torch.rand(4))
    with pytest.raises(fz.RandomOpError, match=rf"random generator, at {__file__}:\d+ in .*<lambda>"):
        fz.jit(g)(params)


def classes(p: Any, x: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(x @ p, labels)


def picked(p: Any, x: Tensor, index: Tensor) -> Tensor:
    return (x @ p).gather(1, index[:, None]).sum()


ROWS, WEIGHT = torch.ones(2, 4), torch.ones(4, 3)
META = torch.ones(2, 4, device="meta")
INTEGERS, VALUES = r"labels\.long\(\)", r"fz\.init makes values"
# A function, a batch that is wrong, and the way out.
BATCHES: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...], str]] = {
    "float labels": (classes, (ROWS, torch.ones(2)), INTEGERS),
    "float index": (picked, (ROWS, torch.ones(2)), INTEGERS),
    "meta input": (classes, (META, torch.ones(2, dtype=torch.int64)), VALUES),
}


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("name", BATCHES)
def test_a_wrong_batch_is_told_with_the_line_and_what_to_do(name: str, traced: bool) -> None:
    f, batch, way_out = BATCHES[name]
    gradient_ = fz.value_and_grad(f)
    with pytest.raises(fz.ModuleError, match=way_out) as info:
        (fz.jit(gradient_) if traced else gradient_)(WEIGHT, *batch)
    assert __file__ in str(info.value) and f"in {f.__name__}" in str(info.value)


@pytest.mark.parametrize("traced", [False, True])
def test_shapes_of_a_factory_are_no_parameters_to_call_with(traced: bool) -> None:
    apply, params = fz.functional(lambda: nn.Linear(4, 2))
    with pytest.raises(fz.ModuleError, match=f"in module Linear\n.*{VALUES}"):
        (fz.jit(apply) if traced else apply)(params, ROWS)
    assert fz.trace(apply)(params, META).flops() == 2 * 2 * 4 * 2


def test_any_other_error_of_a_trace_notes_the_line() -> None:
    with pytest.raises(RuntimeError) as info:
        fz.jit(classes)(WEIGHT, ROWS[:, :3], torch.ones(2, dtype=torch.int64))
    (note,) = info.value.__notes__
    assert __file__ in note and "in classes" in note
