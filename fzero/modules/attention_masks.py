"""Attention masks of numbers, in the dtype of the queries beside them.

A function sees parameters in the compute dtype of its policy, and makes bfloat16 queries of them. A mask that it makes
or is given may still be float32. Torch takes such a pair, but not each of its kernels does: cuDNN reads the bits of the
mask as numbers of the queries' dtype, and returns wrong ones without a word. So where fzero calls a function, such a
mask is cast before torch chooses a kernel, whoever calls torch: the function itself, a module of torch, Transformers.

    attention(bfloat16 queries, float32 mask) ──▶ attention(bfloat16 queries, bfloat16 mask) ──▶ any kernel

A mode costs every operation. So modes that stand around a gradient or a trace anyhow look into the table `FORMS` too,
and only calls without either are given `masks_cast`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


class masks_cast(TorchFunctionMode):  # noqa: N801 - used as a context manager, `with masks_cast():`
    """While active, functions of torch that attend cast masks of numbers to the dtype of their queries.

    Example:
        >>> q, mask = torch.ones(1, 2, 4, dtype=torch.bfloat16), torch.full((2, 2), torch.finfo(torch.float32).min)
        >>> with masks_cast():  # all keys are masked alike: the lowest number stays a number, and they count alike
        ...     F.scaled_dot_product_attention(q, q, q, mask)[0, 0]
        tensor([1., 1., 1., 1.], dtype=torch.bfloat16)
    """

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        form = FORMS.get(func)
        return func(*args, **(kwargs or {})) if form is None else form(func, *args, **(kwargs or {}))


def cast(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a mask of numbers in another dtype. What is finite stays so.

    The lowest float32 number, or -1e9 in float16, would become an infinity: a row of nothing else then has no softmax.
    """
    limits = torch.finfo(dtype)
    if limits.max < torch.finfo(mask.dtype).max:
        mask = torch.where(mask.isinf(), mask, mask.clamp(limits.min, limits.max))
    return mask.to(dtype)


def _fitting(mask: Any, query: Tensor) -> Any:
    if not isinstance(mask, Tensor) or type(mask).__module__ == _BIAS or not mask.is_floating_point():
        return mask
    return mask if mask.dtype == query.dtype else cast(mask, query.dtype)


def _attention(
    original: Callable[..., Any], query: Tensor, key: Any, value: Any, attn_mask: Any = None, *rest: Any, **given: Any
) -> Any:
    return original(query, key, value, _fitting(attn_mask, query), *rest, **given)


def _heads(original: Callable[..., Any], query: Tensor, *rest: Any, **given: Any) -> Any:
    """`torch.nn.functional.multi_head_attention_forward`, which a mode sees in the place of what it calls."""
    masks = {name: _fitting(given[name], query) for name in ("attn_mask", "key_padding_mask") if name in given}
    return original(query, *rest, **given | masks)


# The module of torch's masks that hold no numbers. It is not imported: it would load Dynamo.
_BIAS = "torch.nn.attention.bias"
# Functions that attend, and the form in which each is called: `form(function, *args, **kwargs)`.
FORMS: dict[Any, Callable[..., Any]] = {
    F.scaled_dot_product_attention: _attention,
    F.multi_head_attention_forward: _heads,
}
