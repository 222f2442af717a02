"""Weighted means over micro-batches and ranks: those of one big batch, whoever has how many tokens."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fzero as fz
from tests import small, world

ROWS, CLASSES, IGNORED = 8, 5, -100


def batch_of(ranks: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Rows of all ranks with uneven labels: a micro-batch without any, and a last rank without any."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(ranks * ROWS, 23, generator=generator, dtype=dtype)
    y = torch.randint(0, CLASSES, (ranks * ROWS,), generator=generator)
    y[[0, 1, 5]] = IGNORED
    if ranks > 1:
        y[-ROWS:] = IGNORED
    return {"x": x, "y": y, "scale": torch.tensor(2.0, dtype=dtype)}


def tokens(batch: dict[str, Tensor]) -> Tensor:
    return (batch["y"] != IGNORED).sum()


def loss(p: Any, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """A mean over labels, and not a number where there are none: neither it nor its gradient."""
    logits = batch["x"].to(p["block"]["weight"].dtype) @ p["block"]["weight"] * batch["scale"]
    logits, taken = logits.to(torch.promote_types(logits.dtype, torch.float32)), batch["y"] != IGNORED
    summed = F.cross_entropy(logits, batch["y"], ignore_index=IGNORED, reduction="sum")
    share = (logits.argmax(1) == batch["y"]).sum() / taken.sum()
    return summed / taken.sum(), {"share": share, "labels": taken.sum()}


def own(batch: dict[str, Tensor], rank: int) -> dict[str, Tensor]:
    return {k: v[rank * ROWS :][:ROWS] if v.ndim else v for k, v in batch.items()}


def accumulated(stage: int, ranks: int, n: int, traced: bool) -> Any:
    """Value, aux and gradient over micro-batches and ranks."""
    mesh = fz.make_mesh("cpu")
    params = fz.shard(small.parameters(dtype=torch.float64), mesh, fz.zero(stage))
    function = fz.accumulate(fz.value_and_grad(loss, has_aux=True), n, weight=tokens)
    function = fz.jit(function) if traced else function
    (value, aux), gradient = function(params, own(batch_of(ranks), mesh.index("data")))
    return value, aux, fz.gather(gradient)


@pytest.mark.parametrize(
    ("ranks", "stage", "n", "traced"),
    [
        *[(1, 3, 4, False), (1, 0, 4, True), (1, 3, 1, True)],
        *[(2, 3, 4, True), (2, 0, 1, False), (2, 1, 2, True)],
        *(pytest.param(*case, marks=pytest.mark.slow) for case in [(4, 3, 2, True), (4, 0, 4, True)]),
    ],
)
def test_means_are_those_of_one_batch(ranks, stage, n, traced):
    batch = batch_of(ranks)
    (value, aux), gradient = fz.value_and_grad(loss, has_aux=True)(small.parameters(dtype=torch.float64), batch)
    for got, got_aux, got_gradient in world.run(accumulated, stage, ranks, n, traced, size=ranks):
        torch.testing.assert_close((got, got_aux["share"].double()), (value, aux["share"].double()), rtol=1e-7, atol=0)
        for path, leaf in small.flat(gradient).items():
            torch.testing.assert_close(small.flat(got_gradient)[path], leaf, rtol=1e-7, atol=1e-12)


SCALED = dataclasses.replace(fz.policy("fp16-mixed"), loss_scale=fz.LossScale(initial=256.0))


def stepped(stage: int, policy: str | fz.Policy, ranks: int, n: int, clip: float) -> Any:
    mesh = fz.make_mesh("cpu")
    optimizer = fz.chain(fz.clip_by_global_norm(clip), fz.sgd(0.5))
    state = fz.init(small.parameters(), optimizer, mesh, fz.zero(stage), policy=policy)
    batch = own(batch_of(ranks, torch.float32), mesh.index("data"))
    step = fz.train_step(loss, n, weight=tokens, has_aux=True, donate=False)
    for _ in range(3):
        state, metrics = step(state, batch)
    assert len(step.programs) == 1
    return fz.gather(state.params), {name: x.double() for name, x in metrics.items() if name != "labels"}


@pytest.mark.parametrize(
    ("policy", "ranks", "stage", "n"),
    [
        ("fp32", 1, 3, 4),
        ("fp32", 2, 1, 4),
        (SCALED, 2, 3, 2),
        pytest.param("fp32", 4, 2, 1, marks=pytest.mark.slow),
    ],
)
def test_steps_are_those_of_one_rank_with_the_whole_batch(policy, ranks, stage, n):
    """Loss scale, clip and norm included."""
    optimizer = fz.chain(fz.clip_by_global_norm(0.3), fz.sgd(0.5))
    state = fz.init(small.parameters(), optimizer, fz.make_mesh("cpu"), policy="fp32")
    step = fz.train_step(loss, has_aux=True, donate=False)
    for _ in range(3):
        state, metrics = step(state, batch_of(ranks, torch.float32))
    rtol = 1e-5 if policy == "fp32" else 2e-2
    for params, got in world.run(stepped, stage, policy, ranks, n, 0.3, size=ranks):
        for name in ("loss", "grad_norm"):
            torch.testing.assert_close(got[name], metrics[name].double(), rtol=rtol, atol=0)
        for path, leaf in small.flat(fz.gather(state.params)).items():
            torch.testing.assert_close(small.flat(params)[path], leaf, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("transform", [lambda f: f, fz.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("n", [1, 4])
def test_no_weight_at_all_is_zero(n, transform):
    batch = own({**batch_of(1), "y": torch.full((ROWS,), IGNORED)}, 0)
    function = transform(fz.accumulate(fz.value_and_grad(loss, has_aux=True), n, weight=tokens))
    (value, _), gradient = function(small.parameters(dtype=torch.float64), batch)
    assert value == 0
    assert all((leaf == 0).all() for leaf in fz.tree.leaves(gradient))


def test_equal_weights_change_no_bit():
    state = fz.init(small.parameters(), fz.sgd(0.1), fz.make_mesh("cpu"), policy="bf16")
    batch = {"x": torch.randn(ROWS, 23), "y": torch.randint(0, CLASSES, (ROWS,)), "scale": torch.tensor(2.0)}
    function = fz.value_and_grad(lambda p, b: loss(p, b)[0].float())
    expected = fz.accumulate(function, 4)(state, batch)
    small.assert_same_bits(fz.accumulate(function, 4, weight=lambda b: 3)(state, batch), expected)


def test_weight_sees_the_arguments_that_are_split():
    seen: list[Any] = []

    def weight(x: Tensor, *, y: Tensor) -> float:
        seen.append((len(x), len(y)))
        return 1.0

    function = fz.value_and_grad(lambda p, teacher, x, power, *, y: (p * x * y).mean() * teacher.sum())
    call = torch.tensor(1.0), torch.ones(3), torch.ones(4), 2
    assert fz.accumulate(function, 2, weight=weight, whole="teacher")(*call, y=torch.ones(4)) == (3.0, 3.0)
    assert seen == [(2, 2), (2, 2)]


def test_the_graph_does_not_grow_with_the_number_of_micro_batches():
    sizes = []
    for n in (2, 8):
        step = fz.jit(fz.accumulate(fz.value_and_grad(lambda p, b: loss(p, b)[0]), n, weight=tokens))
        step(small.parameters(dtype=torch.float64), own(batch_of(1), 0))
        sizes.append(len(step.programs[0].trace.module.graph.nodes))
    assert sizes[0] == sizes[1]


def test_a_weight_is_one_number():
    function = fz.accumulate(fz.value_and_grad(lambda p, x: (p * x).mean()), 2, weight=lambda x: x)
    with pytest.raises(TypeError, match=r"weight must return a number.*returned float32\(2,\)"):
        function(torch.tensor(1.0), torch.ones(4))


def test_a_function_around_value_and_grad_cannot_be_weighted():
    def around(p: Tensor, x: Tensor) -> Any:
        return fz.value_and_grad(lambda p, x: (p * x).mean())(p, x)

    with pytest.raises(TypeError, match=r"pass what fz\.value_and_grad returned, and not around"):
        fz.accumulate(around, 2, weight=lambda x: 1)
