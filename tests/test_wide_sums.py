"""Sums over rows in bfloat16 and float16 on a CPU, against float64; and which of torch's operators need ours."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fzero as fz
from fzero.precision.wide_sums import Summing, summing
from fzero.torch_api import Model
from tests.small import assert_same_bits

ROWS = 3000  # that share an entry: bfloat16 stops at 256, float16 at 2048
SQUARE = 55  # about the root
LOW = (torch.bfloat16, torch.float16)
NOUGHTS = torch.zeros(ROWS, dtype=torch.long)


class Case(NamedTuple):
    """A function whose result or gradients are sums over rows.

    Attributes:
        f: the function.
        args: its arguments, float64; those that the test casts.
        ours: whether torch's own sum is wrong, so that fzero takes another.
        forward: whether the result itself is the sum; otherwise the gradients are.
        float32: positions of arguments that stay float32.
    """

    f: Callable[..., Tensor]
    args: tuple[Tensor, ...]
    ours: bool
    forward: bool = False
    float32: tuple[int, ...] = ()


def some(*shape: int, mean: float = 1.0) -> Tensor:
    """Numbers around 1 that bfloat16 holds."""
    draw = torch.rand(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64) - 0.5
    return (draw + mean).to(torch.bfloat16).double()


def spike(*shape: int) -> Tensor:
    """Nought but in the middle."""
    x = torch.zeros(shape, dtype=torch.float64)
    x[tuple(size // 2 for size in shape)] = 9
    return x


def noughts(*shape: int) -> Tensor:
    return NOUGHTS[: shape[0]].view(-1, *[1] * (len(shape) - 1)).expand(shape)


def sampled(x: Tensor, *shape: int) -> Tensor:
    """The middle of an image, read many times."""
    return F.grid_sample(x, torch.zeros(1, *shape, len(shape), dtype=x.dtype), align_corners=True)


SLOTS, TERMS = some(4, 3), some(ROWS, 3)
IMAGES = some(12, 4, 25, 25, mean=3.0)

CASES = {
    # An entry that many rows read.
    "embedding": Case(lambda w: F.embedding(NOUGHTS, w), (SLOTS,), True),
    "embedding, second derivative": Case(
        lambda w: torch.func.grad(lambda v: F.embedding(NOUGHTS, v).float().square().sum())(w), (SLOTS,), True
    ),
    "embedding_bag": Case(lambda w: F.embedding_bag(NOUGHTS.view(-1, 2), w), (SLOTS,), True),
    "embedding_bag, one": Case(lambda w: F.embedding_bag(NOUGHTS.view(1, -1), w, mode="sum"), (SLOTS,), True),
    "index": Case(lambda w: w[NOUGHTS], (SLOTS,), True),
    "index, columns": Case(lambda w: w[:, NOUGHTS], (SLOTS,), True),
    "take": Case(lambda w: w.take(NOUGHTS), (SLOTS,), True),
    "index_select": Case(lambda w: w.index_select(0, NOUGHTS), (SLOTS,), False),
    "gather": Case(lambda w: w.gather(0, noughts(ROWS, 3)), (SLOTS,), False),
    "take_along_dim": Case(lambda w: w.take_along_dim(noughts(ROWS, 3), 0), (SLOTS,), False),
    "expand": Case(lambda w: w.expand(ROWS, 3) * 1, (some(3),), False),
    "broadcast": Case(lambda w, x: w * x, (some(3), TERMS), False),
    "repeat": Case(lambda w: w.repeat(ROWS, 1), (some(1, 3),), False),
    "repeat_interleave": Case(lambda w: w.repeat_interleave(ROWS, 0), (some(1, 3),), False),
    "unfold": Case(lambda x: x.unfold(0, ROWS, 1), (some(2 * ROWS),), True),
    "as_strided": Case(lambda x: x.as_strided((ROWS, ROWS), (1, 1)), (some(2 * ROWS),), True),
    "cumsum": Case(lambda x: x.cumsum(0), (TERMS,), False),
    # Weights that many rows share.
    "linear": Case(lambda x, w, b: F.linear(x, w, b), (TERMS, some(2, 3), some(2)), False),
    "bilinear": Case(
        lambda x, w, b: F.bilinear(x, x, w, b), (TERMS, some(2, 3, 3), some(2)), False
    ),
    "conv1d": Case(lambda x, w, b: F.conv1d(x, w, b), (some(2, 3, ROWS), some(4, 3, 3), some(4)), False),
    "conv2d": Case(lambda x, w, b: F.conv2d(x, w, b), (some(1, 2, SQUARE, SQUARE), some(3, 2, 3, 3), some(3)), False),
    "conv_transpose2d": Case(
        lambda x, w, b: F.conv_transpose2d(x, w, b), (some(1, 2, SQUARE, SQUARE), some(2, 3, 3, 3), some(3)), False
    ),
    "prelu": Case(lambda x, w: F.prelu(x, w), (some(ROWS, 3, mean=-1.0), some(3)), False),
    "layer_norm": Case(
        lambda x, w, b: F.layer_norm(x, (32,), w, b), (some(ROWS, 32, mean=0), some(32), some(32)), True
    ),
    "layer_norm, two dimensions": Case(
        lambda x, w, b: F.layer_norm(x, (2, 16), w, b), (some(ROWS, 2, 16, mean=0), some(2, 16), some(2, 16)), True
    ),
    "layer_norm, float32 weights": Case(
        lambda x, w, b: F.layer_norm(x, (32,), w, b), (some(ROWS, 32, mean=0), some(32), some(32)), True, float32=(1, 2)
    ),
    "rms_norm": Case(lambda x, w: F.rms_norm(x, (8,), w), (some(ROWS, 8), some(8)), False),
    "group_norm": Case(lambda x, w, b: F.group_norm(x, 2, w, b), (IMAGES, some(4), some(4)), True),
    "instance_norm": Case(lambda x, w, b: F.instance_norm(x, weight=w, bias=b), (IMAGES, some(4), some(4)), True),
    "batch_norm": Case(
        lambda x, w, b: F.batch_norm(x, None, None, w, b, training=True), (some(ROWS, 3, mean=3.0), some(3), some(3)),
        True,
    ),
    "batch_norm, images": Case(
        lambda x, w, b: F.batch_norm(x, None, None, w, b, training=True), (IMAGES, some(4), some(4)), True
    ),
    "attention": Case(
        lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, attn_mask=m),
        (some(1, 1, ROWS, 4, mean=0), some(1, 1, 3, 4, mean=0), some(1, 1, 3, 4, mean=0), some(1, 3, mean=0)), False,
    ),
    # Pixels that many windows read.
    "grid_sample": Case(lambda x: sampled(x, SQUARE, SQUARE), (some(1, 1, 4, 4),), True),
    "grid_sample, volumes": Case(lambda x: sampled(x, 15, 15, 15), (some(1, 1, 4, 4, 4),), True),
    "interpolate": Case(lambda x: F.interpolate(x, (110, 110), mode="bilinear"), (some(1, 1, 2, 2),), False),
    "interpolate, nearest": Case(lambda x: F.interpolate(x, 2 * ROWS), (some(1, 1, 2),), False),
    "max_pool1d": Case(lambda x: F.max_pool1d(x, ROWS + 1, 1), (spike(1, 1, 2 * ROWS + 1),), True),
    "max_pool2d": Case(lambda x: F.max_pool2d(x, 51, 1, 25), (spike(1, 1, 65, 65),), True),
    "max_pool3d": Case(lambda x: F.max_pool3d(x, 15, 1, 7), (spike(1, 1, 29, 29, 29),), True),
    "avg_pool2d": Case(lambda x: F.avg_pool2d(x, 51, 1, 25, divisor_override=1), (some(1, 1, 52, 52),), True),
    "adaptive_avg_pool1d": Case(lambda x: F.adaptive_avg_pool1d(x, 2 * ROWS), (some(1, 1, 2),), True),
    "adaptive_avg_pool2d": Case(lambda x: F.adaptive_avg_pool2d(x, (99, 99)), (some(1, 1, 2, 2),), True),
    "adaptive_avg_pool3d": Case(lambda x: F.adaptive_avg_pool3d(x, (25, 25, 25)), (some(1, 1, 2, 2, 2),), True),
    "adaptive_max_pool2d": Case(lambda x: F.adaptive_max_pool2d(x, (99, 99)), (some(1, 1, 2, 2),), True),
    "adaptive_max_pool3d": Case(lambda x: F.adaptive_max_pool3d(x, (25, 25, 25)), (some(1, 1, 2, 2, 2),), True),
    "pad": Case(lambda x: F.pad(x, (ROWS, ROWS), mode="replicate"), (some(1, 1, 2),), True),
    "pad, images": Case(lambda x: F.pad(x, (SQUARE,) * 4, mode="replicate"), (some(1, 1, 2, 2),), True),
    "pad, volumes": Case(lambda x: F.pad(x, (14,) * 6, mode="replicate"), (some(1, 1, 2, 2, 2),), True),
    "F.unfold": Case(lambda x: F.unfold(x, (51, 51)), (some(1, 1, 101, 101),), True),
    # Sums of the forward.
    "sum": Case(lambda x: x.sum(), (some(ROWS),), False, True),
    "sum, rows": Case(lambda x: x.sum(0), (TERMS,), False, True),
    "mean": Case(lambda x: x.mean(), (some(ROWS),), False, True),
    "norm": Case(lambda x: x.norm(dim=0), (TERMS,), False, True),
    "cross_entropy": Case(lambda x: F.cross_entropy(x, NOUGHTS), (TERMS,), False, True),
    "nll_loss": Case(lambda x: F.nll_loss(x, NOUGHTS, reduction="sum"), (TERMS,), False, True),
    "mse_loss": Case(lambda x: F.mse_loss(x, -x), (TERMS,), False, True),
    "F.fold": Case(
        lambda x: F.fold(x, (1, 1), (51, 51), padding=25), (some(1, 2601, 1),), False, True
    ),
    "index_add": Case(lambda x, y: x.index_add(0, NOUGHTS, y), (SLOTS, TERMS), False, True),
    "index_add, alpha": Case(lambda x, y: x.index_add(0, NOUGHTS, y, alpha=0.5), (SLOTS, TERMS), True, True),
    "index_add, vectors": Case(lambda x, y: x.index_add(0, NOUGHTS, y), (some(4), some(ROWS)), True, True),
    "index_add_": Case(lambda x, y: (x * 1).index_add_(0, NOUGHTS, y, alpha=2), (SLOTS, TERMS), True, True),
    "index_put": Case(lambda x, y: x.index_put((NOUGHTS,), y, accumulate=True), (SLOTS, TERMS), True, True),
    "index_put_": Case(lambda x, y: (x * 1).index_put_((NOUGHTS,), y, accumulate=True), (SLOTS, TERMS), True, True),
    "put": Case(lambda x, y: x.put(NOUGHTS, y, accumulate=True), (SLOTS, some(ROWS)), True, True),
    "put_": Case(lambda x, y: (x * 1).put_(NOUGHTS, y, accumulate=True), (SLOTS, some(ROWS)), True, True),
    "index_reduce": Case(lambda x, y: x.index_reduce(0, NOUGHTS, y, "mean"), (SLOTS, TERMS), True, True),
    "scatter_add": Case(lambda x, y: x.scatter_add(0, noughts(ROWS, 3), y), (SLOTS, TERMS), False, True),
    "scatter_reduce": Case(lambda x, y: x.scatter_reduce(0, noughts(ROWS, 3), y, "mean"), (SLOTS, TERMS), False, True),
    "segment_reduce": Case(
        lambda x: torch.segment_reduce(x, "sum", lengths=torch.tensor([ROWS])), (TERMS,), True, True
    ),
    "adaptive_avg_pool3d, forward": Case(
        lambda x: F.adaptive_avg_pool3d(x, (2, 1, 1)), (some(1, 1, 30, 15, 15),), True, True
    ),
    "avg_pool2d, forward": Case(lambda x: F.avg_pool2d(x, SQUARE), (some(1, 1, SQUARE, SQUARE),), False, True),
    "addbmm": Case(lambda x, y: torch.addbmm(x, y, y), (some(1, 1), some(ROWS, 1, 1)), True, True),
    "histc": Case(lambda x: torch.histc(x, 1, 0, 2), (some(ROWS),), True, True),
    "matmul": Case(lambda x, y: x.T @ y, (TERMS, TERMS), False, True),
    "linear, forward": Case(lambda x, w: F.linear(x, w), (some(2, ROWS), some(3, ROWS)), False, True),
    "einsum": Case(lambda x: torch.einsum("nd,nd->d", x, x), (TERMS,), False, True),
}  # fmt: skip
# What torch calls a beta is not ours to warn of.
pytestmark = pytest.mark.filterwarnings("ignore:index_reduce:UserWarning")
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
# Thousands of windows of thousands of numbers: float16 has to be given as many.
LARGE = ("unfold", "as_strided", "F.unfold", "max_pool3d")


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    yield
    torch.set_num_threads(1)


def cast(case: Case, dtype: torch.dtype) -> list[Tensor]:
    return [x.to(torch.float32 if i in case.float32 else dtype) for i, x in enumerate(case.args)]


def cotangent_of(case: Case, args: list[Tensor]) -> Tensor:
    """Numbers around 1, in the dtype of the result."""
    out = case.f(*args)
    noise = torch.rand(out.numel(), generator=torch.Generator().manual_seed(7), dtype=torch.float64).view(out.shape)
    return (noise * 0.5 + 0.75).to(torch.bfloat16).to(out.dtype)


def by_fzero(case: Case, args: list[Tensor], cotangent: Tensor) -> list[Tensor]:
    return [fz.call(case.f, *args)] if case.forward else list(fz.vjp(case.f, *args)[1](cotangent))


def by_torch(case: Case, args: list[Tensor]) -> list[Tensor]:
    if case.forward:
        return [case.f(*args)]
    cotangent = cotangent_of(case, args)
    pullback = torch.func.vjp(case.f, *args)[1]
    with torch.no_grad():
        return list(pullback(cotangent))


@functools.cache
def exact(case: Case) -> list[Tensor]:
    return by_torch(case, list(case.args))


def error(found: list[Tensor], case: Case) -> float:
    """The largest error of a result, as a part of its size."""
    return max(float((x.double() - y).norm() / y.norm()) for x, y in zip(found, exact(case), strict=True))


# A few roundings on the way: of statistics, of the products of rows.
BOUND = {torch.bfloat16: 2**-6, torch.float16: 2**-9}


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        pytest.param(
            case, dtype, marks=[pytest.mark.slow] * (dtype == torch.float16 and name in LARGE), id=f"{name}-{dtype}"
        )
        for name, case in CASES.items()
        for dtype in LOW
    ],
)
def test_sums_are_right_to_the_dtype(case: Case, dtype: torch.dtype) -> None:
    args = cast(case, dtype)
    assert error(by_fzero(case, args, cotangent_of(case, args)), case) < BOUND[dtype]


@every_case
def test_torch_sums_right_where_its_own_sum_is_taken_and_wrong_where_ours_is(case: Case) -> None:
    # When an upgrade of torch mends an operator, its formula here can go.
    assert (error(by_torch(case, cast(case, torch.bfloat16)), case) > BOUND[torch.bfloat16]) == case.ours


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=[pytest.mark.slow] * (not case.ours or name in LARGE[:2]), id=name)
        for name, case in CASES.items()
    ],
)
def test_neither_traces_nor_threads_change_a_bit(case: Case) -> None:
    args = cast(case, torch.bfloat16)
    cotangent = cotangent_of(case, args)
    eager = by_fzero(case, args, cotangent)
    assert_same_bits(fz.jit(lambda args, cotangent: by_fzero(case, args, cotangent))(args, cotangent), eager)
    torch.set_num_threads(2)
    assert_same_bits(by_fzero(case, args, cotangent), eager)


def test_sums_to_one_number_do_not_depend_on_threads() -> None:
    x = torch.randn(1 << 18).to(torch.bfloat16)
    one = fz.call(lambda x: [x.sum(), x.view(1, -1).sum((0, 1), keepdim=True)], x)
    torch.set_num_threads(2)
    assert_same_bits(fz.call(lambda x: [x.sum(), x.view(1, -1).sum((0, 1), keepdim=True)], x), one)
    assert one[0] == x.double().sum().to(torch.bfloat16) and one[1].shape == (1, 1)


@pytest.mark.parametrize("weight", [None, torch.tensor([1.0, 0.5, 2.0], dtype=torch.bfloat16)], ids=["one", "weighted"])
@pytest.mark.parametrize("images", [False, True], ids=["rows", "images"])
def test_targets_are_counted_beyond_what_the_dtype_can_count(weight: Tensor | None, images: bool) -> None:
    target = torch.arange(1001) % 3
    target[5:900:7] = -100
    x = F.log_softmax(some(1001, 3), -1)
    if images:
        x, target = x.T.reshape(1, 3, 7, 143).contiguous(), target.view(1, 7, 143)
    low = x.to(torch.bfloat16)
    exact, exact_gradient = torch.func.grad_and_value(
        lambda x: F.nll_loss(x, target, None if weight is None else weight.double())
    )(low.double())[::-1]
    loss, gradient = fz.value_and_grad(lambda x: F.nll_loss(x, target, weight))(low)
    assert loss == exact.to(torch.bfloat16)
    assert torch.equal(gradient == 0, exact_gradient == 0)
    assert ((gradient.double() / exact_gradient)[exact_gradient != 0] - 1).abs().max() < 2**-7.5
    with pytest.raises(IndexError, match="out of bounds"):
        fz.call(lambda x: F.nll_loss(x, target + 3, weight, ignore_index=-97), low)


class Net(nn.Module):
    """Tokens that share rows, and norms."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(3, 8)
        self.norm = nn.LayerNorm(8)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.norm(self.embed(tokens))


APPLY, PARAMS = fz.functional(Net())
TOKENS = torch.arange(ROWS) % 3


def loss(params: Any, tokens: Tensor) -> Tensor:
    return (APPLY(params, tokens).float() * (1 + tokens[:, None]) * torch.arange(8)).sum() * 2**-20


def autocast_by_hand(params: Any, tokens: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        params = fz.tree.map(lambda x: x * torch.ones_like(x, dtype=torch.bfloat16), params)
        return loss(fz.tree.map(lambda x: x.to(torch.bfloat16), params), tokens)


def exact_gradient(f: Any, params: Any) -> Any:
    return torch.func.grad(f)(fz.tree.map(torch.Tensor.double, params), TOKENS)


def assert_close(found: Any, wanted: Any, bound: float = 2**-6) -> None:
    for x, y in zip(fz.tree.leaves(found), fz.tree.leaves(wanted), strict=True):
        assert (x.double() - y).norm() <= bound * y.norm()


AUTOCAST = fz.Policy(autocast=torch.bfloat16)
BY = {
    "value_and_grad": lambda f, s: fz.value_and_grad(f)(s, TOKENS)[1],
    "traced": lambda f, s: fz.jit(lambda s, tokens: fz.value_and_grad(f)(s, tokens)[1])(s, TOKENS),
    "remat": lambda f, s: fz.grad(fz.remat(f))(s, TOKENS),
    "split_vjp": lambda f, s: by_split_vjp(f, s),
    "accumulate": lambda f, s: fz.accumulate(fz.value_and_grad(f), 2)(s, TOKENS)[1],
}


def by_split_vjp(f: Any, state: Any) -> Any:
    forward, backward = fz.split_vjp(f)
    out, residuals = forward(state, TOKENS)
    return backward(residuals, torch.ones_like(out))[0]


@pytest.mark.parametrize("way", BY)
@pytest.mark.parametrize(("policy", "f"), [
    ("bf16", loss), ("mixed", loss), (AUTOCAST, loss), ("fp16-mixed", loss), ("fp32", autocast_by_hand),
], ids=["bf16", "mixed", "autocast", "fp16-mixed", "by hand"])  # fmt: skip
def test_every_way_to_a_gradient_sums_wide(way: str, policy: Any, f: Any) -> None:
    state = fz.init(PARAMS, fz.sgd(0.1), fz.make_mesh("cpu"), policy=policy)
    low = fz.call(lambda p: p, state)
    wanted = exact_gradient(loss, low)
    share = 0.5 if way == "accumulate" else 1.0
    assert_close(fz.gather(BY[way](f, state)), fz.tree.map(lambda x: x * share, wanted))


def test_a_wrapped_model_sums_wide() -> None:
    state = fz.init(PARAMS, fz.sgd(0.1), fz.make_mesh("cpu"), policy="bf16")
    model = Model(loss, state)
    model(TOKENS).backward()
    assert_close(fz.gather(model.grads), exact_gradient(loss, fz.call(lambda p: p, state)))


def low_params() -> Any:
    return fz.tree.map(lambda x: x.to(torch.bfloat16), PARAMS)


def squared_gradient(grad: Any, params: Any) -> Tensor:
    """A penalty on a gradient, in float32."""
    terms = [x.float().square().sum() for x in fz.tree.leaves(grad(loss)(params, TOKENS))]
    return torch.stack(terms).sum()


def test_second_derivatives_sum_wide() -> None:
    params = low_params()
    exact = torch.func.grad(lambda p: squared_gradient(torch.func.grad, p))(fz.tree.map(torch.Tensor.double, params))
    assert_close(fz.grad(lambda p: squared_gradient(fz.grad, p))(params), exact, bound=2**-4)
    assert_close(fz.grad(lambda p: squared_gradient(torch.func.grad, p))(params), exact, bound=2**-4)


@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # torch.func.jvp, at its first use
def test_gradients_under_jvp_and_for_each_example_sum_wide() -> None:
    params = low_params()
    found: Any = torch.func.jvp(lambda p: fz.grad(loss)(p, TOKENS), (params,), (params,))
    assert_close(found[0], exact_gradient(loss, params))
    each = torch.func.vmap(fz.grad(loss), in_dims=(None, 0))(params, torch.stack([TOKENS, TOKENS]))
    assert_close(each, fz.tree.map(lambda x: torch.stack([x, x]), exact_gradient(loss, params)))


def test_a_pullback_runs_under_the_mode_only_where_there_was_a_cast() -> None:
    seen: list[bool] = []

    class Probe(torch.autograd.Function):
        @staticmethod
        def forward(x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            pass

        @staticmethod
        def backward(ctx: Any, cotangent: Tensor) -> Tensor:
            seen.append(isinstance(summing(), Summing))
            return cotangent

    for dtype in (torch.float32, torch.bfloat16):
        fz.grad(lambda x, dtype=dtype: Probe.apply(x).to(dtype).sum())(torch.ones(3))
    assert seen == [False, True]
    assert summing() is None
