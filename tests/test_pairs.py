"""All-gathers by messages between pairs of ranks: gloo's own results, waited for as those are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import fzero as fz
from fzero._torch import c10d
from fzero.program.graph.collectives import GATHERS
from fzero.program.lower.python import BY_PAIRS
from fzero.ranks import pairs
from tests import world

LARGE = pairs.LEAST // 2
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int32, torch.bool)


def piece(number: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(100 * dist.get_rank() + number)
    return torch.randint(0, 2 if dtype == torch.bool else 100, shape, generator=generator).to(dtype)


def gathered(shapes: list[tuple[int, ...]]) -> list[bool]:
    mesh = fz.make_mesh("cpu")
    group, ranks = mesh.group("data"), mesh.size("data")
    found = []
    for dtype in DTYPES:
        given = [piece(i, shape, dtype) for i, shape in enumerate(shapes)]
        given[0] = given[0].expand(2, *given[0].shape)[0]  # a view, as pieces of a leaf are
        ours = [pairs.wait(x) for x in pairs.all_gather_coalesced(given, ranks, group)]
        theirs = [c10d.wait_tensor(x) for x in c10d.all_gather_into_tensor_coalesced(given, ranks, group)]
        found += [torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(ours, theirs, strict=True)]
        one = pairs.wait(pairs.all_gather(given[0], ranks, group))
        found.append(torch.equal(one, theirs[0]))
    return found


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow), 4])
def test_what_is_gathered_is_what_gloo_gathers(size: int) -> None:
    shapes = [(LARGE,), (3,), (64, LARGE // 8), (0,), (1,), (LARGE + 1,)]
    assert all(all(found) for found in world.run(gathered, shapes, size=size))


def overwritten() -> bool:
    """What was sent may be overwritten after the wait, and many gathers may be on their way at a time."""
    mesh = fz.make_mesh("cpu")
    group, ranks = mesh.group("data"), mesh.size("data")
    mine = [torch.full((LARGE,), float(10 * i + dist.get_rank())) for i in range(8)]
    started = [pairs.all_gather(x, ranks, group) for x in mine]
    found = []
    for i in reversed(range(8)):
        whole = pairs.wait(started[i])
        mine[i].fill_(-1.0)
        found += [bool((whole[r * LARGE : (r + 1) * LARGE] == 10 * i + r).all()) for r in range(ranks)]
    return all(found)


def test_many_are_on_their_way_and_what_was_sent_is_overwritten() -> None:
    assert all(world.run(overwritten, size=3))


def wide_step() -> Any:
    """A step whose leaves are sent in pairs, jitted and eager."""
    torch.manual_seed(0)
    apply, params = fz.functional(nn.Sequential(nn.Linear(256, 300), nn.Tanh(), nn.Linear(300, 256)))
    mesh = fz.make_mesh("cpu")
    state = fz.init(params, fz.adamw(1e-2), mesh, fz.zero(3), policy="fp32")
    step = fz.train_step(lambda p, x: (apply(p, x) - x).square().mean(), donate=False)
    x = torch.randn(4, 256, generator=torch.Generator().manual_seed(dist.get_rank()))
    program = step.trace(state, x)
    paired = [node for node in program.trace.module.graph.nodes if node.target in GATHERS and node.target in BY_PAIRS]
    assert paired and any(piece.nbytes >= pairs.LEAST for piece in state.params.pieces if piece is not None)
    jitted, eager = state, state
    for _ in range(3):
        jitted, _ = step(jitted, x)
        eager, _ = step.f(eager, x)
    return [torch.equal(a, b) for a, b in zip(fz.tree.leaves(jitted), fz.tree.leaves(eager), strict=True)]


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_program_sends_in_pairs_and_has_the_bits_of_the_eager_step(size: int) -> None:
    assert all(all(found) for found in world.run(wide_step, size=size))


def deserted() -> str:
    mesh = fz.make_mesh("cpu", deadline=3.0)
    if dist.get_rank() == 1:
        return "went on"
    try:
        pairs.wait(pairs.all_gather(torch.ones(LARGE), mesh.size("data"), mesh.group("data")))
    except RuntimeError:
        return "heard of it"
    return "gathered"


def test_a_rank_that_sends_nothing_is_missed_at_the_deadline() -> None:
    assert world.run(deserted, size=2, deadline=30.0) == ["heard of it", "went on"]
    world.fresh()
