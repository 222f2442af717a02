"""Some leaves of a tree: `fz.gather(x, only=...)` moves those and no others."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import fzero as fz
from tests import world


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


def parameters() -> dict[Any, Any]:
    values = iter(range(1, 9))
    leaf = lambda *shape: torch.randn(shape, generator=torch.Generator().manual_seed(next(values)))  # noqa: E731
    return {
        "embed": {"weight": leaf(16, 8)},
        "blocks": [{"w": leaf(8, 8), "b": leaf(8)}, {"w": leaf(8, 8), "b": leaf(8)}],
        "pair": Pair(leaf(40), leaf(3)),
        4: leaf(9, 9),
    }


# what is asked for -> how to reach each leaf that comes, in the tree and in the result alike
CASES: dict[str, tuple[Any, list[tuple[Any, ...]]]] = {
    "one leaf": ("embed.weight", [("embed", "weight")]),
    "a block": ("blocks.0.*", [("blocks", 0, "b"), ("blocks", 0, "w")]),
    "a part of each block": ("blocks.*.w", [("blocks", 0, "w"), ("blocks", 1, "w")]),
    "several patterns": (["*.b", "4"], [("blocks", 0, "b"), ("blocks", 1, "b"), (4,)]),
    "a leaf that two patterns fit": (("4", "?"), [(4,)]),
    "a field of a named tuple": ("pair.1", [("pair", 1)]),
}


def reached(tree_: Any, way: tuple[Any, ...]) -> Any:
    for entry in way:
        tree_ = tree_[entry]
    return tree_


def loss(params: Any) -> Tensor:
    leaves = fz.tree.leaves(params)
    return sum((leaf.float().square().sum() for leaf in leaves), torch.zeros(()))


def gathered_in_part(stage: int, policy: str) -> list[str]:
    """Return what is wrong: nothing."""
    state = fz.init(parameters(), fz.sgd(0.1), fz.make_mesh("cpu"), fz.zero(stage), policy=policy)
    grads = fz.grad(loss)(state)
    wrong = []
    parts = lambda *trees: [[fz.gather(x, only=only) for only, _ in CASES.values()] for x in trees]  # noqa: E731
    wholes, both = [fz.gather(state.params), fz.gather(grads)], (state.params, grads)
    for how, found in (("eager", parts(*both)), ("traced", fz.jit(parts)(*both))):
        for what, whole, some in zip(("params", "grads"), wholes, found, strict=True):
            for (name, (_, ways)), part in zip(CASES.items(), some, strict=True):
                same = all(torch.equal(reached(part, way), reached(whole, way)) for way in ways)
                if not same or len(fz.tree.leaves(part)) != len(ways):
                    wrong.append(f"{name} of {what}, {how}")
    return wrong


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize(("stage", "policy"), [(0, "fp32"), (1, "mixed"), (3, "fp16")])
def test_the_leaves_that_were_asked_for_are_those_of_the_whole(stage, policy, size):
    assert world.run(gathered_in_part, stage, policy, size=size) == [[]] * size


def moved(sharded: fz.Sharded, **only: Any) -> int:
    return fz.trace(lambda x: fz.gather(x, **only))(sharded).traffic().total


def test_the_others_are_not_gathered():
    sharded = fz.shard(parameters(), fz.make_mesh(data=4, simulate=True), fz.zero(3))
    one = 8 * 8 * 4 * 3 // 4  # what a rank receives of a matrix: three of its four pieces
    assert moved(sharded, only="blocks.0.*") == one  # its bias is whole on every rank
    assert moved(sharded, only="blocks.*") == 2 * one
    assert moved(sharded, only="pair.1") == 0
    assert moved(sharded) > 2 * one


def test_what_comes_shares_no_memory_with_the_pieces():
    sharded = fz.shard({"w": torch.ones(3)}, fz.make_mesh("cpu"), fz.zero(3))
    fz.gather(sharded, only="w")["w"].fill_(7)
    assert fz.gather(sharded)["w"].tolist() == [1, 1, 1]


def test_a_gradient_that_is_not_there_is_none():
    params = {"w": torch.ones(3), "n": torch.arange(3)}
    grads = fz.grad(lambda p: p["w"].sum())(fz.init(params, fz.sgd(0.1), fz.make_mesh("cpu"), policy="fp32"))
    assert fz.gather(grads, only="n") == {"n": None}


def test_a_leaf_by_itself_comes_by_itself():
    sharded = fz.shard(torch.ones(3), fz.make_mesh("cpu"), fz.zero(3))
    assert torch.equal(fz.gather(sharded, only="*"), torch.ones(3))


def test_what_fits_no_leaf_is_refused_with_the_near_name():
    state = fz.init(parameters(), fz.sgd(0.1), fz.make_mesh("cpu"), policy="fp32")
    for only, message in {
        "embed.wieght": "only='embed.wieght' fits no leaf. Did you mean 'embed.weight'?",
        "block.0.*": "only='block.0.*' fits no leaf. Did you mean 'blocks.0.*'?",
        "blocks.0": "only='blocks.0' fits no leaf. Did you mean 'blocks.0.*'?",
        ("embed.weight", "xyz"): "only='xyz' fits no leaf. The paths are ",
    }.items():
        with pytest.raises(fz.TreeError) as error:
            fz.gather(state.params, only=only)
        assert str(error.value).startswith(f"fz.gather: {message}")
    no_patterns: list[Any] = [3, (), [None], {"w": 1}]
    for no_pattern in no_patterns:
        with pytest.raises(TypeError, match=r"fz\.gather: only: expected a pattern of dotted paths"):
            fz.gather(state.params, only=no_pattern)
    with pytest.raises(TypeError, match=r"got State\. Write fz\.gather\(state.params, only=...\)"):
        fz.gather(state, only="w")


def other_leaves_on_each_rank() -> None:
    mesh = fz.make_mesh("cpu")
    sharded = fz.shard(parameters(), mesh, fz.zero(3))
    fz.gather(sharded, only=f"blocks.{mesh['data'].index}.w")


def a_pattern_and_the_whole() -> None:
    mesh = fz.make_mesh("cpu")
    sharded = fz.shard(parameters(), mesh, fz.zero(3))
    fz.gather(sharded, only=["*", "embed.*", "blocks.0.w"][mesh["data"].index :])


def no_such_leaf_on_one_rank() -> None:
    mesh = fz.make_mesh("cpu")
    sharded = fz.shard(parameters(), mesh, fz.zero(3))
    fz.gather(sharded, only="blocks.0.*" if mesh["data"].index else "embedding.weight")


@pytest.mark.parametrize("case", [other_leaves_on_each_rank, a_pattern_and_the_whole])
def test_ranks_that_ask_for_other_leaves_all_raise(case):
    world.raises(fz.ProgramMismatchError, case, size=2)


def test_where_one_rank_names_no_leaf_the_other_hears_of_it():
    with pytest.raises(world.WorldError) as error:
        world.run(no_such_leaf_on_one_rank, size=2)
    errors = error.value.errors
    assert "TreeError" in errors[0].type and "fits no leaf" in errors[0].message
    assert "PeerError" in errors[1].type and "fits no leaf" in errors[1].message
