"""An optimizer whose update acts on each element by itself: a formula, and its loop over leaves."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from fzero.kernels.update import Update
from fzero.marks import mark
from fzero.optim.base import Optimizer
from fzero.optim.leaves import Leaves
from fzero.optim.masks import Mask
from fzero.optim.moments import with_remainder, zeros
from fzero.optim.step import Rate, Step, rate
from fzero.sharding.sharded import Sharded

# Pieces under this many elements are updated together, where a launch costs as much as 100,000 elements. Their
# gradients then wait for one another.
SMALL = {"cuda": 1 << 15}


class Elementwise(Optimizer):
    """An optimizer whose update acts on each element by itself.

    A subclass gives `kernel`, `numbers`, `scalars`, `signed` and `state_type`.
    """

    lr: Rate
    weight_decay: float
    mask: Mask | None
    kernel: ClassVar[Update]

    @property
    @abstractmethod
    def numbers(self) -> tuple[float, ...]:
        """What the formula of the kernel takes that never changes."""

    @property
    @abstractmethod
    def state_type(self) -> Callable[..., Any]:
        """A named tuple of the moments."""

    @property
    @abstractmethod
    def signed(self) -> tuple[bool, ...]:
        """For each moment, whether it may be negative."""

    @abstractmethod
    def scalars(self, t: Tensor, lr: Tensor, weight_decay: float) -> tuple[Tensor, ...]:
        """Return what the formula takes that changes from step to step, but for the factor of the gradient, its last.

        Args:
            t: float64, 0-d: the number of this step, from 1 on.
            lr: float64, 0-d.
            weight_decay: of some leaves; 0 for those that the mask exempts.
        """

    def scalars_of(self, step: Tensor, factor: float | Tensor, decays: bool) -> Tensor:
        """Return all scalars of the kernel: computed in float64, rounded to float32, on the device of `step`.

        Args:
            step: 0-based count of the steps taken: int32, 0-d.
            factor: what the gradient has to be multiplied by to be true; NaN skips the step.
            decays: whether they are those of leaves that decay.
        """
        t = step.to(torch.float64) + 1
        made = self.scalars(t, rate(self.lr, step).to(torch.float64), self.weight_decay if decays else 0.0)
        return torch.stack([*made, torch.zeros_like(t) + factor]).to(torch.float32)

    def learning_rate(self, step: Tensor) -> Tensor:
        return rate(self.lr, step)

    def init_sharded(self, params: Sharded, remainder: Sharded | None = None) -> Any:
        state = self.state_type(*(zeros(params, signed=signed) for signed in self.signed))
        return with_remainder(state, params, remainder)

    def update_sharded(self, grads: Sharded, opt_state: Any, params: Sharded, at: Step) -> tuple[Sharded, Any]:
        leaves, decays = Leaves(grads, opt_state, params, at), self._decays(params)
        scalars = {either: self.scalars_of(at.count, grads.multiplier, either) for either in dict.fromkeys(decays)}
        for group in self._groups(leaves, grads, decays):
            with mark(role="update", leaf=leaves.name(group)):
                states, gradients, rounding = leaves.take(group)
                new = self.kernel(
                    states, gradients, scalars[decays[group[0]]], *rounding.source,
                    numbers=self.numbers, stochastic=rounding.stochastic,
                )  # fmt: skip
                leaves.put(group, new)
        return leaves.done()

    def _decays(self, params: Sharded) -> list[bool]:
        return [self.mask is None or bool(self.mask(path)) for path in params.paths]

    def _groups(self, leaves: Leaves, grads: Sharded, decays: Sequence[bool]) -> list[list[int]]:
        """Return the leaves that have gradients: large ones by themselves, small ones of one kind together, last."""
        alone, together = [], dict[Any, list[int]]()
        small = SMALL.get(grads.mesh.device.type, 0)
        for i in leaves.indices:
            gradient = grads.pieces[i]
            assert gradient is not None
            if gradient.shape[-1] >= small:
                alone.append([i])
            else:
                together.setdefault((leaves.kind(i), decays[i]), []).append(i)
        return alone + list(together.values())
