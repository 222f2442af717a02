"""What a pass bought: a program after it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """A program after one pass.

    Attributes:
        name: the pass; `"trace"` for what came in.
        peak: the most bytes alive at once on this rank, what is at rest included.
        received: bytes that this rank receives.
        nodes: operations, those of loop bodies counted once.
        collectives: calls of collectives, those in loop bodies once a round.
        seconds: what the pass took.
    """

    name: str
    peak: int
    received: int
    nodes: int
    collectives: int
    seconds: float
