"""The passes in their order, and what each bought.

    dead        what nobody uses goes, so that nothing else looks at it
    recompute   values made again for the backward, gathers among them
    hoist       leaves that stay gathered, gathered once for all micro-batches
    bucket      a block's collectives in one call, before the order is fixed: a bucket moves as one
    schedule    one order for all nodes that keeps the fewest bytes alive
    overlap     collectives start earlier, and are waited for later, where that order leaves room
    donate      updates overwrite what they update; last, since who reads what before is decided only now

A loop's body is a program of its own and goes through the same passes.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from fzero.program.agree.order import Order, with_order
from fzero.program.graph.trace import Trace
from fzero.program.options import Options
from fzero.program.passes.bucket import bucket
from fzero.program.passes.dead import dead
from fzero.program.passes.donate import donate
from fzero.program.passes.hoist import hoist
from fzero.program.passes.overlap import overlap
from fzero.program.passes.recompute import recompute
from fzero.program.passes.schedule import schedule
from fzero.program.report.memory import peak_bytes
from fzero.program.report.stage import Stage
from fzero.program.report.traffic import received_bytes

Pass = Callable[[Trace, Options], Trace]

PASSES: tuple[Pass, ...] = (dead, recompute, hoist, bucket, schedule, overlap, donate)


def run_passes(trace: Trace, options: Options, order: Order | None = None) -> tuple[Trace, tuple[Stage, ...]]:
    """Return the trace after all passes, and what it was after each; with its collectives in an order, if given."""
    stages = [_stage("trace", trace, 0.0)]
    for run in PASSES:
        if order is not None and run is schedule:
            trace = with_order(trace, order)
        start = time.perf_counter()
        trace = applied(run, trace, options)
        stages.append(_stage(run.__name__, trace, time.perf_counter() - start))
    return trace, tuple(stages)


def applied(run: Pass, trace: Trace, options: Options) -> Trace:
    """Run a pass over a trace and the loop bodies in it."""
    bodies = {name: applied(run, body, options) for name, body in trace.bodies.items()}
    return run(trace.replace(bodies=bodies), options)


def _stage(name: str, trace: Trace, seconds: float) -> Stage:
    received, calls = received_bytes(trace)
    return Stage(name, peak_bytes(trace), received, _count(trace), calls, seconds)


def _count(trace: Trace) -> int:
    own = sum(node.op == "call_function" for node in trace.module.graph.nodes)
    return own + sum(_count(body) for body in trace.bodies.values())
