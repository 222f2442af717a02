"""`partition`: what a forward saves for its backward, and what is made again."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fzero as fz
from fzero._torch import c10d
from fzero.marks import marks_of
from fzero.program.graph.partition import Halves, cotangent_like, partition
from fzero.program.graph.trace import trace_flat


def halves_of(f: Callable[..., Tensor], *examples: Tensor, by_reference: tuple[int, ...] = ()) -> Halves:
    """Cut the joint trace of a function of tensors with one output."""

    def joint(*tensors: Tensor) -> Any:
        output, pullback = fz.vjp(f, *tensors)
        return output, None, pullback(cotangent_like(output, 0))

    _, _, hollow = fz.tree.split((examples, {}))
    paths = [f"x{i}" for i in range(len(examples))]
    return partition(trace_flat(joint, examples, hollow, paths=paths), by_reference)


def twice_exp(w: Tensor, x: Tensor) -> Tensor:
    return torch.exp(w * x).sum()


def transposed(w: Tensor, x: Tensor) -> Tensor:
    return torch.tanh(x @ w.t()).t().reshape(-1)


def chunked(w: Tensor, x: Tensor) -> Tensor:
    a, b = torch.exp(w * x).chunk(2)
    return a * b


def normalized(w: Tensor, x: Tensor) -> Tensor:
    return nn.functional.layer_norm(x * w, (4,))


# What is saved of each, as (what made it, shape).
SAVED: dict[str, tuple[Callable[..., Tensor], list[tuple[str, tuple[int, ...]]]]] = {
    "an elementwise product reads both factors": (
        twice_exp, [("argument x0", (4, 4)), ("argument x1", (4, 4)), ("exp", (4, 4))],
    ),
    "of a view, what it is a view of": (
        transposed, [("argument x0", (4, 4)), ("argument x1", (4, 4)), ("tanh", (4, 4))],
    ),
    "of two views of one value, the value, once": (
        chunked, [("argument x0", (4, 4)), ("argument x1", (4, 4)), ("exp", (4, 4))],
    ),
    "elements of a tuple that only the backward reads": (
        normalized,
        [("argument x0", (4, 4)), ("argument x1", (4, 4)), ("mul", (4, 4)),
         ("native_layer_norm", (4, 1)), ("native_layer_norm", (4, 1))],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SAVED)
def test_what_is_saved(name: str) -> None:
    f, expected = SAVED[name]
    saved = halves_of(f, torch.ones(4, 4), torch.ones(4, 4)).saved
    assert [(s.source, s.shape) for s in saved] == expected
    assert all(s.nbytes == 4 * math.prod(s.shape) for s in saved)
    assert all(s.line is None or s.line[0] == __file__ for s in saved)


def test_inputs_by_reference_are_not_saved_nor_what_is_a_cast_or_view_of_them() -> None:
    def cast(w: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(x @ w.double().t())

    halves = halves_of(cast, torch.ones(3, 4), torch.ones(2, 4).double(), by_reference=(0,))
    assert halves.references == (0,)
    assert [s.source for s in halves.saved] == ["argument x1", "tanh"]
    assert [s.kind for s in halves.sources] == ["input", "output"]
    targets = [str(node.target) for node in halves.backward.module.graph.nodes]
    assert "aten._to_copy.default" in targets  # the weight's cast is made again

    saves = halves_of(cast, torch.ones(3, 4), torch.ones(2, 4).double())
    assert [s.source for s in saves.saved] == ["argument x1", "_to_copy", "tanh"]


def test_the_halves_compute_what_the_whole_does() -> None:
    w, x = torch.randn(4, 4), torch.randn(4, 4)
    for f, _ in SAVED.values():
        halves = halves_of(f, w, x)
        output, pullback = fz.vjp(f, w, x)
        bar = torch.randn(output.shape)
        found, _, extras = halves.forward.output.fill(_run(halves.forward, [w, x]))  # type: ignore[union-attr]
        sources = {"input": [w, x], "output": [found], "extra": extras}
        saved = [sources[s.kind][s.index] for s in halves.sources]
        assert torch.equal(found, output)
        for gradient, expected in zip(_run(halves.backward, [*saved, bar]), pullback(bar), strict=True):
            assert torch.equal(gradient, expected)


def _run(trace: Any, inputs: list[Tensor]) -> list[Tensor]:
    results: list[Tensor] = torch.fx.Interpreter(trace.module).run(*inputs)
    return results


def test_a_gathered_leaf_is_gathered_again() -> None:
    apply, params = fz.functional(nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 8)))
    state = fz.init(params, fz.adamw(1e-3), fz.make_mesh("cpu", data=4, simulate=True), policy="bf16")
    x = torch.empty(2, 8, dtype=torch.bfloat16)
    forward, backward = fz.split_vjp(apply)

    def gathered(f: Callable[..., Any], *arguments: Any) -> Counter[str]:
        """How often each leaf is gathered, without what all-reduces gather."""
        graph = fz.trace(f, bucket=0)(*arguments).trace.module.graph
        found = [n for n in graph.nodes if n.target == c10d.all_gather_into_tensor.default]
        return Counter(str(marks_of(n).leaf) for n in found if marks_of(n).role == "gather")

    def both(state: fz.State, x: Tensor) -> Any:
        out, residuals = forward(state, x)
        return backward(residuals, torch.ones_like(out))

    assert gathered(forward, state, x) == {"0.weight": 1, "0.bias": 1, "2.weight": 1}
    # No bias is read by the backward, and the last one is too small to be cut.
    assert gathered(both, state, x) == {"0.weight": 2, "0.bias": 1, "2.weight": 2}
    assert not [s for s in fz.residuals(apply)(state, x) if math.prod(s.shape) >= 8 * 64]
