"""Gradients as pullbacks, of functions that see full parameters.

`vjp` opens its primals, runs the function, and returns its output with a pullback. Opening a primal and
forming its gradient are each other's mirror:

    pieces ──cast to compute──▶ pieces ──all-gather──▶ full leaves ──f──▶ output
    pieces ◀──reduce-scatter── full gradients ◀──pullback of f── cotangent

The function itself is local: it runs on one rank, on full leaves, and gradients taken inside it involve
no other rank. Ranks meet only in the gather before it and in the reduction after it.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor

from fzero import tree
from fzero._torch import is_functorch_wrapped, storage_id, under_dynamo
from fzero.autodiff.inner import constants_refused
from fzero.autodiff.open import Opened, Reduce, is_float
from fzero.errors import CotangentError, GradientError
from fzero.marks import mark, mark_line
from fzero.modules.attention_masks import masks_cast
from fzero.modules.explain import explaining
from fzero.precision.wide_sums import Summing, summing
from fzero.ranks.peers import collective
from fzero.sharding.sharded import held
from fzero.wrapped import is_connected

Pullback = Callable[[Any], tuple[Any, ...]]


@overload
def vjp(
    f: Callable[..., Any], *primals: Any, has_aux: Literal[False] = False, reduce: Reduce = "mean"
) -> tuple[Any, Pullback]: ...


@overload
def vjp(
    f: Callable[..., Any], *primals: Any, has_aux: Literal[True], reduce: Reduce = "mean"
) -> tuple[Any, Pullback, Any]: ...


@overload
def vjp(
    f: Callable[..., Any], *primals: Any, has_aux: bool, reduce: Reduce = "mean"
) -> tuple[Any, Pullback] | tuple[Any, Pullback, Any]: ...


def vjp(
    f: Callable[..., Any], *primals: Any, has_aux: bool = False, reduce: Reduce = "mean"
) -> tuple[Any, Pullback] | tuple[Any, Pullback, Any]:
    """Evaluate `f(*primals)` and return its output with its pullback.

    Args:
        f: sees full parameters in the compute dtype where a primal is a `State` or a `Sharded`, else the
            primal itself. Returns any tree.
        *primals: each a `State`, a `Sharded`, or a tree of tensors.
        has_aux: `f` returns `(output, aux)`; `aux` is not differentiated.
        reduce: gradients of a `State` or `Sharded` are the mean over the data axes, or the sum.

    Returns:
        `(output, pullback)`, with `aux` as a third where asked for. `pullback(cotangent)` takes a tree
        like the output (`None` or anything equal where the output is no floating-point tensor) and
        returns a tuple, one gradient for each primal:

        - of a `State` or `Sharded`, a `Sharded` that pairs with it leaf by leaf and carries its `factor`;
        - of a tree, a tree: this rank's own gradient, unscaled, without a collective.

        Leaves that are not floating-point, or are frozen, have `None`. A pullback is pure: it may be
        called again, with another cotangent.

    Raises:
        CotangentError: from the pullback, for a cotangent that does not match the output.
        DonatedError: from the pullback, once the memory of a primal was donated.
        GradientError: a primal is a `State` or a `Sharded`, and nothing that `f` returns depends on any primal; or `f`
            gives what is differentiated to a collective of `torch.distributed`.
        ParameterWriteError: `f` writes to a leaf of a `State` or a `Sharded`.
        ModuleError: `f` takes a gradient by `torch.autograd` that would count as a constant.
        TypeError: `f` returns no floating-point tensor.

    Example:
        >>> output, pullback = vjp(lambda w, x: w * x, torch.tensor([2.0, 3.0]), torch.tensor(5.0))
        >>> pullback(torch.tensor([1.0, 10.0]))
        (tensor([ 5., 50.]), tensor(32.))
    """
    refuse_dynamo("fz.vjp")
    output, pullback, aux = pulled_back(f, primals, tuple(range(len(primals))), has_aux=has_aux, reduce=reduce)
    return (output, pullback, aux) if has_aux else (output, pullback)


@collective("fz.vjp", lambda f, arguments, positions, **_: held_by(arguments, positions))
def pulled_back(
    f: Callable[..., Any],
    arguments: Sequence[Any],
    positions: tuple[int, ...],
    *,
    has_aux: bool,
    reduce: Reduce,
    scalar: bool = False,
) -> tuple[Any, Callable[..., tuple[Any, ...]], Any]:
    """`vjp` with respect to the arguments at `positions`; the others are opened for `f` all the same.

    With `scalar`, `f` returns a value to be minimised: it is refused where nothing of it can be.
    """
    if reduce not in ("mean", "sum"):
        raise ValueError(f"fz.vjp: reduce={reduce!r}; expected 'mean' or 'sum'.")
    opened = Opened.of(arguments, positions)
    leaves = opened.leaves()
    where, size = opened.differentiable(leaves), len(leaves)
    structure: dict[str, Any] = {}

    def on_differentiable(*chosen: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        filled = list(leaves)
        for i, leaf in zip(where, chosen, strict=True):
            filled[i] = leaf
        context = opened.context(leaves, differentiated=bool(where))
        with context as mode, constants_refused(), explaining("fz.vjp"):
            result = f(*opened.close(filled))
        structure["sums"] = mode is not None and mode.low
        if has_aux and not (isinstance(result, tuple) and len(result) == 2):
            raise TypeError(f"fz.vjp: with has_aux=True f must return (output, aux), and it returned {type(result)}.")
        output, aux = result if has_aux else (result, None)
        floats, others, out_rest = tree.split(output, is_float)
        if not floats:
            raise TypeError("fz.vjp: f returned no floating-point tensor, so there is nothing to differentiate.")
        extra, _, aux_rest = tree.split(aux)
        connected = not where or any(is_connected(x) for x in floats)
        structure.update(output=out_rest, aux=aux_rest, connected=connected)
        return tuple(floats), (*others, *extra)

    if where:
        traced: Any = torch.func.vjp(on_differentiable, *(leaves[i] for i in where), has_aux=True)
        floats, pull, rest = traced
    else:
        (floats, rest), pull = on_differentiable(), lambda _: ()
    if not structure["connected"] and (scalar or opened.differentiates_parameters()):
        raise GradientError(
            f"{'fz.value_and_grad' if scalar else 'fz.vjp'}: what {_called(f)} returns does not depend on what it is "
            f"differentiated by: no leaf has a path to it, so every gradient would be zero. Compute it from the "
            f"arguments: by apply(params, ...) of apply, params = fz.functional(module), not by the module itself, and "
            f"outside of torch.no_grad() and .detach()."
        )
    floats, rest = _own(floats, leaves), _own(rest, leaves)
    count = structure["output"].slots.count(tree.OTHER)
    output = structure["output"].fill(floats, rest[:count])
    aux = structure["aux"].fill(rest[count:], ())
    expected = tree.map(abstract, output)
    plain = not any(_is_tracked(x) for x in leaves)

    @collective("pullback", lambda *_: held_by(arguments, positions))
    def pullback(cotangent: Any, counts: Tensor | None = None) -> tuple[Any, ...]:
        opened.check_not_donated()
        cotangents = check_cotangent(expected, cotangent)
        if opened.scale is not None:
            cotangents = [c * opened.scale.to(c.dtype) for c in cotangents]
        gradients: list[Tensor | None] = [None] * size
        # With grad mode on, torch takes formulas that can be differentiated again: other bits, more memory.
        last_order = plain and not any(_is_tracked(c) for c in cotangents)
        once = torch.no_grad() if last_order else contextlib.nullcontext()
        sums = Summing(low=True) if structure["sums"] and summing() is None else contextlib.nullcontext()
        with mark(phase="backward"), once, sums:
            mark_line()
            for i, gradient in zip(where, pull(tuple(cotangents)), strict=True):
                gradients[i] = gradient if counts is None else torch.where(counts, gradient, 0)
            return opened.gradients(gradients, reduce)

    return output, pullback, aux


@collective("fz.call", lambda f, *args: held(*args))
def call(f: Callable[..., Any], *args: Any) -> Any:
    """Call `f` with every `State` and `Sharded` in the arguments gathered to full parameters.

    Args:
        f: any function. It sees full parameters in the compute dtype of their policy, as in `vjp`, draws
            from the state's key and runs under the policy's autocast.
        *args: trees, with a `State` or `Sharded` anywhere in them.

    Returns:
        What `f` returns. It shares no memory with the arguments' pieces.

    Raises:
        DonatedError: the memory of an argument was donated.
        MeshError: an argument is of a simulated mesh.

    Example:
        >>> call(lambda w: w + 1, torch.tensor(1.0))
        tensor(2.)
    """
    opened = Opened.of(args)
    leaves = opened.leaves()
    with opened.context(leaves), masks_cast():
        result = f(*opened.close(leaves))
    flat, treedef = tree.flatten(result)
    return tree.unflatten(treedef, _own(flat, leaves))


def check_cotangent(output: Any, cotangent: Any) -> list[Tensor]:
    """Return the cotangents of the floating-point outputs, in order. Raise if one does not match its output."""
    expected = tree.leaves(output, none_is_leaf=True)

    def fits(out: Any, bar: Any) -> bool:
        if is_float(out):
            return isinstance(bar, Tensor) and (bar.shape, bar.dtype, bar.device) == (out.shape, out.dtype, out.device)
        return bar is None or tree.describe(out) == tree.describe(bar)

    lines = tree.differences(output, cotangent, same=fits)
    if lines:
        listing = "\n  ".join(lines)
        raise CotangentError(
            f"pullback: the cotangent does not match the output:\n  {listing}\n"
            f"Pass a tree like the output, each tensor of the same shape, dtype and device."
        )
    given = tree.leaves(cotangent, none_is_leaf=True)
    return [bar for out, bar in zip(expected, given, strict=True) if is_float(out)]


def _called(f: Callable[..., Any]) -> str:
    """Return a function's name, and where it stands."""
    original = inspect.unwrap(f)
    code = getattr(original, "__code__", None)
    place = "" if code is None else f" ({code.co_filename}:{code.co_firstlineno})"
    return f"{getattr(original, '__qualname__', type(original).__name__)}{place}"


def _is_tracked(x: Any) -> bool:
    """Whether a transform outside of this one, or autograd, may differentiate what is made of `x`."""
    return isinstance(x, Tensor) and (is_functorch_wrapped(x) or x.requires_grad)


def held_by(arguments: Sequence[Any], positions: Sequence[int]) -> list[str]:
    """Return what the collectives of a gradient depend on."""
    lines = held(*arguments)
    return [*lines, f"gradients of {positions}"] if lines else []


def abstract(leaf: Any) -> Any:
    """Return what a leaf looks like, so that a pullback need not keep the output itself."""
    return (
        torch.empty((), dtype=leaf.dtype, device=leaf.device).expand(leaf.shape) if isinstance(leaf, Tensor) else leaf
    )


def _own(results: Sequence[Any], leaves: Sequence[Any]) -> list[Any]:
    """Copy results that are views of gathered leaves: those may be views of a state's own memory."""
    plain = [leaf for leaf in leaves if isinstance(leaf, Tensor) and not is_functorch_wrapped(leaf)]
    storages = {storage_id(leaf) for leaf in plain}

    def aliases(x: Any) -> bool:
        return isinstance(x, Tensor) and not is_functorch_wrapped(x) and storage_id(x) in storages

    return [x.clone() if aliases(x) else x for x in results]


def refuse_dynamo(call_name: str) -> None:
    """Raise inside `torch.compile`."""
    if under_dynamo():
        raise RuntimeError(
            f"{call_name} inside torch.compile would silently lose gradients of custom backward functions. "
            f"Use fz.jit around the step instead of torch.compile."
        )
