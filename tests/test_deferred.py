"""Models built leaf by leaf: the values they get, what these depend on, and the memory it takes."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fzero import tree
from fzero.errors import TraceError
from fzero.modules.deferred import Deferred, deferred
from fzero.modules.functional import functional
from tests.small import LiveBytes


def values(model: Deferred) -> dict[str, Tensor]:
    return {path: model.materialize(path) for path in model.paths}


def leaf(make: Callable[[], Tensor], seed: int = 0) -> Tensor:
    """Return what a model with one parameter made by `make` gets."""

    def factory() -> nn.Module:
        module = nn.Module()
        module.w = nn.Parameter(make(), requires_grad=False)
        return module

    model = deferred(factory, seed)
    abstract, t = model.module.get_parameter("w"), model.materialize("w")
    assert abstract.is_meta
    assert (t.shape, t.dtype) == (abstract.shape, abstract.dtype)
    return t


def mlp(width: int = 64) -> nn.Module:
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))


class Odd(nn.Module):
    """Tied weights, buffers, plain tensors, real constants and values that the factory reads."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 8, padding_idx=3)
        self.head = nn.Linear(8, 32, bias=False)
        self.head.weight = self.embed.weight
        self.norm = nn.BatchNorm1d(8)
        self.given = nn.Parameter(torch.tensor([1.0, 2.0]))
        self.array = nn.Parameter(torch.from_numpy(np.ones((2, 3))), requires_grad=False)
        self.register_buffer("mask", torch.ones(4, 4).triu(1).bool(), persistent=False)
        self.register_buffer("spin", torch.polar(torch.ones(4), torch.arange(4.0)))
        self.tables = [torch.tril(torch.ones(3, 3)), torch.arange(3) / 2]
        self.rates = [x.item() for x in torch.linspace(0, 1, 5)] + torch.zeros(2).add(1).tolist()
        self.array_read = (torch.ones(3) * 2).numpy()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.embed(x)))


def test_the_model_is_the_one_that_the_factory_makes():
    model, module = deferred(Odd), Odd()
    expected = dict((*module.named_parameters(), *module.named_buffers()))
    assert model.paths == tuple(expected)
    assert list(model.module.state_dict()) == list(module.state_dict())
    for path, t in values(model).items():
        assert (t.shape, t.dtype, t.stride()) == (expected[path].shape, expected[path].dtype, expected[path].stride())
    for name, p in model.module.named_parameters():
        assert p.is_meta
        assert p.requires_grad == expected[name].requires_grad
    for name, b in model.module.named_buffers():
        assert torch.equal(b, expected[name])
        assert torch.equal(model.materialize(name), b)
    built = model.module
    assert isinstance(built, Odd)
    assert built.head.weight is built.embed.weight
    assert all(torch.equal(a, b) for a, b in zip(built.tables, module.tables, strict=True))
    assert built.rates == module.rates
    assert (built.array_read == module.array_read).all()
    assert torch.equal(model.materialize("given"), torch.tensor([1.0, 2.0]))
    assert torch.equal(model.materialize("embed.weight")[3], torch.zeros(8))


def test_a_leaf_has_memory_of_its_own():
    model = deferred(Odd)
    for path in model.paths:
        model.materialize(path).zero_()
    assert model.materialize("given").sum() == 3
    assert model.materialize("embed.weight").abs().sum() > 0
    assert model.module.get_buffer("mask").any()


N, M = 96, 160


def initialised(f: Callable[..., Any], *args: Any, **kwargs: Any) -> Callable[[], Tensor]:
    def make() -> Tensor:
        t = torch.empty(N, M)
        f(t, *args, **kwargs)
        return t

    return make


@pytest.mark.parametrize(
    ("make", "mean", "std"),
    [
        (initialised(nn.init.normal_, 1.0, 0.5), 1.0, 0.5),
        (initialised(nn.init.uniform_, -1, 1), 0.0, 1 / math.sqrt(3)),
        (initialised(nn.init.trunc_normal_, std=0.02), 0.0, 0.02),
        (initialised(nn.init.trunc_normal_, std=1.0, a=-1, b=1), 0.0, 0.5396),
        (initialised(nn.init.kaiming_normal_), 0.0, math.sqrt(2 / M)),
        (initialised(nn.init.kaiming_uniform_, a=math.sqrt(5)), 0.0, math.sqrt(1 / 3 / M)),
        (initialised(nn.init.xavier_uniform_), 0.0, math.sqrt(2 / (M + N))),
        (initialised(nn.init.sparse_, 0.5, std=1.0), 0.0, math.sqrt(0.5)),
        (initialised(nn.init.orthogonal_), 0.0, 1 / math.sqrt(M)),
        (initialised(nn.init.constant_, 3.0), 3.0, 0.0),
        (lambda: torch.randn(N, M) * 0.02 + 1, 1.0, 0.02),
        (lambda: torch.rand(N, M, dtype=torch.float64) * 2 - 1, 0.0, 1 / math.sqrt(3)),
        (lambda: torch.randn(N, M, dtype=torch.bfloat16), 0.0, 1.0),
        (lambda: torch.randn(N, M).to(torch.bfloat16), 0.0, 1.0),
        (lambda: torch.randn(M, N).t(), 0.0, 1.0),
        (lambda: torch.rand_like(torch.tensor([[0.0] * M] * N)), 0.5, math.sqrt(1 / 12)),
        (lambda: torch.Tensor(N, M).normal_(), 0.0, 1.0),
    ],
)
def test_statistics(make, mean, std):
    t = leaf(make).double()
    assert t.shape == (N, M)
    assert abs(t.mean() - mean) < 5 * std / math.sqrt(t.numel()) + 1e-9
    assert abs(t.std() - std) < 5 * std / math.sqrt(t.numel()) + 1e-9
    if std:
        assert not torch.equal(t, leaf(make, seed=1).double())


def test_exact_values():
    q = leaf(initialised(nn.init.orthogonal_))
    assert torch.allclose(q @ q.T, torch.eye(N), atol=1e-5)
    assert torch.equal(leaf(initialised(nn.init.eye_)), torch.eye(N, M))
    assert leaf(initialised(nn.init.trunc_normal_, std=1.0, a=-1, b=1)).abs().max() <= 1
    assert (leaf(initialised(nn.init.sparse_, 0.5)) == 0).sum() == N // 2 * M
    assert leaf(lambda: torch.empty(5)).tolist() == [0.0] * 5


def test_values_written_through_views_and_masks():
    def make() -> Tensor:
        t = torch.zeros(4, 6)
        t[1] = torch.arange(6.0)
        t.data[:, ::2].add_(10)
        t[t > 12] = -1
        t.view(-1)[3:5].copy_(torch.tensor([7.0, 8.0]))
        return t.t()[1:]

    assert torch.equal(leaf(make), make())


def cast() -> nn.Module:
    module = mlp(4).to(torch.bfloat16)
    nn.init.constant_(module.get_parameter("0.weight"), 2.0)
    return module


def tied_and_cast() -> nn.Module:
    first, last = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    last.weight = first.weight
    module = nn.Sequential(first, last).double()
    nn.init.ones_(last.weight)
    return module


def given_other_memory() -> nn.Module:
    module = nn.Linear(4, 4, bias=False)
    module.weight.data = torch.ones(4, 4)
    module.weight.data.mul_(2)
    with torch.no_grad():
        module.weight.add_(1)
    return module


@pytest.mark.parametrize(
    ("factory", "path", "value", "count"),
    [(cast, "0.weight", 2.0, 4), (tied_and_cast, "0.weight", 1.0, 1), (given_other_memory, "weight", 3.0, 1)],
)
def test_memory_that_a_parameter_was_given_is_followed(factory, path, value, count):
    model, expected = deferred(factory), factory().state_dict()[path]
    assert len(model.paths) == count
    assert torch.equal(model.materialize(path), torch.full((4, 4), value, dtype=expected.dtype))
    assert torch.equal(model.materialize(path), expected)


def test_constants_keep_the_values_they_had():
    def make() -> Tensor:
        constant = torch.tensor([1.0, 2.0])
        t = torch.zeros(2).add_(constant)
        constant.zero_()
        return t

    assert leaf(make).tolist() == [1.0, 2.0]


def test_the_default_dtype_is_that_of_the_factory():
    def make() -> Tensor:
        torch.set_default_dtype(torch.float64)
        try:
            return torch.randn(3)
        finally:
            torch.set_default_dtype(torch.float32)

    assert leaf(make).dtype == torch.float64


def test_same_seed_same_values():
    a, b, c = values(deferred(mlp)), values(deferred(mlp)), values(deferred(mlp, seed=1))
    assert all(torch.equal(a[path], b[path]) for path in a)
    assert not any(torch.equal(a[path], c[path]) for path in a)
    assert not torch.equal(a["0.weight"], a["2.weight"])


def test_values_depend_on_the_path_alone():
    def longer() -> nn.Module:
        extra = nn.Linear(7, 7)
        module = mlp()
        assert isinstance(module, nn.Sequential)
        return module.append(nn.Dropout()).append(extra)

    a, b = deferred(mlp), deferred(longer)
    backwards = {path: b.materialize(path) for path in reversed(b.paths)}
    assert all(torch.equal(a.materialize(path), backwards[path]) for path in a.paths)


def test_copied_layers_start_equal_as_in_torch():
    encoder = deferred(lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2))
    for path in encoder.paths:
        if path.startswith("layers.0"):
            assert torch.equal(encoder.materialize(path), encoder.materialize(path.replace("layers.0", "layers.1")))
    layer = nn.Linear(4, 4)
    clones = deferred(lambda: nn.ModuleList([copy.deepcopy(layer) for _ in range(2)]))
    assert torch.equal(clones.materialize("1.weight"), layer.weight)


def test_values_that_the_factory_reads_are_those_of_the_leaf():
    seen = []

    def make() -> Tensor:
        t = torch.randn(100)
        while t.abs().max() > 2:
            t = torch.where(t.abs() > 2, torch.randn_like(t), t)
        seen.append(t.sum().item())
        return t

    t = leaf(make)
    assert t.abs().max() <= 2
    assert seen == [t.sum().item()]


def test_random_states_are_left_alone():
    def factory() -> nn.Module:
        torch.manual_seed(3)
        np.random.rand()
        random.random()
        module = mlp()
        torch.tensor([0.0, 0.0]).normal_()
        return module

    def states() -> list[Any]:
        return [torch.get_rng_state().tolist(), repr(np.random.get_state()), random.getstate()]

    before = states()
    a = deferred(factory)
    a.materialize("0.weight")
    assert states() == before
    assert torch.equal(a.materialize("0.weight"), deferred(mlp).materialize("0.weight"))


LEAF = 512 * 512 * 4


def linear(initialise: Callable[[Tensor], Any]) -> Callable[[], nn.Module]:
    def factory() -> nn.Module:
        layers = [nn.Linear(512, 512) for _ in range(3)]
        for layer in layers:
            initialise(layer.weight.data)
        return nn.Sequential(*layers)

    return factory


def chain() -> nn.Module:
    module = nn.Module()
    for name in "abc":
        module.register_parameter(name, nn.Parameter((torch.rand(512, 512) * 2 - 1).clamp(-0.9, 0.9).clone()))
    return module


@pytest.mark.parametrize(
    ("factory", "leaves"),
    [
        (linear(lambda w: w.normal_()), 1),
        (linear(lambda w: nn.init.xavier_uniform_(w)), 1),
        (chain, 1),
        (linear(lambda w: w.copy_(torch.randn(512, 512) * 0.02)), 2),
        (lambda: linear(lambda w: w.normal_())().to(torch.bfloat16), 1.5),
    ],
    ids=["in place", "xavier", "chain", "copy", "cast"],
)
def test_peak_is_the_largest_leaf(factory, leaves):
    with LiveBytes() as memory:
        model = deferred(factory)
    assert memory.peak < 1000
    with LiveBytes() as memory:
        for path in model.paths:
            model.materialize(path)
        assert memory.live() == 0
    assert memory.peak <= leaves * LEAF + 10_000


def test_truncated_normal_needs_no_copies_of_the_leaf(monkeypatch):
    monkeypatch.setattr("fzero.modules.recording._CHUNK", 4096)
    with LiveBytes() as memory:
        model = deferred(linear(lambda w: nn.init.trunc_normal_(w, std=0.02)))
        assert memory.peak < 1000
        model.materialize("0.weight")
    assert memory.peak <= LEAF + 10 * 4096 * 4


def test_values_of_hugging_face_models():
    from transformers import AutoModelForCausalLM, LlamaConfig, ViTConfig, ViTModel

    small: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=99, pad_token_id=5, tie_word_embeddings=True, intermediate_size=96, **small)
    vit = ViTConfig(image_size=16, patch_size=8, intermediate_size=96, **small)
    for factory in (lambda: AutoModelForCausalLM.from_config(config), lambda: ViTModel(vit)):
        model, module = deferred(factory), factory()
        expected = dict((*module.named_parameters(), *module.named_buffers()))
        assert model.paths == tuple(expected)
        for path, t in values(model).items():
            assert (t.shape, t.dtype) == (expected[path].shape, expected[path].dtype)
            if path in dict(module.named_buffers()):
                assert torch.equal(model.module.get_buffer(path), expected[path])
            elif "norm" in path or path.endswith("bias"):
                assert torch.equal(t, expected[path])
            else:
                assert abs(t.std() - 0.02) < 5 * 0.02 / math.sqrt(t.numel())
    padded = deferred(lambda: AutoModelForCausalLM.from_config(config)).materialize("model.embed_tokens.weight")
    assert torch.equal(padded[5], torch.zeros(64))
    apply, params = functional(lambda: AutoModelForCausalLM.from_config(config))
    assert "lm_head" not in params
    real = tree.map(lambda p: torch.zeros_like(p, device="cpu"), params)
    assert torch.equal(apply(real, torch.arange(4)[None]).logits, torch.zeros(1, 4, 99))


def test_what_cannot_be_recorded_says_so():
    def resizes() -> nn.Module:
        module = nn.Linear(2, 2)
        module.weight.data.resize_(4, 4)
        return module

    def on_meta() -> nn.Module:
        return nn.Linear(2, 2, device="meta")

    def conjugated() -> Tensor:
        return torch.randn(3, dtype=torch.complex64).conj()

    with pytest.raises(TraceError, match=r"aten\.resize_.*pass its parameters as a tree"):
        deferred(resizes)
    with pytest.raises(TraceError, match="on the meta device"):
        deferred(on_meta)
    with pytest.raises(TraceError, match="on the meta device"), torch.device("meta"):
        deferred(mlp)
    with pytest.raises(TraceError, match="conjugated"):
        leaf(conjugated)
    with pytest.raises(TypeError, match=r"must return an nn\.Module, got Tensor"):
        deferred(lambda: torch.ones(2))  # type: ignore[arg-type, return-value]
    with pytest.raises(ValueError, match=r"no leaf 'x'.*0\.weight"):
        deferred(mlp).materialize("x")


def test_an_error_of_the_factory_is_its_own():
    with pytest.raises(RuntimeError, match="size of tensor") as error:
        deferred(lambda: nn.Linear(2, int((torch.ones(3) + torch.ones(4)).sum())))
    assert "pass its parameters as a tree" in error.value.__notes__[0]


@pytest.mark.gpu
def test_on_a_gpu():
    model = deferred(mlp)
    before = torch.cuda.get_rng_state()
    a, b = model.materialize("0.weight", "cuda"), model.materialize("0.weight", "cuda")
    assert a.is_cuda
    assert torch.equal(a, b)
    assert torch.equal(torch.cuda.get_rng_state(), before)
