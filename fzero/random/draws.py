"""Calls of torch's random operators answered from a key, or refused with the way out.

A call of an in-place form copies what is drawn, and so does the form with `out`; an overload with `generator=None` is
the one without.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fzero._torch import OpOverload
from fzero.random.distributions import DRAWS

_MATH = (
    "Take the kernel that drops by an operator of its own: with torch.nn.attention.sdpa_kernel(SDPBackend.MATH), or "
    "set the dropout of the attention to 0"
)
_LAYERS = (
    "Turn the fused kernel off, with torch.backends.cudnn.flags(enabled=False), or drop between layers by F.dropout"
)
# Those that cannot be drawn from a key, with the way out. They draw inside of a kernel, or their distribution has no
# inverse in operators of torch.
REFUSED: dict[str, str] = {
    "aten::binomial": "Sum coins instead: (torch.rand(n, *p.shape) < p).sum(0)",
    "aten::_cudnn_rnn": _LAYERS,
    "aten::_cudnn_init_dropout_state": _LAYERS,
    "aten::miopen_rnn": _LAYERS,
    "aten::_lstm_mps": _LAYERS,
    "aten::_scaled_dot_product_flash_attention": _MATH,
    "aten::_scaled_dot_product_flash_attention_for_cpu": _MATH,
    "aten::_scaled_dot_product_efficient_attention": _MATH,
    "aten::_scaled_dot_product_efficient_attention_backward": _MATH,
    "aten::_scaled_dot_product_cudnn_attention": _MATH,
    "aten::_scaled_dot_product_cudnn_attention_backward": _MATH,
    "aten::_scaled_dot_product_fused_attention_overrideable": _MATH,
    "aten::_scaled_dot_product_attention_math_for_mps": _MATH,
    "aten::_flash_attention_forward": _MATH,
    "aten::_flash_attention_forward_no_dropout_inplace": _MATH,
    "aten::_efficient_attention_forward": _MATH,
    "aten::_cudnn_attention_forward": _MATH,
    "aten::_cudnn_attention_backward": _MATH,
    "aten::_triton_scaled_dot_attention": _MATH,
    "aten::_fill_mem_eff_dropout_mask": _MATH,
    "aten::_nested_tensor_softmax_with_shape": "Pad the batch to one length instead of nesting it",
    "prims::inductor_seed": "Call torch.rand instead",
    "prims::inductor_seeds": "Call torch.rand instead",
    "prims::inductor_rand_eager_offset": "Call torch.rand instead",
    "prims::inductor_rand_eager_offsets": "Call torch.rand instead",
    "prims::normal": "Call torch.randn instead",
    "prims::uniform": "Call torch.rand instead",
    "rngprims::philox_rand": "Call torch.rand instead",
    "inductor_prims::inductor_reserve_rng_state": "Compile by fz.jit(..., lower='inductor')",
}


def named(op: OpOverload) -> str:
    """Return the name by which an operator stands in the tables."""
    return op._schema.name.removesuffix("_")


def drawn(op: OpOverload, keys: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Return what a call of a random operator returns, drawn from the key words (2,). It must stand in `DRAWS`."""
    given: dict[str, Any] = {}
    out: list[Tensor] = []
    for position, argument in enumerate(op._schema.arguments):
        if position < len(args):
            value = args[position]
        else:
            value = kwargs.get(argument.name, argument.default_value)
        if argument.is_out:
            out.append(value)
        else:
            given[argument.name] = value
    if out and "dtype" not in given:
        given["dtype"], given["device"] = out[0].dtype, out[0].device
    result = DRAWS[named(op)](keys, given)
    if op._schema.name.endswith("_"):
        return given["self"].copy_(result)
    if not out:
        like = given.get("self")
        return result.to(like.dtype) if named(op) in _OF_ITS_DTYPE and isinstance(like, Tensor) else result
    several = result if isinstance(result, tuple) else (result,)
    for target, value in zip(out, several, strict=True):
        if target.shape != value.shape:
            target.resize_(value.shape)
        target.copy_(value)
    return out[0] if len(out) == 1 else tuple(out)


# Their draws have a dtype of their own, which the in-place form casts.
_OF_ITS_DTYPE = (
    "aten::cauchy",
    "aten::exponential",
    "aten::geometric",
    "aten::log_normal",
    "aten::normal",
    "aten::normal_functional",
    "aten::uniform",
)


def truncated_normal_(
    original: Callable[..., Tensor],
    x: Tensor,
    mean: float,
    std: float,
    a: float,
    b: float,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Fill `x` as `torch.nn.init.trunc_normal_` does, which draws again until all values are within the bounds.

    One draw serves here, by the inverse of the distribution function. An interval above the mean is mirrored to below
    it, where the function is small and float64 tells its values apart.
    """
    low, high, sign = (a - mean) / std, (b - mean) / std, 1.0
    if low + high > 0.0:
        low, high, sign = -high, -low, -1.0
    below, within = 0.5 * math.erfc(-low / math.sqrt(2.0)), 0.5 * (math.erfc(-high / math.sqrt(2.0)))
    with torch.no_grad():
        unit = torch.empty_like(x, dtype=torch.float64).uniform_(generator=generator)
        # Draws are multiples of 2^-24, from 0 on. In the middle of a step none is 0, where the inverse may be infinite.
        values = torch.special.ndtri(below + (unit + 2.0**-25) * (within - below)) * (sign * std) + mean
        return x.copy_(values.clamp(min=a, max=b))
