"""`fz.visualize`: each rank is drawn with what it holds, to scale, on meshes of any size."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

import fzero as fz
from fzero.display.holdings import Holdings, Segment
from fzero.display.listing import amount
from tests.small import dot, parameters
from tests.test_display import SVG, bytes_of, donated, parsed, state_of

WORLDS: dict[str, tuple[dict[str, int], Any]] = {
    "one": ({"data": 1}, fz.zero(3)),
    "stage 0": ({"data": 4}, fz.zero(0)),
    "stage 1": ({"data": 4}, fz.zero(1)),
    "stage 3": ({"data": 4}, fz.zero(3)),
    "two axes": ({"node": 2, "data": 4}, fz.zero(3, replicate="node")),
    "split": ({"data": 2, "model": 2}, fz.zero(3, split={"*weight": fz.P(None, "model")})),
    "thousands": ({"data": 4096, "model": 2}, fz.zero(3, split={"*weight": fz.P(None, "model")})),
}


def rectangles(picture: Any) -> list[ElementTree.Element]:
    """The filled parts of a picture."""
    return [r for r in parsed(picture.svg).iter(f"{SVG}rect") if r.find(f"{SVG}title") is not None]


@pytest.mark.parametrize("axes, layout", WORLDS.values(), ids=WORLDS.keys())
def test_a_rank_is_drawn_with_what_it_holds(axes: dict[str, int], layout: Any) -> None:
    mesh = fz.make_mesh("cpu", simulate=True, **axes)
    shapes = {"norm": (40,), "a": {"weight": (256, 1024)}, "b": {"weight": (1024, 1024)}}
    params = fz.tree.map(torch.empty, shapes, is_leaf=lambda x: isinstance(x, tuple))
    state = fz.init(params, fz.adamw(1e-3), mesh, layout, policy="bf16")
    picture = fz.visualize(state)
    held, whole = bytes_of((state.params, state.moments)), 3 * 2 * sum(x.numel() for x in fz.tree.leaves(params))
    ranks, drawn = math.prod(axes.values()), min(math.prod(axes.values()), 8)
    lines = picture.text.splitlines()
    assert lines[0].endswith(f"a rank holds {amount(held)} of {amount(whole)}")
    assert sum(line.endswith(amount(held)) for line in lines[1:]) == drawn
    assert (f"… {ranks - 8:,} more" in picture.text) == (ranks > 8)
    last = " ".join(f"{axis}={size - 1}" for axis, size in axes.items())
    assert any(line.startswith(last) for line in lines)
    assert len(rectangles(picture)) == drawn * 6
    # As wide as what is held, but for the line between neighbours and for what is too small to be seen.
    wide = sum(float(r.get("width", 0)) for r in rectangles(picture)) / drawn
    assert wide == pytest.approx(560 * held / whole, abs=6)


def drawn_at(axes: dict[str, int], divided: tuple[str, ...], rank: int) -> tuple[float, float]:
    place = {}
    for axis in reversed(axes):
        rank, place[axis] = divmod(rank, axes[axis])
    return Segment("params", "w", 1, divided, 16, 1).part(place, axes)


@pytest.mark.parametrize(
    "divided, starts",
    [
        ((), [0, 0, 0, 0]),
        (("data",), [0, 0, 0.5, 0.5]),
        (("model",), [0, 0.5, 0, 0.5]),
        (("data", "model"), [0, 0.25, 0.5, 0.75]),
        (("model", "data"), [0, 0.5, 0.25, 0.75]),
    ],
)
def test_a_part_lies_where_the_mesh_puts_it(divided: tuple[str, ...], starts: list[float]) -> None:
    found = [drawn_at({"data": 2, "model": 2}, divided, rank) for rank in range(4)]
    assert [start for start, _ in found] == starts
    assert {end - start for start, end in found} == {0.5 ** len(divided)}


def test_a_line_of_text_is_to_scale() -> None:
    segments = (Segment("params", "a", 1, ("data",), 54, 18), Segment("moments", "b", 2, (), 18, 18))
    lines = Holdings("tree", (("data", 3),), segments, 8).text().splitlines()
    bars = [line[len("data=0  ") :] for line in lines[1:4]]
    assert bars[0] == "█" * 18 + "·" * 36 + " " + "█" * 18 + "  36 B"
    assert bars[2] == "·" * 36 + "█" * 18 + " " + "█" * 18 + "  36 B"
    assert lines[4].startswith("params") and lines[5].endswith("2 leaves whole")


def test_many_leaves_are_joined_by_what_their_paths_begin_with() -> None:
    mesh = fz.make_mesh("cpu", data=2, simulate=True)
    blocks = {f"b{i}": {"mlp": {"w": torch.empty(64), "v": torch.empty(64)}} for i in range(10)}
    for names, expected in ((40, 21), (16, 11), (5, 5)):
        picture = fz.visualize(fz.shard({"blocks": blocks, "a": torch.empty(64)}, mesh, fz.zero(3)), names=names)
        count = len(rectangles(picture)) // 2
        assert count == (expected if names != 5 else 2), "blocks, and a"
    flat = {f"w{i}": torch.empty(64) for i in range(30)}
    notes = [r[0].text or "" for r in rectangles(fz.visualize(fz.shard(flat, mesh, fz.zero(3)), names=4))]
    assert len(notes) == 2 * 4 and sum("27 others" in note and "27 leaves" in note for note in notes) == 2


def test_a_tree_of_several_is_drawn_in_one() -> None:
    mesh = fz.make_mesh("cpu", data=2, simulate=True)
    vision, text = (fz.init({"w": torch.empty(64, 64)}, fz.adamw(1e-3), mesh) for _ in range(2))
    lines = fz.visualize({"vision": vision, "text": text, "batch": torch.ones(3)}).text.splitlines()
    kinds = [line.split()[0] for line in lines[-4:]]
    assert kinds == ["text.params", "text.moments", "vision.params", "vision.moments"]
    grads = fz.grad(dot)(state_of(), parameters(1))
    assert "gradients" in str(fz.visualize(grads)) and "gradients" in fz.visualize(grads)._repr_html_()


def test_what_was_donated_is_not_drawn() -> None:
    assert str(fz.visualize(donated())).splitlines()[0].endswith("a rank holds 0 B of 0 B")


@pytest.mark.parametrize(
    "call, error, match",
    [
        (lambda: fz.visualize(torch.ones(3)), TypeError, "a State, a Sharded or a tree of such, got float32"),
        (lambda: fz.visualize(state_of(), ranks=0), ValueError, "ranks=0"),
        (lambda: fz.visualize([state_of(ranks=2), state_of(ranks=4)]), ValueError, "data=2, simulated, data=4"),
    ],
)
def test_what_cannot_be_drawn(call: Callable[[], Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        call()
