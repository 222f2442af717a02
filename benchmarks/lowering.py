"""What a call of an operator costs in a lowered program, against eager PyTorch.

    python benchmarks/lowering.py [--device cuda]

A chain of 1,000 operations on 8 × 8 tensors, where hardly anything but overhead is left: as Python code that calls
PyTorch; as the program that `lower="graph"` makes of it; and as the same program calling operators of `torch.ops`,
which is what it would do without further thought. The three take turns. Time is that of the calling thread's core: on
CUDA, of the launches.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from fzero.program.graph.trace import graph_of
from fzero.program.lower.python import lower_graph

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from step_report import machine, versions

RESULTS = Path(__file__).parent / "results"
LENGTH = 1000

CHAINS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": lambda x, y: x + y,
    "mm": lambda x, y: x @ y,
    "view": lambda x, y: x.view(8, 8),
    "sum": lambda x, y: x.sum(0, keepdim=True).expand(8, 8),
    "gelu": lambda x, y: torch.nn.functional.gelu(x),
    "layer_norm": lambda x, y: torch.nn.functional.layer_norm(x, (8,)),
}

Run = Callable[[list[Tensor]], list[Tensor]]


def candidates(operation: Callable[[Tensor, Tensor], Tensor], inputs: list[Tensor]) -> dict[str, Run]:
    """Return the chain of an operation in three forms."""

    def eager(given: list[Tensor]) -> list[Tensor]:
        x, y = given
        for _ in range(LENGTH):
            x = operation(x, y)
        return [x]

    module = graph_of(lambda x, y: eager([x, y]), inputs)  # as traced: no pass has put anything in place
    return {"eager": eager, "graph": lower_graph(module), "torch.ops": through_torch_ops(module)}


def through_torch_ops(module: fx.GraphModule) -> Run:
    """Return the graph lowered with each line calling an operator of `torch.ops`: nothing is known of its arguments."""
    graph, mapping = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in module.graph.nodes:
        mapping[node] = graph.node_copy(node, mapping.__getitem__)
        mapping[node].meta = {}
    return lower_graph(fx.GraphModule(torch.nn.Module(), graph))


def microseconds(runs: dict[str, Run], inputs: list[Tensor], repeats: int) -> dict[str, list[float]]:
    """Return what one operation takes in each form, repeat by repeat."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 3):
        names = list(runs)[repeat % len(runs) :] + list(runs)[: repeat % len(runs)]
        for name in names:
            synchronize(inputs[0])
            start = time.thread_time()
            with torch.no_grad():
                runs[name](inputs.copy())
            if repeat >= 3:  # the first ones warm up
                found[name].append((time.thread_time() - start) / LENGTH * 1e6)
    return found


def synchronize(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize()


def measure(device: torch.device, repeats: int) -> dict[str, Any]:
    """Return the whole measurement."""
    inputs = [torch.randn(8, 8, device=device) * 0.1 for _ in range(2)]
    rows = {}
    for name, operation in CHAINS.items():
        runs = candidates(operation, inputs)
        rows[name] = {
            form: {"median": round(statistics.median(times), 3), "least": round(min(times), 3)}
            for form, times in microseconds(runs, inputs, repeats).items()
        }
    date = datetime.now(UTC).date().isoformat()
    return {"date": date, "machine": machine(device), "versions": versions(), "microseconds": rows}


def markdown(record: dict[str, Any]) -> str:
    """Return a measurement as a table: microseconds an operation, the median and the least of the repeats."""
    lines = [
        '| µs of CPU time an operation, median (least) | eager | `lower="graph"` | through `torch.ops` |',
        "|---|---|---|---|",
    ]
    for name, row in record["microseconds"].items():
        cells = [f"{row[form]['median']:.2f} ({row[form]['least']:.2f})" for form in ("eager", "graph", "torch.ops")]
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--output", type=Path, help="default: results/lowering-DEVICE.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    record = measure(torch.device(args.device), args.repeats)
    print(markdown(record))
    output = args.output or RESULTS / f"lowering-{args.device}.json"
    output.parent.mkdir(exist_ok=True)
    output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
