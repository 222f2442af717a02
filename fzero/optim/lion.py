"""Lion: the sign of an interpolated momentum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from fzero.calls.arguments import named, number, rate_of
from fzero.kernels import ops
from fzero.kernels.update import Update
from fzero.optim.elementwise import Elementwise
from fzero.optim.masks import Mask, mask_of
from fzero.optim.moments import Moment
from fzero.optim.step import Rate


class LionState(NamedTuple):
    """The running mean of gradients."""

    m: Moment


def formula(values: ops.Value, gradient: ops.Value, scalars: ops.Value, numbers: ops.Value) -> tuple[Any, Any]:
    """What one element becomes, in torch and in Triton: see `fzero.kernels.ops`."""
    p, m = values
    decay, lr, factor = scalars
    share, b2, one_minus_b2 = numbers
    gradient = gradient * factor
    step = ops.signed_as(lr, m * share + gradient)
    return (p * decay - step, m * b2 + gradient * one_minus_b2), ops.is_finite(gradient)


LION = Update("lion", formula, ("p", "m"), scalars=3)


@dataclass(frozen=True, repr=False)
class Lion(Elementwise):
    """See `lion`."""

    lr: Rate
    b1: float = 0.9
    b2: float = 0.99
    weight_decay: float = 0.0
    mask: Mask | None = None

    state_type = LionState
    signed = (True,)
    kernel = LION

    @property
    def numbers(self) -> tuple[float, ...]:
        return self.b1 / (1 - self.b1), self.b2, 1 - self.b2

    def scalars(self, t: Tensor, lr: Tensor, weight_decay: float) -> tuple[Tensor, ...]:
        return 1 - lr * weight_decay, lr


@named("fz.lion")
def lion(lr: Rate, b1: float = 0.9, b2: float = 0.99, weight_decay: float = 0.0, mask: Any = None) -> Lion:
    """Return Lion.

    Args:
        lr: learning rate: a number, or a function of the step tensor. About a tenth of AdamW's.
        b1: share of the momentum in the direction of a step.
        b2: decay of the momentum.
        weight_decay: decoupled, about ten times AdamW's.
        mask: which leaves decay, see `adamw`.

    Raises:
        TypeError, ValueError: a number is none, or out of its range.

    Source: Chen et al. 2023, arXiv 2302.06675.

    Example:
        >>> import torch
        >>> opt, w, zero = lion(0.5), torch.ones(2), torch.tensor(0, dtype=torch.int32)
        >>> opt.update(torch.tensor([3.0, -7.0]), opt.init(w), w, step=zero, seed=zero)[0]
        tensor([0.5000, 1.5000])
    """
    return Lion(
        rate_of("fz.lion", lr),
        number("fz.lion", "b1", b1, least=0, below=1),
        number("fz.lion", "b2", b2, least=0, below=1),
        number("fz.lion", "weight_decay", weight_decay, least=0),
        mask_of("fz.lion", mask),
    )
