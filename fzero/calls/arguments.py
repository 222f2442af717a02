"""Whether an argument is what a call takes: numbers in their range, names that there are.

Checked where the argument is given, so that the error stands at the line that is wrong. `call` is that of the message,
such as "fz.adamw".
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from numbers import Integral, Real
from typing import Any, TypeVar, cast

from torch import Tensor, nn

from fzero import tree
from fzero.calls.nearest import nearest

C = TypeVar("C", bound=Callable[..., Any])

# What users of torch call things that have another name here,
_RENAMED = {
    "betas": "b1, b2",
    "learning_rate": "lr",
    "max_norm": "limit",
    "warmup_steps": "warmup",
    "num_warmup_steps": "warmup",
    "total_steps": "total",
    "num_training_steps": "total",
    "T_max": "total",
    "decay_steps": "decay",
    "eta_min": "floor",
    "stage": "layout=fz.zero(stage)",
    "dtype": "policy, such as policy='bf16'",
    "precision": "policy, such as policy='bf16'",
}
# or none.
_ABSENT = {
    "params": "An optimizer here is given no parameters: fz.init(params, optimizer) brings them together.",
    "amsgrad": "There is no such variant here.",
    "maximize": "Negate the loss.",
    "momentum": "b1 is the decay of the momentum here, or use fz.sgd(lr, momentum).",
    "nesterov": "Only fz.sgd and fz.muon look ahead.",
    "foreach": "Each leaf is one fused update anyway.",
    "fused": "Each leaf is one fused update anyway.",
    "max_grad_norm": "A clip stands before the optimizer: fz.chain(fz.clip_by_global_norm(limit), optimizer).",
    "norm_type": "Clips are by the 2-norm.",
    "dampening": "The velocity takes the whole gradient.",
}


def number(
    call: str,
    name: str,
    value: Any,
    *,
    above: float | None = None,
    least: float | None = None,
    below: float | None = None,
    most: float | None = None,
    finite: bool = True,
    hint: str = "",
) -> Any:
    """Return a number that is in its range.

    Args:
        call: for the message.
        name: of the argument.
        value: what came.
        above, least, below, most: its bounds.
        finite: whether it has to be.
        hint: the way out, a sentence.

    Raises:
        TypeError: it is no number.
        ValueError: it is out of range.

    Example:
        >>> number("fz.f", "b1", 1.0, least=0, below=1)
        Traceback (most recent call last):
        ValueError: fz.f: b1: expected a number of at least 0 and below 1, got 1.0.
    """
    bounds = (
        ("of at least", least),
        ("above", above),
        ("at most" if least is None else "of at most", most),
        ("below", below),
    )
    words = " and ".join(f"{word} {bound:g}" for word, bound in bounds if bound is not None)
    expected = f"a {'finite ' if finite and not words else ''}number{f' {words}' if words else ''}"
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(_text(call, name, expected, value, hint))
    x = float(value)
    if (
        math.isnan(x)
        or (finite and math.isinf(x))
        or (least is not None and x < least)
        or (above is not None and x <= above)
        or (most is not None and x > most)
        or (below is not None and x >= below)
    ):
        raise ValueError(_text(call, name, expected, value, hint))
    return value


def whole(call: str, name: str, value: Any, *, least: int, most: int | None = None, hint: str = "") -> Any:
    """Return a whole number that is in its range; `1e4` is one.

    Raises:
        TypeError: it is no whole number.
        ValueError: it is out of range.

    Example:
        >>> whole("fz.f", "steps", 0, least=1)
        Traceback (most recent call last):
        ValueError: fz.f: steps: expected a whole number of at least 1, got 0.
    """
    limit = "" if most is None else f" and at most {most}"
    expected = f"a whole number of at least {least}{limit}"
    is_whole = isinstance(value, Integral) or (isinstance(value, float) and value.is_integer())
    if not is_whole or isinstance(value, bool):
        raise TypeError(_text(call, name, expected, value, hint))
    if value < least or (most is not None and value > most):
        raise ValueError(_text(call, name, expected, value, hint))
    return value


def flag(call: str, name: str, value: Any, hint: str = "") -> bool:
    """Return a truth value."""
    if not isinstance(value, bool):
        raise TypeError(_text(call, name, "True or False", value, hint))
    return value


def rate_of(call: str, value: Any, *, name: str = "lr") -> Any:
    """Return a learning rate: a number that is not negative, a tensor of shape (), or a function of the step.

    Raises:
        TypeError: it is something else.
        ValueError: it is negative, or not finite.
    """
    if isinstance(value, Tensor):
        if value.ndim or not value.is_floating_point():
            raise TypeError(_text(call, name, "a number, or a floating-point tensor of shape ()", value, ""))
        return value
    if isinstance(value, Real):
        return number(call, name, value, least=0.0)
    if not callable(value) or isinstance(value, nn.Module | type):
        hint = "A schedule is one: fz.schedules.warmup_cosine(3e-4, warmup=100, total=10_000)."
        raise TypeError(
            _text(call, name, "a number, or a function of the step", value, _no_params(value, call) or hint)
        )
    return value


def named(call: str) -> Callable[[C], C]:
    """Return a decorator of a public function, or class: arguments that it does not take are told with near names.

    Example:
        >>> @named("fz.f")
        ... def f(b1, b2): ...
        >>> f(betas=(0.9, 0.99))
        Traceback (most recent call last):
        TypeError: fz.f: there is no argument 'betas'; here it is b1, b2. It takes (b1, b2).
    """

    def decorate(f: C) -> C:
        target: Any = vars(f)["__init__"] if isinstance(f, type) else f
        signature = inspect.signature(target)
        takes = [p for p in signature.parameters.values() if p.name != "self"]
        listing = f"({', '.join(str(p).partition(':')[0] + _default(p) for p in takes)})"
        is_open = any(p.kind is p.VAR_KEYWORD for p in takes)

        @functools.wraps(target)
        def checked(*args: Any, **kwargs: Any) -> Any:
            names = [p.name for p in takes]
            for name in () if is_open else kwargs:
                if name not in names:
                    raise TypeError(f"{call}: there is no argument {name!r}{_instead(name, names)} It takes {listing}.")
            try:
                signature.bind(*args, **kwargs)
            except TypeError as error:
                hint = next((hint for x in args if (hint := _no_params(x, call))), "")
                raise TypeError(f"{call}: {error}. It takes {listing}.{f' {hint}' if hint else ''}") from None
            return target(*args, **kwargs)

        if not isinstance(f, type):
            return cast(C, checked)
        f.__init__ = checked  # type: ignore[misc]
        return f

    return decorate


def _instead(name: str, names: list[str]) -> str:
    if name in _RENAMED:
        return f"; here it is {_RENAMED[name]}."
    return f". {_ABSENT[name]}" if name in _ABSENT else f".{nearest(name, names)}"


def _no_params(value: Any, call: str) -> str:
    """Return a hint where an optimizer was given a model or its parameters, as torch's are."""
    if isinstance(value, nn.Module | list | tuple | Mapping) or inspect.isgenerator(value):
        return f"An optimizer here is given no parameters: fz.init(model, {call}(3e-4)) brings them together."
    return ""


def _default(parameter: inspect.Parameter) -> str:
    return "" if parameter.default is parameter.empty else f"={parameter.default!r}"


def _text(call: str, name: str, expected: str, value: Any, hint: str) -> str:
    return f"{call}: {name}: expected {expected}, got {tree.describe(value)}.{f' {hint}' if hint else ''}"
