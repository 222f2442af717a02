"""What a gradient that is not finite does: `skip="step"` keeps all as it was, `skip="element"` only that element."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fzero as fz
from fzero.train.step import Skip
from tests import world
from tests.small import assert_same_bits, copied, flat, gradient_of, parameters, same_bits

SIZES = (1, 2, 4)
STAGES = (0, 1, 3)
QUICK = {(1, 3), (2, 0), (2, 1), (4, 3)}
every_layout = pytest.mark.parametrize(
    ("size", "stage"),
    [
        pytest.param(size, stage, marks=[pytest.mark.slow] * ((size, stage) not in QUICK))
        for size in SIZES
        for stage in STAGES
    ],
)
OPTIMIZERS: dict[str, fz.Optimizer] = {
    "adamw": fz.adamw(1e-2, weight_decay=0.1),
    "lion": fz.lion(1e-2),
    "sgd": fz.sgd(0.1, momentum=0.9),
    "clip": fz.chain(fz.clip_by_global_norm(1.0), fz.adamw(1e-2)),
}
CASES = [("adamw", "fp32"), ("adamw", "bf16"), ("lion", "bf16"), ("sgd", "fp32"), ("clip", "fp32")]
FEW = CASES[1:2]  # on four ranks

# Which elements of the last rank's gradient are not finite, and what they are.
FAULTS: dict[str, Callable[[Any], None]] = {
    "a NaN": lambda value: value["head"][3].fill_(torch.nan),
    "an inf in the last element": lambda value: value["block"]["weight"][-1, -1].fill_(torch.inf),
    "a NaN in a leaf kept whole": lambda value: value["block"]["bias"][2].fill_(torch.nan),
    "a scalar": lambda value: value["scale"].fill_(-torch.inf),
    "a whole leaf": lambda value: value["head"].fill_(torch.nan),
}


def state_of(name: str, stage: int, policy: str) -> fz.State:
    """A state one step old, so that moments are not zero."""
    state = fz.init(parameters(), OPTIMIZERS[name], fz.make_mesh("cpu"), fz.zero(stage), policy=policy)
    return fz.apply_gradients(state, gradient_of(state, parameters(1)))[0]


def faulty(state: fz.State, fault: str) -> fz.Sharded:
    """A gradient in which the last rank has a fault."""
    value = parameters(3)
    if state.mesh.index("data") == state.mesh.size("data") - 1:
        FAULTS[fault](value)
    return gradient_of(state, value)


def hit(fault: str) -> dict[str, Tensor]:
    """Which elements the fault hits."""
    value = parameters(3)
    FAULTS[fault](value)
    return {path: ~leaf.isfinite() for path, leaf in flat(value).items()}


def whole(state: fz.State) -> dict[str, dict[str, Tensor]]:
    """Every parameter and moment in full: kind to path to leaf."""
    kinds = {"params": state.params}
    for moment in fz.tree.leaves(state.moments, is_leaf=lambda x: isinstance(x, fz.Sharded)):
        kinds[f"moment {len(kinds)}"] = moment
    return {kind: flat(fz.gather(sharded)) for kind, sharded in kinds.items()}


# ---------------------------------------------------------------------------------------------------------
# skip="step"


def skip_steps(stage: int, cases: list[tuple[str, str]]) -> None:
    """A skipped step leaves every bit on this rank as it was, and the next step is the one that was due."""
    for name, policy in cases:
        before = state_of(name, stage, policy)
        for fault in FAULTS:
            after, info = fz.apply_gradients(before, faulty(before, fault), skip="step")
            assert_same_bits(after, before)
            assert after.step == 1
            assert not info["finite"]
            assert not info["grad_norm"].isfinite()
        good = gradient_of(before, parameters(4))
        assert_same_bits(fz.apply_gradients(after, good)[0], fz.apply_gradients(before, good)[0])


@every_layout
def test_a_skipped_step_changes_nothing_on_any_rank(size: int, stage: int) -> None:
    world.run(skip_steps, stage, FEW if size == 4 else CASES, size=size)


def skips_agree_on_good_gradients(stage: int) -> None:
    for name, policy in CASES:
        state = state_of(name, stage, policy)
        good = gradient_of(state, parameters(3))
        by_step, info = fz.apply_gradients(state, good, skip="step")
        by_element, _ = fz.apply_gradients(state, good, skip="element")
        by_default, _ = fz.apply_gradients(state, good)
        assert_same_bits(by_step, by_element)
        assert_same_bits(by_default, by_element)
        assert by_step.step == 2
        assert info["finite"]


@pytest.mark.parametrize("stage", [0, pytest.param(1, marks=pytest.mark.slow), 3])
def test_finite_gradients_are_never_skipped(stage: int) -> None:
    world.run(skips_agree_on_good_gradients, stage, size=2)


# ---------------------------------------------------------------------------------------------------------
# skip="element"


def skip_elements(stage: int, cases: list[tuple[str, str]]) -> dict[str, Any]:
    """Full parameters and moments before the step, after the step without a fault, and after it for each fault."""
    results = {}
    for name, policy in cases:
        if name == "clip":  # it scales the other elements by a norm that does not count those hit
            continue
        before = state_of(name, stage, policy)
        unfaulted, _ = fz.apply_gradients(before, gradient_of(before, parameters(3)))
        after = {}
        for fault in FAULTS:
            state, info = fz.apply_gradients(before, faulty(before, fault), skip="element")
            assert not info["finite"]
            assert not info["grad_norm"].isfinite()
            assert state.step == 2
            after[fault] = whole(state)
        results[f"{name}, {policy}"] = whole(before), whole(unfaulted), after
    return results


@every_layout
def test_only_the_elements_that_are_hit_stay(size: int, stage: int) -> None:
    for results in world.run(skip_elements, stage, FEW if size == 4 else CASES, size=size):
        for case, (before, unfaulted, after) in results.items():
            for fault, kinds in after.items():
                for kind, leaves in kinds.items():
                    for path, leaf in leaves.items():
                        expected = torch.where(hit(fault)[path], before[kind][path], unfaulted[kind][path])
                        assert same_bits(leaf, expected), f"{case}, {fault}: {kind} of {path}"


# ---------------------------------------------------------------------------------------------------------
# info, and wrong use


def norms() -> list[float]:
    found = []
    for stage in STAGES:
        state = fz.init(parameters(), fz.adamw(1e-3), fz.make_mesh("cpu"), fz.zero(stage), policy="fp32")
        _, info = fz.apply_gradients(state, gradient_of(state, parameters(1 + state.mesh.index("data"))))
        found.append(info["grad_norm"].item())
        assert info["finite"]
        assert info["loss_scale"] == 1
        assert info["lr"] == torch.tensor(1e-3)
    return found


@pytest.mark.parametrize("size", SIZES)
def test_the_norm_is_that_of_the_mean_gradient(size: int) -> None:
    ranks = [torch.cat([leaf.flatten() for leaf in flat(parameters(1 + rank)).values()]) for rank in range(size)]
    expected = torch.stack(ranks).double().mean(0).norm().item()
    for found in world.run(norms, size=size):
        assert found == pytest.approx([expected] * len(STAGES), rel=1e-6)


def test_the_traced_step_skips_alike() -> None:
    def step(state: fz.State, value: Any, skip: Skip) -> Any:
        return fz.apply_gradients(state, gradient_of(state, value), skip)

    bad = parameters(3)
    FAULTS["a NaN"](bad)
    traced = fz.jit(step, donate=0)
    for skip in ("step", "element"):
        state = state_of("adamw", 3, "bf16")
        expected = step(state, bad, skip)
        assert_same_bits(traced(copied(state), bad, skip), expected)


@pytest.mark.parametrize("grads", [None, {"w": torch.ones(3)}, torch.ones(3), 1.0])
def test_gradients_have_to_be_a_states(grads: Any) -> None:
    with pytest.raises(TypeError, match=r"fz\.apply_gradients: expected the gradients of a State"):
        fz.apply_gradients(state_of("adamw", 3, "fp32"), grads)


def test_gradients_of_other_parameters_name_what_differs() -> None:
    state = state_of("adamw", 3, "fp32")
    other = fz.init({**parameters(), "head": torch.ones(71)}, fz.adamw(1.0), fz.make_mesh("cpu"), policy="fp32")
    grads = gradient_of(other, fz.gather(other.params))
    with pytest.raises(fz.TreeError, match=r"head: expected shape \(70,\), got shape \(71,\)"):
        fz.apply_gradients(state, grads)


def pass_gradients_of_another_layout() -> None:
    grads = gradient_of(state_of("adamw", 0, "fp32"), parameters(3))
    fz.apply_gradients(state_of("adamw", 3, "fp32"), grads)


def test_gradients_of_another_layout_are_refused() -> None:
    message = r"the gradient of leaf 'block.weight' is cut over \(\), and its moments over \('data',\)"
    world.raises(fz.LayoutError, pass_gradients_of_another_layout, size=2, match=message)


def test_skip_is_step_or_element() -> None:
    state = state_of("adamw", 3, "fp32")
    with pytest.raises(ValueError, match="expected 'step', 'element' or None"):
        fz.apply_gradients(state, gradient_of(state, parameters(3)), skip="never")  # type: ignore[arg-type]
