"""The norm of a sharded gradient: right, the same in every layout, and measured once a step."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fzero as fz
from fzero.optim.norm import measure, measure_leaf
from tests import world
from tests.small import flat, gradient_of, parameters

SIZES = (1, 2, 4)
STAGES = (0, 1, 3)


def state_of(optimizer: fz.Optimizer, stage: int = 3, policy: str = "fp32", mesh: fz.Mesh | None = None) -> fz.State:
    return fz.init(parameters(), optimizer, mesh or fz.make_mesh("cpu"), fz.zero(stage), policy=policy)


def norms() -> list[list[float]]:
    """The norm of the whole gradient and of each leaf, for each stage; all ranks pass the same gradient."""
    found = []
    for stage in STAGES:
        for policy in ("fp32", "bf16"):
            grads = gradient_of(state_of(fz.sgd(1.0), stage, policy), parameters(1))
            every = [measure(grads), *(measure_leaf(grads, i) for i in range(len(grads.pieces)))]
            assert all(squares.finite(grads.multiplier) for squares in every)
            found.append([squares.norm(grads.multiplier).item() for squares in every])
    return found


def test_norms_are_those_of_the_full_leaves_and_equal_bit_for_bit_in_every_layout() -> None:
    # Sums of four leaves' squares in float64, rounded to float32: their order does not show.
    expected = flat(parameters(1))
    whole = torch.cat([leaf.flatten() for leaf in expected.values()]).double().norm().item()
    (alone,) = world.run(norms, size=1)
    assert alone[0] == pytest.approx([whole, *(leaf.double().norm().item() for leaf in expected.values())], rel=1e-6)
    for size in (2, 4):
        for stages in world.run(norms, size=size):
            for i, found in enumerate(stages):
                # A world sees the pieces that its ranks would hold, so sizes differ in what is added first.
                assert found == pytest.approx(alone[i], rel=1e-6)
                assert found == stages[i % 2], "the layout does not show"


def test_what_was_measured_is_of_the_pieces_whatever_the_factor() -> None:
    grads = gradient_of(state_of(fz.sgd(1.0)), parameters(1))
    squares = measure(grads)
    assert squares.are_of(grads)
    assert squares.are_of(grads.replace(factor=torch.tensor(2.0)))
    assert not squares.are_of(grads.replace(pieces=(None, *grads.pieces[1:])))
    assert not squares.are_of(grads.select(range(4)))
    norm = squares.norm(torch.ones(()))
    assert squares.norm(torch.tensor(2.0)) == 2 * norm
    assert not squares.finite(torch.tensor(torch.nan))


def test_a_leaf_without_a_gradient_does_not_count() -> None:
    grads = gradient_of(state_of(fz.sgd(1.0)), parameters(1))
    without = grads.replace(pieces=(None, *grads.pieces[1:]))
    rest = torch.cat([leaf.flatten() for leaf in list(flat(parameters(1)).values())[1:]])
    assert measure(without).norm(without.multiplier).item() == pytest.approx(rest.norm().item(), rel=1e-6)


class Double(fz.optim.transforms.GradientTransform):
    """Doubles the gradients: by their factor, or leaf by leaf."""

    def __init__(self, leaves: bool) -> None:
        self.leaves = leaves

    def update(self, grads: fz.Sharded, state: Any, params: fz.Sharded) -> tuple[fz.Sharded, Any]:
        if self.leaves:
            return grads.replace(pieces=tuple(None if g is None else 2 * g for g in grads.pieces)), state
        return grads.replace(factor=grads.multiplier * 2), state


CLIP, LEAF, LAST = fz.clip_by_global_norm(1.0), fz.clip_by_leaf_norm(1.0), fz.clip_by_last_norm(1.0)
# Optimizer, and how many times a leaf is measured on the way.
MEASURED: dict[str, tuple[fz.Optimizer, int]] = {
    "no clip": (fz.adamw(1e-2), 1),
    "global": (fz.chain(CLIP, fz.adamw(1e-2)), 1),
    "last": (fz.chain(LAST, fz.adamw(1e-2)), 1),
    "leaf": (fz.chain(LEAF, fz.adamw(1e-2)), 2),
    "twice": (fz.chain(CLIP, Double(leaves=False), LAST, fz.adamw(1e-2)), 1),
    "chain in chain": (fz.chain(CLIP, fz.chain(LAST, fz.adamw(1e-2))), 1),
    "after other leaves": (fz.chain(CLIP, Double(leaves=True), CLIP, fz.adamw(1e-2)), 2),
    "around groups": (fz.chain(CLIP, fz.partition_by(lambda path: "all", {"all": fz.adamw(1e-2)})), 1),
    "inside a group": (fz.partition_by(lambda path: "all", {"all": fz.chain(CLIP, fz.adamw(1e-2))}), 2),
}


# A trace costs half a second: fast is each optimizer when bad steps are skipped, and three when elements are.
@pytest.mark.parametrize(
    ("optimizer", "times", "skip"),
    [
        pytest.param(*row, skip, id=f"{name}-{skip}", marks=() if quick else pytest.mark.slow)
        for name, row in MEASURED.items()
        for skip, quick in (("step", True), ("element", name in ("no clip", "leaf", "around groups")))
    ],
)
def test_a_step_measures_each_leaf_once(optimizer: fz.Optimizer, times: int, skip: Any) -> None:
    def step(state: fz.State, value: Any) -> Any:
        return fz.apply_gradients(state, gradient_of(state, value), skip)

    state = state_of(optimizer, mesh=fz.make_mesh("cpu", data=2, simulate=True))
    nodes = fz.trace(step)(state, parameters(1)).trace.module.graph.nodes
    measured = [node for node in nodes if node.target is torch.ops.fzero.squares.default]
    assert len(measured) == times * len(state.params.paths)


@pytest.mark.parametrize("optimizer", [row[0] for row in MEASURED.values()], ids=MEASURED.keys())
def test_an_update_by_itself_measures_what_a_step_hands_on(optimizer: fz.Optimizer) -> None:
    state = state_of(optimizer)
    grads = gradient_of(state, parameters(1))
    alone = optimizer.update(grads, state.moments, state.params, step=state.step, seed=state.seed)
    stepped, _ = fz.apply_gradients(state, grads)
    for a, b in zip(fz.tree.leaves(alone), fz.tree.leaves((stepped.params, stepped.moments)), strict=True):
        assert torch.equal(a, b)
