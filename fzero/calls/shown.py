"""How values print: as the call that makes them, with what differs from the defaults."""

from __future__ import annotations

import dataclasses
import math
import types
from typing import Any

from torch import Tensor

_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, types.MethodType)


def call(name: str, /, *values: Any, **keywords: Any) -> str:
    """Return a call as text.

    Example:
        >>> call("zero", 3, axis=("node", "data"), replicate=max)
        "zero(3, axis=('node', 'data'), replicate=max)"
    """
    return f"{name}({', '.join([*map(text, values), *(f'{key}={text(value)}' for key, value in keywords.items())])})"


def made(name: str, value: Any, *, positional: bool = False, leave_out: tuple[str, ...] = ()) -> str:
    """Return the call that makes a dataclass: fields without a default, and those that differ from it.

    Args:
        name: of what is called.
        value: an instance.
        positional: the first field stands without its name, and always.
        leave_out: fields that the call does not take.
    """
    first, *others = [f for f in dataclasses.fields(value) if f.repr and f.name not in leave_out]
    shown = {f.name: getattr(value, f.name) for f in others if not _is(getattr(value, f.name), f.default)}
    own = getattr(value, first.name)
    if positional:
        return call(name, own, **shown)
    return call(name, **({} if _is(own, first.default) else {first.name: own}), **shown)


def text(value: Any) -> str:
    """Return a value as text: a function by its name, an infinite number so that Python reads it."""
    if isinstance(value, _FUNCTIONS):
        return value.__name__
    if isinstance(value, float) and not math.isfinite(value):
        return f"float('{value}')"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key!r}: {text(x)}' for key, x in value.items())}}}"
    return repr(value)


def _is(value: Any, default: Any) -> bool:
    return value is default or (not isinstance(value, Tensor) and type(value) is type(default) and value == default)
