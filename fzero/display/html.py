"""A listing or a program as HTML for notebooks: small tables that fold, styles inline, all text escaped.

Colours are the page's own, so that it reads on light and dark.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from typing import Any

from fzero.display.listing import Listing, amount, printable
from fzero.display.svg import timeline

ROWS = 200

_FONT = "font-family:ui-monospace,monospace;font-size:12px;line-height:1.4"
_CELL = "padding:1px 10px 1px 0;border:0;white-space:nowrap"


def html_of(listing: Listing, *, rows: int = ROWS) -> str:
    """Return a listing as HTML.

    Args:
        listing: what there is to say.
        rows: how many leaves to name at most.
    """
    found = [table(listing.facts, left=2)]
    if listing.leaves:
        cells: list[Sequence[str]] = [
            (printable(leaf.path), str(leaf.shape), leaf.dtype, leaf.held, *map(amount, leaf.sizes))
            for leaf in listing.leaves[:rows]
        ]
        more = len(listing.leaves) - len(cells)
        cells += [(f"... {more:,} more",)] if more else []
        head = ("leaf", "shape", "dtype", "held", *listing.columns)
        found.append(fold("leaves", table(cells, head=head, left=4), is_open=len(listing.leaves) <= 12))
    return page(listing.title, found)


def html_of_program(title: str, memory: Any, traffic: Any, flops: int, stages: Sequence[Any]) -> str:
    """Return what a program costs as HTML.

    Args:
        title: the headline.
        memory: its `Memory`, drawn as a timeline.
        traffic: its `Traffic`.
        flops: its operations.
        stages: what it was after each pass, each a `Stage`.
    """
    facts = [
        ("peak", f"{amount(memory.peak)} in {memory.where}; at rest {amount(memory.at_rest)}"),
        ("received", " and ".join(f"{amount(n)} over {axis}" for axis, n in traffic.by_axis.items()) or "nothing"),
        ("flops", f"{flops:.4g}"),
    ]
    found = [table(facts, left=2), timeline(memory.live, memory.operations, memory.at_rest)]
    kinds = [(kind, amount(n), f"{n / max(memory.peak, 1):.1%}") for kind, n in memory.by_kind.items() if n]
    found.append(fold("at the peak", table(kinds, head=("kind", "bytes", "share"))))
    calls = [(name, f"{n:,}", amount(traffic.by_collective[name])) for name, n in traffic.calls.items() if n]
    if calls:
        found.append(fold("collectives", table(calls, head=("collective", "calls", "received"))))
    if stages:
        head = ("after", "peak", "received", "operations", "collectives", "seconds")
        cells = [
            (s.name, amount(s.peak), amount(s.received), f"{s.nodes:,}", f"{s.collectives:,}", f"{s.seconds:.2f}")
            for s in stages
        ]
        found.append(fold("passes", table(cells, head=head)))
    return page(title, found)


def page(title: str, parts: Iterable[str]) -> str:
    """Return parts, each HTML, under a title that is text."""
    return f'<div style="{_FONT}">{fold(title, "".join(parts))}</div>'


def fold(title: str, inside: str, *, is_open: bool = True) -> str:
    """Return HTML that folds away under a title that is text."""
    state = 'open="open" ' if is_open else ""
    return (
        f'<details {state}style="margin:2px 0 2px 8px">'
        f'<summary style="cursor:pointer">{html.escape(title)}</summary>{inside}</details>'
    )


def table(cells: Iterable[Sequence[str]], *, head: Sequence[str] = (), left: int = 1) -> str:
    """Return rows of text as a table, the first `left` columns flush left and the others flush right."""
    rows = [_row(head, "th", left)] if head else []
    rows += [_row(row, "td", left) for row in cells]
    return f"<table style='{_FONT};border-collapse:collapse;margin:2px 0 2px 8px'>{''.join(rows)}</table>"


def _row(cells: Sequence[str], tag: str, left: int) -> str:
    weight = "font-weight:normal;opacity:0.6;" if tag == "th" else ""
    made = [
        f"<{tag} style='{weight}text-align:{'left' if i < left else 'right'};{_CELL}'>{html.escape(cell)}</{tag}>"
        for i, cell in enumerate(cells)
    ]
    return f"<tr style='background:none'>{''.join(made)}</tr>"
