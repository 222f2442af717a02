"""A listing as text of a bounded number of lines."""

from __future__ import annotations

from collections.abc import Sequence

from fzero.display.listing import Listing, amount, printable

ROWS = 20


def text_of(listing: Listing, *, rows: int = ROWS) -> str:
    """Return a listing as text.

    Args:
        listing: what there is to say.
        rows: how many leaves to name at most.

    Example:
        >>> from fzero.display.listing import Leaf
        >>> leaf = Leaf("w", (4, 4), "float32", "whole", (64,))
        >>> print(text_of(Listing("Sharded(…)", (("at rest", "64 B"),), ("bytes",), (leaf,))))
        Sharded(…)
          at rest  64 B
          leaf  shape   dtype    held   bytes
          w     (4, 4)  float32  whole   64 B
    """
    lines = [listing.title]
    wide = max((len(name) for name, _ in listing.facts), default=0)
    lines += [f"  {name:<{wide}}  {value}" for name, value in listing.facts]
    if listing.leaves:
        cells = [("leaf", "shape", "dtype", "held", *listing.columns)]
        cells += [
            (printable(leaf.path), str(leaf.shape), leaf.dtype, leaf.held, *map(amount, leaf.sizes))
            for leaf in listing.leaves[:rows]
        ]
        lines += [f"  {line}" for line in aligned(cells, left=4)]
    if more := len(listing.leaves) - rows if len(listing.leaves) > rows else 0:
        lines.append(f"  ... {more:,} more")
    return "\n".join(lines)


def aligned(cells: Sequence[Sequence[str]], *, left: int) -> list[str]:
    """Return rows of cells as lines, the first `left` columns flush left and the others flush right.

    Example:
        >>> aligned([("a", "10"), ("bb", "5")], left=1)
        ['a   10', 'bb   5']
    """
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join(
            f"{cell:<{width}}" if i < left else f"{cell:>{width}}"
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]
