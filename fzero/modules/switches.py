"""What a module runs under, so that eager, traced and transformed calls of it agree.

Torch and its libraries take shortcuts that depend on how they are called. The shortcut of attention has no
second derivative; that of `nn.MultiheadAttention` is taken in eager calls and not in traces; and Transformers
looks at the values of a mask to leave it out, which a trace does not have. Each is turned off here where it
would be in the way, by the switch that its library has for it, and nowhere else.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fzero._torch import get_proxy_mode
from fzero.modules.known import answering, is_known
from fzero.wrapped import transforms_nest

# The module of Transformers that builds attention masks, and the function that it asks whether it may read values.
_MASKS, _MAY_NOT_READ = "transformers.masking_utils", "is_tracing"


@dataclass(frozen=True)
class Shortcuts:
    """Kernels by which torch would run parts of a module in some calls and not in others.

    Attributes:
        attention: the one for inference of `nn.MultiheadAttention` and what is made of it: it has no gradient,
            other bits than the layers themselves, and no trace.
        lstm: that of `nn.LSTM` on a CPU, whose backward cannot be traced.
    """

    attention: bool
    lstm: bool

    @staticmethod
    def of(module: nn.Module) -> Shortcuts:
        """Return which of them torch has for the parts of a module."""
        kinds = {type(m) for m in module.modules()}
        attention = any(issubclass(kind, nn.MultiheadAttention | nn.TransformerEncoderLayer) for kind in kinds)
        return Shortcuts(attention, any(issubclass(kind, nn.LSTM) for kind in kinds))


@contextlib.contextmanager
def surroundings(shortcuts: Shortcuts) -> Iterator[None]:
    """Return the context in which `fz.functional` calls a module that has these shortcuts."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(differentiable_attention())
        if shortcuts.attention:
            mha = torch.backends.mha
            stack.enter_context(_off(mha.get_fastpath_enabled(), mha.set_fastpath_enabled))
        if shortcuts.lstm:
            stack.enter_context(_off(bool(torch.backends.mkldnn.enabled), _set_mkldnn))
        if get_proxy_mode() is not None:
            stack.enter_context(answering())
            stack.enter_context(_masks_built_in_full())
        yield


@contextlib.contextmanager
def differentiable_attention() -> Iterator[None]:
    """Inside, `scaled_dot_product_attention` has the derivatives that the transforms around it may ask for.

    Its fused kernels have a first one, backward. Where transforms nest, as in a Hessian-vector product, or
    differentiate forward, its formula is taken instead.
    """
    with sdpa_kernel(SDPBackend.MATH) if transforms_nest() else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def _off(before: bool, switch: Callable[[bool], object]) -> Iterator[None]:
    switch(False)
    try:
        yield
    finally:
        switch(before)


def _set_mkldnn(enabled: bool) -> None:
    torch.backends.mkldnn.set_flags(enabled, _fp32_precision=None)


@contextlib.contextmanager
def _masks_built_in_full() -> Iterator[None]:
    """Let Transformers build masks without a look at values that a trace does not have.

    It asks `is_tracing(mask)` first, and is told no where `torch.func` has wrapped the traced tensor.
    """
    masks: Any = sys.modules.get(_MASKS)
    original: Callable[..., bool] | None = getattr(masks, _MAY_NOT_READ, None)
    if original is None:
        yield
        return

    def is_tracing(tensor: Any = None) -> bool:
        return not is_known(tensor) if isinstance(tensor, Tensor) else original(tensor)

    setattr(masks, _MAY_NOT_READ, is_tracing)
    try:
        yield
    finally:
        setattr(masks, _MAY_NOT_READ, original)
