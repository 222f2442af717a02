"""What a user may choose about a program, and what is said to wrong choices."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import fzero as fz
from fzero.program.options import Options

GOOD: list[dict[str, Any]] = [
    {},
    {"lower": None},
    {"lower": "graph"},
    {"lower": "inductor"},
    {"lower": "cudagraph"},
    {"remat": "block"},
    {"remat": 0},
    {"remat": 10**12},
    {"keep_gathered": math.inf},
    {"keep_gathered": 10},
    {"bucket": 0},
    {"overlap": None},
    {"overlap": 0},
]

BAD: list[tuple[dict[str, Any], str]] = [
    ({"lower": "fast"}, r"lower='fast' is not known. Use 'graph', 'inductor' or 'cudagraph'"),
    ({"remat": "all"}, r"remat='all'; expected 'none', 'block', or a number of bytes"),
    ({"remat": -1}, r"remat=-1; expected"),
    ({"remat": True}, r"remat=True; expected"),
    ({"remat": None}, r"remat=None; expected"),
    ({"remat": 1.5}, r"remat=1\.5; expected"),
    ({"keep_gathered": -1}, r"keep_gathered=-1; expected a number of bytes, or math\.inf"),
    ({"keep_gathered": math.nan}, r"keep_gathered=nan; expected"),
    ({"keep_gathered": True}, r"keep_gathered=True; expected"),
    ({"bucket": -1}, r"bucket=-1; expected a number of bytes, 0 for no buckets"),
    ({"bucket": None}, r"bucket=None; expected"),
    ({"overlap": -1}, r"overlap=-1; expected a number of bytes, or None for no overlap"),
    ({"overlap": False}, r"overlap=False; expected"),
]


@pytest.mark.parametrize("choices", GOOD)
def test_choices_are_taken(choices: dict[str, Any]) -> None:
    found = Options(**choices)
    assert all(getattr(found, name) == value for name, value in choices.items())


@pytest.mark.parametrize(("choices", "message"), BAD)
def test_a_wrong_choice_says_what_is_right(choices: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"^fz\.jit: {message}"):
        Options(**choices)
    with pytest.raises(ValueError, match=message):
        fz.jit(lambda x: x, **choices)
    with pytest.raises(ValueError, match=message):
        fz.train_step(lambda params, batch: params, **choices)


def test_an_option_that_does_not_exist_is_named() -> None:
    with pytest.raises(
        TypeError, match=r"there is no option 'buckets'\. Options are donate, lower, remat, keep_gathered"
    ):
        fz.jit(lambda x: x, buckets=3)


def test_names_are_those_that_jit_takes() -> None:
    assert Options.names() == ("lower", "remat", "keep_gathered", "bucket", "overlap", "keep_programs", "sizes")
    f = fz.jit(lambda x: x + 1, remat="block", keep_gathered=5, bucket=6, overlap=7, lower="graph")
    assert f.options == Options(lower="graph", remat="block", keep_gathered=5, bucket=6, overlap=7)
    assert f(torch.ones(1)).item() == 2.0


def test_a_choice_is_fixed() -> None:
    with pytest.raises(AttributeError):
        Options().bucket = 3  # type: ignore[misc]
