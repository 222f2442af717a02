"""8-bit codes: every code is found again, rounding keeps the mean, small squares do not vanish."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fzero as fz
from fzero.kernels.codes import BLOCK, FLOOR, decode, encode

signed_and_not = pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])


def some(n: int, signed: bool, seed: int = 0) -> Tensor:
    """Numbers of many sizes, blocks of very different scales among them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, generator=generator) ** 5 * 10.0 ** (torch.arange(n) // BLOCK % 9 - 4)
    return x if signed else x.abs()


def noise(n: int) -> Tensor:
    return torch.randint(0, 1 << 16, (n,), dtype=torch.int32, generator=torch.Generator().manual_seed(1))


def every_code(signed: bool) -> Tensor:
    return torch.arange(-127, 128, dtype=torch.int8) if signed else torch.arange(256).to(torch.uint8)


def grid(signed: bool) -> Tensor:
    """The value of every code under a scale of 1, in float64."""
    code = every_code(signed).double()
    eighths = code.abs() + 8 * 127 - (127 if signed else 255)
    value = 2 ** (eighths.div(8, rounding_mode="floor") - 127) * (1 + eighths % 8 / 8)
    return torch.where(code == 0, 0.0, value * code.sign())


@signed_and_not
def test_codes_stand_for_the_values_that_they_should(signed: bool) -> None:
    codes = every_code(signed)
    for scale in (1.0, 3.7e-5, 2.0**100):
        scales = torch.full((2,), scale)
        values = decode(codes, scales)
        torch.testing.assert_close(values.double(), grid(signed) * scales[0].double(), rtol=1e-6, atol=0)
        assert values.max() == scales[0]


@signed_and_not
def test_every_code_is_found_again(signed: bool) -> None:
    codes = torch.cat([every_code(signed), every_code(signed)])
    if not signed:
        codes = torch.where((codes > 0) & (codes < FLOOR), FLOOR, codes)
    codes[::BLOCK] = 127 if signed else 255  # a block's largest has the largest code
    for scale in (1.0, 3.7e-5, 2.0**100):
        scales = torch.full((len(codes[::BLOCK]),), scale)
        again, scales_again = encode(decode(codes, scales), signed=signed)
        assert torch.equal(again, codes) and torch.equal(scales_again, scales)


@signed_and_not
def test_nearest_is_the_nearest(signed: bool) -> None:
    x = some(BLOCK * 9, signed)
    codes, scales = encode(x, signed=signed)
    assert torch.equal(scales, x.view(9, BLOCK).abs().amax(1))
    part = x.double().view(9, BLOCK) / scales.double()[:, None]
    gap = (part.flatten()[:, None] - grid(signed)).abs()
    found = gap[torch.arange(len(x)), codes.long() + (127 if signed else 0)]
    least = gap.amin(1)
    is_floor = (codes == FLOOR) & (x > 0) & (not signed)
    assert (found <= least * (1 + 1e-4) + 1e-12)[~is_floor].all()


@signed_and_not
def test_stochastic_rounding_goes_to_neighbours_and_keeps_the_mean(signed: bool) -> None:
    n = 1 << 16
    for part in (0.9, 0.123, 0.01, 0.0004, 1e-7) + ((-0.3, -0.002) if signed else ()):
        # Every noise value once, in blocks that share a largest element: the mean is exact up to 2^-16 of a gap.
        x = torch.full((n, BLOCK), part)[:, :2].contiguous()
        x[:, 0] = 1.0
        codes, scales = encode(x, signed=signed, noise16=torch.arange(n, dtype=torch.int32)[:, None].expand(n, 2))
        values = decode(codes, scales)[:, 1].double()
        exact = x[0, 1].double()
        assert values.unique().numel() <= 2
        assert (values.min() <= exact * (1 + 1e-6) and exact * (1 - 1e-6) <= values.max()) or exact < 0
        gap = values.max() - values.min()
        assert abs(values.mean() - exact) <= gap * 2**-15 + exact.abs() * 1e-6


def test_what_is_above_zero_never_becomes_zero() -> None:
    x = torch.zeros(4 * BLOCK)
    x[0], x[BLOCK], x[2 * BLOCK] = 1.0, 1e30, 1e-20
    x[1::BLOCK], x[2::BLOCK] = 1e-35, 1e-45
    for noise16 in (None, torch.zeros(len(x), dtype=torch.int32), noise(len(x))):
        codes, scales = encode(x, signed=False, noise16=noise16)
        values = decode(codes, scales)
        assert torch.equal(codes > 0, x > 0)
        assert torch.equal(values[: 3 * BLOCK] > 0, x[: 3 * BLOCK] > 0)


@signed_and_not
def test_zeros_infinities_and_nan(signed: bool) -> None:
    x = torch.zeros(3 * BLOCK)
    x[BLOCK], x[BLOCK + 1] = float("inf"), 1.0
    x[2 * BLOCK], x[2 * BLOCK + 1] = float("nan"), 2.0
    codes, scales = encode(x, signed=signed)
    assert scales.tolist() == [0, 2.0**126, 2]
    top = 127 if signed else 255
    assert not codes[:BLOCK].any() and codes[BLOCK] == top
    assert codes[2 * BLOCK :].tolist()[:2] == [0, top]
    assert decode(codes, scales).isfinite().all()


@signed_and_not
@pytest.mark.parametrize("n", [0, 1, 127, 128, 129, 1000])
def test_a_short_last_block_is_a_block(signed: bool, n: int) -> None:
    x, bits = some(n, signed), noise(n)
    codes, scales = encode(x, signed=signed, noise16=bits)
    assert (codes.shape, scales.shape) == ((n,), (-(-n // BLOCK),))
    whole = n // BLOCK * BLOCK
    for part in (slice(0, whole), slice(whole, n)):
        some_codes, some_scales = encode(x[part], signed=signed, noise16=bits[part])
        assert torch.equal(codes[part], some_codes)
        assert torch.equal(scales[part.start // BLOCK : -(-part.stop // BLOCK)], some_scales)


def test_scales_that_do_not_fit_are_refused() -> None:
    codes = torch.ones(129, dtype=torch.int8)
    with pytest.raises(ValueError, match=r"decode: scales have shape \(1,\), expected \(2,\)"):
        decode(codes, torch.ones(1))


RATIOS = 10.0 ** -torch.arange(9.0)
ADAMW_LIKE = {"adamw": fz.adamw(1.0, weight_decay=0.0), "adam": fz.adam(1.0)}
LINEAR = {"sgd": fz.sgd(1.0, momentum=0.9), "lion": fz.lion(1.0)}


def moved(optimizer: Any, moment: torch.dtype, noisy: bool) -> Tensor:
    """How far elements with gradients of each ratio to their block's largest go in 20 steps, on average."""
    ratio = RATIOS[torch.arange(BLOCK) % 9].repeat(24)
    policy = fz.Policy(moment=moment, rounding="stochastic" if moment == torch.int8 else "nearest")
    state = fz.init({"w": torch.zeros(len(ratio))}, optimizer, fz.make_mesh("cpu"), policy=policy)
    params, opt_state, generator = state.params, state.moments, torch.Generator().manual_seed(3)
    for step in range(20):
        g = (torch.randn(len(ratio), generator=generator) * noisy + 1) * ratio
        params, opt_state = optimizer.update(params.replace(pieces=(g,)), opt_state, params, step=step, seed=7)
    w = fz.gather(params)["w"].abs()
    return torch.stack([w[ratio == r].mean() for r in RATIOS])


@pytest.mark.parametrize("noisy", [False, True], ids=["constant", "noisy"])
@pytest.mark.parametrize("name", [*ADAMW_LIKE, *LINEAR])
def test_no_element_moves_further_than_by_exact_moments(name: str, noisy: bool) -> None:
    optimizer = {**ADAMW_LIKE, **LINEAR}[name]
    exact, found = moved(optimizer, torch.float32, noisy), moved(optimizer, torch.int8, noisy)
    # Below the least signed code a linear optimizer moves few elements, each too far, and as far on average: that takes
    # more elements than these to show.
    assert (found <= exact * 1.1)[: 9 if name in ADAMW_LIKE else 6].all()
    assert (found >= exact * 0.9)[:4].all()
