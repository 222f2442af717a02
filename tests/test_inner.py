"""Gradients taken inside of a function that is differentiated: right, or refused with the way out; never zero."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import functional

import fzero as fz
from tests.small import assert_same_bits

W = torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
X = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))


def height(w: Tensor) -> Tensor:
    return torch.tanh(X @ w).sum()


def penalty(gradient: Callable[[Tensor], Any]) -> Callable[[Tensor], Tensor]:
    return lambda w: height(w) + gradient(w).square().sum()


def by_autograd(w: Tensor, **options: Any) -> Tensor:
    return torch.autograd.grad(height(w), w, **options)[0]


def of_a_list(w: Tensor) -> Tensor:
    return torch.autograd.grad([height(w)], [w], [torch.tensor(1.0)], create_graph=True)[0]


RIGHT: dict[str, Callable[[Tensor], Any]] = {
    "torch.func.grad": torch.func.grad(height),
    "fz.grad": fz.grad(height),
    "fz.vjp": lambda w: fz.vjp(height, w)[1](torch.tensor(1.0))[0],
    "jacrev": torch.func.jacrev(height),
    "create_graph": lambda w: by_autograd(w, create_graph=True),
    "create_graph of a list": of_a_list,
    "jacobian": lambda w: functional.jacobian(height, w, create_graph=True),
    "autograd's vjp": lambda w: functional.vjp(height, w, create_graph=True)[1],
}


@pytest.mark.parametrize("transform", [lambda f: f, fz.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("gradient", RIGHT.values(), ids=RIGHT)
def test_a_gradient_inside_is_differentiated(gradient: Callable[[Tensor], Any], transform: Callable[..., Any]):
    w = W.double().requires_grad_()
    inside = torch.autograd.grad(torch.tanh(X.double() @ w).sum(), w, create_graph=True)[0]
    expected = torch.autograd.grad(torch.tanh(X.double() @ w).sum() + inside.square().sum(), w)[0]
    torch.testing.assert_close(transform(fz.grad(penalty(gradient)))(W).double(), expected, rtol=1e-4, atol=1e-4)


def by_backward(w: Tensor) -> Tensor:
    height(w).backward()
    assert w.grad is not None
    return w.grad


X_TRACKED = X.clone().requires_grad_()

REFUSED: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "grad": (by_autograd, "fz.vjp: torch.autograd.grad without create_graph.*torch.func.grad"),
    "grad that keeps the graph": (lambda w: by_autograd(w, retain_graph=True), "torch.func.grad"),
    "grad of a list": (lambda w: torch.autograd.grad([height(w)], [w])[0], "torch.func.grad"),
    "grad of what is closed over": (
        lambda w: torch.autograd.grad((X_TRACKED @ w).sum(), X_TRACKED, create_graph=True, materialize_grads=True)[0],
        "does not differentiate by.*torch.func.grad",
    ),
    "backward": (by_backward, "fz.vjp: backward.*torch.func.grad"),
    "torch.autograd.backward": (lambda w: torch.autograd.backward([height(w)]), r"backward\(\).*grad"),
    "jacobian": (lambda w: functional.jacobian(height, w), "torch.autograd.functional"),
    "hvp": (lambda w: functional.hvp(height, w, torch.ones(3, 2), create_graph=True)[1], "torch.autograd.functional"),
    "requires_grad_": (lambda w: X.clone().requires_grad_(), "functorch transforms"),
}


@pytest.mark.parametrize("transform", [lambda f: f, fz.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("gradient, message", REFUSED.values(), ids=REFUSED)
def test_a_gradient_that_would_be_lost_is_refused(
    gradient: Callable[[Tensor], Any], message: str, transform: Callable[..., Any]
):
    with pytest.raises(RuntimeError, match=message):
        transform(fz.grad(penalty(gradient)))(W)


@pytest.mark.parametrize(
    "around",
    [
        lambda f: fz.vjp(f, W),
        lambda f: fz.value_and_grad(f)(fz.init({"w": W}, fz.sgd(0.1), policy="fp32")),
        lambda f: fz.split_vjp(f)[0](W),
        lambda f: fz.grad(fz.remat(f))(W),
        lambda f: fz.accumulate(fz.value_and_grad(lambda w, x: f(w)), 2)(W, X),
    ],
    ids=["vjp", "state", "split", "remat", "accumulate"],
)
def test_every_gradient_refuses_it(around: Callable[[Any], Any]):
    def f(w: Any) -> Tensor:
        return penalty(by_autograd)(w["w"] if isinstance(w, dict) else w)

    with pytest.raises(RuntimeError, match=r"create_graph=True|does not require grad"):
        around(f)


def test_a_constant_that_is_meant_is_one():
    def f(w: Tensor) -> Tensor:
        y = height(w)
        with torch.no_grad():
            direction = torch.autograd.grad(y, w, retain_graph=True)[0]
        return (direction * w).sum()

    gradient = fz.grad(f)(W)
    torch.testing.assert_close(gradient, fz.grad(height)(W))
    assert_same_bits(fz.jit(fz.grad(f))(W), gradient)


def test_outside_of_a_gradient_autograd_is_left_alone():
    w = W.clone().requires_grad_()
    height(w).backward()
    assert w.grad is not None
    torch.testing.assert_close(by_autograd(w), w.grad)
