"""CONTRIBUTING.md does what it says: its recipes are followed to the letter, in temporary files."""

from __future__ import annotations

import importlib.util
import re
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fzero as fz
from fzero.precision import policy as policies
from fzero.program import pipeline
from tests.small import assert_same_bits

DOCUMENT = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()
Load = Callable[[str], types.ModuleType]


def block(title: str) -> str:
    """The block of code of the document whose first line is a comment of this title."""
    (found,) = re.findall(rf"```python\n# {re.escape(title)}\n(.*?)```", DOCUMENT, re.DOTALL)
    return str(found)


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    """Write a block into a temporary file, and import it under the name of the file that it is meant for."""

    def load(title: str) -> types.ModuleType:
        path = tmp_path / Path(title).name
        path.write_text(block(title))
        name = title.removesuffix(".py").replace("/", ".")
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module

    return load


def run_tests_of(module: types.ModuleType) -> None:
    tests = [f for name, f in vars(module).items() if name.startswith("test_")]
    assert tests
    for test in tests:
        test()


def test_a_pass_is_added(load, monkeypatch):
    squares = load("fzero/program/passes/squares.py").squares
    run_tests_of(load("tests/test_passes_squares.py"))
    state = fz.init({"w": torch.randn(4, 3)}, fz.adamw(1e-3), fz.make_mesh("cpu"), policy="fp32")
    step = fz.train_step(lambda params, x: ((x @ params["w"]) ** 2).sum(), donate=False)
    x = torch.randn(5, 4)
    assert "aten.pow.Tensor_Scalar(mm, 2)" in fz.trace(step)(state, x).text()
    monkeypatch.setattr(pipeline, "PASSES", (*pipeline.PASSES[:1], squares, *pipeline.PASSES[1:]))
    assert_same_bits(step(state, x), step.f(state, x))
    (program,) = step.programs
    assert "squares" in [stage.name for stage in program.stages]
    assert "aten.pow.Tensor_Scalar(mm, 2)" not in program.text()


def test_a_policy_is_added(monkeypatch):
    scope: dict[str, Any] = {**vars(policies)}
    (entry,) = eval(block("an entry of POLICIES"), scope).items()
    monkeypatch.setitem(policies.POLICIES, *entry)
    state = fz.init({"w": torch.ones(4)}, fz.adamw(1e-3), fz.make_mesh("cpu"), policy=entry[0])
    assert state.policy == fz.policy(entry[0]) != fz.policy("bf16")
    assert repr(state.policy) == f"policy({entry[0]!r})"
    new, _ = fz.apply_gradients(state, fz.grad(lambda params: (params["w"].float() ** 2).sum())(state))
    assert fz.gather(new.params)["w"].dtype == torch.bfloat16
