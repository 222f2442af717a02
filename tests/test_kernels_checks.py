"""What the update kernels refuse, and that the error says which tensor of which leaf it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.test_kernels_update import FLOAT, STORAGES, UPDATES, ZERO, operands, renewed


def changed(arguments: dict[str, Any], key: str, position: tuple[int, ...], wrong: Tensor) -> dict[str, Any]:
    """Arguments with one tensor replaced: that at a position in `states` or `grads`, or the one called `key`."""
    arguments = dict(arguments)
    if not position:
        arguments[key] = wrong
    elif key == "grads":
        arguments[key] = [wrong if i == position[0] else g for i, g in enumerate(arguments[key])]
    else:
        arguments[key] = [
            tuple(wrong if (i, k) == position else x for k, x in enumerate(leaf))
            for i, leaf in enumerate(arguments[key])
        ]
    return arguments


@pytest.mark.parametrize(
    ("storage", "key", "position", "wrong", "error", "message"),
    [
        (STORAGES[0], "grads", (1,), torch.ones(9, dtype=torch.float64), TypeError, "adamw: leaf 1 has dtypes"),
        (STORAGES[0], "states", (1, 1), torch.ones(8), ValueError, r"m of leaf 1 has shape \(8,\), expected \(9,\)"),
        (STORAGES[0], "states", (0, 0), torch.ones(3, 3), ValueError, "expected one dimension"),
        (STORAGES[0], "grads", (1,), torch.ones(18)[::2], ValueError, "the gradient of leaf 1 is not contiguous"),
        (STORAGES[0], "offsets", (), torch.tensor([0, 1]), TypeError, "adamw: offsets has dtype torch.int64"),
        (STORAGES[0], "keys", (), ZERO.expand(2), ValueError, r"adamw: keys has shape \(2,\), expected \(2, 2\)"),
        (STORAGES[0], "scalars", (), torch.ones(3), ValueError, r"adamw: scalars has shape \(3,\)"),
        (STORAGES[4], "states", (1, 1), ZERO.to(torch.int16).expand(1), ValueError, "the remainder of p of leaf 1"),
        (STORAGES[5], "states", (1, 2), torch.ones(2), ValueError, "the scales of m of leaf 1"),
    ],
)
def test_refuses_what_the_kernels_do_not_take(
    storage: Any, key: str, position: tuple[int, ...], wrong: Tensor, error: type[Exception], message: str
) -> None:
    arguments = changed(operands("adamw", storage, (9, 9), FLOAT), key, position, wrong)
    with pytest.raises(error, match=message):
        renewed("adamw", arguments, stochastic=False)


def test_refuses_states_that_are_not_those_of_the_kernel() -> None:
    arguments = operands("adamw", STORAGES[0], (9,))
    with pytest.raises(TypeError, match=r"lion: the state of leaf 0 has dtypes .* expected those of p, m, each"):
        renewed("lion", {**arguments, "scalars": UPDATES["lion"][1]}, stochastic=False)
    with pytest.raises(TypeError, match="adamw: the state of leaf 0 has dtypes"):
        renewed("adamw", {**arguments, "states": [arguments["states"][0][:2]]}, stochastic=False)
    with pytest.raises(ValueError, match="adamw: 1 states and 2 gradients"):
        renewed("adamw", {**arguments, "grads": arguments["grads"] * 2}, stochastic=False)
    codes = (torch.zeros(9, dtype=torch.int8), torch.zeros(1), *arguments["states"][0][1:])
    with pytest.raises(TypeError, match="but for p, int8 or uint8"):
        renewed("adamw", {**arguments, "states": [codes]}, stochastic=False)
    assert renewed("adamw", operands("adamw", STORAGES[0], (1,)) | {
        "states": [], "grads": [], "keys": torch.zeros(0, 2, dtype=torch.int32), "offsets": ZERO.expand(0)
    }, stochastic=False) == []  # fmt: skip
