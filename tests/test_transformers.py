"""Models of Hugging Face Transformers: their own loss and outputs, cache, masks, dropout and tied heads.

Gradients are those of plain torch, traced is eager, alone and on several ranks. The models are made here, small and
with random weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fzero as fz
from tests import small, world

transformers = pytest.importorskip("transformers")

# torch compiles its jvp rules with torch.jit.script on first use, which warns of itself.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")

SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "attention_dropout": 0.2,
}
TEXT = {"vocab_size": 32, "max_position_embeddings": 16, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
IMAGE = {"image_size": 8, "patch_size": 4}


def llama() -> nn.Module:
    config = transformers.LlamaConfig(**TEXT, **SIZES, num_key_value_heads=1, tie_word_embeddings=True)
    return transformers.LlamaForCausalLM(config)


def mistral() -> nn.Module:
    return transformers.MistralForCausalLM(
        transformers.MistralConfig(**TEXT, **SIZES, num_key_value_heads=1, sliding_window=3)
    )


def mixtral(experts: str = "batched_mm") -> nn.Module:
    return transformers.MixtralForCausalLM(
        transformers.MixtralConfig(
            **TEXT, **SIZES, num_key_value_heads=1, num_local_experts=4, experts_implementation=experts
        )
    )


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=32, n_embd=16, n_layer=1, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=1
    )
    config.loss_type = "ForCausalLM"
    return transformers.GPT2LMHeadModel(config)


def bert() -> nn.Module:
    return transformers.BertForMaskedLM(transformers.BertConfig(**TEXT, **SIZES))


def vit() -> nn.Module:
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(**IMAGE, **SIZES, hidden_dropout_prob=0.1, num_labels=3)
    )


def clip() -> nn.Module:
    config = transformers.CLIPConfig(text_config={**TEXT, **SIZES}, vision_config={**IMAGE, **SIZES}, projection_dim=8)
    return transformers.CLIPModel(config)


def t5() -> nn.Module:
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=32, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0
        )
    )


def inputs(rank: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(rank)
    tokens = torch.randint(3, 32, (2, 6), generator=generator)
    return {
        "tokens": tokens,
        "images": torch.randn(2, 3, 8, 8, generator=generator),
        "kinds": torch.tensor([0, 2]),
        "padding": torch.tensor([[1] * 6, [1] * 4 + [0] * 2]),
        "packed": torch.tensor([[0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 0, 1]]),
    }


def text(x: dict[str, Tensor]) -> dict[str, Any]:
    return {"input_ids": x["tokens"], "labels": x["tokens"]}


def pairs(x: dict[str, Tensor]) -> dict[str, Any]:
    return {"input_ids": x["tokens"], "pixel_values": x["images"], "attention_mask": x["padding"], "return_loss": True}


Case = tuple[Callable[[], nn.Module], Callable[[dict[str, Tensor]], dict[str, Any]]]

# name: model, its arguments of a batch
CASES: dict[str, Case] = {
    "llama": (llama, text),
    "llama, no cache": (llama, lambda x: text(x) | {"use_cache": False}),
    "llama, padded": (llama, lambda x: text(x) | {"attention_mask": x["padding"]}),
    "llama, packed": (llama, lambda x: text(x) | {"use_cache": False, "position_ids": x["packed"]}),
    "mistral, no cache": (mistral, lambda x: text(x) | {"use_cache": False}),
    "mixtral, no cache": (mixtral, lambda x: text(x) | {"use_cache": False}),
    "gpt2": (gpt2, text),
    "gpt2, no cache": (gpt2, lambda x: text(x) | {"use_cache": False}),
    "bert, padded": (bert, lambda x: text(x) | {"attention_mask": x["padding"]}),
    "vit": (vit, lambda x: {"pixel_values": x["images"], "labels": x["kinds"]}),
    "clip, padded": (clip, pairs),
    "t5, padded": (t5, lambda x: text(x) | {"attention_mask": x["padding"]}),
}
FAST = {
    ("llama, no cache", True),
    ("llama, padded", False),
    ("gpt2", True),
    ("vit", True),
    ("clip, padded", False),
}
GRADIENTS = [
    pytest.param(name, train, marks=() if (name, train) in FAST else pytest.mark.slow, id=f"{name}, train={train}")
    for name in CASES
    for train in (False, True)
]
TIED = {"llama": "lm_head.weight", "gpt2": "lm_head.weight", "bert": "cls.predictions.decoder.weight"}


def made(name: str, train: bool) -> nn.Module:
    torch.manual_seed(1)
    return CASES[name][0]().train(train)


def of(name: str, rank: int = 0) -> dict[str, Any]:
    return CASES[name][1](inputs(rank))


def plain_gradient(module: nn.Module, arguments: dict[str, Any], key: int) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and gradients of plain torch; dropout draws from a key, so that it can be the same elsewhere."""
    loss = fz.keyed(lambda: module(**arguments).loss)(key)
    named = dict(module.named_parameters())
    gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    zipped = zip(named.items(), gradients, strict=True)
    return loss.detach(), {name: torch.zeros_like(p) if g is None else g for (name, p), g in zipped}


@pytest.mark.parametrize(("name", "train"), GRADIENTS)
def test_gradients_are_those_of_plain_torch_and_traced_is_eager(name: str, train: bool) -> None:
    module, arguments = made(name, train), of(name)
    apply, params = fz.functional(module)
    assert TIED.get(name.split(",")[0]) not in fz.tree.paths(params), "a tied head is one parameter"

    gradient = fz.value_and_grad(lambda p, x: fz.keyed(lambda: apply(p, **x).loss)(7))
    loss, gradients = gradient(params, arguments)
    expected_loss, expected = plain_gradient(module, arguments, 7)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(small.flat(gradients), dict(sorted(expected.items())), rtol=1e-4, atol=1e-6)
    small.assert_same_bits(fz.jit(gradient)(params, arguments), (loss, gradients))
    if train:
        assert not torch.equal(loss, plain_gradient(module.eval(), arguments, 7)[0]), "dropout was on"


def test_a_mask_of_ones_gives_the_same_numbers_up_to_rounding() -> None:
    # Eagerly Transformers looks, and leaves such a mask out; a trace cannot look.
    apply, params = fz.functional(made("llama", False))
    arguments = of("llama")
    gradient = fz.value_and_grad(lambda p, x: apply(p, **x).loss)
    masked = fz.jit(gradient)(params, arguments | {"attention_mask": torch.ones_like(arguments["input_ids"])})
    torch.testing.assert_close(masked, gradient(params, arguments), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", pytest.param("t5, padded", marks=pytest.mark.slow)])
def test_outputs_keep_their_class_and_hold_real_tensors_the_cache_included(name: str) -> None:
    apply, params = fz.functional(made(name, False))

    def forward(params: Any, arguments: Any) -> Any:
        return apply(params, **arguments)

    eager = forward(params, of(name))
    traced = fz.jit(forward)(params, of(name))
    differentiated, pullback = fz.vjp(lambda p: forward(p, of(name)), params)
    for output in (traced, differentiated):
        assert type(output) is type(eager)
        assert type(output.past_key_values) is type(eager.past_key_values)
        assert output.past_key_values.get_seq_length() == eager.past_key_values.get_seq_length() == 6
        assert output["logits"] is output.logits
        leaves = [x for x in fz.tree.leaves(output) if isinstance(x, Tensor)]
        assert {type(x) for x in leaves} == {Tensor}
        expected = [x for x in fz.tree.leaves(eager) if isinstance(x, Tensor)]
        if output is traced:
            small.assert_same_bits(leaves, expected)
        else:  # torch takes other kernels where a mask has a gradient, as T5's does
            torch.testing.assert_close(leaves, expected, rtol=1e-4, atol=1e-6)
    bar = fz.tree.map(lambda x: torch.zeros_like(x) if isinstance(x, Tensor) else x, differentiated)
    bar["loss"] = torch.ones(())
    small.assert_same_bits(pullback(bar)[0], fz.grad(lambda p: forward(p, of(name)).loss)(params))


def test_what_a_model_does_that_cannot_be_traced_is_named() -> None:
    apply, params = fz.functional(mixtral("eager"))
    with pytest.raises(fz.TraceError, match=r"in module 'model\.layers\.0\.mlp\.experts' \(MixtralExperts\)"):
        fz.jit(lambda p, x: apply(p, **x).loss)(params, of("llama"))
    module = made("llama", True)
    module.activation_checkpointing_enable()  # type: ignore[operator]
    apply, params = fz.functional(module)
    with pytest.raises(fz.ModuleError, match="checkpointing_disable"):
        fz.grad(lambda p: apply(p, **of("llama, no cache")).loss)(params)


def test_a_residual_network_hands_out_its_statistics() -> None:
    torch.manual_seed(1)
    config = transformers.ResNetConfig(
        embedding_size=4, hidden_sizes=[4, 6], depths=[1, 1], layer_type="basic", num_labels=3
    )
    module = transformers.ResNetForImageClassification(config).train()
    arguments = CASES["vit"][1](inputs())
    apply, params, buffers = fz.functional(module, buffers=True)

    def loss_fn(params: Any, buffers: Any, arguments: Any) -> tuple[Tensor, Any]:
        output, buffers = apply(params, buffers, **arguments)
        return output.loss, buffers

    gradient = fz.value_and_grad(loss_fn, has_aux=True)
    (loss, after), gradients = gradient(params, buffers, arguments)
    expected_loss, expected = plain_gradient(module, arguments, 0)
    torch.testing.assert_close(loss, expected_loss)
    torch.testing.assert_close(small.flat(gradients), dict(sorted(expected.items())), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(small.flat(after), dict(sorted(module.named_buffers())))
    small.assert_same_bits(fz.jit(gradient)(params, buffers, arguments), ((loss, after), gradients))


def test_a_model_decodes_with_its_cache_as_an_argument() -> None:
    apply, params = fz.functional(made("llama", False))
    tokens = inputs()["tokens"]

    @fz.jit
    def read(params: Any, tokens: Tensor, cache: Any) -> Any:
        output = apply(params, input_ids=tokens, past_key_values=cache)
        return output.logits, output.past_key_values

    whole, _ = read(params, tokens, None)
    _, cache = read(params, tokens[:, :5], None)
    last, cache = read(params, tokens[:, 5:], cache)
    assert cache.get_seq_length() == 6
    torch.testing.assert_close(last[:, 0], whole[:, 5], rtol=1e-4, atol=1e-5)


def test_a_second_derivative_is_that_of_the_formula() -> None:
    apply, params = fz.functional(made("gpt2, no cache", False))
    direction = fz.tree.map(torch.ones_like, params)

    def loss(p: Any) -> Tensor:
        return apply(p, **of("gpt2, no cache")).loss

    along: Any = torch.func.jvp(fz.grad(loss), (params,), (direction,))[1]
    step = 1e-3
    there, back = (fz.grad(loss)(fz.tree.map(lambda x: x + s, params)) for s in (step, -step))  # noqa: B023
    for path, got in small.flat(along).items():
        want = (small.flat(there)[path] - small.flat(back)[path]) / (2 * step)
        torch.testing.assert_close(got, want, rtol=0.05, atol=0.05 * max(float(want.abs().max()), 0.02))


def test_an_attention_kernel_from_outside_is_registered_with_transformers() -> None:
    from tests.test_attention import OUTSIDE

    def attend(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, *, scaling: float, **_: Any) -> Any:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        out = fz.attention(q, k, v, causal=True, scale=scaling, kernel=OUTSIDE)
        return out.transpose(1, 2).contiguous(), None

    transformers.AttentionInterface.register("fzero_tests", attend)
    module, arguments = made("llama, no cache", False), of("llama, no cache")
    _, expected = plain_gradient(module, arguments, 0)
    module.set_attn_implementation("fzero_tests")  # type: ignore[operator]
    apply, params = fz.functional(module)
    gradient = fz.grad(lambda p: apply(p, **arguments).loss)
    got = gradient(params)
    torch.testing.assert_close(small.flat(got), dict(sorted(expected.items())), rtol=1e-4, atol=1e-6)
    small.assert_same_bits(fz.jit(gradient)(params), got)


def test_a_mask_of_the_user_has_the_dtype_of_the_queries_where_it_arrives() -> None:
    from tests.test_attention_masks import Arriving

    module, arguments = made("llama, no cache", False), of("llama, no cache")
    apply, params = fz.functional(module)
    later = torch.ones(6, 6).triu(1).bool()
    mask = torch.zeros(2, 1, 6, 6).masked_fill(later, torch.finfo(torch.float32).min)
    low = fz.shard(params, fz.make_mesh("cpu"), fz.zero(3), policy=fz.Policy(compute=torch.bfloat16))
    gradient = fz.value_and_grad(lambda p, mask: apply(p, **arguments, attention_mask=mask).loss)
    with Arriving() as arriving:
        loss, _ = eager = gradient(low, mask)
    assert arriving.found and all(dtypes == {torch.bfloat16} for _, dtypes in arriving.found)
    torch.testing.assert_close(loss.float(), gradient(params, mask)[0], rtol=0.01, atol=0.01)
    small.assert_same_bits(fz.jit(gradient)(low, mask), eager)


# ---------------------------------------------------------------------------------------------------------
# On several ranks


def sharded(name: str, stage: int, train: bool) -> tuple[Any, Any]:
    """The gathered gradient and the parameters after a step, eager and traced; the key of each rank's draws."""
    mesh = fz.make_mesh("cpu")
    module = made(name, train)
    apply, _ = fz.functional(module)
    state = fz.init(module, fz.sgd(0.1), mesh, fz.zero(stage), policy="fp32")
    arguments = of(name, mesh.index("data"))
    gradient = fz.value_and_grad(lambda p, x: apply(p, **x).loss)

    def step(state: fz.State, x: Any) -> Any:
        loss, grads = gradient(state, x)
        return loss, grads, fz.apply_gradients(state, grads)[0].params

    eager, traced = step(state, arguments), fz.jit(step)(state, arguments)
    small.assert_same_bits(traced, eager)
    loss, grads, params = eager
    return (loss, fz.gather(grads), fz.gather(params)), state.as_primal().key


DISTRIBUTED = [
    pytest.param(name, size, stage, train, marks=() if (name, size, stage, train) in fast else pytest.mark.slow)
    for fast in [{("llama, no cache", 2, 3, True)}]
    for name in ("llama, no cache", "gpt2", "vit", "clip, padded")
    for size, stage in [(1, 0), (1, 3), (2, 0), (2, 3), (4, 0), (4, 1), (4, 2), (4, 3)]
    for train in ((True,) if name == "vit" else (False, True))
]


@pytest.mark.parametrize(("name", "size", "stage", "train"), DISTRIBUTED)
def test_on_several_ranks_the_gradient_is_the_mean(name: str, size: int, stage: int, train: bool) -> None:
    got = world.run(sharded, name, stage, train, size=size, deadline=240)
    module = made(name, train)
    alone = [plain_gradient(module, of(name, rank), int(key)) for rank, (_, key) in enumerate(got)]
    names = [name for name, _ in module.named_parameters()]
    mean = {path: torch.stack([gradient[path] for _, gradient in alone]).mean(0) for path in sorted(names)}
    before = {path: p.detach() for path, p in module.named_parameters()}
    after = {path: before[path] - 0.1 * gradient for path, gradient in mean.items()}
    for (loss, _), ((own_loss, gradient, params), _) in zip(alone, got, strict=True):
        torch.testing.assert_close(own_loss, loss, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(small.flat(gradient), mean, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(small.flat(params), after, rtol=1e-4, atol=1e-6)
