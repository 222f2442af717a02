"""Attention masks of numbers beside queries of another dtype: cast, on every way that leads to a kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.bias import causal_lower_right

import fzero as fz
from fzero._torch import TorchDispatchMode
from fzero.modules.attention_masks import cast, masks_cast
from tests.pairwise import pairwise
from tests.small import assert_same_bits

# torch compiles its jvp rules with torch.jit.script on first use, which warns of itself, and warns where vmap loops.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning"),
]

X, BAR = torch.randn(2, 2, 6, 8, generator=torch.Generator().manual_seed(0))
MASK = torch.randn(6, 6, generator=torch.Generator().manual_seed(1)).masked_fill(torch.ones(6, 6).triu(1).bool(), -1e9)


class Arriving(TorchDispatchMode):
    """Notes the dtypes of queries and mask of each attention operator that arrives below all transforms."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, set[torch.dtype]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found += [noted] if (noted := fused(func, args, kwargs or {})) else []
        return func(*args, **(kwargs or {}))


def fused(op: Any, args: Any, kwargs: Any) -> tuple[str, set[torch.dtype]] | None:
    """The name of a fused attention operator, and the dtypes of what it is given besides its own statistics."""
    if "scaled_dot_product" not in str(op):
        return None
    given = dict(zip((a.name for a in op._schema.arguments), args, strict=False)) | kwargs
    values = [given.get(name) for name in ("query", "key", "value", "attn_mask", "attn_bias")]
    values = [x.meta["val"] if isinstance(x, torch.fx.Node) else x for x in values]
    return str(op), {x.dtype for x in values if isinstance(x, Tensor)}


class Block(nn.Module):
    """A module as users write them: its mask is float32 whatever its parameters are."""

    def __init__(self, attend: Callable[..., Tensor]) -> None:
        super().__init__()
        self.mix, self.attend = nn.Linear(8, 24), attend
        self.heads = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.attend(self, x.to(self.mix.weight.dtype), mask)


def by_function(block: Any, x: Tensor, mask: Tensor) -> Tensor:
    q, k, v = (part.unflatten(-1, (2, 4)).transpose(-3, -2) for part in block.mix(x).chunk(3, -1))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(-3, -2).flatten(-2)


def by_module(block: Any, x: Tensor, mask: Tensor) -> Tensor:
    found: Tensor = block.heads(x, x, x, attn_mask=mask, need_weights=False)[0]
    return found


def by_module_with_weights(block: Any, x: Tensor, mask: Tensor) -> Tensor:
    found, weights = block.heads(x, x, x, attn_mask=mask, key_padding_mask=mask[: len(x)] * 0)
    result: Tensor = found + weights.sum()
    return result


CALLERS = {"function": by_function, "module": by_module, "module, weights": by_module_with_weights}
# Which of these come to a fused operator, and in which of the ways below torch takes the formula instead.
FUSED, FORMULA = ("function", "module"), ("jvp", "grad, of the mask")


def _vjp(f: Any, params: Any, x: Tensor, mask: Tensor) -> Any:
    out, pullback = fz.vjp(lambda params, x: f(params, x, mask), params, x)
    return out, pullback(torch.ones_like(out))


def _split(f: Any, params: Any, x: Tensor, mask: Tensor) -> Any:
    forward, backward = fz.split_vjp(lambda *args: f(*args[:2], args[2].detach()))
    out, residuals = forward(params, x, mask)
    return backward(residuals, torch.ones_like(out))


def _rows(f: Any) -> Any:
    return lambda params, x, mask: torch.vmap(lambda row: f(params, row[None], mask))(x)


def _tangent(f: Any, params: Any, x: Tensor, mask: Tensor) -> Any:
    return torch.func.jvp(lambda x, mask: fz.call(f, params, x, mask), (x, mask), (x, mask))


# From a loss of (parameters, examples, mask), and these, to what is compared.
WAYS: dict[str, Callable[..., Any]] = {
    "call": lambda f, *args: fz.call(f, *args),
    "grad": lambda f, *args: fz.grad(f)(*args),
    "grad, of the mask": lambda f, *args: fz.grad(f, 2)(*args),
    "vjp": _vjp,
    "split_vjp": _split,
    "remat": lambda f, *args: fz.grad(fz.remat(f))(*args),
    "vmap": lambda f, *args: fz.call(_rows(f), *args),
    "vmap in grad": lambda f, *args: fz.grad(lambda *args: _rows(f)(*args).sum())(*args),
    "grad in vmap": lambda f, *args: fz.call(
        lambda p, x, mask: torch.vmap(torch.func.grad(lambda row: f(p, row[None], mask)))(x), *args
    ),
    "jvp": _tangent,
}


# What is right by another way than the one under test: in float64, the fake attention of torch 2.11 has another dtype
# than the real one, and split_vjp refuses such residuals.
EXACT: dict[str, Callable[..., Any]] = {
    "split_vjp": lambda f, *args: fz.grad(lambda *args: f(*args[:2], args[2].detach()), (0, 1, 2))(*args),
}


def case(caller: str, low: bool) -> tuple[Any, ...]:
    """A loss, its parameters, examples, and mask: in bfloat16 by the policy, or whole in float64."""
    torch.manual_seed(0)
    apply, params = fz.functional(Block(CALLERS[caller]))
    params, x = fz.tree.map(lambda p: p.bfloat16().float(), (params, X))  # exact in both
    if low:
        kept: Any = fz.shard(params, fz.make_mesh("cpu"), fz.zero(3), policy=fz.Policy(compute=torch.bfloat16))
        mask = MASK
    else:
        kept, x, mask = fz.tree.map(Tensor.double, (params, x, MASK))

    def loss(params: Any, x: Tensor, mask: Tensor) -> Tensor:
        out = apply(params, x, mask)
        return (out * BAR[: len(out)].to(out.dtype)).sum(dtype=torch.promote_types(out.dtype, torch.float32))

    return loss, kept, x, mask


def whole(result: Any) -> list[Tensor]:
    return fz.tree.leaves(fz.tree.map(lambda x: x, gathered(result)))


def gathered(result: Any) -> Any:
    if isinstance(result, fz.Sharded):
        return fz.gather(result)
    return tuple(map(gathered, result)) if isinstance(result, tuple) else result


@pytest.mark.parametrize(("caller", "way", "traced"), pairwise(CALLERS, WAYS, [False, True]))
def test_what_arrives_has_one_dtype_and_is_right(caller: str, way: str, traced: bool) -> None:
    f, *args = case(caller, low=True)
    expected = whole(EXACT.get(way, WAYS[way])(*case(caller, low=False)))
    with Arriving() as arriving:
        found = whole(WAYS[way](f, *args))
    for got, right in zip(found, expected, strict=True):
        scale = float(right.abs().max())
        torch.testing.assert_close(got.double(), right, rtol=0.02, atol=0.02 * scale)
    operators = arriving.found
    if traced:
        jitted = fz.jit(lambda *args: WAYS[way](f, *args))
        assert_same_bits(whole(jitted(*args)), found)
        (program,) = jitted.programs
        nodes = [node for node in program.trace.module.graph.nodes if node.op == "call_function"]
        operators += [noted for node in nodes if (noted := fused(node.target, node.args, node.kwargs))]
    assert all(dtypes == {torch.bfloat16} for _, dtypes in operators)
    assert bool(operators) == (caller in FUSED and way not in FORMULA)


LOWEST = torch.finfo(torch.float32).min


@pytest.mark.parametrize(
    ("dtype", "value", "expected"),
    [
        (torch.bfloat16, LOWEST, torch.finfo(torch.bfloat16).min),
        (torch.bfloat16, -LOWEST, torch.finfo(torch.bfloat16).max),
        (torch.float16, -1e9, torch.finfo(torch.float16).min),
        (torch.float16, -torch.inf, -torch.inf),
        (torch.float16, torch.nan, torch.nan),
        (torch.bfloat16, 1.003, 1.0),
        (torch.float64, -1e9, -1e9),
    ],
)
def test_what_is_finite_stays_so(dtype: torch.dtype, value: float, expected: float) -> None:
    found = cast(torch.tensor([value, 1.0]), dtype)
    assert_same_bits(found, torch.tensor([expected, 1.0], dtype=dtype))


def test_a_row_without_a_key_is_that_of_torch_in_float32() -> None:
    q, mask = X.bfloat16(), torch.full((6, 6), LOWEST)
    expected = F.scaled_dot_product_attention(*(q.float(),) * 3, attn_mask=mask)
    torch.testing.assert_close(fz.attention(q, q, q, mask=mask).float(), expected, rtol=0.02, atol=0.02)


def test_other_masks_and_calls_outside_are_as_torch_has_them() -> None:
    q, below = X[None].bfloat16(), torch.ones(6, 6).tril().bool()
    options: list[dict[str, Any]] = [
        {}, {"attn_mask": below}, {"attn_mask": MASK.bfloat16(), "scale": 0.3}, {"is_causal": True, "enable_gqa": True},
        {"attn_mask": causal_lower_right(6, 6)},
    ]  # fmt: skip
    for given in options:
        plain = F.scaled_dot_product_attention(q, q, q, **given)
        with masks_cast():
            assert_same_bits(F.scaled_dot_product_attention(q, q, q, **given), plain)
    with Arriving() as arriving:
        F.scaled_dot_product_attention(q, q, q, attn_mask=MASK)
    assert arriving.found[0][1] == {torch.bfloat16, torch.float32}
