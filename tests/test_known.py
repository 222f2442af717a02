"""What a trace knows: values that no input decides may be asked for, all others stay refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fzero as fz
from fzero.modules.known import answering, is_known
from tests.small import assert_same_bits

X = torch.tensor([1.0, -2.0, 3.0])


def asked(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The function, with its questions answered as they are inside `fz.functional`."""

    def run(x: Tensor) -> Tensor:
        with answering():
            return f(x)

    return run


def written(x: Tensor) -> Tensor:
    base = torch.zeros(3)
    base[0] = x[0]
    return x * base.sum().item()


def written_by_a_view(x: Tensor) -> Tensor:
    base = torch.zeros(3)
    base.view(3, 1)[1:].copy_(x[1:, None])
    return x * base.sum().item()


def filled(x: Tensor) -> Tensor:
    return x * torch.zeros(3).fill_(2.0).sum().item()


KNOWN: dict[str, Callable[[Tensor], Tensor]] = {
    "item": lambda x: x * torch.arange(4).sum().item(),
    "bool": lambda x: x if (torch.arange(3).diff() == 1).all() else -x,
    "of a shape": lambda x: x * torch.full(x.shape, 2).sum().item(),
    "int": lambda x: x * int(torch.ones(3).cumsum(0)[-1]),
    "equal": lambda x: x if torch.equal(torch.arange(3), torch.arange(1, 4) - 1) else -x,
    "of lists": lambda x: x * torch.cat([torch.ones(2), torch.zeros(1)]).mean().item(),
}
UNKNOWN: dict[str, Callable[[Tensor], Tensor]] = {
    "an input": lambda x: x * x.sum().item(),
    "made of an input": lambda x: x if (torch.zeros_like(x) + x).sum() > 0 else -x,
    "written": written,
    "written by a view": written_by_a_view,
    "filled": filled,
    "one of two": lambda x: x if torch.equal(torch.arange(3.0), x) else -x,
    "drawn": lambda x: x * torch.rand(3).sum().item(),
    "closed over": lambda x: x * X.sum().item(),
}


arounds = pytest.mark.parametrize(
    "around", [lambda f: f, lambda f: fz.grad(lambda x: f(x).square().sum())], ids=["plain", "grad"]
)


@arounds
@pytest.mark.parametrize("f", KNOWN.values(), ids=KNOWN)
def test_values_without_inputs_are_answered(
    f: Callable[[Tensor], Tensor], around: Callable[..., Callable[..., Tensor]]
):
    assert_same_bits(fz.jit(around(asked(f)))(X), around(f)(X))


@arounds
@pytest.mark.parametrize("f", UNKNOWN.values(), ids=UNKNOWN)
def test_values_that_inputs_decide_are_refused(
    f: Callable[[Tensor], Tensor], around: Callable[..., Callable[..., Tensor]]
):
    with pytest.raises(fz.TraceError, match="looks at the value of a tensor"):
        fz.jit(around(asked(f)))(X)


def test_what_is_known_is_said():
    seen: dict[str, Any] = {}

    def f(x: Tensor) -> Tensor:
        seen.update(
            constant=is_known(torch.arange(3)),
            input=is_known(x),
            shape=is_known(torch.ones_like(x)),
            outside=is_known(X),
            batched=torch.vmap(lambda y: torch.tensor(is_known(y)) | (y > 9))(torch.arange(2)),
        )
        return x

    fz.jit(f)(X)
    assert (seen["constant"], seen["input"], seen["outside"]) == (True, False, False)
    assert seen["shape"] is False, "it is made of the input, if only of its shape"
    assert not is_known(torch.arange(3)), "no trace is running"


def test_outside_of_a_trace_questions_are_answered_as_ever():
    assert_same_bits(asked(lambda x: x * x.sum().item())(X), X * 2)
