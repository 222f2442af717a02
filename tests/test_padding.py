"""`fz.pad_to`: batches padded to few lengths."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fzero as fz


def batch() -> dict[str, Any]:
    return {"a": {"x": torch.ones(3, 5), "y": torch.ones(3, dtype=torch.bool)}, "n": 7, "w": torch.tensor(2.0)}


def test_each_tensor_is_padded_at_its_ends_where_it_has_the_dimension() -> None:
    given = batch()
    found = fz.pad_to(given, {0: 4, 1: 8}, value={"a.x": -1})
    assert found["a"]["x"].shape == (4, 8) and found["a"]["y"].shape == (4,) and found["n"] == 7
    assert torch.equal(found["a"]["x"][:3, :5], given["a"]["x"]) and found["a"]["x"].sum() == 15 - 17
    assert found["a"]["y"].dtype == torch.bool and found["a"]["y"].tolist() == [True] * 3 + [False]
    assert found["w"] is given["w"] and given["a"]["x"].shape == (3, 5)


def test_what_fits_is_passed_on() -> None:
    given = batch()
    assert fz.pad_to(given, {1: 5})["a"]["x"] is given["a"]["x"]


def test_one_value_and_patterns() -> None:
    assert fz.pad_to(batch(), {1: 6}, value=9)["a"]["x"][0, -1] == 9
    assert fz.pad_to(batch(), {1: 6}, value={"a.*": 3})["a"]["x"][0, -1] == 3


@pytest.mark.parametrize("multiples", [{-1: 4}, {0: 0}, {0: 2.0}, {"x": 4}, {True: 4}])
def test_wrong_multiples_are_refused(multiples: Any) -> None:
    with pytest.raises(ValueError, match=r"fz\.pad_to: expected dimensions from 0 on .*; got"):
        fz.pad_to(batch(), multiples)


def test_a_path_of_no_tensor_is_refused_with_the_near_name() -> None:
    with pytest.raises(ValueError, match=r"fz\.pad_to: value= names 'a\.z', .* Did you mean 'a\.[xy]'\?"):
        fz.pad_to(batch(), {0: 4}, value={"a.z": -100})


def test_padded_batches_have_few_programs() -> None:
    f = fz.jit(lambda b: b["a"]["x"].sum(0), sizes="fixed")
    for n in (3, 2, 4, 1):
        f(fz.pad_to({"a": {"x": torch.ones(n, 5)}}, {0: 4}))
    assert len(f.programs) == 1
