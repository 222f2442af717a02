"""Training state: an immutable pytree of this rank's pieces, and how it is made."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fzero import tree
from fzero._torch import FakeTensor, torch_pytree
from fzero.autodiff.open import Primal
from fzero.calls.arguments import named, whole
from fzero.display.html import html_of
from fzero.display.listing import of_state
from fzero.display.text import text_of
from fzero.optim.base import Optimizer
from fzero.precision.policy import Policy
from fzero.precision.policy import policy as policy_of
from fzero.random.bits import fold, signed
from fzero.ranks.mesh import Mesh, make_mesh
from fzero.ranks.peers import together
from fzero.sharding.layout import Layout, zero
from fzero.sharding.sharded import Sharded
from fzero.sharding.statics import check_given_alike
from fzero.train.first_pieces import cut
from fzero.train.fits import fitting


@dataclass(frozen=True, eq=False)
class State:
    """The state of training; a pytree whose leaves are tensors.

    Attributes:
        step: int32 of shape (): updates made so far.
        params: this rank's pieces of the parameters, as the policy stores them.
        moments: the optimizer's state.
        loss_scale: fp32 of shape (), or `None` for policies without loss scaling.
        streak: int32 of shape (), or `None` likewise: finite steps since the loss scale last moved; negative,
            overflows in a row that have not moved it.
        seed: int32 of shape (): with the step it decides dropout and the rounding of updates.
        optimizer: static.
        policy: how the parameters are stored: they say so.
        layout: where they live, likewise.

    Example:
        >>> from fzero.optim.sgd import sgd
        >>> state = init({"w": torch.ones(4, 4)}, sgd(0.1), make_mesh("cpu"), policy="bf16")
        >>> state.step, state.params.pieces[0].dtype, state.params.shapes
        (tensor(0, dtype=torch.int32), torch.bfloat16, ((4, 4),))
        >>> state.replace(optimizer=sgd(0.2)).optimizer
        sgd(lr=0.2)
    """

    step: Tensor
    params: Sharded
    moments: Any
    loss_scale: Tensor | None
    streak: Tensor | None
    seed: Tensor
    optimizer: Optimizer

    @property
    def mesh(self) -> Mesh:
        """The processes that hold the pieces."""
        return self.params.mesh

    @property
    def policy(self) -> Policy:
        """How the parameters are stored, computed with and rounded."""
        policy = self.params.policy
        assert policy is not None
        return policy

    @property
    def layout(self) -> Layout:
        """Where the parameters live."""
        return self.params.layout

    def replace(self, **changes: Any) -> State:
        """Return a copy with some attributes changed, where that makes a state that fits together.

        Another optimizer keeps the moments where it means the same by them: another learning rate, weight decay or
        schedule, a clip more or less. Give it new ones where not: `moments=optimizer.init(state.params)`.

        Raises:
            TreeError: the moments are of other leaves or of another meaning than the optimizer's, or parameters are
                other ones.
            PolicyError, LayoutError: the state is stored otherwise; the message says how to start another.
            ShapeError, TypeError: a counter is no tensor like the old one, or there is no such attribute.
        """
        return dataclasses.replace(self, **fitting(self, changes))

    def as_primal(self) -> Primal:
        """What `vjp` differentiates: the parameters; random draws are keyed by seed, step and data rank."""
        rank = self.mesh.index_tensor(self.layout.data_axes)
        key = fold(fold(self.seed, self.step), rank)
        return Primal(self.params, self.optimizer.frozen(self.params.paths), self.loss_scale, key)

    def for_microbatch(self, index: Tensor) -> State:
        """The same state with other random draws, for one of several micro-batches."""
        return dataclasses.replace(self, seed=fold(self.seed, index))

    def __repr__(self) -> str:
        return text_of(of_state(self))

    def _repr_html_(self) -> str:
        return html_of(of_state(self))


@named("fz.init")
def init(
    params: Any,
    optimizer: Optimizer,
    mesh: Mesh | None = None,
    layout: Layout | None = None,
    policy: str | Policy = "bf16",
    seed: int = 0,
) -> State:
    """Return the first state: parameters cut and cast, zero moments, step 0.

    Args:
        params: a tree of tensors, equal on every rank; an `nn.Module`; or a factory, called without
            arguments, that returns one. A factory's model is built leaf by leaf, with draws keyed by
            (seed, path): the same values on any number of ranks, and never more memory than the pieces plus
            the largest leaf (an initialiser that itself needs more, such as `orthogonal_` or a cast, has it
            for one leaf). What is given is copied. Leaves are frozen by `fz.partition_by`; those of a module that
            require no grad and are trained get a warning. Floating-point leaves are cast to what the policy stores,
            float64 too; integers are kept as they are.
        optimizer: such as `fz.adamw(3e-4)`.
        mesh: default: all processes, on the axis `data`.
        layout: default: `zero(3)`.
        policy: a name or a `Policy`.
        seed: of the draws of a factory's model, of dropout and of stochastic rounding.

    Raises:
        LayoutError: a leaf is no tensor or is on another device, is complex, of float8 or not dense, cannot be split
            as the layout says, or differs between ranks; or the layout leaves out a mesh axis.
        MeshError: the layout names an axis that the mesh does not have.
        PolicyError: there is no such policy.
        ProgramMismatchError: ranks give another optimizer, policy, layout or seed. All ranks call it together.
        TypeError, ValueError: an argument is of another kind; the seed is not of 32 bits; a mask, or the label of an
            optimizer, fits no leaf.

    Example:
        >>> from fzero.optim.adamw import adamw
        >>> from fzero.ranks.mesh import make_mesh
        >>> init({"w": torch.ones(4, 4)}, adamw(1e-3), make_mesh("cpu"), policy="fp32")
        State(1 leaf, 16 parameters, ZeRO-3 over data=1, step 0)
          at rest  200 B on this rank: params 64 B, moments 128 B, rest 8 B
          policy   stored float32, moments float32, computed in float32, rounding nearest
          leaf  shape   dtype    held   params  moments
          w     (4, 4)  float32  whole    64 B    128 B
    """
    _check_given(params, optimizer, mesh)
    seed = int(whole("fz.init", "seed", seed, least=-(2**31), most=2**32 - 1, hint="A seed is 32 bits."))
    if isinstance(params, Sharded | State):
        raise TypeError(
            f"fz.init: got a {type(params).__name__}, which is cut already. Pass full tensors: fz.gather(...)."
        )
    mesh, layout, precision = mesh or make_mesh(), layout or zero(3), policy_of(policy)
    with together("fz.init"):
        return _init(params, optimizer, mesh, layout, precision, seed)


def _init(params: Any, optimizer: Optimizer, mesh: Mesh, layout: Layout, policy: Policy, seed: int) -> State:
    pieces, remainder = cut(params, mesh, layout, policy, seed, optimizer.frozen)
    optimizer.check_paths(pieces.paths, pieces.paths)
    if not any(isinstance(piece, FakeTensor) for piece in pieces.pieces):
        check_given_alike("fz.init", mesh, optimizer=optimizer, policy=policy, layout=layout, seed=seed)
    device = torch.device("meta") if mesh.simulated else mesh.device
    scale, streak = (None, None) if policy.scaling is None else policy.scaling.start(device)
    return State(
        step=torch.zeros((), dtype=torch.int32, device=device),
        params=pieces,
        moments=optimizer.init_sharded(pieces, remainder),
        loss_scale=scale,
        streak=streak,
        seed=torch.full((), signed(seed), dtype=torch.int32, device=device),
        optimizer=optimizer,
    )


def _check_given(params: Any, optimizer: Any, mesh: Any) -> None:
    """Raise for arguments of `init` of another kind."""
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"fz.init: optimizer must be an fz optimizer, got {tree.describe(optimizer)}. Try fz.adamw(lr): optimizers "
            f"here are pure functions, and are given no parameters."
        )
    if mesh is not None and not isinstance(mesh, Mesh):
        name = "layout" if isinstance(mesh, Layout) else "policy" if isinstance(mesh, str | Policy) else None
        way_out = f"Pass it by its name, {name}=..." if name else "Make one: fz.make_mesh()"
        raise TypeError(f"fz.init: mesh must be made by fz.make_mesh, got {tree.describe(mesh)}. {way_out}.")
    if inspect.isgenerator(params):
        raise TypeError(
            "fz.init: params must be a tree of tensors, a module or a factory, got a generator, such as "
            "model.parameters(), which has no names. Pass the model itself, or dict(model.named_parameters())."
        )


_STATIC = ("optimizer",)
_CHILDREN = ("step", "params", "moments", "loss_scale", "streak", "seed")


def _flatten_state(state: State) -> tuple[tuple[Any, ...], tuple[Any, ...], tuple[str, ...]]:
    return tuple(getattr(state, n) for n in _CHILDREN), tuple(getattr(state, n) for n in _STATIC), _CHILDREN


def _unflatten_state(static: tuple[Any, ...], children: Iterable[Any]) -> State:
    return State(*children, *static)


tree.register(State, _flatten_state, _unflatten_state)
torch_pytree.register_pytree_node(
    State,
    lambda s: ([c for c in _flatten_state(s)[0] if c is not None], (_flatten_state(s)[1], s.loss_scale is None)),
    lambda children, context: _torch_unflatten_state(list(children), *context),
)


def _torch_unflatten_state(children: list[Any], static: tuple[Any, ...], unscaled: bool) -> State:
    # torch calls None a leaf, and no torch.func transform takes one.
    return _unflatten_state(static, [*children[:3], None, None, *children[3:]] if unscaled else children)
