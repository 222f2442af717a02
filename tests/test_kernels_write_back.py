"""The write-back: its Triton kernel, compiled and op by op alike for every storage, and what it computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import tests.test_kernels_update as shared
from fzero.kernels import compiled
from fzero.kernels.storage import load
from fzero.kernels.write_back import WRITE_BACK, write_back_scalars
from tests import triton_process
from tests.test_kernels_update import BFLOAT, FLOAT, HALF, assert_same_bits, expected, operands, renewed

STORAGES = [(kind, FLOAT, FLOAT) for kind in (FLOAT, BFLOAT, HALF, "split")]
ENTRY: Any = (WRITE_BACK, write_back_scalars(torch.tensor(1e-2), torch.tensor(1e-3), 0.1), ())
OTHER_PROCESS = """
import tests.test_kernels_update as shared
from tests.test_kernels_write_back import ENTRY, STORAGES
shared.UPDATES["write_back"] = ENTRY
"""


@pytest.fixture(autouse=True)
def entry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(shared.UPDATES, "write_back", ENTRY)


def test_interpreted_triton_kernel_equals_the_reference() -> None:
    triton_process.interpreted(OTHER_PROCESS + "shared.check_triton('write_back', 'cpu', STORAGES)")


def test_triton_kernel_compiles_for_hopper() -> None:
    storages = [("bf16",), ("split",)]
    triton_process.compiled(OTHER_PROCESS + f"shared.check_ptx('write_back', {storages})")


@pytest.mark.gpu
def test_triton_kernel_on_a_gpu_equals_the_reference_on_a_cpu() -> None:
    shared.check_triton("write_back", "cuda", STORAGES)


@pytest.mark.parametrize("storage", STORAGES, ids=str)
def test_the_op_and_what_is_compiled_equal_the_reference(storage: tuple[Any, ...]) -> None:
    # One storage is compiled.
    for n in (1, 1000, compiled.MIN_COMPILED) if storage[0] == "split" else (1, 1000):
        arguments = operands("write_back", storage, (n,), BFLOAT)
        wanted = expected("write_back", arguments, stochastic=True)
        before = shared.on("cpu", arguments)["states"]
        assert_same_bits(renewed("write_back", arguments, stochastic=True), wanted)
        assert_same_bits(arguments["states"], before)
        rest = (arguments[key] for key in ("grads", "scalars", "keys", "offsets"))
        torch.ops.fzero.write_back_(list(arguments["states"][0]), *rest, (), True)
        assert_same_bits(arguments["states"], wanted)
    assert compiled._compiler.works


@pytest.mark.parametrize("storage", STORAGES, ids=str)
def test_it_steps_along_the_direction_and_leaves_what_has_none(storage: tuple[Any, ...]) -> None:
    arguments = operands("write_back", storage, (1000,))
    (old,), (direction,) = arguments["states"], arguments["grads"]
    (new,) = renewed("write_back", arguments, stochastic=True)
    stay = ~direction.isfinite()
    assert 128 < stay.sum() < 300
    assert all(torch.equal(x[stay], y[stay]) for x, y in zip(old, new, strict=True))
    exact = load(old).double() * (1 - 1e-3 * 0.1) - 1e-2 * direction.double()
    spacing = {FLOAT: 2.0**-22, BFLOAT: 2.0**-7, HALF: 2.0**-10, "split": 2.0**-22}[storage[0]]
    error = (load(new).double() - exact)[~stay].abs()
    assert (error <= spacing * exact[~stay].abs().clamp(min=2.0**-4)).all()
    assert (load(new) != load(old))[~stay].float().mean() > 0.3


def test_transforms_see_the_reference() -> None:
    zeros = torch.zeros(1, 2, dtype=torch.int32)

    def new(p: Tensor, direction: Tensor) -> Tensor:
        return WRITE_BACK([(p,)], [direction], ENTRY[1], zeros, zeros[:, 0], numbers=(), stochastic=False)[0][0]

    p, direction = torch.randn(9), torch.randn(9)
    out, pullback, *_ = torch.func.vjp(new, p, direction)
    assert torch.equal(out, new(p, direction))
    for got, wanted in zip(pullback(torch.ones(9)), (ENTRY[1][0], -ENTRY[1][1]), strict=True):
        assert torch.equal(got, wanted.expand(9))
