"""The pass `recompute`: what is made again for the backward, how often, and what never is."""

from __future__ import annotations

import copy
import functools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fzero as fz
from fzero.marks import marks_of
from fzero.operators import written_by
from fzero.program.graph.collectives import GATHERS
from fzero.program.graph.trace import Trace
from fzero.program.graph.values import nbytes
from fzero.program.lower.python import lower_graph
from fzero.program.options import Options
from fzero.program.passes.dead import dead
from fzero.program.passes.recompute import recompute
from fzero.program.pipeline import applied
from tests import world
from tests.programs import (
    DEPTH,
    gathers,
    kept_for_backward,
    matmuls,
    misplaced,
    nodes,
    raw,
    simulated,
    text,
    tokens,
    training,
)
from tests.small import assert_same_bits, copied
from tests.test_program_trace import targets, traced

WEIGHTS = {"embed.weight", *(f"blocks.{i}.{name}.weight" for i in range(DEPTH) for name in ("up", "down"))}
SMALL = {f"blocks.{i}.{name}" for i in range(DEPTH) for name in ("up.bias", "norm.weight", "norm.bias", "down.bias")}


@functools.cache
def swept(stage: int, **kwargs: Any) -> Trace:
    """A step that went through `dead`; nothing else has to be in it. No pass changes what it is given."""
    state, step = training(simulated(2), stage, **kwargs)
    return applied(dead, raw(step, state, tokens()), Options())


def recomputed(trace: Trace, **options: Any) -> Trace:
    return applied(recompute, trace, Options(**options))


# ---------------------------------------------------------------------------------------------------------
# Gathers


@pytest.mark.parametrize(
    ("stage", "policy", "keep", "times", "microbatches"),
    [
        (3, "bf16", 0, 2, 1),
        (3, "bf16", 0, 2, 2),
        (3, "bf16", math.inf, 1, 1),
        (3, "bf16", math.inf, 1, 2),
        (3, "mixed", 0, 2, 1),
        (1, "mixed", 0, 1, 1),
        (1, "mixed", 0, 1, 2),
        (1, "bf16", 0, 0, 1),
        (0, "fp32", 0, 0, 1),
    ],
)
def test_how_often_a_leaf_is_gathered(stage: int, policy: str, keep: float, times: int, microbatches: int) -> None:
    options = {"policy": policy} if microbatches == 1 else {"policy": policy, "microbatches": microbatches}
    trace = recomputed(swept(stage, **options), keep_gathered=keep)
    found = gathers(trace)
    assert {leaf: found[leaf] for leaf in WEIGHTS} == dict.fromkeys(WEIGHTS, times), "tied leaves too"
    assert all(found[leaf] == 0 for leaf in SMALL), "leaves too small to cut are whole everywhere"
    assert not list(misplaced(trace))


def test_never_a_third_gather_and_none_where_the_backward_reads_no_weight() -> None:
    def loss(w: dict[str, Tensor], x: Tensor) -> Tensor:
        for _ in range(3):
            x = torch.tanh(x @ w["square"])
        return (x + w["bias"]).sum()

    params = {"square": torch.zeros(16, 16), "bias": torch.zeros(64, 16)}
    state = fz.init(params, fz.adamw(1e-2), simulated(2), policy="fp32")
    trace = dead(raw(fz.train_step(loss), state, torch.zeros(64, 16)), Options())
    assert gathers(recomputed(trace)) == {"square": 2, "bias": 1}


def test_a_function_without_a_backward_gathers_once() -> None:
    state, _ = training(simulated(2), 3, policy="bf16")
    total = fz.jit(lambda s: fz.call(lambda p: p["embed"]["weight"].sum() * p["embed"]["weight"].exp(), s))
    assert gathers(recomputed(dead(raw(total, state), Options()))) == {"embed.weight": 1}


@pytest.mark.parametrize("keep", [0, 100, 500, 1000, 1500, 2500, 10**6])
def test_a_budget_keeps_what_fits(keep: int) -> None:
    trace = recomputed(swept(3, policy="bf16"), keep_gathered=keep)
    size = {marks_of(n).leaf: nbytes(n.meta["val"]) for n in nodes(trace) if n.target in GATHERS and _of_leaf(n)}
    times = gathers(trace)
    kept = sum(size[leaf] for leaf, count in times.items() if count == 1)
    assert kept <= keep
    assert all(size[leaf] > keep - kept for leaf, count in times.items() if count == 2), "no other would fit"
    assert set(times.values()) <= {1, 2}


@pytest.mark.parametrize(("keep", "kept"), [(4 * 256, 1), (4 * 256 - 1, 0)])
def test_a_leaf_that_is_cast_once_gathered_counts_as_what_it_is_cast_to(keep: int, kept: int) -> None:
    params, policy = {"square": torch.zeros(16, 16)}, fz.policy("bf16", compute=torch.float32)
    state = fz.init(params, fz.sgd(1e-2), simulated(2), policy=policy)
    step = fz.train_step(lambda p, x: torch.tanh(torch.tanh(x @ p["square"]) @ p["square"]).sum())
    trace = dead(raw(step, state, torch.zeros(4, 16)), Options())
    assert gathers(recomputed(trace, keep_gathered=keep)) == {"square": 2 - kept}


def _of_leaf(node: Any) -> bool:
    return marks_of(node).role == "gather"


# ---------------------------------------------------------------------------------------------------------
# Blocks


def test_blocks_keep_less_and_their_last_product_is_not_made_again() -> None:
    trace = swept(3)
    plain, blocks = recomputed(trace), recomputed(trace, remat="block")
    assert kept_for_backward(blocks) < 0.5 * kept_for_backward(plain)
    assert matmuls(blocks) == matmuls(plain) + DEPTH  # `up` of each block; nothing reads what `down` gave
    assert not list(misplaced(blocks))


def test_byte_budgets_are_monotone() -> None:
    trace = swept(3)
    whole = kept_for_backward(recomputed(trace))
    least = kept_for_backward(recomputed(trace, remat="block"))
    kept, products = [], []
    for budget in (0, least, (2 * least + whole) // 3, (least + 2 * whole) // 3, whole, 10 * whole):
        found = recomputed(trace, remat=budget)
        kept.append(kept_for_backward(found))
        products.append(matmuls(found))
    assert kept == sorted(kept)
    assert products == sorted(products, reverse=True)
    assert (kept[0], kept[-1]) == (least, whole)
    assert len(set(kept)) > 2, "some budgets lie in between"


def test_without_blocks_there_is_nothing_to_choose() -> None:
    def loss(w: Tensor, x: Tensor) -> Tensor:
        return (x @ w).exp().sum()

    trace = dead(traced(fz.value_and_grad(loss), torch.ones(3, 3), torch.ones(2, 3)), Options())
    for remat in ("block", 100):
        with pytest.raises(ValueError, match=r"remat=.* makes blocks again, and the function has none.*fz\.remat"):
            recomputed(trace, remat=remat)
    forward = dead(traced(loss, torch.ones(3, 3), torch.ones(2, 3)), Options())
    assert targets(recomputed(forward, remat="block").module) == targets(forward.module)


@pytest.mark.parametrize("stage", [pytest.param(0, marks=pytest.mark.slow), 3])
def test_what_remat_makes_again_is_not_made_a_third_time(stage: int) -> None:
    trace = swept(stage, remat_blocks=True)
    plain, blocks = recomputed(trace), recomputed(trace, remat="block")
    assert matmuls(blocks) == matmuls(plain)
    assert kept_for_backward(blocks) == kept_for_backward(plain)


def test_dropout_is_made_again_with_the_same_bits() -> None:
    state, step = training(fz.make_mesh("cpu"), 3, dropout=0.5)
    trace = dead(raw(step, state, tokens()), Options())
    again = recomputed(trace, remat="block")
    flat = fz.tree.leaves((state, tokens()))
    draws = [targets(found.module).count("aten.bitwise_xor.Tensor") for found in (trace, again)]
    assert draws[1] > draws[0], "the masks are drawn again"
    assert kept_for_backward(again) < 0.5 * kept_for_backward(trace), "and not kept"
    expected = lower_graph(trace.module)(copied(flat))
    assert_same_bits(lower_graph(again.module)(copied(flat)), expected)


class TwoInARow(nn.Module):
    """The same blocks run twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 6)) for _ in range(2)))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(self.layers(x).sin())


def one_after_the_other(pieces: fz.Sharded, x: Tensor, apply: Any) -> Any:
    """Two backwards, the second forward behind the first."""
    first = fz.grad(lambda p: apply(p, x).square().sum())(pieces)
    second = fz.grad(lambda p: apply(p, x + 1).square().sum())(pieces)
    return first, second


def both_then_back(pieces: fz.Sharded, x: Tensor, apply: Any) -> Any:
    """Two forwards, then their backwards."""
    y, pull = fz.vjp(lambda p: apply(p, x), pieces)
    z, pull_z = fz.vjp(lambda p: apply(p, x + 1), pieces)
    return pull(z), pull_z(y)


@pytest.mark.parametrize(("f", "remat"), [(one_after_the_other, "block"), (both_then_back, 600)])
def test_each_run_through_a_block_is_made_again_by_itself(f: Any, remat: Any) -> None:
    """Blocks of one name, in two models or in two runs of one, are not one block."""
    torch.manual_seed(0)
    apply, params = fz.functional(TwoInARow())
    pieces, x = fz.shard(params, fz.make_mesh("cpu"), fz.zero(3)), torch.randn(4, 6)

    def step(pieces: fz.Sharded, x: Tensor) -> Any:
        return f(pieces, x, apply)

    trace = dead(traced(step, pieces, x), Options())
    again = recomputed(trace, remat=remat)
    assert not list(misplaced(again))
    assert matmuls(again) > matmuls(trace)
    flat = fz.tree.leaves((pieces, x))
    assert_same_bits(lower_graph(again.module)(copied(flat)), lower_graph(trace.module)(copied(flat)))
    assert_same_bits(fz.jit(step, remat=remat)(pieces, x), step(pieces, x))


# ---------------------------------------------------------------------------------------------------------
# What is never made again


def writes(trace: Trace) -> list[str]:
    return [str(node.target) for node in nodes(trace) if written_by(node)]


def test_buffers_are_written_once() -> None:
    torch.manual_seed(0)
    layers = (nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 6))
    model = nn.Sequential(*(nn.Sequential(*copy.deepcopy(layers)) for _ in range(2)))
    apply, params, buffers = fz.functional(model, buffers=True)
    state = fz.init(params, fz.adamw(1e-2), fz.make_mesh("cpu"), policy="fp32")
    x = torch.randn(8, 6)

    def step(state: fz.State, buffers: Any, x: Tensor) -> Any:
        def loss(p: Any) -> Any:
            y, new = apply(p, buffers, x)
            return y.square().mean(), new

        (value, new), grads = fz.value_and_grad(loss, has_aux=True)(state)
        return value, grads, new

    trace = dead(traced(step, state, buffers, x), Options())
    again = recomputed(trace, remat="block")
    assert writes(trace).count("aten.native_batch_norm.default") == 2
    assert writes(again).count("aten.native_batch_norm.default") == 2, "it writes the running statistics"
    assert targets(again.module).count("aten.tanh.default") > targets(trace.module).count("aten.tanh.default")
    assert_same_bits(fz.jit(step, remat="block")(state, buffers, x), step(state, buffers, x))


def written_between(pieces: fz.Sharded, x: Tensor) -> Any:
    """Overwrites a piece between the forward, which gathered it, and the backward, which reads the full leaf."""
    y, pull = fz.vjp(lambda p: (x @ p["w"]).sin(), pieces)
    pieces.pieces[0].mul_(2.0)  # type: ignore[union-attr]
    _, pull_x = fz.vjp(lambda x: (x @ torch.ones(8, 8)).sin(), x)
    return y, pull(y), pull_x(y)


def input_gradient(pieces: fz.Sharded, x: Tensor) -> Any:
    y, pull = fz.vjp(lambda p, x: (x @ p["w"]).sin(), pieces, x)
    pieces.pieces[0].mul_(2.0)  # type: ignore[union-attr]
    return y, pull(y)


@pytest.mark.parametrize("f", [written_between, input_gradient])
def test_a_piece_that_is_overwritten_is_gathered_once(f: Any) -> None:
    pieces = fz.shard({"w": torch.zeros(8, 8)}, simulated(2), fz.zero(3))
    trace = dead(raw(fz.jit(f), pieces, torch.zeros(4, 8)), Options())
    again = recomputed(trace)
    assert gathers(again) == {"w": 1}
    assert writes(again) == ["aten.mul_.Tensor"]


def overwritten_piece(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    mesh = fz.make_mesh("cpu")
    for f in (written_between, input_gradient):
        w, x = torch.randn(8, 8), torch.randn(4, 8)
        mine, theirs = (fz.shard({"w": w}, mesh, fz.zero(3)) for _ in range(2))
        assert_same_bits(fz.jit(f, **options)(mine, x), f(theirs, x))
        assert_same_bits(mine, theirs)


def test_a_piece_that_is_overwritten_gives_the_bits_of_the_eager_function() -> None:
    world.run(overwritten_piece, {"overlap": 2**20}, size=2)


# ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("remat", "microbatches"), [("none", 2), ("block", 1), ("block", 2), (2000, 1)])
def test_the_pass_is_pure_and_deterministic(remat: Any, microbatches: int) -> None:
    trace = swept(3, dropout=0.1, microbatches=microbatches)
    before = text(trace)
    once, again = recomputed(trace, remat=remat), recomputed(trace, remat=remat)
    assert text(trace) == before
    assert text(once) == text(again)
    assert text(once) != before
