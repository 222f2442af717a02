"""A drawing as a value: shown in a notebook, printed in a terminal, saved as a file."""

from __future__ import annotations

import html
from dataclasses import dataclass


@dataclass(frozen=True, repr=False)
class Picture:
    """A drawing for notebooks, as SVG, and for terminals, as text.

    Attributes:
        text: it as text.
        svg: it as SVG, to be saved or shown.
    """

    text: str
    svg: str

    def __str__(self) -> str:
        return self.text

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return f'<div title="{html.escape(self.text.splitlines()[0])}">{self.svg}</div>'
