"""How moments are stored: by the policy, cut as gradients are, and handed to kernels leaf by leaf and back."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fzero as fz
from fzero.optim import elementwise
from fzero.optim.moments import MIN_QUANTIZED, Quantized, WithRemainder, restored, stored, zeros
from tests import world
from tests.small import assert_same_bits, flat, gradient_of, parameters

QUANTIZED = fz.policy("bf16-8bit", exempt=["norm*"])
SHAPES = {"wide": (48, 64), "odd": (41, 43), "small": (MIN_QUANTIZED - 1,), "norm": (4096,)}


def params_of(policy: Any, layout: fz.Layout | None = None, mesh: fz.Mesh | None = None) -> fz.Sharded:
    tree = {name: torch.ones(shape) for name, shape in SHAPES.items()} | {"ids": torch.arange(2000)}
    state = fz.init(tree, fz.sgd(0.1), mesh or fz.make_mesh("cpu"), layout or fz.zero(3), policy=policy)
    return state.params


def test_large_leaves_are_quantized_and_small_and_exempt_ones_are_not() -> None:
    moment = zeros(params_of(QUANTIZED), signed=True)
    assert isinstance(moment, Quantized)
    dtypes = {path: x.dtype for path, x in flat(moment.codes).items()}
    assert dtypes == {"wide": torch.int8, "odd": torch.int8, "small": torch.bfloat16, "norm": torch.float32}
    assert {path: tuple(x.shape) for path, x in flat(moment.scales).items()} == {"wide": (24,), "odd": (14,)}
    unsigned = zeros(params_of(QUANTIZED), signed=False)
    assert isinstance(unsigned, Quantized)
    assert flat(unsigned.codes)["wide"].dtype == torch.uint8


def gathered_shapes(stage: int) -> dict[str, tuple[int, ...]]:
    moment = zeros(params_of(QUANTIZED, fz.zero(stage)), signed=True)
    return {path: tuple(x.shape) for path, x in flat(fz.gather(moment)).items()}


@pytest.mark.parametrize(("size", "stage", "blocks"), [(1, 3, 14), (2, 0, 14), (2, 1, 14), (4, 3, 16)])
def test_scales_are_as_many_as_the_pieces_have_blocks(size: int, stage: int, blocks: int) -> None:
    # 41 x 43 elements are 13.8 blocks; of four pieces of 441 elements each has 3.4.
    codes = {f"0.{name}": shape for name, shape in SHAPES.items()}
    expected = {**codes, "1.odd": (blocks,), "1.wide": (24,)}
    for shapes in world.run(gathered_shapes, stage, size=size):
        assert shapes == expected


def test_scales_of_leaves_that_are_split_have_an_axis_more() -> None:
    mesh = fz.make_mesh("cpu", data=2, model=2, simulate=True)
    layout = fz.zero(3, split={"wide": fz.P(None, "model")})
    moment = zeros(params_of(QUANTIZED, layout, mesh), signed=True)
    assert isinstance(moment, Quantized)
    index = moment.scales.paths.index("wide")
    spec, piece = moment.scales.placement.specs[index], moment.scales.pieces[index]
    assert piece is not None
    assert spec.shape == (2, 12)
    assert spec.piece_numel(mesh) == piece.numel() == 6


@pytest.mark.parametrize("policy", ["bf16", QUANTIZED], ids=["plain", "quantized"])
def test_what_a_kernel_gets_goes_back_where_it_was(policy: Any) -> None:
    params = params_of(policy)
    moments = [zeros(params, signed=True), zeros(params, signed=False)]
    rows = [tuple(x + 1 for x in stored(moments, i)) for i in range(len(params.paths))]
    rows[params.paths.index("odd")] = ()  # a leaf without a gradient
    new = restored(moments, rows)
    for before, after in zip(flat(moments).items(), flat(new).items(), strict=True):
        assert before[0] == after[0]
        assert torch.equal(after[1], before[1] + (0 if "odd" in before[0] else 1))
    assert stored(new, params.paths.index("ids")) == ()


def test_the_state_of_a_split_master_has_a_remainder_beside_it() -> None:
    state = fz.init({"w": torch.full((2000,), 1.001)}, fz.adamw(0.1), fz.make_mesh("cpu"), policy="bf16-exact")
    assert isinstance(state.moments, WithRemainder)
    assert flat(state.moments.remainder)["w"].dtype == torch.int16
    assert flat(state.moments.remainder)["w"].any()
    assert not flat(state.optimizer.init(state.params).remainder)["w"].any(), "of bf16 parameters there is none"


@pytest.mark.parametrize(
    "policy", ["bf16", "bf16-exact", "bf16-8bit", *(pytest.param(p, marks=pytest.mark.slow) for p in ("fp32", "fp16"))]
)
def test_small_pieces_updated_together_get_the_bits_that_they_get_alone(
    policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    optimizer = fz.adamw(1e-2, weight_decay=0.1, mask=lambda path: path != "head")
    tree = {**parameters(), "wide": torch.ones(64, 32)}
    weights = fz.tree.map(lambda x: x * 0.1, {**parameters(1), "wide": torch.ones(64, 32)})

    def updated(small: int) -> tuple[Any, int]:
        monkeypatch.setattr(elementwise, "SMALL", {"cpu": small})
        state = fz.init(tree, optimizer, fz.make_mesh("cpu"), policy=policy)
        step = fz.jit(lambda s: fz.apply_gradients(s, gradient_of(s, weights))[0], donate=0)
        for _ in range(2):
            state = step(state)
        (program,) = step.programs
        return state, program.text().count("adamw_")

    (alone, calls), (together, fewer) = updated(0), updated(1 << 15)
    assert_same_bits(together, alone)
    assert calls == 5
    # Those that decay, of one storage: the scalar, the block; the wide one where it is quantized; the head.
    assert fewer == (3 if policy == "bf16-8bit" else 2)
