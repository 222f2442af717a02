"""A primal opens into full leaves and closes again; its gradients take the same way back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fzero as fz
from fzero.autodiff.open import HasPrimal, Opened, is_float
from fzero.random.keyed import current_draw
from tests import small


def sharded(seed: int = 0, stage: int = 3, policy: fz.Policy | None = None) -> fz.Sharded:
    return fz.shard(small.parameters(seed), fz.make_mesh("cpu"), fz.zero(stage), policy=policy)


def new_state(**options: Any) -> fz.State:
    return fz.init(small.parameters(), fz.sgd(0.1), fz.make_mesh("cpu"), **{"policy": "fp32", **options})


def test_opening_and_closing_shows_full_trees_where_containers_were():
    state, pieces, plain = new_state(), sharded(1), {"x": torch.ones(2), "name": "plain", "none": None}
    opened = Opened.of([state, (pieces, plain), 3])
    whole, (other, same), number = opened.close(opened.leaves())
    small.assert_same_bits(whole, small.parameters())
    small.assert_same_bits(other, small.parameters(1))
    assert same["x"] is plain["x"] and (same["name"], same["none"], number) == ("plain", None, 3)


def test_only_arguments_at_the_positions_asked_for_get_gradients():
    opened = Opened.of([sharded(), torch.ones(2), torch.ones(3)], positions=[1])
    leaves = opened.leaves()
    (where,) = opened.differentiable(leaves)
    assert leaves[where].shape == (2,)
    gradients = opened.gradients([leaf if i == where else None for i, leaf in enumerate(leaves)], "mean")
    small.assert_same_bits(gradients, (torch.ones(2),))


def test_a_state_offers_itself_as_primal_and_a_sharded_does_not_need_to():
    assert isinstance(new_state(), HasPrimal) and not isinstance(sharded(), HasPrimal)


def test_only_floating_point_leaves_that_are_not_frozen_are_differentiable():
    optimizer = fz.partition_by(lambda path: path, {"a": None, "b": fz.sgd(0.1), "n": fz.sgd(0.1)})
    tree = {"a": torch.ones(2), "b": torch.ones(2), "n": torch.tensor(1)}
    state = fz.init(tree, optimizer, fz.make_mesh("cpu"), policy="fp32")
    opened = Opened.of([state, torch.ones(2), torch.tensor(True), "text"], positions=range(4))
    assert opened.differentiable(opened.leaves()) == [1, 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.complex64])
def test_floating_point_tensors_are_differentiable(dtype):
    assert is_float(torch.ones(1, dtype=dtype))


@pytest.mark.parametrize("leaf", [torch.tensor(1), torch.tensor(True), 1.0, None], ids=fz.tree.describe)
def test_other_leaves_are_not(leaf):
    assert not is_float(leaf)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_leaves_come_in_the_compute_dtype_and_integers_as_they_are(dtype):
    tree = {"n": torch.tensor([1, 2]), "w": torch.ones(3)}
    pieces = fz.shard(tree, fz.make_mesh("cpu"), fz.zero(3), policy=fz.Policy(compute=dtype))
    assert [leaf.dtype for leaf in Opened.of([pieces]).leaves()] == [torch.int64, dtype]


def test_gradients_as_primal_are_seen_in_true_values():
    pieces = sharded().replace(factor=torch.tensor(0.5))
    small.assert_same_bits(fz.call(lambda p: p, pieces), fz.tree.map(lambda x: x * 0.5, small.parameters()))


def test_gradients_of_a_frozen_leaf_are_no_parameters():
    pieces = sharded()
    with pytest.raises(fz.LayoutError, match=r"'block\.bias' is None"):
        fz.call(lambda p: p, pieces.replace(pieces=(None, *pieces.pieces[1:])))


def test_the_function_runs_under_the_key_of_the_first_state_and_a_sharded_has_none():
    draws: list[Any] = []

    def f(*trees: Any) -> Tensor:
        draws.append(current_draw())
        return torch.ones(())

    first, second = new_state(seed=1), new_state(seed=2)
    for arguments in ([first, second], [first], [second], [sharded()]):
        fz.call(f, *arguments)
    keys = [None if draw is None else int(draw.key) for draw in draws]
    assert keys[0] == keys[1] != keys[2]
    assert keys[3] is None and current_draw() is None
