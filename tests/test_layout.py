"""Layouts: any tree survives cutting and gathering, and each rank holds no more than its share."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fzero as fz
from fzero import tree
from fzero.sharding.leaf import reduce_leaf
from fzero.sharding.placement import place
from tests import world

STAGES = (0, 1, 2, 3)
SIZES = (1, 2, 3, 4)
NODES = {"node": 2, "data": 2}  # the axes of a world of four, in two nodes
WHOLE_BELOW = 16  # elements a rank

FLOATS = (torch.float32, torch.bfloat16, torch.float64)
DTYPES = (*FLOATS, torch.int64, torch.int32, torch.uint8, torch.bool)


@dataclass(frozen=True)
class Leaf:
    """A tensor as hypothesis draws it: its values follow from it, on every rank."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    seed: int = 0

    def tensor(self) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        if self.dtype in FLOATS:  # any bits, not-a-number included
            count = math.prod(self.shape) * self.dtype.itemsize
            flat = torch.randint(256, (count,), dtype=torch.uint8, generator=generator).view(self.dtype)
            return flat.reshape(self.shape)
        return torch.randint(2, self.shape, generator=generator).to(self.dtype) * 113


def built(drawn: Any) -> Any:
    return tree.map(Leaf.tensor, drawn, is_leaf=lambda x: isinstance(x, Leaf))


def trees() -> st.SearchStrategy[Any]:
    shapes = st.one_of(
        st.lists(st.integers(0, 9), max_size=3),
        st.lists(st.integers(60, 70), min_size=1, max_size=1),  # around the size below which a leaf stays whole
        st.lists(st.integers(1, 40), min_size=2, max_size=2),
    )
    leaf = st.builds(Leaf, shapes.map(tuple), st.sampled_from(DTYPES), st.integers(0, 99))
    return st.recursive(
        leaf | st.none(),
        lambda inner: (
            st.dictionaries(st.sampled_from("abc"), inner, max_size=3)
            | st.lists(inner, max_size=3)
            | st.tuples(inner, inner)
        ),
        max_leaves=8,
    )


def same_bits(x: Tensor, y: Tensor) -> bool:
    return (x.shape, x.dtype) == (y.shape, y.dtype) and torch.equal(as_bytes(x), as_bytes(y))


def as_bytes(x: Tensor) -> Tensor:
    return x.reshape(-1).contiguous().view(torch.uint8)


def equal_trees(x: Any, y: Any) -> bool:
    return tree.structure(x) == tree.structure(y) and all(map(same_bits, tree.leaves(x), tree.leaves(y)))


def cut(flat: Tensor, ranks: int) -> list[Tensor]:
    """The pieces of a flattened leaf, cut by hand."""
    if flat.numel() < WHOLE_BELOW * ranks:
        return [flat] * ranks
    numel = math.ceil(flat.numel() / ranks)
    padded = flat.new_zeros(ranks * numel)
    padded[: flat.numel()] = flat
    return list(padded.split(numel))


# ---------------------------------------------------------------------------------------------------------
# Any tree


def cut_and_gathered(forest: Sequence[Any], stages: Sequence[int]) -> list[list[tuple[list[Tensor], Any]]]:
    """For each tree and stage: this rank's pieces, and what gathering them gives."""
    mesh = fz.make_mesh("cpu")
    results = []
    for drawn in forest:
        sharded = [fz.shard(built(drawn), mesh, fz.zero(stage)) for stage in stages]
        results.append([(tree.leaves(s), fz.gather(s)) for s in sharded])
    return results


@pytest.mark.parametrize("size", SIZES)
@settings(max_examples=15)
@given(forest=st.lists(trees(), min_size=1, max_size=5))
def test_any_tree_survives_bit_for_bit_and_a_piece_is_a_cut_of_the_flattened_leaf_padded_by_zeros(size, forest):
    for drawn, *ranks in zip(forest, *world.run(cut_and_gathered, forest, (0, 1, 3), size=size), strict=True):
        for rank in ranks:
            assert all(equal_trees(gathered, built(drawn)) for _, gathered in rank)
        pieces_of_ranks = [pieces for *_, (pieces, _) in ranks]
        for leaf, *pieces in zip(tree.leaves(built(drawn)), *pieces_of_ranks, strict=True):
            assert all(map(same_bits, pieces, cut(leaf.reshape(-1), size)))


# ---------------------------------------------------------------------------------------------------------
# Memory

AWKWARD = {
    "scalar": Leaf(()),
    "none": Leaf((0, 5)),
    "small": Leaf((WHOLE_BELOW * 4 - 1,)),
    "just large": Leaf((WHOLE_BELOW * 4,)),
    "odd": Leaf((13, 11), torch.bfloat16),
    "even": Leaf((16, 16)),
    "int": Leaf((3, 50), torch.int64),
    "bool": Leaf((101,), torch.bool),
}


def elements_held(layout: fz.Layout, policy: fz.Policy | None) -> dict[str, int]:
    """The elements of memory that hold each piece."""
    sharded = fz.shard(built(AWKWARD), fz.make_mesh("cpu"), layout, policy=policy)
    held = {}
    for path, piece in zip(sharded.paths, sharded.pieces, strict=True):
        assert piece is not None
        assert piece.ndim == 1
        assert piece.is_contiguous()
        held[path] = piece.untyped_storage().nbytes() // piece.itemsize
    return held


@pytest.mark.parametrize("size", SIZES)
def test_a_rank_holds_its_share_of_large_leaves_and_small_ones_whole(size):
    total = {name: math.prod(leaf.shape) for name, leaf in AWKWARD.items()}
    for held in world.run(elements_held, fz.zero(3), None, size=size):
        assert held.keys() == total.keys()
        for name, n in total.items():
            assert held[name] == (n if n < WHOLE_BELOW * size else math.ceil(n / size)), name


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("policy", ["fp32", "mixed"])
def test_stages_below_3_cut_parameters_only_where_there_is_a_master(policy, stage):
    master = fz.policy(policy).master is not None
    cut_in_two = stage == 3 or (master and stage > 0)
    for held in world.run(elements_held, fz.zero(stage), fz.policy(policy), size=2):
        assert held["even"] == (128 if cut_in_two else 256)
        assert held["small"] == (32 if cut_in_two else 63)
        assert held["scalar"] == 1


def shard_then_overwrite(layout: fz.Layout) -> Any:
    given = built(AWKWARD)
    sharded = fz.shard(given, fz.make_mesh("cpu"), layout)
    for leaf in tree.leaves(given):
        leaf.zero_()
    return fz.gather(sharded)


def gather_then_overwrite(layout: fz.Layout) -> Any:
    sharded = fz.shard(built(AWKWARD), fz.make_mesh("cpu"), layout)
    for leaf in tree.leaves(fz.gather(sharded)):
        leaf.zero_()
    return fz.gather(sharded)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("overwritten", [shard_then_overwrite, gather_then_overwrite])
def test_pieces_share_no_memory_with_what_goes_in_or_comes_out(overwritten, stage, size):
    for gathered in world.run(overwritten, fz.zero(stage), size=size):
        assert equal_trees(gathered, built(AWKWARD))


def test_shard_detaches():
    w = torch.ones(64, requires_grad=True)
    (piece,) = fz.shard(w, fz.make_mesh("cpu"), fz.zero(3)).pieces
    assert piece is not None
    assert not piece.requires_grad


def test_a_leaf_need_not_be_contiguous():
    w = torch.arange(600.0).reshape(20, 30).T[::2]
    assert torch.equal(fz.gather(fz.shard(w, fz.make_mesh("cpu"), fz.zero(3))), w)


# ---------------------------------------------------------------------------------------------------------
# Several axes

TWO_AXES = {
    "cut in a node, copied across": fz.zero(3, axis="data", replicate="node"),
    "cut across, copied in a node": fz.zero(3, axis="node", replicate="data"),
    "cut over both": fz.zero(3, axis=("node", "data")),
    "cut over both, data first": fz.zero(3, axis=("data", "node")),
    "moments cut in a node": fz.zero(1, axis="data", replicate="node"),
    "all copied": fz.zero(0, axis="data", replicate="node"),
}
# Which part of how many ranks 0 to 3 hold.
HOLDS = {
    "cut in a node, copied across": (2, [0, 1, 0, 1]),
    "cut across, copied in a node": (2, [0, 0, 1, 1]),
    "cut over both": (4, [0, 1, 2, 3]),
    "cut over both, data first": (4, [0, 2, 1, 3]),
    "moments cut in a node": (1, [0, 0, 0, 0]),
    "all copied": (1, [0, 0, 0, 0]),
}


def cut_on(axes, drawn, layout):
    sharded = fz.shard(built(drawn), fz.make_mesh("cpu", **axes), layout)
    return tree.leaves(sharded), fz.gather(sharded)


@pytest.mark.parametrize("name", TWO_AXES)
def test_two_data_axes(name):
    parts, indices = HOLDS[name]
    results = world.run(cut_on, NODES, AWKWARD, TWO_AXES[name], size=4)
    for index, (pieces, gathered) in zip(indices, results, strict=True):
        assert equal_trees(gathered, built(AWKWARD))
        for leaf, piece in zip(tree.leaves(built(AWKWARD)), pieces, strict=True):
            assert same_bits(piece, cut(leaf.reshape(-1), parts)[index])


WEIGHT = {"w": Leaf((12, 8, 6))}
TENSOR_PARALLEL = {"data": 2, "model": 2}


@pytest.mark.parametrize(
    ("spec", "dim"),
    [
        (fz.P("model"), 0),
        (fz.P("model", None), 0),
        (fz.P(None, "model", None), 1),
        (fz.P(None, None, "model"), 2),
        (fz.P(), None),
    ],
    ids=str,
)
def test_zero_cuts_the_block_that_p_leaves(spec, dim):
    w = WEIGHT["w"].tensor()
    results = world.run(cut_on, TENSOR_PARALLEL, WEIGHT, fz.zero(3, split={"w": spec}), size=4)
    for rank, ((piece,), gathered) in enumerate(results):
        data, model = divmod(rank, 2)
        block = w if dim is None else w.chunk(2, dim)[model]
        assert same_bits(piece, cut(block.reshape(-1), 2)[data])
        assert same_bits(gathered["w"], w)


@pytest.mark.parametrize("spec", [fz.P("data", "model"), fz.P("model", None, "data"), fz.P(None, "model")], ids=str)
def test_p_alone_splits_every_leaf(spec):
    w = WEIGHT["w"].tensor()
    for rank, ((piece,), gathered) in enumerate(world.run(cut_on, TENSOR_PARALLEL, WEIGHT, spec, size=4)):
        coordinate = dict(zip(TENSOR_PARALLEL, divmod(rank, 2), strict=True))
        block = w
        for dim, axis in enumerate(spec):
            block = block if axis is None else block.chunk(2, dim)[coordinate[axis]]
        assert same_bits(piece, block.reshape(-1))
        assert same_bits(gathered["w"], w)


def test_the_first_pattern_that_fits_a_path_splits_it():
    mesh = fz.make_mesh("cpu", data=2, model=4, simulate=True)
    layout = fz.zero(3, split={"*.bias": fz.P(), "attn.*": fz.P("model", None), "*": fz.P(None, "model")})
    shapes = {"attn": {"w": (64, 64), "bias": (64,)}, "mlp": {"w": (64, 64)}}
    leaves, treedef = tree.flatten(shapes, is_leaf=lambda x: isinstance(x, tuple))
    placed = place(leaves, treedef, mesh, layout)
    assert dict(zip(placed.paths, (s.split for s in placed.specs), strict=True)) == {
        "attn.bias": fz.P(),
        "attn.w": fz.P("model", None),
        "mlp.w": fz.P(None, "model"),
    }


# ---------------------------------------------------------------------------------------------------------
# Sums of gradients


def summed(axes, layout):
    """This rank's piece of the sum, over the data axes, of a leaf that is multiplied by 10 ** (data rank)."""
    mesh = fz.make_mesh("cpu", **axes)
    leaf = torch.arange(108.0).reshape(12, 9)
    placed = fz.shard({"w": leaf}, mesh, layout).placement.cut_over(layout.gradient_cut)
    mine = leaf * 10 ** mesh.index(layout.data_axes)
    return reduce_leaf(mine, placed.specs[0], mesh, axes=layout.data_axes, dtype=torch.float64)


@pytest.mark.parametrize("name", TWO_AXES)
def test_gradients_are_summed_over_all_data_axes_and_cut_over_some(name):
    layout = TWO_AXES[name]
    parts, indices = HOLDS[name] if layout.stage != 1 else HOLDS["cut in a node, copied across"]
    flat = torch.arange(108.0, dtype=torch.float64) * 1111
    for index, piece in zip(indices, world.run(summed, NODES, layout, size=4), strict=True):
        assert same_bits(piece, cut(flat, parts)[index])


def test_gradients_are_not_summed_over_an_axis_that_splits():
    layout = fz.zero(3, split={"w": fz.P("model", None)})
    block = torch.arange(108.0, dtype=torch.float64).reshape(12, 9) * 11
    for rank, piece in enumerate(world.run(summed, TENSOR_PARALLEL, layout, size=4)):
        data, model = divmod(rank, 2)
        assert same_bits(piece, cut(block.chunk(2)[model].reshape(-1), 2)[data])


# ---------------------------------------------------------------------------------------------------------
# Sharded and gather


def test_a_sharded_says_what_it_is():
    sharded = fz.shard({"w": torch.ones(4, 4), "b": torch.ones(3)}, fz.make_mesh("cpu"), fz.zero(2))
    assert repr(sharded).splitlines()[0] == "Sharded(2 leaves, 19 elements, ZeRO-2 over data=1)"
    assert sharded.paths == ("b", "w")
    assert sharded.shapes == ((3,), (4, 4))
    assert sharded.layout == fz.zero(2)
    assert sharded.policy is None


@pytest.mark.parametrize(
    ("key", "way_out"), [("w", "only='w'"), ("blocks", r"only='blocks\.\*'"), ("v", r"fz\.gather\(sharded\)\['v'\]")]
)
def test_a_sharded_is_not_indexed_and_says_how_to_gather_a_leaf(key: str, way_out: str) -> None:
    sharded = fz.shard({"w": torch.ones(4), "blocks": [torch.ones(3)]}, fz.make_mesh("cpu"), fz.zero(3))
    with pytest.raises(TypeError, match=way_out) as info:
        sharded[key]
    assert "blocks.0, w" in str(info.value)


def test_p_is_a_value():
    spec = fz.P("model", None)
    assert repr(spec) == "P('model', None)"
    assert list(spec) == ["model", None]
    for copied in (copy.deepcopy(spec), pickle.loads(pickle.dumps(spec))):
        assert copied == spec
        assert type(copied) is fz.P


def test_select_keeps_some_leaves_in_the_order_asked():
    sharded = fz.shard({"z": torch.zeros(2), "a": [torch.ones(3), torch.ones(1)]}, fz.make_mesh("cpu"), fz.zero(3))
    picked = sharded.select([2, 0])
    assert picked.paths == ("z", "a.0")
    assert list(fz.gather(picked)) == ["z", "a.0"]
    assert fz.gather(picked)["a.0"].tolist() == [1, 1, 1]


def test_gather_opens_every_sharded_in_a_tree_and_copies_the_rest():
    mesh, plain = fz.make_mesh("cpu"), torch.ones(2)
    given = {"s": fz.shard([torch.ones(3)], mesh, fz.zero(3)), "plain": plain, "name": "x", "none": None}
    gathered = fz.gather(given)
    assert gathered["s"][0].tolist() == [1, 1, 1]
    assert gathered["name"] == "x"
    assert gathered["none"] is None
    assert torch.equal(gathered["plain"], plain)
    assert gathered["plain"] is not plain


def test_gathered_gradients_are_leaf_times_factor_and_may_be_none():
    sharded = fz.shard([torch.ones(3), torch.ones(2, dtype=torch.bfloat16)], fz.make_mesh("cpu"), fz.zero(3))
    gathered = fz.gather(sharded.replace(factor=torch.tensor(0.5)))
    assert [(x.tolist(), x.dtype) for x in gathered] == [([0.5] * 3, torch.float32), ([0.5] * 2, torch.bfloat16)]
    without = fz.gather(sharded.replace(pieces=(None, sharded.pieces[1])))
    assert without[0] is None
    assert without[1].tolist() == [1, 1]


# ---------------------------------------------------------------------------------------------------------
# Wrong use

MESH = fz.make_mesh("cpu", data=2, model=4, simulate=True)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fz.zero(4), "no stage 4. Use 0, 1, 2 or 3"),
        (lambda: fz.zero(-1), "no stage -1"),
        (lambda: fz.zero(3, axis=("data", "node"), replicate="data"), r"\['data'\] stand twice"),
        (lambda: fz.zero(3, axis=("data", "data")), r"\['data'\] stand twice"),
    ],
)
def test_a_layout_that_cannot_be_is_refused(make, message):
    with pytest.raises(fz.LayoutError, match=f"fz.zero: .*{message}"):
        make()


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (fz.P("model", None), "dimension 0 of leaf 'a.w', of size 6, over 4 ranks of 'model'"),
        (fz.zero(3, split={"a.*": fz.P(None, "model")}), "dimension 1 of leaf 'a.w', of size 10, over 4 ranks"),
        (fz.P(None, None, "model"), "more dimensions than leaf 'a.w' has"),
        (fz.zero(3, split={"*": fz.P("data", None)}), "'data', which another dimension or the data axes"),
        (
            fz.zero(3, "model", replicate="data", split={"*": fz.P("data")}),
            "'data', which another dimension or the data",
        ),
        (fz.P("data", "data"), "'data', which another dimension"),
    ],
    ids=str,
)
def test_a_split_that_does_not_fit_is_refused(layout, message):
    with pytest.raises(fz.LayoutError, match=message):
        fz.shard({"a": {"w": torch.ones(6, 10)}}, MESH, layout)


@pytest.mark.parametrize("layout", [fz.zero(3, "rows"), fz.zero(0, "data", replicate="rows"), fz.P("rows", None)])
def test_an_unknown_axis_is_named(layout):
    with pytest.raises(fz.MeshError, match=r"no axis 'rows'; the mesh has data=2 × model=4"):
        fz.shard({"w": torch.ones(8, 8)}, MESH, layout)


@pytest.mark.parametrize(
    ("leaf", "message"),
    [
        (3, "leaf 'a.0' is 3, and only tensors"),
        ("w", "leaf 'a.0' is 'w', and only tensors"),
        (torch.nn.Linear, "leaf 'a.0' is type, and only tensors"),
        (torch.empty(3, device="meta"), r"leaf 'a.0' is on meta and the mesh is on cpu. Move it with .to\('cpu'\)"),
    ],
    ids=["int", "str", "class", "meta"],
)
def test_a_leaf_that_cannot_be_sharded_is_named(leaf, message):
    with pytest.raises(fz.LayoutError, match=f"fz.shard: {message}"):
        fz.shard({"a": [leaf], "b": torch.ones(2)}, fz.make_mesh("cpu"), fz.zero(3))


def test_what_is_no_layout_is_refused():
    with pytest.raises(TypeError, match=r"fz.shard: expected a layout, such as fz.zero\(3\), got 'zero3'"):
        fz.shard({"w": torch.ones(2)}, fz.make_mesh("cpu"), "zero3")  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------------------
# Pickled and copied

SQUARE = torch.arange(256.0).view(16, 16)
# The layout and the axes of a world of two or four -> which ranks' pickles a rank can load.
CARRIED: list[tuple[fz.Layout, dict[str, int], list[set[int]]]] = [
    (fz.zero(3), {"data": 2}, [{0}, {1}]),
    (fz.zero(0), {"data": 2}, [{0, 1}, {0, 1}]),
    (fz.zero(0, split={"w": fz.P("data")}, axis=()), {"data": 2}, [{0}, {1}]),
    (fz.zero(3, replicate="node"), NODES, [{0, 2}, {1, 3}, {0, 2}, {1, 3}]),
    (fz.zero(3, axis=("node", "data")), NODES, [{0}, {1}, {2}, {3}]),
]


def pickled(layout: fz.Layout, axes: dict[str, int]) -> bytes:
    sharded = fz.shard({"w": SQUARE}, fz.make_mesh("cpu", deadline=None, simulate=False, **axes), layout)
    for twin in (copy.deepcopy(sharded), copy.copy(sharded), pickle.loads(pickle.dumps(sharded))):
        assert torch.equal(fz.gather(twin)["w"], SQUARE)
    return pickle.dumps(sharded)


def unpickled(bodies: list[bytes], axes: dict[str, int] | None = None) -> list[str]:
    """What comes of each pickle: nothing, or an error. No rank gathers by itself, so the piece is compared."""
    # Kept until the end: all ranks start the groups of a mesh together, and one that raised would start new ones.
    mesh = fz.make_mesh("cpu", deadline=None, simulate=False, **axes) if axes else None
    found = []
    for body in bodies:
        try:
            sharded = pickle.loads(body)
            own = fz.shard({"w": SQUARE}, sharded.mesh, sharded.layout)
            assert mesh is None or torch.equal(tree.leaves(own)[0], tree.leaves(sharded)[0])
            found.append("")
        except fz.MeshError as error:
            found.append(str(error))
    return found


@pytest.mark.parametrize(("layout", "axes", "allowed"), CARRIED, ids=str)
def test_pieces_are_unpickled_where_they_belong(
    layout: fz.Layout, axes: dict[str, int], allowed: list[set[int]]
) -> None:
    size, is_whole = len(allowed), layout == fz.zero(0)
    bodies = world.run(pickled, layout, axes, size=size)
    for rank, messages in enumerate(world.run(unpickled, bodies, axes, size=size)):
        assert {i for i, message in enumerate(messages) if not message} == allowed[rank]
        for other, message in enumerate(messages):
            assert not message or f"pieces of rank {other} of {size}" in message
            assert not message or f"this is rank {rank} of {size}" in message
            assert not message or "fz.gather" in message
    for body in bodies:  # a process by itself can look at what a rank holds
        alone = pickle.loads(body)
        assert set(tree.leaves(alone)[0].flatten().tolist()) <= set(SQUARE.flatten().tolist())
        if is_whole:
            assert torch.equal(fz.gather(alone)["w"], SQUARE)
            continue
        with pytest.raises(fz.MeshError, match=f"fz.gather: these are the pieces of one rank of {size}, loaded where"):
            fz.gather(alone)
    if not is_whole and size == 4:
        assert all("this is rank" in message for message in world.run(unpickled, bodies, size=2)[0])


def state_carried() -> None:
    mesh = fz.make_mesh("cpu")
    state = fz.init({"w": SQUARE}, fz.adamw(0.1), mesh, fz.zero(3), policy="bf16-8bit")
    step = fz.train_step(lambda params, batch: (params["w"] * batch).float().sum())
    for twin in (copy.deepcopy(state), pickle.loads(pickle.dumps(state))):
        other, _ = step(twin, torch.ones(16, 16))
        assert other.step.item() == 1 and len(step.programs) == 1


def test_a_state_is_pickled_and_copied_on_its_rank() -> None:
    world.run(state_carried, size=2)
