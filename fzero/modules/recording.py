"""Recording what a model's factory does to memory, and replaying the part that one tensor depends on.

While a `Recorder` is active, tensors that the factory creates have shapes and no values, and each operation
that writes values is noted. The values of a storage come of the operations that wrote it, and of those that
wrote what they read: its slice of the record, which `fzero.modules.replay` runs.

The tracer of programs cannot do this. It knows a tensor by its object, and factories change what an object holds:
behind `weight.data = other` it goes on with the old values, without an error, and at `module.to(torch.bfloat16)`, at
`copy.deepcopy(layer)` and at `trunc_normal_` it raises. (`tests/test_torch_facts.py` shows each.) A storage says where
values really are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fzero._torch import OpOverload, TorchDispatchMode, trunc_normal_replaced
from fzero.errors import FzeroError, TraceError
from fzero.modules.replay import Constant, Op, View, drawing, map_leaves, replay, tensors_of
from fzero.operators import draws
from fzero.operators import written as written_in

# Functions that create small tensors, which factories like to read back: they run for real.
_RANGES = ("arange", "linspace", "logspace", "scalar_tensor")

# Elements that `nn.init.trunc_normal_` is given at a time: its temporaries are three times as large as its argument.
_CHUNK = 1 << 20


class Recorder(TorchDispatchMode):
    """Records the operations of a factory, and replays those that a tensor depends on."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed
        self.busy = False  # the calls that come now are this file's or torch's own: they pass as they are
        self.ops: list[Op] = []
        self.devices: dict[torch.UntypedStorage, torch.device] = {}  # every recorded storage: where it should lie
        self.writers: dict[torch.UntypedStorage, list[int]] = {}  # storage -> positions in `ops`
        self.constants: dict[torch.UntypedStorage, list[Constant]] = {}
        self.looks = 0  # how often the factory needed values

    def holds(self, t: Tensor) -> bool:
        """True for a tensor without values that was recorded."""
        return t.is_meta and t.layout is torch.strided and t.untyped_storage() in self.devices

    def source(self, t: Tensor) -> View | Constant:
        """Return where a tensor's values come from: a place in a recorded storage, or the real tensor that it is."""
        if self.holds(t):
            return View.at(t)
        constant = Constant(t.detach())
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
        tensors, written = tensors_of((args, kwargs)), written_in(func, args, kwargs)
        recorded = [t for t in tensors if self.holds(t)]
        creates = not tensors and _creates(func, kwargs)
        is_draw = draws(func, args, kwargs) and not written and bool(tensors)  # `rand_like` of a real tensor
        if not (recorded or creates or is_draw):
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
            meta_args, meta_kwargs = map_leaves(lambda x: x.to("meta") if isinstance(x, Tensor) else x, (args, kwargs))
            if "device" in kwargs:
                meta_kwargs["device"] = "meta"
            results = func(*meta_args, **meta_kwargs)
        except (NotImplementedError, RuntimeError) as error:
            # What torch raises, by operation, where one has no form without values or cannot do without them.
            if written:
                raise _unrecordable(func, str(error)) from error
            results = None
        if results is None or not (tensors_of(results) or written):  # values that the factory needs now
            return self._run_with_values(func, args, kwargs, written)

        if _name(func) == "set_" and all(self.holds(t) for t in tensors):  # shares memory, writes none
            return results
        if _name(func) in ("set_", "resize_", "resize_as_"):
            raise _unrecordable(func, "it exchanges a tensor's memory for another")
        if any(t.layout is not torch.strided for t in tensors_of(results)):
            raise _unrecordable(func, "it returns a sparse tensor")
        if creates and any(argument.name == "dtype" for argument in func._schema.arguments):
            kwargs["dtype"] = tensors_of(results)[0].dtype  # the default may be another one later
        fresh = [None if self.holds(t) else t for t in tensors_of(results)]
        for t in fresh:
            if t is not None:
                self.devices[t.untyped_storage()] = device
        if written or (any(t is not None for t in fresh) and "empty" not in _name(func)):
            self.record(func, _name(func), args, kwargs, written, fresh, random=draws(func, args, kwargs))
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
        args, kwargs = map_leaves(lambda x: self.source(x) if isinstance(x, Tensor) else x, (args, kwargs))
        writes = tuple(View.at(t) for t in written)
        results = tuple(None if t is None else View.at(t) for t in fresh)
        op = Op(func, name, args, kwargs, writes, results, random)
        for storage in op.written:
            self.writers.setdefault(storage, []).append(len(self.ops))
        self.ops.append(op)

    def _run_real(self, func: OpOverload, args: Any, kwargs: dict[str, Any], written: list[Tensor]) -> Any:
        for t in written:
            for constant in self.constants.pop(t.untyped_storage(), ()):
                constant.tensor = constant.tensor.clone()
        if not (written and draws(func, args, kwargs)):
            return func(*args, **kwargs)
        self.looks += 1
        with drawing(written[0].device, draw_seed(self.seed, f"look {self.looks}", 0)):
            return func(*args, **kwargs)

    def _run_with_values(self, func: OpOverload, args: Any, kwargs: dict[str, Any], written: list[Tensor]) -> Any:
        args, kwargs = map_leaves(lambda x: self.look(x) if isinstance(x, Tensor) else x, (args, kwargs))
        return self._run_real(func, args, kwargs, written)

    def look(self, t: Tensor) -> Tensor:
        """Return `t` with the values of this moment.

        A draw made here has no leaf to be named after; it keeps its values when the leaf is made.
        """
        if not self.holds(t):
            return t
        self.looks += 1
        self.own(View.at(t), f"look {self.looks}")
        return self.values(View.at(t))

    # Replaying

    def own(self, source: View | Constant, path: str) -> None:
        """Give the draws on which `source` depends, and that nobody owns yet, to `path`."""
        if isinstance(source, View):
            draws = [op for op in self._slice(source.storage) if op.random and op.seed is None]
            for i, op in enumerate(draws):
                op.seed = draw_seed(self.seed, path, i)

    def values(self, source: View | Constant, device: torch.device | str | None = None) -> Tensor:
        """Return the values of a source in memory of its own."""
        if isinstance(source, Constant):
            return source.tensor.to(device or source.tensor.device, copy=True)
        place = torch.device(device or self.devices[source.storage])
        with torch.no_grad():
            t = source.of(replay(self._slice(source.storage), source.storage, place))
            return t if source.whole else t.clone()

    def _slice(self, target: torch.UntypedStorage) -> list[Op]:
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


class _Facade(TorchFunctionMode):
    """Lets recorded tensors look as if they were real, to a factory that asks.

    Several initialisers of `torch.nn.init` do nothing for a tensor that says it is on the meta device.
    """

    def __init__(self, recorder: Recorder) -> None:
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
                raise on_meta("a tensor of the factory")
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
def recording(recorder: Recorder) -> Iterator[None]:
    """Inside, what tensors are made and written goes to `recorder`."""

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
        # The user's factory may raise these by itself: the note says what else may be behind them, and all pass on.
        if not isinstance(error, FzeroError):
            error.add_note(
                "This came while fz.init ran the factory without values. If the factory needs values in a way that "
                "cannot be recorded, build the module and pass its parameters as a tree."
            )
        raise


def draw_seed(seed: int, path: str, number: int) -> int:
    """Return the seed of one draw, in 63 bits."""
    digest = hashlib.blake2b(f"{seed}|{path}|{number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _name(func: OpOverload) -> str:
    return str(func.overloadpacket.__name__)


def _creates(func: OpOverload, kwargs: dict[str, Any]) -> bool:
    """True if `func`, called without tensors, makes one that is worth recording."""
    has_device = any(argument.name == "device" for argument in func._schema.arguments)
    return has_device and (_name(func) not in _RANGES or str(kwargs.get("device")) == "meta")


def on_meta(what: str) -> TraceError:
    """The error of a factory that asks for the meta device itself."""
    return TraceError(
        f"deferred: {what} is on the meta device, where tensors have no values to be made later. "
        f"Drop torch.device('meta'): nothing is allocated for the parameters in any case."
    )


def _unrecordable(func: OpOverload, reason: str) -> TraceError:
    return TraceError(
        f"deferred: the factory calls {func}, which cannot be recorded: {reason}. "
        f"Build the module and pass its parameters as a tree instead."
    )
