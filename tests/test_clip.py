"""Clips: each is the formula it says, in every layout; what its updates wait for; what it does to a bad gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fzero as fz
from fzero.optim.norm import measure_leaf
from fzero.optim.transforms import GradientTransform
from tests import world
from tests.pairwise import pairwise
from tests.small import assert_same_bits, copied, described, flat, gradient_of, parameters, piece, same_bits

SIZES = (1, 2, 4)
STAGES = (0, 1, 3)
CLIPS: dict[str, Callable[[float], GradientTransform]] = {
    "global": fz.clip_by_global_norm,
    "leaf": fz.clip_by_leaf_norm,
    "last": fz.clip_by_last_norm,
}
every_clip = pytest.mark.parametrize("clip", CLIPS)


def state_of(optimizer: fz.Optimizer, stage: int = 3, policy: str = "fp32", mesh: fz.Mesh | None = None) -> fz.State:
    return fz.init(parameters(), optimizer, mesh or fz.make_mesh("cpu"), fz.zero(stage), policy=policy)


def clipping(clip: str, limit: float = 1.0) -> fz.Optimizer:
    return fz.chain(CLIPS[clip](limit), fz.sgd(1.0))


def of_rank(rank: int, step: int = 0) -> Any:
    """The gradient of one rank in a step, twice the size in odd steps; the true gradient is the mean over the ranks."""
    return fz.tree.map(lambda x: x * (1 + step % 2), parameters(seed=10 + rank + 10 * step))


def norm_of(leaves: dict[str, Tensor]) -> Tensor:
    return torch.cat([leaf.double().flatten() for leaf in leaves.values()]).norm()


# ---------------------------------------------------------------------------------------------------------
# What all clips have in common


def by_formula(clip: str, limit: float, gradients: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """What each step subtracts, in float64."""
    clipped, last = [], None
    for gradient in gradients:
        norm = norm_of(gradient)
        ceilings = {
            "global": dict.fromkeys(gradient, norm),
            "leaf": {path: leaf.norm() for path, leaf in gradient.items()},
            "last": dict.fromkeys(gradient, last),
        }[clip]
        shrink = {path: 1.0 if at is None else min(1.0, limit / at.item()) for path, at in ceilings.items()}
        clipped.append({path: shrink[path] * leaf for path, leaf in gradient.items()})
        last = norm
    return clipped


def steps(clip: str, limit: float, stage: int, microbatches: int) -> list[dict[str, Tensor]]:
    """Full parameters after each of three steps, every rank with gradients of its own."""
    state, found = state_of(clipping(clip, limit), stage), []
    gradient = fz.value_and_grad(lambda params, rows: dot_rows(params, rows))
    total = gradient if microbatches == 1 else fz.accumulate(gradient, microbatches)
    for step in range(3):
        rows = fz.tree.map(lambda x: torch.stack([x, 3 * x]), of_rank(state.mesh.index("data"), step))
        state, _ = fz.apply_gradients(state, total(state, rows)[1])
        found.append(flat(fz.gather(state.params)))
    return found


def dot_rows(params: Any, rows: Any) -> Tensor:
    """The function whose gradient is the mean of the rows of each leaf."""
    pairs = zip(fz.tree.leaves(params), fz.tree.leaves(rows), strict=True)
    return torch.stack([(p * row.mean(0)).sum() for p, row in pairs]).sum()


@pytest.mark.parametrize(("size", "clip", "stage", "microbatches"), pairwise(SIZES, CLIPS, STAGES, (1, 2)))
def test_steps_are_those_of_the_formula(clip: str, size: int, stage: int, microbatches: int) -> None:
    means = []
    for step in range(3):
        ranks = [flat(of_rank(rank, step)) for rank in range(size)]
        means.append({path: 2 * torch.stack([r[path].double() for r in ranks]).mean(0) for path in ranks[0]})
    limit = 5.0  # below the norm of the whole, and of the larger leaves alone
    expected = {path: leaf.double() for path, leaf in flat(parameters()).items()}
    moved = by_formula(clip, limit, means)
    for results in world.run(steps, clip, limit, stage, microbatches, size=size):
        params = expected
        for found, change in zip(results, moved, strict=True):
            params = {path: leaf - change[path] for path, leaf in params.items()}
            for path, leaf in params.items():
                # A few roundings of float32 in numbers up to 10.
                torch.testing.assert_close(found[path].double(), leaf, rtol=2e-6, atol=1e-5, msg=f"{path} differs")


def same_gradients(clip: str, policy: str) -> list[Any]:
    """The state after two steps at each stage, all ranks with the same gradients."""
    found = []
    for stage in STAGES:
        state = state_of(fz.chain(CLIPS[clip](1.0), fz.adamw(1e-2)), stage, policy)
        for step in range(2):
            state, _ = fz.apply_gradients(state, gradient_of(state, of_rank(0, step)))
        found.append({"params": fz.gather(state.params), "moments": fz.gather(state.moments)})
    return found


@pytest.mark.parametrize(("size", "clip", "policy"), pairwise((2, 4), CLIPS, ("mixed", "bf16")))
def test_the_layout_does_not_show_in_the_bits(clip: str, size: int, policy: str) -> None:
    for stages in world.run(same_gradients, clip, policy, size=size):
        for found in stages[1:]:
            assert_same_bits(found, stages[0])


@every_clip
def test_within_the_limit_nothing_changes(clip: str) -> None:
    for policy in ("fp32", "bf16"):
        clipped, plain = (state_of(opt, policy=policy) for opt in (clipping(clip, 1e3), fz.sgd(1.0)))
        for step in range(2):
            clipped, plain = (fz.apply_gradients(s, gradient_of(s, of_rank(0, step)))[0] for s in (clipped, plain))
        assert_same_bits(clipped.params, plain.params)


def step_with_a_fault(clip: str, stage: int, fault: float, skip: Any) -> dict[str, Any]:
    """Two good steps around one in which an element of the last rank's gradient is not finite."""
    state = state_of(clipping(clip), stage)
    found: dict[str, Any] = {}
    for step, name in enumerate(("good", "bad", "next")):
        value = of_rank(0, step)
        if name == "bad" and state.mesh.index("data") == state.mesh.size("data") - 1:
            value["head"][3] = fault
        state, info = fz.apply_gradients(state, gradient_of(state, value), skip=skip)
        assert info["finite"] == info["grad_norm"].isfinite() == (name != "bad")
        found[name] = {"params": fz.gather(state.params), "moments": fz.gather(state.moments)}
    return found


@pytest.mark.parametrize(
    ("size", "clip", "stage", "fault"), pairwise(SIZES, CLIPS, STAGES, (float("nan"), float("inf")))
)
def test_an_element_that_is_not_finite_does_not_count_and_the_rest_is_clipped(
    clip: str, size: int, stage: int, fault: float
) -> None:
    gradients = [{path: leaf.double() for path, leaf in flat(of_rank(0, step)).items()} for step in range(3)]
    gradients[1]["head"][3] = 0.0
    moved = by_formula(clip, 1.0, gradients)
    for found in world.run(step_with_a_fault, clip, stage, fault, "element", size=size):
        params = {path: leaf.double() for path, leaf in flat(parameters()).items()}
        for state, change in zip(found.values(), moved, strict=True):
            params = {path: leaf - change[path] for path, leaf in params.items()}
            for path, leaf in params.items():
                torch.testing.assert_close(flat(state["params"])[path].double(), leaf, rtol=2e-6, atol=1e-5)
        assert flat(found["bad"]["params"])["head"][3] == flat(found["good"]["params"])["head"][3]


@pytest.mark.parametrize(("size", "clip", "stage"), pairwise(SIZES, CLIPS, STAGES))
def test_a_skipped_step_changes_nothing_and_the_next_is_clipped_as_ever(clip: str, size: int, stage: int) -> None:
    for found in world.run(step_with_a_fault, clip, stage, float("nan"), "step", size=size):
        assert_same_bits(found["bad"], found["good"])
        moved = [flat(found["next"]["params"])[path] - p for path, p in flat(found["bad"]["params"]).items()]
        assert all(m.isfinite().all() and m.any() for m in moved)


@every_clip
def test_frozen_leaves_and_groups(clip: str) -> None:
    def label(path: str) -> str:
        return "frozen" if path == "head" else "trained"

    def step(optimizer: fz.Optimizer) -> fz.State:
        state = state_of(optimizer)
        for i in range(2):
            state, _ = fz.apply_gradients(state, gradient_of(state, of_rank(0, i)))
        return state

    around = step(fz.chain(CLIPS[clip](1.0), fz.partition_by(label, {"trained": fz.sgd(1.0), "frozen": None})))
    inside = step(fz.partition_by(label, {"trained": clipping(clip), "frozen": None}))
    assert_same_bits(around.params, inside.params)
    gradients = [{path: leaf.double() for path, leaf in flat(of_rank(0, i)).items()} for i in range(2)]
    for gradient in gradients:
        del gradient["head"]
    first, second = by_formula(clip, 1.0, gradients)
    for path, before in flat(parameters()).items():
        after = piece(around.params, path).reshape(before.shape)
        if path == "head":
            assert same_bits(after, before)
        else:
            torch.testing.assert_close(after.double(), before - first[path] - second[path], rtol=2e-6, atol=1e-5)


@pytest.mark.parametrize(
    ("clip", "policy"),
    [
        pytest.param(clip, policy, marks=() if policy == ("fp32" if clip == "leaf" else "bf16") else pytest.mark.slow)
        for clip in CLIPS
        for policy in ("fp32", "bf16")
    ],
)
def test_a_donated_step_equals_an_eager_one(clip: str, policy: str) -> None:
    def step(state: fz.State, value: Any) -> Any:
        return fz.apply_gradients(state, gradient_of(state, value))

    optimizer = fz.chain(CLIPS[clip](1.0), fz.adamw(1e-2))
    jitted = fz.jit(step, donate=(0,))
    eager, traced = state_of(optimizer, policy=policy), state_of(optimizer, policy=policy)
    for i in range(3):
        given = traced
        (eager, info), (traced, traced_info) = step(eager, of_rank(0, i)), jitted(traced, of_rank(0, i))
        assert_same_bits((eager, info), (traced, traced_info))
        for leaf in fz.tree.leaves(given.moments):
            with pytest.raises(fz.DonatedError):
                leaf.sum()
    assert len(jitted.programs) == 1


@every_clip
def test_an_abstract_state_has_the_layout_of_a_real_one_and_traces(clip: str) -> None:
    def step(state: fz.State, value: Any) -> Any:
        return fz.apply_gradients(state, gradient_of(state, value))[0]

    optimizer = fz.chain(CLIPS[clip](1.0), fz.adamw(1e-2))
    simulated = fz.make_mesh("cpu", data=1, simulate=True)
    abstract = state_of(optimizer, policy="bf16", mesh=simulated)
    assert all(leaf.is_meta for leaf in fz.tree.leaves(abstract))
    assert described(abstract) == described(state_of(optimizer, policy="bf16"))
    fz.trace(step)(abstract, parameters(1))


# The leaves whose gradients the update of a leaf waits for: all, or its own.
WAITS = {"global": True, "leaf": False, "last": False, "none": False}


@pytest.mark.parametrize("stage", [0, pytest.param(1, marks=pytest.mark.slow), 3])
@pytest.mark.parametrize(("clip", "waits"), WAITS.items())
def test_what_an_update_waits_for(clip: str, waits: bool, stage: int) -> None:
    def step(state: fz.State, grads: fz.Sharded) -> Any:
        return fz.apply_gradients(state, grads, skip="element")

    optimizer = fz.adamw(1e-2) if clip == "none" else fz.chain(CLIPS[clip](1.0), fz.adamw(1e-2))
    state = state_of(optimizer, stage, mesh=fz.make_mesh("cpu", data=2, simulate=True))
    adam = state.moments if clip == "none" else state.moments[-1]
    grads = adam.m.replace(pieces=fz.tree.map(torch.empty_like, adam.m.pieces))  # gradients are cut as the moments are
    graph = fz.trace(step)(state, grads).trace.module.graph
    gradients = [node for node in graph.nodes if node.op == "placeholder"][-4:]  # the second argument comes last
    updates = [node for node in graph.nodes if node.target is torch.ops.fzero.adamw.default]
    assert len(updates) == 4
    for own, update in zip(gradients, updates, strict=True):
        above, todo = set(), [update]
        while todo:
            node = todo.pop()
            if node not in above:
                above.add(node)
                todo += node.all_input_nodes
                todo += [user for user in node.users if user.target is torch.ops.aten.add_.Tensor]  # written in place
        assert above.intersection(gradients) == (set(gradients) if waits else {own})


CALLS = {
    "global": "fz.clip_by_global_norm",
    "leaf": "fz.clip_by_leaf_norm",
    "last": "fz.clip_by_last_norm",
}


@pytest.mark.parametrize("limit", [0.0, -1.0, float("nan")])
@every_clip
def test_a_limit_has_to_be_above_zero(clip: str, limit: float) -> None:
    with pytest.raises(ValueError, match=rf"{CALLS[clip]}: limit: expected a number above 0, got {limit}"):
        CLIPS[clip](limit)


@pytest.mark.parametrize("clip", ["global", "last"])
def test_a_factor_that_is_there_is_multiplied_and_no_leaf_is_touched(clip: str) -> None:
    state = state_of(fz.sgd(1.0))
    grads = gradient_of(state, of_rank(0))
    kept = copied(grads)
    transform = CLIPS[clip](1.0)
    given = fz.optim.clip.LastNorm(torch.tensor(10.0)) if clip == "last" else ()
    once, twice = (transform.update(grads.replace(factor=torch.tensor(f)), given, state.params)[0] for f in (1.0, 2.0))
    for clipped in (once, twice):
        assert all(a is b for a, b in zip(clipped.pieces, grads.pieces, strict=True))
    assert_same_bits(grads, kept)
    ratio = 1.0 if clip == "global" else 2.0  # the global norm is that of the doubled gradient
    torch.testing.assert_close(twice.multiplier, ratio * once.multiplier)


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


# ---------------------------------------------------------------------------------------------------------
# clip_by_leaf_norm


@pytest.mark.parametrize("policy", ["fp32", "bf16"])
def test_a_leaf_is_multiplied_in_fp32_and_rounded_once(policy: str) -> None:
    state = state_of(fz.sgd(1.0), policy=policy)
    grads = gradient_of(state, of_rank(0)).replace(factor=torch.tensor(0.5))
    kept = copied(grads)
    clipped, _ = fz.clip_by_leaf_norm(1.0).update(grads, (), state.params)
    assert_same_bits(grads, kept)
    assert clipped.factor is grads.factor
    for i, path in enumerate(grads.paths):
        leaf, norm = piece(grads, path), measure_leaf(grads, i).norm(torch.tensor(0.5))
        torch.testing.assert_close(norm, (leaf.double().norm() * 0.5).float())
        expected = (leaf.float() * (1.0 / (norm + 1e-6)).clamp(max=1.0)).to(leaf.dtype)
        assert same_bits(piece(clipped, path), expected)
        assert (norm > 1) == (not same_bits(expected, leaf))


# ---------------------------------------------------------------------------------------------------------
# clip_by_last_norm


def kept_norm(state: fz.State) -> Tensor:
    return state.moments[0].norm


def test_the_norm_that_is_kept_is_the_one_that_the_step_reports() -> None:
    state = state_of(clipping("last"))
    assert kept_norm(state) == 0
    assert (kept_norm(state).dtype, kept_norm(state).shape) == (torch.float32, ())
    for step in range(3):
        state, info = fz.apply_gradients(state, gradient_of(state, of_rank(0, step)))
        assert kept_norm(state) == info["grad_norm"]


@pytest.mark.parametrize("limit", [1e-9, 1.0])
def test_the_first_step_and_the_step_after_a_gradient_of_zeros_are_not_clipped(limit: float) -> None:
    state, value = state_of(clipping("last", limit)), of_rank(0)
    for zeros in (False, True):
        if zeros:
            state, _ = fz.apply_gradients(state, gradient_of(state, fz.tree.map(torch.zeros_like, value)))
            assert kept_norm(state) == 0
        before = state.params
        state, _ = fz.apply_gradients(state, gradient_of(state, value))
        for path, leaf in flat(value).items():
            torch.testing.assert_close(piece(before, path) - piece(state.params, path), leaf.reshape(-1))


def test_a_norm_past_the_largest_float32_is_not_kept() -> None:
    state = state_of(clipping("last"))
    state, _ = fz.apply_gradients(state, gradient_of(state, of_rank(0)))
    norm = kept_norm(state)
    state, _ = fz.apply_gradients(state, gradient_of(state, fz.tree.map(lambda x: x * 1e30, of_rank(0))))
    assert kept_norm(state) == norm
