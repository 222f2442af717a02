"""Cases between modules: what a user combines, and what once went wrong there."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gpt import GPT, PRESETS
from torch import Tensor, nn

import fzero as fz
from tests import small, world


def state_of(*names: str, policy: str | fz.Policy = "fp32", **options: Any) -> fz.State:
    generator = torch.Generator().manual_seed(3)
    params = {name: torch.randn(8, 8, generator=generator) for name in names}
    return fz.init(params, fz.adamw(1e-2), policy=policy, **options)


EXPANDED = {
    "sum": lambda p, x: p["w"].sum(),
    "mean": lambda p, x: p["w"].mean(),
    "one gradient for two leaves": lambda p, x: ((p["w"] + p["v"]) * x).sum(),
}


@pytest.mark.parametrize("loss", EXPANDED.values(), ids=EXPANDED)
@pytest.mark.parametrize("policy", ["fp32", "mixed", "bf16"])
def test_gradients_that_autograd_hands_out_as_views_can_be_applied_and_donated(loss, policy):
    state, x = state_of("v", "w", policy=policy), torch.ones(8, 8)
    _, grads = fz.value_and_grad(loss)(state, x)
    pieces = [piece for piece in grads.pieces if piece is not None]
    assert all(piece.is_contiguous() for piece in pieces)
    assert len({piece.data_ptr() for piece in pieces}) == len(pieces)
    expected, _ = fz.apply_gradients(*fz.tree.map(torch.clone, (state, grads)))
    got, _ = fz.jit(fz.apply_gradients, donate=(0, 1))(state, grads)
    small.assert_same_bits(got, expected)


def gpt_loss(policy: str) -> tuple[Any, fz.State, Tensor]:
    config = replace(PRESETS["tiny"], depth=1)
    apply, _ = fz.functional(lambda: GPT(config))
    state = fz.init(lambda: GPT(config), fz.adamw(1e-2), policy=policy)
    rows = torch.randint(256, (2, 17), generator=torch.Generator().manual_seed(0))
    return lambda p, t: F.cross_entropy(apply(p, t[:, :-1]).flatten(0, 1).float(), t[:, 1:].flatten()), state, rows


OPERATIONS = {
    "silu": F.silu,
    "mish": F.mish,
    "gelu": F.gelu,
    "group_norm": lambda x: F.group_norm(x, 2),
    "softplus": F.softplus,
    "layer_norm": lambda x: F.layer_norm(x, (8,)),
}


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
@pytest.mark.parametrize("policy", ["fp32", "bf16"])
def test_operations_with_two_backward_formulas_take_the_same_one_traced_and_eager(operation, policy):
    state, x = state_of("w", policy=policy), torch.randn(4, 8)
    gradient = fz.value_and_grad(lambda p, x: operation(x.to(p["w"].dtype) @ p["w"]).float().square().sum())
    small.assert_same_bits(fz.jit(gradient)(state, x), gradient(state, x))


@pytest.mark.parametrize("policy", ["fp32", "mixed", "bf16"])
def test_the_gpt_of_the_examples_has_the_same_bits_traced_and_eager(policy):
    loss, state, rows = gpt_loss(policy)
    gradient = fz.value_and_grad(loss)
    small.assert_same_bits(fz.jit(gradient)(state, rows), gradient(state, rows))


def test_what_a_state_that_is_not_differentiated_hands_out_is_a_copy():
    state = state_of("w")
    (_, aux), _ = fz.value_and_grad(lambda w, p: ((w * p["w"]).sum(), p["w"]), has_aux=True)(torch.ones(8, 8), state)
    before = aux.clone()
    fz.train_step(lambda p, x: p["w"].square().sum())(state, torch.ones(1))
    assert torch.equal(aux, before)


def test_a_state_that_is_not_differentiated_keys_random_draws_too():
    state = state_of("w")
    noisy = fz.value_and_grad(lambda w, p: F.dropout(w * p["w"], 0.5).sum())
    assert torch.equal(noisy(torch.ones(8, 8), state)[0], noisy(torch.ones(8, 8), state)[0])
    other = noisy(torch.ones(8, 8), state.replace(seed=state.seed + 1))
    assert not torch.equal(noisy(torch.ones(8, 8), state)[0], other[0])


def test_autocast_of_a_policy_holds_for_a_state_that_is_not_differentiated():
    state = state_of("w", policy=fz.Policy(autocast=torch.bfloat16))
    seen: list[torch.dtype] = []

    def f(w: Tensor, p: Any) -> Tensor:
        seen.append((w @ p["w"]).dtype)
        return (w @ p["w"]).float().sum()

    fz.value_and_grad(f)(torch.ones(8, 8), state)
    assert seen == [torch.bfloat16]


def test_keyword_arguments_reach_the_function_opened():
    state = state_of("w")
    value, _ = fz.value_and_grad(lambda x, *, p: (x @ p["w"]).sum())(torch.ones(8, 8), p=state)
    torch.testing.assert_close(value, fz.gather(state.params)["w"].sum() * 8)


@pytest.mark.parametrize("transform", [fz.value_and_grad, fz.grad])
def test_reduce_is_mean_or_sum(transform):
    with pytest.raises(ValueError, match="reduce='avg'; expected 'mean' or 'sum'"):
        transform(lambda p: p["w"].sum(), reduce="avg")(state_of("w"))


def test_remat_refuses_captured_tensors_inside_lists_and_those_of_autograd():
    with pytest.raises(fz.TraceError, match="not one of its arguments"):
        fz.grad(lambda w: fz.remat(lambda x: torch.cat([x, w]).square().sum())(torch.ones(3)))(torch.ones(3))
    w = torch.ones(3, requires_grad=True)
    with pytest.raises(fz.TraceError, match="not one of its arguments"):
        fz.remat(lambda x: (x * w).sum())(torch.ones(3, requires_grad=True))
    fz.remat(lambda w, x: (x * w).sum())(w, torch.ones(3)).backward()
    assert torch.equal(w.grad if w.grad is not None else torch.zeros(3), torch.ones(3))


def linear_seeded_by_rank() -> None:
    mesh = fz.make_mesh("cpu")
    torch.manual_seed(mesh.index("data"))
    fz.init(nn.Linear(8, 5), fz.adamw(1e-3), mesh)


def width_by_rank() -> None:
    mesh = fz.make_mesh("cpu")
    fz.init({"w": torch.zeros(4 + mesh.index("data"))}, fz.adamw(1e-3), mesh)


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_that_start_from_different_trees_are_told(size):
    world.raises(fz.LayoutError, linear_seeded_by_rank, size=size, match="different values at bias, weight.*factory")
    world.raises(fz.LayoutError, width_by_rank, size=size, match="different names, shapes or dtypes")


def an_axis_left_out() -> None:
    fz.init({"w": torch.zeros(64)}, fz.adamw(1e-3), fz.make_mesh("cpu", node=2, data=2), fz.zero(3))


def test_a_mesh_axis_that_the_layout_leaves_out_is_an_error():
    world.raises(fz.LayoutError, an_axis_left_out, size=4, match=r"\['node'\].*replicate='node'")


def test_donation_is_by_position():
    step = fz.jit(lambda s, x: s, donate=(0,))
    with pytest.raises(TypeError, match="Pass what is donated by position"):
        step(s=state_of("w"), x=1)
    with pytest.raises(ValueError, match="count from 0"):
        fz.jit(lambda s: s, donate=(-1,))


def test_aux_may_not_hide_the_metrics_of_a_step():
    step = fz.train_step(lambda p, x: (p["w"].sum(), {"lr": p["w"].mean()}), has_aux=True)
    with pytest.raises(ValueError, match=r"must not name \['lr'\]"):
        step(state_of("w"), torch.ones(1))


def test_gradients_of_another_policy_are_refused():
    _, grads = fz.value_and_grad(lambda p, x: p["w"].float().sum())(state_of("w", policy="bf16"), None)
    with pytest.raises(fz.PolicyError, match="another policy"):
        fz.apply_gradients(state_of("w", policy="fp32"), grads)


def test_a_tree_of_a_mask_or_of_labels_names_every_leaf():
    with pytest.raises(fz.TreeError, match="mask has nothing at 'w'"):
        opt = fz.adamw(1e-3, mask={"v": True})
        params = {"v": torch.ones(2), "w": torch.ones(2)}
        zero = torch.zeros((), dtype=torch.int32)
        opt.update(params, opt.init(params), params, step=zero, seed=zero)
    with pytest.raises(fz.TreeError, match="the tree of labels has nothing at 'w'"):
        fz.partition_by({"v": "a"}, {"a": fz.sgd(0.1)}).init({"w": torch.ones(2)})


def test_paths_are_unique():
    with pytest.raises(fz.LayoutError, match=r"two leaves have the path 'a\.b'"):
        fz.init({"a.b": torch.ones(2), "a": {"b": torch.ones(2)}}, fz.sgd(0.1))
