"""What a state takes instead of its own: what fits works on, what does not is refused with a way out that works."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import fzero as fz
from fzero.optim.transforms import GradientTransform
from tests import small, world
from tests.small import assert_same_bits, gradient_of


def frozen_but(trained: str) -> fz.Optimizer:
    return fz.partition_by(lambda path: "t" if path in trained else "f", {"t": fz.adamw(1e-2), "f": None})


@dataclass(frozen=True)
class Counts(GradientTransform):
    """A transform with a state of one tensor."""

    def init(self, params: Any) -> Tensor:
        return torch.zeros(())

    def update(self, grads: Any, state: Tensor, params: Any) -> tuple[Any, Tensor]:
        return grads, state + 1


@dataclass(frozen=True)
class Doubles(Counts):
    """Another, whose state looks the same."""


def state_of(optimizer: fz.Optimizer, policy: str = "fp32", stage: int = 3) -> fz.State:
    """A state after one step, at step 7 of another seed."""
    state = fz.init(small.parameters(), optimizer, fz.make_mesh("cpu"), fz.zero(stage), policy=policy, seed=3)
    state = fz.apply_gradients(state, gradient_of(state, small.parameters(1)))[0]
    return state.replace(step=small.int32(7))


ADAMW, SGDM = fz.adamw(1e-2), fz.sgd(0.1, momentum=0.9)
CLIP = fz.clip_by_global_norm(1.0)

FITS: dict[str, tuple[fz.Optimizer, fz.Optimizer]] = {
    "another rate, decay, mask": (ADAMW, fz.adamw(1e-3, weight_decay=0.0, mask=lambda path: path == "head")),
    "a schedule": (ADAMW, fz.adamw(fz.schedules.linear(1e-2, 0.0, 10))),
    "adam": (ADAMW, fz.adam(1e-3)),
    "a clip more": (ADAMW, fz.chain(CLIP, fz.adamw(1e-3))),
    "a clip less": (fz.chain(CLIP, ADAMW), ADAMW),
    "a clip beside one that counts": (fz.chain(Counts(), ADAMW), fz.chain(CLIP, Counts(), ADAMW)),
    "chains in one another": (fz.chain(Counts(), CLIP, SGDM), fz.chain(Counts(), fz.chain(CLIP, SGDM))),
    "a clip in a group": (
        fz.partition_by(lambda path: path[0], {"b": ADAMW, "h": SGDM, "s": None}),
        fz.partition_by(lambda path: path[0], {"s": None, "h": fz.chain(CLIP, SGDM), "b": fz.adamw(1e-3)}),
    ),
    "muon": (fz.muon(1e-2), fz.muon(1e-3, weight_decay=0.1)),
    "adafactor": (fz.adafactor(1e-2), fz.adafactor(1e-3)),
    "nothing to keep": (fz.sgd(0.1), fz.chain(CLIP, fz.sgd(0.2))),
    "another momentum": (SGDM, fz.sgd(0.1, momentum=0.5, nesterov=True)),
}

REFUSED: dict[str, tuple[fz.Optimizer, fz.Optimizer, str]] = {
    "another leaf of equal shape": (frozen_but("head"), frozen_but("scale"), r"t: AdamW: 0\.head: expected nothing"),
    "one leaf less": (ADAMW, frozen_but("head"), "holds the state of AdamW, and the optimizer keeps .* t: AdamW"),
    "another kind": (ADAMW, fz.lion(1e-3), "holds the state of AdamW, and the optimizer keeps the state of Lion"),
    "momentum of nothing": (fz.sgd(0.1), SGDM, "holds nothing, and the optimizer keeps the state of SGD"),
    "no momentum": (SGDM, fz.sgd(0.1), "keeps nothing"),
    "a clip that remembers": (ADAMW, fz.chain(fz.clip_by_last_norm(1.0), ADAMW), "ClipByLastNorm"),
    "a transform of another meaning": (fz.chain(Counts(), ADAMW), fz.chain(Doubles(), ADAMW), "Doubles"),
    "muon with other matrices": (
        fz.muon(1e-2),
        fz.muon(1e-2, matrix=lambda path: False),
        "others: AdamW",
    ),
}


# Every pair under fp32; under the others one that is nested, and one that is not.
CASES = [(name, "fp32") for name in FITS] + [
    (name, policy) for name in ("a clip in a group", "muon") for policy in ("bf16-exact", "bf16-8bit", "fp16")
]


@pytest.mark.parametrize(
    ("old", "new", "policy"), [(*FITS[name], policy) for name, policy in CASES], ids=["-".join(case) for case in CASES]
)
def test_what_fits_keeps_every_bit_and_goes_on(old: fz.Optimizer, new: fz.Optimizer, policy: str) -> None:
    state = state_of(old, policy)
    changed = state.replace(optimizer=new)
    assert changed.optimizer is new and fz.tree.structure(changed.moments) == fz.tree.structure(new.init(state.params))
    # What a path ends in is the leaf; before it stands what the optimizer calls its parts.
    before, after = (
        sorted((path.rpartition(".")[2].strip("012"), x.tolist()) for path, x in small.flat(s.moments).items())
        for s in (state, changed)
    )
    assert before == after
    fz.apply_gradients(changed, gradient_of(changed, small.parameters(2)))


@pytest.mark.parametrize(("old", "new", "why"), REFUSED.values(), ids=REFUSED.keys())
def test_what_does_not_fit_is_refused_and_the_way_out_works(old: fz.Optimizer, new: fz.Optimizer, why: str) -> None:
    state = state_of(old)
    with pytest.raises(fz.TreeError, match=r"fz\.State\.replace: the moments are not those") as caught:
        state.replace(optimizer=new)
    assert re.search(why, str(caught.value)), str(caught.value)
    other = way_out(caught.value, state, optimizer=new)
    assert other.optimizer is new and (other.step, other.seed) == (7, 3)
    assert_same_bits(other.params, state.params)
    anew = state.replace(optimizer=new, moments=new.init(state.params))
    assert_same_bits(anew, other)


def way_out(error: Exception, state: fz.State, **names: Any) -> Any:
    """Do what a message says."""
    found = re.search(r"(fz\.init\(.*\))\.$", str(error))
    assert found, str(error)
    return eval(found[1], {"fz": fz, "state": state, **names})


def test_a_leaf_of_equal_shape_that_trains_instead_starts_with_moments_of_its_own() -> None:
    params = {"a": torch.ones(4), "b": torch.ones(4)}
    state = fz.init(params, frozen_but("a"), fz.make_mesh("cpu"), policy="fp32")
    with pytest.raises(fz.TreeError, match=r"0\.b: expected float32\(4,\), got nothing"):
        state.replace(optimizer=frozen_but("b"))


@pytest.mark.parametrize("policy", ["fp32", "bf16-exact", "fp16-mixed"])
def test_another_optimizer_takes_the_exact_parameters_over(policy: str) -> None:
    state = state_of(ADAMW, policy)
    with pytest.raises(fz.TreeError) as caught:
        state.replace(optimizer=fz.lion(1e-3))
    other = way_out(caught.value, state, optimizer=fz.lion(1e-3))
    assert_same_bits(fz.ema(None, other, 0.0), fz.ema(None, state, 0.0))
    if state.loss_scale is not None:
        assert (other.loss_scale, other.streak) == (state.loss_scale, state.streak)


STORED: dict[str, tuple[str, Any, type[Exception]]] = {
    "policy": ("policy", fz.policy("bf16"), fz.PolicyError),
    "layout": ("layout", fz.zero(1), fz.LayoutError),
    "mesh": ("mesh", fz.make_mesh("cpu", data=2, simulate=True), fz.LayoutError),
}


@pytest.mark.parametrize(("name", "value", "error"), STORED.values(), ids=STORED.keys())
def test_a_word_does_not_convert_a_state(name: str, value: Any, error: type[Exception]) -> None:
    state = state_of(ADAMW)
    with pytest.raises(error, match=f"stored as another {name} says") as caught:
        state.replace(**{name: value})
    if name != "mesh":
        other = way_out(caught.value, state, **{name: value})
        assert getattr(other, name) == value and other.step == 7
        small.assert_same_bits(fz.gather(fz.ema(None, other, 0.0)), rounded(fz.gather(state.params), other))
    assert getattr(state.replace(**{name: getattr(state, name)}), name) == getattr(state, name)


def rounded(params: Any, state: fz.State) -> Any:
    return fz.tree.map(lambda x: x.to(state.policy.stored).float(), params)


def test_a_state_cannot_say_two_things() -> None:
    state = state_of(ADAMW, "bf16", 1)
    assert state.policy is state.params.policy and state.layout is state.params.layout
    mapped = fz.tree.map(lambda x: x + 0, state)
    assert (mapped.policy, mapped.layout, mapped.optimizer) == (state.policy, state.layout, state.optimizer)


PARAMS: dict[str, tuple[Callable[[fz.State], Any], type[Exception], str]] = {
    "full tensors": (lambda s: fz.gather(s.params), TypeError, "expected a Sharded .*, got dict"),
    "a gradient": (
        lambda s: gradient_of(s, small.parameters()),
        fz.LayoutError,
        r"fz\.like\(gradient, state\.params\)",
    ),
    "another layout": (
        lambda s: fz.init(small.parameters(), ADAMW, s.mesh, fz.zero(0), policy="fp32").params,
        fz.LayoutError,
        "the layout of the state's own",
    ),
    "another policy": (
        lambda s: fz.init(small.parameters(), ADAMW, s.mesh, policy="mixed").params,
        fz.PolicyError,
        "the policy of the state's own",
    ),
    "another dtype": (
        lambda s: fz.tree.map(lambda x: x.bfloat16(), s.params),
        fz.TreeError,
        r"head: expected float32\(70,\) of a leaf \(70,\), got bfloat16",
    ),
    "one leaf less": (
        lambda s: s.params.replace(pieces=(None, *s.params.pieces[1:])),
        fz.TreeError,
        r"block\.bias: expected float32\(7,\) of a leaf \(7,\), got None",
    ),
    "other leaves": (
        lambda s: fz.init({"w": torch.ones(3)}, ADAMW, s.mesh, policy="fp32").params,
        fz.TreeError,
        "w: expected nothing, got",
    ),
}


@pytest.mark.parametrize(("make", "error", "why"), PARAMS.values(), ids=PARAMS.keys())
def test_other_parameters_are_refused(make: Callable[[fz.State], Any], error: type[Exception], why: str) -> None:
    state = state_of(ADAMW)
    with pytest.raises(error, match=why):
        state.replace(params=make(state))


def test_parameters_like_the_old_ones_fit_also_inside_transforms() -> None:
    state = state_of(ADAMW)
    doubled = fz.scale(state.params, 2.0)
    assert state.replace(params=doubled).params is doubled
    inside = fz.jit(lambda s, x: s.replace(params=fz.add(s.params, x), optimizer=fz.chain(CLIP, ADAMW)))
    assert_same_bits(inside(state, state.params).params, doubled)
    assert "meta" not in inside.programs[0].text(), "what is compared leaves nothing in the program"


SCALARS: dict[str, tuple[str, Any, type[Exception], str]] = {
    "step, a number": ("step", 7, TypeError, r"expected a tensor int32\(\), got 7. Pass torch.tensor\(7, dtype=torch"),
    "step, another dtype": ("step", torch.tensor(7), fz.ShapeError, r"got int64\(\)"),
    "seed, a vector": ("seed", torch.zeros(2, dtype=torch.int32), fz.ShapeError, r"got int32\(2,\)"),
    "loss_scale, half": ("loss_scale", torch.tensor(8.0).half(), fz.ShapeError, r"expected a tensor float32\(\)"),
    "loss_scale, none": ("loss_scale", None, TypeError, "got None"),
    "polcy": ("polcy", 1, TypeError, "no attribute 'polcy'. Did you mean 'policy'?"),
    "optimizer": ("optimizer", torch.optim.SGD, TypeError, "must be an fz optimizer"),
    "moments": ("moments", (), fz.TreeError, "0.block.bias: expected float32"),
}


@pytest.mark.parametrize(("name", "value", "error", "why"), SCALARS.values(), ids=SCALARS.keys())
def test_other_counters_and_other_names_are_refused(name: str, value: Any, error: type[Exception], why: str) -> None:
    with pytest.raises(error, match=why):
        state_of(ADAMW, "fp16").replace(**{name: value})


def test_a_policy_without_a_loss_scale_takes_none() -> None:
    with pytest.raises(fz.PolicyError, match="has no loss scale"):
        state_of(ADAMW).replace(loss_scale=torch.tensor(1.0))


def test_members_of_an_ensemble_change_their_optimizer_together() -> None:
    members = [state_of(ADAMW) for _ in range(2)]
    ensemble = fz.tree.map(lambda *leaves: torch.stack(leaves), *members)
    changed = ensemble.replace(optimizer=fz.chain(CLIP, ADAMW))
    assert_same_bits(fz.tree.map(lambda x: x[0], changed), members[0].replace(optimizer=fz.chain(CLIP, ADAMW)))


def replaced_on_ranks(stage: int, policy: str) -> list[bool]:
    state = state_of(ADAMW, policy, stage)
    changed = state.replace(optimizer=fz.chain(CLIP, fz.adamw(1e-3)))
    with pytest.raises(fz.TreeError):
        state.replace(optimizer=frozen_but("head"))
    pairs = zip(fz.tree.leaves(state.moments), fz.tree.leaves(changed.moments), strict=True)
    return [a is b for a, b in pairs]


@pytest.mark.parametrize(("size", "stage", "policy"), [(2, 1, "bf16-exact"), (2, 3, "fp32"), (4, 3, "bf16-8bit")])
def test_pieces_fit_as_leaves_do(size: int, stage: int, policy: str) -> None:
    assert all(all(same) and same for same in world.run(replaced_on_ranks, stage, policy, size=size))
