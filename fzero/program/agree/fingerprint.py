"""Programs as text that is the same on every rank, and in every launch, if it is the same program.

A hash of the whole text tells whether residuals are of this function. What ranks compare before they run is the
program's collectives alone: see `fzero.program.agree.order`.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

from fzero._torch import OpOverload
from fzero.marks import marks_of
from fzero.program.graph.trace import Trace


def fingerprint(trace: Trace) -> str:
    """Return a hash of a program: equal on every rank and in every launch for the same program.

    Operators, constants, shapes, strides, dtypes and kinds of device go into it. Tensors that the function closes
    over count by their shape and dtype, and process groups, whose names differ between ranks, by their axis.
    """
    return hashlib.sha256("\n".join(program_text(trace)).encode()).hexdigest()


def program_text(trace: Trace) -> list[str]:
    """Return the text that the hash is made of: one line for each operation, those of loop bodies included."""
    return list(_lines(trace, _Groups()))


class _Groups(dict[str, str]):
    """Names of process groups as numbers, in the order in which a program uses them."""

    def __missing__(self, name: str) -> str:
        self[name] = f"<group {len(self)}>"
        return self[name]


def _lines(trace: Trace, groups: _Groups, indent: str = "") -> Iterator[str]:
    for node in trace.module.graph.nodes:
        if node.op == "get_attr" and node.target in trace.bodies:
            yield f"{indent}{node.name} = loop body:"
            yield from _lines(trace.bodies[node.target], groups, indent + "    ")
            continue
        if node.op == "output":
            yield f"{indent}return {_text(node.args[0])}"
            continue
        value = node.meta.get("val")
        if node.op == "get_attr":
            made = "constant"
            value = getattr(trace.module, str(node.target), value)
        elif node.op == "call_function":
            made = f"{_name(node.target)}({', '.join(_arguments(node, groups))})"
        else:
            made = node.op
        yield f"{indent}{node.name} = {made} -> {_kind(value)}"


def _arguments(node: fx.Node, groups: _Groups) -> Iterator[str]:
    names = [a.name for a in node.target._schema.arguments] if isinstance(node.target, OpOverload) else []
    positional = itertools.zip_longest(names[: len(node.args)], node.args)
    for name, value in [*positional, *node.kwargs.items()]:
        key = f"{name}=" if name in node.kwargs else ""
        if name == "group_name" and isinstance(value, str):
            yield f"{key}{groups[value]}{marks_of(node).axis or ''}"
        else:
            yield f"{key}{_text(value)}"


def _text(value: Any) -> str:
    """Write a constant, or the name of a value, without what differs between processes: addresses, device numbers."""
    if isinstance(value, fx.Node):
        return value.name
    if isinstance(value, torch.device):
        return value.type
    if isinstance(value, list | tuple):
        return f"{type(value).__name__}({', '.join(map(_text, value))})"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key!r}: {_text(x)}' for key, x in value.items())}}}"
    if isinstance(value, slice):
        return f"slice({_text(value.start)}, {_text(value.stop)}, {_text(value.step)})"
    if isinstance(value, Tensor):
        return _kind(value)
    if callable(value) and hasattr(value, "__name__"):
        return _name(value)
    return re.sub(r"\b0x[0-9a-fA-F]+", "0x", repr(value))


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        dtype, strides = str(value.dtype).removeprefix("torch."), tuple(value.stride())
        return f"{dtype}{tuple(value.shape)} strides {strides} on {value.device.type}"
    if isinstance(value, list | tuple):
        return f"({', '.join(map(_kind, value))})"
    return type(value).__name__


def _name(target: Any) -> str:
    if isinstance(target, OpOverload):
        return str(target)
    return f"{getattr(target, '__module__', '')}.{getattr(target, '__qualname__', type(target).__qualname__)}"
