"""Tracing for a device that this machine does not have.

A plan for an H100 can be made on a laptop: a trace needs no memory, only fake tensors. But fakes on CUDA want a driver
all the same where torch was built without one: `torch.tensor` makes a real tensor first, `x[0]` asks who the current
device is, and so does autograd, which ends the process. So in a trace for a device that is absent, CPU tensors stand
for its tensors, and whatever asks for that device gets the CPU. The mesh stays what it is: collectives, kernels and
layouts are chosen for its device. Attention runs by the CPU's fused operator in the place of the device's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


def stand_in(device: torch.device) -> torch.device:
    """Return the device whose tensors stand for those of a simulated mesh: its own, or the CPU where it is absent."""
    return torch.device("cpu") if is_absent(device) else device


def traced_for(device: torch.device | None) -> contextlib.AbstractContextManager[Any]:
    """Return a context for a trace on a simulated mesh of a device; `None` for a trace on no such mesh."""
    return contextlib.nullcontext() if device is None or not is_absent(device) else _OnCPU()


def is_absent(device: torch.device) -> bool:
    """Return whether tensors on a device cannot be made here."""
    return device.type == "cuda" and not torch.cuda.is_available()


class _OnCPU(TorchFunctionMode):
    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.cuda:
            return args[0]
        given = {name: _mapped(x) if name == "device" else x for name, x in (kwargs or {}).items()}
        return func(*(_mapped(x) if isinstance(x, torch.device) or func is Tensor.to else x for x in args), **given)


def _mapped(x: Any) -> Any:
    is_device = isinstance(x, torch.device) or (isinstance(x, str) and x.startswith("cuda"))
    return stand_in(torch.device(x)) if is_device else x
