from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fzero as fz
from tests import small, world

torch.manual_seed(0)

SIZES = (1, 2, 4)
STAGES = (0, 1, 2, 3)


class Odd(nn.Module):
    """A model of awkward shapes: odd widths, three rows, a bias of one, a scalar, a tied embedding of 4W+1 rows."""

    def __init__(self, width: int = 5) -> None:
        super().__init__()
        self.embed = nn.Embedding(4 * width + 1, width)
        self.up = nn.Linear(width, 23)
        self.few = nn.Parameter(torch.randn(3, 23) * 0.1)
        self.mix = nn.Linear(3, 1)
        self.scale = nn.Parameter(torch.tensor(0.7))
        self.norm = nn.LayerNorm(23)
        self.down = nn.Linear(23, width, bias=False)
        self.head = nn.Linear(width, 4 * width + 1, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(torch.tanh(self.up(self.embed(tokens))))
        x = x * (1 + self.mix(x @ self.few.T))
        return self.head(self.down(x) * self.scale)


def model() -> Odd:
    torch.manual_seed(1)
    return Odd()


def batches(ranks: int, steps: int, rows: int = 4) -> Tensor:
    """Tokens of shape (steps, ranks, rows, 7)."""
    return torch.randint(21, (steps, ranks, rows, 7), generator=torch.Generator().manual_seed(2))


def cross_entropy(logits: Tensor, tokens: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())


def reference(data: Tensor, **adamw) -> dict[str, Tensor]:
    """Plain PyTorch in one process: the mean of the ranks' losses, `torch.optim.AdamW`."""
    module = model()
    optimizer = torch.optim.AdamW(module.parameters(), **adamw)
    for step in data:
        optimizer.zero_grad()
        torch.stack([cross_entropy(module(tokens), tokens) for tokens in step]).mean().backward()
        optimizer.step()
    return {name: p.detach() for name, p in module.named_parameters()}


def train(
    layout: fz.Layout, axes: dict[str, int], data: Tensor, *, microbatches: int = 1, policy: str = "fp32", **adamw
):
    """Train with fzero on this rank's part of the data; return the gathered parameters and the last metrics."""
    apply, params = fz.functional(model())
    make: Any = fz.make_mesh  # its keywords are axes, as well as options
    mesh = make("cpu", **axes)
    state = fz.init(params, fz.adamw(**adamw), mesh, layout, policy=policy)
    step = fz.train_step(lambda p, tokens: cross_entropy(apply(p, tokens), tokens), microbatches=microbatches)
    rank = mesh.index(layout.data_axes)
    for tokens in data[:, rank]:
        state, metrics = step(state, tokens)
    assert len(step.programs) == 1, "one signature, one trace"
    names = fz.tree.paths(params)
    return dict(zip(names, fz.tree.leaves(fz.gather(state.params)), strict=True)), metrics


def check_against_reference(results, data: Tensor, **adamw) -> None:
    expected = reference(data, **adamw)
    for params, _ in results:
        assert params.keys() == expected.keys()
        for name, value in params.items():
            # Element by element with a floor for those near zero, and each parameter as a whole without one.
            torch.testing.assert_close(value, expected[name], rtol=5e-6, atol=5e-8)
            assert (value - expected[name]).norm() <= 5e-6 * expected[name].norm(), name


ADAMW = {"lr": 1e-2, "weight_decay": 0.1}


QUICK = {(1, 3), (2, 0), (2, 1), (2, 3)}  # four ranks stand below


@pytest.mark.parametrize(
    ("size", "stage"),
    [
        pytest.param(size, stage, marks=[pytest.mark.slow] * ((size, stage) not in QUICK))
        for size in SIZES
        for stage in STAGES
    ],
)
def test_ten_steps_equal_plain_pytorch(size, stage):
    data = batches(size, 10)
    check_against_reference(world.run(train, fz.zero(stage), {}, data, size=size, **ADAMW), data, **ADAMW)


@pytest.mark.parametrize("stage", [*(pytest.param(stage, marks=pytest.mark.slow) for stage in (0, 1)), 3])
def test_sharded_inside_a_node_and_replicated_across(stage):
    data = batches(4, 10)
    layout = fz.zero(stage, axis="data", replicate="node")
    results = world.run(train, layout, {"node": 2, "data": 2}, data, size=4, **ADAMW)
    check_against_reference(results, data, **ADAMW)


@pytest.mark.parametrize("size", [2, *(pytest.param(size, marks=pytest.mark.slow) for size in (1, 4))])
def test_microbatches_are_the_mean(size):
    data = batches(size, 3)
    results = world.run(train, fz.zero(3), {}, data, size=size, microbatches=2, **ADAMW)
    check_against_reference(results, data, **ADAMW)


@pytest.mark.parametrize(
    ("size", "policy", "stages"),
    [
        (2, "mixed", (1, 3)),
        *(
            pytest.param(*case, STAGES, marks=pytest.mark.slow)
            for case in [(2, "fp32"), (2, "mixed"), (2, "bf16"), (4, "fp32"), (4, "mixed"), (4, "bf16")]
        ),
    ],
)
def test_every_layout_gives_the_same_bits(size, policy, stages):
    data = batches(size, 5)
    results = [world.run(train, fz.zero(stage), {}, data, size=size, policy=policy, **ADAMW)[0][0] for stage in stages]
    for other in results[1:]:
        for name, value in results[0].items():
            assert torch.equal(value, other[name]), name


class Wide(nn.Module):
    """Leaves of several sizes, drawn in place; the embedding is the largest."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(1031, 128)
        self.layers = nn.ModuleList(nn.Linear(128, 128) for _ in range(6))
        self.norm = nn.LayerNorm(128)


def peak_of_init(policy: str) -> tuple[int, int]:
    """Bytes that `fz.init` of a factory had live at most, and bytes of the state that came of it."""
    mesh = fz.make_mesh("cpu")
    with small.LiveBytes() as bytes_:
        state = fz.init(Wide, fz.sgd(0.1), mesh, fz.zero(3), policy=policy)
    return bytes_.peak, sum(x.nbytes for x in fz.tree.leaves(state))


@pytest.mark.parametrize("policy", ["fp32", "mixed", "bf16"])
@pytest.mark.parametrize("size", SIZES)
def test_a_factory_peaks_at_the_pieces_plus_the_largest_leaf(size, policy):
    largest, slack = 1031 * 128 * 4, 4096
    for peak, held in world.run(peak_of_init, policy, size=size):
        assert largest < peak <= held + largest + slack


def values_of_factory(stage: int) -> dict[str, Tensor]:
    state = fz.init(Wide, fz.sgd(0.1), fz.make_mesh("cpu"), fz.zero(stage), policy="bf16", seed=7)
    return dict(zip(state.params.paths, fz.tree.leaves(fz.gather(state.params)), strict=True))


def test_a_factory_draws_the_same_values_on_any_number_of_ranks():
    first, *others = (
        values for size in SIZES for stage in (0, 3) for values in world.run(values_of_factory, stage, size=size)
    )
    for other in others:
        small.assert_same_bits(other, first)
    assert first["embed.weight"].float().std() == pytest.approx(1.0, rel=0.02)
