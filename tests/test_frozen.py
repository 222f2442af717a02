"""What is frozen costs nothing: no gradient, no moments, no reduction, and no cotangent that nothing upstream needs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fzero as fz
from fzero._torch import TorchDispatchMode
from fzero.marks import marks_of
from fzero.program.graph.trace import Trace
from tests import small, world
from tests.programs import gathers, matmuls, nodes, simulated

DEPTH, WIDTH, ROWS = 3, 8, 3

# Which layers are trained, the lowest first.
TRAINED = {"top": [2], "bottom": [0], "middle": [1], "both ends": [0, 2], "upper half": [1, 2], "all": [0, 1, 2]}
every_choice = pytest.mark.parametrize("trained", TRAINED.values(), ids=TRAINED)


def layers(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {str(i): torch.randn(WIDTH, WIDTH, generator=generator, dtype=dtype) / 2 for i in range(DEPTH)}


def loss(p: Any, x: Tensor, remat: bool = False) -> Tensor:
    """One matrix product for each layer."""
    layer = fz.remat(torch.matmul) if remat else torch.matmul
    for i in range(len(p)):
        x = torch.tanh(layer(x.to(p[str(i)].dtype), p[str(i)]))
    return x.float().square().sum()


def loss_of_parts(part: Any, rest: Any, x: Tensor) -> Tensor:
    return loss({**part, **rest}, x)


def batch(ranks: int = 1) -> Tensor:
    return torch.randn(ranks, ROWS, WIDTH, generator=torch.Generator().manual_seed(2))


def frozen_but(trained: list[int]) -> fz.Optimizer:
    """AdamW for some layers, after a clip that changes nothing but measures their gradients."""
    optimizer = fz.partition_by(
        lambda path: "trained" if int(path) in trained else "frozen", {"trained": fz.adamw(1e-2), "frozen": None}
    )
    return fz.chain(fz.clip_by_global_norm(1e6), optimizer)


def new_state(trained: list[int], mesh: fz.Mesh, stage: int = 3) -> fz.State:
    return fz.init(layers(), frozen_but(trained), mesh, fz.zero(stage), policy="fp32")


def products(trained: list[int]) -> int:
    """Forward products, a gradient for each trained layer, a cotangent for each layer above the lowest of them."""
    return DEPTH + len(trained) + DEPTH - 1 - min(trained)


def step(state: fz.State, x: Tensor) -> Any:
    value, grads = fz.value_and_grad(loss)(state, x)
    return value, fz.apply_gradients(state, grads)


def reduced(trace: Trace) -> set[str]:
    """The leaves whose gradients are reduced over ranks."""
    found = [marks_of(node) for node in nodes(trace)]
    return {leaf for m in found if m.role == "reduce" for leaf in str(m.leaf).split(", ")}


# ---------------------------------------------------------------------------------------------------------
# In a program


@pytest.mark.parametrize(
    ("stage", "trained"),
    [
        pytest.param(
            stage, trained, marks=[pytest.mark.slow] * (stage == 0 and name != "both ends"), id=f"{stage}-{name}"
        )
        for stage in (0, 3)
        for name, trained in TRAINED.items()
    ],
)
def test_a_program_holds_nothing_for_frozen_leaves(trained: list[int], stage: int) -> None:
    state = new_state(trained, simulated(4), stage)
    program = fz.trace(step)(state, batch()[0])
    assert matmuls(program.trace) == products(trained)
    assert program.flops() == 2 * ROWS * WIDTH * WIDTH * products(trained)
    assert reduced(program.trace) == {str(i) for i in trained}
    moments = sum(x.numel() for x in fz.tree.leaves(state.moments))
    assert moments == 2 * len(trained) * WIDTH * WIDTH // (1 if stage == 0 else 4)
    if stage == 3:  # a layer is gathered a second time where a cotangent passes through it
        assert gathers(program.trace) == {str(i): 2 if i > min(trained) else 1 for i in range(DEPTH)}


@pytest.mark.parametrize("trained", [x for x in TRAINED.values() if len(x) < DEPTH], ids=str)
def test_leaves_beside_the_state_are_as_frozen_as_those_inside(trained: list[int]) -> None:
    mesh, params = simulated(4), layers()
    part = {str(i): params.pop(str(i)) for i in trained}
    state = fz.init(part, fz.adamw(1e-2), mesh, fz.zero(3), policy="fp32")
    rest = fz.shard(params, mesh, fz.zero(3))
    program = fz.trace(fz.value_and_grad(loss_of_parts))(state, rest, batch()[0])
    assert matmuls(program.trace) == products(trained)
    assert reduced(program.trace) == {str(i) for i in trained}
    assert gathers(program.trace) == {str(i): 2 if i > min(trained) else 1 for i in range(DEPTH)}


@pytest.mark.parametrize(
    "trained",
    [
        pytest.param(trained, marks=[pytest.mark.slow] * (name not in ("middle", "both ends")), id=name)
        for name, trained in TRAINED.items()
    ],
)
def test_micro_batches_add_no_products(trained: list[int]) -> None:
    state, x = new_state(trained, simulated(4)), torch.zeros(2 * ROWS, WIDTH)
    one, two = (fz.trace(fz.train_step(loss, microbatches=n))(state, x) for n in (1, 2))
    assert two.flops() == one.flops() == 2 * len(x) * WIDTH * WIDTH * products(trained)
    assert reduced(two.trace) == reduced(one.trace) == {str(i) for i in trained}


def test_a_frozen_sharded_base_is_never_whole() -> None:
    """Bare pieces that a loss reads are gathered layer by layer, and for the backward once more."""
    depth, width = 4, 64
    generator = torch.Generator().manual_seed(0)
    mesh = simulated(8)
    base = fz.shard({str(i): torch.randn(width, width, generator=generator) for i in range(depth)}, mesh, fz.zero(3))
    state = fz.init({"scale": torch.ones(width)}, fz.adamw(1e-2), mesh, fz.zero(3), policy="fp32")

    def scaled(p: Any, base: Any, x: Tensor) -> Tensor:
        return loss(base, x * p["scale"])

    program = fz.trace(fz.value_and_grad(scaled), bucket=0)(state, base, torch.zeros(2, width))
    assert gathers(program.trace) == {str(i): 2 for i in range(depth)}, "the scale is too small to cut"
    memory, layer = program.memory(), 4 * width * width
    assert max(memory.live["gathered"]) < 2 * layer
    kept = fz.trace(fz.value_and_grad(scaled), bucket=0, keep_gathered=depth * layer)(
        state, base, torch.zeros(2, width)
    )
    assert max(kept.memory().live["gathered"]) >= depth * layer


# ---------------------------------------------------------------------------------------------------------
# Eagerly


class CountProducts(TorchDispatchMode):
    """Counts matrix products: torch's own counter does not run through one vjp inside another, as in `remat`."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten.mm.default
        return func(*args, **(kwargs or {}))


@every_choice
def test_eager_gradients_take_no_product_more(trained: list[int]) -> None:
    state = new_state(trained, fz.make_mesh("cpu"))
    with CountProducts() as counted:
        fz.grad(loss)(state, batch()[0])
    assert counted.count == products(trained)


@every_choice
def test_remat_recomputes_no_layer_below_the_lowest_trained_one(trained: list[int]) -> None:
    state = new_state(trained, fz.make_mesh("cpu"))
    with CountProducts() as counted:
        fz.grad(loss)(state, batch()[0], remat=True)
    assert counted.count == products(trained) + DEPTH - min(trained)


# ---------------------------------------------------------------------------------------------------------
# Values


def steps_on_ranks(trained: list[int], stage: int, xs: Tensor) -> Any:
    mesh = fz.make_mesh("cpu")
    start, x = new_state(trained, mesh, stage), xs[mesh.index("data")]
    eager = step(start, x)
    small.assert_same_bits(fz.jit(step)(start, x), eager)
    _, (state, info) = eager
    gradient = fz.gather(fz.grad(loss)(start, x))
    return gradient, fz.gather(state.params), info["grad_norm"]


@pytest.mark.parametrize("size", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("stage", [0, *(pytest.param(s, marks=pytest.mark.slow) for s in (1, 2)), 3])
def test_gradients_and_updates_are_those_of_torch_with_requires_grad_off(stage: int, size: int) -> None:
    trained, xs = TRAINED["both ends"], batch(size)
    params = {name: leaf.requires_grad_(int(name) in trained) for name, leaf in layers().items()}
    optimizer = torch.optim.AdamW([p for p in params.values() if p.requires_grad], 1e-2)
    torch.stack([loss(params, x) for x in xs]).mean().backward()
    norm = torch.stack([p.grad.norm() for p in params.values() if p.grad is not None]).norm()
    expected = {name: None if p.grad is None else p.grad.clone() for name, p in params.items()}
    optimizer.step()
    for gradient, updated, grad_norm in world.run(steps_on_ranks, trained, stage, xs, size=size):
        torch.testing.assert_close(grad_norm, norm)
        for name, p in params.items():
            assert (gradient[name] is None) == (expected[name] is None)
            torch.testing.assert_close(gradient[name], expected[name])
            torch.testing.assert_close(updated[name], p.detach(), rtol=1e-4, atol=1e-4)
            assert p.requires_grad or torch.equal(updated[name], layers()[name])
