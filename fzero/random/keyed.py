"""Library random operations drawn from a key.

Dropout and its like draw from a hidden global generator. Inside `keyed` a dispatch mode answers them instead:
the n-th random operation of a call draws from (key, n). The mode sits below `torch.func` transforms and
above tracing, so an eager call, its trace and a recomputation draw the same numbers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from fzero import tree
from fzero._torch import OpOverload, dispatch_modes, trunc_normal_replaced
from fzero.errors import RandomOpError
from fzero.operators import draws, written
from fzero.precision.wide_sums import Summing
from fzero.random.bits import fold, signed
from fzero.random.distributions import DRAWS
from fzero.random.draws import REFUSED, drawn, named, truncated_normal_
from fzero.wrapped import unwrapped


def keyed(f: Callable[..., Any]) -> Callable[..., Any]:
    """Return `g(key, *args)`, equal to `f(*args)` with its random operations drawn from `key`.

    The key that was given last is the one to draw from: a `keyed` inside another draws from its own. A `State` that is
    opened inside, by `fz.call` or a gradient, has a key by itself, of its seed, step and rank; it is folded with that
    of the `keyed` around, so that two calls with two keys draw differently.

    Args:
        f: any function. Each random operation that it runs counts one further, and so does each state that it
            opens; a function that runs the same operations in the same order draws the same numbers.

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
            # Where the arguments are: a copy to there would wait for the device, and no CUDA graph records it.
            device = next((x.device for x in tree.leaves((args, kwargs)) if isinstance(x, Tensor)), None)
            key = torch.full((), signed(key), dtype=torch.int32, device=device)
        if key.ndim or key.is_floating_point() or key.is_complex():
            raise TypeError(f"fz.keyed: the key must be an integer of shape (), got {tree.describe(key)}.")
        with drawing_from(key):
            return f(*args, **kwargs)

    return g


@dataclass(frozen=True)
class _Above:
    """The `keyed` around a state's own scope: from the first draw on, the state's key is folded with that one's."""

    scope: drawing_from
    key: Tensor
    ordinal: int

    def fold_into(self, key: Tensor) -> Tensor:
        return fold(key, fold(self.key, self.ordinal))


class drawing_from(Summing):  # noqa: N801 - used as a context manager, `with drawing_from(key):`
    """While active, answers random operations with draws from `key`, counting from `count`.

    All other operations it answers as `fzero.precision.wide_sums` does, in whose place it stands: each mode costs every
    eager operation, and so there is one and not two.

    A key that `vmap` batches is one for each member: `vmap(f, randomness="different")(keys)`. `vmap` then asks for the
    draws of all members as one operation of shape (members, ...), and each member's are drawn from its own key.

    Attributes:
        count: of the next draw, and of the next state that is opened inside.
        used: how many draws depended on the key.
    """

    def __init__(self, key: Tensor, count: int = 0, *, above: _Above | None = None, is_default: bool = False):
        super().__init__()
        self.key = unwrapped(key.to(torch.int32))  # the mode runs below torch.func, where wrappers have no storage
        self.count = count
        self.used = 0
        self.is_default = is_default  # the key of a state, not one that was given to `keyed`
        self._above = above
        self._pending = is_default and above is not None
        self._replaced = contextlib.ExitStack()

    def __enter__(self) -> Self:
        self._replaced.enter_context(trunc_normal_replaced(truncated_normal_))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._replaced.close()

    def copy(self) -> drawing_from:
        """Return a scope that draws what this one would draw from here on."""
        copy = drawing_from(self.key, self.count, above=self._above, is_default=self.is_default)
        copy._pending, copy.low = self._pending, self.low
        return copy

    def above_state(self) -> _Above | None:
        """Return what the key of a state that is opened here is folded with. Each state that is opened gets another."""
        if self.is_default:
            return self._above
        self.count += 1
        return _Above(self, self.key, self.count - 1)

    def of_microbatches(self) -> tuple[list[Tensor], Callable[[Tensor, Sequence[Tensor]], drawing_from]]:
        """Return key tensors, and a function `(index, keys)` that gives the scope of a micro-batch.

        The draws of each are its own, whether the micro-batches run one after another or as one traced body.
        """
        tensors = [fold(self.key, self.count)]
        self.count += 1
        if self.is_default and self._above is not None:
            tensors.append(fold(self._above.key, self._above.ordinal))

        def scope(index: Tensor, given: Sequence[Tensor]) -> drawing_from:
            keys = [fold(key, index) for key in given]
            above = _Above(self, keys[1], 0) if len(keys) > 1 else _Above(self, keys[0], 0)
            made = drawing_from(keys[0], above=above, is_default=self.is_default)
            made._pending, made.low = len(keys) > 1, self.low
            return made

        return tensors, scope

    def _mark(self) -> None:
        self.used += 1
        if self._above is not None:
            self._above.scope._mark()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, OpOverload) and draws(func, args, kwargs):
            check_can_be_keyed("fz.keyed", func, args, kwargs)
            if self._pending and self._above is not None:
                self.key, self._pending = self._above.fold_into(self.key), False
            self._mark()
            words = torch.arange(2, dtype=torch.int32, device=self.key.device)
            keys = fold(fold(self.key, self.count)[..., None], words)
            self.count += 1
            return _drawn(func, keys, args, kwargs)
        return super().__torch_dispatch__(func, types, args, kwargs)


def drawing_of_state(key: Tensor) -> drawing_from:
    """Return the scope of a state's own key, folded with that of the `keyed` around it, if there is one."""
    around = current_draw()
    return drawing_from(key, above=None if around is None else around.above_state(), is_default=True)


def _drawn(func: OpOverload, keys: Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Draw from the key words (2,), or member by member from those of each (n, ..., 2)."""
    if keys.ndim == 1:
        return drawn(func, keys, args, kwargs)
    members = [
        _drawn(func, of_member, [_member(x, i, len(keys), func) for x in args], kwargs)
        for i, of_member in enumerate(keys.unbind())
    ]
    if written(func, args, kwargs):  # into views, member by member
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


def check_can_be_keyed(call: str, func: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Raise for a random operation that no key can answer, naming the way out."""
    if any(isinstance(x, torch.Generator) for x in (*args, *kwargs.values())):
        raise RandomOpError(
            f"{call}: {func} is given a torch.Generator, whose state would change behind the function's back. Leave "
            f"generator= out and give the function a key instead: fz.keyed(f)(key, ...)."
        )
    if named(func) not in DRAWS:
        way = REFUSED.get(named(func), "Draw it outside and pass it in as an argument")
        raise RandomOpError(f"{call}: {func} cannot be drawn from a key. {way}.")


def current_draw() -> drawing_from | None:
    """Return the scope that the next random operation would draw from, `None` outside of `keyed`."""
    return next((mode for mode in reversed(dispatch_modes()) if isinstance(mode, drawing_from)), None)
