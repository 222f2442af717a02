"""What torch traces, a step traces; what nobody can trace is named, with a remedy that works."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

import fzero as fz
from tests.small import assert_same_bits

W = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
X = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
Y = torch.tensor([1, 0, 4, 2])
MASK = torch.tensor([True, False, True, True])

Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

# (parameters, inputs, labels, mask) -> scalar. Composite operators that take shortcuts by values in some surroundings.
TRACED: dict[str, Loss] = {
    "one_hot": lambda w, x, y, m: (F.one_hot(y, 5) * (x @ w)).sum(),
    "one_hot by keyword": lambda w, x, y, m: (F.one_hot(y, num_classes=5) * (x @ w)).sum(),
    "gaussian_nll_loss": lambda w, x, y, m: F.gaussian_nll_loss(x @ w, x[:, :5], (x @ w).square() + 1),
    "gaussian_nll_loss of a number": lambda w, x, y, m: F.gaussian_nll_loss(x @ w, x[:, :5], 0.5),
    "narrow": lambda w, x, y, m: torch.narrow(x @ w, 0, y[0], 2).sum(),
    "narrow from the end": lambda w, x, y, m: (x @ w).narrow(1, -y[3], 2).square().sum(),
    "pinv": lambda w, x, y, m: torch.linalg.pinv(x @ w).sum(),
    "cov": lambda w, x, y, m: torch.cov(x @ w).sum(),
    "corrcoef": lambda w, x, y, m: torch.corrcoef(x @ w).square().sum(),
    "istft": lambda w, x, y, m: torch.istft(
        torch.stft((x @ w).reshape(-1).repeat(5), 8, window=torch.hann_window(8), return_complex=True),
        8,
        window=torch.hann_window(8),
    ).sum(),
    "a write by a mask": lambda w, x, y, m: (x @ w).index_put((m,), torch.tensor(0.0)).sum(),
    "Categorical": lambda w, x, y, m: torch.distributions.Categorical(logits=x @ w).log_prob(y).sum(),
    "Normal": lambda w, x, y, m: torch.distributions.Normal(x @ w, (x @ w).exp()).log_prob(x[:, :5]).sum(),
    "Beta": lambda w, x, y, m: torch.distributions.Beta((x @ w).exp(), x.exp()[:, :5]).entropy().sum(),
    "repeat_interleave": lambda w, x, y, m: torch.repeat_interleave(x @ w, y, dim=0, output_size=7).sum(),
    "cross_entropy": lambda w, x, y, m: F.cross_entropy(x @ w, y, ignore_index=4, label_smoothing=0.1),
}


@pytest.mark.parametrize("f", TRACED.values(), ids=TRACED)
def test_a_loss_traces_to_its_own_bits(f: Loss):
    assert_same_bits(fz.jit(f)(W, X, Y, MASK), f(W, X, Y, MASK))
    gradient = fz.value_and_grad(f)
    assert_same_bits(fz.jit(gradient)(W, X, Y, MASK), gradient(W, X, Y, MASK))


# What nobody can trace, the operator that is named, and what the remedy makes of it: the same value.
REMEDIED: dict[str, tuple[Loss, str, str, Loss]] = {
    "a mask": (
        lambda w, x, y, m: (x @ w)[m].mean(),
        "aten.nonzero.default",
        r"\(x \* mask\)\.sum\(\)",
        lambda w, x, y, m: ((x @ w) * m[:, None]).sum() / (m.sum() * 5),
    ),
    "masked_select": (
        lambda w, x, y, m: torch.masked_select(x @ w, m[:, None]).sum(),
        "aten.masked_select.default",
        r"torch\.where\(mask, x, y\)",
        lambda w, x, y, m: torch.where(m[:, None], x @ w, 0.0).sum(),
    ),
    "nonzero": (
        lambda w, x, y, m: (x @ w)[m.nonzero()[:, 0]].sum(),
        "aten.nonzero.default",
        r"\(x \* mask\)\.sum\(\)",
        lambda w, x, y, m: ((x @ w) * m[:, None]).sum(),
    ),
    "unique": (
        lambda w, x, y, m: len(torch.unique(y)) * (x @ w).sum(),
        r"aten\._unique2\.default",
        r"x\.sort\(\)\.values\.diff\(\)",
        lambda w, x, y, m: (1 + (y.sort().values.diff() != 0).sum()) * (x @ w).sum(),
    ),
    "item": (
        lambda w, x, y, m: (x @ w).sum() / m.sum().item(),
        r"aten\._local_scalar_dense\.default",
        r"instead of \.item\(\)",
        lambda w, x, y, m: (x @ w).sum() / m.sum(),
    ),
    "if": (
        lambda w, x, y, m: (x @ w).sum() if m.all() else w.sum(),
        r"aten\._local_scalar_dense\.default",
        "torch.where instead of `if`",
        lambda w, x, y, m: torch.where(m.all(), (x @ w).sum(), w.sum()),
    ),
    "an index": (
        lambda w, x, y, m: (x @ w)[y[0]].sum(),
        r"aten\._local_scalar_dense\.default",
        r"x\.index_select\(0, i\.reshape\(1\)\)",
        lambda w, x, y, m: (x @ w).index_select(0, y[0].reshape(1)).sum(),
    ),
    "repeat_interleave": (
        lambda w, x, y, m: torch.repeat_interleave(x @ w, y, dim=0).sum(),
        r"aten\.repeat_interleave\.Tensor",
        "output_size=n",
        lambda w, x, y, m: torch.repeat_interleave(x @ w, y, dim=0, output_size=7).sum(),
    ),
    "bincount": (
        lambda w, x, y, m: (torch.bincount(y) * (x @ w)).sum(),
        r"aten\.bincount\.default",
        r"torch\.zeros\(n\)\.index_add",
        lambda w, x, y, m: (torch.zeros(5).index_add(0, y, torch.ones(y.shape)) * (x @ w)).sum(),
    ),
    "equal": (
        lambda w, x, y, m: (x @ w).sum() if torch.equal(x, x + 1) else w.sum(),
        r"aten\.equal\.default",
        r"\(x == y\)\.all\(\)",
        lambda w, x, y, m: torch.where((x == x + 1).all(), (x @ w).sum(), w.sum()),
    ),
    "allclose": (
        lambda w, x, y, m: (x @ w).sum() if torch.allclose(x, x + 1) else w.sum(),
        r"aten\.allclose\.default",
        r"torch\.isclose",
        lambda w, x, y, m: torch.where(torch.isclose(x, x + 1).all(), (x @ w).sum(), w.sum()),
    ),
    "lstsq": (
        lambda w, x, y, m: torch.linalg.lstsq(x.T @ x + torch.eye(6), w).solution.sum(),
        r"aten\.linalg_lstsq\.default",
        r"torch\.linalg\.pinv\(A\) @ B",
        lambda w, x, y, m: (torch.linalg.pinv(x.T @ x + torch.eye(6)) @ w).sum(),
    ),
    "a write of a mask's elements": (
        lambda w, x, y, m: torch.zeros(4, 5).index_put((m,), (x @ w)[:3]).square().sum(),
        "aten.nonzero.default",
        r"x\.masked_scatter\(mask, y\)",
        lambda w, x, y, m: torch.zeros(4, 5).masked_scatter(m[:, None], (x @ w)[:3]).square().sum(),
    ),
}


@pytest.mark.parametrize("f, operator, words, instead", REMEDIED.values(), ids=REMEDIED)
def test_what_cannot_be_traced_is_named_with_a_remedy_that_works(f: Loss, operator: str, words: str, instead: Loss):
    expected = fz.value_and_grad(f)(W, X, Y, MASK)
    with pytest.raises(fz.TraceError, match=rf"looks at the value of a tensor, by {operator}") as info:
        fz.jit(fz.value_and_grad(f))(W, X, Y, MASK)
    assert info.match(words) and "contextlib" not in str(info.value)
    torch.testing.assert_close(fz.jit(fz.value_and_grad(instead))(W, X, Y, MASK), expected)


def test_the_line_that_looked_is_named():
    with pytest.raises(fz.TraceError, match=r"x\[x > 0\]\.sum\(\)  # here"):
        fz.jit(lambda x: x[x > 0].sum())(X)  # x[x > 0].sum()  # here


# Torch traces these by shapes that values decide; here they are named.
BY_VALUES = (
    *("argwhere", "bincount", "combinations", "index_fill", "index_put", "item", "masked_select", "nonzero"),
    *("to_sparse", "unique", "unique_consecutive"),
)


@pytest.mark.slow
def test_what_torch_traces_is_traced():
    from torch.testing._internal.common_methods_invocations import op_db

    failed: dict[str, str] = {}
    for info in op_db:
        dtypes = info.supported_dtypes("cpu")
        dtype = next((d for d in (torch.float32, torch.int64, torch.bool) if d in dtypes), None)
        if dtype is None or info.name in BY_VALUES:
            continue
        for sample in itertools.islice(info.sample_inputs("cpu", dtype), 3):
            leaves, _, hollow = fz.tree.split((sample.input, sample.args, sample.kwargs))
            if any(x.layout is not torch.strided for x in leaves):
                continue

            def f(*tensors: Tensor, info: Any = info, hollow: Any = hollow) -> Any:
                x, args, kwargs = hollow.fill(tensors)
                return info.op(x, *args, **kwargs)

            for g in (f, _pulled(f)):
                if _error(make_fx(g, tracing_mode="fake"), leaves) is None:
                    ours = _error(fz.trace(g), leaves)
                    if ours is not None and not isinstance(ours, fz.RandomOpError):
                        failed[info.full_name] = str(ours)
    assert not failed


def _pulled(f: Callable[..., Any]) -> Callable[..., Any]:
    """The function inside a pullback by its floating-point arguments, all others closed over."""

    def run(*tensors: Tensor) -> Any:
        where = [i for i, x in enumerate(tensors) if x.is_floating_point()]

        def on_floats(*floats: Tensor) -> tuple[Tensor, ...]:
            filled = list(tensors)
            for i, x in zip(where, floats, strict=True):
                filled[i] = x
            outputs = [x for x in fz.tree.leaves(f(*filled)) if isinstance(x, Tensor) and x.is_floating_point()]
            return (*outputs, *floats)

        outputs, pull, *_ = torch.func.vjp(on_floats, *(tensors[i] for i in where))
        return pull(tuple(torch.ones_like(x) for x in outputs))

    return run


def _error(f: Callable[..., Any], tensors: Sequence[Tensor]) -> Exception | None:
    try:
        f(*tensors)
    except Exception as error:
        return error
    return None
