"""What a user may choose about a program."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

Lower = Literal["graph", "inductor", "cudagraph"]


@dataclass(frozen=True)
class Options:
    """The choices of `fz.jit`, checked. Bytes are a rank's.

    Attributes:
        lower: how the graph is run. `"graph"`: operation by operation, bitwise equal to the function. `"inductor"`:
            compiled into fused kernels at the first call, close to it; on CUDA, without collectives, also recorded at
            the second call and replayed from then on. `"cudagraph"`: the operations of `"graph"`, recorded likewise.
            `None` picks by device: `"graph"` on a CPU, `"inductor"` on CUDA.
        remat: which forward values are made again for the backward: `"none"`, `"block"` for all that a block makes
            inside, or a number of bytes: as many blocks as it takes until what is kept for the backward is no more.
        keep_gathered: bytes of gathered parameters that ZeRO-3 may keep from forward to backward; the others are
            gathered again. `math.inf` keeps all.
        bucket: the most bytes that collectives of one block move in one call; 0 leaves each leaf its own.
        overlap: collectives start early and are waited for late as long as the peak rises by at most this many bytes;
            `None` starts each where it is needed.
        keep_programs: how many programs a function keeps, one for each signature. One more, and that which was not
            used for longest goes, with what it holds; the log says so.
        sizes: `"any"`: the second size of an argument that is no state makes one program for all its sizes, where the
            program is run as `lower="graph"`; with Inductor and CUDA graphs each size has a program of its own.
            `"fixed"`: each size has one always.
    """

    lower: Lower | None = None
    remat: Literal["none", "block"] | int = "none"
    keep_gathered: float = 0
    bucket: int = 128 * 2**20
    overlap: int | None = 0
    keep_programs: int = 64
    sizes: Literal["any", "fixed"] = "any"

    def __post_init__(self) -> None:
        if self.lower not in (None, "graph", "inductor", "cudagraph"):
            raise ValueError(f"fz.jit: lower={self.lower!r} is not known. Use 'graph', 'inductor' or 'cudagraph'.")
        if self.remat not in ("none", "block") and not _is_count(self.remat):
            raise ValueError(f"fz.jit: remat={self.remat!r}; expected 'none', 'block', or a number of bytes.")
        if not (_is_count(self.keep_gathered) or self.keep_gathered == math.inf):
            raise ValueError(f"fz.jit: keep_gathered={self.keep_gathered!r}; expected a number of bytes, or math.inf.")
        if not _is_count(self.bucket):
            raise ValueError(f"fz.jit: bucket={self.bucket!r}; expected a number of bytes, 0 for no buckets.")
        if self.overlap is not None and not _is_count(self.overlap):
            raise ValueError(f"fz.jit: overlap={self.overlap!r}; expected a number of bytes, or None for no overlap.")
        if not _is_count(self.keep_programs) or self.keep_programs == 0:
            raise ValueError(f"fz.jit: keep_programs={self.keep_programs!r}; expected how many, at least 1.")
        if self.sizes not in ("any", "fixed"):
            raise ValueError(f"fz.jit: sizes={self.sizes!r} is not known. Use 'any' or 'fixed'.")

    @staticmethod
    def names() -> tuple[str, ...]:
        """Return the names of the choices."""
        return tuple(f.name for f in dataclasses.fields(Options))


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def takes_any_size(leaves: Sequence[Tensor], options: Options) -> bool:
    """Return whether a program of these inputs may leave sizes open: Inductor and CUDA graphs fix them."""
    return options.sizes == "any" and (options.lower or default_for(leaves)) == "graph"


def default_for(values: Sequence[Any]) -> Lower:
    """Return how a program of these inputs runs where the user has not chosen."""
    on_cuda = any(x.device.type == "cuda" for x in values if isinstance(x, Tensor))
    return "inductor" if on_cuda else "graph"
