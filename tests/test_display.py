"""What states, sharded trees and programs look like: it says what is there, it stays small, and it never raises."""

from __future__ import annotations

import dataclasses
import html
import re
from collections.abc import Callable
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import fzero as fz
from fzero._torch import TorchDispatchMode
from fzero.display.html import ROWS, html_of, table
from fzero.display.listing import Leaf, Listing, amount, printable
from fzero.display.svg import timeline
from fzero.display.text import text_of
from tests.small import dot, parameters

SVG = "{http://www.w3.org/2000/svg}"


def state_of(
    policy: str = "bf16", stage: int = 3, optimizer: fz.Optimizer | None = None, ranks: int = 1, leaves: int = 0
) -> fz.State:
    mesh = fz.make_mesh("cpu") if ranks == 1 else fz.make_mesh("cpu", data=ranks, simulate=True)
    params = {f"w{i}": torch.ones(40, 40) for i in range(leaves)} or parameters()
    return fz.init(params, optimizer or fz.adamw(1e-3), mesh, fz.zero(stage), policy=policy)


def bytes_of(tree: Any) -> int:
    return sum(x.numel() * x.element_size() for x in fz.tree.leaves(tree))


def rows_of(text: str) -> dict[str, list[str]]:
    """The table of a text, as path to the other cells."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("  leaf "))
    return {cells[0]: cells[1:] for cells in (re.split(r"\s{2,}", line.strip()) for line in lines[start + 1 :])}


def parsed(page: str) -> ElementTree.Element:
    """Our HTML closes what it opens, and so is XML."""
    return ElementTree.fromstring(page)


def words(page: str) -> list[str]:
    return [text.strip() for text in parsed(page).itertext() if text.strip()]


# ---------------------------------------------------------------------------------------------------------
# What is said


@pytest.mark.parametrize("policy", ["fp32", "mixed", "bf16", "bf16-exact", "bf16-8bit", "fp16"])
@pytest.mark.parametrize("stage", [1, 3])
def test_a_state_says_what_it_weighs(policy: str, stage: int) -> None:
    state = state_of(policy, stage, ranks=4)
    text, page = repr(state), state._repr_html_()
    parts = [amount(bytes_of(part)) for part in (state, state.params, state.moments)]
    assert "{} on this rank: params {}, moments {}".format(*parts) in text
    assert all(any(part in word for word in words(page)) for part in parts)
    assert text.startswith(f"State(4 leaves, 193 parameters, ZeRO-{stage} over data=4, simulated)")
    rows = rows_of(text)
    assert list(rows) == list(state.params.paths)
    assert [row[0] for row in rows.values()] == [str(shape) for shape in state.params.shapes]
    assert {row[1] for row in rows.values()} == {str(state.policy.stored).removeprefix("torch.")}
    assert [row[3] for row in rows.values()] == [amount(bytes_of(piece)) for piece in state.params.pieces]


@pytest.mark.parametrize("optimizer", [fz.adamw(1e-3), fz.adafactor(1e-3), fz.muon(1e-3), fz.sgd(0.1)], ids=str)
def test_moments_stand_beside_their_leaf(optimizer: fz.Optimizer) -> None:
    state = state_of("bf16", optimizer=fz.partition_by(lambda path: path.partition(".")[0], {
        "block": fz.chain(fz.clip_by_global_norm(1.0), optimizer), "head": None, "scale": fz.lion(1e-3)
    }))  # fmt: skip
    rows = rows_of(repr(state))
    paths = {path: [x for p, x in zip(fz.tree.paths(state.moments), fz.tree.leaves(state.moments), strict=True)
                    if p.endswith(path)] for path in state.params.paths}  # fmt: skip
    assert {path: row[4] for path, row in rows.items()} == {path: amount(bytes_of(x)) for path, x in paths.items()}
    assert rows["head"][4] == "0 B"


@pytest.mark.parametrize(
    "layout, held",
    [
        (fz.zero(0), "whole"),
        (fz.zero(3), "1/4 over data"),
        (fz.zero(3, axis=("data", "node")), "1/8 over data, node"),
        (fz.zero(3, split={"*": fz.P("model", None)}), "dimension 0 over model=2, 1/4 over data"),
        (fz.P(None, "model"), "dimension 1 over model=2"),
        (fz.P("one", None), "whole"),
    ],
    ids=str,
)
def test_a_leaf_says_how_it_is_held(layout: Any, held: str) -> None:
    mesh = fz.make_mesh("cpu", data=4, node=2, model=2, one=1, simulate=True)
    sharded = fz.shard({"w": torch.empty(64, 64)}, mesh, layout)
    assert rows_of(repr(sharded))["w"][2] == held
    assert held in words(sharded._repr_html_())


def test_a_step_and_a_loss_scale_are_said_where_they_are_known() -> None:
    assert "loss scale  32,768.0" in repr(state_of("fp16"))
    state = state_of()
    assert "step 0)" in repr(state) and "loss scale" not in repr(state)
    state, _ = fz.apply_gradients(state, fz.grad(dot)(state, parameters(1)))
    assert "step 1)" in repr(state)
    assert "step" not in repr(state_of(ranks=2)).splitlines()[0]


def test_gradients_say_that_they_have_a_factor() -> None:
    state = state_of()
    assert "factor" in repr(fz.grad(dot)(state, parameters(1)))
    assert "factor" not in repr(state.params)


def test_a_text_is_bounded() -> None:
    text = repr(state_of(leaves=123))
    assert len(text.splitlines()) <= 25
    assert text.endswith("... 103 more")
    page = state_of(leaves=ROWS + 50)._repr_html_()
    assert "... 50 more" in words(page) and len(page) < 200_000


# ---------------------------------------------------------------------------------------------------------
# It never raises


def donated() -> fz.State:
    state = state_of("fp16")
    fz.jit(lambda s: s.replace(step=s.step + 1), donate=0)(state)
    return state


def in_a_trace(seen: list[Any]) -> None:
    def step(state: fz.State) -> Tensor:
        seen.append((repr(state), state._repr_html_(), str(fz.visualize(state))))
        return state.step + 1

    fz.trace(step)(state_of("fp16"))


def in_vmap(seen: list[Any]) -> None:
    state = state_of()
    many = fz.tree.map(lambda x: torch.stack([x, x]), state)
    seen.append((repr(many), many._repr_html_(), str(fz.visualize(many))))

    def one(s: fz.State) -> Tensor:
        seen.append((repr(s), s._repr_html_(), str(fz.visualize(s))))
        return s.step

    torch.func.vmap(one)(many)


def in_vjp(seen: list[Any]) -> None:
    def f(params: fz.Sharded) -> Tensor:
        seen.append((repr(params), params._repr_html_(), str(fz.visualize(params))))
        return fz.call(dot, params, parameters(1))

    torch.func.vjp(f, state_of("fp32").params)


HEAD_ONLY = fz.partition_by(lambda path: "head" if path == "head" else "rest", {"head": fz.sgd(0.1), "rest": None})

ODD: dict[str, Callable[[], Any]] = {
    "donated": donated,
    "no leaves": lambda: fz.init({}, fz.adamw(1e-3), fz.make_mesh("cpu")),
    "gradients, some frozen": lambda: fz.grad(dot)(state_of(optimizer=HEAD_ONLY), parameters(1)),
    "dtypes": lambda: fz.tree.map(lambda x: x.dtype, state_of()),
    "strings": lambda: fz.tree.map(lambda x: "<b>\n" * 100, state_of()),
    "norms": lambda: fz.tree.map(lambda x: 1.0, state_of(), is_leaf=lambda x: isinstance(x, fz.Sharded)),
    "nothing": lambda: dataclasses.replace(state_of(), params=None, moments=None),  # type: ignore[arg-type]
    "other dtypes": lambda: fz.shard(
        {"n": torch.arange(100), "c": torch.ones(3, dtype=torch.complex64)}, fz.make_mesh("cpu"), fz.zero(3)
    ),
}


@pytest.mark.parametrize("make", ODD.values(), ids=ODD.keys())
def test_what_is_odd_can_be_looked_at(make: Callable[[], Any]) -> None:
    x = make()
    assert len(repr(x)) < 4000 and len(f"{x}".splitlines()) < 12
    assert parsed(x._repr_html_()) is not None


def test_what_was_donated_says_so() -> None:
    state = donated()
    assert {row[1] for row in rows_of(repr(state)).values()} == {"donated"}
    assert "0 B on this rank" in repr(state)


@pytest.mark.parametrize("look", [in_a_trace, in_vmap, in_vjp])
def test_it_can_be_looked_at_from_inside(look: Callable[[list[Any]], None]) -> None:
    seen: list[Any] = []
    look(seen)
    assert seen and all(text.startswith(("State(4", "Sharded(4")) for text, *_ in seen)


class Calls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_to_look_runs_nothing() -> None:
    state = state_of("bf16-8bit")
    with Calls() as calls:
        repr(state), state._repr_html_(), fz.visualize(state).svg
    assert calls.count == 0


# ---------------------------------------------------------------------------------------------------------
# Text that is not ours

text = st.text(st.characters(exclude_categories=()), max_size=200)


@given(path=text, name=text)
def test_any_path_gives_one_line_and_a_whole_page(path: str, name: str) -> None:
    leaf = Leaf(path, (1,), "float32", "whole", (4,))
    listing = Listing("State", (("name", printable(name)),), ("bytes",), (leaf,))
    assert len(text_of(listing).splitlines()) == 4
    cells = [cell.text or "" for cell in parsed(html_of(listing)).iter("td")]
    assert cells[:3] == ["name", printable(name), printable(path)]


@given(key=st.text(min_size=1, max_size=100).filter(lambda key: "." not in key))
def test_any_key_can_be_shown(key: str) -> None:
    sharded = fz.shard({key: torch.ones(2)}, fz.make_mesh("cpu"), fz.zero(3))
    assert len(repr(sharded).splitlines()) == 4
    assert printable(key) in [cell.text for cell in parsed(sharded._repr_html_()).iter("td")]
    assert parsed(fz.visualize(sharded).svg).tag == f"{SVG}svg"


def test_cells_are_escaped() -> None:
    assert "<script>" not in table([("<script>", "&")]) and html.escape("<script>") in table([("<script>", "&")])


# ---------------------------------------------------------------------------------------------------------
# Programs


def program_of(**options: Any) -> fz.Program:
    mesh = fz.make_mesh("cpu", data=8, simulate=True)
    state = fz.init({"w": torch.empty(256, 256)}, fz.adamw(1e-3), mesh, policy="bf16")
    step = fz.train_step(lambda params, x: (x @ params["w"]).float().square().mean(), **options)
    return fz.trace(step)(state, torch.empty(64, 256, dtype=torch.bfloat16))


@pytest.mark.parametrize("options", [{}, {"microbatches": 4}], ids=str)
def test_a_program_shows_what_it_costs(options: dict[str, Any]) -> None:
    program = program_of(**options)
    found = words(program._repr_html_())
    memory, traffic = program.memory(), program.traffic()
    assert repr(program) == found[0] and len(repr(program).splitlines()) == 1
    assert f"{amount(memory.peak)} in {memory.where}; at rest {amount(memory.at_rest)}" in found
    assert f"{amount(traffic.total)} over data" in found
    assert {stage.name for stage in program.stages} <= set(found)
    assert {name for name, count in traffic.calls.items() if count} <= set(found)
    assert {kind for kind, size in memory.by_kind.items() if size} <= set(found)


def test_a_program_without_collectives_or_states_can_be_shown() -> None:
    page = fz.trace(lambda x: torch.tanh(x) + 1)(torch.ones(10))._repr_html_()
    assert "nothing" in words(page) and "collectives" not in words(page)[:8]


@pytest.mark.parametrize("operations, at", [(1, 0), (7, 3), (10_000, 6_543)])
def test_no_peak_is_lost(operations: int, at: int) -> None:
    params, other = [100] * operations, [0] * operations
    other[at] = 300
    svg = parsed(timeline({"params": params, "gathered": [0] * operations, "other": other}, ["x"] * operations, 100))
    paths = [path for path in svg.iter(f"{SVG}path") if path.get("fill")]
    heights = [[float(y) for y in re.findall(r"[ V](\d+\.\d)", path.get("d", ""))] for path in paths]
    bottom, tops = max(heights[0]), [min(ys) for ys in heights]
    assert len(paths) == 2, "what is never there is not drawn"
    assert bottom - tops[1] == pytest.approx(4 * (bottom - tops[0]), rel=0.01)


def test_nothing_alive_is_no_picture() -> None:
    assert timeline({"params": [0, 0]}, ["a", "b"], 0) == ""
