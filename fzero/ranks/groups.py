"""Process groups of torch: what operators are told of them, and those over gloo: one thread each, let go of in time.

Torch gives a gloo group two threads. They write the name of the collective that ended last into one string, without a
lock. Where one ends in each at once they free that string's memory twice, and the process dies then or later. Names of
up to 15 letters need no memory; that of a coalesced all-gather does, and so does that of every functional one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from fzero._torch import cpu_backend, gloo_options, groups_held_by, threads_of


@contextmanager
def one_gloo_thread() -> Iterator[None]:
    """Inside, a gloo group is made with one thread, which runs its collectives in their order."""
    module: Any = dist.distributed_c10d
    gloo: Any = getattr(module, "ProcessGroupGloo", None)
    if gloo is None:  # torch was built without it
        yield
        return

    class OneThread(gloo):
        def __init__(self, store: Any, rank: int, size: int, timeout: timedelta) -> None:
            names = [name for name in os.environ.get("GLOO_SOCKET_IFNAME", "").split(",") if name]
            devices = [gloo.create_device(interface=name) for name in names] or [gloo.create_default_device()]
            super().__init__(store, rank, size, gloo_options(timeout, devices, threads=1))

    module.ProcessGroupGloo = OneThread
    try:
        yield
    finally:
        module.ProcessGroupGloo = gloo


def gloo_threads(group: dist.ProcessGroup | None) -> int:
    """Return how many threads run the collectives of a group over gloo; 0 without gloo."""
    gloo: Any = getattr(dist.distributed_c10d, "ProcessGroupGloo", ())
    backend = None if group is None else cpu_backend(group)
    return threads_of(backend) if isinstance(backend, gloo) else 0


def release_groups(mesh: DeviceMesh) -> None:
    """Let go of the process groups that a mesh keeps alive. It finds them by name while they exist."""
    groups_held_by(mesh).clear()


def group_of(process_group: Any) -> tuple[str, int]:
    """Return the name of a process group, as operators are given it, and the number of its ranks."""
    group = dist.ProcessGroup.unbox(process_group)
    return group.group_name, group.size()


def reduction_of(reduce_op: Any) -> str:
    """Return the name of a reduction, as operators are given it, in the words of functional collectives."""
    name: str = dist.ReduceOp.RedOpType(int(reduce_op.op())).name
    return name.lower()
