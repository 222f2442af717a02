"""A full tree under the names of a `state_dict`.

{"blocks": {"0": {"weight": w}}}    ──▶    {"blocks.0.weight": w}, and the names of tied weights again
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from fzero import tree
from fzero.errors import TreeError
from fzero.sharding.sharded import Sharded


def named(full: Any, module: nn.Module | None = None) -> dict[str, Tensor]:
    """Return a full tree as a flat dict, named as the module's `state_dict` names it.

    Args:
        full: parameters or buffers as `fz.functional` and `fz.gather` give them.
        module: the module that they are of, in any mode and on any device, also on meta. With it a weight that
            the module holds under several names, such as a tied head, stands under each of them.

    Returns:
        Dotted name to tensor: those of `full`, not copies.

    Raises:
        TypeError: `full` is cut into pieces.
        TreeError: `full` has names that the module does not have, or lacks some.

    Example:
        >>> import torch
        >>> named({"0": {"bias": torch.zeros(2), "weight": torch.ones(2)}})
        {'0.bias': tensor([0., 0.]), '0.weight': tensor([1., 1.])}
    """
    if isinstance(full, Sharded) or isinstance(getattr(full, "params", None), Sharded):
        raise TypeError(
            f"fz.named: got a {type(full).__name__}, which is cut. Gather its parameters first: fz.named(fz.gather(x))."
        )
    leaves, paths = tree.leaves(full, none_is_leaf=True), tree.paths(full, none_is_leaf=True)
    if not isinstance(full, Mapping) or not all(isinstance(x, Tensor) for x in leaves):
        other = next((p for p, x in zip(paths, leaves, strict=True) if not isinstance(x, Tensor)), "")
        raise TypeError(
            f"fz.named: expected a nested dict of tensors, got {tree.describe(full) if not other else 'another leaf'}"
            f"{f' at {other!r}' if other else ''}."
        )
    flat = dict(zip(paths, leaves, strict=True))
    return flat if module is None else _with_tied_names(flat, module)


def _with_tied_names(flat: dict[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    first: dict[int, str] = {}
    names: dict[str, str] = {}  # every name of the module, to the first name of the same tensor
    owned = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
    for name, x in owned:
        names[name] = first.setdefault(id(x), name)
    parameters = {names[name] for name, _ in module.named_parameters()}
    buffers = {names[name] for name, _ in module.named_buffers()}
    expected = next((kind for kind in (parameters, buffers) if not kind.isdisjoint(flat)), parameters)
    missing, unknown = sorted(expected - flat.keys()), sorted(flat.keys() - expected)
    if missing or unknown:
        told = [f"{name}: expected by the module, not in the tree" for name in missing]
        told += [f"{name}: in the tree, not in the module" for name in unknown]
        raise TreeError(
            "fz.named: the tree is not of this module. Pass the module that fz.functional or fz.init was given.\n  "
            + "\n  ".join(told[:8] + ([f"and {len(told) - 8} more"] if len(told) > 8 else []))
        )
    return {name: flat[of] for name, of in names.items() if of in expected}
