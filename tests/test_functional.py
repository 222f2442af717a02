"""Modules as pure functions: parameters in, outputs out, buffers only where asked for."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from einops.layers.torch import EinMix, Rearrange
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import fzero as fz
from fzero import tree
from fzero._torch import make_fx
from fzero.errors import BufferWriteError
from fzero.modules.functional import functional

# torch compiles its jvp rules with torch.jit.script on first use, which warns of itself.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")


class Tied(nn.Module):
    """A bag of tokens with the embedding as its head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embed(tokens))


class Reassigns(nn.Module):
    """Keeps a running count in a buffer that it replaces."""

    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.count = self.count + x.sum()
        return x * 2


class WritesData(nn.Module):
    """Writes a buffer through `.data`, as codebooks with moving averages do."""

    code: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("code", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        self.code.data.copy_(x.detach().mean(0))
        return x + self.code


class MakesBuffer(nn.Module):
    """Fills a buffer that was None."""

    cache: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("cache", None)

    def forward(self, x: Tensor) -> Tensor:
        self.cache = x * 1
        return x


def norm() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))


LEVELS = {
    "plain": lambda f, x: f(x),
    "no_grad": lambda f, x: torch.no_grad()(f)(x),
    "inference": lambda f, x: torch.inference_mode()(f)(x),
    "vjp": lambda f, x: torch.func.vjp(f, x)[0],
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x,))[0],
    "vjp of vjp": lambda f, x: torch.func.vjp(lambda y: torch.func.vjp(f, y)[0], x)[0],
    "traced": lambda f, x: make_fx(f, tracing_mode="fake", _allow_non_fake_inputs=True)(x)(x),
    "traced vjp": lambda f, x: make_fx(
        lambda y: torch.func.vjp(f, y)[0], tracing_mode="fake", _allow_non_fake_inputs=True
    )(x)(x),
}
level = pytest.mark.parametrize("run", LEVELS.values(), ids=LEVELS)


def test_names_are_those_of_state_dict():
    module = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    apply, params = functional(module)
    assert tree.paths(params) == ["0.bias", "0.weight", "2.bias", "2.weight"]
    assert set(tree.paths(params)) == set(module.state_dict())
    assert all(not p.requires_grad for p in tree.leaves(params))
    x = torch.randn(5, 2)
    assert torch.equal(apply(params, x), module(x))


def test_gradient_is_that_of_the_module():
    module = norm().eval()
    apply, params = functional(module)
    x = torch.randn(3, 4)
    module(x).sum().backward()
    pullback = torch.func.vjp(lambda p: apply(p, x).sum(), params)[1]
    bar = pullback(torch.tensor(1.0))[0]
    for name, p in module.named_parameters():
        layer, leaf = name.split(".")
        assert p.grad is not None
        assert torch.equal(bar[layer][leaf], p.grad)


def test_tied_parameters_stay_tied():
    module = Tied()
    apply, params = functional(module)
    assert tree.paths(params) == ["embed.weight"]
    tokens = torch.arange(5)
    doubled = tree.map(lambda p: p * 2, params)
    assert torch.allclose(apply(doubled, tokens), module(tokens) * 4)


def test_later_changes_of_the_module_do_not_reach_the_function():
    module = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
    apply, params = functional(module.eval())
    x = torch.randn(2, 4)
    expected = apply(params, x)
    module.train()
    assert torch.equal(apply(params, x), expected)


@pytest.mark.parametrize(
    ("params", "lines"),
    [
        ({"weight": torch.ones(3, 2)}, ["bias: expected shape (3,), got nothing"]),
        (
            {"weight": torch.ones(3, 2), "bias": torch.ones(3), "x": {"y": torch.ones(1)}},
            ["x.y: expected nothing, got float32(1,)"],
        ),
        ({"weight": torch.ones(2, 3), "bias": torch.ones(3)}, ["weight: expected shape (3, 2), got float32(2, 3)"]),
        ({"weight": None, "bias": torch.ones(3)}, ["weight: expected shape (3, 2), got None"]),
        (
            torch.ones(3),
            ["weight: expected shape (3, 2), got nothing", "(the whole): expected nothing, got float32(3,)"],
        ),
    ],
)
def test_a_tree_that_does_not_fit_is_named(params, lines):
    apply, _ = functional(nn.Linear(2, 3))
    with pytest.raises(ValueError, match="params that do not fit") as error:
        apply(params, torch.ones(1, 2))
    assert all(line in str(error.value) for line in lines)


@level
def test_a_write_without_buffers_is_an_error(run):
    module = norm()
    before = copy.deepcopy(module.state_dict())
    apply, params = functional(module)
    with pytest.raises(
        BufferWriteError, match=r"1\.running_mean, 1\.running_var, 1\.num_batches_tracked.*buffers=True"
    ):
        run(lambda x: apply(params, x), torch.randn(8, 4))
    assert all(torch.equal(module.state_dict()[name], t) for name, t in before.items())


@level
@pytest.mark.parametrize(("module", "name"), [(Reassigns(), "count"), (WritesData(), "code")], ids=["new", "data"])
def test_other_writes_are_found(run, module, name):
    apply, params = functional(module)
    with pytest.raises(BufferWriteError, match=name):
        run(lambda x: apply(params, x), torch.randn(8, 4))
    assert torch.equal(getattr(module, name), torch.zeros_like(getattr(module, name)))


class DirectNorm(nn.BatchNorm1d):
    """Calls torch's operator itself, and counts no batches."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.batch_norm(x, self.weight, self.bias, self.running_mean, self.running_var, True, 0.1, 1e-5, False)


@pytest.mark.parametrize("module", [nn.InstanceNorm1d(4, track_running_stats=True), DirectNorm(4)])
def test_running_statistics_alone_are_found(module):
    apply, params = functional(module)
    with pytest.raises(BufferWriteError, match="running_mean, running_var"):
        apply(params, torch.randn(2, 4, 8))


@level
def test_buffers_are_read_without_complaint(run):
    module = norm().eval()
    apply, params = functional(module)
    x = torch.randn(8, 4)
    assert torch.allclose(run(lambda x: apply(params, x), x), module(x))


@level
def test_buffers_come_back_changed(run):
    module = norm()
    apply, params, buffers = functional(module, buffers=True)
    x = torch.randn(8, 4)

    def after(name: str) -> Tensor:
        return run(lambda x: apply(params, buffers, x)[1]["1"][name] * 1.0, x)

    changed = {name: after(name) for name in buffers["1"]}
    assert torch.equal(buffers["1"]["running_mean"], torch.zeros(4))
    out, _ = apply(params, buffers, x)
    assert module.state_dict()["1.num_batches_tracked"] == 0
    assert torch.equal(out, module(x))
    for name, b in module[1].named_buffers():
        assert torch.allclose(changed[name], b * 1.0)


@pytest.mark.parametrize("cls", [Reassigns, WritesData])
def test_any_way_of_writing_works_with_buffers(cls):
    apply, params, buffers = functional(cls(), buffers=True)
    x = torch.ones(2, 4)
    _, after = apply(params, buffers, x)
    _, last = apply(params, after, x)
    (before,), (once,), (twice,) = map(tree.leaves, (buffers, after, last))
    assert before.sum() == 0
    assert once.sum() > 0
    assert torch.equal(twice, once * (2 if cls is Reassigns else 1))


# ---------------------------------------------------------------------------------------------------------
# Modes


def dropping() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.BatchNorm1d(4))


def test_eval_is_the_function_in_evaluation_mode():
    module, x = dropping(), torch.randn(8, 4)
    apply, params = functional(module)
    with_buffers, _, buffers = functional(module, buffers=True)
    factory, _ = functional(dropping)
    module.eval()
    expected = module(x)
    assert torch.equal(apply.eval(params, x), expected)
    assert apply.eval.eval is apply.eval
    out, after = with_buffers.eval(params, buffers, x)
    assert torch.equal(out, expected) and tree.map(torch.equal, after, buffers) == tree.map(lambda _: True, buffers)
    assert torch.equal(factory.eval(params, x), expected)
    assert repr(apply) == "fz.functional of Sequential in training mode"


@pytest.mark.parametrize("training", [True, False])
def test_a_module_that_is_switched_afterwards_warns_once(training):
    x = torch.randn(8, 4)
    module = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)).train(training)
    apply, params = functional(module)
    calls = {True: lambda: apply(params, x), False: lambda: torch.func.vjp(lambda p: apply(p, x), params)}
    for call in calls.values():
        call()
    module.train(not training)
    calls[not training]()
    way = r"apply\.eval\(params" if training else r"before fz\.functional"
    with pytest.warns(UserWarning, match=f"was put into .* mode after this function.*{way}"):
        calls[training]()
    calls[training]()


# ---------------------------------------------------------------------------------------------------------
# Hooks


def test_hooks_of_the_forward_run():
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    module[0].register_forward_hook(lambda part, inputs, output: output * 2)
    module[1].register_forward_pre_hook(lambda part, inputs: (inputs[0] + 1,))
    apply, params = functional(module)
    x = torch.randn(2, 4)
    for run in LEVELS.values():
        assert torch.allclose(run(lambda x: apply(params, x), x), module(x))


@pytest.mark.parametrize(
    ("hook", "where"),
    [
        (lambda m: m[0].register_full_backward_hook(lambda *_: None), r"'?0'? \(Linear\)"),
        (lambda m: m.register_full_backward_pre_hook(lambda *_: None), r"'Sequential'"),
        (lambda m: m[0].weight.register_hook(lambda g: g), r"0\.weight"),
        (lambda m: m[0].bias.register_post_accumulate_grad_hook(lambda p: None), r"0\.bias"),
    ],
)
def test_hooks_on_gradients_are_refused(hook, where):
    module = nn.Sequential(nn.Linear(4, 4))
    hook(module)
    with pytest.raises(fz.ModuleError, match=f"{where}.* has a hook on gradients"):
        functional(module)


def test_a_buffer_from_nowhere_is_an_error():
    module = MakesBuffer()
    apply, params, buffers = functional(module, buffers=True)
    for call in (lambda: apply(params, buffers, torch.ones(2)), lambda: functional(module)[0]({}, torch.ones(2))):
        with pytest.raises(BufferWriteError, match="cache"):
            call()
    assert module.cache is None


def test_wrong_modules_are_refused():
    with pytest.raises(TypeError, match=r"expected an nn\.Module or a function"):
        functional(3)  # type: ignore[call-overload]
    with pytest.raises(TypeError, match=r"must return an nn\.Module, got int"):
        functional(lambda: 3)  # type: ignore[arg-type, return-value]
    with pytest.raises(ValueError, match="weight has no shape yet"):
        functional(nn.LazyLinear(3))


def test_factory_gives_meta_parameters_and_real_buffers():
    apply, params, buffers = functional(norm, buffers=True)
    assert all(p.is_meta for p in tree.leaves(params))
    assert torch.equal(buffers["1"]["running_var"], torch.ones(4))
    module = norm()
    real = tree.nest({name: p.detach() for name, p in module.named_parameters()})
    x = torch.randn(8, 4)
    assert torch.equal(apply(real, buffers, x)[0], module(x))


X = torch.linspace(-1, 1, 96).view(3, 4, 8)


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Sequential(
            EinMix("b t c -> b t d", weight_shape="c d", bias_shape="d", c=8, d=6), Rearrange("b t d -> b (t d)")
        ),
        lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True),
        lambda: nn.LSTM(8, 5, 2),
        lambda: parametrizations.weight_norm(nn.Linear(8, 3)),
        lambda: parametrizations.orthogonal(nn.Linear(8, 8)),
        lambda: parametrizations.spectral_norm(nn.Linear(8, 3)).eval(),
    ],
    ids=["einops", "attention", "lstm", "weight norm", "orthogonal", "spectral norm"],
)
def test_module_zoo(make):
    module = make()
    apply, params = functional(module)
    expected, got = tree.leaves(module(X)), tree.leaves(apply(params, X))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(expected, got, strict=True))
    zeros = tree.leaves(apply(tree.map(torch.zeros_like, params), X))
    assert not any(torch.equal(a, b) for a, b in zip(expected, zeros, strict=True))


def test_attention_reads_the_parameters_it_is_given():
    module = nn.MultiheadAttention(8, 2, batch_first=True)
    apply, params = functional(module)
    assert torch.allclose(apply(params, X, X, X)[0], module(X, X, X)[0], atol=1e-6)


def test_hugging_face_models():
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, ViTConfig, ViTModel

    tokens = {"input_ids": torch.arange(6)[None]}
    small: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 24,
    }
    gpt2 = GPT2Config(
        vocab_size=32, n_embd=16, n_layer=1, n_head=2, n_positions=8, bos_token_id=None, eos_token_id=None
    )
    cases = [
        (LlamaForCausalLM(LlamaConfig(vocab_size=32, tie_word_embeddings=True, **small)), tokens),
        (GPT2LMHeadModel(gpt2), tokens),
        (ViTModel(ViTConfig(image_size=8, patch_size=4, **small)), {"pixel_values": torch.ones(1, 3, 8, 8)}),
    ]
    for module, inputs in cases:
        module.eval()
        apply, params = functional(module)
        assert "lm_head.weight" not in tree.paths(params)
        assert torch.allclose(apply(params, **inputs)[0], module(**inputs)[0], atol=1e-6)


class TwoWays(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.drop, self.head = nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 2)

    def embed(self, x: Tensor) -> Tensor:
        return self.drop(self.body(x)).tanh()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embed(x))


def test_another_method_is_a_function_of_the_same_parameters():
    module, x = TwoWays(), torch.randn(3, 4)
    apply, params = fz.functional(module)
    embed = apply.method("embed")
    assert torch.equal(embed.eval(params, x), module.body(x).tanh())
    assert torch.equal(apply.method("head.forward")(params, torch.ones(8)), module.head(torch.ones(8)))
    gradient = torch.func.grad(lambda p: embed.eval(p, x).sum())(params)
    assert gradient["body"]["weight"].any() and not gradient["head"]["weight"].any()
    assert torch.equal(apply.eval(params, x), module.eval()(x)), "the module's own call stays"
    with pytest.raises(AttributeError, match=r"TwoWays has no method .embedd.\. Did you mean .embed."):
        apply.method("embedd")
