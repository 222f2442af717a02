"""The examples of many losses and of adapters: what they compute is right, and they show what they claim."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradient_norms
import lora
import pcgrad
import pytest
import torch
from gpt import GPT, Config
from torch import Tensor
from two_tasks import TwoTasks, gradients_of, losses_of

import fzero as fz
from tests import small, world

# ---------------------------------------------------------------------------------------------------------
# Gradients of single losses, their norms, and surgery


def gradients_by_autograd(images: Tensor, labels: Tensor) -> dict[str, dict[str, Tensor]]:
    apply, params = fz.functional(model())
    leaves = fz.tree.map(lambda x: x.clone().requires_grad_(), params)
    values = losses_of(apply)(leaves, images, labels)
    found = {}
    for task, value in values.items():
        flat = fz.tree.leaves(leaves)
        gradients = torch.autograd.grad(value, flat, retain_graph=True, materialize_grads=True)
        found[task] = dict(zip(fz.tree.paths(leaves), gradients, strict=True))
    return found


def model() -> TwoTasks:
    torch.manual_seed(7)
    return TwoTasks(width=8)


def images_and_labels(ranks: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(23)  # in worlds of one, two and four the gradients conflict
    return torch.rand(ranks, 5, 64, generator=generator), torch.randint(10, (ranks, 5), generator=generator)


def on_ranks(stage: int, traced: bool) -> dict[str, Any]:
    mesh = fz.make_mesh("cpu")
    apply, params = fz.functional(model())
    state = fz.init(params, fz.sgd(0.1), mesh, fz.zero(stage), policy="fp32")
    images, labels = (x[mesh.index("data")] for x in images_and_labels(mesh.size("data")))

    def everything(state: fz.State, images: Tensor, labels: Tensor) -> Any:
        _, gradients = gradients_of(losses_of(apply), state, images, labels)
        norms = {task: fz.norm(gradient) for task, gradient in gradients.items()}
        return gradients, gradient_norms.balanced(gradients, norms), pcgrad.surgery(list(gradients.values()))

    run = fz.jit(everything) if traced else everything
    gradients, balanced, operated = fz.gather(run(state, images, labels))
    return {"gradients": gradients, "balanced": balanced, "surgery": operated}


def vector(gradient: Any) -> Tensor:
    return torch.cat([x.flatten().double() for _, x in sorted(small.flat(gradient).items())])


# Training traces the same functions, below.
@pytest.mark.parametrize(
    ("size", "stage", "traced"),
    [
        (2, 3, False),
        *(pytest.param(n, s, True, marks=pytest.mark.slow) for n in (1, 2, 4) for s in (0, 1, 2, 3)),
    ],
)
def test_gradients_of_each_loss_and_what_is_made_of_them_are_those_of_plain_torch(
    size: int, stage: int, traced: bool
) -> None:
    images, labels = (x.flatten(0, 1) for x in images_and_labels(size))
    wanted = {task: vector(gradient) for task, gradient in gradients_by_autograd(images, labels).items()}
    digit, ink = wanted.values()
    overlap = digit @ ink
    assert overlap < 0, "a case in which there is something to operate on"
    operated = digit - overlap / (ink @ ink) * ink + ink - overlap / (digit @ digit) * digit
    for found in world.run(on_ranks, stage, traced, size=size):
        for task, gradient in found["gradients"].items():
            torch.testing.assert_close(
                vector(gradient), wanted[task], rtol=1e-4, atol=1e-4 * wanted[task].norm().item()
            )
        torch.testing.assert_close(
            vector(found["balanced"]), digit / digit.norm() + ink / ink.norm(), rtol=0, atol=1e-5
        )
        torch.testing.assert_close(vector(found["surgery"]), operated, rtol=0, atol=1e-5 * ink.norm().item())


def test_surgery_leaves_gradients_alone_that_do_not_conflict_and_ends_every_conflict_of_two() -> None:
    mesh = fz.make_mesh("cpu")
    shards = [fz.shard({"w": torch.tensor(x)}, mesh, fz.zero(3)) for x in ([1.0, 0.0], [1.0, 2.0], [-1.0, 1.0])]
    one, agrees, conflicts = shards
    assert fz.gather(pcgrad.surgery([one, agrees]))["w"].tolist() == [2.0, 2.0]
    assert fz.gather(pcgrad.surgery([one, conflicts]))["w"].tolist() == [0.5, 1.5]
    assert pcgrad.agreement(pcgrad.surgery([one, conflicts]), [one, conflicts]) >= 0
    nothing = fz.shard({"w": torch.zeros(2)}, mesh, fz.zero(3))
    assert fz.gather(pcgrad.surgery([one, nothing]))["w"].tolist() == [1.0, 0.0]


def test_balanced_gradients_teach_the_task_of_the_small_loss(capsys: Any) -> None:
    plain, balanced = gradient_norms.main(["--steps", "60"]).values()
    assert balanced["read right"] > plain["read right"] + 0.1, (plain, balanced)
    assert plain["norms"]["ink"] > 100 * plain["norms"]["digit"]
    assert "gradients of one norm" in capsys.readouterr().out


def test_after_surgery_no_step_goes_against_a_task() -> None:
    found = pcgrad.train(fz.make_mesh("cpu"), 20, operate=True)
    assert found["conflicts"] > 0
    assert found["harmful"] == 0


@pytest.mark.slow
def test_the_example_tells_how_often_gradients_conflict(capsys: Any) -> None:
    plain, surgery = pcgrad.main(["--steps", "300"]).values()
    assert plain["harmful"] > surgery["harmful"] == 0
    assert "surgery" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------
# LoRA

SHAPE = Config(width=32, depth=2, heads=2, vocabulary=64)


def rows(count: int = 4) -> Tensor:
    return torch.randint(64, (count, 9), generator=torch.Generator().manual_seed(0))


def test_new_adapters_change_nothing() -> None:
    base = lora.base_state(SHAPE, fz.make_mesh("cpu")).params
    adapters = lora.adapter_state(base, rank=2)
    apply, _ = fz.functional(lambda: GPT(SHAPE))
    expected = fz.call(lambda p: lora.next_byte_loss(apply(p, rows()[:, :-1]), rows()), base)
    assert torch.equal(fz.call(lora.loss_of(SHAPE, 2), adapters, base, rows()), expected)


def adapted_on_ranks(data: Tensor) -> Any:
    mesh = fz.make_mesh("cpu")
    base = lora.base_state(SHAPE, mesh).params
    before = fz.gather(base)
    adapters = lora.adapter_state(base, rank=2)
    step = fz.jit(lora.step_of(lora.loss_of(SHAPE, 2)), donate=(0,), remat="block")
    losses = []
    for _ in range(6):
        adapters, loss = step(adapters, base, data.chunk(mesh.size("data"))[mesh.index("data")])
        losses.append(loss.item())
    small.assert_same_bits(fz.gather(base), before)
    return losses, fz.gather(adapters.params)


def test_adapters_learn_and_the_base_keeps_its_bits() -> None:
    base = lora.base_state(SHAPE, fz.make_mesh("cpu")).params
    alone = fz.call(lora.loss_of(SHAPE, 2), lora.adapter_state(base, rank=2), base, rows()).item()
    (first, params), (second, same) = world.run(adapted_on_ranks, rows(), size=2)
    losses = [(one + other) / 2 for one, other in zip(first, second, strict=True)]
    assert losses[0] == pytest.approx(alone, rel=1e-2), "the bf16 base sees other rows on each rank"
    assert losses[-1] < losses[0] - 0.01, losses
    small.assert_same_bits(params, same)


@pytest.mark.slow
def test_adapters_take_little_memory_and_the_base_is_never_whole() -> None:
    wider = Config(width=128, depth=4, heads=2)  # a thinner adapter would be too small to cut
    figures = lora.foretold(wider, ranks=8, rank=2, rows=1, tokens=8)
    adapted, whole = figures["LoRA"], figures["all weights"]
    assert adapted.trained < 0.03 * whole.trained
    assert adapted.at_rest < 0.4 * whole.at_rest
    assert adapted.peak < whole.peak
    assert adapted.by_kind["gathered"] < 2 * whole.trained, "under the bytes of the whole base"


@pytest.mark.slow
def test_the_example_adapts_a_model_to_capitals(tmp_path: Path, capsys: Any) -> None:
    text = tmp_path / "rhyme.txt"
    text.write_bytes(b"the quick brown fox jumps over the lazy dog; " * 200)
    losses = lora.main(["--data", str(text), "--base-steps", "25", "--steps", "25"])
    assert losses["capitals, adapted"] < losses["capitals, base"] - 0.5, losses
    assert "capitals, adapted" in capsys.readouterr().out
