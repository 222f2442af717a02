"""Operations that a GPU has fewer instructions for give what Triton's own give, bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fzero.kernels.nvidia import jit, narrowed, reciprocal, root, signed_as, tl, widened
from tests.triton_process import compiled, interpreted

FLOAT = torch.float32


@jit
def every_operation(x_in, y_in, code_in, reciprocals, roots, signs, signed, unsigned, wide, COUNT: tl.constexpr):
    place = tl.program_id(0) * COUNT + tl.arange(0, COUNT)
    x, y, code = tl.load(x_in + place), tl.load(y_in + place), tl.load(code_in + place)
    tl.store(reciprocals + place, reciprocal(x))
    tl.store(roots + place, root(y))
    tl.store(signs + place, signed_as(tl.full((COUNT,), 2.5, tl.float32), x))
    low, high = narrowed(code, True), narrowed(code, False)
    tl.store(signed + place, low)
    tl.store(unsigned + place, high)
    tl.store(wide + place, widened(low) + widened(high))


def check(device: str, step: int) -> None:
    """Compare every `step`-th of the numbers that each operation is made for."""
    count = 1024

    def patterns(first: int, last: int) -> Tensor:
        found = torch.arange(first, last, step, dtype=torch.int32)
        return found[: len(found) // count * count].view(FLOAT)

    x = patterns(1 << 23, 253 << 23)
    x = torch.cat([x, -x])
    y = patterns(0, 0x7F800000)
    y = torch.cat([y] * (1 + len(x) // len(y)))[: len(x)]
    code = (torch.arange(len(x), dtype=torch.int32) % 4096 - 2048).to(device)
    x, y = x.to(device), y.to(device)
    reciprocals, roots, signs = torch.empty_like(x), torch.empty_like(x), torch.empty_like(x)
    signed, unsigned = code.to(torch.int8), code.to(torch.uint8)
    wide = torch.empty_like(code)
    every_operation[(len(x) // count,)](x, y, code, reciprocals, roots, signs, signed, unsigned, wide, COUNT=count)
    assert torch.equal(reciprocals.cpu(), 1.0 / x.cpu())
    assert torch.equal(roots.cpu(), y.cpu().double().sqrt().float())
    assert torch.equal(signs.cpu(), torch.where(x.cpu() > 0, 2.5, -2.5))
    assert torch.equal(signed, code.clamp(-128, 127).to(torch.int8))
    assert torch.equal(unsigned, code.clamp(0, 255).to(torch.uint8))
    assert torch.equal(wide, signed.int() + unsigned.int())


def test_interpreted_operations_are_exact() -> None:
    interpreted("from tests.test_kernels_nvidia import check; check('cpu', 40_009)")


@pytest.mark.gpu
def test_operations_on_a_gpu_are_exact_for_every_seventh_number() -> None:
    check("cuda", 7)


def test_operations_compile_to_few_instructions() -> None:
    # As measured by `benchmarks/instructions.py`: for 8 elements, with what stands before them.
    compiled(
        """
from instructions import KERNELS, _counted
for name, most in {"AdamW, bf16": 520, "AdamW, 8-bit moments": 800, "Lion, 8-bit momentum": 450}.items():
    found = _counted(*KERNELS[name])
    assert found["for 8 elements"] <= most, (name, found)
    bits = found["global memory by bits"]
    assert set(bits) == {32, 128}, bits  # the numbers of a step, and scales, are single ones
    assert found["called"] == 0
"""
    )
