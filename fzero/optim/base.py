"""What an optimizer is: a pure `(init, update)` pair over sharded trees, write-back included.

An update acts on each rank's pieces. Where parameters are stored whole while moments are cut (stages 1
and 2), it takes the rank's own piece of the parameter, updates that, and gathers:

    stage 0, 3    p, m, v, ḡ            ──update──▶ p, m, v
    stage 1, 2    own piece of p, m, v, ḡ ──update──▶ piece ──all-gather──▶ p

A gradient element that is not finite leaves its parameter and moments as they were, bit for bit; moments that are
quantized with others that move are encoded again. A whole step is skipped by a factor of NaN, which makes every
element so, and then nothing moves.
"""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fzero import tree
from fzero.calls import shown
from fzero.calls.nearest import nearest
from fzero.errors import ShapeError, TreeError
from fzero.kernels.update import Update
from fzero.marks import mark
from fzero.optim.moments import WithRemainder, restored, stored, with_remainder, without_remainder, zeros
from fzero.optim.norm import Squares
from fzero.optim.pair import check_pair
from fzero.random.bits import fold, signed, step_keys
from fzero.ranks.mesh import Mesh
from fzero.ranks.peers import collective
from fzero.sharding.layout import zero
from fzero.sharding.leaf import first_elements, join_block, own_piece
from fzero.sharding.parameters import check_updated
from fzero.sharding.placement import place
from fzero.sharding.sharded import Sharded, held

Rate = float | Callable[[Tensor], Tensor]
Mask = Callable[[str], bool]


class Optimizer(ABC):
    """A pure `(init, update)` pair. Instances are frozen dataclasses: static data, equal by value."""

    def __repr__(self) -> str:
        return shown.made(type(self).__name__.lower(), self)

    def init(self, params: Any) -> Any:
        """Return the optimizer's state for `params`: a `Sharded`, or a tree of tensors."""
        lifted = _lift(params)
        check_updated(type(self).__name__, lifted.paths, lifted.pieces)
        return self.init_sharded(lifted)

    @collective("Optimizer.update", lambda self, grads, opt_state, params, **_: held(grads, params))
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
    def init_sharded(self, params: Sharded, remainder: Sharded | None = None) -> Any:
        """Do what `init` does.

        Args:
            params: as the policy stores them.
            remainder: under a policy that splits masters, what the parameters lack of them; `None` for nothing.
        """

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
        """Do what `update` does, unchecked, given what may have been measured of `grads` already.

        Args:
            grads: cut as the moments are.
            opt_state: from `init_sharded` or the last update.
            params: as the policy stores them.
            step: int32 of shape ().
            seed: int32 of shape ().
            squares: the sums of the squares of `grads`, where somebody has them, such as a clip.

        Returns:
            `(params, opt_state)`.
        """

    @abstractmethod
    def learning_rate(self, step: Tensor) -> Any:
        """Return the learning rate of a step, fp32 of shape (); a dict of them where there are groups."""

    def frozen(self, paths: Sequence[str]) -> frozenset[str]:
        """Return the paths of leaves that never change, and so need no gradient."""
        return frozenset()

    def check_paths(self, own: Sequence[str], everyone: Sequence[str]) -> None:
        """Raise where what the optimizer was told of leaves by their paths fits none.

        Args:
            own: paths of the leaves that it updates.
            everyone: paths of all leaves of the parameters, which others may update.
        """
        mask: Mask | None = getattr(self, "mask", None)
        decay: float = getattr(self, "weight_decay", 0.0)
        check_mask(mask, own, everyone, f"none of the leaves would decay, and weight_decay is {decay}" if decay else "")

    def parts(self, opt_state: Any) -> list[tuple[str, Any]]:
        """Return what a state of this optimizer holds, part by part, each with the name of whoever gives it meaning.

        Where names, leaves and their owners are the same, another optimizer may take the state over.
        """
        return [(kind_of(self), opt_state)]


def kind_of(x: Any) -> str:
    """Return the name of the class of an optimizer or a transform, which says what its state means."""
    return f"{type(x).__module__}.{type(x).__qualname__}"


@dataclass(frozen=True)
class Rounding:
    """What the write-back of some leaves draws from.

    Attributes:
        keys: int32 of shape (n, 2): for each leaf.
        offsets: int32 of shape (n,): global index of the first element of each piece.
        stochastic: whether low-precision results are rounded stochastically.
    """

    keys: Tensor
    offsets: Tensor
    stochastic: bool

    @property
    def source(self) -> tuple[Tensor, Tensor]:
        """Keys and offsets, as kernels take them."""
        return self.keys, self.offsets

    @staticmethod
    def joined(parts: Sequence[Rounding]) -> Rounding:
        """Return that of several leaves, which round alike."""
        if len(parts) == 1:
            return parts[0]
        keys, offsets = torch.cat([part.keys for part in parts]), torch.cat([part.offsets for part in parts])
        return Rounding(keys, offsets, parts[0].stochastic)


# A leaf's state, flat: the parameter, its remainder if it is split, each moment, its scales if it is quantized.
LeafState = tuple[Tensor, ...]

# Pieces under this many elements are updated together, where a launch costs as much as 100,000 elements. Their
# gradients then wait for one another.
SMALL = {"cuda": 1 << 15}


class Elementwise(Optimizer):
    """An optimizer whose update acts on each element by itself.

    A subclass gives `kernel`, `numbers`, `scalars`, `signed` and `state_type`.
    """

    lr: Rate
    weight_decay: float
    mask: Mask | None
    kernel: ClassVar[Update]

    @property
    @abstractmethod
    def numbers(self) -> tuple[float, ...]:
        """What the formula of the kernel takes that never changes."""

    @property
    @abstractmethod
    def state_type(self) -> Callable[..., Any]:
        """A named tuple of the moments."""

    @property
    @abstractmethod
    def signed(self) -> tuple[bool, ...]:
        """For each moment, whether it may be negative."""

    @abstractmethod
    def scalars(self, t: Tensor, lr: Tensor, weight_decay: float) -> tuple[Tensor, ...]:
        """Return what the formula takes that changes from step to step, but for the factor of the gradient, its last.

        Args:
            t: float64, 0-d: the number of this step, from 1 on.
            lr: float64, 0-d.
            weight_decay: of some leaves; 0 for those that the mask exempts.
        """

    def scalars_of(self, step: Tensor, factor: float | Tensor, decays: bool) -> Tensor:
        """Return all scalars of the kernel: computed in float64, rounded to float32, on the device of `step`.

        Args:
            step: 0-based count of the steps taken: int32, 0-d.
            factor: what the gradient has to be multiplied by to be true; NaN skips the step.
            decays: whether they are those of leaves that decay.
        """
        t = step.to(torch.float64) + 1
        made = self.scalars(t, rate(self.lr, step).to(torch.float64), self.weight_decay if decays else 0.0)
        return torch.stack([*made, torch.zeros_like(t) + factor]).to(torch.float32)

    def learning_rate(self, step: Tensor) -> Tensor:
        return rate(self.lr, step)

    def init_sharded(self, params: Sharded, remainder: Sharded | None = None) -> Any:
        state = self.state_type(*(zeros(params, signed=signed) for signed in self.signed))
        return with_remainder(state, params, remainder)

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
        moments, remainder = without_remainder(opt_state)
        beside = moments if remainder is None else (remainder, *moments)
        decays = self._decays(params)
        scalars = {either: self.scalars_of(step, grads.multiplier, either) for either in dict.fromkeys(decays)}
        rounding = roundings(grads, params, step=step, seed=seed)
        pieces = list(params.pieces)
        rows: list[tuple[Tensor, ...]] = [()] * len(pieces)
        for group in self._groups(grads, params, beside):
            named = params.paths[group[0]] + (f" and {len(group) - 1} more" if len(group) > 1 else "")
            with mark(role="update", leaf=named):
                updated = self.kernel(
                    [(own_of(grads, params, i), *stored(beside, i)) for i in group],
                    [piece for i in group if (piece := grads.pieces[i]) is not None],
                    scalars[decays[group[0]]],
                    *Rounding.joined([rounding[i] for i in group]).source,
                    numbers=self.numbers,
                    stochastic=rounding[group[0]].stochastic,
                )
                for i, (own, *row) in zip(group, updated, strict=True):
                    pieces[i], rows[i] = joined(own, grads, params, i), tuple(row)
        new = restored(beside, rows)
        state = self.state_type(*(new if remainder is None else new[1:]))
        return params.replace(pieces=tuple(pieces)), state if remainder is None else WithRemainder(state, new[0])

    def _decays(self, params: Sharded) -> list[bool]:
        return [self.mask is None or bool(self.mask(path)) for path in params.paths]

    def _groups(self, grads: Sharded, params: Sharded, beside: Sequence[Any]) -> list[list[int]]:
        """Return the leaves that have gradients: large ones by themselves, small ones of one kind together, last."""
        alone, together = [], dict[Any, list[int]]()
        small = SMALL.get(params.mesh.device.type, 0)
        for i, (path, decays) in enumerate(zip(params.paths, self._decays(params), strict=True)):
            piece, gradient = params.pieces[i], grads.pieces[i]
            if piece is None or gradient is None:
                continue
            if gradient.shape[-1] >= small:
                alone.append([i])
                continue
            dtypes = tuple(x.dtype for x in (piece, gradient, *stored(beside, i)))
            together.setdefault((dtypes, decays, params.placement.policy_of(path)), []).append(i)
        return alone + list(together.values())


def own_of(grads: Sharded, params: Sharded, index: int) -> Tensor:
    """Return this rank's own piece of a parameter, cut as its gradient is."""
    piece, spec = params.pieces[index], grads.placement.specs[index]
    assert piece is not None
    return own_piece(piece, spec, params.mesh) if _is_stored_whole(grads, params, index) else piece


def joined(own: Tensor, grads: Sharded, params: Sharded, index: int) -> Tensor:
    """Return a parameter as it is stored, of the pieces that ranks have updated. Undoes `own_of`."""
    spec = grads.placement.specs[index]
    return join_block(own, spec, params.mesh) if _is_stored_whole(grads, params, index) else own


def _is_stored_whole(grads: Sharded, params: Sharded, index: int) -> bool:
    return grads.placement.specs[index].cut != params.placement.specs[index].cut


def rate(lr: Rate, step: Tensor) -> Tensor:
    """Return a learning rate at a step, as fp32 of shape ()."""
    value = lr(step) if callable(lr) else lr
    if not isinstance(value, Tensor):
        return torch.full((), value, dtype=torch.float32, device=step.device)
    if value.numel() != 1:
        raise ShapeError(
            f"fz.apply_gradients: the learning rate of a step must be one number, got {tree.describe(value)} from "
            f"{getattr(lr, '__name__', lr)}. Return a tensor of shape ()."
        )
    return value.reshape(()).to(torch.float32)


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


def roundings(grads: Sharded, params: Sharded, *, step: Tensor, seed: Tensor) -> list[Rounding]:
    """Return what each leaf rounds by: keys and offsets of all leaves at once, a few operations in all."""
    mesh, specs = params.mesh, grads.placement.specs
    policies = [params.placement.policy_of(path) for path in params.paths]
    stochastic = [policy is not None and policy.rounding == "stochastic" for policy in policies]
    if not any(stochastic):
        keys = torch.zeros((1, 2), dtype=torch.int32, device=mesh.device)
        return [Rounding(keys, keys[0, :1], stochastic=False)] * len(specs)
    hashes = torch.tensor([signed(zlib.crc32(p.encode())) for p in params.paths], dtype=torch.int32, device=mesh.device)
    keys = fold(step_keys(seed, step), hashes[:, None])
    offsets = first_elements(specs, mesh)
    return [Rounding(*row) for row in zip(keys.split(1), offsets.split(1), stochastic, strict=True)]


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
