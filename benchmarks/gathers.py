"""What a gather of parameters costs on gloo: messages between pairs of ranks against gloo's own coalesced all-gather.

    python benchmarks/gathers.py                          # two and four ranks on this machine's cores

The two take turns. Milliseconds are those of rank 0: of a clock, and of the cores for all of its threads.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing import get_context
from torch.multiprocessing.spawn import spawn

import fzero as fz
from fzero._torch import c10d
from fzero.ranks import pairs

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from step_report import machine, versions

RESULTS = Path(__file__).parent / "results"
# Elements of a rank's fp32 pieces: a block of the GPT of 25 M parameters on two ranks, and single leaves.
SIZES = {
    "a block of 1.6 M": (704512, 352256, 393216, 131072, 256, 256),
    "4 M": (1 << 22,),
    "256 K": (1 << 18,),
    "16 K": (1 << 14,),
    "8 × 256": (256,) * 8,
}


def measure(rank: int, ranks: int, path: str, repeats: int, line: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=ranks)
    group = fz.make_mesh("cpu").group("data")
    ways: dict[str, Callable[[list[Tensor]], list[Tensor]]] = {
        "gloo": lambda x: [c10d.wait_tensor(y) for y in c10d.all_gather_into_tensor_coalesced(x, ranks, group)],
        "pairs": lambda x: [pairs.wait(y) for y in pairs.all_gather_coalesced(x, ranks, group)],
    }
    found: dict[str, Any] = {}
    for name, sizes in SIZES.items():
        pieces = [torch.randn(size) for size in sizes]
        for first, second in zip(*(way(pieces) for way in ways.values()), strict=True):
            assert torch.equal(first, second)
        times: dict[str, dict[str, list[float]]] = {way: {"clock": [], "cores": []} for way in ways}
        for _ in range(repeats):
            for way, gather in ways.items():
                dist.barrier()
                clock, cores = time.perf_counter(), time.process_time()
                gather(pieces)
                times[way]["cores"].append(1e3 * (time.process_time() - cores))
                times[way]["clock"].append(1e3 * (time.perf_counter() - clock))
        found[name] = {
            way: {kind: round(statistics.median(x), 3) for kind, x in own.items()} for way, own in times.items()
        }
    if rank == 0:
        line.put(found)
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    # Memory that is freed stays with the process, or each gather would fault it in again; read as a process starts.
    settings = dict.fromkeys(("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"), str(2**32 - 1))
    os.environ.update(settings)
    record: dict[str, Any] = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine(torch.device("cpu")),
        "versions": versions(),
        "repeats": args.repeats,
        "milliseconds": {},
    }
    context = get_context("spawn")
    args.out.mkdir(parents=True, exist_ok=True)
    for ranks in args.ranks:
        line, store = context.SimpleQueue(), args.out / f".gathers-store-{os.getpid()}-{ranks}"
        spawn(measure, (ranks, str(store), args.repeats, line), nprocs=ranks)
        store.unlink(missing_ok=True)
        record["milliseconds"][f"{ranks} ranks"] = line.get()
    print(markdown(record))
    (args.out / "gathers-cpu.json").write_text(json.dumps(record, indent=1) + "\n")


def markdown(record: dict[str, Any]) -> str:
    """Return a result as the table of the documentation."""
    lines = [
        "| ranks | pieces | ms of a core: gloo | pairs | ms of a clock: gloo | pairs |",
        "|---|---|---|---|---|---|",
    ]
    for ranks, rows in record["milliseconds"].items():
        for name, row in rows.items():
            cells = [f"{row[way][kind]:.2f}" for kind in ("cores", "clock") for way in ("gloo", "pairs")]
            lines.append(f"| {ranks} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
