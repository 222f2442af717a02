"""Axes as values: their collectives against the same maps of the stacked tensors, and gradients through them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fzero as fz
from tests import world

SIZES = (1, 2, 4)
SHAPE = (4, 8, 3)  # divides into 1, 2 and 4 along its first two dimensions


def everywhere(ranks: int) -> list[Tensor]:
    """The tensors of all ranks."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(SHAPE, generator=generator, dtype=torch.float64) for _ in range(ranks)]


def applied(method: str, dim: int | None) -> tuple[Tensor, Tensor]:
    """What an axis makes of this rank's tensor, and the cotangent of that tensor."""
    axis = fz.make_mesh("cpu")["data"]
    x, rank = everywhere(axis.size), int(axis.index)
    arguments = () if dim is None else (dim,)
    out, pullback, *_ = torch.func.vjp(lambda x: getattr(axis, method)(x, *arguments), x[rank])
    return out, pullback(weights(out, rank))[0]


def weights(out: Tensor, rank: int) -> Tensor:
    """A cotangent of a rank's result."""
    return torch.randn(out.shape, generator=torch.Generator().manual_seed(1 + rank), dtype=out.dtype)


REFERENCES: dict[str, Any] = {
    "sum": lambda x, dim: [torch.stack(x).sum(0)] * len(x),
    "gather": lambda x, dim: [torch.cat(x, dim)] * len(x),
    "scatter": lambda x, dim: list(torch.stack(x).sum(0).chunk(len(x), dim)),
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("method", "dim"), [("sum", None), ("gather", 0), ("gather", -1), ("scatter", 1)])
def test_collectives_are_those_of_the_stacked_tensors(size, method, dim):
    found = world.run(applied, method, dim, size=size)
    x = [t.requires_grad_() for t in everywhere(size)]
    right = REFERENCES[method](x, dim)
    losses = [(out * weights(out, rank)).sum() for rank, out in enumerate(right)]
    cotangents = torch.autograd.grad(torch.stack(losses).sum(), x)
    for (out, cotangent), wanted, wanted_cotangent in zip(found, right, cotangents, strict=True):
        torch.testing.assert_close(out, wanted.detach(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(cotangent, wanted_cotangent, rtol=1e-12, atol=1e-12)


def contrastive(params: Any, batch: Any, axis: Any) -> Tensor:
    """Each rank's rows against the rows of all ranks."""
    images, texts = (F.normalize(x @ params[k], dim=-1) for k, x in zip(("image", "text"), batch, strict=True))
    rows = len(images)
    labels = torch.arange(rows) + axis.index * rows
    one = F.cross_entropy(8 * images @ axis.gather(texts).T, labels)
    return (one + F.cross_entropy(8 * texts @ axis.gather(images).T, labels)) / 2


def pairs(rows: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(rows, 12, generator=generator), torch.randn(rows, 20, generator=generator)


def matrices() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {"image": torch.randn(12, 16, generator=generator), "text": torch.randn(20, 16, generator=generator)}


def negatives_of_all_ranks(stage: int) -> dict[str, Tensor]:
    axis = fz.make_mesh("cpu")["data"]
    state = fz.init(matrices(), fz.sgd(1.0), policy="fp32", layout=fz.zero(stage))
    rank, rows = int(axis.index), 8 // axis.size
    batch = tuple(x[rank * rows : (rank + 1) * rows] for x in pairs(8))

    def gradient(state: fz.State, batch: Any) -> fz.Sharded:
        return fz.grad(lambda p, b: contrastive(p, b, axis))(state, batch)

    eager, traced = fz.gather(gradient(state, batch)), fz.gather(fz.jit(gradient)(state, batch))
    for path, a, b in zip(fz.tree.paths(eager), fz.tree.leaves(eager), fz.tree.leaves(traced), strict=True):
        assert torch.equal(a, b), path
    return eager


@pytest.mark.parametrize(
    ("size", "stage"),
    [
        pytest.param(size, stage, marks=[pytest.mark.slow] * ((size, stage) not in ((1, 0), (2, 3))))
        for size in SIZES
        for stage in (0, 3)
    ],
)
def test_a_contrastive_loss_over_ranks_has_the_gradient_of_the_whole_batch(size, stage):
    params = {k: x.double().requires_grad_() for k, x in matrices().items()}
    whole = contrastive(params, [x.double() for x in pairs(8)], fz.make_mesh("cpu")["data"])
    right = dict(zip(params, torch.autograd.grad(whole, list(params.values())), strict=True))
    for found in world.run(negatives_of_all_ranks, stage, size=size):
        for name, wanted in right.items():
            assert (found[name] - wanted).norm() < 2e-6 * wanted.norm()


def test_what_an_axis_does_not_have():
    mesh = fz.make_mesh("cpu")
    assert repr(mesh["data"]) == "Axis('data', size=1)" and mesh["data"] == fz.make_mesh("cpu")["data"]
    with pytest.raises(fz.MeshError, match="no axis 'model'"):
        mesh["model"]
    with pytest.raises(fz.ShapeError, match=r"fz.Axis.gather: there is no dimension 0 .*x\[None\]"):
        mesh["data"].gather(torch.tensor(1.0))
    with pytest.raises(fz.ShapeError, match=r"does not divide into the 4 ranks of axis 'data'"):
        fz.make_mesh("cpu", data=4, simulate=True)["data"].scatter(torch.zeros(6))
