"""Primals: what a function is differentiated by, opened into full leaves, and the gradients formed of them.

`Opened` takes the arguments of a call apart. Each `State` or `Sharded` among them becomes the full leaves
that the function sees; each gradient goes the same way back.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeGuard, runtime_checkable

import torch
from torch import Tensor

from fzero import tree
from fzero._torch import is_functorch_wrapped, storage_id
from fzero.errors import LayoutError, PolicyError
from fzero.marks import mark, tree_of
from fzero.modules.writes import read_only
from fzero.precision.products import warn_if_slow
from fzero.precision.wide_sums import Summing, is_low, summing
from fzero.random.keyed import drawing_of_state
from fzero.sharding.leaf import join, reduce_leaf, scaled
from fzero.sharding.sharded import Sharded, check_not_simulated

Reduce = Literal["mean", "sum"]


@dataclass(frozen=True)
class Primal:
    """What a differentiable container, such as a training state, offers to be differentiated by.

    Attributes:
        params: the parameters.
        frozen: paths of leaves that get no gradient.
        scale: what a cotangent is multiplied by, recorded in the gradient's factor; `None` for 1.
        key: what random operations inside the function draw from; `None` to leave them alone.
    """

    params: Sharded
    frozen: frozenset[str] = frozenset()
    scale: Tensor | None = None
    key: Tensor | None = None

    def as_primal(self) -> Primal:
        """Return itself: inside another call it is opened again."""
        return self


tree.register(
    Primal,
    lambda p: ((p.params, p.scale, p.key), p.frozen, ("params", "scale", "key")),
    lambda frozen, children: Primal(children[0], frozen, *children[1:]),
)


@runtime_checkable
class HasPrimal(Protocol):
    """A container of parameters that functions can be differentiated by."""

    def as_primal(self) -> Primal:
        """Return what a function is differentiated by."""


@dataclass(frozen=True)
class Opened:
    """Arguments taken apart into flat leaves: a node of several leaves for each `State` or `Sharded`."""

    treedef: tree.TreeDef
    nodes: tuple[Any, ...]  # a Primal, or the leaf itself
    wanted: tuple[bool, ...]  # for each node, whether it is differentiated
    positions: tuple[int, ...]  # of the arguments that are

    @staticmethod
    def of(arguments: Sequence[Any], positions: Sequence[int] = ()) -> Opened:
        """Take arguments apart; those at `positions` are to be differentiated."""
        nodes, treedef = tree.flatten(tuple(arguments), is_leaf=lambda x: isinstance(x, (Sharded, HasPrimal)))
        counts = [child.num_leaves for child in treedef.children()]
        wanted = tuple(i in positions for i, count in enumerate(counts) for _ in range(count))
        for node, differentiated in zip(nodes, wanted, strict=True):
            if differentiated and isinstance(node, Sharded):
                _check_unscaled(node)
        return Opened(treedef, tuple(_as_primal(node) for node in nodes), wanted, tuple(positions))

    def arguments(self) -> tuple[Any, ...]:
        """Return the arguments with a `Primal` in the place of each `State` and `Sharded`."""
        return tree.unflatten(self.treedef, self.nodes)

    def leaves(self) -> list[Any]:
        """Return the full leaves of all arguments, gathered where they are cut, in the order of `nodes`."""
        return [leaf for node in self.nodes for leaf in (gathered(node) if isinstance(node, Primal) else [node])]

    def close(self, leaves: Sequence[Any]) -> tuple[Any, ...]:
        """Rebuild the arguments, with a full tree in the place of each `State` and `Sharded`."""
        return tree.unflatten(
            self.treedef,
            [
                tree.unflatten(node.params.placement.treedef, part) if isinstance(node, Primal) else part[0]
                for node, part in self._parts(leaves)
            ],
        )

    def differentiable(self, leaves: Sequence[Any]) -> list[int]:
        """Return the positions of the leaves that get a gradient."""
        wanted = [
            wanted and not (isinstance(node, Primal) and path in node.frozen)
            for node, wanted in zip(self.nodes, self.wanted, strict=True)
            for path in (node.params.paths if isinstance(node, Primal) else ("",))
        ]
        return [i for i, leaf in enumerate(leaves) if is_float(leaf) and wanted[i]]

    def differentiates_parameters(self) -> bool:
        """Return whether a `State` or a `Sharded` is among what is differentiated."""
        return any(isinstance(node, Primal) and wanted for node, wanted in zip(self.nodes, self.wanted, strict=True))

    def gradients(self, flat: Sequence[Tensor | None], reduce: Reduce) -> tuple[Any, ...]:
        """Form the gradients of the differentiated arguments from full local gradients of all leaves."""
        formed = [
            _reduced(node, part, self.scale, reduce)
            if isinstance(node, Primal) and wanted
            else (None if isinstance(node, Primal) else self._plain(part[0]))
            for (node, part), wanted in zip(self._parts(flat), self.wanted, strict=True)
        ]
        whole = tree.unflatten(self.treedef, formed)
        return tuple(whole[position] for position in self.positions)

    def check_not_donated(self) -> None:
        """Raise if memory that full leaves may share was given away: a pullback would read stale numbers."""
        for node in self.nodes:
            for x in node.params.pieces if isinstance(node, Primal) else (node,):
                if isinstance(x, Tensor):
                    x.shape  # noqa: B018 - a donated tensor raises, and says to which call it went

    @contextlib.contextmanager
    def context(self, leaves: Sequence[Any], *, differentiated: bool = False) -> Iterator[Summing | None]:
        """What the function runs under: the policy's autocast, the state's random key, and wide sums on a CPU.

        Yields the mode that sums wide, which afterwards says whether the pullback has to run under one too.
        """
        with contextlib.ExitStack() as stack:
            # Of several states one gives the key that the function draws from: the first that is differentiated.
            order = sorted(range(len(self.nodes)), key=lambda i: not self.wanted[i])
            primals = [self.nodes[i] for i in order if isinstance(self.nodes[i], Primal)]
            policies = {p.params.policy: p.params.mesh for p in primals if p.params.policy is not None}
            for policy, mesh in policies.items():
                if not mesh.simulated:
                    warn_if_slow(policy.compute if policy.autocast is None else policy.autocast, mesh.device)
            for dtype in dict.fromkeys(policy.autocast for policy in policies):
                if dtype is not None:
                    device = next(piece.device.type for piece in primals[0].params.pieces if piece is not None)
                    stack.enter_context(torch.autocast(device, dtype=dtype, cache_enabled=False))
            key = next((p.key for p in primals if p.key is not None), None)
            if key is not None:
                stack.enter_context(drawing_of_state(key))
            elif summing() is None and any(isinstance(x, Tensor) and x.device.type == "cpu" for x in leaves):
                stack.enter_context(Summing())
            mode = summing()
            if mode is not None:
                mode.low = mode.low or any(map(is_low, leaves))
            named = [
                pair
                for node, part in self._parts(leaves)
                if isinstance(node, Primal)
                for pair in zip(node.params.paths, part, strict=True)
            ]
            if named:
                stack.enter_context(read_only(named, differentiated=differentiated))
            yield mode

    @property
    def scale(self) -> Tensor | None:
        """The smallest loss scale of the primals: the largest that none of them overflows at."""
        pairs = zip(self.nodes, self.wanted, strict=True)
        scales = [n.scale for n, wanted in pairs if wanted and isinstance(n, Primal) and n.scale is not None]
        return torch.stack(scales).min() if scales else None

    def _parts(self, flat: Sequence[Any]) -> Iterator[tuple[Any, Sequence[Any]]]:
        start = 0
        for node in self.nodes:
            size = len(node.params.paths) if isinstance(node, Primal) else 1
            yield node, flat[start : start + size]
            start += size

    def _plain(self, gradient: Tensor | None) -> Tensor | None:
        return gradient if gradient is None or self.scale is None else scaled(gradient, 1 / self.scale)


def _as_primal(node: Any) -> Any:
    if isinstance(node, Sharded):
        return Primal(node)
    return node.as_primal() if isinstance(node, HasPrimal) else node


def _check_unscaled(params: Sharded) -> None:
    """Raise for parameters whose policy scales losses: the scale belongs to the state, and is not in them."""
    if params.policy is not None and params.policy.loss_scale is not None:
        raise PolicyError(
            "fz.vjp: expected a State, got the bare parameters of one whose policy has a loss scale: without the scale "
            "their fp16 gradients would underflow. Differentiate by the State itself: fz.vjp(f, state), or fz.grad(f)."
        )


def _reduced(primal: Primal, leaves: Sequence[Tensor | None], scale: Tensor | None, reduce: Reduce) -> Sharded:
    """Sum full local gradients over the data axes into the layout's pieces; the mean goes into the factor."""
    params = primal.params
    mesh, axes = params.mesh, params.layout.data_axes
    placement = params.placement.cut_over(params.layout.gradient_cut)
    pieces: list[Tensor | None] = []
    taken: set[int] = set()
    of = tree_of(params.pieces)
    for path, leaf, spec in zip(params.paths, leaves, placement.specs, strict=True):
        if leaf is None:
            pieces.append(None)
            continue
        policy = params.placement.policy_of(path)
        with mark(role="reduce", leaf=path, tree=of):
            if policy is not None and leaf.is_floating_point() and params.factor is None:
                leaf = leaf.to(policy.sent)
            dtype = leaf.dtype if policy is None or leaf.is_complex() else policy.reduce
            piece = reduce_leaf(leaf, spec, mesh, axes=axes, dtype=dtype).to(leaf.dtype).contiguous()
        # Autograd gives two leaves one tensor where their gradients are equal, and pieces may be donated.
        shared = not is_functorch_wrapped(piece) and storage_id(piece) in taken
        pieces.append(piece.clone() if shared else piece)
        taken |= set() if is_functorch_wrapped(piece) else {storage_id(piece)}
    count = mesh.size(axes) if reduce == "mean" else 1
    factor = torch.tensor(1.0 / count, dtype=torch.float32, device=mesh.device)
    factor = factor if scale is None else factor / scale
    if any(piece is not None and is_functorch_wrapped(piece) for piece in pieces):
        # An outer jvp or vmap takes this tree apart: a constant factor would come out with a tangent of zero,
        # and the tangent of leaf × factor would be lost. So the leaves hold true values.
        return Sharded(tuple(None if piece is None else scaled(piece, factor) for piece in pieces), placement)
    return Sharded(tuple(pieces), placement, factor)


def gathered(primal: Primal) -> list[Tensor]:
    """Return the full leaves of a primal, in its policy's compute dtype. Differentiable in the pieces."""
    params, full = primal.params, []
    again, of = params.layout.stage == 3, tree_of(params.pieces)
    check_not_simulated(params, "fz")
    for path, piece, spec in zip(params.paths, params.pieces, params.placement.specs, strict=True):
        if piece is None:
            raise LayoutError(f"fz: leaf {path!r} is None: this tree holds gradients of a frozen leaf, not parameters.")
        with mark(role="gather", leaf=path, again=again, tree=of):
            policy = params.placement.policy_of(path)
            if policy is None or not piece.is_floating_point() or params.factor is not None:
                leaf = join(piece, spec, params.mesh)
            else:
                leaf = join(piece.to(policy.sent), spec, params.mesh).to(policy.compute)
        full.append(leaf if params.factor is None else scaled(leaf, params.factor))
    return full


def is_float(leaf: Any) -> TypeGuard[Tensor]:
    """Return whether a leaf is a tensor that has gradients."""
    return isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex())
