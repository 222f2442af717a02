"""The pass `donate`: updates in place where that is safe and nowhere else, and outputs that own their memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fzero as fz
from fzero.program.graph.trace import Trace
from fzero.program.lower.python import lower_graph
from fzero.program.options import Options
from fzero.program.passes.dead import dead
from fzero.program.passes.donate import donate
from tests.small import assert_same_bits, copied, int32
from tests.test_program_trace import targets, traced

P, M, V, G = (torch.linspace(k, k + 1.0, 8) for k in range(4))
KEYS = torch.zeros(2, dtype=torch.int32)
ADAMW, SGD, NESTEROV = fz.adamw(0.1, weight_decay=0.1), fz.sgd(0.1), fz.sgd(0.1, 0.5, nesterov=True)
SCALARS = ADAMW.scalars_of(int32(0), 1.0, True)
STATE = frozenset({0, 1, 2})
OPTIONS = Options()


def update(p: Tensor, m: Tensor, v: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rest = SCALARS, KEYS[None], KEYS[:1]
    ((p, m, v),) = ADAMW.kernel([(p, m, v)], [g], *rest, numbers=ADAMW.numbers, stochastic=False)
    return p, m, v


def one_result(p: Tensor, m: Tensor, v: Tensor, g: Tensor) -> Any:
    """A list of one is a list: its element is taken out of it."""
    rest = SCALARS[:3], KEYS[None], KEYS[:1]
    ((new,),) = SGD.kernel([(p,)], [g], *rest, numbers=SGD.numbers, stochastic=False)
    return new, m, v


def two_leaves(p: Tensor, m: Tensor, v: Tensor, g: Tensor) -> Any:
    zeros = torch.zeros(2, 2, dtype=torch.int32)
    rest = SCALARS[:3], zeros, zeros[0]
    one, two = SGD.kernel([(p, m), (v, v * 2)], [g, g], *rest, numbers=NESTEROV.numbers, stochastic=False)
    return *one, *two


def two_leaves_and_one_is_read_after(p: Tensor, m: Tensor, v: Tensor, g: Tensor) -> Any:
    return *two_leaves(p, m, v, g), v.exp()


def read_before(p: Tensor, m: Tensor, v: Tensor, g: Tensor) -> Any:
    total = (p + m).sum()
    return *update(p, m, v, g), total


def read_after(p: Tensor, m: Tensor, v: Tensor, g: Tensor) -> Any:
    new = update(p, m, v, g)
    return *new, new[0] - p


def read_after_through_a_view(p: Tensor, m: Tensor, v: Tensor, g: Tensor) -> Any:
    half = m[4:]
    new = update(p, m, v, g)
    return *new, half.exp()


def old_is_returned(p: Tensor, m: Tensor, v: Tensor, g: Tensor) -> Any:
    return *update(p, m, v, g), p


def view_of_old_is_returned(p: Tensor, m: Tensor, v: Tensor, g: Tensor) -> Any:
    return *update(p, m, v, g), v[2:]


def own_memory(p: Tensor, m: Tensor, v: Tensor, g: Tensor) -> Any:
    return update(p * 2, m * 2, v * 2, g)


def one_memory_twice(p: Tensor, m: Tensor, v: Tensor, g: Tensor) -> Any:
    return update(p, m, m, g)


def two_updates(p: Tensor, m: Tensor, v: Tensor, g: Tensor) -> Any:
    return update(*update(p, m, v, g), g)


def view_of_the_new_between_two_updates(p: Tensor, m: Tensor, v: Tensor, g: Tensor) -> Any:
    first = update(p, m, v, g)
    view = first[0][2:]
    return *update(*first, g), view.exp()


def the_new_between_two_updates(p: Tensor, m: Tensor, v: Tensor, g: Tensor) -> Any:
    first = update(p, m, v, g)
    return *update(*first, g), first[0]


def new_read_twice(p: Tensor, m: Tensor, v: Tensor, g: Tensor) -> Any:
    new = update(p, m, v, g)
    return *new, new[0][2:], new[0].exp(), new[0]


# What is donated, and how many updates can be in place, how many not.
CASES: dict[str, tuple[Callable[..., Any], frozenset[int], int, int]] = {
    "all donated": (update, STATE, 1, 0),
    "nothing donated": (update, frozenset(), 0, 1),
    "a moment is kept": (update, frozenset({0, 1}), 0, 1),
    "read before": (read_before, STATE, 1, 0),
    "read after": (read_after, STATE, 0, 1),
    "a view read after": (read_after_through_a_view, STATE, 0, 1),
    "the old is returned": (old_is_returned, STATE, 0, 1),
    "a view of the old is returned": (view_of_old_is_returned, STATE, 0, 1),
    "memory of the program's own": (own_memory, frozenset(), 1, 0),
    "one memory twice": (one_memory_twice, STATE, 0, 1),
    "two updates": (two_updates, STATE, 2, 0),
    "two updates, nothing donated": (two_updates, frozenset(), 1, 1),
    "a view of the new is read between": (view_of_the_new_between_two_updates, STATE, 1, 1),
    "the new is returned from between": (the_new_between_two_updates, STATE, 1, 1),
    "the new is read and returned twice": (new_read_twice, STATE, 1, 0),
    "one result": (one_result, STATE, 1, 0),
    "two leaves": (two_leaves, STATE, 1, 0),
    "two leaves, one of them kept": (two_leaves, frozenset({0, 1}), 0, 1),
    "two leaves, one of them read after": (two_leaves_and_one_is_read_after, STATE, 0, 1),
}
every_case = pytest.mark.parametrize(("f", "donated", "in_place", "plain"), CASES.values(), ids=CASES.keys())


def passed(f: Callable[..., Any], donated: frozenset[int]) -> Trace:
    return donate(dead(traced(f, P, M, V, G, donated=donated), OPTIONS), OPTIONS)


@every_case
def test_updates_are_in_place_where_that_is_safe(
    f: Callable[..., Any], donated: frozenset[int], in_place: int, plain: int
) -> None:
    found = targets(passed(f, donated).module)
    assert sum(found.count(f"fzero.{kernel}_.default") for kernel in ("adamw", "sgd")) == in_place
    assert sum(found.count(f"fzero.{kernel}.default") for kernel in ("adamw", "sgd")) == plain


@every_case
def test_results_are_those_of_the_function_and_what_is_kept_stays(
    f: Callable[..., Any], donated: frozenset[int], in_place: int, plain: int
) -> None:
    trace, inputs = passed(f, donated), [x.clone() for x in (P, M, V, G)]
    kept = [x for i, x in enumerate(inputs) if i not in donated]
    kept_before = copied(kept)
    results = lower_graph(trace.module)(list(inputs))
    assert_same_bits(results, list(f(P.clone(), M.clone(), V.clone(), G.clone())))
    assert_same_bits(kept, kept_before)
    owners = [x.untyped_storage().data_ptr() for x in (*results, *kept)]
    assert len(set(owners)) == len(owners), "no result shares memory with another or with what is kept"


@every_case
def test_the_pass_is_pure_and_deterministic(
    f: Callable[..., Any], donated: frozenset[int], in_place: int, plain: int
) -> None:
    trace = dead(traced(f, P, M, V, G, donated=donated), OPTIONS)
    before = str(trace.module.graph)
    once, again = donate(trace, OPTIONS), donate(trace, OPTIONS)
    assert str(trace.module.graph) == before
    assert str(once.module.graph) == str(again.module.graph)


def test_new_values_lie_in_donated_memory() -> None:
    inputs = [x.clone() for x in (P, M, V, G)]
    addresses = [x.data_ptr() for x in inputs]
    results = lower_graph(passed(update, STATE).module)(list(inputs))
    assert [x.data_ptr() for x in results] == addresses[:3]


def test_a_donated_input_is_returned_without_a_copy_and_a_kept_one_with() -> None:
    for donated, copies in ((frozenset({0}), 0), (frozenset[int](), 1)):
        trace = donate(traced(lambda x: x, P, donated=donated), OPTIONS)
        assert targets(trace.module).count("aten.clone.default") == copies
