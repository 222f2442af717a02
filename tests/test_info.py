"""What a step tells: tensors of shape () by the same names, whatever the optimizer is."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fzero as fz
from tests import world

RATE = torch.tensor(0.25)  # the user's own
DOUBLE = torch.tensor(0.25, dtype=torch.float64)


def own(step: Tensor) -> Tensor:
    return RATE


def double(step: Tensor) -> Tensor:
    return DOUBLE


def of_one_element(step: Tensor) -> Tensor:
    return RATE.view(1)


def python(step: Tensor) -> Any:
    return 0.25


def top(path: str) -> str:
    return path.split(".")[0]


def inside(path: str) -> str:
    return path.split(".")[1]


NESTED = fz.partition_by(inside, {"w": fz.sgd(0.125), "b": fz.chain(fz.clip_by_leaf_norm(1.0), fz.lion(0.5))})
# an optimizer -> the rates that a step tells
OPTIMIZERS: dict[str, tuple[fz.Optimizer, dict[str, float]]] = {
    "adamw": (fz.adamw(0.25), {"lr": 0.25}),
    "adam, a whole number": (fz.adam(1), {"lr": 1.0}),
    "sgd, a schedule": (fz.sgd(fz.schedules.linear(0.5, 0.0, 10)), {"lr": 0.5}),
    "sgd, a tensor": (fz.sgd(own), {"lr": 0.25}),
    "sgd, of another dtype": (fz.sgd(double), {"lr": 0.25}),
    "sgd, of one element": (fz.sgd(of_one_element), {"lr": 0.25}),
    "sgd, a function of Python": (fz.sgd(python), {"lr": 0.25}),
    "lion": (fz.lion(0.25), {"lr": 0.25}),
    "adafactor": (fz.adafactor(0.25), {"lr": 0.25}),
    "muon": (fz.muon(0.25), {"lr": 0.25}),
    "muon and another": (
        fz.muon(0.25, others=fz.sgd(own)),
        {"lr": 0.25, "lr/matrices": 0.25, "lr/others": 0.25},
    ),
    "a chain": (fz.chain(fz.clip_by_global_norm(1.0), fz.adamw(own)), {"lr": 0.25}),
    "groups": (
        fz.partition_by(top, {"body": fz.adamw(own), "head": fz.sgd(0.5)}),
        {"lr": 0.5, "lr/body": 0.25, "lr/head": 0.5},
    ),
    "one group is frozen": (
        fz.partition_by(top, {"body": fz.adamw(own), "head": None}),
        {"lr": 0.25, "lr/body": 0.25},
    ),
    "groups in a chain": (
        fz.chain(fz.clip_by_global_norm(1.0), fz.partition_by(top, {"body": fz.muon(0.25), "head": fz.sgd(0.5)})),
        {"lr": 0.5, "lr/body": 0.25, "lr/head": 0.5},
    ),
    "groups of groups": (
        fz.partition_by(top, {"body": NESTED, "head": fz.adamw(0.25)}),
        {"lr": 0.5, "lr/body": 0.5, "lr/body/w": 0.125, "lr/body/b": 0.5, "lr/head": 0.25},
    ),
}


def parameters() -> Any:
    return {"body": {"w": torch.ones(4, 4), "b": torch.ones(4)}, "head": {"w": torch.ones(4, 4)}}


def loss(params: Any, batch: Tensor) -> Tensor:
    body, head = params["body"], params["head"]
    return ((batch @ body["w"] + body["b"]) @ head["w"]).square().mean()


def state_of(optimizer: fz.Optimizer) -> fz.State:
    return fz.init(parameters(), optimizer, fz.make_mesh("cpu"), policy="fp32")


def by_hand(state: fz.State, batch: Tensor) -> Any:
    value, grads = fz.value_and_grad(loss)(state, batch)
    state, info = fz.apply_gradients(state, grads)
    return state, {"loss": value, **info}


STEPS: dict[str, Callable[..., Any]] = {
    "eager": by_hand,
    "traced": fz.jit(by_hand),
    "kept": fz.train_step(loss, donate=False),
    "donated": fz.train_step(loss),
}


# Eagerly each, and in programs each in one way: what a step tells is made by the same code.
CASES = [
    *((name, "eager") for name in OPTIMIZERS),
    *zip(OPTIMIZERS, itertools.cycle(("traced", "donated"))),
    ("sgd, a tensor", "donated"),
    ("sgd, a tensor", "kept"),
    ("groups", "kept"),
]
OTHERS = [case for case in itertools.product(OPTIMIZERS, ("traced", "donated")) if case not in CASES]


@pytest.mark.parametrize(("name", "how"), [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in OTHERS)])
def test_the_rate_is_a_tensor_of_shape_nothing_and_nobody_elses(name: str, how: str) -> None:
    optimizer, expected = OPTIMIZERS[name]
    _, metrics = STEPS[how](state_of(optimizer), torch.ones(2, 4))
    rates = {key: value for key, value in metrics.items() if key.startswith("lr")}
    assert list(rates) == list(expected)
    assert {key: value.item() for key, value in rates.items()} == expected
    assert set(metrics) == {"loss", "grad_norm", "finite", "loss_scale", *expected}
    for key, value in metrics.items():
        assert value.shape == (), key
        assert value.dtype == (torch.bool if key == "finite" else torch.float32), key
    for value in rates.values():
        value.fill_(-1.0)
    assert RATE == DOUBLE == 0.25, "a rate that a schedule closes over is the user's"
    assert all(rates[key] == -1 for key in rates)


def test_a_rate_that_is_more_than_one_number_is_refused() -> None:
    state = state_of(fz.sgd(lambda step: torch.ones(2)))
    _, grads = fz.value_and_grad(loss)(state, torch.ones(2, 4))
    with pytest.raises(fz.ShapeError, match=r"the learning rate of a step must be one number, got float32\(2,\)"):
        fz.apply_gradients(state, grads)


def averaged_by_hand() -> list[Tensor]:
    """Return the mean loss as a step of one's own averages it, as `train_step` does, and this rank's own."""
    mesh = fz.make_mesh("cpu")
    state = state_of(fz.sgd(0.25))
    batch = torch.full((2, 4), float(mesh["data"].index + 1))

    def step(state: fz.State, batch: Tensor) -> Any:
        value, grads = fz.value_and_grad(loss)(state, batch)
        state, info = fz.apply_gradients(state, grads)
        return state, fz.average({"loss": value}, state.mesh) | info

    _, mine = fz.jit(step)(state, batch)
    _, ready = fz.train_step(loss, donate=False)(state, batch)
    return [mine["loss"], ready["loss"], fz.call(loss, state, batch)]


def test_the_step_of_the_guide_averages_what_it_shows() -> None:
    (mine, ready, first), (other, _, second) = world.run(averaged_by_hand, size=2)
    assert mine == other == ready == (first + second) / 2
    assert first != second
