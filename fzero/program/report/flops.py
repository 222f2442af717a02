"""The floating-point operations of a program: those of matrix products, convolutions and attention.

The formulas are torch's own, of `torch.utils.flop_counter`; what it counts while a function runs, this counts in
the graph. Attention counts in full, also where a mask leaves half of it out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from fzero._torch import OpOverload
from fzero.kernels.counted import count_flops_of, flop_formulas
from fzero.kernels.logits_in_chunks import FLOPS
from fzero.program.graph.trace import Trace
from fzero.program.graph.walk import calls, vals

_ATEN = torch.ops.aten

# Forms of attention that torch has no formula for, with those that take the same arguments first.
_LIKE = {
    _ATEN._scaled_dot_product_flash_attention_for_cpu: _ATEN._scaled_dot_product_flash_attention,
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: _ATEN._scaled_dot_product_flash_attention_backward,
}


def flops_of(trace: Trace) -> int:
    """Return the floating-point operations of a program, those inside loops once for each round."""
    return sum(flops_at(node) * times for node, times in calls(trace))


def flops_at(node: fx.Node) -> int:
    """Return the floating-point operations of one node; 0 for what has no formula, such as additions."""
    formula = formula_of(node.target)
    if formula is None:
        return 0
    return int(formula(*vals(node.args), **vals(node.kwargs), out_val=node.meta["val"]))


def formula_of(target: Any) -> Callable[..., int] | None:
    """Return the formula for an operator, given fake tensors and `out_val=`; `None` where there is none."""
    if not isinstance(target, OpOverload):
        return None
    packet = target.overloadpacket
    formulas = flop_formulas()
    count_flops_of(FLOPS)
    return formulas.get(_LIKE.get(packet, packet))
