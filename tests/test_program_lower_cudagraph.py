"""Lowering to a CUDA graph: what is recorded and what is copied, on a recorder for the CPU and on CUDA itself."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fzero as fz
from fzero._torch import FakeTensorMode, storage_id
from fzero.program.donation import run_donating
from fzero.program.lower import cudagraph
from fzero.program.lower.cudagraph import MOST, Recorder, Replayed, lower_cudagraph, replayed_if_possible
from fzero.program.lower.python import Lowered, lower_graph
from tests.small import assert_same_bits, copied, dot, parameters


class OnCPU(Recorder):
    """Replays as CUDA does: the same memory in, the same memory out, and nothing runs while it records."""

    def __init__(self) -> None:
        self.lock = threading.Lock()

    def warm_up(self, run: Lowered, inputs: list[Tensor]) -> list[Tensor]:
        return run(inputs)

    def record(self, run: Lowered, inputs: list[Tensor]) -> tuple[Callable[[], Any], list[Tensor]]:
        stand_ins = [x.clone() for x in inputs]
        position = {storage_id(x): i for i, x in enumerate(stand_ins)}
        outputs = [inputs[position[s]] if (s := storage_id(x)) in position else x for x in run(list(stand_ins))]

        def launch() -> None:
            for x, new in zip(outputs, run(list(inputs)), strict=True):
                if storage_id(x) != storage_id(new):
                    x.copy_(new)

        return launch, outputs


def always(recorder: Recorder) -> Callable[[torch.device], Recorder]:
    return lambda device: recorder


State = list[Tensor]


def update(state: State, batch: Tensor) -> tuple[State, Tensor]:
    """A weight and a momentum that are updated in place, a count that is not, and a metric."""
    weight, momentum, step = state
    momentum = momentum + batch
    weight = weight + momentum
    return [weight, momentum, step + 1], (weight * batch).sum() + step


class Steps:
    """`update` as a jitted function would run it, on the recorder for the CPU."""

    def __init__(self) -> None:
        trace = fz.jit(update, donate=(0,)).trace(start(), torch.ones(3)).trace
        self.program = Replayed(lower_graph(trace.module), trace.donated, recorder=always(OnCPU()))

    def __call__(self, state: State, batch: Tensor) -> tuple[State, Tensor]:
        *new, metric = run_donating(self.program, [*state, batch], range(len(state)), "a step")
        return new, metric

    @property
    def recordings(self) -> int:
        return len(self.program.recordings)


def start(value: float = 1.0) -> State:
    return [torch.full((3,), value), torch.zeros(3), torch.tensor(0.0)]


def taken_over(inputs: list[Tensor]) -> list[Tensor]:
    heirs = list(inputs)
    inputs.clear()
    return heirs


BATCHES = [torch.tensor([1.0, 2.0, 3.0]) * i for i in range(1, 6)]


def expected(state: State, batches: list[Tensor]) -> tuple[State, list[Tensor]]:
    metrics = []
    for batch in batches:
        state, metric = update(state, batch)
        metrics.append(metric)
    return state, metrics


def test_steps_are_replayed_from_one_recording() -> None:
    steps, state, metrics = Steps(), start(), []
    places = [x.data_ptr() for x in state[:2]]
    for batch in BATCHES:
        state, metric = steps(state, batch)
        metrics.append(metric)
    assert_same_bits((state, metrics), expected(start(), BATCHES))
    assert [x.data_ptr() for x in state[:2]] == places
    assert steps.recordings == 1


def test_what_was_handed_out_outlives_later_calls() -> None:
    steps, state, metrics = Steps(), start(), []
    for batch in BATCHES:
        kept = batch.clone()
        state, metric = steps(state, batch)
        metrics.append(metric)
        assert torch.equal(batch, kept)
    assert_same_bits(metrics, expected(start(), BATCHES)[1])


def test_a_restored_state_is_copied_in_where_nobody_holds_the_old_one() -> None:
    steps, state = Steps(), start()
    for batch in BATCHES[:3]:
        state, _ = steps(state, batch)
    state, _ = steps(start(5.0), BATCHES[3])  # the old one is dropped only now
    state, _ = steps(state, BATCHES[4])
    assert_same_bits(state, expected(start(5.0), BATCHES[3:])[0])
    recordings = steps.recordings
    state = start(7.0)
    state, _ = steps(state, BATCHES[0])
    assert_same_bits(state, expected(start(7.0), BATCHES[:1])[0])
    assert steps.recordings == recordings


def test_a_state_that_is_held_is_never_overwritten() -> None:
    steps, state = Steps(), start()
    for batch in BATCHES[:3]:
        state, _ = steps(state, batch)
    before = copied(state)
    other, _ = steps(start(5.0), BATCHES[3])
    assert_same_bits(state, before)
    assert_same_bits(other, expected(start(5.0), BATCHES[3:4])[0])
    for batch in BATCHES:  # turn by turn: each has a recording of its own
        state, _ = steps(state, batch)
        other, _ = steps(other, batch)
    assert_same_bits(state, expected(before, BATCHES)[0])
    assert_same_bits(other, expected(expected(start(5.0), BATCHES[3:4])[0], BATCHES)[0])
    assert steps.recordings == 2


def test_memory_that_another_program_took_over_counts_as_held() -> None:
    steps, state = Steps(), start()
    for batch in BATCHES[:2]:
        state, _ = steps(state, batch)
    heirs = run_donating(taken_over, state, range(len(state)), "another program")
    before = copied(heirs)
    steps(start(5.0), BATCHES[2])
    assert_same_bits(heirs, before)


def test_leaves_may_change_places() -> None:
    steps, state = Steps(), start()
    for batch in BATCHES[:2]:
        state, _ = steps(state, batch)
    swapped = [state[1], state[0], state[2]]
    before = copied(swapped)
    assert_same_bits(steps(swapped, BATCHES[2])[0], expected(before, BATCHES[2:3])[0])


def test_without_donation_everything_is_copied() -> None:
    trace = fz.jit(update).trace(start(), BATCHES[0]).trace
    program = Replayed(lower_graph(trace.module), trace.donated, recorder=always(OnCPU()))
    state = start()
    results = [program([*state, batch]) for batch in BATCHES]
    assert_same_bits(state, start())
    for batch, result in zip(BATCHES, results, strict=True):
        (new, metric) = update(start(), batch)
        assert_same_bits(result, [*new, metric])
    assert len(program.recordings) == 1


class Refusing(OnCPU):
    """Records nothing."""

    def record(self, run: Lowered, inputs: list[Tensor]) -> tuple[Callable[[], Any], list[Tensor]]:
        raise RuntimeError("no recording here")


def test_what_cannot_be_recorded_runs_as_it_is_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    trace = fz.jit(update, donate=(0,)).trace(start(), BATCHES[0]).trace
    program = Replayed(lower_graph(trace.module), trace.donated, recorder=always(Refusing()), must=False)
    state, metrics = start(), []
    for batch in BATCHES:
        *state, metric = run_donating(program, [*state, batch], range(len(state)), "a step")
        metrics.append(metric)
    assert_same_bits((state, metrics), expected(start(), BATCHES))
    assert len([record for record in caplog.records if "no recording here" in record.getMessage()]) == 1
    program.must, program.is_recorded = True, True
    with pytest.raises(RuntimeError, match="no recording here"):
        program([*state, BATCHES[0]])


def test_large_results_are_not_copied_where_nobody_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cudagraph, "MOST_COPIED", 8)  # a metric and the count take 8, a state 24 more
    for donated, is_recorded in (((0,), True), ((), False)):
        trace = fz.jit(update, donate=donated).trace(start(), BATCHES[0]).trace
        program = Replayed(lower_graph(trace.module), trace.donated, recorder=always(OnCPU()), must=False)
        state, metrics = start(), []
        for batch in BATCHES:
            *state, metric = run_donating(program, [*state, batch], trace.donated, "a step")
            metrics.append(metric)
        assert_same_bits((state, metrics), expected(start(), BATCHES))
        assert program.is_recorded == is_recorded


def test_what_is_only_read_is_read_where_it_is_and_held_by_nobody() -> None:
    trace = fz.jit(lambda w, x: w @ x).trace(torch.ones(3, 3), BATCHES[0]).trace
    program = Replayed(lower_graph(trace.module), trace.donated, frozenset({0}), recorder=always(OnCPU()))
    weights = [torch.full((3, 3), float(i)) for i in range(MOST + 2)]
    for batch in BATCHES[:3]:
        for w in weights:
            assert_same_bits(program([w, batch]), [w @ batch])
    assert len(program.recordings) == MOST, "one for each address, and no more than that"
    assert not any(0 in recording.inputs for recording in program.recordings)


def test_the_default_records_what_runs_on_cuda_alone_without_collectives(monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        x, here = torch.empty(2, device="cuda"), torch.empty(2)
    run = lower_graph(fz.trace(lambda x: x + 1)(x).trace.module)
    assert isinstance(replayed_if_possible(run, fz.trace(lambda x: x + 1)(x).trace), Replayed)
    assert replayed_if_possible(run, fz.trace(lambda x, y: (x + 1, y + 1))(x, here).trace) is run
    monkeypatch.setattr(cudagraph, "not_on_cuda", lambda trace: None)
    for ranks, is_recorded in ((1, True), (2, False)):
        mesh = fz.make_mesh("cpu", data=ranks, simulate=True)
        apply, params = fz.functional(lambda: nn.Linear(4, 4))
        step = fz.train_step(lambda params, x, apply=apply: apply(params, x).sum())
        trace = step.trace(fz.init(params, fz.sgd(0.1), mesh, fz.zero(3), policy="fp32"), torch.ones(2, 4)).trace
        assert isinstance(replayed_if_possible(run, trace), Replayed) == is_recorded


def test_a_cpu_is_refused_with_the_input_that_is_there() -> None:
    with pytest.raises(ValueError, match=r"'0\.w' is on cpu.*lower=\"graph\""):
        fz.jit(lambda p: p["w"] + 1, lower="cudagraph")({"w": torch.ones(2)})


def test_closed_over_tensors_have_to_be_on_cuda_and_numbers_need_not() -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(2, device="cuda")
    here = torch.tensor(2.0)
    fz.jit(lambda x: x + torch.tensor(2.0), lower="cudagraph").trace(x)
    with pytest.raises(ValueError, match="closes over is on cpu"):
        fz.jit(lambda x: x + here, lower="cudagraph").trace(x)


def train(lower: str, steps: int) -> tuple[list[Any], list[int]]:
    """States and metrics after each step, on CUDA, and the addresses of the state's memory."""
    mesh = fz.make_mesh("cuda")
    params = fz.tree.map(lambda x: x.cuda(), parameters())
    state = fz.init(params, fz.adamw(1e-2), mesh, fz.zero(3))
    step = fz.train_step(dot, lower=lower)
    seen, places = [], []
    for i in range(steps):
        batch = fz.tree.map(lambda x: x.cuda().to(torch.bfloat16), parameters(i + 1))
        state, metrics = step(state, batch)
        seen.append((copied(state), metrics))
        places.append(hash(tuple(x.data_ptr() for x in fz.tree.leaves(state.params))))
    return seen, places


@pytest.mark.gpu
def test_replayed_steps_equal_those_of_the_graph_lowering() -> None:
    replayed, places = train("cudagraph", 5)
    assert_same_bits(replayed, train("graph", 5)[0])
    assert len(set(places)) == 1


@pytest.mark.gpu
def test_held_states_metrics_and_batches_stay_on_cuda() -> None:
    jitted = fz.jit(update, donate=(0,), lower="cudagraph")
    one, two = ([x.cuda() for x in start(v)] for v in (1.0, 5.0))
    metrics: tuple[list[Tensor], list[Tensor]] = [], []
    for batch in BATCHES:
        given = batch.cuda()
        one, first = jitted(one, given)
        two, second = jitted(two, given)
        metrics[0].append(first)
        metrics[1].append(second)
        assert torch.equal(given.cpu(), batch)
    for v, state, seen in ((1.0, one, metrics[0]), (5.0, two, metrics[1])):
        assert_same_bits(fz.tree.map(Tensor.cpu, (state, seen)), expected(start(v), BATCHES))


@pytest.mark.gpu
def test_micro_batches_are_recorded() -> None:
    loop = fz.accumulate(fz.value_and_grad(lambda w, x: (w * x).sum()), 3)
    jitted = fz.jit(loop, lower="cudagraph")
    for i in range(4):
        arguments = torch.ones(2).cuda(), torch.arange(12.0).view(6, 2).cuda() + i
        assert_same_bits(fz.tree.map(Tensor.cpu, jitted(*arguments)), fz.tree.map(Tensor.cpu, loop(*arguments)))


@pytest.mark.gpu
def test_a_program_that_cannot_be_recorded_says_so_and_leaves_the_stream() -> None:
    jitted = fz.jit(lambda x: x.cpu() + 1, lower="cudagraph")
    x, stream = torch.ones(2).cuda(), torch.cuda.current_stream()
    jitted(x)
    with pytest.raises(RuntimeError, match="cannot be recorded as a CUDA graph"):
        jitted(x)
    assert torch.cuda.current_stream() == stream


def test_the_lowering_is_made_without_a_gpu() -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(2, device="cuda")
    program = fz.jit(lambda x: x + 1).trace(x)
    assert isinstance(lower_cudagraph(program.trace), Replayed)
