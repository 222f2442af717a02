"""What `torch.func`, vmap and a trace have wrapped a tensor in, and the plain tensor or the node below it."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import forward_ad

from fzero._torch import functorch, get_proxy_mode, get_proxy_slot, is_functorch_wrapped, unwrap_if_dead


def functorch_level(x: torch.Tensor) -> int:
    """Return the nesting level of the transform that wraps a tensor; 0 for a plain one."""
    level = functorch.maybe_get_level(x)
    return 0 if level is None else max(level, 0)


def unwrapped(x: torch.Tensor) -> torch.Tensor:
    """Return the plain tensor below the wrappers of transforms. What vmap batches stands in front, the outer first."""
    while is_functorch_wrapped(x):
        is_batched = functorch.is_batchedtensor(x)
        dim = functorch.maybe_get_bdim(x) if is_batched else 0
        x = functorch.get_unwrapped(x)
        if is_batched:
            x = x.movedim(dim, 0)  # where those of inner vmaps stand already
    return x


def below_transforms(x: torch.Tensor) -> torch.Tensor:
    """Return the plain tensor below the wrappers of transforms, none of which is vmap."""
    while is_functorch_wrapped(x):
        x = functorch.get_unwrapped(x)
    return x


def is_batched(x: torch.Tensor) -> bool:
    """Return whether vmap batches a tensor, at any level."""
    while is_functorch_wrapped(x):
        if functorch.is_batchedtensor(x):
            return True
        x = functorch.get_unwrapped(x)
    return False


def is_differentiated(x: torch.Tensor) -> bool:
    """Return whether a transform that runs differentiates `x`, backward or forward, at any level."""
    stack = functorch.get_interpreter_stack() or []
    forward = any(interpreter.key() == functorch.TransformType.Jvp for interpreter in stack)
    x = unwrap_if_dead(x)
    while is_functorch_wrapped(x):
        here = functorch.is_gradtrackingtensor(x)
        if here and (x.requires_grad or (forward and forward_ad.unpack_dual(x, level=0).tangent is not None)):
            return True
        x = unwrap_if_dead(functorch.get_unwrapped(x))
    return False


def is_connected(x: torch.Tensor) -> bool:
    """Return whether what the innermost `torch.func` transform differentiates has a path to `x`."""
    here = functorch.is_gradtrackingtensor(x) and functorch.maybe_get_level(x) == functorch.maybe_current_level()
    return bool(here and x.requires_grad)


def transforms_nest() -> bool:
    """Return whether what runs now may be differentiated twice, or forward: by more than one transform, or by jvp."""
    stack = functorch.get_interpreter_stack() or []
    kinds = [interpreter.key() for interpreter in stack]
    forward = kinds.count(functorch.TransformType.Jvp)
    return forward > 0 or kinds.count(functorch.TransformType.Grad) > 1


def is_transformed_now() -> bool:
    """Return whether a `torch.func` transform is running."""
    return functorch.peek_interpreter_stack() is not None


def traced_node(x: torch.Tensor) -> torch.fx.Node | None:
    """Return the node of the graph that is being traced that stands for `x`, `None` where there is none."""
    mode = get_proxy_mode()
    if mode is None:
        return None
    while is_functorch_wrapped(x):
        if functorch.is_batchedtensor(x):
            return None
        x = functorch.get_unwrapped(x)
    tracer: Any = mode.tracer
    proxy = tracer.unwrap_proxy(x)
    return proxy.node if isinstance(proxy, torch.fx.Proxy) else None


def source_name(x: torch.Tensor) -> str | None:
    """Return the name of the node that `x`, below all transforms, stands for in the graph that is being traced."""
    while is_functorch_wrapped(x):
        x = functorch.get_unwrapped(x)
    node = traced_node(x)
    return None if node is None else node.name


def is_constant(x: torch.Tensor) -> bool:
    """Return whether a trace takes a plain tensor for a constant, and runs operators of it for real while it traces."""
    mode = get_proxy_mode()
    slot: Any = None if mode is None else get_proxy_slot(x, mode.tracer, None)
    return slot is not None and slot.constant is not None
