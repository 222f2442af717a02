"""The arguments of a call, as what is split into micro-batches and what every one of them gets whole.

(state, {"x": rows, "scale": number}, teacher)   ──▶   whole: state, number, teacher      split: rows
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from fzero import tree
from fzero.errors import BatchError
from fzero.nodes import held_tensors
from fzero.sharding.sharded import Sharded


@runtime_checkable
class HasMicrobatches(Protocol):
    """An argument whose random draws differ between micro-batches."""

    def for_microbatch(self, index: Tensor) -> Any:
        """Return the argument as the micro-batch of this index sees it: int32 of shape ()."""


@dataclass(frozen=True)
class Batch:
    """Arguments without their tensors, and the tensors that were in them.

    Attributes:
        hollow: a list of all arguments, positional ones first; tensors to be split are picked.
        names: of the arguments that were passed by name, which come last in it.
        split: tensors that are split along dimension 0, in order.
        whole: the others.
        counted: positions in the list of the arguments that hold something to split; of all that might, if none does.
    """

    hollow: tree.Hollow
    names: tuple[str, ...]
    split: list[Tensor]
    whole: list[Tensor]
    counted: tuple[int, ...]

    @staticmethod
    def of(
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        n: int,
        differentiated: Sequence[int],
        whole: Sequence[int | str],
        parameters: Sequence[str],
    ) -> Batch:
        """Look at the arguments of a call.

        Args:
            args: the positional ones.
            kwargs: those by name.
            n: the number of micro-batches.
            differentiated: positions of arguments that are differentiated.
            whole: positions and names of others that go whole.
            parameters: what the function calls its positional arguments, as far as that is known.
        """
        arguments: list[Any] = [*args, *kwargs.values()]
        keys: list[int | str] = [*range(len(args)), *kwargs]
        wanted = {parameters.index(name) if name in parameters[: len(args)] else name for name in whole}
        if missing := sorted(map(repr, wanted - set(keys))):
            raise BatchError(
                f"fz.accumulate: whole= names {missing[0]}, and the call has the arguments {keys}. Name one of these."
            )
        is_split = [
            key not in wanted and key not in differentiated and not _is_whole(argument)
            for key, argument in zip(keys, arguments, strict=True)
        ]
        leaves, treedef = tree.flatten(arguments)
        slots: list[Any] = []
        counted: list[int] = []
        paths = iter(tree.structure_paths(treedef))
        rest = iter(leaves)
        for at, (key, child) in enumerate(zip(keys, treedef.children(), strict=True)):
            for _ in range(child.num_leaves):
                leaf, path = next(rest), next(paths)
                if is_split[at]:
                    _check(leaf, key, path, n)
                picked = is_split[at] and isinstance(leaf, Tensor) and leaf.ndim > 0
                slots.append(tree.PICKED if picked else tree.OTHER if isinstance(leaf, Tensor) else leaf)
                counted += [at] if picked and at not in counted else []
        if any(is_split) and not counted and n > 1:
            at = is_split.index(True)
            raise BatchError(
                f"fz.accumulate: nothing can be split into {n} micro-batches: {_where(keys[at], str(at))} is "
                f"{tree.describe(arguments[at])}, and no argument has a tensor with a dimension to split. Pass the "
                f"batch as tensors with rows; name what every micro-batch is to see in whole=."
            )
        counted = counted or [at for at, cut in enumerate(is_split) if cut]
        split = [leaf for leaf, slot in zip(leaves, slots, strict=True) if slot is tree.PICKED]
        others = [leaf for leaf, slot in zip(leaves, slots, strict=True) if slot is tree.OTHER]
        return Batch(tree.Hollow(treedef, tuple(slots)), tuple(kwargs), split, others, tuple(counted))

    def arguments(self, whole: Sequence[Tensor], parts: Sequence[Tensor]) -> tuple[list[Any], dict[str, Any]]:
        """Return the arguments of one micro-batch, positional ones and those by name."""
        filled = self.hollow.fill(parts, whole)
        by_name = len(filled) - len(self.names)
        return filled[:by_name], dict(zip(self.names, filled[by_name:], strict=True))

    def only_counted(self) -> Batch:
        """Return the arguments that hold something to split, and no others."""
        children = self.hollow.treedef.children()
        slots, leaves = iter(self.hollow.slots), (iter(self.split), iter(self.whole))
        kept: list[tuple[Any, Any]] = []
        for at, child in enumerate(children):
            for _ in range(child.num_leaves):
                slot = next(slots)
                leaf = next(leaves[slot is tree.OTHER]) if isinstance(slot, tree.Slot) else slot
                kept += [(slot, leaf)] if at in self.counted else []
        treedef = tree.structure([tree.unflatten(children[at], [0] * children[at].num_leaves) for at in self.counted])
        positional = len(children) - len(self.names)
        return Batch(
            tree.Hollow(treedef, tuple(slot for slot, _ in kept)),
            tuple(self.names[at - positional] for at in self.counted if at >= positional),
            [leaf for slot, leaf in kept if slot is tree.PICKED],
            [leaf for slot, leaf in kept if slot is tree.OTHER],
            tuple(range(len(self.counted))),
        )


def parameters_of(f: Callable[..., Any]) -> tuple[str, ...]:
    """Return the names of a function's positional parameters; nothing where they cannot be known."""
    try:
        parameters = inspect.signature(f).parameters.values()
    except (TypeError, ValueError):
        return ()
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(p.name for p in parameters if p.kind in positional)


def check_whole(whole: Sequence[Any], f: Callable[..., Any]) -> tuple[int | str, ...]:
    """Return what `whole=` names, if a function can have such arguments."""
    for name in whole:
        if isinstance(name, bool) or not (isinstance(name, str) or (isinstance(name, int) and name >= 0)):
            raise BatchError(
                f"fz.accumulate: whole={whole!r}; expected positions of arguments, counted from 0, or their names."
            )
    try:
        parameters = inspect.signature(f).parameters
    except (TypeError, ValueError):
        return tuple(whole)
    kinds = [p.kind for p in parameters.values()]
    for name in whole:
        if isinstance(name, str) and name not in parameters and inspect.Parameter.VAR_KEYWORD not in kinds:
            near = difflib.get_close_matches(name, parameters, 1)
            raise BatchError(
                f"fz.accumulate: whole= names {name!r}, and the function takes {', '.join(parameters)}."
                + (f" Did you mean {near[0]!r}?" if near else "")
            )
    return tuple(whole)


def _is_whole(argument: Any) -> bool:
    is_node = lambda x: isinstance(x, (Sharded, HasMicrobatches))  # noqa: E731
    return any(is_node(node) for node in tree.leaves(argument, is_leaf=is_node))


def _check(leaf: Any, key: int | str, path: str, n: int) -> None:
    """Raise where a leaf of an argument that is to be split does not split, or hides tensors."""
    if isinstance(leaf, Tensor):
        if leaf.ndim > 0 and leaf.shape[0] % n:
            raise BatchError(
                f"fz.accumulate: {_where(key, path)} has {leaf.shape[0]} rows (shape {tuple(leaf.shape)}), which do "
                f"not split into {n} micro-batches. Choose a number that divides them; name what every micro-batch is "
                f"to see in whole=, such as whole=({key!r},)."
            )
        return
    if getattr(leaf, "ndim", 0) and hasattr(leaf, "__array__"):
        raise BatchError(
            f"fz.accumulate: {_where(key, path)} is a {type(leaf).__name__}, and only tensors are split: every "
            f"micro-batch would get all of it. Pass torch.as_tensor(it); name it in whole= if that is meant."
        )
    held = [] if isinstance(leaf, nn.Module) else held_tensors(leaf)
    if held:
        raise BatchError(
            f"fz.accumulate: {_where(key, path)} is a {type(leaf).__name__}, which holds "
            f"{'a tensor' if len(held) == 1 else 'tensors'} of {tree.describe(held[0])} and is no tree, so it cannot "
            f"be split: every micro-batch would get all of it. Pass what is in it as a dict, a tuple or a dataclass; "
            f"name the argument in whole= if that is meant."
        )


def _where(key: int | str, path: str) -> str:
    """Return an argument and the path in it, of which the first part is its place among all arguments."""
    rest = path.partition(".")[2]
    return f"argument {key!r}" + (f", {rest!r}" if rest else "")
