"""Text as bytes: where it comes from, what is held out, and which windows a rank sees at a step."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

NOT_PROSE = {"site-packages", "test", "tests", "encodings", "pydoc_data"}  # others' code, data and tables


def standard_library() -> list[Path]:
    """Return the source files of Python's standard library, in sorted order."""
    root = Path(sysconfig.get_path("stdlib"))
    return sorted(path for path in root.rglob("*.py") if not NOT_PROSE & set(path.relative_to(root).parts))


@dataclass(frozen=True)
class Text:
    """Bytes to train on, and bytes to measure on: the last tenth."""

    train: Tensor
    held_out: Tensor

    @classmethod
    def read(cls, paths: Iterable[Path]) -> Text:
        """Join the files."""
        data = torch.frombuffer(bytearray(b"\n".join(path.read_bytes() for path in paths)), dtype=torch.uint8)
        cut = len(data) * 9 // 10
        return cls(data[:cut], data[cut:])

    def batch(self, rows: int, length: int, *, seed: int, step: int, rank: int) -> Tensor:
        """Return `rows` windows of `length` bytes to train on: a function of (seed, step, rank) and nothing else."""
        starts = np.random.default_rng((seed, step, rank)).integers(self._last(self.train, length), size=rows)
        return windows(self.train, starts, length)

    def held_out_rows(self, rows: int, length: int) -> Tensor:
        """Return `rows` windows spread evenly over what is held out."""
        return windows(self.held_out, np.linspace(0, self._last(self.held_out, length) - 1, rows, dtype=int), length)

    def _last(self, data: Tensor, length: int) -> int:
        if len(data) < length:
            raise SystemExit(f"The text is too short: windows of {length} bytes from a part of {len(data)} bytes.")
        return len(data) - length + 1


def windows(data: Tensor, starts: np.ndarray, length: int) -> Tensor:
    return data[torch.from_numpy(starts)[:, None] + torch.arange(length)].long()
