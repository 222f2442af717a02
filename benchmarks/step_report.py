"""What `step.py` found, as text and as the table of the documentation."""

from __future__ import annotations

import os
import platform
import statistics
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from peers import PEERS

import fzero as fz

# What is timed, and how the table names it.
MEASURES = {"seconds": "", "cpu_seconds_all_ranks": "core-seconds "}

Rows = dict[str, dict[str, Any]]  # by candidate


def spread(seconds: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return {"median": round(middle, 5), "quartile_1": round(low, 5), "quartile_3": round(high, 5)}


def ratios(rows: Rows, name: str) -> dict[str, dict[str, float]]:
    """Return a candidate's medians over those of every candidate of the other systems, by that candidate."""
    return {
        peer: {m: round(rows[name][m]["median"] / rows[peer][m]["median"], 3) for m in MEASURES}
        for variants in PEERS.values()
        for peer in variants
        if peer in rows
    }


def over_system(rows: Rows, name: str, system: str, measure: str) -> float:
    """Return a candidate's median over that of a system's fastest variant."""
    medians = [rows[peer][measure]["median"] for peer in PEERS[system] if peer in rows]
    return rows[name][measure]["median"] / min(medians)


def systems(rows: Rows) -> list[str]:
    return [system for system, variants in PEERS.items() if any(peer in rows for peer in variants)]


def markdown(record: dict[str, Any]) -> str:
    """Return a result as the table of the documentation. Where a system has variants, × is over its fastest."""
    models: dict[str, Rows] = record["models"]
    peers = list(dict.fromkeys(system for rows in models.values() for system in systems(rows)))
    heads = [f"{prefix}× {peer}" for prefix in MEASURES.values() for peer in peers]
    columns = ["model", "candidate", "s a step (quartiles)", *heads, "MiB a rank at rest", "peak"]
    lines = [line(columns), "|" + "---|" * len(columns)]
    for model, rows in models.items():
        for name, row in rows.items():
            times = [f"{over_system(rows, name, peer, m):.2f}" for m in MEASURES for peer in peers]
            sizes = [f"{row[size] / 2**20:.1f}" for size in ("bytes_at_rest", "bytes_peak")]
            lines.append(line([model, name, quartiles(row["seconds"]), *times, *sizes]))
    return "\n".join(lines)


def line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def quartiles(x: dict[str, float]) -> str:
    digits = 3 if x["median"] >= 0.05 else 5
    low, middle, high = (f"{x[name]:.{digits}f}" for name in ("quartile_1", "median", "quartile_3"))
    return f"{middle} ({low} to {high})"


def show(model: str, rows: Rows) -> str:
    """Return one setting's results for a terminal; × is of core-seconds, over a system's fastest variant."""
    peers = systems(rows)
    heads = "".join(f"{'× ' + peer:>12}" for peer in peers)
    text = [f"\n{model:24}{'s a step':>24}{'core-s of all ranks':>24}{heads}{'MiB at rest':>13}{'peak':>8}{'loss':>16}"]
    for name, row in rows.items():
        times = "".join(f"{quartiles(row[m]):>24}" for m in MEASURES)
        over = "".join(f"{over_system(rows, name, peer, 'cpu_seconds_all_ranks'):12.2f}" for peer in peers)
        sizes = f"{row['bytes_at_rest'] / 2**20:13.1f}{row['bytes_peak'] / 2**20:8.1f}"
        losses = f"{row['loss']['first']:.3f} to {row['loss']['last']:.3f}"
        text.append(f"{name:24}{times}{over}{sizes}{losses:>16}")
    return "\n".join(text)


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": torch.__version__, "fzero": fz.__version__}
    try:
        return found | {"deepspeed": metadata.version("deepspeed")}
    except metadata.PackageNotFoundError:
        return found


def machine(device: torch.device) -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    models = (
        [x.split(":")[1].strip() for x in info.read_text().splitlines() if "model name" in x] if info.exists() else []
    )
    found: dict[str, Any] = {"cpu": models[0] if models else platform.processor(), "cores": os.cpu_count()}
    return found | ({"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else {})
