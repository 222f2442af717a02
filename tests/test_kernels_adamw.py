"""AdamW: its Triton kernel, its compiled reference and the reference op by op agree bit for bit, and it is AdamW."""

from __future__ import annotations

import itertools
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fzero import _torch
from fzero.kernels import compiled
from fzero.kernels.adamw import (
    adamw,
    adamw_,
    adamw_reference,
    adamw_scalars,
    launch,
)
from fzero.random import leaf_keys

FLOAT, BFLOAT, HALF = torch.float32, torch.bfloat16, torch.float16
STATICS: dict[str, Any] = {"b1": 0.9, "b2": 0.999, "eps": 1e-8}
STATE = ("p", "m", "v")
ALL_DTYPES = list(itertools.product((FLOAT, BFLOAT), (FLOAT, BFLOAT), (FLOAT, BFLOAT), (FLOAT, BFLOAT, HALF)))
ROOT = Path(__file__).parents[1]


def int32(value: int) -> Tensor:
    return torch.tensor(value, dtype=torch.int32)


def operands(n: int, dtypes: tuple[torch.dtype, ...], offset: int = 5) -> dict[str, Any]:
    """Arguments of a step that has been going on for a while, with gradients that are not finite here and there."""
    generator = torch.Generator().manual_seed(n)
    p, m, v, g = (torch.randn(n, generator=generator) for _ in range(4))
    g[3::97], g[5::89], g[7::83] = float("nan"), float("inf"), float("-inf")
    return {
        "p": p.to(dtypes[0]),
        "m": (m * 0.1).to(dtypes[1]),
        "v": (v * v).to(dtypes[2]),
        "g": g.to(dtypes[3]),
        "scalars": adamw_scalars(int32(3), 1e-3, 0.9, 0.999, 0.1, 0.5),
        "keys": leaf_keys(int32(0), int32(3), "w"),
        "offset": int32(offset),
    }


def on(device: str, arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: tensor.to(device, copy=True) for name, tensor in arguments.items()}


def assert_same_bits(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for name, x, y in zip(STATE, actual, expected, strict=True):
        assert x.dtype == y.dtype
        differ = (x.cpu().view(torch.uint8) != y.cpu().view(torch.uint8)).sum().item()
        assert differ == 0, f"{name} differs in {differ} bytes"


def triton_step(arguments: dict[str, Any], stochastic: bool) -> tuple[Tensor, Tensor, Tensor]:
    p, m, v = (torch.empty_like(arguments[name]) for name in STATE)
    out = (p, m, v)
    launch(out, **arguments, **STATICS, stochastic=stochastic)
    return out


def check_triton_against_reference(device: str) -> None:
    for n, dtypes, stochastic in itertools.product((1, 1023, 3001), ALL_DTYPES, (False, True)):
        arguments = operands(n, dtypes, offset=2**31 - 1000)
        expected = adamw_reference(**arguments, **STATICS, stochastic=stochastic)
        assert_same_bits(triton_step(on(device, arguments), stochastic), expected)


@pytest.fixture
def op_by_op(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "MIN_COMPILED", 1 << 60)
    monkeypatch.setattr(compiled, "_programs", {})


def test_interpreted_triton_kernel_equals_the_reference() -> None:
    # Triton decides when it is imported whether it interprets, hence a process of its own.
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    code = "import test_kernels_adamw as t; t.check_triton_against_reference('cpu')"
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr


def test_triton_kernel_compiles_for_hopper_without_fused_multiply_add() -> None:
    # Needs no GPU: Triton brings its own assembler.
    pytest.importorskip("triton")
    code = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from fzero.kernels.adamw import adamw_kernel
types = dict(g_in="*fp16", scalars="*fp32", keys="*i32", offset_in="*i32", length="i64")
types |= dict.fromkeys(("p_out", "m_out", "v_out", "p_in", "m_in", "v_in"), "*bf16")
types |= dict.fromkeys(("STOCHASTIC", "BLOCK"), "constexpr")
source = ASTSource(
    adamw_kernel,
    {name: types.get(name, "fp32") for name in adamw_kernel.arg_names},
    {"STOCHASTIC": True, "BLOCK": 1024},
)
ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"enable_fp_fusion": False}).asm["ptx"]
assert "fma." not in ptx and "ftz" not in ptx and "approx" not in ptx
assert "sqrt.rn.f32" in ptx and "div.rn.f32" in ptx
"""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr


@pytest.mark.gpu
def test_triton_kernel_on_a_gpu_equals_the_reference_on_a_cpu() -> None:
    check_triton_against_reference("cuda")


@pytest.mark.gpu
def test_ops_on_a_gpu_equal_those_on_a_cpu(op_by_op: None) -> None:
    host = operands(5000, (BFLOAT, BFLOAT, FLOAT, BFLOAT))
    device = on("cuda", host)
    assert_same_bits(adamw(**device, **STATICS, stochastic=True), adamw(**host, **STATICS, stochastic=True))
    adamw_(**host, **STATICS, stochastic=True)
    adamw_(**device, **STATICS, stochastic=True)
    assert_same_bits(tuple(device[name] for name in STATE), tuple(host[name] for name in STATE))


@pytest.mark.parametrize(
    ("dtypes", "stochastic"),
    [
        ((BFLOAT, BFLOAT, BFLOAT, BFLOAT), True),
        ((BFLOAT, FLOAT, FLOAT, BFLOAT), False),
        ((BFLOAT, BFLOAT, FLOAT, HALF), True),
        ((FLOAT, FLOAT, FLOAT, BFLOAT), False),
    ],
    ids=str,
)
def test_compiled_equals_op_by_op(dtypes: tuple[torch.dtype, ...], stochastic: bool) -> None:
    for n in (compiled.MIN_COMPILED, 40_001):
        arguments = operands(n, dtypes, offset=2**31 - 1000)
        expected = adamw_reference(**arguments, **STATICS, stochastic=stochastic)
        adamw_(**arguments, **STATICS, stochastic=stochastic)
        assert_same_bits(tuple(arguments[name] for name in STATE), expected)
    assert compiled._compiler.works


def test_the_compiled_root_is_correctly_rounded() -> None:
    # With b2 = 1 and no gradient the second moment stays, and p becomes -1 / (root + eps): every root is seen, those of
    # the smallest numbers and of infinity too.
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randint(0, 0x7F800001, (compiled.MIN_COMPILED,), generator=generator, dtype=torch.int32)
    patterns[:4] = torch.tensor([0, 1, 0x00800000, 0x7F800000])
    n = len(patterns)
    arguments = operands(n, (FLOAT, FLOAT, FLOAT, FLOAT))
    arguments |= {"p": torch.zeros(n), "m": torch.ones(n), "v": patterns.view(FLOAT), "g": torch.zeros(n)}
    arguments["scalars"] = torch.tensor([1.0, 1.0, 1.0, 1.0])
    statics: dict[str, Any] = {"b1": 1.0, "b2": 1.0, "eps": 0.0, "stochastic": False}
    root = arguments["v"].double().sqrt().float()
    expected = adamw_reference(**arguments, **statics)
    assert_same_bits((expected[0],) * 3, (0 - 1 / root,) * 3)
    assert_same_bits(adamw(**arguments, **statics), expected)
    assert compiled._compiler.works


@pytest.mark.parametrize("dtypes", [(BFLOAT, BFLOAT, BFLOAT, BFLOAT), (FLOAT, FLOAT, FLOAT, FLOAT)], ids=str)
def test_short_pieces_take_a_program_that_is_there(
    dtypes: tuple[torch.dtype, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "_programs", {})
    adamw(**operands(compiled.MIN_COMPILED - 1, dtypes), **STATICS, stochastic=True)
    assert not compiled._programs, "a short piece alone compiles nothing"
    adamw(**operands(compiled.MIN_COMPILED, dtypes), **STATICS, stochastic=True)
    ((key, program),) = compiled._programs.items()
    assert program is not None
    called = []

    def counted(*tensors: Tensor) -> None:
        called.append(len(tensors[0]))
        program(*tensors)

    compiled._programs[key] = counted
    lengths = [0, 1, 2, 3, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 1000]
    for n in lengths:
        arguments = operands(n, dtypes, offset=2**31 - 10)
        expected = adamw_reference(**arguments, **STATICS, stochastic=BFLOAT in dtypes)
        assert_same_bits(adamw(**arguments, **STATICS, stochastic=True), expected)
    assert called == lengths[2:]


@pytest.mark.parametrize("refused", [{"cpp.no_such_setting": True}, {"cpp.march": "native -fno-such-flag"}], ids=str)
def test_settings_that_are_refused_are_left_out(
    refused: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    settings = [compiled.INDUCTOR_SETTINGS | refused, compiled.INDUCTOR_SETTINGS]
    monkeypatch.setattr(compiled, "_programs", {})
    monkeypatch.setattr(compiled, "_settings", lambda: settings)
    arguments = operands(compiled.MIN_COMPILED, (BFLOAT, BFLOAT, BFLOAT, BFLOAT))
    expected = adamw_reference(**arguments, **STATICS, stochastic=True)
    with caplog.at_level(logging.WARNING):
        assert_same_bits(adamw(**arguments, **STATICS, stochastic=True), expected)
    assert None not in compiled._programs.values()
    assert not [record for record in caplog.records if record.name.startswith("fzero")]


def test_an_architecture_that_the_user_chose_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CPP_MARCH", "x86-64-v3")
    assert not any("cpp.march" in settings for settings in compiled._settings())


def test_compiles_under_the_modes_of_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "_programs", {})
    arguments = operands(compiled.MIN_COMPILED, (BFLOAT, BFLOAT, BFLOAT, BFLOAT))
    expected = adamw_reference(**arguments, **STATICS, stochastic=True)
    with torch.utils.flop_counter.FlopCounterMode(display=False):
        assert_same_bits(adamw(**arguments, **STATICS, stochastic=True), expected)
    compiled._programs.clear()
    with torch.inference_mode():
        assert_same_bits(adamw(**arguments, **STATICS, stochastic=True), expected)
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
            arguments = operands(compiled.MIN_COMPILED, dtypes)
            expected = adamw_reference(**arguments, **STATICS, stochastic=True)
            assert_same_bits(adamw(**arguments, **STATICS, stochastic=True), expected)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "no compiler here" in caplog.text


@pytest.mark.parametrize("n", [0, 1, 33, 1000])
def test_chunks_and_pieces_equal_the_whole(n: int, op_by_op: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "CHUNK", 100)
    arguments = operands(n, (BFLOAT, BFLOAT, BFLOAT, FLOAT))
    whole = adamw_reference(**arguments, **STATICS, stochastic=True)
    assert_same_bits(adamw(**arguments, **STATICS, stochastic=True), whole)
    cut = n // 3
    second = {name: tensor[cut:] if name in (*STATE, "g") else tensor for name, tensor in arguments.items()}
    second["offset"] = arguments["offset"] + cut
    assert_same_bits(adamw(**second, **STATICS, stochastic=True), tuple(x[cut:] for x in whole))


@pytest.mark.parametrize("stochastic", [False, True])
def test_elements_without_a_finite_gradient_stay(stochastic: bool, op_by_op: None) -> None:
    arguments = operands(1000, (BFLOAT, BFLOAT, FLOAT, FLOAT))
    stay = ~arguments["g"].isfinite()
    assert 0 < stay.sum() < 100
    updated = adamw(**arguments, **STATICS, stochastic=stochastic)
    assert all(x.isfinite().all() for x in updated)
    assert_same_bits(tuple(x[stay] for x in updated), tuple(arguments[name][stay] for name in STATE))
    assert (updated[2][~stay] != arguments["v"][~stay]).float().mean() > 0.9
    # A gradient that the factor takes past the largest float32 counts as not finite.
    large = {**arguments, "g": torch.full((1000,), 1e30), "scalars": arguments["scalars"].clone()}
    large["scalars"][3] = 1e10
    assert_same_bits(adamw(**large, **STATICS, stochastic=stochastic), tuple(large[name] for name in STATE))


def test_a_nan_factor_skips_the_step(op_by_op: None) -> None:
    arguments = operands(1000, (BFLOAT, BFLOAT, FLOAT, FLOAT))
    arguments["scalars"][3] = float("nan")
    updated = adamw(**arguments, **STATICS, stochastic=True)
    assert_same_bits(updated, tuple(arguments[name] for name in STATE))


def test_follows_torch_adamw(op_by_op: None) -> None:
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(1000, generator=generator)
    theirs = p.clone().requires_grad_()
    optimizer = torch.optim.AdamW([theirs], lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
    m, v = torch.zeros_like(p), torch.zeros_like(p)
    for step in range(10):
        g = torch.randn(1000, generator=generator)
        theirs.grad = g.clone()
        optimizer.step()
        scalars = adamw_scalars(int32(step), 1e-2, 0.9, 0.999, 0.1)
        keys = leaf_keys(int32(0), int32(step), "w")
        adamw_(p, m, v, g, scalars, keys, int32(0), **STATICS, stochastic=False)
    torch.testing.assert_close(p, theirs.detach(), rtol=1e-6, atol=1e-7)


def test_factor_multiplies_the_gradient(op_by_op: None) -> None:
    arguments = operands(1000, (FLOAT, FLOAT, FLOAT, FLOAT))
    scaled = {**arguments, "g": arguments["g"] * 8, "scalars": arguments["scalars"].clone()}
    scaled["scalars"][3] /= 8
    assert_same_bits(adamw(**scaled, **STATICS, stochastic=False), adamw(**arguments, **STATICS, stochastic=False))


@pytest.mark.parametrize("stochastic", [False, True])
def test_small_steps_are_lost_to_nearest_rounding_and_kept_by_stochastic(stochastic: bool, op_by_op: None) -> None:
    n, steps, lr = 20_000, 50, 1e-4
    p = torch.ones(n, dtype=BFLOAT)
    m, v = torch.zeros(n, dtype=FLOAT), torch.zeros(n, dtype=FLOAT)
    g = torch.ones(n, dtype=BFLOAT)
    for step in range(steps):
        scalars = adamw_scalars(int32(step), lr, 0.9, 0.999, 0.0)
        keys = leaf_keys(int32(0), int32(step), "w")
        adamw_(p, m, v, g, scalars, keys, int32(0), **STATICS, stochastic=stochastic)
    drift = (1 - p.double()).mean().item()
    if stochastic:
        # In float32 every step moves by lr. One element's spread is about a root of steps · lr · 2^-8.
        assert abs(drift - steps * lr) < 5 * (steps * lr * 2**-8 / n) ** 0.5
    else:
        assert drift == 0


def test_scalars_are_exact_to_float32() -> None:
    for step in (0, 9, 99_999):
        scalars = adamw_scalars(int32(step), torch.tensor(3e-4), 0.9, 0.95, 0.1, torch.tensor(0.25))
        t, lr = step + 1, torch.tensor(3e-4).item()
        expected = [1 - lr * 0.1, lr / (1 - 0.9**t), (1 - 0.95**t) ** -0.5, 0.25]
        torch.testing.assert_close(scalars, torch.tensor(expected), rtol=1e-7, atol=0)


@pytest.mark.parametrize("stochastic", [False, True])
def test_ops_fulfil_torch_library_contract(stochastic: bool, op_by_op: None) -> None:
    arguments = operands(33, (BFLOAT, FLOAT, BFLOAT, BFLOAT))
    checks = ("test_schema", "test_faketensor")
    for op in (torch.ops.fzero.adamw.default, torch.ops.fzero.adamw_.default):
        torch.library.opcheck(op, (*arguments.values(), *STATICS.values(), stochastic), test_utils=checks)


def test_a_trace_holds_one_node_and_keeps_the_write(op_by_op: None) -> None:
    arguments = operands(33, (BFLOAT, BFLOAT, BFLOAT, BFLOAT))

    def step(*tensors: Tensor) -> tuple[Tensor, ...]:
        updated = adamw(*tensors, **STATICS, stochastic=True)
        adamw_(*tensors, **STATICS, stochastic=True)
        return updated

    graph = _torch.make_fx(step, tracing_mode="fake")(*arguments.values())
    graph.graph.eliminate_dead_code()
    targets = [node.target for node in graph.graph.nodes]
    assert targets.count(torch.ops.fzero.adamw.default) == targets.count(torch.ops.fzero.adamw_.default) == 1
    expected = adamw_reference(**arguments, **STATICS, stochastic=True)
    assert_same_bits(graph(*arguments.values()), expected)
    assert_same_bits(tuple(arguments[name] for name in STATE), expected)


def test_transforms_see_the_reference() -> None:
    arguments = operands(9, (FLOAT, FLOAT, FLOAT, FLOAT))
    arguments["g"] = torch.linspace(0.5, 1.5, 9)

    def new_p(g: Tensor) -> Tensor:
        return adamw(**{**arguments, "g": g}, **STATICS, stochastic=False)[0]

    out, pullback, *_ = torch.func.vjp(new_p, arguments["g"])
    assert torch.equal(out, new_p(arguments["g"]))
    cotangent = torch.ones(9)
    (by_vjp,) = pullback(cotangent)
    leaf = arguments["g"].clone().requires_grad_()
    (by_autograd,) = torch.autograd.grad(new_p(leaf), leaf, cotangent)
    assert by_vjp.abs().min() > 0
    assert torch.equal(by_vjp, by_autograd)
    batch = torch.stack([arguments["g"], 2 * arguments["g"]])
    assert torch.equal(torch.func.vmap(new_p)(batch), torch.stack([new_p(g) for g in batch]))


@pytest.mark.parametrize(
    ("name", "wrong", "error", "message"),
    [
        ("p", torch.ones(9, dtype=HALF), TypeError, "adamw: p has dtype torch.float16"),
        ("g", torch.ones(9, dtype=torch.float64), TypeError, "adamw: g has dtype torch.float64"),
        ("m", torch.ones(8), ValueError, r"adamw: m has shape \(8,\), expected \(9,\)"),
        ("g", torch.ones(18)[::2], ValueError, "adamw: g is not contiguous"),
        ("p", torch.ones(3, 3), ValueError, "expected one dimension"),
        ("offset", torch.tensor(0), TypeError, "adamw: offset has dtype torch.int64"),
    ],
)
def test_refuses_what_the_kernel_does_not_take(name: str, wrong: Tensor, error: type[Exception], message: str) -> None:
    arguments = {**operands(9, (FLOAT, FLOAT, FLOAT, FLOAT)), name: wrong}
    with pytest.raises(error, match=message):
        adamw(**arguments, **STATICS, stochastic=False)
