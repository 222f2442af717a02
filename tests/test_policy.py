"""Policies: what each name stands for, and which combinations are refused, with the reason."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch

import fzero as fz
from fzero import tree
from fzero.precision.policy import POLICIES

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16

# name: param, master, moment, compute, reduce, rounding; bytes of weights and two moments for each of 1,024 parameters
NAMED = {
    "fp32": (FP32, None, FP32, FP32, FP32, "nearest", 12),
    "mixed": (None, FP32, FP32, BF16, FP32, "nearest", 12),
    "bf16": (BF16, None, BF16, BF16, BF16, "stochastic", 6),
    "bf16-exact": (BF16, "split", BF16, BF16, BF16, "stochastic", 8),
    "bf16-fp32-moments": (BF16, None, FP32, BF16, BF16, "stochastic", 10),
    "bf16-8bit": (BF16, None, torch.int8, BF16, BF16, "stochastic", 4 + 2 * 4 / 128),
    "fp16": (FP16, None, FP32, FP16, FP32, "stochastic", 10),
    "fp16-mixed": (None, FP32, FP32, FP16, FP32, "nearest", 12),
}
SCALED = ("fp16", "fp16-mixed")


def test_every_name_has_a_row_here_and_in_the_table_that_users_read():
    assert list(NAMED) == list(POLICIES)
    assert re.findall(r"^ *\| `([\w-]+)` .*?([\d.]+) *\|$", str(fz.policy.__doc__), re.MULTILINE) == [
        (name, f"{row[-1]:.2f}".removesuffix(".00")) for name, row in NAMED.items()
    ]


@pytest.mark.parametrize("name", NAMED)
def test_a_name_stands_for_its_dtypes(name):
    p = fz.policy(name)
    *fields, _ = NAMED[name]
    assert [p.param, p.master, p.moment, p.compute, p.reduce, p.rounding] == fields
    assert p.loss_scale == (fz.LossScale(initial=2.0**15) if name in SCALED else None)
    assert p.autocast is None
    assert p.exempt == ()
    assert p.stored == (p.param or p.master)


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
        ({"param": torch.float64}, r"param=torch.float64 is not supported(.|\n)*bfloat16"),
        ({"master": BF16, "param": None}, r"master=torch.bfloat16 is not supported. Use torch.float32, 'split', None"),
        ({"master": "split"}, "master='split' completes a bfloat16 parameter(.|\n)*param=torch.float32"),
        ({"master": "split", "param": None}, "param=None(.|\n)*Pass param=torch.bfloat16"),
        ({"moment": FP16}, "moment=torch.float16 is not supported: squares(.|\n)*underflow"),
        ({"moment": torch.int32}, "moment=torch.int32 is not supported"),
        ({"compute": torch.float64}, "compute=torch.float64 is not supported"),
        ({"compute": BF16, "reduce": FP16}, "gradients in torch.bfloat16 cannot be summed in torch.float16"),
        ({"compute": FP16, "wire": BF16}, "gathered in torch.bfloat16 cannot be computed with in torch.float16"),
        ({"wire": BF16, "reduce": FP16}, "gradients in torch.bfloat16 cannot be summed in torch.float16"),
        ({"wire": torch.float64}, "wire=torch.float64 is not supported"),
        ({"autocast": FP32}, "autocast=torch.float32 is not supported"),
        ({"loss_scale": 2.0**15}, "loss_scale=32768.0 has nothing to protect(.|\n)*compute=torch.float16"),
        ({"loss_scale": fz.LossScale(), "compute": BF16}, "has nothing to protect"),
        ({"loss_scale": 0.0, "compute": FP16}, "loss_scale=0.0; expected None, a number above 0"),
        ({"loss_scale": "dynamic", "compute": FP16}, "loss_scale='dynamic'; expected None, a number above 0"),
        ({"rounding": "up"}, "rounding='up'; expected 'nearest' or 'stochastic'"),
        ({"rounding": "stochastic"}, "nothing to round"),
        ({"param": None, "master": FP32, "compute": BF16, "rounding": "stochastic"}, "nothing to round"),
        ({"param": BF16, "master": "split", "rounding": "stochastic"}, "nothing to round(.|\n)*split in two"),
        ({"exempt": "*norm*"}, "expected a tuple of patterns"),
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
        {"autocast": FP16, "loss_scale": 128.0},
        {"param": FP16, "compute": FP16},
        {"param": BF16, "master": "split", "moment": torch.int8, "rounding": "stochastic"},
        {"moment": torch.int8},
        {"exempt": ("*norm*", "embed*")},
        {"wire": FP16, "loss_scale": 128.0},
    ],
)
def test_what_makes_sense_is_allowed(fields):
    p = fz.Policy(**fields)
    assert all(getattr(p, name) == value for name, value in fields.items())


@pytest.mark.parametrize("name", ["fp8", "BF16", ""])
def test_an_unknown_name_is_answered_with_the_known_ones(name):
    with pytest.raises(fz.PolicyError, match=f"no policy is called '{name}'.*'fp32', 'mixed', 'bf16', .*'fp16-mixed'"):
        fz.policy(name)
    with pytest.raises(fz.PolicyError, match="no policy is called"):
        fz.init({"w": torch.ones(4)}, fz.sgd(0.1), fz.make_mesh("cpu"), policy=name)


def test_keywords_change_a_policy_of_a_name():
    p = fz.policy("bf16", autocast=BF16, exempt=["*norm*"])
    assert p == dataclasses.replace(fz.policy("bf16"), autocast=BF16, exempt=("*norm*",))
    assert fz.policy(p, exempt=()).exempt == ()


# ---------------------------------------------------------------------------------------------------------
# The compute dtype


@pytest.mark.parametrize("name", NAMED)
def test_another_compute_dtype_leaves_storage_wire_and_gradients_as_they_are(name):
    own, wide = fz.policy(name), fz.policy(name, compute=FP32)
    assert dataclasses.replace(wide, compute=own.compute, wire=None) == own
    assert (wide.compute, wide.sent) == (FP32, own.compute)
    states = [fz.init(PARAMS, fz.adamw(1e-3), fz.make_mesh("cpu"), policy=p) for p in (own, wide)]
    assert dtypes(states[0]) == dtypes(states[1])
    assert set(fz.call(dtypes, states[1]).values()) == {FP32, torch.int64}
    grads = [fz.grad(lambda params: sum(x.float().sum() for x in tree.leaves(params)))(state) for state in states]
    assert dtypes(grads[0]) == dtypes(grads[1])


def test_what_is_gathered_has_been_rounded_to_the_wire():
    state = fz.init({"w": torch.full((40,), 1.001)}, fz.sgd(0.1), fz.make_mesh("cpu"), policy="mixed")
    wide = fz.init({"w": torch.full((40,), 1.001)}, fz.sgd(0.1), state.mesh, policy=fz.policy("mixed", compute=FP32))
    assert torch.equal(fz.call(lambda p: p["w"] + 0, wide), fz.call(lambda p: p["w"].float(), state))
    grads = fz.grad(lambda p: (1.001 * p["w"]).sum())(wide)
    assert torch.equal(fz.gather(grads)["w"], torch.full((40,), 1.001, dtype=BF16))


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("fast", [True, False])
def test_auto_computes_in_fp32_where_products_are_slow(name, fast, monkeypatch):
    monkeypatch.setattr("fzero.precision.products.are_fast", lambda dtype, device: fast or dtype == FP32)
    found = fz.policy(name, compute="auto", device="cpu")
    assert found == (fz.policy(name) if fast else fz.policy(name, compute=FP32))
    assert fz.policy(found, compute="auto", device="cpu") == found
    assert fz.policy(found, compute=NAMED[name][3]) == fz.policy(name)


def test_auto_asks_about_the_device_of_the_mesh(monkeypatch):
    monkeypatch.setattr(
        "fzero.precision.products.are_fast", lambda dtype, device: dtype == FP32 or device.type == "cuda"
    )
    assert fz.policy("bf16", compute="auto", device=torch.device("cuda", 0)) == fz.policy("bf16")
    assert fz.policy("bf16", compute="auto", device="cpu").compute == FP32
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert fz.policy("bf16", compute="auto").compute == FP32


def test_auto_casts_to_nothing_slow_but_keeps_what_a_loss_scale_is_for(monkeypatch):
    monkeypatch.setattr("fzero.precision.products.are_fast", lambda dtype, device: dtype == FP32)
    assert fz.policy("fp32", autocast=BF16, compute="auto") == fz.policy("fp32")
    assert fz.policy("mixed", autocast=BF16, compute=FP32).autocast == BF16
    scaled = fz.Policy(autocast=FP16, loss_scale=128.0)
    assert fz.policy(scaled, compute="auto") == scaled
    assert fz.policy("fp16", autocast=FP16, compute="auto") == fz.policy("fp16", compute=FP32)


# ---------------------------------------------------------------------------------------------------------
# Exempt leaves


def dtypes(tree_):
    return {path: x.dtype for path, x in zip(tree.paths(tree_), tree.leaves(tree_), strict=True)}


PARAMS = {"embed": torch.randn(40, 4), "norm": {"scale": torch.randn(40)}, "ids": torch.arange(40)}


@pytest.mark.parametrize("name", NAMED)
def test_exempt_leaves_are_fp32_throughout(name):
    policy = fz.policy(name, exempt=["*norm*"])
    state = fz.init(PARAMS, fz.adamw(1e-2), fz.make_mesh("cpu"), policy=policy)
    seen = fz.call(dtypes, state)
    assert seen == {"embed": policy.compute, "norm.scale": FP32, "ids": torch.int64}
    assert {dtype for path, dtype in dtypes(state).items() if "norm" in path} == {FP32}
    grads = fz.grad(lambda params: sum(x.float().sum() for x in tree.leaves(params)))(state)
    assert [None if x is None else x.dtype for x in grads.pieces] == [policy.compute, None, FP32]


def test_an_exempt_leaf_is_updated_as_under_fp32():
    mesh, optimizer = fz.make_mesh("cpu"), fz.adamw(1e-2)
    exempt = fz.init(PARAMS, optimizer, mesh, policy=fz.policy("bf16-8bit", exempt=["*norm*"]))
    plain = fz.init(PARAMS, optimizer, mesh, policy="fp32")
    for _ in range(3):
        exempt, plain = (
            fz.apply_gradients(s, fz.grad(lambda p: (p["norm"]["scale"] ** 2).sum() + p["embed"].float().sum())(s))[0]
            for s in (exempt, plain)
        )
    left, right = fz.gather(exempt.params), fz.gather(plain.params)
    assert torch.equal(left["norm"]["scale"], right["norm"]["scale"])
    assert not torch.equal(left["embed"].float(), right["embed"])


def test_a_pattern_that_fits_nothing_is_an_error():
    with pytest.raises(fz.PolicyError, match=r"exempts \['nrom\*'\], and no leaf has such a path(.|\n)*norm.scale"):
        fz.init(PARAMS, fz.sgd(0.1), fz.make_mesh("cpu"), policy=fz.policy("bf16", exempt=["*norm*", "nrom*"]))
