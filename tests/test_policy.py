"""Policies: what each name stands for, and which combinations are refused, with the reason."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import fzero as fz
from fzero import tree

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16

# name: param, master, moment, compute, reduce, rounding; bytes of weights and two moments for each parameter
NAMED = {
    "fp32": (FP32, None, FP32, FP32, FP32, "nearest", 12),
    "mixed": (None, FP32, FP32, BF16, FP32, "nearest", 12),
    "bf16": (BF16, None, BF16, BF16, BF16, "stochastic", 6),
}


@pytest.mark.parametrize("name", NAMED)
def test_a_name_stands_for_its_dtypes(name):
    p = fz.policy(name)
    *fields, _ = NAMED[name]
    assert [p.param, p.master, p.moment, p.compute, p.reduce, p.rounding] == fields
    assert p.loss_scale is None
    assert p.autocast is None
    assert p.stored == (p.master or p.param)


@pytest.mark.parametrize("name", NAMED)
def test_a_state_takes_the_bytes_that_its_policy_says(name):
    n = 1024
    state = fz.init({"w": torch.ones(n)}, fz.adamw(1e-3), fz.make_mesh("cpu"), policy=name)
    per_parameter = NAMED[name][-1]
    held = sum(x.nbytes for x in tree.leaves((state.params, state.moments)))
    assert held == per_parameter * n


@pytest.mark.parametrize("name", NAMED)
def test_a_function_sees_the_compute_dtype(name):
    state = fz.init({"w": torch.ones(4)}, fz.adamw(1e-3), fz.make_mesh("cpu"), policy=name)
    assert fz.call(lambda params: params["w"].dtype, state) == fz.policy(name).compute


def test_the_default_is_fp32_and_a_policy_is_its_own_name():
    assert fz.Policy() == fz.policy("fp32")
    own = fz.Policy(param=BF16, compute=BF16, rounding="stochastic")
    assert fz.policy(own) is own


def test_a_policy_is_a_value():
    assert hash(fz.Policy(compute=BF16)) == hash(fz.Policy(compute=BF16))
    assert fz.Policy(compute=BF16) != fz.Policy()
    with pytest.raises(dataclasses.FrozenInstanceError):
        fz.Policy().compute = BF16  # type: ignore[misc]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"param": None}, "nothing is stored"),
        ({"param": BF16, "master": FP32}, "would store every weight twice(.|\n)*pass param=None"),
        ({"param": FP16}, "param=torch.float16 is not supported(.|\n)*bfloat16"),
        ({"moment": torch.int8}, "moment=torch.int8 is not supported"),
        ({"compute": torch.float64}, "compute=torch.float64 is not supported"),
        ({"autocast": FP16}, "autocast=torch.float16 is not supported"),
        ({"loss_scale": 2.0**15}, "loss_scale=32768.0 is not supported"),
        ({"rounding": "up"}, "rounding='up'; expected 'nearest' or 'stochastic'"),
        ({"rounding": "stochastic"}, "nothing to round"),
        ({"param": None, "master": FP32, "compute": BF16, "rounding": "stochastic"}, "nothing to round"),
    ],
)
def test_a_contradiction_is_refused_with_its_reason(fields, reason):
    with pytest.raises(fz.PolicyError, match=f"fz.Policy: (.|\n)*{reason}"):
        fz.Policy(**fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"param": BF16, "rounding": "stochastic"},
        {"moment": BF16, "rounding": "stochastic"},
        {"param": None, "master": FP32, "moment": BF16, "rounding": "stochastic"},
        {"autocast": BF16},
    ],
)
def test_what_makes_sense_is_allowed(fields):
    p = fz.Policy(**fields)
    assert all(getattr(p, name) == value for name, value in fields.items())


@pytest.mark.parametrize("name", ["fp8", "BF16", ""])
def test_an_unknown_name_is_answered_with_the_known_ones(name):
    with pytest.raises(fz.PolicyError, match=f"no policy is called '{name}'.*'fp32', 'mixed', 'bf16'"):
        fz.policy(name)
    with pytest.raises(fz.PolicyError, match="no policy is called"):
        fz.init({"w": torch.ones(4)}, fz.sgd(0.1), fz.make_mesh("cpu"), policy=name)
