"""Gradients are those of plain PyTorch: of every kind of primal, in every layout, for any cotangent, to any order."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import fzero as fz
from fzero.tree import flatten, unflatten
from tests import small, world

SIZES = (1, 2, 4)
STAGES = (0, 1, 3)
every_layout = pytest.mark.parametrize(("size", "stage"), [(1, 3), (2, 0), (2, 1), (4, 3)])

# Forward-mode differentiation makes torch import a module of its own that uses what torch has deprecated.
forward_mode = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")


def network(p: Any, x: Tensor) -> Tensor:
    """Uses every leaf of `small.parameters`: (rows, 23) -> (rows, 2, 7)."""
    hidden = torch.tanh(x @ p["block"]["weight"]) @ p["head"].reshape(5, 14)
    return torch.sin(hidden.reshape(-1, 2, 7) + p["block"]["bias"]) * p["scale"]


def objective(p: Any, x: Tensor) -> Tensor:
    return network(p, x).square().mean()


def inputs(ranks: int, dtype: torch.dtype = torch.float64, rows: int = 6) -> Tensor:
    """A batch of its own for each rank."""
    return torch.randn(ranks, rows, 23, generator=torch.Generator().manual_seed(3), dtype=dtype)


def parameters(seed: int = 0) -> dict[str, Any]:
    return small.parameters(seed, torch.float64)


def sharded(tree: Any, stage: int = 3) -> fz.Sharded:
    return fz.shard(tree, fz.make_mesh("cpu"), fz.zero(stage))


def new_state(tree: Any, stage: int = 3, optimizer: fz.Optimizer | None = None, **options: Any) -> fz.State:
    options.setdefault("policy", "fp32")
    return fz.init(tree, optimizer or fz.adamw(0.1), fz.make_mesh("cpu"), fz.zero(stage), **options)


def reference(function: Callable[..., Tensor], tree: Any) -> Any:
    """The gradient of a scalar function by `torch.autograd`."""
    leaves, treedef = flatten(tree)
    tracked = [leaf.clone().requires_grad_() for leaf in leaves]
    found = torch.autograd.grad(function(unflatten(treedef, tracked)), tracked, materialize_grads=True)
    return unflatten(treedef, found)


def mean_over_ranks(function: Callable[..., Tensor], xs: Tensor) -> Callable[[Any], Tensor]:
    return lambda p: torch.stack([function(p, x) for x in xs]).mean()


def assert_close(actual: Any, expected: Any, rtol: float = 1e-12) -> None:
    """Two trees have the same paths and nearly the same values."""
    left, right = small.flat(actual), small.flat(expected)
    assert left.keys() == right.keys()
    for path, value in right.items():
        torch.testing.assert_close(left[path], value, rtol=rtol, atol=rtol, msg=partial("{}: {}".format, path))


# ---------------------------------------------------------------------------------------------------------
# Gradients over ranks


def gradient_on_ranks(stage: int, xs: Tensor, reduce: Any) -> Any:
    primal = sharded(parameters(), stage)
    return fz.gather(fz.grad(objective, reduce=reduce)(primal, xs[primal.mesh.index("data")]))


@every_layout
@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_gradient_of_a_sharded_is_the_mean_or_the_sum_over_ranks(reduce, size, stage):
    xs = inputs(size)
    expected = reference(mean_over_ranks(objective, xs), parameters())
    if reduce == "sum":
        expected = fz.tree.map(lambda g: g * size, expected)
    for gradient in world.run(gradient_on_ranks, stage, xs, reduce, size=size):
        assert_close(gradient, expected)


def gradient_of_state_on_ranks(stage: int, xs: Tensor) -> tuple[Tensor, Any]:
    state = new_state(small.parameters(), stage)
    value, gradient = fz.value_and_grad(objective)(state, xs[state.mesh.index("data")])
    return value, fz.gather(gradient)


@every_layout
def test_gradient_of_a_state_is_the_mean_over_ranks_and_the_value_is_the_ranks_own(size, stage):
    xs = inputs(size, torch.float32)
    expected = reference(mean_over_ranks(objective, xs), small.parameters())
    for rank, (value, gradient) in enumerate(world.run(gradient_of_state_on_ranks, stage, xs, size=size)):
        torch.testing.assert_close(value, objective(small.parameters(), xs[rank]))
        assert_close(gradient, expected, rtol=1e-5)


def gradient_over_two_axes(layout: fz.Layout, xs: Tensor) -> Any:
    mesh = fz.make_mesh("cpu", node=2, data=2)
    gradient = fz.grad(objective)(fz.shard(parameters(), mesh, layout), xs[mesh.index(("node", "data"))])
    return fz.gather(gradient)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("axes", [{"axis": ("node", "data")}, {"axis": "data", "replicate": "node"}], ids=str)
def test_the_mean_is_over_all_data_axes(axes, stage):
    xs = inputs(4)
    expected = reference(mean_over_ranks(objective, xs), parameters())
    for gradient in world.run(gradient_over_two_axes, fz.zero(stage, **axes), xs, size=4):
        assert_close(gradient, expected)


def pullback_on_ranks(stage: int, xs: Tensor, bars: Tensor) -> Any:
    primal = sharded(parameters(), stage)
    rank = primal.mesh.index("data")
    output, pullback = fz.vjp(network, primal, xs[rank])
    gradient, x_bar = pullback(bars[rank])
    return output, fz.gather(gradient), x_bar


@every_layout
def test_a_cotangent_of_any_shape_gives_the_mean_for_parameters_and_the_ranks_own_for_plain_inputs(size, stage):
    xs = inputs(size)
    bars = torch.randn(size, 6, 2, 7, dtype=torch.float64)
    expected = reference(
        lambda p: sum((network(p, x) * bar).sum() for x, bar in zip(xs, bars, strict=True)) / size, parameters()
    )
    for rank, (output, gradient, x_bar) in enumerate(world.run(pullback_on_ranks, stage, xs, bars, size=size)):
        assert_close(output, network(parameters(), xs[rank]))
        assert_close(gradient, expected)
        own = reference(lambda x, bar=bars[rank]: (network(parameters(), x) * bar).sum(), xs[rank])
        assert_close(x_bar, own)


def only_rank_0_differentiates() -> Any:
    rank = fz.make_mesh("cpu").index("data")
    return fz.grad(objective)(parameters(), inputs(1)[0]) if rank == 0 else None


def test_the_gradient_of_a_plain_tree_involves_no_other_rank():
    gradient, nothing = world.run(only_rank_0_differentiates, size=2)
    assert nothing is None
    assert_close(gradient, reference(lambda p: objective(p, inputs(1)[0]), parameters()))


def collectives(argnums: int | tuple[int, ...]) -> int:
    """How many the gradient of a step takes on four ranks."""
    mesh = fz.make_mesh("cpu", data=4, simulate=True)
    state = fz.init(small.parameters(), fz.sgd(0.1), mesh, policy="fp32")
    # Kept: a gradient with respect to `x` reads one more weight in the backward, which would be gathered again.
    program = fz.trace(fz.grad(lambda p, x, t: objective(p, x) * t, argnums=argnums), keep_gathered=math.inf)(
        state, inputs(1, torch.float32)[0], torch.tensor(0.5)
    )
    nodes = program.trace.module.graph.nodes
    return sum("_c10d_functional" in str(node.target) and "wait" not in str(node.target) for node in nodes)


def test_gradients_of_plain_tensors_beside_a_state_add_no_collective():
    assert collectives((0, 1, 2)) == collectives(0) > collectives(1) > 0, "a gather alone where the state is constant"


def factor_and_pieces(stage: int, reduce: Any) -> tuple[Tensor, Tensor, Tensor]:
    primal = sharded(parameters(), stage)
    gradient = fz.grad(objective, reduce=reduce)(primal, inputs(1)[0])
    whole = fz.gather(gradient.replace(factor=None))
    return gradient.factor, whole["head"], fz.gather(gradient)["head"]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(("reduce", "expected"), [("mean", 0.25), ("sum", 1.0)])
def test_the_mean_is_in_the_factor_and_the_value_is_leaf_times_factor(reduce, expected, stage):
    for factor, leaf, value in world.run(factor_and_pieces, stage, reduce, size=4):
        assert (factor.dtype, factor.shape) == (torch.float32, ())
        assert factor == expected
        assert torch.equal(value, leaf * expected)


# ---------------------------------------------------------------------------------------------------------
# Kinds of primals


@dataclass(frozen=True)
class Model:
    """A tree that is not made of dicts."""

    weight: Any
    temperature: Any


def towers(image: Any, text: Any, x: Tensor) -> Tensor:
    """A loss of two models, one of which reads what the other returns."""
    return (network(text, x) * network(image, x)).mean()


def two_models_on_ranks(stage: int, xs: Tensor, kind: str) -> Any:
    """Gradients of both models: taken together, or chained by the cotangent of what one hands to the other."""
    image, text = sharded(parameters(1), stage), sharded(parameters(2), stage)
    x = xs[image.mesh.index("data")]
    if kind == "together":
        return fz.gather(fz.grad(towers, argnums=(0, 1))(image, text, x))
    embedded, pull_image = fz.vjp(network, image, x)
    loss, pull_text = fz.vjp(lambda p, e: (network(p, x) * e).mean(), text, embedded)
    g_text, embedded_bar = pull_text(torch.ones_like(loss))
    g_image, _ = pull_image(embedded_bar)
    return fz.gather((g_image, g_text))


@pytest.mark.parametrize("kind", ["together", "chained"])
@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("size", SIZES)
def test_two_models_together_or_chained_by_a_cotangent(size, stage, kind):
    xs = inputs(size)
    expected = reference(
        mean_over_ranks(lambda both, x: towers(both[0], both[1], x), xs), (parameters(1), parameters(2))
    )
    for gradients in world.run(two_models_on_ranks, stage, xs, kind, size=size):
        assert_close(gradients, expected)


def mixtures_on_ranks(xs: Tensor) -> dict[str, Any]:
    """Gradients of a model and of a temperature that is a plain tensor, passed in several ways."""
    model, temperature = sharded(parameters()), torch.tensor(0.5, dtype=torch.float64)
    x = xs[model.mesh.index("data")]

    def loss(p: Any, t: Tensor) -> Tensor:
        return objective(p, x) / t

    both = fz.grad(loss, argnums=(0, 1))(model, temperature)
    swapped = fz.grad(loss, argnums=(1, 0))(model, temperature)
    in_dict = fz.grad(lambda a: loss(a["p"], a["t"]))({"p": model, "t": temperature})
    in_class = fz.grad(lambda a: loss(a.weight, a.temperature))(Model(model, temperature))
    return {
        "both": fz.gather(both),
        "swapped": fz.gather(swapped[::-1]),
        "dict": fz.gather((in_dict["p"], in_dict["t"])),
        "dataclass": fz.gather((in_class.weight, in_class.temperature)),
        "model only": fz.gather((fz.grad(loss)(model, temperature), both[1])),
        "temperature only": fz.gather((both[0], fz.grad(loss, argnums=1)(model, temperature))),
    }


@pytest.mark.parametrize("size", [1, 2])
def test_a_model_beside_plain_tensors_has_the_mean_while_they_have_the_ranks_own(size):
    xs = inputs(size)
    mean = reference(mean_over_ranks(lambda p, x: objective(p, x) / 0.5, xs), parameters())
    for rank, ways in enumerate(world.run(mixtures_on_ranks, xs, size=size)):
        own = -objective(parameters(), xs[rank]) / 0.25
        for gradients in ways.values():
            assert_close(gradients, (mean, own))


def test_two_states_and_a_plain_tensor():
    image, text = new_state(small.parameters(1)), new_state(small.parameters(2))
    x = inputs(1, torch.float32)[0]
    gradients = fz.grad(towers, argnums=(0, 1, 2))(image, text, x)
    expected = reference(lambda a: towers(*a), (small.parameters(1), small.parameters(2), x))
    assert_close(fz.gather(gradients), expected, rtol=1e-5)


@pytest.mark.parametrize(("policy", "seen"), [("fp32", "float32"), ("mixed", "bfloat16"), ("bf16", "bfloat16")])
def test_functions_see_the_compute_dtype_and_gradients_have_it(policy, seen):
    state = new_state(small.parameters(), policy=policy)
    dtypes: list[str] = []

    def loss(p: Any) -> Tensor:
        dtypes.extend(str(leaf.dtype).removeprefix("torch.") for leaf in fz.tree.leaves(p))
        return small.dot(p, p)

    gradient = fz.grad(loss)(state)
    fz.call(loss, state)
    dtypes += [str(piece.dtype).removeprefix("torch.") for piece in gradient.pieces]
    assert set(dtypes) == {seen}


def test_autocast_of_a_policy_holds_inside_the_function_alone():
    policy = fz.Policy(autocast=torch.bfloat16)
    state = new_state({"w": torch.randn(8, 8)}, policy=policy)
    output = fz.call(lambda p: (p["w"] @ p["w"], p["w"] + 1), state)
    assert [o.dtype for o in output] == [torch.bfloat16, torch.float32]
    assert fz.vjp(lambda p: p["w"] @ p["w"], state)[0].dtype == torch.bfloat16
    assert not torch.is_autocast_enabled("cpu")


# ---------------------------------------------------------------------------------------------------------
# Gradients pair with their primal


def test_gradients_pair_with_parameters_and_are_none_at_integer_and_frozen_leaves():
    tree = {"count": torch.tensor(3), **small.parameters()}
    optimizer = fz.partition_by(
        lambda path: "frozen" if path.startswith("block") else "free", {"frozen": None, "free": fz.sgd(0.1)}
    )
    state = new_state(tree, optimizer=optimizer)
    x = inputs(1, torch.float32)[0]
    gradient = fz.grad(lambda p: objective(p, x) * p["count"])(state)
    assert (gradient.paths, gradient.shapes) == (state.params.paths, state.params.shapes)
    absent = {path for path, piece in zip(gradient.paths, gradient.pieces, strict=True) if piece is None}
    assert absent == {"count", "block.bias", "block.weight"}
    expected = reference(lambda p: objective({**small.parameters(), **p}, x) * 3, {"head": tree["head"]})
    whole = fz.gather(gradient)
    assert whole["count"] is None
    assert_close(whole["head"], expected["head"], rtol=1e-5)


def placements(stage: int) -> list[bool]:
    """Whether each gradient piece is cut, and as long as the moment that it updates."""
    state = new_state(small.parameters(), stage)
    gradient = fz.grad(objective)(state, inputs(1, torch.float32)[0])
    moments = [m for m in fz.tree.leaves(state.moments) if m.ndim == 1]
    sizes = [piece.numel() for piece in gradient.pieces]
    assert sizes == [m.numel() for m in moments[: len(sizes)]]
    return [size < torch.Size(shape).numel() for size, shape in zip(sizes, gradient.shapes, strict=True)]


@pytest.mark.parametrize("stage", STAGES)
def test_gradients_are_cut_like_moments_from_stage_1_on(stage):
    cut = [False, stage > 0, stage > 0, False]  # block.bias and scale are too small
    assert world.run(placements, stage, size=4) == [cut] * 4


def test_unused_parameters_have_a_gradient_of_zeros():
    gradient = fz.gather(fz.grad(lambda p: p["scale"] * 3)(sharded(parameters())))
    assert gradient.pop("scale") == 3
    assert all(torch.equal(leaf, torch.zeros_like(leaf)) for leaf in fz.tree.leaves(gradient))


# ---------------------------------------------------------------------------------------------------------
# Outputs


def test_any_tree_may_be_an_output_and_its_cotangent_is_one_like_it():
    def f(w: Tensor) -> Any:
        return {"class": Model(w * 2, (w.sum(), None)), "list": [w * w], "rank": 3, "where": w.argmax()}

    w = torch.tensor([1.0, 2.0])
    output, pullback = fz.vjp(f, w)
    assert isinstance(output["class"], Model)
    assert (output["rank"], output["where"]) == (3, 1)
    bar = {"class": Model(torch.ones(2), (torch.tensor(10.0), None)), "list": [torch.ones(2)], "rank": 3}
    for where in (None, output["where"]):
        (gradient,) = pullback({**bar, "where": where})
        assert torch.equal(gradient, 2 + 10 + 2 * w)


def test_outputs_of_cotangent_zero_contribute_nothing():
    w = torch.tensor([1.0, 2.0])
    (_, pullback) = fz.vjp(lambda w: (w * 2, w.exp()), w)
    assert torch.equal(pullback((torch.ones(2), torch.zeros(2)))[0], torch.full((2,), 2.0))


def test_aux_is_returned_and_not_differentiated():
    def f(w: Tensor) -> Any:
        return w.square().sum(), {"twice": 2 * w, "name": "aux", "count": torch.tensor(4)}

    w = torch.tensor([1.0, 2.0])
    (value, aux), gradient = fz.value_and_grad(f, has_aux=True)(w)
    assert (value, aux["name"], aux["count"]) == (5, "aux", 4)
    assert torch.equal(aux["twice"], 2 * w) and torch.equal(gradient, 2 * w)
    gradient_alone, aux_alone = fz.grad(f, has_aux=True)(w)
    assert torch.equal(gradient_alone, gradient) and torch.equal(aux_alone["twice"], aux["twice"])
    output, pullback, aux_of_vjp = fz.vjp(f, w, has_aux=True)
    assert torch.equal(aux_of_vjp["twice"], 2 * w)
    assert torch.equal(pullback(torch.tensor(3.0))[0], 6 * w)
    assert not aux["twice"].requires_grad and not output.requires_grad


def test_an_output_of_hugging_face_keeps_its_class():
    outputs = pytest.importorskip("transformers.modeling_outputs")

    def f(w: Tensor) -> Any:
        return outputs.CausalLMOutputWithPast(loss=w.sum(), logits=w * 2)

    w = torch.tensor([1.0, 2.0])
    output, pullback = fz.vjp(f, w)
    assert isinstance(output, outputs.CausalLMOutputWithPast)
    bar = outputs.CausalLMOutputWithPast(loss=torch.tensor(10.0), logits=torch.ones(2))
    assert torch.equal(pullback(bar)[0], torch.full((2,), 12.0))
    with pytest.raises(fz.CotangentError, match=r"logits: expected float32\(2,\), got nothing"):
        pullback(outputs.CausalLMOutputWithPast(loss=torch.tensor(10.0)))


def test_a_language_model_of_hugging_face_returns_loss_logits_and_cache():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    model, tokens = transformers.LlamaForCausalLM(config), torch.randint(32, (2, 8))
    loss = model(input_ids=tokens, labels=tokens).loss
    expected = torch.autograd.grad(loss, list(model.parameters()))

    apply, params = fz.functional(model)
    output, pullback = fz.vjp(lambda p: apply(p, input_ids=tokens, labels=tokens), params)
    assert torch.equal(output.loss, loss)
    bar = fz.tree.map(lambda x: torch.zeros_like(x) if isinstance(x, Tensor) else x, output)
    bar["loss"] = torch.ones(())
    (gradient,) = pullback(bar)
    named = dict(zip([name for name, _ in model.named_parameters()], expected, strict=True))
    assert_close(small.flat(gradient), small.flat(named), rtol=1e-6)


# ---------------------------------------------------------------------------------------------------------
# Pullbacks are pure


def test_a_pullback_may_be_called_again_and_interleaved_with_another():
    tree, x = parameters(), inputs(1)[0]
    image, text = sharded(tree), sharded(parameters(1))
    output, pull_image = fz.vjp(lambda p: network(p, x), image)
    _, pull_text = fz.vjp(lambda p: network(p, x), text)
    one, two = torch.randn(2, *output.shape, dtype=torch.float64).unbind()
    calls = [(pull_image, one), (pull_text, two), (pull_text, one), (pull_image, two)]
    forward = [fz.gather(pull(bar)[0]) for pull, bar in calls]
    backward = [fz.gather(pull(bar)[0]) for pull, bar in reversed(calls)]
    for there, back in zip(forward, reversed(backward), strict=True):
        small.assert_same_bits(there, back)
    assert_close(forward[0], reference(lambda p: (network(p, x) * one).sum(), tree))
    assert_close(forward[3], reference(lambda p: (network(p, x) * two).sum(), tree))


def test_a_pullback_is_of_the_state_that_it_was_taken_at():
    state, x = new_state(small.parameters()), inputs(1, torch.float32)[0]
    output, pullback = fz.vjp(lambda p: network(p, x), state)
    (before,) = pullback(torch.ones_like(output))
    updated, _ = fz.apply_gradients(state, before)
    assert not torch.equal(fz.gather(updated.params)["head"], fz.gather(state.params)["head"])
    (after,) = pullback(torch.ones_like(output))
    small.assert_same_bits(before, after)


def pulls_back_after_donation() -> None:
    state, x = new_state(small.parameters()), inputs(1, torch.float32)[0]
    output, pullback = fz.vjp(lambda p: network(p, x), state)
    fz.train_step(objective)(state, x)
    pullback(torch.ones_like(output))


@pytest.mark.parametrize("size", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_pullback_of_a_donated_state_raises_instead_of_reading_what_was_overwritten(size):
    world.raises(fz.DonatedError, pulls_back_after_donation, size=size, match="donated to train_step")


def outputs_and_a_step(stage: int) -> list[tuple[Tensor, Tensor]]:
    """What calls hand out, beside a copy taken before a step reuses the state's memory."""
    state, x = new_state(small.parameters(), stage), inputs(1, torch.float32)[0]
    outputs = [
        *fz.tree.leaves(fz.call(lambda p: p, state)),
        fz.call(lambda p: p["block"]["weight"].T, state),
        fz.call(lambda p: (p["head"], x), state)[0],
        fz.vjp(lambda p: p["head"], state)[0],
        fz.vjp(lambda p: (p["scale"] * 2, p["block"]["weight"][1:]), state, has_aux=True)[2],
        *fz.tree.leaves(fz.gather(state.params)),
    ]
    copies = small.copied(outputs)
    fz.train_step(objective)(state, x)
    return list(zip(outputs, copies, strict=True))


@pytest.mark.parametrize(("size", "stage"), [(1, 0), (2, 3)])
def test_outputs_outlive_a_step_that_reuses_the_state(size, stage):
    for pairs in world.run(outputs_and_a_step, stage, size=size):
        for output, copy in pairs:
            assert small.same_bits(output, copy)


def test_differentiating_changes_neither_primals_nor_cotangents():
    state, x = new_state(small.parameters()), inputs(1, torch.float32)[0]
    output, pullback = fz.vjp(network, state, x)
    bar = torch.ones_like(output)
    before = small.copied((state, x, bar))
    pullback(bar)
    small.assert_same_bits((state, x, bar), before)


# ---------------------------------------------------------------------------------------------------------
# Bad input

ONES = torch.ones(2)
COTANGENTS: dict[str, tuple[Any, str]] = {
    "a bare tensor": (ONES, r"a: expected float32\(2,\), got nothing"),
    "another tree": ([ONES, {"c": ONES}], r"a: expected float32\(2,\), got nothing\n.*b\.c: expected.*got nothing"),
    "missing": ({"a": ONES, "b": {}}, r"b\.c: expected bfloat16\(2,\), got nothing"),
    "extra": ({"a": ONES, "b": {"c": ONES.bfloat16()}, "z": ONES}, r"z: expected nothing, got float32\(2,\)"),
    "None": ({"a": None, "b": {"c": ONES.bfloat16()}}, r"a: expected float32\(2,\), got None"),
    "a number": ({"a": 1.0, "b": {"c": ONES.bfloat16()}}, r"a: expected float32\(2,\), got 1\.0"),
    "shape": ({"a": ONES[:1], "b": {"c": ONES.bfloat16()}}, r"a: expected float32\(2,\), got float32\(1,\)"),
    "dtype": ({"a": ONES, "b": {"c": ONES}}, r"b\.c: expected bfloat16\(2,\), got float32\(2,\)"),
    "wider": ({"a": ONES.double(), "b": {"c": ONES.bfloat16()}}, r"a: expected float32\(2,\), got float64\(2,\)"),
    "device": ({"a": ONES.to("meta"), "b": {"c": ONES.bfloat16()}}, r"a: expected .* on cpu, got .* on meta"),
    "two at once": ({"a": ONES[:1], "b": {"c": ONES}}, r"a: expected.*\n.*b\.c: expected"),
}


@pytest.mark.parametrize("name", COTANGENTS)
def test_a_cotangent_unlike_the_output_is_refused_naming_each_path(name):
    cotangent, message = COTANGENTS[name]
    _, pullback = fz.vjp(lambda w: {"a": w * 2, "b": {"c": w.bfloat16()}}, ONES)
    with pytest.raises(ValueError, match=message) as raised:
        pullback(cotangent)
    assert type(raised.value) is fz.CotangentError


@pytest.mark.parametrize(
    ("cotangent", "message"),
    [
        ({"w": ONES, "n": torch.tensor(3)}, None),
        ({"w": ONES, "n": None}, None),
        ({"w": ONES, "n": 3}, r"n: expected int64\(\), got 3"),
        ({"w": ONES}, r"n: expected int64\(\), got nothing"),
    ],
)
def test_an_integer_output_takes_none_or_its_like(cotangent, message):
    _, pullback = fz.vjp(lambda w: {"w": w * 2, "n": torch.tensor(3)}, ONES)
    if message is None:
        assert torch.equal(pullback(cotangent)[0], 2 * ONES)
    else:
        with pytest.raises(fz.CotangentError, match=message):
            pullback(cotangent)


@pytest.mark.parametrize(
    ("output", "got"),
    [
        (lambda w: w * 2, r"output: float32\(2,\)"),
        (lambda w: {"loss": w.sum(), "logits": w}, r"logits: float32\(2,\), loss: float32\(\)"),
        (lambda w: (w.sum(), w.mean()), r"0: float32\(\), 1: float32\(\)"),
    ],
    ids=["vector", "dict", "two scalars"],
)
@pytest.mark.parametrize("transform", [fz.value_and_grad, fz.grad])
def test_only_one_scalar_has_a_gradient(transform, output, got):
    with pytest.raises(TypeError, match=got):
        transform(output)(ONES)


def test_a_scalar_may_have_dimensions_of_size_one():
    value, gradient = fz.value_and_grad(lambda w: w.sum(0, keepdim=True))(ONES)
    assert value.shape == (1,) and torch.equal(gradient, ONES)


@pytest.mark.parametrize("output", [lambda w: 3, lambda w: w.argmax(), lambda w: None], ids=["int", "index", "None"])
def test_a_function_without_floating_point_output_is_refused(output):
    with pytest.raises(TypeError, match="no floating-point tensor"):
        fz.vjp(output, ONES)


@pytest.mark.parametrize("output", [lambda w: w.sum(), lambda w: (w.sum(), 1, 2)])
def test_has_aux_wants_a_pair(output):
    with pytest.raises(TypeError, match=r"must return \(output, aux\)"):
        fz.vjp(output, ONES, has_aux=True)


@pytest.mark.parametrize("argnums", [2, -1, (0, 2), (0, 0)])
def test_argnums_that_name_no_argument_or_one_twice_are_refused(argnums):
    with pytest.raises(TypeError, match="argnums="):
        fz.value_and_grad(lambda a, b: (a * b).sum(), argnums=argnums)(ONES, ONES)


@pytest.mark.parametrize("argnums", [0, 1, (0,), (1, 0), (0, 1, 2)])
def test_argnums_choose_the_gradients_and_their_order(argnums):
    a, b, c = torch.tensor(2.0), torch.tensor(3.0), torch.tensor(5.0)
    every = (b * c, a * c, a * b)
    gradient = fz.grad(lambda a, b, c: a * b * c, argnums=argnums)(a, b, c)
    assert gradient == (every[argnums] if isinstance(argnums, int) else tuple(every[i] for i in argnums))


made_outside = fz.grad(lambda w: w.square().sum())


@pytest.mark.parametrize(
    "f",
    [
        lambda w: fz.grad(lambda w: w.square().sum())(w),
        lambda w: fz.value_and_grad(lambda w: w.square().sum())(w),
        lambda w: fz.vjp(lambda w: w.square(), w)[0],
        lambda w: fz.split_vjp(lambda w: w.square())[0](w)[0],
        lambda w: made_outside(w),
    ],
    ids=["grad", "value_and_grad", "vjp", "split_vjp", "made outside"],
)
def test_torch_compile_around_vjp_is_refused(f):
    compiled = torch.compile(f, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match=r"Use fz\.jit around the step instead of torch\.compile"):
        compiled(ONES)


# ---------------------------------------------------------------------------------------------------------
# Higher orders and other transforms


def local_penalty(p: Any, x: Tensor) -> Tensor:
    """A gradient penalty: a gradient taken inside the function, of this rank's objective."""
    gradient = fz.grad(objective)(p, x)
    return sum((g.square().sum() for g in fz.tree.leaves(gradient)), torch.zeros((), dtype=x.dtype))


def penalty_by_autograd(p: Any, x: Tensor) -> Tensor:
    gradients = torch.autograd.grad(objective(p, x), fz.tree.leaves(p), create_graph=True)
    return torch.stack([g.square().sum() for g in gradients]).sum()


def penalty_on_ranks(stage: int, xs: Tensor) -> Any:
    primal = sharded(parameters(), stage)
    return fz.gather(fz.grad(local_penalty)(primal, xs[primal.mesh.index("data")]))


@every_layout
def test_a_gradient_penalty_inside_the_function(size, stage):
    xs = inputs(size)
    expected = reference(mean_over_ranks(penalty_by_autograd, xs), parameters())
    for gradient in world.run(penalty_on_ranks, stage, xs, size=size):
        assert_close(gradient, expected)


def hessian_vector_product(function: Callable[[Any], Tensor], tree: Any, direction: Any) -> Any:
    """The unsharded one, by `torch.autograd` twice."""

    def slope(p: Any) -> Tensor:
        gradients = torch.autograd.grad(function(p), fz.tree.leaves(p), create_graph=True)
        return torch.stack([(g * d).sum() for g, d in zip(gradients, fz.tree.leaves(direction), strict=True)]).sum()

    return reference(slope, tree)


def forward_over_reverse_on_ranks(stage: int, xs: Tensor) -> Any:
    primal, tangent = sharded(parameters(), stage), sharded(parameters(1), stage)
    x = xs[primal.mesh.index("data")]
    _, product, *_ = torch.func.jvp(lambda p: fz.grad(objective)(p, x), (primal,), (tangent,))
    return fz.gather(product)


@forward_mode
@every_layout
def test_a_hessian_vector_product_forward_over_reverse(size, stage):
    xs = inputs(size)
    expected = hessian_vector_product(mean_over_ranks(objective, xs), parameters(), parameters(1))
    for product in world.run(forward_over_reverse_on_ranks, stage, xs, size=size):
        assert_close(product, expected)


def large(seed: int = 0) -> dict[str, Tensor]:
    """The leaves that are cut over up to four ranks."""
    tree = parameters(seed)
    return {"weight": tree["block"]["weight"], "head": tree["head"]}


def objective_of_large(p: Any, x: Tensor) -> Tensor:
    rest = parameters(5)
    block = {"weight": p["weight"], "bias": rest["block"]["bias"]}
    return objective({"block": block, "head": p["head"], "scale": rest["scale"]}, x)


def reverse_over_reverse_on_ranks(xs: Tensor) -> Any:
    """The gradient of the global inner product of gradient and direction: each rank has its pieces' part."""
    primal, direction = sharded(large()), sharded(large(1))
    x = xs[primal.mesh.index("data")]

    def slope(p: fz.Sharded) -> Tensor:
        gradient = fz.grad(objective_of_large)(p, x)
        assert gradient.factor is None, "inside a transform the leaves hold true values"
        products = [(g * d).sum() for g, d in zip(gradient.pieces, direction.pieces, strict=True)]
        return torch.stack(products).sum()

    return fz.gather(torch.func.grad(slope)(primal))


@pytest.mark.parametrize("size", SIZES)
def test_a_hessian_vector_product_reverse_over_reverse_through_the_collectives(size):
    xs = inputs(size)
    expected = hessian_vector_product(mean_over_ranks(objective_of_large, xs), large(), large(1))
    for product in world.run(reverse_over_reverse_on_ranks, xs, size=size):
        assert_close(product, expected)


def directional_derivative_on_ranks(stage: int, xs: Tensor) -> Any:
    primal, tangent = sharded(parameters(), stage), sharded(parameters(1), stage)
    x = xs[primal.mesh.index("data")]
    return torch.func.jvp(lambda p: fz.call(network, p, x), (primal,), (tangent,))


@forward_mode
@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("size", SIZES)
def test_forward_mode_through_call(size, stage):
    xs = inputs(size)
    for rank, actual in enumerate(world.run(directional_derivative_on_ranks, stage, xs, size=size)):
        expected = torch.func.jvp(lambda p, x=xs[rank]: network(p, x), (parameters(),), (parameters(1),))
        assert_close(actual, expected)


def ensemble_on_ranks(xs: Tensor) -> Any:
    members = [sharded(parameters(seed)) for seed in (0, 1, 2)]
    x = xs[members[0].mesh.index("data")]
    stacked = fz.tree.map(lambda *pieces: torch.stack(pieces), *members)
    outputs = torch.func.vmap(lambda p: fz.call(network, p, x))(stacked)
    gradients = torch.func.vmap(lambda p: fz.grad(objective)(p, x).pieces)(stacked)
    alone = [[piece * g.factor for piece in g.pieces] for g in (fz.grad(objective)(m, x) for m in members)]
    return outputs, gradients, [torch.stack(pieces) for pieces in zip(*alone, strict=True)]


@pytest.mark.parametrize("size", [1, 2])
def test_an_ensemble_is_vmap_over_stacked_pieces(size):
    xs = inputs(size)
    for rank, (outputs, gradients, alone) in enumerate(world.run(ensemble_on_ranks, xs, size=size)):
        assert_close(outputs, torch.stack([network(parameters(seed), xs[rank]) for seed in (0, 1, 2)]))
        assert_close(list(gradients), alone)


def test_eager_and_traced_gradients_have_the_same_bits():
    state, x = new_state(small.parameters()), inputs(1, torch.float32)[0]
    for transform in (fz.value_and_grad(objective), fz.value_and_grad(local_penalty)):
        small.assert_same_bits(fz.jit(transform)(state, x), transform(state, x))


# ---------------------------------------------------------------------------------------------------------
# Functions that do not depend on what they are differentiated by


LINEAR = torch.nn.Linear(4, 4)


def through_the_module(p: Any, x: Tensor) -> Tensor:
    return LINEAR(x).sum()


def under_no_grad(p: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        return (x @ p["weight"]).sum()


CUT_OFF: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "through the module": through_the_module,
    "under no_grad": under_no_grad,
    "detached": lambda p, x: (x @ p["weight"].detach()).sum(),
    "a constant": lambda p, x: torch.zeros(()),
}


@pytest.mark.parametrize("f", CUT_OFF.values(), ids=CUT_OFF)
def test_a_loss_without_a_path_to_the_parameters_is_refused(f):
    x = torch.ones(2, 4)
    state = fz.init(LINEAR, fz.sgd(0.1), fz.make_mesh("cpu"), policy="fp32")
    gradient = fz.value_and_grad(f)
    calls: list[Callable[[], Any]] = [
        lambda: gradient(state, x),
        lambda: fz.jit(gradient)(state, x),
        lambda: fz.accumulate(gradient, 2)(state, x),
        lambda: fz.train_step(f, donate=False)(state, x),
        lambda: fz.vjp(lambda s: f(s, x), state),
        lambda: gradient({"weight": torch.ones(4, 4)}, x),
    ]
    for call in calls:
        with pytest.raises(fz.GradientError, match=r"test_autodiff\.py:\d+\) returns does not depend.*apply\(params"):
            call()
    assert torch.isfinite(fz.call(f, state, x))


def test_a_leaf_that_is_not_used_a_frozen_state_and_a_constant_output_are_fine():
    x = torch.ones(2, 4)
    state = fz.init(LINEAR, fz.sgd(0.1), fz.make_mesh("cpu"), policy="fp32")
    _, gradient = fz.value_and_grad(lambda p, x: (x @ p["weight"]).sum())(state, x)
    assert (fz.gather(gradient)["bias"] == 0).all()
    frozen = fz.init(LINEAR, fz.partition_by(lambda path: "no", {"no": None}), fz.make_mesh("cpu"), policy="fp32")
    assert fz.value_and_grad(through_the_module)(frozen, x)[1].pieces == (None, None)
    _, pullback = fz.vjp(lambda p: (p["weight"].sum(), torch.ones(2)), state)
    assert (fz.gather(pullback((torch.tensor(1.0), torch.ones(2)))[0])["weight"] == 1).all()
    assert fz.vjp(lambda w: torch.ones(()), torch.ones(3))[1](torch.tensor(1.0))[0].tolist() == [0, 0, 0]
    with torch.no_grad():
        assert fz.value_and_grad(lambda w: (w * w).sum())(torch.ones(3))[1].tolist() == [2, 2, 2]
