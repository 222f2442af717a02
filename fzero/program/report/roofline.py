"""How long a program takes at best on a device that is known by its data sheet: a roofline.

One walk over the schedule with two clocks. An operation takes the longer of its arithmetic and of its bytes through
memory. A collective starts when it is issued and the wire is free, and runs on the wire's clock; a wait brings both
together. So a schedule that starts collectives early is seen to hide them:

    compute  ── mm ── mm ── wait ──────▶ mm          what the wait is long, is exposed
    wire     ────── gather ─────────────▶

It is an optimistic bound. Not in it: launching kernels, shapes that fill a device badly, a network that others use
too, ranks that wait for each other. Each operation moves its own operands; kernels that a compiler fuses move fewer.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from fzero.program.graph.aliases import alias_of
from fzero.program.graph.collectives import COLLECTIVES, ISSUES, WAIT, issue_of
from fzero.program.graph.kinds import overwritten
from fzero.program.graph.loop import loop_call, run_loop
from fzero.program.graph.trace import Trace
from fzero.program.graph.values import tensors_of
from fzero.program.graph.walk import body_of
from fzero.program.report.flops import flops_at
from fzero.program.report.traffic import Message, message_of

# Lookups: of the table that they are given, these read only as many bytes as they return.
_LOOK_UP = frozenset(
    (
        torch.ops.aten.embedding.default,
        torch.ops.aten.gather.default,
        torch.ops.aten.index.Tensor,
        torch.ops.aten.index_select.default,
    )
)


@dataclass(frozen=True)
class Device:
    """A device and its links, by their peaks, and the share of each that a program reaches.

    Attributes:
        name: such as `"H100"`.
        flops: dense matrix products of bfloat16 or float16, per second.
        float32_flops: those of float32, without TF32.
        memory: bytes of memory.
        memory_bandwidth: bytes a second to and from it.
        node_bandwidth: bytes a second that a rank receives from ranks of its node.
        network_bandwidth: bytes a second that a rank receives through its own network adapter.
        node_ranks: ranks of a node.
        latency: seconds that a call of a collective takes for each doubling of its ranks.
        matmul_efficiency: share of the peak that matrix products reach.
        memory_efficiency: share of the peak that copies reach.
        wire_efficiency: share of the peak that collectives reach.
    """

    name: str
    flops: float
    float32_flops: float
    memory: float
    memory_bandwidth: float
    node_bandwidth: float
    network_bandwidth: float
    node_ranks: int = 8
    latency: float = 5e-6
    # An H200 measured: 790 of 989 TFLOP/s in large products, 4.3 of 4.8 TB/s in copies. The wire's is assumed.
    matmul_efficiency: float = 0.8
    memory_efficiency: float = 0.9
    wire_efficiency: float = 0.8


DEVICES = {
    device.name: device
    for device in (
        # NVIDIA A100 80 GB SXM data sheet; DGX A100: NVLink 600 GB/s both ways, HDR InfiniBand of 200 Gbit/s a GPU.
        Device("A100-80GB", 312e12, 19.5e12, 80e9, 2.039e12, 300e9, 25e9),
        # NVIDIA H100 SXM data sheet (half of the sparse figure); NVLink 900 GB/s both ways, NDR of 400 Gbit/s a GPU.
        Device("H100", 989e12, 67e12, 80e9, 3.35e12, 450e9, 50e9),
        # NVIDIA H200 SXM data sheet: the same chip with other memory.
        Device("H200", 989e12, 67e12, 141e9, 4.8e12, 450e9, 50e9),
        # NVIDIA HGX B200 at 1000 W: dense figures; NVLink 1.8 TB/s both ways, 400 Gbit/s a GPU.
        Device("B200", 2250e12, 80e12, 180e9, 8e12, 900e9, 50e9),
    )
}


@dataclass(frozen=True)
class Estimate:
    """The time of one run of a program on a device, at best. Printed, it is a line.

    Attributes:
        device: the device.
        seconds: from start to end.
        compute: seconds of operations.
        wire: seconds of collectives.
        exposed: seconds in which collectives run and operations wait for them.
        utilization: the program's flops, recomputed ones included, over what the device's peak gives in that time.
    """

    device: Device
    seconds: float
    compute: float
    wire: float
    exposed: float
    utilization: float

    def __str__(self) -> str:
        return (
            f"{self.device.name}: {_time(self.seconds)} at best (compute {_time(self.compute)}, wire "
            f"{_time(self.wire)}, of that exposed {_time(self.exposed)}), {self.utilization:.0%} of peak flops"
        )


def device_named(device: str | Device) -> Device:
    """Return a device by its name.

    Raises:
        ValueError: there is no such device.

    Example:
        >>> device_named("H200").memory_bandwidth
        4800000000000.0
    """
    if isinstance(device, Device):
        return device
    if device not in DEVICES:
        raise ValueError(
            f"program.estimate: there is no device {device!r}. Known are {', '.join(DEVICES)}; for another, pass "
            f"fzero.program.report.roofline.Device(name, ...) with its peaks."
        )
    return DEVICES[device]


def estimate(trace: Trace, device: str | Device, *, between: Collection[str] = ()) -> Estimate:
    """Return how long a program takes at best.

    Args:
        trace: the program.
        device: a name of `DEVICES`, or a device.
        between: mesh axes whose neighbours stand in different nodes. Of the others, those with more ranks than a node
            has cross nodes, whole nodes at a time.
    """
    clocks = _Clocks(device_named(device), frozenset(between))
    clocks.run(trace)
    seconds = max(clocks.compute, clocks.wire)
    return Estimate(
        device=clocks.device,
        seconds=seconds,
        compute=clocks.busy_compute,
        wire=clocks.busy_wire,
        exposed=seconds - clocks.busy_compute,
        utilization=clocks.flops / (seconds * clocks.device.flops) if seconds else 0.0,
    )


class _Clocks:
    """When compute and wire are free again, and how long each was busy."""

    def __init__(self, device: Device, between: frozenset[str]):
        self.device = device
        self.between = between
        self.compute = self.wire = self.busy_compute = self.busy_wire = 0.0
        self.flops = 0

    def run(self, trace: Trace) -> None:
        ends: dict[fx.Node, float] = {}
        for node in trace.module.graph.nodes:
            if node.op != "call_function":
                continue
            if node.target is run_loop:
                self._loop(body_of(trace, node), loop_call(node).rounds)
            elif node.target in ISSUES:
                seconds = wire_seconds(message_of(node), self.device, self.between)
                self.wire = ends[node] = max(self.wire, self.compute) + seconds
                self.busy_wire += seconds
            elif node.target is WAIT:
                issue = issue_of(node)
                self.compute = max(self.compute, 0.0 if issue is None else ends[issue])
            elif alias_of(node) is None:
                seconds, flops = compute_seconds(node, self.device)
                self.compute += seconds
                self.busy_compute += seconds
                self.flops += flops

    def _loop(self, body: Trace, rounds: int) -> None:
        one = _Clocks(self.device, self.between)
        one.run(body)
        # A round ends when computing and sending have both ended: the next round's first collective needs the wire.
        self.compute = max(self.compute, self.wire) + rounds * max(one.compute, one.wire)
        self.wire = self.compute
        self.busy_compute += rounds * one.busy_compute
        self.busy_wire += rounds * one.busy_wire
        self.flops += rounds * one.flops


def compute_seconds(node: fx.Node, device: Device) -> tuple[float, int]:
    """Return the time of an operation, the longer of its arithmetic and its bytes; and its flops."""
    operands = [x for source in node.all_input_nodes for x in tensors_of(source)[:1] if x is not None]
    made = sum(_bytes(x) for x in tensors_of(node) if x is not None)
    made += sum(_bytes(target.meta["val"]) for target in overwritten(node))
    read = sum(min(_bytes(x), made) if node.target in _LOOK_UP else _bytes(x) for x in operands)
    flops = flops_at(node)
    half = bool(operands) and operands[0].element_size() <= 2
    peak = device.flops if half else device.float32_flops
    arithmetic = flops / (peak * device.matmul_efficiency)
    return max(arithmetic, (read + made) / (device.memory_bandwidth * device.memory_efficiency)), flops


def wire_seconds(message: Message, device: Device, between: frozenset[str] = frozenset()) -> float:
    """Return the time of a collective.

    A group of whole nodes moves what comes from other nodes once into each node, through the adapters of all its
    ranks, and on inside it; in an exchange each rank gets its own parts through its own adapter.
    """
    if message.axis in between:
        rate = device.network_bandwidth
    elif message.ranks <= device.node_ranks:
        rate = device.node_bandwidth
    elif COLLECTIVES[message.collective].is_personal:
        rate = device.network_bandwidth
    else:
        rate = min(device.node_bandwidth, device.network_bandwidth * device.node_ranks)
    doublings = math.ceil(math.log2(message.ranks)) if message.ranks > 1 else 1
    return device.latency * doublings + message.received / (rate * device.wire_efficiency)


def _bytes(x: Tensor) -> int:
    """Return the bytes that are read or written of a tensor; an expanded one has fewer than it shows."""
    shown = math.prod(size for size, step in zip(x.shape, x.stride(), strict=True) if step)
    return shown * x.element_size()


def _time(seconds: float) -> str:
    for scale, name in ((1, "s"), (1e3, "ms")):
        if seconds * scale >= 1:
            return f"{seconds * scale:.3g} {name}"
    return f"{seconds * 1e6:.3g} µs"
