"""Which tensors can be parameters: every dtype is trained, kept as it is, or refused with a way out that works."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fzero as fz
from tests import small, world
from tests.small import flat

TRAINED = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
KEPT = (
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
    torch.uint16, torch.uint32, torch.uint64,
)  # fmt: skip
COMPLEX = (torch.complex64, torch.complex128, torch.complex32)
NARROW = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)


def leaf_of(dtype: torch.dtype, numel: int = 101) -> Tensor:
    return (torch.arange(numel) % 2).to(dtype)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def after_a_step(policy: str, stage: int) -> dict[str, tuple[torch.dtype, Tensor]]:
    """A leaf of every dtype that is trained or kept, and one of nothing, after a step of gradients of one.

    Values are told in float64: pickles of unsigned ones do not load.
    """
    params = {name_of(dtype): leaf_of(dtype) for dtype in (*TRAINED, *KEPT)}
    params["empty"], params["empty rows"] = torch.zeros(0), torch.zeros(3, 0)
    state = fz.init(params, fz.sgd(0.5), fz.make_mesh("cpu"), fz.zero(stage), policy=policy)

    def total(p: dict[str, Tensor]) -> Tensor:
        return torch.stack([x.float().sum() for x in fz.tree.leaves(p) if x.is_floating_point()]).sum()

    state, metrics = fz.train_step(lambda p, _: total(p))(state, torch.zeros(1))
    assert bool(metrics["finite"])
    return {path: (x.dtype, x.double()) for path, x in flat(fz.gather(state.params)).items()}


@pytest.mark.parametrize(
    ("size", "stage", "policy"),
    [
        (1, 3, "fp32"),
        (1, 3, "bf16-exact"),
        (2, 3, "bf16"),
        (2, 1, "mixed"),
        pytest.param(4, 3, "bf16-exact", marks=pytest.mark.slow),
    ],
)
def test_floats_are_trained_as_the_policy_stores_them_and_integers_kept(size: int, stage: int, policy: str) -> None:
    for found in world.run(after_a_step, policy, stage, size=size):
        for dtype in TRAINED:
            stored, leaf = found[name_of(dtype)]
            assert stored == fz.policy(policy).stored and torch.equal(leaf, leaf_of(torch.float64) - 0.5)
        for dtype in KEPT:
            stored, leaf = found[name_of(dtype)]
            assert stored == dtype and torch.equal(leaf, leaf_of(torch.float64)), dtype
        assert found["empty"][1].shape == (0,) and found["empty rows"][1].shape == (3, 0)


REFUSED: dict[str, tuple[Callable[[], Tensor], str]] = {
    **{
        name_of(dtype): (partial(leaf_of, dtype), rf"{name_of(dtype)}\(101,\), and parameters are real")
        for dtype in COMPLEX[:2]
    },
    **{
        name_of(dtype): (
            partial(leaf_of, dtype),
            rf"{name_of(dtype)}\(101,\), and .*\.to\(torch\.bfloat16\)",
        )
        for dtype in NARROW
    },
    "sparse": (lambda: torch.eye(20).to_sparse(), r"of layout sparse_coo, .*\.to_dense\(\)"),
    "quantized": (lambda: quantized(torch.ones(20)), r"quantized, .*\.dequantize\(\)"),
    "nested": (lambda: nested(torch.ones(2), torch.ones(3)), r"nested, .*\.to_padded_tensor"),
}


def quantized(x: Tensor) -> Tensor:
    return torch.quantize_per_tensor(x, 0.1, 0, torch.qint8)


def nested(*rows: Tensor) -> Tensor:
    return torch.nested.nested_tensor(list(rows))


@pytest.mark.filterwarnings("ignore:.*prototype:UserWarning", "ignore:.*deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*quantiz.*:UserWarning")
@pytest.mark.parametrize(("make", "why"), REFUSED.values(), ids=REFUSED.keys())
def test_what_no_optimizer_updates_is_refused_by_its_path(make: Callable[[], Tensor], why: str) -> None:
    with pytest.raises(fz.LayoutError, match=rf"fz\.init: leaf 'block\.w' is {why}"):
        fz.init({"block": {"w": make()}}, fz.sgd(0.1), fz.make_mesh("cpu"), policy="fp32")


class Spectral(nn.Module):
    """Weights of a layer on frequencies."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, 5, dtype=torch.complex64))


@pytest.mark.parametrize("make", [Spectral, lambda: Spectral()], ids=["factory", "function"])
@pytest.mark.parametrize("simulate", [False, True])
def test_a_factory_of_complex_parameters_is_refused_before_it_is_built(make: Any, simulate: bool) -> None:
    with pytest.raises(fz.LayoutError, match=r"fz\.init: leaf 'weight' is complex64\(3, 5\)"):
        fz.init(make, fz.sgd(0.1), fz.make_mesh("cpu", simulate=simulate))


def test_an_optimizer_makes_no_state_for_a_complex_leaf() -> None:
    with pytest.raises(fz.LayoutError, match=r"AdamW: leaf 'w' is complex64"):
        fz.adamw(0.1).init({"w": torch.ones(3, dtype=torch.complex64)})


# ---------------------------------------------------------------------------------------------------------
# The way out: real and imaginary parts


OPTIMIZERS: dict[str, tuple[fz.Optimizer, Callable[..., torch.optim.Optimizer]]] = {
    "adamw": (fz.adamw(0.1, weight_decay=0.1), lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.1)),
    "sgd": (fz.sgd(0.1, momentum=0.9), lambda p: torch.optim.SGD(p, 0.1, momentum=0.9)),
    "clip": (fz.chain(fz.clip_by_global_norm(1.0), fz.sgd(0.1)), lambda p: torch.optim.SGD(p, 0.1)),
}


def weights() -> Tensor:
    return torch.randn(7, 9, dtype=torch.complex64, generator=torch.Generator().manual_seed(0))


def bent(w: Tensor) -> Tensor:
    return (w * (1 + 2j) + 3).abs().square().sum()


def trained(name: str, stage: int, jit: bool) -> tuple[Tensor, Tensor]:
    """The parameter after three steps, and the norm of the last gradient."""
    params = {"w": torch.view_as_real(weights())}
    state = fz.init(params, OPTIMIZERS[name][0], fz.make_mesh("cpu"), fz.zero(stage), policy="fp32")

    def step(state: fz.State) -> Any:
        grads = fz.grad(lambda p: bent(torch.view_as_complex(p["w"].float())))(state)
        return fz.apply_gradients(state, grads)

    run = fz.jit(step, donate=0) if jit else step
    for _ in range(3):
        state, info = run(state)
    return torch.view_as_complex(fz.gather(state.params)["w"]), info["grad_norm"]


@pytest.mark.parametrize(
    ("size", "stage", "name"),
    [(1, 3, "adamw"), (2, 3, "sgd"), (2, 1, "clip"), pytest.param(4, 3, "adamw", marks=pytest.mark.slow)],
)
def test_parts_are_trained_as_torch_trains_a_complex_leaf(size: int, stage: int, name: str) -> None:
    weight = nn.Parameter(weights())
    optimizer = OPTIMIZERS[name][1]([weight])
    for _ in range(3):
        optimizer.zero_grad()
        bent(weight).backward()
        assert weight.grad is not None
        norm = weight.grad.abs().square().sum().sqrt()
        if name == "clip":
            weight.grad.mul_(1 / (norm + 1e-6))
        optimizer.step()
    alone = trained(name, stage, jit=False)
    for got in world.run(trained, name, stage, jit=True, size=size):
        if name != "clip":  # a norm is summed piece by piece
            small.assert_same_bits(torch.view_as_real(got[0]), torch.view_as_real(alone[0]))
        torch.testing.assert_close(got[0], weight.detach(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(got[1], norm, rtol=1e-5, atol=0)


# ---------------------------------------------------------------------------------------------------------
# A complex leaf as data


def as_data(policy: fz.Policy | None, stage: int) -> dict[str, Tensor]:
    mesh = fz.make_mesh("cpu")
    params = fz.shard({"w": weights()}, mesh, fz.zero(stage), policy=policy)
    grads = fz.grad(lambda p: bent(p["w"]))(params)
    _, many = fz.accumulate(fz.value_and_grad(lambda p, x: bent(p["w"]) * x.mean()), 2)(params, torch.ones(2))
    return {
        "gradient": fz.gather(grads)["w"],
        "accumulated": fz.gather(many)["w"],
        "norm": fz.norm(grads),
        "dot": fz.dot(params, grads),
        "sum": fz.gather(fz.add(params, grads, -0.5))["w"],
        "multiple": fz.gather(fz.scale(params, 0.5, dtype=torch.float32))["w"],
        "average": fz.gather(fz.ema(fz.ema(None, params, 0.5), fz.scale(params, 3.0), 0.5))["w"],
        "like": fz.gather(fz.like(grads, params))["w"],
    }


@pytest.mark.parametrize(
    ("size", "stage", "policy"), [(1, 3, None), (1, 1, "bf16"), (2, 3, "mixed"), (2, 1, None), (4, 3, "bf16")]
)
def test_arithmetic_of_a_complex_leaf_is_that_of_its_parts(size: int, stage: int, policy: str | None) -> None:
    w = weights()
    gradient = torch.func.grad(bent)(w)
    parts = torch.view_as_real(w), torch.view_as_real(gradient)
    expected = {
        "gradient": gradient,
        "accumulated": gradient,
        "norm": parts[1].norm(),
        "dot": (parts[0] * parts[1]).sum(),
        "sum": w - 0.5 * gradient,
        "multiple": 0.5 * w,
        "average": 2 * w,
        "like": gradient,
    }
    for found in world.run(as_data, None if policy is None else fz.policy(policy), stage, size=size):
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5)


def test_no_random_direction_is_half_of_one() -> None:
    with pytest.raises(TypeError, match=r"fz\.random_like: leaf 'w' is torch\.complex64"):
        fz.random_like(fz.shard({"w": weights()}, fz.make_mesh("cpu"), fz.zero(3)), 0)
