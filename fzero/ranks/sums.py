"""The sum of what ranks have sent: in the order of the ranks, so that every layout adds in one order."""

from __future__ import annotations

import torch
from torch import Tensor

# How the parts of N ranks are added in the order of the ranks. Up to 4, torch's own sum over rows does so. Of 5 rows
# and more its order depends on where in its row an element stands, which differs between layouts, so they are added one
# after another. Beyond 64 that would be too many operations, so torch's sum is taken: layouts may differ in a last bit.
_SUM_IS_IN_ORDER = 4
_ADDED_ONE_BY_ONE = 64


def sum_parts(x: Tensor, parts: int, dtype: torch.dtype) -> Tensor:
    """Add `parts` equal parts of dimension 0, in order, in at least float32; return the sum as `dtype`."""
    wide = torch.promote_types(dtype, torch.float32)
    rows = x.unflatten(0, (parts, x.shape[0] // parts))
    if not _SUM_IS_IN_ORDER < parts <= _ADDED_ONE_BY_ONE:
        return rows.sum(0, dtype=wide).to(dtype)
    total = rows[0].to(wide)
    for i in range(1, parts):
        total = total + rows[i]
    return total.to(dtype)


# The sum as one operator, so that a program shows it, and its passes see it, as one thing.
torch.library.define(
    "fzero::sum_parts", "(Tensor x, int parts, ScalarType dtype) -> Tensor", tags=torch.Tag.pt2_compliant_tag
)


def _impl(x: Tensor, parts: int, dtype: torch.dtype) -> Tensor:
    if parts == 2 and dtype == x.dtype:  # torch adds two bfloat16 in float32 and rounds once: the same bits, one pass
        return torch.add(*x.chunk(2))
    return sum_parts(x, parts, dtype)


torch.library.impl("fzero::sum_parts", ("cpu", "cuda"), _impl)


@torch.library.register_fake("fzero::sum_parts")
def _(x: Tensor, parts: int, dtype: torch.dtype) -> Tensor:
    return x.new_empty((x.shape[0] // parts, *x.shape[1:]), dtype=dtype)


SUM_PARTS = torch.ops.fzero.sum_parts.default
