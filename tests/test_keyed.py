"""Random operations drawn from a key: the right distribution, and the same draws eager, traced and recomputed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, distributions
from torch.nn import functional as F

import fzero as fz
from fzero.random.distributions import DRAWS as DRAWN
from fzero.random.draws import REFUSED, named
from tests import small, world
from tests.test_operators import registered

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
    "random_": integers(lambda x: torch.empty_like(x, dtype=torch.int8).random_(), 0, 128),
    "random_ of floats": integers(lambda x: torch.empty_like(x).random_(), 0, 2**24 + 1),
    "randperm": integers(lambda x: torch.randperm(N), 0, N),
    "rand with a generator of None": flat(lambda x: torch.rand(N, generator=None), 0, 1),
    "randn with a generator of None": gaussian(lambda x: torch.randn(N, generator=None)),
    "randint with a generator of None": integers(lambda x: torch.randint(7, (N,), generator=None), 0, 7),
    "randint from with a generator of None": integers(lambda x: torch.randint(-3, 4, (N,), generator=None), -3, 4),
    "randperm with a generator of None": integers(lambda x: torch.randperm(N, generator=None), 0, N),
    "bernoulli with a generator of None": coin(lambda x: torch.bernoulli(fill(x, P), generator=None)),
    "rand into a tensor": flat(lambda x: torch.rand(N, out=torch.empty(N)), 0, 1),
    "normal into a tensor": gaussian(lambda x: torch.normal(1.0, 2.0, (N,), out=torch.empty(N)), 1, 2),
    "normal of a row and a number": gaussian(lambda x: torch.normal(torch.ones(1), fill(x, 2)), 1, 2),
    "geometric_": Draw(lambda x: torch.empty_like(x).geometric_(P), 1 / P, (1 - P) / P**2, 1, 100),
    "log_normal_": Draw(
        lambda x: torch.empty_like(x).log_normal_(0, 0.5), math.exp(0.125), math.exp(0.25) * math.expm1(0.25), 0, 30
    ),
    "poisson": Draw(lambda x: torch.poisson(fill(x, 3.5)), 3.5, 3.5, 0, 25),
    "poisson of many": Draw(lambda x: torch.poisson(fill(x, 2000)), 2000, 2000, 1700, 2300),
    "gamma": Draw(lambda x: torch._standard_gamma(fill(x, 2)), 2, 2, 0, 40),
    "gamma below one": Draw(lambda x: torch._standard_gamma(fill(x, 0.5)), 0.5, 0.5, 0, 30),
    "Gamma.sample": Draw(lambda x: distributions.Gamma(fill(x, 2), fill(x, 4)).sample(), 0.5, 2 / 16, 0, 10),
    "Gamma.rsample": Draw(lambda x: distributions.Gamma(fill(x, 2), fill(x, 4)).rsample(), 0.5, 2 / 16, 0, 10),
    "dirichlet": Draw(lambda x: torch._sample_dirichlet(torch.ones(N, 3))[:, 0], 1 / 3, 1 / 18, 0, 1),
    "multinomial": integers(lambda x: torch.multinomial(torch.ones(7), N, replacement=True), 0, 7),
    "multinomial one by one": integers(lambda x: torch.multinomial(torch.ones(N, 7), 1), 0, 7),
    "multinomial without replacement": integers(lambda x: torch.multinomial(torch.ones(N), N), 0, N),
    "Categorical.sample": integers(lambda x: distributions.Categorical(torch.ones(7)).sample((N,)), 0, 7),
    "rrelu": Draw(lambda x: -F.rrelu(-x, 0.1, 0.4, training=True), 0.25, 0.3**2 / 12, 0.1, 0.4),
    "rrelu_": Draw(lambda x: -F.rrelu(-x, 0.1, 0.4, training=True, inplace=True), 0.25, 0.3**2 / 12, 0.1, 0.4),
    "trunc_normal_": Draw(lambda x: torch.nn.init.trunc_normal_(torch.empty_like(x), a=-1, b=1), 0, 0.2911, -1, 1),
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


# Ten rounds of rejection take seconds to trace, and a generator of None is gone before a trace sees it.
SLOWLY_TRACED = {"gamma", "gamma below one", "Gamma.sample", "dirichlet"}
# The one below traces a gamma draw; of the others another row traces the operator.
TRACED_BY_OTHERS = {
    "Gamma.rsample", "poisson of many", "rand float64", "randn two-dimensional", "normal of numbers",
    "normal of a mean", "normal of a deviation", "normal into a tensor", "bernoulli_", "native_dropout", "dropout1d",
    "randint", "randint_like", "random_ to", "random_", "random_ of floats", "multinomial", "Categorical.sample",
}  # fmt: skip
TRACED = [
    pytest.param(name, marks=[pytest.mark.slow] * (name in TRACED_BY_OTHERS))
    for name in DRAWS
    if name not in SLOWLY_TRACED and "generator" not in name
]


@pytest.mark.parametrize("name", TRACED)
def test_traced_recomputed_and_differentiated_draws_are_the_eager_ones(name):
    op, x = DRAWS[name].op, ones()

    def weighted(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: fz.keyed(f)(7, x) * x.mean()

    def gradient(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Any]:
        def loss(x: Tensor) -> tuple[Tensor, Tensor]:
            draws = weighted(f)(x)
            return draws.sum(), draws

        return fz.value_and_grad(loss, has_aux=True)

    eager = weighted(op)(x)
    assert torch.equal(weighted(fz.remat(op))(x), eager)
    expected = gradient(op)(x)
    assert torch.equal(fz.tree.leaves(expected)[1], eager)
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


IMAGES = torch.arange(81.0).reshape(1, 1, 9, 9).expand(N // 9, 1, 9, 9)
torch.manual_seed(1)
LSTM = torch.nn.LSTM(2, 2, num_layers=2, dropout=0.5).requires_grad_(False)


# Operators and what they return of a draw, to be compared with torch's own: shapes that a mean and a variance miss.
LIKE_TORCH: dict[str, Callable[[], Tensor]] = {
    "cauchy_": lambda: torch.empty(N).cauchy_(1.0, 2.0),
    "geometric_": lambda: torch.empty(N).geometric_(0.05),
    "geometric_ of certainty": lambda: torch.empty(N).geometric_(0.999999),
    "log_normal_": lambda: torch.empty(N).log_normal_(1.0, 2.0),
    "exponential_": lambda: torch.empty(N).exponential_(0.5),
    "poisson": lambda: torch.poisson(torch.tensor([0.0, 0.1, 1.0, 30.0, 1e4]).repeat(N // 4)),
    "gamma": lambda: torch._standard_gamma(torch.tensor([0.01, 0.5, 1.0, 3.0, 300.0]).repeat(N // 4)),
    "gamma in float64": lambda: torch._standard_gamma(torch.full((N,), 1.0, dtype=torch.float64)),
    "dirichlet": lambda: torch._sample_dirichlet(torch.tensor([0.1, 1.0, 5.0]).expand(N, 3))[:, 1],
    "Beta.sample": lambda: distributions.Beta(torch.full((N,), 0.5), torch.full((N,), 2.0)).sample(),
    "StudentT.sample": lambda: distributions.StudentT(torch.full((N,), 3.0)).sample(),
    "multinomial": lambda: torch.multinomial(torch.tensor([0.0, 5.0, 1.0, 0.0, 3.0]), N, replacement=True),
    "multinomial of rows": lambda: torch.multinomial(torch.tensor([0.0, 5.0, 1.0, 3.0]).expand(N, 4), 2)[:, 1],
    "multinomial of rows with replacement": lambda: torch.multinomial(
        torch.tensor([0.0, 5.0, 1.0, 3.0]).expand(N, 4), 2, replacement=True
    )[:, 1],
    "rrelu": lambda: F.rrelu(torch.linspace(-1, 1, N), training=True),
    "alpha_dropout": lambda: F.alpha_dropout(torch.ones(N), 0.3, training=True),
    "feature_alpha_dropout": lambda: F.feature_alpha_dropout(torch.ones(N, 1, 2), 0.3)[:, 0, 0],
    "fractional_max_pool2d": lambda: F.fractional_max_pool2d(IMAGES, 2, output_size=3),
    "trunc_normal_": lambda: torch.nn.init.trunc_normal_(torch.empty(N), mean=1.0, std=2.0, a=-1.0, b=2.5),
    "trunc_normal_ in a tail": lambda: torch.nn.init.trunc_normal_(torch.empty(N), std=1.0, a=1.9, b=3.0),
    "random_ of int64": lambda: torch.empty(N, dtype=torch.int64).random_() / 2**63,
    "randint of many": lambda: torch.randint(-(2**40), 2**41, (N,)) / 2**41,
    "attention": lambda: F.scaled_dot_product_attention(
        torch.ones(N // 8, 2, 4), torch.ones(N // 8, 4, 4), torch.ones(N // 8, 4, 4), dropout_p=0.4
    ),
    "lstm": lambda: LSTM(torch.ones(1, N // 8, 2))[0],
}  # fmt: skip


@pytest.mark.parametrize("draw", LIKE_TORCH.values(), ids=LIKE_TORCH)
def test_draws_are_distributed_as_those_of_torch(draw: Callable[[], Tensor]):
    torch.manual_seed(3)
    expected = draw()
    keyed = fz.keyed(draw)(7)
    assert fz.tree.describe(keyed) == fz.tree.describe(expected)
    ours, theirs = keyed.detach().flatten().double().sort()[0], expected.detach().flatten().double().sort()[0]
    # The distance of Kolmogorov and Smirnov, at which one in a million pairs of equal distributions lies.
    at = torch.cat([ours, theirs])
    below = [torch.searchsorted(x, at, right=True) / len(x) for x in (ours, theirs)]
    assert (below[0] - below[1]).abs().max() < math.sqrt(-math.log(0.5e-6) / min(N, len(ours)))


# By the rejection that the gradient of a gamma draw traces too, or an operator that stands in `TRACED`.
SLOW = {
    "gamma", "gamma in float64", "Beta.sample", "StudentT.sample", "dirichlet",
    "geometric_", "geometric_ of certainty", "log_normal_", "exponential_", "poisson", "rrelu",
    "multinomial", "multinomial of rows", "trunc_normal_",
}  # fmt: skip


@pytest.mark.parametrize(
    "draw",
    [pytest.param(draw, id=name, marks=[pytest.mark.slow] * (name in SLOW)) for name, draw in LIKE_TORCH.items()],
)
def test_a_trace_draws_what_the_eager_call_draws(draw: Callable[[], Tensor]):
    key = torch.tensor(7, dtype=torch.int32)
    expected = fz.keyed(draw)(key)
    assert torch.equal(fz.jit(lambda key: fz.keyed(draw)(key))(key), expected)
    assert torch.equal(fz.keyed(fz.remat(draw))(key), expected)


def test_the_gradient_of_a_gamma_draw_is_that_of_its_concentration():
    def draws(concentration: Tensor) -> Tensor:
        return distributions.Gamma(concentration, torch.ones(N)).rsample()

    def mean(concentration: Tensor) -> Tensor:
        return fz.keyed(draws)(7, concentration).mean()

    def recomputed(concentration: Tensor) -> Tensor:
        return fz.keyed(fz.remat(draws))(7, concentration).mean()

    concentration = torch.full((N,), 2.5)
    gradient = fz.grad(mean)(concentration)
    assert abs(gradient.sum() - 1) < 5 * 1 / math.sqrt(N)  # the mean of a gamma distribution is its concentration
    small.assert_same_bits(fz.grad(recomputed)(concentration), gradient)
    small.assert_same_bits(fz.jit(fz.grad(mean))(concentration), gradient)


@pytest.mark.parametrize("p", [[1.0, -1.0], [0.0, 0.0], [1.0, math.nan], [1.0, 0.0]], ids=str)
def test_what_is_no_distribution_is_refused(p):
    with pytest.raises(RuntimeError, match="multinomial: expected probabilities"):
        fz.keyed(lambda: torch.multinomial(torch.tensor(p), 2))(7)


def test_every_random_operator_of_torch_stands_in_a_table():
    homeless = set()
    for op in registered():
        generators = any("Generator" in str(a.type) for a in op._schema.arguments)
        if not generators and torch.Tag.nondeterministic_seeded not in op.tags:
            continue
        composite = torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), "CompositeImplicitAutograd")
        chooses = op._schema.name == "aten::_fused_sdp_choice"
        if not composite and not chooses and named(op) not in DRAWN and named(op) not in REFUSED:
            homeless.add(op.name())
    assert not homeless, "add these to fzero/random/distributions.py, or to what draws.py refuses"
    assert not DRAWN.keys() & REFUSED.keys()


def _gamma_of_a_kernel(x: Tensor) -> Tensor:
    q = x.reshape(1, 1, 4, 2)
    result: Tensor = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, q, q, 0.5)[0]
    return result


UNKEYED: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "binomial": (lambda x: torch.binomial(x, x / 2), r"aten\.binomial\.default cannot be drawn.*Sum coins instead"),
    "a kernel of attention": (_gamma_of_a_kernel, r"flash_attention_for_cpu.*SDPBackend\.MATH"),
    "own generator": (lambda x: torch.rand(3, generator=torch.Generator()), r"rand\.generator.*fz\.keyed\(f\)\(key"),
    "own generator in place": (lambda x: x.clone().normal_(generator=torch.Generator()), "normal_.*torch.Generator"),
}


@pytest.mark.parametrize("name", UNKEYED)
@pytest.mark.parametrize("transform", [lambda f: f, fz.jit, fz.remat], ids=["eager", "jit", "remat"])
def test_an_operation_that_cannot_be_keyed_is_refused_by_name(transform, name):
    op, message = UNKEYED[name]
    with pytest.raises(fz.RandomOpError, match=message):
        transform(lambda x: fz.keyed(op)(7, x))(torch.ones(8))


@pytest.mark.parametrize("name", UNKEYED)
def test_without_a_key_such_an_operation_is_refused_in_a_trace(name):
    generator = r".*torch\.Generator.*fz\.keyed\(f\)\(key" if "generator" in name else ""
    with pytest.raises(fz.RandomOpError, match=r"fz\.jit: aten\." + generator):
        fz.jit(UNKEYED[name][0])(torch.ones(8))


def test_the_way_out_of_a_binomial_is_one():
    draw = fz.keyed(lambda: (torch.rand(10, N) < P).sum(0).double())(7)
    assert abs(draw.mean() - 10 * P) < 5 * math.sqrt(10 * P * (1 - P) / N)


# Without a key torch itself cannot trace the overload `random_.from`: it writes it as code, where `from` is a keyword.
# Nor does it trace `trunc_normal_`, which looks whether it has to draw again.
@pytest.mark.parametrize("name", sorted(DRAWS.keys() - {"random_ from", "trunc_normal_"}))
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


@pytest.mark.parametrize("microbatches", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_dropout_is_the_same_on_a_rerun_and_traced(microbatches):
    first, again, traced = (
        world.run(masks_of_two_steps, transform, microbatches, 0, size=2) for transform in (plain, plain, fz.jit)
    )
    for rank in (0, 1):
        assert torch.equal(first[rank], again[rank]) and torch.equal(first[rank], traced[rank])


# ---------------------------------------------------------------------------------------------------------
# A key around a State


def state_of(seed: int = 0) -> fz.State:
    return fz.init({"w": torch.ones(64)}, fz.sgd(0.1), fz.make_mesh("cpu"), policy="fp32", seed=seed)


def noise(params: Any, *_: Any) -> Tensor:
    return params["w"] * torch.rand(64)


TWO = fz.accumulate(fz.value_and_grad(lambda p, x: (noise(p) * x).sum()), 2)
# What draws inside of a state's scope: (key, state) -> draws.
ROLLOUTS: dict[str, Callable[[Any, fz.State], Tensor]] = {
    "call": lambda key, state: fz.keyed(fz.call)(key, noise, state),
    "vjp": lambda key, state: fz.keyed(lambda: fz.vjp(noise, state)[0])(key),
    "gradient": lambda key, state: fz.keyed(
        lambda: fz.gather(fz.grad(lambda p: noise(p).sum())(state))["w"]
    )(key),
    "remat": lambda key, state: fz.keyed(
        lambda: fz.gather(fz.grad(lambda p: fz.remat(noise)(p).square().sum())(state))["w"]
    )(key),
    "call in a remat": lambda key, state: fz.keyed(
        lambda: fz.grad(lambda x: fz.remat(lambda x: (fz.call(noise, state) * x).square().sum())(x))(torch.ones(64))
    )(key),
    "accumulate": lambda key, state: fz.gather(fz.keyed(TWO)(key, state, torch.ones(2, 64))[1])["w"],
    "accumulate of a tree": lambda key, state: fz.keyed(TWO)(key, {"w": torch.ones(64)}, torch.ones(2, 64))[1]["w"],
    "a state in a state": lambda key, state: fz.keyed(
        lambda: fz.call(lambda p: fz.call(noise, state), state_of(1))
    )(key),
    "vmap": lambda key, state: torch.vmap(
        lambda k: fz.keyed(fz.call)(k, noise, state), randomness="different"
    )(torch.stack([torch.as_tensor(key), torch.as_tensor(key) + 100]))[0],
}  # fmt: skip
rollouts = pytest.mark.parametrize("rollout", ROLLOUTS.values(), ids=ROLLOUTS)


@rollouts
def test_two_keys_around_a_state_give_two_draws(rollout: Callable[[Any, fz.State], Tensor]):
    state = state_of()
    first, second, again = (rollout(key, state) for key in (7, 8, 7))
    assert torch.equal(first, again)
    assert not torch.isclose(first, second).any()


@pytest.mark.parametrize(
    "rollout",
    [
        pytest.param(rollout, id=name, marks=[pytest.mark.slow] * (name in ("vjp", "remat", "accumulate of a tree")))
        for name, rollout in ROLLOUTS.items()
    ],
)
def test_a_key_around_a_state_traces_as_it_runs(rollout: Callable[[Any, fz.State], Tensor]):
    state, step = state_of(), fz.jit(lambda key, state: rollout(key, state))
    for key in (7, 8):
        traced = step(torch.tensor(key, dtype=torch.int32), state)
        assert torch.equal(traced, rollout(key, state))


def test_the_state_under_the_key_counts_too():
    one, other = (fz.keyed(fz.call)(7, noise, state_of(seed)) for seed in (0, 1))
    assert not torch.isclose(one, other).any()
    first, second = fz.keyed(lambda: [fz.call(noise, state_of()) for _ in range(2)])(7)
    assert not torch.isclose(first, second).any()


def test_a_key_inside_a_state_wins():
    state = state_of()
    inside = fz.call(lambda p: p["w"] * fz.keyed(torch.rand)(7, 64), state)
    assert torch.equal(inside, fz.keyed(torch.rand)(7, 64))
    assert torch.equal(fz.keyed(fz.call)(9, lambda p: fz.keyed(torch.rand)(7, 64), state), inside)


def test_a_state_alone_draws_as_ever():
    state = state_of()
    assert torch.equal(fz.call(noise, state), fz.call(noise, state))
    nested = fz.call(lambda p: fz.call(noise, state), state_of(1))
    assert torch.equal(nested, fz.call(noise, state))


def test_micro_batches_under_a_key_draw_each_their_own():
    def drawn(p: Any, x: Tensor) -> Any:
        return (p["w"] * x).sum(), torch.rand(1, 64)

    gradient = fz.accumulate(fz.value_and_grad(drawn, has_aux=True), 4)
    for primal in (state_of(), {"w": torch.ones(64)}):
        (_, rows), _ = fz.keyed(gradient)(7, primal, torch.ones(4, 64))
        assert len(torch.unique(rows, dim=0)) == 4


def test_a_key_around_a_program_is_refused_where_its_state_draws():
    state, step = state_of(), fz.jit(lambda state: fz.call(noise, state))
    step(state)
    with pytest.raises(fz.RandomOpError, match="would become a constant of the program"):
        fz.keyed(step)(7, state)
    quiet = fz.jit(lambda state: fz.call(lambda p: p["w"] * 2, state))
    assert torch.equal(fz.keyed(quiet)(7, state), 2 * torch.ones(64))
