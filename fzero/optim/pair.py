"""Whether gradients are those of the parameters that they are to update."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fzero import tree
from fzero.errors import LayoutError, PolicyError, TreeError
from fzero.sharding.sharded import Sharded


def check_pair(grads: Any, params: Any) -> None:
    """Raise if gradients are not those of these parameters."""
    expected, got = _shapes(params), _shapes(grads)
    lines = [
        f"{path or '(the whole)'}: expected {expected.get(path, 'nothing')}, got {got.get(path, 'nothing')}"
        for path in dict.fromkeys([*expected, *got])
        if path not in expected or path not in got or got[path] not in ("None", expected[path])
    ]
    if lines or isinstance(grads, Sharded) != isinstance(params, Sharded):
        lines = lines or [f"expected a {type(params).__name__}, got a {type(grads).__name__}"]
        raise TreeError("update: gradients do not pair with parameters:\n  " + "\n  ".join(lines))
    if isinstance(params, Sharded):
        if grads.policy is not None and params.policy is not None and grads.policy != params.policy:
            raise PolicyError(
                f"update: the gradients were taken under another policy, {grads.policy}, than the parameters are "
                f"stored by, {params.policy}. Take the gradient with respect to the state that it updates."
            )
        placement = params.placement.cut_over(params.layout.gradient_cut)
        for path, spec, other in zip(params.paths, placement.specs, grads.placement.specs, strict=True):
            if spec != other:
                raise LayoutError(
                    f"update: the gradient of leaf {path!r} is cut over {other.cut}, and its moments over {spec.cut}. "
                    f"Take the gradient with respect to the state that it updates."
                )


def _shapes(tree_: Any) -> dict[str, str]:
    if isinstance(tree_, Sharded):
        return {path: f"shape {shape}" for path, shape in zip(tree_.paths, tree_.shapes, strict=True)}
    leaves = tree.leaves(tree_, none_is_leaf=True)
    shapes = [f"shape {tuple(leaf.shape)}" if isinstance(leaf, Tensor) else tree.describe(leaf) for leaf in leaves]
    return dict(zip(tree.paths(tree_, none_is_leaf=True), shapes, strict=True))
