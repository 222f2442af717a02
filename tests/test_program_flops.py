"""`program.flops()`: what torch's own counter counts while the step runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

import fzero as fz

ATEN = torch.ops.aten
# torch's counter leaves attention out where the CPU's own kernel does it.
CPU_ATTENTION = {
    ATEN._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, out_shape, **__: sdpa_flop_count(q, k, v),
    ATEN._scaled_dot_product_flash_attention_for_cpu_backward: lambda g, q, k, v, *_, out_shape, **__: (
        sdpa_backward_flop_count(g, q, k, v)
    ),
}


class Mixed(nn.Module):
    """Convolution, attention and products of both kinds."""

    def __init__(self, math_attention: bool) -> None:
        super().__init__()
        self.math_attention = math_attention
        self.convolve = nn.Conv1d(3, 16, 5, padding=2)
        self.qkv = nn.Linear(16, 48)
        self.out = nn.Linear(16, 7, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.convolve(x)).transpose(1, 2)
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4).unbind()
        if self.math_attention:
            mixed = torch.softmax(q @ k.transpose(-1, -2), -1) @ v
        else:
            mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))


def step_of(module: nn.Module, **options: Any) -> tuple[fz.State, Any]:
    apply, params = fz.functional(module)
    state = fz.init(params, fz.adamw(1e-3), fz.make_mesh("cpu"), policy="fp32")
    return state, fz.train_step(lambda params, x: apply(params, x).square().mean(), donate=False, **options)


def counted(f: Callable[..., Any], *args: Any) -> int:
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        f(*args)
    return int(counter.get_total_flops())


@pytest.mark.parametrize("math_attention", [False, True])
@pytest.mark.parametrize("microbatches", [1, 2])
def test_a_program_has_the_flops_of_the_eager_step(math_attention: bool, microbatches: int) -> None:
    state, step = step_of(Mixed(math_attention), microbatches=microbatches)
    x = torch.randn(4, 3, 20)
    flops = fz.trace(step)(state, x).flops()
    assert isinstance(flops, int)
    assert flops == counted(step.f, state, x) > 0


def test_a_product_of_two_matrices() -> None:
    program = fz.trace(lambda a, b: a @ b)(torch.ones(3, 5), torch.ones(5, 7))
    assert program.flops() == 2 * 3 * 5 * 7


def test_attention_counts_on_a_cpu_too() -> None:
    q = torch.ones(2, 4, 6, 8)
    program = fz.trace(nn.functional.scaled_dot_product_attention)(q, q, q)
    assert program.flops() == 2 * (2 * 4) * (2 * 6 * 6 * 8)


def test_what_is_made_again_counts_again() -> None:
    module = nn.Sequential(*(nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 8)) for _ in range(3)))
    x = torch.randn(5, 8)
    kept, again = (
        fz.trace(step)(state, x).flops() for state, step in (step_of(module), step_of(module, remat="block"))
    )
    first = 2 * 5 * 8 * 32  # of each block the first product is made again; the last one's result nobody reads
    assert again - kept == 3 * first
