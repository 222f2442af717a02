"""Ranks compare a new program before its first run.

Ranks that run different programs would wait for each other in different collectives. So a program that holds any
is written as text, the same on every rank and in every launch if it is the same program; the ranks compare a hash
of it, and only where hashes differ they send the text, to say what differs:

    rank 0   trace ─▶ text ─▶ hash ─┐                  all equal ─▶ run
    rank 1   trace ─▶ text ─▶ hash ─┴─▶ store ─▶ ─▶    else      ─▶ ProgramMismatchError on every rank

A program without collectives is its rank's own affair and is not announced.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, fx

from fzero._torch import OpOverload
from fzero.errors import ProgramMismatchError
from fzero.marks import line_of, marks_of
from fzero.peers import Entry, hold_round
from fzero.program.program import Program
from fzero.program.trace import Trace

# Paths that a message lists.
_LISTED = 4


def announce(program: Program, call: str, arguments: Mapping[str, str]) -> None:
    """Compare a program that this rank is about to run for the first time with those of the other ranks.

    Args:
        program: what was traced.
        call: the call that it was traced for, such as `step (call 7)`.
        arguments: path to dtype and shape, or to the constant that stands there.

    Raises:
        ProgramMismatchError: another rank announces a different program, or none as long as a collective may wait.
        PeerError: another rank raised in this call.
    """
    if not dist.is_initialized() or not program.communicates:
        return

    def reasons() -> bytes:
        rows = [(text, _place(node)) for text, node in _lines(program.trace, _Groups())]
        return zlib.compress(json.dumps({"call": call, "arguments": dict(arguments), "lines": rows}).encode())

    if different := hold_round(Entry(fingerprint(program.trace), call, program.cause), reasons):
        told = {rank: json.loads(zlib.decompress(reason)) for rank, reason in different.items()}
        raise ProgramMismatchError(f"{call}: {_explained(told)}")


def fingerprint(trace: Trace) -> str:
    """Return a hash of a program: equal on every rank and in every launch for the same program.

    Operators, constants, shapes, strides, dtypes and kinds of device go into it. Tensors that the function closes
    over count by their shape and dtype, and process groups, whose names differ between ranks, by their axis.
    """
    return hashlib.sha256("\n".join(program_text(trace)).encode()).hexdigest()


def program_text(trace: Trace) -> list[str]:
    """Return the text that the hash is made of: one line for each operation, those of loop bodies included."""
    return [text for text, _ in _lines(trace, _Groups())]


class _Groups(dict[str, str]):
    """Names of process groups as numbers, in the order in which a program uses them."""

    def __missing__(self, name: str) -> str:
        self[name] = f"<group {len(self)}>"
        return self[name]


def _lines(trace: Trace, groups: _Groups, indent: str = "") -> Iterator[tuple[str, fx.Node]]:
    for node in trace.module.graph.nodes:
        if node.op == "get_attr" and node.target in trace.bodies:
            yield f"{indent}{node.name} = loop body:", node
            yield from _lines(trace.bodies[node.target], groups, indent + "    ")
            continue
        if node.op == "output":
            yield f"{indent}return {_text(node.args[0])}", node
            continue
        value = node.meta.get("val")
        if node.op == "get_attr":
            made = "constant"
            value = getattr(trace.module, str(node.target), value)
        elif node.op == "call_function":
            made = f"{_name(node.target)}({', '.join(_arguments(node, groups))})"
        else:
            made = node.op
        yield f"{indent}{node.name} = {made} -> {_kind(value)}", node


def _arguments(node: fx.Node, groups: _Groups) -> Iterator[str]:
    names = [a.name for a in node.target._schema.arguments] if isinstance(node.target, OpOverload) else []
    positional = itertools.zip_longest(names[: len(node.args)], node.args)
    for name, value in [*positional, *node.kwargs.items()]:
        key = f"{name}=" if name in node.kwargs else ""
        if name == "group_name" and isinstance(value, str):
            yield f"{key}{groups[value]}{marks_of(node).get('axis', '')}"
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


def _place(node: fx.Node) -> str | None:
    line = line_of(node)
    return None if line is None else f"{line[0]}:{line[1]}"


def _explained(told: Mapping[int, dict[str, Any]]) -> str:
    (first, a), (second, b) = told.items()
    head = f"the ranks hold different programs. Rank {first} traced {a['call']}, rank {second} traced {b['call']}"
    rows = _different_arguments(a["arguments"], b["arguments"])
    if rows:
        way_out = "Give every rank arguments of the same shapes and dtypes, and the same constants."
    else:
        way_out = "Run the same function on every rank, with the same constants."
        rows = [] if a["call"] != b["call"] else [_different_line(a["lines"], b["lines"])]
    listed = [f"{path}: rank {first} has {mine}, rank {second} has {theirs}" for path, mine, theirs in rows[:_LISTED]]
    more = [f"and {len(rows) - _LISTED} more"] if len(rows) > _LISTED else []
    return f"{'; '.join([head, *listed, *more])}. {way_out}"


def _different_arguments(mine: Mapping[str, str], theirs: Mapping[str, str]) -> list[tuple[str, str, str]]:
    rows = []
    for path in dict.fromkeys([*mine, *theirs]):
        a, b = (_portable(side.get(path, "nothing")) for side in (mine, theirs))
        if a != b:
            short = [x.replace(" on cpu", "").replace(" on cuda", "") for x in (a, b)]
            a, b = short if short[0] != short[1] else (a, b)
            rows.append((path, a, b))
    return rows


def _portable(text: str) -> str:
    """Return the description of an argument without the number of its device and addresses of objects."""
    return re.sub(r"\b0x[0-9a-fA-F]+", "0x", re.sub(r" on (\w+):\d+", r" on \1", text))


def _different_line(mine: list[list[Any]], theirs: list[list[Any]]) -> tuple[str, str, str]:
    pairs = enumerate(itertools.zip_longest(mine, theirs, fillvalue=("nothing", None)), 1)
    number, sides = next((n, (a, b)) for n, (a, b) in pairs if a[0] != b[0])
    told = [f"`{text.strip()}`{f' ({place})' if place else ''}" for text, place in sides]
    return f"line {number} of the program", told[0], told[1]
