"""Gradients that a function takes by itself while it is differentiated.

`torch.func.grad` inside of a function nests. `torch.autograd.grad` does so with `create_graph=True`, and without it
returns a constant: whatever is made of that, such as a gradient penalty, has a gradient of zero. A torch-function mode
sees the call and refuses it. The transforms of `torch.func` call it too, and know what they do.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fzero._torch import is_functorch_wrapped
from fzero.errors import ModuleError
from fzero.marks import OWN, TORCH
from fzero.modules.attention_masks import FORMS as MASKS
from fzero.modules.explain import line_here

# What stands on the stack between the mode and who called `torch.autograd.grad`.
_BETWEEN = (OWN, TORCH + "overrides.py", TORCH + "autograd/__init__.py")
_TRANSFORMS = TORCH + "_functorch/"
_NESTED = "Take the gradient inside by torch.func.grad or fz.grad, which nest"


class constants_refused(TorchFunctionMode):  # noqa: N801 - used as a context manager, `with constants_refused():`
    """While active, gradients by `torch.autograd` that the gradient around would take for constants raise.

    It stands around every function that is differentiated, and so does the work of `masks_cast` too.

    Raises:
        ModuleError: from the call.
    """

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        form = _FORMS.get(func)
        return func(*args, **(kwargs or {})) if form is None else form(func, *args, **(kwargs or {}))


def _grad(original: Callable[..., Any], outputs: Any, inputs: Any, *rest: Any, **options: Any) -> Any:
    if not _caller().startswith(_TRANSFORMS):
        _check(inputs, **options)
    return original(outputs, inputs, *rest, **options)


def _backward(*_: Any, **__: Any) -> Any:
    raise ModuleError(
        f"fz.vjp: backward() inside of a function that is differentiated would add to .grad, which no function "
        f"returns. {_NESTED}.\n{line_here()}"
    )


def _check(inputs: Sequence[Any], *, create_graph: bool = False, **_: Any) -> None:
    if not create_graph and torch.is_grad_enabled():
        raise ModuleError(
            f"fz.vjp: torch.autograd.grad without create_graph=True, inside of a function that is differentiated, "
            f"returns a constant: the gradient of what is made of it would be zero. {_NESTED}, or pass "
            f"create_graph=True; where a constant is meant, call it under torch.no_grad().\n{line_here()}"
        )
    if any(isinstance(x, Tensor) and not is_functorch_wrapped(x) for x in inputs):
        raise ModuleError(
            f"fz.vjp: torch.autograd.grad inside of a function that is differentiated was asked for the gradient of "
            f"a tensor that the function does not differentiate by. {_NESTED}, by any of their arguments."
            f"\n{line_here()}"
        )


def _caller() -> str:
    """Return the file of who called `torch.autograd.grad`."""
    frame: Any = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(_BETWEEN):
        frame = frame.f_back
    return "" if frame is None else str(frame.f_code.co_filename)


# The mode costs every operation of the function, so it casts the masks of attention as well.
_FORMS: dict[Any, Callable[..., Any]] = {
    torch.autograd.grad: _grad,
    torch.autograd.backward: _backward,
    Tensor.backward: _backward,
} | MASKS
