"""Functions of torch that look at values, in forms that do not, for a trace, which has none.

Some look to check their arguments, and some for a number that is an operand as well. Each form returns the same bits.
What has no such form is refused, with the remedies of `fzero.program.graph.remedies`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from fzero._torch import TorchDispatchMode
from fzero.modules.attention_masks import FORMS as MASKS

_Form = Callable[..., Any]


class without_looks(TorchFunctionMode):  # noqa: N801 - used as a context manager, `with without_looks():`
    """While active, the functions of the table below run in the forms that stand there."""

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        form = _FORMS.get(func)
        return func(*args, **(kwargs or {})) if form is None else form(func, *args, **(kwargs or {}))


class _Unchecked(TorchDispatchMode):
    """Answers the questions of a function that only asks whether something is wrong: no."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return False if func is torch.ops.aten._local_scalar_dense.default else func(*args, **(kwargs or {}))


def _one_hot(original: _Form, tensor: Tensor, num_classes: int = -1) -> Tensor:
    """Torch looks whether all classes are below `num_classes`. Compared with 0, 1, 2, … they need no look."""
    if num_classes < 0:  # the shape depends on the largest class: refused
        return original(tensor, num_classes)
    classes = torch.arange(num_classes, dtype=tensor.dtype, device=tensor.device)
    return (tensor.unsqueeze(-1) == classes).to(torch.int64)


def _unchecked(original: _Form, *args: Any, **kwargs: Any) -> Any:
    with _Unchecked():
        return original(*args, **kwargs)


def _narrow(original: _Form, input: Tensor, dim: int, start: int | Tensor, length: int) -> Tensor:
    """Torch reads a start that is a tensor as a number. Here the elements from it on are looked up by their indices."""
    if not isinstance(start, Tensor):
        return original(input, dim, start, length)
    first = torch.where(start < 0, start + input.shape[dim], start)
    return input.index_select(dim, first + torch.arange(length, device=input.device))


_FORMS: dict[Any, _Form] = {
    F.one_hot: _one_hot,
    F.gaussian_nll_loss: _unchecked,  # it looks for negative variances
    torch.narrow: _narrow,
    Tensor.narrow: _narrow,
}
_FORMS |= MASKS
