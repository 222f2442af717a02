"""Cross entropy of a linear layer, `x @ weight.T + bias`, whose logits never exist whole.

This file is the loss as a function: what it takes, and what it is differentiated to. How the vocabulary is walked is
`fzero.kernels.logits_in_chunks`.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from fzero.kernels.counted import count_flops_of
from fzero.kernels.logits_in_chunks import FLOPS, default_chunk

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

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
        chunk: columns of logits that exist at a time. Default: so many that they take about 32 MiB in float32, and on
            CUDA 128.

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
    columns = min(chunk or default_chunk(len(rows), len(weight), x.device.type), len(weight))
    log_probability, logsumexp, _ = _LinearCrossEntropy.apply(rows, weight, bias, flat, ignore_index, columns)
    losses = -log_probability
    if z_loss:
        losses = losses + z_loss * logsumexp.square()
    counts = flat != ignore_index
    losses = torch.where(counts, losses, 0.0)
    if reduction == "none":
        return losses.reshape(labels.shape)
    return losses.sum() / counts.sum() if reduction == "mean" else losses.sum()


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
