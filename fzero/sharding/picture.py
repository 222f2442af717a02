"""`fz.visualize`: a picture of who holds what."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from fzero import tree
from fzero.display.holdings import Holdings, Segment
from fzero.display.listing import nbytes, printable
from fzero.display.picture import Picture
from fzero.ranks.mesh import Mesh
from fzero.sharding.sharded import Sharded


def visualize(x: Any, *, ranks: int = 8, names: int = 8) -> Picture:
    """Draw who holds what: for each rank everything there is, to scale, filled where that rank has it.

    Nothing is run or read: it works on simulated worlds of any size, and costs no collective. Counters of a few bytes
    are left out, and so is what was donated.

    Args:
        x: a `State`, a `Sharded`, or any tree that holds some, all over one mesh.
        ranks: how many ranks to draw at most: of more, the first and the last.
        names: how many parts to tell apart in each kind at most: of more, those whose paths begin alike are joined.

    Returns:
        A picture: displayed in a notebook, printed in a terminal; `.svg` and `.text` give it away.

    Raises:
        TypeError: there is no `Sharded` in `x`.
        ValueError: they lie over different meshes, or `ranks` or `names` is under 1.

    Example:
        >>> import torch
        >>> from fzero.sharding.layout import zero
        >>> from fzero.sharding.sharded import shard
        >>> from fzero.ranks.mesh import make_mesh
        >>> print(visualize(shard({"w": torch.ones(64, 8)}, make_mesh(data=4, simulate=True), zero(3))))
        1 leaf over data=4, simulated: a rank holds 512 B of 2.00 KiB
        data=0  ██████████████████······················································  512 B
        data=1  ··················██████████████████····································  512 B
        data=2  ····································██████████████████··················  512 B
        data=3  ······················································██████████████████  512 B
        params  512 B a rank  of 2.00 KiB:  1 leaf cut over data
    """
    if min(ranks, names) < 1:
        raise ValueError(f"fz.visualize: ranks={ranks} and names={names}; both have to be at least 1.")
    parts = dict(_sharded_in(x))
    if not parts:
        raise TypeError(
            f"fz.visualize: expected a State, a Sharded or a tree of such, got {tree.describe(x)}, which holds none. "
            f"Make one: fz.init(...) or fz.shard(...)."
        )
    meshes = list(dict.fromkeys(part.mesh for part in parts.values()))
    if len(meshes) > 1:
        raise ValueError(
            f"fz.visualize: the parts lie over different meshes, {', '.join(map(_text, meshes))}. Draw one at a time."
        )
    found: dict[str, list[Segment]] = {}
    for path, part in parts.items():
        found.setdefault(_kind(path, part), []).extend(_segments(_kind(path, part), part))
    segments = [s for some in found.values() for s in _joined(some, names)]
    count = sum(len(part.paths) for path, part in parts.items() if "moments" not in path.split("."))
    title = f"{count:,} {'leaf' if count == 1 else 'leaves'} over {_text(meshes[0])}"
    holdings = Holdings(title, meshes[0].axes, tuple(segments), ranks)
    return Picture(holdings.text(), holdings.svg())


def _sharded_in(x: Any) -> Iterator[tuple[str, Sharded]]:
    """Yield each `Sharded` of a tree with its path."""
    nodes, treedef = tree.flatten(x, is_leaf=lambda node: isinstance(node, Sharded))
    for path, node in zip(tree.structure_paths(treedef), nodes, strict=True):
        if isinstance(node, Sharded):
            yield path, node


def _kind(path: str, part: Sharded) -> str:
    """Return what a part is for: `params`, `vision.moments`; of what is no state, its path."""
    names = path.split(".")
    for i, name in enumerate(names):
        if name in ("params", "moments"):
            return ".".join(names[: i + 1])
    return path or ("params" if part.factor is None else "gradients")


def _segments(kind: str, part: Sharded) -> Iterator[Segment]:
    """Yield one segment for each leaf that is there."""
    for path, piece, spec in zip(part.paths, part.pieces, part.placement.specs, strict=True):
        size = nbytes(piece)
        if isinstance(piece, Tensor) and size:
            axes = [axis for axis in (*spec.split_axes, *spec.cut) if part.mesh.size(axis) > 1]
            whole = piece.element_size() * math.prod(spec.shape)
            yield Segment(kind, path, 1, tuple(axes), whole, size)


def _joined(segments: list[Segment], most: int) -> Iterator[Segment]:
    """Yield at most about `most` segments, joined by what their paths begin with and by how they are held."""
    depths = range(max(s.name.count(".") for s in segments) + 1, 0, -1) if segments else ()
    depth = next((d for d in depths if len({_prefix(s.name, d) for s in segments}) <= most), 1)
    names = list(dict.fromkeys(_prefix(s.name, depth) for s in segments))
    kept = set(names if len(names) <= most else names[: most - 1])
    groups: dict[tuple[str, tuple[str, ...]], list[Segment]] = {}
    for s in segments:
        name = _prefix(s.name, depth)
        groups.setdefault((name if name in kept else f"{len(names) - len(kept)} others", s.axes), []).append(s)
    for (name, axes), some in groups.items():
        whole, size = sum(s.whole for s in some), sum(s.size for s in some)
        yield Segment(some[0].kind, printable(name), len({s.name for s in some}), axes, whole, size)


def _prefix(path: str, depth: int) -> str:
    return ".".join(path.split(".")[:depth])


def _text(mesh: Mesh) -> str:
    axes = " × ".join(f"{name}={size}" for name, size in mesh.axes)
    return f"{axes}{', simulated' if mesh.simulated else ''}"
