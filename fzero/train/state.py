"""Training state, and the step made of it.

A `State` is an immutable pytree of this rank's pieces. Nothing here has effects: a step takes a state and
returns another.

    loss, grads = value_and_grad(loss_fn)(state, batch)
    state, info = apply_gradients(state, grads)
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fzero import tree
from fzero._torch import torch_pytree
from fzero.autodiff.accumulate import accumulate
from fzero.autodiff.open import Primal
from fzero.autodiff.vjp import value_and_grad
from fzero.calls.arguments import named, whole
from fzero.display.html import html_of
from fzero.display.listing import of_state
from fzero.display.text import text_of
from fzero.optim.base import Optimizer
from fzero.optim.norm import measure
from fzero.optim.pair import check_pair
from fzero.precision.policy import Policy
from fzero.precision.policy import policy as policy_of
from fzero.program.jit import Jitted, jit
from fzero.random.bits import fold, signed
from fzero.ranks.collectives import all_reduce
from fzero.ranks.mesh import Mesh, make_mesh
from fzero.ranks.peers import collective
from fzero.sharding.layout import Layout, zero
from fzero.sharding.sharded import Sharded, held
from fzero.train.first_pieces import cut
from fzero.train.fits import fitting

Skip = Literal["step", "element"]


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
        return self.params.mesh

    @property
    def policy(self) -> Policy:
        policy = self.params.policy
        assert policy is not None
        return policy

    @property
    def layout(self) -> Layout:
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
    pieces, remainder = cut(params, mesh, layout, precision, seed, optimizer.frozen)
    optimizer.check_paths(pieces.paths, pieces.paths)
    device = torch.device("meta") if mesh.simulated else mesh.device
    scale, streak = (None, None) if precision.scaling is None else precision.scaling.start(device)
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


@collective("fz.apply_gradients", lambda state, grads, skip=None: held(state, grads))
def apply_gradients(state: State, grads: Sharded, skip: Skip | None = None) -> tuple[State, dict[str, Any]]:
    """Update a state by its gradients.

    Args:
        state: the state that the gradients are of.
        grads: from a pullback, `value_and_grad` or `accumulate`.
        skip: what a gradient that is not finite does. `"step"`: nothing changes, on any rank, not even the
            step counter, but a dynamic loss scale, which is lowered; all gradients have to be there before the
            first update. `"element"`: only elements with such a gradient stay as they were, moments included;
            nothing waits for anything. Default: `"step"` for policies with a loss scale, which allow nothing
            else, and `"element"` for the others.

    Returns:
        `(state, info)`, where `info` holds `grad_norm` (fp32, over all ranks, not finite where a gradient is not),
        `finite` (bool), `lr` (fp32), and `loss_scale` (fp32): the one that this step used (1 without loss scaling).
        All are of shape () and of no memory that anybody else holds. Where groups of leaves have rates of their own, as
        under `fz.partition_by`, `lr` is the largest of them, and each stands beside it: `lr/label`.

    Raises:
        TypeError: `grads` are not a state's gradients.
        ValueError: `skip="element"` under a policy with a loss scale.
        TreeError: they pair with other parameters.
        PolicyError: they were taken under another policy.

    Example:
        >>> from fzero.optim.sgd import sgd
        >>> from fzero.ranks.mesh import make_mesh
        >>> state = init({"w": torch.ones(2)}, sgd(0.5), make_mesh("cpu"), policy="fp32")
        >>> _, grads = value_and_grad(lambda params: params["w"].sum())(state)
        >>> state, info = apply_gradients(state, grads)
        >>> state.params.pieces[0], info["finite"], state.step
        (tensor([0.5000, 0.5000]), tensor(True), tensor(1, dtype=torch.int32))
    """
    if skip not in (None, "step", "element"):
        raise ValueError(f"fz.apply_gradients: skip={skip!r}; expected 'step', 'element' or None.")
    scaling = state.policy.scaling
    if scaling is not None and skip == "element":
        raise ValueError(
            "fz.apply_gradients: skip='element' under a policy with a loss scale would train on gradients whose "
            "overflow the scale is there to find. Leave skip out, or use a bf16 policy."
        )
    if not isinstance(grads, Sharded):
        raise TypeError(
            f"fz.apply_gradients: expected the gradients of a State, got {tree.describe(grads)}. Take them with the "
            f"State as primal: fz.value_and_grad(loss)(state, batch)."
        )
    check_pair(grads, state.params)
    squares = measure(grads)
    finite = squares.finite(grads.multiplier)
    norm = torch.where(finite, squares.norm(grads.multiplier), torch.nan)
    advance = torch.ones_like(state.step)
    if skip == "step" or scaling is not None:
        grads = grads.replace(factor=torch.where(finite, grads.multiplier, torch.nan))
        advance = finite.to(state.step.dtype)
    params, moments = state.optimizer.update_sharded(
        grads, state.moments, state.params, step=state.step, seed=state.seed, squares=squares
    )
    info = {
        "grad_norm": norm,
        "finite": finite,
        **_rates("lr", state.optimizer.learning_rate(state.step), state.step),
        "loss_scale": torch.ones((), device=state.mesh.device) if state.loss_scale is None else state.loss_scale,
    }
    scale, streak = state.loss_scale, state.streak
    if scaling is not None and scale is not None and streak is not None:
        scale, streak = scaling.after(scale, streak, finite)
    moved = dataclasses.replace(
        state, params=params, moments=moments, step=state.step + advance, loss_scale=scale, streak=streak
    )
    return moved, info


def _rates(name: str, rates: Any, step: Tensor) -> dict[str, Tensor]:
    """Return learning rates, one or a dict of groups' in dicts, by name: the largest first, then those of groups."""
    if isinstance(rates, Tensor):
        return {name: rates.clone()}  # a schedule may return a tensor that it closes over
    below = {label: _rates(f"{name}/{label}", inner, step) for label, inner in rates.items()}
    largest = [next(iter(group.values())) for group in below.values()] or [torch.zeros((), device=step.device)]
    return {name: torch.stack(largest).amax(), **{key: rate for group in below.values() for key, rate in group.items()}}


def train_step(
    loss_fn: Callable[..., Any],
    microbatches: int = 1,
    donate: bool = True,
    skip: Skip | None = None,
    has_aux: bool = False,
    weight: Callable[..., Any] | None = None,
    **jit_options: Any,
) -> Jitted:
    """Return `step(state, batch) -> (state, metrics)`, jitted.

    Args:
        loss_fn: `loss_fn(params, batch) -> loss`, or `(loss, aux)` with `has_aux`. It sees full parameters and
            this rank's batch.
        microbatches: splits the batch on dimension 0 and accumulates; gradients are the mean.
        donate: reuse the old state's memory; reading the old state afterwards raises `DonatedError`.
        skip: see `apply_gradients`.
        has_aux: `aux` is a dict of tensors, which join the metrics.
        weight: `weight(batch)` is what a micro-batch counts, such as its number of tokens. Gradients, loss and
            floating-point scalars of `aux` are then weighted means over micro-batches and ranks, see `accumulate`.
        **jit_options: for `fz.jit`.

    Returns:
        The step. Its metrics are `loss`, what `apply_gradients` tells, and `aux`; floating-point scalars are
        averaged over the data axes.

    Example:
        >>> from fzero.optim.sgd import sgd
        >>> from fzero.ranks.mesh import make_mesh
        >>> state = init({"w": torch.ones(2)}, sgd(0.5), make_mesh("cpu"), policy="fp32")
        >>> step = train_step(lambda params, batch: (params["w"] * batch).sum())
        >>> state, metrics = step(state, torch.tensor([1.0, 2.0]))
        >>> state.params.pieces[0], metrics["loss"]
        (tensor([0.5000, 0.0000]), tensor(3.))
    """
    if not callable(loss_fn) or isinstance(loss_fn, State):
        raise TypeError(
            f"fz.train_step: loss_fn must be a function of (params, batch), got {tree.describe(loss_fn)}. The state is "
            f"for the step that this makes: step = fz.train_step(loss_fn); state, metrics = step(state, batch)."
        )
    microbatches = int(whole("fz.train_step", "microbatches", microbatches, least=1))
    gradient = value_and_grad(loss_fn, has_aux=has_aux)
    total = gradient if microbatches == 1 and weight is None else accumulate(gradient, microbatches, weight)

    def step(state: State, batch: Any) -> tuple[State, dict[str, Any]]:
        _check_step(state, batch)
        value, grads = total(state, batch)
        loss, aux = value if has_aux else (value, {})
        if not isinstance(aux, dict):
            raise TypeError(f"fz.train_step: aux must be a dict of tensors, got {tree.describe(aux)}.")
        state, info = apply_gradients(state, grads, skip)
        if taken := aux.keys() & {"loss", *info}:
            raise ValueError(f"fz.train_step: aux must not name {sorted(taken)}, which the step's own metrics do.")
        means = {"loss": loss, **aux}
        if weight is None:  # else they are means over ranks already
            means = mean_over_ranks(means, state.mesh, state.layout.data_axes)
        return state, {"loss": means.pop("loss"), **info, **means}

    step.__doc__ = getattr(loss_fn, "__doc__", None)
    step.__name__ = step.__qualname__ = f"train_step({getattr(loss_fn, '__name__', 'loss_fn')})"
    return jit(step, donate=(0,) if donate else (), **jit_options)


def _check_step(state: Any, batch: Any) -> None:
    """Raise where what a step is called with is no state and a batch."""
    if isinstance(state, State) and not isinstance(batch, State):
        return
    got = f"a {tree.describe(state)} and a {tree.describe(batch)}"
    way_out = "Make a state of parameters with fz.init(params, optimizer)"
    if isinstance(batch, State):
        way_out = "The state comes first"
    elif isinstance(state, Sharded):
        way_out = "Pass the State itself, of which these are a part"
    raise TypeError(
        f"fz.train_step: the step takes (state, batch), a State and this rank's data; got {got}. {way_out}."
    )


def mean_over_ranks(metrics: Any, mesh: Mesh, axes: Sequence[str]) -> Any:
    """Average the floating-point scalars of a tree over mesh axes, by one collective an axis; keep the rest."""
    leaves, treedef = tree.flatten(metrics)
    where = [i for i, x in enumerate(leaves) if isinstance(x, Tensor) and x.is_floating_point() and x.numel() == 1]
    if where and mesh.size(axes) > 1:
        total = torch.stack([leaves[i].reshape(()).to(torch.float32) for i in where])
        for axis in axes:
            total = all_reduce(total, mesh, axis)
        for i, mean in zip(where, (total / mesh.size(axes)).unbind(), strict=True):
            leaves[i] = mean.reshape(leaves[i].shape)
    return tree.unflatten(treedef, leaves)


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
