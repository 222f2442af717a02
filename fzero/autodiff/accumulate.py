"""Accumulation: one large batch as several micro-batches, traced once.

    for i in range(n):   value, gradients = f(state, batch[i])     one micro-batch at a time
                         sum += value, gradients                   gradients as pieces: sharded sums

Eagerly this is that loop. Inside a trace the body is traced by itself, once however large n is, and one
node of the outer graph, `run_loop`, stands for all its rounds. Both add the same numbers in the same order,
from zero.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fzero import tree
from fzero.autodiff.batch import Batch, HasMicrobatches, check_whole, parameters_of
from fzero.autodiff.rounds import Rounds, in_loop, one_by_one
from fzero.autodiff.terms import Recipe, taken_apart
from fzero.autodiff.value_and_grad import ValueAndGrad
from fzero.autodiff.weights import mean_over, ranks_of, relative, weight_of
from fzero.errors import BatchError
from fzero.ranks.peers import together


def accumulate(
    f: Callable[..., Any],
    n: int,
    weight: Callable[..., Any] | None = None,
    whole: int | str | Sequence[int | str] = (),
) -> Callable[..., Any]:
    """Return a function equal to `f` that splits its batch into `n` micro-batches and averages.

    Args:
        f: from `fz.value_and_grad`, or a function that returns `(value, gradients)` or
            `((value, aux), gradients)` likewise. Under `fz.jit` it is traced once, for one micro-batch.
        n: the number of micro-batches.
        weight: what a micro-batch counts, such as its number of tokens: `weight(batch)` is a number, or a tensor of
            shape (). It is called with the arguments that are split. Value, gradients and floating-point scalars of
            `aux` are then weighted means over the micro-batches and over the ranks, the same on every rank. Left
            out, all count the same, and a value is this rank's own.
        whole: positions, or names, of arguments that every micro-batch gets whole.

    Returns:
        A function with the arguments and results of `f`. Differentiated arguments, every `State` and `Sharded`, and
        those of `whole` are passed to each micro-batch whole, and so are tensors of shape () and what is no tensor.
        All other tensors are split along dimension 0, whatever tree they stand in.
        Value and gradients are means over the micro-batches; gradients of a `State` stay sharded and are summed
        in the policy's `reduce` dtype. Of `aux`, floating-point scalars are averaged, integer scalars added up,
        and tensors with dimensions concatenated along dimension 0. Where all weights are zero, so are value and
        gradients.

    Raises:
        BatchError: from the call: a tensor of the batch does not split into `n`, an argument holds tensors where
            they are not seen, or nothing can be split.
        TypeError: `weight` with a function that is not of `fz.value_and_grad`; from the call: it gives no number.
        TraceError: from the call under `fz.jit`: `f` closes over a tensor that is being differentiated.

    Example:
        >>> from fzero.autodiff.value_and_grad import value_and_grad
        >>> gradient = accumulate(value_and_grad(lambda w, x: (w * x).mean()), 2)
        >>> gradient(torch.tensor(1.0), torch.tensor([1.0, 2.0, 3.0, 4.0]))
        (tensor(2.5000), tensor(2.5000))
    """
    if not isinstance(n, int) or n < 1:
        raise BatchError(f"fz.accumulate: n must be a whole number of at least 1, got {n!r}.")
    if weight is not None and not isinstance(f, ValueAndGrad):
        raise TypeError(
            "fz.accumulate: weight= has to reach the cotangent, before ranks meet: pass what fz.value_and_grad "
            f"returned, and not {getattr(f, '__name__', tree.describe(f))}, which is around it."
        )
    differentiated = f.differentiated if isinstance(f, ValueAndGrad) else (0,)
    function = f.f if isinstance(f, ValueAndGrad) else f
    names = parameters_of(function)
    chosen = check_whole((whole,) if isinstance(whole, int | str) else tuple(whole), function)

    def accumulated(*args: Any, **kwargs: Any) -> Any:
        batch = Batch.of(args, kwargs, n, differentiated, chosen, names)
        recipes: list[Recipe] = []

        def body(inputs: list[Tensor], weights: Tensor | None = None) -> list[Tensor]:
            index, rest = inputs[0], inputs[1:]
            positional, keywords = batch.arguments(rest[: len(batch.whole)], rest[len(batch.whole) :])
            positional = [_for_microbatch(a, index) for a in positional]
            keywords = {name: _for_microbatch(a, index) for name, a in keywords.items()}
            if weights is None:
                result = f(*positional, **keywords)
            else:
                assert isinstance(f, ValueAndGrad), "checked above"
                result = f.weighted(weights, *positional, **keywords)
            recipe, terms = taken_apart(result, keep_factor=isinstance(f, ValueAndGrad), weight=weights)
            recipes[:] = [recipe]
            return terms

        def weighted(inputs: list[Tensor]) -> list[Tensor]:
            return body(inputs[:-1], inputs[-1].reshape(()))

        index = torch.arange(n, dtype=torch.int32, device=_device(batch.whole, batch.split))
        rounds = Rounds(body, lambda: recipes[0].kinds, index, batch.whole, batch.split)
        if weight is None:
            terms = in_loop(rounds)
            return recipes[0].finish(terms, n)
        ranks = ranks_of([args[i] for i in differentiated if i < len(args)])
        with together("fz.accumulate"):
            own = _weights(weight, index, batch.only_counted())
        weights = relative(own, ranks)
        # A single micro-batch needs no loop.
        terms = (in_loop if n > 1 else one_by_one)(replace(rounds, body=weighted, batch=[*batch.split, weights]))
        value, gradients = recipes[0].finish(terms, n)
        return mean_over(ranks, value, has_aux=recipes[0].has_aux), gradients

    return accumulated


def _weights(weight: Callable[..., Any], index: Tensor, batch: Batch) -> Tensor:
    """Return what each micro-batch counts."""

    def body(inputs: list[Tensor]) -> list[Tensor]:
        rest = inputs[1:]
        positional, keywords = batch.arguments(rest[: len(batch.whole)], rest[len(batch.whole) :])
        return [weight_of(weight(*positional, **keywords), index.device)]

    rounds = Rounds(body, lambda: ["stack"], index, batch.whole, batch.split)
    (weights,) = (in_loop if rounds.n > 1 else one_by_one)(rounds)
    return weights


def _for_microbatch(argument: Any, index: Tensor) -> Any:
    is_node = lambda x: isinstance(x, HasMicrobatches)  # noqa: E731
    return tree.map(lambda x: x.for_microbatch(index) if is_node(x) else x, argument, is_leaf=is_node)


def _device(*groups: Sequence[Tensor]) -> torch.device:
    return next((x.device for group in groups for x in group), torch.device("cpu"))
