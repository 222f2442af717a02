"""Sizes that a program leaves open: symbols while it is traced, conditions when it is called.

A dimension of an input whose size differs between calls is traced as a symbol. Sizes inside the program are then
expressions of the symbols, and whatever the function asks of a size becomes a condition that later calls have to meet:

    x: f32[8, 32]   x: f32[12, 32]    ──▶    x: f32[s, 32],  s ≥ 2,  s % 4 == 0   (asked for at train.py:8)

Each dimension has a symbol of its own, also where sizes are equal at first: that they have to be equal is a condition,
if the function asks for it. Sizes of 0 and 1 mean other programs, by torch's rule, and are never a symbol's.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from fzero._torch import FakeTensorMode, floor_div, python_of, size_source, sizes_env
from fzero.marks import current_line

Dim = tuple[int, int]  # an input, and one of its dimensions
Shapes = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Sizes:
    """Which sizes of its inputs a program leaves open.

    Attributes:
        dims: the open dimensions.
        fixed: dimensions that were to be open, and turned out to have one size, with the place that asked for it.
        conditions: what has to hold of the sizes, as text, with the place that asked for it.
        serve: whether the program is for inputs of these shapes.
        sent: whether what collectives send depends on them.
    """

    dims: tuple[Dim, ...]
    fixed: Mapping[Dim, str]
    conditions: tuple[str, ...]
    serve: Callable[[Shapes], bool] = field(repr=False)
    sent: bool = False


class SizeOf:
    """A size as an expression of other sizes: what a node of a graph calls.

    Example:
        >>> SizeOf("s0 // 4", ("s0",))(12)
        3
    """

    def __init__(self, code: str, names: Sequence[str]) -> None:
        self.code, self.names = code, tuple(names)
        self.__name__ = self.__qualname__ = f"size[{code}]"
        self._call: Callable[..., int] = eval(f"lambda {', '.join(names)}: {code}", {"math": math})

    def __call__(self, *sizes: int) -> int:
        return int(self._call(*sizes))

    def __repr__(self) -> str:
        return self.__name__


class Symbols:
    """The open sizes of a trace while it is made.

    Args:
        dims: the dimensions that are to be open.
        shapes: the inputs' shapes, at which passes decide.
        names: what inputs are called.
        checked: the inputs whose other sizes have to be these; those of the rest are known to be.
    """

    def __init__(self, dims: Sequence[Dim], shapes: Shapes, names: Sequence[str], checked: Iterable[int]) -> None:
        self.checked = sorted(checked)
        self.env = sizes_env()(current_line)
        self.shapes = [tuple(shape) for shape in shapes]
        self.names = names
        self.sizes: dict[Dim, torch.SymInt] = {
            (i, d): _new_size(self.env, self.shapes[i][d], f"{names[i]}[{d}]") for i, d in dims
        }
        self.symbols: dict[Dim, Any] = {dim: size.node.expr for dim, size in self.sizes.items()}

    def examples(self, like: Sequence[Tensor]) -> list[Tensor]:
        """Return tensors without memory that look like these, with symbols where sizes are open."""
        opened = {i for i, _ in self.sizes}
        mode = FakeTensorMode(shape_env=self.env, allow_non_fake_inputs=True)
        mode.cache_enabled = False  # with symbols, keys of the cache take longer than what they stand for
        with mode:
            return [self._example(i, x) if i in opened else _fake(x) for i, x in enumerate(like)]

    def _example(self, i: int, x: Tensor) -> Tensor:
        shape: list[Any] = [self.sizes.get((i, d), size) for d, size in enumerate(self.shapes[i])]
        order = order_of(x.shape, x.stride())
        assert order is not None, "only dense tensors have open sizes"
        strides: list[Any] = [0] * len(shape)
        step: Any = 1
        for d in reversed(order):
            strides[d], step = step, step * shape[d]
        return torch.empty_strided(shape, strides, dtype=x.dtype, device=x.device)

    def sizes_of(self) -> Sizes:
        """Return what the trace, now made, leaves open and asks for."""
        replaced = {dim: self.env.replace(symbol) for dim, symbol in self.symbols.items()}
        fixed = {dim: "" for dim, expression in replaced.items() if expression.is_number}
        lines, texts = [], []
        names = {str(symbol): f"{self.names[i]}[{d}]" for (i, d), symbol in self.symbols.items()}
        names |= {str(part): f"({python_of(whole)})" for part, whole in self.env.parts.items()}
        for guard in self.env.guards:
            expression, place = guard.expr, str(guard.sloc.framework_loc)
            code = python_of(expression)
            lines.append(code)
            texts.append(f"{_named(code, names)}{place}")
            for dim in fixed:
                if not fixed[dim] and self.symbols[dim] in expression.free_symbols:
                    fixed[dim] = place
        dims = tuple(dim for dim in self.symbols if dim not in fixed)
        return Sizes(dims, fixed, tuple(texts), self._serving(lines))

    def _serving(self, conditions: Sequence[str]) -> Callable[[Shapes], bool]:
        code = ["def serve(shapes):"]
        rows = []
        for i in self.checked:
            fixed = [(d, size) for d, size in enumerate(self.shapes[i]) if (i, d) not in self.symbols]
            rows += [f"shapes[{i}][{d}] == {size}" for d, size in fixed]
        code += [f"    if not ({' and '.join(rows) or 'True'}): return False"]
        code += [f"    {symbol} = shapes[{i}][{d}]" for (i, d), symbol in self.symbols.items()]
        code += [f"    {part} = {python_of(whole)}" for part, whole in self.env.parts.items()]
        rows = [f"{symbol} >= 2" for symbol in (*self.symbols.values(), *self.env.parts)]
        code += [f"    return {' and '.join([*rows, *(f'({c})' for c in conditions)])}"]
        scope: dict[str, Any] = {"math": math, "torch": torch}
        exec("\n".join(code), scope)
        serve: Callable[[Shapes], bool] = scope["serve"]
        return serve


def part_like(x: Tensor, n: int) -> Tensor:
    """Return a tensor such as an n-th of dimension 0 of another. An open size has open parts."""
    size: Any = x.shape[0]
    return x.narrow(0, 0, _part(size, n) if isinstance(size, torch.SymInt) else size // n)


def _new_size(env: Any, hint: int, name: str) -> Any:
    """Return a new symbol for a size that is `hint` here, and at least 2 elsewhere."""
    from torch.fx.experimental.symbolic_shapes import DimDynamic  # loads sympy

    source = size_source(name)
    return env.create_symintnode(env.create_symbol(hint, source, DimDynamic.DYNAMIC), hint=hint, source=source)


def _part(size: torch.SymInt, n: int) -> Any:
    """Return the n-th part of a size that `n` divides, as a symbol: it is known inside a loop's body."""
    env, hint = size.node.shape_env, size.node.hint // n
    if hint < 2:
        return int(size) // n
    whole = floor_div(size.node.expr, n)
    for symbol, known in env.parts.items():
        if known == whole:
            return env.create_symintnode(symbol, hint=hint)
    made = _new_size(env, hint, f"part {len(env.parts)}")
    env.parts[made.node.expr] = whole
    return made


def _fake(x: Tensor) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)


def _named(code: str, names: Mapping[str, str]) -> str:
    """Return a condition with its symbols under the names of the dimensions that they are."""
    return re.sub(r"\b[a-z]\d+\b", lambda found: names.get(found.group(), found.group()), code)


def is_size(node: fx.Node) -> bool:
    """Whether a node stands for a number: a size of an input, or what is made of such."""
    return isinstance(node.meta.get("val"), int | float)


def order_of(shape: Sequence[int], strides: Sequence[int]) -> tuple[int, ...] | None:
    """Return the order in which a tensor's dimensions lie in its memory, outermost first; `None` if it has gaps.

    Example:
        >>> order_of((2, 3), (3, 1)), order_of((2, 3), (1, 2)), order_of((2, 3), (4, 1))
        ((0, 1), (1, 0), None)
    """
    order, step = sorted(range(len(shape)), key=lambda d: -strides[d]), 1
    for d in reversed(order):
        if strides[d] != step:
            return None
        step *= shape[d]
    return tuple(order)
