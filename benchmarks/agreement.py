"""What it costs that ranks agree at every call: a step of about 10 ms with agreement, and its program run directly.

What a step becomes longer by is the time from when the last rank comes until the last one goes on; it is taken over
many calls to which ranks come one after another. Beside it stands the difference itself: a step and its program run
directly take turns in the same processes, in an order drawn anew for each pair, and the median over pairs is told with
its quartiles, which on a busy machine are far apart. The bare exchange is timed too, `compare` in a loop, and beside it
the smallest collective of gloo. Give it a quiet machine: a rank that another process keeps from its core is waited for.

    python benchmarks/agreement.py                 # 2 and 4 ranks, written to benchmarks/results/agreement-cpu.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import fzero as fz
from fzero.ranks.peers import compare

# Calls in a row of the bare exchange.
_CALLS = 2000

RESULT = Path(__file__).parent / "results" / "agreement-cpu.json"


def measured(pairs: int, width: int, depth: int) -> dict[str, Any]:
    """Time both ways of a step on this world; every rank returns the same."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    mesh = fz.make_mesh("cpu")
    model = nn.Sequential(*(nn.Linear(width, width) for _ in range(depth)))
    apply, _ = fz.functional(model)
    state = fz.init(model, fz.sgd(1e-3), mesh, fz.zero(3), policy="fp32")
    step = fz.train_step(lambda p, x: apply(p, x).square().mean(), donate=False)
    batch = torch.randn(64, width)
    step(state, batch)
    (program,) = step.programs

    def agreed() -> None:
        program.agree("step", dict, ())
        direct()

    def direct() -> None:
        program(fz.tree.leaves(((state, batch), {})))

    def seconds(f: Any) -> float:
        dist.barrier()
        start = time.perf_counter()
        f()
        slowest = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        return slowest.item()

    def each(f: Any) -> dict[str, float]:
        """Microseconds of one of many calls in a row: the least is what a machine does that does nothing else."""
        found = []
        for _ in range(_CALLS):
            start = time.perf_counter()
            f()
            found.append(1e6 * (time.perf_counter() - start))
        tenth = statistics.quantiles(found, n=10)[0]
        named = {"least": min(found), "tenth": tenth, "median": statistics.median(found)}
        return {name: round(value, 1) for name, value in named.items()}

    def added() -> dict[str, Any]:
        """Microseconds from when the last rank comes until the last one goes on: what a step becomes longer by."""
        waits, times, operand = random.Random(dist.get_rank()), [], torch.ones(64, 64)
        for _ in range(_CALLS):
            until = time.perf_counter() + waits.uniform(0.0, 0.002)  # ranks come one after another, out of a step
            while time.perf_counter() < until:
                torch.mm(operand, operand)
            came = time.perf_counter()  # a clock that the processes of a machine share
            compare("same", "step", dict, list)
            times.append((came, time.perf_counter()))
        everyone = [torch.zeros(_CALLS, 2, dtype=torch.float64) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, torch.tensor(times, dtype=torch.float64))
        came_and_went = torch.stack(everyone).amax(0)
        cuts = statistics.quantiles((1e6 * (came_and_went[:, 1] - came_and_went[:, 0])).tolist(), n=4)
        return {"median": round(cuts[1], 1), "quartiles": [round(cuts[0], 1), round(cuts[2], 1)]}

    order, differences, plain = random.Random(0), [], []
    for _ in range(pairs):
        ways = [agreed, direct] if order.random() < 0.5 else [direct, agreed]
        found = {f.__name__: seconds(f) for f in ways}
        differences.append(found["agreed"] - found["direct"])
        plain.append(found["direct"])
    exchange = each(lambda: compare("same", "step", dict, list))
    reduction = torch.zeros(1)
    alone = {"exchange": exchange, "gloo_all_reduce": each(lambda: dist.all_reduce(reduction))}
    quartiles = [round(1e6 * q, 1) for q in statistics.quantiles(differences, n=4)]
    return {
        "ranks": dist.get_world_size(),
        "added_us": (extra := added()),
        "share_of_a_step_of_10_ms_percent": round(extra["median"] / 100, 2),
        "step_ms": round(1e3 * statistics.median(plain), 3),
        "agreement_us": {"median": quartiles[1], "quartiles": [quartiles[0], quartiles[2]]},
        "share_of_step_percent": round(1e-4 * quartiles[1] / statistics.median(plain), 2),
        "alone_us": alone,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--pairs", type=int, default=200, help="pairs of steps, one with agreement and one without")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--depth", type=int, default=8)
    arguments = parser.parse_args()
    if "RANK" in os.environ:
        found = measured(arguments.pairs, arguments.width, arguments.depth)
        if dist.get_rank() == 0:
            print("RESULT " + json.dumps(found), flush=True)
        return
    rows = []
    for ranks in (2, 4):
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        run = subprocess.run(
            [*launch, *sys.argv], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        told = [line.removeprefix("RESULT ") for line in run.stdout.splitlines() if line.startswith("RESULT ")]
        if not told:
            raise SystemExit(run.stderr)
        rows.append(json.loads(told[0]))
        print(rows[-1])
    machine = {
        "cores": os.cpu_count(),
        "processor": platform.processor() or platform.machine(),
        "load": os.getloadavg()[0],
    }
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    RESULT.write_text(json.dumps({"machine": machine, "versions": versions, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
