"""Cross entropy of a linear layer, `x @ weight.T + bias`, whose logits never exist whole.

The vocabulary is walked in chunks of columns. The forward keeps three numbers a token, the backward makes the logits of
a chunk again:

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
from typing import Any, Literal

import torch
from torch import Tensor

from fzero.kernels.counted import count_flops_of
from fzero.kernels.softmax_chunk import fold_reference, gradient_reference, launch_fold, launch_gradient

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Logits in a chunk, where nothing else is said: 32 MiB of float32.
CHUNK_ELEMENTS = 1 << 23
# Fewer columns than these make slow products, however many tokens there are.
MIN_COLUMNS = 256

Reduction = Literal["mean", "sum", "none"]


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    z_loss: float = 0.0,
    reduction: Reduction = "mean",
    chunk: int | None = None,
) -> Tensor:
    """Return the cross entropy of `x @ weight.T + bias` and labels, without making all logits.

    Products are those of `F.linear`, in the dtype of the inputs or of autocast; the softmax is float32.

    Args:
        x: (..., D): float32, bfloat16, float16 or float64.
        weight: (V, D), dtype of `x`.
        labels: (...), int64: each in 0 .. V - 1, or `ignore_index`.
        bias: (V,), dtype of `x`.
        ignore_index: tokens with this label count for nothing.
        z_loss: adds `z_loss · logsumexp(logits)²` to the loss of each token.
        reduction: "mean" over the tokens that count (NaN where there are none), their "sum", or "none".
        chunk: columns of logits that exist at a time. Default: so many that they take about 32 MiB in float32.

    Returns:
        float32 (float64 of float64): of shape (), or of the shape of `labels`. Differentiable once in x, weight and
        bias, by autograd and by `torch.func.{grad, vjp}`; gradients have the dtypes of what they belong to.

    Raises:
        TypeError: a dtype that is not taken.
        ValueError: shapes or devices that do not fit. A label outside of the vocabulary, on a CPU; on CUDA, where
            asking would stop the queue, its loss and what depends on it are NaN.
        NotImplementedError: from a second derivative, `torch.func.jvp` or `torch.func.vmap`.

    Source: logits chunk by chunk, Hsu et al. 2024, arXiv 2410.10989, and Wijmans et al. 2024, arXiv 2411.09009; the
    running maximum and sum, Milakov and Gimelshein 2018, arXiv 1805.02867; z-loss, Chowdhery et al. 2022,
    arXiv 2204.02311.

    Example:
        >>> x, weight, labels = torch.ones(2, 3, 4), torch.zeros(10, 4), torch.tensor([[0, 1, 2], [3, -100, 9]])
        >>> linear_cross_entropy(x, weight, labels)  # the logarithm of 10
        tensor(2.3026)
    """
    x, weight = _as_autocast(x), _as_autocast(weight)
    bias = None if bias is None else _as_autocast(bias)
    _check(x, weight, labels, bias, reduction, chunk)
    rows, flat = x.reshape(labels.numel(), x.shape[-1]), labels.reshape(-1).contiguous()
    columns = min(chunk or default_chunk(len(rows), len(weight)), len(weight))
    log_probability, logsumexp, _ = _LinearCrossEntropy.apply(rows, weight, bias, flat, ignore_index, columns)
    losses = -log_probability
    if z_loss:
        losses = losses + z_loss * logsumexp.square()
    counts = flat != ignore_index
    losses = torch.where(counts, losses, 0.0)
    if reduction == "none":
        return losses.reshape(labels.shape)
    return losses.sum() / counts.sum() if reduction == "mean" else losses.sum()


def default_chunk(tokens: int, vocabulary: int) -> int:
    """Return how many columns of logits exist at a time: about 32 MiB in float32, in chunks of nearly equal size.

    Example:
        >>> default_chunk(8192, 128_000), default_chunk(8, 50_257)
        (1024, 50257)
    """
    most = max(MIN_COLUMNS, CHUNK_ELEMENTS // max(tokens, 1))
    chunks = -(-vocabulary // most)
    if chunks == 1:
        return vocabulary
    return -(-vocabulary // chunks // 64) * 64


class _Once(torch.autograd.Function):
    """What can be differentiated once, backwards."""

    @staticmethod
    def jvp(*_: Any) -> Any:
        raise _not_implemented("forward-mode differentiation, as by torch.func.jvp,")

    @staticmethod
    def vmap(*_: Any) -> Any:
        raise _not_implemented("torch.func.vmap")


class _LinearCrossEntropy(_Once):
    """(x, weight, bias) -> each token's log-probability of its label, its logsumexp, and what the backward needs."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
        count_flops_of(FLOPS)
        statistics = torch.ops.fzero.linear_cross_entropy(*args)[0]
        maximum, log_total, label_logit = statistics.unbind()
        # The maximum comes off first: of a label that is nearly certain both logarithms are small, and exact.
        return label_logit - maximum - log_total, maximum + log_total, statistics

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.ignore_index, ctx.chunk = inputs
        ctx.mark_non_differentiable(output[2])
        ctx.save_for_backward(*tensors, output[2])

    @staticmethod
    def backward(ctx: Any, log_probability_bar: Tensor, logsumexp_bar: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        weights = torch.stack([logsumexp_bar - log_probability_bar, log_probability_bar])
        wanted = list(ctx.needs_input_grad[:3])
        gradients = _Gradients.apply(weights, *ctx.saved_tensors, ctx.ignore_index, ctx.chunk, wanted)
        return (*(g if is_wanted else None for g, is_wanted in zip(gradients, wanted, strict=True)), None, None, None)


class _Gradients(_Once):
    """The backward of `_LinearCrossEntropy`: a function of its own, so that differentiating it is an error."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        return tuple(torch.ops.fzero.linear_cross_entropy_backward(*args)[:3])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise _not_implemented("a second derivative")


def _not_implemented(what: str) -> NotImplementedError:
    return NotImplementedError(
        f"fz.linear_cross_entropy: {what} is not implemented. Use F.cross_entropy(F.linear(x, weight, bias).float(), "
        f"labels) there: the same loss, with all logits in memory."
    )


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


def _as_autocast(x: Tensor) -> Tensor:
    """Return an operand as autocast would give it to a product."""
    device = x.device.type
    is_cast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device) and x.dtype != torch.float64
    return x.to(torch.get_autocast_dtype(device)) if is_cast else x


def _check(x: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, reduction: str, chunk: int | None) -> None:
    call = "fz.linear_cross_entropy"
    if x.dtype not in FLOATS:
        raise TypeError(f"{call}: x has dtype {x.dtype}, expected one of {', '.join(map(str, FLOATS))}. Cast it first.")
    for name, tensor, dtype in (("weight", weight, x.dtype), ("bias", bias, x.dtype), ("labels", labels, torch.int64)):
        if tensor is not None and tensor.dtype != dtype:
            raise TypeError(f"{call}: {name} has dtype {tensor.dtype}, expected {dtype} beside x. Cast it first.")
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{call}: {name} is on {tensor.device} and x on {x.device}. Move it there.")
    if x.ndim == 0 or weight.ndim != 2 or len(weight) == 0:
        raise ValueError(
            f"{call}: x has shape {tuple(x.shape)} and weight {tuple(weight.shape)}, expected (..., D) and (V, D) with "
            f"V > 0. The weight of an nn.Linear has that form."
        )
    vocabulary, width = weight.shape
    for name, tensor, shape in (
        ("x", x, (*x.shape[:-1], width)),
        ("labels", labels, x.shape[:-1]),
        ("bias", bias, (vocabulary,)),
    ):
        if tensor is not None and tensor.shape != shape:
            raise ValueError(
                f"{call}: {name} has shape {tuple(tensor.shape)}, expected {tuple(shape)} beside x of shape "
                f"{tuple(x.shape)} and weight of shape {tuple(weight.shape)}."
            )
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"{call}: reduction={reduction!r}; expected 'mean', 'sum' or 'none'.")
    if chunk is not None and chunk < 1:
        raise ValueError(f"{call}: chunk={chunk}; expected a number of columns, at least 1, or None.")
