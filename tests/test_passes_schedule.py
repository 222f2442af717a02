"""The pass `schedule`: never worse than what came in, nor than rules of placement that one would write by hand."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from gpt import GPT, PRESETS
from hypothesis import given, settings
from torch import Tensor, fx, nn

import fzero as fz
from fzero.marks import marks_of
from fzero.program.graph.aliases import alias_of
from fzero.program.graph.collectives import WAIT
from fzero.program.graph.gathers import from_pieces
from fzero.program.graph.trace import Trace
from fzero.program.graph.values import Values, precedences
from fzero.program.lower.python import lower_graph
from fzero.program.options import Options
from fzero.program.passes.bucket import bucket
from fzero.program.passes.dead import dead
from fzero.program.passes.recompute import recompute
from fzero.program.passes.schedule import schedule
from fzero.program.pipeline import applied, run_passes
from fzero.program.report.memory import inside_loops, live_bytes
from tests.programs import after, misplaced, raw, simulated, text
from tests.small import assert_same_bits, copied
from tests.test_program_trace import targets, traced

# ---------------------------------------------------------------------------------------------------------
# The oracle


def placed_by_hand(trace: Trace) -> list[fx.Node]:
    """The order of the program, with a few rules.

    A gather and a view come right before their first consumer, small things that hang on nothing come first, and a
    reduction with all that follows to the update comes right behind its gradient.
    """
    graph, values = trace.module.graph, Values.of(trace)
    before = precedences(graph, values)
    fixed = values.overwritten()
    cheap = from_pieces(graph, fixed)
    nodes = list(graph.nodes)
    lazy = {n for n in nodes if n.op == "get_attr" or n in cheap or (alias_of(n) is not None and n not in fixed)}
    lazy -= {n for n in lazy if n.target is WAIT and n not in cheap}
    behind = {n for n in nodes if marks_of(n).role in ("reduce", "update") and n not in lazy}
    order: dict[fx.Node, None] = {n: None for n in nodes if n.op == "placeholder"}

    def needs(node: fx.Node) -> list[fx.Node]:
        return [n for n in (*node.all_input_nodes, *before.get(node, ())) if n not in order]

    def pull(node: fx.Node) -> None:
        for source in needs(node):
            assert source in lazy, f"{node} is emitted in front of {source}"
            pull(source)
        order[node] = None

    def ready(node: fx.Node) -> bool:
        return all(source in lazy and ready(source) for source in needs(node))

    def follow() -> None:
        found = True
        while found:
            found = False
            for node in [n for n in nodes if n in behind and n not in order]:
                if ready(node):
                    pull(node)
                    found = True

    for node in nodes:
        small = all(values.size[b] <= 256 for b in (*values.makes.get(node, ()), *values.reads.get(node, ())))
        if small and node.op == "call_function" and node not in lazy and ready(node):
            pull(node)
    for node in nodes:
        if node not in lazy and node not in order and node.op != "output":
            pull(node)
            follow()
    for node in nodes:
        if node not in order and node.op != "output":
            pull(node)
    order[graph.output_node()] = None
    return list(order)


def peak(trace: Trace, order: list[fx.Node] | None = None) -> int:
    values = Values.of(trace)
    return max(live_bytes(order or list(trace.module.graph.nodes), values, inside_loops(trace)))


def check(trace: Trace) -> None:
    """The schedule of a trace, and of the loop bodies in it, is valid, and no worse than the others."""
    for body in trace.bodies.values():
        check(body)
    scheduled = schedule(trace, Options())
    assert_valid(trace, scheduled)
    assert peak(scheduled) <= peak(trace)
    assert peak(scheduled) <= peak(trace, placed_by_hand(trace))


def assert_valid(trace: Trace, scheduled: Trace) -> None:
    """The same operations, each behind what it needs and what it must not overtake."""
    assert not list(misplaced(scheduled))
    assert sorted(targets(trace.module)) == sorted(targets(scheduled.module))
    position = {node.name: i for i, node in enumerate(scheduled.module.graph.nodes)}
    values = Values.of(trace)
    for node, sources in precedences(trace.module.graph, values).items():
        for source in sources:
            # A view may come later than a write to what it is a view of: it reads nothing.
            is_view = alias_of(source) is not None and source.target is not WAIT and source not in values.writes
            assert is_view or position[source.name] < position[node.name], f"{node} overtakes {source}"


# ---------------------------------------------------------------------------------------------------------
# Training steps


# As narrow as "tiny"; a block more, so that two blocks are less than the whole, or one less.
CONFIGS = PRESETS | {name: dataclasses.replace(PRESETS["tiny"], depth=d) for name, d in (("deep", 3), ("flat", 1))}


def gpt_step(
    preset: str, ranks: int, stage: int, *, clip: bool = False, microbatches: int = 1, rows: int = 2, **options: Any
) -> tuple[fz.State, Any, Tensor]:
    make = lambda: GPT(CONFIGS[preset])  # noqa: E731
    apply, _ = fz.functional(make)
    optimizer: Any = fz.chain(fz.clip_by_global_norm(1.0), fz.adamw(1e-3)) if clip else fz.adamw(1e-3)
    state = fz.init(make, optimizer, simulated(ranks), fz.zero(stage), policy="bf16")

    def loss(params: Any, batch: Tensor) -> Tensor:
        return F.cross_entropy(apply(params, batch[:, :-1]).flatten(0, 1).float(), batch[:, 1:].flatten())

    step = fz.train_step(loss, microbatches=microbatches, **options)
    return state, step, torch.zeros(rows * microbatches, 33, dtype=torch.int64)


def bucketed(step: Any, *args: Any, **options: Any) -> Trace:
    return after("bucket", raw(step, *args), Options(**options))


def cases(preset: str) -> list[Any]:
    fast = {("tiny", 2, 0, True, "none", 1), ("tiny", 8, 3, True, "block", 1)}
    fast |= {("tiny", 8, 1, False, "none", 2)}
    found = []
    for ranks in (2, 8):
        for stage in (0, 1, 3):
            for clip in (False, True):
                for remat in ("none", "block"):
                    for microbatches in (1, 2):
                        case = (preset, ranks, stage, clip, remat, microbatches)
                        found.append(pytest.param(*case, marks=() if case in fast else pytest.mark.slow))
    return found


@pytest.mark.parametrize(
    ("preset", "ranks", "stage", "clip", "remat", "microbatches"), [*cases("tiny"), *cases("small")]
)
def test_a_step_of_a_gpt(preset: str, ranks: int, stage: int, clip: bool, remat: str, microbatches: int) -> None:
    state, step, batch = gpt_step(preset, ranks, stage, clip=clip, microbatches=microbatches)
    check(bucketed(step, state, batch, remat=remat))


def test_an_mlp() -> None:
    make = lambda: nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)))  # noqa: E731
    apply, _ = fz.functional(make)
    state = fz.init(make, fz.adamw(1e-3), simulated(4), policy="fp32")
    step = fz.train_step(lambda p, x: apply(p, x).square().mean())
    check(bucketed(step, state, torch.zeros(8, 64)))


def test_two_models_in_one_step() -> None:
    make = lambda: nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(3)))  # noqa: E731
    apply, _ = fz.functional(make)
    one, two = (fz.init(make, fz.adamw(1e-3), simulated(4), policy="bf16", seed=seed) for seed in (1, 2))

    @fz.jit(donate=(0, 1))
    def step(one: fz.State, two: fz.State, x: Tensor) -> Any:
        y, pull_one = fz.vjp(apply, one, x)
        loss, grads_two = fz.value_and_grad(lambda p: apply(p, y).float().square().mean())(two)
        g_one, _ = pull_one(y)
        return fz.apply_gradients(one, g_one)[0], fz.apply_gradients(two, grads_two)[0], loss

    check(bucketed(step, one, two, torch.zeros(8, 64, dtype=torch.bfloat16), remat="block"))


def kept_and_overwritten(x: Tensor, y: Tensor) -> Any:
    """Copies and views of memory that is overwritten, read before and after."""
    old, view = x.clone(), x[2:]
    total = view.exp().sum()
    x.add_(y)
    big = torch.cat([y, y, y]) * 2
    x[1:].mul_(3.0)
    return old * total, view * big.sum(), x.double()


def test_a_function_that_writes() -> None:
    x, y = torch.linspace(0, 1, 4096), torch.linspace(2, 3, 4096)
    trace = traced(kept_and_overwritten, x, y)
    check(trace)
    mine, theirs = x.clone(), x.clone()
    found = lower_graph(schedule(trace, Options()).module)([mine, y])
    assert_same_bits((*found, mine), (*kept_and_overwritten(theirs, y), theirs))


def copy_behind_a_write(x: Tensor, y: Tensor) -> Any:
    """To copy as late as possible would save memory, and be wrong."""
    old = x.to(torch.float64)
    x.mul_(2.0)
    big = torch.outer(y, y).exp()
    return big.sum() + x.sum(), old


def test_a_copy_does_not_go_behind_a_write_to_what_it_copies() -> None:
    x, y = torch.linspace(0, 1, 4096), torch.linspace(0, 1, 64)
    trace = traced(copy_behind_a_write, x, y)
    check(trace)
    mine, theirs = x.clone(), x.clone()
    found = lower_graph(schedule(trace, Options()).module)([mine, y])
    assert_same_bits((*found, mine), (*copy_behind_a_write(theirs, y), theirs))


def test_updates_stay_in_place_where_the_old_parameters_are_read_late() -> None:
    """What reads gathered parameters for a metric, in program order before the update, must not go behind it."""

    def step(state: fz.State, x: Tensor) -> Any:
        size = fz.call(lambda p: torch.outer(p["w"][0], p["w"][0]).exp().sum(), state)
        grads = fz.grad(lambda p: (x @ p["w"]).square().sum())(state)
        return fz.apply_gradients(state, grads)[0], size

    state = fz.init({"w": torch.zeros(64, 64)}, fz.adamw(1e-3), simulated(2), policy="fp32")
    trace = bucketed(fz.jit(step, donate=0), state, torch.zeros(8, 64))
    scheduled = schedule(trace, Options())
    assert_valid(trace, scheduled)
    assert len(Values.of(scheduled).in_place) == len(Values.of(trace).in_place) > 0


# ---------------------------------------------------------------------------------------------------------
# Gradients never live all at once


def gradient_bytes(trace: Trace) -> int:
    """The most bytes of gradients, full and reduced, that are alive at once."""
    values = Values.of(trace)
    order = list(trace.module.graph.nodes)
    reducing = [n for n in order if marks_of(n).role == "reduce"]
    inside = set(reducing)
    full = {b for n in reducing for source in n.all_input_nodes if source not in inside for b in values.holds[source]}
    own = full | {b for n in reducing for b in values.makes[n]}
    values.size = [size if b in own else 0 for b, size in enumerate(values.size)]
    return max(live_bytes(order, values))


def block_bytes(state: fz.State, itemsize: int = 2) -> tuple[int, int]:
    """The bytes of the gradient of the largest block, and of a rank's pieces of all of them."""
    sizes: dict[str, int] = {}
    pieces = 0
    for path, piece, shape in zip(state.params.paths, state.params.pieces, state.params.shapes, strict=True):
        assert piece is not None
        sizes[".".join(path.split(".")[:2])] = sizes.get(".".join(path.split(".")[:2]), 0) + torch.Size(shape).numel()
        pieces += piece.numel()
    return itemsize * max(sizes.values()), itemsize * pieces


@pytest.mark.parametrize(
    ("preset", "ranks", "remat"),
    [
        ("deep", 8, "block"),
        *(
            pytest.param("small", *case, marks=pytest.mark.slow)
            for case in itertools.product((2, 8), ("none", "block"))
        ),
    ],
)
def test_gradients_of_two_blocks_at_most_are_alive_at_once(preset: str, ranks: int, remat: str) -> None:
    peaks = []
    for clip in (False, True):
        state, step, batch = gpt_step(preset, ranks, 3, clip=clip)
        trace, _ = run_passes(raw(step, state, batch), Options(remat=remat, overlap=None))  # type: ignore[arg-type]
        peaks.append(gradient_bytes(trace))
    block, pieces = block_bytes(state)
    assert peaks[0] <= 2 * block
    assert peaks[1] <= 2 * block + pieces


# ---------------------------------------------------------------------------------------------------------
# Random programs


SIZE = 4
UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "double": lambda x: x * 2,
    "clone": torch.clone,
    "copy": lambda x: x.to(torch.float64).to(torch.float32),
    "transposed": lambda x: x.t(),
    "rows": lambda x: x[:2].repeat(2, 1),
    "flat": lambda x: x.reshape(SIZE, SIZE),
    "upper": lambda x: x.view(2, 2, SIZE).select(0, 1),
    "halves": lambda x: torch.cat(x.split(2)[::-1]),
}
BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": lambda x, y: x + y,
    "times": lambda x, y: x * y,
    "mm": lambda x, y: x @ y,
    "add_": lambda x, y: x.add_(y),
    "copy_": lambda x, y: x.copy_(y),
    "row add_": lambda x, y: x[1:].add_(y[1:]),
}
ops = st.tuples(st.sampled_from([*UNARY, *BINARY]), st.integers(0, 20), st.integers(0, 20))


def program(lines: list[tuple[str, int, int]], outputs: list[int]) -> Callable[..., list[Tensor]]:
    """A function of two matrices from a random list of operations."""

    def run(*inputs: Tensor) -> list[Tensor]:
        pool = list(inputs)
        for name, i, j in lines:
            a, b = pool[i % len(pool)], pool[j % len(pool)]
            result = UNARY[name](a) if name in UNARY else BINARY[name](a, b)
            if result.shape == (SIZE, SIZE):
                pool.append(result)
        return [pool[k % len(pool)] for k in outputs]

    return run


@settings(max_examples=40)
@given(st.lists(ops, min_size=3, max_size=25), st.lists(st.integers(0, 30), min_size=1, max_size=3), st.integers(0, 3))
def test_random_programs_keep_their_meaning(lines: list[Any], outputs: list[int], donated: int) -> None:
    f = program(lines, outputs)
    x, y = torch.rand(SIZE, SIZE), torch.rand(SIZE, SIZE)
    donated_inputs = frozenset(i for i in (0, 1) if donated >> i & 1)
    trace = dead(traced(f, x, y, donated=donated_inputs), Options())
    scheduled = schedule(trace, Options())
    assert_valid(trace, scheduled)
    assert peak(scheduled) <= peak(trace)
    theirs = [x.clone(), y.clone()]
    expected = f(*theirs)
    for found in (scheduled, run_passes(trace, Options())[0]):
        mine = [x.clone(), y.clone()]
        results = lower_graph(found.module)(list(mine))
        kept = [i for i in (0, 1) if i not in donated_inputs]
        assert_same_bits((results, [mine[i] for i in kept]), (expected, [theirs[i] for i in kept]))


# ---------------------------------------------------------------------------------------------------------


def test_the_pass_is_pure_and_deterministic() -> None:
    state, step, batch = gpt_step("flat", 2, 3, microbatches=2)
    trace = bucketed(step, state, batch)
    before = text(trace)
    once, again = applied(schedule, trace, Options()), applied(schedule, trace, Options())
    assert text(trace) == before
    assert text(once) == text(again)
    assert peak(applied(schedule, once, Options())) <= peak(once)


def test_a_loop_counts_with_what_it_has_inside() -> None:
    def step(w: Tensor, x: Tensor) -> Any:
        late = torch.outer(w, w)
        _, grads = fz.accumulate(fz.value_and_grad(lambda w, x: torch.outer(x.sum(0) * w, w).exp().sum()), 2)(w, x)
        return grads, late.sum()

    trace = applied(recompute, dead(traced(step, torch.ones(64), torch.ones(4, 64)), Options()), Options())
    trace = applied(bucket, trace, Options())
    scheduled = schedule(trace, Options())
    (loop,) = inside_loops(scheduled)
    names = [str(n.target) for n in scheduled.module.graph.nodes]
    assert inside_loops(scheduled)[loop] > 64 * 64 * 4
    assert peak(scheduled) <= peak(trace)
    position = {node: i for i, node in enumerate(scheduled.module.graph.nodes)}
    assert names.index("aten.sum.default") < position[loop], "what is large is gone before the loop runs"
    inputs = [torch.rand(64), torch.rand(4, 64)]
    found = lower_graph(scheduled.module, scheduled.bodies)(copied(inputs))
    grads, total = step(*inputs)
    assert_same_bits(found, [grads, total])
