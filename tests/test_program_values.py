"""The memory behind a graph: which buffers nodes make, share, read and overwrite."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx

import fzero as fz
from fzero.operators import written_by
from fzero.program.graph.aliases import alias_of
from fzero.program.graph.collectives import ISSUES, WAIT, issue_of, sent_for
from fzero.program.graph.gathers import from_pieces
from fzero.program.graph.loop import run_loop
from fzero.program.graph.trace import Trace, results
from fzero.program.graph.values import Values, precedences
from fzero.program.lower.python import lower_graph
from fzero.program.options import Options
from fzero.program.passes.dead import dead
from fzero.program.passes.donate import donate
from fzero.program.report.memory import live_bytes, peak_bytes
from fzero.ranks.collectives import all_gather, all_to_all, reduce_scatter
from tests import world
from tests.programs import simulated
from tests.small import assert_same_bits
from tests.test_program_trace import targets, traced

A, B = torch.arange(6.0), torch.ones(6)
MESH = simulated(2)


def node(trace: Trace, name: str) -> fx.Node:
    return next(n for n in trace.module.graph.nodes if n.name == name)


def held(f: Callable[..., Any], *args: Tensor) -> tuple[Trace, Values, list[set[str]]]:
    """For each result, the nodes that own the memory that it lies in."""
    trace = traced(f, *args)
    values = Values.of(trace)
    return trace, values, [{values.owner[b].name for b in values.holds[r]} for r in results(trace.module)]


SHARED: dict[str, tuple[Callable[[Tensor, Tensor], Any], list[set[str]]]] = {
    "a computation": (lambda x, y: x + y, [{"add"}]),
    "an input": (lambda x, y: (x, y), [{"arg0"}, {"arg1"}]),
    "a view": (lambda x, y: x.view(2, 3), [{"arg0"}]),
    "a view of a view": (lambda x, y: (x + y).view(2, 3).t()[1:], [{"add"}]),
    "elements of a split": (lambda x, y: x.split(2), [{"arg0"}] * 3),
    "elements of a computation": (lambda x, y: torch.max(x.view(2, 3), 0), [{"max_1"}] * 2),
    "a write": (lambda x, y: x.add_(y), [{"arg0"}]),
    "a write through a view": (lambda x, y: x[2:].add_(y[2:]), [{"arg0"}]),
    "a write to a result": (lambda x, y: (x * y).exp_().mul_(2), [{"mul"}]),
    "what arrives": (lambda x, y: all_gather(x, MESH, "data"), [{"all_gather_into_tensor"}]),
    "a copy": (lambda x, y: x.clone(), [{"clone"}]),
}


@pytest.mark.parametrize(("f", "expected"), SHARED.values(), ids=SHARED.keys())
def test_where_a_value_lies(f: Callable[..., Any], expected: list[set[str]]) -> None:
    trace, values, found = held(f, A, B)
    assert found == expected
    for n in trace.module.graph.nodes:
        if n.op != "output":
            assert {values.owner[b] for b in values.makes[n]} <= {n}
            assert set(values.makes[n]) <= set(values.holds[n])


def test_each_element_of_a_tuple_has_memory_of_its_own_and_those_of_a_view_share_it() -> None:
    _, values, _ = held(lambda x, y: torch.max(x.view(2, 3), 0), A, B)
    (made,) = (n for n in values.makes if n.name == "max_1")
    assert [values.size[b] for b in values.makes[made]] == [3 * 4, 3 * 8]
    elements = [values.holds[n] for n in values.holds if n.target is operator.getitem]
    assert sorted(elements) == sorted((b,) for b in values.makes[made])
    _, values, _ = held(lambda x, y: [part + 1 for part in x.split(2)], A, B)
    assert all(not values.makes[n] for n in values.makes if n.target is operator.getitem or "split" in n.name)


def test_a_wait_reads_what_was_sent_and_shares_what_arrived() -> None:
    def f(x: Tensor, y: Tensor) -> Tensor:
        return all_gather(x * 2, MESH, "data") + 1

    trace = traced(f, A, B)
    values = Values.of(trace)
    (wait,) = (n for n in trace.module.graph.nodes if n.target is WAIT)
    issue = issue_of(wait)
    assert issue is not None
    assert issue.target in ISSUES
    assert sent_for(wait) == [node(trace, "mul")]
    assert values.holds[wait] == values.makes[issue]
    assert set(values.reads[wait]) == {*values.holds[issue], *values.holds[node(trace, "mul")]}
    # What is sent is there until the wait; what arrives, until it is read.
    order = list(trace.module.graph.nodes)
    live = dict(zip((n.name for n in order), live_bytes(order, values), strict=True))
    sent, arrived = 6 * 4, 12 * 4
    assert live["wait_tensor"] == live["mul"] + arrived
    assert live["add"] == live["wait_tensor"] - sent + (0 if values.in_place else arrived)
    assert live["output"] == live["mul"] - sent + arrived


def test_the_constants_of_a_program_and_inputs_that_are_not_donated_are_kept() -> None:
    constant = torch.ones(6)
    trace = traced(lambda x, y: x + y + constant, A, B, donated=frozenset({1}))
    values = Values.of(trace)
    assert {values.owner[b].op for b in values.kept} == {"placeholder", "get_attr"}
    assert {values.owner[b].name for b in values.kept if values.owner[b].op == "placeholder"} == {"arg0"}
    assert alias_of(node(trace, "add")) is None


# ---------------------------------------------------------------------------------------------------------
# What can be written in place: only where nobody reads the memory later


def gathered_twice(x: Tensor, y: Tensor) -> Any:
    full = all_gather(x, MESH, "data")
    return full + 1, full * 2


def gathered_once(x: Tensor, y: Tensor) -> Any:
    return all_gather(x, MESH, "data") + 1


def gathered_and_viewed(x: Tensor, y: Tensor) -> Any:
    full = all_gather(x, MESH, "data").view(2, 6)
    return full + 1, full[0] * 2


def sent_and_added(x: Tensor, y: Tensor) -> Any:
    mine = x * 2
    return all_to_all(mine, MESH, "data") * 3, mine + y


def added_before_it_is_sent(x: Tensor, y: Tensor) -> Any:
    mine = x * 2
    return mine + y, all_to_all(mine, MESH, "data")


# Function, what is donated, and which additions may overwrite what they add to.
IN_PLACE: dict[str, tuple[Callable[..., Any], frozenset[int], list[str]]] = {
    "memory of its own": (lambda x, y: (x * 2) + y, frozenset(), ["add"]),
    "an input": (lambda x, y: x + y, frozenset(), []),
    "a donated input": (lambda x, y: x + y, frozenset({0}), ["add"]),
    "a donated input that is read later": (lambda x, y: (x + y, x * 2), frozenset({0}), []),
    "a donated input that is read before": (lambda x, y: (x * 2, x + y), frozenset({0}), ["add"]),
    "added to itself": (lambda x, y: (z := x * 2) + z, frozenset(), ["add"]),
    "added to a view of itself": (lambda x, y: (z := x * 2) + z.flip(0).view(6), frozenset(), ["add"]),
    "added to its own view": (lambda x, y: (z := x * 2) + z.view(2, 3).view(6), frozenset(), []),
    "a part of its memory": (lambda x, y: (x * 2)[2:] + 1, frozenset(), []),
    "another dtype": (lambda x, y: (x * 2).to(torch.bfloat16) + y, frozenset(), []),
    "broadcast": (lambda x, y: (x * 2).view(6, 1) + y, frozenset(), []),
    "a chain": (lambda x, y: (x * 2) + y + y, frozenset(), ["add", "add_1"]),
    "a chain whose middle is returned": (lambda x, y: ((z := (x * 2) + y), z + y), frozenset(), ["add"]),
    "a gathered leaf that is read later": (gathered_twice, frozenset(), []),
    "a gathered leaf that is not": (gathered_once, frozenset(), ["add"]),
    "a gathered leaf that is read later through a view": (gathered_and_viewed, frozenset(), []),
    "what was sent, and has been waited for": (sent_and_added, frozenset(), ["add"]),
    "what is sent later": (added_before_it_is_sent, frozenset(), []),
}


@pytest.mark.parametrize(("f", "donated", "expected"), IN_PLACE.values(), ids=IN_PLACE.keys())
def test_what_may_be_written_in_place(f: Callable[..., Any], donated: frozenset[int], expected: list[str]) -> None:
    trace = traced(f, A, B, donated=donated)
    assert [n.name for n in Values.of(trace).in_place] == expected
    if "c10d" not in str(trace.module.graph):
        mine = [A.clone(), B.clone()]
        found = lower_graph(donate(trace, Options()).module)(list(mine))
        expected_values = f(A.clone(), B.clone())
        assert_same_bits(found, list(expected_values) if isinstance(expected_values, tuple) else [expected_values])


def gathers_are_added_to() -> None:
    mesh = fz.make_mesh("cpu")

    def f(x: Tensor) -> Any:
        full, total = all_gather(x, mesh, "data"), reduce_scatter(x, mesh, "data")
        return full + 1, full * 2, total + 1, total * 2, all_gather(total, mesh, "data") + 1, total.exp()

    x = torch.linspace(0, 1, 6) + mesh.index("data")
    assert_same_bits(fz.jit(f)(x), f(x))


def test_what_arrived_is_not_overwritten_before_its_last_reader() -> None:
    world.run(gathers_are_added_to, size=2)


# ---------------------------------------------------------------------------------------------------------
# Writes


WRITES: dict[str, tuple[Callable[[Tensor, Tensor], Any], list[str]]] = {
    "none": (lambda x, y: x + y, []),
    "in place": (lambda x, y: x.mul_(y), ["arg0"]),
    "a copy": (lambda x, y: y.copy_(x), ["arg1"]),
    "out": (lambda x, y: torch.add(x, y, out=y), ["arg1"]),
    "a norm in training": (
        lambda x, y: torch.batch_norm(x.view(1, 6).repeat(2, 1), None, None, y, y * 2, True, 0.1, 1e-5, False),
        ["arg1", "mul"],
    ),
    "a norm in evaluation": (
        lambda x, y: torch.batch_norm(x.view(1, 6).repeat(2, 1), None, None, y, y * 2, False, 0.1, 1e-5, False),
        [],
    ),
}


@pytest.mark.parametrize(("f", "expected"), WRITES.values(), ids=WRITES.keys())
def test_what_an_operator_writes(f: Callable[..., Any], expected: list[str]) -> None:
    trace = traced(f, A, B)
    assert [source.name for n in trace.module.graph.nodes for source in written_by(n)] == expected
    left = targets(dead(trace, Options()).module)
    assert all(str(n.target) in left for n in trace.module.graph.nodes if written_by(n))


def around_a_write(x: Tensor, y: Tensor) -> Any:
    before, view = x.exp(), x[2:]
    x.add_(y)
    after = x.sin() + before
    y.mul_(2)
    return after, view.cos()


def test_nodes_keep_their_place_between_the_writes_to_what_they_read() -> None:
    trace = traced(around_a_write, A, B)
    before = precedences(trace.module.graph, Values.of(trace))
    names = {n.name: {s.name for s in sources} for n, sources in before.items()}
    assert names["add_"] == {"exp", "slice_1"}, "readers come before the writer"
    assert names["sin"] == {"add_"}, "and behind it"
    assert names["cos"] == {"add_"}, "a view made before is read behind it"
    assert names["mul_"] == {"add_"}, "what reads y comes before y is written"
    assert "exp" not in names


def test_what_a_write_touches_is_not_moved_or_repeated() -> None:
    trace = traced(around_a_write, A, B)
    values = Values.of(trace)
    free = {n.name for n in trace.module.graph.nodes if n.op == "call_function"} - {
        n.name for n in values.overwritten()
    }
    assert free == {"add"}
    again = {n.name for n in trace.module.graph.nodes if n.op == "call_function"} - {
        n.name for n in values.unrepeatable()
    }
    assert again == {"add", "sin", "cos"}, "what reads memory behind its last write gives the same again"


def test_an_update_does_not_count_as_a_write() -> None:
    trace = traced(lambda x, y: (x.exp(), x + y), A, B, donated=frozenset({0}))
    values = Values.of(trace)
    assert len(values.in_place) == 1
    assert values.overwritten() == values.unrepeatable() == set()


def test_a_loop_sums_in_the_memory_it_starts_from() -> None:
    trace = traced(fz.accumulate(fz.value_and_grad(lambda w, x: (w * x).sum()), 2), A[:3], A.view(2, 3))
    values = Values.of(trace)
    (loop,) = (n for n in trace.module.graph.nodes if n.target is run_loop)
    starts = [values.holds[n] for n in loop.args[3]]
    assert values.writes[loop] == tuple(b for buffers in starts for b in buffers)
    assert set(values.writes[loop]) <= set(values.holds[loop])


def test_from_pieces_is_what_leads_from_inputs_through_gathers_casts_and_views() -> None:
    def f(x: Tensor, y: Tensor) -> Any:
        full = all_gather(x.to(torch.bfloat16), MESH, "data").view(2, 6)
        return full.t() @ full, all_gather(x + y, MESH, "data"), y.view(2, 3)

    trace = traced(f, A, B)
    found = {n.name for n in from_pieces(trace.module.graph)}
    assert found == {"_to_copy", "all_gather_into_tensor", "wait_tensor", "view", "t", "view_1"}
    fixed = {node(trace, "wait_tensor")}
    assert {n.name for n in from_pieces(trace.module.graph, fixed)} == {"_to_copy", "all_gather_into_tensor", "view_1"}


def test_live_bytes_of_a_chain() -> None:
    size = 6 * 4
    trace = traced(lambda x: x.exp().sin().cos(), A)
    assert live_bytes(list(trace.module.graph.nodes), Values.of(trace)) == [
        size,
        2 * size,
        3 * size,
        3 * size,
        2 * size,
    ]
    assert peak_bytes(trace) == 3 * size
    given = traced(lambda x: x.exp().sin().cos(), A, donated=frozenset({0}))
    assert peak_bytes(given) == 2 * size, "a donated input is gone once it is read"
