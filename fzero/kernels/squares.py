"""The sum of squares of one 1-D piece and whether it is finite: what a norm over all leaves is made of.

One op, opaque to a trace: `fzero::squares`. On a CPU it walks over the piece in chunks that stay in the cache, so that
it reads once and holds no converted copy of the piece; only a chunk with an element that is not finite is read again.
Elsewhere it is the reference: no value may decide there what is computed next.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fzero.kernels.transformed import transformed

# Elements whose squares are added in float32; further up the sum is one of float64. One thread adds them, so the bits
# of the sum do not depend on the number of threads.
ROW = 1 << 12
# Elements converted at a time.
CHUNK = 1 << 20


def squares(piece: Tensor, ranks: int = 1) -> Tensor:
    """Return the sum of squares of the finite elements, and 1 if there are others, else 0: float64 of shape (2,).

    Args:
        piece: 1-D, floating point.
        ranks: how many pieces this one stands for. They are summed one by one, so that a leaf gives the same bits whole
            and cut.

    Returns:
        The two numbers. Under `torch.func` transforms differentiable; there its last bits may differ.

    Example:
        >>> squares(torch.tensor([3.0, torch.nan, 4.0]))
        tensor([25.,  1.], dtype=torch.float64)
    """
    if transformed(piece):
        return squares_reference(piece, ranks)
    summed: Tensor = torch.ops.fzero.squares(piece, ranks)
    return summed


def squares_reference(piece: Tensor, ranks: int) -> Tensor:
    """`squares` in plain torch operations, whatever the values are."""
    length = piece.shape[0]
    if length == 0:
        return torch.zeros(2, dtype=torch.float64, device=piece.device)
    rows = math.ceil(length / ranks)
    finite = torch.nan_to_num(piece, nan=0.0, posinf=0.0, neginf=0.0)
    cut = torch.nn.functional.pad(finite, (0, ranks * rows - length)).view(ranks, rows) if ranks > 1 else finite[None]
    total = torch.linalg.vector_norm(cut, dim=-1, dtype=torch.float32).to(torch.float64).square().sum()
    # The extremes are NaN where an element is; one pass, without the mask that isfinite makes.
    low, high = torch.aminmax(piece.detach())
    bad = ~(torch.isfinite(low) & torch.isfinite(high))
    return torch.stack([total, bad.to(torch.float64)])


def _squares_cpu(piece: Tensor, ranks: int) -> Tensor:
    total, bad = 0.0, False
    # One buffer for all chunks: fresh memory costs more than what is done with it.
    converted = None if piece.dtype == torch.float32 else torch.empty(min(CHUNK, piece.shape[0]))
    for row in piece.split(max(1, math.ceil(piece.shape[0] / ranks))):
        of_row = 0.0
        for chunk in row.split(CHUNK):
            values = chunk if converted is None else converted[: chunk.shape[0]].copy_(chunk)
            square = _sum_of_squares(values)
            if not math.isfinite(square):  # or a square is larger than any float32, as it is again below
                bad = bad or not values.isfinite().all()
                square = _sum_of_squares(torch.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0))
            of_row += square
        total += of_row
    return torch.tensor([total, bad], dtype=torch.float64)


def _sum_of_squares(values: Tensor) -> float:
    whole = values.shape[0] // ROW * ROW
    norms = [torch.linalg.vector_norm(values[whole:]).item()]
    if whole:
        norms += torch.linalg.vector_norm(values[:whole].view(-1, ROW), dim=-1).tolist()
    return sum(norm * norm for norm in norms)


torch.library.define("fzero::squares", "(Tensor piece, int ranks) -> Tensor", tags=torch.Tag.pt2_compliant_tag)
torch.library.impl("fzero::squares", "cpu", _squares_cpu)
torch.library.impl("fzero::squares", "cuda", squares_reference)


@torch.library.register_fake("fzero::squares")
def _(piece: Tensor, ranks: int) -> Tensor:
    return piece.new_empty(2, dtype=torch.float64)
