"""Micro-batches add up to the batch that they were cut from, in one trace however many they are."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict, UserDict
from functools import partial
from types import MappingProxyType, SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import BatchEncoding

import fzero as fz
from tests import small, world

COUNTS = (1, 2, 4, 8)
ROWS = 8


def loss(p: Any, x: Tensor) -> Tensor:
    """A mean over rows that uses every leaf of `small.parameters`."""
    hidden = torch.tanh(x @ p["block"]["weight"]) @ p["head"].reshape(5, 14)
    return (torch.sin(hidden.reshape(-1, 2, 7) + p["block"]["bias"]) * p["scale"]).square().mean()


def inputs(ranks: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    """A batch of its own for each rank."""
    return torch.randn(ranks, ROWS, 23, generator=torch.Generator().manual_seed(3), dtype=dtype)


def new_state(stage: int = 3, policy: str | fz.Policy = "fp32", seed: int = 0) -> fz.State:
    return fz.init(small.parameters(seed), fz.adamw(0.1), fz.make_mesh("cpu"), fz.zero(stage), policy=policy)


def assert_close(actual: Any, expected: Any, rtol: float) -> None:
    left, right = small.flat(actual), small.flat(expected)
    assert left.keys() == right.keys()
    for path, value in right.items():
        torch.testing.assert_close(left[path], value, rtol=rtol, atol=rtol, msg=partial("{}: {}".format, path))


# ---------------------------------------------------------------------------------------------------------
# Equal to the whole batch


def accumulated_on_ranks(stage: int, xs: Tensor, counts: tuple[int, ...]) -> Any:
    """Value and gradient of the whole batch, and for each count; float64 for all but the factor."""
    mesh = fz.make_mesh("cpu")
    params = fz.shard(small.parameters(dtype=torch.float64), mesh, fz.zero(stage))
    x, function = xs[mesh.index("data")], fz.value_and_grad(loss)
    whole = fz.gather(function(params, x))
    return whole, [fz.gather(fz.accumulate(function, n)(params, x)) for n in counts]


@pytest.mark.parametrize(("size", "stage"), [(1, 3), (2, 0), (2, 1), (4, 3)])
def test_micro_batches_equal_the_batch(size, stage):
    for whole, parts in world.run(accumulated_on_ranks, stage, inputs(size, torch.float64), COUNTS, size=size):
        for part in parts:
            # 1/(D·n) is exact in the factor for powers of two, so all that differs is the order of sums.
            assert_close(part, whole, rtol=1e-13)


def test_a_number_that_is_no_power_of_two():
    params, x = small.parameters(dtype=torch.float64), inputs(dtype=torch.float64)[0][:6]
    function = fz.value_and_grad(loss)
    assert_close(fz.accumulate(function, 3)(params, x), function(params, x), rtol=1e-13)


def factors(reduce: Any) -> tuple[list[Tensor], Tensor]:
    """The factor of the gradient for each count, and that of the whole batch."""
    state, x = new_state(), inputs()[0]
    function = fz.value_and_grad(loss, reduce=reduce)
    return [fz.accumulate(function, n)(state, x)[1].factor for n in COUNTS], function(state, x)[1].factor


@pytest.mark.parametrize(("reduce", "ranks"), [("mean", 2), ("sum", 1)])
def test_the_means_are_in_the_factor(reduce, ranks):
    for found, of_one in world.run(factors, reduce, size=2):
        assert of_one == 1 / ranks
        for n, factor in zip(COUNTS, found, strict=True):
            assert (factor.dtype, factor.shape) == (torch.float32, ())
            assert factor == 1 / (ranks * n)


def eager_and_traced(stage: int, policy: str, n: int) -> tuple[Any, Any]:
    state = new_state(stage, policy)
    function = fz.accumulate(fz.value_and_grad(loss), n)
    x = inputs()[0].to(state.policy.compute)
    return function(state, x), fz.jit(function)(state, x)


@pytest.mark.parametrize(("size", "n", "policy"), [(1, 1, "fp32"), (1, 8, "bf16"), (2, 4, "mixed")])
def test_traced_equals_eager(size, n, policy):
    for eager, traced in world.run(eager_and_traced, 3, policy, n, size=size):
        small.assert_same_bits(traced, eager)


def test_a_plain_tree_as_primal():
    params, x = small.parameters(dtype=torch.float64), inputs(dtype=torch.float64)[0]
    function = fz.accumulate(fz.value_and_grad(loss), 4)
    expected = fz.value_and_grad(loss)(params, x)
    assert_close(function(params, x), expected, rtol=1e-13)
    small.assert_same_bits(fz.jit(function)(params, x), function(params, x))


def test_the_batch_is_any_tree_and_what_is_no_tensor_goes_to_every_micro_batch():
    def f(p: Any, batch: Any, power: int, targets: Tensor | None) -> Tensor:
        assert batch["name"] == "batch" and targets is None
        return (batch["x"][0].mean(1) * batch["y"] ** power).mean() * p

    p, batch = torch.tensor(2.0), {"x": [inputs()[0]], "y": torch.arange(8.0), "name": "batch"}
    function = fz.value_and_grad(f)
    assert_close(fz.accumulate(function, 4)(p, batch, 2, None), function(p, batch, 2, None), rtol=1e-6)


@dataclasses.dataclass(frozen=True)
class Rows:
    x: Tensor
    name: str = "rows"


class Named(NamedTuple):
    x: Tensor


class Items(dict[str, Any]):
    """A dict with a constructor of its own."""

    def __init__(self, x: Tensor) -> None:
        super().__init__(x=x)


CONTAINERS: dict[str, Any] = {
    "dict": lambda x: {"x": x},
    "ordered": lambda x: OrderedDict(x=x),
    "user dict": lambda x: UserDict(x=x),
    "read-only": lambda x: MappingProxyType({"x": x}),
    "subclass": Items,
    "Transformers": lambda x: BatchEncoding({"x": x}),
    "dataclass": Rows,
    "named tuple": Named,
    "namespace": lambda x: SimpleNamespace(x=x),
}


@pytest.mark.parametrize("transform", [lambda f: f, fz.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("make", CONTAINERS.values(), ids=CONTAINERS)
def test_a_batch_is_split_in_any_container_and_stays_one(make, transform):
    kind, rows = type(make(torch.zeros(8))), []

    def f(p: Tensor, batch: Any) -> Tensor:
        assert type(batch) is kind
        x = batch["x"] if hasattr(batch, "keys") else batch.x
        rows.append(len(x))
        return (p * x).mean()

    got = transform(fz.accumulate(fz.value_and_grad(f), 4))(torch.tensor(2.0), make(torch.arange(8.0)))
    assert got == (7.0, 3.5)
    assert set(rows) == {2}


@pytest.mark.parametrize("transform", [lambda f: f, fz.jit], ids=["eager", "jit"])
def test_numbers_and_what_is_named_go_whole(transform):
    def f(p: Tensor, batch: Any, table: Tensor, *, shift: Tensor, y: Tensor) -> Tensor:
        assert (batch["x"].shape, table.shape, shift.shape, y.shape) == ((2,), (3,), (), (2,))
        return (p * batch["x"] * batch["scale"] * table.sum() + y + shift).mean()

    batch = {"x": torch.arange(8.0), "scale": torch.tensor(2.0)}
    call = (torch.tensor(2.0), batch, torch.ones(3)), {"shift": torch.tensor(1.0), "y": torch.arange(8.0)}
    function = fz.value_and_grad(f)
    expected = fz.value_and_grad(lambda p: p * 3.5 * 6 + 4.5)(torch.tensor(2.0))
    for whole in (2, "table", ("table",), (2,)):
        assert transform(fz.accumulate(function, 4, whole=whole))(*call[0], **call[1]) == expected


def test_differentiated_arguments_are_whole_wherever_they_stand():
    def f(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return (x * a.sum() * b.prod()).mean()

    x, a, b = torch.arange(8.0), torch.tensor([2.0, 3.0]), torch.tensor([5.0])
    function = fz.value_and_grad(f, argnums=(2, 1))
    assert_close(fz.accumulate(function, 4)(x, a, b), function(x, a, b), rtol=1e-6)


# ---------------------------------------------------------------------------------------------------------
# States


def distillation(student: Any, teacher: Any, x: Tensor) -> Tensor:
    return (torch.tanh(x @ student["block"]["weight"]) - torch.tanh(x @ teacher["block"]["weight"])).square().mean()


def distilled(argnums: int | tuple[int, ...], n: int) -> Any:
    student, teacher = new_state(), new_state(seed=1)
    x = inputs(4)[student.mesh.index("data")]
    function = fz.value_and_grad(distillation, argnums=argnums)
    accumulated = fz.accumulate(function, n)
    return (
        fz.gather(function(student, teacher, x)),
        fz.gather(accumulated(student, teacher, x)),
        fz.gather(fz.jit(accumulated)(student, teacher, x)),
    )


@pytest.mark.parametrize("argnums", [0, (0, 1)], ids=["a frozen teacher", "both differentiated"])
@pytest.mark.parametrize("size", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_two_states_are_passed_whole(size, argnums):
    for whole, parts, traced in world.run(distilled, argnums, 4, size=size):
        assert_close(parts, whole, rtol=1e-6)
        small.assert_same_bits(traced, parts)


WIDE = fz.Policy(param=torch.bfloat16, moment=torch.bfloat16, compute=torch.bfloat16, reduce=torch.float32)


@pytest.mark.parametrize(
    ("policy", "reduce"), [("mixed", torch.float32), (WIDE, torch.float32), ("bf16", torch.bfloat16)], ids=str
)
def test_gradients_are_summed_in_the_reduce_dtype_and_kept_in_their_own(policy, reduce):
    state, x = new_state(policy=policy), inputs()[0].bfloat16()
    function = fz.value_and_grad(loss)
    parts = [function(state, part)[1].pieces for part in x.chunk(8)]
    (_, gradient) = fz.accumulate(function, 8)(state, x)
    for at, piece in enumerate(gradient.pieces):
        total = parts[0][at].to(reduce)
        for part in parts[1:]:
            total = total + part[at].to(reduce)
        assert piece.dtype == torch.bfloat16
        assert torch.equal(piece, total.bfloat16())


def test_leaves_without_a_gradient_have_none():
    tree = {"count": torch.tensor(3), "w": torch.randn(23)}
    state = fz.init(tree, fz.adamw(0.1), fz.make_mesh("cpu"), policy="fp32")
    _, gradient = fz.accumulate(fz.value_and_grad(lambda p, x: (x @ p["w"]).mean() * p["count"]), 4)(state, inputs()[0])
    assert [piece is None for piece in gradient.pieces] == [True, False]


def test_a_function_of_ones_own_may_scale_each_micro_batch():
    """Each round has a factor of its own, so what is summed is true values."""
    state, x = new_state(), inputs()[0]

    def weighted(state: fz.State, x: Tensor, weight: Tensor) -> Any:
        value, gradient = fz.value_and_grad(loss)(state, x)
        return value * weight.mean(), gradient.replace(factor=gradient.factor * weight.mean())

    weight = torch.arange(4.0).repeat_interleave(2)
    value, gradient = fz.accumulate(weighted, 4)(state, x, weight)
    expected = fz.value_and_grad(
        lambda p, x: torch.stack([i * loss(p, part) for i, part in enumerate(x.chunk(4))]).mean()
    )(state, x)
    assert_close(fz.gather((value, gradient)), fz.gather(expected), rtol=1e-5)


# ---------------------------------------------------------------------------------------------------------
# What the function returns beside the value


def with_aux(p: Tensor, x: Tensor) -> Any:
    aux = {
        "mean": x.mean(),
        "half": x.mean().bfloat16(),
        "count": (x > 3).sum(),
        "rows": x * 2,
        "integers": x.long()[:, None],
        "name": "aux",
        "none": None,
    }
    return (p * x).mean(), aux


@pytest.mark.parametrize("transform", [lambda f: f, fz.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("n", COUNTS)
def test_aux_scalars_are_averaged_integers_added_up_and_arrays_joined(n, transform):
    x = torch.arange(8.0)
    (value, aux), gradient = transform(fz.accumulate(fz.value_and_grad(with_aux, has_aux=True), n))(
        torch.tensor(2.0), x
    )
    assert (value, gradient) == (7.0, 3.5)
    assert fz.tree.map(fz.tree.describe, aux) == fz.tree.map(fz.tree.describe, with_aux(torch.tensor(2.0), x)[1])
    assert (aux["mean"], aux["half"], aux["count"]) == (3.5, 3.5, 4)
    assert torch.equal(aux["rows"], x * 2) and torch.equal(aux["integers"], torch.arange(8)[:, None])


# ---------------------------------------------------------------------------------------------------------
# One trace


def test_the_body_is_traced_once_and_the_graph_does_not_grow():
    state, x, runs = new_state(), inputs()[0], []

    def counted(p: Any, x: Tensor) -> Tensor:
        runs.append(x.shape[0])
        return loss(p, x)

    sizes = {}
    for n in COUNTS:
        runs.clear()
        step = fz.jit(fz.accumulate(fz.value_and_grad(counted), n))
        for _ in range(2):
            step(state, x)
        assert runs == [ROWS // n], "one trace, of one micro-batch"
        trace = step.programs[0].trace
        sizes[n] = [len(t.module.graph.nodes) for t in (trace, *trace.bodies.values())]
    assert len(sizes[2]) == 2, "the step, and the body of its loop"
    assert sizes[2] == sizes[4] == sizes[8]


def test_eagerly_the_function_runs_once_for_each_micro_batch_in_order():
    seen = []

    def f(p: Tensor, x: Tensor) -> Tensor:
        seen.append(x.tolist())
        return (p * x).mean()

    fz.accumulate(fz.value_and_grad(f), 4)(torch.tensor(1.0), torch.arange(8.0))
    assert seen == [[0, 1], [2, 3], [4, 5], [6, 7]]


# ---------------------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize("n", [0, -1, 2.5, 2.0])
def test_n_is_a_whole_number_of_at_least_one(n):
    with pytest.raises(fz.BatchError, match=f"whole number of at least 1, got {n}"):
        fz.accumulate(fz.value_and_grad(loss), n)


class Hides:
    def __init__(self, x: Any) -> None:
        self.x = x


BATCHES: dict[str, tuple[Any, str]] = {
    "a bare tensor": (torch.ones(6), r"argument 1 has 6 rows \(shape \(6,\)\).*into 4"),
    "no rows": (torch.tensor(1.0), r"nothing can be split into 4 micro-batches: argument 1 is float32\(\)"),
    "no tensor": ({"a": 1}, r"nothing can be split into 4 micro-batches: argument 1 is dict"),
    "inside a tree": ({"a": torch.ones(8), "b": [torch.ones(7, 2)]}, r"argument 1, 'b\.0' has 7 rows \(shape \(7, 2\)"),
}

# What holds tensors where they are not seen would go whole to every micro-batch.
HIDDEN: dict[str, tuple[Any, str]] = {
    "an object": (Hides(torch.ones(8)), r"argument 1 is a Hides, which holds a tensor of float32\(8,\)"),
    "inside a tree": ({"a": torch.ones(8), "b": Hides([torch.ones(8)])}, r"argument 1, 'b' is a Hides.*whole="),
    "a set": ({"a": torch.ones(8), "b": {torch.ones(8)}}, "argument 1, 'b' is a set"),
    "an array": (np.ones(8), r"argument 1 is a ndarray, and only tensors are split.*torch\.as_tensor"),
}


@pytest.mark.parametrize("name", HIDDEN)
def test_tensors_that_are_not_seen_are_refused(name):
    batch, message = HIDDEN[name]
    function = fz.accumulate(fz.value_and_grad(lambda p, batch: p * 2), 4)
    with pytest.raises(fz.BatchError, match=message):
        function(torch.tensor(1.0), batch)
    whole = fz.accumulate(fz.value_and_grad(lambda p, batch: p * 2), 4, whole=1)
    assert whole(torch.tensor(1.0), batch) == (2.0, 2.0)


@pytest.mark.parametrize(
    ("whole", "message"),
    [
        (-1, "expected positions"),
        ((True,), "expected positions"),
        ("teachers", "takes p, batch, teacher. Did you mean 'teacher'"),
        ((7,), r"names 7, and the call has the arguments \[0, 1, 2\]"),
    ],
)
def test_whole_names_an_argument(whole, message):
    with pytest.raises(fz.BatchError, match=message):
        fz.accumulate(fz.value_and_grad(lambda p, batch, teacher: p * 2), 4, whole=whole)(
            torch.tensor(1.0), torch.ones(8), torch.ones(3)
        )


@pytest.mark.parametrize("transform", [lambda f: f, fz.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("name", BATCHES)
def test_a_batch_that_does_not_split_is_named(name, transform):
    batch, message = BATCHES[name]
    function = fz.accumulate(fz.value_and_grad(lambda p, batch: p * 2), 4)
    with pytest.raises(ValueError, match=message) as raised:
        transform(function)(torch.tensor(1.0), batch)
    assert type(raised.value) is fz.BatchError


def test_the_error_counts_arguments_as_the_caller_does():
    function = fz.accumulate(fz.value_and_grad(lambda x, p, y: p * 2, argnums=1), 4)
    with pytest.raises(fz.BatchError, match="argument 2 has 7 rows"):
        function(torch.ones(8), torch.tensor(1.0), torch.ones(7))


def test_what_the_step_computes_may_be_closed_over():
    def step(p: Tensor, x: Tensor) -> Any:
        scale, rows = x.mean(), x.cumsum(0)
        return fz.accumulate(fz.value_and_grad(lambda p, x: (p * x).mean() * scale + rows.sum()), 2)(p, x)

    arguments = torch.tensor(2.0), torch.arange(8.0)
    small.assert_same_bits(fz.jit(step)(*arguments), step(*arguments))


def test_closing_over_a_tensor_that_is_differentiated_is_refused_in_a_trace():
    def outer(scale: Tensor, p: Tensor, x: Tensor) -> Tensor:
        return fz.accumulate(fz.value_and_grad(lambda p, x: (p * x).mean() * scale), 2)(p, x)[1]

    arguments = torch.tensor(3.0), torch.tensor(2.0), torch.arange(8.0)
    assert fz.grad(outer)(*arguments) == 3.5
    with pytest.raises(fz.TraceError, match=r"closes over a tensor of .* being differentiated.*Pass it as an argument"):
        fz.jit(fz.grad(outer))(*arguments)


def test_closing_over_a_constant_is_fine():
    scale = torch.tensor(3.0)
    function = fz.accumulate(fz.value_and_grad(lambda p, x: (p * x).mean() * scale), 2)
    arguments = torch.tensor(2.0), torch.arange(8.0)
    small.assert_same_bits(fz.jit(function)(*arguments), function(*arguments))


def test_a_function_that_returns_no_pair_is_refused():
    with pytest.raises(TypeError, match=r"must return \(value, gradients\).*it returned float32\(\)"):
        fz.accumulate(lambda p, x: (p * x).mean(), 2)(torch.tensor(1.0), torch.ones(4))
