"""`program.memory()`: what a run really holds, by kind, and what it takes to ask."""

from __future__ import annotations

import functools
import math
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from gpt import GPT, PRESETS, Config
from torch import Tensor, nn

import fzero as fz
from fzero._torch import TorchDispatchMode
from fzero.display.listing import amount
from fzero.program.graph.kinds import KINDS, kinds_in
from fzero.program.program import Program
from fzero.program.report.memory import Memory, peak_bytes
from tests import world
from tests.small import LiveBytes
from tests.test_display import SVG

TINY = PRESETS["tiny"]


def training(
    mesh: fz.Mesh, config: Config = TINY, stage: int = 3, policy: str = "bf16", clip: bool = False, **options: Any
) -> tuple[fz.State, Any]:
    apply, _ = fz.functional(lambda: GPT(config))
    optimizer = fz.chain(fz.clip_by_global_norm(1.0), fz.adamw(1e-3)) if clip else fz.adamw(1e-3)
    state = fz.init(lambda: GPT(config), optimizer, mesh, fz.zero(stage), policy=policy)

    def loss(params: Any, text: Tensor) -> Tensor:
        logits = apply(params, text[:, :-1]).flatten(0, 1).float()
        return nn.functional.cross_entropy(logits, text[:, 1:].flatten())

    return state, fz.train_step(loss, **options)


@functools.cache
def simulated(ranks: int = 8, *, rows: int = 4, time: int = 128, **options: Any) -> tuple[fz.State, Program]:
    state, step = training(fz.make_mesh("cpu", data=ranks, simulate=True), **options)
    return state, fz.trace(step)(state, torch.empty(rows, time + 1, dtype=torch.int64, device="meta"))


def nbytes(tree: Any) -> int:
    return sum(x.numel() * x.element_size() for x in fz.tree.leaves(tree))


# ---------------------------------------------------------------------------------------------------------
# As a run has it


def peaks(rows: int, **options: Any) -> tuple[int, int, int]:
    """Return the peak of a run of a program, the one that is foretold, and what is at rest."""
    state, step = training(fz.make_mesh("cpu"), **options)
    text = torch.randint(0, TINY.vocabulary, (rows, 129))
    program = fz.trace(step)(state, text)
    inputs = fz.tree.leaves((state, text))
    constants = [x for x in vars(program.trace.module).values() if isinstance(x, Tensor)]
    held = [*constants, *(x for i, x in enumerate(inputs) if i not in program.trace.donated)]
    # What is donated, nobody holds but the program.
    inputs = [x.clone() if i in program.trace.donated else x for i, x in enumerate(inputs)]
    live = LiveBytes()
    for x in (*held, *inputs):
        live.storages.add(x.untyped_storage())
    del x, state, text
    with live:
        program.run(inputs)
    return live.peak, program.memory().peak, program.memory().at_rest


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "size, options",
    [
        (1, {"microbatches": 2, "donate": False}),
        (2, {"remat": "block", "clip": True}),
        pytest.param(1, {}, marks=SLOW),
        pytest.param(2, {"microbatches": 2}, marks=SLOW),
        pytest.param(1, {"remat": "block"}, marks=SLOW),
        pytest.param(2, {"clip": True}, marks=SLOW),
        pytest.param(2, {"stage": 0, "policy": "mixed"}, marks=SLOW),
        pytest.param(2, {"stage": 1}, marks=SLOW),
        pytest.param(2, {"keep_gathered": math.inf, "bucket": 0}, marks=SLOW),
        pytest.param(2, {"overlap": None}, marks=SLOW),
    ],
    ids=str,
)
def test_the_peak_is_that_of_a_run(size: int, options: dict[str, Any]) -> None:
    for measured, foretold, at_rest in world.run(
        peaks, 2 * options.get("microbatches", 1), size=size, deadline=200.0, **options
    ):
        assert measured == pytest.approx(foretold, rel=0.01)  # metrics and counters of a few bytes are not exact
        assert measured > 1.5 * at_rest, "nothing but the state would be no test"


# ---------------------------------------------------------------------------------------------------------
# By kind


@pytest.mark.parametrize(
    "options", [{}, {"remat": "block"}, {"microbatches": 4}, {"stage": 1}, {"clip": True}], ids=str
)
def test_kinds_add_up_to_the_peak_that_passes_see(options: dict[str, Any]) -> None:
    _, program = simulated(**options)
    memory = program.memory()
    assert memory.peak == sum(memory.by_kind.values()) == max(memory.total) == peak_bytes(program.trace)
    assert memory.peak == program.stages[-1].peak
    assert set(memory.by_kind) == set(memory.live) == set(KINDS)
    at = memory.total.index(memory.peak)
    assert memory.by_kind == {kind: curve[at] for kind, curve in memory.live.items()}
    assert memory.where == memory.operations[at]
    assert {len(curve) for curve in memory.live.values()} == {len(memory.operations)}


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_what_is_at_rest_is_the_state(stage: int) -> None:
    state, program = simulated(**({} if stage == 3 else {"stage": stage}))
    memory = program.memory()
    assert memory.at_rest == nbytes(state)
    assert set(memory.live["moments"]) == {nbytes(state.moments)}, "the update is in place"
    assert memory.live["params"][0] == memory.live["params"][-1] == nbytes(state.params)
    if stage != 1:  # where whole parameters are made anew of the pieces that were updated
        assert set(memory.live["params"]) == {nbytes(state.params)}


def test_without_donation_the_new_state_is_params_and_moments_too() -> None:
    state, program = simulated(donate=False)
    memory = program.memory()
    assert memory.live["params"][-1] == 2 * nbytes(state.params)
    assert memory.live["moments"][-1] == 2 * nbytes(state.moments)


def test_gathered_is_the_parameters_that_are_whole() -> None:
    def deep() -> nn.Module:
        return nn.Sequential(*(nn.Sequential(nn.Linear(64, 64, bias=False), nn.Tanh()) for _ in range(6)))

    apply, _ = fz.functional(deep)
    mesh = fz.make_mesh("cpu", data=8, simulate=True)
    state = fz.init(deep, fz.sgd(0.1), mesh, policy="bf16")
    x = torch.empty(2, 64, dtype=torch.bfloat16, device="meta")

    def gathered(**options: Any) -> list[int]:
        step = fz.train_step(lambda params, x: apply(params, x).float().sum(), **options)
        return list(fz.trace(step)(state, x).memory().live["gathered"])

    full = 2 * 5 * 64 * 64  # nothing reads the first again: its gradient needs the batch only
    assert max(gathered(keep_gathered=math.inf)) == full
    again = gathered()
    assert max(again) < 0.6 * full
    assert again[-1] == 0


def test_activations_are_what_the_backward_reads() -> None:
    _, kept = simulated()
    _, made_again = simulated(remat="block")
    most = max(kept.memory().live["activations"])
    # Of each of two layers at least: x, two norms, q, k, v, the mixed, gate and value. In bfloat16.
    rows, layer = 4 * 128, 4 * TINY.width + 3 * TINY.width + 2 * 160
    assert most > 2 * 2 * rows * layer
    assert max(made_again.memory().live["activations"]) < 0.75 * most
    assert kept.memory().live["activations"][-1] == 0


def test_a_clip_keeps_the_pieces_of_all_gradients() -> None:
    state, clipped = simulated(clip=True)
    pieces = nbytes(state.params)  # the same shapes, also in bfloat16
    _, free = simulated()
    assert max(clipped.memory().live["gradients"]) >= pieces
    # Freely, the last to die is the embedding's whole gradient, and those of the block before it.
    assert free.memory().live["gradients"][-1] == 0

    def kept_at_the_end(program: Program) -> int:
        updates = [i for i, name in enumerate(program.memory().operations) if name.startswith("adamw")]
        return program.memory().live["gradients"][updates[0]]

    assert kept_at_the_end(clipped) >= pieces


def test_sums_of_micro_batches_are_gradients() -> None:
    state, program = simulated(microbatches=4)
    memory = program.memory()
    inside = [i for i, name in enumerate(memory.operations) if " in run_loop" in name]
    assert inside == list(range(inside[0], inside[-1] + 1)), "a body stands in one piece"
    assert min(memory.live["gradients"][i] for i in inside) >= nbytes(state.params)
    # A body's own bytes count once, however many rounds: its activations are those of a quarter of the batch.
    _, whole = simulated()
    assert max(memory.live["activations"]) == pytest.approx(max(whole.memory().live["activations"]) / 4, rel=0.1)


def test_stacked_outputs_are_there_twice_at_the_end() -> None:
    mesh = fz.make_mesh("cpu", data=1, simulate=True)
    state = fz.init({"w": torch.ones(64)}, fz.sgd(0.1), mesh, policy="fp32")

    def loss(params: Any, batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        y = params["w"] * batch
        return y.sum(), {"y": y.detach()}

    step = fz.train_step(loss, microbatches=4, has_aux=True)
    memory = fz.trace(step)(state, torch.empty(4096, 64)).memory()
    assert memory.by_kind["other"] >= 2 * 4096 * 64 * 4


# ---------------------------------------------------------------------------------------------------------
# What inputs are for


def test_inputs_are_told_apart_by_what_holds_them() -> None:
    state = fz.init({"w": torch.ones(2, 2)}, fz.adamw(1e-3), fz.make_mesh("cpu"), policy="fp32")
    grads = fz.grad(lambda params: params["w"].sum())(state)
    arguments = (state, state.params, grads, {"params": torch.ones(2)}, 3)
    tensors = [
        path
        for path, leaf in zip(fz.tree.paths(arguments), fz.tree.leaves(arguments), strict=True)
        if isinstance(leaf, Tensor)
    ]
    found = dict(zip(tensors, kinds_in(arguments), strict=True))
    assert found["0.step"] == found["0.seed"] == "state"
    assert found["0.params.w"] == found["1.w"] == "params"
    assert {kind for path, kind in found.items() if path.startswith("0.moments")} == {"moments"}
    assert found["2.w"] == found["2.factor"] == "gradients"
    assert found["3.params"] == "inputs"


def test_without_a_state_everything_is_at_rest() -> None:
    program = fz.trace(lambda x, y: torch.tanh(x) + y)(torch.ones(1000), torch.ones(1000))
    memory = program.memory()
    assert memory.at_rest == memory.by_kind["inputs"] == 8000
    assert memory.peak == 12000  # tanh, to which y is added in place


# ---------------------------------------------------------------------------------------------------------
# To look at


def test_a_plot_is_saved(tmp_path: Any) -> None:
    memory = simulated()[1].memory()
    picture = memory.plot(tmp_path / "memory.svg")
    assert str(picture) == memory.table()
    assert (tmp_path / "memory.svg").read_text() == picture.svg
    labels = [element.text for element in ElementTree.fromstring(picture.svg).iter(f"{SVG}text")]
    assert {"params", "moments", "activations", "-- at rest"} <= set(labels)
    assert f"{amount(memory.peak)} at most, in {memory.where}" in labels


def test_a_plot_of_another_kind_is_refused(tmp_path: Any) -> None:
    with pytest.raises(ValueError, match=r"is SVG, and '.*memory\.png' ends in '\.png'. Save it as '.*memory\.svg'"):
        simulated()[1].memory().plot(tmp_path / "memory.png")


def test_a_table_has_a_line_for_each_kind_at_the_peak() -> None:
    live = {kind: [0] for kind in KINDS} | {"params": [3 * 2**20], "other": [2**20]}
    memory = Memory(2**20, 2**22, {kind: x[0] for kind, x in live.items()}, "mm", live, ["mm"])
    assert str(memory).splitlines() == [
        "peak 4.00 MiB in mm; at rest 1.00 MiB",
        "  params          3.00 MiB   75.0%",
        "  other           1.00 MiB   25.0%",
    ]


@pytest.mark.parametrize("size, text", [(0, "0 B"), (1023, "1023 B"), (2**20, "1.00 MiB"), (2**50, "1024.00 TiB")])
def test_amounts_read_well(size: int, text: str) -> None:
    assert amount(size) == text


# ---------------------------------------------------------------------------------------------------------
# For nothing


class Allocations(TorchDispatchMode):
    """The largest memory that an operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in fz.tree.leaves(result):
            if isinstance(x, Tensor) and x.untyped_storage().device.type != "meta":
                self.largest = max(self.largest, x.untyped_storage().nbytes())
        return result


def test_a_program_of_a_simulated_world_allocates_nothing() -> None:
    config = Config(width=2048, depth=1, heads=16, vocabulary=32768)
    with Allocations() as allocations:
        state, program = simulated(1024, config=config, rows=1, time=1024)
        assert sum(math.prod(shape) for shape in state.params.shapes) > 10**8
        assert program.memory().peak > 10**8
        program.traffic(), program.flops(), program.estimate("H100"), program.text()
    assert allocations.largest < 2**20
