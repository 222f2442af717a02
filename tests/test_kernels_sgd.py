"""SGD: its Triton kernel, its compiled reference and the reference op by op agree bit for bit, and it is torch's."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fzero as fz
from fzero.kernels import compiled
from fzero.kernels.launch import launch
from tests.test_kernels_update import (
    BFLOAT,
    FLOAT,
    UPDATES,
    ZERO,
    assert_same_bits,
    check_triton,
    compiled_for_hopper,
    expected,
    on,
    op_by_op,
    operands,
    renewed,
)
from tests.triton_process import interpreted

__all__ = ["op_by_op"]  # a fixture


def check_all(device: str) -> None:
    check_triton("sgd", device, [(BFLOAT, BFLOAT, None)])
    check_triton("nesterov", device, [("split", "8-bit", None)])
    # Without momentum a state is the parameter alone.
    check_triton("plain", device, [(torch.float16, None, None), ("split", None, None)])
    check_rounding(device)


def check_rounding(device: str) -> None:
    """Store float32 numbers of all sizes: a step of -1 along them from 0."""
    update, _, numbers = UPDATES["plain"]
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (8000,), dtype=torch.int64, generator=generator).to(torch.int32)
    half = torch.randn(8000, generator=generator) * 2.0 ** torch.linspace(-30, 17, 8000)  # about what float16 holds
    g = torch.cat([bits.view(FLOAT), half])
    for storage in (BFLOAT, torch.float16, "split"):
        arguments = operands("plain", (storage, None, None), (len(g),), FLOAT)
        arguments |= {"grads": [g], "scalars": torch.tensor([-1.0, 0.0, 1.0])}
        arguments["states"] = [tuple(torch.zeros_like(x) for x in arguments["states"][0])]
        for stochastic in (False, True):
            there = on(device, arguments)
            launch(there["states"], **there, formula=update.kernel, numbers=numbers, stochastic=stochastic)
            assert_same_bits(there["states"], expected("plain", arguments, stochastic=stochastic))


def test_interpreted_triton_kernel_equals_the_reference() -> None:
    interpreted("from tests.test_kernels_sgd import check_all; check_all('cpu')")


def test_triton_kernel_compiles_for_hopper_without_fused_multiply_add() -> None:
    compiled_for_hopper("nesterov", [("bf16",), ("split", "signed")])


@pytest.mark.gpu
def test_triton_kernel_on_a_gpu_equals_the_reference_on_a_cpu() -> None:
    check_all("cuda")


@pytest.mark.parametrize(
    ("name", "stochastic"),
    [("nesterov", True), ("plain", False), pytest.param("plain", True, marks=pytest.mark.slow)],
)
def test_compiled_equals_op_by_op(name: str, stochastic: bool) -> None:
    arguments = operands(name, (BFLOAT, BFLOAT, None), (compiled.MIN_COMPILED + 1,))
    assert_same_bits(renewed(name, arguments, stochastic=stochastic), expected(name, arguments, stochastic=stochastic))
    assert compiled._compiler.works


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_follows_torch_sgd(momentum: float, nesterov: bool, weight_decay: float, op_by_op: None) -> None:
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(1000, generator=generator)
    theirs = p.clone().requires_grad_()
    how: dict[str, Any] = {"momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay}
    optimizer, ours = torch.optim.SGD([theirs], lr=1e-2, **how), fz.sgd(1e-2, **how)
    state: tuple[torch.Tensor, ...] = (p, torch.zeros(1000)) if momentum else (p,)
    zeros = torch.zeros(1, 2, dtype=torch.int32)
    for step in range(10):
        g = torch.randn(1000, generator=generator)
        theirs.grad = g.clone()
        optimizer.step()
        scalars = ours.scalars_of(ZERO + step, 0.5, True)
        (state,) = ours.kernel([state], [g * 2], scalars, zeros, zeros[0, :1], numbers=ours.numbers, stochastic=False)
    torch.testing.assert_close(state[0], theirs.detach(), rtol=1e-6, atol=1e-6)


def test_scalars_are_exact_to_float32() -> None:
    scalars = fz.sgd(lambda step: torch.tensor(3e-4), weight_decay=0.1).scalars_of(ZERO, torch.tensor(0.25), True)
    assert scalars.dtype == FLOAT
    torch.testing.assert_close(scalars, torch.tensor([3e-4, 0.1, 0.25]), rtol=1e-7, atol=0)
