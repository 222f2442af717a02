"""Whether what a state is given instead of its own fits it: another optimizer, other parameters, another counter.

Moments mean something only to the optimizer that made them, and belong to certain leaves. So an optimizer says what its
state holds, part by part, and two states are of one kind where the parts have the same names and, leaf by leaf, the
same owners, shapes and dtypes:

    adamw                         [AdamW: m, v of a, b]
    chain(clip, adamw)            [AdamW: m, v of a, b]              fits: a clip keeps nothing
    adamw, b frozen               [train: AdamW: m, v of a]          does not: other leaves
    lion                          [Lion: m of a, b]                  does not: another meaning
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fzero import tree
from fzero._torch import disable_proxy_modes_tracing
from fzero.calls.nearest import nearest
from fzero.errors import LayoutError, PolicyError, ShapeError, TreeError
from fzero.optim.base import Optimizer
from fzero.sharding.sharded import Sharded

_CALL = "fz.State.replace"
_SCALARS = ("step", "loss_scale", "streak", "seed")
_PARTS = ("step", "params", "moments", "loss_scale", "streak", "seed", "optimizer")
# What the parameters say, and the state with them.
_OF_PARAMS = {"policy": PolicyError, "layout": LayoutError, "mesh": LayoutError}


def fitting(state: Any, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the changes that make of a state another that fits together; raise if there is none.

    Args:
        state: a `State`.
        changes: attribute to its new value.
    """
    for name in changes:
        if name not in _PARTS and name not in _OF_PARAMS:
            raise TypeError(
                f"{_CALL}: a state has no attribute {name!r}.{nearest(name, [*_PARTS, *_OF_PARAMS])} "
                f"It has {', '.join([*_PARTS, *_OF_PARAMS])}."
            )
    for name, error in _OF_PARAMS.items():
        if name in changes and changes[name] != getattr(state, name):
            raise error(
                f"{_CALL}: the parameters and moments are stored as another {name} says, {getattr(state, name)!r}, "
                f"than {changes[name]!r}, and replacing the word would not convert them. {_anew(state, name)}"
            )
    for name in _SCALARS:
        if name in changes:
            _check_scalar(name, getattr(state, name), changes[name])
    new = {name: value for name, value in changes.items() if name in _PARTS}
    if "params" in new:
        _check_params(state.params, new["params"])
    optimizer = new.get("optimizer", state.optimizer)
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"{_CALL}: optimizer must be an fz optimizer, got {tree.describe(optimizer)}. Try fz.adamw(lr)."
        )
    params = new.get("params", state.params)
    if "moments" in new:
        _check_moments(new["moments"], optimizer, params)
    elif optimizer != state.optimizer:
        new["moments"] = _carried(state, optimizer, params)
    return new


def _check_scalar(name: str, old: Tensor | None, new: Any) -> None:
    if old is None and new is None:
        return
    if old is None:
        raise PolicyError(
            f"{_CALL}: {name}={tree.describe(new)}, and the policy of this state has no loss scale. Leave it None, or "
            f"start a state with a policy that has one: fz.init(..., policy='fp16')."
        )
    expected = f"a tensor {tree.describe(old)}"
    if not isinstance(new, Tensor):
        example = f"torch.tensor({new!r}, dtype={old.dtype})" if isinstance(new, int | float) else "a tensor like it"
        raise TypeError(f"{_CALL}: {name}: expected {expected}, got {tree.describe(new)}. Pass {example}.")
    if (new.shape, new.dtype) != (old.shape, old.dtype):
        raise ShapeError(
            f"{_CALL}: {name}: expected {expected}, got {tree.describe(new)}. Pass it with that shape and dtype, "
            f"such as {name}.reshape({tuple(old.shape)}).to({old.dtype})."
        )


def _check_params(old: Sharded, new: Any) -> None:
    if not isinstance(new, Sharded):
        raise TypeError(
            f"{_CALL}: params: expected a Sharded like the state's own, got {tree.describe(new)}. Start a state "
            f"on full tensors with fz.init."
        )
    if new.factor is not None:
        raise LayoutError(
            f"{_CALL}: params: got a gradient, whose leaves stand for leaf × factor. Make parameters of it: "
            f"fz.like(gradient, state.params)."
        )
    for what, error in _OF_PARAMS.items():
        if getattr(new, what) != getattr(old, what):
            raise error(
                f"{_CALL}: params: expected the {what} of the state's own, {getattr(old, what)!r}, got "
                f"{getattr(new, what)!r}. Store them as the state does: fz.like(params, state.params)."
            )
    lines = _differences(_by_path(old), _by_path(new))
    if not lines and new.placement != old.placement:
        lines = [
            f"{path}: expected it cut over {a.cut} and split by {a.split}, got {b.cut} and {b.split}"
            for path, a, b in zip(old.paths, old.placement.specs, new.placement.specs, strict=True)
            if a != b
        ] or ["they are nested in other containers"]
    if lines:
        raise TreeError(
            f"{_CALL}: params are not stored as the state's own are:\n  " + "\n  ".join(lines) + "\nMake them "
            "so: fz.like(params, state.params) for the same leaves, fz.init(fz.gather(params), ...) for others."
        )


def _check_moments(moments: Any, optimizer: Optimizer, params: Sharded) -> None:
    expected = _expected(optimizer, params)
    lines = tree.differences(expected, moments, same=_alike)
    if lines or tree.structure(expected) != tree.structure(moments):
        lines = lines or ["they belong to other leaves, or mean something else"]
        raise TreeError(
            f"{_CALL}: moments are not what the optimizer keeps for these parameters:\n  "
            + "\n  ".join(lines[:8])
            + "\nStart them anew: state.replace(optimizer=optimizer, moments=optimizer.init(state.params))."
        )


def _carried(state: Any, optimizer: Optimizer, params: Sharded) -> Any:
    """Return a state's moments in the structure that another optimizer gives them, where it means the same by them."""
    expected = _expected(optimizer, params)
    leaves, structure = tree.flatten(expected)
    numbered = tree.unflatten(structure, range(len(leaves)))  # a leaf by its number: two may be one tensor
    kept, wanted = _parts(state.optimizer, state.moments), _parts(optimizer, expected)
    lines = []
    if [name for name, _ in kept] != [name for name, _ in wanted]:
        lines.append(f"the state holds {_names(kept)}, and the optimizer keeps {_names(wanted)}")
    else:
        for (name, old), (_, new) in zip(kept, wanted, strict=True):
            found = tree.differences(new, old, same=_alike)
            if not found and tree.structure(old) != tree.structure(new):
                found = ["other leaves, or laid out otherwise"]
            lines += [f"{_short(name)}: {line}" for line in found]
    if lines:
        more = [f"and {len(lines) - 8} more"] if len(lines) > 8 else []
        raise TreeError(
            f"{_CALL}: the moments are not those that this optimizer keeps:\n  "
            + "\n  ".join([*lines[:8], *more])
            + f"\nLearning rates, weight decay, schedules and clips may change. {_anew(state, 'optimizer')}"
        )
    places = zip(_parts(optimizer, numbered), kept, strict=True)
    found_at = {i: leaf for (_, a), (_, b) in places for i, leaf in zip(tree.leaves(a), tree.leaves(b), strict=True)}
    return tree.map(lambda i: found_at[i], numbered)


def _parts(optimizer: Optimizer, moments: Any) -> list[tuple[str, Any]]:
    """Return the parts of a state that hold something, by their names."""
    return sorted(((name, part) for name, part in optimizer.parts(moments) if tree.leaves(part)), key=lambda p: p[0])


def _expected(optimizer: Optimizer, params: Sharded) -> Any:
    """Return the state that an optimizer starts with, without memory. What is stacked has it stacked likewise."""
    with disable_proxy_modes_tracing():
        bare = [None if x is None else torch.empty(x.shape[-1:], dtype=x.dtype, device="meta") for x in params.pieces]
        state = optimizer.init_sharded(params.replace(pieces=tuple(bare)))
        stack = next((x.shape[:-1] for x in params.pieces if x is not None), ())
        return tree.map(lambda x: torch.empty((*stack, *x.shape), dtype=x.dtype, device="meta"), state)


def _alike(a: Any, b: Any) -> bool:
    return tree.describe(a) == tree.describe(b)


def _by_path(x: Sharded) -> dict[str, str]:
    rows = zip(x.paths, x.pieces, x.shapes, strict=True)
    return {path: f"{tree.describe(piece)} of a leaf {shape}" for path, piece, shape in rows}


def _differences(expected: Mapping[str, str], got: Mapping[str, str]) -> list[str]:
    return [
        f"{path or '(the whole)'}: expected {expected.get(path, 'nothing')}, got {got.get(path, 'nothing')}"
        for path in dict.fromkeys([*expected, *got])
        if expected.get(path) != got.get(path)
    ]


def _names(parts: list[tuple[str, Any]]) -> str:
    return ", ".join(f"the state of {_short(name)}" for name, _ in parts) or "nothing"


def _short(name: str) -> str:
    return re.sub(r"\bfzero\.[a-z_.]+\.", "", name)


def _anew(state: Any, changed: str) -> str:
    """Return how to start a state on the parameters of this one, with something else changed."""
    # What a split master has beside its bfloat16 half is in the moments.
    is_split = state.policy.master == "split"
    whole = "fz.gather(fz.ema(None, state, 0.0))" if is_split else "fz.gather(state.params)"
    given = ", ".join(
        name if name == changed else f"state.{name}" for name in ("optimizer", "mesh", "layout", "policy")
    )
    kept = ["step", "seed"]
    if changed != "policy" and state.loss_scale is not None:
        kept += ["loss_scale", "streak"]
    again = ", ".join(f"{name}=state.{name}" for name in kept)
    return f"Start another state, with moments of zero: fz.init({whole}, {given}).replace({again})."
