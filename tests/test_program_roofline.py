"""`program.estimate()`: a roofline of two clocks, on programs whose times are known."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import fzero as fz
from fzero import tree
from fzero._torch import c10d
from fzero.program.graph.trace import Trace, trace_flat
from fzero.program.report.roofline import DEVICES, Device, Estimate, device_named, estimate, wire_seconds
from fzero.program.report.traffic import Message

# Round numbers: 1 TFLOP/s, 1 GB/s of memory, 1 MB/s in a node, 0.1 MB/s out of it, no latency, all of it reached.
ROUND = Device("round", 1e12, 1e11, 1e9, 1e9, 1e6, 1e5, 4, 0.0, 1.0, 1.0, 1.0)


def traced(f: Callable[..., Any], *examples: Tensor) -> Trace:
    """The trace of a function of tensors as it stands: no pass moves anything."""
    hollow = tree.split((examples, {}))[2]
    return trace_flat(f, examples, hollow, paths=[f"x{i}" for i in range(len(examples))])


def half(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16)


def gathered(x: Tensor) -> Tensor:
    return c10d.all_gather_into_tensor(x, 2, "simulated:data")


def test_a_product_takes_its_flops_or_its_bytes() -> None:
    square = traced(torch.mm, half(1024, 1024), half(1024, 1024))
    flops, moved = 2 * 1024**3, 3 * 2 * 1024**2
    assert estimate(square, dataclasses.replace(ROUND, memory_bandwidth=1e15)).seconds == flops / 1e12
    assert estimate(square, ROUND).seconds == moved / 1e9
    full = traced(torch.mm, torch.empty(1024, 1024), torch.empty(1024, 1024))
    assert estimate(full, dataclasses.replace(ROUND, memory_bandwidth=1e15)).seconds == flops / 1e11


def test_shares_of_the_peak_that_are_reached_divide() -> None:
    square = traced(torch.mm, half(1024, 1024), half(1024, 1024))
    fast = dataclasses.replace(ROUND, memory_bandwidth=1e15, matmul_efficiency=0.5)
    assert estimate(square, fast).seconds == 2 * 2 * 1024**3 / 1e12
    assert estimate(square, fast).utilization == 0.5
    assert estimate(square, dataclasses.replace(ROUND, memory_efficiency=0.5)).seconds == 2 * 6 * 1024**2 / 1e9


@pytest.mark.parametrize(
    "f, shapes, moved",
    [
        (torch.tanh, [(1000,)], 2 * 2000),
        (torch.add, [(1000,), (1000,)], 3 * 2000),
        (lambda x: x.t(), [(10, 100)], 0),
        (lambda x, y: x.expand(50, 20) + y, [(1, 20), (50, 20)], 40 + 2 * 2000),
    ],
    ids=["tanh", "add", "view", "expanded"],
)
def test_operations_move_their_operands(
    f: Callable[..., Tensor], shapes: Sequence[tuple[int, ...]], moved: int
) -> None:
    assert estimate(traced(f, *(half(*shape) for shape in shapes)), ROUND).seconds == pytest.approx(moved / 1e9)


def test_a_look_up_reads_what_it_returns() -> None:
    program = traced(torch.nn.functional.embedding, torch.zeros(3, dtype=torch.int64), half(10000, 8))
    assert estimate(program, ROUND).seconds == pytest.approx((24 + 48 + 48) / 1e9)


def test_an_update_in_place_writes_what_it_overwrites() -> None:
    state = fz.init({"w": torch.zeros(4096)}, fz.adamw(1e-3), fz.make_mesh("cpu"), policy="bf16")
    program = fz.trace(fz.apply_gradients, donate=(0,))(state, fz.grad(lambda p: p["w"].sum())(state))
    (update,) = [node for node in program.trace.module.graph.nodes if "adamw_" in str(node.target)]
    alone = estimate(program.trace, ROUND).seconds
    reads, writes = 4 * 2 * 4096, 3 * 2 * 4096  # p, m, v and g; p, m and v
    assert alone > (reads + writes) / 1e9
    assert update.meta["val"] is None


# ---------------------------------------------------------------------------------------------------------
# Two clocks: a product of 4.2 ms and a gather that receives 2 kB in 2 ms, or 20 kB in 20 ms


def hidden(x: Tensor, w: Tensor) -> Any:
    sent = gathered(x)
    return w @ w, c10d.wait_tensor(sent)


def in_turn(x: Tensor, w: Tensor) -> Any:
    return c10d.wait_tensor(gathered(x)), w @ w


W = (1024, 1024)
PRODUCT = 2 * 2 * 1024**2 / 1e9  # w is read once


@pytest.mark.parametrize(
    "f, numel, seconds, exposed",
    [
        (hidden, 1000, PRODUCT, 0.0),
        (hidden, 10000, 0.02, 0.02 - PRODUCT),
        (in_turn, 1000, PRODUCT + 0.002, 0.002),
        (in_turn, 10000, PRODUCT + 0.02, 0.02),
    ],
)
def test_what_is_issued_early_is_hidden(f: Callable[..., Any], numel: int, seconds: float, exposed: float) -> None:
    found = estimate(traced(f, half(numel), half(*W)), ROUND)
    assert found.seconds == pytest.approx(seconds)
    assert found.exposed == pytest.approx(exposed)
    assert found.compute == pytest.approx(PRODUCT)
    assert found.wire == pytest.approx(2 * numel / 1e6)


def test_one_wire_carries_one_collective_at_a_time() -> None:
    def both(x: Tensor, y: Tensor) -> Any:
        a, b = gathered(x), gathered(y)
        return c10d.wait_tensor(a), c10d.wait_tensor(b)

    assert estimate(traced(both, half(1000), half(1000)), ROUND).seconds == pytest.approx(0.004)


def test_a_loop_takes_as_long_as_its_rounds() -> None:
    state = fz.init({"w": torch.zeros(256, 256)}, fz.sgd(0.1), fz.make_mesh("cpu"), policy="bf16")
    gradient = fz.value_and_grad(lambda p, x: (x @ p["w"]).float().square().mean())
    x = half(64, 256)
    one = fz.trace(gradient)(state, x).estimate(ROUND)
    four = fz.trace(fz.accumulate(gradient, 4))(state, x.repeat(4, 1)).estimate(ROUND)
    assert 4 * one.seconds <= four.seconds < 6 * one.seconds  # and it adds up


# ---------------------------------------------------------------------------------------------------------
# Wires


@pytest.mark.parametrize(
    "collective, axis, ranks, seconds",
    [
        ("all_gather", "data", 4, 1.0),  # in a node
        ("all_gather", "data", 8, 2.5),  # four adapters for each node: 0.4 MB/s
        ("all_to_all", "data", 8, 10.0),  # each rank through its own
        ("all_gather", "node", 4, 10.0),
    ],
)
def test_the_links_that_a_group_uses(collective: str, axis: str, ranks: int, seconds: float) -> None:
    message = Message(collective, axis, ranks, 10**6)
    assert wire_seconds(message, ROUND, frozenset({"node"})) == pytest.approx(seconds)


def test_a_call_takes_its_latency_for_each_doubling() -> None:
    slow = dataclasses.replace(ROUND, latency=1e-3)
    for ranks, doublings in ((2, 1), (8, 3), (9, 4), (16384, 14)):
        assert wire_seconds(Message("all_gather", "data", ranks, 0), slow) == pytest.approx(doublings * 1e-3)


# ---------------------------------------------------------------------------------------------------------
# Devices


def test_peaks_are_those_of_the_data_sheets() -> None:
    assert set(DEVICES) == {"A100-80GB", "H100", "H200", "B200"}
    for name, device in DEVICES.items():
        assert device.name == name
        assert device.float32_flops < device.flops
        assert device.network_bandwidth < device.node_bandwidth < device.memory_bandwidth
    assert DEVICES["H100"].flops == DEVICES["H200"].flops
    order = [DEVICES[name].memory_bandwidth for name in ("A100-80GB", "H100", "H200", "B200")]
    assert order == sorted(order)


def test_a_device_that_is_not_known() -> None:
    with pytest.raises(ValueError, match=r"no device 'TPU'.*H100, H200, B200.*Device\(name"):
        device_named("TPU")
    assert device_named(ROUND) is ROUND


def test_a_faster_device_is_faster() -> None:
    program = fz.trace(torch.mm)(half(4096, 4096), half(4096, 4096))
    seconds = [program.estimate(name).seconds for name in ("A100-80GB", "H100", "B200")]
    assert seconds == sorted(seconds, reverse=True)
    assert program.estimate("H100").utilization == pytest.approx(0.8, rel=0.05)  # large enough for the peak


def test_an_estimate_reads_as_a_line() -> None:
    text = str(Estimate(DEVICES["H200"], 1.234, 1.2, 0.5, 0.034, 0.4321))
    assert text == "H200: 1.23 s at best (compute 1.2 s, wire 500 ms, of that exposed 34 ms), 43% of peak flops"


def test_an_empty_program_takes_no_time() -> None:
    assert fz.trace(lambda x: x)(torch.ones(0)).estimate("H100").seconds == 0
