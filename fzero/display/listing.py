"""What there is to say of a sharded tree or a state: a headline, a few facts, a row for each leaf.

A listing is made of shapes and dtypes. It runs no operator and no collective and never waits for a device, so it can be
had anywhere: in a trace, below a transform, of a simulated world, of leaves that were donated or mapped to something
else. A debugger that prints a state must not be what fails.

This file stands above `layout`, whose classes it describes, and knows them by their attributes.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fzero import tree
from fzero._torch import dispatch_modes, is_functorch_wrapped
from fzero.errors import DonatedError

_LONGEST = 40  # characters of what is no tensor


@dataclass(frozen=True)
class Leaf:
    """A row: one leaf of a tree, and what this rank holds of it.

    Attributes:
        path: where it stands.
        shape: its full shape.
        dtype: as this rank stores it; or what came instead of a tensor.
        held: which part is here, such as `1/8 over data`.
        sizes: bytes on this rank, one for each column of the listing.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    held: str
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class Listing:
    """What there is to say of a tree.

    Attributes:
        title: the headline.
        facts: pairs of a name and what there is to say about it.
        columns: what the sizes of each leaf are of.
        leaves: the rows.
    """

    title: str
    facts: tuple[tuple[str, str], ...]
    columns: tuple[str, ...]
    leaves: tuple[Leaf, ...]


def of_sharded(sharded: Any) -> Listing:
    """Return what there is to say of a `Sharded`."""
    elements = sum(math.prod(shape) for shape in sharded.shapes)
    title = f"Sharded({_count(sharded)}, {elements:,} elements, {_where(sharded)})"
    facts = [("at rest", f"{amount(_held(sharded))} on this rank")]
    if sharded.factor is not None:
        facts.append(("values", "leaf × factor, as in gradients"))
    return Listing(title, tuple(facts), ("bytes",), tuple(_rows(sharded, [_sizes(sharded)])))


def of_state(state: Any) -> Listing:
    """Return what there is to say of a `State`."""
    parts = {name: _held(getattr(state, name)) for name in ("params", "moments")}
    rest = _held((state.step, state.seed, state.loss_scale, state.streak))
    held = ", ".join(f"{name} {amount(size)}" for name, size in {**parts, "rest": rest}.items())
    facts = [("at rest", f"{amount(sum(parts.values()) + rest)} on this rank: {held}")]
    if is_sharded(state.params):
        facts.append(("policy", _policy(state.policy)))
    if scale := _number(state.loss_scale):
        facts.append(("loss scale", scale))
    number = _number(state.step)
    step = f", step {number}" if number else ""
    if not is_sharded(state.params):  # a function was mapped over the state's parts
        return Listing(f"State(params: {_brief(state.params)}{step})", tuple(facts), (), ())
    params = state.params
    elements = sum(math.prod(shape) for shape in params.shapes)
    title = f"State({_count(params)}, {elements:,} parameters, {_where(params)}{step})"
    moments = Counter[str]()
    for part in tree.leaves(state.moments, is_leaf=is_sharded):
        if is_sharded(part):
            moments.update(_sizes(part))
    return Listing(title, tuple(facts), ("params", "moments"), tuple(_rows(params, [_sizes(params), moments])))


def is_sharded(x: Any) -> bool:
    """Whether something is a `Sharded`, by its attributes."""
    return not isinstance(x, Tensor) and hasattr(x, "pieces") and hasattr(x, "placement")


def held_text(spec: Any, mesh: Any) -> str:
    """Return which part of a leaf a rank holds, from the leaf's `Spec` and its `Mesh`."""
    parts = [
        f"dimension {dim} over {axis}={mesh.size(axis)}"
        for dim, axis in enumerate(spec.split)
        if axis is not None and mesh.size(axis) > 1
    ]
    if mesh.size(spec.cut) > 1:
        parts.append(f"1/{mesh.size(spec.cut)} over {', '.join(spec.cut)}")
    return ", ".join(parts) or "whole"


def nbytes(x: Any) -> int:
    """Return the bytes of a tensor; 0 of what is none, or was donated."""
    try:
        return int(x.numel() * x.element_size()) if isinstance(x, Tensor) else 0
    except DonatedError:
        return 0


def amount(size: float) -> str:
    """Return bytes as text in the unit that suits them.

    Example:
        >>> amount(3 * 2**30), amount(1536), amount(12)
        ('3.00 GiB', '1.50 KiB', '12 B')
    """
    for power, name in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        if size >= 2 ** (10 * power):
            return f"{size / 2 ** (10 * power):.2f} {name}"
    return f"{size:.0f} B"


def printable(text: str, longest: int = 72) -> str:
    r"""Return text on one line, its middle left out where it is too long.

    Example:
        >>> printable("a\nb"), printable("abcdefghij", longest=7)
        ('a\\nb', 'abc…hij')
    """
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    half = longest // 2
    return line if len(line) <= longest else f"{line[:half]}…{line[-half:]}"


def _rows(sharded: Any, columns: Sequence[dict[str, int]]) -> Iterator[Leaf]:
    for path, piece, spec in zip(sharded.paths, sharded.pieces, sharded.placement.specs, strict=False):
        sizes = tuple(column.get(path, 0) for column in columns)
        yield Leaf(path, tuple(spec.shape), _dtype(piece), held_text(spec, sharded.mesh), sizes)


def _sizes(sharded: Any) -> dict[str, int]:
    return {path: nbytes(piece) for path, piece in zip(sharded.paths, sharded.pieces, strict=False)}


def _held(part: Any) -> int:
    return sum(nbytes(leaf) for leaf in tree.leaves(part))


def _count(sharded: Any) -> str:
    return f"{len(sharded.paths):,} {'leaf' if len(sharded.paths) == 1 else 'leaves'}"


def _where(sharded: Any) -> str:
    mesh = sharded.mesh
    axes = " × ".join(f"{name}={size}" for name, size in mesh.axes)
    return f"ZeRO-{sharded.layout.stage} over {axes}{', simulated' if mesh.simulated else ''}"


def _dtype(piece: Any) -> str:
    if not isinstance(piece, Tensor):
        return "none" if piece is None else _brief(piece)
    try:
        return str(piece.dtype).removeprefix("torch.")
    except DonatedError:
        return "donated"


def _policy(policy: Any) -> str:
    if policy.master == "split":
        stored = f"{_name(policy.param)} + 16 bits"
    else:
        stored = _name(policy.param) if policy.master is None else f"{_name(policy.master)} master"
    text = f"stored {stored}, moments {_name(policy.moment)}, computed in {_name(policy.compute)}"
    text += f", sent as {_name(policy.wire)}" if policy.wire is not None else ""
    text += f" under autocast to {_name(policy.autocast)}" if policy.autocast is not None else ""
    return f"{text}, rounding {policy.rounding}{', exempt leaves' if policy.exempt else ''}"


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def _brief(x: Any) -> str:
    return printable(tree.describe(x), _LONGEST)


def _number(x: Any) -> str:
    """Return the value of a scalar where it can be read without waiting, outside of traces; else nothing."""
    plain = type(x) is Tensor and x.device.type == "cpu" and not is_functorch_wrapped(x) and not dispatch_modes()
    return f"{x.item():,}" if plain and x.numel() == 1 else ""
