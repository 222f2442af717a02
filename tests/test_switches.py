"""Modules of torch and einops, hand-written nets in timm's manner: gradients of plain torch, traced as eager."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from einops.layers.torch import EinMix, Rearrange, Reduce
from torch import Tensor, nn

import fzero as fz
from fzero.modules.switches import Shortcuts, surroundings
from tests.small import assert_same_bits, flat

# torch compiles its jvp rules with torch.jit.script on first use, which warns of itself.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")

X = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0))


class SelfAttention(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **options)

    def forward(self, x: Tensor) -> Tensor:
        mixed, weights = self.attention(x, x, x)
        return mixed + weights.sum()


class Attention(nn.Module):
    """Attention that torch may compute by a fused kernel, and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.mix(x).unflatten(-1, (2, 4)).transpose(1, 2)
        return F.scaled_dot_product_attention(heads, heads, heads)


class Padded(nn.Module):
    """An encoder that is given lengths: in eval mode torch would make nested tensors of it."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1)

    def forward(self, x: Tensor) -> Tensor:
        padding = torch.arange(4) >= torch.tensor([[4], [2]])
        return self.encoder(x, src_key_padding_mask=padding)[:, :2]


class Recurrent(nn.Module):
    def __init__(self, cell: Callable[..., nn.RNNBase]) -> None:
        super().__init__()
        self.cell = cell(8, 5, 1, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.cell(x)[0]


class NormAct(nn.BatchNorm1d):
    """A norm and an activation in one module, with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        x = F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training, self.momentum or 0.0
        )
        return F.silu(x, inplace=True)


class Residual(nn.Module):
    """A residual block with squeeze-and-excitation and a path that is dropped for whole examples."""

    def __init__(self, channels: int, drop: float) -> None:
        super().__init__()
        self.drop = drop
        self.conv1 = nn.Conv1d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = NormAct(channels)
        self.gate = nn.Sequential(nn.AdaptiveAvgPool1d(1), nn.Conv1d(channels, channels, 1), nn.Sigmoid())
        self.conv2 = nn.Conv1d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm1d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(x))
        y = self.bn2(self.conv2(y * self.gate(y)))
        if self.training and self.drop:
            keep = y.new_empty((y.shape[0], 1, 1)).bernoulli_(1 - self.drop)
            y = y * keep / (1 - self.drop)
        return F.relu(x + y)


MODULES: dict[str, Callable[[], nn.Module]] = {
    "einops": lambda: nn.Sequential(
        Rearrange("b t (h c) -> b t h c", h=2),
        EinMix("b t h c -> b t h d", weight_shape="h c d", bias_shape="h d", h=2, c=4, d=3),
        Reduce("b t h d -> b t d", "max"),
    ),
    "attention": lambda: SelfAttention(dropout=0.2),
    "encoder layer": lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.2, batch_first=True),
    "padded encoder": Padded,
    "dropout": lambda: nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.4), nn.Linear(8, 2), nn.AlphaDropout(0.3)),
    "dropped channels": lambda: nn.Sequential(nn.Conv1d(4, 4, 3), nn.Dropout1d(0.4)),
    "lstm": lambda: Recurrent(nn.LSTM),
    "gru": lambda: Recurrent(nn.GRU),
    "convolutions": lambda: nn.Sequential(
        nn.Conv1d(4, 6, 3, padding=1, groups=2),
        nn.GroupNorm(2, 6),
        nn.GELU(),
        nn.MaxPool1d(2),
        nn.ConvTranspose1d(6, 4, 2, 2),
    ),
    "residual": lambda: nn.Sequential(Residual(4, 0.5), Residual(4, 0.0), nn.Flatten(), nn.Linear(32, 3)),
}


# What another row shows too: an encoder is made of encoder layers, a cell has no mode, and without its mode a
# dropout is no module.
SLOW = {("padded encoder", True), ("gru", True), ("lstm", False), ("dropout", False), ("dropped channels", False)}
ROWS = [
    pytest.param(
        make,
        train,
        marks=[pytest.mark.slow] * ((name, train) in SLOW),
        id=f"{name}-{'train' if train else 'eval'}",
    )
    for name, make in MODULES.items()
    for train in (True, False)
]


@pytest.mark.parametrize(("make", "train"), ROWS)
def test_a_module_has_the_gradients_of_plain_torch_and_a_trace_has_its_bits(make: Any, train: bool):
    torch.manual_seed(1)
    module = make().train(train)
    apply, params, buffers = fz.functional(module, buffers=True)

    def forward(p: Any, b: Any, x: Tensor) -> tuple[Tensor, Any]:
        return fz.keyed(apply)(3, p, b, x)

    def loss(p: Any, b: Any, x: Tensor) -> tuple[Tensor, Any]:
        out, b = forward(p, b, x)
        return out.square().sum(), b

    gradient = fz.value_and_grad(loss, has_aux=True)
    got = gradient(params, buffers, X)
    value = fz.keyed(lambda: module(X).square().sum())(3)
    named = dict(module.named_parameters())
    expected = dict(zip(named, torch.autograd.grad(value, list(named.values())), strict=True))
    (loss_value, after), gradients = got
    torch.testing.assert_close(loss_value, value.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(flat(gradients), dict(sorted(expected.items())), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(flat(after), dict(sorted(module.named_buffers())))
    assert_same_bits(fz.jit(gradient)(params, buffers, X), got)
    # Without a gradient torch would take its kernels for inference.
    with torch.no_grad():
        assert_same_bits(fz.jit(forward)(params, buffers, X), forward(params, buffers, X))


def test_switches_are_set_inside_alone_and_set_back_after_an_error():
    before = torch.backends.mha.get_fastpath_enabled(), torch.backends.mkldnn.enabled
    shortcuts = Shortcuts.of(nn.Sequential(nn.MultiheadAttention(8, 2), nn.LSTM(2, 2)))
    assert shortcuts == Shortcuts(attention=True, lstm=True)
    assert Shortcuts.of(nn.Linear(2, 2)) == Shortcuts(attention=False, lstm=False)
    with pytest.raises(KeyError), surroundings(shortcuts):
        assert not torch.backends.mha.get_fastpath_enabled()
        assert not torch.backends.mkldnn.enabled
        raise KeyError
    assert (torch.backends.mha.get_fastpath_enabled(), torch.backends.mkldnn.enabled) == before


def test_the_fused_kernel_of_attention_runs_where_one_gradient_is_asked_for():
    apply, params = fz.functional(Attention())

    def gradient(p: Any) -> Any:
        return fz.grad(lambda p: apply(p, X).sum())(p)

    def names(f: Callable[..., Any]) -> str:
        return str(fz.trace(f)(params).trace.module.graph)

    assert "scaled_dot_product_flash_attention_for_cpu_backward" in names(gradient)
    twice = names(lambda p: torch.func.jvp(gradient, (p,), (p,))[1])
    assert "flash" not in twice
    assert "softmax" in twice
