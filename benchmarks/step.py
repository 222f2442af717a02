"""Time and memory of a training step: fzero against DistributedDataParallel with torch's fused AdamW.

    python benchmarks/step.py                                                    # two ranks on the CPU, over gloo
    python benchmarks/step.py --device cuda                                      # one rank on a GPU
    torchrun --nproc-per-node 8 benchmarks/step.py --device cuda                 # several, over nccl

Same model, same batches, everything stored and computed in bfloat16 on both sides, no clipping. The candidates live in
the same processes and take turns, one step at a time; the order turns too. fzero rounds its updates stochastically,
torch rounds to nearest. Peaks come from torch's own record of every allocation, on a CPU as on a GPU, in runs apart
from the timed ones.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import fzero as fz

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from gpt import GPT, PRESETS, Config

RESULTS = Path(__file__).parent / "results"
RATE = 1e-3
WARM_UP = 3


@dataclass
class Candidate:
    """One way to train: `step(rows)` does a step, `at_rest` counts the bytes that stay between steps."""

    step: Callable[[Tensor], Any]
    at_rest: int


def cross_entropy(logits: Tensor, rows: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())


def fzero(config: Config, mesh: fz.Mesh, stage: int) -> Candidate:
    apply, _ = fz.functional(lambda: GPT(config))
    state = fz.init(lambda: GPT(config), fz.adamw(RATE), mesh, fz.zero(stage), policy="bf16")
    train = fz.train_step(lambda params, rows: cross_entropy(apply(params, rows[:, :-1]), rows))

    def step(rows: Tensor) -> None:
        nonlocal state
        state, _ = train(state, rows)

    return Candidate(step, size_of(fz.tree.leaves(state)))


def ddp(config: Config, mesh: fz.Mesh) -> Candidate:
    model = GPT(config).to(mesh.device, torch.bfloat16)
    wrapped: Any = model
    if mesh.size("data") > 1:
        wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True, static_graph=True)
    optimizer = torch.optim.AdamW(model.parameters(), RATE, fused=True)
    weights = size_of(model.parameters())

    def step(rows: Tensor) -> None:
        optimizer.zero_grad(set_to_none=mesh.size("data") == 1)  # DDP's gradients are views of buckets that stay
        cross_entropy(wrapped(rows[:, :-1]), rows).backward()
        optimizer.step()

    gradients = weights if mesh.size("data") > 1 else 0
    return Candidate(step, at_rest=3 * weights + gradients)


def candidates(config: Config, mesh: fz.Mesh) -> dict[str, Callable[[], Candidate]]:
    stages = (0, 1, 3) if mesh.size("data") > 1 else (0,)
    ours = {f"fzero ZeRO-{stage}": lambda stage=stage: fzero(config, mesh, stage) for stage in stages}
    return {"DDP": lambda: ddp(config, mesh), **ours}


def timed(config: Config, mesh: fz.Mesh, rows: Tensor, repeats: int) -> dict[str, dict[str, Any]]:
    """Return seconds of a step, and seconds of all ranks' cores, for each candidate."""
    built = {name: make() for name, make in candidates(config, mesh).items()}
    for candidate in built.values():
        for _ in range(WARM_UP):
            candidate.step(rows)
    wall: dict[str, list[float]] = {name: [] for name in built}
    cpu: dict[str, list[float]] = {name: [] for name in built}
    for repeat in range(repeats):
        names = list(built)
        for name in names[repeat % len(names) :] + names[: repeat % len(names)]:
            together(mesh)
            start, start_cpu = time.perf_counter(), time.process_time()
            built[name].step(rows)
            together(mesh)
            wall[name].append(time.perf_counter() - start)
            cpu[name].append(total(mesh, time.process_time() - start_cpu))
    base = statistics.median(wall["DDP"]), statistics.median(cpu["DDP"])
    return {
        name: {
            "seconds": spread(wall[name]),
            "cpu_seconds_all_ranks": spread(cpu[name]),
            "seconds_over_ddp": round(statistics.median(wall[name]) / base[0], 3),
            "cpu_seconds_over_ddp": round(statistics.median(cpu[name]) / base[1], 3),
            "bytes_at_rest": candidate.at_rest,
        }
        for name, candidate in built.items()
    }


def peak(make: Callable[[], Candidate], rows: Tensor) -> int:
    """Return the most bytes of tensors that live at once in a step after the first, what stays between steps included.

    On a CPU every allocation since before the candidate was made is recorded and added up.
    """
    gc.collect()
    if rows.is_cuda:
        before = torch.cuda.memory_allocated()
        candidate = make()
        candidate.step(rows)
        torch.cuda.reset_peak_memory_stats()
        candidate.step(rows)
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        candidate = make()
        candidate.step(rows)
        with torch.profiler.record_function("measured"):
            candidate.step(rows)
    with tempfile.TemporaryDirectory() as folder:
        profile.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(folder, "trace.json").read_text())["traceEvents"]
    start = next(event["ts"] for event in events if event.get("name") == "measured")
    live = most = 0
    for event in sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"]):
        live += event["args"]["Bytes"]
        most = max(most, live) if event["ts"] >= start else 0
    return most


def together(mesh: fz.Mesh) -> None:
    """Wait for the device, then for the other ranks."""
    if mesh.device.type == "cuda":
        torch.cuda.synchronize()
    if mesh.size("data") > 1:
        dist.barrier()


def total(mesh: fz.Mesh, x: float) -> float:
    value = torch.tensor(x, dtype=torch.float64, device=mesh.device)
    if mesh.size("data") > 1:
        dist.all_reduce(value)
    return value.item()


def spread(seconds: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return {"median": round(middle, 5), "quartile_1": round(low, 5), "quartile_3": round(high, 5)}


def size_of(tensors: Iterable[Tensor]) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def machine(device: torch.device) -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    models = (
        [x.split(":")[1].strip() for x in info.read_text().splitlines() if "model name" in x] if info.exists() else []
    )
    found: dict[str, Any] = {"cpu": models[0] if models else platform.processor(), "cores": os.cpu_count()}
    return found | ({"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else {})


def measure(args: argparse.Namespace) -> None:
    mesh = fz.make_mesh(args.device)
    ranks = mesh.size("data")
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks))
    torch.manual_seed(mesh.index("data"))
    report: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(mesh.device),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "fzero": fz.__version__},
        "setting": {
            "ranks": ranks,
            "threads_a_rank": torch.get_num_threads(),
            "rows": args.rows,
            "tokens_a_row": args.tokens,
            "repeats": args.repeats,
            "dtype": "bfloat16",
        },
        "models": {},
    }
    for preset in args.models:
        config = PRESETS[preset]
        rows = torch.randint(config.vocabulary, (args.rows, args.tokens + 1), device=mesh.device)
        results = timed(config, mesh, rows, args.repeats)
        for name, make in candidates(config, mesh).items():
            results[name]["bytes_peak"] = peak(make, rows)
        report["models"][preset] = results
        if mesh.index("data") == 0:
            show(preset, results)
    if mesh.index("data") == 0:
        path = args.out / f"step-{args.device}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=2) + "\n")
        print(f"\nWritten to {path}.")


def show(preset: str, results: dict[str, dict[str, Any]]) -> None:
    print(
        f"\n{preset:14}{'s/step':>9}{'quartiles':>18}{'× DDP':>8}{'core-s':>9}{'× DDP':>8}{'at rest':>10}{'peak':>10}"
    )
    for name, r in results.items():
        wall, cpu = r["seconds"], r["cpu_seconds_all_ranks"]
        quartiles = f"{wall['quartile_1']:.4f}-{wall['quartile_3']:.4f}"
        print(
            f"{name:14}{wall['median']:9.4f}{quartiles:>18}{r['seconds_over_ddp']:8.2f}{cpu['median']:9.4f}"
            f"{r['cpu_seconds_over_ddp']:8.2f}{r['bytes_at_rest'] / 2**20:6.1f} MiB{r['bytes_peak'] / 2**20:6.1f} MiB"
        )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--models", choices=PRESETS, nargs="+", default=["small", "medium"])
    parser.add_argument("--rows", type=int, default=2, help="of a step and rank")
    parser.add_argument("--tokens", type=int, default=128, help="of a row")
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--ranks", type=int, default=2, help="processes to start on a CPU without a launcher")
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args()


def markdown(record: dict[str, Any]) -> str:
    """Return a result as the table of the documentation."""
    lines = [
        "| model | candidate | s a step (quartiles) | × DDP | core-seconds × DDP | MiB a rank at rest | peak |",
        "|---|---|---|---|---|---|---|",
    ]
    for model, candidates in record["models"].items():
        for name, row in candidates.items():
            seconds = row["seconds"]
            lines.append(
                f"| {model} | {name} | {seconds['median']:.3f} ({seconds['quartile_1']:.3f} to "
                f"{seconds['quartile_3']:.3f}) | {row['seconds_over_ddp']:.2f} | {row['cpu_seconds_over_ddp']:.2f} | "
                f"{row['bytes_at_rest'] / 2**20:.1f} | {row['bytes_peak'] / 2**20:.1f} |"
            )
    return "\n".join(lines)


def main() -> None:
    args = arguments()
    if args.device == "cpu" and args.ranks > 1 and "WORLD_SIZE" not in os.environ:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(args.ranks)]
        sys.exit(subprocess.call([*launcher, *sys.argv]))
    measure(args)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
