"""`fz.split_vjp`: the bits of `fz.vjp`, with residuals that are data."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fzero as fz
from tests import world
from tests.small import assert_same_bits, copied


class Attention(nn.Module):
    """A block with what models have: tied weights, views, a softmax, dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(19, 24)
        self.qkv = nn.Linear(24, 72)
        self.norm = nn.LayerNorm(24)
        self.drop = nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        tokens = (x * 3).long().remainder(19)
        h = self.embed(tokens)
        q, k, v = self.qkv(self.norm(h)).unflatten(-1, (3, 4, 6)).movedim(-3, 0).transpose(-2, -3)
        h = h + self.drop(nn.functional.scaled_dot_product_attention(q, k, v).transpose(-2, -3).flatten(-2))
        return h @ self.embed.weight.T


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 33), nn.GELU(), nn.Dropout(0.3), nn.Linear(33, 20), nn.LayerNorm(20))


def attention() -> nn.Module:
    return Attention()


def in_place(apply: Any, p: Any, x: Tensor) -> Any:
    h = apply(p, x)
    y = h * h
    y.mul_(2.0)
    return {"y": y.add_(1), "count": torch.tensor(3), "nothing": None}


def rematerialized(apply: Any, p: Any, x: Tensor) -> Any:
    return fz.remat(lambda q, z: torch.tanh(apply(q, z)))(p, x).square()


def pieces_of_views(apply: Any, p: Any, x: Tensor) -> Any:
    first, second = apply(p, x).chunk(2, -1)
    return first.exp() * second, (first.T, x)


def plain(apply: Any, p: Any, x: Tensor) -> Any:
    return apply(p, x)


FUNCTIONS: dict[str, tuple[Callable[[], nn.Module], Callable[..., Any]]] = {
    "perceptron": (perceptron, plain),
    "attention": (attention, plain),
    "in place": (perceptron, in_place),
    "remat": (perceptron, rematerialized),
    "views": (perceptron, pieces_of_views),
}


def case(name: str, stage: int, policy: str) -> tuple[Callable[..., Any], fz.State, Tensor]:
    torch.manual_seed(1)
    make, use = FUNCTIONS[name]
    apply, params = fz.functional(make())
    state = fz.init(params, fz.adamw(1e-2), fz.make_mesh("cpu"), fz.zero(stage), policy=policy, seed=3)
    generator = torch.Generator().manual_seed(state.mesh.index("data"))
    x = torch.rand(5, 6, generator=generator).to(state.policy.compute)
    return (lambda p, x: use(apply, p, x)), state, x


def cotangent_of(output: Any) -> Any:
    generator = torch.Generator().manual_seed(7)

    def one(x: Any) -> Any:
        is_float = isinstance(x, Tensor) and x.is_floating_point()
        return torch.randn(x.shape, generator=generator).to(x.dtype) if is_float else x

    return fz.tree.map(one, output)


def test_what_the_forward_writes_is_written_before_the_backward_reads_it() -> None:
    apply, params, buffers = fz.functional(nn.Sequential(nn.Linear(6, 33), nn.BatchNorm1d(33), nn.Tanh()), buffers=True)
    state = fz.init(params, fz.sgd(0.1), fz.make_mesh("cpu"), policy="fp32")
    x, bar = torch.randn(8, 6), torch.randn(8, 33)
    expected, pullback, statistics = fz.vjp(lambda p, x: apply(p, buffers, x), state, x, has_aux=True)
    forward, backward = fz.split_vjp(lambda p, x: apply(p, buffers, x), has_aux=True)
    out, residuals, found = forward(state, x)
    assert_same_bits((out, found, backward(residuals, bar)), (expected, statistics, pullback(bar)))


def halves_and_vjp(name: str, stages: tuple[int, ...], policy: str) -> None:
    for stage in stages:
        f, state, x = case(name, stage, policy)
        output, pullback = fz.vjp(f, state, x)
        bar = cotangent_of(output)
        expected = (output, pullback(bar))
        before = copied(state)

        forward, backward = fz.split_vjp(f)
        out, residuals = forward(state, x)
        assert_same_bits((out, backward(residuals, bar)), expected)
        assert_same_bits(backward(residuals, bar), expected[1])  # again, with the same residuals
        assert_same_bits(state, before)
        held_by_reference(residuals, state)

        jitted_forward, jitted_backward = fz.jit(forward), fz.jit(backward)
        out, residuals = jitted_forward(state, x)
        assert_same_bits((out, jitted_backward(residuals, bar)), expected)

        @fz.jit
        def step(state: fz.State, x: Tensor, bar: Any, forward: Any = forward, backward: Any = backward) -> Any:
            out, residuals = forward(state, x)
            return out, backward(residuals, bar)

        assert_same_bits(step(state, x, bar), expected)


def held_by_reference(residuals: fz.Residuals, state: fz.State) -> None:
    """Pieces are the state's own tensors, and nothing that is saved has as many elements as a leaf that is cut."""
    stored = [x for x in fz.tree.leaves((state.params, state.as_primal())) if isinstance(x, Tensor)]
    owned = {x.data_ptr() for x in stored}
    weights = [x for x in residuals.pieces if x.ndim == 1]
    assert weights and all(x.data_ptr() in owned for x in weights)
    full = {spec.shape for spec in state.params.placement.specs if len(spec.shape) == 2}
    assert not [x.shape for x in residuals.saved if {tuple(x.shape), tuple(x.T.shape if x.ndim == 2 else ())} & full]


@pytest.mark.parametrize(
    ("size", "name", "stage", "policy"),
    [
        (1, "perceptron", 0, "fp32"),
        *((1, name, 3, "fp32") for name in FUNCTIONS if name != "perceptron"),
        (2, "attention", 3, "bf16"),
        (2, "perceptron", 1, "bf16"),
    ],
)
def test_halves_have_the_bits_of_vjp(size: int, name: str, stage: int, policy: str) -> None:
    world.run(halves_and_vjp, name, (stage,), policy, size=size)


@pytest.mark.slow
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("policy", ["fp32", "mixed", "bf16", "bf16-exact", "fp16", "bf16-8bit"])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_halves_have_the_bits_of_vjp_under_every_policy(name: str, size: int, policy: str) -> None:
    world.run(halves_and_vjp, name, (0, 1, 3), policy, size=size, deadline=180.0)


# ---------------------------------------------------------------------------------------------------------
# Residuals as data


def travelled() -> None:
    f, state, x = case("attention", 3, "bf16")
    forward, backward = fz.split_vjp(f)
    out, residuals = forward(state, x)
    bar = cotangent_of(out)
    expected = backward(residuals, bar)
    arrived = pickle.loads(pickle.dumps(residuals))
    assert_same_bits(backward(arrived, bar), expected)
    _, elsewhere = fz.split_vjp(f)  # as in a process that has run no forward
    assert_same_bits(elsewhere(arrived, bar), expected)
    moved = fz.tree.map(lambda x: x.clone(), residuals.to("cpu"))
    assert_same_bits(backward(moved, bar), expected)


@pytest.mark.parametrize("size", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_residuals_may_travel(size: int) -> None:
    world.run(travelled, size=size)


def gradient_of(sent: bytes, bar: Tensor) -> tuple[Tensor, ...]:
    _, backward = fz.split_vjp(product)
    gradients: tuple[Tensor, ...] = backward(pickle.loads(sent), bar)
    return gradients


def product(w: Tensor, x: Tensor) -> Tensor:
    return torch.tanh(w @ x)


def test_a_process_that_ran_no_forward_runs_the_backward() -> None:
    w, x, bar = torch.randn(3, 4), torch.randn(4, 2), torch.randn(3, 2)
    forward, backward = fz.split_vjp(product)
    _, residuals = forward(w, x)
    (found,) = world.run(gradient_of, pickle.dumps(residuals), bar, size=1)
    assert_same_bits(found, backward(residuals, bar))


def gradient_of_a_state(sent: bytes) -> Any:
    f, _, _ = case("attention", 3, "bf16")
    residuals, bar = pickle.loads(sent)
    _, backward = fz.split_vjp(f)
    return fz.gather(backward(residuals, bar)[0])


def test_a_process_that_ran_no_forward_runs_the_backward_of_a_state() -> None:
    f, state, x = case("attention", 3, "bf16")
    forward, backward = fz.split_vjp(f)
    out, residuals = forward(state, x)
    bar = cotangent_of(out)
    (found,) = world.run(gradient_of_a_state, pickle.dumps((residuals, bar)), size=1)
    assert_same_bits(found, fz.gather(backward(residuals, bar)[0]))


def test_residuals_of_several_forwards_are_held_and_used_in_any_order() -> None:
    forward, backward = fz.split_vjp(product)
    w = torch.randn(3, 4)
    xs, bars = torch.randn(4, 4, 2), torch.randn(4, 3, 2)
    held = [forward(w, x)[1] for x in xs]
    for i in (2, 0, 3, 1, 2):
        _, pullback = fz.vjp(product, w, xs[i])
        assert_same_bits(backward(held[i], bars[i]), pullback(bars[i]))


def test_aux_is_not_differentiated() -> None:
    forward, backward = fz.split_vjp(lambda w: (w.square(), {"size": w.norm(), "name": "w"}), has_aux=True)
    w = torch.tensor([3.0, 4.0])
    out, residuals, aux = forward(w)
    assert_same_bits((out, aux["size"]), (w.square(), w.norm()))
    assert aux["name"] == "w"
    assert_same_bits(backward(residuals, torch.ones(2)), (2 * w,))


def test_a_cotangent_may_have_any_strides() -> None:
    forward, backward = fz.split_vjp(product)
    w, x, bar = torch.randn(3, 4), torch.randn(4, 2), torch.randn(2, 3).T
    _, residuals = forward(w, x)
    assert_same_bits(backward(residuals, bar), backward(residuals, bar.contiguous()))


def test_one_trace_for_each_signature() -> None:
    traced = []

    def counted(w: Tensor, x: Tensor) -> Tensor:
        traced.append(x.shape)
        return product(w, x)

    forward, backward = fz.split_vjp(counted)
    for columns in (2, 2, 5, 2):
        out, residuals = forward(torch.randn(3, 4), torch.randn(4, columns))
        backward(residuals, torch.ones_like(out))
        fz.jit(forward)(torch.randn(3, 4), torch.randn(4, columns))
    assert traced == [(4, 2), (4, 5)]


# ---------------------------------------------------------------------------------------------------------
# What the two halves have to keep together


def written_through_a_view(w: Tensor, x: Tensor) -> Any:
    y, count = torch.zeros(2), torch.zeros(2, dtype=torch.int64)
    y[0] = (w * x).sum()
    count.select(0, 1).fill_(5)
    return y, count


class _IntoAView(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x[0].clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        (ctx.size,) = inputs[0].shape

    @staticmethod
    def backward(ctx: Any, bar: Tensor) -> Tensor:
        gradient = bar.new_zeros(ctx.size)
        gradient[0] = bar
        return gradient


def gradient_written_through_a_view(w: Tensor, x: Tensor) -> Any:
    return _IntoAView.apply(w * x) + _IntoAView.apply(x)


def saved_is_a_view(w: Tensor, x: Tensor) -> Any:
    return (torch.exp((w * x).expand(3, -1).t()).t().contiguous().view(-1) ** 2).sum()


@pytest.mark.parametrize("f", [written_through_a_view, gradient_written_through_a_view, saved_is_a_view])
def test_memory_that_is_written_is_not_lost(f: Callable[..., Any]) -> None:
    w, x = torch.tensor([1.0, 3.0]), torch.tensor([2.0, 5.0])
    output, pullback = fz.vjp(f, w, x)
    bar = cotangent_of(output)
    forward, backward = fz.split_vjp(f)
    found, residuals = forward(w, x)
    assert_same_bits((found, backward(residuals, bar)), (output, pullback(bar)))


def test_strides_that_a_copy_lost_do_not_matter() -> None:
    forward, backward = fz.split_vjp(lambda w: (torch.exp(w.t()).t().reshape(-1) ** 2).sum())
    _, residuals = forward(torch.randn(3, 4))
    copies = fz.tree.map(lambda x: x.contiguous(), residuals)
    assert_same_bits(backward(copies, torch.tensor(1.0)), backward(residuals, torch.tensor(1.0)))


def test_residuals_of_another_function_are_refused() -> None:
    forward, _ = fz.split_vjp(lambda w, x: (w * x.sin()).sum())
    _, backward = fz.split_vjp(lambda w, x: (w.sin() * x).sum())
    _, residuals = forward(torch.ones(3), torch.ones(3))
    with pytest.raises(fz.ResidualsError, match="of another function than"):
        backward(residuals, torch.tensor(1.0))


def test_a_backward_without_its_forward_runs_under_the_forwards_autocast() -> None:
    forward, expected = fz.split_vjp(product)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, residuals = forward(torch.randn(3, 4), torch.randn(4, 2))
    assert out.dtype == torch.bfloat16
    _, elsewhere = fz.split_vjp(product)
    assert_same_bits(elsewhere(residuals, torch.ones_like(out)), expected(residuals, torch.ones_like(out)))


def test_a_first_call_inside_a_trace_on_tensors_that_it_closes_over() -> None:
    w, x = torch.randn(3, 4), torch.randn(4, 2)
    forward, _ = fz.split_vjp(product)
    assert_same_bits(fz.jit(lambda z: forward(w, x)[0] + z)(torch.ones(3, 2)), product(w, x) + 1)


@pytest.mark.parametrize("make", [lambda f: fz.split_vjp(f)[0], fz.jit], ids=["split_vjp", "jit"])
def test_a_key_around_the_call_does_not_become_a_constant(make: Callable[..., Any]) -> None:
    drop = make(lambda w: nn.functional.dropout(w, 0.5))
    with pytest.raises(fz.RandomOpError, match="the key as an argument"):
        fz.keyed(drop)(torch.tensor(1, dtype=torch.int32), torch.ones(8))


def test_under_accumulate_no_leaf_is_kept_for_all_rounds() -> None:
    apply, params = fz.functional(nn.Sequential(*(nn.Linear(64, 64) for _ in range(3))))
    state = fz.init(params, fz.sgd(0.1), fz.make_mesh("cpu", data=8, simulate=True), policy="bf16")
    x = torch.empty(8, 64, dtype=torch.bfloat16)
    forward, backward = fz.split_vjp(lambda p, x: apply(p, x).float().square().mean())

    def halves(state: fz.State, x: Tensor) -> Any:
        loss, residuals = forward(state, x)
        return loss, backward(residuals, torch.ones_like(loss))[0]

    whole = fz.value_and_grad(lambda p, x: apply(p, x).float().square().mean())
    peaks = [fz.trace(fz.accumulate(f, 4))(state, x).memory().peak for f in (halves, whole)]
    assert peaks[0] <= 1.02 * peaks[1]


# ---------------------------------------------------------------------------------------------------------
# Wrong use


def test_changed_residuals_are_refused() -> None:
    forward, backward = fz.split_vjp(product)
    out, residuals = forward(torch.randn(3, 4), torch.randn(4, 2))
    bar = torch.ones_like(out)
    with pytest.raises(fz.ResidualsError, match=r"residuals of 3 tensors, and got 2"):
        backward(residuals.replace(saved=residuals.saved[:-1]), bar)
    with pytest.raises(fz.ResidualsError, match=r"saved\.0 \(argument 0\) as float32\(3, 4\) on cpu, and got float64"):
        backward(fz.tree.map(lambda x: x.double(), residuals), bar)
    with pytest.raises(fz.ResidualsError, match=r"on cpu, and got float32\(3, 4\) on meta.*residuals\.to\('cpu'\)"):
        backward(residuals.to("meta"), bar)
    with pytest.raises(TypeError, match="takes the residuals of its forward"):
        backward((), bar)
    with pytest.raises(fz.CotangentError, match=r"expected float32\(3, 2\), got float32\(2,\)"):
        backward(residuals, bar[0])


def test_pieces_that_were_donated_are_not_read() -> None:
    f, state, x = case("perceptron", 3, "bf16")
    forward, backward = fz.split_vjp(f)
    out, residuals = forward(state, x)
    fz.jit(lambda s: s.replace(step=s.step + 1), donate=0)(state)
    with pytest.raises(fz.DonatedError, match="donated to"):
        backward(residuals, torch.ones_like(out))


@pytest.mark.parametrize("transform", [torch.func.grad, lambda f: torch.func.vmap(f)])
def test_a_transform_around_the_halves_is_refused(transform: Any) -> None:
    forward, _ = fz.split_vjp(lambda w: w.square())
    with pytest.raises(fz.TraceError, match=r"do not run under\s+torch\.func"):
        transform(lambda w: forward(w)[0].sum())(torch.ones(3))


def test_a_tensor_that_is_being_traced_has_to_be_an_argument() -> None:
    def step(w: Tensor) -> Tensor:
        scale = w.norm()
        forward, _ = fz.split_vjp(lambda x: x * scale)
        out: Tensor = forward(w)[0]
        return out

    with pytest.raises(fz.TraceError, match="closes over a tensor of float32"):
        fz.jit(step)(torch.ones(3))


def test_nothing_to_differentiate() -> None:
    forward, _ = fz.split_vjp(lambda w: w.long())
    with pytest.raises(TypeError, match="no floating-point tensor"):
        forward(torch.ones(3))


def test_a_simulated_state_is_listed_and_does_not_run() -> None:
    apply, params = fz.functional(perceptron())
    state = fz.init(params, fz.adamw(1e-2), fz.make_mesh(data=4, simulate=True), policy="bf16")
    x = torch.empty(5, 6, dtype=torch.bfloat16)
    assert fz.residuals(apply)(state, x).nbytes > 0
    forward, _ = fz.split_vjp(apply)
    with pytest.raises(fz.MeshError, match="simulated mesh"):
        forward(state, x)
    program = fz.trace(forward)(state, x)
    assert program.traffic().total > 0


@torch.library.custom_op("fzero_tests::seeded", mutates_args=())
def seeded(x: Tensor) -> tuple[Tensor, Tensor]:
    """As attention of cuDNN: the seed of its draws is on the CPU, where its fake form says another device."""
    return 2 * x, torch.tensor(7)


@seeded.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty((), dtype=torch.int64, device="meta")


@torch.library.custom_op("fzero_tests::seeded_backward", mutates_args=())
def seeded_backward(cotangent: Tensor, seed: Tensor) -> Tensor:
    return cotangent * (seed.item() - 5)


@seeded_backward.register_fake
def _(cotangent: Tensor, seed: Tensor) -> Tensor:
    return torch.empty_like(cotangent)


class Seeded(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        return seeded(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], outputs: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(outputs[1])
        ctx.save_for_backward(outputs[1])

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor, _: Any) -> Tensor:
        return seeded_backward(cotangent, ctx.saved_tensors[0])


def test_a_seed_that_an_operator_leaves_on_the_cpu_may_stay_there():
    forward, backward = fz.split_vjp(lambda x: Seeded.apply(x)[0])
    output, residuals = forward(torch.ones(3))
    assert [(x.dtype, x.device.type) for x in residuals.saved] == [(torch.int64, "cpu")]
    assert torch.equal(output, torch.full((3,), 2.0))
    assert torch.equal(backward(residuals, torch.ones(3))[0], torch.full((3,), 2.0))
