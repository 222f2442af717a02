"""Who holds what: a line for each rank, as long as everything there is, filled where that rank has it.

    data=0  ██▌·······················█████▌··························
    data=1  ··▌██··························▌████▌·····················

Bytes are to scale. Of many ranks the first and the last are drawn.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from fzero.display.listing import amount, printable
from fzero.display.svg import colour, drawing, label, rectangle, tiles
from fzero.display.text import aligned

_CHARACTERS = 72
_BAR, _ROW, _GAP = 560.0, 14.0, 5.0  # pixels: a rank's line, its height, what is between two
_LETTER = 6.7  # pixels


@dataclass(frozen=True)
class Segment:
    """Leaves side by side that ranks hold in the same way.

    Attributes:
        kind: what they are for, such as `params`.
        name: what their paths have in common.
        leaves: how many.
        axes: mesh axes that they are divided over, outermost first; where there are none every rank has all.
        whole: bytes of the full leaves.
        size: bytes on a rank.
    """

    kind: str
    name: str
    leaves: int
    axes: tuple[str, ...]
    whole: int
    size: int

    def part(self, place: Mapping[str, int], sizes: Mapping[str, int]) -> tuple[float, float]:
        """Return from where to where the rank at a place of the mesh holds it, as fractions."""
        index = 0
        for axis in self.axes:
            index = index * sizes[axis] + place[axis]
        count = math.prod(sizes[axis] for axis in self.axes)
        return index / count, (index + 1) / count

    def text(self) -> str:
        """Return what it is: `12 leaves cut over data`, `1 leaf whole`."""
        many = f"{self.leaves:,} {'leaf' if self.leaves == 1 else 'leaves'}"
        return f"{many} cut over {', '.join(self.axes)}" if self.axes else f"{many} whole"


@dataclass(frozen=True)
class Holdings:
    """What the ranks of a mesh hold.

    Attributes:
        title: a headline.
        mesh: `(name, size)` of each axis, the last varying fastest over ranks.
        segments: in the order in which they are drawn; those of a kind are neighbours.
        ranks: how many ranks to draw at most.
    """

    title: str
    mesh: tuple[tuple[str, int], ...]
    segments: tuple[Segment, ...]
    ranks: int

    @property
    def size(self) -> int:
        """Bytes on a rank."""
        return sum(segment.size for segment in self.segments)

    @property
    def whole(self) -> int:
        """Bytes of all full leaves."""
        return sum(segment.whole for segment in self.segments)

    def text(self) -> str:
        """Return the drawing as text, and what it shows."""
        merged = _by_placement(self.segments)
        lengths = [max(1, round(_CHARACTERS * s.whole / max(self.whole, 1))) for s in merged]
        rows = []
        for name, place in self._lines():
            line = ""
            for i, (segment, length) in enumerate(zip(merged, lengths, strict=True)):
                line += " " if i and segment.kind != merged[i - 1].kind else ""
                line += self._characters(segment, place, length)
            rows.append((name, line, amount(self.size) if place else ""))
        return "\n".join([self.headline(), *aligned(rows, left=2), *aligned(list(self._legend()), left=4)])

    def svg(self) -> str:
        """Return the drawing as SVG."""
        lines = list(self._lines())
        left = 12 + _LETTER * max(len(name) for name, _ in lines)
        scale, top, parts = _BAR / max(self.whole, 1), 36.0, [label(4, 14, self.headline())]
        pale: dict[str, list[tuple[float, float, float, float]]] = {}  # all there is, below what is held
        for name, place in lines:
            x = left
            parts.append(label(4, top + 11, name))
            for segment in self.segments if place else ():
                width = segment.whole * scale
                start, end = segment.part(place, dict(self.mesh))
                pale.setdefault(segment.kind, []).append((x, top, max(width - 0.5, 0.5), _ROW))
                # A sliver of one in thousands is drawn a pixel wide, or it would not be seen.
                held, note = (
                    max((end - start) * width - 0.5, 1.0),
                    f"{name} has {amount(segment.size)}: {_note(segment)}",
                )
                at = min(x + start * width, x + max(width - held, 0))
                parts.append(rectangle(at, top, held, _ROW, colour(segment.kind), note=note))
                x += width
            parts.append(label(left + _BAR + 8, top + 11, amount(self.size) if place else ""))
            top += _ROW + _GAP
        parts += self._names(left, scale)
        for kind, *words in self._legend():
            parts += [
                rectangle(left, top + 4, 10, 10, colour(kind)),
                label(left + 16, top + 13, f"{kind} {' '.join(words)}"),
            ]
            top += 16
        parts[:0] = [tiles(some, colour(kind), opacity=0.2) for kind, some in pale.items()]
        return drawing(parts, width=left + _BAR + 90, height=top + 8)

    def headline(self) -> str:
        """Return the title, and how much a rank holds of the whole."""
        return f"{self.title}: a rank holds {amount(self.size)} of {amount(self.whole)}"

    def _lines(self) -> Iterator[tuple[str, dict[str, int]]]:
        """Yield name and place of each rank to draw; in the middle a line that stands for the others."""
        count = math.prod(size for _, size in self.mesh)
        first = count if count <= self.ranks else (self.ranks + 1) // 2
        last = 0 if count <= self.ranks else self.ranks - first
        for rank in (*range(first), *range(count - last, count)):
            if last and rank == count - last:
                yield f"… {count - first - last:,} more", {}
            place = self._place(rank)
            yield " ".join(f"{axis}={i}" for axis, i in place.items()), place

    def _place(self, rank: int) -> dict[str, int]:
        found = {}
        for axis, size in reversed(self.mesh):
            rank, found[axis] = divmod(rank, size)
        return dict(reversed(found.items()))

    def _characters(self, segment: Segment, place: Mapping[str, int], length: int) -> str:
        if not place:
            return " " * length
        start, end = (x * length for x in segment.part(place, dict(self.mesh)))
        covered = [max(0.0, min(end, i + 1) - max(start, i)) for i in range(length)]
        return "".join("█" if c > 0.75 else "▌" if c > 0.25 else "▏" if c > 1e-9 else "·" for c in covered)

    def _legend(self) -> Iterator[tuple[str, str, str, str]]:
        merged = _by_placement(self.segments)
        for kind in dict.fromkeys(segment.kind for segment in merged):
            mine = [segment for segment in merged if segment.kind == kind]
            size, whole = (sum(getattr(s, name) for s in mine) for name in ("size", "whole"))
            yield kind, f"{amount(size)} a rank", f"of {amount(whole)}:", ", ".join(s.text() for s in mine)

    def _names(self, left: float, scale: float) -> Iterator[str]:
        """Yield the names of the segments that have room for one."""
        x = left
        for segment in self.segments:
            width = segment.whole * scale
            if len(segment.name) * _LETTER < width:
                yield label(x + width / 2, 30, segment.name, anchor="middle", opacity=0.6)
            x += width


def _by_placement(segments: Sequence[Segment]) -> list[Segment]:
    """Return segments with those of one kind and one way of being held joined."""
    found: dict[tuple[str, tuple[str, ...]], list[Segment]] = {}
    for segment in segments:
        found.setdefault((segment.kind, segment.axes), []).append(segment)
    kinds = list(dict.fromkeys(kind for kind, _ in found))
    return [
        Segment(
            kind,
            "",
            sum(s.leaves for s in some),
            axes,
            sum(s.whole for s in some),
            sum(s.size for s in some),
        )
        for (kind, axes), some in sorted(found.items(), key=lambda item: kinds.index(item[0][0]))
    ]


def _note(segment: Segment) -> str:
    return f"{segment.kind} {printable(segment.name)}, {amount(segment.whole)}, {segment.text()}"
