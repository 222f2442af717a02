"""Whole steps on a GPU beside the same on a CPU: every lowering, states, keys, attention, donation."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fzero as fz
from fzero import torch_api
from tests import programs
from tests.small import assert_same_bits, copied, parameters

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
STEPS = 4


def there(tree: Any) -> Any:
    return fz.tree.map(lambda x: x.to(DEVICE) if isinstance(x, Tensor) else x, tree)


def here(tree: Any) -> Any:
    return fz.tree.map(lambda x: x.to("cpu") if isinstance(x, Tensor) else x, tree)


def on(device: str, policy: str, **options: Any) -> tuple[list[float], dict[str, Tensor]]:
    """Losses of some steps of a small model with dropout and recomputed blocks, and its parameters behind them."""
    torch.manual_seed(1)
    apply, params = fz.functional(programs.Model(0.2, remat=True))
    # With a large eps an update is a smooth function of the gradient also where that is near zero.
    optimizer = fz.chain(fz.clip_by_global_norm(1.0), fz.adamw(1e-2, eps=1e-3))
    params = fz.tree.map(lambda x: x.to(device), params)
    state = fz.init(params, optimizer, fz.make_mesh(device), fz.zero(3), policy=policy, seed=3)

    def loss(p: Any, tokens: Tensor) -> Tensor:
        return F.cross_entropy(apply(p, tokens[:, :-1]).flatten(0, 1).float(), tokens[:, 1:].flatten())

    step = fz.train_step(loss, **options)
    losses = []
    for number in range(STEPS):
        state, metrics = step(state, programs.tokens(number=number).to(device))
        losses.append(metrics["loss"])
    assert len(step.programs) == 1
    found = fz.gather(state.params)
    return [x.item() for x in losses], dict(zip(fz.tree.paths(found), fz.tree.leaves(here(found)), strict=True))


@functools.cache
def expected(policy: str, microbatches: int) -> tuple[list[float], dict[str, Tensor]]:
    return on("cpu", policy, lower="graph", microbatches=microbatches)


# Inductor takes half a minute, so it is not asked for everything.
@pytest.mark.parametrize(
    ("policy", "lower", "microbatches"),
    [
        ("fp32", "graph", 1),
        ("fp32", "cudagraph", 2),
        ("fp32", "inductor", 1),
        ("bf16", None, 1),  # what runs where nothing is said
        ("bf16", "graph", 2),
        ("bf16-8bit", "cudagraph", 1),
        ("bf16-exact", "graph", 1),
        ("mixed", "graph", 1),
        ("fp16", "cudagraph", 1),
    ],
)
def test_steps_follow_those_of_a_cpu(policy: str, lower: Any, microbatches: int) -> None:
    losses, params = on(DEVICE, policy, lower=lower, microbatches=microbatches)
    wanted, wanted_params = expected(policy, microbatches)
    tolerance = 1e-4 if policy == "fp32" else 3e-2
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(wanted), rtol=tolerance, atol=tolerance)
    for path, x in params.items():
        difference = (x.float() - wanted_params[path].float()).abs().mean()
        assert difference < (1e-4 if policy == "fp32" else 1e-2), path
    assert losses[-1] != losses[0]


def test_traced_equals_eager() -> None:
    torch.manual_seed(1)
    apply, params = fz.functional(programs.Model(0.2))
    state = fz.init(there(params), fz.adamw(1e-2), fz.make_mesh(DEVICE), policy="bf16", seed=3)

    def step(state: fz.State, tokens: Tensor) -> Any:
        def loss(p: Any, x: Tensor) -> Tensor:
            return F.cross_entropy(apply(p, x[:, :-1]).flatten(0, 1).float(), x[:, 1:].flatten())

        value, grads = fz.value_and_grad(loss)(state, tokens)
        return value, fz.apply_gradients(state, grads)

    tokens = programs.tokens().to(DEVICE)
    assert_same_bits(fz.jit(step, lower="graph")(state, tokens), step(state, tokens))


@pytest.mark.parametrize("policy", ["fp32", "mixed", "bf16", "bf16-exact", "bf16-8bit", "fp16"])
def test_a_state_has_the_bits_of_one_on_a_cpu(policy: str) -> None:
    made = fz.init(there(parameters()), fz.adamw(1e-2), fz.make_mesh(DEVICE), policy=policy, seed=3)
    leaves = [x for x in fz.tree.leaves(made) if isinstance(x, Tensor)]
    assert leaves and all(x.device.type == DEVICE for x in leaves)
    reference = fz.init(parameters(), fz.adamw(1e-2), fz.make_mesh("cpu"), policy=policy, seed=3)
    assert_same_bits([here(x) for x in leaves], [x for x in fz.tree.leaves(reference) if isinstance(x, Tensor)])


def test_a_factory_makes_the_same_state_each_time_and_keeps_the_generators() -> None:
    def model() -> nn.Module:
        return nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64))

    def generators() -> list[Tensor]:
        return [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if DEVICE == "cuda" else [])]

    before = generators()
    first, second = (fz.init(model, fz.adamw(1e-2), fz.make_mesh(DEVICE), seed=5) for _ in range(2))
    assert_same_bits(here(first.params), here(second.params))
    assert fz.gather(first.params)["0"]["weight"].device.type == DEVICE
    assert all(map(torch.equal, before, generators()))


DRAWS: dict[str, Callable[[Tensor], Tensor]] = {
    "dropout": lambda x: F.dropout(x, 0.3),
    "bernoulli": lambda x: torch.bernoulli(x * 0.3),
    "rand": lambda x: torch.rand(1000, device=x.device),
    "rand_like": torch.rand_like,
    "uniform": lambda x: torch.empty_like(x).uniform_(-1.0, 1.0),
    "randint": lambda x: torch.randint(100, (1000,), device=x.device),
    "randperm": lambda x: torch.randperm(1000, device=x.device),
    "randn": lambda x: torch.randn(1000, device=x.device),
    "multinomial": lambda x: torch.multinomial(x.abs(), 20),
}


@pytest.mark.parametrize("name", DRAWS)
@pytest.mark.parametrize("key", [7, torch.tensor(7)], ids=["number", "tensor"])
def test_a_key_draws_the_same_as_on_a_cpu(name: str, key: Any) -> None:
    f = fz.keyed(DRAWS[name])
    reference = f(key, torch.ones(1000))
    moved = key.to(DEVICE) if isinstance(key, Tensor) else key
    for run in (f, fz.jit(f, lower="graph"), fz.jit(f, lower="cudagraph") if DEVICE == "cuda" else f):
        for _ in range(2 if name != "multinomial" else 1):  # which looks at the probabilities, and is not recorded
            drawn = run(moved, torch.ones(1000, device=DEVICE))
            assert drawn.device.type == DEVICE
            if name == "randn":  # whose logarithm may differ in its last bit
                torch.testing.assert_close(drawn.cpu(), reference, rtol=1e-5, atol=1e-5)
            else:
                assert torch.equal(drawn.cpu(), reference)


class Attention(nn.Module):
    """Queries of the width that fused kernels take, in bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(128, 384), nn.Linear(128, 128)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 64)).movedim(-3, 0).transpose(-2, -3)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(-2, -3).flatten(-2))


def rows(seed: int = 0) -> Tensor:
    return torch.randn(2, 32, 128, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def attending() -> tuple[Any, fz.State]:
    torch.manual_seed(1)
    apply, params = fz.functional(Attention())
    return apply, fz.init(there(params), fz.adamw(1e-2), fz.make_mesh(DEVICE), policy="bf16", seed=3)


@pytest.mark.parametrize("jitted", [False, True])
def test_halves_of_attention_are_those_of_vjp(jitted: bool) -> None:
    apply, state = attending()
    x = rows().bfloat16()
    output, pullback = fz.vjp(apply, state, x)
    forward, backward = fz.split_vjp(apply)
    if jitted:
        forward, backward = fz.jit(forward, lower="graph"), fz.jit(backward, lower="graph")
    split, residuals = forward(state, x)
    torch.testing.assert_close(split, output, rtol=1e-2, atol=1e-2)
    bar = torch.ones_like(output)
    for _ in range(2):
        for mine, theirs in zip(backward(residuals, bar), pullback(bar), strict=True):
            pairs = zip(fz.tree.leaves(mine), fz.tree.leaves(theirs), strict=True)
            for a, b in pairs:
                torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("policy", ["fp32", "bf16", "fp16"])
def test_a_loop_of_plain_pytorch(policy: str, traced: bool) -> None:
    def trained(device: str) -> list[float]:
        torch.manual_seed(1)
        module = Attention().to(device)
        options: dict[str, Any] = {"mesh": fz.make_mesh(device), "policy": policy, "seed": 3, "traced": traced}
        model = torch_api.wrap(module, fz.adamw(1e-2, eps=1e-3), **options)
        losses = []
        for number in range(3):
            x = rows(number).to(device).requires_grad_()
            loss = model(x).float().square().mean() + model(x * 2).float().abs().mean()
            loss.backward()
            assert x.grad is not None and x.grad.device.type == device and model.grads is not None
            info = model.step()
            assert info["finite"]
            losses.append(loss.item())
        return losses

    tolerance = 1e-4 if policy == "fp32" else 2e-2
    assert trained(DEVICE) == pytest.approx(trained("cpu"), rel=tolerance)


MASKS: dict[str, Callable[[Any, Any], Tensor]] = {
    "fz.attention": lambda x, mask: fz.attention(*x, mask=mask),
    "cast by the caller": lambda x, mask: F.scaled_dot_product_attention(
        x[0], x[1], x[2], attn_mask=mask.to(x[0].dtype)
    ),
    "cast by fz.call": lambda x, mask: fz.call(lambda x: F.scaled_dot_product_attention(x[0], x[1], x[2], mask), x),
    "cast by fz.vjp": lambda x, mask: fz.vjp(lambda x: F.scaled_dot_product_attention(x[0], x[1], x[2], mask), x)[0],
}


@pytest.mark.parametrize("name", MASKS)
def test_a_mask_of_numbers_is_added(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 2, 2, 64, 64, generator=generator).to(DEVICE, torch.bfloat16)
    mask = torch.randn(64, 64, generator=generator).to(DEVICE)
    exact = torch.softmax(x[0].double() @ x[1].double().mT / 8 + mask.double(), -1) @ x[2].double()
    for f in (MASKS[name], fz.jit(MASKS[name], lower="graph")):
        torch.testing.assert_close(f(x, mask).double(), exact, rtol=3e-2, atol=3e-2)


def wide(donate: bool) -> tuple[fz.State, Any]:
    """A state of eight leaves of a million, and a step whose gradients are made one after another."""
    params = {f"w{i}": torch.ones(1 << 20, device=DEVICE) for i in range(8)}
    state = fz.init(params, fz.adamw(1e-2), fz.make_mesh(DEVICE), policy="fp32")
    loss = lambda p, x: sum(((w * x).square().mean() for w in p.values()), torch.zeros((), device=DEVICE))  # noqa: E731
    return state, fz.train_step(loss, donate=donate, lower="graph")


def test_donated_memory_is_used_again() -> None:
    def peak(donate: bool) -> int:
        state, step = wide(donate)
        x = torch.ones((), device=DEVICE)
        for _ in range(2):
            state, _ = step(state, x)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        state, _ = step(state, x)
        if donate:
            assert torch.cuda.memory_allocated() <= before + 4096, "what a step allocates it gives back"
        most: int = torch.cuda.max_memory_allocated() - before
        return most

    leaf = 4 << 20
    assert peak(True) < 12 * leaf  # gradients, and what a leaf's own computation holds
    assert peak(False) > 24 * leaf  # a second state


def test_what_was_donated_is_not_read() -> None:
    state, step = wide(True)
    kept = copied(state)
    new, _ = step(state, torch.ones((), device=DEVICE))
    with pytest.raises(fz.DonatedError):
        fz.gather(state.params)
    assert not torch.equal(fz.gather(new.params)["w0"], fz.gather(kept.params)["w0"])


def test_a_batch_that_was_left_on_the_cpu_takes_no_state_with_it() -> None:
    state, step = wide(True)
    with pytest.raises(Exception, match="cpu"):
        step(state, torch.ones(1 << 20))
    assert fz.gather(state.params)["w0"].device.type == DEVICE


def test_no_step_waits_for_the_gpu() -> None:
    state, step = wide(True)
    x = torch.ones((), device=DEVICE)
    for _ in range(2):
        state, metrics = step(state, x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that this mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
        try:
            state, metrics = step(state, x)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert metrics["finite"]
