"""The operations of a formula that torch and Triton have in different forms: here torch's, op by op.

A formula is written once, with the signs of arithmetic and with what this module names, as `ops.root(x)`. For Triton it
is compiled with `fzero.kernels.nvidia` in the place of this module, which has functions of the same names; for Inductor
with `COMPILED`.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

# What a formula works on: a number for each element, or one for all of them, or a tuple of such.
Value: TypeAlias = Any

LARGEST = torch.finfo(torch.float32).max


def is_finite(x: Tensor) -> Tensor:
    """Whether float32 `x` is."""
    return torch.isfinite(x)


def reciprocal(x: Tensor) -> Tensor:
    """1 / `x` for float32 from 2^-126 to 2^126, correctly rounded."""
    return 1.0 / x


def root(x: Tensor) -> Tensor:
    """The square root of float32 `x`, not negative, correctly rounded. Infinity counts as the largest number."""
    # torch's own operation calls a library that may be one bit off, and that of a float64 rounded to float32 is right.
    return torch.sqrt(x.clamp(max=LARGEST).double()).float()


def signed_as(x: Tensor, y: Tensor) -> Tensor:
    """`x`, above zero, with the sign of `y`, all float32; 0 where `y` is 0 or NaN."""
    return torch.where(y > 0, x, torch.where(y < 0, -x, 0.0))


def _compiled_root(x: Tensor) -> Tensor:
    return torch.sqrt(x.clamp(max=LARGEST))  # for which compiled code has an instruction


COMPILED = types.SimpleNamespace(is_finite=is_finite, reciprocal=reciprocal, root=_compiled_root, signed_as=signed_as)


def over(formula: Callable[..., Any], operations: Any) -> Any:
    """Return a function that does what `formula` does, by other operations than those of this module.

    Args:
        formula: a function of a module that knows this one as `ops`.
        operations: what has functions of the same names.
    """
    # What Triton interprets has to see Triton.
    known = {**formula.__globals__, "ops": operations, "tl": getattr(operations, "tl", None)}
    copy = types.FunctionType(formula.__code__, known, formula.__name__, formula.__defaults__, formula.__closure__)
    copy.__module__, copy.__qualname__, copy.__doc__ = formula.__module__, formula.__qualname__, formula.__doc__
    return copy
