"""Donation: giving a tensor's memory away, and telling whoever still holds it.

A donated tensor object becomes a tombstone: its memory is handed on, and the object, which every holder
sees, turns into a class that answers any operation with `DonatedError`.

    leaf ── heir ──▶ inputs ──▶ program          a program empties its inputs when it begins to run
      └─ tombstone                               until then whatever is raised turns it back into the tensor that it was
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from fzero._torch import storage_id
from fzero.errors import DonatedError


class Donated(Tensor):
    """What a tensor is after its memory was donated."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        stack: list[Any] = [args, *(kwargs or {}).values()]
        call = "a call"
        while stack:
            x = stack.pop()
            if isinstance(x, Donated):
                call = x.__dict__.get("donated_to", call)
                break
            if isinstance(x, list | tuple):
                stack.extend(x)
        reader = _reader(func)
        raise DonatedError(
            f"fz: this tensor's memory was donated to {call}, which may have overwritten it"
            f"{f', and {reader} reads it' if reader else ''}. Use what that call returned, or jit without donate=. "
            f"To keep what a call takes, copy it before: a tensor by .clone(), a state by "
            f"fz.tree.map(torch.clone, state)."
        )

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"<donated to {self.__dict__.get('donated_to', 'a call')}>"

    def __format__(self, spec: str) -> str:
        return repr(self)


def _reader(func: Any) -> str:
    """Return the name of an operation that a user has called; nothing for those behind an attribute or a check."""
    name = str(getattr(func, "__name__", ""))
    return "" if name.startswith(("_", "is_")) or (not hasattr(Tensor, name) and not hasattr(torch, name)) else name


class HasPaths(Protocol):
    """The arguments of a call: which of their tensors are donated, and where each stands."""

    donated: frozenset[int]

    @property
    def paths(self) -> list[str]:
        """The path of each tensor in the arguments, such as `0.params.w`."""


def check_distinct(leaves: Sequence[Tensor], arguments: HasPaths, call: str) -> None:
    """Raise if memory that is to be donated is reached twice.

    Raises:
        ValueError: a donated tensor shares its memory with another argument.
    """
    storages = [storage_id(leaf) for leaf in leaves]
    if len(set(storages)) == len(storages):
        return  # the usual case, and this is done at every call
    owner = {storages[i]: i for i in sorted(arguments.donated, reverse=True) if leaves[i].numel()}
    for i, leaf in enumerate(leaves):
        first = owner.get(storages[i]) if leaf.numel() else None
        if first is not None and first != i:
            paths = arguments.paths  # only now: they take time to spell
            raise ValueError(
                f"{call}: {paths[first]!r} is donated, and {paths[i]!r} is the same memory. "
                f"Pass a copy (.clone()) of one of them, or do not donate."
            )


def run_donating(
    run: Callable[[list[Tensor]], Any], leaves: Sequence[Tensor], donated: Collection[int], call: str
) -> Any:
    """Return `run(inputs)`, where the memory of donated leaves goes to the inputs.

    Args:
        run: a program. It empties its inputs before it does anything else.
        leaves: the tensors of a call's arguments.
        donated: positions of those to donate. They turn into tombstones that name `call`: all of them, or, if
            anything is raised before the program has emptied its inputs, none.
        call: what runs.
    """
    kinds = {i: type(leaves[i]) for i in donated}
    inputs = list(leaves)
    try:
        with torch.no_grad():
            for i in donated:
                inputs[i] = leaves[i].detach()
                _bury(leaves[i], call)
        return run(inputs)
    except BaseException as error:
        if inputs:
            with torch.no_grad():
                for i, kind in kinds.items():
                    _revive(leaves[i], inputs[i], kind)
        elif donated:
            error.add_note(f"{call} was running, so the arguments that were donated to it are gone.")
        raise


def _bury(leaf: Tensor, call: str) -> None:
    leaf.__dict__["donated_to"] = call
    leaf.set_()  # type: ignore[call-overload]
    leaf.__class__ = Donated


def _revive(leaf: Tensor, heir: Tensor, kind: type[Tensor]) -> None:
    """Undo `_bury`, however far it has come."""
    leaf.__class__ = kind
    leaf.__dict__.pop("donated_to", None)
    leaf.set_(heir)  # type: ignore[call-overload]
