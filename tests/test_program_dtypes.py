"""Dtypes that only kernels refuse: found by the trace, with the line, in the cases in which a kernel raises."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fzero as fz
from fzero.program.graph.dtypes import _ALIKE, _INDICES, _NORMS

X, W, V = torch.ones(4, 4), torch.ones(4, 4), torch.ones(4)
B, IMAGE, GRID = torch.ones(2, 4, 4), torch.ones(1, 4, 4, 4), torch.zeros(1, 4, 4, 2)
WORDS, BAGS = torch.tensor([0, 1, 2, 3]), torch.tensor([0, 2])

# Two operands of one dtype each, and what is done with them.
CALLS: dict[str, tuple[Callable[..., Any], Tensor, Tensor]] = {
    "mm": (torch.mm, X, W),
    "linear": (lambda x, w: F.linear(x, w, V), X, W),
    "linear's bias": (lambda x, b: F.linear(x, X, b), X, V),
    "linear in 3 dimensions": (F.linear, B, W),
    "matmul": (torch.matmul, B, B),
    "mv": (torch.mv, X, V),
    "baddbmm": (lambda x, y: torch.baddbmm(B, x, y), B, B),
    "addbmm": (lambda x, y: torch.addbmm(X, x, y), B, B),
    "conv1d": (F.conv1d, B, torch.ones(2, 4, 1)),
    "conv2d": (F.conv2d, IMAGE, torch.ones(2, 4, 1, 1)),
    "conv_transpose2d": (F.conv_transpose2d, IMAGE, torch.ones(4, 2, 1, 1)),
    "layer_norm": (lambda x, w: F.layer_norm(x, (4,), w, w), X, V),
    "group_norm": (lambda x, w: F.group_norm(x, 2, w, w), IMAGE, V),
    "batch_norm": (lambda x, w: F.batch_norm(x, None, None, w, w, training=True), X, V),
    "cdist": (torch.cdist, X, W),
    "embedding_bag": (lambda w, each: F.embedding_bag(WORDS, w, BAGS, mode="sum", per_sample_weights=each), X, V),
    "binary_cross_entropy": (F.binary_cross_entropy, X, W),
    "complex": (torch.complex, X, W),
    "polar": (torch.polar, X, W),
    "cross": (torch.linalg.cross, torch.ones(2, 3), torch.ones(2, 3)),
    "grid_sample": (lambda x, grid: F.grid_sample(x, grid, align_corners=False), IMAGE, GRID),
    "heaviside": (torch.heaviside, X, W),
    "index_add": (lambda x, y: x.index_add(0, WORDS, y), X, W),
    "index_copy": (lambda x, y: x.index_copy(0, WORDS, y), X, W),
    "index_put": (lambda x, y: x.index_put((WORDS,), y), X, W),
    "index_reduce": (lambda x, y: x.index_reduce(0, WORDS, y, "amax"), X, W),
    "put": (lambda x, y: x.put(WORDS, y), X, V),
    "weights of classes": (lambda x, w: F.nll_loss(x, WORDS, w), X, V),
    "addmv": (lambda x, v: torch.addmv(V, x, v), X, V),
    "dot": (torch.dot, V, V),  # found by the fake itself
}


@pytest.mark.filterwarnings("ignore:index_reduce")
@pytest.mark.parametrize("other", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("call", "x", "w"), CALLS.values(), ids=CALLS.keys())
def test_the_trace_refuses_what_the_kernel_refuses(
    call: Callable[..., Any], x: Tensor, w: Tensor, other: torch.dtype
) -> None:
    def traced(x: Tensor, w: Tensor) -> Any:
        return call(x, w)

    for pair in ((x.to(other), w), (x, w.to(other))):
        try:
            call(*pair)
        except RuntimeError:
            with pytest.raises((fz.TraceError, RuntimeError)):
                fz.trace(traced)(*pair)
        else:
            assert fz.trace(traced)(*pair).trace.inputs
    assert fz.trace(traced)(x, w).trace.inputs


INDICES: dict[str, Callable[[Tensor], Any]] = {
    "cross_entropy": lambda index: F.cross_entropy(X, index),
    "cross_entropy of images": lambda index: F.cross_entropy(B.view(1, 4, 2, 4), index.view(1, 1, 4).repeat(1, 2, 1)),
    "nll_loss": lambda index: F.nll_loss(X, index),
    "multi_margin_loss": lambda index: F.multi_margin_loss(X, index),
    "multilabel_margin_loss": lambda index: F.multilabel_margin_loss(V, index),
    "index_add": lambda index: X.index_add(0, index, W),
    "index_copy": lambda index: X.index_copy(0, index, W),
    "index_fill": lambda index: X.index_fill(0, index, 1.0),
    "index_select": lambda index: X.index_select(0, index),
    "index_reduce": lambda index: X.index_reduce(0, index, W, "amax"),
    "put": lambda index: X.put(index, V),
    "gather": lambda index: V.gather(0, index),
    "embedding": lambda index: F.embedding(index, W),
}


@pytest.mark.filterwarnings("ignore:index_reduce")
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float32])
@pytest.mark.parametrize("call", INDICES.values(), ids=INDICES.keys())
def test_so_with_indices(call: Callable[[Tensor], Any], dtype: torch.dtype) -> None:
    def traced(index: Tensor) -> Any:
        return call(index)

    index = WORDS.to(dtype)
    try:
        call(index)
    except (RuntimeError, IndexError):
        with pytest.raises((fz.TraceError, RuntimeError, IndexError)):
            fz.trace(traced)(index)
    else:
        assert fz.trace(traced)(index).trace.inputs


def test_the_message_names_operator_operands_line_and_way_out() -> None:
    def loss(params: Any, x: Tensor) -> Tensor:
        return F.linear(x, params["w"]).sum()  # the line

    state = fz.init({"w": X}, fz.sgd(0.1), fz.make_mesh("cpu"), policy="fp32")
    step = fz.train_step(loss, microbatches=2)
    with pytest.raises(fz.TraceError, match=r"one dtype, and got self float64\(2, 4\), mat2 float32\(4, 4\).*") as info:
        step(state, X.double())
    assert "# the line" in str(info.value)
    assert "Cast one of them" in str(info.value)
    assert_alive(state)


def assert_alive(state: fz.State) -> None:
    assert torch.equal(fz.gather(state.params)["w"], X)


@pytest.mark.parametrize("name", sorted({*_ALIKE, *_NORMS, *_INDICES}))
def test_names_are_those_of_the_schemas(name: str) -> None:
    packet = getattr(torch.ops.aten, name)
    schemas = [getattr(packet, overload)._schema for overload in packet.overloads()]
    known = {argument.name for schema in schemas for argument in schema.arguments}
    asked = {*_ALIKE.get(name, ()), *_NORMS.get(name, ()), *(_INDICES[name][:1] if name in _INDICES else ())}
    assert asked <= known
