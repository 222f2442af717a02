"""A loop of plain PyTorch gives the same with wrapped models: every path to a backward, on any number of ranks."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fzero as fz
from fzero import torch_api
from tests import small, world

# In every world; the other ones are for few paths, or slow.
WORLDS = [(1, 3), (2, 3)]
MORE_WORLDS = [(1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (2, 2), (4, 0), (4, 1), (4, 2), (4, 3)]
FEW = [("several losses", 1, 0), ("a loss over two models", 2, 1), ("forward twice, backward in reverse", 4, 2)]


class Encoder(nn.Module):
    """Its output is a tree: floating-point tensors, an integer tensor, a string."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.side = nn.Linear(6, 24), nn.Linear(24, 3)

    def forward(self, x: Tensor) -> dict[str, Any]:
        hidden = torch.tanh(self.inner(x))
        return {"hidden": hidden, "side": self.side(hidden), "largest": hidden.argmax(-1), "name": "encoder"}


def make_head() -> nn.Module:
    return nn.Sequential(nn.GELU(), nn.Linear(24, 5))


class Plain:
    """A module and its optimizer with the face of a `Model`: the reference."""

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.module, self.optimizer = module, optimizer

    def __call__(self, *args: Any) -> Any:
        return self.module(*args)

    def no_sync(self) -> AbstractContextManager[None]:
        return nullcontext()

    def gradients(self) -> dict[str, Tensor]:
        return {name: p.grad for name, p in self.module.named_parameters() if p.grad is not None}

    def step(self, ranks: int) -> None:
        for p in self.module.parameters():
            if p.grad is not None:
                p.grad /= ranks
        self.optimizer.step()
        self.optimizer.zero_grad()


@dataclass(frozen=True)
class Batch:
    """What one rank sees in one step; `weight` multiplies each loss and cotangent."""

    x: Tensor
    y: Tensor
    weight: float


def batches(ranks: int, steps: int, weight: float = 1.0) -> list[list[Batch]]:
    g = torch.Generator().manual_seed(5)
    draw = partial(torch.randn, generator=g)
    return [[Batch(draw(4, 6), draw(4, 5), weight) for _ in range(ranks)] for _ in range(steps)]


# ---------------------------------------------------------------------------------------------------------
# The paths: plain PyTorch, run with plain and with wrapped models alike


def loss_defined_elsewhere(encoder: Any, head: Any, b: Batch) -> list[Tensor]:
    loss = b.weight * F.mse_loss(head(encoder(b.x)["hidden"]), b.y)
    loss.backward()
    return [loss.detach()]


def any_cotangent(encoder: Any, head: Any, b: Batch) -> list[Tensor]:
    head(encoder(b.x)["hidden"]).backward(b.weight * b.y)
    return []


def several_losses(encoder: Any, head: Any, b: Batch) -> list[Tensor]:
    output = encoder(b.x)
    score = head(output["hidden"])
    (b.weight * F.mse_loss(score, b.y)).backward(retain_graph=True)
    (b.weight * score.abs().mean()).backward(retain_graph=True)
    (b.weight * output["side"].square().sum()).backward()
    return []


def loss_over_two_models(encoder: Any, head: Any, b: Batch) -> list[Tensor]:
    hidden = torch.tanh(b.x @ torch.ones(6, 24))
    loss = encoder(b.x)["side"].square().mean() + F.mse_loss(head(hidden), b.y)
    (b.weight * loss).backward()
    return []


def middle_handed_over(encoder: Any, head: Any, b: Batch) -> list[Tensor]:
    hidden = encoder(b.x)["hidden"]
    middle = hidden.detach().requires_grad_()
    (b.weight * F.mse_loss(head(middle), b.y)).backward()
    assert middle.grad is not None
    hidden.backward(middle.grad)
    return [middle.grad]


def forward_twice(encoder: Any, head: Any, b: Batch, *, order: Sequence[int]) -> list[Tensor]:
    losses = [F.mse_loss(head(encoder(x)["hidden"]), b.y) for x in (b.x, 2 * b.x)]
    for i in order:
        (b.weight * losses[i]).backward()
    return []


def not_synchronised(encoder: Any, head: Any, b: Batch) -> list[Tensor]:
    first, second = (list(rows.split(2)) for rows in (b.x, b.y))
    with encoder.no_sync(), head.no_sync():
        (b.weight * F.mse_loss(head(encoder(first[0])["hidden"]), second[0])).backward()
    (b.weight * F.mse_loss(head(encoder(first[1])["hidden"]), second[1])).backward()
    return []


def called_twice_for_one_loss(encoder: Any, head: Any, b: Batch) -> list[Tensor]:
    one, other = encoder(b.x)["hidden"], encoder(-b.x.flip(0))["hidden"]
    (b.weight * (one * other).sum()).backward()
    (b.weight * F.mse_loss(head(one.detach()), b.y)).backward()
    return []


def gradients_of_inputs(encoder: Any, head: Any, b: Batch) -> list[Tensor]:
    x = b.x.clone().requires_grad_()
    output = encoder(x)
    (asked,) = torch.autograd.grad(b.weight * output["hidden"].sum(), x, retain_graph=True)
    loss = b.weight * (F.mse_loss(head(output["hidden"]), b.y) + output["side"].sum())
    loss.backward()
    assert x.grad is not None
    return [asked, x.grad]


PATHS: dict[str, Callable[..., list[Tensor]]] = {
    "a loss defined elsewhere": loss_defined_elsewhere,
    "any cotangent": any_cotangent,
    "several losses": several_losses,
    "a loss over two models": loss_over_two_models,
    "a middle tensor handed over": middle_handed_over,
    "forward twice, backward in order": partial(forward_twice, order=(0, 1)),
    "forward twice, backward in reverse": partial(forward_twice, order=(1, 0)),
    "backward in no_sync": not_synchronised,
    "called twice for one loss": called_twice_for_one_loss,
    "gradients of inputs": gradients_of_inputs,
}


def make_encoder() -> Encoder:
    torch.manual_seed(1)
    return Encoder()


def make_seeded_head() -> nn.Module:
    torch.manual_seed(2)
    return make_head()


def wrapped(stage: int, policy: str = "fp32", **options: Any) -> list[torch_api.Model]:
    """Two models of different learning rates."""
    options |= {"mesh": fz.make_mesh("cpu"), "layout": fz.zero(stage), "policy": policy}
    encoder = torch_api.wrap(make_encoder(), fz.adamw(3e-3, weight_decay=0.0), **options)
    return [encoder, torch_api.wrap(make_seeded_head(), fz.sgd(0.05), **options)]


def plain() -> list[Plain]:
    encoder, head = make_encoder(), make_seeded_head()
    return [
        Plain(encoder, torch.optim.AdamW(encoder.parameters(), lr=3e-3, weight_decay=0.0)),
        Plain(head, torch.optim.SGD(head.parameters(), lr=0.05)),
    ]


def gradients_of(model: torch_api.Model) -> dict[str, Tensor]:
    """The true values, which fp16 could not hold, in fp32."""
    if model.grads is None:
        return {}
    pieces = tuple(None if piece is None else piece.float() for piece in model.grads.pieces)
    return small.flat(fz.gather(model.grads.replace(pieces=pieces)))


def on_rank(path: str, stage: int, steps: list[list[Batch]]) -> tuple[list[Any], list[Any], list[Any]]:
    """What a rank sees on a path: values, gradients before each step, parameters at the end."""
    models = wrapped(stage, donate=False)
    rank = models[0].state.mesh.index("data")
    values, gradients = [], []
    for step in steps:
        values.append([v.detach() for v in PATHS[path](*models, step[rank])])
        gradients.append([gradients_of(m) for m in models])
        for model in models:
            if model.grads is not None:
                model.step()
    return values, gradients, [small.flat(fz.gather(m.state.params)) for m in models]


def in_one_process(path: str, steps: list[list[Batch]]) -> Iterator[tuple[list[Any], list[Any], list[Any]]]:
    """The same of plain models that see the batches of all ranks, for each rank."""
    models, values, gradients = plain(), [], []
    for step in steps:
        values.append([[v.detach().clone() for v in PATHS[path](*models, b)] for b in step])
        gradients.append([{n: g / len(step) for n, g in m.gradients().items()} for m in models])
        for model in models:
            model.step(len(step))
    params = [{name: p.detach() for name, p in m.module.named_parameters()} for m in models]
    for rank in range(len(steps[0])):
        yield [v[rank] for v in values], gradients, params


def assert_close(actual: Any, expected: Any, **tolerances: Any) -> None:
    torch.testing.assert_close(actual, expected, **tolerances)


def filled(gradients: list[Any], params: Any) -> list[Any]:
    """Gradients with zeros where autograd has none, because a path does not reach a leaf."""
    return [
        [
            {n: g.get(n, torch.zeros_like(p)) for n, p in own.items()} if g else {}
            for g, own in zip(step, params, strict=True)
        ]
        for step in gradients
    ]


def rows() -> list[Any]:
    fast = [*((path, *pair) for pair in WORLDS for path in PATHS), *FEW]
    more = [(path, *pair) for pair in MORE_WORLDS for path in PATHS]
    return [*fast, *(pytest.param(*row, marks=pytest.mark.slow) for row in more if row not in FEW)]


@pytest.mark.parametrize("path, size, stage", rows())
def test_a_loop_gives_what_plain_pytorch_gives(path, size, stage):
    steps = batches(size, steps=2)
    found = world.run(on_rank, path, stage, steps, size=size)
    for (values, gradients, params), expected in zip(found, in_one_process(path, steps), strict=True):
        assert_close(values, expected[0], rtol=1e-5, atol=1e-6)
        assert_close(gradients, filled(expected[1], expected[2]), rtol=1e-4, atol=1e-6)
        assert_close(params, expected[2], rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------
# Loss scaling


def scaled_on_rank(path: str, policy: str, stage: int, step: list[Batch]) -> tuple[list[Tensor], list[Any]]:
    models = wrapped(stage, policy)
    values = PATHS[path](*models, step[models[0].state.mesh.index("data")])
    return [v.detach() for v in values], [gradients_of(m) for m in models]


@pytest.mark.parametrize(
    "size, stage, policy",
    [pytest.param(1, 3, "fp16-mixed", marks=pytest.mark.slow), (2, 1, "fp16"), (2, 3, "fp16-mixed")],
)
@pytest.mark.parametrize("path", PATHS)
def test_the_loss_scale_lifts_gradients_over_the_underflow_of_fp16_on_every_path(path, size, stage, policy):
    steps = batches(size, steps=1, weight=2.0**-22)  # unscaled, fp16 holds next to nothing of it
    found = world.run(scaled_on_rank, path, policy, stage, steps[0], size=size)
    for (values, gradients), (wanted, expected, params) in zip(found, in_one_process(path, steps), strict=True):
        assert all(v.dtype == torch.float32 for v in values)
        for pair in zip(values, wanted[0], strict=True):
            assert relative(*pair) < 0.02
        for model, reference in zip(gradients, filled(expected, params)[0], strict=True):
            assert model.keys() == reference.keys()
            for name, gradient in model.items():
                assert relative(gradient, reference[name]) < 0.02, name


def relative(actual: Tensor, expected: Tensor) -> float:
    """The norm of the difference in units of the norm. Zero for two zeros."""
    difference = (actual.double() - expected.double()).norm()
    return float(difference / expected.double().norm().clamp(min=1e-30))


def overflow_on_one_rank() -> tuple[bool, float, Tensor]:
    encoder, _ = wrapped(3, "fp16-mixed")
    output = encoder(torch.ones(2, 6))["hidden"]
    output.backward(torch.full_like(output, torch.inf if encoder.state.mesh.index("data") == 1 else 1.0))
    info = encoder.step()
    scale = encoder.state.loss_scale
    assert scale is not None
    return bool(info["finite"]), float(scale / info["loss_scale"]), encoder.state.step


def test_an_overflow_on_one_rank_skips_the_step_on_all_and_lowers_the_scale():
    assert world.run(overflow_on_one_rank, size=2) == [(False, 0.5, 0), (False, 0.5, 0)]


def test_gradients_taken_at_different_loss_scales_add_up():
    (encoder, _), x = wrapped(3, "fp16-mixed"), torch.ones(2, 6)
    encoder(x)["hidden"].sum().backward()
    once = gradients_of(encoder)
    assert encoder.state.loss_scale is not None
    encoder.state = encoder.state.replace(loss_scale=encoder.state.loss_scale / 8)
    encoder(x)["hidden"].sum().backward()
    for name, gradient in gradients_of(encoder).items():
        assert relative(gradient, 2 * once[name]) < 1e-3


def test_low_precision_gradients_add_up_in_the_reduce_dtype():
    state = fz.init({"w": torch.ones(32)}, fz.sgd(0.1), policy="mixed")
    model = torch_api.Model(lambda p, x: p["w"] * x, state)
    model(torch.full((32,), 256.0)).sum().backward()
    for _ in range(4):
        model(torch.full((32,), 0.5)).sum().backward()  # half of bfloat16's last bit at 256: lost if added in it
    assert torch.equal(gradients_of(model)["w"], torch.full((32,), 258.0))


# ---------------------------------------------------------------------------------------------------------
# What autograd promises


def small_model(**options: Any) -> torch_api.Model:
    state = fz.init({"w": torch.eye(8) / 2}, fz.sgd(0.1), policy="fp32")
    return torch_api.Model(lambda p, x: torch.tanh(x @ p["w"]), state, **options)


def test_a_second_backward_needs_a_retained_graph():
    model = small_model()
    loss = model(torch.ones(2, 8)).sum()
    loss.backward(retain_graph=True)
    once = gradients_of(model)["w"]
    loss.backward()
    assert_close(gradients_of(model)["w"], 2 * once)
    with pytest.raises(RuntimeError, match="second time"):
        model(torch.ones(2, 8)).backward(loss.detach().expand(2, 8))
        loss.backward()


def test_a_second_derivative_is_refused_with_the_way_out():
    model, x = small_model(), torch.ones(2, 8, requires_grad=True)
    with pytest.raises(ValueError, match=r"create_graph=True.*fz\.grad inside"):
        torch.autograd.grad(model(x).sum(), x, create_graph=True)


def test_asking_for_the_gradient_of_inputs_alone_adds_nothing_to_the_model():
    model, x = small_model(), torch.ones(2, 8, requires_grad=True)
    torch.autograd.grad(model(x).sum(), x)
    assert model.grads is None
    model(x).sum().backward(inputs=[x])
    assert model.grads is None and x.grad is not None


def test_a_backward_frees_what_it_used_although_the_loss_lives_on():
    model = small_model()
    with small.LiveBytes() as bytes_:
        x = torch.ones(512, 8)
        loss = model(x).sum()
        held = bytes_.live()
        loss.backward()
        assert bytes_.live() < 1.5 * x.nbytes < held


def test_a_call_whose_output_is_dropped_leaves_nothing_behind():
    model = small_model()
    gc.collect()
    gc.disable()
    try:
        with small.LiveBytes() as bytes_:
            x = torch.ones(512, 8)
            model(x)
            assert bytes_.live() < 1.5 * x.nbytes
    finally:
        gc.enable()


def test_one_tensor_at_two_places_of_the_output_gets_both_cotangents():
    state = fz.init({"w": torch.ones(4)}, fz.sgd(0.1), policy="fp32")

    def twice(p: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        y = p["w"] * x
        return y, y

    model = torch_api.Model(twice, state)
    one, other = model(torch.ones(4))
    (one + 2 * other).sum().backward()
    assert torch.equal(gradients_of(model)["w"], torch.full((4,), 3.0))


def test_the_output_keeps_its_tree_and_only_floating_point_tensors_are_of_autograd():
    encoder, _ = wrapped(3)
    output = encoder(torch.ones(2, 6))
    assert output["name"] == "encoder" and not output["largest"].requires_grad
    assert output["hidden"].requires_grad and output["side"].requires_grad
    with torch.no_grad():
        assert not encoder(torch.ones(2, 6))["hidden"].requires_grad


def test_a_captured_tensor_that_requires_grad_is_refused():
    prompt = torch.ones(4, requires_grad=True)
    state = fz.init({"w": torch.ones(4)}, fz.sgd(0.1), policy="fp32")
    with pytest.raises(ValueError, match=r"closes over a tensor that requires grad.*as an argument"):
        torch_api.Model(lambda p: p["w"] * prompt, state)()


# ---------------------------------------------------------------------------------------------------------
# Traced calls


def traced_on_rank(path: str, policy: str, step: list[Batch]) -> None:
    b = step[fz.make_mesh("cpu").index("data")]
    eager, traced = wrapped(3, policy), wrapped(3, policy, traced=True)
    values, expected = PATHS[path](*traced, b), PATHS[path](*eager, b)
    small.assert_same_bits(values, expected)
    for one, other in zip(traced, eager, strict=True):
        small.assert_same_bits(one.grads, other.grads)


@pytest.mark.parametrize(
    "path, size, policy",
    [
        ("several losses", 1, "fp16-mixed"),
        ("gradients of inputs", 1, "fp16-mixed"),
        ("a middle tensor handed over", 2, "fp32"),
        pytest.param("a middle tensor handed over", 1, "fp16-mixed", marks=pytest.mark.slow),
        pytest.param("several losses", 2, "fp32", marks=pytest.mark.slow),
        pytest.param("gradients of inputs", 2, "fp32", marks=pytest.mark.slow),
    ],
)
def test_traced_calls_give_the_same_bits(path, size, policy):
    world.run(traced_on_rank, path, policy, batches(size, steps=1)[0], size=size)


def settled(bytes_: small.LiveBytes) -> int:
    """What stays alive: gloo's thread lets go of a collective's tensors a moment after the wait for it."""
    lowest = bytes_.live()
    for _ in range(20):
        time.sleep(0.01)
        lowest = min(lowest, bytes_.live())
    return lowest


def held_after_a_call(traced: bool) -> int:
    model = torch_api.wrap(lambda: nn.Linear(256, 256), fz.sgd(0.1), mesh=fz.make_mesh("cpu"), traced=traced)
    x = torch.ones(2, 256)
    model(x)
    with small.LiveBytes() as bytes_:
        output = model(x)
        held = settled(bytes_)
        output.float().sum().backward()
    return held


def test_a_traced_call_holds_no_gathered_leaf():
    full = 256 * 256 * 2
    for eager, traced in zip(*(world.run(held_after_a_call, t, size=2) for t in (False, True)), strict=True):
        assert eager > full > 4 * traced


def test_draws_of_traced_calls_are_those_of_eager_ones_and_modes_have_their_own_traces():
    x = torch.randn(16, 4)
    dropping = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 2))
    eager, traced = (torch_api.wrap(dropping, fz.sgd(0.1), policy="fp32", traced=t) for t in (False, True))
    for _ in range(2):
        small.assert_same_bits(traced(x).detach(), eager(x).detach())
    small.assert_same_bits(traced.eval()(x).detach(), eager.eval()(x).detach())


# ---------------------------------------------------------------------------------------------------------
# The state


@pytest.mark.parametrize("policy", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("donate, traced", [(True, False), (False, False), (True, True)])
def test_a_step_is_the_functional_one_to_the_last_bit(policy, donate, traced):
    x = torch.randn(4, 8, dtype=fz.policy(policy).compute)
    state = fz.init({"w": torch.randn(8, 24)}, fz.adamw(1e-2), policy=policy)
    own = fz.tree.map(torch.clone, state)
    model = torch_api.Model(lambda p, x: x @ p["w"], own, donate=donate, traced=traced)
    for _ in range(2):
        old = model.state
        model(x).float().square().mean().backward()
        info = model.step()
        _, gradient = fz.value_and_grad(lambda p: (x @ p["w"]).float().square().mean())(state)
        state, expected = fz.apply_gradients(state, gradient)
        small.assert_same_bits(model.state, state)
        small.assert_same_bits(info, expected)
        assert model.grads is None
        if donate:
            with pytest.raises(fz.DonatedError):
                fz.gather(old.params)
        else:
            fz.gather(old.params)


@pytest.mark.parametrize("donate", [True, False])
def test_a_backward_through_a_call_before_the_step_is_an_error_or_the_gradient_of_then(donate):
    model, x = small_model(donate=donate), torch.ones(2, 8)
    early = model(x).sum()
    model(x).sum().backward()
    expected = gradients_of(model)["w"]
    model.step()
    if donate:
        with pytest.raises(fz.DonatedError):
            early.backward()
    else:
        early.backward()
        assert_close(gradients_of(model)["w"], expected)


def test_zero_grad_forgets_and_a_step_without_gradients_says_so():
    model = small_model()
    model(torch.ones(2, 8)).sum().backward()
    model.zero_grad()
    with pytest.raises(ValueError, match="no backward has reached this model"):
        model.step()
    with pytest.raises(TypeError, match=r"expected a State.*fz\.init"):
        torch_api.Model(lambda p: p, {"w": torch.ones(2)})  # type: ignore[arg-type]


def test_inputs_come_in_the_compute_dtype_unless_asked_otherwise():
    state, x = fz.init({"w": torch.eye(8)}, fz.sgd(0.1), policy="bf16"), torch.ones(2, 8, requires_grad=True)
    output = torch_api.Model(lambda p, x: x @ p["w"], state)(x)
    output.float().sum().backward()
    assert output.dtype == torch.bfloat16 and x.grad is not None and x.grad.dtype == torch.float32
    with pytest.raises(RuntimeError, match="dtype"):
        torch_api.Model(lambda p, x: x @ p["w"], state, cast_inputs=False)(x)


# ---------------------------------------------------------------------------------------------------------
# Modules: modes, buffers, dropout


def make_normed() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2))


@pytest.mark.parametrize("given", ["a module", "a factory", "a module in eval mode"])
def test_modes_switch_and_buffers_move_in_training_only(given):
    module: Any = {"a module": make_normed, "a factory": lambda: make_normed}.get(given, lambda: make_normed().eval())()
    model, x = torch_api.wrap(module, fz.sgd(0.1), policy="fp32"), torch.randn(16, 4)
    reference = make_normed()
    values = small.flat(fz.gather(model.state.params))  # a factory draws values of its own
    reference.load_state_dict(values, strict=False)
    reference(x)
    assert model.training and "training" in repr(model)
    model(x)
    statistics = {name: b for name, b in reference.named_buffers()}
    assert_close(small.flat(model.buffers), statistics)
    assert_close(model.eval()(x).detach(), reference.eval()(x).detach(), rtol=1e-4, atol=1e-5)
    assert_close(small.flat(model.buffers), statistics)
    assert not torch.equal(model.train()(x), model.eval()(x))


def test_wrapping_leaves_the_module_as_it_was_and_keeps_parts_in_their_modes():
    module = make_normed()
    next(part for part in module.modules() if isinstance(part, nn.BatchNorm1d)).eval()
    before = [part.training for part in module.modules()]
    model = torch_api.wrap(module, fz.sgd(0.1), policy="fp32")
    assert [part.training for part in module.modules()] == before
    model(torch.randn(16, 4))
    assert_close(small.flat(model.buffers), dict(module.named_buffers()))  # a frozen norm does not move


def test_each_call_between_two_steps_draws_its_own_numbers():
    state, x = fz.init({"w": torch.ones(256)}, fz.sgd(0.0), policy="fp32"), torch.ones(256)
    drop = lambda p, x: F.dropout(p["w"] * x, 0.5)  # noqa: E731
    model = torch_api.Model(drop, state, donate=False)
    one, other = model(x), model(x)
    assert torch.equal(one, fz.call(drop, state, x)) and not torch.equal(one, other)
    (one + other).sum().backward()
    model.step()
    assert not torch.equal(model(x), one)
    again = torch_api.Model(drop, state)
    with torch.no_grad():
        assert torch.equal(again(x), one) and torch.equal(again(x), other)


def test_the_draws_of_a_call_are_those_of_its_backward():
    state, x = fz.init({"w": torch.ones(256)}, fz.sgd(0.1), policy="fp32"), torch.ones(256)
    model = torch_api.Model(lambda p, x: F.dropout(p["w"] * x, 0.5), state)
    first, second = model(x), model(x)
    second.sum().backward()
    assert torch.equal(gradients_of(model)["w"], second.detach())
    first.sum().backward()
    assert torch.equal(gradients_of(model)["w"], (first + second).detach())
