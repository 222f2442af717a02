"""Drawings as SVG: the primitives, and what a program keeps alive over its operations."""

from __future__ import annotations

import html
import itertools
from collections.abc import Mapping, Sequence

from fzero.display.listing import amount

COLOURS = {
    "params": "#4c78a8",
    "moments": "#f58518",
    "gathered": "#9ecae9",
    "activations": "#54a24b",
    "gradients": "#e45756",
    "inputs": "#b279a2",
    "other": "#9d9da1",
}

_COLUMNS = 240  # more operations than that share columns


def colour(kind: str) -> str:
    """Return the colour of what memory is for: `moments` and `vision.moments` have the same."""
    return COLOURS.get(kind.rpartition(".")[2], COLOURS["other"])


def drawing(parts: Sequence[str], *, width: float, height: float) -> str:
    """Return SVG elements as one picture."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" '
        f'height="{height:g}" font-family="ui-monospace,monospace" font-size="11" fill="currentColor">'
        f"{''.join(parts)}</svg>"
    )


def rectangle(x: float, y: float, width: float, height: float, fill: str, *, note: str = "") -> str:
    """Return a filled rectangle; a note is shown while the pointer is on it."""
    title = f"<title>{html.escape(note)}</title>" if note else ""
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{fill}">{title}</rect>'


def tiles(rectangles: Sequence[tuple[float, float, float, float]], fill: str, *, opacity: float) -> str:
    """Return many rectangles (x, y, width, height) of one colour, in little text."""
    path = "".join(f"M{x:.1f} {y:.1f}h{width:.1f}v{height:.1f}h{-width:.1f}z" for x, y, width, height in rectangles)
    return f'<path d="{path}" fill="{fill}" opacity="{opacity:g}"/>'


def label(x: float, y: float, text: str, *, anchor: str = "start", opacity: float = 1) -> str:
    """Return text at a place: its `start`, `middle` or `end`."""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" opacity="{opacity:g}">{html.escape(text)}</text>'


def timeline(live: Mapping[str, Sequence[int]], operations: Sequence[str], at_rest: int) -> str:
    """Draw the bytes alive while each operation runs, stacked by kind.

    Args:
        live: by kind, the bytes alive at each operation.
        operations: their names.
        at_rest: bytes that stay between runs, drawn as a dashed line.
    """
    kinds = [kind for kind, curve in live.items() if any(curve)]
    if not kinds:
        return ""
    total = [sum(live[kind][i] for kind in kinds) for i in range(len(operations))]
    # Of operations that share a column the fullest stands for all: no peak may be lost.
    columns = min(_COLUMNS, len(total))
    bounds = [len(total) * column // columns for column in range(columns + 1)]
    at = [max(range(a, b), key=total.__getitem__) for a, b in itertools.pairwise(bounds)]
    left, top, width, height = 8.0, 18.0, 560.0, 150.0
    peak = max(range(len(total)), key=total.__getitem__)
    scale, step = height / max(total[peak], at_rest, 1), width / len(at)
    bottom = top + height
    parts, base = [], [0] * len(at)
    for kind in kinds:
        roof = [b + live[kind][i] for b, i in zip(base, at, strict=True)]
        edges = [left + step * column for column in range(len(at) + 1)]
        there = _steps(edges, [bottom - y * scale for y in roof])
        back = _steps(edges[::-1], [bottom - y * scale for y in base[::-1]])
        note = f"{kind}: {amount(live[kind][peak])} at the peak"
        parts.append(f'<path d="M{there}L{back}Z" fill="{colour(kind)}"><title>{note}</title></path>')
        base = roof
    rest = bottom - at_rest * scale
    parts.append(f'<path d="M{left:g} {rest:.1f}H{left + width:g}" stroke="currentColor" stroke-dasharray="4 3"/>')
    parts.append(label(left, top - 6, f"{amount(total[peak])} at most, in {operations[peak]}"))
    parts.append(label(left, bottom + 14, f"{len(operations):,} operations in order", opacity=0.6))
    for i, kind in enumerate(reversed(kinds)):
        y = top + 10 + 15 * i
        parts += [rectangle(left + width + 12, y - 9, 10, 10, colour(kind)), label(left + width + 28, y, kind)]
    parts.append(label(left + width + 12, top + 10 + 15 * len(kinds), "-- at rest", opacity=0.6))
    return drawing(parts, width=left + width + 110, height=bottom + 22)


def _steps(xs: Sequence[float], ys: Sequence[float]) -> str:
    """Return a path of steps: the height `ys[i]` from `xs[i]` to `xs[i + 1]`."""
    path = f"{xs[0]:.1f} {ys[0]:.1f}"
    for x, y, after in zip(xs[1:], ys, [*ys[1:], None], strict=True):
        if after is None:
            path += f"H{x:.1f}"
        elif f"{y:.1f}" != f"{after:.1f}":
            path += f"H{x:.1f}V{after:.1f}"
    return path
