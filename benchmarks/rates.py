"""What a device can do at most: the rate of a copy and of a matrix product, which other figures are read against.

`python benchmarks/rates.py` on one CUDA GPU; elsewhere with `--device cpu --elements 1000000 --side 256`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from kernels import timed
from step_report import machine, spread, versions

RESULTS = Path(__file__).parent / "results"


def rate(call: Callable[[], Any], amount: int, device: torch.device, repeats: int) -> dict[str, Any]:
    """Return the seconds of a call, and its amount of bytes or operations a second at the median."""
    for _ in range(3):
        call()
    seconds = [timed(call, device) for _ in range(repeats)]
    found = spread([1e3 * x for x in seconds])
    return {"milliseconds": found, "a_second": round(amount / found["median"] * 1e3)}


def facts(device: torch.device) -> dict[str, Any]:
    """Return what is there: the driver as it tells, and what torch knows of the device."""
    if device.type != "cuda":
        return {}
    found = torch.cuda.get_device_properties(device)
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem,power.draw", "--format=csv,noheader"]
    told = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "multiprocessors": found.multi_processor_count,
        "bytes": found.total_memory,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        "nvidia-smi: driver, clocks, power": told,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--elements", type=int, default=2**31, help="bytes of the tensor that is copied")
    parser.add_argument("--side", type=int, default=8192, help="of the square matrices")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    device = torch.device(args.device)
    record: dict[str, Any] = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine(device) | facts(device),
        "versions": versions(),
    }
    source = torch.randint(0, 255, (args.elements,), dtype=torch.uint8, device=device)
    copy = partial(torch.empty_like(source).copy_, source)
    record["copy, bytes"] = rate(copy, 2 * source.nbytes, device, args.repeats)
    for dtype in (torch.bfloat16, torch.float32):
        a, b = (torch.randn(args.side, args.side, device=device, dtype=dtype) for _ in range(2))
        name = f"product, {str(dtype).removeprefix('torch.')}, operations"
        record[name] = rate(partial(torch.mm, a, b, out=torch.empty_like(a)), 2 * args.side**3, device, args.repeats)
    for name, row in record.items():
        if isinstance(row, dict) and "a_second" in row:
            print(f"{name}: {row['a_second']:.3e} a second, {row['milliseconds']['median']:.3f} ms")
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"rates-{args.device}.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
