"""What is wrong is told where it is given: the call, the argument, what was expected, what came, the way out."""

# mypy: disable-error-code="arg-type,call-arg,dict-item,misc"

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fzero as fz
from fzero.calls.arguments import number, whole
from tests import small, world

S = fz.schedules
MODEL = nn.Linear(2, 2)
# Each row: a wrong call, the error's class, and words of its text, in order. Every row's text names its call.
WRONG: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    # Numbers of another kind, or out of their range.
    "adamw lr, text": (
        lambda: fz.adamw("1e-3"),
        TypeError,
        "fz.adamw: lr: expected a number, or a f.* got '1e-3'. A sch",
    ),
    "adamw lr, negative": (lambda: fz.adamw(-1), ValueError, "fz.adamw: lr: expected a number of at least 0, got -1."),
    "adamw lr, nan": (lambda: fz.adamw(float("nan")), ValueError, "fz.adamw: lr: .* got nan"),
    "adamw lr, infinite": (lambda: fz.adamw(float("inf")), ValueError, "fz.adamw: lr: .* got inf"),
    "adamw lr, a flag": (lambda: fz.adamw(True), TypeError, "fz.adamw: lr: .* got True"),
    "adamw lr, a vector": (lambda: fz.adamw(torch.ones(2)), TypeError, r"fz.adamw: lr: .* got float32\(2,\)"),
    "adamw lr, a model": (lambda: fz.adamw(MODEL), TypeError, r"fz.adamw: lr: .* fz.init\(model, fz.adamw\(3e-4\)\)"),
    "adamw b1": (lambda: fz.adamw(1e-3, b1=1.0), ValueError, "fz.adamw: b1: .* at least 0 and below 1, got 1.0"),
    "adamw b2": (lambda: fz.adamw(1e-3, b2=-0.1), ValueError, "fz.adamw: b2: .* got -0.1"),
    "adamw pair": (lambda: fz.adamw(1e-3, (0.9, 0.99)), TypeError, "fz.adamw: b1: expected a number .* got tuple"),
    "adamw eps": (
        lambda: fz.adamw(1e-3, eps=0),
        ValueError,
        "fz.adamw: eps: expected a number above 0, got 0. An elem",
    ),
    "adamw decay": (lambda: fz.adamw(1e-3, weight_decay=-1), ValueError, "fz.adamw: weight_decay: .* got -1"),
    "adam": (lambda: fz.adam(1e-3, b2=2.0), ValueError, "fz.adam: b2: .* got 2.0"),
    "sgd momentum": (lambda: fz.sgd(0.1, momentum=-0.9), ValueError, "fz.sgd: momentum: .* got -0.9"),
    "sgd nesterov": (lambda: fz.sgd(0.1, 0.9, nesterov="no"), TypeError, "fz.sgd: nesterov: expected True or False"),
    "sgd nesterov of nothing": (lambda: fz.sgd(0.1, nesterov=True), ValueError, "fz.sgd: nesterov=True needs a mom"),
    "sgd decay": (lambda: fz.sgd(0.1, weight_decay="0"), TypeError, "fz.sgd: weight_decay: .* got '0'"),
    "lion": (lambda: fz.lion(1e-3, b1=1), ValueError, "fz.lion: b1: .* got 1"),
    "adafactor clip": (lambda: fz.adafactor(clip=0), ValueError, "fz.adafactor: clip: .* above 0, got 0"),
    "adafactor eps": (lambda: fz.adafactor(eps=1e-3), TypeError, r"fz.adafactor: eps: expected two numbers, \(root"),
    "adafactor decay": (lambda: fz.adafactor(decay=0.8), ValueError, "fz.adafactor: decay: .* at most 0, got 0.8"),
    "muon steps": (lambda: fz.muon(1e-2, steps=0), ValueError, "fz.muon: steps: .* whole .* at least 1, got 0"),
    "muon momentum": (lambda: fz.muon(1e-2, 1.0), ValueError, "fz.muon: momentum: .* below 1, got 1.0"),
    "muon others": (lambda: fz.muon(1e-2, others="adamw"), TypeError, "fz.muon: others must be an fz optimizer"),
    "clip": (lambda: fz.clip_by_global_norm(0), ValueError, "fz.clip_by_global_norm: limit: .* above 0, got 0"),
    "clip, text": (lambda: fz.clip_by_leaf_norm("1"), TypeError, "fz.clip_by_leaf_norm: limit: .* got '1'"),
    "clip, nan": (lambda: fz.clip_by_last_norm(float("nan")), ValueError, "fz.clip_by_last_norm: limit: .* got nan"),
    "constant": (lambda: S.constant(-1.0), ValueError, "fz.schedules.constant: value: .* got -1.0"),
    "linear": (lambda: S.linear(1.0, 0.0, steps=0), ValueError, "fz.schedules.linear: steps: .* at least 1, got 0"),
    "linear, end": (lambda: S.linear(1.0, -1.0, 5), ValueError, "fz.schedules.linear: end: .* got -1.0"),
    "warm-up": (
        lambda: S.warmup_cosine(1.0, 20, 10),
        ValueError,
        "fz.schedules.warmup_cosine: warmup=20 is longer than",
    ),
    "total": (lambda: S.warmup_cosine(1.0, 0, -5), ValueError, "fz.schedules.warmup_cosine: total: .* got -5"),
    "half a step": (lambda: S.warmup_cosine(1.0, 0.5, 5), TypeError, "fz.schedules.warmup_cosine: warmup: .* got 0.5"),
    "wsd": (lambda: S.wsd(1.0, 5, 6, 10), ValueError, r"fz.schedules.wsd: warmup=5 \+ decay=6 is longer than the run"),
    "loss scale": (lambda: fz.LossScale(initial="2"), fz.PolicyError, "fz.LossScale: initial='2'; expected a number"),
    # Things of another kind.
    "mask, a pattern": (
        lambda: fz.adamw(1e-3, mask="*.weight"),
        TypeError,
        "fz.adamw: mask: .* got '.*' at .* fnmatch",
    ),
    "mask, of numbers": (lambda: fz.lion(1e-3, mask={"w": 1}), TypeError, "fz.lion: mask: .* True and .* got 1 at w"),
    "matrix": (lambda: fz.muon(1e-3, matrix=["w"]), TypeError, "fz.muon: matrix: .* got 'w' at 0"),
    "chain, turned round": (
        lambda: fz.chain(fz.sgd(1), fz.clip_by_global_norm(1)),
        TypeError,
        "fz.chain: .* come first",
    ),
    "chain, two": (lambda: fz.chain(fz.sgd(1), fz.sgd(1)), TypeError, "fz.chain: argument 0 .* fz.partition_by"),
    "chain, nothing": (lambda: fz.chain(), TypeError, "fz.chain: the last argument must be an optimizer, got None"),
    "partition, a list": (
        lambda: fz.partition_by(str, [fz.sgd(1)]),
        TypeError,
        "fz.partition_by: optimizers: .* a dict",
    ),
    "partition, a rate": (
        lambda: fz.partition_by(str, {"a": 0.1}),
        TypeError,
        r"fz.partition_by: optimizers\['a'\]: .* 0.1",
    ),
    "policy": (
        lambda: fz.policy("bf-16"),
        fz.PolicyError,
        "fz.policy: no policy is called 'bf-16'. Did you mean 'bf16'",
    ),
    "policy, a dtype": (lambda: fz.policy(torch.bfloat16), fz.PolicyError, "fz.policy: no policy is called torch.bfl"),
    "policy, a list": (lambda: fz.policy(["bf16"]), fz.PolicyError, "fz.policy: no policy is called"),
    "zero": (lambda: fz.zero("3"), fz.LayoutError, "fz.zero: there is no stage '3'. Use 0, 1, 2 or 3"),
    "zero, a float": (lambda: fz.zero(2.0), fz.LayoutError, "fz.zero: there is no stage 2.0. Use 0, 1, 2 or 3"),
    "zero, a bool": (lambda: fz.zero(True), fz.LayoutError, "fz.zero: there is no stage True. Use 0, 1, 2 or 3"),
    "layout, a float": (lambda: fz.init({}, fz.sgd(0.1), layout=2.0), TypeError, r".*Pass layout=fz.zero\(3\)"),
    "zero, axis": (
        lambda: fz.zero(3, axis=None),
        fz.LayoutError,
        "fz.zero: axis=None; expected the name of a mesh axis",
    ),
    "zero, split": (lambda: fz.zero(3, split={"w": ("a",)}), fz.LayoutError, "fz.zero: split=.*; expected .* fz.P"),
    "P": (lambda: fz.P("data", 0), TypeError, "fz.P: expected the name of a mesh axis, or None"),
    "shard, mesh": (
        lambda: fz.shard({}, fz.zero(3), None),
        TypeError,
        "fz.shard: mesh: expected a mesh, .* got Layout",
    ),
    "shard, policy": (
        lambda: fz.shard({}, fz.make_mesh("cpu"), fz.zero(3), policy="bf16"),
        TypeError,
        r"fz.shard: policy: expected a Policy, such as fz.policy\('bf16'\)",
    ),
    "init, torch's": (
        lambda: fz.init(MODEL, torch.optim.AdamW(MODEL.parameters())),
        TypeError,
        r"fz.init: optimizer must be an fz optimizer, got AdamW. Try fz.adamw\(lr\)",
    ),
    "init, parameters": (
        lambda: fz.init(MODEL.parameters(), fz.sgd(1)),
        TypeError,
        r"fz.init: params must be .* got a generator.* dict\(model.named_parameters\(\)\)",
    ),
    "init, layout as mesh": (lambda: fz.init({}, fz.sgd(1), fz.zero(3)), TypeError, "fz.init: mesh .* name, layout="),
    "init, policy as mesh": (lambda: fz.init({}, fz.sgd(1), "bf16"), TypeError, "fz.init: mesh .* its name, policy="),
    "init, a stage": (lambda: fz.init({}, fz.sgd(1), layout=3), TypeError, r"fz.init: layout .* layout=fz.zero\(3\)"),
    "init, seed": (lambda: fz.init({}, fz.sgd(1), seed=2**32), ValueError, "fz.init: seed: .* got 4294967296"),
    "init, seed, text": (lambda: fz.init({}, fz.sgd(1), seed="0"), TypeError, "fz.init: seed: expected a whole number"),
    "microbatches": (lambda: fz.train_step(len, microbatches=0), ValueError, "fz.train_step: microbatches: .* got 0"),
    "accumulate": (lambda: fz.accumulate(len, 0), fz.BatchError, "fz.accumulate: n must be a whole number"),
    "train_step": (
        lambda: fz.train_step(state_of()),
        TypeError,
        "fz.train_step: loss_fn must be a function .* got State",
    ),
    "mesh": (lambda: fz.make_mesh("cpu", data=0), fz.MeshError, "fz.make_mesh: axis 'data' needs a size of at least 1"),
    # Names that there are not.
    "betas": (
        lambda: fz.adamw(1e-3, betas=(0.9, 0.99)),
        TypeError,
        "fz.adamw: there is no .* 'betas'; here it is b1, b2.",
    ),
    "learning_rate": (lambda: fz.sgd(learning_rate=1), TypeError, "fz.sgd: .* 'learning_rate'; here it is lr."),
    "momentum": (
        lambda: fz.lion(1, momentum=0.9),
        TypeError,
        "fz.lion: .* 'momentum'. b1 is the decay of the momentum",
    ),
    "nesterov": (lambda: fz.adamw(1, nesterov=True), TypeError, "fz.adamw: .* 'nesterov'. Only fz.sgd and fz.muon"),
    "amsgrad": (lambda: fz.adamw(1, amsgrad=True), TypeError, "fz.adamw: .* 'amsgrad'. There is no such variant"),
    "max_norm": (lambda: fz.clip_by_global_norm(max_norm=1), TypeError, "fz.clip_by_global_norm: .* here it is limit."),
    "params": (
        lambda: fz.adamw(params=MODEL.parameters()),
        TypeError,
        "fz.adamw: .* 'params'. An optimizer here is giv",
    ),
    "parameters": (
        lambda: fz.adamw(MODEL.parameters(), lr=1e-3),
        TypeError,
        r"fz.adamw: multiple values for argument 'lr'. .* fz.init\(model, fz.adamw\(3e-4\)\)",
    ),
    "a typing error": (lambda: fz.adamw(1, wieght_decay=1), TypeError, "fz.adamw: .* Did you mean 'weight_decay'?"),
    "nothing": (lambda: fz.adamw(), TypeError, r"fz.adamw: missing a required argument: 'lr'. It takes \(lr, b1=0.9"),
    "T_max": (lambda: S.warmup_cosine(1, T_max=5), TypeError, "fz.schedules.warmup_cosine: .* here it is total."),
    "zero, axes": (lambda: fz.zero(3, axes="data"), TypeError, "fz.zero: .* 'axes'. Did you mean 'axis'?"),
    "init, dtype": (lambda: fz.init({}, fz.sgd(1), dtype="bf16"), TypeError, "fz.init: .* 'dtype'; here it is policy"),
    "init, stage": (
        lambda: fz.init({}, fz.sgd(1), stage=3),
        TypeError,
        r"fz.init: .* here it is layout=fz.zero\(stage\)",
    ),
}


@pytest.mark.parametrize(("call", "error", "text"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_argument_is_told_at_once(call: Callable[[], Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error) as caught:
        call()
    assert re.match(text, str(caught.value), re.DOTALL), str(caught.value)


RIGHT: dict[str, Callable[[], Any]] = {
    "a rate of zero": lambda: fz.adamw(0),
    "of numpy": lambda: fz.adamw(np.float32(1e-3), b1=np.float64(0.9)),
    "a tensor": lambda: fz.adamw(torch.tensor(1e-3)),
    "a function": lambda: fz.adamw(lambda step: step * 1e-3),
    "a limit that is none": lambda: fz.clip_by_global_norm(float("inf")),
    "a run of 1e4 steps": lambda: S.wsd(1e-3, 1e3, 1e3, 1e4),
    "a warm-up alone": lambda: S.warmup_cosine(1e-3, 10, 10),
    "the largest seed": lambda: fz.init({}, fz.sgd(1), fz.make_mesh("cpu"), seed=2**32 - 1),
    "a negative seed": lambda: fz.init({}, fz.sgd(1), fz.make_mesh("cpu"), seed=-1),
    "a seed of numpy": lambda: fz.init({}, fz.sgd(1), fz.make_mesh("cpu"), seed=np.int64(3)),
    "momentum for ever": lambda: fz.sgd(0.1, momentum=1),
}


@pytest.mark.parametrize("call", RIGHT.values(), ids=RIGHT.keys())
def test_what_is_right_is_taken(call: Callable[[], Any]) -> None:
    call()


# Optimizers that were told of leaves by name, and say something of `tests.small.parameters()` that is not so.
TREE = fz.tree.map(lambda x: True, small.parameters())
BY_NAME: dict[str, tuple[Callable[[], fz.Optimizer], type[Exception], str]] = {
    "a mask of a leaf that there is not": (
        lambda: fz.adamw(1, mask={**TREE, "haed": True}),
        fz.TreeError,
        "fz.adamw: mask has 'haed', and no leaf has this path. Did you mean 'head'?",
    ),
    "a mask without a leaf": (
        lambda: fz.chain(fz.clip_by_global_norm(1), fz.lion(1, mask={k: v for k, v in TREE.items() if k != "head"})),
        fz.TreeError,
        "fz.lion: mask has nothing at 'head'",
    ),
    "a mask that is true for nothing": (
        lambda: fz.adamw(1, mask=lambda path: path.endswith(".wieght")),
        ValueError,
        "the mask of the optimizer is true for no leaf, so none of the leaves would decay, and weight_decay is 0.01",
    ),
    "a choice of matrices": (
        lambda: fz.muon(1, matrix={**TREE, "heads": False}),
        fz.TreeError,
        "fz.muon: matrix has 'heads', .* Did you mean 'head'",
    ),
    "a label without an optimizer": (
        lambda: fz.partition_by(lambda path: "trian", {"train": fz.sgd(1)}),
        ValueError,
        r"leaf 'block.bias' has the label 'trian', and there are optimizers for \['train'\]. Did you mean 'train'?",
    ),
    "an optimizer without a label": (
        lambda: fz.partition_by(lambda path: "train", {"train": fz.sgd(1), "decay": fz.adamw(1)}),
        ValueError,
        r"an optimizer for 'decay', and no leaf has this label; leaves have \['train'\]",
    ),
    "labels of a leaf that there is not": (
        lambda: fz.partition_by(fz.tree.map(lambda x: "t", {**TREE, "scael": True}), {"t": fz.sgd(1)}),
        fz.TreeError,
        "fz.partition_by: the tree of labels has 'scael', and no leaf has this path. Did you mean 'scale'?",
    ),
    "a mask in a group": (
        lambda: fz.partition_by(lambda path: "t", {"t": fz.adamw(1, mask={**TREE, "haed": True})}),
        fz.TreeError,
        "fz.adamw: mask has 'haed'",
    ),
}


@pytest.mark.parametrize(("make", "error", "text"), BY_NAME.values(), ids=BY_NAME.keys())
def test_a_name_that_fits_no_leaf_is_told_by_init(make: Any, error: type[Exception], text: str) -> None:
    optimizer = make()
    with pytest.raises(error, match=text):
        fz.init(small.parameters(), optimizer, fz.make_mesh("cpu"), policy="fp32")


NAMED: dict[str, fz.Optimizer] = {
    "a frozen group that is empty": fz.partition_by(lambda path: "t", {"t": fz.sgd(1), "f": None}),
    "a mask of all leaves in a group": fz.partition_by(
        lambda path: "m" if path == "head" else "o", {"m": fz.adamw(1, mask=TREE), "o": fz.lion(1, mask=TREE)}
    ),
    "a mask that is true in another group": fz.partition_by(
        lambda path: path, {path: fz.adamw(1, mask=lambda p: p == "head") for path in small.flat(small.parameters())}
    ),
    "groups in groups": fz.partition_by(
        lambda path: path == "head",
        {True: fz.sgd(1), False: fz.partition_by(lambda p: p, {p: fz.sgd(1) for p in small.flat(small.parameters())})},
    ),
    "no decay": fz.adamw(1, weight_decay=0, mask=lambda path: False),
}


@pytest.mark.parametrize("optimizer", NAMED.values(), ids=NAMED.keys())
def test_names_that_fit_are_taken(optimizer: fz.Optimizer) -> None:
    fz.init(small.parameters(), optimizer, fz.make_mesh("cpu"), policy="fp32")


def state_of() -> fz.State:
    return fz.init({"w": torch.ones(2)}, fz.sgd(0.5), fz.make_mesh("cpu"), policy="fp32")


STEPS: dict[str, tuple[Callable[[fz.State], tuple[Any, Any]], str]] = {
    "parameters": (lambda s: ({"w": torch.ones(2)}, torch.ones(2)), r"got a dict .*fz\.init\(params, optimizer\)"),
    "a Sharded": (lambda s: (s.params, torch.ones(2)), "got a Sharded .*Pass the State itself"),
    "turned round": (lambda s: (torch.ones(2), s), r"got a float32\(2,\) and a State.*The state comes first"),
    "a module": (lambda s: (MODEL, torch.ones(2)), "got a Linear"),
}


@pytest.mark.parametrize(("arguments", "text"), STEPS.values(), ids=STEPS.keys())
def test_a_step_that_is_given_no_state_says_what_came(arguments: Any, text: str) -> None:
    state = state_of()
    step = fz.train_step(lambda params, batch: (params["w"] * batch).sum())
    with pytest.raises(TypeError, match=rf"fz\.train_step: the step takes \(state, batch\).*{text}"):
        step(*arguments(state))
    assert fz.gather(state.params)["w"].tolist() == [1, 1], "and the state is there"


def test_numbers_say_their_range() -> None:
    assert number("f", "x", 1, above=0, most=1) == 1 and whole("f", "n", 1e4, least=1) == 1e4
    with pytest.raises(ValueError, match=r"f: x: expected a number above 0 and at most 1, got 0\."):
        number("f", "x", 0, above=0, most=1)
    with pytest.raises(ValueError, match=r"f: x: expected a finite number, got inf\."):
        number("f", "x", float("inf"))


def wrong_mask() -> None:
    fz.init(small.parameters(), fz.adamw(1, mask={**TREE, "haed": True}), fz.make_mesh("cpu"), policy="fp32")


def test_every_rank_tells() -> None:
    world.raises(fz.TreeError, wrong_mask, size=2, match="no leaf has this path")
