"""The floating-point operations of kernels: torch's own formulas, and ours beside them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from fzero._torch import dispatch_modes


def flop_formulas() -> dict[Any, Callable[..., int]]:
    """Return torch's formulas for floating-point operations, of which those of loaded libraries are part."""
    from torch.utils.flop_counter import flop_registry

    return flop_registry


def count_flops_of(formulas: dict[Any, Callable[..., int]]) -> None:
    """Give torch's counter of floating-point operations formulas, by operator, where a program has loaded it.

    A count that runs already, with formulas of its start, gets them too.
    """
    counter: Any = sys.modules.get("torch.utils.flop_counter")
    if counter is None:
        return
    new = {operator: formula for operator, formula in formulas.items() if operator not in counter.flop_registry}
    for operator, formula in new.items():
        counter.register_flop_formula(operator)(formula)
    if new:
        for running in (getattr(mode, "counter", None) for mode in dispatch_modes()):
            if isinstance(running, counter.FlopCounterMode):
                running.flop_registry.update({operator: counter.flop_registry[operator] for operator in new})
