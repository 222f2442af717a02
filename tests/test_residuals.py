"""Residuals as data to count, and as a table to read."""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

import fzero as fz


def hidden(w: Tensor, x: Tensor) -> Tensor:
    return torch.tanh(x @ w).sum(0)


def test_they_are_a_tree_of_pieces_and_what_is_saved() -> None:
    forward, _ = fz.split_vjp(hidden)
    _, residuals = forward(torch.ones(4, 3), torch.ones(2, 4))
    assert fz.tree.paths(residuals) == ["saved.0", "saved.1", "saved.2"]
    assert residuals.nbytes == 4 * (12 + 8 + 6)
    assert repr(residuals) == "Residuals(3 tensors saved, 104 bytes; 0 by reference)"
    assert fz.tree.structure(fz.tree.map(lambda x: x + 1, residuals)) == fz.tree.structure(residuals)


def test_another_shape_is_another_structure() -> None:
    forward, _ = fz.split_vjp(hidden)
    _, small = forward(torch.ones(4, 3), torch.ones(2, 4))
    _, large = forward(torch.ones(4, 3), torch.ones(5, 4))
    assert fz.tree.structure(small) != fz.tree.structure(large)


def test_the_listing_counts_what_the_forward_saves() -> None:
    apply, params = fz.functional(nn.Sequential(nn.Linear(6, 33), nn.GELU(), nn.Linear(33, 20), nn.LayerNorm(20)))
    state = fz.init(params, fz.adamw(1e-2), fz.make_mesh("cpu"), policy="bf16")
    x = torch.ones(5, 6, dtype=torch.bfloat16)
    forward, _ = fz.split_vjp(apply)
    _, residuals = forward(state, x)
    listing = fz.residuals(apply)(state, x)
    assert listing.nbytes == residuals.nbytes
    assert [(s.shape, s.dtype) for s in listing] == [(tuple(t.shape), t.dtype) for t in residuals.saved]
    assert {s.block for s in listing if s.source == "native_layer_norm"} == {"3"}


def test_the_listing_is_a_table() -> None:
    lines = repr(fz.residuals(hidden)(torch.ones(4, 3), torch.ones(2, 4))).splitlines()
    assert re.fullmatch(r"48  float32\[4, 3\]  argument 0", lines[0])
    assert re.fullmatch(r"24  float32\[2, 3\]  tanh        .*test_residuals\.py:\d+ \(hidden\)", lines[2])
    assert lines[-1] == "104 bytes in 3 tensors"
    assert repr(fz.SavedResiduals()) == "0 bytes in 0 tensors"


def test_recomputation_saves_its_arguments_alone() -> None:
    w, x = torch.ones(4, 4), torch.ones(2, 4)

    def deep(w: Tensor, x: Tensor) -> Tensor:
        for _ in range(3):
            x = torch.tanh(x @ w)
        return x

    kept, again = fz.residuals(deep)(w, x), fz.residuals(fz.remat(deep))(w, x)
    assert [s.source for s in again] == ["argument 0", "argument 1"]
    assert again.nbytes == 4 * (16 + 8) < kept.nbytes
