"""Layouts: where the leaves of a tree live.

A leaf is laid out in two steps. `P` splits dimensions over mesh axes (tensor parallelism), which leaves
this rank a block. ZeRO then cuts the block over the data axes: flattened, padded at its end by at most
N − 1 zeros, cut into N equal contiguous pieces. A block of under 16·N elements stays whole on every rank.

    leaf (rows, columns) ──P──▶ block ──flatten──▶ 0 1 2 3 4 5 6 0 ──cut──▶ │0 1│2 3│4 5│6 0│

Every piece is a 1-D tensor, also the whole ones, so that an update kernel sees only one kind.
"""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral

from fzero.calls import shown
from fzero.calls.arguments import named
from fzero.errors import LayoutError
from fzero.precision.policy import Policy
from fzero.sharding.leaf import P


@dataclass(frozen=True)
class Layout:
    """Where parameters, gradients and moments live; made by `zero`.

    Attributes:
        stage: the ZeRO stage, 0 to 3.
        axis: data axes that leaves are cut over.
        replicate: data axes that hold copies.
        split: `(pattern of paths, P)` pairs; the first pattern that fits a path splits that leaf.

    Example:
        >>> layout = zero(1, split={"*.weight": P("model", None)})
        >>> layout.gradient_cut, layout.parameter_cut(None), layout.split_of("head.weight")
        (('data',), (), P('model', None))
    """

    stage: int
    axis: tuple[str, ...]
    replicate: tuple[str, ...] = ()
    split: tuple[tuple[str, P], ...] = ()

    @property
    def data_axes(self) -> tuple[str, ...]:
        """The axes over which batches differ, and gradients are averaged."""
        return self.replicate + self.axis

    @property
    def gradient_cut(self) -> tuple[str, ...]:
        """The axes over which gradients and moments are cut."""
        return self.axis if self.stage >= 1 else ()

    def parameter_cut(self, policy: Policy | None) -> tuple[str, ...]:
        """The axes over which stored parameters are cut.

        A master is only read by the update, so stages 1 and 2 cut it like the moments.
        """
        return self.gradient_cut if self.stage == 3 or (policy is not None and policy.has_master) else ()

    def split_of(self, path: str) -> P:
        """Return the mesh axes that the dimensions of the leaf at a path are split over."""
        return next((spec for pattern, spec in self.split if fnmatch.fnmatchcase(path, pattern)), P())

    def __repr__(self) -> str:
        axes = {"axis": self.axis} if self.axis != ("data",) else {}
        axes |= {"replicate": self.replicate} if self.replicate else {}
        named = {name: names[0] if len(names) == 1 else names for name, names in axes.items()}
        return shown.call("zero", self.stage, **named, **({"split": dict(self.split)} if self.split else {}))


@named("fz.zero")
def zero(
    stage: int,
    axis: str | Sequence[str] = "data",
    *,
    replicate: str | Sequence[str] = (),
    split: Mapping[str, P] | None = None,
) -> Layout:
    """Return a ZeRO layout.

    Args:
        stage: 0 copies everything to every rank; 1 and 2 cut gradients and moments (as one program they
            are the same thing); 3 cuts the parameters too.
        axis: the mesh axis, or axes, to cut over.
        replicate: mesh axes that hold copies and see different batches, such as `node` where `data` runs
            inside a node.
        split: pattern of leaf paths (`*` matches anything) to the `P` that splits such leaves.

    Raises:
        LayoutError: the stage is not 0 to 3, or an axis is named twice.

    Source: ZeRO, Rajbhandari et al. 2019, arXiv 1910.02054.

    Example:
        >>> zero(3, axis="data", replicate="node").data_axes
        ('node', 'data')
    """
    if not isinstance(stage, Integral) or isinstance(stage, bool) or stage not in (0, 1, 2, 3):
        raise LayoutError(f"fz.zero: there is no stage {stage!r}. Use 0, 1, 2 or 3.")
    cut, copies = _axes("axis", axis), _axes("replicate", replicate)
    for pattern, spec in (split or {}).items():
        if not isinstance(pattern, str) or not isinstance(spec, P):
            raise LayoutError(
                f"fz.zero: split={split!r}; expected a dict from patterns of paths to P, such as "
                f"{{'*.weight': fz.P('model', None)}}."
            )
    if twice := sorted(name for name, count in Counter(cut + copies).items() if count > 1):
        raise LayoutError(
            f"fz.zero: {twice} stand twice in axis={axis!r}, replicate={replicate!r}. Name each axis once."
        )
    return Layout(int(stage), cut, copies, tuple((split or {}).items()))


def _axes(name: str, given: str | Sequence[str]) -> tuple[str, ...]:
    axes = (given,) if isinstance(given, str) else given
    if not isinstance(axes, tuple | list) or not all(isinstance(axis, str) for axis in axes):
        raise LayoutError(f"fz.zero: {name}={given!r}; expected the name of a mesh axis, or several in a tuple.")
    return tuple(axes)
