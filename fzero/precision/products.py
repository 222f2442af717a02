"""Which dtypes a device multiplies at speed.

A CPU without instructions for bfloat16 multiplies it some 15 times slower than fp32: it converts number by number.
"""

from __future__ import annotations

import functools
import logging

import torch

from fzero._torch import cpu_multiplies

logger = logging.getLogger(__name__)


@functools.cache
def are_fast(dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether a device has instructions for products of this dtype.

    A GPU that is not there, such as that of a simulated mesh, is taken for a recent one.

    Example:
        >>> are_fast(torch.float32, torch.device("cpu"))
        True
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return True
    if device.type == "cpu":
        return cpu_multiplies(dtype)
    if device.type == "cuda" and dtype == torch.bfloat16 and torch.cuda.is_available():
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return True


@functools.cache
def warn_if_slow(dtype: torch.dtype, device: torch.device) -> None:
    """Log, once a process, that products of this dtype are slow on this device."""
    if not are_fast(dtype, device):
        name = str(dtype).removeprefix("torch.")
        logger.warning(
            f"This {device.type.upper()} has no instructions for {name}, whose products take many times as long as "
            f'those of float32. fz.policy(name, compute="auto") computes in float32 on such a device; the state, '
            f"what is sent and gradients stay in {name}."
        )
