"""An `nn.Module` as a pure function of its parameters.

What a module keeps to itself becomes an argument, and what it changes becomes a result:

    module(x)              reads and writes tensors that the module owns
    apply(params, x)       reads only its arguments and writes nothing
"""

from __future__ import annotations

import copy
import operator
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm as functional_batch_norm
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

from fzero import tree
from fzero._torch import hooks_on_gradients, storage_id
from fzero.calls.nearest import nearest
from fzero.errors import BufferWriteError, ModuleError, ParameterWriteError, TreeError
from fzero.marks import blocks_marked
from fzero.modules.deferred import deferred, without_parameters
from fzero.modules.explain import explaining
from fzero.modules.switches import Shortcuts, surroundings
from fzero.modules.writes import read_only
from fzero.wrapped import is_transformed_now, unwrapped

Tree = dict[str, Any]


@overload
def functional(
    module: nn.Module | Callable[[], nn.Module], *, buffers: Literal[False] = False
) -> tuple[Apply, Tree]: ...


@overload
def functional(module: nn.Module | Callable[[], nn.Module], *, buffers: Literal[True]) -> tuple[Apply, Tree, Tree]: ...


def functional(module: nn.Module | Callable[[], nn.Module], *, buffers: bool = False) -> Any:
    """Return a module as a pure function, and its parameters.

    The function works on a copy of the module as it is now: train or eval mode, hooks and attributes set
    later have no effect on it. It keeps no parameters alive. `apply.eval` is the same function in evaluation mode.

    Args:
        module: the module, or a function without arguments that makes one. Of the latter, the parameters
            come back on the meta device and nothing is allocated for them: `apply` works with any real
            parameters of the same shapes. The buffers are real.
        buffers: whether `apply` takes and returns the buffers too. Without, they are constants.

    Returns:
        `(apply, params)`, where `apply(params, *args, **kwargs)` is what the module returns. `params` is a
        nested dict of detached tensors, named as `state_dict` names them and split at the dots; they share
        memory with the module's. Tied parameters stand there once, under their first name, and stay tied.
        With `buffers=True`, `(apply, params, buffers)`, where
        `apply(params, buffers, *args, **kwargs)` is `(output, new buffers)`.

    Raises:
        TypeError: `module` is neither a module nor a function that makes one, or cannot be copied.
        ValueError: the module is lazy and has not been run yet. From `apply`: a tree that does not fit.
        BufferWriteError: from `apply`, without `buffers=True`: the module wrote one of its buffers.
        ParameterWriteError: from `apply`: the module wrote one of its parameters.
        ModuleError: the module has hooks on gradients. From `apply` under a gradient: it does what cannot be
            differentiated as a function.

    Example:
        >>> apply, params = functional(nn.Linear(2, 3))
        >>> sorted(params), apply(params, torch.ones(5, 2)).shape
        (['bias', 'weight'], torch.Size([5, 3]))
    """
    if isinstance(module, nn.Module):
        _check_not_lazy(module)
        params = {name: p.detach() for name, p in module.named_parameters()}
        skeleton = without_parameters(module)
    elif callable(module):
        skeleton = deferred(module).module
        params = {name: p.detach() for name, p in skeleton.named_parameters()}
    else:
        raise TypeError(
            f"fz.functional: expected an nn.Module or a function that makes one, got {type(module).__name__}."
        )

    if hooked := hooks_on_gradients(module if isinstance(module, nn.Module) else skeleton):
        raise ModuleError(
            f"fz.functional: {hooked[0]}{f' and {len(hooked) - 1} more' if len(hooked) > 1 else ''} has a hook on "
            f"gradients, and a function has none: it would never run. Remove it, and change the gradients that "
            f"fz.value_and_grad returns, or the cotangent that a pullback is given. Hooks of the forward work."
        )
    switched = _Switched(module) if isinstance(module, nn.Module) else None
    evaluation = skeleton
    if any(part.training for part in skeleton.modules()):
        evaluation = without_parameters(skeleton, {id(t): t for t in _tensors(skeleton)}).eval()
    apply = Apply(evaluation, buffers, None, None)
    if evaluation is not skeleton or switched is not None:
        apply = Apply(skeleton, buffers, apply, switched)
    owned = {name: b.detach() for name, b in skeleton.named_buffers()}
    return (apply, tree.nest(params), tree.nest(owned)) if buffers else (apply, tree.nest(params))


class Apply:
    """A module as a pure function of its parameters, and of its buffers where it was made so; by `functional`.

    Attributes:
        eval: the same function with the module in evaluation mode.

    `method` makes a function of another method than `forward`.
    """

    def __init__(
        self, skeleton: nn.Module, takes_buffers: bool, evaluation: Apply | None, switched: _Switched | None
    ) -> None:
        self.eval: Apply = self if evaluation is None else evaluation
        self._call = _Call(skeleton)
        self._shapes = {name: p.shape for name, p in skeleton.named_parameters()}
        self._buffers = {name: b.detach() for name, b in skeleton.named_buffers()}
        self._takes_buffers = takes_buffers
        self._switched = switched

    def __call__(self, params: Tree, *args: Any, **kwargs: Any) -> Any:
        if self._switched is not None:
            self._switched.warn()
        given = _fitting("params", params, self._shapes)
        if not self._takes_buffers:
            return self._with_constants(given, args, kwargs)
        if not args:
            raise TypeError("fz.functional: with buffers=True, apply takes (params, buffers, ...).")
        return self._with_buffers(given, args[0], args[1:], kwargs)

    def method(self, name: str) -> Apply:
        """Return another method of the module as a function of the same parameters.

        Args:
            name: of a method, such as `"encode"`; also of one of a part, such as `"text_model.embed"`.

        Raises:
            AttributeError: the module has no such method.

        Example:
            >>> class Doubled(nn.Linear):
            ...     def twice(self, x):
            ...         return self(self(x))
            >>> apply, params = functional(Doubled(2, 2))
            >>> apply.method("twice")(params, torch.ones(5, 2)).shape
            torch.Size([5, 2])
        """
        found: Any = self._call.module
        for part in name.split("."):
            found = getattr(found, part, None)
        if not callable(found):
            raise AttributeError(
                f"fz.functional: {type(self._call.module).__name__} has no method {name!r}."
                f"{nearest(name, dir(self._call.module))}"
            )
        other = copy.copy(self)
        other._call = _Call(self._call.module, name)
        other.eval = other if self.eval is self else self.eval.method(name)
        return other

    def __repr__(self) -> str:
        module = self._call.module
        return f"fz.functional of {type(module).__name__} in {'training' if module.training else 'evaluation'} mode"

    def _with_constants(self, given: dict[str, Tensor], args: Any, kwargs: Any) -> Any:
        copies = _copies(self._buffers)
        with _watching(copies) as written:
            out, after = _run(self._call, given, copies, args, kwargs)
        changed = [name for name in self._buffers if name in written or after.get(name) is not copies[name]]
        changed += [name for name in after if name not in self._buffers]
        if changed:
            raise BufferWriteError(
                f"fz.functional: the module wrote its buffers {', '.join(changed)}, which are constants here. Use "
                f"apply, params, buffers = fz.functional(module, buffers=True), or apply.eval(params, ...) if it "
                f"writes them in training only."
            )
        return out

    def _with_buffers(self, given: dict[str, Tensor], buffers: Any, args: Any, kwargs: Any) -> tuple[Any, Tree]:
        shapes = {name: b.shape for name, b in self._buffers.items()}
        out, after = _run(self._call, given, _copies(_fitting("buffers", buffers, shapes)), args, kwargs)
        if after.keys() != self._buffers.keys():
            names = sorted(after.keys() ^ self._buffers.keys())
            raise BufferWriteError(
                f"fz.functional: the module made or removed its buffers {', '.join(names)} while it ran; the buffers "
                f"that come out must be those that went in. Register them with a tensor from the start."
            )
        return out, tree.nest(after)


class _Switched:
    """Warns once where a module is put into another mode, and the function made of it before is called."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.training, self.warned = weakref.ref(module), module.training, False

    def warn(self) -> None:
        module = self.module()
        if self.warned or module is None or module.training == self.training:
            return
        # Gradients by a function of training mode, and plain calls by one of evaluation mode, are what each is for.
        if is_transformed_now() == self.training:
            return
        self.warned = True
        was, now = ("training", "evaluation") if self.training else ("evaluation", "training")
        way = "Call apply.eval(params, ...) to evaluate." if self.training else "Put it there before fz.functional."
        warnings.warn(
            f"fz.functional: {type(module).__name__} was put into {now} mode after this function was made of it, which "
            f"stays in {was} mode. {way}",
            stacklevel=3,
        )


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _check_not_lazy(module: nn.Module) -> None:
    for name, t in (*module.named_parameters(), *module.named_buffers()):
        if is_lazy(t):
            raise ValueError(
                f"fz.functional: {name} has no shape yet, since {type(module).__name__} is lazy. "
                f"Run the module once on an example before."
            )


class _After:
    """What a module holds after a call. Not part of its output, which hooks on all modules, as counters have, see."""

    buffers: dict[str, Tensor]
    params: dict[str, Tensor]


class _Call(nn.Module):
    """Calls a module and reads its buffers back while they are still in place."""

    def __init__(self, module: nn.Module, method: str = "") -> None:
        super().__init__()
        self.module = module
        self.method = method
        self.shortcuts = Shortcuts.of(module)

    def forward(self, held: _After, /, *args: Any, **kwargs: Any) -> Any:
        called = operator.attrgetter(self.method)(self.module) if self.method else self.module
        out = called(*args, **kwargs)
        held.buffers, held.params = dict(self.module.named_buffers()), dict(self.module.named_parameters())
        return out


def _run(
    call: _Call, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor], args: Any, kwargs: Any
) -> tuple[Any, dict[str, Tensor]]:
    tensors = {f"module.{name}": t for name, t in (*params.items(), *buffers.items())}
    module, held = call.module, _After()
    memory = {name: storage_id(unwrapped(p)) for name, p in params.items()}
    with (
        explaining("fz.functional", module),
        surroundings(call.shortcuts),
        blocks_marked(module),
        read_only(params.items()),
    ):
        out = torch.func.functional_call(call, tensors, (held, *args), kwargs)
    replaced = [name for name in memory if held.params.get(name) is not params[name]]
    replaced += [
        name for name in memory if name not in replaced and storage_id(unwrapped(params[name])) != memory[name]
    ]
    replaced += [name for name in held.params if name not in memory]
    if replaced:
        raise ParameterWriteError(
            f"fz.functional: the module put other tensors in the place of its parameters {', '.join(replaced)} while "
            f"it ran, which would be lost. A function reads parameters, and an update alone changes them: compute what "
            f"you need from them without assigning it."
        )
    return out, held.buffers


def _copies(buffers: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy the buffers, so that a module may write them: inside torch.func too, where only new tensors can be."""
    # An inference tensor has no version counter, and with it no trace of a write.
    with torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext():
        return {name: b.clone() for name, b in buffers.items()}


@contextmanager
def _watching(buffers: Mapping[str, Tensor]) -> Iterator[set[str]]:
    """Yield a set that afterwards holds the names of the buffers written in place."""
    watch = _Watch(buffers)
    with watch if buffers else nullcontext():
        yield watch.written
    watch.written.update(name for name, t, version in watch.seen if t._version != version)


class _Watch(TorchFunctionMode):
    """Finds the writes that leave no trace in a buffer's version.

    They are those through `buffer.data`, which is the same memory with a version of its own, and those of
    batch norm, whose operator does not declare that it writes the running statistics.
    """

    def __init__(self, buffers: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.seen = [(name, b, b._version) for name, b in buffers.items()]
        self.written: set[str] = set()

    def names(self, t: Any) -> list[str]:
        return [name for name, other, _ in self.seen if other is t]

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func == _GET_DATA:
            self.seen += [(name, result, result._version) for name in self.names(args[0])]
        elif func is functional_batch_norm and kwargs["training"]:
            self.written.update(name for t in args for name in self.names(t))
        elif func is torch.batch_norm and args[5]:
            self.written.update(name for t in args[3:5] for name in self.names(t))
        return result


# What mypy takes for a tensor is a property, read through its __get__.
_GET_DATA = getattr(Tensor.data, "__get__")  # noqa: B009


def _fitting(what: str, given: Any, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """Return a nested dict as a flat one, if it has exactly the names and shapes asked for."""
    flat = dict(_flat(given))
    if flat.keys() == shapes.keys() and all(getattr(flat[name], "shape", None) == s for name, s in shapes.items()):
        return flat
    lines = []
    for name in dict.fromkeys([*shapes, *flat]):
        expected = f"shape {tuple(shapes[name])}" if name in shapes else "nothing"
        got = tree.describe(flat[name]) if name in flat else "nothing"
        if name not in shapes or getattr(flat.get(name), "shape", None) != shapes[name]:
            lines.append(f"{name or '(the whole)'}: expected {expected}, got {got}")
    raise TreeError(
        f"fz.functional: apply was given {what} that do not fit the module. Pass a tree like the one that "
        f"fz.functional returned.\n  " + "\n  ".join(lines)
    )


def _flat(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if not isinstance(node, Mapping):
        yield prefix, node
        return
    for key, value in node.items():
        yield from _flat(value, f"{prefix}.{key}" if prefix else str(key))
