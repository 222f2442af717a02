"""AdamW on one 1-D piece of a leaf, its rounding to bfloat16 included: one pass over memory.

Two ops, opaque to a trace: `fzero::adamw` returns new (p, m, v), `fzero::adamw_` overwrites them. CUDA runs the Triton
kernel; a CPU runs the torch reference, compiled where that is possible. All three do the same float32 operations in the
same order, one rounding each, so they agree bit for bit (but for the payload of a NaN).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fzero import random
from fzero.kernels.compiled import run_in_place
from fzero.kernels.rounding import jit, mix, remix, round_to, tl
from fzero.kernels.transformed import transformed

STATE_DTYPES = (torch.float32, torch.bfloat16)
GRADIENT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Elements that one Triton program updates.
BLOCK = 1024


def adamw(
    p: Tensor,
    m: Tensor,
    v: Tensor,
    g: Tensor,
    scalars: Tensor,
    keys: Tensor,
    offset: Tensor,
    *,
    b1: float,
    b2: float,
    eps: float,
    stochastic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return parameters and moments after one AdamW step; nothing is overwritten.

    An element whose gradient times the factor is not finite keeps p, m and v; a NaN factor skips the whole step.

    Args:
        p: parameters: 1-D, contiguous, float32 or bfloat16.
        m: first moment: shape of `p`, float32 or bfloat16.
        v: second moment: likewise.
        g: gradient: shape of `p`, float32, bfloat16 or float16.
        scalars: float32 of shape (4,), from `adamw_scalars`.
        keys: int32 of shape (2,), from `fzero.random.leaf_keys`.
        offset: int32, 0-d: global index of element 0 in its leaf, modulo 2^32.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the root of the second moment.
        stochastic: round what is stored as bfloat16 stochastically, by bits drawn for `keys` and the element's index;
            otherwise to nearest.

    Returns:
        `(p, m, v)`, each in the dtype it came in. Under `torch.func` transforms differentiable, the rounding as the
        identity.

    Raises:
        ValueError: a shape or a layout in memory that the kernel does not take.
        TypeError: a dtype that it does not take.

    Source: decoupled weight decay, Loshchilov and Hutter 2019, arXiv 1711.05101.

    Example:
        >>> p, m, v, g = torch.ones(3), torch.zeros(3), torch.zeros(3), torch.ones(3)
        >>> zero = torch.tensor(0, dtype=torch.int32)
        >>> scalars = adamw_scalars(zero, lr=0.1, b1=0.9, b2=0.999, weight_decay=0.0)
        >>> keys = torch.zeros(2, dtype=torch.int32)
        >>> adamw(p, m, v, g, scalars, keys, zero, b1=0.9, b2=0.999, eps=1e-8, stochastic=False)[0]
        tensor([0.9000, 0.9000, 0.9000])
    """
    _check("adamw", p, m, v, g, scalars, keys, offset)
    run = adamw_reference if transformed(p, m, v, g, scalars, keys, offset) else torch.ops.fzero.adamw
    updated: tuple[Tensor, Tensor, Tensor] = run(p, m, v, g, scalars, keys, offset, b1, b2, eps, stochastic)
    return updated


def adamw_(
    p: Tensor,
    m: Tensor,
    v: Tensor,
    g: Tensor,
    scalars: Tensor,
    keys: Tensor,
    offset: Tensor,
    *,
    b1: float,
    b2: float,
    eps: float,
    stochastic: bool,
) -> None:
    """Overwrite `p`, `m` and `v` by one AdamW step. Arguments and values are those of `adamw`."""
    _check("adamw_", p, m, v, g, scalars, keys, offset)
    run = adamw_reference_ if transformed(p, m, v, g, scalars, keys, offset) else torch.ops.fzero.adamw_
    run(p, m, v, g, scalars, keys, offset, b1, b2, eps, stochastic)


def adamw_scalars(
    step: Tensor,
    lr: float | Tensor,
    b1: float,
    b2: float,
    weight_decay: float,
    factor: float | Tensor = 1.0,
) -> Tensor:
    """Return what an AdamW step needs beside its tensors: (decay, step size, 1 / root of 1 - b2^t, factor).

    Computed in float64, returned as float32 of shape (4,), on the device of `step`.

    Args:
        step: 0-based count of the steps taken: int32, 0-d. t is `step + 1`.
        lr: learning rate.
        b1: decay of the first moment.
        b2: decay of the second moment.
        weight_decay: decoupled, multiplied by the learning rate.
        factor: what the gradient has to be multiplied by to be true; NaN skips the step.
    """
    t = step.to(torch.float64) + 1
    rate = torch.zeros_like(t) + lr
    decay = 1 - rate * weight_decay
    step_size = rate / (1 - b1**t)
    correction = 1 / torch.sqrt(1 - b2**t)
    return torch.stack([decay, step_size, correction, torch.zeros_like(t) + factor]).to(torch.float32)


def adamw_reference(
    p: Tensor,
    m: Tensor,
    v: Tensor,
    g: Tensor,
    scalars: Tensor,
    keys: Tensor,
    offset: Tensor,
    b1: float,
    b2: float,
    eps: float,
    stochastic: bool,
    compiled: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """AdamW in plain torch operations: what the kernel computes. Arguments are those of `adamw`.

    `compiled` says that Inductor traces it, see `fzero.kernels.compiled.run_in_place`.
    """
    decay, step_size, correction, factor = scalars.unbind()
    gradient = g.float() * factor
    ok = torch.isfinite(gradient)
    first = m.float()
    first = first + (gradient - first) * (1 - b1)
    second = v.float() * b2 + gradient * gradient * (1 - b2)
    parameter = p.float() * decay - step_size * (first / (_sqrt(second, compiled) * correction + eps))
    noise: tuple[Tensor | None, Tensor | None, Tensor | None]
    if stochastic:
        word = random.bits(keys, offset, p.shape[0])
        noise = word & 0xFFFF, random.shift_right(word, 16), random.remix(word) & 0xFFFF
    else:
        noise = None, None, None
    return (
        torch.where(ok, _round_to(parameter, noise[0], p.dtype), p),
        torch.where(ok, _round_to(first, noise[1], m.dtype), m),
        torch.where(ok, _round_to(second, noise[2], v.dtype), v),
    )


def _sqrt(x: Tensor, compiled: bool) -> Tensor:
    """The root of float32 `x`, correctly rounded, as kernels compute it.

    Compiled code has an instruction for that; torch's own operation calls a library that may be one bit off, and the
    root of a float64 rounded to float32 is correct.
    """
    return torch.sqrt(x) if compiled else torch.sqrt(x.double()).float()


def adamw_reference_(p: Tensor, m: Tensor, v: Tensor, *rest: Any, **static: Any) -> None:
    """Overwrite `p`, `m` and `v` by what `adamw_reference` returns for the same arguments."""
    new_p, new_m, new_v = adamw_reference(p, m, v, *rest, **static)
    p.copy_(new_p)
    m.copy_(new_m)
    v.copy_(new_v)


def _round_to(x: Tensor, noise16: Tensor | None, dtype: torch.dtype) -> Tensor:
    if noise16 is None or dtype == torch.float32:
        return x.to(dtype)
    return random.round_stochastic(x, noise16, dtype)


@jit
def adamw_kernel(
    p_out, m_out, v_out, p_in, m_in, v_in, g_in, scalars, keys, offset_in,
    length, one_minus_b1, b2, one_minus_b2, eps,
    STOCHASTIC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`adamw_reference` for BLOCK elements a program. Launched without fused multiply-add."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < length
    decay, step_size = tl.load(scalars), tl.load(scalars + 1)
    correction, factor = tl.load(scalars + 2), tl.load(scalars + 3)

    p = tl.load(p_in + place, inside)
    m = tl.load(m_in + place, inside)
    v = tl.load(v_in + place, inside)
    gradient = tl.load(g_in + place, inside).to(tl.float32) * factor
    # Finite: the exponent bits are not all ones.
    ok = (gradient.to(tl.int32, bitcast=True) & 0x7F800000) != 0x7F800000
    first = m.to(tl.float32)
    first = first + (gradient - first) * one_minus_b1
    second = v.to(tl.float32) * b2 + gradient * gradient * one_minus_b2
    parameter = p.to(tl.float32) * decay - step_size * tl.div_rn(first, tl.sqrt_rn(second) * correction + eps)

    index = place.to(tl.int32) + tl.load(offset_in)
    word = mix(index, tl.load(keys), tl.load(keys + 1))
    parameter = round_to(parameter, word & 0xFFFF, p.dtype, STOCHASTIC)
    first = round_to(first, (word >> 16) & 0xFFFF, m.dtype, STOCHASTIC)
    second = round_to(second, remix(word) & 0xFFFF, v.dtype, STOCHASTIC)
    tl.store(p_out + place, tl.where(ok, parameter, p), inside)
    tl.store(m_out + place, tl.where(ok, first, m), inside)
    tl.store(v_out + place, tl.where(ok, second, v), inside)


def launch(
    out: tuple[Tensor, Tensor, Tensor],
    p: Tensor,
    m: Tensor,
    v: Tensor,
    g: Tensor,
    scalars: Tensor,
    keys: Tensor,
    offset: Tensor,
    b1: float,
    b2: float,
    eps: float,
    stochastic: bool,
) -> None:
    """Write the step into `out` by one launch of the Triton kernel. `out` may be (p, m, v) themselves."""
    length = p.numel()
    if length == 0:
        return
    grid = ((length + BLOCK - 1) // BLOCK,)
    tensors = (*out, p, m, v, g, scalars, keys, offset)
    numbers = (length, 1 - b1, b2, 1 - b2, eps)
    with torch.cuda.device_of(p):
        adamw_kernel[grid](*tensors, *numbers, STOCHASTIC=stochastic, BLOCK=BLOCK, enable_fp_fusion=False)


ARGUMENTS = "Tensor g, Tensor scalars, Tensor keys, Tensor offset, float b1, float b2, float eps, bool stochastic"
torch.library.define(
    "fzero::adamw", f"(Tensor p, Tensor m, Tensor v, {ARGUMENTS}) -> (Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)  # fmt: skip
torch.library.define(
    "fzero::adamw_", f"(Tensor(a!) p, Tensor(b!) m, Tensor(c!) v, {ARGUMENTS}) -> ()",
    tags=torch.Tag.pt2_compliant_tag,
)  # fmt: skip


def _adamw(
    p: Tensor, m: Tensor, v: Tensor, g: Tensor, scalars: Tensor, keys: Tensor, offset: Tensor, *statics: Any
) -> tuple[Tensor, Tensor, Tensor]:
    if p.is_cuda:
        out = torch.empty_like(p), torch.empty_like(m), torch.empty_like(v)
        launch(out, p, m, v, g, scalars, keys, offset, *statics)
    else:
        out = p.clone(), m.clone(), v.clone()
        _adamw_(*out, g, scalars, keys, offset, *statics)
    return out


def _adamw_(
    p: Tensor,
    m: Tensor,
    v: Tensor,
    g: Tensor,
    scalars: Tensor,
    keys: Tensor,
    offset: Tensor,
    b1: float,
    b2: float,
    eps: float,
    stochastic: bool,
) -> None:
    if p.is_cuda:
        launch((p, m, v), p, m, v, g, scalars, keys, offset, b1, b2, eps, stochastic)
        return
    # float32 throughout draws nothing: one program for both flags.
    stochastic = stochastic and torch.bfloat16 in (p.dtype, m.dtype, v.dtype)
    statics = {"b1": b1, "b2": b2, "eps": eps, "stochastic": stochastic}
    run_in_place(adamw_reference_, (p, m, v, g), (scalars, keys), offset, **statics)


torch.library.impl("fzero::adamw", ("cpu", "cuda"), _adamw)
torch.library.impl("fzero::adamw_", ("cpu", "cuda"), _adamw_)


@torch.library.register_fake("fzero::adamw")
def _(p: Tensor, m: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(p), torch.empty_like(m), torch.empty_like(v)


@torch.library.register_fake("fzero::adamw_")
def _(p: Tensor, m: Tensor, v: Tensor, *rest: Any) -> None:
    return None


def _check(
    call: str, p: Tensor, m: Tensor, v: Tensor, g: Tensor, scalars: Tensor, keys: Tensor, offset: Tensor
) -> None:
    for name, tensor, dtypes in (
        ("p", p, STATE_DTYPES),
        ("m", m, STATE_DTYPES),
        ("v", v, STATE_DTYPES),
        ("g", g, GRADIENT_DTYPES),
        ("scalars", scalars, (torch.float32,)),
        ("keys", keys, (torch.int32,)),
        ("offset", offset, (torch.int32,)),
    ):
        if tensor.dtype not in dtypes:
            expected = " or ".join(str(dtype) for dtype in dtypes)
            raise TypeError(f"{call}: {name} has dtype {tensor.dtype}, expected {expected}. Cast it first.")
        if tensor.device != p.device:
            raise ValueError(f"{call}: {name} is on {tensor.device} and p on {p.device}. Move it there.")
        if not tensor.is_contiguous():
            raise ValueError(f"{call}: {name} is not contiguous. Pass {name}.contiguous().")
    if p.ndim != 1:
        raise ValueError(f"{call}: p has shape {tuple(p.shape)}, expected one dimension. Pass p.flatten().")
    for name, tensor, shape in (
        ("m", m, p.shape),
        ("v", v, p.shape),
        ("g", g, p.shape),
        ("scalars", scalars, (4,)),
        ("keys", keys, (2,)),
        ("offset", offset, ()),
    ):
        if tensor.shape != shape:
            raise ValueError(f"{call}: {name} has shape {tuple(tensor.shape)}, expected {tuple(shape)}.")
