"""What programs tell of a step without running it, how long that takes, and how near it is to a run.

    python benchmarks/programs.py [--parts passes layouts worlds depths runs] [--out FILE]

    passes    the peak after each pass: a GPT of 124 M parameters, ZeRO-3 on 8 ranks
    layouts   the collectives of a step of it in each layout
    worlds    a report on Llama 3.1 8B on 8 ranks, and 405B on 16,384, from this machine
    depths    seconds of tracing and passes over the depth of a GPT of 1.3 B parameters and half and twice that
    runs      the peak that is foretold over the one that the allocator sees, in this process

No world but that of `runs` exists: its states have no memory. Every part is traced for CPUs.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fzero as fz
from fzero.display.listing import amount
from fzero.program.program import Program

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from footprint import footprint
from gpt import GPT, PRESETS, Config
from llama import SHAPES, Llama
from peers import Candidate

RESULT = Path(__file__).parent / "results" / "programs.json"

GPT_124M = Config(width=768, depth=12, heads=12, vocabulary=50257)
GPT_1B = Config(width=2048, depth=24, heads=16, vocabulary=50257)
LLAMAS = {"8B": 8, "405B": 16384}  # and the ranks that each is traced for
DEVICES = ("H100", "H200")

Rows = list[dict[str, Any]]


def training(model: Callable[[], nn.Module], mesh: fz.Mesh, stage: int = 3, **options: Any) -> tuple[fz.State, Any]:
    """Return a state and its step: AdamW, bfloat16, no clip."""
    apply, _ = fz.functional(model)
    state = fz.init(model, fz.adamw(1e-3), mesh, fz.zero(stage), policy="bf16")

    def loss(params: Any, text: Tensor) -> Tensor:
        return F.cross_entropy(apply(params, text[:, :-1]).flatten(0, 1).float(), text[:, 1:].flatten())

    return state, fz.train_step(loss, **options)


def traced(model: Callable[[], nn.Module], ranks: int, tokens: int, **options: Any) -> tuple[fz.State, Program, float]:
    """Return the state and program of a world that does not exist, and the seconds that tracing and passes took."""
    state, step = training(model, fz.make_mesh("cpu", data=ranks, simulate=True), **options)
    text = torch.empty(1, tokens + 1, dtype=torch.int64, device="meta")
    start = time.perf_counter()
    program = fz.trace(step)(state, text)
    return state, program, time.perf_counter() - start


def passes() -> Rows:
    rows = []
    for tokens, remat in ((128, "none"), (128, "block"), (1024, "none"), (1024, "block")):
        _, program, _ = traced(lambda: GPT(GPT_124M), 8, tokens, remat=remat)
        memory = program.memory()
        stages = [asdict(stage) for stage in program.stages]
        by_kind = dict(memory.by_kind)
        rows.append({"tokens": tokens, "remat": remat, "stages": stages, "at_rest": memory.at_rest, "by_kind": by_kind})
    return rows


def layouts() -> Rows:
    rows = []
    for stage, keep in ((0, 0), (1, 0), (3, 0), (3, math.inf)):
        state, program, _ = traced(lambda: GPT(GPT_124M), 8, 128, stage=stage, keep_gathered=keep)
        traffic = program.traffic()
        weights = 2 * sum(map(math.prod, state.params.shapes))
        rows.append(
            {
                "layout": f"fz.zero({stage})" + (", kept" if keep else ""),
                "calls": dict(traffic.calls),
                "received": dict(traffic.by_collective),
                "over_parameters": round(traffic.total / weights * 8 / 7, 4),
            }
        )
    return rows


def worlds() -> Rows:
    rows = []
    for name, ranks in LLAMAS.items():
        begin, cpu = time.perf_counter(), time.process_time()
        state, program, seconds = traced(lambda name=name: Llama(SHAPES[name]), ranks, 8192, remat="block")  # type: ignore[misc]
        program.report()
        estimates = {device: program.estimate(device) for device in DEVICES}
        rows.append(
            {
                "model": name,
                "ranks": ranks,
                "parameters": sum(map(math.prod, state.params.shapes)),
                "seconds": round(time.perf_counter() - begin, 2),
                "cpu_seconds": round(time.process_time() - cpu, 2),
                "trace_and_passes": round(seconds, 2),
                "nodes": program.stages[-1].nodes,
                "at_rest": program.memory().at_rest,
                "peak": program.memory().peak,
                "received": program.traffic().total,
                "flops": program.flops(),
                "step": {device: round(found.seconds, 3) for device, found in estimates.items()},
                "exposed": {device: round(found.exposed, 3) for device, found in estimates.items()},
                "utilization": {device: round(found.utilization, 3) for device, found in estimates.items()},
            }
        )
    return rows


def depths() -> Rows:
    rows = []
    for depth in (12, 24, 48):
        config = Config(GPT_1B.width, depth, GPT_1B.heads, GPT_1B.vocabulary)
        cpu = time.process_time()
        _, program, seconds = traced(lambda config=config: GPT(config), 1024, 1024)  # type: ignore[misc]
        found = {"seconds": round(seconds, 2), "cpu_seconds": round(time.process_time() - cpu, 2)}
        in_passes = round(sum(stage.seconds for stage in program.stages), 2)
        rows.append({"depth": depth, **found, "in_passes": in_passes, "nodes": program.stages[-1].nodes})
    return rows


def runs() -> Rows:
    rows = []
    text = torch.randint(0, 256, (4, 257), generator=torch.Generator().manual_seed(0))
    for preset in ("small", "medium"):
        for remat in ("none", "block"):

            def make(preset: str = preset, remat: str = remat) -> Candidate:
                state, step = training(lambda: GPT(PRESETS[preset]), fz.make_mesh("cpu"), remat=remat)

                def advance(rows: Tensor) -> Tensor:
                    nonlocal state
                    state, metrics = step(state, rows)
                    loss: Tensor = metrics["loss"]
                    return loss

                return Candidate(advance)

            state, step = training(lambda preset=preset: GPT(PRESETS[preset]), fz.make_mesh("cpu"), remat=remat)  # type: ignore[misc]
            foretold = fz.trace(step)(state, text).memory().peak
            del state, step
            _, measured = footprint(make, text)
            measured += text.nbytes  # it was there before
            over = round(foretold / measured, 4)
            rows.append(
                {"model": preset, "remat": remat, "foretold": foretold, "measured": measured, "foretold_over": over}
            )
    return rows


PARTS: dict[str, Callable[[], Rows]] = {
    "passes": passes,
    "layouts": layouts,
    "worlds": worlds,
    "depths": depths,
    "runs": runs,
}


def tables(record: dict[str, Any]) -> dict[str, str]:
    """Return a result as the tables of the documentation, by part."""
    texts = {}
    if rows := record.get("passes"):
        names = [stage["name"] for stage in rows[0]["stages"]]
        peaks = [
            [f"{row['tokens']:,}", row["remat"], *(amount(s["peak"]) for s in row["stages"]), amount(row["at_rest"])]
            for row in rows
        ]
        texts["passes"] = table(["tokens", "remat", *names, "at rest"], peaks)
    if rows := record.get("layouts"):
        kinds = ("all_gather", "reduce_scatter")
        cells = [
            [
                f"`{row['layout']}`",
                *(f"{row['calls'].get(k, 0)}, {amount(row['received'].get(k, 0))}" for k in kinds),
                f"{row['over_parameters']:.3f}·P",
            ]
            for row in rows
        ]
        texts["layouts"] = table(["layout", *(f"{kind}: calls, bytes" for kind in kinds), "in all × N/(N − 1)"], cells)
    if rows := record.get("worlds"):
        heads = ["Llama 3.1", "ranks", "s to report", "at rest", "peak", "received a step", "TFLOP a step"]
        heads += [f"step on {device}, at best" for device in DEVICES]
        cells = []
        for row in rows:
            cost = [*(amount(row[k]) for k in ("at_rest", "peak", "received")), f"{row['flops'] / 1e12:,.0f}"]
            best = [f"{row['step'][device]:.2f} s" for device in DEVICES]
            cells.append([row["model"], f"{row['ranks']:,}", f"{row['seconds']:.0f}", *cost, *best])
        texts["worlds"] = table(heads, cells)
    if rows := record.get("depths"):
        cells = [
            [str(row["depth"]), f"{row['nodes']:,}", f"{row['seconds']:.1f}", f"{row['in_passes']:.1f}"] for row in rows
        ]
        texts["depths"] = table(
            ["layers of width 2048", "operations", "s to trace, passes included", "s of passes"], cells
        )
    if rows := record.get("runs"):
        sizes = [[*(amount(row[k]) for k in ("foretold", "measured")), f"{row['foretold_over']:.3f}"] for row in rows]
        cells = [[row["model"], row["remat"], *own] for row, own in zip(rows, sizes, strict=True)]
        texts["runs"] = table(["model", "remat", "peak foretold", "measured", "ratio"], cells)
    return texts


def table(heads: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (heads, ["---"] * len(heads), *rows))


def about() -> dict[str, Any]:
    return {
        "torch": torch.__version__,
        "fzero": fz.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "date": datetime.now(UTC).date().isoformat(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    record = about()
    for name in args.parts:
        record[name] = PARTS[name]()
        print(tables({name: record[name]})[name], end="\n\n", flush=True)
    args.out.parent.mkdir(exist_ok=True)
    args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
