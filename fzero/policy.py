"""Precision policies: in which dtype state is stored, computed with, reduced and rounded.

A policy is data. What it means is applied where the thing happens: `vjp` casts to the compute dtype and
reduces in the reduce dtype, the optimizers store and round.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from fzero.errors import PolicyError


@dataclass(frozen=True)
class Policy:
    """Dtypes of storage, compute, reduction and moments, and the rounding of what is written back.

    Attributes:
        param: dtype of the stored parameters; `None` where only the master is stored and the parameters
            are cast from it for each step.
        master: dtype of a separate full-precision copy, or `None`.
        moment: dtype of the optimizer's moments.
        compute: dtype in which the user's function sees parameters, and of their gradients.
        reduce: dtype in which gradients are summed over ranks and micro-batches. On gloo and over
            several ranks the wire carries the gradient's own dtype and only the sum is this wide.
        rounding: how a low-precision write-back rounds: `"nearest"` or `"stochastic"`.
        loss_scale: `None`, for no loss scaling.
        autocast: run the user's function under `torch.autocast` of this dtype; `None` for not.

    Raises:
        PolicyError: the fields contradict each other; the message says how.
    """

    param: torch.dtype | None = torch.float32
    master: torch.dtype | None = None
    moment: torch.dtype = torch.float32
    compute: torch.dtype = torch.float32
    reduce: torch.dtype = torch.float32
    rounding: Literal["nearest", "stochastic"] = "nearest"
    loss_scale: None = None
    autocast: torch.dtype | None = None

    def __post_init__(self) -> None:
        if self.param is None and self.master is None:
            raise PolicyError("fz.Policy: nothing is stored: param and master are both None. Give one of them a dtype.")
        if self.param is not None and self.master is not None:
            raise PolicyError(
                f"fz.Policy: param={self.param} and master={self.master} would store every weight twice. With a "
                f"master pass param=None: the parameters are cast from it for each step."
            )
        if self.loss_scale is not None:
            raise PolicyError(f"fz.Policy: loss_scale={self.loss_scale!r} is not supported. Use a bf16 policy.")
        for name in ("param", "master", "moment", "compute", "reduce", "autocast"):
            dtype = getattr(self, name)
            if dtype is not None and dtype not in (torch.float32, torch.bfloat16):
                raise PolicyError(f"fz.Policy: {name}={dtype} is not supported. Use float32 or bfloat16.")
        if self.rounding not in ("nearest", "stochastic"):
            raise PolicyError(f"fz.Policy: rounding={self.rounding!r}; expected 'nearest' or 'stochastic'.")
        if self.rounding == "stochastic" and torch.bfloat16 not in (self.stored, self.moment):
            raise PolicyError(
                f"fz.Policy: rounding='stochastic' has nothing to round: parameters are stored in {self.stored} "
                f"and moments in {self.moment}. Use rounding='nearest', or store one of them in bfloat16."
            )

    @property
    def stored(self) -> torch.dtype:
        """The dtype of the parameters at rest."""
        dtype = self.param if self.master is None else self.master
        assert dtype is not None
        return dtype


_POLICIES = {
    "fp32": Policy(),
    "mixed": Policy(param=None, master=torch.float32, compute=torch.bfloat16),
    "bf16": Policy(
        param=torch.bfloat16,
        moment=torch.bfloat16,
        compute=torch.bfloat16,
        reduce=torch.bfloat16,
        rounding="stochastic",
    ),
}


def policy(name: str | Policy) -> Policy:
    """Return the policy of a name; a `Policy` is returned as it is.

    Args:
        name: `"fp32"`, `"mixed"` (an fp32 master, bf16 compute) or `"bf16"` (everything in bf16, rounded
            stochastically when written back).

    Raises:
        PolicyError: no policy has this name.

    Example:
        >>> policy("bf16").stored
        torch.bfloat16
    """
    if isinstance(name, Policy):
        return name
    if name not in _POLICIES:
        raise PolicyError(
            f"fz.policy: no policy is called {name!r}. Use one of {list(_POLICIES)}, or compose one: fz.Policy(...)."
        )
    return _POLICIES[name]
