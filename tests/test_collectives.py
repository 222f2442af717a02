"""Collectives and their derivatives, against the same linear maps of the ranks' tensors stacked in one process.

A reference takes the tensors of all ranks, stacked along dimension 0, and returns the results of all ranks,
stacked. A transform written once is applied to both sides: on a rank it sees `x`, in the reference the stack.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, jvp, vjp, vmap

import fzero as fz
from fzero._torch import c10d, make_fx
from fzero.ranks.collectives import _SMALL, all_gather, all_reduce, all_to_all, pad, reduce_scatter
from fzero.ranks.sums import sum_parts
from tests import world
from tests.pairwise import pairwise

# torch compiles its jvp rules with torch.jit.script on first use, which warns of itself.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")

SIZES = (2, 4)

COLLECTIVES: dict[str, Callable[..., Tensor]] = {
    "all_gather": all_gather,
    "reduce_scatter": reduce_scatter,
    "all_reduce": all_reduce,
    "all_to_all": all_to_all,
}


def parts(x: Tensor) -> Tensor:
    """Cut what each rank holds into one part for each rank: `(N, N·n, ...) -> (N, N, n, ...)`."""
    return x.unflatten(1, (x.shape[0], x.shape[1] // x.shape[0]))


REFERENCES: dict[str, Callable[[Tensor], Tensor]] = {
    "all_gather": lambda x: x.flatten(0, 1).expand(len(x), -1, *x.shape[2:]),
    "reduce_scatter": lambda x: parts(x.sum(0, keepdim=True).expand_as(x)).diagonal().movedim(-1, 0),
    "all_reduce": lambda x: x.sum(0, keepdim=True).expand_as(x),
    "all_to_all": lambda x: parts(x).transpose(0, 1).flatten(1, 2),
}


def curved(linear: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A function around a linear map that has derivatives of every order."""
    return lambda x: torch.tanh(linear(torch.sin(x)))


def loss_gradient(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """On a rank: the gradient of the sum over ranks of their losses, with respect to this rank's tensor."""
    return grad(lambda x: (f(x) ** 2).sum())


TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor, Tensor], Tensor]] = {
    "value": lambda f, x, v: f(x),
    "gradient": lambda f, x, v: loss_gradient(f)(x),
    "gradient of gradient": lambda f, x, v: grad(lambda x: (loss_gradient(f)(x) * v).sum())(x),
    "third derivative": lambda f, x, v: loss_gradient(lambda x: loss_gradient(loss_gradient(f))(x))(x),
    "jvp": lambda f, x, v: jvp(f, (x,), (v,))[1],
    "jvp of gradient": lambda f, x, v: jvp(loss_gradient(f), (x,), (v,))[1],
    "gradient of jvp": lambda f, x, v: loss_gradient(lambda x: jvp(f, (x,), (v,))[1])(x),
    "vmap": lambda f, x, v: vmap(f, -1, -1)(torch.stack([x, v], -1)),
    "vmap of gradient": lambda f, x, v: vmap(loss_gradient(f), -1, -1)(torch.stack([x, v], -1)),
    "gradient of vmap": lambda f, x, v: loss_gradient(vmap(f, -1, -1))(torch.stack([x, v], -1)),
    "vmap of jvp": lambda f, x, v: vmap(lambda x: jvp(f, (x,), (x,))[1], -1, -1)(torch.stack([x, v], -1)),
    "vmap of vmap": lambda f, x, v: vmap(vmap(f, -1, -1), -1, -1)(torch.stack([x, v], -1)[..., None]),
}


def operands(size: int, shape: tuple[int, ...] = (3,)) -> tuple[Tensor, Tensor]:
    """A point and a direction for each rank: `(N, N·2, *shape)` twice."""
    generator = torch.Generator().manual_seed(size)
    x, v = torch.randn(2, size, size * 2, *shape, dtype=torch.float64, generator=generator)
    return x, v


def transformed(transform: str, collective: str, x: Tensor, v: Tensor) -> Tensor:
    mesh = fz.make_mesh("cpu")
    rank = mesh.index("data")
    f = curved(partial(COLLECTIVES[collective], mesh=mesh, axis="data"))
    return TRANSFORMS[transform](f, x[rank], v[rank])


@pytest.mark.parametrize(("size", "collective", "transform"), pairwise(SIZES, COLLECTIVES, TRANSFORMS))
def test_transforms_see_the_linear_map(collective, transform, size):
    x, v = operands(size)
    expected = TRANSFORMS[transform](curved(REFERENCES[collective]), x, v)
    results = world.run(transformed, transform, collective, x, v, size=size)
    torch.testing.assert_close(torch.stack(results), expected, rtol=1e-12, atol=1e-12)


def transposed(forward: str, backward: str, x: Tensor, cotangent: Tensor) -> bool:
    mesh = fz.make_mesh("cpu")
    rank = mesh.index("data")
    pullback = vjp(lambda x: COLLECTIVES[forward](x, mesh, "data"), x[rank])[1]
    return torch.equal(pullback(cotangent[rank])[0], COLLECTIVES[backward](cotangent[rank], mesh, "data"))


@pytest.mark.parametrize(
    ("forward", "backward"),
    [
        ("all_gather", "reduce_scatter"),
        ("reduce_scatter", "all_gather"),
        ("all_to_all", "all_to_all"),
        ("all_reduce", "all_reduce"),
    ],
)
def test_each_is_the_transpose_of_another(forward, backward):
    x, _ = operands(2)
    cotangent = torch.randn_like(REFERENCES[forward](x))
    assert world.run(transposed, forward, backward, x, cotangent, size=2) == [True, True]


# ---------------------------------------------------------------------------------------------------------
# Sums


def in_rank_order(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum over dimension 0, one row after another, in at least float32."""
    total = x[0].to(torch.promote_types(dtype, torch.float32))
    for row in x[1:]:
        total = total + row
    return total.to(dtype)


def reduced(x: Tensor, dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    mesh = fz.make_mesh("cpu")
    mine = x[mesh.index("data")]
    return reduce_scatter(mine, mesh, "data", dtype=dtype), all_reduce(mine, mesh, "data", dtype=dtype)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("wire", "dtype"),
    [
        (torch.bfloat16, None),
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, None),
        (torch.float32, torch.bfloat16),
        (torch.float64, None),
    ],
)
def test_sums_are_wide_whatever_the_wire_carries(wire, dtype, size):
    x = torch.randn(size, size * 501, 3).to(wire)
    total = in_rank_order(x, dtype or wire)
    for rank, (scattered, whole) in enumerate(world.run(reduced, x, dtype, size=size)):
        assert scattered.dtype == whole.dtype == total.dtype
        assert torch.equal(scattered, total.chunk(size)[rank])
        assert torch.equal(whole, total)


def test_small_terms_are_not_lost_in_bfloat16():
    x = torch.tensor([256.0, 1.0, 1.0, 2.0], dtype=torch.bfloat16)[:, None].expand(4, 4)
    for scattered, whole in world.run(reduced, x, None, size=4):
        assert scattered.tolist() == [260.0]
        assert whole.tolist() == [260.0] * 4


def all_reduced(xs: list[Tensor]) -> list[Tensor]:
    mesh = fz.make_mesh("cpu")
    return [all_reduce(x[mesh.index("data")], mesh, "data") for x in xs]


SHAPES = [(), (0,), (0, 4), (1,), (7,), (3, 5, 7), (_SMALL // 4,), (_SMALL // 4 + 1,), (257, 259), (_SMALL + 3,)]


@pytest.mark.parametrize("size", (1, 2, 3, 4))
def test_all_reduce_takes_any_shape_and_gives_every_rank_the_same_bits(size):
    xs = [torch.randn(size, *shape) for shape in SHAPES]
    for results in world.run(all_reduced, xs, size=size):
        for x, result in zip(xs, results, strict=True):
            assert torch.equal(result, in_rank_order(x, x.dtype))


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 7, 8, 16, 64])
@pytest.mark.parametrize("n", [1, 3, 17, 1000])
def test_parts_are_added_in_rank_order_wherever_an_element_stands(n, count):
    x = torch.randn(count, n)
    assert torch.equal(sum_parts(x.flatten(), count, torch.float32), in_rank_order(x, torch.float32))


def test_many_parts_are_added_too():
    assert sum_parts(torch.ones(1000, dtype=torch.bfloat16), 500, torch.bfloat16).tolist() == [500, 500]


def along_two_axes(x: Tensor) -> tuple[Tensor, ...]:
    mesh = fz.make_mesh("cpu", node=2, data=2)
    mine = x[mesh.index(mesh.names)]
    return tuple(f(mine, mesh, axis) for axis in ("node", "data") for f in COLLECTIVES.values())


def test_a_collective_stays_on_its_axis():
    x = torch.randn(4, 6, dtype=torch.float64)
    ranks = {"node": torch.tensor([[0, 2], [1, 3]]), "data": torch.tensor([[0, 1], [2, 3]])}
    results = world.run(along_two_axes, x, size=4)
    calls = [(axis, name) for axis in ("node", "data") for name in COLLECTIVES]
    for call, (axis, name) in enumerate(calls):
        for group in ranks[axis]:
            expected = REFERENCES[name](x[group])
            for rank, value in zip(group.tolist(), expected, strict=True):
                torch.testing.assert_close(results[rank][call], value, rtol=1e-14, atol=1e-14)


# ---------------------------------------------------------------------------------------------------------
# Traces


def value_and_gradient(x: Tensor, mesh: fz.Mesh) -> list[Tensor]:
    def f(x: Tensor) -> Tensor:
        gathered = all_gather(torch.sin(x), mesh, "data")
        swapped = all_to_all(gathered**2, mesh, "data")
        return all_reduce(reduce_scatter(swapped * gathered, mesh, "data"), mesh, "data")

    value, pullback = vjp(f, x)[:2]
    return [value, pullback(torch.cos(value))[0]]


def traced_and_replayed(x: Tensor, other: Tensor) -> tuple[list[str], list[list[Tensor]]]:
    mesh = fz.make_mesh("cpu")
    graph = make_fx(partial(value_and_gradient, mesh=mesh), tracing_mode="fake")(x)
    targets = [str(node.target) for node in graph.graph.nodes]
    mine = other + mesh.index("data")
    return targets, [graph(mine), value_and_gradient(mine, mesh)]


def test_a_trace_holds_the_collectives_and_replays_them():
    x, other = torch.randn(2, 4)
    (targets, (replayed, eager)), (targets_of_1, _) = world.run(traced_and_replayed, x, other, size=2)
    assert targets == targets_of_1
    assert {str(c10d.all_gather_into_tensor.default), str(c10d.all_to_all_single.default)} <= set(targets)
    assert all(torch.equal(a, b) for a, b in zip(replayed, eager, strict=True))


def test_on_a_simulated_world_traces_have_its_shapes():
    mesh = fz.make_mesh("cpu", data=16384, simulate=True)

    def f(x: Tensor) -> list[Tensor]:
        gathered = all_gather(x, mesh, "data")
        return [gathered, reduce_scatter(gathered, mesh, "data"), all_to_all(gathered, mesh, "data")]

    graph: Any = make_fx(f, tracing_mode="fake")(torch.ones(2, 3))
    (results,) = next(node for node in graph.graph.nodes if node.op == "output").args
    assert [tuple(node.meta["val"].shape) for node in results] == [(32768, 3), (2, 3), (32768, 3)]


# ---------------------------------------------------------------------------------------------------------
# One rank, and padding


def test_along_an_axis_of_one_rank_each_is_the_identity():
    mesh, x = fz.make_mesh("cpu"), torch.randn(4, 3)
    for name, f in COLLECTIVES.items():
        assert f(x, mesh, "data") is x, name
    for f in (reduce_scatter, all_reduce):
        assert torch.equal(f(x, mesh, "data", dtype=torch.bfloat16), x.bfloat16())


@pytest.mark.parametrize("collective", COLLECTIVES)
def test_an_unknown_axis_is_named(collective):
    with pytest.raises(fz.MeshError, match="no axis 'model'"):
        COLLECTIVES[collective](torch.ones(2), fz.make_mesh("cpu"), "model")


def test_pad_adds_zeros_or_nothing():
    x = torch.tensor([1, 2, 3])
    assert pad(x, 5).tolist() == [1, 2, 3, 0, 0]
    assert pad(x, 3) is x
    assert math.isnan(pad(torch.tensor([math.nan]), 2)[0])
