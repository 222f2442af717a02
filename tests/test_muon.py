"""Muon: torch's own on plain trees, the same steps under every policy, layout and world, and who gets which leaf."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import fzero as fz
from fzero.optim.muon import muon
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
SHAPES = {"matrix": (23, 5), "wide": (6, 40), "cube": (4, 5, 9), "bias": (7,), "scale": ()}
# Every policy, and every way to lay a leaf out.
CASES = tuple(zip(POLICIES, (0, 1, 3, 3, 1, 3, 1), strict=True))
every_policy = pytest.mark.parametrize("policy", POLICIES)
TRACED = {("bf16-exact", 3), ("bf16-8bit", 3), ("fp16", 1)}  # what a trace has to have other leaves for
every_case = pytest.mark.parametrize(("policy", "stage"), CASES)


def normal(seed: int, scale: float = 1.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: scale * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def state_of(optimizer: fz.Optimizer, policy: str | fz.Policy = "fp32", stage: int = 3, params: Any = None) -> fz.State:
    values = parameters() if params is None else params
    return fz.init(values, optimizer, fz.make_mesh("cpu"), fz.zero(stage), policy=policy)


def apply(state: fz.State, value: Any, skip: Any = None) -> fz.State:
    # An eighth, so that float16 holds it times the loss scale.
    value = fz.tree.map(lambda x: x / 8, value)
    return fz.apply_gradients(state, gradient_of(state, value), skip)[0]


# ---------------------------------------------------------------------------------------------------------
# The numbers


def by_torch(values: Sequence[dict[str, Tensor]], nesterov: bool) -> dict[str, Tensor]:
    """Torch's Muon of the matrices, a cube as one, and torch's AdamW of the others."""
    leaves = {name: leaf.clone() for name, leaf in normal(0).items()}
    matrices = {n: x.reshape(x.shape[0], -1).requires_grad_() for n, x in leaves.items() if x.ndim >= 2}
    others = {n: x.requires_grad_() for n, x in leaves.items() if x.ndim < 2}
    made: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices.values(), 1e-2, 0.1, nesterov=nesterov, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others.values(), 1e-2, weight_decay=0.1),
    ]
    for value in values:
        for name, leaf in (matrices | others).items():
            leaf.grad = value[name].reshape(leaf.shape) / 8
        for optimizer in made:
            optimizer.step()
    return {name: leaf.detach().reshape(SHAPES[name]) for name, leaf in (matrices | others).items()}


@pytest.mark.parametrize("nesterov", [True, False])
def test_ten_steps_equal_those_of_torch(nesterov: bool) -> None:
    values = [normal(seed) for seed in range(1, 11)]
    state = state_of(muon(1e-2, nesterov=nesterov, weight_decay=0.1), params=normal(0))
    for value in values:
        state = apply(state, value)
    expected = by_torch(values, nesterov)
    for name, got in flat(fz.gather(state.params)).items():
        # A step moves an element of a matrix by some 1e-2, as a bfloat16: 8 bits. Ten of them rounded otherwise would
        # differ by 4e-4; what differs is the direction's own rounding, where a float32 is near a tie.
        tolerance = 1e-6 if len(SHAPES[name]) < 2 else 2e-4
        torch.testing.assert_close(got, expected[name], rtol=0, atol=tolerance, msg=f"{name} differs")


def test_the_size_of_a_step_is_that_of_adamw() -> None:
    """Elements move by about 0.2 · lr, whatever the shape: its scale does what it is for."""
    for shape in ((64, 64), (256, 16), (16, 256)):
        w = torch.zeros(shape)
        optimizer = muon(1.0)
        gradient = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        new, _ = optimizer.update(gradient, optimizer.init(w), w, step=0, seed=0)
        assert 0.15 < new.square().mean().sqrt() < 0.25


# ---------------------------------------------------------------------------------------------------------
# Policies, layouts, worlds


@every_case
def test_an_update_is_pure_and_keeps_structure_and_dtypes(policy: str, stage: int) -> None:
    state = state_of(muon(1e-2), policy, stage)
    grads = gradient_of(state, fz.tree.map(lambda x: x / 8, parameters(1)))
    kept = copied((state, grads))
    after, info = fz.apply_gradients(state, grads)
    assert_same_bits((state, grads), kept)
    assert described(after) == described(state)
    assert info["lr"] == torch.tensor(1e-2)
    assert not same_bits(piece(after.params, "block.weight"), piece(state.params, "block.weight"))


@pytest.mark.parametrize(
    ("policy", "stage"),
    [pytest.param(*case, marks=() if case in TRACED else pytest.mark.slow) for case in CASES],
)
def test_traced_equals_eager(policy: str, stage: int) -> None:
    eager = state_of(muon(1e-2, weight_decay=0.1), policy, stage)
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
    expected, got = state_of(muon(1e-2), "fp32", params=start), state_of(muon(1e-2), policy, params=start)
    for value in values:
        expected, got = apply(expected, value), apply(got, value)
    stored = piece(got.params, "block.weight")
    assert same_bits(stored, piece(expected.params, "block.weight").to(stored.dtype))


def trained(policy: str, stage: int) -> dict[str, Any]:
    state = state_of(muon(1e-2, weight_decay=0.1), policy, stage)
    for value in gradients(3):
        state = apply(state, value)
    # gloo gathers no int16, such as the remainders of masters.
    moments = fz.tree.map(lambda x: x.view(torch.bfloat16) if x.dtype == torch.int16 else x, state.moments)
    return {"params": fz.gather(state.params), "moments": fz.gather(moments)}


# Blocks of 8-bit moments begin where pieces do, so they depend on the number of ranks.
@pytest.mark.parametrize("policy", [pytest.param("fp32", marks=pytest.mark.slow), "bf16", "bf16-exact"])
def test_worlds_of_any_size_agree_bit_for_bit(policy: str) -> None:
    (alone,) = world.run(trained, policy, 3, size=1)
    for stage, size in ((1, 2), (3, 4)):
        for rank in world.run(trained, policy, stage, size=size):
            assert_same_bits(rank, alone)


def split_over_a_model_axis(stage: int) -> dict[str, Any]:
    mesh = fz.make_mesh("cpu", data=2, model=2)
    layout = fz.zero(stage, split={"tall": fz.P("model"), "wide": fz.P(None, "model")})
    params = {"tall": normal(0)["matrix"][:20], "wide": normal(0)["wide"]}
    state = fz.init(params, muon(1e-2), mesh, layout, policy="fp32")
    for seed in (1, 2):
        value = {"tall": normal(seed)["matrix"][:20], "wide": normal(seed)["wide"]}
        state = apply(state, value)
    return {"params": fz.gather(state.params), "moments": fz.gather(state.moments)}


def not_split(stage: int) -> dict[str, Any]:
    params = {"tall": normal(0)["matrix"][:20], "wide": normal(0)["wide"]}
    state = state_of(muon(1e-2), "fp32", stage, params)
    for seed in (1, 2):
        state = apply(state, {"tall": normal(seed)["matrix"][:20], "wide": normal(seed)["wide"]})
    return {"params": fz.gather(state.params), "moments": fz.gather(state.moments)}


@pytest.mark.parametrize("stage", [1, 3])
def test_a_split_leaf_is_orthogonalized_whole(stage: int) -> None:
    expected = not_split(stage)
    for rank in world.run(split_over_a_model_axis, stage, size=4):
        assert_same_bits(rank, expected)


# ---------------------------------------------------------------------------------------------------------
# Gradients that are not finite


@every_policy
def test_a_step_that_is_skipped_changes_no_bit(policy: str) -> None:
    state = apply(state_of(muon(1e-2, weight_decay=0.1), policy), parameters(1))
    bad = parameters(2)
    bad["block"]["weight"][3, 2] = torch.inf
    after = apply(state, bad, "step")
    assert_same_bits((after.params, after.moments), (state.params, state.moments))


@pytest.mark.parametrize("policy", ["fp32", "bf16", "bf16-exact"])
def test_elements_without_a_finite_gradient_stay(policy: str) -> None:
    state = apply(state_of(muon(1e-2, weight_decay=0.1), policy), parameters(1))
    bad = parameters(2)
    where = torch.zeros(23, 5, dtype=torch.bool)
    for place, value in (((3, 2), torch.inf), ((0, 0), torch.nan), ((22, 4), -torch.inf)):
        bad["block"]["weight"][place] = value
        where[place] = True
    after = apply(state, bad, "element")
    before_leaves, after_leaves = (flat({"p": s.params, "m": s.moments}) for s in (state, after))
    kept = [path for path, old in before_leaves.items() if old.shape == (115,)]
    assert len(kept) == (3 if policy == "bf16-exact" else 2), "the parameter, its remainder, its momentum"
    for path in kept:
        same = after_leaves[path] == before_leaves[path]
        assert same[where.view(-1)].all(), path
        assert not same[~where.view(-1)].all(), f"{path}: the others move"
    assert all(leaf.isfinite().all() for leaf in after_leaves.values() if leaf.is_floating_point())


def test_momentum_of_8_bits_follows_that_of_float32() -> None:
    params = {"w": torch.randn(40, 40, generator=torch.Generator().manual_seed(0))}
    values = [{"w": torch.randn(40, 40, generator=torch.Generator().manual_seed(seed))} for seed in range(1, 6)]
    quantized = state_of(muon(1e-2), dataclasses.replace(fz.policy("bf16-8bit"), param=torch.float32), params=params)
    expected = state_of(muon(1e-2), params=params)
    assert {leaf.dtype for leaf in fz.tree.leaves(quantized.moments)} == {torch.int8, torch.float32}
    traced, step = copied(quantized), fz.jit(apply, donate=0)
    for value in values:
        quantized, traced, expected = apply(quantized, value), step(traced, value), apply(expected, value)
    assert_same_bits(traced, quantized)
    moved, wanted = (piece(state.params, "w") - params["w"].view(-1) for state in (quantized, expected))
    assert torch.nn.functional.cosine_similarity(moved, wanted, dim=0) > 0.98
    skipped = apply(quantized, {"w": torch.full((40, 40), torch.nan)}, "step")
    assert_same_bits((skipped.params, skipped.moments), (quantized.params, quantized.moments))


def test_an_update_has_derivatives() -> None:
    """The direction of a matrix turns with its gradient, through momentum, orthogonalization and write-back."""
    optimizer, w = muon(1e-2), torch.zeros(4, 6)
    generator = torch.Generator().manual_seed(0)
    g, along, weights = torch.randn(3, 4, 6, generator=generator)

    def lost(g: Tensor) -> Tensor:
        return (weights * optimizer.update(g, optimizer.init(w), w, step=0, seed=0)[0]).sum()

    derivative = (torch.func.grad(lost)(g) * along).sum()
    difference = (lost(g + 0.1 * along) - lost(g - 0.1 * along)) / 0.2
    torch.testing.assert_close(derivative, difference, rtol=0.1, atol=0)


# ---------------------------------------------------------------------------------------------------------
# Who gets which leaf


CHOICES: dict[str, tuple[Any, set[str]]] = {
    "default": (None, {"matrix", "wide", "cube"}),
    "function": (lambda path: path == "wide", {"wide"}),
    "tree": ({"matrix": True, "wide": False, "cube": True, "bias": False, "scale": False}, {"matrix", "cube"}),
    "none": (lambda path: False, set()),
}


@pytest.mark.parametrize(("matrix", "expected"), CHOICES.values(), ids=CHOICES.keys())
def test_matrix_says_which_leaves_are_orthogonalized(matrix: Any, expected: set[str]) -> None:
    # The others do not move at a learning rate of zero.
    optimizer = muon(1e-2, matrix=matrix, others=fz.sgd(0.0))
    state = state_of(optimizer, params=normal(0))
    after = apply(state, normal(1))
    moved = {path for path in SHAPES if not same_bits(piece(after.params, path), piece(state.params, path))}
    assert moved == expected


def test_the_mask_says_which_leaves_decay() -> None:
    optimizers = {
        "masked": muon(1e-2, weight_decay=0.5, mask=lambda path: path == "wide"),
        "all": muon(1e-2, weight_decay=0.5),
        "none": muon(1e-2),
    }
    after = {name: apply(state_of(opt, params=normal(0)), normal(1)) for name, opt in optimizers.items()}
    for path in SHAPES:
        same_as = "all" if path == "wide" else "none"
        assert same_bits(piece(after["masked"].params, path), piece(after[same_as].params, path)), path
        assert not same_bits(piece(after["all"].params, path), piece(after["none"].params, path)), "the decay is seen"


def test_others_freeze_what_they_freeze() -> None:
    labels = {"bias": "frozen", "wide": "frozen", "matrix": "rest", "cube": "rest", "scale": "rest"}
    rest = fz.partition_by(labels.__getitem__, {"rest": fz.sgd(0.1), "frozen": None})
    for matrix, still in ((None, {"bias", "wide"}), (lambda path: path == "wide", {"bias"})):
        optimizer = muon(1e-2, matrix=matrix, others=rest)
        assert optimizer.frozen(list(SHAPES)) == still
        state = state_of(optimizer, params=normal(0))
        after = apply(state, normal(1))
        assert {p for p in SHAPES if same_bits(piece(after.params, p), piece(state.params, p))} == still


def test_integer_leaves_pass_through() -> None:
    params = {"w": torch.randn(4, 4), "table": torch.arange(16).view(4, 4)}
    state = state_of(muon(1e-2), params=params)
    after, _ = fz.apply_gradients(state, fz.grad(lambda p: (p["w"] * p["table"]).sum())(state))
    assert torch.equal(fz.gather(after.params)["table"], params["table"])
    assert not torch.equal(fz.gather(after.params)["w"], params["w"])


def test_empty_leaves_are_no_matter() -> None:
    params = {"a": torch.zeros(0, 5), "b": torch.zeros(5, 0), "c": torch.ones(3, 3), "d": torch.zeros(0)}
    optimizer = muon(1e-2)
    new, _ = optimizer.update(fz.tree.map(torch.ones_like, params), optimizer.init(params), params, step=0, seed=0)
    assert described(new) == described(params)


def test_leaves_without_a_gradient_stay() -> None:
    state = state_of(muon(1e-2))
    full = gradient_of(state, fz.tree.map(lambda x: x / 8, parameters(1)))
    pairs = zip(full.paths, full.pieces, strict=True)
    without = full.replace(pieces=tuple(None if path == "block.weight" else x for path, x in pairs))
    after, _ = fz.apply_gradients(state, without)
    assert same_bits(piece(after.params, "block.weight"), piece(state.params, "block.weight"))
    expected = apply(state, parameters(1))
    assert same_bits(piece(after.params, "head"), piece(expected.params, "head"))


def test_a_schedule_gives_each_step_its_rate() -> None:
    schedule = fz.schedules.linear(0.1, 0.02, steps=4)
    scheduled, by_hand = state_of(muon(schedule)), state_of(muon(0.1))
    for step, value in enumerate(gradients(3)):
        by_hand = apply(by_hand.replace(optimizer=muon(schedule(int32(step)).item())), value)
        scheduled = apply(scheduled, value)
        assert_same_bits(scheduled.params, by_hand.params)


def test_with_others_the_learning_rate_is_a_dict() -> None:
    assert muon(0.5).learning_rate(int32(0)) == 0.5
    rates = muon(0.5, others=fz.sgd(0.25)).learning_rate(int32(0))
    assert {name: value.item() for name, value in rates.items()} == {"matrices": 0.5, "others": 0.25}


def test_it_goes_into_a_chain_and_into_groups() -> None:
    inner = muon(1e-2)
    plain = apply(state_of(inner), parameters(1))
    chained = apply(state_of(fz.chain(fz.clip_by_global_norm(1e3), inner)), parameters(1))
    grouped = apply(state_of(fz.partition_by(lambda path: "all", {"all": inner})), parameters(1))
    assert_same_bits(chained.params, plain.params)
    assert_same_bits(grouped.params, plain.params)


def test_wrong_use_is_refused() -> None:
    with pytest.raises(ValueError, match=r"fz\.muon: matrix= chooses leaf 'bias' of shape \(7,\)"):
        state_of(muon(1e-2, matrix=lambda path: True), params=normal(0))
    with pytest.raises(ValueError, match=r"fz\.muon: steps: expected a whole number of at least 1, got 0"):
        muon(1e-2, steps=0)
    with pytest.raises(TypeError, match=r"fz\.muon: others must be an fz optimizer"):
        muon(1e-2, others=0.1)  # type: ignore[arg-type]
