"""Which tensors can be parameters, and which can be cut at all.

    float32, bfloat16, float16, float64    stored as the policy says, so float64 as float32 at most
    integers, bool                         stored as they are; no gradient, no update
    complex                                cut, gathered, differentiated and added as they are, but not updated
    float8 and narrower                    cut and gathered, but not updated
    sparse, quantized, nested              not cut

What cannot be updated is refused where a state is made, or an optimizer's, with the way out.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fzero import tree
from fzero.errors import LayoutError

_UPDATED = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_dense(call: str, path: str, leaf: Tensor) -> None:
    """Raise for a tensor whose elements do not lie one after another."""
    kind, way_out = None, ".to_dense()"
    if leaf.is_quantized:
        kind, way_out = "quantized", ".dequantize()"
    elif leaf.is_nested:
        kind, way_out = "nested", ".to_padded_tensor(0.0)"
    elif leaf.layout is not torch.strided:
        kind = f"of layout {str(leaf.layout).removeprefix('torch.')}"
    if kind is not None:
        raise LayoutError(
            f"{call}: leaf {path!r} is {kind}, and only dense tensors can be cut into pieces. Make it one: {way_out}."
        )


def check_updated(call: str, paths: Sequence[str], leaves: Sequence[Tensor | None]) -> None:
    """Raise for a leaf that no optimizer here updates, though it is no integer."""
    for path, leaf in zip(paths, leaves, strict=True):
        if leaf is None or leaf.dtype in _UPDATED:
            continue
        if leaf.is_complex():
            raise LayoutError(
                f"{call}: leaf {path!r} is {tree.describe(leaf)}, and parameters are real. Store its real and "
                f"imaginary parts, torch.view_as_real(leaf), and take them together inside the function: "
                f"torch.view_as_complex(leaf.float()). The update is then what torch's own makes of a complex leaf."
            )
        if leaf.is_floating_point():
            raise LayoutError(
                f"{call}: leaf {path!r} is {tree.describe(leaf)}, and parameters are float32, bfloat16, float16 or "
                f"float64, which the policy casts. Cast it first: .to(torch.bfloat16)."
            )
