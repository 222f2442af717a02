"""Learning rates as functions of the step tensor.

Each returns a frozen callable: `step` (int32, shape (), steps taken so far) to an fp32 tensor of shape ().
A schedule is traced into the program, so a new step never retraces.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fzero.calls import shown
from fzero.calls.arguments import named, rate_of, whole


@named("fz.schedules.constant")
@dataclass(frozen=True)
class constant:  # noqa: N801 - used as a function
    """The same rate at every step.

    Args:
        value: the rate, 0 or above.

    Raises:
        TypeError, ValueError: it is no number, or negative.

    Example:
        >>> constant(0.1)(torch.tensor(7))
        tensor(0.1000)
    """

    value: float

    def __repr__(self) -> str:
        return shown.made("constant", self, positional=True)

    def __post_init__(self) -> None:
        rate_of("fz.schedules.constant", self.value, name="value")

    def __call__(self, step: Tensor) -> Tensor:
        return torch.full((), self.value, device=step.device)


@named("fz.schedules.linear")
@dataclass(frozen=True)
class linear:  # noqa: N801
    """From `start` to `end` in a straight line over `steps` steps, then `end`.

    Args:
        start: the rate of the first step, 0 or above.
        end: the rate from step `steps` on, 0 or above.
        steps: how many, 1 or above.

    Raises:
        TypeError, ValueError: a number is none, or out of its range.

    Example:
        >>> linear(1.0, 0.0, steps=4)(torch.tensor(1))
        tensor(0.7500)
    """

    start: float
    end: float
    steps: int

    def __repr__(self) -> str:
        return shown.made("linear", self, positional=True)

    def __post_init__(self) -> None:
        rate_of("fz.schedules.linear", self.start, name="start")
        rate_of("fz.schedules.linear", self.end, name="end")
        whole("fz.schedules.linear", "steps", self.steps, least=1)

    def __call__(self, step: Tensor) -> Tensor:
        return self.start + (self.end - self.start) * _progress(step, 0, self.steps)


@named("fz.schedules.warmup_cosine")
@dataclass(frozen=True)
class warmup_cosine:  # noqa: N801
    """Linearly from 0 to `peak` over `warmup` steps, then along a half cosine to `floor` at step `total`.

    The first step already has a rate: `peak / warmup`.

    Args:
        peak: the highest rate.
        warmup: steps of the rise; 0 for none.
        total: steps of the whole run, the rise included.
        floor: the rate at its end.

    Raises:
        TypeError, ValueError: a number is none, or out of its range; the rise is longer than the run.

    Example:
        >>> warmup_cosine(1.0, warmup=2, total=10)(torch.tensor([0, 1, 2, 6, 10]))
        tensor([0.5000, 1.0000, 1.0000, 0.5000, 0.0000])
    """

    peak: float
    warmup: int
    total: int
    floor: float = 0.0

    def __repr__(self) -> str:
        return shown.made("warmup_cosine", self, positional=True)

    def __post_init__(self) -> None:
        _check_run("fz.schedules.warmup_cosine", self.peak, self.floor, self.total, warmup=self.warmup)

    def __call__(self, step: Tensor) -> Tensor:
        wave = 0.5 * (1 + torch.cos(math.pi * _progress(step, self.warmup, self.total)))
        return torch.where(
            step < self.warmup, self.peak * _rising(step, self.warmup), self.floor + (self.peak - self.floor) * wave
        )


@named("fz.schedules.wsd")
@dataclass(frozen=True)
class wsd:  # noqa: N801
    """Warm up, stay, decay: linearly to `peak`, `peak` until `decay` steps before `total`, linearly to `floor`.

    Args:
        peak: the highest rate.
        warmup: steps of the rise; 0 for none.
        decay: steps of the fall, the last of the run.
        total: steps of the whole run, rise and fall included.
        floor: the rate at its end.

    Raises:
        TypeError, ValueError: a number is none, or out of its range; rise and fall are longer than the run.

    Source: Hu et al. 2024, arXiv 2404.06395.

    Example:
        >>> wsd(1.0, warmup=2, decay=4, total=10)(torch.tensor([0, 2, 6, 8, 10]))
        tensor([0.5000, 1.0000, 1.0000, 0.5000, 0.0000])
    """

    peak: float
    warmup: int
    decay: int
    total: int
    floor: float = 0.0

    def __repr__(self) -> str:
        return shown.made("wsd", self, positional=True)

    def __post_init__(self) -> None:
        _check_run("fz.schedules.wsd", self.peak, self.floor, self.total, warmup=self.warmup, decay=self.decay)

    def __call__(self, step: Tensor) -> Tensor:
        falling = self.peak + (self.floor - self.peak) * _progress(step, self.total - self.decay, self.total)
        return torch.where(step < self.warmup, self.peak * _rising(step, self.warmup), falling)


def _check_run(call: str, peak: float, floor: float, total: int, **parts: int) -> None:
    """Raise where a rate is none, or the parts of a run are longer than the run."""
    rate_of(call, peak, name="peak")
    rate_of(call, floor, name="floor")
    whole(call, "total", total, least=1)
    for name, steps in parts.items():
        whole(call, name, steps, least=0)
    if sum(parts.values()) > total:
        text = " + ".join(f"{name}={steps}" for name, steps in parts.items())
        raise ValueError(
            f"{call}: {text} is longer than the run, total={total} steps. `total` counts all steps, the warm-up "
            f"included: make it longer, or the parts shorter."
        )


def _progress(step: Tensor, start: int, end: int) -> Tensor:
    return ((step.to(torch.float32) - start) / max(end - start, 1)).clamp(0.0, 1.0)


def _rising(step: Tensor, warmup: int) -> Tensor:
    return (step.to(torch.float32) + 1) / max(warmup, 1)
