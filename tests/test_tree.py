"""Trees: what opens and is rebuilt, how leaves are called, and how two trees differ."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType, SimpleNamespace
from typing import Any, NamedTuple

import optree
import pytest
import torch
from torch import Tensor
from transformers import BatchEncoding
from transformers.modeling_outputs import CausalLMOutput

import fzero as fz
from fzero import tree
from fzero._torch import torch_pytree

# torch compiles its jvp rules with torch.jit.script on first use, which warns of itself.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")


@dataclass
class Pair:
    left: Any
    right: Any = None


@dataclass(frozen=True)
class Frozen:
    left: Any
    right: Any = None


@dataclass(frozen=True, slots=True)
class Slotted:
    left: Any
    right: Any = None


@dataclass
class Counted:
    """Its constructor takes fewer arguments than it has fields, and cannot be called twice."""

    left: Any
    calls: Any = field(init=False)

    def __post_init__(self) -> None:
        self.calls = 1


@dataclass
class Child(Pair):
    extra: Any = 5


@dataclass
class Extended(Pair):
    """Has attributes that are no fields."""

    def __post_init__(self) -> None:
        self.right, self.more = 2, 3


class Items(dict[str, Any]):
    """Its constructor takes a list."""

    def __init__(self, items: list[Any]) -> None:
        super().__init__(zip(map(str, range(len(items))), items, strict=True))


class Point(NamedTuple):
    x: Any
    y: Any = None


class Sealed(Mapping[str, Any]):
    """Cannot be made of its items."""

    def __init__(self, seal: int, **items: Any) -> None:
        self.items_ = items

    def __getitem__(self, key: str) -> Any:
        return self.items_[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.items_)

    def __len__(self) -> int:
        return len(self.items_)


TREES: dict[str, tuple[Any, list[str], list[Any]]] = {
    "leaf": (3, [""], [3]),
    "nothing": (None, [], []),
    "empty": ({"a": {}, "b": []}, [], []),
    "dict": ({"b": 1, "a": 2}, ["a", "b"], [2, 1]),
    "ordered dict": (collections.OrderedDict([("b", 1), ("a", 2)]), ["b", "a"], [1, 2]),
    "list": ([1, [2, 3]], ["0", "1.0", "1.1"], [1, 2, 3]),
    "tuple": ((1, (2,)), ["0", "1.0"], [1, 2]),
    "namedtuple": (Point(1, Point(2)), ["0", "1.0"], [1, 2]),
    "dataclass": (Pair(1, Pair(2, 3)), ["left", "right.left", "right.right"], [1, 2, 3]),
    "dataclass with None": (Pair(1), ["left"], [1]),
    "frozen dataclass": (Frozen(1, [2]), ["left", "right.0"], [1, 2]),
    "dataclass with slots": (Slotted(1, 2), ["left", "right"], [1, 2]),
    "dataclass with a field of its own": (Counted(7), ["left", "calls"], [7, 1]),
    "inherited dataclass": (Child(1, 2), ["left", "right", "extra"], [1, 2, 5]),
    "dataclass with more than its fields": (Extended(1), ["left", "right", "more"], [1, 2, 3]),
    "mapping": (collections.UserDict(b=1, a=2), ["b", "a"], [1, 2]),
    "read-only mapping": (MappingProxyType({"b": 1, "a": 2}), ["b", "a"], [1, 2]),
    "chained mapping": (collections.ChainMap({"b": 1}, {"a": 2}), ["a", "b"], [2, 1]),
    "subclass of dict": (Items([1, 2]), ["0", "1"], [1, 2]),
    "mapping of Transformers": (BatchEncoding({"b": 1, "a": 2}), ["b", "a"], [1, 2]),
    "namespace": (SimpleNamespace(b=1, a=2), ["b", "a"], [1, 2]),
    "class inside a class": (
        {"a": [Frozen(Slotted(1, 2), 3)]},
        ["a.0.left.left", "a.0.left.right", "a.0.right"],
        [1, 2, 3],
    ),
}


@pytest.mark.parametrize(("opened", "paths", "leaves"), TREES.values(), ids=TREES)
def test_a_tree_opens_and_is_rebuilt(opened, paths, leaves):
    assert tree.leaves(opened) == leaves
    assert tree.paths(opened) == paths
    rebuilt = tree.unflatten(tree.structure(opened), leaves)
    assert rebuilt == opened
    assert type(rebuilt) is type(opened)
    assert tree.leaves(tree.map(lambda x: -x, opened)) == [-x for x in leaves]
    assert tree.leaves(opened) == leaves, "map changed its argument"


def test_none_is_a_subtree_or_a_leaf():
    given = {"a": None, "b": Pair(1)}
    assert tree.paths(given, none_is_leaf=True) == ["a", "b.left", "b.right"]
    assert tree.leaves(given, none_is_leaf=True) == [None, 1, None]
    assert tree.map(lambda x: x or 0, given, none_is_leaf=True) == {"a": 0, "b": Pair(1, 0)}
    assert tree.map(lambda x: x + 1, given) == {"a": None, "b": Pair(2)}


def test_is_leaf_stops_the_descent():
    given = {"a": Point(1, 2), "b": 3}
    assert tree.paths(given, is_leaf=lambda x: isinstance(x, Point)) == ["a", "b"]
    assert tree.map(lambda x: type(x).__name__, given, is_leaf=lambda x: isinstance(x, Point)) == {
        "a": "Point",
        "b": "int",
    }


def test_map_takes_trees_side_by_side():
    assert tree.map(lambda *xs: xs, Pair(1, [2]), Pair("a", ["b"]), Pair(3, [None])) == Pair(
        (1, "a", 3), [(2, "b", None)]
    )
    assert tree.map(lambda x, subtree: subtree, Pair(1, 2), Pair({"a": 1}, [2, 3])) == Pair({"a": 1}, [2, 3])


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"a": 1, "b": {"d": 2}}, r"\['b'\](.|\n)*\['c'\](.|\n)*\['d'\]"),
        ({"a": 1, "b": [2]}, r"\['b'\](.|\n)*dict(.|\n)*list"),
        ({"a": 1}, "missing key"),
    ],
)
def test_map_names_where_trees_differ(other, message):
    with pytest.raises(fz.TreeError, match=f"fz.tree.map(.|\n)*{message}"):
        tree.map(lambda x, y: x, {"a": 1, "b": {"c": 2}}, other)


def test_a_dict_keeps_what_else_it_carries():
    given = Items([torch.ones(2)])
    given.lengths, given.name, given.opaque = torch.ones(3), "batch", object()  # type: ignore[attr-defined]
    assert tree.paths(given) == ["0", "lengths"]
    doubled = tree.map(lambda x: 2 * x, given)
    assert (doubled["0"].sum(), doubled.lengths.sum(), doubled.name) == (4, 6, "batch")
    assert not hasattr(doubled, "opaque")
    assert tree.structure(doubled) == tree.structure(given)


def test_a_mapping_that_cannot_be_made_again_says_so():
    assert tree.leaves(Sealed(1, a=2)) == [2]
    with pytest.raises(fz.TreeError, match=r"Sealed is a mapping whose constructor.*Pass a dict"):
        tree.map(lambda x: x, Sealed(1, a=2))


def test_other_users_of_optree_and_torch_see_nothing_of_it():
    batch = BatchEncoding({"a": torch.ones(2)})
    assert tree.paths(batch) == ["a"]
    assert len(optree.tree_leaves(batch)) == 1  # type: ignore[arg-type]
    assert len(torch_pytree.tree_leaves(batch)) == 1


def test_outputs_of_hugging_face_models_open():
    output = CausalLMOutput(logits=torch.ones(2), hidden_states=(torch.zeros(1), torch.ones(1)))
    assert tree.paths(output) == ["logits", "hidden_states.0", "hidden_states.1"]
    doubled = tree.map(lambda x: 2 * x, output)
    assert type(doubled) is CausalLMOutput
    assert doubled.loss is None
    assert doubled["logits"] is doubled.logits
    assert torch.stack(tree.leaves(doubled.logits)).tolist() == [[2, 2]]
    assert doubled.keys() == output.keys()
    assert tree.structure(output) == tree.structure(doubled) != tree.structure(CausalLMOutput(logits=torch.ones(2)))


@pytest.mark.parametrize(
    ("expected", "got", "lines"),
    [
        (Pair(1, [2]), Pair(1, [2]), []),
        ({"a": 1}, {"a": 2}, ["a: expected 1, got 2"]),
        ({"a": 1, "b": 2}, {"a": 1}, ["b: expected 2, got nothing"]),
        ({"a": 1}, {"a": 1, "b": "x"}, ["b: expected nothing, got 'x'"]),
        ([1, None], [None, 1], ["0: expected 1, got None", "1: expected None, got 1"]),
        (torch.ones(2), torch.ones(3), ["(the whole): expected float32(2,), got float32(3,)"]),
        (
            Pair(torch.ones(2), torch.ones(1)),
            Pair(torch.ones(2, dtype=torch.bfloat16), torch.zeros(1)),
            ["left: expected float32(2,), got bfloat16(2,)"],
        ),
        ({"a": {"b": 1}}, {"a": 1}, ["a.b: expected 1, got nothing", "a: expected nothing, got 1"]),
        ({"a": object()}, {"a": Pair}, ["a: expected object, got type"]),
    ],
)
def test_differences_name_each_path(expected, got, lines):
    assert tree.differences(expected, got) == lines


def test_differences_see_the_container():
    (line,) = tree.differences([1, 2], (1, 2))
    assert line.startswith("(the whole): expected the structure")
    assert tree.differences({"a": 1}, {"a": 2}, same=lambda x, y: True) == []


def test_split_takes_tensors_out_and_fill_puts_them_back():
    given = {"x": torch.ones(2), "n": torch.arange(3), "name": "a", "none": None}
    floats, others, hollow = tree.split(given, Tensor.is_floating_point)
    assert [x.dtype for x in floats] == [torch.float32]
    assert [x.dtype for x in others] == [torch.int64]
    assert hollow.fill(["first"], ["second"]) == {"x": "first", "n": "second", "name": "a", "none": None}
    assert hash(hollow) == hash(tree.split(given, Tensor.is_floating_point)[2])
    assert hollow != tree.split({**given, "name": "b"}, Tensor.is_floating_point)[2]


def test_nest_undoes_paths():
    nested = {"blocks": {"0": {"w": 1}, "1": {"w": 2}}, "bias": 3}
    assert tree.nest(dict(zip(tree.paths(nested), tree.leaves(nested), strict=True))) == nested


# ---------------------------------------------------------------------------------------------------------
# fzero's own nodes


def pieces() -> fz.Sharded:
    return fz.shard({"w": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(2.0)}, fz.make_mesh("cpu"), fz.zero(3))


def state() -> fz.State:
    return fz.init({"w": torch.ones(2, 3)}, fz.adamw(1e-3), fz.make_mesh("cpu"), policy="fp32")


@pytest.mark.parametrize(
    ("make", "paths"),
    [
        (pieces, ["b", "w"]),
        (state, ["step", "params.w", "moments.0.w", "moments.1.w", "seed"]),
    ],
)
def test_sharded_and_state_open_in_the_namespace_of_fzero_only(make, paths):
    node = make()
    assert tree.paths(node) == paths
    assert all(isinstance(leaf, Tensor) for leaf in tree.leaves(node))
    rebuilt = tree.map(lambda x: x, node)
    assert type(rebuilt) is type(node)
    assert tree.structure(rebuilt) == tree.structure(node) == tree.structure(make())
    assert optree.tree_leaves(node) == [node]
    assert optree.tree_leaves(node, namespace="another") == [node]


def test_what_is_static_is_part_of_the_structure():
    mesh, w = fz.make_mesh("cpu"), {"w": torch.ones(64)}
    shapes = [tree.structure(fz.shard(w, mesh, fz.zero(3))), tree.structure(fz.shard(w, mesh, fz.zero(1)))]
    shapes.append(tree.structure(fz.shard({"w": torch.ones(8, 8)}, mesh, fz.zero(3))))
    shapes += [tree.structure(fz.init(w, fz.sgd(0.1), mesh, policy=name)) for name in ("fp32", "bf16")]
    assert len(set(shapes)) == len(shapes)


def weighted(s: fz.Sharded) -> Tensor:
    whole = fz.gather(s)
    return whole["b"] ** 2 * whole["w"].sum()


def test_jvp_opens_a_sharded():
    s = pieces()
    assert torch.func.jvp(weighted, (s,), (tree.map(torch.ones_like, s),)) == (4 * 15, 2 * 2 * 15 + 4 * 6)
    doubled, tangents, *_ = torch.func.jvp(lambda s: tree.map(lambda x: 2 * x, s), (s,), (s,))
    assert isinstance(tangents, fz.Sharded)
    assert tree.map(torch.equal, tangents, doubled).pieces == (True, True)


def test_vmap_opens_a_sharded():
    s = pieces()
    batch = tree.map(lambda x: torch.stack([x, 2 * x]), s)
    assert torch.func.vmap(weighted)(batch).tolist() == [60, 480]
    tripled = torch.func.vmap(lambda s: tree.map(lambda x: 3 * x, s))(batch)
    assert isinstance(tripled, fz.Sharded)
    assert tree.map(lambda x, y: torch.equal(x, 3 * y), tripled, batch).pieces == (True, True)


def test_vjp_opens_a_state():
    s = state()
    counted_in_floats = dataclasses.replace(s, step=s.step.float(), seed=s.seed.float())
    pullback = torch.func.vjp(lambda s: 3 * fz.gather(s.params)["w"].sum(), counted_in_floats)[1]
    (gradient,) = pullback(torch.tensor(1.0))
    assert isinstance(gradient, fz.State)
    assert fz.gather(gradient.params)["w"].tolist() == [[3, 3, 3], [3, 3, 3]]
    assert torch.func.vmap(lambda s: s.step + 1)(tree.map(lambda x: x[None], s)).tolist() == [1]
