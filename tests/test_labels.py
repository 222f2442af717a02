"""Parameters that require no grad: labelled for `fz.partition_by`, and told of where they would be trained."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import fzero as fz


def make() -> nn.Module:
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    module[0].requires_grad_(False)
    return module


@pytest.mark.parametrize("given", [make, make()], ids=["factory", "module"])
def test_what_requires_no_grad_is_frozen_by_its_label_and_told_of_without(given):
    mesh, labels = fz.make_mesh("cpu"), fz.labels_of(given)
    assert labels["0"] == {"weight": "frozen", "bias": "frozen"} and labels["1"]["weight"] == "trained"
    with pytest.warns(UserWarning, match=r"2 of 4 parameters of Sequential.*such as '0\.weight'.*fz\.labels_of"):
        fz.init(given, fz.sgd(0.1), mesh, policy="fp32")
    optimizer = fz.partition_by(labels, {"trained": fz.sgd(0.1), "frozen": None})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        state = fz.init(given, optimizer, mesh, policy="fp32")
    apply, _ = fz.functional(given)
    _, gradient = fz.value_and_grad(lambda p: apply(p, torch.ones(1, 4)).sum())(state)
    assert [p is None for p in gradient.pieces] == [True, True, False, False]


def test_labels_are_of_a_module():
    with pytest.raises(TypeError, match=r"expected an nn\.Module or a function that makes one, got 3"):
        fz.labels_of(3)  # type: ignore[arg-type]
