"""`program.traffic()`: what each layout sends, against closed forms in the bytes P of the parameters."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from gpt import GPT, Config
from torch import Tensor, nn

import fzero as fz
from fzero.program.graph.collectives import COLLECTIVES
from fzero.program.program import Program
from fzero.ranks.collectives import all_to_all
from tests import world

WIDE = Config(width=512, depth=1, heads=4, vocabulary=1024)
# What an all-gather and a sum all-reduce instead of a reduce-scatter and an all-gather: elements of all ranks.
SMALL = 65536


def step_of(config: Config, **options: Any) -> Any:
    apply, _ = fz.functional(lambda: GPT(config))

    def loss(params: Any, text: Tensor) -> Tensor:
        logits = apply(params, text[:, :-1]).flatten(0, 1).float()
        return nn.functional.cross_entropy(logits, text[:, 1:].flatten())

    return fz.train_step(loss, **options)


@functools.cache
def traced(
    ranks: int, stage: int, policy: str | fz.Policy = "bf16", clip: bool = False, **options: Any
) -> tuple[fz.State, Program]:
    mesh = fz.make_mesh("cpu", data=ranks, simulate=True)
    optimizer = fz.chain(fz.clip_by_global_norm(1.0), fz.adamw(1e-3)) if clip else fz.adamw(1e-3)
    state = fz.init(lambda: GPT(WIDE), optimizer, mesh, fz.zero(stage), policy=policy)
    text = torch.empty(4, 17, dtype=torch.int64, device="meta")
    return state, fz.trace(step_of(WIDE, **options))(state, text)


@pytest.mark.parametrize("options", [{}, {"policy": "mixed"}], ids=str)
def test_what_is_sent_does_not_depend_on_the_compute_dtype(options: dict[str, Any]) -> None:
    _, own = traced(8, 3, **options)
    _, wide = traced(8, 3, policy=fz.policy(options.get("policy", "bf16"), compute=torch.float32))
    assert wide.traffic().by_collective == own.traffic().by_collective
    assert wide.traffic().calls == own.traffic().calls


def elements(state: fz.State, ranks: int) -> tuple[int, list[int]]:
    """Return the elements of leaves that are cut, padding included, and of each that is too small for it."""
    counts = [math.prod(shape) for shape in state.params.shapes]
    return sum(padded(n, ranks) for n in counts if n >= 16 * ranks), [n for n in counts if n < 16 * ranks]


def padded(count: int, ranks: int) -> int:
    return math.ceil(count / ranks) * ranks


def all_reduced(counts: list[int], ranks: int, itemsize: int) -> int:
    """Bytes that all-reducing leaves brings: those of all ranks where that is little, or of a sum, cut and whole."""
    few = sum(n * (ranks - 1) for n in counts if n * ranks <= SMALL)
    return itemsize * (few + sum(2 * padded(n, ranks) * (ranks - 1) // ranks for n in counts if n * ranks > SMALL))


def scalars(ranks: int, calls: int = 6) -> int:
    """The most that norms and metrics bring: a few all-gathers of a pair of numbers of eight bytes."""
    return calls * 16 * (ranks - 1)


LAYOUTS: list[tuple[int, dict[str, Any], int]] = [
    (1, {}, 2),
    (2, {}, 2),
    (3, {}, 3),
    (3, {"keep_gathered": math.inf}, 2),
]
QUICK = [(2, 3), (8, 2), (8, 1), (1024, 0), (1024, 2)]  # ranks, and which layout


@pytest.mark.parametrize(
    ("ranks", "stage", "options", "times"),
    [
        pytest.param(ranks, *layout, marks=() if (ranks, i) in QUICK else pytest.mark.slow)
        for ranks in (2, 8, 1024)
        for i, layout in enumerate(LAYOUTS)
    ],
)
def test_a_step_brings_what_its_layout_says(ranks: int, stage: int, options: dict[str, Any], times: int) -> None:
    state, program = traced(ranks, stage, **options)
    cut, small = elements(state, ranks)
    traffic = program.traffic()
    expected = times * 2 * cut * (ranks - 1) // ranks + all_reduced(small, ranks, 2)
    assert 0 <= traffic.total - expected <= scalars(ranks), "nothing more than norms and metrics"
    assert traffic.by_axis == {"data": traffic.total}
    assert sum(traffic.by_collective.values()) == traffic.total
    if not small:
        assert traffic.by_collective["reduce_scatter"] == 2 * cut * (ranks - 1) // ranks
    assert traffic.total == program.stages[-1].received
    assert sum(traffic.calls.values()) == program.stages[-1].collectives


@pytest.mark.parametrize("ranks", [pytest.param(2, marks=pytest.mark.slow), 8, 1024])
def test_stage_0_brings_each_gradient_twice(ranks: int) -> None:
    state, program = traced(ranks, 0)
    counts = [math.prod(shape) for shape in state.params.shapes]
    large = sum(padded(n, ranks) for n in counts if n * ranks > SMALL)
    expected = 2 * 2 * large * (ranks - 1) // ranks + all_reduced([n for n in counts if n * ranks <= SMALL], ranks, 2)
    assert 0 <= program.traffic().total - expected <= scalars(ranks)


def test_a_clip_by_the_global_norm_adds_a_few_numbers() -> None:
    _, free = traced(8, 3)
    _, clipped = traced(8, 3, clip=True)
    assert 0 <= clipped.traffic().total - free.traffic().total <= scalars(8)


def test_the_wire_has_the_dtype_that_the_policy_says() -> None:
    state, program = traced(8, 3, policy="mixed")
    cut, small = elements(state, 8)
    assert not small
    traffic = program.traffic()
    assert traffic.by_collective["reduce_scatter"] == 4 * cut * 7 // 8  # NCCL adds in the dtype that it sends
    gathers = 2 * 2 * cut * 7 // 8  # in bfloat16, not in the master's float32
    assert 0 <= traffic.by_collective["all_gather"] - gathers <= scalars(8)


def test_a_loop_counts_once_a_round() -> None:
    _, once = traced(8, 3)
    _, program = traced(8, 3, microbatches=4)
    for name in ("all_gather", "reduce_scatter"):
        quarter = program.traffic().by_collective[name] / 4
        assert quarter == pytest.approx(once.traffic().by_collective[name], rel=1e-3)
    assert program.traffic().calls["reduce_scatter"] == 4 * once.traffic().calls["reduce_scatter"]


def test_buckets_change_calls_and_no_bytes() -> None:
    _, packed = traced(8, 3)
    _, single = traced(8, 3, bucket=0)
    assert packed.traffic().total == single.traffic().total
    assert packed.traffic().calls["all_gather"] < single.traffic().calls["all_gather"]


def test_each_axis_has_its_share() -> None:
    mesh = fz.make_mesh("cpu", node=4, data=8, simulate=True)
    layout = fz.zero(3, axis="data", replicate="node")
    state = fz.init({"w": torch.empty(256, 1024, device="meta")}, fz.sgd(0.1), mesh, layout, policy="bf16")
    step = fz.train_step(lambda params, batch: (batch @ params["w"]).float().sum())
    traffic = fz.trace(step)(state, torch.empty(4, 256, dtype=torch.bfloat16)).traffic()
    p = 2 * 256 * 1024
    data = 2 * p * 7 // 8  # gathered once: its gradient needs the batch only; and reduced
    node = 2 * (p // 8) * 3 // 4  # the pieces of the sum are all-reduced between nodes
    assert 0 <= traffic.by_axis["data"] - data <= scalars(8)
    assert 0 <= traffic.by_axis["node"] - node <= scalars(4)
    assert traffic.total == sum(traffic.by_axis.values())


def test_an_exchange_is_no_reduction() -> None:
    mesh = fz.make_mesh("cpu", data=8, simulate=True)
    state = fz.shard({"w": torch.empty(64, device="meta")}, mesh, fz.zero(0))

    def f(params: fz.Sharded, x: Tensor) -> Tensor:
        return all_to_all(x, mesh, "data") * 2

    traffic = fz.trace(f)(state, torch.empty(64, 10)).traffic()
    assert traffic.by_collective == {**dict.fromkeys(COLLECTIVES, 0), "all_to_all": 64 * 10 * 4 * 7 // 8}
    assert traffic.calls["all_to_all"] == 1


def test_a_world_of_one_receives_nothing() -> None:
    _, program = traced(1, 3)
    traffic = program.traffic()
    assert (traffic.total, traffic.by_axis, set(traffic.calls.values())) == (0, {}, {0})


def on_gloo(bucket: int) -> tuple[int, dict[str, int], dict[str, int]]:
    state = fz.init(lambda: GPT(WIDE), fz.sgd(0.1), fz.make_mesh("cpu"), fz.zero(3), policy="bf16")
    program = fz.trace(step_of(WIDE, bucket=bucket))(state, torch.zeros(1, 17, dtype=torch.int64))
    assert any("all_to_all_single" in str(node.target) for node in program.trace.module.graph.nodes)
    traffic = program.traffic()
    return elements(state, 2)[0], dict(traffic.by_collective), dict(traffic.calls)


@pytest.mark.parametrize("bucket", [0, 128 * 2**20])
def test_what_a_reduce_scatter_is_on_gloo_counts_as_one(bucket: int) -> None:
    for cut, sizes, calls in world.run(on_gloo, bucket, size=2):
        assert sizes["reduce_scatter"] == 2 * cut // 2
        assert sizes["all_to_all"] == calls["all_to_all"] == 0
