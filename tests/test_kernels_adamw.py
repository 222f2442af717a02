"""AdamW: its Triton kernel, its compiled reference and the reference op by op agree bit for bit, and it is AdamW."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import torch.utils.flop_counter
from torch import Tensor

import fzero as fz
from fzero import _torch
from fzero.kernels import compiled
from fzero.kernels.reference import reference
from fzero.kernels.storage import join_master, split_master
from fzero.random.bits import leaf_keys
from tests.test_kernels_update import (
    assert_same_bits,
    check_triton,
    compiled_for_hopper,
    expected,
    on,
    op_by_op,
    operands,
    renewed,
)  # fmt: skip
from tests.triton_process import interpreted

__all__ = ["op_by_op"]  # a fixture

FLOAT, BFLOAT, HALF = torch.float32, torch.bfloat16, torch.float16


def int32(value: int) -> Tensor:
    return torch.tensor(value, dtype=torch.int32)


def leaf(n: int, dtypes: tuple[torch.dtype, ...]) -> dict[str, Any]:
    """One leaf in the middle of training; its indices cross the end of the positive int32."""
    return operands("adamw", dtypes[:3], (n,), dtypes[3])


def stepped(state: tuple[Tensor, ...], g: Tensor, step: int, *, lr: float, decay: float, stochastic: bool) -> Any:
    """The state of a leaf after a step."""
    ours = fz.adamw(lr, weight_decay=decay)
    scalars = ours.scalars_of(int32(step), 1.0, True)
    keys = leaf_keys(int32(0), int32(step), "w")[None]
    how: dict[str, Any] = {"numbers": ours.numbers, "stochastic": stochastic}
    return ours.kernel([state], [g], scalars, keys, int32(0)[None], **how)[0]


def test_interpreted_triton_kernel_equals_the_reference() -> None:
    interpreted("from tests.test_kernels_update import *; check_triton('adamw', 'cpu', EACH)")


def test_triton_kernel_compiles_for_hopper_without_fused_multiply_add() -> None:
    compiled_for_hopper("adamw", [("bf16", "bf16", "bf16"), ("bf16", "signed", "unsigned"), ("split", "bf16", "fp32")])


@pytest.mark.gpu
def test_triton_kernel_on_a_gpu_equals_the_reference_on_a_cpu() -> None:
    check_triton("adamw", "cuda")


@pytest.mark.gpu
def test_ops_on_a_gpu_equal_those_on_a_cpu(op_by_op: None) -> None:
    host = operands("adamw", (BFLOAT, "8-bit", "8-bit"), (5000, 512))
    device = on("cuda", host)
    assert_same_bits(renewed("adamw", device, stochastic=True), renewed("adamw", host, stochastic=True))


# A program takes seconds to compile. Float32 alone is compiled for the root below, rounding to nearest for SGD.
@pytest.mark.parametrize(
    ("dtypes", "stochastic"),
    [
        ((BFLOAT, BFLOAT, BFLOAT, BFLOAT), True),
        pytest.param((HALF, BFLOAT, FLOAT, HALF), True, marks=pytest.mark.slow),
        pytest.param((BFLOAT, FLOAT, FLOAT, BFLOAT), False, marks=pytest.mark.slow),
        pytest.param((BFLOAT, BFLOAT, FLOAT, HALF), True, marks=pytest.mark.slow),
        pytest.param((FLOAT, FLOAT, FLOAT, BFLOAT), False, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_compiled_equals_op_by_op(dtypes: tuple[torch.dtype, ...], stochastic: bool) -> None:
    for n in (compiled.MIN_COMPILED, 40_001):
        arguments = leaf(n, dtypes)
        wanted = expected("adamw", arguments, stochastic=stochastic)
        assert_same_bits(renewed("adamw", arguments, stochastic=stochastic), wanted)
    assert compiled._compiler.works


def test_the_compiled_root_is_correctly_rounded() -> None:
    # With b2 = 1 and no gradient the second moment stays, and p becomes -1 / (root + eps): every root is seen, those of
    # the smallest numbers too. Infinity counts as the largest number.
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randint(0, 0x7F800001, (compiled.MIN_COMPILED,), generator=generator, dtype=torch.int32)
    patterns[:4] = torch.tensor([0, 1, 0x00800000, 0x7F800000])
    n = len(patterns)
    v = patterns.view(FLOAT)
    arguments: dict[str, Any] = leaf(n, (FLOAT, FLOAT, FLOAT, FLOAT))
    arguments |= {"states": [(torch.zeros(n), torch.ones(n), v)], "grads": [torch.zeros(n)]}
    arguments["scalars"] = torch.tensor([1.0, 1.0, 2.0**-100, 1.0])
    kernel, how = fz.adamw(1.0).kernel, {"numbers": (0.0, 1.0, 0.0), "stochastic": False}
    state = (*arguments["states"][0], torch.zeros(n), arguments["scalars"], arguments["keys"][0], int32(0))
    roots = v.clamp(max=torch.finfo(FLOAT).max).double().sqrt().float()
    wanted = reference(kernel.formula, state[:3], *state[3:], **how)  # type: ignore[arg-type]
    assert_same_bits([wanted[:1]], [(0 - 1 / (roots + 2.0**-100),)])
    assert_same_bits(kernel(**arguments, **how), [wanted])  # type: ignore[arg-type]
    assert compiled._compiler.works


@pytest.mark.parametrize(
    "dtypes",
    [(BFLOAT, BFLOAT, BFLOAT, BFLOAT), pytest.param((FLOAT, FLOAT, FLOAT, FLOAT), marks=pytest.mark.slow)],
    ids=str,
)
def test_short_pieces_take_a_program_that_is_there(
    dtypes: tuple[torch.dtype, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "_programs", {})
    renewed("adamw", leaf(compiled.MIN_COMPILED - 1, dtypes), stochastic=True)
    assert not compiled._programs, "a short piece alone compiles nothing"
    renewed("adamw", leaf(compiled.MIN_COMPILED, dtypes), stochastic=True)
    ((key, program),) = compiled._programs.items()
    assert program is not None
    called = []

    def counted(*tensors: Tensor) -> None:
        called.append(len(tensors[0]))
        program(*tensors)

    compiled._programs[key] = counted
    lengths = [0, 1, 2, 3, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 1000]
    for n in lengths:
        arguments = leaf(n, dtypes)
        arguments["offsets"] += 990  # the index overflows within a few elements
        wanted = expected("adamw", arguments, stochastic=True)
        assert_same_bits(renewed("adamw", arguments, stochastic=True), wanted)
    assert called == lengths[2:]


@pytest.mark.slow
@pytest.mark.parametrize("refused", [{"cpp.no_such_setting": True}, {"cpp.march": "native -fno-such-flag"}], ids=str)
def test_settings_that_are_refused_are_left_out(
    refused: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    settings = [compiled.INDUCTOR_SETTINGS | refused, compiled.INDUCTOR_SETTINGS]
    monkeypatch.setattr(compiled, "_programs", {})
    monkeypatch.setattr(compiled, "_settings", lambda: settings)
    arguments = leaf(compiled.MIN_COMPILED, (BFLOAT, BFLOAT, BFLOAT, BFLOAT))
    wanted = expected("adamw", arguments, stochastic=True)
    with caplog.at_level(logging.WARNING):
        assert_same_bits(renewed("adamw", arguments, stochastic=True), wanted)
    assert None not in compiled._programs.values()
    assert not [record for record in caplog.records if record.name.startswith("fzero")]


def test_an_architecture_that_the_user_chose_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CPP_MARCH", "x86-64-v3")
    assert not any("cpp.march" in settings for settings in compiled._settings())


def test_compiles_under_the_modes_of_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "_programs", {})
    arguments = leaf(compiled.MIN_COMPILED, (BFLOAT, BFLOAT, BFLOAT, BFLOAT))
    wanted = expected("adamw", arguments, stochastic=True)
    with torch.utils.flop_counter.FlopCounterMode(display=False):
        assert_same_bits(renewed("adamw", arguments, stochastic=True), wanted)
    compiled._programs.clear()
    with torch.inference_mode():
        assert_same_bits(renewed("adamw", arguments, stochastic=True), wanted)
    assert compiled._compiler.works


def test_without_a_compiler_it_warns_once_and_runs(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(compiled, "_programs", {})
    monkeypatch.setattr(compiled._compiler, "works", True)
    monkeypatch.setattr(_torch, "standalone_compile", fail)
    with caplog.at_level(logging.WARNING):
        for dtypes in ((FLOAT, FLOAT, FLOAT, FLOAT), (BFLOAT, FLOAT, FLOAT, FLOAT)):
            arguments = leaf(compiled.MIN_COMPILED, dtypes)
            wanted = expected("adamw", arguments, stochastic=True)
            assert_same_bits(renewed("adamw", arguments, stochastic=True), wanted)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "no compiler here" in caplog.text


@pytest.mark.parametrize("n", [0, 1, 33, 1000])
def test_chunks_and_pieces_equal_the_whole(n: int, op_by_op: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "CHUNK", 100)
    arguments = leaf(n, (BFLOAT, BFLOAT, BFLOAT, FLOAT))
    whole = expected("adamw", arguments, stochastic=True)[0]
    assert_same_bits(renewed("adamw", arguments, stochastic=True), [whole])
    cut = n // 3
    second = {
        **arguments,
        "states": [tuple(x[cut:] for x in arguments["states"][0])],
        "grads": [arguments["grads"][0][cut:]],
        "offsets": arguments["offsets"] + cut,
    }
    assert_same_bits(renewed("adamw", second, stochastic=True), [[x[cut:] for x in whole]])


@pytest.mark.parametrize(("gradient", "factor"), [(1e30, 1e10), (1e15, 1e5)], ids=["gradient", "square"])
def test_elements_whose_gradient_or_its_square_overflows_stay(gradient: float, factor: float, op_by_op: None) -> None:
    arguments = leaf(1000, (BFLOAT, BFLOAT, FLOAT, FLOAT))
    arguments["grads"] = [torch.full((1000,), gradient)]
    arguments["scalars"] = torch.cat([arguments["scalars"][:3], torch.tensor([factor])])
    assert_same_bits(renewed("adamw", arguments, stochastic=True), arguments["states"])


def test_follows_torch_adamw(op_by_op: None) -> None:
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(1000, generator=generator)
    theirs = p.clone().requires_grad_()
    optimizer = torch.optim.AdamW([theirs], lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
    state = (p, torch.zeros_like(p), torch.zeros_like(p))
    for step in range(10):
        g = torch.randn(1000, generator=generator)
        theirs.grad = g.clone()
        optimizer.step()
        state = stepped(state, g, step, lr=1e-2, decay=0.1, stochastic=False)
    torch.testing.assert_close(state[0], theirs.detach(), rtol=1e-6, atol=1e-7)


def test_factor_multiplies_the_gradient(op_by_op: None) -> None:
    arguments = leaf(1000, (FLOAT, FLOAT, FLOAT, FLOAT))
    scaled = {**arguments, "grads": [arguments["grads"][0] * 8], "scalars": arguments["scalars"].clone()}
    scaled["scalars"][3] /= 8
    same = renewed("adamw", arguments, stochastic=False)
    assert_same_bits(renewed("adamw", scaled, stochastic=False), same)


def test_a_split_master_is_a_float32_parameter(op_by_op: None) -> None:
    generator = torch.Generator().manual_seed(0)
    master = torch.randn(1000, generator=generator)
    moments = torch.zeros(1000, dtype=BFLOAT), torch.zeros(1000, dtype=BFLOAT)
    whole, split = (master, *moments), (*split_master(master), *moments)
    for step in range(20):
        g = torch.randn(1000, generator=generator).to(BFLOAT)
        whole = stepped(whole, g, step, lr=1e-3, decay=0.1, stochastic=True)
        split = stepped(split, g, step, lr=1e-3, decay=0.1, stochastic=True)
        assert_same_bits([(join_master(*split[:2]), *split[2:])], [whole])
        # But for ties, p is what a cast of the master makes.
        assert (split[0] == whole[0].to(BFLOAT)).float().mean() > 0.99


def test_eight_bit_moments_keep_close_to_float32_ones(op_by_op: None) -> None:
    generator = torch.Generator().manual_seed(0)
    n = 4096
    size = torch.logspace(-4, 0, n)
    start = torch.zeros(n)
    whole = (start, start, start)
    codes = start.to(torch.int8), torch.zeros(32), start.to(torch.uint8), torch.zeros(32)
    coded: tuple[Tensor, ...] = (start, *codes)
    for step in range(30):
        g = (1 + torch.randn(n, generator=generator)) * size
        whole = stepped(whole, g, step, lr=1e-3, decay=0.0, stochastic=True)
        coded = stepped(coded, g, step, lr=1e-3, decay=0.0, stochastic=True)
    gap = (coded[0] - whole[0]).norm() / whole[0].norm()
    assert 0 < gap < 0.1


@pytest.mark.parametrize("stochastic", [False, True])
def test_small_steps_are_lost_to_nearest_rounding_and_kept_by_stochastic(stochastic: bool, op_by_op: None) -> None:
    n, steps, lr = 20_000, 50, 1e-4
    p = torch.ones(n, dtype=BFLOAT)
    state = (p, torch.zeros(n), torch.zeros(n))
    g = torch.ones(n, dtype=BFLOAT)
    for step in range(steps):
        state = stepped(state, g, step, lr=lr, decay=0.0, stochastic=stochastic)
    drift = (1 - state[0].double()).mean().item()
    if stochastic:
        # In float32 every step moves by lr. One element's spread is about a root of steps · lr · 2^-8.
        assert abs(drift - steps * lr) < 5 * (steps * lr * 2**-8 / n) ** 0.5
    else:
        assert drift == 0


def test_scalars_are_exact_to_float32() -> None:
    for step in (0, 9, 99_999):
        ours = fz.adamw(lambda step: torch.tensor(3e-4), 0.9, 0.95, 1e-8, 0.1)
        scalars = ours.scalars_of(int32(step), torch.tensor(0.25), True)
        t, lr = step + 1, torch.tensor(3e-4).item()
        correction = (1 - 0.95**t) ** 0.5
        expected = [1 - lr * 0.1, lr * correction / (1 - 0.9**t), 1e-8 * correction, 0.25]
        torch.testing.assert_close(scalars, torch.tensor(expected), rtol=1e-7, atol=0)
