"""The blocks of docs/recipes.md run as they stand, on one process and on two, and do what they say."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import fzero as fz
from tests import world

DOCUMENT = (Path(__file__).parents[1] / "docs" / "recipes.md").read_text()


def scope_of_all_blocks() -> dict[str, Any]:
    fz.make_mesh("cpu")
    scope: dict[str, Any] = {"__name__": "recipes"}
    for block in re.findall(r"```python\n(.*?)```", DOCUMENT, re.DOTALL):
        exec(compile(block, "recipes.md", "exec"), scope)
    return scope


def told() -> dict[str, Any]:
    """What the recipes end with, as plain numbers and tensors."""
    torch.manual_seed(0)
    scope = scope_of_all_blocks()
    moved = fz.gather(scope["head_only"].params)
    start = fz.gather(fz.init(scope["make_model"], fz.adamw(1e-3), policy="fp32").params)
    return {
        "scores": {k: float(x) for k, x in scope["scores"].items()},
        "draws differ": not torch.equal(scope["first"], scope["second"]),
        "rates": (float(scope["rate"]), scope["plateau"].get_last_lr()[0]),
        "layer": {k: tuple(x.shape) for k, x in scope["layer"].items()},
        "moved": {path for path, x in fz.named(moved).items() if not torch.equal(x, fz.named(start)[path])},
        "average": {x.dtype for x in fz.tree.leaves(fz.gather(scope["average"]))},
        "padded": {k: (tuple(x.shape), int(x[0, -1])) for k, x in scope["padded"].items()},
        "embedding": tuple(scope["embedding"].shape),
        "programs of the step": len(scope["step"].programs),
    }


@pytest.mark.parametrize("size", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_recipes_do_what_they_say(size):
    for found in world.run(told, size=size, deadline=240):
        assert 0.5 < found["scores"]["loss"] < 3 and 0 <= found["scores"]["accuracy"] <= 1
        assert found["draws differ"]
        assert found["rates"][0] == pytest.approx(found["rates"][1])
        assert found["layer"] == {"weight": (4, 64), "bias": (4,)}
        assert found["moved"] == {"4.weight", "4.bias"}
        assert found["average"] == {torch.float32}
        assert found["padded"] == {"input_ids": ((8, 48), 0), "labels": ((8, 48), -100)}
        assert found["embedding"] == (8, 8)
        assert found["programs of the step"] == 3, "one for each optimizer: a changed rate traces nothing"
