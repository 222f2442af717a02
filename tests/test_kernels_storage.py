"""How values are stored: split masters are exact, whatever is not to change keeps its bits, stores round."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fzero.kernels.codes import FLOOR
from fzero.kernels.storage import (
    BLOCK,
    blocks_of,
    encode,
    grouped,
    join_master,
    load,
    split_master,
    store,
)  # fmt: skip

FLOAT, BFLOAT, HALF = torch.float32, torch.bfloat16, torch.float16


def patterns(n: int = 1 << 16) -> Tensor:
    """Float32 numbers of all sizes, those at the ends among them, without NaN."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (n,), dtype=torch.int64, generator=generator).to(torch.int32)
    ends = [0, -(2**31), 1, 0x007FFFFF, 0x00800000, 0x7F7FFFFF, 0x7F7F8000, 0x7F800000, 0x3F808000, 0x3F807FFF]
    x = torch.cat([bits, torch.tensor(ends, dtype=torch.int32)]).view(FLOAT)
    return x[~x.isnan()]


def noise(n: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 1 << 16, (n,), dtype=torch.int32, generator=generator)


def same_bits(x: Tensor, y: Tensor) -> bool:
    return x.dtype == y.dtype and torch.equal(x.view(torch.uint8), y.view(torch.uint8))


def test_a_split_master_is_joined_exactly() -> None:
    master = patterns()
    p, remainder = split_master(master)
    assert (p.dtype, remainder.dtype) == (BFLOAT, torch.int16)
    assert same_bits(join_master(p, remainder), master)


def test_the_first_half_is_the_master_rounded_with_ties_up() -> None:
    master = patterns()
    p, remainder = split_master(master)
    tie = (master.view(torch.int32) & 0xFFFF) == 0x8000
    assert 0 < tie.sum() < 100
    assert same_bits(p[~tie], master.to(BFLOAT)[~tie])
    assert (remainder[tie] == -0x8000).all()
    assert (p.abs() >= master.abs())[tie].all()


def test_a_nan_stays_a_nan() -> None:
    bits = torch.tensor([0x7F800001, 0x7F808000, 0x7FC00000, 0x7FFFFFFF, -1, -0x400000, -0x7FFFFF], dtype=torch.int32)
    master = bits.view(FLOAT)
    assert master.isnan().all()
    assert join_master(*split_master(master)).isnan().all()


def test_stored_values_are_told_apart_by_their_dtypes() -> None:
    x, half, short = torch.ones(3), torch.ones(3, dtype=BFLOAT), torch.ones(3, dtype=torch.int16)
    int8, uint8, scale = short.to(torch.int8), short.to(torch.uint8), torch.ones(1)
    for parts in (
        [[half, short], [int8, scale], [uint8, scale]],
        [[half], [half], [half]],
        [[x], [int8, scale], [x]],
        [[half, short], [half], [uint8, scale]],
        [[x.half()], [x], [x]],
    ):
        found = grouped([tensor for part in parts for tensor in part])
        assert [[id(x) for x in value] for value in found] == [[id(x) for x in part] for part in parts]


@pytest.mark.parametrize("dtypes", [[torch.int8], [torch.uint8, BFLOAT], [torch.int16], [FLOAT, torch.int64]], ids=str)
def test_other_dtypes_are_refused(dtypes: list[torch.dtype]) -> None:
    with pytest.raises(TypeError, match="grouped: nothing is stored as"):
        grouped([torch.ones(3).to(dtype) for dtype in dtypes])


# What is stored to begin with, for n elements.
OLD: dict[str, Any] = {
    "float32": lambda x: (x,),
    "bfloat16": lambda x: (x.to(BFLOAT),),
    "float16": lambda x: (x.to(HALF),),
    "split": split_master,
    "signed": lambda x: encode(x, signed=True),
    "unsigned": lambda x: encode(x.abs(), signed=False),
}


def stepped(value: Tensor, old: Any, ok: Tensor, noise16: Tensor | None) -> Any:
    """What is stored where only some elements change, as in an update."""
    return store(torch.where(ok, value, load(old)), old, torch.tensor(True), noise16)


every_storage = pytest.mark.parametrize("make", OLD.values(), ids=OLD.keys())


def some(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


@every_storage
@pytest.mark.parametrize("n", [0, 1, 127, 128, 1000])
def test_what_is_not_to_change_keeps_its_bits(make: Any, n: int) -> None:
    old = make(some(n))
    new = stepped(some(n, 1).abs() * 100, old, torch.zeros(n, dtype=torch.bool), noise(n))
    assert all(same_bits(x, y) for x, y in zip(new, old, strict=True))


@pytest.mark.parametrize("signed", [True, False])
def test_codes_keep_their_bits_by_every_noise_unless_what_they_stand_for_is_no_float32(signed: bool) -> None:
    codes = torch.arange(-127, 128).to(torch.int8) if signed else torch.arange(FLOOR, 256).to(torch.uint8)
    top = 127 if signed else 255
    for bits in (0, 1, 32767, 65534, 65535):
        for scale in (2.0**-90, 1.1e-7, 1 / 3, 1.0, 1.9999999, 7e20, 2.0**126):
            old = torch.cat([codes[-1:], codes[:127]]), torch.tensor([scale])
            assert old[0][0] == top
            new = stepped(
                load(old), old, torch.zeros(128, dtype=torch.bool), torch.full((128,), bits, dtype=torch.int32)
            )
            assert all(same_bits(x, y) for x, y in zip(new, old, strict=True)), (scale, bits)
    old = codes[:128], torch.tensor([1e-44])
    kept = store(load(old), old, torch.tensor(False), None)
    assert all(same_bits(x, y) for x, y in zip(kept, old, strict=True))


@every_storage
@pytest.mark.parametrize("is_stochastic", [False, True])
def test_what_changes_is_stored_to_the_precision_there_is(make: Any, is_stochastic: bool) -> None:
    n = 1000
    old, value = make(some(n)), some(n, 1).abs()
    ok = torch.arange(n) % 3 > 0
    new = stepped(value, old, ok, noise(n) if is_stochastic else None)
    assert [(x.dtype, x.shape) for x in new] == [(x.dtype, x.shape) for x in old]
    wanted, found = torch.where(ok, value, load(old)), load(new)
    if not new[0].is_floating_point():
        # Between two codes, or below the least.
        padded = torch.nn.functional.pad(wanted.abs(), (0, -n % BLOCK)).view(-1, BLOCK)
        largest = padded.amax(1).repeat_interleave(BLOCK)[:n]
        gap = wanted.abs() / 8 + largest * 2e-5
    else:
        gap = wanted.abs() * (0.0 if len(new) == 2 or new[0].dtype == FLOAT else 2**-7)
    assert ((found - wanted).abs() <= gap).all()
    if new[0].is_floating_point():
        assert all(same_bits(x[~ok], y[~ok]) for x, y in zip(new, old, strict=True))


@pytest.mark.parametrize("name", ["signed", "unsigned"])
def test_a_block_with_nothing_to_change_keeps_its_bits_and_others_do_not(name: str) -> None:
    n = 3 * BLOCK + 5
    old = OLD[name](some(n))
    ok = torch.zeros(n, dtype=torch.bool)
    ok[BLOCK + 7] = ok[-1] = True
    new = stepped(torch.full((n,), 50.0), old, ok, None)
    assert new[1].tolist() == [old[1][0].item(), 50, old[1][2].item(), 50]
    kept = torch.zeros(n, dtype=torch.bool)
    kept[:BLOCK] = kept[2 * BLOCK : 3 * BLOCK] = True
    assert torch.equal(new[0][kept], old[0][kept])
    # What stays in a block that changes is encoded again under the larger scale.
    rest = ~kept & ~ok
    assert (new[0][rest] != old[0][rest]).any()
    kept_to = load(old).abs() / 8 + 50 * 2e-5
    assert ((load(new) - load(old)).abs() <= kept_to)[rest].all()


@every_storage
def test_rows_are_stored_as_what_lies_in_one_dimension(make: Any) -> None:
    n = 3 * BLOCK
    old, value, ok, bits = make(some(n)), some(n, 1).abs(), torch.arange(n) % 5 > 0, noise(n)
    flat = stepped(value, old, ok, bits)
    by_rows = tuple(x if x.shape == (3,) else x.view(3, BLOCK) for x in old)
    rows = stepped(value.view(3, -1), by_rows, ok.view(3, -1), bits.view(3, -1))
    assert all(torch.equal(x.flatten(), y) for x, y in zip(rows, flat, strict=True))
    assert torch.equal(load(by_rows).flatten(), load(old))


def through_halves(x: Tensor) -> Tensor:
    p, remainder = split_master(x)
    return join_master(p, remainder)


def test_halves_pass_derivatives_through() -> None:
    f, master = through_halves, some(8)
    out, pullback, *_ = torch.func.vjp(f, master)
    assert torch.equal(out, master)
    assert torch.equal(pullback(torch.ones(8))[0], torch.ones(8))
    batch = master.expand(3, 8).contiguous()
    assert torch.equal(torch.func.vmap(f)(batch), batch)


@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # torch.func.jvp, at its first use
def test_halves_pass_tangents_through() -> None:
    found = torch.func.jvp(through_halves, (some(8),), (torch.ones(8),))
    assert torch.equal(found[0], some(8)) and torch.equal(found[1], torch.ones(8))


def test_blocks_of() -> None:
    assert [blocks_of(n) for n in (0, 1, 128, 129, 1000)] == [0, 1, 1, 2, 8]
