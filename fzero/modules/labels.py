"""`requires_grad` of a module's parameters, which no state looks at, as labels for `fz.partition_by`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from fzero import tree
from fzero.modules.deferred import deferred


def labels_of(module: nn.Module | Callable[[], nn.Module]) -> dict[str, Any]:
    """Return the labels of a module's parameters: `"trained"` where they require grad, else `"frozen"`.

    Args:
        module: the module, such as one that a library of adapters has frozen in part; or a function without arguments
            that makes one.

    Returns:
        A tree of labels like the parameters, for `fz.partition_by(labels, {"trained": optimizer, "frozen": None})`.

    Raises:
        TypeError: `module` is neither.

    Example:
        >>> model = nn.Linear(2, 3)
        >>> model.bias.requires_grad_(False).shape
        torch.Size([3])
        >>> labels_of(model)
        {'weight': 'trained', 'bias': 'frozen'}
    """
    if not isinstance(module, nn.Module):
        if not callable(module):
            raise TypeError(
                f"fz.labels_of: expected an nn.Module or a function that makes one, got {tree.describe(module)}."
            )
        module = deferred(module).module
    return tree.nest({name: "trained" if p.requires_grad else "frozen" for name, p in module.named_parameters()})


def warn_of_frozen(module: nn.Module, frozen: Callable[[Sequence[str]], frozenset[str]]) -> None:
    """Warn where parameters that require no grad would be trained.

    Args:
        module: whose parameters become a state.
        frozen: of some paths, those that the optimizer leaves alone.
    """
    names = [name for name, p in module.named_parameters() if not p.requires_grad and p.is_floating_point()]
    moved = [name for name in names if name not in frozen(names)] if names else []
    if moved:
        total = sum(1 for _ in module.parameters())
        warnings.warn(
            f"fz.init: {len(moved)} of {total} parameters of {type(module).__name__} have requires_grad=False, such as "
            f"{moved[0]!r}, and the optimizer trains them all the same. Freeze them: "
            f'fz.partition_by(fz.labels_of(module), {{"trained": optimizer, "frozen": None}}).',
            stacklevel=5,
        )
