"""Sums over rows and columns of a matrix that is cut anywhere, and Adafactor's direction: in parts as in whole."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from fzero.kernels import adafactor, adafactor_triton
from fzero.kernels.adafactor import (
    Matrices,
    factored_direction,
    factored_direction_reference,
    matrix_squares,
    matrix_squares_reference,
    sum_of_squares,
)
from fzero.kernels.adafactor_triton import launch_factored_direction, launch_matrix_squares
from fzero.kernels.storage import split_master
from tests.triton_process import compiled, interpreted

# (matrices, rows, columns): one and several, thin and flat, smaller and larger than a tile.
MATRICES: list[Matrices] = [
    (1, 1, 1), (1, 7, 5), (1, 1, 300), (1, 300, 1), (1, 70, 150), (3, 5, 4), (40, 3, 3), (2, 35, 130), (5, 1, 2),
]  # fmt: skip
RANKS = (1, 3, 4)
every_shape = pytest.mark.parametrize("matrices", MATRICES, ids=str)


def gradient(matrices: Matrices, dtype: torch.dtype = torch.float32) -> Tensor:
    """Multiples of 1/8: sums of their squares are exact. Some are not finite, or have no finite square."""
    generator = torch.Generator().manual_seed(0)
    g = torch.randint(-64, 65, (math.prod(matrices),), generator=generator) / 8
    g[3::41], g[5::43], g[7::47] = torch.nan, -torch.inf, 1e30
    return g.to(dtype)


def pieces(g: Tensor, ranks: int) -> list[tuple[Tensor, Tensor]]:
    """The ranks' pieces with their offsets, the last ones padded by zeros."""
    size = math.ceil(g.shape[0] / ranks)
    padded = torch.nn.functional.pad(g, (0, ranks * size - g.shape[0]))
    return [(piece, torch.tensor(i * size)) for i, piece in enumerate(padded.split(size))]


def whole_sums(g: Tensor, factor: float, matrices: Matrices) -> tuple[Tensor, Tensor]:
    value = g.float() * factor
    squares = torch.where((value * value).isfinite(), value, 0.0).double().square().view(matrices)
    return squares.sum(2).view(-1), squares.sum(1).view(-1)


FACTOR = torch.tensor(0.5)
Squares = Callable[..., tuple[Tensor, Tensor]]
WAYS: dict[str, Squares] = {"op": torch.ops.fzero.matrix_squares, "reference": matrix_squares_reference}


def check_squares(way: Squares, matrices: Matrices, ranks_of: Sequence[int] = RANKS, device: str = "cpu") -> None:
    for dtype in (torch.float32, torch.bfloat16):
        g = gradient(matrices, dtype)
        for ranks in ranks_of:
            rows = torch.zeros(matrices[0] * matrices[1], dtype=torch.float64)
            columns = torch.zeros(matrices[0] * matrices[2], dtype=torch.float64)
            for piece, offset in pieces(g, ranks):
                found = way(piece.to(device), FACTOR.to(device), offset.to(device), *matrices)
                rows, columns = rows + found[0].cpu(), columns + found[1].cpu()
            expected = whole_sums(g, 0.5, matrices)
            assert torch.equal(rows, expected[0]), (matrices, dtype, ranks)
            assert torch.equal(columns, expected[1]), (matrices, dtype, ranks)


@every_shape
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_sums_over_pieces_are_those_of_the_whole(way: Squares, matrices: Matrices) -> None:
    check_squares(way, matrices)


@pytest.mark.parametrize("chunk", [1, 10, 64])
def test_chunks_equal_the_whole(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adafactor, "CHUNK", chunk)
    for matrices in MATRICES:
        if math.prod(matrices) < 200 * chunk:
            check_squares(WAYS["op"], matrices)
            check_direction(torch.ops.fzero.factored_direction, matrices)
    assert sum_of_squares((torch.arange(100.0),)) == 328350


def factors(matrices: Matrices) -> tuple[Tensor, Tensor]:
    """Row and column factors, some of them below the floor together."""
    generator = torch.Generator().manual_seed(1)
    count, rows, columns = matrices
    return torch.rand(count * rows, generator=generator), torch.rand(count * columns, generator=generator)


FLOOR = 0.05


def check_direction(way: Squares, matrices: Matrices, ranks_of: Sequence[int] = RANKS, device: str = "cpu") -> None:
    row, column = factors(matrices)
    for dtype in (torch.float32, torch.bfloat16):
        g = gradient(matrices, dtype)
        value = g.float() * 0.5
        ok = (value * value).isfinite()
        moment = (row.view(matrices[0], -1, 1) * column.view(matrices[0], 1, -1)).view(-1).clamp(min=FLOOR)
        expected = torch.where(ok, value / moment.double().sqrt().float(), torch.nan)
        for ranks in ranks_of:
            found, total = [], 0.0
            for piece, offset in pieces(g, ranks):
                tensors = [x.to(device) for x in (piece, FACTOR, offset, row, column)]
                direction, square = way(*tensors, *matrices, FLOOR)
                found.append(direction.cpu())
                total += square.item()
            joined = torch.cat(found)
            assert torch.equal(joined[: len(g)].view(torch.int32), expected.view(torch.int32)), (matrices, dtype, ranks)
            assert not joined[len(g) :].any(), "what pads the leaf does not move"
            assert total == pytest.approx(expected[ok].double().square().sum().item(), rel=1e-13)


DIRECTIONS: dict[str, Squares] = {
    "op": torch.ops.fzero.factored_direction,
    "reference": factored_direction_reference,
}


@every_shape
@pytest.mark.parametrize("way", DIRECTIONS.values(), ids=DIRECTIONS.keys())
def test_the_direction_of_pieces_is_that_of_the_whole(way: Squares, matrices: Matrices) -> None:
    check_direction(way, matrices)


def check_triton(device: str, shapes: Sequence[Matrices] = MATRICES, ranks_of: Sequence[int] = RANKS) -> None:
    for matrices in shapes:
        check_squares(launch_matrix_squares, matrices, ranks_of, device)
        check_direction(launch_factored_direction, matrices, ranks_of, device)


def test_interpreted_triton_kernels_equal_the_whole() -> None:
    shapes = [(1, 7, 5), (2, 35, 130), (5, 1, 2)]
    interpreted(f"import tests.test_kernels_adafactor as t; t.check_triton('cpu', {shapes}, (1, 3))")


@pytest.mark.gpu
def test_triton_kernels_on_a_gpu_equal_the_whole() -> None:
    check_triton("cuda")


def check_ptx() -> None:
    """Compile both kernels for Hopper: sums in float64, and where an exact root is wanted nothing fused or rough."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {"g_in": "*bf16", "factor_in": "*fp32", "offset_in": "*i64", "row_in": "*fp32", "column_in": "*fp32"}
    types |= {"row_out": "*fp64", "column_out": "*fp64", "out": "*fp32", "sum_out": "*fp64"}
    types |= {"length": "i64", "floor": "fp32"}
    for kernel, constants in (
        (adafactor_triton.matrix_squares_kernel, {"TILE_ROWS": 32, "TILE_COLUMNS": 128}),
        (adafactor_triton.factored_direction_kernel, {"BLOCK": 1024}),
    ):
        signature = {name: types.get(name, "i32") for name in kernel.arg_names}
        source = ASTSource(kernel, signature | dict.fromkeys(constants, "constexpr"), constants)
        ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"enable_fp_fusion": False}).asm["ptx"]
        assert "fma." not in ptx and "ftz" not in ptx and "approx" not in ptx
        assert "add.rn.f64" in ptx and "atom" not in ptx
        assert ("sqrt.rn.f32" in ptx and "div.rn.f32" in ptx) or kernel is adafactor_triton.matrix_squares_kernel


def test_triton_kernels_compile_for_hopper() -> None:
    compiled("import tests.test_kernels_adafactor as t; t.check_ptx()")


def test_the_sum_of_squares_is_that_of_what_is_stored() -> None:
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    for stored, value in (((x,), x), ((x.bfloat16(),), x.bfloat16()), ((x.half(),), x.half()), (split_master(x), x)):
        assert sum_of_squares(stored).item() == pytest.approx(value.double().square().sum().item(), rel=1e-14)
    assert sum_of_squares((torch.zeros(0),)) == 0


def test_ops_fulfil_torch_library_contract() -> None:
    matrices = (2, 35, 13)
    g, (row, column) = gradient(matrices, torch.bfloat16), factors(matrices)
    checks = ("test_schema", "test_faketensor")
    common = (g, FACTOR, torch.tensor(0))
    torch.library.opcheck(torch.ops.fzero.matrix_squares.default, (*common, *matrices), test_utils=checks)
    given = (*common, row, column, *matrices, FLOOR)
    torch.library.opcheck(torch.ops.fzero.factored_direction.default, given, test_utils=checks)
    torch.library.opcheck(torch.ops.fzero.sum_of_squares.default, ([g],), test_utils=checks)


def test_transforms_see_the_references() -> None:
    matrices = (1, 3, 4)
    g, (row, column), start = torch.randn(12), factors(matrices), torch.tensor(0)

    def total(g: Tensor) -> Tensor:
        rows, columns = matrix_squares(g, FACTOR, start, matrices)
        direction, square = factored_direction(g, FACTOR, start, row, column, matrices, FLOOR)
        return rows.sum() + columns.sum() + direction.sum() + square + sum_of_squares((g,))

    value, derivative = torch.func.grad_and_value(total)(g)[::-1]
    assert value.item() == pytest.approx(total(g).item(), rel=1e-6)
    step = 1e-3 * torch.eye(12)
    numeric = torch.stack([(total(g + s) - total(g - s)) / 2e-3 for s in step])
    torch.testing.assert_close(derivative, numeric.float(), rtol=1e-2, atol=1e-2)
