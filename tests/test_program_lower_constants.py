"""What a program computes of nothing: which of it Inductor is given as values, and that these are right."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fzero as fz
from fzero.program.lower import constants
from fzero.program.lower.choose import lowered
from fzero.program.lower.constants import constants_of
from fzero.program.options import Options

LENGTH = 8


def angles() -> Tensor:
    return torch.arange(LENGTH, dtype=torch.float32)[:, None] * 10000 ** -(torch.arange(2) / 2)


def rotated(x: Tensor) -> Tensor:
    return x * angles().cos() + x.flip(1) * angles().sin()


def overwritten(x: Tensor) -> Tensor:
    table = angles().cos()
    left, right = table.split(1, dim=1)
    left.add_(x[:, :1])
    return table * right + x


CASES: list[tuple[str, Callable[[Tensor], Tensor], int]] = [
    ("tables of sines and cosines", rotated, 2),
    ("a mask is cheaper made than read", lambda x: x * (torch.arange(LENGTH)[:, None] > torch.arange(2)), 0),
    ("what depends on the input", lambda x: x + (x.sum() * torch.arange(2)).sin(), 0),
    ("what is overwritten through a view", overwritten, 0),
    ("what is handed out", lambda x: angles().cos(), 0),
    ("a view of what is handed out", lambda x: (c := angles().cos()).expand(2, LENGTH, 2) + (0 * c).t().sum(), 0),
    ("what a closed-over tensor decides", lambda x: x + fz.keyed(lambda: torch.rand(2).exp())(7), 0),
    ("too large to keep", lambda x: (x.sum() * torch.arange(5 << 20).float().cos()).sum(), 0),
]


@pytest.mark.parametrize(("what", "f", "count"), CASES, ids=[what for what, *_ in CASES])
def test_what_is_kept(what: str, f: Callable[[Tensor], Tensor], count: int) -> None:
    module = fz.trace(f)(torch.ones(LENGTH, 2)).trace.module
    assert len(constants_of(module)) == count


def test_together_they_stay_under_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "MOST_TOGETHER", angles().nbytes)
    assert len(constants_of(fz.trace(rotated)(torch.ones(LENGTH, 2)).trace.module)) == 1


def test_the_compiled_program_reads_them_and_nobody_can_write_them() -> None:
    x = torch.randn(LENGTH, 2)
    with torch.autocast("cpu", torch.bfloat16):  # the caller's modes have no part in them
        program = lowered(fz.trace(lambda x: (rotated(x), angles().sin()))(x).trace, Options(lower="inductor"))
        for _ in range(2):
            with torch.no_grad():
                out, table = program([x])
            torch.testing.assert_close(out, rotated(x))
            torch.testing.assert_close(table, angles().sin())
            table.zero_()
