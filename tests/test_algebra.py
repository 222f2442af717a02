"""A sharded tree is a vector: its arithmetic is that of the full leaves, whatever the layout."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import fzero as fz
from tests import small, world
from tests.small import dot as weighted_sum
from tests.small import gradient_of

STAGES = (0, 1, 3)


def worlds(*fast: tuple[int, int]) -> pytest.MarkDecorator:
    """Every size of world with every stage; those that are not named are slow."""
    product = [(size, stage) for size in (1, 2, 4) for stage in STAGES]
    return pytest.mark.parametrize(
        ("size", "stage"), [pytest.param(*row, marks=[] if row in fast else pytest.mark.slow) for row in product]
    )


# torch compiles its jvp rules with torch.jit.script on first use, which warns of itself.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")


def sharded(seed: int = 0, stage: int = 3, dtype: torch.dtype = torch.float32) -> fz.Sharded:
    return fz.shard(fz.tree.map(lambda x: x.to(dtype), small.parameters(seed)), fz.make_mesh("cpu"), fz.zero(stage))


def state_of(stage: int = 3, policy: str = "fp32", optimizer: fz.Optimizer | None = None) -> fz.State:
    return fz.init(small.parameters(), optimizer or fz.sgd(1.0), fz.make_mesh("cpu"), fz.zero(stage), policy=policy)


def gradient(seed: int, stage: int = 3, policy: str = "fp32") -> fz.Sharded:
    return gradient_of(state_of(stage, policy), small.parameters(seed))


def pieces_of(*trees: fz.Sharded) -> list[list[Tensor]]:
    """Of trees whose leaves are all there."""
    return [[piece for piece in tree.pieces if piece is not None] for tree in trees]


def vector(tree: Any) -> Tensor:
    return torch.cat([leaf.double().flatten() for leaf in fz.tree.leaves(tree)])


A, B, C = (vector(small.parameters(seed)) for seed in (0, 1, 2))


# ---------------------------------------------------------------------------------------------------------
# Inner products


def products(stage: int) -> list[Tensor]:
    """Of parameters, which stages 1 and 2 hold whole, and gradients, which they cut and which have a factor."""
    params, one, two = sharded(0, stage), gradient(1, stage), gradient(2, stage)
    pairs = [(params, params), (one, two), (params, one), (one, params)]
    eager = [*(fz.dot(a, b) for a, b in pairs), fz.norm(one), fz.dot(sharded(1, stage, torch.float64), params)]
    jitted = fz.jit(lambda a, b: (fz.dot(a, b), fz.norm(b)))(params, one)
    assert torch.equal(jitted[0], eager[2]) and torch.equal(jitted[1], eager[4])
    return eager


@worlds((2, 1), (2, 3))
def test_inner_products_and_norms_are_those_of_the_full_leaves_on_every_rank(stage, size):
    expected = [A @ A, B @ C, A @ B, B @ A, B.norm(), B @ A]
    for found in world.run(products, stage, size=size):
        assert [x.dtype for x in found] == [torch.float32] * 5 + [torch.float64]
        for actual, value in zip(found, expected, strict=True):
            assert actual.item() == pytest.approx(value.item(), rel=1e-6)


def inner_product(stage: int) -> Tensor:
    return fz.dot(gradient(1, stage), gradient(2, stage))


def test_the_layout_shows_in_the_last_bit_at_most():
    found = [inner_product(3), *(x for stage in STAGES for x in world.run(inner_product, stage, size=2))]
    assert max(found) - min(found) <= torch.finfo(torch.float32).eps * abs(max(found))


def derivatives(stage: int) -> dict[str, Any]:
    """What a transform makes of `dot` and `norm`; trees come back whole."""
    a, b, c = (sharded(seed, stage, torch.float64) for seed in (0, 1, 2))
    value, pullback, *_ = torch.func.vjp(fz.dot, a, b)
    a_bar, b_bar = pullback(torch.full_like(value, 2.0))
    (slope,) = torch.func.vjp(fz.norm, a)[1](torch.ones((), dtype=torch.float64))
    # The fourth power of the norm: its gradient sends a sum over ranks back through a sum over ranks.
    quartic = torch.func.grad(lambda p: fz.dot(p, p) ** 2)
    second = torch.func.grad(lambda p: fz.dot(quartic(p), c))(a)
    forward = torch.func.jvp(lambda p: fz.dot(quartic(p), c), (a,), (b,))[1]
    stacked = fz.tree.map(lambda *pieces: torch.stack(pieces), a, b)
    batched = torch.func.vmap(lambda p: fz.dot(p, c))(stacked)
    batched_slope = torch.func.vmap(torch.func.grad(lambda p: fz.dot(p, p) ** 2))(stacked)
    # Stages 1 and 2 cut gradients and not parameters: the cotangent of each has its own placement.
    weights = fz.tree.map(lambda x: x / a.mesh.size("data"), fz.gather(b))
    grads = fz.grad(weighted_sum, reduce="sum")(a, weights)
    mixed, pull, *_ = torch.func.vjp(lambda p, g: fz.dot(fz.add(p, g), fz.add(g, p)), a, grads)
    return {
        "vjp": fz.gather((a_bar, b_bar)),
        "vjp of two placements": fz.gather(tuple(bar.replace(factor=None) for bar in pull(torch.ones_like(mixed)))),
        "slope of the norm": fz.gather(slope),
        "jvp": torch.func.jvp(fz.dot, (a, b), (c, c))[1],
        "reverse over reverse": fz.gather(second),
        "forward over reverse": forward,
        "vmap": batched,
        "vmap of gradient": fz.gather(fz.tree.map(lambda x: x[1], batched_slope)),
    }


@worlds((2, 1), (2, 3))
def test_derivatives_are_those_of_one_inner_product(stage, size):
    hessian_c = 4 * (A @ A) * C + 8 * (A @ C) * A
    expected = {
        "vjp": torch.cat([2 * B, 2 * A]),
        "vjp of two placements": torch.cat([2 * (A + B), 2 * (A + B)]),
        "slope of the norm": A / A.norm(),
        "jvp": (C @ B + A @ C)[None],
        "reverse over reverse": hessian_c,
        "forward over reverse": (hessian_c @ B)[None],
        "vmap": torch.stack([A @ C, B @ C]),
        "vmap of gradient": 4 * (B @ B) * B,
    }
    for found in world.run(derivatives, stage, size=size):
        for name, value in expected.items():
            torch.testing.assert_close(vector(found[name]), value, rtol=1e-10, atol=1e-10, msg=f"{name}: {{}}".format)


def test_the_norm_of_nothing_has_a_derivative():
    nothing = fz.zeros_like(sharded())
    assert fz.norm(nothing) == 0
    assert fz.norm(torch.func.grad(fz.norm)(nothing)) == 0


def test_a_norm_of_something_infinite_is_not_finite():
    a = sharded()
    assert not fz.norm(fz.scale(a, math.inf)).isfinite()


# ---------------------------------------------------------------------------------------------------------
# Sums and multiples


def sums(stage: int) -> list[Any]:
    params, one, two = sharded(0, stage), gradient(1, stage), gradient(2, stage)
    alpha = torch.tensor(-0.5)
    pairs = [(params, one), (one, params), (one, two), (fz.scale(one, 0.0), two), (one, fz.scale(two, 1e-30))]
    found = [fz.add(a, b, alpha) for a, b in pairs]
    for result, (a, _) in zip(found, pairs, strict=True):
        assert result.placement == a.placement
        assert (result.factor is None) == (a.factor is None)
    jitted = fz.jit(lambda a, b, alpha: fz.add(a, b, alpha))
    small.assert_same_bits(jitted(one, two, alpha), found[2])
    return [fz.gather(x) for x in (*found, jitted(one, two, torch.tensor(3.0)))] + [len(jitted.programs)]


@worlds((2, 1), (2, 3))
def test_a_sum_has_the_values_of_both_and_the_form_of_the_first(stage, size):
    expected = [A - B / 2, B - A / 2, B - C / 2, -C / 2, B, B + 3 * C]
    for *found, programs in world.run(sums, stage, size=size):
        for actual, value in zip(found, expected, strict=True):
            torch.testing.assert_close(vector(actual), value, rtol=1e-6, atol=1e-6)
        assert programs == 1


@pytest.mark.parametrize("policy", ["fp32", "bf16", "mixed", "fp16"])
def test_gradients_of_one_loss_scale_add_to_the_bits_of_their_leaves(policy):
    one, two = gradient(1, policy=policy), gradient(2, policy=policy)
    added = fz.add(one, two)
    small.assert_same_bits(list(added.pieces), [x + y for x, y in zip(*pieces_of(one, two), strict=True)])
    assert torch.equal(added.multiplier, one.multiplier)


def test_a_multiple_of_a_gradient_touches_no_leaf():
    grads = gradient(1)
    multiple = fz.scale(grads, torch.tensor(3.0))
    assert multiple.pieces is grads.pieces and multiple.factor == 3
    state, _ = fz.apply_gradients(state_of(), multiple)
    torch.testing.assert_close(vector(fz.gather(state.params)), A - 3 * B, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_multiple_of_parameters_has_no_factor_and_keeps_its_dtype(dtype):
    params = sharded(dtype=dtype)
    multiple = fz.scale(params, 0.3)
    assert multiple.factor is None
    (pieces,) = pieces_of(params)
    wide = torch.promote_types(dtype, torch.float32)
    small.assert_same_bits(list(multiple.pieces), [(x.to(wide) * 0.3).to(dtype) for x in pieces])


def test_sums_and_multiples_round_once_and_in_another_dtype_when_asked():
    one, small_step = sharded(dtype=torch.bfloat16), fz.scale(sharded(1), 1e-4)
    stands_still, moves = fz.add(one, small_step), fz.add(one, small_step, dtype=torch.float32)
    assert {x.dtype for x in pieces_of(stands_still)[0]} == {torch.bfloat16}
    for was, is_now, term in zip(*pieces_of(one, moves, small_step), strict=True):
        assert torch.equal(is_now, was.float() + term)
    for was, third in zip(*pieces_of(one, fz.scale(one, 1 / 3, dtype=torch.float32)), strict=True):
        assert torch.equal(third, was.float() * (1 / 3))
    grads = gradient(1, policy="bf16")
    half = fz.scale(grads, 0.5, dtype=torch.float32)
    assert torch.equal(vector(fz.gather(half)), 0.5 * vector(fz.gather(grads))) and half.factor is not None
    with pytest.raises(TypeError, match=r"fz\.add: dtype: expected a floating-point dtype"):
        fz.add(one, one, dtype=torch.int32)


def test_values_of_a_scale_change_without_a_retrace():
    step = fz.jit(lambda grads, s: fz.norm(fz.scale(grads, s)))
    found = [step(gradient(1), torch.tensor(s)).item() for s in (1.0, 2.0)]
    assert found[1] == 2 * found[0]
    assert len(step.programs) == 1


def test_inside_a_transform_a_factor_goes_into_the_leaves():
    grads = gradient(1).replace(factor=torch.tensor(0.5))

    def scaled(s: Tensor) -> fz.Sharded:
        return fz.add(fz.scale(grads, s), grads)

    value, tangent, *_ = torch.func.jvp(scaled, (torch.tensor(3.0),), (torch.tensor(1.0),))
    torch.testing.assert_close(vector(fz.gather(value)), 2 * B, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(vector(fz.gather(tangent)), B / 2, rtol=1e-6, atol=1e-6)
    batched = torch.func.vmap(scaled)(torch.tensor([3.0, 5.0]))
    torch.testing.assert_close(vector(fz.gather(fz.tree.map(lambda x: x[1], batched))), 3 * B, rtol=1e-6, atol=1e-6)


def test_leaves_that_are_none_or_integers_are_left_alone():
    tree = {"count": torch.arange(3), "w": torch.ones(20), "v": torch.full((20,), 2.0)}
    params = fz.shard(tree, fz.make_mesh("cpu"), fz.zero(3))
    grads = fz.grad(lambda p: weighted_sum({"v": p["v"], "w": p["w"]}, {"v": 1.0, "w": 3.0}))(params)
    assert params.paths == ("count", "v", "w") and grads.pieces[0] is None
    without = grads.replace(pieces=(None, None, grads.pieces[2]))
    assert fz.dot(params, grads) == 20 * (2 + 3)
    assert fz.dot(params, without) == 20 * 3
    moved = fz.gather(fz.add(params, without, 10.0))
    assert moved["count"].tolist() == [0, 1, 2] and moved["w"][0] == 31 and moved["v"][0] == 2
    assert fz.gather(fz.add(without, grads))["v"] is None
    direction = fz.gather(fz.like(without, params))
    assert direction["count"].tolist() == [0, 0, 0] and direction["w"][0] == 3 and direction["v"][0] == 0
    assert fz.gather(fz.random_like(params, 0))["count"].tolist() == [0, 0, 0]


# ---------------------------------------------------------------------------------------------------------
# Directions


def directions(stage: int, policy: str) -> tuple[list[Any], list[Tensor]]:
    params = state_of(stage, policy).params
    found = [fz.random_like(params, 7), fz.random_like(params, 8), fz.like(gradient(1, stage, policy), params)]
    for direction in found:
        assert small.described(direction) == small.described(params) and direction.placement == params.placement
    return [fz.gather(direction) for direction in found], [fz.norm(direction) for direction in found]


@worlds((2, 1), (2, 3))
@pytest.mark.parametrize("policy", ["mixed", "bf16"])
def test_directions_look_like_parameters_and_do_not_depend_on_the_layout(policy, stage, size):
    alone, _ = directions(3, policy)
    for trees, norms in world.run(directions, stage, policy, size=size):
        small.assert_same_bits(trees, alone)
        for norm, tree in zip(norms, trees, strict=True):
            assert norm.item() == pytest.approx(vector(tree).norm().item(), rel=1e-6), "padding has no length"


def test_a_random_direction_is_a_function_of_its_key_under_jit_too():
    step = fz.jit(fz.random_like)
    for key in (7, 8):
        small.assert_same_bits(step(sharded(), small.int32(key)), fz.random_like(sharded(), key))
    assert len(step.programs) == 1


def test_random_directions_are_normal_and_differ_by_key_and_leaf():
    params = fz.shard({"a": torch.zeros(20_000), "b": torch.zeros(20_000)}, fz.make_mesh("cpu"), fz.zero(3))
    draws = [fz.gather(fz.random_like(params, key)) for key in (0, 1)]
    rows = torch.stack([tree[name] for tree in draws for name in ("a", "b")])
    torch.testing.assert_close(rows.cov(), torch.eye(4), rtol=0, atol=0.05)
    torch.testing.assert_close(rows.mean(1), torch.zeros(4), rtol=0, atol=0.03)


# ---------------------------------------------------------------------------------------------------------
# Wrong use


@pytest.mark.parametrize("call", [fz.dot, fz.add, fz.like])
def test_trees_of_different_leaves_are_refused_by_name(call):
    mesh, layout = fz.make_mesh("cpu"), fz.zero(3)
    a, b = fz.shard({"w": torch.ones(2)}, mesh, layout), fz.shard({"w": torch.ones(3)}, mesh, layout)
    with pytest.raises(fz.TreeError, match=r"fz\.\w+: the two trees have different leaves:\n  w: \(.*,\) and \(.*,\)"):
        call(a, b)
    with pytest.raises(TypeError, match=r"fz\.\w+: expected a Sharded.*got dict"):
        call(a, {"w": torch.ones(2)})


def cut_differently() -> None:
    mesh, tree = fz.make_mesh("cpu", node=2, data=2), small.parameters()
    layouts = fz.zero(3, axis=("node", "data")), fz.zero(3, axis="data", replicate="node")
    fz.dot(*(fz.shard(tree, mesh, layout) for layout in layouts))


@pytest.mark.slow
def test_trees_cut_over_different_axes_are_refused():
    world.raises(fz.LayoutError, cut_differently, size=4, match=r"leaf 'block\.weight' is cut over.*Lay both out alike")
