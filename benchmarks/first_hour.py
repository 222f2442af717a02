"""What the first hour costs: parts by name, each a function that returns its figures.

    python benchmarks/first_hour.py            every part
    python benchmarks/first_hour.py sizes      what a new size of the batch costs, as CPU time
    python benchmarks/first_hour.py imports    what `import fzero` adds to `import torch`, as CPU time
    python benchmarks/first_hour.py demo       `make demo` from start to end, and a step of it
    python benchmarks/first_hour.py vision     `make demo-vision` from start to end
    python benchmarks/first_hour.py suite      `make test`, with cold compiler caches

With `--before PATH` imports, demo and suite do the same in an older checkout, in the same run. The older demo runs a
few steps only, from which its 500 steps of 16 rows are told; today's has 450 of 12.

Figures go into `benchmarks/results/first-hour.json`, part by part; those of parts that were not run stay.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from step_report import machine, versions

import fzero as fz

HERE = Path(__file__).parents[1]
RESULT = Path(__file__).parent / "results" / "first-hour.json"

Batch = Callable[[int], dict[str, Tensor]]


def sizes(repeats: int = 5) -> dict[str, Any]:
    """Return, for two models, the CPU seconds of a retrace, of the second size, and of a third one.

    A step of the same sizes that has run before is taken off, so that what is left is what the size costs.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return {name: _costs_of_sizes(*make(), repeats) for name, make in (("mlp", _mlp), ("llama", _llama))}
    finally:
        torch.set_num_threads(threads)


def _mlp() -> tuple[Callable[[], nn.Module], Callable[..., Tensor], Batch]:
    def model() -> nn.Module:
        layers = [layer for _ in range(9) for layer in (nn.Linear(64, 64), nn.ReLU())]
        return nn.Sequential(*layers, nn.Linear(64, 10, bias=False))

    apply, _ = fz.functional(model)

    def loss(params: Any, batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(apply(params, batch["x"]), batch["y"])

    return model, loss, lambda i: {"x": torch.randn(8 + 3 * i, 64), "y": torch.randint(0, 10, (8 + 3 * i,))}


def _llama() -> tuple[Callable[[], nn.Module], Callable[..., Tensor], Batch]:
    from transformers import LlamaConfig, LlamaForCausalLM

    widths: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    config = LlamaConfig(vocab_size=97, num_hidden_layers=2, max_position_embeddings=256, **widths)
    apply, _ = fz.functional(LlamaForCausalLM(config))

    def loss(params: Any, batch: dict[str, Tensor]) -> Tensor:
        found: Tensor = apply(params, **batch).loss
        return found

    def batch(i: int) -> dict[str, Tensor]:
        ids = torch.randint(0, 97, (2 + i % 3, 16 + 2 * i))
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}

    return lambda: LlamaForCausalLM(config), loss, batch


def _costs_of_sizes(
    model: Callable[[], nn.Module], loss: Callable[..., Tensor], batch: Batch, repeats: int
) -> dict[str, Any]:
    found: dict[str, list[float]] = {"retrace": [], "second": [], "third": [], "steady": []}
    for i in range(repeats + 1):
        fixed, opened = (fz.train_step(loss, sizes=choice) for choice in ("fixed", "any"))
        state = fz.init(model, fz.adamw(1e-3), policy="fp32")
        rows = [batch(4 * i), batch(4 * i + 1), batch(4 * i + 2)]
        state, _ = fixed(state, rows[0])
        state, retrace = _timed(fixed, state, rows[1])
        state, _ = opened(state, rows[0])
        state, second = _timed(opened, state, rows[1])
        state, third = _timed(opened, state, rows[2])
        state, steady = _timed(opened, state, rows[2])
        if i:  # the first round imports and compiles
            row = {"retrace": retrace - steady, "second": second - steady, "third": third - steady, "steady": steady}
            for name, seconds in row.items():
                found[name].append(seconds)
    middle = {name: statistics.median(values) for name, values in found.items()}
    ratios = {f"{name}_over_retrace": middle[name] / middle["retrace"] for name in ("second", "third")}
    return {"cpu_seconds": middle, **ratios, "spread": {name: (min(v), max(v)) for name, v in found.items()}}


def _timed(step: Callable[..., Any], state: Any, batch: Any) -> tuple[Any, float]:
    start = time.process_time()
    state, _ = step(state, batch)
    return state, time.process_time() - start


_IMPORT = """
import gc, sys, time
start = time.process_time()
import torch
if "uncollected" in sys.argv:
    gc.disable()
between = time.process_time()
import fzero
print(between - start, time.process_time() - between)
"""


def imports(before: Path | None = None, repeats: int = 9) -> dict[str, Any]:
    """Return medians of the CPU seconds of `import torch`, and of `import fzero` after it, each in a fresh process.

    `uncollected` is the same with Python's garbage collector off: importing torch makes a full collection due, which
    comes while fzero is imported.
    """
    checkouts = {"now": HERE, "uncollected": HERE} | ({} if before is None else {"before": before})
    rows: dict[str, list[list[float]]] = {name: [] for name in checkouts}
    for _ in range(repeats + 1):  # the first run of each writes byte code
        for name, folder in checkouts.items():
            environment = {**os.environ, "PYTHONPATH": str(folder.resolve()), "PYTHONDONTWRITEBYTECODE": ""}
            command = [sys.executable, "-c", _IMPORT, name]  # which looks for fzero where it runs
            run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, check=True)
            rows[name].append([float(x) for x in run.stdout.split()])
    medians = {name: [statistics.median(column) for column in zip(*of[1:], strict=True)] for name, of in rows.items()}
    return {name: {"torch": torch_s, "fzero": fzero_s} for name, (torch_s, fzero_s) in medians.items()}


def demo(before: Path | None = None) -> dict[str, Any]:
    """Return the seconds of `make demo`, wall and CPU, and of one step of it, here and in an older checkout."""
    found: dict[str, Any] = {"now": _ran(HERE, "examples/train_gpt.py")}
    for name, folder, short, long in (("now", HERE, 5, 45), ("before", before, 2, 8)):
        if folder is not None:
            few, more = (
                _ran(folder, "examples/train_gpt.py", "--steps", str(n), "--sample", "1") for n in (short, long)
            )
            step = {key: (more[key] - few[key]) / (long - short) for key in few}
            found.setdefault(name, {})["step"] = step
    if "before" in found:
        found["before"] |= {"told_from_steps": {key: 500 * x for key, x in found["before"]["step"].items()}}
    return found


def vision(before: Path | None = None) -> dict[str, Any]:
    """Return the seconds of `make demo-vision`, wall and CPU."""
    return {"now": _ran(HERE, "examples/vision_language.py")}


def suite(before: Path | None = None) -> dict[str, Any]:
    """Return the seconds of `make test`, wall and CPU, and what it says, here and in an older checkout."""
    folders = {"now": HERE} | ({} if before is None else {"before": before})
    found = {}
    for name, folder in folders.items():
        said: list[str] = []
        workers = re.findall(r"pytest -n (\d+)", (folder / "Makefile").read_text())[0]
        seconds = _ran(folder, "-m", "pytest", "-n", workers, "--dist", "worksteal", "-q", said=said)
        found[name] = seconds | {"said": next((line for line in reversed(said) if re.search(r" in \d", line)), "")}
        print(name, found[name], flush=True)
    return found


def _ran(folder: Path, *command: str, said: list[str] | None = None) -> dict[str, float]:
    """Run Python in a checkout, with compiler caches of its own; return the seconds that it took."""
    with tempfile.TemporaryDirectory() as scratch:
        caches = {name: f"{scratch}/{name}" for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")}
        environment = {**os.environ, "PYTHONPATH": str(folder.resolve()), **caches}
        start, used = time.perf_counter(), _used()
        run = subprocess.run([sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True)
        if said is None and run.returncode:
            raise SystemExit(run.stderr)
        if said is not None:
            said += run.stdout.splitlines()
            print("\n".join(line for line in said if line.startswith(("FAILED", "ERROR"))), flush=True)
    return {"seconds": time.perf_counter() - start, "cpu_seconds": _used() - used}


def _used() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


PARTS: dict[str, Callable[..., dict[str, Any]]] = {
    "sizes": sizes,
    "imports": imports,
    "demo": demo,
    "vision": vision,
    "suite": suite,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; default: all")
    parser.add_argument("--before", type=Path, metavar="PATH", help="an older checkout")
    args = parser.parse_args()
    known = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    about = {
        "machine": machine(torch.device("cpu")),
        "versions": versions(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }
    for name in args.parts or PARTS:
        figures = PARTS[name]() if name == "sizes" else PARTS[name](args.before)
        known[name] = {**about, **figures}
        print(name, json.dumps(known[name], indent=1), flush=True)
        RESULT.parent.mkdir(parents=True, exist_ok=True)
        RESULT.write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    main()
