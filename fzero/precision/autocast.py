"""Autocast as it stands around a call: noted there, and put up again where the call runs later."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

# On a CPU and on CUDA: whether it is on, and its dtype.
Autocast = tuple[tuple[bool, torch.dtype], tuple[bool, torch.dtype]]


def autocast_here() -> Autocast:
    """Return the autocast that operations run under now."""
    return _of("cpu"), _of("cuda")


@contextlib.contextmanager
def under_autocast(wanted: Autocast) -> Iterator[None]:
    """Inside, operations run under an autocast that `autocast_here` has noted."""
    with contextlib.ExitStack() as stack:
        for device, (enabled, dtype) in zip(("cpu", "cuda"), wanted, strict=True):
            if (enabled, dtype) != _of(device):
                stack.enter_context(torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=False))
        yield


def _of(device: str) -> tuple[bool, torch.dtype]:
    return torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
