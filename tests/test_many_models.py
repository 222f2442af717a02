"""Several models and several losses in one step have the gradients that plain PyTorch gives in one process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fzero as fz
from tests import small, world

ROWS = 3

# Traced runs are compared with eager ones too.
every_layout = pytest.mark.parametrize(
    ("size", "stage", "jitted"),
    [
        pytest.param(
            *(size, stage, jitted),
            marks=[] if (size, stage, jitted) in ((2, 0, False), (2, 3, True)) else pytest.mark.slow,
            id=f"{size} ranks, ZeRO-{stage}, {'jit' if jitted else 'eager'}",
        )
        for size in (1, 2, 4)
        for stage in (0, 1, 3)
        for jitted in (False, True)
    ],
)


def image_model() -> dict[str, Tensor]:
    return drawn(1, up=(9, 17), scale=(17,), down=(17, 6))


def text_model() -> dict[str, Tensor]:
    return drawn(2, mix=(6, 19), bias=(19,), out=(19, 5))


def drawn(seed: int, **shapes: tuple[int, ...]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) / 2 for name, shape in shapes.items()}


def encode(p: Any, x: Tensor) -> dict[str, Tensor]:
    """A model with a tree for an output."""
    hidden = torch.tanh(x.to(p["up"].dtype) @ p["up"]) * p["scale"]
    return {"embedding": hidden @ p["down"], "size": hidden.float().square().mean(-1)}


def caption(p: Any, embedding: Tensor, y: Tensor) -> Tensor:
    """A model's loss, of what another model made."""
    hidden = torch.tanh(embedding.to(p["mix"].dtype) @ p["mix"] + p["bias"])
    return F.cross_entropy((hidden @ p["out"]).float(), y)


def both_losses(image: Any, text: Any, x: Tensor, y: Tensor) -> dict[str, Any]:
    encoded = encode(image, x)
    return {"caption": caption(text, encoded["embedding"], y), "size": encoded["size"].mean(), "rows": torch.tensor(3)}


def objective(image: Any, text: Any, x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
    losses = both_losses(image, text, x, y)
    return weights[0] * losses["caption"] + weights[1] * losses["size"]


def batches(ranks: int) -> tuple[Tensor, Tensor]:
    """Rows of its own for each rank."""
    generator = torch.Generator().manual_seed(3)
    return torch.randn(ranks, ROWS, 9, generator=generator), torch.randint(5, (ranks, ROWS), generator=generator)


def expected(ranks: int, weights: Tensor) -> tuple[Any, Any]:
    """The gradients of both models over the batch of all ranks, by autograd in this process."""
    models = [{k: v.requires_grad_() for k, v in model.items()} for model in (image_model(), text_model())]
    x, y = (part.flatten(0, 1) for part in batches(ranks))
    objective(models[0], models[1], x, y, weights).backward()
    image, text = ({k: v.grad for k, v in model.items()} for model in models)
    return image, text


def new_state(params: Any, stage: int, optimizer: fz.Optimizer | None = None, policy: str = "fp32") -> fz.State:
    return fz.init(params, optimizer or fz.sgd(0.1), fz.make_mesh("cpu"), fz.zero(stage), policy=policy)


def two_states(stage: int) -> tuple[fz.State, fz.State]:
    """Two models in two layouts."""
    return new_state(image_model(), stage), new_state(text_model(), 3 - stage)


def own_batch(state: fz.State, ranks: int) -> tuple[Tensor, Tensor]:
    x, y = batches(ranks)
    rank = state.mesh.index("data")
    return x[rank], y[rank]


def assert_close(actual: Any, wanted: Any, tolerance: float = 1e-5) -> None:
    left, right = small.flat(actual), small.flat(wanted)
    assert left.keys() == right.keys()
    for path, value in right.items():
        torch.testing.assert_close(
            left[path].float(), value, rtol=tolerance, atol=tolerance, msg=f"{path}: {{}}".format
        )


# ---------------------------------------------------------------------------------------------------------
# One gradient, said in several ways


def together(image: Any, text: Any, x: Tensor, y: Tensor, weights: Tensor) -> Any:
    """One loss, differentiated by two models."""
    return fz.grad(objective, argnums=(0, 1))(image, text, x, y, weights)


def as_one_tree(image: Any, text: Any, x: Tensor, y: Tensor, weights: Tensor) -> Any:
    """One primal, made of two states."""
    grads = fz.grad(lambda models: objective(models["image"], models["text"], x, y, weights))
    found = grads({"image": image, "text": text})
    return found["image"], found["text"]


def chained(image: Any, text: Any, x: Tensor, y: Tensor, weights: Tensor) -> Any:
    """Two functions; the cotangent of a tree is handed from one to the other."""
    encoded, pull_image = fz.vjp(encode, image, x)
    _, pull_text = fz.vjp(caption, text, encoded["embedding"], y)
    g_text, embedding_bar, nothing = pull_text(weights[0])
    assert nothing is None, "labels have no gradient"
    size_bar = (weights[1] / ROWS).expand(ROWS)
    g_image, _ = pull_image({"embedding": embedding_bar, "size": size_bar})
    return g_image, g_text


def weighted_cotangent(image: Any, text: Any, x: Tensor, y: Tensor, weights: Tensor) -> Any:
    """Two losses in a tree, beside an output that has no gradient; the weights are the cotangent."""
    _, pullback = fz.vjp(lambda i, t: both_losses(i, t, x, y), image, text)
    return pullback({"caption": weights[0], "size": weights[1], "rows": None})


def loss_by_loss(image: Any, text: Any, x: Tensor, y: Tensor, weights: Tensor) -> Any:
    """One forward, one pullback for each loss; their gradients are added."""
    _, pullback = fz.vjp(lambda i, t: both_losses(i, t, x, y), image, text)
    one, zero = torch.ones(()), torch.zeros(())
    of_caption = pullback({"caption": one, "size": zero, "rows": None})
    of_size = pullback({"caption": zero, "size": one, "rows": None})
    pairs = zip(of_caption, of_size, strict=True)
    return tuple(fz.add(fz.scale(a, weights[0]), b, alpha=weights[1]) for a, b in pairs)


WAYS: dict[str, Callable[..., Any]] = {
    f.__name__: f for f in (together, as_one_tree, chained, weighted_cotangent, loss_by_loss)
}


def all_ways(stage: int, ranks: int, all_weights: list[Tensor], jitted: tuple[str, ...]) -> dict[str, list[Any]]:
    """The gradients for each of several weights, which are chosen at run time and take no program of their own."""
    image, text = two_states(stage)
    x, y = own_batch(image, ranks)
    found: dict[str, list[Any]] = {}
    for name, way in WAYS.items():
        step = fz.jit(way)
        for weights in all_weights:
            gradients = way(image, text, x, y, weights)
            if name in jitted:
                small.assert_same_bits(step(image, text, x, y, weights), gradients)
            found.setdefault(name, []).append(fz.gather(tuple(gradients)))
        assert len(step.programs) == (name in jitted)
    return found


@every_layout
def test_gradients_of_two_losses_for_two_models(size: int, stage: int, jitted: bool) -> None:
    weights = [torch.tensor(w) for w in ([0.7, -2.0], [1.0, 0.0], [0.0, 1.0])]
    wanted = [expected(size, w) for w in weights]
    # The fast test traces the ways that have pullbacks; training, below, traces one loss of two models.
    traced = ("chained", "loss_by_loss") if (size, stage) == (2, 3) else tuple(WAYS)
    for found in world.run(all_ways, stage, size, weights, traced if jitted else (), size=size):
        for name, gradients in found.items():
            assert_close({name: gradients}, {name: wanted})


def one_forward() -> list[int]:
    """How many matrix products each of several ways takes."""
    mesh = fz.make_mesh("cpu", data=4, simulate=True)
    image, text = (fz.init(p, fz.sgd(0.1), mesh, policy="fp32") for p in (image_model(), text_model()))
    x, y = (part[0] for part in batches(1))
    programs = [fz.trace(way)(image, text, x, y, torch.ones(2)) for way in (together, chained, loss_by_loss)]
    return [program.flops() for program in programs]


def test_composition_adds_no_product_and_a_loss_by_itself_no_forward() -> None:
    as_one, in_two, by_loss = one_forward()
    forward = 2 * ROWS * (9 * 17 + 17 * 6 + 6 * 19 + 19 * 5)
    assert as_one == 3 * forward - 2 * ROWS * 9 * 17, "forward and backward, without the gradient of x"
    assert in_two == as_one, "x's gradient is not used, and goes"
    # The second loss hangs on the first product alone; with a cotangent of zero the others are still there.
    assert as_one < by_loss <= 2 * as_one - forward


# ---------------------------------------------------------------------------------------------------------
# Each model has its own policy, optimizer and layout


OPTIMIZERS: tuple[tuple[fz.Optimizer, Callable[..., torch.optim.Optimizer]], ...] = (
    (fz.sgd(0.1, momentum=0.9), lambda p: torch.optim.SGD(p, 0.1, momentum=0.9)),
    (fz.adamw(0.01, eps=1e-3), lambda p: torch.optim.AdamW(p, 0.01, eps=1e-3)),
)
WEIGHTS = torch.tensor([1.0, 0.3])


def trained(stage: int, ranks: int, jitted: bool) -> tuple[list[float], Any]:
    image = new_state(image_model(), stage, OPTIMIZERS[0][0])
    text = new_state(text_model(), 3 - stage, OPTIMIZERS[1][0])
    x, y = own_batch(image, ranks)

    def step(image: fz.State, text: fz.State, x: Tensor, y: Tensor) -> Any:
        loss, grads = fz.value_and_grad(objective, argnums=(0, 1))(image, text, x, y, WEIGHTS)
        (image, _), (text, _) = (fz.apply_gradients(s, g) for s, g in zip((image, text), grads, strict=True))
        return image, text, loss

    run = fz.jit(step, donate=(0, 1)) if jitted else step
    losses = []
    for _ in range(3):
        image, text, loss = run(image, text, x, y)
        losses.append(loss.item())
    return losses, fz.gather((image.params, text.params))


@every_layout
def test_two_models_train_with_their_own_optimizers_in_their_own_layouts(size: int, stage: int, jitted: bool) -> None:
    models = [{k: v.requires_grad_() for k, v in model.items()} for model in (image_model(), text_model())]
    optimizers = [make(model.values()) for (_, make), model in zip(OPTIMIZERS, models, strict=True)]
    x, y = (part.flatten(0, 1) for part in batches(size))
    losses = []
    for _ in range(3):
        loss = objective(models[0], models[1], x, y, WEIGHTS)
        losses.append(loss.item())
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
    found = world.run(trained, stage, size, jitted, size=size)
    for step in range(3):
        torch.testing.assert_close(sum(own[step] for own, _ in found) / size, losses[step], rtol=1e-5, atol=1e-5)
    wanted = fz.tree.map(Tensor.detach, tuple(models))
    for _, params in found:
        assert_close(params, wanted, 1e-4)


def under_policies(policies: tuple[str, str], stage: int, ranks: int, jitted: bool) -> dict[str, Any]:
    image, text = new_state(image_model(), stage, None, policies[0]), new_state(text_model(), stage, None, policies[1])
    x, y = own_batch(image, ranks)
    ways = {"together": together, "chained": chained} | ({"jit": fz.jit(chained)} if jitted else {})
    return {name: fz.gather(tuple(way(image, text, x, y, WEIGHTS))) for name, way in ways.items()}


PAIRS = [("mixed", "fp32"), ("bf16", "fp16-mixed"), ("fp16", "bf16-exact")]


@pytest.mark.parametrize(
    ("policies", "jitted"),
    [
        *((pair, pair == ("fp16", "bf16-exact")) for pair in PAIRS),
        *(pytest.param(pair, True, marks=pytest.mark.slow) for pair in PAIRS[:2]),
    ],
    ids=str,
)
def test_models_of_different_policies_meet_in_one_loss(policies: tuple[str, str], jitted: bool) -> None:
    """A model with a loss scale, too: the cotangent that it hands to one without has the scale taken out."""
    wanted = expected(2, WEIGHTS)
    for found in world.run(under_policies, policies, 3, 2, jitted, size=2):
        for name, gradients in found.items():
            assert_close({name: gradients}, {name: wanted}, 0.02)


def blocks(seed: int, *names: str) -> dict[str, Any]:
    """A model of two blocks, of two square matrices each."""
    return {"blocks": {str(i): drawn(10 * seed + i, **dict.fromkeys(names, (16, 16))) for i in range(2)}}


def through(p: Any, x: Tensor) -> Tensor:
    for block in p["blocks"].values():
        for w in block.values():
            x = torch.tanh(x @ w)
    return x


def step_of_two(first: fz.State, second: fz.State, x: Tensor) -> Any:
    """Two models composed by a cotangent."""
    y, pull_first = fz.vjp(lambda p: through(p, x), first)
    loss, pull_second = fz.vjp(lambda p, y: through(p, y).square().mean(), second, y)
    g_second, y_bar = pull_second(torch.ones_like(loss))
    (g_first,) = pull_first(y_bar)
    return fz.apply_gradients(first, g_first)[0], fz.apply_gradients(second, g_second)[0]


def step_of_one(both: fz.State, x: Tensor) -> Any:
    """The same computation written as one model."""
    grads = fz.grad(lambda p: through(p["second"], through(p["first"], x)).square().mean())(both)
    return fz.apply_gradients(both, grads)[0]


@pytest.mark.parametrize(
    ("stage", "names"),
    [
        pytest.param(stage, names, marks=[pytest.mark.slow] * ((stage, names) != (3, ("v", "w"))), id=f"{stage}-{name}")
        for names, name in ((("v", "w"), "blocks of the same names"), (("a", "b"), "other names in them"))
        for stage in (0, 3)
    ],
)
def test_the_program_of_two_models_holds_what_that_of_one_does(stage: int, names: tuple[str, str]) -> None:
    """Blocks of two models share a number, and are no one block: their collectives stay apart."""
    mesh, x = fz.make_mesh("cpu", data=4, simulate=True), torch.zeros(ROWS, 16)
    models = {"first": blocks(0, "v", "w"), "second": blocks(1, *names)}
    first, second, both = (
        fz.init(p, fz.adamw(0.1), mesh, fz.zero(stage), policy="fp32") for p in (*models.values(), models)
    )
    two = fz.trace(step_of_two, donate=(0, 1))(first, second, x)
    one = fz.trace(step_of_one, donate=(0,))(both, x)
    assert two.flops() == one.flops()
    assert two.traffic() == one.traffic()
    counters = 8  # the step and the seed of the second state
    assert two.memory().at_rest - one.memory().at_rest == counters
    assert abs(two.memory().peak - one.memory().peak) <= 64, "scalars that live for a moment"


# ---------------------------------------------------------------------------------------------------------
# The order of calls


def in_both_orders(stage: int, ranks: int) -> list[Any]:
    """Two forwards of one model, their backwards in either order, each once or twice."""
    image, _ = two_states(stage)
    x, _ = own_batch(image, ranks)

    def backwards(image: Any, x: Tensor, order: str) -> Any:
        pulls = {"a": fz.vjp(encode, image, x)[1], "b": fz.vjp(encode, image, -2 * x)[1]}
        bar = {"embedding": x[:, :6], "size": torch.ones(ROWS)}
        found = {name: pulls[name](bar)[0] for name in order}
        return found["a"], found["b"]

    calls = [(backwards, "ab"), (backwards, "baba"), (fz.jit(backwards), "ba")]
    return [fz.gather(f(image, x, order)) for f, order in calls]


@pytest.mark.parametrize("stage", [3, pytest.param(0, marks=pytest.mark.slow)])
def test_backwards_come_in_any_order_and_do_not_add_up(stage: int) -> None:
    for first, *others in world.run(in_both_orders, stage, 2, size=2):
        for other in others:
            small.assert_same_bits(other, first)
