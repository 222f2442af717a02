"""The sum of squares of a piece: right, blind to what is not finite, the same whole and cut, without a large copy."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

import fzero as fz
from fzero import _torch
from fzero.kernels import squares as module
from fzero.kernels.squares import add_squares, squares, squares_reference
from tests.small import LiveBytes
from tests.triton_process import compiled as compiled_by_triton
from tests.triton_process import interpreted

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BAD = {"nan": [math.nan], "inf": [math.inf], "-inf": [-math.inf], "nan and inf": [math.nan, math.inf, -math.inf]}
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows and chunks of which a short piece has several."""
    monkeypatch.setattr(module, "ROW", 8)
    monkeypatch.setattr(module, "CHUNK", 24)


def normal(n: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(n)).to(dtype)


def assert_measured(actual: Tensor, finite: Tensor, bad: bool) -> None:
    """The sum is that of `finite`, up to the rounding of float32 sums."""
    assert (actual.dtype, actual.shape) == (torch.float64, (2,))
    torch.testing.assert_close(actual[0], finite.double().square().sum(), rtol=1e-6, atol=0)
    assert actual[1] == bad


@every_dtype
@pytest.mark.parametrize("n", [0, 1, 7, 8, 23, 24, 25, 100])
def test_sums_the_squares_of_every_element_once(n: int, dtype: torch.dtype, small_chunks: None) -> None:
    x = normal(n, dtype)
    for ranks in (1, 2, 3, 4):
        assert_measured(add_squares([squares(x, ranks)]), x, bad=False)
        assert_measured(squares_reference(x, ranks)[0], x, bad=False)


@every_dtype
def test_sums_more_than_a_chunk(dtype: torch.dtype) -> None:
    x = normal(module.CHUNK + module.ROW + 5, dtype)
    assert_measured(squares(x)[0], x, bad=False)


@every_dtype
@pytest.mark.parametrize("bad", BAD.values(), ids=BAD.keys())
def test_elements_that_are_not_finite_are_told_and_left_out(
    bad: list[float], dtype: torch.dtype, small_chunks: None
) -> None:
    for n in (3, 8, 50, 100):
        for start in {0, (n - len(bad)) // 2, n - len(bad)}:
            x = normal(n, dtype)
            x[start : start + len(bad)] = torch.tensor(bad, dtype=dtype)
            kept = torch.where(x.isfinite(), x, 0)
            for measured in (squares(x), squares(x, 3), squares_reference(x, 1), squares_reference(x, 3)):
                assert_measured(measured[0], kept, bad=True)


@every_dtype
def test_the_largest_elements_are_finite(dtype: torch.dtype) -> None:
    x = torch.full((100,), torch.finfo(dtype).max, dtype=dtype)
    for measured in (squares(x), squares_reference(x, 1)):
        assert measured[0, 1] == 0
        # Their squares are larger than any float32, but for float16.
        assert measured[0, 0].isinf() == (dtype != torch.float16)


@every_dtype
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_a_whole_leaf_gives_the_bits_of_its_pieces(ranks: int, dtype: torch.dtype, small_chunks: None) -> None:
    for n in (1, 5, 64, 257):
        x, rows = normal(n, dtype), math.ceil(n / ranks)
        padded = torch.nn.functional.pad(x, (0, ranks * rows - n))
        pieces = torch.cat([squares(piece.clone()) for piece in padded.split(rows)])
        # Sums of so few float64 numbers of 48 bits are exact in whatever order, or nearly: their root is compared.
        roots = [total.sqrt().float() for total in (pieces[:, 0].sum(), squares(x, ranks)[0, 0])]
        assert torch.equal(*roots)


def test_the_number_of_threads_does_not_matter() -> None:
    x = normal(3 * module.CHUNK // 2, torch.bfloat16)
    alone = squares(x)
    try:
        torch.set_num_threads(2)
        assert torch.equal(squares(x), alone)
    finally:
        torch.set_num_threads(1)


def test_no_copy_of_the_piece_is_made() -> None:
    x = normal(8 * module.CHUNK, torch.bfloat16)
    with LiveBytes() as live:
        squares(x)
    assert live.peak < 5 * module.CHUNK


def test_the_op_fulfils_torch_library_contract() -> None:
    for x in (normal(33, torch.bfloat16), normal(0, torch.float32)):
        torch.library.opcheck(torch.ops.fzero.squares.default, (x, 2), test_utils=("test_schema", "test_faketensor"))


def test_transforms_see_the_reference() -> None:
    x = normal(10, torch.float32)
    _, pullback, *_ = torch.func.vjp(lambda x: squares(x, 2)[0, 0], x)
    torch.testing.assert_close(pullback(torch.ones((), dtype=torch.float64))[0], 2 * x)
    leaf = x.clone().requires_grad_()
    (by_autograd,) = torch.autograd.grad(squares(leaf)[0, 0], leaf)
    torch.testing.assert_close(by_autograd, 2 * x)
    batch = torch.stack([x, 2 * x])
    torch.testing.assert_close(torch.func.vmap(squares)(batch), torch.stack([squares(x) for x in batch]))


def test_a_trace_holds_one_node() -> None:
    graph = _torch.make_fx(lambda x: squares(x), tracing_mode="fake")(normal(10, torch.float32))
    assert [node.target for node in graph.graph.nodes if node.op == "call_function"] == [
        torch.ops.fzero.squares.default
    ]
    x = normal(10, torch.float32)
    x[3] = math.nan
    assert torch.equal(graph(x), squares(x))


def check_triton_against_reference(device: str) -> None:
    """Flags exactly; sums up to rounding: the reference adds in float32, in another order, the kernel in float64."""
    for (n, ranks), dtype in itertools.product(((0, 1), (1, 3), (5, 2), (64, 1), (65, 1), (300, 3)), DTYPES):
        for bad in ([], *(BAD.values() if n == 65 else ())):
            x = normal(n, dtype)
            x[: len(bad)] = torch.tensor(bad, dtype=dtype)[:n]
            measured = module.launch(x.to(device), ranks).sum(0).cpu()
            torch.testing.assert_close(measured, squares_reference(x, ranks)[0], rtol=1e-6, atol=0)
            exact = torch.where(x.isfinite(), x, 0).double().square().sum()
            torch.testing.assert_close(measured[0], exact, rtol=1e-14, atol=0)
    x = normal(1100, torch.bfloat16)  # more blocks than are added at a time
    x[3] = math.nan
    assert_measured(module.launch(x.to(device), 1).sum(0).cpu(), torch.where(x.isfinite(), x, 0), bad=True)


def check_triton_bits(device: str) -> None:
    """A row has the bits of the same piece by itself, however many programs there are, and so has each run."""
    for (n, ranks), dtype in itertools.product(((5, 7), (257, 3)), DTYPES):
        x, rows = normal(n, dtype).to(device), math.ceil(n / ranks)
        padded = torch.nn.functional.pad(x, (0, ranks * rows - n))
        pieces = [module.launch(piece, 1) for piece in padded.split(rows)]
        assert torch.equal(torch.cat(pieces[: math.ceil(n / rows)]), module.launch(x, ranks))
        assert torch.equal(module.launch(x, ranks), module.launch(x, ranks))
    largest = torch.full((64,), torch.finfo(torch.float32).max, device=device)
    assert module.launch(largest, 1).sum(0).tolist() == [64 * largest[0].item() ** 2, 0.0]


def test_interpreted_triton_kernels_equal_the_reference() -> None:
    interpreted(
        """
import tests.test_kernels_squares as t
t.module.BLOCK, t.module.LANES = 64, 16
t.check_triton_against_reference("cpu")
t.check_triton_bits("cpu")
""",
        loops=True,
    )


def test_triton_kernels_compile_for_hopper_without_atomics() -> None:
    # Needs no GPU: Triton brings its own assembler.
    compiled_by_triton(
        """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from fzero.kernels.squares import BLOCK, LANES, block_kernel
types = dict(partial="*fp64", length="i64", rows="i64", blocks="i32")
constants = dict(BLOCK=BLOCK, LANES=LANES)
ones = dict(length=1, rows=1, blocks=1)  # what Triton makes a constant of
for dtype, more in (("bf16", {}), ("fp32", {}), ("fp16", ones)):
    known = {**constants, **more}
    names = block_kernel.arg_names
    signature = {name: "constexpr" if name in known else types.get(name, "*" + dtype) for name in names}
    source = ASTSource(block_kernel, signature, known)
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
    assert "atom." not in ptx and "red.global" not in ptx
    assert "add.rn.f64" in ptx or "add.f64" in ptx or "fma.rn.f64" in ptx
"""
    )


@pytest.mark.gpu
def test_triton_kernels_on_a_gpu_equal_the_reference_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK", 64)
    monkeypatch.setattr(module, "LANES", 16)
    check_triton_against_reference("cuda")
    check_triton_bits("cuda")


@pytest.mark.gpu
def test_a_gpu_measures_what_a_cpu_does() -> None:
    for dtype in DTYPES:
        for n in (0, 1, 1000, 100_003):
            x = normal(n, dtype)
            for bad in ([], *BAD.values()):
                x[: len(bad)] = torch.tensor(bad, dtype=dtype)[:n]
                for ranks in (1, 4):
                    actual, expected = squares(x.cuda(), ranks).cpu(), squares(x, ranks)
                    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0)


def test_the_squares_of_pieces_are_added_by_one_operation_which_transforms_see_through() -> None:
    pieces = [torch.randn(n) for n in (3, 1, 7)]
    expected = sum(float(piece.double().square().sum()) for piece in pieces)
    total = add_squares([squares(piece) for piece in pieces])
    torch.testing.assert_close(total, torch.tensor([expected, 0.0], dtype=torch.float64))
    nodes = fz.trace(lambda *given: add_squares([squares(x) for x in given]))(*pieces).trace.module.graph.nodes
    assert sum(node.op == "call_function" for node in nodes) == len(pieces) + 1

    def norm(x: Tensor) -> Tensor:
        return add_squares([squares(x), squares(2 * x)])[0]

    torch.testing.assert_close(torch.func.grad(norm)(pieces[0]), 10 * pieces[0])
    batch = torch.randn(4, 3)
    torch.testing.assert_close(torch.vmap(norm)(batch), 5 * batch.double().square().sum(1))
