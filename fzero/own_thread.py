"""Work in a thread that has none of its caller's modes."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from fzero._torch import FakeTensorMode

T = TypeVar("T")


def in_own_thread(function: Callable[[], T]) -> T:
    """Return what a function returns in a thread of its own, without the caller's modes (fake, traced, autocast).

    Where torch has CUDA and no device, the first thread that makes fake tensors leaves something to stand in for the
    device, in torch 2.11 in its own memory: once that thread has ended, the next fake tensors end the process. So the
    caller's thread comes first.
    """
    with FakeTensorMode():
        pass
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(function).result()
