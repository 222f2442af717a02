"""The pass `bucket`: a block's collectives in one call, in parameter order, within a limit, without a cycle."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx

import fzero as fz
from fzero._torch import c10d
from fzero.marks import marks_of
from fzero.program.graph.collectives import GATHERS, ISSUES
from fzero.program.graph.trace import Trace
from fzero.program.graph.values import nbytes
from fzero.program.options import Options
from fzero.program.passes.bucket import _PACKED, bucket
from fzero.program.pipeline import applied
from tests import world
from tests.programs import DEPTH, after, gathers, misplaced, nodes, raw, simulated, text, tokens, training
from tests.small import assert_same_bits

LIMIT = 128 * 2**20
GATHERS_TOGETHER = c10d.all_gather_into_tensor_coalesced.default
SCATTERS = {c10d.reduce_scatter_tensor.default, c10d.reduce_scatter_tensor_coalesced.default}


@functools.cache
def unbucketed(microbatches: int = 1) -> Trace:
    """A step before the pass, which does not change it."""
    state, step = training(simulated(2), 3, policy="bf16", microbatches=microbatches)
    return after("recompute", raw(step, state, tokens()), Options())


def bucketed(trace: Trace, limit: int = LIMIT) -> Trace:
    return applied(bucket, trace, Options(bucket=limit))


def calls(trace: Trace, role: str, kinds: Collection[Any] = ISSUES) -> Counter[tuple[str, str]]:
    """How many calls of collectives there are for each block and phase."""
    found = [marks_of(n) for n in nodes(trace) if n.target in kinds]
    marks = [m for m in found if m.role == role]
    return Counter((_block(str(m.leaf).split(", ")[0]), m.phase or "forward") for m in marks)


def _block(leaf: str) -> str:
    return ".".join(leaf.split(".")[:2]) if leaf.startswith("blocks") else leaf.split(".")[0]


BLOCKS = [f"blocks.{i}" for i in range(DEPTH)]


@pytest.mark.parametrize("microbatches", [1, 2])
def test_one_call_for_each_block_and_direction(microbatches: int) -> None:
    trace = unbucketed(microbatches)
    found = bucketed(trace)
    once = {(block, phase): 1 for block in BLOCKS for phase in ("forward", "backward")}
    # The head is tied to the embedding: the second gather of that leaf is for the head's forward.
    assert calls(found, "gather") == once | {("embed", "forward"): 2}
    assert calls(found, "reduce", SCATTERS) == {(block, "backward"): 1 for block in [*BLOCKS, "embed"]}
    # Gradients of leaves that are too small to cut are gathered, and added everywhere.
    assert calls(found, "reduce", GATHERS) == {(block, "backward"): 1 for block in BLOCKS}
    assert sum(calls(trace, "gather").values()) > sum(calls(found, "gather").values())
    assert gathers(found) == gathers(trace), "each leaf as often as before"


def test_a_second_gather_does_not_join_the_first() -> None:
    for node in nodes(bucketed(unbucketed())):
        if node.target in GATHERS and marks_of(node).role == "gather":
            leaves = str(marks_of(node).leaf).split(", ")
            assert len(set(leaves)) == len(leaves)


def test_leaves_of_a_call_stand_in_the_order_of_the_parameters() -> None:
    state, _ = training(simulated(2), 3)
    place = {path: i for i, path in enumerate(state.params.paths)}
    trace = bucketed(unbucketed())
    together = [marks_of(n) for n in nodes(trace) if n.target in ISSUES and ", " in str(marks_of(n).leaf)]
    assert together
    for marks in together:
        if marks.role == "reduce" or marks.phase is None:
            places = [place[leaf] for leaf in str(marks.leaf).split(", ")]
            assert places == sorted(places)


@pytest.mark.parametrize("limit", [0, 79, 80, 500, 1000, 10**6])
def test_no_call_carries_more_than_the_limit(limit: int) -> None:
    trace = unbucketed()
    found = bucketed(trace, limit)
    alone = Counter(_moved(n) for n in nodes(trace) if n.target in ISSUES)
    count = 0
    for node in nodes(found):
        if node.target in ISSUES:
            count += 1
            many = isinstance(node.args[0], list | tuple) and len(node.args[0]) > 1
            assert _moved(node) <= limit if many else alone[_moved(node)] > 0
    assert count <= alone.total()
    assert (count == alone.total()) == (limit < 80), "the smallest two that may share a call have 40 bytes each"


def _moved(issue: fx.Node) -> int:
    """The larger of what a collective is given and what it returns."""
    inputs = issue.args[0] if isinstance(issue.args[0], list | tuple) else [issue.args[0]]
    given = sum(nbytes(x.meta["val"]) for x in inputs)  # type: ignore[union-attr,misc]
    value = issue.meta["val"]
    return max(given, sum(map(nbytes, value)) if isinstance(value, list | tuple) else nbytes(value))


def test_different_dtypes_axes_and_blocks_stay_apart() -> None:
    mesh = fz.make_mesh("cpu", node=2, data=2, simulate=True)
    params = {"layers": {str(i): {"a": torch.zeros(64), "b": torch.zeros(96)} for i in range(2)}}
    state = fz.init(params, fz.adamw(1e-2), mesh, fz.zero(3, axis=("node", "data")), policy="bf16")

    def loss(p: Any, x: Tensor) -> Tensor:
        return sum(w.float().exp().sum() for w in fz.tree.leaves(p)) * x.sum()

    trace = bucketed(after("recompute", raw(fz.train_step(loss), state, torch.zeros(1)), Options()))
    found = [marks_of(n) for n in nodes(trace) if n.target in ISSUES and marks_of(n).role == "gather"]
    assert Counter((m.axis, m.leaf) for m in found) == {
        (axis, f"layers.{i}.a, layers.{i}.b"): 1 for axis in ("node", "data") for i in range(2)
    }


# ---------------------------------------------------------------------------------------------------------
# No cycle


def inner_step(state: fz.State, x: Tensor, y: Tensor) -> Any:
    """A gradient whose result is gathered again for another: no reduction may wait for what depends on it."""

    def loss(p: Any, batch: Tensor) -> Tensor:
        for layer in p["layers"].values():
            batch = torch.tanh(batch @ layer["w"] + layer["b"])
        return batch.square().mean()

    inner = fz.grad(loss)(state, x)
    moved = state.params.replace(
        pieces=tuple(p - 0.1 * g for p, g in zip(state.params.pieces, inner.pieces, strict=True))
    )
    outer = fz.grad(loss)(moved, y)
    third = state.params.replace(pieces=tuple(p - 0.1 * g for p, g in zip(moved.pieces, outer.pieces, strict=True)))
    return inner, outer, fz.grad(loss)(third, x + y)


def meta_state(mesh: fz.Mesh) -> fz.State:
    torch.manual_seed(0)
    layers = {str(i): {"w": torch.randn(12, 12), "b": torch.randn(64, 12)} for i in range(2)}
    return fz.init({"layers": layers}, fz.adamw(1e-2), mesh, fz.zero(3), policy="fp32")


def meta_inputs(rank: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(64, 12, generator=generator), torch.randn(64, 12, generator=generator)


def test_a_gradient_of_an_update_makes_no_cycle() -> None:
    trace = after("recompute", raw(fz.jit(inner_step), meta_state(simulated(2)), *meta_inputs()), Options())
    found = bucketed(trace)
    assert not list(misplaced(found))
    reductions = calls(found, "reduce")
    # All of one block would fit in one call; but three gradients follow each other.
    assert reductions == {("layers", "backward"): 2 * 3}
    assert len([n for n in nodes(trace) if n.target in SCATTERS]) == 4 * 3
    for limit in (2000, 4000, 10_000):
        assert not list(misplaced(bucketed(trace, limit)))


def meta_steps(sizes: Sequence[int]) -> None:
    mesh = fz.make_mesh("cpu")
    state, inputs = meta_state(mesh), meta_inputs(mesh.index("data"))
    expected = inner_step(state, *inputs)
    for limit in sizes:
        assert_same_bits(fz.jit(inner_step, bucket=limit)(state, *inputs), expected)


@pytest.mark.parametrize(
    ("size", "limits"),
    [
        (2, [LIMIT]),
        pytest.param(2, [1500, 3000], marks=pytest.mark.slow),
        pytest.param(4, [LIMIT], marks=pytest.mark.slow),
    ],
)
def test_a_gradient_of_an_update_has_the_bits_of_the_eager_one(size: int, limits: list[int]) -> None:
    world.run(meta_steps, limits, size=size)


# ---------------------------------------------------------------------------------------------------------
# Memory that is overwritten


def written_between(state: fz.Sharded, x: Tensor) -> Any:
    """Two leaves of a block; the piece of one is overwritten between their gathers."""
    first = fz.call(lambda p: p["layers"]["0"]["a"].exp() * x, state)
    state.pieces[1].mul_(2.0)  # type: ignore[union-attr]
    return first, fz.call(lambda p: p["layers"]["0"]["b"] + first, state)


def test_a_gather_of_what_is_overwritten_stays_alone() -> None:
    layers = {"layers": {"0": {"a": torch.zeros(64), "b": torch.zeros(64)}}}
    pieces = fz.shard(layers, simulated(2), fz.zero(3))
    trace = bucketed(after("dead", raw(fz.jit(written_between), pieces, torch.zeros(64)), Options()))
    joined = [str(marks_of(n).leaf) for n in nodes(trace) if n.target is GATHERS_TOGETHER]
    assert all("b" not in leaf for leaf in joined)
    assert not list(misplaced(trace))


def of_two(first: fz.Sharded, second: fz.Sharded, x: Any) -> Any:
    def loss(p: Any, q: Any) -> Any:
        one, other = p["layers"]["0"], q["layers"]["0"]
        return (one["a"] * other["a"] * x + (one["b"] * other["b"]).exp()).sum()

    _, pull = fz.vjp(loss, first, second)
    return pull(torch.ones(()))


@pytest.mark.parametrize("copied", [False, True])
def test_trees_with_equal_paths_and_shapes_share_no_call(copied: bool) -> None:
    layers = {"layers": {"0": {"a": torch.zeros(64), "b": torch.ones(64)}}}
    first, second = (fz.shard(layers, simulated(2), fz.zero(3)) for _ in range(2))
    assert first.placement == second.placement
    args: tuple[Any, ...] = (first, second, torch.zeros(64))
    f: Any = of_two
    if copied:  # made in the program
        f, args = (lambda first, x: of_two(first, fz.tree.map(torch.clone, first), x)), (first, torch.zeros(64))
    trace = after("dead", raw(fz.jit(f), *args), Options())
    found = bucketed(trace)
    joined = Counter(marks_of(n).leaf for n in nodes(found) if n.target in ISSUES)
    assert set(joined) == {"layers.0.a, layers.0.b"}, "a block of a tree goes together, and no leaf of another with it"
    assert sum(joined.values()) * 2 == sum(n.target in ISSUES for n in nodes(trace))


def write_between_gathers() -> None:
    mesh = fz.make_mesh("cpu")
    layers = {"layers": {"0": {"a": torch.linspace(0, 1, 64), "b": torch.linspace(1, 2, 64)}}}
    mine, theirs = (fz.shard(layers, mesh, fz.zero(3)) for _ in range(2))
    x = torch.linspace(2, 3, 64)
    assert_same_bits(fz.jit(written_between)(mine, x), written_between(theirs, x))
    assert_same_bits(mine, theirs)


def test_a_write_between_two_gathers_is_seen_by_the_second() -> None:
    world.run(write_between_gathers, size=2)


# ---------------------------------------------------------------------------------------------------------
# On gloo a reduction is an exchange and a sum


def exchanges() -> tuple[dict[Any, int], dict[Any, int], list[list[int]]]:
    mesh = fz.make_mesh("cpu")
    state, step = training(mesh, 3, policy="bf16")
    trace = after("recompute", raw(step, state, tokens()), Options())
    found = bucketed(trace)
    values = [n for n in nodes(found) if n.target is c10d.all_to_all_single.default]
    assert all(str(n.target).startswith("aten.cat") for v in values for n in v.all_input_nodes if _together(v))
    assert not list(misplaced(found))
    shapes = [list(v.meta["val"].shape) for v in values]
    kinds = {c10d.all_to_all_single.default}
    return dict(calls(found, "reduce", kinds)), dict(calls(trace, "reduce", kinds)), shapes


def _together(node: fx.Node) -> bool:
    return ", " in str(marks_of(node).leaf)


def test_on_gloo_exchanges_are_packed() -> None:
    for found, before, shapes in world.run(exchanges, size=2):
        assert found == {(block, "backward"): 1 for block in [*BLOCKS, "embed"]}
        assert sum(before.values()) > len(found)
        # Two rows, one for each rank: the pieces of `up` and of `down`, side by side.
        assert [2, 115 + 115] in shapes


def large_exchange() -> int:
    rows = _PACKED // 4 // 8
    params = {"layers": {"0": {"a": torch.zeros(rows, 8), "b": torch.zeros(rows + 1, 8), "c": torch.zeros(rows, 4)}}}
    state = fz.init(params, fz.adamw(1e-2), fz.make_mesh("cpu"), fz.zero(3), policy="fp32")

    def loss(p: Any, x: Tensor) -> Tensor:
        return sum(w.exp().sum() for w in fz.tree.leaves(p)) * x.sum()

    trace = bucketed(after("recompute", raw(fz.train_step(loss), state, torch.zeros(1)), Options()))
    return sum(n.target is c10d.all_to_all_single.default for n in nodes(trace))


def test_what_is_large_is_not_packed() -> None:
    assert world.run(large_exchange, size=2) == [2, 2]


def same_bits_with_and_without(stage: int, policy: str, limits: Sequence[int]) -> None:
    mesh = fz.make_mesh("cpu")
    results = []
    for limit in limits:
        state, step = training(mesh, stage, policy=policy, clip=True, bucket=limit)
        for number in range(2):
            state, metrics = step(state, tokens(mesh.index("data"), number))
        results.append((state, metrics))
    for other in results[1:]:
        assert_same_bits(other, results[0])


@pytest.mark.parametrize(
    ("size", "stage", "policy", "limits"),
    [
        (2, 3, "bf16", (0, 700)),
        (2, 0, "fp32", (0, LIMIT)),
        pytest.param(2, 3, "bf16", (0, LIMIT), marks=pytest.mark.slow),
        pytest.param(4, 3, "mixed", (0, 700, LIMIT), marks=pytest.mark.slow),
        pytest.param(4, 1, "bf16", (0, 700, LIMIT), marks=pytest.mark.slow),
    ],
)
def test_buckets_change_no_bit_on_gloo(size: int, stage: int, policy: str, limits: Sequence[int]) -> None:
    world.run(same_bits_with_and_without, stage, policy, limits, size=size)


# ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("microbatches", [1, 2])
def test_the_pass_is_pure_and_deterministic(microbatches: int) -> None:
    trace = unbucketed(microbatches)
    before = text(trace)
    once, again = bucketed(trace), bucketed(trace)
    assert text(trace) == before
    assert text(once) == text(again)
    assert not list(misplaced(once))
    assert text(bucketed(trace, 0)) == before
    assert all("val" in made.meta for made in nodes(once)), "reports read what a node returns"
