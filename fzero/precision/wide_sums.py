"""Sums over rows in float32 where a CPU's operators sum in bfloat16 or float16.

The gradient of an embedding's row is a sum over the tokens that share it. Some operators of torch keep such a sum in
the dtype of its terms, and there it ends: bfloat16 has no number between 256 and 258, so 256 ones and more make 256. A
dispatch mode answers these operators by the same sum, wide, rounded once to the dtype that they return:

    x ──to float32──▶ the operator ──to bfloat16──▶ result

The mode sits below `torch.func` transforms and above tracing, so that eager calls, traces, recomputations and second
derivatives sum alike. Operators that sum wide already, and devices that do, are left alone; `tests/test_wide_sums.py`
holds a table of all that sum over rows, against float64. What no operator sums is not seen here: autograd itself adds
up the gradients of a tensor that a function uses many times, in that tensor's dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fzero._torch import OpOverload, TorchDispatchMode, dispatch_modes

aten = torch.ops.aten

# (operator, arguments, keywords) -> its results
Formula = Callable[..., Any]


class Summing(TorchDispatchMode):
    """While active, the operators concerned sum wide.

    Attributes:
        low: whether there may be bfloat16 or float16 tensors. Only then the pullback has to run under such a mode as
            well. A function of float32 leaves begins with false, and the first cast inside of it makes it true.
    """

    def __init__(self, low: bool = False) -> None:
        super().__init__()
        self.low = low

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        formula = _FORMULAS.get(func)
        if formula is not None and any(is_low(x) for x in args):
            self.low = True
            return formula(func, *args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        if func in _CASTS:
            self.low = self.low or is_low(result)
        return result


def summing() -> Summing | None:
    """Return the mode that is active, `None` where there is none."""
    return next((mode for mode in reversed(dispatch_modes()) if isinstance(mode, Summing)), None)


def is_low(x: Any) -> bool:
    """Return whether a tensor is of a dtype and on a device for which torch may sum in the dtype itself."""
    return isinstance(x, Tensor) and x.dtype in (torch.bfloat16, torch.float16) and x.device.type == "cpu"


def _to(dtype: torch.dtype, x: Any) -> Any:
    return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x


def _wide(func: Any, *args: Any, dtype: torch.dtype = torch.float32, **kwargs: Any) -> Any:
    """Run an operator on wide arguments. Its results get the dtype of the first argument that is low."""
    low = next(x.dtype for x in args if is_low(x))
    results = func(*(_to(dtype, x) for x in args), **{name: _to(dtype, x) for name, x in kwargs.items()})
    return _to(low, results) if isinstance(results, Tensor) else tuple(_to(low, x) for x in results)


def _in_place(new: OpOverload) -> Formula:
    """Return the formula of an operator that overwrites its first argument, from that of one that does not."""

    def formula(func: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return x.copy_(_FORMULAS[new](new, x, *args, **kwargs))

    return formula


def _put(func: Any, x: Tensor, where: Any, values: Tensor, accumulate: bool = False, *unsafe: bool) -> Any:
    """Put at indices. Several threads add float32 numbers in any order; float64 ones are added by one."""
    if not accumulate:
        return func(x, where, values, accumulate)
    return _wide(func, x, where, values, accumulate, dtype=torch.float64)


def _sum(func: Any, x: Tensor, dims: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Any:
    """Sum. Torch splits a sum to one number over threads and rounds each part; in float64 that split does not show."""
    if dims is not None and 0 < len(dims) < x.ndim:
        return func(x, dims, keepdim, dtype=dtype)
    total = x.sum(dtype=torch.float64).to(dtype or x.dtype)
    return total.view([1] * x.ndim) if keepdim else total


def _layer_norm_backward(
    func: Any, grad: Tensor, x: Tensor, shape: Sequence[int], mean: Tensor, rstd: Tensor, weight: Tensor | None,
    bias: Tensor | None, wanted: Sequence[bool],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """The gradient of the input by torch; those of weight and bias in an order that no number of threads changes."""
    of_x = func(grad, x, shape, mean, rstd, weight, bias, [wanted[0], False, False])[0]
    rows, columns = list(range(x.ndim - len(shape))), list(range(-len(shape), 0))
    wide, of_weight, of_bias = grad.float(), None, None
    if wanted[1] and weight is not None:
        # The given `mean` may be rounded to the dtype of `x`: rows that are alike then err alike, and it adds up.
        centered = x.float() - x.float().mean(columns, keepdim=True)
        of_weight = _over(wide * (centered * rstd), rows).to(weight.dtype)
    if wanted[2] and bias is not None:
        of_bias = _over(wide, rows).to(bias.dtype)
    return of_x, of_weight, of_bias


def _group_norm_backward(
    func: Any, grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, count: int, channels: int,
    pixels: int, groups: int, wanted: Sequence[bool],
) -> Any:  # fmt: skip
    """Torch's own, but by means that are not rounded, as torch does it where the weight is float32."""
    if not (weight is None or is_low(weight)):
        return func(grad, x, mean, rstd, weight, count, channels, pixels, groups, wanted)
    means = x.float().reshape(count, groups, -1).mean(2).reshape(mean.shape)
    return _wide(func, grad, x, means, rstd, weight, count, channels, pixels, groups, wanted)


def _over(x: Tensor, dims: list[int]) -> Tensor:
    return x.sum(dims) if dims else x


def _batch_norm_backward(
    func: Any, grad: Tensor, x: Tensor, weight: Tensor | None, running_mean: Tensor | None, running_var: Tensor | None,
    mean: Tensor | None, rstd: Tensor | None, train: bool, eps: float, wanted: Sequence[bool],
) -> Any:  # fmt: skip
    """Torch's own, but by statistics that are not rounded, as torch does it where the weight is float32."""
    rest = (running_mean, running_var, mean, rstd, train, eps, wanted)
    if not train or not (weight is None or is_low(weight)):
        return func(grad, x, weight, *rest)
    rows = [dim for dim in range(x.ndim) if dim != 1]
    shape = [1, -1, *[1] * (x.ndim - 2)]
    wide, centered = grad.float(), x.float() - x.float().mean(rows, keepdim=True)
    scale = torch.rsqrt(centered.square().mean(rows, keepdim=True) + eps)
    normal = centered * scale
    of_weight, of_bias = (wide * normal).sum(rows), wide.sum(rows)
    of_x = None
    if wanted[0]:
        count = x.numel() // x.shape[1]
        scale = scale if weight is None else scale * weight.float().view(shape)
        of_x = (scale * (wide - (of_bias.view(shape) + normal * of_weight.view(shape)) / count)).to(x.dtype)
    return of_x, of_weight.to(x.dtype) if wanted[1] else None, of_bias.to(x.dtype) if wanted[2] else None


_NONE, _MEAN, _SUM = 0, 1, 2


def _nll_forward(
    func: Any, x: Tensor, target: Tensor, weight: Tensor | None, reduction: int, ignored: int
) -> tuple[Tensor, Tensor]:
    """The loss of targets, and their weight: 300 targets count as 300, where bfloat16 stops counting at 256."""
    if reduction == _NONE:
        losses, total = func(x, target, weight, reduction, ignored)
        return losses, total
    weights = _weights(target, weight, ignored)
    losses = func(x, target, None, _NONE, ignored)[0].double()
    total = weights.sum()
    loss = torch.where(weights == 0, 0.0, losses * weights).sum()
    return (loss / total if reduction == _MEAN else loss).to(x.dtype), total.to(x.dtype)


def _nll_backward(
    func: Any, grad: Tensor, x: Tensor, target: Tensor, weight: Tensor | None, reduction: int, ignored: int,
    total: Tensor,
) -> Any:  # fmt: skip
    """The gradient of the mean as that of a sum, divided by the weight of the targets before it was rounded."""
    if reduction == _MEAN:
        grad = (grad.double() / _weights(target, weight, ignored).sum()).to(grad.dtype)
        reduction = _SUM
    return func(grad, x, target, weight, reduction, ignored, total)


def _weights(target: Tensor, weight: Tensor | None, ignored: int) -> Tensor:
    """Return what each target counts, in float64."""
    counts = target != ignored
    return counts.double() if weight is None else counts * weight.double()[torch.where(counts, target, 0)]


_FORMULAS: dict[Any, Formula] = dict.fromkeys(
    [
        aten.embedding_dense_backward.default,
        aten._embedding_bag_backward.default,
        aten._embedding_bag_dense_backward.default,
        aten.index_add.default,
        aten.index_reduce.default,
        aten.segment_reduce.default,
        aten.unfold_backward.default,
        aten.col2im.default,
        aten.grid_sampler_2d_backward.default,
        aten.grid_sampler_3d_backward.default,
        aten.max_pool2d_with_indices_backward.default,
        aten.max_pool3d_with_indices_backward.default,
        aten.avg_pool2d_backward.default,
        aten._adaptive_avg_pool2d_backward.default,
        aten._adaptive_avg_pool3d_backward.default,
        aten._adaptive_avg_pool3d.default,
        aten.adaptive_max_pool2d_backward.default,
        aten.adaptive_max_pool3d_backward.default,
        aten.replication_pad1d_backward.default,
        aten.replication_pad2d_backward.default,
        aten.replication_pad3d_backward.default,
        aten.addbmm.default,
        aten.histc.default,
    ],
    _wide,
)
_FORMULAS |= {
    aten.sum.default: _sum,
    aten.sum.dim_IntList: _sum,
    aten.index_put.default: _put,
    aten.put.default: _put,
    aten.native_layer_norm_backward.default: _layer_norm_backward,
    aten.native_group_norm_backward.default: _group_norm_backward,
    aten.native_batch_norm_backward.default: _batch_norm_backward,
    aten.nll_loss_forward.default: _nll_forward,
    aten.nll_loss2d_forward.default: _nll_forward,
    aten.nll_loss_backward.default: _nll_backward,
    aten.nll_loss2d_backward.default: _nll_backward,
}
_FORMULAS |= {
    aten.index_add_.default: _in_place(aten.index_add.default),
    aten.index_reduce_.default: _in_place(aten.index_reduce.default),
    aten.addbmm_.default: _in_place(aten.addbmm.default),
    aten.index_put_.default: _in_place(aten.index_put.default),
    aten._index_put_impl_.default: _in_place(aten.index_put.default),
    aten.put_.default: _in_place(aten.put.default),
}
# What makes a low tensor of one that is not.
_CASTS = frozenset({aten._to_copy.default, aten.copy_.default, aten.copy.default})
