"""Values print as the call that makes them, on one line."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import fzero as fz


def top(path: str) -> str:
    return path.split(".")[0]


def falling(step: Tensor) -> Tensor:
    return 1.0 / (step + 1)


NAMES = {**vars(fz), **vars(fz.schedules), "torch": torch, "top": top, "falling": falling}
BF16 = torch.bfloat16
VALUES: list[tuple[Any, str]] = [
    (fz.zero(3), "zero(3)"),
    (fz.zero(2, ("node", "data")), "zero(2, axis=('node', 'data'))"),
    (fz.zero(3, "model", replicate="node"), "zero(3, axis='model', replicate='node')"),
    (fz.zero(0, ()), "zero(0, axis=())"),
    (fz.zero(1, split={"*.w": fz.P("model", None)}), "zero(1, split={'*.w': P('model', None)})"),
    (fz.P("model", None), "P('model', None)"),
    (fz.make_mesh("cpu"), "make_mesh('cpu', data=1)"),
    (fz.make_mesh("cpu", name=2, simulate=True), "make_mesh('cpu', name=2, simulate=True)"),
    (fz.make_mesh("cuda", node=2, data=4, simulate=True), "make_mesh('cuda', node=2, data=4, simulate=True)"),
    *((fz.policy(name), f"policy('{name}')") for name in ("fp32", "mixed", "bf16", "bf16-exact", "bf16-8bit", "fp16")),
    (fz.Policy(), "policy('fp32')"),
    (fz.policy("bf16", compute=torch.float32), "policy('bf16', compute=torch.float32)"),
    (fz.policy("mixed", compute=torch.float32), "policy('mixed', compute=torch.float32)"),
    (
        fz.policy("fp32", autocast=BF16, exempt=["*norm*"]),
        "policy('fp32', autocast=torch.bfloat16, exempt=('*norm*',))",
    ),
    (fz.Policy(compute=BF16), "Policy(compute=torch.bfloat16)"),
    (
        fz.Policy(param=torch.float16, compute=torch.float16, loss_scale=8.0),
        "Policy(param=torch.float16, compute=torch.float16, loss_scale=8.0)",
    ),
    (fz.LossScale(), "LossScale()"),
    (fz.LossScale(1024.0, interval=10), "LossScale(initial=1024.0, interval=10)"),
    (fz.adamw(1e-3), "adamw(lr=0.001)"),
    (fz.adamw(1e-3, b2=0.95, weight_decay=0.1), "adamw(lr=0.001, b2=0.95, weight_decay=0.1)"),
    (fz.adamw(falling, mask=top), "adamw(lr=falling, mask=top)"),
    (fz.adamw(1, mask={"w": True, "n": {"b": False}}), "adamw(lr=1, mask={'n': {'b': False}, 'w': True})"),
    (fz.adam(1e-3), "adamw(lr=0.001, weight_decay=0.0)"),
    (fz.sgd(0.1, momentum=0.9, nesterov=True), "sgd(lr=0.1, momentum=0.9, nesterov=True)"),
    (fz.lion(fz.schedules.constant(0.1)), "lion(lr=constant(0.1))"),
    (fz.adafactor(), "adafactor()"),
    (fz.adafactor(0.1, clip=math.inf), "adafactor(lr=0.1, clip=float('inf'))"),
    (fz.muon(0.1, steps=3), "muon(lr=0.1, steps=3)"),
    (fz.muon(0.1, matrix=top, others=fz.sgd(1.0)), "muon(lr=0.1, others=sgd(lr=1.0), matrix=top)"),
    (fz.chain(fz.clip_by_global_norm(1.0), fz.sgd(0.1)), "chain(clip_by_global_norm(1.0), sgd(lr=0.1))"),
    (
        fz.chain(fz.clip_by_leaf_norm(1), fz.clip_by_last_norm(2.0), fz.sgd(0.1)),
        "chain(clip_by_leaf_norm(1), clip_by_last_norm(2.0), sgd(lr=0.1))",
    ),
    (
        fz.partition_by(top, {"head": fz.sgd(falling), "body": None}),
        "partition_by(top, {'head': sgd(lr=falling), 'body': None})",
    ),
    (
        fz.partition_by({"w": "a", "b": "b"}, {"a": fz.sgd(1), "b": None}),
        "partition_by({'b': 'b', 'w': 'a'}, {'a': sgd(lr=1), 'b': None})",
    ),
    (fz.schedules.linear(1.0, 0.0, 4), "linear(1.0, end=0.0, steps=4)"),
    (fz.schedules.warmup_cosine(0.01, 10, 200), "warmup_cosine(0.01, warmup=10, total=200)"),
    (fz.schedules.wsd(0.01, 1, 2, 9, 0.001), "wsd(0.01, warmup=1, decay=2, total=9, floor=0.001)"),
]


@pytest.mark.parametrize(("value", "text"), VALUES, ids=[text for _, text in VALUES])
def test_a_value_prints_as_the_call_that_makes_it(value: Any, text: str) -> None:
    assert repr(value) == text
    again = eval(text, NAMES.copy())
    assert again == value and type(again) is type(value)


def test_what_no_call_can_say_is_short() -> None:
    many = fz.adamw(1e-3, mask={str(i): True for i in range(100)})
    assert repr(many) == "adamw(lr=0.001, mask=<100 leaves>)"
    assert repr(fz.adamw(lambda step: step)) == "adamw(lr=<lambda>)"
    rate: Any = torch.tensor(0.5)
    assert repr(fz.adamw(rate)) == "adamw(lr=tensor(0.5000))"


def double(x: Tensor) -> Tensor:
    return 2 * x


def test_a_jitted_function_says_what_it_is_and_keeps() -> None:
    plain = fz.jit(double)
    assert repr(plain) == "jit(double): no programs"
    plain(torch.ones(2))
    assert repr(plain) == "jit(double): 1 program"
    plain(torch.ones(2, dtype=torch.float64))
    assert repr(plain) == "jit(double): 2 programs"
    other = fz.jit(double, donate=0, remat="block", keep_gathered=math.inf, lower="graph")
    assert repr(other) == (
        "jit(double, donate=(0,), lower='graph', remat='block', keep_gathered=float('inf')): no programs"
    )
    assert repr(fz.train_step(double)) == "jit(train_step(double), donate=(0,)): no programs"
