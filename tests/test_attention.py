"""Attention: torch's kernels and one from outside, under every transform, eager and traced."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fzero as fz
from tests.small import assert_same_bits

# torch compiles its jvp rules with torch.jit.script on first use, which warns of itself.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")

Q, K, V, BAR = torch.randn(4, 2, 2, 5, 4, generator=torch.Generator().manual_seed(0))
ABOVE = torch.ones(5, 5, dtype=torch.bool).triu(1)


def weights(q: Tensor, k: Tensor, causal: bool, scale: float) -> Tensor:
    scores = q @ k.transpose(-1, -2) * scale
    return scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf) if causal else scores


# A stand-in for flash attention: two operators that nothing sees into, which read memory.


@torch.library.custom_op("fzero_tests::flash", mutates_args=())
def flash(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    q.numpy()
    scores = weights(q, k, causal, scale)
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


@flash.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:-1])


@torch.library.custom_op("fzero_tests::flash_backward", mutates_args=())
def flash_backward(
    bar: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    lse.numpy()
    p = (weights(q, k, causal, scale) - lse[..., None]).exp()
    scores_bar = p * (bar @ v.transpose(-1, -2) - (bar * out).sum(-1, keepdim=True)) * scale
    return scores_bar @ k, scores_bar.transpose(-1, -2) @ q, p.transpose(-1, -2) @ bar


@flash_backward.register_fake
def _(
    bar: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def forward(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> tuple[Tensor, Any]:
    out, lse = flash(q, k, v, causal, scale)
    return out, {"inputs": (q, k, v), "out": out, "lse": lse, "options": (causal, scale)}


def backward(residuals: Any, bar: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return flash_backward(bar, *residuals["inputs"], residuals["out"], residuals["lse"], *residuals["options"])


OUTSIDE = fz.AttentionKernel(forward, backward)
KERNELS = {"default": None, "math": "math", "outside": OUTSIDE}
kernels = pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)


def loss(q: Tensor, k: Tensor, v: Tensor, kernel: Any, **options: Any) -> Tensor:
    return (fz.attention(q, k, v, kernel=kernel, **options) * BAR).sum()


def reference(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Tensor:
    return (weights(q, k, causal, scale).softmax(-1) @ v * BAR.double()).sum()


def in_doubles(f: Callable[..., Any]) -> tuple[Tensor, ...]:
    """What `f` makes of the inputs in float64, rounded: the reference of a gradient."""
    return tuple(x.float() for x in f(Q.double(), K.double(), V.double()))


OPTIONS = [
    ({}, (False, 0.5)),
    ({"causal": True}, (True, 0.5)),
    ({"causal": True, "scale": 0.3}, (True, 0.3)),
]


@kernels
@pytest.mark.parametrize(("options", "expected"), OPTIONS)
def test_the_gradient_is_that_of_the_formula_eager_traced_and_recomputed(kernel: Any, options: Any, expected: Any):
    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return loss(q, k, v, kernel, **options)

    def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return reference(q, k, v, *expected)

    want = in_doubles(torch.func.grad(exact, (0, 1, 2)))
    gradient = fz.grad(f, (0, 1, 2))
    got = gradient(Q, K, V)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert_same_bits(fz.jit(gradient)(Q, K, V), got)
    torch.testing.assert_close(fz.grad(fz.remat(f), (0, 1, 2))(Q, K, V), want, rtol=1e-4, atol=1e-5)
    leaves = [x.clone().requires_grad_() for x in (Q, K, V)]
    torch.testing.assert_close(torch.autograd.grad(f(*leaves), leaves), want, rtol=1e-4, atol=1e-5)


def test_a_kernel_from_outside_stands_in_the_program_as_it_is():
    program = fz.trace(fz.grad(lambda q: loss(q, K, V, OUTSIDE)))(Q)
    names = [str(node.target) for node in program.trace.module.graph.nodes]
    assert [name for name in names if "fzero_tests" in name] == [
        "fzero_tests.flash.default",
        "fzero_tests.flash_backward.default",
    ]


@kernels
def test_the_gradient_of_each_example(kernel: Any):
    def f(q: Tensor, k: Tensor, v: Tensor, bar: Tensor) -> Tensor:
        return (fz.attention(q, k, v, causal=True, kernel=kernel) * bar).sum()

    each = torch.vmap(torch.func.grad(f, (0, 1, 2)))(Q, K, V, BAR)
    whole = torch.func.grad(f, (0, 1, 2))(Q, K, V, BAR)
    torch.testing.assert_close(each, whole, rtol=1e-4, atol=1e-5)
    inside = torch.func.grad(lambda q: torch.vmap(f)(q, K, V, BAR).sum())(Q)
    torch.testing.assert_close(inside, whole[0], rtol=1e-4, atol=1e-5)


def along(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A Hessian-vector product: forward over reverse."""
    return lambda q, k, v: torch.func.jvp(lambda q: fz.grad(f)(q, k, v), (q,), (torch.ones_like(q),))[1]


def penalty(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The gradient of the square of a gradient: reverse over reverse."""
    return lambda q, k, v: fz.grad(lambda q: fz.grad(f)(q, k, v).square().sum())(q)


def tangent(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda q, k, v: torch.func.jvp(f, (q, k, v), (k, v, q))[1]


SECOND = {"forward over reverse": along, "reverse over reverse": penalty, "forward": tangent}


@pytest.mark.parametrize("order", SECOND.values(), ids=SECOND)
@pytest.mark.parametrize("kernel", [None, "math"])
def test_the_formula_is_taken_where_transforms_nest(kernel: Any, order: Any):
    f = order(lambda q, k, v: loss(q, k, v, kernel, causal=True))
    want = in_doubles(lambda *qkv: (order(lambda q, k, v: reference(q, k, v, True, 0.5))(*qkv),))
    torch.testing.assert_close(f(Q, K, V), want[0], rtol=1e-3, atol=1e-4)
    assert_same_bits(fz.jit(f)(Q, K, V), f(Q, K, V))


@pytest.mark.parametrize("order", SECOND.values(), ids=SECOND)
def test_a_kernel_from_outside_has_a_first_derivative_only(order: Any):
    with pytest.raises(fz.ModuleError, match='kernel="math"'):
        order(lambda q, k, v: loss(q, k, v, OUTSIDE))(Q, K, V)


def test_a_mask_of_numbers_is_cast_to_the_dtype_of_the_queries():
    mask, q, k, v = torch.randn(5, 5), *(x.bfloat16() for x in (Q, K, V))
    found = fz.attention(q, k, v, mask=mask)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, fz.attention(q, k, v, mask=mask.bfloat16()))


def test_masks_and_groups_of_heads():
    mask = ~ABOVE
    masked = fz.grad(lambda q, k, v: loss(q, k, v, None, mask=mask), (0, 1, 2))
    causal = fz.grad(lambda q, k, v: loss(q, k, v, None, causal=True), (0, 1, 2))
    torch.testing.assert_close(masked(Q, K, V), causal(Q, K, V))
    one = K[:, :1], V[:, :1]
    repeated = fz.attention(Q, *(x.expand(-1, 2, -1, -1) for x in one))
    torch.testing.assert_close(fz.attention(Q, *one), repeated)


def test_dropout_is_drawn_from_the_key():
    f = fz.keyed(lambda q: fz.attention(q, K, V, dropout=0.5))
    assert_same_bits(f(3, Q), f(3, Q))
    assert_same_bits(fz.jit(lambda q: f(3, q))(Q), f(3, Q))
    assert not torch.equal(f(3, Q), f(4, Q))
    dropped = fz.keyed(lambda q: fz.attention(q, torch.zeros_like(K), torch.ones_like(V), dropout=0.5))(3, Q)
    assert set((dropped[..., 0] * 5 / 2).round(decimals=3).unique().tolist()) <= {0.0, 1.0, 2.0, 3.0, 4.0, 5.0}


def wrong_output(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> tuple[Tensor, Any]:
    return q[..., :1] * 1, (q, k, v)


def wrong_gradient(residuals: Any, bar: Tensor) -> Any:
    return bar, bar[:, :1], bar


@pytest.mark.parametrize(
    ("error", "match", "call"),
    [
        (ValueError, "neither mask nor dropout.*dropout=0.5", lambda: loss(Q, K, V, OUTSIDE, dropout=0.5)),
        (ValueError, r"mask=bool\(5, 5\)", lambda: loss(Q, K, V, OUTSIDE, mask=ABOVE)),
        (
            fz.ShapeError,
            r"\(2, 2, 5, 1\).*expected \(2, 2, 5, 4\)",
            lambda: loss(Q, K, V, fz.AttentionKernel(wrong_output, backward)),
        ),
        (
            fz.ShapeError,
            "expected those of q, k and v",
            lambda: fz.grad(lambda q: loss(q, K, V, fz.AttentionKernel(forward, wrong_gradient)))(Q),
        ),
    ],
)
def test_wrong_use_is_named(error: type[Exception], match: str, call: Callable[[], Any]):
    with pytest.raises(error, match=match):
        call()


def test_a_raw_kernel_runs_eagerly_and_is_refused_by_a_trace_with_the_way_out():
    def raw(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> tuple[Tensor, Any]:
        q.numpy()
        return forward(q, k, v, causal=causal, scale=scale)

    gradient = fz.grad(lambda q: loss(q, K, V, fz.AttentionKernel(raw, backward)))
    torch.testing.assert_close(gradient(Q), fz.grad(lambda q: loss(q, K, V, "math"))(Q), rtol=1e-4, atol=1e-5)
    with pytest.raises(fz.ModuleError, match=r"custom_op"):
        fz.jit(gradient)(Q)
