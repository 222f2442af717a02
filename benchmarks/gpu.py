"""Everything there is to see on one GPU, in parts, each with its own time limit: under nine minutes in all.

    make gpu                                            # one CUDA GPU
    make gpu DEVICE=cpu                                 # does every part run? at tiny sizes, its results thrown away
    python benchmarks/gpu.py --parts rates step         # some of it, where there is no virtual environment to make

A part is a process. What it prints goes into a log, what it finds into a JSON file as it ends, so a part that hangs or
breaks costs its limit and nothing else. Tests that fail are printed as they do. Parts go from what others are read
against to what takes longest.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


@dataclass(frozen=True)
class Part:
    """One thing to run.

    Attributes:
        name: what it is called here; its log is NAME.log.
        command: arguments of Python. `OUT` stands for the folder of results, `DEVICE` for the device.
        tiny: more of them on a CPU.
        seconds: until it is stopped.
        needs: a module without which it is left out.
    """

    name: str
    command: tuple[str, ...]
    tiny: tuple[str, ...]
    seconds: int
    needs: str = "torch"


def script(name: str, *more: str) -> tuple[str, ...]:
    return (f"benchmarks/{name}.py", "--device", "DEVICE", *more)


PYTEST = ("-v", "-n4", "-p", "no:benchmark", "-p", "tests.failures_at_once", "--tb=short", "--no-header")
TINY_MODEL = ("--models", "tiny", "--batches", "2x32", "--repeats", "3", "--ranks", "1")
PARTS = (
    Part("rates", script("rates", "--out", "OUT"), ("--elements", "1000000", "--side", "256"), 20),
    Part("tests", ("-m", "pytest", "-m", "gpu", *PYTEST, "tests"), ("--collect-only",), 110),
    Part("kernels", script("kernels", "--out", "OUT", "--repeats", "15"), ("--elements", "100000"), 40),
    Part(
        "step",
        script("step", "--out", "OUT", "--models", "base", "--batches", "8x1024", "--repeats", "15"),
        TINY_MODEL,
        140,
    ),
    Part(
        "profile",
        script("step_profile", "--out", "OUT"),
        ("--model", "tiny", "--batch", "2x32"),
        40,
    ),
    Part("jax", ("benchmarks/jax_step.py", "--out", "OUT"), ("--model", "tiny", "--batch", "2x32"), 40, "optax"),
    Part(
        "published",
        script("published_gpu", "--out", "OUT", "--policies", "bf16", "--repeats", "8"),
        ("--layers", "2", "--hidden", "64", "--vocabulary", "500", "--tokens", "64", "--adam", "torch"),
        110,
    ),
    Part("lowering", script("lowering", "--repeats", "10", "--output", "OUT/lowering-DEVICE.json"), (), 20),
)

# Times a part's limit that it may take where it is only rehearsed.
PATIENCE = 5


def run(part: Part, device: str, out: Path, logs: Path) -> str:
    """Run a part to its end or its limit, and return how it ended."""
    if importlib.util.find_spec(part.needs) is None:
        return f"left out: {part.needs} is not installed"
    named = [x.replace("DEVICE", device).replace("OUT", str(out)) for x in part.command]
    command = [sys.executable, *named, *(part.tiny if device == "cpu" else ())]
    # Repeated names: the last one counts, so a tiny size overrides the real one.
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}", "PYTHONUNBUFFERED": "1"}
    limit = part.seconds if device == "cuda" else PATIENCE * part.seconds
    start = time.monotonic()
    with (logs / f"{part.name}.log").open("w") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return f"stopped at its limit of {limit} s"
        finally:
            seconds = time.monotonic() - start
    return f"{'done' if code == 0 else f'FAILED with {code}'} in {seconds:.0f} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--parts", nargs="+", choices=[part.name for part in PARTS], help="default: all")
    parser.add_argument("--out", type=Path, help="folder of results; default: benchmarks/results, on a CPU out/gpu")
    parser.add_argument("--logs", type=Path, default=ROOT / "out" / "gpu", help="folder of logs")
    parser.add_argument("--tail", type=int, default=12, help="lines of each log to show")
    args = parser.parse_args()
    out: Path = args.out or (RESULTS if args.device == "cuda" else ROOT / "out" / "gpu")
    for folder in (out, args.logs):
        folder.mkdir(parents=True, exist_ok=True)
    endings: dict[str, str] = {}
    for part in PARTS:
        if args.parts and part.name not in args.parts:
            continue
        endings[part.name] = run(part, args.device, out.resolve(), args.logs)
        print(f"== {part.name}: {endings[part.name]}", flush=True)
        log = args.logs / f"{part.name}.log"
        if args.tail and log.exists():
            print("\n".join(line[:200] for line in log.read_text().splitlines()[-args.tail :]), flush=True)
    print("\n".join(f"{name:10} {ending}" for name, ending in endings.items()))
    sys.exit(any("FAILED" in ending or "stopped" in ending for ending in endings.values()))


if __name__ == "__main__":
    main()
