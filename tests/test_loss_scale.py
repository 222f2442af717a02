"""Loss scaling: how the scale moves, that no path leads around it, and what an overflow leaves untouched."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import fzero as fz
from tests import small, world
from tests.small import assert_same_bits, copied

POLICIES = ("fp16", "fp16-mixed")
every_policy = pytest.mark.parametrize("policy", POLICIES)


def parameters(seed: int = 0) -> Any:
    """Small enough that 2^15 times the sum of four of them is a number of fp16."""
    return fz.tree.map(lambda x: x * 0.1, small.parameters(seed))


def state_of(policy: Any, stage: int = 3, **options: Any) -> fz.State:
    return fz.init(parameters(), fz.adamw(1e-2), fz.make_mesh("cpu"), fz.zero(stage), policy=policy, **options)


def dot(params: Any, weights: Any) -> Tensor:
    pairs = zip(fz.tree.leaves(params), fz.tree.leaves(weights), strict=True)
    return torch.stack([(p.float() * w).sum() for p, w in pairs]).sum()


def poisoned(value: float = float("inf")) -> Any:
    weights = parameters(1)
    weights["head"][3] = value
    return weights


def held(state: fz.State) -> list[Tensor]:
    """What a skipped step leaves as it is."""
    leaves: list[Tensor] = fz.tree.leaves((state.params, state.moments, state.step))
    return leaves


def step(state: fz.State, weights: Any) -> tuple[fz.State, dict[str, Any]]:
    return fz.apply_gradients(state, fz.grad(dot)(state, weights))


# ---------------------------------------------------------------------------------------------------------
# The scale


def by_torch(scaling: fz.LossScale, finite: list[bool]) -> list[float]:
    """The scales of torch's own scaler, which are fed the same overflows."""
    scaler = torch.amp.GradScaler(
        "cpu", scaling.initial, growth_factor=scaling.growth, backoff_factor=scaling.backoff,
        growth_interval=scaling.interval,
    )  # fmt: skip
    weight, scales = torch.zeros(1, requires_grad=True), []
    optimizer = torch.optim.SGD([weight], lr=0.0)
    for ok in finite:
        scales.append(scaler.get_scale())
        weight.grad = None
        scaler.scale(weight.sum() * (1.0 if ok else float("inf"))).backward()
        scaler.step(optimizer)
        scaler.update()
    return [*scales, scaler.get_scale()]


@pytest.mark.parametrize("interval", [1, 3])
def test_the_scale_moves_as_that_of_torch(interval: int) -> None:
    scaling = fz.LossScale(initial=2.0**10, interval=interval, smallest=2.0**-20)
    finite = [True, True, True, False, True, True, False, False, True, True, True, True, True, True, False]
    scale, streak = scaling.start(torch.device("cpu"))
    scales = [scale.item()]
    for ok in finite:
        scale, streak = scaling.after(scale, streak, torch.tensor(ok))
        scales.append(scale.item())
    assert scales == by_torch(scaling, finite)


def test_hysteresis_lowers_the_scale_at_the_last_of_several_overflows_in_a_row() -> None:
    scaling = fz.LossScale(initial=16.0, hysteresis=2, interval=10)
    scale, streak = scaling.start(torch.device("cpu"))
    scales = []
    for ok in (False, True, False, False, False, False):
        scale, streak = scaling.after(scale, streak, torch.tensor(ok))
        scales.append(scale.item())
    assert scales == [16, 16, 16, 8, 8, 4]


def test_the_scale_stays_within_its_bounds() -> None:
    scaling = fz.LossScale(initial=2.0, interval=1, growth=2.0**100, smallest=1.0)
    scale, streak = scaling.start(torch.device("cpu"))
    for _ in range(3):
        scale, streak = scaling.after(scale, streak, torch.tensor(True))
    assert scale == 2.0**101, "it stops before it would be infinite"
    scale = torch.tensor(1.5)
    for _ in range(3):
        scale, streak = scaling.after(scale, streak, torch.tensor(False))
    assert scale == 1.0


@pytest.mark.parametrize(
    "fields",
    [{"initial": 0.0}, {"initial": float("inf")}, {"growth": 0.5}, {"backoff": 0.0}, {"backoff": 2.0}, {"interval": 0},
     {"hysteresis": 0}, {"smallest": 0.0}, {"initial": 1.0, "smallest": 2.0}],
    ids=str,
)  # fmt: skip
def test_numbers_out_of_range_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(fz.PolicyError, match=f"fz.LossScale: {list(fields)[-1]}="):
        fz.LossScale(**fields)


# ---------------------------------------------------------------------------------------------------------
# Steps


@every_policy
def test_a_state_starts_with_its_scale_and_steps_tell_the_one_they_used(policy: str) -> None:
    state = state_of(policy)
    assert state.loss_scale == 2.0**15
    after, info = step(state, parameters(1))
    assert info["loss_scale"] == 2.0**15
    assert info["finite"]
    after, info = step(after, poisoned())
    assert not info["finite"]
    assert after.loss_scale == 2.0**14


def test_a_number_is_a_scale_that_stays() -> None:
    policy = fz.Policy(param=torch.float16, compute=torch.float16, loss_scale=512.0)
    state = state_of(policy)
    for weights in (parameters(1), poisoned(), parameters(2)):
        state, info = step(state, weights)
        assert state.loss_scale == info["loss_scale"] == 512.0
    assert state.step == 2


def overflowing(policy: str, stage: int, jitted: bool) -> Any:
    """Steps of which the second overflows on the last rank alone."""
    mesh = fz.make_mesh("cpu")
    run = fz.jit(step) if jitted else step
    state, _ = run(state_of(policy, stage), parameters(1))
    before = copied(state)
    last = mesh.index("data") == mesh.size("data") - 1
    state, info = run(state, poisoned() if last else parameters(2))
    kept = held(before)
    same = all(torch.equal(a, b) for a, b in zip(kept, held(state), strict=True))
    after, again = run(state, parameters(3))
    moved = not torch.equal(fz.gather(after.params)["head"], fz.gather(state.params)["head"])
    assert state.loss_scale is not None
    return {
        "same": same, "scale": state.loss_scale.item(), "finite": bool(info["finite"]), "moved": moved,
        "recovered": bool(again["finite"]), "step": int(after.step),
    }  # fmt: skip


# A trace on every rank takes a second: fast are two ranks of two layouts.
SIZES = {
    **{("eager", policy, stage): (1, 2, 4) for policy in POLICIES for stage in (0, 3)},
    ("jit", "fp16", 3): (2,),
    ("jit", "fp16-mixed", 0): (2,),
}


@pytest.mark.parametrize(
    ("how", "policy", "stage", "sizes"),
    [
        *((*case, sizes) for case, sizes in SIZES.items()),
        *(
            pytest.param(*case, (1, 2, 4), marks=pytest.mark.slow)
            for case in itertools.product(("eager", "jit"), POLICIES, (0, 1, 3))
            if case not in SIZES or case[0] == "jit"
        ),
    ],
)
def test_an_overflow_on_one_rank_is_skipped_by_all(how: str, policy: str, stage: int, sizes: tuple[int, ...]) -> None:
    expected = {"same": True, "scale": 2.0**14, "finite": False, "moved": True, "recovered": True, "step": 2}
    jitted = how == "jit"
    for size in sizes:
        assert world.run(overflowing, policy, stage, jitted, size=size) == [expected] * size


@every_policy
def test_small_gradients_survive(policy: str) -> None:
    # 1e-8 is a seventh of the smallest number of fp16.
    tiny = fz.tree.map(lambda x: torch.full_like(x, 1e-8), parameters())
    state = state_of(policy)
    grads = fz.grad(dot)(state, tiny)
    values = [piece.float() * grads.multiplier for piece in grads.pieces if piece is not None]
    for value in values:
        torch.testing.assert_close(value, torch.full_like(value, 1e-8), rtol=1e-3, atol=0)
    moved, info = step(state, tiny)
    assert info["finite"]
    # AdamW moves by its learning rate whatever the size of the gradient is, but half as far for one as small as eps.
    change = fz.gather(moved.params)["head"].float() - fz.gather(state.params)["head"].float()
    torch.testing.assert_close(change.mean(), torch.tensor(-5e-3), rtol=0.05, atol=0)


# ---------------------------------------------------------------------------------------------------------
# No way around it


def scalar(state: fz.State, weights: Any) -> fz.Sharded:
    gradient: fz.Sharded = fz.grad(dot)(state, weights)
    return gradient


def cotangent(state: fz.State, weights: Any) -> fz.Sharded:
    _, pull = fz.vjp(lambda params: fz.tree.map(lambda x: x.float(), params), state)
    (gradient,) = pull(weights)
    return gradient


def through_another(state: fz.State, weights: Any) -> fz.Sharded:
    """The cotangent of a plain tensor that another pullback hands over."""
    doubled, pull = fz.vjp(lambda params: fz.tree.map(lambda x: x.float() * 2, params), state)
    _, pull_loss = fz.vjp(lambda tree_: dot(tree_, weights), doubled)
    (bar,) = pull_loss(torch.tensor(0.5))
    (gradient,) = pull(bar)
    return gradient


WEIGHTS = parameters(1)


def accumulated(state: fz.State, weights: Any) -> fz.Sharded:
    def loss(params: Any, rows: Tensor) -> Tensor:
        return dot(params, WEIGHTS) * rows.mean()

    _, gradient = fz.accumulate(fz.value_and_grad(loss), 2)(state, torch.ones(4))
    return gradient


@functools.cache
def other() -> fz.State:
    """A state with a smaller scale. It is made before a trace, and not in the ranks that import this file."""
    return state_of("fp16").replace(loss_scale=torch.tensor(64.0))


def by_three(state: fz.State, weights: Any) -> tuple[Any, ...]:
    """Gradients by two states, of which the other has a smaller scale, and by a tensor."""
    f = lambda p, q, x: dot(p, weights) + dot(q, weights) * x  # noqa: E731
    _, pull = fz.vjp(f, state, other(), torch.tensor(3.0))
    gradients: tuple[Any, ...] = pull(torch.tensor(1.0))
    return gradients


def with_others(state: fz.State, weights: Any) -> fz.Sharded:
    gradient: fz.Sharded = by_three(state, weights)[0]
    return gradient


def inside_remat(state: fz.State, weights: Any) -> fz.Sharded:
    gradient: fz.Sharded = fz.grad(lambda params: fz.remat(dot)(params, weights))(state)
    return gradient


PATHS = {
    "grad": (scalar, 2.0**15),
    "cotangent": (cotangent, 2.0**15),
    "through another pullback": (through_another, 2.0**15),
    "accumulate": (accumulated, None),
    "smallest of several": (with_others, 64.0),
    "remat": (inside_remat, 2.0**15),
}


@pytest.mark.parametrize(
    ("policy", "jitted"),
    [("fp16", False), ("fp16-mixed", False), ("fp16", True), pytest.param("fp16-mixed", True, marks=pytest.mark.slow)],
)
@pytest.mark.parametrize(("path", "scale"), PATHS.values(), ids=PATHS.keys())
def test_every_path_scales_and_tells_true_values(policy: str, path: Any, scale: float | None, jitted: bool) -> None:
    state, weights = state_of(policy), parameters(1)
    other()
    gradient = (fz.jit(path) if jitted else path)(state, weights)
    if scale is not None:
        assert gradient.factor == 1 / scale
        index = gradient.paths.index("head")
        held = gradient.pieces[index].float()
        torch.testing.assert_close(held[:70], weights["head"] * scale, rtol=1e-3, atol=scale * 1e-7)
    for got, expected in zip(fz.tree.leaves(fz.gather(gradient)), fz.tree.leaves(weights), strict=True):
        torch.testing.assert_close(got.float(), expected, rtol=2e-3, atol=1e-6)


def test_several_states_share_the_smallest_scale_and_a_tensor_has_none() -> None:
    state, weights = state_of("fp16-mixed"), parameters(1)
    ours, theirs, bar = by_three(state, weights)
    assert ours.factor == theirs.factor == 1 / 64
    torch.testing.assert_close(fz.gather(theirs)["head"].float(), 3 * weights["head"], rtol=2e-3, atol=1e-6)
    torch.testing.assert_close(bar, dot(parameters(), weights), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_scale_above_the_range_of_fp16_leaves_gradients_of_tensors_true(dtype: torch.dtype) -> None:
    state = state_of("fp16").replace(loss_scale=torch.tensor(2.0**17))
    _, pull = fz.vjp(lambda p, x: (p["head"].float() * x.float()).sum() * 1e-4, state, torch.ones(70, dtype=dtype))
    _, bar = pull(torch.tensor(1.0))
    torch.testing.assert_close(bar.float(), parameters()["head"] * 1e-4, rtol=2e-3, atol=1e-7)


@every_policy
def test_bare_parameters_of_a_scaled_policy_are_no_primal(policy: str) -> None:
    state = state_of(policy)
    for call in (
        lambda: fz.grad(dot)(state.params, parameters(1)),
        lambda: fz.vjp(lambda params: params["head"], state.params),
        lambda: fz.vjp(lambda both: both[0]["head"], (state.params, 1.0)),
    ):
        with pytest.raises(ValueError, match=r"expected a State, got the bare parameters(.|\n)*fz\.vjp\(f, state\)"):
            call()
    assert_same_bits(fz.call(lambda params: params, state.params), fz.call(lambda params: params, state))


@every_policy
def test_elements_cannot_be_skipped_under_a_loss_scale(policy: str) -> None:
    state = state_of(policy)
    with pytest.raises(ValueError, match=r"skip='element' under a policy with a loss scale"):
        fz.apply_gradients(state, fz.grad(dot)(state, parameters(1)), skip="element")
