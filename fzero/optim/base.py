"""What an optimizer is: a pure `(init, update)` pair over sharded trees, write-back included.

An update acts on each rank's pieces. Where parameters are stored whole while moments are cut (stages 1
and 2), it takes the rank's own piece of the parameter, updates that, and gathers:

    stage 0, 3    p, m, v, ḡ            ──update──▶ p, m, v
    stage 1, 2    own piece of p, m, v, ḡ ──update──▶ piece ──all-gather──▶ p

A gradient element that is not finite leaves its parameter and moments as they were, bit for bit. A whole
step is skipped by a factor of NaN, which makes every element so.
"""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fzero import tree
from fzero.errors import TreeError
from fzero.layout import Sharded, place, zero
from fzero.marks import mark
from fzero.mesh import Mesh
from fzero.optim.norm import Squares
from fzero.optim.pair import check_pair
from fzero.pieces import Spec, join_block, own_piece
from fzero.random import bits, fold, remix, round_stochastic, shift_right, signed, step_keys

Rate = float | Callable[[Tensor], Tensor]
Mask = Callable[[str], bool]


class Optimizer(ABC):
    """A pure `(init, update)` pair. Instances are frozen dataclasses: static data, equal by value."""

    def init(self, params: Any) -> Any:
        """Return the optimizer's state for `params`: a `Sharded`, or a tree of tensors."""
        return self.init_sharded(_lift(params))

    def update(
        self, grads: Any, opt_state: Any, params: Any, *, step: int | Tensor, seed: int | Tensor
    ) -> tuple[Any, Any]:
        """Return `(params, opt_state)` after one step; nothing that was passed in is changed.

        Args:
            grads: pairs with `params`; `None` where a leaf has no gradient, which leaves it as it is.
            opt_state: from `init` or the last update.
            params: a `Sharded`, or a tree of tensors.
            step: integer of shape (): how many steps were taken before this one.
            seed: integer of shape (), taken modulo 2^32: with the step, the leaf's path and the element's index, it
                decides how stochastic rounding falls.

        Raises:
            TreeError: gradients and parameters do not pair.
            LayoutError: they pair, and the gradients are not cut as the moments are.
        """
        check_pair(grads, params)
        lifted, lifted_grads = _lift(params), _lift(grads, like=params)
        device = lifted.mesh.device
        new, opt_state = self.update_sharded(
            lifted_grads, opt_state, lifted, step=_counter(step, device), seed=_counter(seed, device)
        )
        return (new if isinstance(params, Sharded) else _lower(new)), opt_state

    @abstractmethod
    def init_sharded(self, params: Sharded) -> Any: ...

    @abstractmethod
    def update_sharded(
        self,
        grads: Sharded,
        opt_state: Any,
        params: Sharded,
        *,
        step: Tensor,
        seed: Tensor,
        squares: Squares | None = None,
    ) -> tuple[Sharded, Any]:
        """Do what `update` does, unchecked, given what may have been measured of `grads` already."""

    @abstractmethod
    def learning_rate(self, step: Tensor) -> Any:
        """Return the learning rate of a step, fp32 of shape (); a dict of them where there are groups."""

    def frozen(self, paths: Sequence[str]) -> frozenset[str]:
        """Return the paths of leaves that never change, and so need no gradient."""
        return frozenset()


@dataclass(frozen=True)
class Leaf:
    """One leaf in an update: what is its own beside its tensors.

    Attributes:
        path: dotted path in the parameter tree.
        keys: int32 of shape (2,): what its rounding draws from.
        offset: int32 of shape (): global index of the piece's first element.
        stochastic: whether low-precision results are rounded stochastically.
    """

    path: str
    keys: Tensor
    offset: Tensor
    stochastic: bool


class Elementwise(Optimizer):
    """An optimizer whose update acts on each element by itself, with `count` moments an element.

    A subclass gives `count`, `state_type`, `prologue` and `update_piece`.
    """

    lr: Rate

    @property
    @abstractmethod
    def state_type(self) -> Callable[..., Any]:
        """A named tuple of one `Sharded` for each moment."""

    @property
    @abstractmethod
    def count(self) -> int:
        """The number of moments."""

    @abstractmethod
    def prologue(self, step: Tensor, factor: Tensor) -> Any:
        """Return what all leaves of a step share, such as the learning rate at `step` and the gradients' factor."""

    @abstractmethod
    def update_piece(
        self, p: Tensor, moments: tuple[Tensor, ...], g: Tensor, leaf: Leaf, shared: Any
    ) -> tuple[Tensor, ...]:
        """Return the new piece and its new moments: `(p, *moments)`, 1-D, dtypes unchanged."""

    def learning_rate(self, step: Tensor) -> Tensor:
        return rate(self.lr, step)

    def init_sharded(self, params: Sharded) -> Any:
        placement = params.placement.cut_over(params.layout.gradient_cut)

        def zeros() -> Sharded:
            pieces: list[Tensor | None] = []
            for piece, spec in zip(params.pieces, placement.specs, strict=True):
                if piece is None or not piece.is_floating_point():
                    pieces.append(None)
                    continue
                dtype = piece.dtype if params.policy is None else params.policy.moment
                pieces.append(torch.zeros(spec.piece_numel(params.mesh), dtype=dtype, device=piece.device))
            return Sharded(tuple(pieces), placement)

        return self.state_type(*(zeros() for _ in range(self.count)))

    def update_sharded(
        self,
        grads: Sharded,
        opt_state: Any,
        params: Sharded,
        *,
        step: Tensor,
        seed: Tensor,
        squares: Squares | None = None,
    ) -> tuple[Sharded, Any]:
        mesh = params.mesh
        factor = grads.multiplier
        shared = self.prologue(step, factor)
        rounding = _leaves(grads, params, step=step, seed=seed)
        new_pieces, new_moments = [], []
        for i, (leaf, spec) in enumerate(zip(rounding, grads.placement.specs, strict=True)):
            piece, gradient = params.pieces[i], grads.pieces[i]
            moments = tuple(moment.pieces[i] for moment in opt_state)
            if piece is None or gradient is None:
                new_pieces.append(piece)
                new_moments.append(moments)
                continue
            stored_whole = spec.cut != params.placement.specs[i].cut
            with mark(role="update", leaf=leaf.path):
                own = own_piece(piece, spec, mesh) if stored_whole else piece
                new, *moved = self.update_piece(own, moments, gradient, leaf, shared)
                new_pieces.append(join_block(new, spec, mesh) if stored_whole else new)
            new_moments.append(tuple(moved))
        states = [moment.replace(pieces=tuple(row[k] for row in new_moments)) for k, moment in enumerate(opt_state)]
        return params.replace(pieces=tuple(new_pieces)), self.state_type(*states)


def rate(lr: Rate, step: Tensor) -> Tensor:
    """Return a learning rate at a step, as fp32 of shape ()."""
    value = lr(step) if callable(lr) else lr
    return value.to(torch.float32) if isinstance(value, Tensor) else torch.full((), value, device=step.device)


def mask_of(mask: Any) -> Mask | None:
    """Return a mask as a function of paths: from a function, or a tree of booleans like the parameters."""
    if mask is None or callable(mask):
        return mask
    return ByPath.of(mask, "mask")


@dataclass(frozen=True)
class ByPath:
    """A tree of values like the parameters, as a function of a path."""

    what: str
    values: tuple[tuple[str, Any], ...]

    @staticmethod
    def of(tree_: Any, what: str) -> ByPath:
        return ByPath(what, tuple(zip(tree.paths(tree_), tree.leaves(tree_), strict=True)))

    def __call__(self, path: str) -> Any:
        values = dict(self.values)
        if path not in values:
            raise TreeError(f"update: the {self.what} has nothing at {path!r}. Give it every leaf of the parameters.")
        return values[path]


def write_back(leaf: Leaf, ok: Tensor, *pairs: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Round new fp32 values to their old dtypes; elements where `ok` is false keep the old ones.

    Args:
        leaf: whose rounding it is.
        ok: boolean, 1-D.
        *pairs: `(new value in fp32, old value as stored)`; at most three.
    """
    noise: list[Tensor | None] = [None] * 3
    if leaf.stochastic:
        word = bits(leaf.keys, leaf.offset, ok.shape[0])
        noise = [word & 0xFFFF, shift_right(word, 16), remix(word) & 0xFFFF]
    results = []
    for (new, old), noise16 in zip(pairs, noise, strict=False):
        if noise16 is None or old.dtype == torch.float32:
            rounded = new.to(old.dtype)
        else:
            rounded = round_stochastic(new, noise16, old.dtype)
        results.append(torch.where(ok, rounded, old))
    return tuple(results)


def _leaves(grads: Sharded, params: Sharded, *, step: Tensor, seed: Tensor) -> list[Leaf]:
    """Return what each leaf rounds by: keys and offsets of all leaves at once, a few operations in all."""
    mesh, policy, specs = params.mesh, params.policy, grads.placement.specs
    if policy is None or policy.rounding == "nearest":
        nothing = torch.zeros(2, dtype=torch.int32, device=mesh.device)
        return [Leaf(path, nothing, nothing[0], stochastic=False) for path in params.paths]
    hashes = torch.tensor([signed(zlib.crc32(p.encode())) for p in params.paths], dtype=torch.int32, device=mesh.device)
    keys = fold(step_keys(seed, step), hashes[:, None])
    offsets = torch.zeros(len(specs), dtype=torch.int32, device=mesh.device)
    for axes in dict.fromkeys(spec.cut for spec in specs):
        sizes = [signed(s.piece_numel(mesh)) if s.cut == axes else 0 for s in specs]
        offsets = offsets + mesh.index_tensor(axes) * torch.tensor(sizes, dtype=torch.int32, device=mesh.device)
    # The blocks of a leaf split by P have no contiguous indices; they are numbered one after another.
    for axes in dict.fromkeys(_split_axes(spec) for spec in specs):
        sizes = [signed(s.block_numel(mesh)) if _split_axes(s) == axes else 0 for s in specs]
        offsets = offsets + mesh.index_tensor(axes) * torch.tensor(sizes, dtype=torch.int32, device=mesh.device)
    rows = zip(params.paths, keys.unbind(), offsets.unbind(), strict=True)
    return [Leaf(path, key, offset, stochastic=True) for path, key, offset in rows]


def _split_axes(spec: Spec) -> tuple[str, ...]:
    return tuple(axis for axis in spec.split if axis is not None)


def _counter(value: int | Tensor, device: torch.device) -> Tensor:
    """Return an integer as the int32 tensor that keys are made of."""
    if isinstance(value, Tensor):
        return value.to(torch.int32)
    return torch.tensor(signed(value), dtype=torch.int32, device=device)


def _lift(tree_: Any, *, like: Any = None) -> Sharded:
    """Return a tree of tensors as a `Sharded` of a world of one, without a copy."""
    if isinstance(tree_, Sharded):
        return tree_
    examples, structure = tree.flatten(tree_ if like is None else like)
    leaves: list[Any] = structure.flatten_up_to(tree_)
    shapes = [tuple(x.shape) for x in examples]
    device: torch.device = next((x.device for x in examples), torch.device("cpu"))
    placement = place(shapes, structure, Mesh((("data", 1),), device), zero(0))
    return Sharded(tuple(None if x is None else x.reshape(-1).contiguous() for x in leaves), placement)


def _lower(sharded: Sharded) -> Any:
    rows = zip(sharded.pieces, sharded.shapes, strict=True)
    leaves = [None if piece is None else piece.reshape(shape) for piece, shape in rows]
    return tree.unflatten(sharded.placement.treedef, leaves)
