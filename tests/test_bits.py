"""The bits are even, independent across elements, keys, leaves and steps, and rounding by them keeps the mean."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fzero.kernels.rounding import round_stochastic
from fzero.random.bits import GOLDEN, bits, fold, leaf_keys, mix, noises, normal, shift_right, signed, uniform

DRAWS = 1 << 16


def int32(value: int) -> Tensor:
    return torch.tensor(signed(value), dtype=torch.int32)


def words(n: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**31), 2**31, (n,), dtype=torch.int64, generator=generator).to(torch.int32)


KEYS = leaf_keys(int32(0), int32(0), "w")
PINNED_KEYS = [1600039016, -2096090855]
PINNED_BITS = [-1738540287, 1441215709, -1703090210]


def flip_rates(function: Callable[..., Tensor], arguments: list[Tensor], position: int) -> Tensor:
    """How often each output bit flips when one input bit of one argument does: (32 input bits, 32 output bits)."""
    base, rates = function(*arguments), []
    for bit in range(32):
        flipped = list(arguments)
        flipped[position] = flipped[position] ^ signed(1 << bit)
        changed = function(*flipped) ^ base
        rates.append(torch.stack([((changed >> out) & 1).float().mean() for out in range(32)]))
    return torch.stack(rates)


def correlation(x: Tensor, y: Tensor) -> float:
    return torch.corrcoef(torch.stack([x, y]))[0, 1].item()


@pytest.mark.parametrize("sequential", [True, False])
@pytest.mark.parametrize("position", [0, 1, 2], ids=["index", "k0", "k1"])
def test_each_input_bit_of_mix_flips_each_output_bit_half_the_time(position: int, sequential: bool) -> None:
    index = torch.arange(DRAWS, dtype=torch.int32) if sequential else words(DRAWS)
    rates = flip_rates(mix, [index, words(DRAWS, 1), words(DRAWS, 2)], position)
    assert rates.min() > 0.47 and rates.max() < 0.53


@pytest.mark.parametrize("position", [0, 1], ids=["seed", "step"])
def test_each_bit_of_seed_and_step_flips_each_bit_of_both_keys(position: int) -> None:
    def key(word: int) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda seed, step: fold(fold(fold(seed, word), step), 0x1234ABCD)

    counts = torch.arange(DRAWS, dtype=torch.int32)
    for word in (0, 1):
        rates = flip_rates(key(word), [counts % 7, counts // 7], position)
        assert rates.min() > 0.47 and rates.max() < 0.53


def test_bytes_of_a_stream_are_uniform() -> None:
    word = bits(KEYS, int32(0), 1 << 18)
    for byte in range(4):
        counts = torch.bincount((shift_right(word, 8 * byte) if byte else word) & 0xFF, minlength=256).double()
        expected = counts.sum() / 256
        chi2 = ((counts - expected) ** 2 / expected).sum().item()
        assert abs(chi2 - 255) < 5 * math.sqrt(2 * 255)


def drawn(keys: Tensor, first: int, n: int) -> tuple[Tensor, ...]:
    """What p, m and v of elements are rounded by."""
    return noises(torch.arange(n, dtype=torch.int32) + first, keys[0], keys[1])


def assert_even(cells: Tensor, count: int) -> None:
    counts = torch.bincount(cells.flatten(), minlength=count).double()
    expected = counts.sum() / count
    chi2 = ((counts - expected) ** 2 / expected).sum().item()
    assert abs(chi2 - (count - 1)) < 5 * math.sqrt(2 * (count - 1))


def test_each_noise_is_uniform_and_the_three_of_an_element_are_independent() -> None:
    three = drawn(KEYS, 0, 1 << 20)
    for noise in three:
        assert_even(noise, 1 << 16)
        assert abs(noise.double().mean() - 32767.5) < 5 * 2**16 / math.sqrt(12 * len(noise))
    for low in (0, 6, 12):  # four bits of each together
        p, m, v = ((noise >> low) & 15 for noise in three)
        assert_even((p * 16 + m) * 16 + v, 1 << 12)


@pytest.mark.parametrize("stream", ["neighbour", "sixteenth", "row", "step", "leaf", "seed"])
def test_noises_of_neighbours_steps_leaves_and_seeds_are_independent(stream: str) -> None:
    n = 1 << 18
    there = {
        "neighbour": drawn(KEYS, 1, n),
        "sixteenth": drawn(KEYS, 16, n),
        "row": drawn(KEYS, 4096, n),
        "step": drawn(leaf_keys(int32(0), int32(1), "w"), 0, n),
        "leaf": drawn(leaf_keys(int32(0), int32(0), "v"), 0, n),
        "seed": drawn(leaf_keys(int32(1), int32(0), "w"), 0, n),
    }[stream]
    for x in drawn(KEYS, 0, n):
        for y in there:
            assert abs(correlation(x.double(), y.double())) < 5 / math.sqrt(n)
            assert_even((x >> 10) * 64 + (y >> 10), 1 << 12)


@pytest.mark.parametrize("lag", [1, 2, 3, 16, 256, 1024, 4096])
def test_elements_of_a_stream_are_uncorrelated(lag: int) -> None:
    x = uniform(KEYS, int32(0), 1 << 18)
    assert abs(correlation(x[:-lag], x[lag:])) < 5 / math.sqrt(len(x))


def test_leaves_steps_and_seeds_are_uncorrelated_and_never_equal() -> None:
    names = [(s, t, path) for s in (0, 1) for t in (0, 1, 2) for path in ("blocks.0.w", "blocks.1.w", "blocks.0.b")]
    streams = [bits(leaf_keys(int32(s), int32(t), path), int32(0), DRAWS) for s, t, path in names]
    table = torch.corrcoef(torch.stack(streams).double()) - torch.eye(len(streams))
    assert table.abs().max() < 5.5 / math.sqrt(DRAWS)
    for i, x in enumerate(streams):
        for y in streams[:i]:
            assert (x == y).sum() <= 3


@pytest.mark.parametrize("changed", [0, 1], ids=["k0", "k1"])
def test_streams_that_differ_in_one_key_word_are_not_shifted_copies(changed: int) -> None:
    other = KEYS.clone()
    other[changed] += 1
    x, y = bits(KEYS, int32(0), DRAWS), bits(other, int32(0), DRAWS)
    for shift in range(4):
        assert (x[shift:] == y[: DRAWS - shift]).sum() <= 3
        assert (y[shift:] == x[: DRAWS - shift]).sum() <= 3


def test_keys_of_many_leaves_and_steps_differ() -> None:
    keys = {tuple(leaf_keys(int32(7), int32(t), f"blocks.{i}.w").tolist()) for t in range(40) for i in range(40)}
    assert len(keys) == 1600
    assert len({word for pair in keys for word in pair}) >= 3199


def test_mix_is_a_permutation_of_indices() -> None:
    assert bits(KEYS, int32(0), 1 << 20).unique().numel() == 1 << 20


def test_a_piece_draws_what_the_whole_leaf_draws_there() -> None:
    whole = bits(KEYS, int32(0), 1000)
    assert torch.equal(whole[300:700], bits(KEYS, int32(300), 400))
    assert torch.equal(whole[300:700], bits(KEYS, 300, 400))


def test_offsets_wrap() -> None:
    across = bits(KEYS, int32(2**31 - 10), 20)
    assert torch.equal(across[10:], bits(KEYS, int32(-(2**31)), 10))
    assert torch.equal(bits(KEYS, int32(-5), 10)[5:], bits(KEYS, int32(0), 5))
    assert torch.equal(bits(KEYS, 2**32 + 3, 4), bits(KEYS, 3, 4))


def test_bits_never_change() -> None:
    # Checkpoints and published runs rely on these: a change of the generator has to be a new one.
    assert KEYS.tolist() == PINNED_KEYS
    assert bits(KEYS, int32(0), 3).tolist() == PINNED_BITS


def test_uniform_and_normal_have_their_moments() -> None:
    n = 1 << 18
    x, z = uniform(KEYS, int32(0), n), normal(KEYS, int32(0), n)
    assert x.dtype == z.dtype == torch.float32
    assert x.min() >= 0 and x.max() < 1
    assert abs(x.mean() - 0.5) < 5 * math.sqrt(1 / 12 / n)
    assert abs(z.mean()) < 5 / math.sqrt(n)
    assert abs(z.var() - 1) < 5 * math.sqrt(2 / n)
    assert abs((z**4).mean() - 3) < 5 * math.sqrt(96 / n)
    # The distribution function at a few places.
    for place in (-2.0, -0.5, 0.0, 1.0, 2.5):
        expected = 0.5 * math.erfc(-place / math.sqrt(2))
        assert abs((z < place).float().mean() - expected) < 5 * math.sqrt(expected * (1 - expected) / n)


def test_keys_are_the_same_traced_and_under_vmap() -> None:
    def draw(seed: Tensor, step: Tensor) -> Tensor:
        return bits(leaf_keys(seed, step, "w"), int32(0), 5)

    graph = torch.fx.experimental.proxy_tensor.make_fx(draw, tracing_mode="fake")(int32(1), int32(2))
    assert torch.equal(graph(int32(3), int32(4)), draw(int32(3), int32(4)))
    steps = torch.arange(3, dtype=torch.int32)
    batched = torch.func.vmap(draw, in_dims=(None, 0))(int32(3), steps)
    assert torch.equal(batched, torch.stack([draw(int32(3), step) for step in steps]))


@pytest.mark.parametrize("value", [1.001, -1.001, 3.14159e-20, 2.7e15, 1e-39])
def test_rounding_goes_to_neighbours_and_keeps_the_mean(value: float) -> None:
    n = 1 << 16
    x = torch.full((n,), value)
    # Every noise value once: the mean is exact up to the grid of 2^-16 units in the last place.
    rounded = round_stochastic(x, torch.arange(n, dtype=torch.int32)).double()
    exact = x[0].double()
    assert rounded.unique().numel() <= 2
    assert rounded.min() <= exact <= rounded.max()
    gap = rounded.max() - rounded.min()
    assert abs(rounded.mean() - exact) <= gap * 2**-16
    drawn = round_stochastic(x, bits(KEYS, int32(0), n) & 0xFFFF).double()
    assert abs(drawn.mean() - exact) <= gap * 5 / math.sqrt(4 * n)


HALF_VALUES = {
    "normal": 1.001, "negative": -3.14159, "large": 65000.3, "largest": 65510.0, "between": 6.1e-5, "subnormal": 1.7e-6,
    "negative subnormal": -2.3e-7, "below the smallest": 3.1e-8, "boundary": 2.0**-14 * (1 - 2**-12),
}  # fmt: skip


@pytest.mark.parametrize("value", HALF_VALUES.values(), ids=HALF_VALUES.keys())
def test_rounding_to_float16_goes_to_a_neighbour_and_keeps_the_mean(value: float) -> None:
    n = 1 << 16
    x = torch.full((n,), value)
    rounded = round_stochastic(x, torch.arange(n, dtype=torch.int32), torch.float16).double()
    exact = x[0].double()
    if value == HALF_VALUES["largest"]:
        assert set(rounded.tolist()) == {65504, math.inf}
        rounded = rounded.clamp(max=65536)
    low, high = rounded.min(), rounded.max()
    assert low <= exact <= high
    # Neighbours: nothing that float16 holds lies between them.
    assert torch.nextafter(low.half(), torch.tensor(math.inf).half()).clamp(max=65504) in (high.half(), 65504)
    assert abs(rounded.mean() - exact) <= (high - low) * 2**-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounding_keeps_what_the_dtype_holds(dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    for noise in (0, 1, 0x7FFF, 0xFFFF):
        rounded = round_stochastic(every.float(), torch.full(every.shape, noise, dtype=torch.int32), dtype)
        assert torch.equal(rounded.isnan(), every.isnan())
        held = ~every.isnan()
        assert torch.equal(rounded.view(torch.int16)[held], every.view(torch.int16)[held])


@pytest.mark.parametrize("pattern", [0x7F800001, 0x7FFFFFFF, 0xFF800001, 0xFFFFFFFF])
def test_rounding_keeps_every_nan_a_nan(pattern: int) -> None:
    x = int32(pattern).view(torch.float32).expand(2)
    for dtype in (torch.bfloat16, torch.float16):
        assert round_stochastic(x, torch.tensor([0, 0xFFFF], dtype=torch.int32), dtype).isnan().all()


@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # torch.func.jvp, at its first use
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounding_passes_derivatives_through(dtype: torch.dtype) -> None:
    x, noise = torch.randn(8), words(8) & 0xFFFF

    def f(x: Tensor) -> Tensor:
        return round_stochastic(x, noise, dtype)

    _, pullback, *_ = torch.func.vjp(f, x)
    assert torch.equal(pullback(torch.ones(8, dtype=dtype))[0], torch.ones(8))
    assert torch.equal(torch.func.jvp(f, (x,), (torch.ones(8),))[1], torch.ones(8, dtype=dtype))
    assert torch.equal(torch.func.vmap(f)(x.expand(3, 8)), f(x).expand(3, 8))
    squares = torch.func.vmap(torch.func.grad(lambda x: f(x).float().square().sum()))
    assert torch.equal(squares(x.expand(3, 8)), 2 * f(x).float().expand(3, 8))
    of_all = torch.func.grad(lambda x: torch.func.vmap(f)(x).float().square().sum())
    assert torch.equal(of_all(x.expand(3, 8)), 2 * f(x).float().expand(3, 8))


@pytest.mark.parametrize("in_dims", [(0, None), (1, 0), (-1, 1), (None, 0), (None, 1)], ids=str)
def test_rounding_of_a_batch_is_that_of_its_members(in_dims: tuple[int | None, int | None]) -> None:
    def column(members: list[Tensor], dim: int | None) -> tuple[list[Tensor], Tensor]:
        return (members[:1] * 3, members[0]) if dim is None else (members, torch.stack(members, dim))

    xs, x = column([torch.randn(8) for _ in range(3)], in_dims[0])
    noises, noise = column([words(8, seed=i) & 0xFFFF for i in range(3)], in_dims[1])
    expected = torch.stack([round_stochastic(*each) for each in zip(xs, noises, strict=True)])
    f = torch.func.vmap(round_stochastic, in_dims=in_dims)
    assert torch.equal(f(x, noise), expected)
    twice = torch.func.vmap(f)(x.expand(2, *x.shape), noise.expand(2, *noise.shape))
    assert torch.equal(twice, expected.expand(2, *expected.shape))


def test_rounding_refuses_other_dtypes() -> None:
    noise = torch.zeros(2, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"cannot round to torch\.float64"):
        round_stochastic(torch.ones(2), noise, torch.float64)
    with pytest.raises(ValueError, match=r"x has dtype torch\.bfloat16"):
        round_stochastic(torch.ones(2, dtype=torch.bfloat16), noise)


@pytest.mark.parametrize("shapes", [((), ()), ((2,), ()), ((2,), (5, 1))], ids=str)
def test_folding_a_key_is_one_operator_with_the_bits_of_its_formula(shapes: tuple[tuple[int, ...], ...]) -> None:
    key, data = (words(max(1, math.prod(shape)), i).reshape(shape) for i, shape in enumerate(shapes))
    expected = mix(data, key, GOLDEN)
    assert torch.equal(fold(key, data), expected)
    assert torch.equal(torch.vmap(fold, in_dims=(None, 0))(key, torch.stack([data, data + 1]))[0], expected)
    torch.library.opcheck(torch.ops.fzero.fold.default, (key, data), test_utils=("test_schema", "test_faketensor"))
