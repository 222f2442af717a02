"""Which choices of a policy go together."""

from __future__ import annotations

from typing import Protocol

import torch

from fzero.errors import PolicyError
from fzero.precision.loss_scale import LossScale

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class Choices(Protocol):
    """What of a policy may contradict something else of it; `fzero.precision.policy.Policy` says what each is."""

    @property
    def param(self) -> torch.dtype | None: ...
    @property
    def master(self) -> torch.dtype | str | None: ...
    @property
    def moment(self) -> torch.dtype: ...
    @property
    def compute(self) -> torch.dtype: ...
    @property
    def wire(self) -> torch.dtype | None: ...
    @property
    def reduce(self) -> torch.dtype: ...
    @property
    def rounding(self) -> str: ...
    @property
    def loss_scale(self) -> float | LossScale | None: ...
    @property
    def autocast(self) -> torch.dtype | None: ...
    @property
    def stored(self) -> torch.dtype: ...
    @property
    def sent(self) -> torch.dtype: ...


def check(policy: Choices) -> None:
    """Raise where choices contradict each other, or are not supported.

    Raises:
        PolicyError: says which, and the way out.
    """
    _check_dtypes(policy)
    _check_storage(policy)
    _check_rounding(policy)
    _check_loss_scale(policy)


def _check_dtypes(policy: Choices) -> None:
    for name, allowed in (
        ("param", (*_FLOATS, None)),
        ("master", (torch.float32, "split", None)),
        ("compute", _FLOATS),
        ("reduce", _FLOATS),
        ("autocast", (torch.bfloat16, torch.float16, None)),
        ("wire", (*_FLOATS, None)),
    ):
        if getattr(policy, name) not in allowed:
            listing = ", ".join(_name(x) for x in allowed)
            raise PolicyError(f"fz.Policy: {name}={_name(getattr(policy, name))} is not supported. Use {listing}.")
    if policy.moment == torch.float16:
        raise PolicyError(
            "fz.Policy: moment=torch.float16 is not supported: squares of gradients under 2.4e-4 underflow to 0 in "
            "it. Use torch.float32, torch.bfloat16 or torch.int8."
        )
    if policy.moment not in (torch.float32, torch.bfloat16, torch.int8):
        raise PolicyError(
            f"fz.Policy: moment={_name(policy.moment)} is not supported. Use torch.float32, torch.bfloat16 or "
            f"torch.int8."
        )


def _check_storage(policy: Choices) -> None:
    if policy.param is None and policy.master is None:
        raise PolicyError("fz.Policy: nothing is stored: param and master are both None. Give one of them a dtype.")
    if policy.master == "split":
        if policy.param != torch.bfloat16:
            raise PolicyError(
                f"fz.Policy: master='split' completes a bfloat16 parameter to fp32 and param={_name(policy.param)}. "
                f"Pass param=torch.bfloat16, or master=torch.float32 with param=None."
            )
    elif policy.param is not None and policy.master is not None:
        raise PolicyError(
            f"fz.Policy: param={policy.param} and master={policy.master} would store every weight twice. With a "
            f"master pass param=None: the parameters are cast from it for each step."
        )
    halves = {torch.bfloat16, torch.float16}
    if {policy.sent, policy.compute} == halves:
        raise PolicyError(
            f"fz.Policy: leaves gathered in {_name(policy.sent)} cannot be computed with in {_name(policy.compute)}: "
            f"neither holds the other's numbers. Use compute={_name(policy.sent)} or compute=torch.float32."
        )
    if {policy.sent, policy.reduce} == halves:
        raise PolicyError(
            f"fz.Policy: gradients in {_name(policy.sent)} cannot be summed in {_name(policy.reduce)}: neither "
            f"holds the other's numbers. Use reduce={_name(policy.sent)} or reduce=torch.float32."
        )


def _check_rounding(policy: Choices) -> None:
    if policy.rounding not in ("nearest", "stochastic"):
        raise PolicyError(f"fz.Policy: rounding={policy.rounding!r}; expected 'nearest' or 'stochastic'.")
    exact = policy.master is not None or policy.param == torch.float32
    if policy.rounding == "stochastic" and exact and policy.moment == torch.float32:
        raise PolicyError(
            f"fz.Policy: rounding='stochastic' has nothing to round: parameters are stored in "
            f"{'fp32, split in two' if policy.master == 'split' else policy.stored} and moments in {policy.moment}. "
            f"Use rounding='nearest', or store one of them in a low precision."
        )


def _check_loss_scale(policy: Choices) -> None:
    scale = policy.loss_scale
    if scale is None:
        return
    if not isinstance(scale, LossScale) and (not isinstance(scale, int | float) or not 0 < scale < float("inf")):
        raise PolicyError(f"fz.Policy: loss_scale={scale!r}; expected None, a number above 0, or fz.LossScale(...).")
    if torch.float16 not in (policy.compute, policy.autocast, policy.wire):
        raise PolicyError(
            f"fz.Policy: loss_scale={scale!r} has nothing to protect: gradients are computed in "
            f"{_name(policy.compute)}, whose range is that of fp32. Use loss_scale=None, or compute=torch.float16."
        )


def _name(value: object) -> str:
    return repr(value) if isinstance(value, str) else str(value)
