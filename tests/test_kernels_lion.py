"""Lion: its Triton kernel, its compiled reference and the reference op by op agree bit for bit, and it is Lion."""

from __future__ import annotations

import pytest
import torch

import fzero as fz
from fzero.kernels import compiled
from tests.test_kernels_update import (
    BFLOAT,
    FLOAT,
    ZERO,
    assert_same_bits,
    check_triton,
    compiled_for_hopper,
    expected,
    op_by_op,
    operands,
    renewed,
)  # fmt: skip
from tests.triton_process import interpreted

__all__ = ["op_by_op"]  # a fixture


def test_interpreted_triton_kernel_equals_the_reference() -> None:
    interpreted("from tests.test_kernels_update import *; check_triton('lion', 'cpu', STORAGES[3:6])")


def test_triton_kernel_compiles_for_hopper_without_fused_multiply_add() -> None:
    compiled_for_hopper("lion", [("bf16", "bf16"), ("split", "signed")])


@pytest.mark.gpu
def test_triton_kernel_on_a_gpu_equals_the_reference_on_a_cpu() -> None:
    check_triton("lion", "cuda")


def test_compiled_equals_op_by_op() -> None:
    arguments = operands("lion", (BFLOAT, BFLOAT, None), (compiled.MIN_COMPILED + 1,))
    assert_same_bits(renewed("lion", arguments, stochastic=True), expected("lion", arguments, stochastic=True))
    assert compiled._compiler.works


def test_follows_its_definition(op_by_op: None) -> None:
    generator = torch.Generator().manual_seed(0)
    p, lr, decay, b1, b2 = torch.randn(1000, generator=generator), 1e-2, 0.1, 0.9, 0.99
    ours = fz.lion(lr, b1, b2, decay)
    exact_p, exact_m = p.double(), torch.zeros(1000, dtype=torch.float64)
    state: tuple[torch.Tensor, ...] = (p, torch.zeros(1000))
    zeros = torch.zeros(1, 2, dtype=torch.int32)
    for step in range(10):
        g = torch.randn(1000, generator=generator)
        scalars = ours.scalars_of(ZERO + step, 0.5, True)
        (state,) = ours.kernel([state], [g * 2], scalars, zeros, zeros[0, :1], numbers=ours.numbers, stochastic=False)
        direction = torch.sign(b1 * exact_m + (1 - b1) * g.double())
        exact_p = exact_p * (1 - lr * decay) - lr * direction
        exact_m = b2 * exact_m + (1 - b2) * g.double()
    torch.testing.assert_close(state[0].double(), exact_p, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(state[1].double(), exact_m, rtol=1e-5, atol=1e-6)


def test_no_direction_is_no_step(op_by_op: None) -> None:
    p, m = torch.ones(4), torch.zeros(4)
    g = torch.tensor([0.0, -0.0, 1e-30, -1e-30])
    zeros = torch.zeros(1, 2, dtype=torch.int32)
    ours = fz.lion(0.5)
    scalars = ours.scalars_of(ZERO, 1.0, True)
    ((new, _),) = ours.kernel([(p, m)], [g], scalars, zeros, zeros[0, :1], numbers=ours.numbers, stochastic=False)
    assert new.tolist() == [1, 1, 0.5, 1.5]


def test_scalars_are_exact_to_float32() -> None:
    scalars = fz.lion(lambda step: torch.tensor(3e-4), weight_decay=0.1).scalars_of(ZERO, torch.tensor(0.25), True)
    lr = torch.tensor(3e-4).item()
    assert scalars.dtype == FLOAT
    torch.testing.assert_close(scalars, torch.tensor([1 - lr * 0.1, lr, 0.25]), rtol=1e-7, atol=0)
