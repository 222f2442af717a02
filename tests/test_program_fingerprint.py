"""A program has one hash wherever it is traced, and what differs has another."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fzero as fz
from fzero.program.agree.fingerprint import fingerprint, program_text
from tests import world
from tests.small import parameters


def fingerprints(stages: tuple[int, ...], axes: dict[str, int]) -> list[str]:
    """One for each stage, of a step with constants of each rank's own and a loop in it."""
    found = []
    for stage in stages:
        mesh = fz.make_mesh("cpu", deadline=None, simulate=False, **axes)
        layout = fz.zero(stage, axis="data", replicate=[name for name in axes if name != "data"])
        state = fz.init(parameters(), fz.adamw(1e-2), mesh, layout, policy="bf16")
        own = torch.full((4, 7), float(mesh.index(mesh.names)), dtype=torch.bfloat16)

        def loss_fn(params: Any, batch: Tensor, own: Tensor = own) -> Tensor:
            return ((params["block"]["bias"] + own[:2]) * batch).float().sum() * params["scale"].float()

        step = fz.train_step(loss_fn, microbatches=2)
        program = fz.trace(step)(state, torch.ones(4, 7, dtype=torch.bfloat16))
        text = "\n".join(program_text(program.trace))
        assert "0x" not in text
        assert "loop body:" in text
        found.append(fingerprint(program.trace))
    return found


@pytest.mark.parametrize(
    "axes",
    [{"data": 2}, *(pytest.param(x, marks=pytest.mark.slow) for x in ({"data": 4}, {"node": 2, "data": 2}))],
    ids=str,
)
def test_a_program_has_one_fingerprint_on_all_ranks(axes: dict[str, int]) -> None:
    size = math.prod(axes.values())
    first, *others = world.run(fingerprints, (0, 1, 3), axes, size=size)
    assert others == [first] * (size - 1)
    assert len(set(first)) == 3


@pytest.mark.slow
def test_two_processes_find_the_same_fingerprint() -> None:
    source = "from tests.test_program_fingerprint import fingerprints; print(fingerprints((0, 3), {'data': 1}))"
    runs = [
        subprocess.run([sys.executable, "-c", source], cwd=Path(__file__).parent.parent, capture_output=True, text=True)
        for _ in range(2)
    ]
    assert all(run.returncode == 0 for run in runs), runs[0].stderr
    assert runs[0].stdout == runs[1].stdout == f"{fingerprints((0, 3), {'data': 1})}\n"


A = torch.arange(6.0)

PROGRAMS: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "the plain one": (lambda x, k: x * 2 + k, (A, 1.0)),
    "a constant": (lambda x, k: x * 3 + k, (A, 1.0)),
    "a constant in the arguments": (lambda x, k: x * 2 + k, (A, 2.0)),
    "an operator": (lambda x, k: x * 2 - k, (A, 1.0)),
    "a shape": (lambda x, k: x * 2 + k, (A[:4], 1.0)),
    "a dtype": (lambda x, k: x * 2 + k, (A.double(), 1.0)),
    "strides": (lambda x, k: x * 2 + k, (A.repeat(2)[::2], 1.0)),
    "an output": (lambda x, k: (x * 2 + k, x), (A, 1.0)),
    "a keyword": (lambda x, k: torch.add(x * 2, x, alpha=2), (A, 1.0)),
    "a closed-over tensor's shape": (lambda x, k: x * 2 + A[:1], (A, 1.0)),
    "a closed-over tensor": (lambda x, k: x * 2 + A, (A, 1.0)),
}


def test_what_differs_has_another_fingerprint() -> None:
    found = {name: fingerprint(fz.trace(f)(*args).trace) for name, (f, args) in PROGRAMS.items()}
    for (a, first), (b, second) in itertools.combinations(found.items(), 2):
        assert first != second, f"{a} and {b}"


def test_values_that_are_closed_over_do_not_count() -> None:
    first, second = (fz.trace(lambda x, own=own: x + own)(A) for own in (A.clone(), A + 1))
    assert fingerprint(first.trace) == fingerprint(second.trace)


def test_loop_bodies_count() -> None:
    def loop(scale: float) -> Any:
        return fz.accumulate(fz.value_and_grad(lambda w, x: (w * x).sum() * scale), 2)

    x = A.view(2, 3)
    first, second, again = (fingerprint(fz.trace(loop(s))(A[:3], x).trace) for s in (1.5, 2.5, 1.5))
    assert first == again != second
