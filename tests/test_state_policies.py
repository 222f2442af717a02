"""Every policy trains: with and without autocast, at every stage, on any number of ranks, as plain PyTorch does."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fzero as fz
from fzero.precision.policy import POLICIES
from tests import world
from tests.small import assert_same_bits

HALF = {"fp16": torch.float16, "fp16-mixed": torch.float16}
# How far losses may be from those in float64, for a compute dtype: some of its roundings.
NEAR = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
STEPS, ROWS = 3, 8


def parameters() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * shape[-1] ** -0.5

    # Weights are quantized, in whole blocks on four ranks.
    return {
        "first": {"weight": draw(64, 24), "bias": torch.zeros(64)},
        "norm": {"weight": torch.ones(64), "bias": torch.zeros(64)},
        "second": {"weight": draw(64, 64)},
        "head": {"weight": draw(40, 64)},
    }


def batches(rows: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(STEPS, rows, 24, generator=generator), torch.randint(40, (STEPS, rows), generator=generator)


def loss_fn(params: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, labels = batch
    hidden = F.linear(x.to(params["first"]["weight"].dtype), params["first"]["weight"], params["first"]["bias"])
    hidden = F.layer_norm(hidden, (64,), params["norm"]["weight"].to(hidden), params["norm"]["bias"].to(hidden))
    hidden = F.gelu(F.linear(hidden, params["second"]["weight"].to(hidden)))
    return F.cross_entropy(F.linear(hidden, params["head"]["weight"]).float(), labels)


def in_float64() -> list[float]:
    """The losses of a plain loop over the whole batch."""
    leaves = fz.tree.map(lambda x: x.double().requires_grad_(), parameters())
    optimizer = torch.optim.AdamW(fz.tree.leaves(leaves), lr=1e-2)
    losses = []
    for x, labels in zip(*batches(ROWS), strict=True):
        hidden = F.linear(x.double(), leaves["first"]["weight"], leaves["first"]["bias"])
        hidden = F.layer_norm(hidden, (64,), leaves["norm"]["weight"], leaves["norm"]["bias"])
        hidden = F.gelu(F.linear(hidden, leaves["second"]["weight"]))
        loss = F.cross_entropy(F.linear(hidden, leaves["head"]["weight"]), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def policies(name: str) -> dict[str, fz.Policy]:
    policy = fz.policy(name)
    if policy.loss_scale is not None:  # low enough for the sum of four ranks' gradients
        policy = dataclasses.replace(policy, loss_scale=fz.LossScale(initial=2.0**12))
    return {
        "plain": policy,
        "autocast": dataclasses.replace(policy, autocast=HALF.get(name, torch.bfloat16)),
        "in fp32": fz.policy(policy, compute=torch.float32),
        "norms exempt": fz.policy(policy, exempt=["norm.*"]),
    }


def trained(name: str, variant: str, stage: int, *, jitted: bool = False) -> dict[str, Any]:
    """Losses of this rank, and the whole state, after steps on its rows."""
    mesh = fz.make_mesh("cpu")
    state = fz.init(parameters(), fz.adamw(1e-2), mesh, fz.zero(stage), policies(name)[variant])
    step = fz.train_step(loss_fn) if jitted else eager
    losses = []
    share = ROWS // mesh.size("data")
    rows = slice(mesh.index("data") * share, (mesh.index("data") + 1) * share)
    for x, labels in zip(*batches(ROWS), strict=True):
        state, metrics = step(state, (x[rows], labels[rows]))
        losses.append(metrics["loss"].item())
        assert metrics["finite"]
    return {"losses": losses, "params": fz.gather(state.params), "moments": fz.gather(state.moments)}


def eager(state: fz.State, batch: tuple[Tensor, Tensor]) -> tuple[fz.State, dict[str, Any]]:
    loss, grads = fz.value_and_grad(loss_fn)(state, batch)
    state, info = fz.apply_gradients(state, grads)
    return state, {"loss": loss, **info}


def at_stages(name: str, variants: dict[str, Sequence[int]]) -> dict[str, list[dict[str, Any]]]:
    return {variant: [trained(name, variant, stage) for stage in stages] for variant, stages in variants.items()}


# By the size of a world.
VARIANTS: dict[int, dict[str, Sequence[int]]] = {
    1: {"norms exempt": (3,)},
    2: {"plain": (0, 1, 3), "autocast": (3,), "in fp32": (1,)},
    4: {"plain": (3,)},
}


QUICK = {(name, 2) for name in POLICIES} | {("bf16-8bit", 1), ("bf16-8bit", 4), ("fp16", 1)}


@pytest.mark.parametrize(
    ("name", "size"),
    [
        pytest.param(name, size, marks=() if (name, size) in QUICK else pytest.mark.slow)
        for name in POLICIES
        for size in (1, 2, 4)
    ],
)
def test_every_policy_trains_as_plain_pytorch_at_every_stage(name: str, size: int) -> None:
    expected = in_float64()
    ranks = world.run(at_stages, name, VARIANTS[size], size=size)
    for variant, stages in VARIANTS[size].items():
        first = ranks[0][variant][0]
        losses = torch.tensor([rank[variant][0]["losses"] for rank in ranks]).mean(0).tolist()
        low = [dtype for dtype in (fz.policy(name).compute, policies(name)[variant].autocast) if dtype is not None]
        assert losses == pytest.approx(expected, rel=max(NEAR[dtype] for dtype in low)), variant
        for rank in ranks:
            for stage, result in zip(stages, rank[variant], strict=True):
                assert result["losses"] == rank[variant][0]["losses"], (variant, stage)
                assert_same_bits(result["params"], first["params"])


def both(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    return trained(name, "in fp32", 3, jitted=True), trained(name, "in fp32", 3)


@pytest.mark.parametrize(
    ("name", "size"),
    [("mixed", 2), ("fp16", 2), ("bf16-8bit", 1), pytest.param("bf16-8bit", 4, marks=pytest.mark.slow)],
)
def test_traced_and_eager_steps_give_the_same_bits_where_leaves_are_cast_once_gathered(name: str, size: int) -> None:
    for traced, untraced in [both(name)] if size == 1 else world.run(both, name, size=size):
        del traced["losses"], untraced["losses"]  # traced, the mean over ranks
        assert_same_bits(traced, untraced)


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        *((name, "plain") for name in POLICIES),
        ("bf16", "autocast"),
        ("fp16-mixed", "autocast"),
    ],
)
def test_traced_and_eager_steps_give_the_same_bits(name: str, variant: str) -> None:
    traced, untraced = trained(name, variant, 3, jitted=True), trained(name, variant, 3)
    assert traced.pop("losses") == untraced.pop("losses")
    assert_same_bits(traced, untraced)
