"""What an optimizer is told of leaves by their paths: which ones decay, which ones it has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fzero import tree
from fzero.calls import shown
from fzero.calls.nearest import nearest
from fzero.errors import TreeError

Mask = Callable[[str], bool]


def mask_of(call: str, mask: Any, name: str = "mask") -> Mask | None:
    """Return a mask as a function of paths: from a function, or a tree of booleans like the parameters."""
    if mask is None or callable(mask):
        return mask
    values = ByPath.of(mask, f"{call}: {name}")
    for path, value in values.values:
        if not isinstance(value, bool):
            raise TypeError(
                f"{call}: {name}: expected a function of the dotted path, or a tree of True and False like the "
                f"parameters, got {tree.describe(value)} at {path or '(the whole)'}. For the leaves of a pattern write "
                f"{name}=lambda path: fnmatch.fnmatch(path, '*.weight')."
            )
    return values


def check_mask(mask: Mask | None, own: Sequence[str], everyone: Sequence[str], idle: str) -> None:
    """Raise where a mask does not know a leaf, or names one that there is not; or chooses none, if that is `idle`."""
    if mask is None or not everyone:
        return
    if isinstance(mask, ByPath):
        mask.check(everyone)
        for path in own:
            mask(path)
    elif idle and not any(mask(path) for path in everyone):
        raise ValueError(
            f"fz.init: the mask of the optimizer is true for no leaf, so {idle}. The paths are "
            f"{', '.join(everyone[:5])}{', …' if len(everyone) > 5 else ''}. Mend the mask, or pass weight_decay=0."
        )


@dataclass(frozen=True)
class ByPath:
    """A tree of values like the parameters, as a function of a path."""

    what: str
    values: tuple[tuple[str, Any], ...]

    def __repr__(self) -> str:
        # Of many leaves the whole would be pages.
        return shown.text(tree.nest(dict(self.values))) if len(self.values) <= 16 else f"<{len(self.values)} leaves>"

    @staticmethod
    def of(tree_: Any, what: str) -> ByPath:
        """Return a tree as such a function; `what` it is stands in messages."""
        return ByPath(what, tuple(zip(tree.paths(tree_), tree.leaves(tree_), strict=True)))

    def __call__(self, path: str) -> Any:
        values = dict(self.values)
        if path not in values:
            raise TreeError(
                f"{self.what} has nothing at {path!r}.{nearest(path, values)} Give it every leaf of the parameters."
            )
        return values[path]

    def check(self, paths: Sequence[str]) -> None:
        """Raise where a path of this tree is that of no leaf."""
        if idle := [path for path, _ in self.values if path not in set(paths)]:
            raise TreeError(
                f"{self.what} has {idle[0]!r}, and no leaf has this path.{nearest(idle[0], paths)} The paths are "
                f"{', '.join(paths[:5])}{', …' if len(paths) > 5 else ''}."
            )
