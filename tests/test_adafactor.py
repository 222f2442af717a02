"""Adafactor: torch's own on plain trees, the same steps under every policy, layout and world, small states."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import fzero as fz
from fzero.optim.adafactor import adafactor
from tests import world
from tests.small import (
    assert_same_bits,
    copied,
    described,
    flat,
    gradient_of,
    gradients,
    int32,
    parameters,
    piece,
    same_bits,
)

POLICIES = ("fp32", "mixed", "bf16", "bf16-exact", "bf16-fp32-moments", "bf16-8bit", "fp16")
# Every policy, and every way to lay a leaf out.
CASES = tuple(zip(POLICIES, (0, 1, 3, 3, 1, 3, 1), strict=True))
SHAPES = {"matrix": (23, 5), "wide": (6, 40), "cube": (4, 5, 9), "line": (1, 70), "bias": (70,), "scale": ()}
every_policy = pytest.mark.parametrize("policy", POLICIES)
TRACED = {("bf16-exact", 3), ("bf16-8bit", 3), ("fp16", 1)}  # what a trace has to have other leaves for
every_case = pytest.mark.parametrize(("policy", "stage"), CASES)


def normal(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def state_of(optimizer: fz.Optimizer, policy: str | fz.Policy = "fp32", stage: int = 3, params: Any = None) -> fz.State:
    values = parameters() if params is None else params
    return fz.init(values, optimizer, fz.make_mesh("cpu"), fz.zero(stage), policy=policy)


def apply(state: fz.State, value: Any, skip: Any = None) -> fz.State:
    # An eighth, so that float16 holds it times the loss scale.
    value = fz.tree.map(lambda x: x / 8, value)
    return fz.apply_gradients(state, gradient_of(state, value), skip)[0]


# ---------------------------------------------------------------------------------------------------------
# The numbers

OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "decay": {"weight_decay": 0.1, "decay": -0.5},
    "clip": {"lr": 0.5, "clip": 1.1},
    "eps": {"eps": (0.3, 2.0)},
}


def by_torch(values: Sequence[dict[str, Tensor]], options: dict[str, Any]) -> dict[str, Tensor]:
    leaves = {name: leaf.double().requires_grad_() for name, leaf in normal(0).items()}
    theirs: dict[str, Any] = {"lr": 1e-2, "eps": (torch.finfo(torch.float32).eps, 1e-3), "weight_decay": 0.0} | options
    names = {"decay": "beta2_decay", "clip": "d"}
    optimizer = torch.optim.Adafactor(leaves.values(), **{names.get(name, name): x for name, x in theirs.items()})
    for value in values:
        for name, leaf in leaves.items():
            leaf.grad = value[name].double() / 8
        optimizer.step()
    return {name: leaf.detach().float() for name, leaf in leaves.items()}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_ten_steps_equal_those_of_torch(options: dict[str, Any]) -> None:
    values = [normal(seed) for seed in range(1, 11)]
    state = state_of(adafactor(**options), params=normal(0))
    for value in values:
        state = apply(state, value)
    # Parameters of up to 30: a few roundings of float32.
    for name, expected in by_torch(values, options).items():
        got = flat(fz.gather(state.params))[name]
        torch.testing.assert_close(got, expected, rtol=2e-6, atol=2e-6, msg=f"{name} differs")


def test_a_gradient_of_zeros_moves_nothing_and_leaves_no_nan() -> None:
    state = state_of(adafactor(), params=normal(0))
    after = apply(state, fz.tree.map(torch.zeros_like, normal(0)))
    assert_same_bits(after.params, state.params)
    assert all(leaf.isfinite().all() for leaf in fz.tree.leaves(after.moments))


def test_the_state_of_a_matrix_is_a_row_and_a_column_whatever_the_policy() -> None:
    shapes = {"rows": {"matrix": (23,), "wide": (6,), "cube": (4, 5), "line": (1,)}}
    shapes["columns"] = {"matrix": (5,), "wide": (40,), "cube": (4, 9), "line": (70,)}
    shapes["squares"] = {"bias": (70,), "scale": ()}
    for policy in POLICIES:
        moments = state_of(adafactor(), policy, params=normal(0)).moments
        state = getattr(moments, "moments", moments)
        for name, expected in shapes.items():
            leaves = {path: leaf for path, leaf in fz.gather(getattr(state, name)).items() if leaf is not None}
            assert {path: tuple(leaf.shape) for path, leaf in leaves.items()} == expected
            assert {leaf.dtype for leaf in leaves.values()} == {torch.float32}


# ---------------------------------------------------------------------------------------------------------
# Policies, layouts, worlds


@every_case
def test_an_update_is_pure_and_keeps_structure_and_dtypes(policy: str, stage: int) -> None:
    state = state_of(adafactor(), policy, stage)
    grads = gradient_of(state, fz.tree.map(lambda x: x / 8, parameters(1)))
    kept = copied((state, grads))
    after, info = fz.apply_gradients(state, grads)
    assert_same_bits((state, grads), kept)
    assert described(after) == described(state)
    assert info["lr"] == torch.tensor(1e-2)
    for path in ("block.weight", "head"):
        assert not same_bits(piece(after.params, path), piece(state.params, path)), path


@pytest.mark.parametrize(
    ("policy", "stage"),
    [pytest.param(*case, marks=() if case in TRACED else pytest.mark.slow) for case in CASES],
)
def test_traced_equals_eager(policy: str, stage: int) -> None:
    eager = state_of(adafactor(weight_decay=0.1), policy, stage)
    traced, step = copied(eager), fz.jit(apply, donate=0)
    for value in gradients(2):
        eager, traced = apply(eager, value), step(traced, value)
    assert_same_bits(traced, eager)
    assert len(step.programs) == 1


SPLIT = dataclasses.replace(fz.policy("bf16-exact"), moment=torch.float32, rounding="nearest")


@pytest.mark.parametrize("policy", [fz.policy("mixed"), SPLIT], ids=["mixed", "split"])
def test_a_master_moves_as_float32_does(policy: fz.Policy) -> None:
    values = [fz.tree.map(lambda x: x.bfloat16().float(), value) for value in gradients(3)]
    start = fz.tree.map(lambda x: x.bfloat16().float(), parameters())
    expected, got = state_of(adafactor(), "fp32", params=start), state_of(adafactor(), policy, params=start)
    for value in values:
        expected, got = apply(expected, value), apply(got, value)
    for path in expected.params.paths:
        stored = piece(got.params, path)
        assert same_bits(stored, piece(expected.params, path).to(stored.dtype)), path


def gathered(state: fz.State) -> dict[str, Any]:
    # gloo gathers no int16, such as the remainders of masters.
    moments = fz.tree.map(lambda x: x.view(torch.bfloat16) if x.dtype == torch.int16 else x, state.moments)
    return {"params": fz.gather(state.params), "moments": fz.gather(moments)}


def trained(policy: str, stage: int) -> dict[str, Any]:
    state = state_of(adafactor(weight_decay=0.1), policy, stage, normal(0))
    for seed in (1, 2, 3):
        state = apply(state, normal(seed))
    return gathered(state)


@pytest.mark.parametrize("policy", ["bf16", *(pytest.param(p, marks=pytest.mark.slow) for p in ("fp32", "bf16-exact"))])
def test_worlds_of_any_size_agree_bit_for_bit(policy: str) -> None:
    (alone,) = world.run(trained, policy, 3, size=1)
    for stage, size in ((1, 2), (3, 4)):
        for rank in world.run(trained, policy, stage, size=size):
            assert_same_bits(rank, alone)


SPLITS = {"wide": fz.P(None, "model"), "cube": fz.P("model"), "tall": fz.P("model", None), "bias": fz.P("model")}


def without_odd_sizes(seed: int) -> dict[str, Tensor]:
    values = normal(seed)
    return {name: values[name] for name in ("wide", "cube", "bias")} | {"tall": values["matrix"][:20]}


def split_over_a_model_axis(stage: int, is_split: bool) -> dict[str, Any]:
    mesh = fz.make_mesh("cpu", data=2, model=2) if is_split else fz.make_mesh("cpu")
    layout = fz.zero(stage, split=SPLITS) if is_split else fz.zero(stage)
    state = fz.init(without_odd_sizes(0), adafactor(), mesh, layout, policy="fp32")
    for seed in (1, 2):
        state = apply(state, without_odd_sizes(seed))
    return gathered(state)


@pytest.mark.parametrize("stage", [1, 3])
def test_sums_over_a_split_leaf_are_those_of_the_whole(stage: int) -> None:
    expected = split_over_a_model_axis(stage, is_split=False)
    for rank in world.run(split_over_a_model_axis, stage, is_split=True, size=4):
        assert_same_bits(rank, expected)


# ---------------------------------------------------------------------------------------------------------
# Gradients that are not finite


@every_policy
def test_a_step_that_is_skipped_changes_no_bit(policy: str) -> None:
    state = apply(state_of(adafactor(weight_decay=0.1), policy), parameters(1))
    bad = parameters(2)
    bad["block"]["weight"][3, 2] = torch.inf
    after = apply(state, bad, "step")
    assert_same_bits((after.params, after.moments), (state.params, state.moments))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e30])
@pytest.mark.parametrize("path", ["matrix", "bias"])
def test_an_element_without_a_finite_gradient_counts_as_zero_and_stays(path: str, bad: float) -> None:
    state = apply(state_of(adafactor(weight_decay=0.1), params=normal(0)), normal(1))
    value = normal(2)
    value[path].view(-1)[[3, 60]] = 0
    expected = flat(fz.gather(apply(state, value).params))[path].view(-1)
    value[path].view(-1)[[3, 60]] = bad
    after = apply(state, value, "element")
    got, old = flat(fz.gather(after.params))[path].view(-1), flat(fz.gather(state.params))[path].view(-1)
    others = torch.ones_like(got, dtype=torch.bool)
    others[[3, 60]] = False
    assert same_bits(got[others], expected[others])
    assert same_bits(got[~others], old[~others])
    assert not same_bits(expected[~others], old[~others]), "with a gradient of zero they would decay"
    assert all(leaf.isfinite().all() for leaf in fz.tree.leaves(after.moments))


# ---------------------------------------------------------------------------------------------------------
# The rest


def test_the_mask_says_which_leaves_decay() -> None:
    optimizers = {
        "masked": adafactor(weight_decay=0.5, mask=lambda path: path == "wide"),
        "all": adafactor(weight_decay=0.5),
        "none": adafactor(),
    }
    after = {name: apply(state_of(opt, params=normal(0)), normal(1)) for name, opt in optimizers.items()}
    for path in SHAPES:
        same_as = "all" if path == "wide" else "none"
        assert same_bits(piece(after["masked"].params, path), piece(after[same_as].params, path)), path
        assert not same_bits(piece(after["all"].params, path), piece(after["none"].params, path)), "the decay is seen"


def test_a_schedule_gives_each_step_its_rate() -> None:
    schedule = fz.schedules.linear(0.1, 0.02, steps=4)
    scheduled, by_hand = state_of(adafactor(schedule)), state_of(adafactor(0.1))
    for step, value in enumerate(gradients(3)):
        by_hand = apply(by_hand.replace(optimizer=adafactor(schedule(int32(step)).item())), value)
        scheduled = apply(scheduled, value)
        assert_same_bits(scheduled.params, by_hand.params)


def test_integer_leaves_and_leaves_without_a_gradient_stay() -> None:
    params = {"w": torch.randn(4, 4), "idle": torch.randn(5, 4), "table": torch.arange(16).view(4, 4)}
    state = state_of(adafactor(), params=params)
    grads = fz.grad(lambda p: (p["w"] * p["table"]).sum())(state)
    pairs = zip(grads.paths, grads.pieces, strict=True)
    grads = grads.replace(pieces=tuple(None if path == "idle" else x for path, x in pairs))
    after, _ = fz.apply_gradients(state, grads)
    moved = {path for path, leaf in fz.gather(after.params).items() if not torch.equal(leaf, params[path])}
    assert moved == {"w"}
    assert described(after) == described(state)


def test_empty_leaves_are_no_matter() -> None:
    params = {"a": torch.zeros(0, 5), "b": torch.zeros(5, 0), "c": torch.ones(3, 3), "d": torch.zeros(0)}
    optimizer = adafactor()
    new, _ = optimizer.update(fz.tree.map(torch.ones_like, params), optimizer.init(params), params, step=0, seed=0)
    assert described(new) == described(params)


def test_an_update_has_derivatives() -> None:
    optimizer, w = adafactor(clip=100.0), torch.ones(4, 6)
    generator = torch.Generator().manual_seed(0)
    g, along, weights = torch.randn(3, 4, 6, generator=generator)

    def lost(g: Tensor) -> Tensor:
        return (weights * optimizer.update(g, optimizer.init(w), w, step=0, seed=0)[0]).sum()

    derivative = (torch.func.grad(lost)(g) * along).sum()
    difference = (lost(g + 0.01 * along) - lost(g - 0.01 * along)) / 0.02
    torch.testing.assert_close(derivative, difference, rtol=1e-2, atol=0)


def test_it_goes_into_a_chain_and_into_groups() -> None:
    inner = adafactor()
    plain = apply(state_of(inner), parameters(1))
    chained = apply(state_of(fz.chain(fz.clip_by_global_norm(1e3), inner)), parameters(1))
    grouped = apply(state_of(fz.partition_by(lambda path: "all", {"all": inner})), parameters(1))
    assert_same_bits(chained.params, plain.params)
    assert_same_bits(grouped.params, plain.params)


def test_an_abstract_state_has_the_layout_of_a_real_one() -> None:
    simulated = fz.make_mesh("cpu", data=1, simulate=True)
    for policy, stage in CASES:
        abstract = fz.init(parameters(), adafactor(), simulated, fz.zero(stage), policy=policy)
        assert all(leaf.is_meta for leaf in fz.tree.leaves(abstract))
        assert described(abstract) == described(state_of(adafactor(), policy, stage))


@pytest.mark.parametrize("options", [{"clip": 0.0}, {"eps": (0.0, 1e-3)}, {"eps": (None, 0.0)}], ids=str)
def test_wrong_use_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"fz\.adafactor: .*expected a number above 0"):
        adafactor(**options)
