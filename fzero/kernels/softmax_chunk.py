"""The softmax of a chunk of logits: how `fzero.kernels.logits_in_chunks` walks over a vocabulary.

For each token three statistics are folded from chunk to chunk, in float32: the largest logit so far, the sum of
exponentials over it, and the label's logit. With them a chunk of logits becomes its own gradient, in place. For each
there is a torch reference and a Triton kernel, one program a token; exponentials differ in their last bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fzero.kernels.nvidia import jit, tl
from fzero.kernels.rounding import round_to

# Columns that a Triton program takes at a time.
BLOCK = 1024


def fold_reference(logits: Tensor, labels: Tensor, statistics: Tensor, start: int) -> None:
    """Fold a chunk of logits into the statistics of each token. Overwrites both.

    Args:
        logits: (N, columns), float32 or float64.
        labels: (N,), int64.
        statistics: (3, N), dtype of `logits`: the maximum over the columns so far, the sum of `exp(logit - maximum)`,
            and the label's logit, taken where the label is a column of this chunk.
        start: the first column.
    """
    maximum, total, label_logit = statistics
    inside, column = _label_column(labels, start, logits)
    label_logit.copy_(torch.where(inside, logits.gather(1, column)[:, 0], label_logit))
    highest = torch.maximum(maximum, logits.amax(1))
    # So far there may be nothing but columns that are masked by a bias of -inf.
    base = highest.masked_fill(highest == -torch.inf, 0.0)
    total.mul_((maximum - base).exp_()).add_(logits.sub_(base[:, None]).exp_().sum(1))
    maximum.copy_(highest)


def gradient_reference(logits: Tensor, labels: Tensor, statistics: Tensor, weights: Tensor, start: int) -> None:
    """Overwrite a chunk of logits by its gradient.

    Args:
        logits: (N, columns), float32 or float64.
        labels: (N,), int64.
        statistics: (3, N), of all columns, with the logarithm of the sum in place of the sum.
        weights: (2, N): by what the softmax is multiplied, and what is added at the label.
        start: the first column.
    """
    inside, column = _label_column(labels, start, logits)
    logits.sub_(statistics[0, :, None]).sub_(statistics[1, :, None]).exp_().mul_(weights[0, :, None])
    logits.scatter_add_(1, column, torch.where(inside, weights[1], 0.0)[:, None])


def _label_column(labels: Tensor, start: int, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return which labels lie in a chunk, and their column, 0 for others: (N,) and (N, 1)."""
    inside = (labels >= start) & (labels < start + logits.shape[1])
    return inside, torch.where(inside, labels - start, 0)[:, None]


@jit
def fold_kernel(logits, labels, statistics, start, columns, BLOCK: tl.constexpr):
    """`fold_reference` for one token a program, of logits in any dtype, which stay."""
    token, tokens = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    logits += token * columns
    statistics += token
    old, old_total = tl.load(statistics), tl.load(statistics + tokens)
    highest = tl.full((BLOCK,), float("-inf"), old.dtype)
    sums = tl.zeros((BLOCK,), old.dtype)
    for first in range(0, columns, BLOCK):
        column = first + tl.arange(0, BLOCK)
        logit = tl.load(logits + column, column < columns, other=float("-inf")).to(old.dtype)
        higher = tl.maximum(highest, logit)
        base = tl.where(higher == float("-inf"), 0.0, higher)
        sums = sums * tl.exp(highest - base) + tl.exp(logit - base)
        highest = higher
    top = tl.maximum(tl.max(highest, 0), old)
    base = tl.where(top == float("-inf"), 0.0, top)
    tl.store(statistics, top)
    tl.store(statistics + tokens, old_total * tl.exp(old - base) + tl.sum(sums * tl.exp(highest - base), 0))
    column = tl.load(labels + token) - start
    inside = (column >= 0) & (column < columns)
    tl.store(statistics + 2 * tokens, tl.load(logits + column, inside, other=0.0).to(old.dtype), inside)


@jit
def gradient_kernel(logits, labels, statistics, weights, start, columns, BLOCK: tl.constexpr):
    """`gradient_reference` for BLOCK columns of one token a program, of logits in any dtype, rounded to nearest."""
    token, tokens = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    place = logits + token * columns + column
    logit = tl.load(place, column < columns, other=0.0)
    maximum, log_total = tl.load(statistics + token), tl.load(statistics + tokens + token)
    gradient = tl.exp(logit.to(maximum.dtype) - maximum - log_total) * tl.load(weights + token)
    at_label = column == tl.load(labels + token) - start
    gradient = gradient + tl.where(at_label, tl.load(weights + tokens + token), 0.0)
    if logit.dtype == tl.bfloat16:
        gradient = round_to(gradient, 0, tl.bfloat16, False)
    tl.store(place, gradient.to(logit.dtype), column < columns)


def launch_fold(logits: Tensor, labels: Tensor, statistics: Tensor, start: int) -> None:
    """`fold_reference` by one launch of the Triton kernel."""
    tokens, columns = logits.shape
    if tokens:
        with torch.cuda.device_of(logits):
            fold_kernel[(tokens,)](logits, labels, statistics, start, columns, BLOCK=BLOCK)


def launch_gradient(logits: Tensor, labels: Tensor, statistics: Tensor, weights: Tensor, start: int) -> None:
    """`gradient_reference` by one launch of the Triton kernel."""
    tokens, columns = logits.shape
    if tokens:
        with torch.cuda.device_of(logits):
            grid = (tokens, -(-columns // BLOCK))
            gradient_kernel[grid](logits, labels, statistics, weights, start, columns, BLOCK=BLOCK)
