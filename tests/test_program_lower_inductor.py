"""Lowering through Inductor: the same step, its collectives and its updates in place as the passes left them."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import fzero as fz
from fzero._torch import TorchDispatchMode
from fzero.program.graph.collectives import GATHERS
from fzero.program.graph.loop import run_loop
from fzero.program.graph.trace import Trace
from fzero.program.lower import inductor as lower_inductor
from fzero.program.lower.choose import lowered
from fzero.program.lower.python import lower_graph
from fzero.program.options import Options
from tests import world

SCALE = torch.tensor([2.0, 3.0])


def update(state: list[Tensor], x: Tensor) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """A leaf updated in place, one that stays, a metric, an input handed out, and a tensor from outside."""
    return [state[0] + torch.tanh(x) * SCALE, state[1]], (x * SCALE).exp().sum(), x, torch.full((2,), 7.0)


class Operators(TorchDispatchMode):
    """Notes the operators that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


def test_a_compiled_step(caplog: pytest.LogCaptureFixture) -> None:
    x = torch.tensor([0.5, -1.0])
    trace = fz.jit(update, donate=(0,)).trace([torch.ones(2), torch.zeros(3)], x).trace
    program, scale = lowered(trace, Options(lower="inductor")), SCALE.clone()
    for i in range(3):
        SCALE.copy_(scale + i)  # what is closed over is read where it stands
        state, kept = [torch.ones(2), torch.zeros(3)], x.clone()
        expected = fz.tree.leaves(update(state, x))
        places = [t.data_ptr() for t in state]
        with torch.no_grad(), Operators() as operators:
            results = program([*state, x])
        assert not [op for op in operators.seen if "tanh" in str(op)], "fused; and compiled out of sight of modes"
        assert [t.data_ptr() for t in results[:2]] == places, "donated memory is updated in place"
        torch.testing.assert_close(results, expected)
        assert torch.equal(x, kept)
        handed_out = {t.data_ptr() for t in results}
        assert len(handed_out) == 5 and not handed_out & {x.data_ptr(), SCALE.data_ptr()}
    SCALE.copy_(scale)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_the_trace_stays_as_it_is_and_nothing_compiles_before_the_first_call(monkeypatch: Any) -> None:
    def broken(*_: Any) -> Any:
        raise OSError("no compiler")

    monkeypatch.setattr(lower_inductor, "standalone_compile_static", broken)
    trace = fz.trace(update)([torch.ones(2), torch.zeros(3)], torch.ones(2)).trace
    before = str(trace.module.graph)
    program = lowered(trace, Options(lower="inductor"))
    with pytest.raises(RuntimeError, match=r'could not compile the program: OSError: no compiler\n.*lower="graph"'):
        program([torch.ones(2), torch.zeros(3), torch.ones(2)])
    assert str(trace.module.graph) == before


def test_a_program_without_results_is_lowered() -> None:
    assert fz.jit(lambda x: None, lower="inductor")(torch.ones(2)) is None


def make_mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))


APPLY, _ = fz.functional(make_mlp)


def loss_fn(params: Any, x: Tensor) -> Tensor:
    return (APPLY(params, x).float() - 1).square().mean()


def collectives(trace: Trace) -> list[str]:
    """The collectives of one run, those in loop bodies once a round."""
    found: list[str] = []
    for node in trace.module.graph.nodes:
        if node.target is run_loop:
            body, _, index, *_ = node.args
            found += collectives(trace.bodies[body.target]) * index.meta["val"].shape[0]
        elif str(node.target).startswith("_c10d_functional."):
            found.append(str(node.target))
    return found


def is_gathered_again(trace: Trace) -> bool:
    """Whether some piece is gathered twice in one pass through a graph."""
    graphs = [trace.module.graph, *(body.module.graph for body in trace.bodies.values())]
    for graph in graphs:
        pieces = [piece for node in graph.nodes if node.target in GATHERS for piece in node.all_input_nodes]
        if len(pieces) > len(set(pieces)):
            return True
    return False


def both_lowerings(zero: int, microbatches: int, options: dict[str, Any]) -> None:
    """Run a training step lowered both ways and compare what they do to the same state."""
    state = fz.init(make_mlp, fz.chain(fz.clip_by_global_norm(1.0), fz.adamw(1e-2)), layout=fz.zero(zero))
    batch = torch.linspace(-1, 1, 8 * 16, dtype=torch.bfloat16).view(8, 16)
    trace = fz.train_step(loss_fn, microbatches=microbatches, **options).trace(state, batch).trace
    assert is_gathered_again(trace) == (zero == 3 and dist.is_initialized())
    inputs = [*fz.tree.leaves(state), batch]
    results, places, issued = [], [], []
    for run in (lowered(trace, Options(lower="inductor")), lower_graph(trace.module, trace.bodies)):
        given = [x.clone() for x in inputs]
        memory = {x.data_ptr(): (i, x) for i, x in enumerate(given)}  # held, so that nothing new takes their places
        kept = [x for i, x in enumerate(given) if i not in trace.donated]
        with torch.no_grad():
            run(given.copy())  # compiles
            given[:] = [x.copy_(old) for x, old in zip(given, inputs, strict=True)]
            with Operators() as operators:
                results.append(run(given))
        assert not given
        assert all(torch.equal(x, inputs[-1]) for x in kept)
        places.append([memory[x.data_ptr()][0] if x.data_ptr() in memory else None for x in results[-1]])
        issued.append([str(op) for op in operators.seen if op.namespace == "_c10d_functional"])
    torch.testing.assert_close(results[0], results[1], rtol=2e-2, atol=1e-3)  # bfloat16, rounded elsewhere
    assert places[0] == places[1] and any(place is not None for place in places[0])
    assert issued[0] == issued[1] == collectives(trace), "each collective, in the order of the passes"


# Ranks, ZeRO stage, micro-batches, options.
CASES: list[tuple[int, int, int, dict[str, Any]]] = [
    (1, 3, 1, {}),
    (1, 3, 2, {}),
    (2, 0, 1, {}),
    (2, 3, 1, {}),
    (2, 3, 1, {"remat": "block", "bucket": 0}),
    (2, 3, 2, {}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("size", "zero", "microbatches", "options"), CASES)
def test_training_steps(size: int, zero: int, microbatches: int, options: dict[str, Any]) -> None:
    world.run(both_lowerings, zero, microbatches, options, size=size, deadline=280.0)
