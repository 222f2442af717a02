"""What the update kernels share: every storage alike by Triton, compiled and op by op; many leaves; what is refused."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import fzero as fz
from fzero import _torch
from fzero.kernels import compiled
from fzero.kernels.launch import BLOCK, BLOCKS, launch, programs_of
from fzero.kernels.reference import reference
from fzero.kernels.storage import encode, grouped, is_quantized, load, split_master
from fzero.kernels.update import Update, leaves_of
from fzero.random.bits import leaf_keys
from tests import triton_process

FLOAT, BFLOAT, HALF = torch.float32, torch.bfloat16, torch.float16
ZERO = torch.zeros((), dtype=torch.int32)
OPTIMIZERS: dict[str, Any] = {
    "adamw": fz.adamw(1e-3, 0.9, 0.999, 1e-8, 0.1),
    "lion": fz.lion(1e-3, 0.9, 0.99, 0.1),
    "sgd": fz.sgd(1e-3, 0.9, False, 0.1),
    "nesterov": fz.sgd(1e-3, 0.9, True, 0.1),
    "plain": fz.sgd(1e-3, 0.0, False, 0.1),
}
# Each kernel with the scalars of a step, after others, and its numbers.
UPDATES: dict[str, tuple[Update, Tensor, tuple[float, ...]]] = {
    name: (optimizer.kernel, optimizer.scalars_of(ZERO + 3, 0.5, True), optimizer.numbers)
    for name, optimizer in OPTIMIZERS.items()
}
# How the values of a leaf's state are stored: a dtype, "split" or "8-bit".
STORAGES = [
    (FLOAT, FLOAT, FLOAT),
    (BFLOAT, BFLOAT, BFLOAT),
    (HALF, FLOAT, FLOAT),
    (HALF, HALF, HALF),
    ("split", BFLOAT, BFLOAT),
    (BFLOAT, "8-bit", "8-bit"),
    ("split", "8-bit", FLOAT),
]
# Those in which each storage of a value is seen.
EACH = [STORAGES[0], STORAGES[3], STORAGES[4], STORAGES[5]]
State = list[tuple[Tensor, ...]]


def stored(x: Tensor, storage: Any, *, signed: bool) -> tuple[Tensor, ...]:
    """A value as a storage holds it."""
    if storage == "split":
        return split_master(x)
    return encode(x, signed=signed) if storage == "8-bit" else (x.to(storage),)


def operands(name: str, storage: Sequence[Any], lengths: Sequence[int], dtype: torch.dtype = BFLOAT) -> dict[str, Any]:
    """Leaves in the middle of training, with gradients that are not finite here and there, and in a whole block."""
    update, scalars, _ = UPDATES[name]
    generator = torch.Generator().manual_seed(len(lengths))
    states, grads = [], []
    for n in lengths:
        p, m, v, g = (torch.randn(n, generator=generator) for _ in range(4))
        m, v = m * 0.1, v * v
        g[3::97], g[5::89], g[7::83], g[256:384] = float("nan"), float("inf"), float("-inf"), float("nan")
        count = 1 if name == "plain" else len(update.values)
        values = [stored(x, kind, signed=x is not v) for x, kind in zip((p, m, v)[:count], storage, strict=False)]
        states.append(tuple(x for value in values for x in value))
        grads.append(g.to(dtype))
    return {
        "states": states,
        "grads": grads,
        "scalars": scalars,
        "keys": torch.stack([leaf_keys(ZERO, ZERO + 3, str(i)) for i in range(len(lengths))]),
        "offsets": torch.arange(len(lengths), dtype=torch.int32) * 1000 + 2**31 - 1000,
    }


def expected(name: str, arguments: dict[str, Any], *, stochastic: bool) -> State:
    """The new states by the reference, op by op on whole leaves."""
    update, _, numbers = UPDATES[name]
    rows = zip(*(arguments[key] for key in ("states", "grads", "keys", "offsets")), strict=True)
    how: dict[str, Any] = {"numbers": numbers, "stochastic": stochastic}
    return [
        tuple(reference(update.formula, state, g, arguments["scalars"], key, offset, **how))
        for state, g, key, offset in rows
    ]


def renewed(name: str, arguments: dict[str, Any], *, stochastic: bool) -> State:
    """The new states by the kernel, as optimizers call it."""
    update, _, numbers = UPDATES[name]
    return update(**arguments, numbers=numbers, stochastic=stochastic)


def on(device: str, arguments: dict[str, Any]) -> dict[str, Any]:
    return {
        "states": [tuple(x.to(device, copy=True) for x in state) for state in arguments["states"]],
        "grads": [g.to(device) for g in arguments["grads"]],
        **{name: arguments[name].to(device) for name in ("scalars", "keys", "offsets")},
    }


def assert_same_bits(actual: Sequence[Sequence[Tensor]], wanted: Sequence[Sequence[Tensor]]) -> None:
    assert len(actual) == len(wanted)
    for i, (one, other) in enumerate(zip(actual, wanted, strict=True)):
        for k, (x, y) in enumerate(zip(one, other, strict=True)):
            assert (x.dtype, x.shape) == (y.dtype, y.shape)
            differ = (x.cpu().view(torch.uint8) != y.cpu().view(torch.uint8)).sum().item()
            assert differ == 0, f"leaf {i}, tensor {k}: {differ} bytes differ"


def check_triton(name: str, device: str, storages: Sequence[Sequence[Any]] = STORAGES) -> None:
    """Compare the Triton kernel with the reference, for one leaf and for several of odd lengths.

    Every length is seen in place and into new memory where there are two storages or more.
    """
    update, _, numbers = UPDATES[name]
    rows = (((1100,), False), ((1029, 0, 3, 8200), True), ((512, 1040), True))
    for (k, storage), (j, (lengths, stochastic)) in itertools.product(enumerate(storages), enumerate(rows)):
        arguments = operands(name, storage, lengths)
        wanted = expected(name, arguments, stochastic=stochastic)
        there = on(device, arguments)
        out = there["states"]
        if (k + j) % 2:
            out = [tuple(torch.empty_like(x) for x in state) for state in out]
        launch(out, **there, formula=update.kernel, numbers=numbers, stochastic=stochastic)
        assert_same_bits(out, wanted)


def compiled_for_hopper(name: str, storages: Sequence[Sequence[Any]]) -> None:
    """Compile the kernel, which needs no GPU: Triton brings its own assembler."""
    triton_process.compiled(f"from tests.test_kernels_update import check_ptx; check_ptx({name!r}, {storages!r})")


POINTERS = {
    "fp32": ("*fp32",), "bf16": ("*bf16",), "fp16": ("*fp16",), "split": ("*bf16", "*i16"),
    "signed": ("*i8", "*fp32"), "unsigned": ("*u8", "*fp32"),
}  # fmt: skip


def check_ptx(name: str, storages: Sequence[Sequence[str]]) -> None:
    """Compile for one leaf and for many: nothing fused but what makes roots and reciprocals, 16 bytes at a time."""
    from instructions import compiled

    from fzero.kernels.launch import update_many, update_one

    update, _, numbers = UPDATES[name]
    for storage in storages:
        state = tuple(POINTERS[kind] for kind in storage)
        for kernel in (update_one, update_many):
            ptx = compiled(kernel, update, len(numbers), state).asm["ptx"]
            # Two fused operations make a root or a reciprocal of the GPU exact; there are no others.
            roots, reciprocals = ptx.count("rsqrt.approx.ftz.f32"), ptx.count("rcp.approx.ftz.f32")
            assert ptx.count("fma.rn.f32") == ptx.count("fma.") == 2 * (roots + reciprocals)
            assert ptx.count("ftz") == ptx.count("approx") == roots + reciprocals
            assert (roots > 0) == (name == "adamw") and "div." not in ptx and "sqrt.rn" not in ptx
            assert "ld.global.v4" in ptx and "st.global.v4" in ptx


@pytest.fixture
def op_by_op(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "MIN_COMPILED", 1 << 60)
    monkeypatch.setattr(compiled, "_programs", {})


@pytest.mark.parametrize("storage", STORAGES, ids=str)
@pytest.mark.parametrize("stochastic", [False, True])
def test_the_op_on_many_leaves_equals_the_reference_on_each(
    storage: tuple[Any, ...], stochastic: bool, op_by_op: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "CHUNK", 300)
    for name in UPDATES:
        arguments = operands(name, storage, (1, 0, 127, 128, 1000))
        wanted = expected(name, arguments, stochastic=stochastic)
        before = on("cpu", arguments)["states"]
        assert_same_bits(renewed(name, arguments, stochastic=stochastic), wanted)
        assert_same_bits(arguments["states"], before)
        update, _, numbers = UPDATES[name]
        in_place = getattr(torch.ops.fzero, f"{update.name}_")
        state = [x for leaf in arguments["states"] for x in leaf]
        rest = (arguments[key] for key in ("grads", "scalars", "keys", "offsets"))
        in_place(state, *rest, numbers, stochastic)
        assert_same_bits(leaves_of(state, 5), wanted)


# 8 bits take half a minute to compile. One program has codes of both signs, and the split parameter.
@pytest.mark.parametrize(
    "storage",
    [("split", "8-bit", "8-bit"), *(pytest.param(STORAGES[i], marks=pytest.mark.slow) for i in (3, 4, 5))],
    ids=str,
)
def test_compiled_equals_op_by_op(storage: tuple[Any, ...]) -> None:
    for n in (compiled.MIN_COMPILED, 40_001):
        arguments = operands("adamw", storage, (n,))
        assert_same_bits(renewed("adamw", arguments, stochastic=True), expected("adamw", arguments, stochastic=True))
    assert compiled._compiler.works


@pytest.mark.parametrize("name", UPDATES)
def test_a_factor_that_is_not_finite_skips_the_step(name: str, op_by_op: None) -> None:
    for storage in STORAGES:
        for factor in (float("nan"), float("inf")):
            arguments = operands(name, storage, (1000,))
            arguments["grads"] = [torch.ones(1000)]
            arguments["scalars"] = torch.cat([arguments["scalars"][:-1], torch.tensor([factor])])
            assert_same_bits(renewed(name, arguments, stochastic=True), arguments["states"])


@pytest.mark.parametrize("name", UPDATES)
@pytest.mark.parametrize("stochastic", [False, True])
def test_elements_without_a_finite_gradient_stay(name: str, stochastic: bool, op_by_op: None) -> None:
    for storage in STORAGES:
        arguments = operands(name, storage, (1000,))
        stay = ~arguments["grads"][0].isfinite()
        assert 128 < stay.sum() < 300
        after = renewed(name, arguments, stochastic=stochastic)[0]
        rows = list(zip(grouped(arguments["states"][0]), grouped(after), strict=True))
        for old, new in rows:
            if is_quantized(old):
                # Elements 256 to 383 are a block in which nothing changes.
                assert torch.equal(new[0][256:384], old[0][256:384]) and new[1][2] == old[1][2]
                assert (new[1] != old[1]).sum() > 5
            else:
                assert all(torch.equal(x[stay], y[stay]) for x, y in zip(old, new, strict=True))
            assert load(new).isfinite().all()
        if len(rows) > 1:
            assert (load(rows[1][1]) != load(rows[1][0]))[~stay].float().mean() > 0.5


def test_a_leaf_cut_anywhere_at_a_block_is_the_same(op_by_op: None) -> None:
    arguments = operands("adamw", (BFLOAT, "8-bit", "8-bit"), (1000,))
    whole = renewed("adamw", arguments, stochastic=True)
    p, m, m_scales, v, v_scales = arguments["states"][0]
    second = {
        **arguments,
        "states": [(p[384:], m[384:], m_scales[3:], v[384:], v_scales[3:])],
        "grads": [arguments["grads"][0][384:]],
        "offsets": arguments["offsets"] + 384,
    }
    wanted = [x[3:] if x.dtype == FLOAT else x[384:] for x in whole[0]]
    assert_same_bits(renewed("adamw", second, stochastic=True), [wanted])


@pytest.mark.gpu
def test_a_graph_that_was_captured_replays_the_update() -> None:
    host = operands("adamw", (BFLOAT, "8-bit", "8-bit"), (1029, 512))
    wanted = expected("adamw", {**host, "states": expected("adamw", host, stochastic=True)}, stochastic=True)
    device = on("cuda", host)
    state = [x for leaf in device["states"] for x in leaf]
    rest = [device[key] for key in ("grads", "scalars", "keys", "offsets")]
    torch.ops.fzero.adamw(state, *rest, UPDATES["adamw"][2], True)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        torch.ops.fzero.adamw_(state, *rest, UPDATES["adamw"][2], True)
    graph.replay()
    graph.replay()
    assert_same_bits(leaves_of(state, 2), wanted)


def test_programs_of_a_launch_see_every_block_once() -> None:
    lengths = (1, 0, BLOCK, BLOCK + 1, 3 * BLOCK * BLOCKS, 10_000_000)
    seen: set[tuple[int, int]] = set()
    for entry in programs_of(lengths).tolist():
        leaf, first = entry >> 32, entry & 0xFFFFFFFF
        blocks = {(leaf, first + i) for i in range(BLOCKS) if (first + i) * BLOCK < lengths[leaf]}
        assert blocks and not blocks & seen
        seen |= blocks
    assert len(seen) == sum(-(-length // BLOCK) for length in lengths)


@pytest.mark.parametrize("storage", [STORAGES[1], STORAGES[5]], ids=str)
@pytest.mark.parametrize("name", ["adamw", "lion", "nesterov"])
def test_ops_fulfil_torch_library_contract(name: str, storage: tuple[Any, ...], op_by_op: None) -> None:
    update, _, numbers = UPDATES[name]
    arguments = operands(name, storage, (33, 200))
    state = [x for leaf in arguments["states"] for x in leaf]
    rest = [arguments[key] for key in ("grads", "scalars", "keys", "offsets")]
    for op in (getattr(torch.ops.fzero, update.name), getattr(torch.ops.fzero, f"{update.name}_")):
        checks = ("test_schema", "test_faketensor")
        torch.library.opcheck(op.default, (state, *rest, numbers, True), test_utils=checks)


def test_a_trace_holds_one_node_and_keeps_the_write(op_by_op: None) -> None:
    arguments = operands("adamw", STORAGES[5], (33, 200))
    update, _, numbers = UPDATES["adamw"]
    state = [x for leaf in arguments["states"] for x in leaf]
    rest = [arguments[key] for key in ("scalars", "keys", "offsets")]

    def step(*tensors: Tensor) -> list[tuple[Tensor, ...]]:
        old, grads = list(tensors[:10]), list(tensors[10:])
        new = update(leaves_of(old, 2), grads, *rest, numbers=numbers, stochastic=True)
        torch.ops.fzero.adamw_(old, grads, *rest, numbers, True)
        return new

    graph = _torch.make_fx(step, tracing_mode="fake", _allow_non_fake_inputs=True)(*state, *arguments["grads"])
    graph.graph.eliminate_dead_code()
    targets = [node.target for node in graph.graph.nodes]
    assert targets.count(torch.ops.fzero.adamw.default) == targets.count(torch.ops.fzero.adamw_.default) == 1
    wanted = expected("adamw", arguments, stochastic=True)
    assert_same_bits(graph(*state, *arguments["grads"]), wanted)
    assert_same_bits(leaves_of(state, 2), wanted)


@pytest.mark.parametrize("storage", [(FLOAT,) * 3, ("split", BFLOAT, BFLOAT)], ids=str)
@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_transforms_see_the_reference(name: str, storage: tuple[Any, ...]) -> None:
    arguments = operands(name, storage, (9,))
    g = torch.linspace(0.5, 1.5, 9)

    def new_p(g: Tensor) -> Tensor:
        return renewed(name, {**arguments, "grads": [g]}, stochastic=False)[0][0]

    out, pullback, *_ = torch.func.vjp(new_p, g)
    assert torch.equal(out, new_p(g))
    cotangent = torch.ones_like(out)
    (by_vjp,) = pullback(cotangent)
    leaf = g.clone().requires_grad_()
    (by_autograd,) = torch.autograd.grad(new_p(leaf), leaf, cotangent)
    assert by_vjp.abs().min() > 0
    assert torch.equal(by_vjp, by_autograd)
    batch = torch.stack([g, 2 * g])
    assert torch.equal(torch.func.vmap(new_p)(batch), torch.stack([new_p(g) for g in batch]))


def test_codes_have_no_derivatives() -> None:
    arguments = operands("adamw", STORAGES[5], (9,))
    arguments["grads"] = [torch.ones(9, requires_grad=True)]
    with pytest.raises(ValueError, match="adamw: a state of 8-bit codes has no derivatives"):
        renewed("adamw", arguments, stochastic=False)
