"""One program for all sizes: what opens, what has to stay fixed, and the bits of the function itself."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from typing import Any

import einops
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fzero as fz
from fzero.program.options import Options
from tests import world
from tests.small import copied


def rows(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(sum(sizes))
    return torch.randn(*sizes, generator=generator).to(dtype)


def bits_of(result: Any) -> list[Tensor]:
    return [x for x in fz.tree.leaves(result) if isinstance(x, Tensor)]


def check_equal(f: Callable[..., Any], calls: list[tuple[Any, ...]], programs: int = 2) -> Any:
    """Call a function with open sizes and as it is: equal bits, and so many programs."""
    opened = fz.jit(f)
    for args in calls:
        for a, b in zip(bits_of(opened(*args)), bits_of(f(*args)), strict=True):
            assert a.dtype == b.dtype and torch.equal(a, b)
    assert len(opened.programs) == programs
    return opened


def test_the_second_size_makes_one_program_for_all() -> None:
    check_equal(lambda x: (x @ x.T).softmax(-1).sum(0), [(rows(n, 4),) for n in (3, 5, 8, 3, 2)])


def test_only_dimensions_that_vary_are_open() -> None:
    f = check_equal(lambda x, w: x @ w, [(rows(n, 3, 4), rows(4, 4)) for n in (3, 5, 8)])
    assert f.programs[-1].trace.sizes.dims == ((0, 0),)


def test_a_dimension_that_varies_later_is_opened_too() -> None:
    f = check_equal(lambda x: x.cumsum(1), [(rows(*s),) for s in ((3, 4), (5, 4), (7, 4), (7, 6), (2, 9))], programs=3)
    assert f.programs[-1].trace.sizes.dims == ((0, 0), (0, 1))


def test_equal_sizes_of_different_dimensions_are_not_merged() -> None:
    check_equal(
        lambda x, y: x.sum(0) + y.sum(0), [(rows(n, 4), rows(m, 4)) for n, m in ((3, 3), (5, 5), (6, 2), (2, 7))]
    )


def test_sizes_of_zero_and_one_have_programs_of_their_own() -> None:
    check_equal(lambda x: x * x.shape[0] + x.sum(0), [(rows(n, 4),) for n in (1, 5, 6, 1, 0, 9)], programs=3)


def test_a_size_as_a_number_in_arithmetic() -> None:
    check_equal(lambda x: x.sum() / x.shape[0] + x.shape[1] ** -0.5, [(rows(*s),) for s in ((3, 4), (5, 6), (2, 9))])


@pytest.mark.parametrize("shape", [lambda n: rows(n, 6).T, lambda n: rows(n, 6)[:, ::2], lambda n: rows(n, 4, 2)])
def test_strides_are_those_of_the_call(shape: Callable[[int], Tensor]) -> None:
    dense = shape(3).is_contiguous() or shape(3).T.is_contiguous()
    check_equal(lambda x: (x.reshape(-1) * 2, x + 1), [(shape(n),) for n in (3, 5, 7)], programs=2 if dense else 3)


def test_a_condition_that_does_not_hold_makes_another_program(caplog: pytest.LogCaptureFixture) -> None:
    def f(x: Tensor) -> Tensor:
        return x * 2 if x.shape[0] > 6 else x * 3

    found = check_equal(f, [(rows(n),) for n in (3, 5, 9, 12, 4, 7)], programs=3)
    assert len(found.programs[1].trace.sizes.conditions) == 1
    assert "test_program_sizes.py" in found.programs[1].trace.sizes.conditions[0]


def test_what_specialises_is_logged_with_its_line(caplog: pytest.LogCaptureFixture) -> None:
    def f(x: Tensor) -> Tensor:
        return x * torch.tensor(float(int(x.shape[0])))

    with caplog.at_level(logging.INFO, "fzero"):
        check_equal(f, [(rows(n, 2),) for n in (3, 5, 8)], programs=3)
    assert "a program for each size of x.shape[0]: the number is asked for" in caplog.text
    assert caplog.text.count("a program for each size of") == 1
    assert (
        "test_program_sizes.py" in caplog.text and "in test_what_specialises_is_logged_with_its_line.f" in caplog.text
    )


def test_what_specialises_in_part_leaves_the_rest_open() -> None:
    calls = [(rows(*s),) for s in ((3, 4), (5, 4), (6, 8), (7, 8))]
    f = check_equal(lambda x: x.sum(0)[: int(x.shape[1]) // 2], calls, programs=3)
    assert f.programs[-1].trace.sizes.dims == ((0, 0),)


def test_fixed_sizes_are_todays() -> None:
    f = fz.jit(lambda x: x + 1, sizes="fixed")
    for n in (3, 5, 7):
        f(rows(n))
    assert len(f.programs) == 3 and all(p.trace.sizes is None for p in f.programs)


def test_an_unknown_choice_is_refused() -> None:
    with pytest.raises(ValueError, match="sizes='some' is not known"):
        Options(sizes="some")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "f",
    [
        lambda x, w, b: F.linear(x, w, b),
        lambda x, w, b: F.linear(x.transpose(0, 1), w, b),
        lambda x, w, b: F.linear(x[None], w, b),
        lambda x, w, b: F.linear(x, w),
        lambda x, w, b: F.linear(x, w.detach(), b.detach()),
        lambda x, w, b: F.linear(x.transpose(0, 1), w.detach()),
        lambda x, w, b: x @ w + x @ b[:, None],
        lambda x, w, b: x.transpose(0, 1).matmul(w.detach()),
        lambda x, w, b: torch.matmul(x, b),
        lambda x, w, b: w @ x.mT + b @ x[0].mT,
        lambda x, w, b: (x @ x.mT)[None] @ x[None],
        lambda x, w, b: F.pad(x, (1, 2), value=3.0),
        lambda x, w, b: F.pad(x, (0, -1, 2, 0)),
        lambda x, w, b: F.pad(x, (1, 1), mode="reflect"),
        lambda x, w, b: torch.baddbmm(b, x, w.expand(x.shape[0], -1, -1)),
        lambda x, w, b: F.layer_norm(x, (4,), w[0], b[:4]),
        lambda x, w, b: F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None], is_causal=True),
    ],
)
def test_functions_that_read_sizes_keep_them_open(f: Callable[..., Tensor]) -> None:
    def gradients(x: Tensor, w: Tensor, b: Tensor) -> Any:
        return fz.vjp(lambda w, b, x: f(x, w, b).square().sum(), w, b, x)[1](torch.ones(()))

    check_equal(gradients, [(rows(*s, 4), rows(4, 4), rows(4)) for s in ((3, 5), (4, 7), (6, 2), (2, 9))])


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(19, 16), nn.LayerNorm(16)
        self.qkv, self.out, self.drop = nn.Linear(16, 48), nn.Linear(16, 16), nn.Dropout(0.1)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.drop(self.out(mixed.transpose(1, 2).flatten(2)))


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Attention()])
        self.head = nn.Linear(16, 19)

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.head(self.blocks[0](tokens))
        return out


apply, _ = fz.functional(Small)


def loss_of(params: Any, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
    logits = apply(params, batch["tokens"])
    loss = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())
    return loss, {"best": logits.amax((1, 2))}


def batch_of(n: int, length: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(31 * n + length)
    tokens = torch.randint(0, 19, (n, length), generator=generator)
    return {"tokens": tokens, "labels": tokens.roll(1, 1)}


def trained(policy: str, stage: int, options: dict[str, Any]) -> tuple[int, bool]:
    """Train through three sizes with open ones and eagerly; return the programs made, and whether bits agree."""
    state = fz.init(Small, fz.adamw(1e-2), fz.make_mesh(), fz.zero(stage), policy=policy)
    step = fz.train_step(loss_of, has_aux=True, **options)
    eager, agree = copied(state), True
    for n, length in ((4, 6), (8, 9), (12, 5)):
        state, metrics = step(state, batch_of(n, length))
        eager, expected = step.f(eager, batch_of(n, length))
        pairs = zip(bits_of((state, metrics)), bits_of((eager, expected)), strict=True)
        agree = agree and all(torch.equal(x, y) for x, y in pairs)
    return len(step.programs), agree


CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "fp32": (3, {}),
    "fp16": (1, {"remat": "block"}),
    "bf16": (0, {"microbatches": 2}),
}
QUICK = [(1, "fp16"), (1, "bf16"), (2, "fp32")]


@pytest.mark.parametrize(
    ("size", "policy"),
    [pytest.param(*x, marks=() if x in QUICK else pytest.mark.slow) for x in itertools.product((1, 2), CASES)],
)
def test_training_has_equal_bits(size: int, policy: str) -> None:
    assert world.run(trained, policy, *CASES[policy], size=size, deadline=240) == [(2, True)] * size


@pytest.mark.parametrize("options", [pytest.param({}, marks=pytest.mark.slow), {"microbatches": 2}])
def test_reports_take_sizes(options: dict[str, Any]) -> None:
    state = fz.init(Small, fz.sgd(0.1), fz.make_mesh(), policy="fp32")
    opened, fixed = (fz.train_step(loss_of, has_aux=True, sizes=sizes, **options) for sizes in ("any", "fixed"))
    for n, length in ((4, 6), (8, 9)):
        state, _ = opened(state, batch_of(n, length))
    program = opened.programs[-1].at({"1.tokens": (12, 16), "1.labels": (12, 16)})
    same = fz.trace(fixed)(state, batch_of(12, 16))
    assert program.flops() == same.flops() > opened.programs[-1].flops()
    assert program.traffic() == same.traffic()
    assert program.memory().at_rest == same.memory().at_rest
    assert program.memory().peak == same.memory().peak > opened.programs[-1].memory().peak
    assert "i64[12, 16]" in program.text()
    with pytest.raises(ValueError, match=r"no input '1\.token'\. Did you mean '1.tokens'"):
        program.at({"1.token": (12, 16)})
    with pytest.raises(ValueError, match=r"open: 1\.labels\.shape\[0\], 1\.labels\.shape\[1\]"):
        program.at({"1.tokens": (12, 17)})
    with pytest.raises(ValueError, match="leaves open: none"):
        same.at({"1.tokens": (12, 17)})


class Named(nn.Module):
    """What models commonly do with sizes, one kind by name."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.lin = kind, nn.Linear(8, 8)
        self.token, self.positions = nn.Parameter(torch.ones(1, 1, 8)), nn.Parameter(torch.eye(16, 8))
        self.attend = nn.MultiheadAttention(8, 2, batch_first=True) if kind == "attention" else None
        self.conv = nn.Conv1d(8, 8, 3, padding=1) if kind == "convolution" else None

    def forward(self, x: Tensor) -> Tensor:
        n, length, _ = x.shape
        y: Tensor = self.lin(x)
        places = torch.arange(length)
        match self.kind:
            case "class token":
                return torch.cat([self.token.expand(n, -1, -1), y + self.positions[:length]], 1)
            case "positions and a mask":
                mask = torch.ones(length, length, dtype=torch.bool).tril()
                scores = y @ (y + self.positions[places]).transpose(1, 2)
                return scores.masked_fill(~mask, float("-inf")).softmax(-1)
            case "attention":
                assert self.attend is not None
                return self.attend(y, y, y, need_weights=False)[0]
            case "convolution":
                assert self.conv is not None
                return F.max_pool2d(self.conv(y.transpose(1, 2)), 2)
            case "losses":
                return F.cross_entropy(y.flatten(0, 1), x.argmax(-1).flatten(), reduction="none") / y[..., 0].numel()
            case _:
                heads = einops.rearrange(y, "b n (h d) -> (b h) n d", h=2)
                return einops.rearrange(heads, "(b h) n d -> b n (h d)", h=2) + self.token.repeat(n, length, 1)


KINDS = ["class token", "positions and a mask", "attention", "convolution", "losses", "einops"]


@pytest.mark.parametrize("kind", KINDS)
def test_what_models_commonly_do_keeps_sizes_open(kind: str) -> None:
    apply, params = fz.functional(Named(kind))
    step = fz.value_and_grad(lambda params, x: apply(params, x).square().mean())
    check_equal(step, [(params, rows(*s, 8)) for s in ((4, 6), (6, 8), (3, 4))])
