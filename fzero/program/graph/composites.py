"""Functions of torch that read sizes as numbers, in a form that leaves sizes open.

Most of torch passes an open size on as it is. A few functions are made of others in C++ that asks for the number: the
program would then be for that one size. Where a trace has open sizes they are put together here, of the same operators
in the same order, so that their results have the same bits. Products of matrices torch puts together itself, in Python.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from fzero._torch import composites_in_python


class sizes_left_open(TorchFunctionMode):  # noqa: N801 - used as a context manager, `with sizes_left_open():`
    """While active, functions that would read open sizes as numbers are replaced by such that do not."""

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        form = _FORMS.get(func)
        if form is not None and any(isinstance(x, Tensor) and _is_open(x) for x in args[:3]):
            found = form(*args, **kwargs)
            if found is not NotImplemented:
                return found
        return func(*args, **kwargs)


def _is_open(x: Tensor) -> bool:
    return any(isinstance(size, torch.SymInt) for size in x.shape)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    """`torch.nn.functional.linear`: one addmm over all rows, as torch has it for contiguous input."""
    if bias is None or x.ndim != 3 or not x.is_contiguous():
        return _by_torch(F.linear)(x, weight, bias)
    flat = torch.addmm(bias, x.reshape(-1, x.shape[-1]), weight.t())
    return flat.view(*x.shape[:-1], weight.shape[0])


def _by_torch(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the form of a function of matrix products, of which torch itself has one in Python that is as good."""

    def form(*args: Any, **kwargs: Any) -> Any:
        with composites_in_python():
            return function(*args, **kwargs)

    return form


def _attention(*args: Any, **kwargs: Any) -> Any:
    dropout = kwargs.get("dropout_p", args[4] if len(args) > 4 else 0)
    return NotImplemented if dropout else _by_torch(F.scaled_dot_product_attention)(*args, **kwargs)


def _heads(*args: Any, **kwargs: Any) -> Any:
    """`torch.nn.functional.multi_head_attention_forward`. Torch's form of dropout would draw other numbers."""
    dropout = kwargs.get("dropout_p", args[10] if len(args) > 10 else 0)
    draws = dropout and kwargs.get("training", True)
    return NotImplemented if draws else _by_torch(F.multi_head_attention_forward)(*args, **kwargs)


def _pad(x: Tensor, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Any:
    """`torch.nn.functional.pad` by constants. Negative numbers cut elements off."""
    if mode != "constant":
        return NotImplemented
    padded = x
    for d, (before, after) in enumerate(zip(pad[::2], pad[1::2], strict=True)):
        dim = x.ndim - 1 - d
        size = padded.shape[dim]
        cut = padded.narrow(dim, max(-before, 0), size + min(before, 0) + min(after, 0))
        ends = [cut.new_full((*cut.shape[:dim], max(n, 0), *cut.shape[dim + 1 :]), value or 0) for n in (before, after)]
        padded = torch.cat([ends[0], cut, ends[1]], dim) if max(before, after) > 0 else cut
    return padded.clone() if max(pad, default=0) <= 0 else padded


def _dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
    """`torch.nn.functional.dropout`, which is one kernel on CUDA."""
    if inplace or not 0 <= p <= 1:
        return NotImplemented
    if p == 0 or not training:
        return x
    if p == 1:
        return x * torch.zeros((), dtype=x.dtype, device=x.device)
    if x.is_cuda:
        return torch.native_dropout(x, p, True)[0]
    return x * torch.empty_like(x).bernoulli_(1 - p).div_(1 - p)


def _baddbmm(x: Tensor, batch1: Tensor, batch2: Tensor, *, beta: float = 1, alpha: float = 1) -> Any:
    """`torch.baddbmm`, with what is added as large as the products."""
    whole = x.expand(batch1.shape[0], batch1.shape[1], batch2.shape[2])
    return torch.baddbmm(whole, batch1, batch2, beta=beta, alpha=alpha)


_FORMS: dict[Callable[..., Any], Callable[..., Any]] = {
    F.linear: _linear,
    torch.matmul: _by_torch(torch.matmul),
    Tensor.matmul: _by_torch(Tensor.matmul),
    Tensor.__matmul__: _by_torch(Tensor.__matmul__),
    F.scaled_dot_product_attention: _attention,
    F.multi_head_attention_forward: _heads,
    F.pad: _pad,
    F.dropout: _dropout,
    torch.dropout: _dropout,
    torch.baddbmm: _baddbmm,
    torch.Tensor.baddbmm: _baddbmm,
}
