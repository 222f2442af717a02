"""Programs of one function with the same collectives run together, in the order of the one that was there first."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import fzero as fz
from fzero.program.agree.order import digest, order_of
from fzero.program.graph.trace import Trace, trace_flat
from fzero.program.options import Options
from fzero.program.pipeline import run_passes
from fzero.program.signature import examples_of
from tests import world

WIDTH = 24


class Blocks(nn.Module):
    def __init__(self, depth: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(32, WIDTH)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 48, bias=False), nn.Tanh(), nn.Linear(48, WIDTH, bias=False))
            for _ in range(depth)
        )
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def loss_of(apply: Any) -> Any:
    return lambda params, batch: apply(params, batch).square().mean()


# Lengths of the ranks' batches, one row a call. The first differs already; some come again; 1 is never an open size. In
# the third row rank 0 runs the program that leaves lengths open while rank 1 runs one for its length alone.
LENGTHS = [(3, 64, 7, 130), (5, 6, 5, 5), (200, 1, 9, 2), (3, 64, 7, 130), (11, 12, 13, 14)]


def trained(stage: int, microbatches: int) -> tuple[float, list[bool]]:
    """The largest difference from plain PyTorch after steps in which each rank has a batch of its own length.

    Also whether each of this rank's programs leaves the length open.
    """
    mesh = fz.make_mesh("cpu", deadline=60.0)
    model = Blocks()
    reference = copy.deepcopy(model)
    apply, _ = fz.functional(model)
    state = fz.init(model, fz.sgd(0.1), mesh, fz.zero(stage), policy="fp32")
    step = fz.train_step(loss_of(apply), microbatches)
    sgd = torch.optim.SGD(reference.parameters(), 0.1)
    for lengths in LENGTHS:
        draw = torch.Generator().manual_seed(sum(lengths))
        batches = [torch.randint(32, (2, n), generator=draw) for n in lengths[: dist.get_world_size()]]
        state, _ = step(state, batches[dist.get_rank()])
        sgd.zero_grad()
        for batch in batches:
            (reference(batch).square().mean() / len(batches)).backward()
        sgd.step()
    full = fz.named(fz.gather(state.params))
    difference = max((full[n] - p).abs().max().item() for n, p in reference.named_parameters())
    return difference, [program.trace.sizes is not None for program in step.programs]


@pytest.mark.parametrize(
    ("size", "stage", "microbatches"),
    [
        pytest.param(2, 0, 1, marks=pytest.mark.slow),
        pytest.param(2, 1, 1, marks=pytest.mark.slow),
        (2, 3, 2),
        pytest.param(4, 3, 1, marks=pytest.mark.slow),
    ],
)
def test_each_rank_has_batches_of_its_own_length(size: int, stage: int, microbatches: int) -> None:
    for rank, (difference, is_open) in enumerate(world.run(trained, stage, microbatches, size=size, deadline=200.0)):
        assert difference < 1e-6
        assert is_open == ([False, True, False] if rank == 1 else [False, True])


def activations_gathered() -> list[Any]:
    """A collective whose size is the batch's own: outputs, or the error, call by call."""
    axis = fz.make_mesh("cpu", deadline=60.0)["data"]
    joined = fz.jit(lambda x, y: axis.gather(2 * x).sum() + y.sum())
    rank = dist.get_rank()
    found: list[Any] = []
    for rows, length in [
        (8, 3),  # both have a program for these sizes
        (8, 3 + rank),  # rank 1 leaves the length open
        (16, 3 + 2 * rank),  # rank 0 leaves the rows open, rank 1 both
        (20 + 2 * rank, 5),  # what is sent differs
        (8, 3 + rank),
        (24, 5),
    ]:
        try:
            found.append(float(joined(torch.ones(rows, 2), torch.zeros(length))))
        except fz.ProgramMismatchError as error:
            found.append(str(error))
    return found


def test_sizes_that_are_sent_have_to_be_equal_at_each_call() -> None:
    for found in world.run(activations_gathered, size=2):
        assert [found[i] for i in (0, 1, 2, 4, 5)] == [2 * 2 * 2 * rows for rows in (8, 8, 16, 8, 24)]
        assert "float32(20, 2)" in found[3] and "float32(22, 2)" in found[3]


def constants() -> list[float]:
    """A Python number that differs between ranks is no difference of collectives."""
    state = fz.init({"w": torch.ones(64)}, fz.sgd(0.1), fz.make_mesh("cpu", deadline=30.0), fz.zero(3), policy="fp32")
    step = fz.train_step(lambda p, b: (p["w"] * b["x"]).sum() * b["scale"])
    state, _ = step(state, {"x": torch.ones(64), "scale": 2.0 + dist.get_rank()})
    return fz.gather(state.params)["w"][:2].tolist()


def test_a_number_may_differ() -> None:
    for found in world.run(constants, size=2):
        assert found == pytest.approx([1 - 0.1 * 2.5] * 2)


# ---------------------------------------------------------------------------------------------------------
# The passes


@functools.cache
def trace_of(length: int, stage: int, microbatches: int, overlap: int = 1 << 20) -> tuple[Trace, Options]:
    """A step as traced, before any pass."""
    mesh = fz.make_mesh("cpu", data=4, simulate=True)
    model = Blocks()
    apply, _ = fz.functional(model)
    state = fz.init(model, fz.adamw(1e-3), mesh, fz.zero(stage), policy="fp32")
    step = fz.train_step(loss_of(apply), microbatches)
    signature, leaves = step._open((state, torch.zeros(2, length, dtype=torch.int64)), {})
    examples = examples_of(leaves, signature.simulated_on)
    trace = trace_flat(step.f, examples, signature.hollow, paths=signature.paths, donated=signature.donated)
    return trace, Options(overlap=overlap)


@pytest.mark.parametrize(("stage", "microbatches"), [(0, 1), (1, 2), (3, 1), (3, 2)])
def test_passes_keep_an_order_that_they_are_given(stage: int, microbatches: int) -> None:
    (short, options), (long, _) = (trace_of(n, stage, microbatches) for n in (4, 4000))
    first, second = run_passes(short, options)[0], run_passes(long, options)[0]
    kept = run_passes(long, options, order_of(first))[0]
    assert order_of(kept) == order_of(first)
    assert digest("step", kept, {}) == digest("step", first, {})
    back = run_passes(short, options, order_of(second))[0]
    assert order_of(back) == order_of(second)
    for trace in (kept, back):  # nothing stands in front of what it needs
        seen: set[Any] = set()
        for node in trace.module.graph.nodes:
            assert seen.issuperset(node.all_input_nodes)
            seen.add(node)


def test_lengths_would_decide_the_order() -> None:
    """Otherwise the test above shows nothing."""
    orders = [order_of(run_passes(*trace_of(n, 3, 1))[0]) for n in (4, 4000)]
    assert orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1])


def test_an_order_that_cannot_be_is_not_kept() -> None:
    trace, options = trace_of(8, 3, 1)
    done = run_passes(trace, options)[0]
    backwards = order_of(done)[::-1]
    assert order_of(run_passes(trace, options, backwards)[0]) != backwards


def test_an_order_costs_little_memory() -> None:
    (short, options), (long, _) = (trace_of(n, 3, 1, 0) for n in (16, 64))
    first = run_passes(short, options)[0]
    free, kept = (run_passes(long, options, order)[1][-1].peak for order in (None, order_of(first)))
    assert kept <= 1.1 * free
