"""Library random operations drawn from a key.

Dropout and its like draw from a hidden global generator. Inside `keyed` a dispatch mode answers them instead:
the n-th random operation of a call draws from (key, n). The mode sits below `torch.func` transforms and
above tracing, so an eager call, its trace and a recomputation draw the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fzero._torch import dispatch_modes, unwrapped
from fzero.errors import RandomOpError
from fzero.random import bits, fold, normal, signed, uniform
from fzero.tree import describe
from fzero.wide_sums import Summing

aten = torch.ops.aten


def keyed(f: Callable[..., Any]) -> Callable[..., Any]:
    """Return `g(key, *args)`, equal to `f(*args)` with its random operations drawn from `key`.

    Args:
        f: any function. Each random operation that it runs counts one further; a function that runs the
            same operations in the same order draws the same numbers.

    Returns:
        `g(key, *args, **kwargs)`. `key` is an integer, or an integer tensor of shape (), taken modulo 2^32.

    Raises:
        RandomOpError: from `g`, at a random operation that cannot be drawn from a key.

    Example:
        >>> drop = keyed(lambda x: torch.nn.functional.dropout(x, 0.5))
        >>> bool((drop(7, torch.ones(8)) == drop(7, torch.ones(8))).all())
        True
    """

    def g(key: int | Tensor, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(key, Tensor):
            key = torch.tensor(signed(key), dtype=torch.int32)
        if key.ndim or key.is_floating_point() or key.is_complex():
            raise TypeError(f"fz.keyed: the key must be an integer of shape (), got {describe(key)}.")
        with drawing_from(key):
            return f(*args, **kwargs)

    return g


class drawing_from(Summing):  # noqa: N801 - used as a context manager, `with drawing_from(key):`
    """While active, answers random operations with draws from `key`, counting from `count`.

    The others it answers as `fzero.wide_sums` does: one mode costs an eager operation half of what two would.

    A key that `vmap` batches is one for each member of the batch. `vmap` then wants `randomness="different"`, and hands
    over the draws of all members as one operation, whose first dimension they are: each is drawn from its own key.
    """

    def __init__(self, key: Tensor, count: int = 0):
        super().__init__()
        self.key = unwrapped(key.to(torch.int32))  # the mode runs below torch.func, where wrappers have no storage
        self.count = count

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        draw = _DRAWS.get(func)
        if draw is not None:
            words = torch.arange(2, dtype=torch.int32, device=self.key.device)
            keys = fold(fold(self.key, self.count)[..., None], words)
            self.count += 1
            return _drawn(func, draw, keys, args, kwargs or {})
        if draws(func, args, kwargs or {}):
            raise RandomOpError(
                f"fz.keyed: {func} cannot be drawn from a key. Keyed are dropout, bernoulli, uniform, normal, "
                f"rand, randn, randint, exponential and randperm. Draw the rest outside and pass it in as an argument."
            )
        return super().__torch_dispatch__(func, types, args, kwargs)


def _drawn(func: Any, draw: Callable[..., Any], keys: Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Draw from the key words (2,), or member by member from those of each (n, ..., 2)."""
    if keys.ndim == 1:
        return draw(keys, *args, **kwargs)
    members = [
        _drawn(func, draw, of_member, [_member(x, i, len(keys), func) for x in args], kwargs)
        for i, of_member in enumerate(keys.unbind())
    ]
    if func._schema.is_mutable:  # they were written into views
        return args[0]
    return (
        tuple(map(torch.stack, zip(*members, strict=True))) if isinstance(members[0], tuple) else torch.stack(members)
    )


def _member(argument: Any, index: int, count: int, func: Any) -> Any:
    """Return what a member of a batch sees of an argument whose first dimension are the members."""
    shape = argument.shape if isinstance(argument, Tensor) else argument
    if not isinstance(shape, Sequence) or (isinstance(argument, Tensor) and argument.ndim == 0):
        return argument
    if not len(shape) or shape[0] != count:
        raise RandomOpError(
            f"fz.keyed: the key has {count} members, batched by vmap, and {func} draws for {tuple(shape)}: one draw "
            f"for all of them. Pass randomness='different' to vmap."
        )
    return argument[index] if isinstance(argument, Tensor) else argument[1:]


def current_draw() -> tuple[Tensor, int] | None:
    """Return the key and the count that the next random operation would draw from, `None` outside `keyed`."""
    for mode in reversed(dispatch_modes()):
        if isinstance(mode, drawing_from):
            return mode.key, mode.count
    return None


def draws(func: Any, args: Any, kwargs: Any) -> bool:
    """Return whether this call of an operator draws random numbers.

    Attention kernels are marked random whatever their dropout is; at a dropout of zero they draw nothing.
    """
    if torch.Tag.nondeterministic_seeded not in getattr(func, "tags", ()):
        return False
    for position, argument in enumerate(func._schema.arguments):
        if argument.name in ("dropout_p", "p", "dropout") and "attention" in func._schema.name:
            given = args[position] if position < len(args) else kwargs.get(argument.name, argument.default_value)
            return bool(given)
    return True


def _fresh(size: Any, dtype: torch.dtype | None, device: Any, keys: Tensor, draw: Callable[..., Tensor]) -> Tensor:
    return draw(keys, 0, math.prod(size)).to(device=device, dtype=dtype or torch.get_default_dtype()).reshape(size)


def _like(x: Tensor, keys: Tensor, draw: Callable[..., Tensor], dtype: torch.dtype | None = None) -> Tensor:
    return draw(keys, 0, x.numel()).to(x.device).reshape(x.shape).to(dtype or x.dtype)


def _coin(keys: Tensor, x: Tensor, p: float | Tensor) -> Tensor:
    return (uniform(keys, 0, x.numel()).to(x.device).reshape(x.shape) < p).to(x.dtype)


def _native_dropout(keys: Tensor, x: Tensor, p: float, train: bool | None) -> tuple[Tensor, Tensor]:
    if train is False or p == 0.0:
        return x.clone(), torch.ones_like(x, dtype=torch.bool)
    kept = uniform(keys, 0, x.numel()).to(x.device).reshape(x.shape) >= p
    return x * kept * (0.0 if p == 1.0 else 1.0 / (1.0 - p)), kept


def _integers(keys: Tensor, offset: int, n: int, low: int, high: int) -> Tensor:
    return low + (bits(keys, offset, n).to(torch.int64) & 0xFFFFFFFF) % (high - low)


def _randint(
    keys: Tensor, low: int, high: int, size: Any, *, dtype: Any = None, device: Any = None, **_: Any
) -> Tensor:
    return _integers(keys, 0, math.prod(size), low, high).to(device=device, dtype=dtype or torch.int64).reshape(size)


def _random_(keys: Tensor, x: Tensor, low: int, high: int) -> Tensor:
    return x.copy_(_integers(keys, 0, x.numel(), low, high).reshape(x.shape))


def _exponential_(keys: Tensor, x: Tensor, rate: float = 1.0, **_: Any) -> Tensor:
    unit = _like(x, keys, uniform, torch.float32).clamp(min=2.0**-25)  # a draw of 0 would be log(0) for a Gumbel
    return x.copy_(-torch.log1p(-unit) / rate)


# Each takes the key words (2,), then the operator's own arguments.
_DRAWS: dict[Any, Callable[..., Any]] = {
    aten.bernoulli.default: lambda k, p, **_: _coin(k, p, p),
    aten.bernoulli.p: lambda k, x, p, **_: _coin(k, x, p),
    aten.bernoulli_.float: lambda k, x, p=0.5, **_: x.copy_(_coin(k, x, p)),
    aten.bernoulli_.Tensor: lambda k, x, p, **_: x.copy_(_coin(k, x, p)),
    aten.native_dropout.default: _native_dropout,
    aten.rand.default: lambda k, size, dtype=None, device=None, **_: _fresh(size, dtype, device, k, uniform),
    aten.randn.default: lambda k, size, dtype=None, device=None, **_: _fresh(size, dtype, device, k, normal),
    aten.rand_like.default: lambda k, x, dtype=None, **_: _like(x, k, uniform, dtype),
    aten.randn_like.default: lambda k, x, dtype=None, **_: _like(x, k, normal, dtype),
    aten.uniform_.default: lambda k, x, a=0.0, b=1.0, **_: x.copy_(_like(x, k, uniform, torch.float32) * (b - a) + a),
    aten.normal_.default: lambda k, x, mean=0.0, std=1.0, **_: x.copy_(_like(x, k, normal, torch.float32) * std + mean),
    aten.normal.float_Tensor: lambda k, mean, std, **_: mean + std * _like(std, k, normal),
    aten.normal.Tensor_float: lambda k, mean, std=1.0, **_: mean + std * _like(mean, k, normal),
    aten.normal.Tensor_Tensor: lambda k, mean, std, **_: mean + std * _like(mean, k, normal),
    aten.normal.float_float: lambda k, mean, std, size, dtype=None, device=None, **_: (
        mean + std * _fresh(size, dtype, device, k, normal)
    ),
    aten.exponential_.default: _exponential_,
    aten.randint.default: lambda k, high, size, **kw: _randint(k, 0, high, size, **kw),
    aten.randint.low: lambda k, low, high, size, **kw: _randint(k, low, high, size, **kw),
    aten.randint_like.default: lambda k, x, high, dtype=None, **_: _like(
        x, k, lambda k, o, n: _integers(k, o, n, 0, high), dtype
    ),
    aten.randint_like.low_dtype: lambda k, x, low, high, dtype=None, **_: _like(
        x, k, lambda k, o, n: _integers(k, o, n, low, high), dtype
    ),
    aten.random_.to: lambda k, x, high, **_: _random_(k, x, 0, high),
    getattr(aten.random_, "from"): lambda k, x, low, high, **_: _random_(k, x, low, high),
    aten.randperm.default: lambda k, n, dtype=torch.int64, device=None, **_: (
        bits(k, 0, n).argsort(stable=True).to(device=device, dtype=dtype)
    ),
}
