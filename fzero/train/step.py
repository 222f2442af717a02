"""The step of training: it takes a state and returns another, without effects.

`train_step` makes one program of a gradient and an update:

    loss, grads = value_and_grad(loss_fn)(state, batch)
    state, info = apply_gradients(state, grads)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from fzero import tree
from fzero.autodiff.accumulate import accumulate
from fzero.autodiff.value_and_grad import value_and_grad
from fzero.calls.arguments import whole
from fzero.optim.base import check_pair
from fzero.optim.norm import measure
from fzero.optim.step import Step
from fzero.program.jit import Jitted, jit
from fzero.ranks.average import means
from fzero.ranks.mesh import Mesh
from fzero.ranks.peers import collective
from fzero.sharding.sharded import Sharded, held
from fzero.sharding.statics import told
from fzero.train.state import State

Skip = Literal["step", "element"]


def _alike(state: State, grads: Sharded, skip: Skip | None = None) -> list[str]:
    """Return what ranks have to have in common to update together: an optimizer too, if there are others at all."""
    lines = held(state, grads)
    return lines and [*lines, *(f"{name}: {text}" for name, text in told(optimizer=state.optimizer).items())]


@collective("fz.apply_gradients", _alike)
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
        >>> from fzero.train.state import init
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
    at = Step(state.step, state.seed, squares)
    params, moments = state.optimizer.update_sharded(grads, state.moments, state.params, at)
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

    Raises:
        TypeError: `loss_fn` is no function. From the step: it was not called with a state and a batch, or `aux` is no
            dict.
        ValueError: `microbatches` is below 1. From the step: `aux` names a metric that the step has already.
        BatchError: from the step: the batch does not divide into micro-batches.

    Example:
        >>> from fzero.optim.sgd import sgd
        >>> from fzero.ranks.mesh import make_mesh
        >>> from fzero.train.state import init
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
    """Average the floating-point scalars of a tree over mesh axes, in at least fp32; keep the rest."""
    leaves, treedef = tree.flatten(metrics)
    where = [i for i, x in enumerate(leaves) if isinstance(x, Tensor) and x.is_floating_point() and x.numel() == 1]
    for i, mean in zip(where, means([leaves[i] for i in where], mesh, axes), strict=True):
        leaves[i] = mean
    return tree.unflatten(treedef, leaves)
