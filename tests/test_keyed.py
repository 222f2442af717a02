"""Random operations drawn from a key: the right distribution, and the same draws eager, traced and recomputed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import fzero as fz
from tests import small, world

N = 1 << 14
P = 0.3


class Draw(NamedTuple):
    """A random operation of `N` elements, with the mean, variance and range of one of them."""

    op: Callable[[Tensor], Tensor]
    mean: float
    variance: float
    low: float
    high: float


def coin(op: Callable[[Tensor], Tensor]) -> Draw:
    return Draw(op, P, P * (1 - P), 0, 1)


def dropout(op: Callable[[Tensor], Tensor]) -> Draw:
    """Ones are kept with probability 1 - P, and are then 1 / (1 - P)."""
    return Draw(op, 1, P / (1 - P), 0, 1 / (1 - P))


def flat(op: Callable[[Tensor], Tensor], low: float, high: float) -> Draw:
    return Draw(op, (low + high) / 2, (high - low) ** 2 / 12, low, high)


def gaussian(op: Callable[[Tensor], Tensor], mean: float = 0, std: float = 1) -> Draw:
    return Draw(op, mean, std**2, mean - 6 * std, mean + 6 * std)


def integers(op: Callable[[Tensor], Tensor], low: int, high: int) -> Draw:
    return Draw(op, (low + high - 1) / 2, ((high - low) ** 2 - 1) / 12, low, high - 1)


def exponential(op: Callable[[Tensor], Tensor], rate: float) -> Draw:
    return Draw(op, 1 / rate, 1 / rate**2, 0, 25 / rate)


def fill(x: Tensor, value: float) -> Tensor:
    return torch.full_like(x, value)


# Each takes a float32 tensor of N ones.
DRAWS = {
    "rand": flat(lambda x: torch.rand(N), 0, 1),
    "rand float64": flat(lambda x: torch.rand(N, dtype=torch.float64), 0, 1),
    "rand_like": flat(lambda x: torch.rand_like(x), 0, 1),
    "uniform_": flat(lambda x: torch.empty_like(x).uniform_(2, 5), 2, 5),
    "randn": gaussian(lambda x: torch.randn(N)),
    "randn two-dimensional": gaussian(lambda x: torch.randn(N // 64, 64)),
    "randn_like": gaussian(lambda x: torch.randn_like(x)),
    "normal_": gaussian(lambda x: torch.empty_like(x).normal_(1, 2), 1, 2),
    "normal of numbers": gaussian(lambda x: torch.normal(1.0, 2.0, (N,)), 1, 2),
    "normal of a mean": gaussian(lambda x: torch.normal(fill(x, 1), 2.0), 1, 2),
    "normal of a deviation": gaussian(lambda x: torch.normal(1.0, fill(x, 2)), 1, 2),
    "normal of both": gaussian(lambda x: torch.normal(fill(x, 1), fill(x, 2)), 1, 2),
    "bernoulli": coin(lambda x: torch.bernoulli(fill(x, P))),
    "bernoulli_": coin(lambda x: torch.empty_like(x).bernoulli_(P)),
    "bernoulli_ of a tensor": coin(lambda x: torch.empty_like(x).bernoulli_(fill(x, P))),
    "dropout": dropout(lambda x: F.dropout(x, P)),
    "dropout in place": dropout(lambda x: F.dropout(x.clone(), P, inplace=True)),
    "native_dropout": dropout(lambda x: torch.native_dropout(x, P, True)[0]),
    "dropout1d": dropout(lambda x: F.dropout1d(x.reshape(1, N, 1), P)),
    "exponential_": exponential(lambda x: torch.empty_like(x).exponential_(2), 2),
    "randint": integers(lambda x: torch.randint(7, (N,)), 0, 7),
    "randint from": integers(lambda x: torch.randint(-3, 4, (N,)), -3, 4),
    "randint_like": integers(lambda x: torch.randint_like(x, 7), 0, 7),
    "randint_like from": integers(lambda x: torch.randint_like(x, -3, 4), -3, 4),
    "random_ to": integers(lambda x: torch.empty_like(x).random_(7), 0, 7),
    "random_ from": integers(lambda x: torch.empty_like(x, dtype=torch.int32).random_(3, 9), 3, 9),
    "randperm": integers(lambda x: torch.randperm(N), 0, N),
}
every_draw = pytest.mark.parametrize("name", DRAWS)


def ones() -> Tensor:
    return torch.ones(N)


@every_draw
def test_draws_have_the_distribution_of_the_operation(name):
    draw = DRAWS[name]
    x = fz.keyed(draw.op)(7, ones()).double().flatten()
    assert x.numel() == N
    assert draw.low <= x.min() + 1e-6 and x.max() <= draw.high + 1e-6
    sigmas = 5
    assert abs(x.mean() - draw.mean) < sigmas * math.sqrt(draw.variance / N)
    kurtosis = 9.0  # that of the exponential distribution, the heaviest of the table
    assert abs(x.var() - draw.variance) < sigmas * draw.variance * math.sqrt(kurtosis / N)


@every_draw
def test_draws_look_like_those_of_the_operation_without_a_key(name):
    op = DRAWS[name].op
    assert fz.tree.describe(fz.keyed(op)(7, ones())) == fz.tree.describe(op(ones()))


@every_draw
def test_a_key_and_an_ordinal_name_the_draw(name):
    twice = fz.keyed(lambda x: (DRAWS[name].op(x), DRAWS[name].op(x)))
    first, second = twice(7, ones())
    for again, expected in zip(twice(torch.tensor(7, dtype=torch.int32), ones()), (first, second), strict=True):
        assert torch.equal(again, expected)
    assert not torch.equal(first, second)
    assert not torch.equal(first, twice(8, ones())[0])


@every_draw
def test_draws_leave_the_global_generator_alone(name):
    before = torch.get_rng_state()
    fz.keyed(DRAWS[name].op)(7, ones())
    assert torch.equal(torch.get_rng_state(), before)


@every_draw
def test_traced_recomputed_and_differentiated_draws_are_the_eager_ones(name):
    op, x = DRAWS[name].op, ones()

    def weighted(f: Callable[[Tensor], Tensor]) -> Callable[[int, Tensor], Tensor]:
        return lambda key, x: fz.keyed(f)(key, x) * x.mean()

    def gradient(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Any]:
        return fz.value_and_grad(lambda x: weighted(f)(7, x).sum())

    eager = weighted(op)(7, x)
    assert torch.equal(fz.jit(weighted(op))(torch.tensor(7, dtype=torch.int32), x), eager)
    assert torch.equal(weighted(fz.remat(op))(7, x), eager)
    assert torch.equal(fz.vjp(lambda x: weighted(op)(7, x), x)[0], eager)
    expected = gradient(op)(x)
    small.assert_same_bits(gradient(fz.remat(op))(x), expected)
    small.assert_same_bits(fz.jit(gradient(fz.remat(op)))(x), expected)


def test_the_key_may_be_traced_and_change_between_calls():
    drop = fz.jit(fz.keyed(lambda x: F.dropout(x, P)))
    for key in (7, 8):
        seed = torch.tensor(key, dtype=torch.int32)
        assert torch.equal(drop(seed, ones()), fz.keyed(lambda x: F.dropout(x, P))(seed, ones()))
    assert len(drop.programs) == 1


def test_the_gradient_of_dropout_passes_where_the_value_did():
    output, pullback = fz.vjp(lambda x: fz.keyed(lambda x: F.dropout(x, P))(7, x), ones())
    (gradient,) = pullback(ones())
    assert torch.equal(gradient, output) and 0 < (gradient == 0).sum() < N


def test_an_inner_key_does_not_advance_the_outer_one():
    def with_inner(x: Tensor) -> Tensor:
        fz.keyed(torch.rand_like)(1, x)
        return torch.rand_like(x)

    assert torch.equal(fz.keyed(with_inner)(7, ones()), fz.keyed(torch.rand_like)(7, ones()))


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_dropout_of_nothing_and_of_everything(p):
    assert torch.equal(fz.keyed(lambda x: F.dropout(x, p))(7, ones()), (1 - p) * ones())
    assert torch.equal(fz.keyed(lambda x: F.dropout(x, p, training=False))(7, ones()), ones())


UNKEYED: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "multinomial": (lambda x: torch.multinomial(x, 3), "multinomial"),
    "poisson": (lambda x: torch.poisson(x), "poisson"),
    "geometric_": (lambda x: x.clone().geometric_(P), "geometric_"),
    "cauchy_": (lambda x: x.clone().cauchy_(), "cauchy_"),
    "rrelu": (lambda x: F.rrelu(x, training=True), "rrelu"),
    "own generator": (lambda x: torch.rand(3, generator=torch.Generator()), r"rand\.generator"),
}


@pytest.mark.parametrize("name", UNKEYED)
@pytest.mark.parametrize("transform", [lambda f: f, fz.jit, fz.remat], ids=["eager", "jit", "remat"])
def test_an_operation_that_cannot_be_keyed_is_refused_by_name(transform, name):
    op, message = UNKEYED[name]
    with pytest.raises(fz.RandomOpError, match=message):
        transform(lambda x: fz.keyed(op)(7, x))(torch.ones(8))


# Without a key torch itself cannot trace the overload `random_.from`: it writes it as code, where `from` is a keyword.
@pytest.mark.parametrize("name", sorted(DRAWS.keys() - {"random_ from"}))
def test_a_draw_without_a_key_cannot_be_traced(name):
    with pytest.raises(fz.RandomOpError, match=r"draws from the global random generator.*fz\.keyed"):
        fz.jit(DRAWS[name].op)(ones())


def attention(p: float) -> Callable[[Tensor], Tensor]:
    return lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=p, is_causal=True)


def test_attention_without_dropout_needs_no_key():
    x = torch.randn(2, 2, 8, 4)
    expected = attention(0.0)(x)
    assert torch.equal(fz.jit(attention(0.0))(x), expected)
    assert torch.equal(fz.keyed(attention(0.0))(7, x), expected)


def test_attention_with_dropout_draws_from_the_key():
    x = torch.randn(2, 2, 8, 4)
    first = fz.keyed(attention(0.5))(7, x)
    assert not torch.equal(first, attention(0.0)(x)) and not torch.equal(first, fz.keyed(attention(0.5))(8, x))
    assert torch.equal(fz.keyed(attention(0.5))(7, x), first)
    assert torch.equal(fz.jit(fz.keyed(attention(0.5)))(torch.tensor(7, dtype=torch.int32), x), first)
    with pytest.raises(fz.RandomOpError):
        fz.jit(attention(0.5))(x)


# ---------------------------------------------------------------------------------------------------------
# Draws of a State


def masks_of_two_steps(transform: Callable[..., Any], microbatches: int, seed: int) -> Tensor:
    """What dropout keeps in two steps of training: (steps, rows, columns)."""
    state = fz.init({"w": torch.ones(64)}, fz.sgd(0.1), fz.make_mesh("cpu"), policy="fp32", seed=seed)

    def loss(params: Any, x: Tensor) -> Any:
        kept = F.dropout(params["w"] * x, 0.5) != 0
        return params["w"].sum(), kept

    gradient = fz.accumulate(fz.value_and_grad(loss, has_aux=True), microbatches)

    def step(state: fz.State, x: Tensor) -> Any:
        (_, kept), grads = gradient(state, x)
        return fz.apply_gradients(state, grads)[0], kept

    step, masks = transform(step), []
    for _ in range(2):
        state, kept = step(state, torch.ones(4, 64))
        masks.append(kept)
    return torch.stack(masks)


def plain(f: Callable[..., Any]) -> Callable[..., Any]:
    return f


def test_dropout_differs_between_ranks_steps_micro_batches_and_seeds():
    masks = [*world.run(masks_of_two_steps, plain, 4, 0, size=2), *world.run(masks_of_two_steps, plain, 4, 1, size=1)]
    rows = torch.stack(masks).reshape(-1, 64)  # of a rank or seed, a step and a micro-batch
    assert len(rows) == 3 * 2 * 4
    assert len(torch.unique(rows, dim=0)) == len(rows)


@pytest.mark.parametrize("microbatches", [1, 2])
def test_dropout_is_the_same_on_a_rerun_and_traced(microbatches):
    first, again, traced = (
        world.run(masks_of_two_steps, transform, microbatches, 0, size=2) for transform in (plain, plain, fz.jit)
    )
    for rank in (0, 1):
        assert torch.equal(first[rank], again[rank]) and torch.equal(first[rank], traced[rank])
