"""An average of parameters: exact where rounding to nearest stands still, the same on every rank and in a trace."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fzero as fz
from fzero.program.jit import Jitted
from tests import small, world
from tests.small import assert_same_bits, flat, gradient_of

POLICIES = ("fp32", "mixed", "bf16", "bf16-exact", "bf16-8bit", "fp16")
GROUPS = fz.partition_by(
    lambda path: path.split(".")[0],
    {"block": fz.chain(fz.clip_by_leaf_norm(1.0), fz.adamw(1e-2)), "head": fz.muon(1e-2), "scale": None},
)


def state_of(policy: str, stage: int = 3, optimizer: fz.Optimizer = GROUPS) -> fz.State:
    return fz.init(small.parameters(), optimizer, fz.make_mesh("cpu"), fz.zero(stage), policy=policy)


def stepped(state: fz.State, value: Any) -> fz.State:
    return fz.apply_gradients(state, gradient_of(state, value))[0]


@pytest.mark.parametrize("policy", POLICIES)
def test_an_average_does_not_stand_still(policy: str) -> None:
    params = fz.init({"w": torch.ones(64)}, fz.sgd(0.1), fz.make_mesh("cpu"), policy=policy).params
    average = fz.ema(None, fz.zeros_like(params), 0.999)
    step = fz.jit(fz.ema, donate=0)
    for _ in range(500):
        average = step(average, params, torch.tensor(0.999, dtype=torch.float64))
    torch.testing.assert_close(fz.gather(average)["w"], torch.full((64,), 1 - 0.999**500), rtol=1e-5, atol=0)


def averaged(policy: str, stage: int, jit: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Three steps, with an average beside the state; and the same average by hand, of gathered float64 leaves."""

    def step(state: fz.State, average: fz.Sharded, value: Any, decay: Tensor) -> Any:
        state = stepped(state, value)
        return state, fz.ema(average, state, decay)

    state, run = state_of(policy, stage), fz.jit(step, donate=(0, 1)) if jit else step
    average = fz.ema(None, state, 0.5)
    by_hand = exact(state)
    for seed, decay in ((1, 0.5), (2, 0.75), (3, 0.9)):
        state, average = run(state, average, small.parameters(seed), torch.tensor(decay))
        # The decay is what float32 makes of it.
        share = 1 - torch.tensor(decay).double()
        by_hand = {path: by_hand[path] + (x - by_hand[path]) * share for path, x in exact(state).items()}
    if isinstance(run, Jitted):
        assert len(run.programs) == 1
    return flat(fz.gather(average)), by_hand


def exact(state: fz.State) -> dict[str, Tensor]:
    """The parameters of a state in float64: of split masters both halves, put together here."""
    halves = {
        path.rpartition(".")[2]: x for path, x in flat(fz.gather(state.moments)).items() if x.dtype == torch.int16
    }
    found = {}
    for path, x in flat(fz.gather(state.params)).items():
        bits = x.float().view(torch.int32)
        half = halves.get(path.rpartition(".")[2])
        found[path] = (x if half is None else (bits + half.reshape(x.shape)).view(torch.float32)).double()
    return found


CASES = [
    (1, 3, "fp32"),
    (1, 3, "bf16-8bit"),
    (1, 3, "bf16"),
    (2, 1, "bf16-exact"),
    (2, 3, "mixed"),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in [(4, 1, "bf16"), (4, 3, "bf16-exact")]),
]


@pytest.mark.parametrize(("size", "stage", "policy"), CASES)
def test_an_average_is_that_of_the_exact_parameters_on_any_number_of_ranks(size: int, stage: int, policy: str) -> None:
    alone, _ = averaged(policy, stage, jit=False)
    for average, by_hand in world.run(averaged, policy, stage, jit=True, size=size):
        assert_same_bits(average, alone)
        for path, leaf in average.items():
            assert leaf.dtype == torch.float32
            torch.testing.assert_close(leaf.double(), by_hand[path], rtol=3e-7, atol=3e-8)


def test_it_starts_with_the_exact_parameters_and_shares_no_memory() -> None:
    for policy in POLICIES:
        state = state_of(policy)
        start = fz.ema(None, state, 0.9)
        if policy in ("fp32", "mixed", "bf16-exact"):
            given = flat(small.parameters())
            trained = {path: x for path, x in flat(fz.gather(start)).items() if path != "scale"}
            assert_same_bits(trained, {path: given[path] for path in trained})
        same = {x.untyped_storage().data_ptr() for x in fz.tree.leaves(state)}
        assert not same & {x.untyped_storage().data_ptr() for x in fz.tree.leaves(start)}
        assert start.placement.specs == state.params.placement.specs


def test_a_function_sees_the_average_in_float32_and_an_integer_as_it_is_now() -> None:
    state = fz.init({"n": torch.tensor([1, 2]), "w": torch.ones(3)}, fz.sgd(1.0), fz.make_mesh("cpu"), policy="bf16")
    average = fz.ema(None, state, 0.5)
    later = state.replace(params=fz.tree.map(lambda x: 2 * x, state.params))
    seen = fz.call(lambda p: p, fz.ema(average, later, 0.5))
    assert_same_bits(seen, {"n": torch.tensor([2, 4]), "w": torch.full((3,), 1.5)})


def test_a_gradient_is_averaged_by_its_value() -> None:
    state = state_of("bf16", optimizer=fz.sgd(0.1))
    grads = gradient_of(state, small.parameters(1))
    average = fz.ema(fz.ema(None, grads, 0.5), fz.scale(grads, 3.0), 0.5)
    for path, leaf in flat(fz.gather(average)).items():
        torch.testing.assert_close(leaf, 2 * flat(fz.gather(grads))[path].float(), rtol=1e-2, atol=1e-3)


TEXT: Any = "0.9"
STATE, OTHER = "bf16", {"w": torch.ones(3)}
REFUSED: dict[str, tuple[Any, type[Exception], str]] = {
    "a tree": (lambda s, a: fz.ema(a, fz.gather(s.params), 0.9), TypeError, "expected a Sharded"),
    "an average of a tree": (lambda s, a: fz.ema(fz.gather(a), s, 0.9), TypeError, "expected a Sharded"),
    "in bfloat16": (
        lambda s, a: fz.ema(s.params, s, 0.9),
        fz.LayoutError,
        r"bfloat16, and is to be kept in torch.float32",
    ),
    "of other leaves": (lambda s, a: fz.ema(fz.shard(OTHER, s.mesh, s.layout), s, 0.9), fz.TreeError, "w"),
    "a decay above 1": (lambda s, a: fz.ema(a, s, 1.5), ValueError, "decay: expected a number of at least 0"),
    "no decay": (lambda s, a: fz.ema(a, s, TEXT), TypeError, "decay: expected a number"),
    "a vector": (lambda s, a: fz.ema(a, s, torch.ones(2)), TypeError, r"of shape \(\), got float32\(2,\)"),
    "gradients": (lambda s, a: fz.ema(fz.scale(gradient_of(s, small.parameters()), 1.0), s, 0.9), fz.LayoutError, "in"),
}


@pytest.mark.parametrize(("call", "error", "why"), REFUSED.values(), ids=REFUSED.keys())
def test_what_is_no_average_is_refused(call: Any, error: type[Exception], why: str) -> None:
    state = state_of(STATE)
    with pytest.raises(error, match=rf"fz\.ema: .*{why}|fz\.ema: .*\n.*{why}"):
        call(state, fz.ema(None, state, 0.9))
