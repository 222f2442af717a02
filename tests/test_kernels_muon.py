"""Muon's momentum: its Triton kernel, compiled and op by op alike for every storage; and the orthogonalization."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tests.test_kernels_update as shared
from fzero.kernels import compiled
from fzero.kernels.muon import MOMENTUM, momentum, orthogonalize
from tests.test_kernels_update import BFLOAT, FLOAT, HALF, assert_same_bits, expected, operands, renewed
from tests.triton_process import compiled as compiled_by_triton
from tests.triton_process import interpreted

# The direction is a bfloat16 that is written anew.
STORAGES = [(BFLOAT, kind, FLOAT) for kind in (FLOAT, BFLOAT, HALF, "8-bit")]
ENTRIES: dict[str, Any] = {
    name: (MOMENTUM, torch.tensor([0.5]), (1 - 0.95, (1 - 0.95) * nesterov))
    for name, nesterov in (("momentum", False), ("looked ahead", True))
}
OTHER_PROCESS = """
import tests.test_kernels_update as shared
from tests.test_kernels_muon import ENTRIES, STORAGES
shared.UPDATES |= ENTRIES
"""


@pytest.fixture(autouse=True)
def entries(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, entry in ENTRIES.items():
        monkeypatch.setitem(shared.UPDATES, name, entry)


def test_interpreted_triton_kernel_equals_the_reference() -> None:
    looked_ahead = "shared.check_triton('looked ahead', 'cpu', STORAGES[1:])\n"
    interpreted(OTHER_PROCESS + looked_ahead + "shared.check_triton('momentum', 'cpu', STORAGES[:1])")


def test_triton_kernel_compiles_for_hopper() -> None:
    storages = [("bf16", "bf16"), ("bf16", "signed")]
    compiled_by_triton(OTHER_PROCESS + f"shared.check_ptx('momentum', {storages})")


@pytest.mark.gpu
@pytest.mark.parametrize("name", ENTRIES)
def test_triton_kernel_on_a_gpu_equals_the_reference_on_a_cpu(name: str) -> None:
    shared.check_triton(name, "cuda", STORAGES)


@pytest.mark.parametrize("storage", STORAGES, ids=str)
@pytest.mark.parametrize("name", ENTRIES)
def test_the_op_equals_the_reference(name: str, storage: tuple[Any, ...]) -> None:
    for n in (1, 1000):
        arguments = operands(name, storage, (n,))
        wanted = expected(name, arguments, stochastic=True)
        assert_same_bits(renewed(name, arguments, stochastic=True), wanted)


# AdamW's codes are compiled in any case.
@pytest.mark.parametrize("storage", [STORAGES[1], pytest.param(STORAGES[3], marks=pytest.mark.slow)], ids=str)
def test_what_is_compiled_equals_the_reference(storage: tuple[Any, ...]) -> None:
    arguments = operands("looked ahead", storage, (compiled.MIN_COMPILED + 5,))
    wanted = expected("looked ahead", arguments, stochastic=True)
    assert_same_bits(renewed("looked ahead", arguments, stochastic=True), wanted)
    assert compiled._compiler.works


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("storage", [STORAGES[0], STORAGES[1]], ids=str)
def test_it_is_momentum_and_marks_what_stays(storage: tuple[Any, ...], nesterov: bool) -> None:
    arguments = operands("momentum", storage, (1000,))
    ((_, old),), (g,) = arguments["states"], arguments["grads"]
    given = {**arguments, "states": [(old,)]}
    ((direction, new),) = momentum(**given, decay=0.95, nesterov=nesterov, stochastic=False)
    stay = ~g.isfinite()
    assert torch.equal(direction.isnan(), stay)
    assert torch.equal(new[stay], old[stay])
    gradient = 0.5 * g.double()
    mean = old.double().lerp(gradient, 0.05)
    wanted = gradient.lerp(mean, 0.95) if nesterov else mean
    tolerance = {FLOAT: 1e-6, BFLOAT: 2.0**-8}[old.dtype]
    torch.testing.assert_close(new[~stay].double(), mean[~stay], rtol=tolerance, atol=1e-7)
    torch.testing.assert_close(direction[~stay].double(), wanted[~stay], rtol=2.0**-8, atol=1e-7)


def test_a_factor_of_nan_changes_no_mean() -> None:
    for storage in STORAGES:
        arguments = operands("momentum", storage, (1000,))
        states = [state[1:] for state in arguments["states"]]
        given = {**arguments, "states": states, "scalars": torch.tensor([torch.nan])}
        ((direction, *new),) = momentum(**given, decay=0.95, nesterov=True, stochastic=True)
        assert direction.isnan().all()
        assert_same_bits([new], states)


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (30, 4), (4, 30), (33, 33)], ids=str)
def test_a_matrix_becomes_about_orthogonal(shape: tuple[int, int]) -> None:
    # Singular values down to a twentieth of the largest come to between 0.6 and 1.3.
    generator = torch.Generator().manual_seed(0)
    u, _, v = torch.linalg.svd(torch.randn(shape, generator=generator), full_matrices=False)
    values = torch.linspace(1.0, 0.05, min(shape))
    got = orthogonalize(((u * values) @ v * 3).bfloat16())
    assert (got.shape, got.dtype) == (shape, BFLOAT)
    singular = torch.linalg.svdvals(got.float())
    assert singular.min() > 0.6
    assert singular.max() < 1.3
    # The singular vectors stay: they turn the result into a diagonal.
    turned = u.T @ got.float() @ v.T
    assert (turned - turned.diagonal().diag()).abs().max() < 0.08
    assert (turned.diagonal() > 0.6).all()


def test_more_steps_bring_up_smaller_singular_values() -> None:
    matrix = torch.diag(torch.tensor([1.0, 1e-3])).bfloat16()
    small = [orthogonalize(matrix, steps=steps)[1, 1].item() for steps in (1, 3, 5)]
    assert small == sorted(small)
    assert small[0] < 0.01 < 0.4 < small[2]


def test_a_matrix_of_zeros_stays() -> None:
    assert not orthogonalize(torch.zeros(4, 6, dtype=BFLOAT)).any()
