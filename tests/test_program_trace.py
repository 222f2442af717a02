"""Tracing: trees in, one flat graph out, with inputs named by their paths."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx

import fzero as fz
from fzero import tree
from fzero.program.graph.trace import Trace, copied, graph_of, results, trace_flat
from fzero.program.lower.python import lower_graph
from tests.small import assert_same_bits

A, B = torch.arange(6.0), torch.ones(6)


def traced(f: Callable[..., Any], *args: Any, donated: frozenset[int] = frozenset(), **kwargs: Any) -> Trace:
    examples, _, hollow = tree.split((args, kwargs))
    rows = zip(tree.structure_paths(hollow.treedef), hollow.slots, strict=True)
    paths = [path.split(".", 1)[1] for path, slot in rows if slot is tree.PICKED]
    return trace_flat(f, examples, hollow, paths=paths, donated=donated)


def run(trace: Trace, *inputs: Tensor) -> Any:
    assert trace.output is not None
    return trace.output.fill(lower_graph(trace.module, trace.bodies)(list(inputs)))


def targets(module: fx.GraphModule) -> list[str]:
    return [str(node.target) for node in module.graph.nodes if node.op == "call_function"]


def linear(params: dict[str, Tensor], x: Tensor, *, scale: float = 1.0) -> dict[str, Any]:
    return {"y": params["w"] * x + params["b"], "scale": scale}


def test_a_graph_computes_what_the_function_does() -> None:
    trace = traced(linear, {"w": A, "b": B}, A, scale=2.0)
    inputs = [B, A, A]  # a dict's leaves are sorted
    assert run(trace, *inputs)["scale"] == 2.0
    assert_same_bits(run(trace, *inputs)["y"], A * A + B)


def test_inputs_are_named_by_their_paths() -> None:
    trace = traced(linear, {"w": A, "b": B}, A, scale=2.0)
    assert trace.inputs == ("0.b", "0.w", "1")
    names = [node.name for node in trace.module.graph.nodes if node.op == "placeholder"]
    assert names == ["arg0_b", "arg0_w", "arg1"]


def test_every_value_knows_its_shape() -> None:
    trace = traced(lambda x: (x + 1).view(2, 3).sum(0), A)
    shapes = [tuple(n.meta["val"].shape) for n in trace.module.graph.nodes if n.op in ("placeholder", "call_function")]
    assert shapes == [(6,), (6,), (2, 3), (3,)]


def test_only_shapes_strides_and_dtypes_of_examples_are_looked_at() -> None:
    abstract = torch.empty(2**40, device="meta")
    trace = traced(lambda x: x + 1, abstract)
    assert results(trace.module)[0].meta["val"].shape == (2**40,)


def test_an_input_that_is_not_used_stays_an_input() -> None:
    trace = traced(lambda x, y: x + 1, A, B)
    assert trace.inputs == ("0", "1")
    assert_same_bits(run(trace, A, B), A + 1)


def test_one_tensor_in_two_places_is_two_inputs() -> None:
    trace = traced(lambda x, y: x - y, A, A)
    assert_same_bits(run(trace, A, B), A - B)


def test_the_function_is_called_once_and_sees_no_values() -> None:
    seen = []

    def f(x: Tensor) -> Tensor:
        seen.append(type(x))
        return x

    traced(f, A)
    assert len(seen) == 1
    assert seen[0] is not Tensor


def test_gradients_are_part_of_the_graph() -> None:
    trace = traced(fz.value_and_grad(lambda w, x: (w * x).tanh().sum()), A, B)
    value, gradient = run(trace, A, B)
    expected = torch.autograd.functional.jacobian(lambda w: (w * B).tanh().sum(), A)
    torch.testing.assert_close(gradient, expected)
    torch.testing.assert_close(value, A.tanh().sum())
    assert any("tanh_backward" in target or "sub" in target for target in targets(trace.module))


def test_what_is_closed_over_is_shared_with_the_graph() -> None:
    offset = torch.zeros(6)
    trace = traced(lambda x: x + offset, A)
    offset.fill_(3.0)
    assert_same_bits(run(trace, A), A + 3)


LOOKS_AT_VALUES: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda x: x * x.sum().item(),
    "tolist": lambda x: x.tolist(),
    "int": lambda x: torch.zeros(int(x[0])),
    "float": lambda x: x * float(x[0]),
    "bool": lambda x: bool(x[0]),
    "if": lambda x: x if x.sum() > 0 else -x,
    "while": lambda x: [x for _ in iter(lambda: bool(x.any()), False)],
    "an index": lambda x: [1, 2, 3][x[0].long()],
    "a range": lambda x: list(range(x[0].long())),
    "a slice": lambda x: x[: x[0].long()],
    "in": lambda x: 3.0 in x,
    "equal": lambda x: torch.equal(x, x),
    "nonzero": lambda x: x.nonzero(),
    "where": lambda x: torch.where(x > 0),
    "a mask": lambda x: x[x > 0],
    "masked_select": lambda x: x.masked_select(x > 0),
    "unique": lambda x: x.unique(),
    "repeat_interleave": lambda x: x.repeat_interleave(x.long()),
    "arange": lambda x: torch.arange(x[0]),  # type: ignore[call-overload]
    "if under a gradient": lambda x: fz.grad(lambda w: w.sum() if w.sum() > 0 else -w.sum())(x),
    "a mask under a gradient": lambda x: fz.grad(lambda w: w[w > 0].sum())(x),
}


@pytest.mark.parametrize(("name", "f"), LOOKS_AT_VALUES.items(), ids=LOOKS_AT_VALUES.keys())
def test_what_depends_on_values_is_refused_at_its_line(name: str, f: Callable[[Tensor], Any]) -> None:
    with pytest.raises(fz.TraceError, match="the function looks at the value of a tensor") as info:
        traced(f, A)
    assert __file__ in str(info.value)
    assert f'"{name}": lambda x:' in str(info.value), "the line is shown"


DRAWS: dict[str, Callable[[Tensor], Any]] = {
    "rand": lambda x: x + torch.rand(6),
    "rand_like": lambda x: x + torch.rand_like(x),
    "dropout": lambda x: torch.nn.functional.dropout(x, 0.5),
    "normal_": lambda x: x.clone().normal_(),
    "random_": lambda x: x.clone().random_(),
    "random_, up to": lambda x: x.clone().random_(9),
    "random_, from": lambda x: x.clone().random_(3, 9),
}


def test_draws_with_a_key_are_traced() -> None:
    f = fz.keyed(lambda x: x.clone().random_(3, 9))
    assert_same_bits(run(traced(lambda x: f(7, x), A), A), f(7, A))


@pytest.mark.parametrize("f", DRAWS.values(), ids=DRAWS.keys())
def test_draws_without_a_key_are_refused(f: Callable[[Tensor], Any]) -> None:
    with pytest.raises(fz.RandomOpError, match="draws from the global random generator"):
        traced(f, A)


def test_a_syntax_error_of_the_function_arrives_as_it_is() -> None:
    with pytest.raises(SyntaxError, match="invalid syntax"):
        traced(lambda x: eval("x +* 2"), A)


def test_a_copy_is_independent() -> None:
    trace = traced(lambda x: (x + 1) * 2, A)
    before = str(trace.module.graph)
    copy = copied(trace.module)
    for node in reversed(list(copy.graph.nodes)):
        if node.op == "call_function":
            node.replace_all_uses_with(node.args[0])
            copy.graph.erase_node(node)
    assert str(trace.module.graph) == before
    assert_same_bits(run(trace, A), (A + 1) * 2)
    assert_same_bits(run(trace.replace(module=copy), A), A)


def test_the_body_of_a_loop_is_a_trace_of_its_own() -> None:
    offset = torch.ones(())
    loop = fz.accumulate(fz.value_and_grad(lambda w, x: (w * x + offset).sum()), 2)
    trace = traced(loop, A[:3], A.view(2, 3))
    ((name, body),) = trace.bodies.items()
    assert any(node.op == "get_attr" and node.target == name for node in trace.module.graph.nodes)
    assert body.donated == {0, 1}, "the sums so far, of value and gradient"
    assert targets(body.module).count("aten.add.Tensor") == 3, "the offset, and two sums"
    inputs = (A[:3], A.view(2, 3))
    assert_same_bits(run(trace, *inputs), loop(*inputs))


def test_tracing_twice_gives_the_same_graph() -> None:
    step = fz.value_and_grad(lambda w, x: (w * x).tanh().sum())
    assert str(traced(step, A, B).module.graph) == str(traced(step, A, B).module.graph)


def test_graph_of_takes_and_gives_lists_of_tensors() -> None:
    module = graph_of(lambda x, y: [x + y, x], [A, B])
    assert_same_bits(module(A, B), [A + B, A])
