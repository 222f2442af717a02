"""Replaying recorded operations on real memory.

An operation is kept with where its operands lie: which storage, with which strides. Replayed, each storage
gets memory of its own, freed behind its last use; a result takes over the memory of an operand that
nobody needs any more where that is possible.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import optree
import torch
from torch import Tensor

from fzero._torch import OpOverload
from fzero.errors import TraceError

# In-place operations that do not read what they overwrite.
_OVERWRITES = ("copy_", "fill_", "zero_", "normal_", "uniform_", "bernoulli_", "random_", "trunc_normal_")

# Operations whose result may take over the memory of an argument that nobody needs any more.
_COPIES = ("clone", "_to_copy")


@dataclass(frozen=True)
class View:
    """Where a recorded tensor lies in its storage."""

    storage: torch.UntypedStorage
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int

    @staticmethod
    def at(t: Tensor) -> View:
        """Return where a recorded tensor lies now.

        Raises:
            TraceError: it is a conjugated or negated view, which its place in memory does not show.
        """
        if t.is_conj() or t.is_neg():
            raise TraceError(
                "deferred: a conjugated or negated view cannot be recorded. Write .resolve_conj() or "
                ".resolve_neg() behind it in the factory, or build the module and pass its parameters as a tree."
            )
        return View(t.untyped_storage(), t.dtype, t.shape, t.stride(), int(t.storage_offset()))

    @property
    def whole(self) -> bool:
        """True if the tensor covers all of its storage."""
        return self.shape.numel() * self.dtype.itemsize == self.storage.nbytes()

    def fits(self, other: View) -> bool:
        """True if the two lie in their storages alike, so that one storage can stand for the other."""
        mine = (self.dtype, self.shape, self.stride, self.offset, self.storage.nbytes())
        return mine == (other.dtype, other.shape, other.stride, other.offset, other.storage.nbytes())

    def of(self, storage: torch.UntypedStorage) -> Tensor:
        """Return the tensor that lies in `storage` as this one in its own."""
        empty = torch.empty(0, dtype=self.dtype, device=storage.device)
        return empty.set_(storage, self.offset, self.shape, self.stride)


@dataclass(eq=False)
class Constant:
    """A tensor that was real when the factory ran."""

    tensor: Tensor


@dataclass(eq=False)
class Op:
    """One operation that writes values. The tensors among its arguments are `View`s and `Constant`s."""

    func: Callable[..., Any]
    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    writes: tuple[View, ...]  # the arguments that it writes
    results: tuple[View | None, ...]  # None for a result in memory that was there before
    random: bool
    seed: int | None = None

    @cached_property
    def overwrites(self) -> bool:
        """True if nothing that was in the written storages before matters afterwards."""
        return self.name in _OVERWRITES and all(view.whole for view in self.writes)

    @cached_property
    def read(self) -> set[torch.UntypedStorage]:
        """The storages whose values the operation needs."""
        arguments = (self.args[1:] if self.overwrites else self.args, self.kwargs)
        return {x.storage for x in leaves_of(arguments) if isinstance(x, View)}

    @cached_property
    def written(self) -> set[torch.UntypedStorage]:
        """The storages that have other values after it."""
        return {view.storage for view in (*self.writes, *self.results) if view is not None}


def replay(ops: Sequence[Op], target: torch.UntypedStorage, device: torch.device) -> torch.UntypedStorage:
    """Run operations in order on `device`; return the memory that stands for `target` afterwards."""
    last_use = {storage: i for i, op in enumerate(ops) for storage in op.written | op.read}
    last_use[target] = len(ops)
    memory = _Memory(device)
    for i, op in enumerate(ops):
        unused = {storage for storage in op.written | op.read if last_use[storage] == i}
        with nullcontext() if op.seed is None else drawing(device, op.seed):
            _run(op, memory, unused)
        for storage in unused:
            memory.pop(storage, None)
    return memory[target]


class _Memory(dict[torch.UntypedStorage, torch.UntypedStorage]):
    """Recorded storage -> its memory on `device`, made when first asked for."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def __missing__(self, storage: torch.UntypedStorage) -> torch.UntypedStorage:
        self[storage] = torch.zeros(storage.nbytes(), dtype=torch.uint8, device=self.device).untyped_storage()
        return self[storage]

    def real(self, x: Any) -> Any:
        if isinstance(x, View):
            return x.of(self[x.storage])
        return x.tensor.to(self.device) if isinstance(x, Constant) else x

    def take(self, t: Tensor, view: View) -> None:
        """Let the memory of a result stand for the storage of `view`."""
        if not View.at(t).fits(view):  # strides that differ from the meta device's
            t = view.of(self[view.storage]).copy_(t)
        self[view.storage] = t.untyped_storage()


def _run(op: Op, memory: _Memory, unused: set[torch.UntypedStorage]) -> None:
    """Run one recorded operation; the storages in `unused` are not needed after it."""
    args, kwargs = map_leaves(memory.real, (op.args, op.kwargs))
    if "device" in kwargs:
        kwargs["device"] = memory.device
    results = (_in_place(op, unused) or op.func)(*args, **kwargs)
    for t, view in zip(tensors_of(results), op.results, strict=True):
        if view is not None:
            memory.take(t, view)


def _in_place(op: Op, unused: set[torch.UntypedStorage]) -> Callable[..., Tensor] | None:
    """Return a function that does `op` in the memory of its first argument, if that is possible."""
    if len(op.results) != 1 or op.results[0] is None or op.writes or not op.args or not isinstance(op.args[0], View):
        return None
    source, others = op.args[0], leaves_of((op.args[1:], op.kwargs))
    shared = any(isinstance(x, View) and x.storage is source.storage for x in others)
    if shared or source.storage not in unused or not source.fits(op.results[0]):
        return None
    if op.name in _COPIES:
        return lambda t, **_: t
    assert isinstance(op.func, OpOverload)
    if torch.Tag.pointwise not in op.func.tags:
        return None
    packet = getattr(torch.ops.aten, f"{op.name}_", None)
    return getattr(packet, op.func._schema.overload_name or "default", None)


@contextmanager
def drawing(device: torch.device, seed: int) -> Iterator[None]:
    """Draw from `seed` on one device, and leave its generator as it was."""
    if device.type == "cpu":
        generator = torch.default_generator
    else:
        module = torch.get_device_module(device)
        generator = module.default_generators[module.current_device() if device.index is None else device.index]
    state = generator.get_state()
    generator.manual_seed(seed)
    try:
        yield
    finally:
        generator.set_state(state)


# fzero's own trees would open a `View`, which is a dataclass; optree's types know nothing of what a call returns.


def leaves_of(x: Any) -> list[Any]:
    """Return what stands in lists, tuples and dicts."""
    return optree.tree_leaves(x)


def map_leaves(f: Callable[[Any], Any], x: Any) -> Any:
    """Apply `f` to what stands in lists, tuples and dicts."""
    return optree.tree_map(f, x)


def tensors_of(arguments: Any) -> list[Tensor]:
    """Return the tensors in lists, tuples and dicts."""
    return [x for x in leaves_of(arguments) if isinstance(x, Tensor)]
