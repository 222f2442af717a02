"""Lowering to Python: the same values, and every value freed at its last use."""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx

import fzero as fz
from fzero._torch import FakeTensorMode, OpOverload, TorchDispatchMode, direct
from fzero.program.graph.trace import graph_of
from fzero.program.lower.choose import default_lower
from fzero.program.lower.python import lower_graph, python_source
from fzero.program.lower.quickest import quickest
from tests.small import assert_same_bits

A, B = torch.arange(6.0), torch.linspace(-1.0, 1.0, 6)

FUNCTIONS: dict[str, Callable[..., list[Tensor]]] = {
    "arithmetic": lambda x, y: [x * 2 + y, x - y],
    "an input": lambda x, y: [y],
    "one result twice": lambda x, y: (lambda z: [z, z])(x + y),
    "nothing": lambda x, y: [],
    "several results": lambda x, y: list(torch.topk(x.reshape(2, 3), 2)),
    "lists of tensors": lambda x, y: [torch.cat([x, y]), torch.stack([x, y], 1)],
    "slices": lambda x, y: [x[1:5:2], y.view(2, 3)[:, None, ::2]],
    "indexing": lambda x, y: [x[torch.tensor([3, 1])], x.view(2, 3)[1, [0, 2]]],
    "infinities": lambda x, y: [torch.full((2,), float("inf")), x.clamp(-float("inf"), 3.0), x * float("nan")],
    "dtypes": lambda x, y: [x.to(torch.bfloat16), torch.zeros(2, dtype=torch.int32, device="cpu")],
    "a constant": lambda x, y: [x + B],
    "keywords": lambda x, y: [torch.add(x, y, alpha=3), x.sum(0, keepdim=True)],
    "names of Python": lambda x, y: [torch.where(x > 2, x, y), torch.max(x), torch.sum(y), x.pow(2)],
    "in place": lambda x, y: [x.clone().add_(1).mul_(y)],
    "no input used": lambda x, y: [torch.arange(3)],
}


@pytest.mark.parametrize("f", FUNCTIONS.values(), ids=FUNCTIONS.keys())
def test_lowered_graphs_compute_what_the_function_does(f: Callable[..., list[Tensor]]) -> None:
    assert_same_bits(lower_graph(graph_of(f, [A, B]))([A, B]), f(A, B))


def test_a_program_can_run_again() -> None:
    program = lower_graph(graph_of(lambda x: [x + 1], [A]))
    for x in (A, B):
        assert_same_bits(program([x]), [x + 1])


def test_a_function_without_inputs_is_lowered() -> None:
    assert_same_bits(lower_graph(graph_of(lambda: [torch.ones(2)], []))([]), [torch.ones(2)])


def test_one_input_is_taken_out_of_its_list() -> None:
    assert_same_bits(lower_graph(graph_of(lambda x: [x.sum()], [A]))([A]), [A.sum()])


def test_the_callers_list_is_emptied() -> None:
    inputs = [A, B]
    lower_graph(graph_of(lambda x, y: [x + y], inputs))(inputs)
    assert inputs == []


class Alive(TorchDispatchMode):
    """Counts, at each operation, how many results of earlier ones still live."""

    def __init__(self) -> None:
        super().__init__()
        self.results: list[weakref.ref[Tensor]] = []
        self.counts: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts.append(sum(ref() is not None for ref in self.results))
        result = func(*args, **(kwargs or {}))
        self.results.append(weakref.ref(result))
        return result


def test_a_value_dies_at_its_last_use() -> None:
    def chain(x: Tensor) -> list[Tensor]:
        for _ in range(5):
            x = x.exp()
        return [x]

    program = lower_graph(graph_of(chain, [A]))
    with Alive() as alive:
        program([A])
    assert alive.counts == [0, 1, 1, 1, 1]


def test_a_value_lives_as_long_as_it_is_needed() -> None:
    program = lower_graph(graph_of(lambda x: (lambda y: [y.exp().sin().cos() + y])(x + 1), [A]))
    with Alive() as alive:
        (result,) = program([A])
    assert alive.counts == [0, 1, 2, 2, 2]
    assert_same_bits(result, (A + 1).exp().sin().cos() + (A + 1))


def test_inputs_die_at_their_last_use() -> None:
    deaths: list[int] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            deaths.append(sum(ref() is None for ref in refs))
            return func(*args, **(kwargs or {}))

    program = lower_graph(graph_of(lambda x, y, unused: [x.exp() + y, y.sin()], [A, B, A]))
    inputs = [A.clone(), B.clone(), A.clone()]
    refs = [weakref.ref(x) for x in inputs]
    with Watch():
        program(inputs)
    assert deaths == [1, 2, 2], "the unused one first, x after exp, y after sin"


def test_the_source_is_straight_line_python() -> None:
    source, scope = python_source(graph_of(lambda x, y: [(x + y) * 2, torch.full((1,), float("inf"))], [A, B]))
    compile(source, "program", "exec")
    lines = source.splitlines()
    assert lines[0] == "def program(inputs):"
    assert lines[2].strip() == "inputs.clear()"
    assert sum("del " in line for line in lines) == 2
    assert scope["inf"] == float("inf")


def named(name: str, target: Callable[..., Any]) -> fx.GraphModule:
    """A graph whose only operation's result, and input, have awkward names."""
    graph = fx.Graph()
    x = graph.placeholder("torch")
    y = graph.create_node("call_function", target, (x, torch.float64), name=name)
    graph.output([y])
    return fx.GraphModule(torch.nn.Module(), graph)


@pytest.mark.parametrize("name", ["result", "aten_to_dtype", "inf", "nan", "torch_1", "inputs", "program"])
def test_names_in_the_graph_do_not_hide_those_of_the_code(name: str) -> None:
    assert_same_bits(lower_graph(named(name, torch.ops.aten.to.dtype))([A]), [A.double()])


def test_a_loop_body_is_lowered_once() -> None:
    loop = fz.accumulate(fz.value_and_grad(lambda w, x: (w * x).sum()), 3)
    jitted = fz.jit(loop)
    arguments = (torch.ones(2), torch.arange(12.0).view(6, 2))
    assert_same_bits(jitted(*arguments), loop(*arguments))
    module = jitted.programs[0].trace.module
    assert sum("run_loop" in str(node.target) for node in module.graph.nodes) == 1


class Operators(TorchDispatchMode):
    """Notes the operators that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("f", FUNCTIONS.values(), ids=FUNCTIONS.keys())
def test_the_operators_of_the_graph_run_and_no_others(f: Callable[..., list[Tensor]]) -> None:
    module = graph_of(f, [A, B])
    program = lower_graph(module)
    with Operators() as operators:
        program([A, B])
    assert operators.seen == [node.target for node in module.graph.nodes if isinstance(node.target, OpOverload)]


X = torch.ones(2, 2)
CALLS = [
    (torch.ops.aten.mm.default, (X, X), {}, torch.mm, (X, X)),
    (torch.ops.aten.add.Tensor, (X, 2), {"alpha": 3}, torch.add, (X, 2)),
    (torch.ops.aten.add_.Tensor, (X, X), {}, Tensor.add_, (X, X)),
    (torch.ops.aten.view.default, (X, [4, 1]), {}, Tensor.view, (X, 4, 1)),
    (torch.ops.aten.sum.dim_IntList, (X, [0], True), {"dtype": torch.float64}, torch.sum, (X, 0, True)),
    (torch.ops.aten.sum.dim_IntList, (X, [0, 1]), {}, torch.sum, (X, [0, 1])),
    (torch.ops.aten.cat.default, ([X, X], 1), {}, torch.cat, ([X, X], 1)),
    (torch.ops.aten.clamp.default, (X, -float("inf"), None), {}, torch.clamp, (X, -float("inf"), None)),
]


@pytest.mark.parametrize(("op", "args", "kwargs", "function", "spelled"), CALLS, ids=[str(op) for op, *_ in CALLS])
def test_operators_are_called_through_their_own_bindings(
    op: OpOverload[..., Any], args: Any, kwargs: Any, function: Any, spelled: Any
) -> None:
    before, is_in_place = X.clone(), "_." in str(op)
    found, form = quickest(op, args, kwargs, None if is_in_place else op(*args, **kwargs))
    assert found == function
    assert str(form) == str(spelled)
    assert torch.equal(X, before), "a trial runs nothing"


@pytest.mark.parametrize(
    ("op", "args"),
    [
        (torch.ops.aten.mul.Scalar, (X, 2.0)),  # torch.mul reaches mul.Tensor with it
        (torch.ops.aten.slice.Tensor, (X, 0, 1)),  # has no binding
        (torch.ops.fzero.sum_parts.default, (X, 2, torch.float32)),
    ],
    ids=str,
)
def test_operators_that_no_binding_reaches_are_called_themselves(op: OpOverload[..., Any], args: Any) -> None:
    assert quickest(op, args, {}, op(*args)) == (direct(op), args)


def test_a_call_that_fails_is_not_a_match() -> None:
    op, args = torch.ops.aten.mm.default, (X, "no tensor")
    assert quickest(op, args, {}, X) == (direct(op), args)


def test_lines_of_a_program_are_spelled_the_quick_way() -> None:
    source, scope = python_source(graph_of(lambda x: [torch.topk(x.view(2, 3), 2)[0]], [A]))
    assert re.search(r"\(\w+, 2, 3\)", source) and "[0]\n" in source
    assert scope["aten_view_default"] is not torch.ops.aten.view.default


@pytest.mark.parametrize(("device", "expected"), [("cpu", "graph"), ("cuda", "inductor")])
def test_the_device_of_the_inputs_decides_where_nothing_is_said(device: str, expected: str) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        inputs = torch.empty(()), torch.empty(2, device=device)
    assert default_lower(fz.trace(lambda scale, x: x * scale)(*inputs).trace) == expected
