"""Meshes: named axes over processes.

A mesh wraps torch's `DeviceMesh`. With no launcher there is one process, no process group is started,
and every collective is the identity. A simulated mesh has any size, and no processes behind it.
"""

from __future__ import annotations

import atexit
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from fzero._torch import set_group_deadline
from fzero.calls import shown
from fzero.errors import MeshError
from fzero.ranks.axis import Axis
from fzero.ranks.groups import gloo_threads, one_gloo_thread, release_groups


@dataclass(frozen=True)
class Mesh:
    """Named axes over processes, made by `make_mesh`. Two meshes of the same axes and device are equal.

    Attributes:
        axes: `(name, size)` pairs, the last one varying fastest over ranks.
        device: where this process keeps its tensors.
        simulated: true for a world that does not exist.
        processes: torch's `DeviceMesh` of the same axes; `None` for one process, and for a simulated world.

    Example:
        >>> mesh = make_mesh("cpu", node=4, data=8, simulate=True)
        >>> mesh.names, mesh.size("data"), mesh.size(("node", "data"))
        (('node', 'data'), 8, 32)
    """

    axes: tuple[tuple[str, int], ...]
    device: torch.device
    simulated: bool = False
    processes: DeviceMesh | None = field(default=None, compare=False, repr=False)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the axes."""
        return tuple(name for name, _ in self.axes)

    def __getitem__(self, name: str) -> Axis:
        """Return an axis as a value, with its collectives: `mesh["data"].gather(x)`.

        Raises:
            MeshError: there is no such axis.
        """
        self.size(name)
        return Axis(self, name)

    def size(self, axes: str | Iterable[str]) -> int:
        """Return the number of ranks along one axis, or along several together.

        Raises:
            MeshError: there is no such axis.
        """
        wanted = (axes,) if isinstance(axes, str) else tuple(axes)
        sizes = dict(self.axes)
        for name in wanted:
            if name not in sizes:
                raise MeshError(
                    f"fz.Mesh: there is no axis {name!r}; the mesh has {self._text()}. "
                    f"Name one of {list(sizes)}, or make the mesh with make_mesh({name}=...)."
                )
        return math.prod(sizes[name] for name in wanted)

    def index(self, axes: str | Iterable[str]) -> int:
        """Return this rank's coordinate along one axis, or along several, the last varying fastest.

        Raises:
            MeshError: there is no such axis.
        """
        wanted = (axes,) if isinstance(axes, str) else tuple(axes)
        position = 0
        for name in wanted:
            here = 0 if self.processes is None else self.processes.get_local_rank(name)
            position = position * self.size(name) + here
        return position

    def index_tensor(self, axes: str | Iterable[str]) -> Tensor:
        """Return `index(axes)` as an int32 tensor of shape ().

        Inside a trace the rank has to be data: as a Python number it would be code, and every rank's
        program would differ.
        """
        return torch.tensor(self.index(axes), dtype=torch.int32, device=self.device)

    def group(self, axis: str) -> str:
        """Return the name of the process group along `axis`, as torch's functional collectives take it."""
        if self.processes is None:
            return f"simulated:{axis}"
        return self.processes.get_group(axis).group_name

    def __repr__(self) -> str:
        return shown.call(
            "make_mesh", str(self.device), **dict(self.axes), **({"simulate": True} if self.simulated else {})
        )

    def __reduce__(self) -> Any:
        # Process groups do not travel: another process stands for itself in a mesh of the same axes.
        return _arrived, (self.axes, self.device, self.simulated)

    def _text(self) -> str:
        return " × ".join(f"{name}={size}" for name, size in self.axes)


def make_mesh(
    device: str | torch.device | None = None, *, simulate: bool = False, deadline: float | None = None, **axes: int
) -> Mesh:
    """Return a mesh over all processes, starting the process group if a launcher asks for one.

    Under torchrun it starts nccl on CUDA and gloo on a CPU; called again it uses what is there. Without
    a launcher the world has one process and no process group.

    Args:
        device: where tensors live. Default: this process's CUDA device where there is one, else the CPU.
        simulate: a world that does not exist: states on it are abstract, `fz.trace` works, running raises.
        deadline: seconds that a call, and a collective in it, may wait for the other ranks. It is that of the default
            process group from then on. Default: torch's own.
        **axes: name and size of each axis, the last one varying fastest. Default: all processes on `data`.

    Returns:
        The mesh.

    Raises:
        MeshError: the axes do not multiply to the number of processes, or there is no such device.

    Example:
        >>> make_mesh("cpu").axes
        (('data', 1),)
        >>> make_mesh("cpu", data=16384, simulate=True).size("data")
        16384
    """
    for name, size in axes.items():
        if not isinstance(size, int) or size < 1:
            raise MeshError(f"fz.make_mesh: axis {name!r} needs a size of at least 1, got {size!r}.")
    if simulate:
        return Mesh(tuple((axes or {"data": 1}).items()), torch.device(device or "cpu"), simulated=True)
    place = _start(device, deadline)
    world = dist.get_world_size() if dist.is_initialized() else 1
    axes = axes or {"data": world}
    if math.prod(axes.values()) != world:
        text = ", ".join(f"{name}={size}" for name, size in axes.items())
        raise MeshError(
            f"fz.make_mesh: the axes {text} need {math.prod(axes.values())} processes, and there "
            f"{'is 1' if world == 1 else f'are {world}'}. Start as many (torchrun --nproc-per-node), change the "
            f"axes, or pass simulate=True to look at programs without running them."
        )
    if world == 1:
        return Mesh(tuple(axes.items()), place)
    made = _made.setdefault(dist.group.WORLD, WeakValueDictionary())
    key = (place.type, deadline, *axes.items())
    processes = made.get(key)
    if processes is None:
        # A process group that the user started runs two collectives at once on gloo, which it does not survive.
        unsafe = place.type == "cpu" and gloo_threads(dist.group.WORLD) > 1
        with one_gloo_thread():
            processes = made[key] = init_device_mesh(
                place.type,
                tuple(axes.values()),
                mesh_dim_names=tuple(axes),
                backend_override={name: "gloo" for name in axes} if unsafe else None,
            )
        if deadline is not None:
            # The default group's deadline as well: it is how long ranks wait for each other before a call.
            everyone = dist.group.WORLD
            assert everyone is not None, "the world has several processes"
            for group in (everyone, *processes.get_all_groups()):
                set_group_deadline(group, deadline)
    return Mesh(tuple(axes.items()), place, processes=processes)


# The meshes in use in each world, so that a second one of the same axes starts no second set of process groups.
_made: WeakKeyDictionary[Any, WeakValueDictionary[Any, DeviceMesh]] = WeakKeyDictionary()


def _arrived(axes: tuple[tuple[str, int], ...], device: torch.device, simulated: bool) -> Mesh:
    """Return a mesh that was pickled, of the processes that are here; one to look at where they are not as many."""
    size = math.prod(n for _, n in axes)
    if not dist.is_initialized():  # reading a file starts no process group
        return Mesh(axes, device, simulated or size > 1)
    return make_mesh(device, simulate=simulated or size != dist.get_world_size(), **dict(axes))


def _start(device: str | torch.device | None, deadline: float | None) -> torch.device:
    """Start the process group that the launcher's environment asks for; return this process's device."""
    if device is None:
        on_cuda = torch.cuda.is_available() and (not dist.is_initialized() or "nccl" in dist.get_backend())
        device = "cuda" if on_cuda else "cpu"
    place = _device(device)
    if place.type == "cuda":
        _check_cuda(place)
        if place.index is None:
            place = torch.device("cuda", int(os.environ.get("LOCAL_RANK", torch.cuda.current_device())))
            torch.cuda.set_device(place)
    if not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        with one_gloo_thread():
            dist.init_process_group(
                backend="nccl" if place.type == "cuda" else "gloo",
                timeout=None if deadline is None else timedelta(seconds=deadline),
            )
        if place.type == "cpu":
            atexit.register(_leave)
    return place


def _device(device: str | torch.device) -> torch.device:
    try:
        return torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise MeshError(f"fz.make_mesh: device={device!r} is none. Pass 'cuda' or 'cpu', or leave it out.") from error


def _check_cuda(place: torch.device) -> None:
    """Raise where this process has no such CUDA device, before a process group waits for it."""
    if not torch.cuda.is_available():
        reason = "is built without it" if torch.version.cuda is None else "finds no device or no driver"
        raise MeshError(
            f"fz.make_mesh: device={str(place)!r}, and there is no CUDA here: torch {torch.__version__} {reason}. "
            f"Leave the device out, or pass 'cpu'. make_mesh('cuda', simulate=True) is for looking at programs."
        )
    count = torch.cuda.device_count()
    there = "there is 1" if count == 1 else f"there are {count}"
    index = int(os.environ.get("LOCAL_RANK", "0")) if place.index is None else place.index
    if index >= count:
        raise MeshError(
            f"fz.make_mesh: this process asks for CUDA device {index}, and {there}. "
            f"Start one process for each device: torchrun --nproc-per-node {count}."
        )


def _leave() -> None:
    """End gloo's threads before the interpreter ends: one that comes back later aborts the process."""
    for made in list(_made.values()):
        for processes in list(made.values()):
            release_groups(processes)
    if dist.is_initialized():
        dist.destroy_process_group()
