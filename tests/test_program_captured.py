"""Writes to tensors that a traced function closes over are refused, at the line that writes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fzero as fz
from fzero.program.graph.captured import check_captured
from fzero.program.graph.trace import graph_of
from tests.small import assert_same_bits, copied

A = torch.arange(6.0)
BUFFER = torch.zeros(6)
LAYER = nn.BatchNorm1d(6)


def sliced(x: Tensor) -> Tensor:
    BUFFER[1:3] = x[:2]  # the line
    return x + 1


def by_data(x: Tensor) -> Tensor:
    LAYER.running_mean.data.copy_(x)  # type: ignore[union-attr]  # the line
    return x + 1


def in_a_split(x: Tensor) -> Tensor:
    _, second = BUFFER.split(3)
    second.zero_()  # the line
    return x + 1


MEAN, VAR = torch.zeros(6), torch.ones(6)
NORM = torch.native_batch_norm


def normed(x: Tensor, mean: Tensor) -> Tensor:
    return nn.functional.batch_norm(x.expand(3, 6), mean, VAR, training=True)  # the line


def as_a_view(x: Tensor) -> Tensor:
    torch.ops.aten._unsafe_view(BUFFER, [2, 3]).zero_()  # the line
    return x + 1


def over_several_views(x: Tensor) -> Tensor:
    view = BUFFER.view(2, 3).t()[1:]
    torch.add(view, 1.0, out=view)  # the line
    return x + 1


WRITES: dict[str, Callable[[Tensor], Any]] = {
    "in place": lambda x: BUFFER.add_(x),  # the line
    "an augmented assignment": lambda x: BUFFER.__iadd__(x),  # the line
    "an index": lambda x: BUFFER.index_put_((torch.tensor([1]),), x[:1]),  # the line
    "a draw with a key": lambda x: fz.keyed(lambda y: BUFFER.normal_() + y)(7, x),  # the line
    "a module's buffer": lambda x: LAYER(x.expand(3, 6)),  # the line
    "a batch norm": lambda x: nn.functional.batch_norm(x.expand(3, 6), MEAN, VAR, training=True),  # the line
    "a batch norm of a view": lambda x: normed(x, MEAN.view(2, 3).view(6)),  # the line
    "an instance norm": lambda x: nn.functional.instance_norm(x.expand(2, 6, 6), MEAN, VAR),  # the line
    "batch norm's own operator": lambda x: NORM(x.expand(3, 6), None, None, MEAN, VAR, True, 0.1, 1e-5),  # the line
    "statistics alone": lambda x: torch.batch_norm_update_stats(x.expand(3, 6), MEAN, VAR, 0.1),  # the line
    "a view that does not say so": as_a_view,
    "many tensors": lambda x: torch._foreach_add_([x.clone(), BUFFER], 1.0),  # the line
    "a slice": sliced,
    "the data of a buffer": by_data,
    "a part of it": in_a_split,
    "a view of a view": over_several_views,
}


@pytest.mark.parametrize("f", WRITES.values(), ids=WRITES.keys())
def test_a_write_to_what_is_closed_over_is_refused_at_its_line(f: Callable[[Tensor], Any]) -> None:
    tensors = (BUFFER, MEAN, VAR, LAYER.running_mean, LAYER.running_var)
    before = copied(tensors)
    with pytest.raises(fz.TraceError, match=r"that the function closes over, at\n.*\n.*# the line") as info:
        fz.jit(f)(A)
    assert __file__ in str(info.value)
    assert "pass the tensor as an argument and return the new value" in str(info.value)
    assert_same_bits(tensors, before)


MAY: dict[str, Callable[[Tensor], Any]] = {
    "to read it": lambda x: x + BUFFER,
    "to write to a copy": lambda x: BUFFER.clone().add_(x),
    "to write to what is made of it": lambda x: (BUFFER + 1).mul_(x),
    "to write to a copy of a view": lambda x: BUFFER[:3].clone().zero_() + x[:3],
    "to write to an own tensor": lambda x: torch.zeros(6).add_(x),
    "to write to a constant made inside": lambda x: torch.tensor([1.0, 2.0]).add_(x[0]),
    "to use a batch norm in evaluation": lambda x: nn.functional.batch_norm(x.expand(3, 6), MEAN, VAR),
    "to use a module that only reads": lambda x: nn.functional.linear(x.view(1, 6), torch.eye(6)),
}


@pytest.mark.parametrize("f", MAY.values(), ids=MAY.keys())
def test_a_function_may(f: Callable[[Tensor], Any]) -> None:
    jitted = fz.jit(f)
    for _ in range(2):
        assert_same_bits(jitted(A), f(A))


def test_a_write_in_a_loop_body_is_refused() -> None:
    def counted(w: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        BUFFER.add_(1)
        return (w * x).sum(), w * x

    with pytest.raises(fz.TraceError, match=r"aten\.add_\.Tensor writes to a tensor of float32\(6,\)"):
        fz.trace(fz.accumulate(counted, 2))(A, torch.ones(2, 6))


def test_a_graph_whose_lines_are_not_known_is_checked_too() -> None:
    module = graph_of(lambda x: [BUFFER.add_(x)], [A])
    for node in module.graph.nodes:
        node.meta.pop("custom", None)
    with pytest.raises(fz.TraceError, match="at a line that is not known"):
        check_captured(module)


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "itself": lambda t: t,
    "unsqueeze": lambda t: t[:, None],
    "view": lambda t: t.view(2, 3),
    "slice": lambda t: t[1:4],
    "select of a view": lambda t: t.view(2, 3)[1],
    "transpose": lambda t: t.view(2, 3).T,
    "split": lambda t: t.split(4)[0],
    "unbind": lambda t: t.view(2, 3).unbind()[1],
    "detach": lambda t: t.detach(),
    "diagonal": lambda t: t[:4].view(2, 2).diagonal(),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_what_is_closed_over_is_neither_written_nor_given_out(
    view: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> None:
    held = torch.arange(6).to(dtype)
    before, x = held.clone(), torch.randn(())
    jitted = fz.jit(lambda x: (x * (1 + view(held)), view(held)))
    for _ in range(2):
        sums, given = jitted(x)
        assert_same_bits((sums, given), (x * (1 + view(before)), view(before)))
        given.zero_()
        assert torch.equal(held, before)
