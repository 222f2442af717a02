"""Where the time of a recorded step goes on a GPU: kernel by kernel, beside recorded PyTorch.

    python benchmarks/step_profile.py                                            # one CUDA GPU
    python benchmarks/step_profile.py --device cpu --model tiny --batch 2x32     # does it run? operators, then

The step of `step.py`. For each candidate: a step that is waited for, how long the host takes until it may go on, ten
steps in a row, and what ran, by torch's profiler.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import fzero as fz

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from gpt import PRESETS
from peers import Candidate, candidates
from step import RESULTS, batch
from step_report import machine, versions
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

REPEATS, PROFILED, LISTED = 12, 3, 40


def measured(candidate: Candidate, rows: Tensor) -> dict[str, Any]:
    """Return what is found of a candidate that has warmed up: milliseconds of one step each."""
    wait: Callable[[], Any] = torch.cuda.synchronize if rows.is_cuda else (lambda: None)
    alone, host = [], []
    for _ in range(REPEATS):
        wait()
        start = time.perf_counter()
        candidate.step(rows)
        host.append(1e3 * (time.perf_counter() - start))
        wait()
        alone.append(1e3 * (time.perf_counter() - start))
    start = time.perf_counter()
    for _ in range(10):
        candidate.step(rows)
    wait()
    in_a_row = 1e2 * (time.perf_counter() - start)
    kernels: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU][not rows.is_cuda :]) as seen:
        for _ in range(PROFILED):
            candidate.step(rows)
        wait()
    for event in seen.events():
        # "#" stands in ranges that optimizers mark, which hold kernels that count by themselves.
        if (event.device_type.name == "CUDA") == rows.is_cuda and "#" not in event.name:
            took = event.device_time if rows.is_cuda else event.self_cpu_time_total
            kernels[event.name][0] += 1 / PROFILED
            kernels[event.name][1] += took / 1e3 / PROFILED
    longest = sorted(kernels.items(), key=lambda item: -item[1][1])
    return {
        "step_alone": round(statistics.median(alone), 3),
        "host": round(statistics.median(host), 3),
        "ten_in_a_row": round(in_a_row, 3),
        "kernels": round(sum(count for count, _ in kernels.values())),
        "kernel_milliseconds": round(sum(took for _, took in kernels.values()), 3),
        "longest": [
            {"name": name[:110], "count": round(count, 1), "ms": round(took, 4)}
            for name, (count, took) in longest[:LISTED]
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--model", choices=PRESETS, default="base")
    parser.add_argument("--batch", type=batch, default=(8, 1024), help="rows x tokens")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    mesh, config, (count, tokens) = fz.make_mesh(args.device), PRESETS[args.model], args.batch
    rows = torch.randint(config.vocabulary, (count, tokens + 1), device=mesh.device)
    makers = candidates(config, mesh, torch.bfloat16)
    found = {}
    for name in ("DDP, recorded", "fzero, inductor") if args.device == "cuda" else ("DDP", "fzero, graph"):
        candidate = makers[name]()
        for _ in range(4):
            candidate.step(rows)
        found[name] = measured(candidate, rows)
        print(f"{name}: " + ", ".join(f"{key} {x}" for key, x in found[name].items() if key != "longest"), flush=True)
    record = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine(mesh.device),
        "versions": versions(),
        "setting": {"model": args.model, "rows": count, "tokens_a_row": tokens, "dtype": "bfloat16"},
        "milliseconds": found,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"step-profile-{args.device}.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
