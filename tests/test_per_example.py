"""Gradients example by example: their norms, inside the function and through a pullback, and clipping each."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, vmap

import fzero as fz
from tests import small, world

SHAPES = {"first": (6, 13), "bias": (13,), "last": (13, 5)}
ROWS = 4
LIMIT = 2.5


def parameters() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) / 2 for name, shape in SHAPES.items()}


def batch_of(rank: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1 + rank)
    x, y = torch.randn(2, ROWS, 6, generator=generator, dtype=torch.float64)
    return x, y[:, :5]


def loss_of_one(p: Any, x: Tensor, y: Tensor) -> Tensor:
    return (torch.tanh(x @ p["first"] + p["bias"]) @ p["last"] - y).square().mean()


def losses(p: Any, x: Tensor, y: Tensor) -> Tensor:
    """Of each example: (rows,)."""
    return vmap(loss_of_one, (None, 0, 0))(p, x, y)


# ---------------------------------------------------------------------------------------------------------
# As users write them


def norms_of(p: Any, x: Tensor, y: Tensor) -> Tensor:
    """Inside the function leaves are whole and gradients local: no collective but the gathers."""

    def norm(x: Tensor, y: Tensor) -> Tensor:
        slopes = grad(loss_of_one)(p, x, y)
        return torch.stack([g.square().sum() for g in fz.tree.leaves(slopes)]).sum().sqrt()

    return vmap(norm)(x, y)


def norms_inside(params: fz.Sharded, x: Tensor, y: Tensor) -> Tensor:
    return fz.call(norms_of, params, x, y)


def norms_by_pullback(params: fz.Sharded, x: Tensor, y: Tensor) -> Tensor:
    """Of the examples of all ranks, from sharded gradients: a one-hot cotangent for each, zero on other ranks."""
    rank, ranks = params.mesh.index_tensor("data"), params.mesh.size("data")
    _, pullback = fz.vjp(lambda p: losses(p, x, y), params, reduce="sum")
    one_hot = torch.eye(ranks * ROWS, dtype=x.dtype).view(ranks * ROWS, ranks, ROWS)
    return vmap(lambda cotangent: fz.norm(pullback(cotangent)[0]))(one_hot.index_select(1, rank).squeeze(1))


def clipped(params: fz.Sharded, x: Tensor, y: Tensor) -> fz.Sharded:
    """The mean of each example's gradient clipped by its own norm: the norms are the cotangent.

    Source: DP-SGD, Abadi et al. 2016, arXiv 1607.00133.
    """
    weights = (LIMIT / fz.call(norms_of, params, x, y)).clamp(max=1.0) / ROWS
    _, pullback = fz.vjp(lambda p: losses(p, x, y), params)
    gradient: fz.Sharded = pullback(weights)[0]
    return gradient


# ---------------------------------------------------------------------------------------------------------
# The same by plain PyTorch


def gradients_alone(ranks: int) -> list[Tensor]:
    """The gradient of each example of all ranks, as a vector."""
    found = []
    for rank in range(ranks):
        for x, y in zip(*batch_of(rank), strict=True):
            p = {name: leaf.clone().requires_grad_() for name, leaf in parameters().items()}
            slopes = torch.autograd.grad(loss_of_one(p, x, y), fz.tree.leaves(p))
            found.append(torch.cat([g.flatten() for g in slopes]))
    return found


def on_ranks(stage: int) -> dict[str, Tensor]:
    mesh = fz.make_mesh("cpu")
    params, batch = fz.shard(parameters(), mesh, fz.zero(stage)), batch_of(mesh.index("data"))
    found = {}
    for function in (norms_inside, norms_by_pullback, clipped):
        eager = function(params, *batch)
        small.assert_same_bits(fz.jit(function)(params, *batch), eager)
        found[function.__name__] = torch.cat([leaf.flatten() for leaf in fz.tree.leaves(fz.gather(eager))])
    return found


@pytest.mark.parametrize(
    ("size", "stage"),
    [
        pytest.param(size, stage, marks=[] if (size, stage) == (2, 3) else pytest.mark.slow)
        for size in (1, 2, 4)
        for stage in (0, 1, 3)
    ],
)
def test_norms_and_clips_are_those_of_each_example_alone(size, stage):
    alone = gradients_alone(size)
    norms = torch.stack([g.norm() for g in alone])
    mean = torch.stack([g * min(1.0, LIMIT / g.norm().item()) for g in alone]).mean(0)
    assert norms.min() < LIMIT < norms.max()
    for rank, found in enumerate(world.run(on_ranks, stage, size=size)):
        torch.testing.assert_close(found["norms_inside"], norms[rank * ROWS : (rank + 1) * ROWS])
        torch.testing.assert_close(found["norms_by_pullback"], norms)
        torch.testing.assert_close(found["clipped"], mean)
