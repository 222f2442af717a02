"""Building a model leaf by leaf: the factory runs once without values, and is replayed for one leaf at a time.

While the factory runs, every tensor it creates lies on the meta device and the operations that write
values are recorded. A leaf is later made by replaying the operations that its memory depends on, and no
others, so a model never has to fit on one device:

    factory()              w = empty(8, 8)   w.normal_()   b = ones(8)   b.mul_(2)      no values
    materialize("w")       w = empty(8, 8)   w.normal_()
    materialize("b")                                       b = ones(8)   b.mul_(2)

Dependence is followed through storages, since `.data`, views and `nn.Parameter(t)` share memory without
an operation that could be recorded.

A random operation draws from a seed made of (seed, path of the first leaf that depends on it, its number
among that leaf's draws). A leaf's values are therefore the same whatever else the model holds and however
many processes build it.
"""

from __future__ import annotations

import copy
import hashlib
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import optree
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fzero._torch import OpOverload, TorchDispatchMode, trunc_normal_replaced
from fzero.errors import FzeroError, TraceError

# Functions that create small tensors, which factories like to read back: they run for real.
_RANGES = ("arange", "linspace", "logspace", "scalar_tensor")

# In-place operations that do not read what they overwrite.
_OVERWRITES = ("copy_", "fill_", "zero_", "normal_", "uniform_", "bernoulli_", "random_", "trunc_normal_")

# Operations whose result may take over the memory of an argument that nobody needs any more.
_COPIES = ("clone", "_to_copy")

# Elements that `nn.init.trunc_normal_` is given at a time: its temporaries are three times as large as its argument.
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Deferred:
    """A model whose parameters have no memory yet.

    Attributes:
        module: the model. Its parameters lie on the meta device; its buffers are real.
        paths: the names of the parameters, then of the buffers, as `state_dict` spells them. A tied
            parameter stands there once, under its first name.
        shapes: path -> shape.
        dtypes: path -> dtype.
    """

    module: nn.Module
    paths: tuple[str, ...]
    shapes: Mapping[str, torch.Size]
    dtypes: Mapping[str, torch.dtype]
    _recorder: _Recorder = field(repr=False)
    _sources: Mapping[str, _View | _Constant] = field(repr=False)

    def materialize(self, path: str, device: torch.device | str | None = None) -> Tensor:
        """Return the values of one leaf, in memory of its own.

        The peak is the leaf itself where it is initialised in place, or by a chain of elementwise
        operations that keep its dtype. A cast holds source and result at once, and
        `nn.init.orthogonal_` a few copies of the leaf. A leaf cut from a larger tensor costs that tensor.
        Memory that the factory never wrote is zero.

        Args:
            path: one of `paths`.
            device: where to put it; by default where the factory asked for it. Random values are those
                of the device's own generator, so a CPU and a GPU draw different ones.

        Raises:
            ValueError: there is no such leaf.
        """
        if path not in self._sources:
            raise ValueError(f"fzero.deferred: there is no leaf {path!r}; the model has {', '.join(self.paths)}.")
        return self._recorder.values(self._sources[path], device)


def deferred(factory: Callable[[], nn.Module], seed: int = 0) -> Deferred:
    """Run `factory` without giving memory to the parameters, so that they can be made one at a time.

    The factory may use `torch.nn.init`, plain tensor operations and the libraries built on them. Where it
    looks at values (`.item()`, `if t.any()`, `.tolist()`, boolean masks) they are made on the spot. A
    generator that it passes to a random operation, or seeds that it sets, have no effect: the draws are
    those of `seed`. The random state of torch, numpy and Python is as before afterwards.

    Args:
        factory: returns the model.
        seed: of the random draws.

    Raises:
        TypeError: the factory returned something else than a module.
        TraceError: the factory uses an operation that cannot be recorded, or asks for the meta device.

    Example:
        >>> model = deferred(lambda: nn.Linear(2, 3))
        >>> model.paths, model.module.weight.device
        (('weight', 'bias'), device(type='meta'))
        >>> model.materialize("bias").shape
        torch.Size([3])
    """
    if torch.get_default_device().type == "meta":
        raise _on_meta("the default device")
    recorder = _Recorder(seed)
    with _random_state_kept(seed), _recording(recorder):
        module = factory()
    if not isinstance(module, nn.Module):
        raise TypeError(f"fzero.deferred: the factory must return an nn.Module, got {type(module).__name__}.")

    parameters, buffers = dict(module.named_parameters()), dict(module.named_buffers())
    leaves: dict[str, Tensor] = {**parameters, **buffers}
    for path, t in leaves.items():
        if t.is_meta and not recorder.holds(t):
            raise _on_meta(f"{path} of the module")
    attributes = {path: t for path, t in _plain_tensors(module) if recorder.holds(t)}
    sources = {path: recorder.source(t) for path, t in {**leaves, **attributes}.items()}
    for path, source in sources.items():
        recorder.own(source, path)

    real = {id(t): recorder.values(sources[path]) for path, t in {**attributes, **buffers}.items()}
    return Deferred(
        module=without_parameters(module, real),
        paths=tuple(leaves),
        shapes={path: t.shape for path, t in leaves.items()},
        dtypes={path: t.dtype for path, t in leaves.items()},
        _recorder=recorder,
        _sources={path: sources[path] for path in leaves},
    )


def without_parameters(module: nn.Module, replaced: Mapping[int, Tensor] | None = None) -> nn.Module:
    """Return a copy of a module whose parameters lie on the meta device.

    Args:
        module: stays as it is.
        replaced: id of a tensor of the module -> what the copy holds in its place.

    Raises:
        TypeError: the module cannot be copied.
    """
    # copy.deepcopy takes what it finds here for the copy that it has already made of a tensor.
    twins: dict[int, Any] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
        for p in module.parameters()
    }
    twins |= {id(t): t.detach() for _, t in _plain_tensors(module) if not t.is_leaf}
    twins |= replaced or {}
    try:
        return copy.deepcopy(module, twins)
    except (TypeError, RuntimeError) as error:
        raise TypeError(
            f"fzero: {type(module).__name__} cannot be copied ({error}). Its attributes must be such that "
            f"copy.deepcopy takes them."
        ) from error


def _plain_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors that submodules keep as plain attributes, alone or in lists, tuples and dicts."""
    registered = {id(t) for t in (*module.parameters(), *module.buffers())}
    for prefix, submodule in module.named_modules():
        for name, value in vars(submodule).items():
            if name not in ("_parameters", "_buffers", "_modules"):
                for i, leaf in enumerate(_leaves(value)):
                    if isinstance(leaf, Tensor) and id(leaf) not in registered:
                        yield f"{prefix}.{name}[{i}]", leaf


@dataclass(frozen=True)
class _View:
    """Where a recorded tensor lies in its storage."""

    storage: torch.UntypedStorage
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int

    @staticmethod
    def at(t: Tensor) -> _View:
        if t.is_conj() or t.is_neg():
            raise TraceError(
                "fzero.deferred: a conjugated or negated view cannot be recorded. Write .resolve_conj() or "
                ".resolve_neg() behind it in the factory, or build the module and pass its parameters as a tree."
            )
        return _View(t.untyped_storage(), t.dtype, t.shape, t.stride(), int(t.storage_offset()))

    @property
    def whole(self) -> bool:
        """True if the tensor covers all of its storage."""
        return self.shape.numel() * self.dtype.itemsize == self.storage.nbytes()

    def fits(self, other: _View) -> bool:
        """True if the two lie in their storages alike, so that one storage can stand for the other."""
        mine = (self.dtype, self.shape, self.stride, self.offset, self.storage.nbytes())
        return mine == (other.dtype, other.shape, other.stride, other.offset, other.storage.nbytes())

    def of(self, storage: torch.UntypedStorage) -> Tensor:
        """Return the tensor that lies in `storage` as this one in its own."""
        empty = torch.empty(0, dtype=self.dtype, device=storage.device)
        return empty.set_(storage, self.offset, self.shape, self.stride)


@dataclass(eq=False)
class _Constant:
    """A tensor that was real when the factory ran."""

    tensor: Tensor


@dataclass(eq=False)
class _Op:
    """One operation that writes values. The tensors among its arguments are `_View`s and `_Constant`s."""

    func: Callable[..., Any]
    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    writes: tuple[_View, ...]  # the arguments that it writes
    results: tuple[_View | None, ...]  # None for a result in memory that was there before
    random: bool
    seed: int | None = None

    @cached_property
    def overwrites(self) -> bool:
        """True if nothing that was in the written storages before matters afterwards."""
        return self.name in _OVERWRITES and all(view.whole for view in self.writes)

    @cached_property
    def read(self) -> set[torch.UntypedStorage]:
        arguments = (self.args[1:] if self.overwrites else self.args, self.kwargs)
        return {x.storage for x in _leaves(arguments) if isinstance(x, _View)}

    @cached_property
    def written(self) -> set[torch.UntypedStorage]:
        return {view.storage for view in (*self.writes, *self.results) if view is not None}


class _Recorder(TorchDispatchMode):
    """Records the operations of a factory, and replays those that a tensor depends on."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed
        self.busy = False  # the calls that come now are this file's or torch's own: they pass as they are
        self.ops: list[_Op] = []
        self.devices: dict[torch.UntypedStorage, torch.device] = {}  # every recorded storage: where it should lie
        self.writers: dict[torch.UntypedStorage, list[int]] = {}  # storage -> positions in `ops`
        self.constants: dict[torch.UntypedStorage, list[_Constant]] = {}
        self.looks = 0  # how often the factory needed values

    def holds(self, t: Tensor) -> bool:
        """True for a tensor without values that was recorded."""
        return t.is_meta and t.layout is torch.strided and t.untyped_storage() in self.devices

    def source(self, t: Tensor) -> _View | _Constant:
        if self.holds(t):
            return _View.at(t)
        constant = _Constant(t.detach())
        if t.layout is torch.strided:
            self.constants.setdefault(t.untyped_storage(), []).append(constant)
        return constant

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Inside, operations pass unrecorded and recorded tensors show that they are on the meta device."""
        before, self.busy = self.busy, True
        try:
            yield
        finally:
            self.busy = before

    # Recording

    def __torch_dispatch__(self, func: OpOverload, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.busy:
            return func(*args, **(kwargs or {}))
        with self.aside():
            return self._dispatch(func, args, dict(kwargs or {}))

    def _dispatch(self, func: OpOverload, args: Any, kwargs: dict[str, Any]) -> Any:
        tensors, written = _tensors((args, kwargs)), _written(func, args, kwargs)
        recorded = [t for t in tensors if self.holds(t)]
        creates = not tensors and _creates(func, kwargs)
        draws = _is_random(func) and not written and bool(tensors)  # `rand_like` of a real tensor
        if not (recorded or creates or draws):
            return self._run_real(func, args, kwargs, written)
        if not all(self.holds(t) for t in written):
            if any(self.holds(t) for t in written):
                raise _unrecordable(func, "it writes recorded and real tensors at once")
            return self._run_with_values(func, args, kwargs, written)

        device = torch.device(kwargs.get("device") or "meta")
        if device.type == "meta":  # as when torch's own code makes a tensor like another one
            device = self.devices[recorded[0].untyped_storage()] if recorded else torch.device("cpu")
        kwargs.pop("pin_memory", None)
        if "generator" in kwargs:
            kwargs["generator"] = None
        if "device" in kwargs or creates:
            kwargs["device"] = device
        try:
            meta_args, meta_kwargs = _map(lambda x: x.to("meta") if isinstance(x, Tensor) else x, (args, kwargs))
            if "device" in kwargs:
                meta_kwargs["device"] = "meta"
            results = func(*meta_args, **meta_kwargs)
        except (NotImplementedError, RuntimeError) as error:
            if written:
                raise _unrecordable(func, str(error)) from error
            results = None
        if results is None or not (_tensors(results) or written):  # values that the factory needs now
            return self._run_with_values(func, args, kwargs, written)

        if _name(func) == "set_" and all(self.holds(t) for t in tensors):  # shares memory, writes none
            return results
        if _name(func) in ("set_", "resize_", "resize_as_"):
            raise _unrecordable(func, "it exchanges a tensor's memory for another")
        if any(t.layout is not torch.strided for t in _tensors(results)):
            raise _unrecordable(func, "it returns a sparse tensor")
        if creates and any(argument.name == "dtype" for argument in func._schema.arguments):
            kwargs["dtype"] = _tensors(results)[0].dtype  # the default may be another one later
        fresh = [None if self.holds(t) else t for t in _tensors(results)]
        for t in fresh:
            if t is not None:
                self.devices[t.untyped_storage()] = device
        if written or (any(t is not None for t in fresh) and "empty" not in _name(func)):
            self.record(func, _name(func), args, kwargs, written, fresh, random=_is_random(func))
        return results

    def record(
        self,
        func: Callable[..., Any],
        name: str,
        args: Any,
        kwargs: dict[str, Any],
        written: list[Tensor],
        fresh: list[Tensor | None],
        *,
        random: bool,
    ) -> None:
        """Append one operation, with where its tensors lie at this moment."""
        args, kwargs = _map(lambda x: self.source(x) if isinstance(x, Tensor) else x, (args, kwargs))
        writes = tuple(_View.at(t) for t in written)
        results = tuple(None if t is None else _View.at(t) for t in fresh)
        op = _Op(func, name, args, kwargs, writes, results, random)
        for storage in op.written:
            self.writers.setdefault(storage, []).append(len(self.ops))
        self.ops.append(op)

    def _run_real(self, func: OpOverload, args: Any, kwargs: dict[str, Any], written: list[Tensor]) -> Any:
        for t in written:
            for constant in self.constants.pop(t.untyped_storage(), ()):
                constant.tensor = constant.tensor.clone()
        if not (written and _is_random(func)):
            return func(*args, **kwargs)
        self.looks += 1
        with _drawing(written[0].device, _draw_seed(self.seed, f"look {self.looks}", 0)):
            return func(*args, **kwargs)

    def _run_with_values(self, func: OpOverload, args: Any, kwargs: dict[str, Any], written: list[Tensor]) -> Any:
        args, kwargs = _map(lambda x: self.look(x) if isinstance(x, Tensor) else x, (args, kwargs))
        return self._run_real(func, args, kwargs, written)

    def look(self, t: Tensor) -> Tensor:
        """Return `t` with the values of this moment.

        A draw made here has no leaf to be named after; it keeps its values when the leaf is made.
        """
        if not self.holds(t):
            return t
        self.looks += 1
        self.own(_View.at(t), f"look {self.looks}")
        return self.values(_View.at(t))

    # Replaying

    def own(self, source: _View | _Constant, path: str) -> None:
        """Give the draws on which `source` depends, and that nobody owns yet, to `path`."""
        if isinstance(source, _View):
            draws = [op for op in self._slice(source.storage) if op.random and op.seed is None]
            for i, op in enumerate(draws):
                op.seed = _draw_seed(self.seed, path, i)

    def values(self, source: _View | _Constant, device: torch.device | str | None = None) -> Tensor:
        """Return the values of a source in memory of its own."""
        if isinstance(source, _Constant):
            return source.tensor.to(device or source.tensor.device, copy=True)
        with torch.no_grad():
            t = source.of(self._replay(source.storage, torch.device(device or self.devices[source.storage])))
            return t if source.whole else t.clone()

    def _slice(self, target: torch.UntypedStorage) -> list[_Op]:
        """Return the operations on which a storage's values depend, in order."""
        needed: set[int] = set()
        pending, seen = [(target, len(self.ops))], set()
        while pending:
            storage, end = pending.pop()
            if (storage, end) in seen:
                continue
            seen.add((storage, end))
            for i in reversed(self.writers.get(storage, ())):
                if i >= end:
                    continue
                op = self.ops[i]
                needed.add(i)
                pending += [(other, i) for other in op.read if other is not storage]
                if op.overwrites and storage not in op.read:
                    break
        return [self.ops[i] for i in sorted(needed)]

    def _replay(self, target: torch.UntypedStorage, device: torch.device) -> torch.UntypedStorage:
        ops = self._slice(target)
        last_use = {storage: i for i, op in enumerate(ops) for storage in op.written | op.read}
        last_use[target] = len(ops)
        memory = _Memory(device)
        for i, op in enumerate(ops):
            unused = {storage for storage in op.written | op.read if last_use[storage] == i}
            with nullcontext() if op.seed is None else _drawing(device, op.seed):
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
        if isinstance(x, _View):
            return x.of(self[x.storage])
        return x.tensor.to(self.device) if isinstance(x, _Constant) else x

    def take(self, t: Tensor, view: _View) -> None:
        """Let the memory of a result stand for the storage of `view`."""
        if not _View.at(t).fits(view):  # strides that differ from the meta device's
            t = view.of(self[view.storage]).copy_(t)
        self[view.storage] = t.untyped_storage()


def _run(op: _Op, memory: _Memory, unused: set[torch.UntypedStorage]) -> None:
    """Run one recorded operation; the storages in `unused` are not needed after it."""
    args, kwargs = _map(memory.real, (op.args, op.kwargs))
    if "device" in kwargs:
        kwargs["device"] = memory.device
    results = (_in_place(op, unused) or op.func)(*args, **kwargs)
    for t, view in zip(_tensors(results), op.results, strict=True):
        if view is not None:
            memory.take(t, view)


def _in_place(op: _Op, unused: set[torch.UntypedStorage]) -> Callable[..., Tensor] | None:
    """Return a function that does `op` in the memory of its first argument, if that is possible."""
    if len(op.results) != 1 or op.results[0] is None or op.writes or not op.args or not isinstance(op.args[0], _View):
        return None
    source, others = op.args[0], _leaves((op.args[1:], op.kwargs))
    shared = any(isinstance(x, _View) and x.storage is source.storage for x in others)
    if shared or source.storage not in unused or not source.fits(op.results[0]):
        return None
    if op.name in _COPIES:
        return lambda t, **_: t
    assert isinstance(op.func, OpOverload)
    if torch.Tag.pointwise not in op.func.tags:
        return None
    packet = getattr(torch.ops.aten, f"{op.name}_", None)
    return getattr(packet, op.func._schema.overload_name or "default", None)


class _Facade(TorchFunctionMode):
    """Lets recorded tensors look as if they were real, to a factory that asks.

    Several initialisers of `torch.nn.init` do nothing for a tensor that says it is on the meta device.
    """

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        recorder, kwargs = self.recorder, kwargs or {}
        if not recorder.busy:
            if func in _ANSWERS:
                with recorder.aside():
                    if recorder.holds(args[0]):
                        return _ANSWERS[func](recorder, *args, **kwargs)
            if str(kwargs.get("device")) == "meta":
                raise _on_meta("a tensor of the factory")
        return func(*args, **kwargs)


# What mypy takes for a bool and a device are properties, read through their __get__.
_ANSWERS: dict[Callable[..., Any], Callable[..., Any]] = {
    getattr(Tensor.is_meta, "__get__"): lambda recorder, t: False,  # noqa: B009
    getattr(Tensor.device, "__get__"): lambda recorder, t: recorder.devices[t.untyped_storage()],  # noqa: B009
    Tensor.tolist: lambda recorder, t: recorder.look(t).tolist(),
    Tensor.numpy: lambda recorder, t, **options: recorder.look(t).numpy(**options),
    Tensor.__array__: lambda recorder, t, *dtype: recorder.look(t).__array__(*dtype),
}


@contextmanager
def _recording(recorder: _Recorder) -> Iterator[None]:
    def trunc_normal_(original: Callable[..., Tensor], t: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Recorded whole, since it draws again until the values are within the bounds."""

        def chunked(t: Tensor, *args: Any, **kwargs: Any) -> None:
            for chunk in t.view(-1).split(_CHUNK) if t.is_contiguous() else [t]:
                original(chunk, *args, **kwargs)

        with recorder.aside():
            if recorder.holds(t):
                options = {**kwargs, "generator": None}
                recorder.record(chunked, "trunc_normal_", (t, *args), options, [t], [], random=True)
                return t
        return original(t, *args, **kwargs)

    try:
        with trunc_normal_replaced(trunc_normal_), recorder, _Facade(recorder):
            yield
    except (NotImplementedError, RuntimeError) as error:
        if not isinstance(error, FzeroError):
            error.add_note(
                "This came while fzero.deferred ran the factory without values. If the factory needs values in a way "
                "that cannot be recorded, build the module and pass its parameters as a tree."
            )
        raise


@contextmanager
def _random_state_kept(seed: int) -> Iterator[None]:
    """Draw numpy's and Python's random numbers from `seed`, and restore them and torch's afterwards."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    python, array = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices):
            random.seed(seed)
            np.random.seed(_draw_seed(seed, "numpy", 0) % 2**32)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(array)


@contextmanager
def _drawing(device: torch.device, seed: int) -> Iterator[None]:
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


def _draw_seed(seed: int, path: str, number: int) -> int:
    digest = hashlib.blake2b(f"{seed}|{path}|{number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _leaves(x: Any) -> list[Any]:
    return optree.tree_leaves(x)


def _map(f: Callable[[Any], Any], x: Any) -> Any:
    return optree.tree_map(f, x)


def _tensors(arguments: Any) -> list[Tensor]:
    return [x for x in _leaves(arguments) if isinstance(x, Tensor)]


def _name(func: OpOverload) -> str:
    return str(func.overloadpacket.__name__)


def _written(func: OpOverload, args: Any, kwargs: dict[str, Any]) -> list[Tensor]:
    schema = func._schema.arguments
    values = {**dict(zip((argument.name for argument in schema), args, strict=False)), **kwargs}
    return _tensors([values.get(a.name) for a in schema if a.alias_info is not None and a.alias_info.is_write])


def _creates(func: OpOverload, kwargs: dict[str, Any]) -> bool:
    """True if `func`, called without tensors, makes one that is worth recording."""
    has_device = any(argument.name == "device" for argument in func._schema.arguments)
    return has_device and (_name(func) not in _RANGES or str(kwargs.get("device")) == "meta")


def _is_random(func: OpOverload) -> bool:
    return torch.Tag.nondeterministic_seeded in func.tags


def _on_meta(what: str) -> TraceError:
    return TraceError(
        f"fzero.deferred: {what} is on the meta device, where tensors have no values to be made later. "
        f"Drop torch.device('meta'): nothing is allocated for the parameters in any case."
    )


def _unrecordable(func: OpOverload, reason: str) -> TraceError:
    return TraceError(
        f"fzero.deferred: the factory calls {func}, which cannot be recorded: {reason}. "
        f"Build the module and pass its parameters as a tree instead."
    )
