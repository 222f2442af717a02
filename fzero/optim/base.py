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

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fzero import tree
from fzero.calls import shown
from fzero.errors import LayoutError, PolicyError, TreeError
from fzero.optim.masks import Mask, check_mask
from fzero.optim.step import Step
from fzero.random.bits import signed
from fzero.ranks.mesh import Mesh
from fzero.ranks.peers import collective
from fzero.sharding.layout import zero
from fzero.sharding.parameters import check_updated
from fzero.sharding.placement import place
from fzero.sharding.sharded import Sharded, held


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
            lifted_grads, opt_state, lifted, Step(_counter(step, device), _counter(seed, device))
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
    def update_sharded(self, grads: Sharded, opt_state: Any, params: Sharded, at: Step) -> tuple[Sharded, Any]:
        """Do what `update` does, unchecked, given what may have been measured of `grads` already.

        Args:
            grads: cut as the moments are.
            opt_state: from `init_sharded` or the last update.
            params: as the policy stores them.
            at: the step that it is, and the sums of the squares of `grads` where somebody has them, such as a clip.

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


def check_pair(grads: Any, params: Any) -> None:
    """Raise if gradients are not those of these parameters."""
    expected, got = _shapes(params), _shapes(grads)
    lines = [
        f"{path or '(the whole)'}: expected {expected.get(path, 'nothing')}, got {got.get(path, 'nothing')}"
        for path in dict.fromkeys([*expected, *got])
        if path not in expected or path not in got or got[path] not in ("None", expected[path])
    ]
    if lines or isinstance(grads, Sharded) != isinstance(params, Sharded):
        lines = lines or [f"expected a {type(params).__name__}, got a {type(grads).__name__}"]
        raise TreeError("update: gradients do not pair with parameters:\n  " + "\n  ".join(lines))
    if isinstance(params, Sharded):
        if grads.policy is not None and params.policy is not None and grads.policy != params.policy:
            raise PolicyError(
                f"update: the gradients were taken under another policy, {grads.policy}, than the parameters are "
                f"stored by, {params.policy}. Take the gradient with respect to the state that it updates."
            )
        placement = params.placement.cut_over(params.layout.gradient_cut)
        for path, spec, other in zip(params.paths, placement.specs, grads.placement.specs, strict=True):
            if spec != other:
                raise LayoutError(
                    f"update: the gradient of leaf {path!r} is cut over {other.cut}, and its moments over {spec.cut}. "
                    f"Take the gradient with respect to the state that it updates."
                )


def _shapes(tree_: Any) -> dict[str, str]:
    if isinstance(tree_, Sharded):
        return {path: f"shape {shape}" for path, shape in zip(tree_.paths, tree_.shapes, strict=True)}
    leaves = tree.leaves(tree_, none_is_leaf=True)
    shapes = [f"shape {tuple(leaf.shape)}" if isinstance(leaf, Tensor) else tree.describe(leaf) for leaf in leaves]
    return dict(zip(tree.paths(tree_, none_is_leaf=True), shapes, strict=True))


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
