"""The value of a function with its gradient: the pullback of a scalar, at once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fzero import tree
from fzero.autodiff.open import Reduce
from fzero.autodiff.vjp import held_by, pulled_back, refuse_dynamo
from fzero.ranks.peers import collective


@dataclass(frozen=True)
class ValueAndGrad:
    """What `value_and_grad` and `grad` return: a function that knows which arguments it differentiates."""

    f: Callable[..., Any]
    argnums: int | tuple[int, ...] = 0
    has_aux: bool = False
    reduce: Reduce = "mean"
    only_grad: bool = False

    @property
    def differentiated(self) -> tuple[int, ...]:
        """The positions of the arguments that are differentiated."""
        return (self.argnums,) if isinstance(self.argnums, int) else tuple(self.argnums)

    @collective("fz.value_and_grad", lambda self, *args, **kwargs: held_by((*args, kwargs), self.differentiated))
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.weighted(None, *args, **kwargs)

    def weighted(self, weight: Tensor | None, *args: Any, **kwargs: Any) -> Any:
        """Evaluate, with the gradient of `weight` times the value: a number of shape () for each rank.

        Where it is zero so is this rank's part of the gradient, even if the value is a mean over nothing.
        """
        refuse_dynamo("fz.value_and_grad")
        for position in self.differentiated:
            if not 0 <= position < len(args):
                raise TypeError(
                    f"fz.value_and_grad: argnums={self.argnums} names argument {position}, and f was called with "
                    f"{len(args)} positional arguments."
                )

        if len(set(self.differentiated)) < len(self.differentiated):
            raise TypeError(f"fz.value_and_grad: argnums={self.argnums} names an argument twice.")

        @functools.wraps(self.f, updated=())
        def on_arguments(*opened: Any) -> Any:
            *positional, keywords = opened
            return self.f(*positional, **keywords)

        value, pullback, aux = pulled_back(
            on_arguments, (*args, kwargs), self.differentiated, has_aux=self.has_aux, reduce=self.reduce, scalar=True
        )
        if not isinstance(value, Tensor) or value.numel() != 1:
            got = ", ".join(f"{p or 'output'}: {tree.describe(x)}" for p, x in _named(value))
            raise TypeError(
                f"fz.value_and_grad: f must return one scalar, and it returned {got}. "
                f"Reduce it inside f, return (scalar, aux) with has_aux=True, or use fz.vjp with a cotangent."
            )
        one = torch.ones_like(value)
        gradients = pullback(one) if weight is None else pullback(one * weight.to(value.dtype), weight != 0)
        gradient = gradients[0] if isinstance(self.argnums, int) else gradients
        if self.only_grad:
            return (gradient, aux) if self.has_aux else gradient
        return ((value, aux), gradient) if self.has_aux else (value, gradient)


def value_and_grad(
    f: Callable[..., Any], argnums: int | tuple[int, ...] = 0, has_aux: bool = False, *, reduce: Reduce = "mean"
) -> ValueAndGrad:
    """Return a function that evaluates `f` and its gradient.

    Args:
        f: `f(*args) -> scalar`, or `(scalar, aux)` with `has_aux`. It sees full parameters.
        argnums: the argument, or arguments, to differentiate. Any other argument that holds a `State` or a
            `Sharded` is gathered for `f` and gets no gradient.
        has_aux: `f` returns `(scalar, aux)`.
        reduce: mean or sum over the data axes, see `vjp`.

    Returns:
        `g(*args, **kwargs) -> (value, gradient)`, or `((value, aux), gradient)`. The value is this rank's own.

    Raises:
        GradientError: from the call: the value does not depend on what `f` is differentiated by.
        TypeError: from the call: `f` does not return one floating-point number, or `argnums` names no argument, or one
            twice.

    Example:
        >>> value_and_grad(lambda w: (w * w).sum())(torch.tensor([1.0, 2.0]))
        (tensor(5.), tensor([2., 4.]))
    """
    refuse_dynamo("fz.value_and_grad")
    return ValueAndGrad(f, argnums, has_aux, reduce)


def grad(
    f: Callable[..., Any], argnums: int | tuple[int, ...] = 0, has_aux: bool = False, *, reduce: Reduce = "mean"
) -> ValueAndGrad:
    """Return a function that evaluates the gradient of `f`.

    Args:
        f: `f(*args) -> scalar`, or `(scalar, aux)` with `has_aux`. It sees full parameters.
        argnums: the argument, or arguments, to differentiate.
        has_aux: `f` returns `(scalar, aux)`.
        reduce: mean or sum over the data axes, see `vjp`.

    Returns:
        `g(*args, **kwargs) -> gradient`, or `(gradient, aux)`.

    Raises:
        GradientError, TypeError: from the call, as of `value_and_grad`.

    Example:
        >>> grad(lambda w: (w * w).sum())(torch.tensor([1.0, 2.0]))
        tensor([2., 4.])
    """
    refuse_dynamo("fz.grad")
    return ValueAndGrad(f, argnums, has_aux, reduce, only_grad=True)


def _named(value: Any) -> list[tuple[str, Any]]:
    return list(zip(tree.paths(value), tree.leaves(value), strict=True))
