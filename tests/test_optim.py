"""Every optimizer goes through one table: it is the optimizer it says, it is pure, and worlds of any size agree."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import fzero as fz
from fzero.kernels.storage import join_master
from tests import small, world
from tests.small import (
    assert_same_bits,
    copied,
    described,
    flat,
    gradient_of,
    int32,
    piece,
    same_bits,
)

POLICIES = ("fp32", "mixed", "bf16", "bf16-exact", "bf16-fp32-moments", "bf16-8bit", "fp16", "fp16-mixed")


def parameters(seed: int = 0) -> dict[str, Any]:
    """Those of `tests.small`, and a leaf large enough to be quantized, whose pieces are whole blocks on four ranks."""
    wide = torch.randn(64, 40, generator=torch.Generator().manual_seed(100 + seed))
    # Small enough for 2^15 times the sum of four gradients to be numbers of fp16.
    return fz.tree.map(lambda x: x * 0.1, {**small.parameters(seed), "wide": wide})


def gradients(steps: int) -> list[dict[str, Any]]:
    return [parameters(seed) for seed in range(1, steps + 1)]


def is_weight(path: str) -> bool:
    return path.endswith("weight")


def group_of(path: str) -> str:
    return path.split(".")[0]


OPTIMIZERS: dict[str, fz.Optimizer] = {
    "adamw": fz.adamw(1e-2, weight_decay=0.1),
    "adamw masked": fz.adamw(1e-2, weight_decay=0.1, mask=is_weight),
    "adam": fz.adam(fz.schedules.warmup_cosine(1e-2, warmup=2, total=8)),
    "sgd": fz.sgd(0.1),
    "sgd momentum": fz.sgd(0.1, momentum=0.9),
    "sgd nesterov": fz.sgd(0.1, momentum=0.9, nesterov=True),
    "sgd decay": fz.sgd(0.1, momentum=0.9, weight_decay=0.1),
    "lion": fz.lion(1e-2, weight_decay=0.1),
    "adafactor": fz.adafactor(1e-2, weight_decay=0.1),
    "muon": fz.muon(1e-2, weight_decay=0.1),
    # Wide enough not to clip: a norm may round.
    "clip": fz.chain(fz.clip_by_global_norm(1e3), fz.adamw(1e-2)),
    "clip leaf": fz.chain(fz.clip_by_leaf_norm(1e3), fz.adamw(1e-2)),
    "groups": fz.partition_by(
        group_of,
        {"block": fz.adamw(1e-2), "head": fz.sgd(0.1, momentum=0.9), "wide": fz.lion(1e-2), "scale": None},
    ),
}
every_optimizer = pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
every_policy = pytest.mark.parametrize("policy", POLICIES)
# Every optimizer under every policy; fast are one optimizer under all, and all under one.
every_pair = pytest.mark.parametrize(
    ("optimizer", "policy"),
    [
        pytest.param(
            optimizer,
            policy,
            id=f"{name}-{policy}",
            marks=() if name == "adamw" or policy == "bf16" else pytest.mark.slow,
        )
        for name, optimizer in OPTIMIZERS.items()
        for policy in POLICIES
    ],
)


def state_of(optimizer: fz.Optimizer, policy: str = "fp32", stage: int = 3, mesh: fz.Mesh | None = None) -> fz.State:
    return fz.init(parameters(), optimizer, mesh or fz.make_mesh("cpu"), fz.zero(stage), policy=policy)


def apply(state: fz.State, value: Any) -> fz.State:
    return fz.apply_gradients(state, gradient_of(state, value))[0]


# ---------------------------------------------------------------------------------------------------------
# The state


@every_pair
def test_an_update_keeps_structure_shapes_and_dtypes_of_the_state(optimizer: fz.Optimizer, policy: str) -> None:
    before = state_of(optimizer, policy)
    after = apply(before, parameters(1))
    assert fz.tree.structure(after) == fz.tree.structure(before)
    assert described(after) == described(before)


# What a moment may be stored as, beside the policy's own dtype.
STORED = {torch.int8: {torch.int8, torch.uint8, torch.bfloat16, torch.float32}}


@every_pair
def test_moments_start_as_zeros_of_the_policy(optimizer: fz.Optimizer, policy: str) -> None:
    state = state_of(optimizer, policy)
    moments = {path: x for path, x in flat(state.moments).items() if x.dtype != torch.int16}
    # What Adafactor keeps is small, or of vectors: float32 under every policy.
    expected = {torch.float32} if optimizer == OPTIMIZERS["adafactor"] else {state.policy.moment}
    assert {leaf.dtype for leaf in moments.values()} <= STORED.get(state.policy.moment, expected)
    assert not any(leaf.any() for leaf in moments.values())
    assert any(x.dtype == torch.int16 for x in flat(state.moments).values()) == (state.policy.master == "split")


@every_optimizer
def test_split_parameters_start_as_the_exact_ones(optimizer: fz.Optimizer) -> None:
    state = state_of(optimizer, "bf16-exact")
    remainders = {path.rpartition(".")[2]: x for path, x in flat(state.moments).items() if x.dtype == torch.int16}
    expected = {path.rpartition(".")[2]: x.reshape(-1) for path, x in flat(parameters()).items()}
    pieces = {path.rpartition(".")[2]: piece(state.params, path) for path in state.params.paths}
    assert remainders.keys() >= expected.keys() - {"scale"}
    for name, remainder in remainders.items():
        assert same_bits(join_master(pieces[name], remainder), expected[name]), name


@pytest.mark.parametrize("stage", [pytest.param(0, marks=pytest.mark.slow), pytest.param(1, marks=pytest.mark.slow), 3])
@every_pair
def test_an_abstract_state_has_the_layout_of_a_real_one(optimizer: fz.Optimizer, policy: str, stage: int) -> None:
    simulated = fz.make_mesh("cpu", data=1, simulate=True)
    abstract = state_of(optimizer, policy, stage, simulated)
    assert all(leaf.is_meta for leaf in fz.tree.leaves(abstract))
    assert described(abstract) == described(state_of(optimizer, policy, stage))


def layouts_of_a_rank(policy: str, stage: int) -> dict[str, dict[str, str]]:
    return {name: described(state_of(optimizer, policy, stage)) for name, optimizer in OPTIMIZERS.items()}


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_an_abstract_state_of_many_ranks_has_the_layout_of_each_rank(stage: int) -> None:
    simulated = fz.make_mesh("cpu", data=4, simulate=True)
    expected = {name: described(state_of(opt, "bf16", stage, simulated)) for name, opt in OPTIMIZERS.items()}
    for layouts in world.run(layouts_of_a_rank, "bf16", stage, size=4):
        assert layouts == expected


# ---------------------------------------------------------------------------------------------------------
# Pure, and traced once


@every_pair
def test_an_update_changes_nothing_that_it_is_given(optimizer: fz.Optimizer, policy: str) -> None:
    state = state_of(optimizer, policy)
    grads = gradient_of(state, parameters(1))
    kept = copied((state, grads))
    new, _ = fz.apply_gradients(state, grads)
    assert_same_bits((state, grads), kept)
    assert not same_bits(piece(new.params, "block.weight"), piece(state.params, "block.weight")), "and it did something"


# A trace sees dtypes; what is stored in parts has other shapes too. Fast is each update once, and one of a schedule.
EACH_ONCE = ("adam", "sgd nesterov", "lion", "adafactor", "muon", "clip", "groups")
TRACED = {("adamw", "bf16-exact"), *((name, "bf16-8bit") for name in EACH_ONCE)}


@pytest.mark.parametrize(
    ("name", "policy"),
    [
        pytest.param(
            name,
            policy,
            marks=() if (name, policy) in TRACED else pytest.mark.slow,
        )
        for name in OPTIMIZERS
        for policy in POLICIES
    ],
)
def test_steps_share_one_trace(name: str, policy: str) -> None:
    step, state = fz.jit(apply, donate=0), state_of(OPTIMIZERS[name], policy)
    for value in gradients(3):
        state = step(state, value)
    assert len(step.programs) == 1
    assert state.step == 3


@every_pair
def test_the_same_steps_give_the_same_bits_again(optimizer: fz.Optimizer, policy: str) -> None:
    runs = []
    for _ in range(2):
        state = state_of(optimizer, policy)
        for value in gradients(2):
            state = apply(state, value)
        runs.append(state)
    assert_same_bits(*runs)


@every_pair
def test_a_run_that_was_written_and_read_goes_on_with_the_same_bits(optimizer: fz.Optimizer, policy: str) -> None:
    state = state_of(optimizer, policy)
    first, second, third = gradients(3)
    state = apply(apply(state, first), second)
    file = io.BytesIO()
    torch.save(fz.tree.leaves(state), file)
    file.seek(0)
    resumed = fz.tree.unflatten(fz.tree.structure(state_of(optimizer, policy)), torch.load(file))
    assert_same_bits(apply(resumed, third), apply(state, third))


# ---------------------------------------------------------------------------------------------------------
# The numbers


@dataclass(frozen=True)
class Twin:
    """An optimizer, and torch's own."""

    ours: fz.Optimizer
    torchs: Callable[[list[Tensor]], torch.optim.Optimizer]


TWINS = {
    "adamw": Twin(fz.adamw(1e-2, weight_decay=0.1), lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1)),
    "adamw betas": Twin(
        fz.adamw(1e-2, 0.8, 0.95, 1e-4), lambda p: torch.optim.AdamW(p, lr=1e-2, betas=(0.8, 0.95), eps=1e-4)
    ),
    "adam": Twin(fz.adam(1e-2), lambda p: torch.optim.Adam(p, lr=1e-2)),
    "sgd": Twin(fz.sgd(0.1), lambda p: torch.optim.SGD(p, lr=0.1)),
    "sgd decay": Twin(fz.sgd(0.1, weight_decay=0.1), lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.1)),
    "sgd momentum": Twin(fz.sgd(0.1, momentum=0.9), lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)),
    "sgd nesterov": Twin(
        fz.sgd(0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    ),
}


def by_torch(optimizer: Callable[[list[Tensor]], torch.optim.Optimizer], values: Sequence[Any]) -> dict[str, Tensor]:
    """Steps of a torch optimizer from `parameters()`, in float64."""
    params = flat(parameters())
    leaves = {path: leaf.double().requires_grad_() for path, leaf in params.items()}
    made = optimizer(list(leaves.values()))
    for value in values:
        for path, gradient in flat(value).items():
            leaves[path].grad = gradient.double()
        made.step()
    return {path: leaf.detach().float() for path, leaf in leaves.items()}


def assert_close(actual: Any, expected: Any) -> None:
    """Equal up to a few roundings of float32 in numbers around 1."""
    left, right = flat(actual), flat(expected)
    assert left.keys() == right.keys()
    for path, value in right.items():
        torch.testing.assert_close(left[path], value, rtol=2e-6, atol=2e-6, msg=f"{path} differs")


@pytest.mark.parametrize("twin", TWINS.values(), ids=TWINS.keys())
def test_ten_steps_equal_those_of_torch(twin: Twin) -> None:
    state = state_of(twin.ours)
    for value in gradients(10):
        state = apply(state, value)
    assert_close(flat(fz.gather(state.params)), by_torch(twin.torchs, gradients(10)))


def lion_in_float64(lr: float, b1: float, b2: float, weight_decay: float, values: Sequence[Any]) -> dict[str, Tensor]:
    params = {path: leaf.double() for path, leaf in flat(parameters()).items()}
    momentum = {path: torch.zeros_like(leaf) for path, leaf in params.items()}
    for value in values:
        for path, gradient in flat(value).items():
            m, g = momentum[path], gradient.double()
            params[path] = params[path] * (1 - lr * weight_decay) - lr * torch.sign(b1 * m + (1 - b1) * g)
            momentum[path] = b2 * m + (1 - b2) * g
    return {path: leaf.float() for path, leaf in params.items()}


def test_ten_steps_of_lion_equal_its_formula() -> None:
    state = state_of(fz.lion(1e-2, 0.8, 0.95, weight_decay=0.1))
    for value in gradients(10):
        state = apply(state, value)
    assert_close(flat(fz.gather(state.params)), lion_in_float64(1e-2, 0.8, 0.95, 0.1, gradients(10)))


MASKS: dict[str, Any] = {
    "function": is_weight,
    "tree": {"block": {"bias": False, "weight": True}, "head": False, "scale": False, "wide": False},
}
DECAYING: dict[str, Callable[..., fz.Optimizer]] = {
    "adamw": lambda **options: fz.adamw(1e-2, **options),
    "sgd": lambda **options: fz.sgd(1e-2, **options),
    "lion": lambda **options: fz.lion(1e-2, **options),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize("make", DECAYING.values(), ids=DECAYING.keys())
def test_the_mask_says_which_leaves_decay(make: Callable[..., fz.Optimizer], mask: Any) -> None:
    masked, decayed, plain = (
        flat(fz.gather(apply(state_of(optimizer), parameters(1)).params))
        for optimizer in (make(weight_decay=0.5, mask=mask), make(weight_decay=0.5), make(weight_decay=0.0))
    )
    for path, value in masked.items():
        assert same_bits(value, (decayed if is_weight(path) else plain)[path]), path
        assert not same_bits(decayed[path], plain[path]), f"{path}: the decay is seen"


SCHEDULED: dict[str, Callable[[Any], fz.Optimizer]] = {
    "adamw": fz.adamw,
    "sgd": lambda lr: fz.sgd(lr, momentum=0.9),
    "lion": fz.lion,
    "chain": lambda lr: fz.chain(fz.clip_by_global_norm(1.0), fz.adamw(lr)),
}


@pytest.mark.parametrize("make", SCHEDULED.values(), ids=SCHEDULED.keys())
def test_a_schedule_gives_each_step_its_rate(make: Callable[[Any], fz.Optimizer]) -> None:
    schedule = fz.schedules.linear(0.1, 0.02, steps=4)
    scheduled, by_hand = state_of(make(schedule)), state_of(make(0.1))
    for step, value in enumerate(gradients(4)):
        rate = schedule(torch.tensor(step)).item()
        by_hand = apply(by_hand.replace(optimizer=make(rate)), value)
        scheduled, info = fz.apply_gradients(scheduled, gradient_of(scheduled, value))
        assert info["lr"].item() == rate
        assert_same_bits(scheduled.params, by_hand.params)


# ---------------------------------------------------------------------------------------------------------
# Worlds


def trained(names: Sequence[str], policy: str, stage: int, steps: int) -> dict[str, Any]:
    """The full parameters and moments after steps of each optimizer, fed the same gradients on every rank."""
    results = {}
    for name in names:
        state = state_of(OPTIMIZERS[name], policy, stage)
        for value in gradients(steps):
            state = apply(state, value)
        results[name] = {"params": fz.gather(state.params), "moments": fz.gather(state.moments)}
    return results


QUICK = [("mixed", 1, 2), ("bf16-8bit", 3, 2), ("bf16", 3, 4)]


@pytest.mark.parametrize(
    ("names", "policy", "stage", "size"),
    [
        *(pytest.param(EACH_ONCE, *case, id=f"each-{case}") for case in QUICK),
        *(
            pytest.param(tuple(OPTIMIZERS), *case, id=f"all-{case}", marks=pytest.mark.slow)
            for case in itertools.product(POLICIES, (1, 3), (2, 4))
        ),
    ],
)
def test_worlds_of_any_size_agree_bit_for_bit(names: Sequence[str], policy: str, stage: int, size: int) -> None:
    alone = trained(names, policy, stage, 3)
    for rank in world.run(trained, names, policy, stage, 3, size=size):
        assert_same_bits(rank, alone)


# ---------------------------------------------------------------------------------------------------------
# Stochastic rounding


def drift(policy: str | fz.Policy, size: int = 10_000, steps: int = 20) -> float:
    """How far ones move on average under a constant gradient, at a rate far below their spacing in bfloat16."""
    state = fz.init({"w": torch.ones(size)}, fz.adamw(1e-4, weight_decay=0.0), fz.make_mesh("cpu"), policy=policy)
    step = fz.jit(apply, donate=0)
    for _ in range(steps):
        state = step(state, {"w": torch.ones(size)})
    return float(fz.gather(state.params)["w"].double().mean() - 1)


def test_stochastic_rounding_drifts_as_float32_and_nearest_stands_still() -> None:
    nearest = fz.Policy(param=torch.bfloat16, moment=torch.float32, compute=torch.bfloat16, rounding="nearest")
    stochastic = fz.Policy(param=torch.bfloat16, moment=torch.float32, compute=torch.bfloat16, rounding="stochastic")
    expected = drift("fp32")
    assert expected == pytest.approx(-20 * 1e-4, rel=1e-3)
    assert drift(nearest) == 0.0
    # The mean of 10 000 elements over 20 steps: a step moves about one element in 39 by 2^-8, the spacing below 1, so
    # it deviates by sqrt(20 / 39 / 10 000) · 2^-8 = 3e-5. The seed is fixed, and four deviations are allowed for.
    assert drift(stochastic) == pytest.approx(expected, abs=1.2e-4)


def test_rounding_is_another_in_each_step_leaf_and_seed() -> None:
    params = {"a": torch.ones(500), "b": torch.ones(500)}
    optimizer = fz.sgd(2.0**-10)  # a quarter of the spacing of bfloat16 below 1: an element moves or does not

    def moved(seed: int, steps: int) -> list[Tensor]:
        state = fz.init(params, optimizer, fz.make_mesh("cpu"), policy="bf16", seed=seed)
        state = state.replace(step=state.step + steps)
        return [piece(apply(state, params).params, path) != 1 for path in "ab"]

    first_a, first_b = moved(seed=0, steps=0)
    assert 0 < first_a.sum() < 500
    for other in (first_b, *moved(seed=0, steps=1), *moved(seed=1, steps=0)):
        assert not torch.equal(first_a, other)
    assert torch.equal(first_a, moved(seed=0, steps=0)[0])


# ---------------------------------------------------------------------------------------------------------
# Plain trees, leaves without a gradient, wrong use


@every_optimizer
def test_a_plain_tree_is_updated_like_a_state(optimizer: fz.Optimizer) -> None:
    params, state, seed = parameters(), state_of(optimizer), int32(0)
    opt_state = optimizer.init(params)
    for step, value in enumerate(gradients(3)):
        given = copied((params, opt_state, value))
        new, new_opt_state = optimizer.update(value, opt_state, params, step=int32(step), seed=seed)
        if "scale" in optimizer.frozen(list(flat(params))):
            value = {**value, "scale": torch.zeros(())}
        state = apply(state, value)
        assert_same_bits((params, opt_state), given[:2])
        params, opt_state = new, new_opt_state
    assert_same_bits(params, fz.gather(state.params))


@every_optimizer
def test_leaves_without_a_gradient_stay_and_the_others_do_not_notice(optimizer: fz.Optimizer) -> None:
    state, value = state_of(optimizer), parameters(1)
    full = gradient_of(state, value)
    pairs = zip(full.paths, full.pieces, strict=True)
    without_head = full.replace(pieces=tuple(None if path == "head" else gradient for path, gradient in pairs))
    expected = flat(fz.gather(apply(state, value).params)) | {"head": parameters()["head"]}
    after, _ = fz.apply_gradients(state, without_head)
    assert_same_bits(flat(fz.gather(after.params)), expected)
    assert described(after) == described(state)


@every_policy
@pytest.mark.parametrize("name", ["adamw", "sgd", "sgd momentum", "lion", "clip"])
def test_integer_leaves_pass_through(name: str, policy: str) -> None:
    params = {"w": torch.randn(40), "table": torch.arange(40)}
    state = fz.init(params, OPTIMIZERS[name], fz.make_mesh("cpu"), policy=policy)
    assert not any("table" in path for path in fz.tree.paths(state.moments))
    loss = fz.grad(lambda p: (p["w"] * p["table"]).sum(dtype=torch.float32) * 1e-2)  # so that fp16 does not overflow
    after, info = fz.apply_gradients(state, loss(state))
    assert torch.equal(fz.gather(after.params)["table"], params["table"])
    assert not torch.equal(piece(after.params, "w"), piece(state.params, "w"))
    assert info["finite"]


UNPAIRED: dict[str, tuple[Any, str]] = {
    "another shape": ({"a": torch.zeros(5), "b": torch.zeros(2)}, r"a: expected shape \(4,\), got shape \(5,\)"),
    "a leaf too many": ({"a": torch.zeros(4), "b": torch.zeros(2), "c": torch.zeros(1)}, "c: expected nothing"),
    "a leaf missing": ({"a": torch.zeros(4)}, r"b: expected shape \(2,\), got nothing"),
    "a number": ({"a": 1.0, "b": torch.zeros(2)}, r"a: expected shape \(4,\), got 1.0"),
}


@pytest.mark.parametrize(("grads", "message"), UNPAIRED.values(), ids=UNPAIRED.keys())
@every_optimizer
def test_gradients_that_do_not_pair_name_the_leaf(optimizer: fz.Optimizer, grads: Any, message: str) -> None:
    params, zero = {"a": torch.zeros(4), "b": torch.zeros(2)}, int32(0)
    if isinstance(optimizer, type(OPTIMIZERS["groups"])):
        optimizer = fz.partition_by(lambda path: "all", {"all": fz.sgd(0.1)})
    with pytest.raises(fz.TreeError, match=message):
        optimizer.update(grads, optimizer.init(params), params, step=zero, seed=zero)


def test_nesterov_needs_momentum() -> None:
    with pytest.raises(ValueError, match=r"fz\.sgd: nesterov=True needs a momentum"):
        fz.sgd(0.1, nesterov=True)


@pytest.mark.parametrize("make", [int, torch.tensor, lambda x: torch.tensor(x, dtype=torch.int32)])
def test_step_and_seed_are_integers_of_any_kind(make):
    state = fz.init({"w": torch.ones(40)}, fz.adamw(1e-2), fz.make_mesh("cpu"), policy="bf16")
    grads = fz.grad(lambda p: p["w"].float().sum())(state)
    one, zero = torch.ones((), dtype=torch.int32), torch.zeros((), dtype=torch.int32)
    expected = state.optimizer.update(grads, state.moments, state.params, step=one, seed=zero)
    got = state.optimizer.update(grads, state.moments, state.params, step=make(1), seed=make(0))
    assert all(torch.equal(x, y) for x, y in zip(fz.tree.leaves(got), fz.tree.leaves(expected), strict=True))
