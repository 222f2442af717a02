"""The logits of a linear layer, chunk by chunk of columns: their log-probabilities, and the gradients through them.

The forward keeps three numbers a token, the backward makes the logits of a chunk again:

    forward    chunk of logits → running maximum, sum of exponentials, the label's logit
    backward   chunk of logits → its gradient, in its place → rows of weight's gradient, += x's gradient

A chunk of columns finishes its rows of the weight's gradient at once, in their own dtype; only the gradient of `x`
is summed over chunks, in float32. Chunks of tokens would sum the weight's gradient instead, the larger of the two.

Two ops, opaque to a trace, so that a program shows two operations, not two for each chunk. Both return their scratch
memory as a last result that nobody reads: what counts the bytes of a program sees it. On CUDA a Triton kernel does the
softmax part of a chunk, on a CPU its torch reference; exponentials differ in their last bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fzero.kernels.softmax_chunk import fold_reference, gradient_reference, launch_fold, launch_gradient

# Logits in a chunk, where nothing else is said: 32 MiB of float32. On CUDA four times as many: there, what is launched
# for so few takes less time than the launches.
CHUNK_ELEMENTS, CHUNK_ELEMENTS_ON_CUDA = 1 << 23, 1 << 25
# Fewer columns than these make slow products, however many tokens there are.
MIN_COLUMNS = 256


def default_chunk(tokens: int, vocabulary: int, device: str = "cpu") -> int:
    """Return how many columns of logits exist at a time, in chunks of nearly equal size.

    Args:
        tokens: rows of logits.
        vocabulary: all columns.
        device: the type of the device that they are on.

    Example:
        >>> default_chunk(8192, 128_000), default_chunk(8192, 128_000, "cuda"), default_chunk(8, 50_257)
        (1024, 4032, 50257)
    """
    elements = CHUNK_ELEMENTS_ON_CUDA if device == "cuda" else CHUNK_ELEMENTS
    most = max(MIN_COLUMNS, elements // max(tokens, 1))
    chunks = -(-vocabulary // most)
    if chunks == 1:
        return vocabulary
    return -(-vocabulary // chunks // 64) * 64


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, ignore_index: int, chunk: int
) -> tuple[Tensor, Tensor]:
    outside = _outside(labels, ignore_index, weight)
    if not runs_triton(x) and outside.any():
        at = int(outside.nonzero()[0])
        raise ValueError(
            f"fz.linear_cross_entropy: label {int(labels[at])} of token {at} is outside of the vocabulary. Expected 0 "
            f"to {len(weight) - 1}, the rows of weight, or ignore_index={ignore_index} for tokens that do not count."
        )
    scratch = _scratch(x, chunk)
    statistics = scratch.new_zeros(3, len(x))
    statistics[0] = -torch.inf
    statistics[2].masked_fill_(outside, torch.nan)
    fold = launch_fold if runs_triton(x) else fold_reference
    for start in range(0, len(weight), chunk):
        _, wide = _logits(x, weight, bias, start, chunk, scratch)
        fold(wide, labels, statistics, start)
    statistics[1].log_()
    return statistics, scratch


def _backward(
    weights: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    statistics: Tensor,
    ignore_index: int,
    chunk: int,
    wanted: list[bool],
) -> tuple[Tensor, ...]:
    x_bar, weight_bar, bias_bar, scratch = _like_gradients(x, weight, chunk, wanted)
    is_wide = x.dtype == scratch.dtype
    x_sum = x_bar if is_wide else scratch[len(scratch) - x_bar.numel() :].view(x_bar.shape)
    x_sum.zero_()
    gradient = gradient_reference
    if runs_triton(x):  # nothing was raised for a label that is wrong, so the gradients say it
        weights, gradient = weights.masked_fill(_outside(labels, ignore_index, weight), torch.nan), launch_gradient
    for start in range(0, len(weight), chunk):
        logits, wide = _logits(x, weight, bias, start, chunk, scratch)
        gradient(wide, labels, statistics, weights, start)
        if wide is not logits:
            logits.copy_(wide)
        columns = slice(start, start + chunk)
        if wanted[0] and is_wide:
            x_sum.addmm_(logits, weight[columns])
        elif wanted[0]:
            x_sum.add_(torch.mm(logits, weight[columns], out=x_bar))
        if wanted[1]:
            torch.mm(logits.T, x, out=weight_bar[columns])
        if wanted[2]:
            torch.sum(logits, 0, out=bias_bar[columns])
    if not is_wide:
        x_bar.copy_(x_sum)
    return x_bar, weight_bar, bias_bar, scratch


def runs_triton(x: Tensor) -> bool:
    """Whether the softmax part of a chunk is the Triton kernel, which also converts as it reads."""
    return x.is_cuda


def _outside(labels: Tensor, ignore_index: int, weight: Tensor) -> Tensor:
    return (labels != ignore_index) & ((labels < 0) | (labels >= len(weight)))


def _logits(
    x: Tensor, weight: Tensor, bias: Tensor | None, start: int, chunk: int, scratch: Tensor
) -> tuple[Tensor, Tensor]:
    """Return a chunk of the logits in the dtype of `x`, and in that of the softmax where its kernel needs that."""
    rows = weight[start : start + chunk]
    shape = (len(x), len(rows))
    # Autocast leaves operations alone that are given an out=, and those in place.
    logits = scratch.view(x.dtype)[: shape[0] * shape[1]].view(shape)
    if bias is None:
        torch.mm(x, rows.T, out=logits)
    else:
        torch.addmm(bias[start : start + chunk], x, rows.T, out=logits)
    if runs_triton(x) or x.dtype == scratch.dtype:
        return logits, logits
    wide = scratch[_narrow(x, chunk) :][: logits.numel()].view(shape)
    return logits, wide.copy_(logits)


def _scratch(x: Tensor, chunk: int, x_sum: int = 0) -> Tensor:
    """Return memory for a chunk of logits, for the same in the dtype of the softmax, and for `x_sum` more numbers."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    wide = 0 if runs_triton(x) or x.dtype == dtype else len(x) * chunk
    return x.new_empty(_narrow(x, chunk) + wide + x_sum, dtype=dtype)


def _narrow(x: Tensor, chunk: int) -> int:
    """Return how many elements of the scratch memory a chunk of logits takes in the dtype of `x`."""
    elements = len(x) * chunk
    return elements if x.dtype.itemsize >= 4 else -(-elements // 2)


def _like_gradients(x: Tensor, weight: Tensor, chunk: int, wanted: list[bool]) -> tuple[Tensor, ...]:
    """Return memory for the gradients that are wanted, and the scratch memory."""
    shapes = (x.shape, weight.shape, weight.shape[:1])
    x_bar, *others = (x.new_empty(shape if want else (0,)) for shape, want in zip(shapes, wanted, strict=True))
    is_wide = x.dtype == torch.promote_types(x.dtype, torch.float32)
    return x_bar, *others, _scratch(x, chunk, 0 if is_wide else x_bar.numel())


ARGUMENTS = "Tensor x, Tensor weight, Tensor? bias, Tensor labels"
torch.library.define(
    "fzero::linear_cross_entropy", f"({ARGUMENTS}, int ignore_index, int chunk) -> (Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)  # fmt: skip
torch.library.define(
    "fzero::linear_cross_entropy_backward",
    f"(Tensor weights, {ARGUMENTS}, Tensor statistics, int ignore_index, int chunk, bool[] wanted)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.impl("fzero::linear_cross_entropy", ("cpu", "cuda"), _forward)
torch.library.impl("fzero::linear_cross_entropy_backward", ("cpu", "cuda"), _backward)


@torch.library.register_fake("fzero::linear_cross_entropy")
def _(x: Tensor, weight: Tensor, bias: Any, labels: Tensor, ignore_index: int, chunk: int) -> tuple[Tensor, Tensor]:
    scratch = _scratch(x, chunk)
    return scratch.new_empty(3, len(x)), scratch


@torch.library.register_fake("fzero::linear_cross_entropy_backward")
def _(weights: Tensor, x: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *_, chunk, wanted = rest
    return _like_gradients(x, weight, chunk, wanted)


def _forward_flops(x_shape: Any, weight_shape: Any, *_: Any, **__: Any) -> int:
    return 2 * x_shape[0] * x_shape[1] * weight_shape[0]


def _backward_flops(_weights: Any, x_shape: Any, weight_shape: Any, *rest: Any, **_: Any) -> int:
    x_wanted, weight_wanted, _ = rest[-1]
    return 2 * x_shape[0] * x_shape[1] * weight_shape[0] * (1 + x_wanted + weight_wanted)


FLOPS: dict[Any, Callable[..., int]] = {
    torch.ops.fzero.linear_cross_entropy: _forward_flops,
    torch.ops.fzero.linear_cross_entropy_backward: _backward_flops,
}
