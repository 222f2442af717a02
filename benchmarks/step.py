"""Time and memory of a training step: fzero against DDP, FSDP2 and DeepSpeed ZeRO-3.

    python benchmarks/step.py                                                    # two ranks on the CPU, over gloo
    python benchmarks/step.py --device cuda                                      # one rank on a GPU
    torchrun --nproc-per-node 8 benchmarks/step.py --device cuda                 # several, over nccl

Same model from the same weights, same batches, everything stored and computed in one dtype on all sides, no clipping:
bfloat16, and on a CPU float32 too; on one that has no instructions for bfloat16 float32 alone, unless `--dtypes` says;
`peers.py` says how each trains. The candidates live in the same processes and take turns, one step at a time; the order
turns too. fzero rounds its updates stochastically, the others round to nearest; fzero averages the loss over ranks in
every step, the others do not. Every candidate has to show that it trains: its first loss and the one after the warm-up
are DDP's, and at the end its loss has fallen. Memory is measured in runs apart from the timed ones.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import fzero as fz
from fzero.precision.products import are_fast

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from footprint import footprint
from gpt import GPT, PRESETS
from peers import Candidate, candidates, missing_deepspeed
from step_report import MEASURES, Rows, machine, markdown, ratios, show, spread, versions

__all__ = ["markdown"]

RESULTS = Path(__file__).parent / "results"
WARM_UP = 3
# How far a candidate's loss may be from DDP's: at the first step they differ in the order of bf16 sums, after the
# warm-up in the rounding of three updates. Ranks that each train on their own rows are 2 to 3 % away by then.
SAME_START, SAME_COURSE = 0.005, 0.01


def timed(makers: dict[str, Callable[[], Candidate]], mesh: fz.Mesh, rows: Tensor, repeats: int) -> Rows:
    """Return seconds of a step, and seconds of all ranks' cores, for each candidate, and its losses."""
    built = {name: make() for name, make in makers.items()}
    losses = {name: [mean(mesh, x.step(rows)) for _ in range(WARM_UP)] for name, x in built.items()}
    times: dict[str, dict[str, list[float]]] = {name: {m: [] for m in MEASURES} for name in built}
    for repeat in range(repeats):
        names = list(built)
        for name in names[repeat % len(names) :] + names[: repeat % len(names)]:
            together(mesh)
            start, start_cpu = time.perf_counter(), time.process_time()
            loss = built[name].step(rows)
            together(mesh)
            wall, cpu = time.perf_counter() - start, time.process_time() - start_cpu
            times[name]["seconds"].append(wall)
            times[name]["cpu_seconds_all_ranks"].append(total(mesh, cpu))
            losses[name].append(mean(mesh, loss))
    for candidate in built.values():
        candidate.close()
    check(losses)
    found: Rows = {name: {m: spread(x) for m, x in by.items()} for name, by in times.items()}
    for name, row in found.items():
        row["over"] = ratios(found, name)
        first, *_, last = losses[name]
        row["loss"] = {"first": round(first, 4), "warm": round(losses[name][WARM_UP], 4), "last": round(last, 4)}
    return found


def check(losses: dict[str, list[float]]) -> None:
    """Raise unless every candidate trains, and as the first one does."""
    reference, wanted = next(iter(losses.items()))
    for name, found in losses.items():
        for step, bound in ((0, SAME_START), (WARM_UP, SAME_COURSE)):
            if not abs(found[step] / wanted[step] - 1) <= bound:
                raise RuntimeError(
                    f"benchmarks/step.py: {name} has a loss of {found[step]:.4f} at step {step}, and {reference} one "
                    f"of {wanted[step]:.4f}; expected at most {bound:.1%} between them. They do not train the same."
                )
        if not statistics.median(found[-3:]) < found[0]:
            raise RuntimeError(
                f"benchmarks/step.py: {name} does not train: its loss on one batch went from {found[0]:.4f} to "
                f"{found[-1]:.4f} in {len(found)} steps."
            )


def together(mesh: fz.Mesh) -> None:
    """Wait for the device, then for the other ranks."""
    if mesh.device.type == "cuda":
        torch.cuda.synchronize()
    if mesh.size("data") > 1:
        dist.barrier()


def total(mesh: fz.Mesh, x: Tensor | float) -> float:
    value = torch.as_tensor(x, dtype=torch.float64, device=mesh.device).clone()
    if mesh.size("data") > 1:
        dist.all_reduce(value)
    return value.item()


def mean(mesh: fz.Mesh, x: Tensor) -> float:
    return total(mesh, x) / mesh.size("data")


def measure(args: argparse.Namespace) -> None:
    mesh = fz.make_mesh(args.device)
    ranks, leads = mesh.size("data"), mesh.index("data") == 0
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks))
    draws = torch.Generator().manual_seed(mesh.index("data"))  # its own rows for each rank
    if leads and (why := missing_deepspeed(mesh)):
        print(f"DeepSpeed is left out: {why}.", flush=True)
    report: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(mesh.device),
        "versions": versions(),
        "setting": {
            "ranks": ranks,
            "threads_a_rank": torch.get_num_threads(),
            "repeats": args.repeats,
            "batches": {},
        },
        "models": {},
    }
    for preset in args.models:
        config = PRESETS[preset]
        with torch.device("meta"):
            parameters = sum(x.numel() for x in GPT(config).parameters())
        for dtype, (count, tokens) in itertools.product(args.dtypes or usual(mesh.device), args.batches):
            key = f"{preset}, {count} × {tokens}, {dtype}"
            makers = chosen(candidates(config, mesh, getattr(torch, dtype)), args.candidates)
            rows = torch.randint(config.vocabulary, (count, tokens + 1), generator=draws).to(mesh.device)
            results = timed(makers, mesh, rows, args.repeats)
            for name, make in makers.items():
                results[name]["bytes_at_rest"], results[name]["bytes_peak"] = footprint(make, rows)
            report["models"][key] = results
            report["setting"]["batches"][key] = {"parameters": parameters, "rows": count, "tokens_a_row": tokens}
            if leads:
                print(show(key, results), flush=True)
    if leads:
        path = args.out / f"step-{args.device}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n")
        print(f"\nWritten to {path}.")


def usual(device: torch.device) -> list[str]:
    """Return the dtypes that it makes sense to train in on a device."""
    if not are_fast(torch.bfloat16, device):
        return ["float32"]
    return ["bfloat16"] if device.type == "cuda" else ["float32", "bfloat16"]


def chosen(makers: dict[str, Callable[[], Candidate]], names: list[str] | None) -> dict[str, Callable[[], Candidate]]:
    if unknown := set(names or ()) - makers.keys():
        raise ValueError(f"benchmarks/step.py: --candidates {sorted(unknown)} are none here; choose of {list(makers)}.")
    return {name: make for name, make in makers.items() if not names or name in names}


def batch(text: str) -> tuple[int, int]:
    rows, _, tokens = text.partition("x")
    if not (rows.isdecimal() and tokens.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is no batch; expected rows and tokens, such as 2x128")
    return int(rows), int(tokens)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--models", choices=PRESETS, nargs="+", default=["medium"])
    parser.add_argument(
        "--batches",
        type=batch,
        nargs="+",
        default=[(2, 128), (4, 256)],
        help="rows of a step and rank, x, tokens of a row",
    )
    parser.add_argument("--dtypes", choices=("float32", "bfloat16"), nargs="+", help="default: as the device has it")
    parser.add_argument("--candidates", nargs="+", help="names as in the table; default: all")
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--ranks", type=int, default=2, help="processes to start on a CPU without a launcher")
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    if args.device == "cpu" and args.ranks > 1 and "WORLD_SIZE" not in os.environ:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(args.ranks)]
        settings = {"KINETO_LOG_LEVEL": "99", "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // args.ranks))}
        # For every candidate: memory that is freed stays with the process, or each step would fault it in again.
        settings |= dict.fromkeys(("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"), str(2**32 - 1))
        sys.exit(subprocess.call([*launcher, *sys.argv], env=settings | os.environ))
    measure(args)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
