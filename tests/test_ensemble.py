"""An ensemble: K states stacked into one, trained by one vmapped step, each as it would be alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fzero as fz
from tests import small, world

MEMBERS = 3


def stacked(members: list[Any]) -> Any:
    return fz.tree.map(lambda *leaves: torch.stack(leaves), *members)


def member(stack: Any, index: int) -> Any:
    return fz.tree.map(lambda leaf: leaf[index], stack)


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 13), nn.Tanh(), nn.Linear(13, 5))


APPLY, _ = fz.functional(model())


def members_of(stage: int, policy: str, optimizer: fz.Optimizer) -> list[fz.State]:
    mesh = fz.make_mesh("cpu")
    return [fz.init(model, optimizer, mesh, fz.zero(stage), policy=policy, seed=seed) for seed in range(MEMBERS)]


def batch_of(state: fz.State, step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(10 * step + state.mesh.index("data"))
    x, y = torch.randn(8, 6, generator=generator), torch.randn(8, 5, generator=generator)
    return x.to(state.policy.compute), y


def loss(p: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    return (APPLY(p, x) - y).square().mean()


def noisy_loss(p: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    return (APPLY(p, F.dropout(x, 0.5)) - y).square().mean()


def trained(stage: int, policy: str, name: str, steps: int) -> tuple[Any, list[Any], int]:
    """The members of a trained ensemble whole, each trained alone, and how many programs the ensemble took."""
    optimizer = OPTIMIZERS[name]
    objective = noisy_loss if name == "dropout" else loss
    members = members_of(stage, policy, optimizer)
    together = stacked(members)
    randomness = "different" if name == "dropout" else "error"
    each = torch.func.vmap(fz.train_step(objective), in_dims=(0, None), randomness=randomness)
    eager, _ = each(small.copied(together), batch_of(members[0], 0))
    step = fz.jit(each, donate=(0,))
    alone_step = fz.train_step(objective)
    for i in range(steps):
        batch = batch_of(members[0], i)
        together, metrics = step(together, batch)
        if i == 0:
            small.assert_same_bits(together, eager)
        rows = [alone_step(state, batch) for state in members]
        members = [state for state, _ in rows]
        torch.testing.assert_close(metrics["loss"], torch.stack([m["loss"] for _, m in rows]), rtol=0.02, atol=0.002)
    return (
        [fz.gather(member(together, i).params) for i in range(MEMBERS)],
        [fz.gather(state.params) for state in members],
        len(step.programs),
    )


OPTIMIZERS: dict[str, fz.Optimizer] = {
    "adamw": fz.adamw(1e-2),
    "clipped": fz.chain(fz.clip_by_global_norm(0.5), fz.adamw(1e-2)),
    "sgd": fz.sgd(0.1, momentum=0.9),
    "lion": fz.lion(1e-3),
    "dropout": fz.sgd(0.1),
}
FAST = {(1, 1, "bf16", "clipped"), (2, 3, "fp32", "dropout")}
PRODUCT = [
    (size, stage, policy, name)
    for size in (1, 2, 4)
    for stage in (0, 1, 3)
    for policy in ("fp32", "bf16", "fp16-mixed")
    for name in OPTIMIZERS
]


@pytest.mark.parametrize(
    ("size", "stage", "policy", "name"),
    [pytest.param(*row, marks=[pytest.mark.slow] * (row not in FAST)) for row in PRODUCT],
)
def test_an_ensemble_trains_as_its_members_alone(name, policy, stage, size):
    # A batched matrix product adds up in another order than one by one, and low precision rounds that.
    tolerance = 1e-4 if policy == "fp32" else 0.04
    for together, alone, programs in world.run(trained, stage, policy, name, 2, size=size):
        assert programs == 1, "a step returns what it takes, strides included"
        for found, expected in zip(together, alone, strict=True):
            for path, leaf in small.flat(expected).items():
                torch.testing.assert_close(small.flat(found)[path], leaf, rtol=tolerance, atol=tolerance)
        assert not torch.equal(together[0]["0"]["weight"], together[1]["0"]["weight"])


# ---------------------------------------------------------------------------------------------------------
# The update by itself, from equal gradients: to the last bit


def update(state: fz.State, value: Any) -> fz.State:
    return fz.apply_gradients(state, small.gradient_of(state, value))[0]


@pytest.mark.parametrize("policy", ["fp32", "mixed", "bf16", "bf16-exact", "fp16"])
@pytest.mark.parametrize("name", ["adamw", "sgd", "lion"])
def test_an_update_of_an_ensemble_has_the_bits_of_each_members_own_rounding_included(name, policy):
    values = [small.parameters(seed) for seed in (5, 6, 7)]
    members = [
        fz.init(small.parameters(seed), OPTIMIZERS[name], fz.make_mesh("cpu"), policy=policy, seed=seed)
        for seed in range(MEMBERS)
    ]
    together = torch.func.vmap(update)(stacked(members), stacked(values))
    for i, (state, value) in enumerate(zip(members, values, strict=True)):
        small.assert_same_bits(member(together, i), update(state, value))


def test_members_with_equal_seeds_round_alike_and_others_do_not():
    members = [
        fz.init(small.parameters(), fz.sgd(1e-3), fz.make_mesh("cpu"), policy="bf16", seed=seed) for seed in (1, 1, 2)
    ]
    together = torch.func.vmap(update)(stacked(members), stacked([small.parameters(5)] * 3))
    first, same, other = (small.piece(member(together, i).params, "block.weight") for i in range(3))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("policy", ["fp32", "fp16"])
def test_a_member_whose_gradient_is_not_finite_skips_its_step_alone(policy):
    members = [
        fz.init(small.parameters(seed), fz.adamw(1e-2), fz.make_mesh("cpu"), policy=policy, seed=seed)
        for seed in range(MEMBERS)
    ]
    # Small enough for fp16 at a loss scale of 2¹⁵.
    values = [fz.tree.map(lambda x: x / 8, small.parameters(seed)) for seed in (5, 6, 7)]
    values[1]["head"][0] = torch.nan
    before = stacked(members)

    def skipping(state: fz.State, value: Any) -> tuple[fz.State, Any]:
        return fz.apply_gradients(state, small.gradient_of(state, value), skip="step")

    after, info = torch.func.vmap(skipping)(before, stacked(values))
    assert info["finite"].tolist() == [True, False, True]
    assert after.step.tolist() == [1, 0, 1]
    small.assert_same_bits(member(after, 1).params, member(before, 1).params)
    if policy == "fp16":
        assert after.loss_scale is not None and after.loss_scale.tolist() == [2.0**15, 2.0**14, 2.0**15]


def test_an_ensemble_is_gathered_member_by_member_or_by_vmap():
    members = members_of(3, "fp32", fz.sgd(0.1))
    whole = torch.func.vmap(fz.gather)(stacked(members).params)
    for i, state in enumerate(members):
        small.assert_same_bits(member(whole, i), fz.gather(state.params))
    with pytest.raises(fz.LayoutError, match=r"one dimension.*vmap\(fz\.gather\)"):
        fz.gather(stacked(members).params)


# ---------------------------------------------------------------------------------------------------------
# Random draws, each member's from its own key


def noisy(x: Tensor) -> Tensor:
    return F.dropout(x, 0.5) + torch.rand(3) + torch.randn_like(x) + torch.empty_like(x).uniform_()


def slope_of_noisy(key: Tensor, x: Tensor) -> Tensor:
    return torch.func.grad(lambda x: fz.keyed(noisy)(key, x * x).square().sum())(x)


@pytest.mark.parametrize("function", [fz.keyed(noisy), slope_of_noisy], ids=["value", "gradient"])
@pytest.mark.parametrize("batched", [(4,), (2, 2)], ids=["once", "twice"])
def test_a_batch_of_keys_draws_what_each_draws_alone(function, batched):
    keys, x = torch.arange(4, dtype=torch.int32), torch.randn(4, 3)
    each = function
    for _ in batched:
        each = torch.func.vmap(each, randomness="different")
    found = each(keys.view(batched), x.view(*batched, 3)).view(4, 3)
    assert torch.equal(found, torch.stack([function(key, row) for key, row in zip(keys, x, strict=True)]))


def test_a_draw_that_a_batch_of_keys_shares_is_an_error():
    keys = torch.arange(4, dtype=torch.int32)
    with pytest.raises(fz.RandomOpError, match=r"4 members.*randomness='different'"):
        torch.func.vmap(fz.keyed(lambda: torch.rand(3)), randomness="same")(keys)
