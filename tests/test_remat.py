"""Recomputation changes what is kept, and no value: the same bits forward, backward, to any order, eager and traced."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fzero as fz
from tests import small

# Forward-mode differentiation makes torch import a module of its own that uses what torch has deprecated.
forward_mode = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")

Wrap = Callable[[Callable[..., Any]], Callable[..., Any]]


def kept(f: Callable[..., Any]) -> Callable[..., Any]:
    """What `fz.remat` is compared with: `f` itself."""
    return f


BOTH: tuple[Wrap, Wrap] = (kept, fz.remat)


@dataclass
class Pair:
    """A tree that is not made of dicts."""

    first: Tensor
    second: Tensor


def mlp(wrap: Wrap) -> Callable[[Any, Tensor], Tensor]:
    def block(w: Any, x: Tensor) -> Tensor:
        return x + torch.tanh(torch.tanh(x @ w["up"]) @ w["down"])

    def loss(p: Any, x: Tensor) -> Tensor:
        for w in p:
            x = wrap(block)(w, x)
        return x.square().sum()

    return loss


def loop_with_late_binding(wrap: Wrap) -> Callable[[Any, Tensor], Tensor]:
    def loss(p: Any, x: Tensor) -> Tensor:
        for power, w in enumerate(p, 1):
            scale = 0.5**power
            x = wrap(lambda w, x: torch.tanh(x @ w["up"] @ w["down"]) * scale + power)(w, x)  # noqa: B023
        return x.square().sum()

    return loss


def nested(wrap: Wrap) -> Callable[[Any, Tensor], Tensor]:
    def half(w: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(x @ w)

    def block(w: Any, x: Tensor) -> Tensor:
        return x + wrap(half)(w["down"], wrap(half)(w["up"], x))

    def loss(p: Any, x: Tensor) -> Tensor:
        for w in p:
            x = wrap(block)(w, x)
        return x.square().sum()

    return loss


def trees_in_and_out(wrap: Wrap) -> Callable[[Any, Tensor], Tensor]:
    def block(w: Any, pair: Pair, *, power: int) -> tuple[Pair, dict[str, Any]]:
        hidden = torch.tanh(pair.first @ w["up"] @ w["down"]) ** power
        return Pair(hidden, pair.second + hidden), {"where": hidden.argmax(-1), "name": "block", "none": None}

    def loss(p: Any, x: Tensor) -> Tensor:
        pair = Pair(x, x)
        for w in p:
            pair, info = wrap(block)(w, pair, power=2)
            assert info["where"].dtype == torch.int64 and info["name"] == "block" and info["none"] is None
        return (pair.first * pair.second).sum() + info["where"].sum()

    return loss


def integers_and_constants_in(wrap: Wrap) -> Callable[[Any, Tensor], Tensor]:
    def block(table: Tensor, index: Tensor, scale: float, mask: Tensor | None) -> Tensor:
        assert mask is None
        return torch.tanh(table[index]) * scale

    def loss(p: Any, x: Tensor) -> Tensor:
        index = torch.arange(4)
        return torch.stack([wrap(block)(w["up"], index, 0.5, None).square().sum() for w in p]).sum() * x.mean()

    return loss


def unused_output(wrap: Wrap) -> Callable[[Any, Tensor], Tensor]:
    def loss(p: Any, x: Tensor) -> Tensor:
        used, _ = wrap(lambda w, x: (torch.sin(x @ w["up"]), torch.cos(x @ w["down"].T)))(p[0], x)
        return used.square().sum()

    return loss


LOSSES = {
    f.__name__: f
    for f in (mlp, loop_with_late_binding, nested, trees_in_and_out, integers_and_constants_in, unused_output)
}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


def weights() -> list[dict[str, Tensor]]:
    """Two blocks of width 6."""
    generator = torch.Generator().manual_seed(1)
    return [
        {"up": torch.randn(6, 8, generator=generator) * 0.3, "down": torch.randn(8, 6, generator=generator) * 0.3}
        for _ in range(2)
    ]


def inputs() -> Tensor:
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(2))


@every_loss
@pytest.mark.parametrize("transform", [kept, fz.jit], ids=["eager", "jit"])
def test_values_and_gradients_have_the_same_bits(transform, loss):
    expected = fz.value_and_grad(loss(kept), argnums=(0, 1))(weights(), inputs())
    actual = transform(fz.value_and_grad(loss(fz.remat), argnums=(0, 1)))(weights(), inputs())
    small.assert_same_bits(actual, expected)


@every_loss
def test_without_a_gradient_it_is_the_function(loss):
    assert torch.equal(loss(fz.remat)(weights(), inputs()), loss(kept)(weights(), inputs()))


def test_under_plain_autograd():
    gradients = []
    for wrap in BOTH:
        p = fz.tree.map(lambda w: w.requires_grad_(), weights())
        gradients.append(list(torch.autograd.grad(mlp(wrap)(p, inputs()), fz.tree.leaves(p))))
    small.assert_same_bits(*gradients)


def double(tree: Any) -> Any:
    return fz.tree.map(lambda x: x.double(), tree)


def penalty(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def slope(p: Any, x: Tensor) -> Tensor:
        return sum((g.square().sum() for g in fz.tree.leaves(fz.grad(loss)(p, x))), x.new_zeros(()))

    return slope


@pytest.mark.parametrize(
    ("transform", "loss"),
    [
        *(pytest.param(kept, loss, id=f"eager-{name}") for name, loss in LOSSES.items()),
        *(
            pytest.param(fz.jit, loss, id=f"jit-{name}", marks=[pytest.mark.slow] * (name not in ("mlp", "nested")))
            for name, loss in LOSSES.items()
        ),
    ],
)
def test_the_gradient_of_a_gradient(transform, loss):
    p, x = double(weights()), double(inputs())
    expected = small.flat(fz.grad(penalty(loss(kept)))(p, x))
    actual = small.flat(transform(fz.grad(penalty(loss(fz.remat))))(p, x))
    assert actual.keys() == expected.keys()
    for path, value in expected.items():  # products may be summed in another order
        torch.testing.assert_close(actual[path], value, rtol=1e-12, atol=1e-12, msg=path)


@forward_mode
@every_loss
@pytest.mark.parametrize("order", [1, 2])
def test_forward_mode(order, loss):
    p, x = double(weights()), double(inputs())
    tangents = (fz.tree.map(torch.ones_like, p), torch.ones_like(x))
    make = {1: lambda f: f, 2: lambda f: fz.grad(f)}[order]
    expected = torch.func.jvp(make(loss(kept)), (p, x), tangents)
    actual = torch.func.jvp(make(loss(fz.remat)), (p, x), tangents)
    for a, b in zip(fz.tree.leaves(actual), fz.tree.leaves(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_a_sharded_is_gathered_again_inside():
    tree, x = {"w": torch.randn(6, 6)}, inputs()
    pieces = fz.shard(tree, fz.make_mesh("cpu"), fz.zero(3))

    def loss(wrap: Wrap) -> Callable[[fz.Sharded, Tensor], Tensor]:
        return lambda s, x: wrap(lambda s, x: fz.call(lambda p, x: torch.tanh(x @ p["w"]), s, x))(s, x).sum()

    expected, actual = (torch.func.grad(loss(wrap))(pieces, x) for wrap in BOTH)
    small.assert_same_bits(actual, expected)


# ---------------------------------------------------------------------------------------------------------
# What is recomputed


def matmuls(wrap: Wrap) -> int:
    graph = fz.trace(fz.grad(mlp(wrap), argnums=(0, 1)))(weights(), inputs()).trace.module.graph
    return sum(node.target == torch.ops.aten.mm.default for node in graph.nodes)


def test_the_backward_runs_each_block_once_more():
    forward, backward, blocks = 2, 4, 2
    assert matmuls(kept) == blocks * (forward + backward)
    assert matmuls(fz.remat) > matmuls(kept)
    assert matmuls(fz.remat) <= blocks * (2 * forward + backward)


def test_the_function_runs_once_forward_and_once_backward():
    runs = []

    def f(w: Tensor) -> Tensor:
        runs.append(1)
        return w.exp()

    _, pullback = fz.vjp(fz.remat(f), torch.ones(3))
    assert len(runs) == 1
    pullback(torch.ones(3))
    assert len(runs) == 2


def saved(wrap: Wrap) -> list[Tensor]:
    """What autograd keeps for the backward of a function, beside its argument."""
    tensors: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        tensors.append(x)
        return x

    w = torch.randn(6, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        wrap(lambda w: torch.tanh(torch.sin(w).exp()).sum())(w)
    return [x for x in tensors if x is not w and x.untyped_storage().data_ptr() != w.untyped_storage().data_ptr()]


def test_nothing_but_the_arguments_is_kept_for_the_backward():
    assert len(saved(kept)) > 0
    assert len(saved(fz.remat)) == 0


# ---------------------------------------------------------------------------------------------------------
# Modules


class Block(nn.Module):
    shift: Tensor

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)
        self.dropout = dropout
        self.register_buffer("shift", torch.full((6,), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        return x + F.dropout(self.down(torch.tanh(self.up(x))), self.dropout) + self.shift

    def through_a_method(self, x: Tensor) -> Tensor:
        return self(x)


class Stack(nn.Module):
    """Calls its blocks in one of the ways in which users wrap them."""

    def __init__(self, call: Callable[[Block, Tensor], Tensor], dropout: float = 0.0) -> None:
        super().__init__()
        self.call = call
        self.blocks = nn.ModuleList(Block(dropout) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            assert isinstance(block, Block)
            x = self.call(block, x)
        return x.square().sum()


CALLS: dict[str, Callable[[Block, Tensor], Tensor]] = {
    "kept": lambda block, x: block(x),
    "module": lambda block, x: fz.remat(block)(x),
    "method": lambda block, x: fz.remat(block.through_a_method)(x),
    "closure": lambda block, x: fz.remat(lambda x: block(x))(x),
    "nested": lambda block, x: fz.remat(lambda x: fz.remat(block)(x))(x),
}


def module_loss(call: str, dropout: float = 0.0) -> tuple[Callable[..., Any], Any]:
    torch.manual_seed(1)
    return fz.functional(Stack(CALLS[call], dropout))


@pytest.mark.parametrize("call", sorted(CALLS.keys() - {"kept"}))
@pytest.mark.parametrize("transform", [kept, fz.jit], ids=["eager", "jit"])
def test_modules_inside_a_functional_model(transform, call):
    apply, params = module_loss("kept")
    expected = fz.value_and_grad(apply, argnums=(0, 1))(params, inputs())
    apply, params = module_loss(call)
    actual = transform(fz.value_and_grad(apply, argnums=(0, 1)))(params, inputs())
    small.assert_same_bits(actual, expected)


# ---------------------------------------------------------------------------------------------------------
# The context of the forward holds in the backward


@pytest.mark.parametrize(
    ("transform", "call"),
    [
        *(pytest.param(kept, call, id=f"eager-{call}") for call in sorted(CALLS)),
        *(
            pytest.param(fz.jit, call, id=f"jit-{call}", marks=[pytest.mark.slow] * (call not in ("module", "nested")))
            for call in sorted(CALLS)
        ),
    ],
)
def test_dropout_of_a_state_is_drawn_again(transform, call):
    def gradient(call: str) -> Callable[..., Any]:
        apply, params = module_loss(call, dropout=0.5)
        state = fz.init(params, fz.sgd(0.1), fz.make_mesh("cpu"), policy="fp32", seed=5)
        return lambda transform: transform(fz.value_and_grad(apply))(state, inputs())

    small.assert_same_bits(gradient(call)(transform), gradient("kept")(kept))


def test_a_pullback_called_outside_the_key_draws_the_same_again():
    def drop(x: Tensor) -> Tensor:
        return F.dropout(x.exp(), 0.5)

    x = torch.randn(256)
    gradients = []
    for wrap in BOTH:
        _, pullback = fz.keyed(lambda x, w=wrap: fz.vjp(lambda x: w(drop)(w(drop)(x)), x))(3, x)
        gradients += [pullback(torch.ones(256))[0], pullback(torch.ones(256))[0]]
    for gradient in gradients[1:]:
        assert torch.equal(gradient, gradients[0])


def test_autocast_holds_in_the_recomputation():
    w, x = torch.randn(6, 6), inputs()

    def gradient(wrap: Wrap) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
            output, pullback = fz.vjp(lambda w: torch.tanh(wrap(lambda w: torch.sin(x @ w))(w)), w)
        assert output.dtype == torch.bfloat16
        return pullback(torch.ones_like(output))[0]

    assert torch.equal(gradient(fz.remat), gradient(kept))


# ---------------------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize("level", ["one transform", "an outer transform"])
def test_a_captured_tensor_that_is_differentiated_is_refused(level):
    x = inputs()

    def capturing(w: Tensor, v: Tensor) -> Tensor:
        block = fz.remat(lambda x: torch.tanh(x @ w))
        return block(x * v).sum() if level == "one transform" else fz.grad(lambda v: block(x * v).sum())(v).sum()

    with pytest.raises(fz.TraceError, match=r"shape \(6, 6\).*Pass it as an argument"):
        fz.grad(capturing)(torch.randn(6, 6), torch.tensor(2.0))


def test_a_captured_constant_is_fine():
    x = inputs()
    expected, actual = (fz.grad(lambda w, f=wrap: f(lambda w: x @ w)(w).sum())(torch.ones(6, 2)) for wrap in BOTH)
    assert torch.equal(actual, expected)


def test_an_unknown_policy_is_refused():
    with pytest.raises(ValueError, match="policy='dots' is not known"):
        fz.remat(torch.sin, policy="dots")  # type: ignore[arg-type]
