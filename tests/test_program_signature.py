"""Signatures: equal where the same program runs, and they travel."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch

import fzero as fz
from fzero.program.signature import Signature, examples_of, simulated_on


def signature(*arguments: Any) -> Signature:
    return Signature.of((arguments, {}), "f")[0]


X = torch.zeros(2, 3)
OTHERS: dict[str, tuple[Any, ...]] = {
    "a shape": (torch.zeros(3, 2), 1.0),
    "strides": (torch.zeros(3, 2).T, 1.0),
    "a dtype": (X.double(), 1.0),
    "a number": (X, 2.0),
    "the type of a number": (X, 1),
    "a tree": ({"x": X}, 1.0),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_makes_another_signature(name: str) -> None:
    assert signature(X, 1.0) == signature(torch.ones(2, 3), 1.0)
    assert signature(X, 1.0) != signature(*OTHERS[name])


def test_autocast_around_the_call_makes_another_signature() -> None:
    before = signature(X)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert signature(X) != before


def test_a_signature_travels() -> None:
    state = fz.init({"w": torch.ones(40, 2)}, fz.adamw(1e-2), fz.make_mesh("cpu"), policy="bf16")
    sent = signature(state.as_primal(), X, "name")
    arrived = pickle.loads(pickle.dumps(sent))
    assert arrived == sent and hash(arrived) == hash(sent) and arrived.paths == sent.paths
    assert [(x.shape, x.dtype) for x in arrived.examples()] == [(x.shape, x.dtype) for x in sent.examples()]


def test_a_simulated_mesh_is_found() -> None:
    state = fz.init({"w": torch.ones(40, 2)}, fz.adamw(1e-2), fz.make_mesh("cpu", data=4, simulate=True))
    assert simulated_on((state, X)) == torch.device("cpu")
    assert simulated_on((X,)) is None
    assert signature(state, X).simulated_on == torch.device("cpu")
    assert signature(X).simulated_on is None
    examples = examples_of(fz.tree.leaves(state.params), torch.device("cpu"))
    assert {x.device.type for x in examples} == {"cpu"}


def test_a_constant_has_to_be_hashable() -> None:
    with pytest.raises(TypeError, match="f got an argument that is neither a tensor nor hashable"):
        signature(X, bytearray(b"x"))
