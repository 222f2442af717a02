"""Buffers in a training step: statistics of batch norm, averaged over the ranks or each rank's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fzero as fz
from tests import small, world

STEPS, RATE = 2, 0.1


def network() -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8, momentum=0.3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 9, 5)
    )


def batch(step: int, rank: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(10 * step + rank)
    images = torch.randn(6, 3, 3, 3, generator=generator) * (1 + rank) + rank
    return images, torch.randint(5, (6,), generator=generator)


def trained(stage: int, average: bool) -> tuple[Any, Any]:
    """Two steps, eager and jitted; the parameters and this rank's buffers after them."""
    mesh = fz.make_mesh("cpu")
    rank = mesh.index("data")
    apply, _, buffers = fz.functional(network(), buffers=True)

    def loss_fn(params: Any, buffers: Any, images: Tensor, labels: Tensor) -> tuple[Tensor, Any]:
        logits, buffers = apply(params, buffers, images)
        return F.cross_entropy(logits, labels), buffers

    def step(state: fz.State, buffers: Any, images: Tensor, labels: Tensor) -> tuple[fz.State, Any, Tensor]:
        (loss, buffers), grads = fz.value_and_grad(loss_fn, has_aux=True)(state, buffers, images, labels)
        state, _ = fz.apply_gradients(state, grads)
        return state, fz.average(buffers, mesh) if average else buffers, loss

    results = []
    for run in (step, fz.jit(step, donate=(0, 1))):
        state = fz.init(network(), fz.sgd(RATE), mesh, fz.zero(stage), policy="fp32")
        now = small.copied(buffers)
        losses = []
        for i in range(STEPS):
            state, now, loss = run(state, now, *batch(i, rank))
            losses.append(loss)
        results.append((fz.gather(state.params), now, losses))
    small.assert_same_bits(results[1], results[0])
    return results[0][:2]


def reference(ranks: int, average: bool) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """The same in plain torch: one module, and the buffers of each rank."""
    module = network()
    names = [name for name, _ in module.named_buffers()]
    buffers = [{name: b.clone() for name, b in module.named_buffers()} for _ in range(ranks)]
    for i in range(STEPS):
        module.zero_grad()
        for rank in range(ranks):
            module.load_state_dict(buffers[rank], strict=False)
            images, labels = batch(i, rank)
            (F.cross_entropy(module(images), labels) / ranks).backward()
            buffers[rank] = {name: b.clone() for name, b in module.named_buffers()}
        if average:
            for name in names:
                if buffers[0][name].is_floating_point():
                    mean = torch.stack([b[name] for b in buffers]).mean(0)
                    buffers = [{**b, name: mean} for b in buffers]
        with torch.no_grad():
            for p in module.parameters():
                assert p.grad is not None
                p.sub_(RATE * p.grad)
    return {name: p.detach() for name, p in module.named_parameters()}, buffers


CASES = [
    pytest.param(size, stage, average, marks=() if (size, stage) in ((1, 0), (2, 3)) else pytest.mark.slow)
    for size in (1, 2, 4)
    for stage in range(4)
    for average in ((True, False) if size == 2 else (True,))
]


@pytest.mark.parametrize(("size", "stage", "average"), CASES)
def test_a_step_with_batch_norm_is_that_of_plain_torch(size: int, stage: int, average: bool) -> None:
    params, buffers = reference(size, average)
    got = world.run(trained, stage, average, size=size)
    for rank, (own, statistics) in enumerate(got):
        torch.testing.assert_close(small.flat(own), dict(sorted(params.items())), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(small.flat(statistics), dict(sorted(buffers[rank].items())), rtol=1e-4, atol=1e-6)
        if average:
            small.assert_same_bits(statistics, got[0][1])
    if size > 1 and not average:
        means = [small.flat(statistics)["1.running_mean"] for _, statistics in got]
        assert not torch.allclose(means[0], means[1]), "the ranks saw different images"


def averaged(axes: Any, mesh_axes: dict[str, int]) -> Any:
    mesh = fz.make_mesh("cpu", simulate=False, **mesh_axes)
    rank = float(sum(mesh.index(name) * 10**i for i, (name, _) in enumerate(reversed(mesh.axes))))
    tree = {
        "mean": torch.tensor([rank, 2 * rank]),
        "half": torch.tensor([[rank]], dtype=torch.bfloat16),
        "double": torch.tensor(rank, dtype=torch.float64),
        "count": torch.tensor(int(rank)),
        "empty": torch.ones(0),
        "name": "a",
    }
    before = small.copied(tree)
    result = fz.average(tree, mesh, axes)
    small.assert_same_bits(
        {k: v for k, v in tree.items() if k != "name"}, {k: v for k, v in before.items() if k != "name"}
    )
    return result


@pytest.mark.parametrize(
    ("mesh_axes", "axes", "means"),
    [
        ({"data": 2}, None, [0.5, 0.5]),
        ({"data": 2}, "data", [0.5, 0.5]),
        ({"data": 2}, (), [0.0, 1.0]),
        ({"data": 2, "model": 2}, None, [5.5] * 4),
        ({"data": 2, "model": 2}, "data", [5.0, 6.0, 5.0, 6.0]),
        ({"data": 2, "model": 2}, ["data", "model"], [5.5] * 4),
    ],
)
def test_floats_are_averaged_and_all_else_is_kept(mesh_axes: dict[str, int], axes: Any, means: list[float]) -> None:
    size = len(means)
    for rank, (got, mean) in enumerate(zip(world.run(averaged, axes, mesh_axes, size=size), means, strict=True)):
        own = rank if size == 2 else 10 * (rank // 2) + rank % 2
        assert torch.equal(got["mean"], torch.tensor([mean, 2 * mean]))
        assert torch.equal(got["half"], torch.tensor([[mean]], dtype=torch.bfloat16))
        assert torch.equal(got["double"], torch.tensor(mean, dtype=torch.float64))
        assert (got["count"], got["name"], got["empty"].shape) == (own, "a", (0,))


def test_an_axis_that_is_not_there_is_named() -> None:
    with pytest.raises(fz.MeshError, match="no axis 'model'"):
        fz.average({"mean": torch.ones(2)}, fz.make_mesh("cpu"), "model")


def test_in_low_precision_a_batch_norm_is_exempt_and_the_error_says_so() -> None:
    apply, _, buffers = fz.functional(network(), buffers=True)

    def loss_fn(params: Any, images: Tensor) -> Tensor:
        return apply(params, buffers, images.to(params["0"]["weight"].dtype))[0].float().sum()

    def gradient(policy: str | fz.Policy) -> Any:
        return fz.grad(loss_fn)(fz.init(network(), fz.sgd(RATE), fz.make_mesh("cpu"), policy=policy), batch(0, 0)[0])

    with pytest.raises(fz.ModuleError, match=r"in module '1' \(BatchNorm2d\)\n.*exempt="):
        gradient("bf16")
    assert gradient(fz.policy("bf16", exempt=["1.*"])).pieces[0] is not None
