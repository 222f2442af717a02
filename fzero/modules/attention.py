"""Attention, by torch's own kernels or by one from outside, as a function that every transform takes.

Torch's fused kernels have a first derivative; where transforms nest, the formula is taken in their place. A
kernel from outside comes as two functions, and becomes one that `torch.func` and a trace can see through:

    forward(q, k, v)               → output, residuals
    backward(residuals, cotangent) → q̄, k̄, v̄
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from fzero import tree
from fzero._torch import unwrap_if_dead
from fzero.errors import ModuleError, ShapeError
from fzero.modules.attention_masks import cast
from fzero.modules.switches import differentiable_attention


@dataclass(frozen=True)
class AttentionKernel:
    """An attention kernel that brings its own backward, such as one of a flash-attention package.

    Attributes:
        forward: `forward(q, k, v, *, causal, scale) -> (output, residuals)`. Residuals are any tree: tensors,
            which may be the inputs and the output, and Python values.
        backward: `backward(residuals, cotangent) -> (q̄, k̄, v̄)`.

    Both are called on plain tensors. To be traced they have to be made of operators that have a fake implementation:
    register a raw kernel by `torch.library.custom_op`, and its results' shapes and strides by `register_fake`.

    Example:
        >>> def forward(q, k, v, *, causal, scale):  # weights that need no softmax: all keys count alike
        ...     return v.mean(-2, keepdim=True).expand_as(q).clone(), (q, k)
        >>> def backward(residuals, cotangent):
        ...     q, k = residuals
        ...     return q * 0, k * 0, cotangent.sum(-2, keepdim=True).expand_as(k) / k.shape[-2]
        >>> q, k, v = torch.ones(3, 2, 4, 8, 16)
        >>> attention(q, k, v, kernel=AttentionKernel(forward, backward)).shape
        torch.Size([2, 4, 8, 16])
    """

    forward: Callable[..., tuple[Tensor, Any]]
    backward: Callable[[Any, Tensor], tuple[Tensor, Tensor, Tensor]]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    mask: Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    kernel: AttentionKernel | Literal["math"] | None = None,
) -> Tensor:
    """Return `softmax(q kᵀ · scale) v`, differentiable under `fz.vjp`, and the same under `fz.jit`.

    Args:
        q: queries, floating-point, `(..., heads, length, width)`.
        k: keys of the same dtype, `(..., heads, length of keys, width)`. Queries may have a multiple of their heads.
        v: values, likewise.
        causal: each position sees itself and those before it.
        mask: bool, true where a score counts; or numbers, cast to the dtype of `q`, that are added to the scores.
            Broadcast to `(..., heads, length, length of keys)`.
        scale: default: one over the square root of the width.
        dropout: the probability of dropping a weight, drawn from the state's key like other draws.
        kernel: default: torch's fastest that has the derivatives asked for. `"math"`: the formula, with
            derivatives of every order. Else an `AttentionKernel`, which has a first derivative only.

    Raises:
        ValueError: a mask or a dropout together with an `AttentionKernel`.
        ShapeError: from an `AttentionKernel`: its output or gradients have other shapes than they should.
        ModuleError: a second or a forward derivative of an `AttentionKernel`.

    Example:
        >>> q, k, v = torch.ones(3, 2, 4, 8, 16)
        >>> attention(q, k, v, causal=True).shape
        torch.Size([2, 4, 8, 16])
    """
    if isinstance(kernel, AttentionKernel):
        if mask is not None or dropout:
            raise ValueError(
                "fz.attention: expected neither mask nor dropout beside an AttentionKernel, which is not told of them: "
                f"got mask={'None' if mask is None else tree.describe(mask)}, dropout={dropout}. Build them into its "
                "forward and backward, or leave the kernel out."
            )
        return _from_outside(kernel, q, k, v, causal=causal, scale=scale)
    if mask is not None and mask.is_floating_point():
        mask = cast(mask, q.dtype)
    # The fused kernels draw from the global generator; the formula drops by an operator that a key decides.
    formula = kernel == "math" or dropout > 0
    context = sdpa_kernel(SDPBackend.MATH) if formula else contextlib.nullcontext()
    with differentiable_attention(), context:
        grouped = q.shape[-3] != k.shape[-3] if q.ndim > 2 else False
        return scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal, scale=scale, enable_gqa=grouped
        )


def _from_outside(
    kernel: AttentionKernel, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float | None
) -> Tensor:
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    recipe: list[_Recipe] = []

    def forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        output, residuals = kernel.forward(q, k, v, causal=causal, scale=scale)
        expected = (*q.shape[:-1], v.shape[-1])
        if output.shape != expected:
            raise ShapeError(
                f"fz.attention: the kernel's forward returned an output of shape {tuple(output.shape)} for q of shape "
                f"{tuple(q.shape)}; expected {expected}."
            )
        tensors, _, hollow = tree.split(residuals)
        known = (q, k, v, output)
        places = tuple(next((i for i, x in enumerate(known) if x is t), None) for t in tensors)
        recipe[:] = [_Recipe(hollow, places)]
        return (output, *(t for t, place in zip(tensors, places, strict=True) if place is None))

    def backward(saved: Sequence[Tensor], cotangent: Tensor) -> tuple[Tensor, ...]:
        gradients = tuple(kernel.backward(recipe[0].filled(saved), cotangent))
        got, expected = [x.shape for x in gradients], [x.shape for x in saved[:3]]
        if got != expected:
            raise ShapeError(
                f"fz.attention: the kernel's backward returned gradients of shapes {[tuple(x) for x in got]}; expected "
                f"those of q, k and v: {[tuple(x) for x in expected]}."
            )
        return gradients

    return _Forward.apply(forward, backward, q, k, v)[0]


@dataclass(frozen=True)
class _Recipe:
    """How residuals are put together from what is saved: q, k, v, the output, and tensors of their own."""

    hollow: tree.Hollow
    places: tuple[int | None, ...]  # of each tensor among the first four; `None` for its own

    def filled(self, saved: Sequence[Tensor]) -> Any:
        own = iter(saved[4:])
        return self.hollow.fill([next(own) if place is None else saved[place] for place in self.places])


class _Forward(torch.autograd.Function):
    @staticmethod
    def forward(forward: Any, backward: Any, *qkv: Tensor) -> tuple[Tensor, ...]:
        return forward(*qkv)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, ctx.run, *qkv = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*qkv, *output)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor, *_: Any) -> tuple[Any, ...]:
        # A pullback runs after its transform has ended; a kernel reads memory, which the wrapper has none of.
        saved = [unwrap_if_dead(x) for x in ctx.saved_tensors]
        return (None, None, *_Backward.apply(ctx.run, cotangent, *saved))

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Any:
        raise _no_derivative("a forward derivative")

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
        return _one_by_one(_Forward, info, in_dims, arguments)


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(backward: Any, cotangent: Tensor, *saved: Tensor) -> tuple[Tensor, ...]:
        return backward(saved, cotangent)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise _no_derivative("a second derivative")

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Any:
        raise _no_derivative("a second derivative")

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
        return _one_by_one(_Backward, info, in_dims, arguments)


def _one_by_one(function: Any, info: Any, in_dims: tuple[Any, ...], arguments: tuple[Any, ...]) -> tuple[Any, Any]:
    """Call a kernel for each element of a batch that it does not know of."""
    rows = [
        function.apply(*(x if dim is None else x.select(dim, i) for x, dim in zip(arguments, in_dims, strict=True)))
        for i in range(info.batch_size)
    ]
    results = tuple(torch.stack(column) for column in zip(*rows, strict=True))
    return results, (0,) * len(results)


def _no_derivative(which: str) -> ModuleError:
    return ModuleError(
        f"fz.attention: {which} of an AttentionKernel was asked for, which brings a first one, backward, only. Leave "
        f'the kernel out, or say kernel="math": the formula has derivatives of every order.'
    )
