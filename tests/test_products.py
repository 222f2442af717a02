"""Which products a device is fast at, and what a step says that multiplies others."""

from __future__ import annotations

import logging

import pytest
import torch

import fzero as fz
from fzero._torch import cpu_multiplies
from fzero.precision import products

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def said_nothing_yet():
    products.warn_if_slow.cache_clear()
    products.are_fast.cache_clear()
    yield
    products.are_fast.cache_clear()


def slow_cpu(monkeypatch: pytest.MonkeyPatch, *, slow: bool = True) -> None:
    monkeypatch.setattr(products, "cpu_multiplies", lambda dtype: not slow)


def test_fp32_is_fast_everywhere_and_16_bits_where_the_cpu_has_instructions():
    assert products.are_fast(FP32, CPU)
    assert products.are_fast(torch.int64, CPU)
    for dtype in (BF16, FP16):
        assert products.are_fast(dtype, CPU) is cpu_multiplies(dtype)


@pytest.mark.skipif(not hasattr(torch._C._cpu, "_get_cpu_capability"), reason="this torch does not tell")
def test_what_the_cpu_says_of_itself():
    flags = torch._C._cpu._get_cpu_capability()
    if flags["architecture"] != "x86_64":
        pytest.skip("other instructions")
    assert cpu_multiplies(BF16) is (flags["avx512_bf16"] or flags["amx_tile"])
    assert cpu_multiplies(FP16) is (flags["avx512_fp16"] or flags["amx_fp16"])


@pytest.mark.parametrize(("capability", "fast"), [((7, 0), False), ((8, 0), True), ((9, 0), True)])
def test_a_gpu_multiplies_bf16_from_ampere_on(capability, fast, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert products.are_fast(BF16, torch.device("cuda")) is fast
    assert products.are_fast(FP16, torch.device("cuda"))


def test_a_gpu_that_is_not_there_is_a_recent_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert products.are_fast(BF16, torch.device("cuda"))


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.startswith("fzero")]


def step(policy: fz.Policy, mesh: fz.Mesh | None = None) -> None:
    state = fz.init({"w": torch.ones(4)}, fz.sgd(0.1), mesh or fz.make_mesh("cpu"), policy=policy)
    loss = fz.grad(lambda params: params["w"].float().sum())
    if mesh is None:
        loss(state)
    else:
        fz.trace(loss)(state)


def test_a_step_says_once_that_its_products_are_slow(monkeypatch, caplog):
    slow_cpu(monkeypatch)
    with caplog.at_level(logging.WARNING, logger="fzero"):
        for _ in range(2):
            step(fz.policy("bf16"))
    (message,) = said(caplog)
    assert "This CPU has no instructions for bfloat16" in message and 'compute="auto"' in message


@pytest.mark.parametrize(
    ("policy", "messages"),
    [
        ({"name": "fp32"}, 0),
        ({"name": "mixed"}, 1),
        ({"name": "bf16", "compute": FP32}, 0),
        ({"name": "fp32", "autocast": BF16}, 1),
        ({"name": "fp16"}, 1),
        ({"name": "fp16-mixed", "compute": FP32}, 0),
    ],
)
@pytest.mark.parametrize("slow", [True, False])
def test_only_slow_products_are_told(policy, messages, slow, monkeypatch, caplog):
    slow_cpu(monkeypatch, slow=slow)
    with caplog.at_level(logging.WARNING, logger="fzero"):
        step(fz.policy(**policy))
    assert len(said(caplog)) == messages * slow


def test_a_simulated_world_multiplies_nothing(monkeypatch, caplog):
    slow_cpu(monkeypatch)
    with caplog.at_level(logging.WARNING, logger="fzero"):
        step(fz.policy("bf16"), fz.make_mesh("cpu", data=2, simulate=True))
    assert not said(caplog)
