"""Weights that models share: the gradients of their uses add up, in whichever way the sharing is said."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fzero as fz
from tests import small, world
from tests.test_many_models import assert_close, batches, drawn, every_layout, new_state, own_batch


def trunk_model() -> dict[str, Tensor]:
    return drawn(4, embed=(9, 17), mix=(17, 17))


def head_model(seed: int) -> dict[str, Tensor]:
    return drawn(seed, out=(17, 5))


def head_loss(trunk: Any, head: Any, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(torch.tanh(torch.tanh(x @ trunk["embed"]) @ trunk["mix"]) @ head["out"], y)


def inverse_loss(trunk: Any, x: Tensor) -> Tensor:
    """Uses the trunk's embedding a second time, transposed, as a tied head does."""
    return (torch.tanh(x @ trunk["embed"]) @ trunk["embed"].mT - x).square().mean()


def all_three(trunk: Any, a: Any, b: Any, x: Tensor, y: Tensor) -> Tensor:
    return head_loss(trunk, a, x, y) + head_loss(trunk, b, x.flip(0), y) + inverse_loss(trunk, x)


def shared_in_one_function(trunk: Any, a: Any, b: Any, x: Tensor, y: Tensor) -> Any:
    return fz.grad(all_three, argnums=(0, 1, 2))(trunk, a, b, x, y)


def shared_by_three_functions(trunk: Any, a: Any, b: Any, x: Tensor, y: Tensor) -> Any:
    """One state, three vjps: the gradients of the shared part are added."""
    of_model = fz.grad(lambda model, rows: head_loss(model["trunk"], model["head"], rows, y))
    first, second = (of_model({"trunk": trunk, "head": head}, rows) for head, rows in ((a, x), (b, x.flip(0))))
    third = fz.grad(inverse_loss)(trunk, x)
    return fz.add(fz.add(first["trunk"], second["trunk"]), third), first["head"], second["head"]


def shared_by_two_primals(trunk: Any, a: Any, b: Any, x: Tensor, y: Tensor) -> Any:
    """The same state passed twice: each place has the gradient of its own use."""

    def f(one: Any, other: Any, a: Any, b: Any) -> Tensor:
        return head_loss(one, a, x, y) + head_loss(other, b, x.flip(0), y) + inverse_loss(other, x)

    first, second, g_a, g_b = fz.grad(f, argnums=(0, 1, 2, 3))(trunk, trunk, a, b)
    return fz.add(first, second), g_a, g_b


def shared(stage: int, ranks: int, jitted: bool) -> list[Any]:
    states = [new_state(model, stage) for model in (trunk_model(), head_model(5), head_model(6))]
    x, y = own_batch(states[0], ranks)
    ways: tuple[Callable[..., Any], ...] = (shared_in_one_function, shared_by_three_functions, shared_by_two_primals)
    found = []
    for way in ways:
        gradients = way(*states, x, y)
        if jitted:
            small.assert_same_bits(fz.jit(way)(*states, x, y), gradients)
        found.append(fz.gather(tuple(gradients)))
    return found


@every_layout
def test_gradients_of_a_part_that_models_share_add_up(size: int, stage: int, jitted: bool) -> None:
    models = [trunk_model(), head_model(5), head_model(6)]
    leaves = [leaf.requires_grad_() for model in models for leaf in model.values()]
    xs, ys = batches(size)
    torch.stack(
        [all_three(models[0], models[1], models[2], x, y) for x, y in zip(xs, ys, strict=True)]
    ).mean().backward()
    assert all(leaf.grad is not None for leaf in leaves)
    wanted = tuple({k: v.grad for k, v in model.items()} for model in models)
    for ways in world.run(shared, stage, size, jitted, size=size):
        for gradients in ways:
            assert_close(gradients, wanted)
