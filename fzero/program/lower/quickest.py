"""The quickest way to call an operator from Python.

`torch.ops.aten.view.default(x, [2, 3])` parses its arguments against a schema at each call; `Tensor.view(x, 2, 3)` does
that in code generated for `view`, in half the time. Which operator such a function reaches depends on its arguments
(`torch.mul(x, 2.0)` is `mul.Tensor`, not `mul.Scalar`), so it stands for an operator only where a trial call, stopped
before anything runs, arrives at the same operator with the same arguments.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, fx
from torch.fx.node import map_arg

from fzero._torch import OpOverload, TorchDispatchMode, below_autograd, bindings, direct

Arguments = tuple[Any, ...]


def quickest(
    operator: OpOverload,
    args: Arguments,
    kwargs: dict[str, Any],
    value: Any,
    value_of: Callable[[fx.Node], Any] = lambda node: node.meta["val"],
) -> tuple[Callable[..., Any], Arguments]:
    """Return what to call, with which positional arguments, for what `operator(*args, **kwargs)` does, in least time.

    Args:
        operator: what is to be called.
        args: its arguments: nodes of a graph, or tensors, where tensors stand.
        kwargs: likewise.
        value: what it returns for them; `None` for one that overwrites its first argument, or returns nothing.
        value_of: gives a tensor for a node, fake or real.

    Example:
        >>> import torch
        >>> x = torch.ones(2, 2)
        >>> quickest(torch.ops.aten.sum.dim_IntList, (x, [0], True), {}, x[:1])[1]
        (tensor([[1., 1.],
            [1., 1.]]), 0, True)
    """
    # One that makes a tensor on a device would start that device, and is rarely reached in the same words.
    found = () if "device" in kwargs else bindings(operator)
    if found:
        given, named = map_arg(args, value_of), map_arg(kwargs, value_of)
        if value is None and args and operator._schema.returns:
            value = given[0]
        expected = _reached(operator, given, named, value)
        for function in found:
            for form in _spellings(args):
                if expected and _same(_reached(function, map_arg(form, value_of), named, value), expected):
                    return function, form
    return direct(operator), args


def _spellings(args: Arguments) -> Iterator[Arguments]:
    """Give ways to pass the same arguments, quick ones first: lists of integers take longest to parse."""
    if args and _is_integers(args[-1]):
        yield (*args[:-1], *args[-1])
    if any(_is_integers(a) and len(a) == 1 for a in args):
        yield tuple(a[0] if _is_integers(a) and len(a) == 1 else a for a in args)
    yield args


def _is_integers(argument: Any) -> bool:
    return isinstance(argument, list) and bool(argument) and all(type(i) is int for i in argument)


class _Trial(TorchDispatchMode):
    """Notes which operators are reached, and runs none."""

    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value
        self.calls: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls.append([func, list(args), sorted((kwargs or {}).items())])
        return self.value


def _reached(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], value: Any) -> list[Any]:
    with _Trial(value) as trial, below_autograd():
        try:
            function(*args, **kwargs)
        except (TypeError, ValueError, RuntimeError):  # arguments that it does not take
            return []
    return trial.calls


def _same(a: Any, b: Any) -> bool:
    """Whether two notes are equal: tensors are the same objects, numbers of one type."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return a is b
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, float) and isinstance(b, float):
        return a.hex() == b.hex() or (math.isnan(a) and math.isnan(b))
    return type(a) is type(b) and a == b
