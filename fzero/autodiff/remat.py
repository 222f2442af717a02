"""Recomputation: a function that keeps only its arguments and runs again for its backward.

    forward    x → f → y                    saves x
    backward   x → f → (y), pullback(ȳ) → x̄

It is an `autograd.Function` whose backward takes the vjp of `f` again, so it composes with any
transform, eager and traced. A gather inside `f` is repeated with it: that is ZeRO-3's re-gather.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from types import CellType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from fzero import tree
from fzero._torch import is_functorch_wrapped, unwrap_if_dead
from fzero.autodiff.open import is_float
from fzero.errors import TraceError
from fzero.modules.attention_masks import masks_cast
from fzero.precision.autocast import autocast_here, under_autocast
from fzero.random.keyed import current_draw
from fzero.wrapped import functorch_level


def remat(f: Callable[..., Any], policy: None = None) -> Callable[..., Any]:
    """Return a function equal to `f` whose backward recomputes it instead of keeping what is inside.

    Args:
        f: a pure function of trees, or an `nn.Module`, whose parameters and buffers then count as arguments;
            so do those of modules that `f` closes over or is a method of.
        policy: `None`: keep nothing but the arguments.

    Returns:
        A function with the signature of `f`. It draws the same random numbers again under `fz.keyed`.

    Raises:
        TraceError: from the call, if `f` reaches a tensor that is being differentiated without taking it as
            an argument: its gradient would be lost.

    Source: sublinear memory cost, Chen et al. 2016, arXiv 1604.06174.

    Example:
        >>> block = remat(lambda w, x: torch.tanh(x @ w))
        >>> torch.func.grad(lambda w: block(w, torch.ones(2, 3)).sum())(torch.zeros(3, 4)).shape
        torch.Size([3, 4])
    """
    if policy is not None:
        raise ValueError(f"fz.remat: policy={policy!r} is not known. Pass None: recompute everything inside f.")

    def recomputed(*args: Any, **kwargs: Any) -> Any:
        holder = _Holder(f)
        state = {**dict(holder.named_parameters()), **dict(holder.named_buffers())}
        leaves, treedef = tree.flatten((state, args, kwargs))
        where = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        structure: list[tree.TreeDef] = []
        ambient = _ambient()

        def on_tensors(*tensors: Tensor) -> tuple[Any, ...]:
            filled = list(leaves)
            for i, tensor in zip(where, tensors, strict=True):
                filled[i] = tensor
            held, f_args, f_kwargs = tree.unflatten(treedef, filled)
            with ambient():
                result = torch.func.functional_call(holder, held, f_args, f_kwargs)
            out, out_treedef = tree.flatten(result)
            structure[:] = [out_treedef]
            return tuple(out)

        out = _Remat.apply(on_tensors, *(leaves[i] for i in where))
        return tree.unflatten(structure[0], out)

    return recomputed


class _Remat(torch.autograd.Function):
    @staticmethod
    def forward(run: Callable[..., tuple[Any, ...]], *tensors: Tensor) -> tuple[Any, ...]:
        with _NoCaptures(tensors):
            return run(*tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        ctx.run, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        ctx.mark_non_differentiable(*(x for x in output if isinstance(x, Tensor) and not is_float(x)))

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> tuple[Any, ...]:
        # A pullback runs after its transform has ended. Torch can still use a tensor that one ended transform wraps. In
        # a recomputation within another, and in a second derivative, two wrap it: so one wrapper is taken off here.
        tensors = [unwrap_if_dead(tensor) for tensor in ctx.saved_tensors]
        # The first of `needs_input_grad` is that of `run`. Frozen tensors, and inputs without a gradient, are left out.
        where = [i for i, needed in enumerate(ctx.needs_input_grad[1:]) if needed and is_float(tensors[i])]

        def on_floats(*floats: Tensor) -> tuple[Tensor, ...]:
            return tuple(x for x in ctx.run(*_filled(tensors, where, floats)) if is_float(x))

        outputs, pullback, *_ = torch.func.vjp(on_floats, *(tensors[i] for i in where))
        kept = [c for c in cotangents if is_float(c)]
        assert len(kept) == len(outputs), "one cotangent for each floating-point output"
        return (None, *_filled([None] * len(tensors), where, pullback(tuple(kept))))

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Any) -> tuple[Any, ...]:
        tensors = ctx.saved_tensors
        where = [i for i, tangent in enumerate(tangents) if tangent is not None and is_float(tensors[i])]
        floating: list[bool] = []

        def on_floats(*floats: Tensor) -> tuple[Tensor, ...]:
            outputs = ctx.run(*_filled(tensors, where, floats))
            floating[:] = [is_float(x) for x in outputs]
            return tuple(x for x in outputs if is_float(x))

        result: Any = torch.func.jvp(on_floats, tuple(tensors[i] for i in where), tuple(tangents[i] for i in where))
        rest = iter(result[1])
        return tuple(next(rest) if is_one else None for is_one in floating)


class _Holder(nn.Module):
    """Holds a function together with the modules that it reaches, so that their tensors can be arguments."""

    def __init__(self, f: Callable[..., Any]):
        super().__init__()
        cells = _cell_contents(f)
        if cells:
            # The backward runs f later: a loop variable that f closes over must still be what it is now.
            f = _with_cells(f, cells)
        self._call = (f,)  # in a tuple, so that a module is registered once, below
        reached = [f, getattr(f, "__self__", None), *cells]
        self.modules_ = nn.ModuleList(m for m in reached if isinstance(m, nn.Module))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._call[0](*args, **kwargs)


def _with_cells(f: Callable[..., Any], contents: Sequence[Any]) -> Callable[..., Any]:
    assert isinstance(f, FunctionType)
    copy = FunctionType(f.__code__, f.__globals__, f.__name__, f.__defaults__, tuple(CellType(c) for c in contents))
    copy.__kwdefaults__ = f.__kwdefaults__
    return copy


def _cell_contents(f: Callable[..., Any]) -> list[Any]:
    """Return what a function closes over; nothing for other callables, or while a cell is still empty."""
    cells = f.__closure__ or () if isinstance(f, FunctionType) else ()
    try:
        return [cell.cell_contents for cell in cells]
    except ValueError:
        return []


class _NoCaptures(masks_cast):
    """Raises at a tensor of the transform being differentiated that did not come in as an argument."""

    def __init__(self, arguments: Sequence[Tensor]):
        super().__init__()
        self.level = max((functorch_level(x) for x in arguments), default=0)
        self.arguments = {id(x) for x in arguments}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for x in tree.leaves((args, kwargs)):
            if isinstance(x, Tensor) and self.captured(x):
                raise TraceError(
                    f"fz.remat: the function uses a tensor of shape {tuple(x.shape)} that is being differentiated "
                    f"and is not one of its arguments, so its gradient would be lost. Pass it as an argument."
                )
        return super().__torch_function__(func, types, args, kwargs)

    def captured(self, x: Tensor) -> bool:
        if is_functorch_wrapped(x):
            return functorch_level(x) > self.level
        # Grad mode is off in here, so what is made here requires no gradient.
        return id(x) not in self.arguments and x.requires_grad and not torch.is_grad_enabled()


def _ambient() -> Callable[[], contextlib.AbstractContextManager[None]]:
    """Return a context like the one of the first run: the random draws that come next, autocast, and cast masks."""
    draw = current_draw()
    draw = None if draw is None else draw.copy()
    autocast = autocast_here()
    runs = 0

    @contextlib.contextmanager
    def again() -> Iterator[None]:
        nonlocal runs
        runs += 1
        is_first = runs == 1  # that one is in this context already, under `_NoCaptures`
        drawing = contextlib.nullcontext() if is_first or draw is None else draw.copy()
        with under_autocast(autocast), drawing, contextlib.nullcontext() if is_first else masks_cast():
            yield

    return again


def _filled(values: Sequence[Any], where: Sequence[int], chosen: Sequence[Any]) -> list[Any]:
    filled = list(values)
    for i, value in zip(where, chosen, strict=True):
        filled[i] = value
    return filled
