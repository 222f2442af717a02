"""The pass `overlap`: collectives start early and are waited for late, where the peak has room for it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import fzero as fz
from fzero.marks import marks_of
from fzero.program.graph.collectives import ISSUES, WAIT, issue_of
from fzero.program.graph.gathers import from_pieces
from fzero.program.graph.trace import Trace
from fzero.program.options import Options
from fzero.program.passes.overlap import overlap
from fzero.program.pipeline import applied
from fzero.program.report.memory import peak_bytes
from tests import world
from tests.programs import after, misplaced, raw, simulated, text, tokens, training
from tests.small import assert_same_bits
from tests.test_program_trace import targets

WIDTH, DEPTH = 48, 5
BYTES = (None, 0, 2**16, 2**22)


def make_model() -> nn.Module:
    return nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False), nn.Tanh()) for _ in range(DEPTH)))


APPLY, _ = fz.functional(make_model)


@functools.cache
def scheduled(*, stage: int = 3, policy: str = "bf16", ranks: int = 2, clip: bool = False, rows: int = 512) -> Trace:
    """A step whose activations outweigh its weights, so that there is room in most places."""
    optimizer: Any = fz.chain(fz.clip_by_global_norm(1.0), fz.adamw(1e-3)) if clip else fz.adamw(1e-3)
    state = fz.init(make_model, optimizer, simulated(ranks), fz.zero(stage), policy=policy)
    step = fz.train_step(lambda p, x: APPLY(p, x.to(p["0"]["0"]["weight"].dtype)).float().square().mean())
    return after("schedule", raw(step, state, torch.zeros(rows, WIDTH)), Options())


@functools.cache
def scheduled_transformer(microbatches: int) -> Trace:
    state, step = training(simulated(2), 3, microbatches=microbatches)
    return after("schedule", raw(step, state, tokens()), Options())


def overlapped(trace: Trace, most: int | None) -> Trace:
    return applied(overlap, trace, Options(overlap=most))


def order(trace: Trace) -> dict[fx.Node, int]:
    return {node: i for i, node in enumerate(trace.module.graph.nodes)}


def early_gathers(trace: Trace) -> list[fx.Node]:
    """The gathers of stored pieces between whose issue and wait a product is computed."""
    place, cheap = order(trace), from_pieces(trace.module.graph)
    nodes = list(place)
    found = []
    for wait in nodes:
        issue = issue_of(wait) if wait.target is WAIT else None
        if issue is not None and issue in cheap:
            between = nodes[place[issue] + 1 : place[wait]]
            if any("mm" in str(n.target) for n in between):
                found.append(issue)
    return list(dict.fromkeys(found))


def late_waits(trace: Trace) -> int:
    """How many reductions are under way while something else is computed."""
    place, cheap = order(trace), from_pieces(trace.module.graph)
    nodes = list(place)
    count = 0
    for wait in nodes:
        issue = issue_of(wait) if wait.target is WAIT else None
        if issue is not None and issue not in cheap:
            between = nodes[place[issue] + 1 : place[wait]]
            count += any("mm" in str(n.target) for n in between)
    return count


def test_a_gather_starts_before_the_block_before_it_ends() -> None:
    trace = scheduled()
    found = overlapped(trace, 2**22)
    assert early_gathers(trace) == []
    gathers = [n for n in found.module.graph.nodes if n.target in ISSUES and marks_of(n).role == "gather"]
    early = early_gathers(found)
    assert len(early) >= len(gathers) - 2
    place = order(found)
    last = {marks_of(n).block: i for n, i in place.items() if marks_of(n).block is not None and not _backward(n)}
    for gather in early:
        if not _backward(gather):
            block = int(str(marks_of(gather).leaf).split(".")[0])
            assert place[gather] < last[str(block - 1)], "while the block before it runs"


def _backward(node: fx.Node) -> bool:
    return marks_of(node).phase == "backward"


def test_reductions_are_under_way_while_the_backward_goes_on() -> None:
    trace = scheduled()
    assert late_waits(trace) == 0
    assert late_waits(overlapped(trace, 2**22)) >= DEPTH - 2


def test_where_there_is_no_room_nothing_moves_before_its_time() -> None:
    """With nothing but weights in memory, every gather ahead would raise the peak by a weight."""
    state = fz.init(make_model, fz.adamw(1e-3), simulated(2), fz.zero(3), policy="fp32")
    forward = fz.jit(lambda state, x: fz.call(APPLY, state, x))
    trace = after("schedule", raw(forward, state, torch.zeros(1, WIDTH)), Options())
    weight = WIDTH * WIDTH * 4
    for most, ahead in ((0, 0), (weight // 2, 0), (weight, DEPTH - 1), (2**22, DEPTH - 1)):
        found = overlapped(trace, most)
        assert len(early_gathers(found)) == ahead
        assert peak_bytes(found) == peak_bytes(trace) + weight * (ahead > 0)


@pytest.mark.parametrize("microbatches", [1, 2])
def test_nothing_moves_without_it(microbatches: int) -> None:
    trace = scheduled_transformer(microbatches)
    assert text(overlapped(trace, None)) == text(trace)


CASES = [
    {"stage": stage, "policy": policy, "clip": clip, "rows": rows}
    for stage, policy in ((3, "bf16"), (3, "mixed"), (1, "bf16"), (0, "fp32"))
    for clip in (False, True)
    for rows in (1, 64, 512)
]


@pytest.mark.parametrize(
    "case", [c if i % 5 == 0 else pytest.param(c, marks=pytest.mark.slow) for i, c in enumerate(CASES)]
)
def test_the_peak_rises_by_no_more_than_was_given(case: Any) -> None:
    trace = scheduled(**case)
    for most in BYTES:
        found = overlapped(trace, most)
        assert peak_bytes(found) <= peak_bytes(trace) + (most or 0)
        assert_valid(trace, found)


@pytest.mark.parametrize(("stage", "policy", "microbatches"), [(3, "bf16", 2), (1, "mixed", 1)])
def test_the_peak_of_a_transformer_rises_by_no_more_than_was_given(stage: int, policy: str, microbatches: int) -> None:
    state, step = training(simulated(4), stage, policy=policy, microbatches=microbatches, clip=True)
    trace = after("schedule", raw(step, state, tokens(rows=64)), Options(remat="block"))
    for most in BYTES:
        found = overlapped(trace, most)
        assert peak_bytes(found) <= peak_bytes(trace) + (most or 0)
        assert_valid(trace, found)


def assert_valid(trace: Trace, found: Trace) -> None:
    assert not list(misplaced(found)), "what waits comes behind what it waits for, and in front of its users"
    assert sorted(targets(trace.module)) == sorted(targets(found.module))
    under_way: set[fx.Node] = set()
    cheap = from_pieces(found.module.graph)
    ahead = 0
    for node in found.module.graph.nodes:
        if node.target in ISSUES and node in cheap:
            under_way.add(node)
            ahead = max(ahead, len(under_way))
        if node.target is WAIT:
            under_way.discard(issue_of(node))
    assert ahead <= 1, "the next gather starts behind the wait for the one before"
    assert [
        marks_of(n).leaf
        for n in trace.module.graph.nodes
        if n.target in ISSUES and n in from_pieces(trace.module.graph)
    ] == [marks_of(n).leaf for n in found.module.graph.nodes if n.target in ISSUES and n in cheap], (
        "in the order in which they are needed"
    )


# ---------------------------------------------------------------------------------------------------------
# Memory that is overwritten


def gathered_behind_a_write(pieces: fz.Sharded, x: Tensor) -> Any:
    y, (piece,) = x.exp().sum(), pieces.pieces
    assert piece is not None
    same = pieces.replace(pieces=(piece.view(-1),))  # made before the write, and read behind it
    piece.mul_(2.0)
    return fz.call(lambda p: p["w"] * y, same), y


def test_a_gather_does_not_start_before_a_write_to_its_piece() -> None:
    pieces = fz.shard({"w": torch.zeros(8, 8)}, simulated(2), fz.zero(3))
    trace = after("schedule", raw(fz.jit(gathered_behind_a_write), pieces, torch.zeros(64)), Options())
    names = [str(node.target) for node in overlapped(trace, 2**22).module.graph.nodes]
    assert names.index("aten.mul_.Tensor") < names.index("_c10d_functional.all_gather_into_tensor.default")


def with_each_overlap(each: Sequence[int | None]) -> None:
    mesh = fz.make_mesh("cpu")
    results = []
    for most in each:
        state, step = training(mesh, 3, policy="bf16", clip=True, dropout=0.1, remat="block", overlap=most)
        for number in range(2):
            state, metrics = step(state, tokens(mesh.index("data"), number))
        x = torch.linspace(0, 1, 64)
        pieces = fz.shard({"w": torch.linspace(0, 1, 64).view(8, 8)}, mesh, fz.zero(3))
        results.append((state, metrics, fz.jit(gathered_behind_a_write, overlap=most)(pieces, x), pieces))
    for other in results[1:]:
        assert_same_bits(other, results[0])


@pytest.mark.parametrize("each", [(None, 2**22), pytest.param(BYTES, marks=pytest.mark.slow)], ids=str)
def test_overlap_changes_no_bit(each: Sequence[int | None]) -> None:
    world.run(with_each_overlap, each, size=2)


@pytest.mark.parametrize("microbatches", [1, 2])
def test_the_pass_is_pure_and_deterministic(microbatches: int) -> None:
    trace = scheduled_transformer(microbatches)
    before = text(trace)
    once, again = overlapped(trace, 2**16), overlapped(trace, 2**16)
    assert text(trace) == before
    assert text(once) == text(again)
    assert text(once) != before
