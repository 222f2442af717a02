"""Tables of cases in which every two choices meet, where the full product would say little more."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any


def pairwise(*factors: Iterable[Any]) -> list[tuple[Any, ...]]:
    """As few rows as it takes for every two choices of different factors to meet, found greedily.

    They come in the order of the product. A world's size goes first, so that worlds of one size follow each other.
    """

    def pairs(row: tuple[Any, ...]) -> set[Any]:
        return set(itertools.combinations(enumerate(row), 2))

    product = list(itertools.product(*map(tuple, factors)))
    left = set().union(*map(pairs, product))
    chosen = []
    while left:
        chosen.append(max(product, key=lambda row: len(pairs(row) & left)))
        left -= pairs(chosen[-1])
    return sorted(chosen, key=product.index)
