"""Arithmetic on sharded trees: inner products and norms over all ranks, sums and multiples.

A `Sharded` is a vector that is cut over ranks. What holds of a vector holds here, whatever the layout: padding is not
part of it, a leaf that every rank holds whole counts once, a gradient's value is leaf × factor, and a leaf that is
`None` or no floating-point tensor is not there. A complex leaf counts as its real and imaginary parts.

    dot, norm      one small all-reduce for the cut leaves, none for the whole ones
    add, scale     each rank on its pieces; what comes out is stored like the first argument

All work under `fz.jit` and under `torch.func.{vjp, jvp, vmap}`. What they return is one vector, or one number, that the
ranks share, and in reverse mode so is its cotangent.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeGuard

import torch
from torch import Tensor

from fzero import tree
from fzero._torch import is_functorch_wrapped
from fzero.errors import LayoutError, TreeError
from fzero.ranks.collectives import total
from fzero.ranks.mesh import Mesh
from fzero.ranks.peers import collective
from fzero.sharding.leaf import Spec, placed_as
from fzero.sharding.sharded import Sharded, held


@collective("fz.dot", held)
def dot(a: Sharded, b: Sharded) -> Tensor:
    """Return the inner product of two sharded trees, over all leaves and all ranks.

    A collective: every rank calls it, and gets the same bits. Products are summed in float64, so that the layout shows
    in the last bit at most. Its pullback gives each piece of `a` the piece of `b`, without a collective.

    Args:
        a: parameters, a gradient, or a direction.
        b: has the same paths and shapes. Where one of the two is cut and the other is not, its pieces are cut.

    Returns:
        fp32 of shape (); fp64 where leaves are.

    Raises:
        TypeError: one is no `Sharded`.
        TreeError: they have different leaves.
        LayoutError: they are cut over different mesh axes.

    Example:
        >>> import fzero as fz
        >>> grads = fz.grad(lambda p: (3 * p).sum())(fz.shard(torch.ones(4), fz.make_mesh("cpu"), fz.zero(3)))
        >>> dot(grads, grads)
        tensor(36.)
    """
    check_same_leaves(a, b, "fz.dot")
    mesh = a.mesh
    sums: dict[tuple[str, ...], list[Tensor]] = {}
    dtype = torch.float32
    rows = zip(a.paths, a.pieces, b.pieces, a.placement.specs, b.placement.specs, strict=True)
    for path, x, y, of_x, of_y in rows:
        if not _has_arithmetic(x) or not _has_arithmetic(y):
            continue
        # Of two that are cut differently, the smaller pieces are the ones to work on: no collective is needed.
        spec = of_x if of_x.cut else of_y
        x, y = _placed(x, of_x, spec, mesh, path, "fz.dot"), _placed(y, of_y, spec, mesh, path, "fz.dot")
        dtype = torch.promote_types(dtype, torch.promote_types(x.dtype, y.dtype).to_real())
        product = _wide(x) * y if not x.is_complex() else (x.conj() * y).real
        sums.setdefault(spec.axes, []).append(product.sum(dtype=torch.float64))
    value = torch.zeros((), dtype=torch.float64, device=mesh.device)
    for axes, parts in sums.items():
        part = torch.stack(parts).sum()
        for axis in axes:
            part = total(part, mesh, axis)
        value = value + part
    for factor in (a.factor, b.factor):
        value = value if factor is None else value * factor
    return value.to(dtype)


def norm(a: Sharded) -> Tensor:
    """Return the 2-norm of a sharded tree, over all leaves and all ranks.

    A collective, as `dot` is. Its derivative at zero is zero. Unlike `info["grad_norm"]` and clips, it does not leave
    out elements that are not finite.

    Args:
        a: parameters, a gradient, or a direction.

    Returns:
        fp32 of shape (); fp64 where leaves are.

    Raises:
        TypeError: `a` is no `Sharded`.

    Example:
        >>> import fzero as fz
        >>> norm(fz.shard({"x": torch.tensor([3.0, 4.0])}, fz.make_mesh("cpu"), fz.zero(3)))
        tensor(5.)
    """
    square = dot(a, a)
    nothing = square == 0
    return torch.where(nothing, 0.0, torch.where(nothing, 1.0, square).sqrt())


@collective("fz.add", lambda a, b, *_, **__: held(a, b))
def add(a: Sharded, b: Sharded, alpha: float | Tensor = 1.0, *, dtype: torch.dtype | None = None) -> Sharded:
    """Return `a + alpha · b`, stored as `a` is.

    Leaves are added in fp32 and rounded once, to nearest: of a low precision, a sum of many small terms stands still
    where its next term is under half its last bit. Pass `dtype=torch.float32` for those, and average weights by `ema`.

    Args:
        a: parameters, a gradient, or a direction. Leaves keep its dtype, layout and `None`s.
        b: has the same paths and shapes; a gradient's factor counts. A leaf that is `None` adds nothing. Where `a` is
            whole and `b` is cut, `b` is gathered.
        alpha: a number, or a tensor of shape (): values of a tensor change without a retrace.
        dtype: of the floating-point leaves of the result. Default: that of `a`.

    Returns:
        A `Sharded` like `a`: without a factor where `a` has none, such as parameters, else with the larger of the two.

    Raises:
        TypeError, TreeError, LayoutError: as `dot`.

    Example:
        >>> import fzero as fz
        >>> params = fz.shard({"x": torch.tensor([3.0, 4.0])}, fz.make_mesh("cpu"), fz.zero(3))
        >>> fz.gather(add(params, params, alpha=-0.5))
        {'x': tensor([1.5000, 2.0000])}
    """
    check_same_leaves(a, b, "fz.add")
    _check_dtype(dtype, "fz.add")
    ours, theirs, factor = _common_factor(a, b, alpha)

    def added(i: int, x: Tensor) -> Tensor:
        y, stored = b.pieces[i], _stored(x, dtype)
        x = _times(x, ours)
        if _has_arithmetic(y):
            y = _placed(y, b.placement.specs[i], a.placement.specs[i], a.mesh, a.paths[i], "fz.add")
            x = x + _times(y, theirs)
        return x.to(stored)

    return on_floats(added, a).replace(factor=factor)


def scale(a: Sharded, s: float | Tensor, *, dtype: torch.dtype | None = None) -> Sharded:
    """Return `s · a`, stored as `a` is.

    Of a gradient only the factor is multiplied, and no leaf is touched. Parameters and directions have no factor:
    their leaves are multiplied in fp32 and rounded once, to nearest, to their dtype.

    Args:
        a: parameters, a gradient, or a direction.
        s: a number, or a tensor of shape (): values of a tensor change without a retrace.
        dtype: of the floating-point leaves of the result. Default: that of `a`.

    Raises:
        TypeError: `a` is no `Sharded`, or `dtype` is none of floating point.

    Example:
        >>> import fzero as fz
        >>> params = fz.shard({"x": torch.tensor([3.0, 4.0])}, fz.make_mesh("cpu"), fz.zero(3))
        >>> fz.gather(scale(params, 2.0))
        {'x': tensor([6., 8.])}
    """
    check_sharded(a, "fz.scale")
    _check_dtype(dtype, "fz.scale")
    if a.factor is not None and not _is_transformed(a, s):
        cast = a if dtype is None else on_floats(lambda _, x: x.to(_stored(x, dtype)), a)
        return cast.replace(factor=(a.factor * s).to(torch.float32))
    weight = s if a.factor is None else a.factor * s
    return on_floats(lambda _, x: _times(x, weight).to(_stored(x, dtype)), a).replace(factor=None)


def check_sharded(a: Any, call: str) -> None:
    """Raise where a sharded tree is expected and something else came."""
    if not isinstance(a, Sharded):
        raise TypeError(
            f"{call}: expected a Sharded, such as a gradient or state.params, got {tree.describe(a)}. "
            f"Cut a tree of full tensors with fz.shard."
        )


def check_same_leaves(a: Any, b: Any, call: str) -> None:
    """Raise where two are not trees of the same leaves."""
    check_sharded(a, call)
    check_sharded(b, call)
    left, right = dict(zip(a.paths, a.shapes, strict=True)), dict(zip(b.paths, b.shapes, strict=True))
    lines = [
        f"{path or '(the whole)'}: {left.get(path, 'nothing')} and {right.get(path, 'nothing')}"
        for path in dict.fromkeys([*left, *right])
        if left.get(path) != right.get(path)
    ]
    if lines:
        raise TreeError(f"{call}: the two trees have different leaves:\n  " + "\n  ".join(lines))
    if a.mesh != b.mesh:
        raise LayoutError(f"{call}: the two trees are on different meshes, {a.mesh.axes} and {b.mesh.axes}.")


def _check_dtype(dtype: torch.dtype | None, call: str) -> None:
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"{call}: dtype: expected a floating-point dtype, such as torch.float32, got {dtype!r}.")


def _stored(x: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """Return what a result is stored in: a complex leaf stays one."""
    return x.dtype if dtype is None else torch.promote_types(x.dtype, dtype) if x.is_complex() else dtype


def _has_arithmetic(x: Tensor | None) -> TypeGuard[Tensor]:
    return x is not None and (x.is_floating_point() or x.is_complex())


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _is_transformed(*values: Any) -> bool:
    """Whether a transform outside wraps something here: of leaf × factor it would derive each by itself."""
    return any(isinstance(x, Tensor) and is_functorch_wrapped(x) for x in tree.leaves(values))


def _times(x: Tensor, weight: float | Tensor) -> Tensor:
    """Return a multiple of a piece in at least fp32."""
    x = _wide(x)
    if isinstance(weight, Tensor):
        return x * weight.to(x.dtype)
    return x if weight == 1.0 else x * weight


def _common_factor(a: Sharded, b: Sharded, alpha: float | Tensor) -> tuple[Any, Any, Tensor | None]:
    """Return what the leaves of each are multiplied by in `a + alpha · b`, and the factor of the sum."""
    ours, theirs = a.multiplier.double(), b.multiplier.double()
    if a.factor is None:
        return 1.0, alpha if b.factor is None else theirs * alpha, None
    if _is_transformed(a, b, alpha):
        return ours, theirs * alpha, None
    # The larger of the two, so that weights are at most 1 and alpha, and leaves in float16 do not overflow: factors of
    # 0.5 and 0.25 give weights of 1 and alpha / 2. Two that are equal give exactly 1 and alpha.
    factor = torch.maximum(ours.abs(), theirs.abs())
    whole = torch.where(factor == 0, 1.0, factor)
    return ours / whole, theirs / whole * alpha, factor.to(torch.float32)


def on_floats(f: Callable[[int, Tensor], Tensor], a: Sharded) -> Sharded:
    """Apply `f(index, piece)` to the leaves that are floating-point or complex; the others stay as they are."""
    return a.replace(pieces=tuple(f(i, x) if _has_arithmetic(x) else x for i, x in enumerate(a.pieces)))


def _placed(piece: Tensor, spec: Spec, wanted: Spec, mesh: Mesh, path: str, call: str) -> Tensor:
    """Return a piece of a leaf as the piece that another placement has."""
    if spec.split != wanted.split or (spec.cut and wanted.cut and spec.cut != wanted.cut):
        raise LayoutError(
            f"{call}: leaf {path!r} is cut over {spec.cut} and split by {spec.split} in one tree, and in the other "
            f"over {wanted.cut} and by {wanted.split}. Lay both out alike."
        )
    return placed_as(wanted, piece, spec, mesh)
