"""Beyond one gradient, on sharded parameters: curvature, forward mode, penalties, unrolled and implicit inner problems.

Each case is a function of sharded parameters, as a user would write it, beside what plain PyTorch makes of full
parameters and the batches of all ranks. Eager and jitted results have the same bits.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, hessian, jvp

import fzero as fz
from tests import small, world

# torch compiles its jvp rules with torch.jit.script on first use, which warns of itself.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")

Params = dict[str, Tensor]
Batch = tuple[Tensor, Tensor]

# Two leaves are cut over up to four ranks, one is whole; none of them divides evenly by four.
SHAPES = {"first": (6, 13), "bias": (13,), "last": (13, 5)}
RATE, DAMPING = 0.1, 5.0


def parameters(dtype: torch.dtype = torch.float64) -> Params:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) / 2
        for name, shape in SHAPES.items()
    }


def batch_of(rank: int, dtype: torch.dtype = torch.float64) -> Batch:
    generator = torch.Generator().manual_seed(1 + rank)
    x, y = torch.randn(2, 8, 6, generator=generator, dtype=torch.float64).to(dtype)
    return x, y[:, :5]


def predict(p: Params, x: Tensor) -> Tensor:
    return torch.tanh(x @ p["first"] + p["bias"]) @ p["last"]


def loss(p: Params, batch: Batch) -> Tensor:
    x, y = batch
    return (predict(p, x) - y).to(torch.promote_types(x.dtype, torch.float32)).square().mean()


def other_half(batch: Batch) -> Batch:
    """Another batch, of the same examples in other pairs."""
    x, y = batch
    return x, y.flip(0)


def product(params: fz.Sharded, direction: fz.Sharded, batch: Batch) -> fz.Sharded:
    """Hessian times direction: forward mode over a gradient."""
    _, curved, *_ = jvp(lambda p: fz.grad(loss)(p, batch), (params,), (direction,))
    return curved


# ---------------------------------------------------------------------------------------------------------
# As users write them: functions of sharded parameters and this rank's batch


def hessian_vector_product(params: fz.Sharded, batch: Batch) -> Any:
    return product(params, fz.random_like(params, 0), batch)


def reverse_over_reverse(params: fz.Sharded, batch: Batch) -> Any:
    """The same from inside the function, where gradients are local and directions are full."""

    def slope(p: Params, direction: Params, batch: Batch) -> Tensor:
        return small.dot(grad(loss)(p, batch), direction)

    return fz.grad(slope)(params, fz.random_like(params, 0), batch)


def directional_derivative(params: fz.Sharded, batch: Batch) -> Any:
    return jvp(lambda p: fz.call(predict, p, batch[0]), (params,), (fz.random_like(params, 0),))


def power_step(params: fz.Sharded, direction: fz.Sharded, batch: Batch) -> tuple[fz.Sharded, Tensor]:
    direction = fz.scale(direction, 1 / fz.norm(direction))
    curved = product(params, direction, batch)
    return fz.like(curved, params), fz.dot(direction, curved)


def power_iteration(params: fz.Sharded, batch: Batch) -> Any:
    direction, value = fz.random_like(params, 0), torch.zeros(())
    for _ in range(2):
        direction, value = power_step(params, direction, batch)
    return value


def input_gradient_penalty(params: fz.Sharded, batch: Batch) -> Any:
    """A double backward through the inputs' gradient: its norm is held at 1, example by example."""

    def penalized(p: Params, batch: Batch) -> Tensor:
        slopes = grad(lambda x: predict(p, x).sum())(batch[0])
        return loss(p, batch) + (slopes.norm(dim=1) - 1).square().mean()

    return fz.grad(penalized)(params, batch)


def gradient_norm_penalty(params: fz.Sharded, batch: Batch) -> Any:
    """The gradient of half the squared norm of the gradient over all ranks: Hessian times gradient."""
    grads = fz.grad(loss)(params, batch)
    return product(params, fz.like(grads, params), batch)


def local_inner_step(params: fz.Sharded, batch: Batch) -> Any:
    """Each rank adapts to a task of its own by one unrolled step; differentiated through."""

    def adapted_loss(p: Params, batch: Batch) -> Tensor:
        slopes = grad(loss)(p, batch)
        return loss(fz.tree.map(lambda w, g: w - RATE * g, p, slopes), other_half(batch))

    return fz.grad(adapted_loss)(params, batch)


def global_inner_step(params: fz.Sharded, batch: Batch) -> Any:
    """All ranks adapt together, on sharded parameters. The transpose of the step is the step, as a Hessian's is."""
    adapted = fz.add(params, fz.grad(loss)(params, batch), alpha=-RATE)
    outer = fz.grad(loss)(adapted, other_half(batch))
    return fz.add(outer, product(params, fz.like(outer, params), batch), alpha=-RATE)


def damped_solve(params: fz.Sharded, batch: Batch) -> Any:
    """(H + 5) x = g by conjugate gradients: what implicit differentiation of a regularized inner optimum solves."""

    def times(v: fz.Sharded) -> fz.Sharded:
        return fz.add(fz.like(product(params, v, batch), params), v, alpha=DAMPING)

    residual = fz.like(fz.grad(loss)(params, batch), params)
    solution, direction, square = fz.zeros_like(params), residual, fz.dot(residual, residual)
    for _ in range(2):
        curved = times(direction)
        step = square / fz.dot(direction, curved)
        solution = fz.add(solution, direction, step)
        residual = fz.add(residual, curved, -step)
        square, before = fz.dot(residual, residual), square
        direction = fz.add(residual, direction, square / before)
    return solution


# ---------------------------------------------------------------------------------------------------------
# The same by plain PyTorch: a vector of parameters, the batches of all ranks, a dense Hessian


class Reference:
    def __init__(self, ranks: int) -> None:
        self.batches = [batch_of(rank) for rank in range(ranks)]
        self.start = flat(parameters())
        self.v = flat(fz.gather(fz.random_like(fz.shard(parameters(), fz.make_mesh("cpu"), fz.zero(3)), 0)))

    def mean(self, f: Callable[[Params, Batch], Tensor], change: Callable[[Batch], Batch] = lambda b: b) -> Any:
        return lambda w: torch.stack([f(unflat(w), change(batch)) for batch in self.batches]).mean()

    def hessian(self) -> Tensor:
        return hessian(self.mean(loss))(self.start)

    def hessian_vector_product(self) -> Tensor:
        return self.hessian() @ self.v

    reverse_over_reverse = hessian_vector_product

    def directional_derivative(self, rank: int) -> Tensor:
        out: Any = jvp(lambda w: predict(unflat(w), self.batches[rank][0]), (self.start,), (self.v,))
        return torch.stack(out).flatten()

    def power_iteration(self) -> Tensor:
        matrix, v, value = self.hessian(), self.v, torch.zeros(())
        for _ in range(2):
            v = v / v.norm()
            value, v = v @ matrix @ v, matrix @ v
        return value[None]

    def input_gradient_penalty(self) -> Tensor:
        def penalized(p: Params, batch: Batch) -> Tensor:
            x = batch[0].clone().requires_grad_()
            (slopes,) = torch.autograd.grad(predict(p, x).sum(), x, create_graph=True)
            return loss(p, batch) + (slopes.norm(dim=1) - 1).square().mean()

        w = self.start.clone().requires_grad_()
        return torch.autograd.grad(self.mean(penalized)(w), w)[0]

    def gradient_norm_penalty(self) -> Tensor:
        return grad(lambda w: grad(self.mean(loss))(w).square().sum() / 2)(self.start)

    def local_inner_step(self) -> Tensor:
        def adapted_loss(p: Params, batch: Batch) -> Tensor:
            w = flat(p)
            return loss(unflat(w - RATE * grad(lambda w: loss(unflat(w), batch))(w)), other_half(batch))

        return grad(self.mean(adapted_loss))(self.start)

    def global_inner_step(self) -> Tensor:
        outer = self.mean(loss, other_half)
        return grad(lambda w: outer(w - RATE * grad(self.mean(loss))(w)))(self.start)

    def damped_solve(self) -> Tensor:
        """Two steps of conjugate gradients: the best in the Krylov space of two dimensions."""
        matrix = self.hessian() + DAMPING * torch.eye(len(self.start), dtype=torch.float64)
        slope = grad(self.mean(loss))(self.start)
        basis = torch.stack([slope, matrix @ slope], 1)
        return basis @ torch.linalg.solve(basis.T @ matrix @ basis, basis.T @ slope)


def flat(tree: Any) -> Tensor:
    return torch.cat([leaf.flatten() for leaf in fz.tree.leaves(tree)])


def unflat(w: Tensor) -> Params:
    names = sorted(SHAPES)
    sizes = [torch.Size(SHAPES[name]).numel() for name in names]
    return {name: part.view(SHAPES[name]) for name, part in zip(names, w.split(sizes), strict=True)}


# ---------------------------------------------------------------------------------------------------------


CASES: dict[str, Callable[[fz.Sharded, Batch], Any]] = {
    f.__name__: f
    for f in (
        hessian_vector_product,
        reverse_over_reverse,
        directional_derivative,
        power_iteration,
        input_gradient_penalty,
        gradient_norm_penalty,
        local_inner_step,
        global_inner_step,
        damped_solve,
    )
}


def on_ranks(name: str, stage: int, traced: bool) -> Tensor:
    mesh = fz.make_mesh("cpu")
    params, batch = fz.shard(parameters(), mesh, fz.zero(stage)), batch_of(mesh.index("data"))
    eager = CASES[name](params, batch)
    if traced:
        small.assert_same_bits(fz.jit(CASES[name])(params, batch), eager)
    return flat(fz.gather(eager))


# Long to trace, and made of what the others trace: of Hessian products, or of gradients inside the function.
COMPOSED = ("power_iteration", "damped_solve", "global_inner_step", "reverse_over_reverse")
FAST = [
    *((2, 3, name, name not in COMPOSED) for name in CASES),
    (2, 1, "global_inner_step", False),
]
SLOW = [(size, stage, name, True) for size in (1, 2, 4) for stage in (0, 1, 3) for name in CASES]


@pytest.mark.parametrize(
    ("size", "stage", "name", "traced"),
    [*FAST, *(pytest.param(*row, marks=pytest.mark.slow) for row in SLOW if row not in FAST)],
)
def test_on_sharded_parameters_as_on_full_ones(name, stage, size, traced):
    reference, by_rank = Reference(size), name == "directional_derivative"
    for rank, found in enumerate(world.run(on_ranks, name, stage, traced, size=size)):
        expected = getattr(reference, name)(*[rank] * by_rank)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_power_iteration_finds_the_eigenvalue_of_largest_size_in_one_program():
    params, batch = fz.shard(parameters(), fz.make_mesh("cpu"), fz.zero(3)), batch_of(0)
    step, direction, value = fz.jit(power_step), fz.random_like(params, 0), torch.zeros(())
    for _ in range(100):
        direction, value = step(params, direction, batch)
    assert len(step.programs) == 1
    values = torch.linalg.eigvalsh(Reference(1).hessian())
    torch.testing.assert_close(value, values[values.abs().argmax()], rtol=1e-4, atol=0)


def state_product(state: fz.State, direction: fz.Sharded, batch: Batch) -> fz.Sharded:
    """With the state around the parameters, a loss scale, random draws and autocast are those of training."""
    _, curved, *_ = jvp(lambda p: fz.grad(loss)(state.replace(params=p), batch), (state.params,), (direction,))
    return curved


@pytest.mark.parametrize(
    ("policy", "tolerance"),
    [
        ("fp32", 1e-5),
        pytest.param("mixed", 0.03, marks=pytest.mark.slow),
        ("bf16", 0.03),
        pytest.param("bf16-exact", 0.03, marks=pytest.mark.slow),
        ("fp16", 0.01),
    ],
)
def test_a_state_of_any_policy_has_a_hessian(policy, tolerance):
    state = fz.init(parameters(torch.float32), fz.adamw(1e-2), fz.make_mesh("cpu"), fz.zero(3), policy=policy)
    batch = batch_of(0, state.policy.compute)
    direction = fz.random_like(state.params, 0)
    direction = fz.scale(direction, 1 / fz.norm(direction))
    found = state_product(state, direction, batch)
    small.assert_same_bits(fz.jit(state_product)(state, direction, batch), found)
    expected = Reference(1).hessian() @ flat(fz.gather(direction)).double()
    assert (flat(fz.gather(found)).double() - expected).norm() < tolerance * expected.norm()


def test_what_the_guide_says_runs():
    guide = (Path(__file__).parents[1] / "docs" / "guide.md").read_text()
    section = guide.split("## Second order and many models at once")[1].split("\n## ")[0]

    def make_model() -> torch.nn.Module:
        return torch.nn.Linear(6, 5)

    apply, _ = fz.functional(make_model)
    batch = batch_of(0, torch.bfloat16)
    scope: dict[str, Any] = {"fz": fz, "torch": torch, "make_model": make_model, "batch": batch}
    scope["loss_fn"] = lambda p, batch: (apply(p, batch[0]) - batch[1]).float().square().mean()
    scope["state"] = state = fz.init(make_model, fz.adamw(1e-3), policy="bf16")
    for block in re.findall(r"```python\n(.*?)```", section, re.DOTALL):
        exec(compile(block, "guide.md", "exec"), scope)
    direction, value = scope["power_step"](state, fz.random_like(state.params, 0), batch)
    assert small.described(direction) == small.described(state.params) and value.isfinite()
    assert scope["metrics"]["loss"].shape == (3,)
    assert small.described(scope["first"]) == small.described(scope["members"][0])
