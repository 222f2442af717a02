"""Loss scaling: how the factor that lifts fp16 gradients above their underflow finds its size.

The scale is a tensor of the training state and moves inside the step, without the host: a pullback multiplies
cotangents by it and records it in the gradients' factor, and the update that sees the gradients moves it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fzero.calls import shown
from fzero.errors import PolicyError


@dataclass(frozen=True)
class LossScale:
    """A loss scale that finds its size by itself.

    Where a gradient is not finite the step is skipped and the scale multiplied by `backoff`; after `interval` finite
    steps in a row it is multiplied by `growth`.

    Attributes:
        initial: the first scale. Above 2^15 the fp16 cotangent of an fp16 output overflows.
        growth: above 1, or 1 for a scale that never grows.
        backoff: between 0 and 1.
        interval: finite steps in a row before the scale grows.
        hysteresis: overflows in a row that it takes before the scale is lowered.
        smallest: the scale is never lowered below.

    Raises:
        PolicyError: a number is out of its range.

    Source: Micikevicius et al. 2018, arXiv 1710.03740; intervals and names as in torch's and DeepSpeed's scalers.

    Example:
        >>> LossScale(initial=1024.0).backoff
        0.5
    """

    initial: float = 2.0**15
    growth: float = 2.0
    backoff: float = 0.5
    interval: int = 2000
    hysteresis: int = 1
    smallest: float = 1.0

    def __repr__(self) -> str:
        return shown.made("LossScale", self)

    def __post_init__(self) -> None:
        for name in ("initial", "growth", "backoff", "interval", "hysteresis", "smallest"):
            if not isinstance(getattr(self, name), int | float):
                raise PolicyError(f"fz.LossScale: {name}={getattr(self, name)!r}; expected a number.")
        for name, fits, range_ in (
            ("initial", 0 < self.initial < float("inf"), "above 0 and finite"),
            ("growth", 1 <= self.growth < float("inf"), "1 or above, and finite"),
            ("backoff", 0 < self.backoff <= 1, "above 0 and at most 1"),
            ("interval", self.interval >= 1, "1 or above"),
            ("hysteresis", self.hysteresis >= 1, "1 or above"),
            ("smallest", 0 < self.smallest <= self.initial, f"above 0 and at most initial={self.initial}"),
        ):
            if not fits:
                raise PolicyError(f"fz.LossScale: {name}={getattr(self, name)!r}; expected a number {range_}.")

    def start(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the first `(scale, streak)`: fp32 and int32, of shape ()."""
        scale = torch.full((), self.initial, dtype=torch.float32, device=device)
        return scale, torch.zeros((), dtype=torch.int32, device=device)

    def after(self, scale: Tensor, streak: Tensor, finite: Tensor) -> tuple[Tensor, Tensor]:
        """Return the `(scale, streak)` of the next step.

        Args:
            scale: fp32 of shape ().
            streak: int32 of shape (): finite steps since the scale last moved; negative, overflows in a row that
                have not moved it yet.
            finite: bool of shape (): whether this step's gradients were.
        """
        streak = torch.where(finite, streak.clamp(min=0) + 1, streak.clamp(max=0) - 1)
        grows, shrinks = streak >= self.interval, streak <= -self.hysteresis
        grown = scale * self.growth
        grown = torch.where(torch.isfinite(grown), grown, scale)
        shrunk = (scale * self.backoff).clamp(min=self.smallest)
        moved = torch.where(grows, grown, torch.where(shrinks, shrunk, scale))
        return moved, torch.where(grows | shrinks, 0, streak).to(torch.int32)
