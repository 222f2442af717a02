"""What is seen of a run: its speed and memory while it goes, its losses as a picture afterwards."""

from __future__ import annotations

import json
import resource
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure


class Meter:
    """Counts tokens per second from the second step on: the first is traced and compiled."""

    def __init__(self, tokens_a_step: int) -> None:
        self.tokens_a_step = tokens_a_step
        self.steps = 0
        self.seconds = 0.0

    def step(self, seconds: float) -> str:
        """Count one step; return what there is to say."""
        self.steps += 1
        self.seconds += seconds if self.steps > 1 else 0.0
        return f"{self}"

    def __str__(self) -> str:
        speed = (self.steps - 1) * self.tokens_a_step / self.seconds if self.seconds else 0.0
        return f"{speed:,.0f} tokens/s, {peak_memory() / 2**20:,.0f} MiB at most"


def peak_memory() -> int:
    """Return the most bytes that this process held: allocated on CUDA where that is in use, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@dataclass
class Curve:
    """Losses in nats per byte, as pairs (step, loss)."""

    train: list[tuple[int, float]] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)

    def write(self, path: Path, about: dict[str, Any]) -> None:
        """Write the numbers as JSON, with what they are of."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({**about, "train": self.train, "held_out": self.held_out}) + "\n")

    def plot(self, path: Path) -> None:
        """Write the curve as a PNG."""
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.subplots()
        axes.plot(*zip(*self.train, strict=True), color="0.7", label="training batch")
        axes.plot(*zip(*self.held_out, strict=True), "o-", color="C0", label="held-out text")
        axes.set(xlabel="step", ylabel="loss (nats per byte)", ylim=(0, None))
        axes.legend(frameon=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
