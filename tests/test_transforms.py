"""Gradient transforms and optimizers made of others: `clip_by_global_norm`, `chain`, `partition_by`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fzero as fz
from fzero.optim import GradientTransform
from tests import world
from tests.small import assert_same_bits, copied, flat, gradient_of, parameters, piece, same_bits

SIZES = (1, 2, 4)
STAGES = (0, 1, 2, 3)


def state_of(optimizer: fz.Optimizer, stage: int = 3, policy: str = "fp32") -> fz.State:
    return fz.init(parameters(), optimizer, fz.make_mesh("cpu"), fz.zero(stage), policy=policy)


def of_rank(rank: int) -> Any:
    """The gradient of one rank; the true gradient is the mean over the ranks."""
    return parameters(seed=10 + rank)


# ---------------------------------------------------------------------------------------------------------
# clip_by_global_norm


def clipped_by_torch(size: int, limit: float) -> tuple[dict[str, Tensor], float]:
    """The mean gradient of the ranks after `clip_grad_norm_`, and its norm before."""
    total = [flat(of_rank(rank)) for rank in range(size)]
    leaves = {path: torch.zeros_like(leaf).requires_grad_() for path, leaf in total[0].items()}
    for path, leaf in leaves.items():
        leaf.grad = torch.stack([gradient[path] for gradient in total]).mean(0)
    norm = torch.nn.utils.clip_grad_norm_(leaves.values(), limit)
    return {path: leaf.grad for path, leaf in leaves.items() if leaf.grad is not None}, norm.item()


def clip_everywhere(limit: float) -> list[tuple[Any, float]]:
    """The clipped gradient and the reported norm, for each stage."""
    clip, results = fz.clip_by_global_norm(limit), []
    for stage in STAGES:
        state = state_of(fz.sgd(1.0), stage)
        grads = gradient_of(state, of_rank(state.mesh.index("data")))
        kept = copied(grads)
        clipped, _ = clip.update(grads, clip.init(state.params), state.params)
        assert all(a is b for a, b in zip(clipped.pieces, grads.pieces, strict=True)), "no leaf is touched"
        assert_same_bits(grads, kept)
        results.append((flat(fz.gather(clipped)), fz.apply_gradients(state, grads)[1]["grad_norm"].item()))
    return results


@pytest.mark.parametrize("limit", [0.1, 1.0, 1e6])
@pytest.mark.parametrize("size", SIZES)
def test_clipping_is_that_of_torch_on_all_shards_together(size: int, limit: float) -> None:
    expected, norm = clipped_by_torch(size, limit)
    for results in world.run(clip_everywhere, limit, size=size):
        for gradient, reported in results:
            assert reported == pytest.approx(norm, rel=1e-6)
            for path, value in expected.items():
                torch.testing.assert_close(gradient[path], value, rtol=2e-6, atol=1e-8)


def clipped_step_with_a_nan(stage: int) -> Any:
    """Full parameters after a step of SGD in which one element of the last rank's gradient is NaN."""
    state = state_of(fz.chain(fz.clip_by_global_norm(1.0), fz.sgd(1.0)), stage)
    value = of_rank(0)
    if state.mesh.index("data") == state.mesh.size("data") - 1:
        value["head"][3] = torch.nan
    state, info = fz.apply_gradients(state, gradient_of(state, value), skip="element")
    assert not info["finite"]
    assert not info["grad_norm"].isfinite()
    return flat(fz.gather(state.params))


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("size", SIZES)
def test_an_element_that_is_not_finite_does_not_count_and_the_rest_is_clipped(size: int, stage: int) -> None:
    value = of_rank(0)
    value["head"][3] = 0.0
    norm = torch.stack([leaf.double().square().sum() for leaf in flat(value).values()]).sum().sqrt()
    for params in world.run(clipped_step_with_a_nan, stage, size=size):
        for path, before in flat(parameters()).items():
            expected = before - flat(value)[path] / norm.float()
            torch.testing.assert_close(params[path], expected, rtol=2e-6, atol=2e-6)
        assert params["head"][3] == parameters()["head"][3]


def test_clipping_multiplies_a_factor_that_is_there() -> None:
    state = state_of(fz.sgd(1.0))
    grads = gradient_of(state, of_rank(0))
    doubled = grads.replace(factor=torch.tensor(2.0))
    clip = fz.clip_by_global_norm(1.0)
    once, twice = (fz.gather(clip.update(g, (), state.params)[0]) for g in (grads, doubled))
    for path, value in flat(once).items():
        torch.testing.assert_close(flat(twice)[path], value)


@pytest.mark.parametrize("limit", [0.0, -1.0, float("nan")])
def test_a_limit_has_to_be_above_zero(limit: float) -> None:
    with pytest.raises(ValueError, match=r"fz\.clip_by_global_norm: the limit must be above 0"):
        fz.clip_by_global_norm(limit)


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
    value = of_rank(0)
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
        results.append(fz.apply_gradients(state, gradient_of(state, of_rank(0)))[0].params)
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
    together, info = fz.apply_gradients(together, gradient_of(together, of_rank(0)))
    for label, optimizer in optimizers.items():
        assert optimizer is not None
        alone = state_of(optimizer)
        alone, alone_info = fz.apply_gradients(alone, gradient_of(alone, of_rank(0)))
        assert torch.equal(info["lr"][label], alone_info["lr"])
        for path in together.params.paths:
            if top(path) == label:
                assert same_bits(piece(together.params, path), piece(alone.params, path)), path


def test_frozen_leaves_have_no_moments_no_gradient_and_do_not_move() -> None:
    state = state_of(groups(None))
    assert not any("block" in path for path in fz.tree.paths(state.moments))
    grads = gradient_of(state, of_rank(0))
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
