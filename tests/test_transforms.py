"""Optimizers made of others: `chain`, `partition_by`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fzero as fz
from fzero.optim.transforms import GradientTransform
from tests.small import assert_same_bits, flat, gradient_of, parameters, piece, same_bits


def state_of(optimizer: fz.Optimizer, stage: int = 3, policy: str = "fp32") -> fz.State:
    return fz.init(parameters(), optimizer, fz.make_mesh("cpu"), fz.zero(stage), policy=policy)


VALUE = parameters(seed=10)  # the gradient


# ---------------------------------------------------------------------------------------------------------
# chain


class Count(GradientTransform):
    """Doubles gradients, and counts its calls in its state."""

    def init(self, params: fz.Sharded) -> Tensor:
        return torch.zeros((), dtype=torch.int32)

    def update(self, grads: fz.Sharded, state: Tensor, params: fz.Sharded) -> tuple[fz.Sharded, Tensor]:
        assert grads.factor is not None
        return grads.replace(factor=grads.factor * 2), state + 1


def test_transforms_run_in_order_and_keep_their_state() -> None:
    value = VALUE
    clipped_then_doubled = state_of(fz.chain(fz.clip_by_global_norm(1.0), Count(), fz.sgd(1.0)))
    doubled_then_clipped = state_of(fz.chain(Count(), fz.clip_by_global_norm(1.0), fz.sgd(1.0)))
    lengths = []
    for state in (clipped_then_doubled, doubled_then_clipped):
        after, _ = fz.apply_gradients(state, gradient_of(state, value))
        assert [leaf.item() for leaf in fz.tree.leaves(after.moments)] == [1]
        moved = [flat(fz.gather(after.params))[path] - before for path, before in flat(parameters()).items()]
        lengths.append(torch.cat([m.flatten() for m in moved]).norm().item())
    assert lengths == pytest.approx([2.0, 1.0], rel=1e-5)


def test_a_chain_of_nothing_is_its_optimizer() -> None:
    results = []
    for optimizer in (fz.chain(fz.adamw(1e-2)), fz.adamw(1e-2)):
        state = state_of(optimizer)
        results.append(fz.apply_gradients(state, gradient_of(state, VALUE))[0].params)
    assert_same_bits(*results)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "last argument must be an optimizer, got None"),
        ((fz.clip_by_global_norm(1.0),), "last argument must be an optimizer"),
        ((fz.adamw(1e-3), fz.adamw(1e-3)), "argument 0 must be a gradient transform"),
    ],
)
def test_a_chain_is_transforms_and_then_one_optimizer(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        fz.chain(*arguments)


# ---------------------------------------------------------------------------------------------------------
# partition_by


def top(path: str) -> str:
    return path.split(".")[0]


def groups(block: fz.Optimizer | None) -> fz.Optimizer:
    return fz.partition_by(top, {"block": block, "head": fz.sgd(0.5), "scale": fz.adamw(1e-1)})


LABELS = {
    "function": top,
    "tree": {"block": {"bias": "block", "weight": "block"}, "head": "head", "scale": "scale"},
}


@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS.keys())
def test_each_group_moves_by_its_own_optimizer(labels: Any) -> None:
    optimizers: dict[str, fz.Optimizer | None] = {"block": fz.sgd(0.1), "head": fz.lion(0.5), "scale": fz.adamw(1e-1)}
    together = state_of(fz.partition_by(labels, optimizers))
    together, info = fz.apply_gradients(together, gradient_of(together, VALUE))
    for label, optimizer in optimizers.items():
        assert optimizer is not None
        alone = state_of(optimizer)
        alone, alone_info = fz.apply_gradients(alone, gradient_of(alone, VALUE))
        assert torch.equal(info[f"lr/{label}"], alone_info["lr"])
        for path in together.params.paths:
            if top(path) == label:
                assert same_bits(piece(together.params, path), piece(alone.params, path)), path


def test_frozen_leaves_have_no_moments_no_gradient_and_do_not_move() -> None:
    state = state_of(groups(None))
    assert not any("block" in path for path in fz.tree.paths(state.moments))
    grads = gradient_of(state, VALUE)
    assert {path for path, g in zip(grads.paths, grads.pieces, strict=True) if g is None} == {
        "block.bias",
        "block.weight",
    }
    after, _ = fz.apply_gradients(state, grads)
    for path in state.params.paths:
        assert same_bits(piece(after.params, path), piece(state.params, path)) == (top(path) == "block"), path


def test_chains_around_and_inside_groups_freeze_the_same_leaves() -> None:
    inside = fz.partition_by(top, {"block": fz.chain(fz.clip_by_global_norm(1.0), groups(None)), "head": None})
    around = fz.chain(fz.clip_by_global_norm(1.0), groups(None))
    paths = list(flat(parameters()))
    assert around.frozen(paths) == {"block.bias", "block.weight"}
    assert inside.frozen(paths[:3]) == {"block.bias", "block.weight", "head"}


def frozen_step(state: fz.State, value: Any) -> Any:
    return fz.apply_gradients(state, gradient_of(state, value))[0]


@pytest.mark.parametrize("stage", [1, 3])
def test_frozen_leaves_cost_no_reduction(stage: int) -> None:
    mesh = fz.make_mesh("cpu", data=2, simulate=True)

    def reductions(optimizer: fz.Optimizer) -> int:
        state = fz.init(parameters(), optimizer, mesh, fz.zero(stage), policy="fp32")
        graph = fz.trace(frozen_step)(state, parameters(1)).trace.module.graph
        return sum("reduce_scatter_tensor" in str(node.target) for node in graph.nodes)

    cut = ["block.weight", "head"]  # the other leaves are whole on every rank, and gathered to be summed
    all_trained = reductions(groups(fz.sgd(0.1)))
    assert all_trained == len(cut)
    assert reductions(groups(None)) == all_trained - 1


def test_a_leaf_without_an_optimizer_is_named() -> None:
    optimizer = fz.partition_by(top, {"block": fz.sgd(0.1), "scale": None})
    with pytest.raises(ValueError, match=r"fz\.partition_by: leaf 'head' has the label 'head'.*\['block', 'scale'\]"):
        state_of(optimizer)
