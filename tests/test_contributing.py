"""CONTRIBUTING.md does what it says: its recipes are followed to the letter, in temporary files."""

from __future__ import annotations

import importlib.util
import itertools
import re
import sys
import threading
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fzero as fz
from fzero.precision import policy as policies
from fzero.program import pipeline
from tests import world
from tests.small import assert_same_bits, copied

DOCUMENT = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()
PACKAGE = Path(fz.__file__).parent
Load = Callable[[str], types.ModuleType]


def block(title: str) -> str:
    """The block of code of the document whose first line is a comment of this title."""
    (found,) = re.findall(rf"```python\n# {re.escape(title)}\n(.*?)```", DOCUMENT, re.DOTALL)
    return str(found)


def loaded(folder: str, title: str) -> types.ModuleType:
    """Write a block into a temporary file, and import it under the name of the file that it is meant for."""
    path = Path(folder) / f"{threading.get_native_id()}_{Path(title).name}"
    path.write_text(block(title))
    name = title.removesuffix(".py").replace("/", ".")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    def load(title: str) -> types.ModuleType:
        name = title.removesuffix(".py").replace("/", ".")
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))  # taken out again after the test
        return loaded(str(tmp_path), title)

    return load


def on_a_rank(folder: str, titles: list[str], function: str) -> Any:
    """Load blocks on a rank, and call a function of the last."""
    module = [loaded(folder, title) for title in titles][-1]
    try:
        return getattr(module, function)()
    finally:
        for title in titles:
            del sys.modules[title.removesuffix(".py").replace("/", ".")]


def run_tests_of(module: types.ModuleType) -> None:
    tests = [f for name, f in vars(module).items() if name.startswith("test_")]
    assert tests
    for test in tests:
        test()


def test_what_happens_where_is_still_there():
    rows = re.findall(r"`([\w/]+\.py)`: ((?:`\w+`(?: \([^)]*\))?(?:, )?)+)", DOCUMENT)
    assert len(rows) > 15
    for file, names in rows:
        source = (PACKAGE / file).read_text()
        for name in re.findall(r"`(\w+)`", names):
            assert re.search(rf"^ *(?:def|class) {name}\b", source, re.MULTILINE), f"{name} is not in {file}"


def test_every_file_has_a_place_in_the_table_of_files():
    table = dict(re.findall(r"^\| `([\w/]+/)` \| (.*) \|$", DOCUMENT, re.MULTILINE))
    missing = []
    for path in sorted(PACKAGE.rglob("*.py")):
        *folders, name = path.relative_to(PACKAGE).parts
        folder = "".join(f"{x}/" for x in folders)
        if name == "__init__.py" or folder in ("optim/", "kernels/", "program/passes/"):  # a formula, or a pass, each
            continue
        if f"`{name}`" not in DOCUMENT if not folder else f"`{path.stem}`" not in table[folder]:
            missing.append(folder + name)
    assert not missing, "CONTRIBUTING.md says nothing of them"


def test_an_optimizer_is_added(load):
    signum = load("fzero/optim/signum.py").Signum(1e-2)
    run_tests_of(load("tests/test_signum.py"))
    params = {"w": torch.randn(70, 30), "b": torch.randn(5)}
    update = fz.jit(fz.apply_gradients, donate=0)
    for policy, stage in zip(policies.POLICIES, itertools.cycle((3, 0, 1, 2))):
        state = fz.init(params, signum, fz.make_mesh("cpu"), fz.zero(stage), policy)
        grads = fz.grad(lambda params: sum((x.float() ** 2).sum() for x in params.values()))(state)
        expected = fz.apply_gradients(copied(state), grads)
        assert_same_bits(update(state, grads), expected)


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


def test_a_collective_is_added(load, tmp_path, monkeypatch):
    titles = ["fzero/ranks/from_first.py", "tests/test_from_first.py"]
    module = [load(title) for title in titles][-1]

    def run(function: Callable[[], Any], size: int) -> Any:
        return world.run(on_a_rank, str(tmp_path), titles, function.__name__, size=size)

    monkeypatch.setattr(module, "world", types.SimpleNamespace(run=run))
    run_tests_of(module)


def test_a_policy_is_added(monkeypatch):
    scope: dict[str, Any] = {**vars(policies)}
    (entry,) = eval(block("an entry of POLICIES"), scope).items()
    monkeypatch.setitem(policies.POLICIES, *entry)
    state = fz.init({"w": torch.ones(4)}, fz.adamw(1e-3), fz.make_mesh("cpu"), policy=entry[0])
    assert state.policy == fz.policy(entry[0]) != fz.policy("bf16")
    assert repr(state.policy) == f"policy({entry[0]!r})"
    new, _ = fz.apply_gradients(state, fz.grad(lambda params: (params["w"].float() ** 2).sum())(state))
    assert fz.gather(new.params)["w"].dtype == torch.bfloat16
