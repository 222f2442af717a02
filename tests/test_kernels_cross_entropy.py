"""The fused cross entropy: the loss and the gradients of the plain one, wherever it runs, without all logits."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.utils.flop_counter
from torch import Tensor, nn
from torch.nn import functional as F

import fzero as fz
from fzero._torch import FakeTensorMode, TorchDispatchMode, make_fx
from fzero.kernels import logits_in_chunks as module
from fzero.kernels import softmax_chunk
from fzero.kernels.cross_entropy import linear_cross_entropy
from fzero.kernels.logits_in_chunks import default_chunk
from fzero.kernels.softmax_chunk import fold_reference, gradient_reference
from tests.pairwise import pairwise
from tests.small import LiveBytes, assert_same_bits
from tests.triton_process import compiled as compiled_by_triton
from tests.triton_process import interpreted

FLOAT, BFLOAT, HALF, DOUBLE = torch.float32, torch.bfloat16, torch.float16, torch.float64
DTYPES = (FLOAT, BFLOAT, HALF, DOUBLE)
IGNORED = -100
WIDTH = 16
Loss = Callable[..., Tensor]
# Forward-mode differentiation makes torch import a module of its own that uses what torch has deprecated.
forward_mode = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")


def operands(tokens: int, vocabulary: int, dtype: torch.dtype, bias: bool = True) -> tuple[list[Tensor], Tensor]:
    """x, weight and perhaps bias; and labels, of which every fifth is ignored where there are several."""
    generator = torch.Generator().manual_seed(tokens * vocabulary)
    shapes = [(tokens, WIDTH), (vocabulary, WIDTH), *([(vocabulary,)] if bias else [])]
    labels = torch.randint(0, vocabulary, (tokens,), generator=generator)
    labels[1::5] = IGNORED
    tensors = [torch.randn(shape, generator=generator) for shape in shapes]
    tensors[1] /= WIDTH**0.5  # logits of size one: a label that is nearly certain has a gradient of differences alone
    return [x.to(dtype) for x in tensors], labels


def plain(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, labels: Tensor, **options: Any) -> Tensor:
    """What is to be computed, by way of all logits."""
    z_loss, reduction = options.get("z_loss", 0.0), options.get("reduction", "mean")
    logits = F.linear(x, weight, bias)
    logits = logits.to(torch.promote_types(logits.dtype, FLOAT))
    if not z_loss:
        return F.cross_entropy(logits, labels, reduction=reduction)
    counts = labels != IGNORED
    squares = torch.where(counts, logits.logsumexp(-1).square(), 0.0)
    losses = F.cross_entropy(logits, labels, reduction="none") + z_loss * squares
    if reduction == "none":
        return losses
    return losses.sum() / counts.sum() if reduction == "mean" else losses.sum()


def fused(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, labels: Tensor, **options: Any) -> Tensor:
    return linear_cross_entropy(x, weight, labels, bias, **options)


def evaluated(loss: Loss, tensors: list[Tensor], **options: Any) -> list[Tensor]:
    """The loss, and the gradients under a cotangent that is the same for all dtypes."""
    output, pullback, *_ = torch.func.vjp(functools.partial(loss, **options), *tensors)
    cotangent = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(output)
    return [output, *pullback(cotangent)]


def assert_as_good_as_plain(tensors: list[Tensor], exactly: list[Tensor] | None = None, **options: Any) -> None:
    """In the dtype of the operands it is as near to float64 as the plain loss is, or within a few roundings."""
    actual, theirs = (evaluated(loss, tensors, **options) for loss in (fused, plain))
    options.pop("chunk", None)
    exact = exactly or evaluated(plain, [x.double() for x in tensors], **options)
    for ours, other, true in zip(actual, theirs, exact, strict=True):
        assert (ours.dtype, ours.shape) == (other.dtype, other.shape)
        scale = true.abs().amax().clamp(min=0.1)
        error, allowed = ((x.double() - true).abs().amax() / scale for x in (ours, other))
        assert error <= 2 * allowed + (2 if ours.dtype.itemsize == 2 else 32) * torch.finfo(ours.dtype).eps


# ---------------------------------------------------------------------------------------------------------
# Values


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_equals_the_plain_loss(reduction: str, dtype: torch.dtype) -> None:
    for tokens, vocabulary, bias, z_loss in pairwise((1, 33), (1, 7, 1000), (False, True), (0.0, 1e-2)):
        tensors, labels = operands(tokens, vocabulary, dtype, bias)
        for chunk in (3, 64, None) if vocabulary < 100 else (300, None):
            assert_as_good_as_plain(tensors, labels=labels, reduction=reduction, z_loss=z_loss, chunk=chunk)


def test_gradients_follow_differences() -> None:
    tensors, labels = operands(3, 5, DOUBLE)
    tensors = [x.requires_grad_() for x in tensors]
    for reduction in ("mean", "none"):
        loss = functools.partial(fused, labels=labels, reduction=reduction, z_loss=0.1, chunk=2)
        assert torch.autograd.gradcheck(loss, tensors)


def test_chunks_do_not_matter() -> None:
    tensors, labels = operands(33, 100, FLOAT)
    whole = evaluated(fused, tensors, labels=labels, chunk=100)
    for chunk in (1, 7, 50, 99, 1000, None):
        for x, y in zip(evaluated(fused, tensors, labels=labels, chunk=chunk), whole, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


def test_a_chunk_takes_32_mib_of_float32() -> None:
    for tokens, vocabulary in ((1, 7), (1024, 8192), (8192, 128_256), (8191, 50_257), (1 << 20, 32_000), (0, 10)):
        chunk = default_chunk(tokens, vocabulary)
        assert chunk <= vocabulary
        chunks = -(-vocabulary // chunk)
        assert chunk == vocabulary or (chunk % 64 == 0 and chunks * chunk - vocabulary < 64 * chunks)
        assert tokens * chunk <= max(1 << 23, 256 * tokens) + 64 * tokens
        assert chunk == vocabulary or tokens * chunk * 2 > 1 << 23


class Chunks(TorchDispatchMode):
    """Notes into how many chunks of columns each operator cuts the vocabulary."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.fzero.linear_cross_entropy.default:
            self.found.append(-(-len(args[1]) // args[-1]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("tokens", "vocabulary", "on_cpu", "on_cuda"),
    [(8192, 50_257, 50, 13), (1024, 8192, 1, 1), (4096, 16_384, 8, 2), (1 << 20, 32_000, 125, 125), (8, 50_257, 1, 1)],
)
def test_a_gpu_is_given_a_quarter_of_the_chunks(tokens: int, vocabulary: int, on_cpu: int, on_cuda: int) -> None:
    with FakeTensorMode(), Chunks() as chunks:
        for device in ("cpu", "cuda"):
            x, weight = torch.empty(tokens, 8, device=device), torch.empty(vocabulary, 8, device=device)
            linear_cross_entropy(x, weight, torch.empty(tokens, dtype=torch.int64, device=device))
    assert chunks.found == [on_cpu, on_cuda]


@pytest.mark.parametrize("shape", [(), (5,), (2, 3, 4)])
def test_labels_may_have_any_shape(shape: tuple[int, ...]) -> None:
    x, weight, labels = torch.randn(*shape, 4), torch.randn(9, 4), torch.randint(0, 9, shape)
    losses = linear_cross_entropy(x, weight, labels, reduction="none", chunk=4)
    expected = F.cross_entropy((x @ weight.T).reshape(-1, 9), labels.reshape(-1), reduction="none")
    torch.testing.assert_close(losses, expected.reshape(shape))


def test_operands_need_not_be_contiguous() -> None:
    tensors, labels = operands(10, 12, FLOAT)
    apart = [x.T.contiguous().T if x.ndim == 2 else x.repeat_interleave(2)[::2] for x in tensors]
    assert not any(x.is_contiguous() for x in apart)
    strided = labels.repeat_interleave(2)[::2]
    for x, y in zip(evaluated(fused, apart, labels=strided), evaluated(fused, tensors, labels=labels), strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("ignored", [IGNORED, 3, -1])
def test_ignored_tokens_count_for_nothing(ignored: int) -> None:
    (x, weight, bias), labels = operands(20, 9, FLOAT)
    labels[4:9] = 3
    loss = functools.partial(linear_cross_entropy, ignore_index=ignored, chunk=4)
    labels[labels == IGNORED] = ignored
    kept = labels != ignored
    actual = torch.func.grad_and_value(lambda x, w, b: loss(x, w, labels, b), (0, 1, 2))(x, weight, bias)
    expected = torch.func.grad_and_value(lambda x, w, b: loss(x[kept], w, labels[kept], b), (0, 1, 2))(x, weight, bias)
    torch.testing.assert_close(actual, expected)
    assert (actual[0][0][~kept] == 0).all()


@pytest.mark.parametrize("tokens", [0, 4])
def test_without_a_token_that_counts(tokens: int) -> None:
    tensors, labels = operands(tokens, 5, FLOAT)
    labels[:] = IGNORED
    for reduction in ("mean", "sum", "none"):
        actual, expected = (evaluated(f, tensors, labels=labels, reduction=reduction) for f in (fused, plain))
        torch.testing.assert_close(actual, expected, equal_nan=True)  # NaN, and gradients of zeros


def test_columns_that_a_bias_masks() -> None:
    (x, weight, bias), labels = operands(20, 12, FLOAT)
    bias[:5], bias[9] = -torch.inf, -torch.inf
    labels = labels % 4 + 5
    for chunk in (1, 2, 5, 12):
        actual, expected = (evaluated(f, [x, weight, bias], labels=labels, chunk=chunk) for f in (fused, plain))
        torch.testing.assert_close(actual, expected)


def test_numbers_that_are_not_finite_are_not_hidden() -> None:
    (x, weight, bias), labels = operands(5, 9, FLOAT)
    labels[:] = 2
    for bad in (torch.nan, torch.inf):
        for column in (0, 2, 8):
            spoiled = bias.clone()
            spoiled[column] = bad
            assert fused(x, weight, spoiled, labels=labels, chunk=4).isnan()
    x[1] *= 1e30
    weight *= 1e30
    actual, expected = (f(x, weight, labels=labels, reduction="none") for f in (fused, plain))
    assert torch.equal(actual.isnan(), expected.isnan()) and actual.isnan().any()


def test_large_logits_do_not_overflow() -> None:
    tensors, labels = operands(8, 30, FLOAT)
    tensors[1] *= 1e4
    assert_as_good_as_plain(tensors, labels=labels, chunk=8)


def test_a_small_loss_beside_large_logits_is_precise() -> None:
    weight = torch.tensor([[600.0], [590.0], [590.0], [1.0]])
    for chunk in (1, 2, 4):
        loss = fused(torch.ones(1, 1), weight, labels=torch.tensor([0]), chunk=chunk)
        exact = torch.tensor(2 * math.exp(-10)).log1p()
        torch.testing.assert_close(loss, exact, rtol=1e-2, atol=0)


# ---------------------------------------------------------------------------------------------------------
# Transforms and programs


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)])
def test_gradients_that_nobody_wants_are_not_made(wanted: tuple[int, ...]) -> None:
    tensors, labels = operands(5, 9, BFLOAT)
    every = torch.func.grad(functools.partial(fused, labels=labels, chunk=4), (0, 1, 2))(*tensors)
    graph = make_fx(torch.func.grad(functools.partial(fused, labels=labels, chunk=4), wanted))(*tensors)
    (node,) = (n for n in graph.graph.nodes if n.target is torch.ops.fzero.linear_cross_entropy_backward.default)
    assert node.args[-1] == [i in wanted for i in range(3)]
    assert_same_bits(graph(*tensors), tuple(every[i] for i in wanted))


def test_autograd_gives_the_bits_of_vjp() -> None:
    tensors, labels = operands(33, 50, BFLOAT)
    by_vjp = torch.func.grad(functools.partial(fused, labels=labels, chunk=16), (0, 1, 2))(*tensors)
    leaves = [x.clone().requires_grad_() for x in tensors]
    fused(*leaves, labels=labels, chunk=16).backward()
    assert_same_bits(by_vjp, tuple(x.grad for x in leaves))


@pytest.mark.parametrize("dtype", [BFLOAT, HALF], ids=str)
def test_autocast_acts_as_on_the_plain_loss(dtype: torch.dtype) -> None:
    (x, weight, bias), labels = operands(33, 50, FLOAT)
    mixed = [x.to(dtype), weight, bias]
    results: list[list[Any]] = []
    for loss in (fused, plain):
        leaves = [tensor.clone().requires_grad_() for tensor in mixed]
        with torch.autocast("cpu", dtype=dtype):
            output = loss(*leaves, labels=labels)
        output.backward()
        results.append([output.detach(), *(tensor.grad for tensor in leaves)])
    for ours, theirs in zip(*results, strict=True):
        assert ours is not None and theirs is not None and ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=1e-3)
    assert torch.equal(results[0][0], fused(*(tensor.to(dtype) for tensor in mixed), labels=labels))


def test_autocast_around_the_backward_does_not_matter() -> None:
    tensors, labels = operands(33, 50, FLOAT)
    _, pullback, *_ = torch.func.vjp(functools.partial(fused, labels=labels), *tensors)
    with torch.autocast("cpu", dtype=BFLOAT):
        inside = pullback(torch.ones(()))
    assert_same_bits(inside, pullback(torch.ones(())))


def test_recomputed_it_has_the_same_bits() -> None:
    tensors, labels = operands(33, 50, BFLOAT)

    def loss(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return fused(torch.tanh(x), weight, bias, labels=labels, chunk=16)

    def nested(*tensors: Tensor) -> Tensor:
        return fz.remat(loss)(*tensors)

    expected = evaluated(loss, tensors)
    assert_same_bits(evaluated(fz.remat(loss), tensors), expected)
    assert_same_bits(evaluated(fz.remat(nested), tensors), expected)


@forward_mode
@pytest.mark.parametrize(
    ("transform", "what"),
    [
        (lambda f: torch.func.jacrev(f), "vmap"),
        (lambda f: torch.func.grad(lambda x: torch.func.grad(f)(x).square().sum()), "a second derivative"),
        (lambda f: lambda x: torch.func.jvp(f, (x,), (x,)), "forward-mode"),
        (lambda f: lambda x: torch.func.jvp(torch.func.grad(f), (x,), (x,)), "forward-mode"),
        (lambda f: lambda x: torch.func.vmap(f)(torch.stack([x, x])), "vmap"),
        (lambda f: lambda x: torch.func.vmap(torch.func.grad(f))(torch.stack([x, x])), "vmap"),
        (lambda f: lambda x: torch.func.vmap(torch.func.vjp(f, x)[1])(torch.ones(2)), "vmap"),
        (lambda f: lambda x: torch.autograd.functional.hessian(f, x), "a second derivative"),
    ],
)
def test_what_it_does_not_do_is_an_error_with_a_way_out(transform: Any, what: str) -> None:
    (x, weight, bias), labels = operands(5, 9, FLOAT)
    with pytest.raises(NotImplementedError, match=rf"(?s){what}.*Use F.cross_entropy\(F.linear"):
        transform(lambda x: fused(x, weight, bias, labels=labels))(x)


class Model(nn.Module):
    """An embedding, a layer and a head."""

    def __init__(self, vocabulary: int, width: int):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.layer = nn.Linear(width, width)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, text: Tensor, loss: Loss, **options: Any) -> Tensor:
        x = torch.relu(self.layer(self.embedding(text[:, :-1]))).flatten(0, 1)
        return loss(x, self.head.weight, self.head.bias, labels=text[:, 1:].flatten(), **options)


def training(vocabulary: int, width: int, loss: Loss, policy: str, **options: Any) -> tuple[fz.State, Any]:
    apply, _ = fz.functional(lambda: Model(vocabulary, width))
    state = fz.init(lambda: Model(vocabulary, width), fz.adamw(1e-3), layout=fz.zero(3), policy=policy)
    return state, lambda params, text: apply(params, text, loss, **options)


@pytest.mark.parametrize("policy", ["mixed", "bf16"])
def test_traced_equals_eager(policy: str) -> None:
    state, loss = training(60, 8, fused, policy, chunk=16)
    text = torch.randint(0, 60, (4, 9))

    def step(state: fz.State, text: Tensor) -> Any:
        value, grads = fz.value_and_grad(loss)(state, text)
        return value, fz.apply_gradients(state, grads)

    assert_same_bits(fz.jit(step)(state, text), step(state, text))


@pytest.mark.parametrize("options", [pytest.param({}, marks=pytest.mark.slow), {"microbatches": 2}], ids=str)
def test_a_step_of_training_is_the_plain_one(options: dict[str, Any]) -> None:
    text, metrics = torch.randint(0, 60, (4, 9)), []
    for loss in (fused, plain):
        state, loss_of_state = training(60, 8, loss, "fp32")
        state, first = fz.train_step(loss_of_state, **options)(state, text)
        metrics.append([first["loss"], first["grad_norm"]])
    torch.testing.assert_close(*metrics)


@pytest.mark.parametrize("policy", [pytest.param("fp32", marks=pytest.mark.slow), "bf16"])
def test_a_program_needs_less_memory(policy: str) -> None:
    text = torch.randint(0, 8192, (8, 129))
    peaks = []
    for loss, options in ((plain, {}), (fused, {}), (fused, {"chunk": 1024})):
        state, loss_of_state = training(8192, 64, loss, policy, **options)
        memory = fz.trace(fz.train_step(loss_of_state))(state, text).memory()
        peaks.append(memory.peak - memory.at_rest)
    logits = 4 * 1024 * 8192
    assert peaks[0] > 2 * logits
    assert peaks[1] < peaks[0] - logits / 2
    assert peaks[2] < logits / 3


@pytest.mark.parametrize("policy", ["fp32", "bf16"])
def test_a_run_holds_what_its_program_foretells(policy: str) -> None:
    state, loss = training(2048, 16, fused, policy, chunk=256)
    text = torch.randint(0, 2048, (4, 65))
    program = fz.trace(fz.value_and_grad(loss))(state, text)
    inputs = fz.tree.leaves((state, text))
    constants = [x for x in vars(program.trace.module).values() if isinstance(x, Tensor)]
    live = LiveBytes()
    live.storages.update(x.untyped_storage() for x in (*inputs, *constants))
    with live:
        program.run(list(inputs))
    assert live.peak == program.memory().peak


@pytest.mark.parametrize("dtype", [FLOAT, BFLOAT], ids=str)
def test_what_an_op_holds_inside_is_what_it_returns(dtype: torch.dtype) -> None:
    tokens, vocabulary, chunk = 256, 4096, 512
    (x, weight, bias), labels = operands(tokens, vocabulary, dtype)
    operands_ = (x, weight, bias, labels)
    runs: tuple[tuple[Any, tuple[Any, ...]], ...] = (
        (module._forward, (*operands_, IGNORED, chunk)),
        (module._backward, (torch.randn(2, tokens), *operands_, torch.randn(3, tokens), IGNORED, chunk, [True] * 3)),
    )
    for op, arguments in runs:
        live = LiveBytes()
        live.storages.update(t.untyped_storage() for t in arguments if isinstance(t, Tensor))
        before = live.live()
        with live:
            results = op(*arguments)
        returned = before + sum(t.untyped_storage().nbytes() for t in results)
        assert live.peak < returned + 100 * tokens  # and some vectors of one number a token
        x_sum = 4 * x.numel() if op is module._backward and dtype != FLOAT else 0
        assert results[-1].nbytes == tokens * chunk * (4 if dtype == FLOAT else 6) + x_sum


def test_flops_are_those_of_the_products() -> None:
    tensors, labels = operands(33, 50, FLOAT)
    product = 2 * 33 * 50 * WIDTH
    for loss, products in ((fused, 4), (plain, 3)):
        with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
            leaves = [x.clone().requires_grad_() for x in tensors]
            loss(*leaves, labels=labels).backward()
        assert counter.get_total_flops() == products * product


def test_a_count_that_began_before_the_first_loss_has_its_formulas(monkeypatch: pytest.MonkeyPatch) -> None:
    for operator in module.FLOPS:
        monkeypatch.delitem(torch.utils.flop_counter.flop_registry, operator, raising=False)
    test_flops_are_those_of_the_products()


@pytest.mark.parametrize("dtype", [FLOAT, BFLOAT, HALF], ids=str)
def test_the_ops_fulfil_torch_library_contract(dtype: torch.dtype) -> None:
    (x, weight, bias), labels = operands(5, 9, dtype)
    ops, tests = torch.ops.fzero, ("test_schema", "test_faketensor")
    for each, wanted in itertools.product((bias, None), ([True, True], [False, True])):
        forward = (x, weight, each, labels, IGNORED, 4)
        torch.library.opcheck(ops.linear_cross_entropy.default, forward, test_utils=tests)
        backward = (torch.randn(2, 5), *forward[:4], torch.randn(3, 5), *forward[4:], [*wanted, each is not None])
        torch.library.opcheck(ops.linear_cross_entropy_backward.default, backward, test_utils=tests)


# ---------------------------------------------------------------------------------------------------------
# What is not taken


def test_labels_outside_of_the_vocabulary_are_refused_eager_and_traced() -> None:
    (x, weight, bias), labels = operands(5, 9, FLOAT)
    graph = make_fx(
        lambda labels: fused(x, weight, bias, labels=labels), tracing_mode="fake", _allow_non_fake_inputs=True
    )(labels)
    for label in (9, -1, -101, 2**40):
        wrong = labels.clone()
        wrong[3] = label
        for call in (graph, lambda labels: fused(x, weight, bias, labels=labels)):
            with pytest.raises(ValueError, match=rf"label {label} of token 3 .* Expected 0 to 8"):
                call(wrong)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.ones(3, 4, dtype=torch.int64)}, TypeError, "x has dtype torch.int64"),
        (
            {"weight": torch.ones(9, 4, dtype=BFLOAT)},
            TypeError,
            "weight has dtype torch.bfloat16, expected torch.float32",
        ),
        ({"bias": torch.ones(9, dtype=DOUBLE)}, TypeError, "bias has dtype torch.float64"),
        ({"labels": torch.ones(3)}, TypeError, "labels has dtype torch.float32, expected torch.int64"),
        ({"labels": torch.ones(3, dtype=torch.int32)}, TypeError, "labels has dtype torch.int32"),
        ({"weight": torch.ones(4, 9)}, ValueError, r"x has shape \(3, 4\), expected \(3, 9\)"),
        ({"weight": torch.ones(0, 4)}, ValueError, r"weight \(0, 4\), expected \(..., D\) and \(V, D\) with V > 0"),
        ({"weight": torch.ones(4)}, ValueError, r"weight \(4,\), expected"),
        ({"labels": torch.zeros(4, dtype=torch.int64)}, ValueError, r"labels has shape \(4,\), expected \(3,\)"),
        ({"bias": torch.ones(4)}, ValueError, r"bias has shape \(4,\), expected \(9,\)"),
        ({"weight": torch.ones(9, 4, device="meta")}, ValueError, "weight is on meta and x on cpu"),
        ({"reduction": "average"}, ValueError, "reduction='average'; expected 'mean', 'sum' or 'none'"),
        ({"chunk": 0}, ValueError, "chunk=0"),
    ],
)
def test_refuses_what_does_not_fit(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"x": torch.ones(3, 4), "weight": torch.ones(9, 4), "labels": torch.zeros(3, dtype=torch.int64)}
    with pytest.raises(error, match=f"fz.linear_cross_entropy: .*{message}"):
        linear_cross_entropy(**(arguments | changes))


# ---------------------------------------------------------------------------------------------------------
# Triton


def check_kernels_against_references(device: str) -> None:
    """Maxima and label's logits exactly; exponentials, which no two libraries round alike, to a few roundings."""
    for columns, dtype in itertools.product((1, 150), DTYPES):
        generator = torch.Generator().manual_seed(columns)
        wide = torch.promote_types(dtype, FLOAT)
        logits = (4 * torch.randn(6, columns, generator=generator)).to(dtype)
        logits[1], logits[2, ::2], logits[3, -1] = -torch.inf, -torch.inf, torch.nan
        labels = torch.tensor([100, 100 + columns - 1, IGNORED, 99, 100 + columns // 2, 100 + columns])
        statistics = torch.randn(3, 6, generator=generator, dtype=wide)
        statistics[1].exp_()
        statistics[:2, :2] = torch.tensor([[-torch.inf], [0.0]])  # nothing so far
        weights = torch.randn(2, 6, generator=generator, dtype=wide)

        expected, actual = statistics.clone(), statistics.to(device, copy=True)
        fold_reference(logits.to(wide, copy=True), labels, expected, 100)
        softmax_chunk.launch_fold(logits.to(device), labels.to(device), actual, 100)
        rtol = 20 * torch.finfo(wide).eps
        beside = torch.arange(6) != 3  # what the maximum is beside a NaN does not matter: the sum is NaN
        assert torch.equal(actual[0].cpu()[beside], expected[0][beside])
        torch.testing.assert_close(actual[1].cpu(), expected[1], rtol=rtol, atol=0, equal_nan=True)
        torch.testing.assert_close(actual[2].cpu(), expected[2], rtol=0, atol=0, equal_nan=True)

        statistics[0, :2] = 1
        gradient, narrow = logits.to(wide, copy=True), logits.to(device, copy=True)
        gradient_reference(gradient, labels, statistics, weights, 100)
        softmax_chunk.launch_gradient(narrow, labels.to(device), statistics.to(device), weights.to(device), 100)
        rounded = gradient.to(dtype)
        tolerance = rtol if dtype == wide else torch.finfo(dtype).eps
        torch.testing.assert_close(narrow.cpu(), rounded, rtol=tolerance, atol=1e-6, equal_nan=True)
        unequal = (narrow.cpu() != rounded) & ~rounded.isnan()
        assert dtype == wide or unequal.double().mean() < 0.02, "rounded to nearest, nearly all have the same bits"


def check_ops_against_the_plain_loss(device: str) -> None:
    for dtype, chunk in ((FLOAT, 100), (BFLOAT, 40)):
        tensors, labels = operands(5, 100, dtype)
        exact = evaluated(plain, [x.double() for x in tensors], labels=labels, z_loss=0.1)
        exact = [x.to(device) for x in exact]
        moved = [x.to(device) for x in tensors]
        assert_as_good_as_plain(moved, exact, labels=labels.to(device), z_loss=0.1, chunk=chunk)
    # Where labels are not looked at before, what is wrong is NaN and nothing else.
    labels[3] = 100
    losses, _, weight_bar, _ = evaluated(fused, moved, labels=labels.to(device), reduction="none", chunk=40)
    assert losses.isnan().tolist() == [False, False, False, True, False]
    assert weight_bar.isnan().all()


def test_interpreted_triton_kernels_equal_the_references() -> None:
    interpreted(
        """
import tests.test_kernels_cross_entropy as t
t.softmax_chunk.BLOCK = 64
t.check_kernels_against_references("cpu")
t.module.runs_triton = lambda x: True
t.check_ops_against_the_plain_loss("cpu")
""",
        loops=True,
    )


def test_triton_kernels_compile_for_hopper() -> None:
    # Needs no GPU: Triton brings its own assembler.
    compiled_by_triton(
        """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from fzero.kernels.softmax_chunk import BLOCK, fold_kernel, gradient_kernel
ones = dict(start=1, columns=1)  # what Triton makes a constant of
for kernel in (fold_kernel, gradient_kernel):
    for narrow, wide, more in (("bf16", "fp32", {}), ("fp16", "fp32", ones), ("fp64", "fp64", {})):
        known = dict(BLOCK=BLOCK, **more)
        types = dict(logits="*" + narrow, labels="*i64", start="i32", columns="i32")
        signature = {name: "constexpr" if name in known else types.get(name, "*" + wide) for name in kernel.arg_names}
        source = ASTSource(kernel, signature, known)
        ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
        assert "atom." not in ptx and "red.global" not in ptx
"""
    )


@pytest.mark.gpu
def test_triton_kernels_on_a_gpu_equal_the_references_on_a_cpu() -> None:
    check_kernels_against_references("cuda")
    check_ops_against_the_plain_loss("cuda")
